"""Probing: what features say about labels, by a ridge regression in closed form.

The maths under the verb `probe` and under the live probe of a pretraining run.

Nothing has to be tuned: the ridge's strength is chosen by generalised cross-validation (Golub, Heath & Wahba 1979) on
the training rows alone. Scores are on held-out patients or scenes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.archives.label_values import block_split
from geomed_mae.archives.labels import LabelledImage
from geomed_mae.archives.splits import split_by_group
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE
from geomed_mae.training.metrics import mean_known, r_squared

MAX_CLASSES = 32
"""Label maps with more different values are taken for something else than classes."""
MIN_LABELLED = 0.5
"""A patch counts when at least this share of its pixels has a label."""
HELD_OUT = 0.3
"""Share of groups, or of blocks of a single image, that the scores are computed on."""
BLOCKS = 4
"""A single image is split into blocks of a quarter of its longest side."""
PENALTIES = np.logspace(-3, 5, 17)
"""Candidate strengths of the ridge, for standardised features."""
SINGULAR = 1e-12
"""Squared singular values below this share of the largest are rounding."""
SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """Rows of a regression: features (n, f), class shares (n, classes), and which of them are held out (n,)."""

    features: np.ndarray
    shares: np.ndarray
    held_out: np.ndarray


def label_values(labelled: Sequence[LabelledImage]) -> list[int]:
    """Return the stored values that occur, rising, IGNORE left out.

    Raises:
        ConfigError: fewer than two, or more than MAX_CLASSES.
    """
    values = sorted({int(value) for entry in labelled for value in np.unique(entry.stored)} - {IGNORE})
    if not 2 <= len(values) <= MAX_CLASSES:
        raise ConfigError(f"the labels hold {len(values)} different values; a probe needs 2 to {MAX_CLASSES} classes")
    return values


def held_out(labelled: Sequence[LabelledImage]) -> tuple[dict[str, np.ndarray], str]:
    """Return per image key which pixels are held out, bool of its shape, and the unit kept apart: group or block."""
    rows: list[Row] = [entry.row for entry in labelled]
    if len({row.group for row in rows}) < 2:
        sides = {row.key: max(-(-max(row.shape) // BLOCKS), 1) for row in rows}
        return {row.key: block_split(row.shape, sides[row.key], HELD_OUT, SEED) for row in rows}, "block"
    _, held = split_by_group(rows, HELD_OUT, SEED)
    keys = {row.key for row in held}
    return {row.key: np.broadcast_to(np.bool_(row.key in keys), row.shape) for row in rows}, "group"


def patch_means(array: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """Return the mean of each patch of an array, float64; patches at the far border hold the pixels that are there."""
    for axis, size in enumerate(patch):
        edges = np.arange(0, array.shape[axis], size)
        counts = np.diff([*edges, array.shape[axis]])
        sums = np.add.reduceat(array.astype(np.float64), edges, axis=axis)
        array = sums / counts.reshape([-1 if other == axis else 1 for other in range(array.ndim)])
    return array


def linear_probe(patches: Patches) -> dict[str, Any]:
    """Return R^2 per class and mean, and accuracy, of a ridge regression on the held-out patches.

    Raises:
        ConfigError: no patch is left to train or to score on.
    """
    found, penalty = held_out_predictions(patches)
    truth = patches.shares[patches.held_out]
    scores = [r_squared(found[:, number], truth[:, number]) for number in range(truth.shape[1])]
    return {
        "r2": [None if score is None else round(score, 6) for score in scores],
        "mean_r2": None if (mean_score := mean_known(scores)) is None else round(mean_score, 6),
        "accuracy": round(float((found.argmax(axis=1) == truth.argmax(axis=1)).mean()), 6),
        "features": int(patches.features.shape[1]),
        "patches_train": int((~patches.held_out).sum()),
        "patches_scored": int(patches.held_out.sum()),
        "penalty": float(penalty),
    }


def held_out_predictions(patches: Patches) -> tuple[np.ndarray, float]:
    """Return the answers (rows, classes) of a ridge for the rows that are held out, and its penalty.

    Raises:
        ConfigError: no patch is left to train or to score on.
    """
    train, test = ~patches.held_out, patches.held_out
    if train.sum() < 2 or test.sum() < 2:
        raise ConfigError(
            f"{int(train.sum())} patches are left to train on and {int(test.sum())} to score on; label more area"
        )
    mean, spread = patches.features[train].mean(axis=0), patches.features[train].std(axis=0)
    features = (patches.features - mean) / np.where(spread > 0, spread, 1.0)
    weights, center, penalty = ridge(features[train], patches.shares[train])
    return features[test] @ weights + center, penalty


def auroc(scores: np.ndarray, positive: np.ndarray) -> float | None:
    """Return the area under the ROC curve of scores (n,) for bool `positive` (n,), ties counting half; None where only
    one kind occurs.
    """
    above, below = int(positive.sum()), int((~positive).sum())
    if above == 0 or below == 0:
        return None
    _, place, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return float((ranks[positive].sum() - above * (above + 1) / 2) / (above * below))


def ridge(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (weights (f, t), intercept (t,), penalty) of ridge regression with the best generalised cross-validation.

    Args:
        features: (n, f), of mean 0.
        targets: (n, t).
    """
    center = targets.mean(axis=0)
    # From the products of features, whose number is small, and not of patches.
    squared, right = np.linalg.eigh(features.T @ features)
    kept = squared > squared.max(initial=0.0) * SINGULAR
    singular, right = np.sqrt(squared[kept]), right[:, kept]
    projected = (right.T @ (features.T @ (targets - center))) / singular[:, None]
    outside = ((targets - center) ** 2).sum() - (projected**2).sum()
    errors = []
    for penalty in PENALTIES:
        shrunk = singular**2 / (singular**2 + penalty)
        residual = outside + (((1 - shrunk)[:, None] * projected) ** 2).sum()
        errors.append(residual / (1 - min(shrunk.sum() / len(features), 1 - 1e-9)) ** 2)
    best = float(PENALTIES[int(np.argmin(errors))])
    return right @ ((singular / (singular**2 + best))[:, None] * projected), center, best
