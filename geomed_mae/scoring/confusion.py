"""Confusion matrices and what follows from them alone."""

from __future__ import annotations

from typing import Any

import numpy as np

from geomed_mae.readers import IGNORE
from geomed_mae.scoring.values import mean_known, ratio, rounded


def confusion(prediction: np.ndarray, truth: np.ndarray, classes: int) -> np.ndarray:
    """Return int64 (classes, classes) pixel counts, row = truth, column = prediction, where the truth is not IGNORE.

    Args:
        prediction: class numbers of any integer type, same shape as `truth`. Labelled pixels without a prediction
            (numbers of `classes` and above, such as a nodata value) are not counted.
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


def recall(counts: np.ndarray) -> list[float | None]:
    """Return TP / (TP + FN) per class, which is the sensitivity; None where a class is nowhere true."""
    return _ratios(np.diag(counts), counts.sum(1))


def precision(counts: np.ndarray) -> list[float | None]:
    """Return TP / (TP + FP) per class; None where a class is nowhere predicted."""
    return _ratios(np.diag(counts), counts.sum(0))


def accuracy(counts: np.ndarray) -> float | None:
    """Return the share of cases on the diagonal, None without cases."""
    return ratio(float(np.trace(counts)), float(counts.sum()))


def balanced_accuracy(counts: np.ndarray) -> float | None:
    """Return the mean recall of the classes that are true somewhere, as scikit-learn does."""
    return mean_known(recall(counts))


def two_by_two(counts: np.ndarray) -> dict[str, Any]:
    """Return the rates of a yes-or-no question from its counts (2, 2), row = truth: rounded, None where undefined."""
    (true_no, false_yes), (false_no, true_yes) = counts.tolist()
    return {
        "sensitivity": rounded(ratio(true_yes, true_yes + false_no)),
        "specificity": rounded(ratio(true_no, true_no + false_yes)),
        "precision": rounded(ratio(true_yes, true_yes + false_yes)),
        "f1": rounded(ratio(2 * true_yes, 2 * true_yes + false_yes + false_no)),
    }


def _ratios(above: np.ndarray, below: np.ndarray) -> list[float | None]:
    return [ratio(a, b) for a, b in zip(above, below, strict=True)]
