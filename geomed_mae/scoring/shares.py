"""Scores of predicted shares: which part of a patch belongs to each class, by R^2, with its uncertainty over groups.

Sums are kept per image, from which the score over any images follows: a bootstrap costs one product of small matrices.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from geomed_mae.scoring.values import mean_known, rounded

FEWEST = 10
"""A class counts in the mean when it occurs in at least so many patches on both sides of the split: R^2 of a class that
was hardly there to learn from, or hardly there to score on, is any number below 0."""


class ShareScores:
    """R^2 of shares in patches of images, added image by image.

    Attributes:
        task, metric: what `headline` is.
        classes: names or stored values of the classes.
        counted: bool (classes,): which classes the mean is over.
    """

    task = "shares"
    metric = "R^2 of class shares in patches, mean over classes"

    def __init__(self, classes: Sequence[str], counted: np.ndarray) -> None:
        self.classes = tuple(classes)
        self.counted = np.asarray(counted, dtype=bool)
        self._keys: list[str] = []
        self._groups: list[str] = []
        self._rows: list[np.ndarray] = []

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the images, in the order in which they were added."""
        return tuple(self._keys)

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups of the images, in the same order."""
        return tuple(self._groups)

    def add(self, key: str, group: str, found: np.ndarray, truth: np.ndarray) -> None:
        """Add the patches of one image: predicted and true shares, float (n, classes).

        Raises:
            ValueError: the shapes differ.
        """
        if found.shape != truth.shape:
            raise ValueError(f"shares of shape {found.shape} cannot be scored against {truth.shape}")
        self._keys.append(key)
        self._groups.append(group)
        count = np.full(truth.shape[1], len(truth))
        right = np.full(truth.shape[1], (found.argmax(axis=1) == truth.argmax(axis=1)).sum())
        self._rows.append(
            np.stack([count, truth.sum(axis=0), (truth**2).sum(axis=0), ((truth - found) ** 2).sum(axis=0), right])
        )

    def _sums(self, indices: np.ndarray | None) -> np.ndarray:
        """Return (5, classes): patches, sum and sum of squares of the truth, squared errors, right answers."""
        rows = np.stack(self._rows)
        if indices is None:
            return rows.sum(axis=0)
        return np.tensordot(np.bincount(indices, minlength=len(rows)).astype(np.float64), rows, axes=1)

    def r2(self, indices: np.ndarray | None = None) -> list[float | None]:
        """Return R^2 per class over images[indices], None where its share is the same in every patch."""
        count, total, squares, errors, _ = self._sums(indices)
        spread = squares - total**2 / np.maximum(count, 1)
        # A share that never varies leaves rounding behind, not 0.
        return [
            float(1 - error / own) if own > 1e-9 * max(n, 1) else None
            for error, own, n in zip(errors, spread, count, strict=True)
        ]

    def headline(self, indices: np.ndarray | None = None) -> float | None:
        """Return the mean R^2 of the classes that count, over images[indices], repeats allowed; None without any."""
        return mean_known([value for value, counts in zip(self.r2(indices), self.counted, strict=True) if counts])

    def accuracy(self) -> float:
        """Return the share of patches whose largest class is found."""
        count, *_, right = self._sums(None)
        return float(right[0] / count[0])

    def patches(self) -> int:
        """Return the number of patches."""
        return int(self._sums(None)[0, 0])

    def summary(self) -> dict[str, object]:
        """Return plain values: R^2 per class, their mean over the classes that count, and accuracy."""
        return {
            "r2": [rounded(value) for value in self.r2()],
            "mean_r2": rounded(self.headline()),
            "accuracy": rounded(self.accuracy()),
            "classes_not_in_the_mean": [
                name for name, counts in zip(self.classes, self.counted, strict=True) if not counts
            ],
        }
