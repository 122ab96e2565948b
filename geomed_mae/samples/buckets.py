"""Buckets: images that can share a batch, because modality, channels and number of axes are the same.

A step takes all its crops from one bucket, drawn with probability proportional to the bucket's valid area (pixels or
voxels times valid fraction), so that every valid pixel of the archive is about equally likely to be seen, or by
`data.weights`. Within a bucket images are drawn by all their pixels: crops lie anywhere in an image and empty ones are
drawn again, so that half-empty images give less by themselves; drawn by valid area they would give less twice over.

Channels are the same when what they are is: name, kind, unit, wavelength, polarisation, sequence. What an operator
dials in differs from series to series: MR repetition, echo and inversion times, the tube voltage of CT. As part of the
key it would give a hundred MR series sixty buckets, batches of one patient each, and few reads to share (see
`dealing`). So these numbers are compared by thirds of an octave, about 26 %, little beside what they differ between
contrasts, and a bucket's channels have the median of its images. Images are read by the names of channels, and a
contract knows them by name too: neither sees the difference.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import median
from typing import TYPE_CHECKING

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel
from geomed_mae.modalities import Modality

if TYPE_CHECKING:
    from geomed_mae.config import DataConfig


DIALLED = ("repetition_time_ms", "echo_time_ms", "inversion_time_ms", "tube_kv")
"""What differs between series of one protocol; compared by its logarithm."""

PARTS_OF_OCTAVE = 3
"""Values within about 2 ** (1 / 3) of each other may share a bucket."""


@dataclass(frozen=True)
class Bucket:
    """Rows of an index that can share a batch, and how crops are cut from them.

    `crop` has one size a spatial axis; `flips` are those of the modality.
    """

    modality: str
    channels: tuple[Channel, ...]
    geometry: str
    crop: tuple[int, ...]
    flips: tuple[str, ...]
    rows: tuple[Row, ...]

    @cached_property
    def areas(self) -> np.ndarray:
        """Valid area of each row, in pixels or voxels (float64)."""
        return np.array([valid_area(row) for row in self.rows], dtype=np.float64)

    @cached_property
    def _pixels(self) -> np.ndarray:
        """Pixels or voxels of each row, valid or not."""
        return np.array([math.prod(row.shape) for row in self.rows], dtype=np.float64)

    @cached_property
    def _total(self) -> np.ndarray:
        return np.cumsum(self._pixels)

    def draw(self, uniform: float, without: frozenset[str] = frozenset()) -> Row | None:
        """Return the row in which the share `uniform` (0 <= uniform < 1) of the bucket's pixels falls.

        Rows whose key is in `without` are left out; None when no other is left.
        """
        total = self._total
        if without:
            total = np.cumsum(np.where([row.key in without for row in self.rows], 0.0, self._pixels))
        return self.rows[int(np.searchsorted(total / total[-1], uniform, side="right"))] if total[-1] > 0 else None


def valid_area(row: Row) -> float:
    """Valid pixels or voxels of an image."""
    return float(np.prod(row.shape, dtype=np.float64) * row.valid_fraction)


def crop_of(geometry: str, config: DataConfig, example: Row) -> tuple[int, ...]:
    """Return the crop for images of this geometry.

    Raises:
        ConfigError: the recipe has no crop for it; the keys to set and the images that need them are named.
    """
    axes = "3d" if geometry == "volume" else "2d"
    crop = config.crop_3d if geometry == "volume" else config.crop_2d
    if crop is None:
        shape = " x ".join(map(str, example.shape))
        raise ConfigError(
            f"the archive holds images of modality '{example.modality}' ({geometry}, {shape}): "
            f"set data.crop_{axes} and model.patch_{axes}, or leave such images out with data.modality"
        )
    return tuple(crop)


def _selected(row: Row, names: Sequence[str] | None) -> tuple[Channel, ...]:
    if names is None:
        return row.channels
    have = {channel.name: channel for channel in row.channels}
    if missing := [name for name in names if name not in have]:
        raise ConfigError(
            f"data.channels asks for {missing}, which an image of modality '{row.modality}' lacks; it has {list(have)}"
        )
    return tuple(have[name] for name in names)


def _known(value: float | None) -> bool:
    return value is not None and value > 0  # as `models.channels.describe` has it


def _alike(channel: Channel) -> Channel:
    """Return what channels of a bucket have in common: the channel with its dialled values as steps of a third."""
    values = ((name, getattr(channel, name)) for name in DIALLED)
    steps = {name: round(PARTS_OF_OCTAVE * math.log2(value)) if _known(value) else None for name, value in values}
    return replace(channel, **steps)


def _median(images: Sequence[tuple[Channel, ...]]) -> tuple[Channel, ...]:
    """Return the channels of several images of a bucket with the median of each dialled value."""
    result = []
    for same in zip(*images, strict=True):
        values = {name: [getattr(one, name) for one in same] for name in DIALLED}
        result.append(replace(same[0], **{name: median(of) if _known(of[0]) else None for name, of in values.items()}))
    return tuple(result)


def make_buckets(rows: Sequence[Row], config: DataConfig, modalities: Mapping[str, Modality]) -> tuple[Bucket, ...]:
    """Sort rows into buckets; `modalities` by name gives their flips. Rows without valid pixels are left out.

    Raises:
        ConfigError: no crop for a geometry, a channel asked for is missing, or no row has valid pixels.
    """
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        if valid_area(row) > 0:
            # Spacing known or not is part of the key: a batch gives positions in physical units for all or for none.
            channels = tuple(_alike(channel) for channel in _selected(row, config.channels))
            key = (row.modality, channels, row.geometry, row.spacing is None)
            groups.setdefault(key, []).append(row)
    if not groups:
        raise ConfigError(f"none of the {len(rows)} images of the archive has valid pixels; look at it with inspect")
    made = [
        Bucket(
            modality=modality,
            channels=_median([_selected(row, config.channels) for row in members]),
            geometry=geometry,
            crop=crop_of(geometry, config, members[0]),
            flips=modalities[modality].flips if modality in modalities else (),
            rows=tuple(members),
        )
        for (modality, _, geometry, _), members in groups.items()
    ]
    # Buckets are sorted by what they are. Rows keep the index's order (`Index.by_pixels`): keys are salted anew by
    # every scan of a raw archive, so that sorting by key would give a resumed run other batches.
    return tuple(
        sorted(made, key=lambda one: repr((one.modality, one.channels, one.geometry, one.rows[0].spacing is None)))
    )


def shares(buckets: Sequence[Bucket], weights: Mapping[str, float] | None) -> np.ndarray:
    """Return each bucket's share of the steps.

    Without weights in proportion to valid area. With them, each modality has its weight's share, and within a modality
    buckets have theirs by valid area.

    Raises:
        ConfigError: a modality of the archive has no weight, or a weight has no images.
    """
    areas = np.array([bucket.areas.sum() for bucket in buckets])
    if weights is None:
        return areas / areas.sum()
    names = [bucket.modality for bucket in buckets]
    if set(names) != set(weights):
        raise ConfigError(
            f"data.weights names {sorted(weights)}, the archive holds {sorted(set(names))}; give each of these a weight"
        )
    totals = {name: sum(area for own, area in zip(names, areas, strict=True) if own == name) for name in weights}
    parts = np.array([weights[name] * area / totals[name] for name, area in zip(names, areas, strict=True)])
    return parts / parts.sum()


def draw_bucket(buckets: Sequence[Bucket], uniform: float, weights: Mapping[str, float] | None = None) -> Bucket:
    """Return the bucket in which the share `uniform` (0 <= uniform < 1) of all steps falls."""
    total = np.cumsum(shares(buckets, weights))
    return buckets[int(np.searchsorted(total / total[-1], uniform, side="right"))]
