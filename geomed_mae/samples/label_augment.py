"""Augmentation of labelled crops: what moves pixels moves validity and labels alike, and then values may change.

2D: albumentations 2.0.8, flips and quarter turns; of rasters no more, a pixel stays what was measured. Its intensity
transforms are not used: they clip floats to [0, 1] without a word. 3D: MONAI, flips. Volumes, and planes such as X-ray,
are also rotated and scaled a little, because patients never lie the same way twice. Flips only where the modality has
the symmetry: organs have sides. Both libraries are seeded from the sample's own generator, so that a crop does not
depend on the process that makes it. Values: see `intensity`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.errors import MissingExtraError
from geomed_mae.modalities import Modality
from geomed_mae.readers import IGNORE
from geomed_mae.samples.buckets import Bucket
from geomed_mae.samples.filling import statistics_of
from geomed_mae.samples.intensity import Intensity, allowed, change

# Without this albumentations asks the network for its newest version when it is imported.
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")

SQUARE_PIXELS = 0.01
"""Rows and columns whose spacing differs by less than this share may change places: positions stay physical."""
AFFINE_PROBABILITY = 0.5
AFFINE_DEGREES = 10.0
AFFINE_SCALE = 0.1
"""How often, and how far at most, a crop is rotated about each axis and scaled along it; nnU-Net goes further."""
MAX_SEED = 2**31
WHOLLY_VALID = 0.999
"""A resampled voxel is valid when its neighbours' validity, interpolated like the values, exceeds this."""

Crop = tuple[np.ndarray, np.ndarray, np.ndarray]
"""raw (C, *crop) float32, valid (C, *crop) bool, target (*crop) int16."""


@dataclass(frozen=True, slots=True)
class Augmentation:
    """What may happen to the crops of a bucket.

    Attributes:
        flips: symmetries of the modality.
        geometry: "raster", "plane" or "volume"; see the module.
        names: of the channels.
        values: what may happen to the values, one entry a channel.
    """

    flips: tuple[str, ...]
    geometry: str
    names: tuple[str, ...]
    values: tuple[Intensity, ...]

    @classmethod
    def of(cls, bucket: Bucket, modality: Modality) -> Augmentation:
        """Return what the bucket's modality allows."""
        names = tuple(channel.name for channel in bucket.channels)
        return cls(bucket.flips, bucket.geometry, names, allowed(modality, bucket.channels))

    def __call__(self, crop: Crop, row: Row, rng: np.random.Generator) -> Crop:
        """Return a crop of the image `row` moved and changed; labels without a valid pixel become IGNORE.

        Raises:
            MissingExtraError: as `augment`.
        """
        raw, valid, target = augment(crop, self.flips, row.spacing, rng, tilted=self.geometry == "plane")
        target = np.where(valid.any(axis=0), target, np.int16(IGNORE))
        return change(raw, valid, self.values, statistics_of(row, self.names), rng), valid, target


def augment(
    crop: Crop,
    flips: Sequence[str],
    spacing: Sequence[float] | None,
    rng: np.random.Generator,
    *,
    tilted: bool = False,
) -> Crop:
    """Return the crop under a random symmetry that `flips` ("y", "x", "z", "rot90") allows.

    3D, and 2D with `tilted`, also a little rotated and scaled.

    Raises:
        MissingExtraError: albumentations (2D) or MONAI (3D) is not installed.
    """
    if crop[2].ndim == 3:
        return _volume(crop, flips, rng)
    turned = _turned(crop, flips, spacing, rng)
    return _tilted(turned, rng) if tilted and rng.random() < AFFINE_PROBABILITY else turned


def _turned(crop: Crop, flips: Sequence[str], spacing: Sequence[float] | None, rng: np.random.Generator) -> Crop:
    raw, valid, target = crop
    square = target.shape[0] == target.shape[1]
    even = spacing is None or abs(spacing[0] - spacing[1]) <= SQUARE_PIXELS * spacing[1]
    allowed = tuple(name for name in ("x", "y", "rot90") if name in flips and (name != "rot90" or (square and even)))
    # Coins are tossed here: albumentations seeds every transform of a Compose alike, so that two flips of probability
    # one half would always fall together.
    chosen = tuple(name for name in allowed if name == "rot90" or rng.random() < 0.5)
    if not chosen:
        return crop
    compose = _albumentations(chosen)
    compose.set_random_seed(int(rng.integers(MAX_SEED)))
    # One mask carries all: several would have to agree in shape. int16 holds IGNORE, which uint8 does not.
    both = np.concatenate([valid.astype(np.int16), target[None]]).transpose(1, 2, 0)
    moved = compose(image=raw.transpose(1, 2, 0), mask=both)
    image = np.ascontiguousarray(moved["image"].transpose(2, 0, 1))
    mask = np.ascontiguousarray(moved["mask"].transpose(2, 0, 1))
    return image, mask[:-1].astype(bool), mask[-1]


def _tilted(crop: Crop, rng: np.random.Generator) -> Crop:
    raw, valid, target = crop
    compose = _albumentations(("tilt",))
    compose.set_random_seed(int(rng.integers(MAX_SEED)))
    # Validity is interpolated like the values: beside an invalid pixel there is none that is wholly valid.
    both = np.concatenate([raw, valid.astype(np.float32)]).transpose(1, 2, 0)
    moved = compose(image=both, mask=target)
    image = np.ascontiguousarray(moved["image"].transpose(2, 0, 1))
    seen = image[len(raw) :] > WHOLLY_VALID
    return np.where(seen, image[: len(raw)], np.float32(0)), seen, np.ascontiguousarray(moved["mask"])


@cache
def _albumentations(chosen: tuple[str, ...]) -> Any:
    try:
        import albumentations
    except ImportError:
        raise MissingExtraError("augmentation of labelled 2D crops", "albumentations", "train") from None
    around, scale = (-AFFINE_DEGREES, AFFINE_DEGREES), (1 - AFFINE_SCALE, 1 + AFFINE_SCALE)
    filled = {"fill": 0, "fill_mask": IGNORE, "p": 1.0}
    parts = {
        "tilt": albumentations.Affine(rotate=around, scale={"x": scale, "y": scale}, **filled),
        "x": albumentations.HorizontalFlip(p=1.0),
        "y": albumentations.VerticalFlip(p=1.0),
        "rot90": albumentations.RandomRotate90(p=1.0),
    }
    return albumentations.Compose([parts[name] for name in chosen])


def _volume(crop: Crop, flips: Sequence[str], rng: np.random.Generator) -> Crop:
    transforms = _monai(tuple(name for name in ("z", "y", "x") if name in flips))
    state = np.random.RandomState(int(rng.integers(MAX_SEED)))  # the old generator, for MONAI takes no other
    raw, valid, target = crop[0], crop[1].astype(np.float32), crop[2][None]
    for flip in transforms[:-1]:
        flip.set_random_state(state=state)
        raw = flip(raw)
        valid, target = flip(valid, randomize=False), flip(target, randomize=False)
    affine = transforms[-1]
    affine.set_random_state(state=state)
    raw = affine(raw, mode="bilinear")
    if affine._do_transform:  # how MONAI's own dictionary transforms ask whether the coin fell for it
        valid = affine(valid, mode="bilinear", randomize=False)
        # Shifted so that IGNORE is 0, with which MONAI fills what comes from outside.
        target = affine((target - IGNORE).astype(np.float32), mode="nearest", randomize=False) + IGNORE
    raw, valid = np.asarray(raw, dtype=np.float32), np.asarray(valid) > WHOLLY_VALID
    return np.where(valid, raw, np.float32(0)), valid, np.asarray(target)[0].round().astype(np.int16)


@cache
def _monai(axes: tuple[str, ...]) -> tuple[Any, ...]:
    try:
        from monai.transforms import RandAffine, RandFlip
    except ImportError:
        raise MissingExtraError("augmentation of labelled volumes", "monai", "train") from None
    flips = [RandFlip(prob=0.5, spatial_axis="zyx".index(name)) for name in axes]
    affine = RandAffine(
        prob=AFFINE_PROBABILITY,
        rotate_range=(math.radians(AFFINE_DEGREES),) * 3,
        scale_range=(AFFINE_SCALE,) * 3,
        padding_mode="zeros",
    )
    return (*flips, affine)
