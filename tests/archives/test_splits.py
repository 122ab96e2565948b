"""Splits by group."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomed_mae.archives.index import Row
from geomed_mae.archives.splits import split_by_group
from geomed_mae.errors import ConfigError


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
    with pytest.raises(ConfigError, match=r"1 patient or scene cannot be split; .*labels.block_px"):
        split_by_group(rows(["a", "a"]), 0.25, seed=0)
