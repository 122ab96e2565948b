"""Draws of groups and images: nested, balanced, and the same for the same seed."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest

from geomed_mae.errors import ConfigError
from geomed_mae.training.draws import by_group, first_groups, first_images, held_groups

COUNTS = (1, 2, 4, 8, 16, 30)


@dataclass(frozen=True)
class Image:
    """As much of a Row as draws look at."""

    key: int
    group: str


def plain(count: int, classes: frozenset[int] = frozenset({0, 1})) -> dict[str, frozenset[int]]:
    return {f"g{number}": classes for number in range(count)}


def single(labels: list[int]) -> list:
    return [(Image(number, f"g{number}"), np.int16(label)) for number, label in enumerate(labels)]


def many(rows: list[list[int]]) -> list:
    return [(Image(number, f"g{number}"), np.array(row, np.int8)) for number, row in enumerate(rows)]


def test_few_groups_are_among_the_more_of_the_same_seed_and_others_of_another():
    drawn = {seed: [first_groups(plain(30), count, seed) for count in COUNTS] for seed in range(5)}
    for sets in drawn.values():
        assert [len(found) for found in sets] == list(COUNTS)
        assert all(few <= more for few, more in itertools.pairwise(sets))
    assert len({sets[2] for sets in drawn.values()}) == 5


def test_a_class_that_one_group_alone_has_is_in_the_first_two_groups_drawn():
    groups = {**plain(30, frozenset({0})), "rare": frozenset({0, 1, 2})}
    assert all("rare" in first_groups(groups, 2, seed) for seed in range(20))
    assert any("rare" not in first_groups(plain(30) | {"rare": frozenset({0, 1})}, 2, seed) for seed in range(20))


def test_every_group_is_drawn_as_often_as_any_other():
    times = np.zeros(10)
    for seed in range(1000):
        for name in first_groups(plain(10), 3, seed):
            times[int(name[1:])] += 1
    assert times.sum() == 3000 and abs(times - 300).max() < 4 * np.sqrt(1000 * 0.3 * 0.7)


def test_held_groups_are_the_share_and_as_large_a_share_of_each_mixture():
    groups = {f"a{n}": frozenset({0}) for n in range(80)} | {f"b{n}": frozenset({0, 1}) for n in range(8)}
    for seed in range(20):
        held = held_groups(groups, 0.25, seed)
        assert len(held) == 22 and sum(name.startswith("b") for name in held) == 2


@pytest.mark.parametrize(("count", "share", "expected"), [(2, 0.01, 1), (2, 0.99, 1), (10, 0.25, 2), (3, 0.9, 2)])
def test_one_group_at_least_is_on_each_side(count, share, expected):
    assert {len(held_groups(plain(count), share, seed)) for seed in range(10)} == {expected}


def test_a_single_group_cannot_be_held_out():
    with pytest.raises(ConfigError, match="1 patient or scene, which cannot be held out and trained on"):
        held_groups(plain(1), 0.5, 0)


def test_shots_are_images_of_each_class_and_nested():
    targets = single([0] * 40 + [1] * 10 + [2] * 5)
    for seed in range(5):
        sets = [first_images(targets, 3, count, seed, multi_label=False) for count in (1, 3, 5)]
        for count, found in zip((1, 3, 5), sets, strict=True):
            assert np.bincount([int(label) for _, label in found]).tolist() == [count] * 3
        keys = [{row.key for row, _ in found} for found in sets]
        assert keys[0] < keys[1] < keys[2]


def test_multi_label_shots_hold_so_many_of_each_class_or_all_there_are_and_images_without_any():
    rng = np.random.default_rng(0)
    rows = (rng.random((200, 4)) < (0.4, 0.1, 0.02, 0.3)).astype(int)
    targets = many(rows.tolist())
    for seed in range(5):
        sets = [first_images(targets, 4, count, seed, multi_label=True) for count in (2, 8, 16)]
        for count, found in zip((2, 8, 16), sets, strict=True):
            have = np.stack([target for _, target in found])
            assert ((have == 1).sum(axis=0) >= np.minimum(count, rows.sum(axis=0))).all()
            assert (have.max(axis=1) == 0).sum() >= count
        keys = [{row.key for row, _ in found} for found in sets]
        assert keys[0] < keys[1] < keys[2]


def test_what_is_drawn_does_not_depend_on_how_groups_are_called():
    other = {name.replace("g", "salted"): classes for name, classes in plain(30).items()}
    assert {name.replace("salted", "g") for name in first_groups(other, 7, 3)} == first_groups(plain(30), 7, 3)
    assert {name.replace("salted", "g") for name in held_groups(other, 0.3, 3)} == held_groups(plain(30), 0.3, 3)


def test_the_classes_of_a_group_are_those_of_all_its_images():
    targets = [
        (Image(0, "a"), np.array([[0, -1]])),
        (Image(1, "b"), np.array([[-1, -1]])),
        (Image(2, "a"), np.array([[2, 2]])),
    ]
    assert by_group(targets) == {"a": frozenset({0, 2}), "b": frozenset()}
    assert by_group(many([[1, 0, -1]]), multi_label=True) == {"g0": frozenset({0})}
