"""What one segmented image leaves behind: a few small tables, however many pixels it has."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.readers import IGNORE
from geomed_mae.scoring.calibration import histograms
from geomed_mae.scoring.confusion import confusion
from geomed_mae.scoring.surfaces import MAX_PIXELS, surface_distance
from geomed_mae.scoring.values import DIGITS, rounded

UNITS = {"raster": "m", "volume": "mm", "plane": "mm"}
PIXELS = "px"
"""Unit of surface distances: by the kind of geometry, pixels where the spacing is not known."""


class Band(Protocol):
    """Some rows (or slices) of a prediction: see `heads.windows`."""

    first: int
    numbers: np.ndarray
    chances: np.ndarray | None


@dataclass(frozen=True, slots=True, eq=False)
class ImageScore:
    """The tables of one image.

    Attributes:
        key: opaque key of the image.
        group: keyed hash of its patient or scene.
        counts: int64 (classes, classes), row = truth.
        unpredicted: labelled pixels for which the model says nothing, because no channel is valid there.
        distances: float (classes, 2): HD95 and mean surface distance, NaN where there is none.
        unit: of the distances; "" where they were not measured.
        calibration: float64 (1 + classes, 3, BINS), see `calibration`; None where no probabilities were given.
    """

    key: str
    group: str
    counts: np.ndarray
    unpredicted: int
    distances: np.ndarray
    unit: str
    calibration: np.ndarray | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain values, NaN as None."""
        return {
            "key": self.key,
            "group": self.group,
            "confusion": self.counts.tolist(),
            "unpredicted": self.unpredicted,
            "distances": [[rounded(value) for value in pair] for pair in self.distances.tolist()],
            "unit": self.unit,
            "calibration": None if self.calibration is None else self.calibration.tolist(),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ImageScore:
        """Inverse of `to_json`."""
        calibration = data["calibration"]
        return cls(
            str(data["key"]),
            str(data["group"]),
            np.array(data["confusion"], dtype=np.int64),
            int(data["unpredicted"]),
            np.array(data["distances"], dtype=np.float64),
            str(data["unit"]),
            None if calibration is None else np.array(calibration, dtype=np.float64),
        )


def score_bands(row: Row, truth: np.ndarray, bands: Iterable[Band], classes: int, *, surfaces: bool) -> ImageScore:
    """Score the prediction of an image, given from the first row or slice to the last.

    Args:
        row: gives key, group, spacing and unit.
        truth: class numbers of the whole image, IGNORE where unknown.
        bands: of the prediction.
        classes: number of classes.
        surfaces: measure surface distances; the whole class map, one byte a pixel, is then kept meanwhile.

    Raises:
        ValueError: the bands together do not have the shape of `truth`.
    """
    done = labelled = 0
    counts = np.zeros((classes, classes), dtype=np.int64)
    bins: np.ndarray | None = None
    surfaces = surfaces and truth.size <= MAX_PIXELS
    whole = np.zeros(truth.shape if surfaces else (0,), dtype=np.uint8)
    for band in bands:
        part = truth[band.first : band.first + len(band.numbers)]
        if part.shape != band.numbers.shape or band.first != done:
            raise ValueError(f"rows {band.first} on of shape {band.numbers.shape} are no part of {truth.shape}")
        done += len(part)
        counts += confusion(band.numbers, part, classes)
        labelled += int((part != IGNORE).sum())
        if band.chances is not None:
            known = (part != IGNORE) & (band.numbers < classes)
            found = histograms(band.chances[:, known], part[known])
            bins = found if bins is None else bins + found
        if surfaces:
            whole[band.first : done] = band.numbers
    if done != len(truth):
        raise ValueError(f"a prediction of {done} rows cannot be scored against truth of shape {truth.shape}")
    # As in the file, so that scores that were stored and read again are the same to the digit.
    bins = None if bins is None else np.round(bins, DIGITS)
    spacing = row.spacing or (1.0,) * truth.ndim
    distances, unit = np.full((classes, 2), np.nan), ""
    if surfaces:
        distances, unit = _distances(whole, truth, classes, spacing), UNITS[row.geometry] if row.spacing else PIXELS
    return ImageScore(row.key, row.group, counts, labelled - int(counts.sum()), distances, unit, bins)


@dataclass(frozen=True, slots=True, eq=False)
class _Whole:
    first: int
    numbers: np.ndarray
    chances: np.ndarray | None


def whole_map(found: np.ndarray, chances: np.ndarray | None = None) -> list[Band]:
    """Return a class map that is in memory, and its probabilities (classes, *shape) if there are any, as one band."""
    return [_Whole(0, found, chances)]


def _distances(found: np.ndarray, truth: np.ndarray, classes: int, spacing: Sequence[float]) -> np.ndarray:
    """Return (classes, 2) surface distances of the foreground classes, NaN where there are none."""
    result = np.full((classes, 2), np.nan)
    unknown = (truth == IGNORE) | (found >= classes)
    unknown = unknown if unknown.any() else None
    for number in range(1, classes):
        masks = (found == number), (truth == number)
        if unknown is not None:
            masks = tuple(mask & ~unknown for mask in masks)
        if (measured := surface_distance(*masks, unknown, spacing)) is not None:
            result[number] = round(measured.hd95, DIGITS), round(measured.assd, DIGITS)
    return result
