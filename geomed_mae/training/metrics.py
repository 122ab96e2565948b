"""Scores of class maps, always with the counts behind them: Dice, IoU, accuracy, and their uncertainty over images.

Counts are kept per image, so that the score over all pixels, the mean over images and a bootstrap interval over images
come from the same numbers. A class that occurs in neither prediction nor truth has no score (None), not 0 and not 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from geomed_mae.readers import IGNORE

BOOTSTRAP_ROUNDS = 2000
"""Resamples of images behind an interval (Efron & Tibshirani 1993 advise 1000 or more for percentile intervals)."""
INTERVAL = (2.5, 97.5)
"""Percentiles of a 95 % interval."""


def confusion(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Return int64 (classes, classes) pixel counts, row = truth, column = prediction, where the truth is not IGNORE.

    Args:
        prediction: class numbers of any integer type, same shape as `truth`. Labelled pixels without a prediction
            (numbers of `classes` and above, such as a nodata value) are not counted; see `Scores.unpredicted`.
        truth: class numbers, IGNORE where unknown.
        classes: number of classes.
    """
    counted = (truth != IGNORE) & (prediction >= 0) & (prediction < classes)
    pairs = truth[counted].astype(np.int64) * classes + prediction[counted].astype(np.int64)
    return np.bincount(pairs, minlength=classes * classes).reshape(classes, classes)


def dice(counts: np.ndarray) -> list[float | None]:
    """Return 2 TP / (2 TP + FP + FN) per class of a confusion matrix, None where a class does not occur."""
    return _ratios(2 * np.diag(counts), counts.sum(0) + counts.sum(1))


def iou(counts: np.ndarray) -> list[float | None]:
    """Return TP / (TP + FP + FN) per class of a confusion matrix, None where a class does not occur."""
    return _ratios(np.diag(counts), counts.sum(0) + counts.sum(1) - np.diag(counts))


def _ratios(above: np.ndarray, below: np.ndarray) -> list[float | None]:
    return [float(a / b) if b > 0 else None for a, b in zip(above, below, strict=True)]


@dataclass
class Scores:
    """Confusion matrices of images, added one by one."""

    classes: tuple[str, ...]
    images: list[np.ndarray] = field(default_factory=list)
    unpredicted: int = 0

    def add(self, prediction: np.ndarray, truth: np.ndarray) -> None:
        """Add one image: class numbers of the same shape, truth IGNORE where unknown.

        Raises:
            ValueError: the shapes differ.
        """
        if prediction.shape != truth.shape:
            raise ValueError(f"a prediction of shape {prediction.shape} cannot be scored against truth {truth.shape}")
        counts = confusion(prediction, truth, len(self.classes))
        self.images.append(counts)
        self.unpredicted += int((truth != IGNORE).sum() - counts.sum())

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """Return plain values: per class and mean Dice and IoU over all pixels, their mean over images with a 95 %
        interval (two images or more), and the counts.
        """
        total = np.sum(self.images, axis=0) if self.images else np.zeros((len(self.classes),) * 2, dtype=np.int64)
        per_class = {
            name: {
                "dice": _rounded(dice(total)[number]),
                "iou": _rounded(iou(total)[number]),
                "pixels_true": int(total[number].sum()),
                "pixels_predicted": int(total[:, number].sum()),
                "images": int(sum(1 for counts in self.images if counts[number].sum() > 0)),
                "dice_over_images": over_images([dice(counts)[number] for counts in self.images], seed=seed),
            }
            for number, name in enumerate(self.classes)
        }
        accuracy = float(np.trace(total) / total.sum()) if total.sum() else None
        return {
            "images": len(self.images),
            "pixels": int(total.sum()),
            "pixels_unpredicted": self.unpredicted,
            "accuracy": _rounded(accuracy),
            "mean_dice": _rounded(mean_known(dice(total))),
            "mean_iou": _rounded(mean_known(iou(total))),
            "classes": per_class,
        }


def over_images(values: Sequence[float | None], *, seed: int) -> dict[str, Any]:
    """Return {mean, images, low, high}: the mean of the known values and a 95 % percentile bootstrap interval.

    The unit of resampling is the image, because pixels of one image are not independent. The interval is None below
    two images, and rough below about ten.
    """
    known = np.array([value for value in values if value is not None], dtype=np.float64)
    if known.size < 2:
        return {"mean": _rounded(mean_known(values)), "images": int(known.size), "low": None, "high": None}
    draws = np.random.default_rng(seed).integers(0, known.size, size=(BOOTSTRAP_ROUNDS, known.size))
    low, high = np.percentile(known[draws].mean(axis=1), INTERVAL)
    return {"mean": _rounded(known.mean()), "images": int(known.size), "low": _rounded(low), "high": _rounded(high)}


def mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are not None, or None."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def r_squared(prediction: np.ndarray, truth: np.ndarray) -> float | None:
    """Return 1 - residual / total sum of squares of float arrays (n,), None where the truth is constant."""
    total = float(((truth - truth.mean()) ** 2).sum())
    return 1.0 - float(((truth - prediction) ** 2).sum()) / total if total > 0 else None


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(float(value), 6)
