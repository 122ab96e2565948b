"""Which labelled images, or blocks of an only image, a probe learns from, and which it is scored on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.archives.label_values import block_split
from geomed_mae.archives.parts import TEST, TRAIN
from geomed_mae.config import LabelConfig
from geomed_mae.errors import ConfigError
from geomed_mae.training.draws import Target, by_group, held_groups
from geomed_mae.training.probing import BLOCKS

BLOCK, GROUP, STORED = "block", "group", "stored"


@dataclass(frozen=True, slots=True, eq=False)
class Parts:
    """Labelled images on two sides.

    Attributes:
        targets: images of either side, in the order in which they came.
        held: key -> bool of the image's shape (a view where it is all one): what is scored.
        unit: what was kept apart: "stored", "group", or "block" where every image is on both sides.
        left_out: labelled images that are in neither part.
    """

    targets: tuple[Target, ...]
    held: Mapping[str, np.ndarray]
    unit: str
    left_out: int = 0

    def train(self) -> list[Target]:
        """Return the images that are learned from, wholly or in part."""
        return [target for target in self.targets if not self.held[target[0].key].all()]

    def test(self) -> list[Target]:
        """Return the images that are scored, wholly or in part."""
        return [target for target in self.targets if self.held[target[0].key].any()]

    def described(self) -> dict[str, Any]:
        """Return the unit, and numbers of images and groups, for the file of scores."""
        sides = {TRAIN: self.train(), TEST: self.test()}
        return {
            "unit": self.unit,
            **{name: len(side) for name, side in sides.items()},
            "groups": {name: len({row.group for row, _ in side}) for name, side in sides.items()},
            **({"labelled_images_in_no_part": self.left_out} if self.left_out else {}),
        }


def part(
    targets: Sequence[Target],
    labels: LabelConfig,
    stored: Mapping[str, str] | None,
    *,
    multi_label: bool = False,
    dense: bool = True,
) -> Parts:
    """Part labelled images as they are stored, else by group, else (label maps of one image) by blocks.

    The draw is that of fine-tuning: with the same labels, labels.test and labels.split_seed the same groups are scored.

    Args:
        targets: images and what is known of them, in an order that does not depend on names (`Index.by_pixels`).
        labels: shares and seed.
        stored: key -> part, None where a split has to be drawn.
        multi_label: whether an image may have several classes.
        dense: whether labels are maps.

    Raises:
        ConfigError: there is nothing to learn from or to score.
    """
    rows = [row for row, _ in targets]
    if stored is not None:
        inside = [target for target in targets if stored.get(target[0].key) in (TRAIN, TEST)]
        keys = {row.key for row in rows if stored.get(row.key) == TEST}
        _refuse_empty(inside, keys)
        return Parts(tuple(inside), _whole(inside, keys), STORED, len(rows) - len(inside))
    if not 0 < labels.test < 1:
        raise ConfigError("labels.test=0 leaves nothing to score a probe on; set the share of groups to hold out")
    groups = by_group(targets, multi_label=multi_label)
    if len(groups) > 1 and labels.block_px is None:
        held = held_groups(groups, labels.test, labels.split_seed)
        return Parts(tuple(targets), _whole(targets, {row.key for row in rows if row.group in held}), GROUP)
    if not dense:
        raise ConfigError(
            f"{len(rows)} labelled images of {len(groups)} patient or scene cannot be split; label images of others"
        )
    sides = {row.key: labels.block_px or max(-(-max(row.shape) // BLOCKS), 1) for row in rows}
    masks = {row.key: block_split(row.shape, sides[row.key], labels.test, labels.split_seed) for row in rows}
    return Parts(tuple(targets), masks, BLOCK)


def _whole(targets: Sequence[Target], keys: set[str]) -> dict[str, np.ndarray]:
    return {row.key: np.broadcast_to(np.bool_(row.key in keys), row.shape) for row, _ in targets}


def _refuse_empty(inside: Sequence[Target], test: set[str]) -> None:
    rows: list[Row] = [row for row, _ in inside]
    for name, count in ((TRAIN, len(rows) - len(test)), (TEST, len(test))):
        if not count:
            raise ConfigError(
                f"no labelled image is in the part '{name}' of the stored split; label images of it, or name with "
                "--split the part within which patients or scenes are then held out"
            )
