"""Which patients, scenes or images are drawn: for the parts of a task, and for few labels.

Everything is a pure function of the targets in the order of their pixels and of a seed, so that a draw is the same
whenever and wherever an archive is scanned. Few labels are nested: with one seed the four are among the sixteen, so
that a curve over the number of labels is a curve over labels and not over luck.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE

Target = tuple[Row, np.ndarray]
"""An image and what is known of it.

segment: int16 class numbers of the image's spatial shape, IGNORE where unknown. classify: int16 () a class number; int8
(classes,) 1, 0 or UNKNOWN where labels are multi-label.
"""

PURPOSE_SPLIT, PURPOSE_GROUPS, PURPOSE_IMAGES = 1, 2, 3
"""Streams of one seed, so that a split says nothing about which labels are then drawn from it."""


def _rng(seed: int, purpose: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=np.array([seed, purpose], dtype=np.uint64)))


def classes_in(target: np.ndarray, *, multi_label: bool = False) -> frozenset[int]:
    """Return the class numbers that occur in a target; of a multi-label one those that are there."""
    if multi_label:
        return frozenset(np.flatnonzero(target == 1).tolist())
    return frozenset(np.unique(target[target != IGNORE]).tolist())


def by_group(targets: Sequence[Target], *, multi_label: bool = False) -> dict[str, frozenset[int]]:
    """Return group -> classes that occur in its images, groups in the order in which they appear."""
    found: dict[str, frozenset[int]] = {}
    for row, target in targets:
        found[row.group] = found.get(row.group, frozenset()) | classes_in(target, multi_label=multi_label)
    return found


def held_groups(groups: Mapping[str, frozenset[int]], share: float, seed: int) -> frozenset[str]:
    """Draw about `share` of the groups, at least one and never all, of each mixture of classes about as large a share.

    Groups are put in line by the classes they have and at random among equals; every n-th is drawn (systematic
    sampling, Cochran 1977, chapter 8), so that a rare class is not left out by bad luck.

    Raises:
        ConfigError: there is only one group.
    """
    if len(groups) < 2:
        raise ConfigError(f"there is {len(groups)} patient or scene, which cannot be held out and trained on")
    rng = _rng(seed, PURPOSE_SPLIT)
    names = list(groups)
    line = sorted(rng.permutation(len(names)).tolist(), key=lambda place: sorted(groups[names[place]]))
    wanted = min(max(round(share * len(names)), 1), len(names) - 1)
    begin = rng.random()
    return frozenset(names[line[int((begin + number) * len(names) / wanted)]] for number in range(wanted))


def first_groups(groups: Mapping[str, frozenset[int]], count: int, seed: int) -> frozenset[str]:
    """Draw `count` groups, nested in `count`: at random, but a group with a class that is still missing comes first."""
    names = list(groups)
    waiting = [names[place] for place in _rng(seed, PURPOSE_GROUPS).permutation(len(names))]
    chosen: list[str] = []
    missing = frozenset().union(*groups.values())
    while waiting and len(chosen) < count:
        name = next(name for name in waiting if groups[name] & missing) if missing else waiting[0]
        waiting.remove(name)
        chosen.append(name)
        missing -= groups[name]
    return frozenset(chosen)


def first_images(targets: Sequence[Target], classes: int, count: int, seed: int, *, multi_label: bool) -> list[Target]:
    """Draw `count` images of each class, nested in `count`, in the order of `targets`.

    Multi-label: until each class is present in `count` of the drawn images, or in as many as there are, the rarest
    class first; images in which no class is present count as one more class, because a model has to see them too.
    """
    present = [classes_in(target, multi_label=multi_label) for _, target in targets]
    if multi_label:
        present = [found or frozenset({classes}) for found in present]
    order = _rng(seed, PURPOSE_IMAGES).permutation(len(targets)).tolist()
    waiting = [[place for place in order if number in present[place]] for number in range(classes + 1)]
    available = [len(line) for line in waiting]
    drawn, have = set(), [0] * (classes + 1)
    by_rarity = sorted(range(classes + 1), key=lambda number: available[number])
    for wanted in range(1, count + 1):
        for number in by_rarity:
            while have[number] < min(wanted, available[number]):
                place = waiting[number].pop(0)
                if place not in drawn:
                    drawn.add(place)
                    for found in present[place]:
                        have[found] += 1
    return [targets[place] for place in sorted(drawn)]
