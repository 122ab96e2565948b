"""Which windows of which images a live probe looks at, and what is true of them: few, fixed, and the most telling.

Of label maps the windows in which most classes meet, as many on the held-out side as on the other; of a table of
classes one window an image.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from geomed_mae.archives.class_labels import ClassQuery, match_classes
from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.labels import match_labels
from geomed_mae.archives.splits import split_by_group
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel
from geomed_mae.models.contract import Contract, normalise, scaling
from geomed_mae.models.spec import ModelSpec
from geomed_mae.readers import IGNORE, LabelQuery
from geomed_mae.training.probing import HELD_OUT, MIN_LABELLED, SEED, held_out, label_values, patch_means

MAX_WINDOWS = 64
"""Windows of the pretraining crop that a probe looks at, of all images together."""

MAX_TOKENS = 16_384
"""Tokens of these windows together; bounds the time of a probe whatever the patch."""

MOST_OF_ONE = 8
"""Windows of one image."""

MAX_IMAGES = 512
"""Images of a table of classes that are looked at, one window each."""

TABLES = (".csv", ".tsv", ".txt")
"""Labels in files of these suffixes are a table of classes."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """One input: `pixels` in model units and `valid` (c, *crop); `kept` (*grid) marks the tokens that are read out."""

    pixels: Tensor
    valid: Tensor
    channels: tuple[Channel, ...]
    spacing: tuple[float, ...] | None
    kept: np.ndarray

    @property
    def kind(self) -> tuple:
        """Windows of one kind can go through the encoder together."""
        return self.channels, tuple(self.pixels.shape), self.spacing is None


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """Windows, `truth` (rows, classes) and `held` (rows,), see `probe_online.OnlineProbe`."""

    windows: tuple[Window, ...]
    truth: np.ndarray
    held: np.ndarray
    dense: bool


def choose(reader: WindowReader, labels: Path) -> Chosen:
    """Match labels to the images of an index, choose windows and read them; errors as `OnlineProbe.open`."""
    chosen = (_of_table if labels.suffix.lower() in TABLES else _of_maps)(reader, labels)
    vary = [[np.ptp(column[chosen.held == side]) > 0 for side in (False, True)] for column in chosen.truth.T]
    if not any(all(sides) for sides in vary):
        raise ConfigError(
            "no class of the labels is here and there on both sides of the split, so that there is nothing to score; "
            "label more patients or scenes"
        )
    return chosen


class WindowReader:
    """Reads windows of the pretraining crop, scaled as training scales them (by the whole image's statistics)."""

    def __init__(self, index: Index, contract: Contract, spec: ModelSpec, recipe: Recipe) -> None:
        self.index, self.contract, self.spec, self.recipe = index, contract, spec, recipe

    def crop(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the window's size: the pretraining crop, smaller where the image is, a multiple of the patch."""
        patch = self.spec.patch(len(shape))
        whole = self.contract.crop_2d if len(shape) == 2 else self.contract.crop_3d
        sizes = [-(-size // step) * step for size, step in zip(shape, patch, strict=True)]
        return tuple(min(size, limit) for size, limit in zip(sizes, whole or sizes, strict=True))

    def tokens(self, shape: Sequence[int]) -> int:
        """Return the number of tokens of a window."""
        return int(np.prod([c // p for c, p in zip(self.crop(shape), self.spec.patch(len(shape)), strict=True)]))

    def corners(self, shape: Sequence[int]) -> list[tuple[int, ...]]:
        """Return the corners of all windows of an image, which do not overlap."""
        return list(itertools.product(*(range(0, s, c) for s, c in zip(shape, self.crop(shape), strict=True))))

    def cut(self, array: np.ndarray, corner: Sequence[int], crop: Sequence[int], fill: float) -> np.ndarray:
        """Cut a window out of (*shape), with `fill` beyond the end."""
        part = array[tuple(slice(start, start + size) for start, size in zip(corner, crop, strict=True))]
        gaps = [(0, size - have) for size, have in zip(crop, part.shape, strict=True)]
        return np.pad(part, gaps, constant_values=fill)

    def read(self, row: Row, corners: Sequence[tuple[int, ...]]) -> list[Window]:
        """Read windows of one image; tokens with enough valid pixels are `kept`."""
        crop, names = self.crop(row.shape), self.recipe.data.channels or tuple(one.name for one in row.channels)
        places = [
            tuple(slice(a, min(a + c, s)) for a, c, s in zip(corner, crop, row.shape, strict=True))
            for corner in corners
        ]
        own = {channel.name: entry for channel, entry in zip(row.channels, row.statistics, strict=True)}
        found = []
        for image in self.index.read_many(row.key, places):
            image = image.select(tuple(names))
            entries = self.contract.entries(image.modality, image.channels)
            center, scale, _ = scaling(entries, [own[name] for name in names])
            zero = (0,) * len(crop)
            valid = np.broadcast_to(image.valid, image.array.shape)
            raw = torch.from_numpy(np.stack([self.cut(one, zero, crop, 0.0) for one in image.array]))
            seen = torch.from_numpy(np.stack([self.cut(one, zero, crop, False) for one in valid]))
            scales = (torch.from_numpy(part)[None] for part in (center, scale))
            ranges = [entry.value_range for entry in entries]
            pixels = normalise(raw[None], seen[None], *scales, ranges)[0]
            whole = patch_means(seen.numpy().all(axis=0), self.spec.patch(len(crop))) >= MIN_LABELLED
            found.append(Window(pixels, seen, image.channels, row.spacing, whole))
        return found


def _of_maps(reader: WindowReader, labels: Path) -> Chosen:
    config = reader.recipe.labels
    query = LabelQuery(column=config.column, ignore=config.ignore, resample=config.resample)
    labelled = list(match_labels(reader.index, labels, query).labelled)
    classes, (held, _) = label_values(labelled), held_out(labelled)
    tokens = max(reader.tokens(entry.row.shape) for entry in labelled)
    most = max(min(MAX_WINDOWS, MAX_TOKENS // tokens), 2)
    windows, truth, outside = [], [], []
    for side in (False, True):
        # As many windows of the held-out side as of the other, so that neither is a handful.
        mine = [entry for entry in labelled if (held[entry.row.key] == side).any()]
        chosen = [mine[number] for number in _spread(len(mine), most // 2)]
        each = min(max(most // 2 // len(chosen), 1), MOST_OF_ONE)
        for entry in chosen:
            known = np.where(held[entry.row.key] == side, entry.stored, np.int16(IGNORE))
            corners = _most_mixed(reader, known, classes, each)
            for corner, window in zip(corners, reader.read(entry.row, corners), strict=True):
                patch, crop = reader.spec.patch(known.ndim), reader.crop(known.shape)
                here = reader.cut(known, corner, crop, IGNORE)
                part = patch_means(here != IGNORE, patch)
                kept = window.kept & (part >= MIN_LABELLED)
                parts = np.stack([patch_means(here == value, patch) for value in classes], axis=-1)
                windows.append(Window(window.pixels, window.valid, window.channels, window.spacing, kept))
                truth.append(parts[kept] / part[kept][:, None])
                outside.append(np.full(int(kept.sum()), side))
    rows, test = np.concatenate(truth), np.concatenate(outside)
    if min(int(test.sum()), int((~test).sum())) < 2:
        raise ConfigError(
            f"{int((~test).sum())} patches are left to train a probe on and {int(test.sum())} to score it on; label "
            "more area"
        )
    return Chosen(tuple(windows), rows, test, dense=True)


def _most_mixed(reader: WindowReader, known: np.ndarray, classes: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Return the windows in which most is labelled with the most different classes (entropy), at least one."""
    crop = reader.crop(known.shape)
    ranked = []
    for number, corner in enumerate(reader.corners(known.shape)):
        here = known[tuple(slice(start, start + size) for start, size in zip(corner, crop, strict=True))]
        shares = np.array([(here == value).mean() for value in classes])
        mixed = -(shares[shares > 0] * np.log(shares[shares > 0])).sum()
        ranked.append((-float(mixed), -float(shares.sum()), number, corner))
    return [corner for *_, corner in sorted(ranked)[:count]]


def _of_table(reader: WindowReader, labels: Path) -> Chosen:
    config = reader.recipe.labels
    query = ClassQuery(
        key_column=config.key_column, class_columns=config.class_columns, values=config.values, ignore=config.ignore
    )
    matching = match_classes(reader.index, labels, query)
    rows, targets = list(matching.labelled), matching.matrix()
    if len(matching.classes) < 2 and not matching.multi_label:
        raise ConfigError(f"the labels hold {len(matching.classes)} class; a probe needs 2")
    keys = {row.key for row in split_by_group(rows, HELD_OUT, SEED)[1]}
    tokens = max(reader.tokens(row.shape) for row in rows)
    numbers = _spread(len(rows), max(min(MAX_IMAGES, MAX_TOKENS // tokens), 4))
    windows, kept = [], []
    for number in numbers:
        corners = reader.corners(rows[number].shape)
        window = reader.read(rows[number], [corners[len(corners) // 2]])[0]
        if window.kept.any():
            windows.append(window)
            kept.append(number)
    test = np.array([rows[number].key in keys for number in kept])
    if min(int(test.sum()), int((~test).sum())) < 2:
        raise ConfigError(f"{len(kept)} labelled images are too few to train a probe on and score it")
    return Chosen(tuple(windows), targets[kept].astype(np.float64), test, dense=False)


def _spread(count: int, most: int) -> list[int]:
    """Return at most `most` numbers below `count`, evenly spread and in order."""
    most = max(most, 1)
    return list(range(count)) if count <= most else [number * count // most for number in range(most)]
