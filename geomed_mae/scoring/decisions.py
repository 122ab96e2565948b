"""What probabilities say once a decision is asked of them: the likeliest class, or each that is likelier than not.

Also the scores that need no ranking, which add up over images: accuracies, Brier score (1950), calibration.
"""

from __future__ import annotations

import numpy as np

from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.scoring.calibration import BINS, histogram
from geomed_mae.scoring.confusion import balanced_accuracy
from geomed_mae.scoring.values import mean_known, ratio

DECISION = 0.5
"""Probability from which on a class of several is said to be there."""


def decide(chances: np.ndarray, *, multi_label: bool) -> np.ndarray:
    """Return which classes images are said to have, bool (images, classes), from their probabilities of that shape."""
    if multi_label:
        return chances >= DECISION
    return chances.argmax(axis=1)[:, None] == np.arange(chances.shape[1])


class Decisions:
    """Scores of decisions and probabilities, each over `counts`: how often each image counts, None for once."""

    def __init__(self, chances: np.ndarray, truth: np.ndarray, *, multi_label: bool) -> None:
        """Decide, and sum up each image once: bootstraps ask thousands of times.

        Args:
            chances: probabilities (images, classes).
            truth: 1, 0 or UNKNOWN (images, classes).
            multi_label: whether an image may have several classes, or none.
        """
        self._multi, self._truth, self._known = multi_label, truth, truth != UNKNOWN
        self._said = decide(chances, multi_label=multi_label)
        right = (truth == self._said) & self._known
        gaps = np.where(self._known, (chances - truth) ** 2, 0.0).sum(axis=1)
        # A case of calibration: each known entry, or with single labels the class that was decided for.
        cases = self._known if multi_label else self._said
        pairs = zip(chances, truth == 1, cases, strict=True)
        self._bins = np.array([histogram(chance[case], true[case]) for chance, true, case in pairs])
        size = truth.shape[1]
        self._pairs = truth.argmax(axis=1) * size + self._said.argmax(axis=1)
        self._right = (right.sum(axis=1) if multi_label else right.all(axis=1)).astype(np.float64)
        self._gaps = gaps / 2 if size == 2 and not multi_label else gaps
        self._asked = (self._known.sum(axis=1) if multi_label else np.ones(len(truth))).astype(np.float64)

    def _weight(self, counts: np.ndarray | None) -> np.ndarray:
        return np.ones(len(self._truth)) if counts is None else counts.astype(np.float64)

    def accuracy(self, counts: np.ndarray | None) -> float | None:
        """Share of images, or with multi-label of known entries, that are decided rightly."""
        weight = self._weight(counts)
        return ratio(float(weight @ self._right), float(weight @ self._asked))

    def balanced_accuracy(self, counts: np.ndarray | None) -> float | None:
        """Mean recall of the classes; with multi-label the mean over classes of (sensitivity + specificity) / 2."""
        if not self._multi:
            return balanced_accuracy(self.confusion(counts))
        return mean_known(
            [balanced_accuracy(self.two_by_two(number, counts)) for number in range(self._truth.shape[1])]
        )

    def confusion(self, counts: np.ndarray | None) -> np.ndarray:
        """Images of single labels (classes, classes), row = truth, column = decision."""
        size = self._truth.shape[1]
        table = np.bincount(self._pairs, weights=self._weight(counts), minlength=size**2)
        return table.reshape(size, size).astype(np.int64)

    def brier(self, counts: np.ndarray | None) -> float | None:
        """Mean squared gap between probability and truth, as scikit-learn has it: one class of two, the sum over more
        than two; with multi-label the mean over known entries.
        """
        weight = self._weight(counts)
        return ratio(float(weight @ self._gaps), float(weight @ self._asked))

    def bins(self, counts: np.ndarray | None) -> np.ndarray:
        """Calibration histogram (3, BINS), see `calibration`."""
        return np.tensordot(self._weight(counts), self._bins.reshape(-1, 3, BINS), axes=1)

    def two_by_two(self, number: int, counts: np.ndarray | None) -> np.ndarray:
        """Counts (2, 2) of one class against the rest, row = truth, over the images of which it is known."""
        known = self._known[:, number]
        pairs = 2 * self._truth[known, number].astype(np.int64) + self._said[known, number]
        return np.bincount(pairs, weights=self._weight(counts)[known], minlength=4).reshape(2, 2).astype(np.int64)
