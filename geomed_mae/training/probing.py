"""Probing: what features say about shares of classes, by a ridge regression in closed form, or by their neighbours.

The maths under the verb `probe` on label maps and under the live probe of a pretraining run.

Nothing has to be tuned: the ridge's strength is chosen by generalised cross-validation (Golub, Heath & Wahba 1979) on
the training rows alone. Scores are on held-out patients or scenes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.archives.label_values import block_split
from geomed_mae.archives.labels import LabelledImage
from geomed_mae.archives.splits import split_by_group
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE

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
CHUNK = 8192
"""Rows that are in memory as float64 together."""
SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """Rows of a regression: features (n, f), class shares (n, classes), and which of them are held out (n,)."""

    features: np.ndarray
    shares: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Ridge:
    """A ridge regression of standardised features.

    Attributes:
        mean, spread: of the training features, (f,).
        weights: (f, t), of features of mean 0 and spread 1.
        center: (t,), the mean of the targets.
        penalty: the strength that generalised cross-validation chose.
        error: its estimate of the squared error of one row, over all targets: how good these features are, told by
            the training side alone.
    """

    mean: np.ndarray
    spread: np.ndarray
    weights: np.ndarray
    center: np.ndarray
    penalty: float
    error: float

    def __call__(self, features: np.ndarray) -> np.ndarray:
        """Return the answers (n, t), float64, to features (n, f)."""
        parts = [(part - self.mean) / self.spread @ self.weights + self.center for part in _chunks(features)]
        return np.concatenate(parts) if parts else np.zeros((0, len(self.center)))


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


def held_out_predictions(patches: Patches) -> tuple[np.ndarray, float]:
    """Return the answers (rows, classes) of a ridge for the rows that are held out, and its penalty.

    Raises:
        ConfigError: no patch is left to train or to score on.
    """
    fitted = fit_patches(patches)
    return fitted(patches.features[patches.held_out]), fitted.penalty


def fit_patches(patches: Patches) -> Ridge:
    """Fit a ridge on the rows that are not held out.

    Raises:
        ConfigError: no patch is left to train or to score on.
    """
    train, test = ~patches.held_out, patches.held_out
    if train.sum() < 2 or test.sum() < 2:
        raise ConfigError(
            f"{int(train.sum())} patches are left to train on and {int(test.sum())} to score on; label more area"
        )
    return ridge(patches.features[train], patches.shares[train])


def ridge(features: np.ndarray, targets: np.ndarray) -> Ridge:
    """Fit the ridge regression with the best generalised cross-validation.

    Args:
        features: (n, f), of any float type; float64 copies are made of CHUNK rows at a time.
        targets: (n, t).
    """
    count = len(features)
    mean = sum(part.sum(axis=0) for part in _chunks(features)) / count
    spread = np.sqrt(sum(((part - mean) ** 2).sum(axis=0) for part in _chunks(features)) / count)
    spread = np.where(spread > 0, spread, 1.0)
    center = targets.mean(axis=0)
    gram, products = 0.0, 0.0
    for part, known in zip(_chunks(features), _chunks(targets), strict=True):
        scaled = (part - mean) / spread
        gram = gram + scaled.T @ scaled
        products = products + scaled.T @ (known - center)
    # From the products of features, whose number is small, and not of patches.
    squared, right = np.linalg.eigh(gram)
    kept = squared > squared.max(initial=0.0) * SINGULAR
    singular, right = np.sqrt(squared[kept]), right[:, kept]
    projected = (right.T @ products) / singular[:, None]
    outside = ((targets - center) ** 2).sum() - (projected**2).sum()
    errors = []
    for penalty in PENALTIES:
        shrunk = singular**2 / (singular**2 + penalty)
        residual = outside + (((1 - shrunk)[:, None] * projected) ** 2).sum()
        errors.append(residual / (1 - min(shrunk.sum() / count, 1 - 1e-9)) ** 2)
    best = int(np.argmin(errors))
    penalty = float(PENALTIES[best])
    weights = right @ ((singular / (singular**2 + penalty))[:, None] * projected)
    return Ridge(mean, spread, weights, center, penalty, float(errors[best] / count))


def _chunks(array: np.ndarray) -> Iterator[np.ndarray]:
    """Yield float64 copies of CHUNK rows."""
    yield from (array[first : first + CHUNK].astype(np.float64) for first in range(0, len(array), CHUNK))
