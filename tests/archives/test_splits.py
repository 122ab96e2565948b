"""Splits by group and by buffered spatial block."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomed_mae.archives.index import Row
from geomed_mae.archives.places import Place, distance_m
from geomed_mae.archives.splits import (
    BUFFER,
    NO_LOCATION,
    SplitRequest,
    parse_shares,
    requested,
    split_by_block,
    split_by_group,
    split_by_shares,
)
from geomed_mae.errors import ConfigError, LeakageError


def rows(groups: list[str]) -> list[Row]:
    empty = {"channels": (), "statistics": (), "flags": (), "shape": (1, 1), "spacing": None, "crs": None}
    rest = {
        "modality": "m",
        "dtype": "uint8",
        "geometry": "raster",
        "footprint": None,
        "valid_fraction": 1.0,
        "content": "",
    }
    return [Row(key=str(number), group=group, **empty, **rest) for number, group in enumerate(groups)]


@given(st.lists(st.sampled_from("abcdefgh"), min_size=1).filter(lambda g: len(set(g)) > 1), st.floats(0.01, 0.99))
def test_no_group_is_on_both_sides_and_none_is_lost(groups, fraction):
    train, held = split_by_group(rows(groups), fraction, seed=3)
    assert not {row.group for row in train} & {row.group for row in held}
    assert sorted(row.key for row in train + held) == sorted(str(number) for number in range(len(groups)))
    assert train and held


def test_the_split_does_not_depend_on_what_the_keys_are():
    first, _ = split_by_group(rows(list("abcdef")), 0.5, seed=1)
    renamed, _ = split_by_group(rows(list("uvwxyz")), 0.5, seed=1)
    assert [row.key for row in first] == [row.key for row in renamed]


def test_another_seed_gives_another_split():
    splits = {tuple(row.key for row in split_by_group(rows(list("abcdef")), 0.5, seed)[1]) for seed in range(10)}
    assert len(splits) > 3


def test_a_single_group_cannot_be_split():
    with pytest.raises(ConfigError, match=r"1 patient or scene cannot be split; add images of oth"):
        split_by_group(rows(["a", "a"]), 0.25, seed=0)


THREE = parse_shares("80,10,10")
GROUPS = SplitRequest(method="group", shares=THREE)


def tokens(of: list[Row]) -> dict[str, str]:
    """What an image holds, told by its number: the same whatever the salt of keys and groups."""
    return {row.key: f"pixels {row.content or row.key}" for row in of}


def square(lon: float, lat: float, side: float = 0.01) -> tuple[tuple[float, float], ...]:
    return ((lon, lat + side), (lon + side, lat + side), (lon + side, lat), (lon, lat))


def placed(rings: list[tuple | None]) -> list[Row]:
    made = rows([f"g{number}" for number in range(len(rings))])
    pairs = enumerate(zip(made, rings, strict=True))
    return [replace(row, footprint=ring, content=f"c{number}") for number, (row, ring) in pairs]


def scattered(count: int, seed: int = 0, span: float = 2.0) -> list[Row]:
    rng = np.random.default_rng(seed)
    return placed([square(10 + span * x, 45 + span * y) for x, y in rng.random((count, 2))])


@given(st.lists(st.sampled_from("abcdefgh"), min_size=3).filter(lambda g: len(set(g)) > 2), st.integers(0, 50))
def test_a_split_in_three_keeps_groups_whole_and_every_part_has_images(groups, seed):
    made = rows(groups)
    parts = split_by_shares(made, tokens(made), replace(GROUPS, seed=seed))
    assert list(parts) == [row.key for row in made] or set(parts) == {row.key for row in made}
    assert set(parts.values()) == {"train", "validation", "test"}
    assert all(len({parts[row.key] for row in made if row.group == group}) == 1 for group in groups)


def test_shares_hold_on_average():
    made = rows([str(number) for number in range(4000)])
    counts = Counter(split_by_shares(made, tokens(made), GROUPS).values())
    # Three standard deviations of a binomial draw.
    assert abs(counts["train"] - 3200) < 3 * 25.3
    assert abs(counts["test"] - 400) < 3 * 19


def test_neither_order_nor_salts_change_a_split():
    made = rows(list("aabbccddeeff"))
    first = split_by_shares(made, tokens(made), GROUPS)
    salted = [replace(row, key=f"x{row.key}", group=f"y{row.group}") for row in reversed(made)]
    again = split_by_shares(salted, {f"x{key}": token for key, token in tokens(made).items()}, GROUPS)
    assert again == {f"x{key}": part for key, part in first.items()}


def test_images_that_are_added_do_not_move_others():
    made = rows([str(number) for number in range(60)])
    few = split_by_shares(made[:30], tokens(made), GROUPS)
    many = split_by_shares(made, tokens(made), GROUPS)
    assert {key: many[key] for key in few} == few


def test_new_images_of_a_known_group_join_its_part():
    made = rows(list("abcabc"))
    old = split_by_shares(made[:3], tokens(made), GROUPS)
    parts = split_by_shares(made, tokens(made), GROUPS, previous=old)
    assert [parts[str(n)] for n in (3, 4, 5)] == [old[str(n)] for n in (0, 1, 2)]


def test_when_two_old_groups_turn_out_to_be_one_the_test_part_keeps_its_images_and_the_train_part_gives_up():
    made = rows(["a", "a", "b", "c"])
    old = {"0": "train", "1": "test", "2": "validation", "3": "train"}
    parts = split_by_shares(made, tokens(made), GROUPS, previous=old)
    assert parts == {"0": BUFFER, "1": "test", "2": "validation", "3": "train"}


def test_too_few_groups_for_the_parts():
    with pytest.raises(ConfigError, match=r"3 images in 2 groups .* cannot be split into 3 parts; .*by block"):
        made = rows(list("aab"))
        split_by_shares(made, tokens(made), GROUPS)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([0.0, 2_000.0, 20_000.0]), st.sampled_from([5_000.0, 40_000.0]))
def test_every_image_is_in_one_part_or_set_aside_and_parts_are_a_buffer_apart(seed, buffer_m, block_m):
    made = scattered(40, seed)
    try:
        parts = split_by_block(made, THREE, block_m=block_m, buffer_m=buffer_m, seed=seed)
    except ConfigError as error:
        assert "is empty" in str(error)
        return
    assert set(parts) == {row.key for row in made}
    assert set(parts.values()) - {BUFFER} == {"train", "validation", "test"}
    for one, other in itertools.combinations(made, 2):
        sides = {parts[one.key], parts[other.key]}
        if BUFFER not in sides and len(sides) == 2:
            assert distance_m(Place(one.footprint), Place(other.footprint)) > buffer_m


def test_only_images_near_another_part_are_set_aside_and_those_of_the_later_part_stay():
    # Two scenes 1 km apart on both sides of a block's edge, and others far away.
    made = placed([square(lon, 45.0) for lon in np.arange(10, 30, 0.0227)])
    near = split_by_block(made, THREE, block_m=10_000, buffer_m=1_500, seed=0)
    free = split_by_block(made, THREE, block_m=10_000, buffer_m=0, seed=0)
    assert BUFFER not in free.values()
    assert all(near[key] == free[key] for key, part in free.items() if part == "test")
    keys = [row.key for row in made]
    for place, key in enumerate(keys):
        around = {free[other] for other in keys[max(place - 1, 0) : place + 2]}
        if near[key] == BUFFER:
            assert len(around) > 1
        if len(around) == 1:
            assert near[key] == free[key]


def test_a_block_split_depends_on_places_alone():
    made = scattered(60)
    options = {"block_m": 20_000, "buffer_m": 1_000, "seed": 3}
    first = split_by_block(made, THREE, **options)
    salted = [replace(row, key=f"x{row.key}", group="y", content=f"z{row.content}") for row in reversed(made)]
    assert split_by_block(salted, THREE, **options) == {f"x{key}": part for key, part in first.items()}
    assert split_by_block(made, THREE, **{**options, "seed": 4}) != first


def test_images_added_near_a_stored_split_give_way_to_it():
    made = scattered(80)
    options = {"block_m": 20_000, "buffer_m": 3_000, "seed": 0}
    old = split_by_block(made[:40], THREE, **options)
    new = split_by_block(made, THREE, **options, previous=old)
    assert {key: new[key] for key, part in old.items() if part != BUFFER} == {
        key: part for key, part in old.items() if part != BUFFER
    }
    assert set(new) == {row.key for row in made}


def test_copies_in_two_blocks_are_not_in_two_parts():
    made = scattered(40)
    options = {"block_m": 20_000, "buffer_m": 0, "seed": 0}
    free = split_by_block(made, THREE, **options)
    train = next(key for key, part in free.items() if part == "train")
    test = next(key for key, part in free.items() if part == "test")
    same = [replace(row, content="copy") if row.key in (train, test) else row for row in made]
    assert split_by_block(same, THREE, **options) == {**free, train: BUFFER}
    alike = split_by_block(made, THREE, **options, twins={train: 7, test: 7})
    assert alike == {**free, train: BUFFER}


def test_the_antimeridian_and_the_poles_are_no_edges():
    ring = square(179.995, 10.0)
    wrapped = tuple((lon - 360.0, lat) for lon, lat in square(180.006, 10.0))
    made = placed(
        [ring, wrapped, *(square(lon, 10.0) for lon in range(0, 100, 5)), square(10, 89.9), square(190, 89.9)]
    )
    for seed in range(20):
        parts = split_by_block(made, THREE, block_m=1_000, buffer_m=2_000, seed=seed)
        across = {parts["0"], parts["1"]}
        assert len(across) == 1 or BUFFER in across


def test_images_without_a_place_are_leakage_unless_they_are_left_out():
    made = [*scattered(20), *placed([None])]
    made[-1] = replace(made[-1], key="lost")
    options = {"block_m": 10_000, "buffer_m": 0, "seed": 0}
    with pytest.raises(LeakageError, match=r"1 of 21 images have no place .*--exclude-unlocated.*--split group"):
        split_by_block(made, THREE, **options)
    parts = split_by_block(made, THREE, **options, exclude_unlocated=True)
    assert parts["lost"] == NO_LOCATION
    assert Counter(parts.values())[NO_LOCATION] == 1


def test_one_block_cannot_be_split():
    with pytest.raises(ConfigError, match=r"lie in 1 blocks of 500 km, .* into 3 parts; use smaller blocks"):
        split_by_block(placed([square(10, 45), square(10.1, 45)]), THREE, block_m=500_000, buffer_m=0, seed=0)


def test_a_buffer_that_swallows_a_part_is_an_error():
    with pytest.raises(ConfigError, match=r"the part 'train' is empty: .* within 900 km of another part"):
        split_by_block(scattered(30), THREE, block_m=20_000, buffer_m=900_000, seed=0)


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("80,10,10", {"train": 0.8, "validation": 0.1, "test": 0.1}),
        ("4, 1", {"train": 0.8, "test": 0.2}),
        ("fit=70%,tune=30%", {"fit": 0.7, "tune": 0.3}),
    ],
)
def test_shares_are_read_as_people_write_them(text, shares):
    assert dict(parse_shares(text)) == pytest.approx(shares)


@pytest.mark.parametrize(
    "text", ["100", "80,20,0", "a=1,a=2", "buffer=1,b=2", "80;20", "1,2,3,4", "train=80,20", "1,inf"]
)
def test_shares_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="are no shares of a split; write"):
        parse_shares(text)


NOTHING = {
    "split": None, "split_shares": None, "split_seed": None, "block_km": None, "buffer_km": None,
    "exclude_unlocated": False,
}  # fmt: skip


def test_options_become_a_request():
    assert requested(**NOTHING) is None
    asked = requested(**{**NOTHING, "split": "block", "block_km": 5.0, "split_seed": 3})
    assert asked == SplitRequest(method="block", shares=THREE, seed=3, block_m=5000.0, buffer_m=2000.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_km": 5.0}, "--block-km needs --split block"),
        ({"split": "group", "buffer_km": 0.0}, "--buffer-km needs --split block"),
        ({"split_shares": "80,20"}, "--split-shares needs --split group or --split block"),
        ({"split": "group", "exclude_unlocated": True}, "--exclude-unlocated needs --split block"),
    ],
)
def test_an_option_without_a_use_is_an_error(options, message):
    with pytest.raises(ConfigError, match=message):
        requested(**{**NOTHING, **options})
