"""AUROC and average precision of one class, fast enough to be taken a few thousand times.

Scores are sorted once; a bootstrap round only says how often each image was drawn. Both are those of scikit-learn
(roc_auc_score, average_precision_score with sample weights), to which the tests compare them.
"""

from __future__ import annotations

import numpy as np


class Ranking:
    """Images in the order of their scores for one class, and which of them have the class."""

    def __init__(self, scores: np.ndarray, positive: np.ndarray) -> None:
        """Sort.

        Args:
            scores: float (images,), larger means more sure.
            positive: (images,) 1, 0, or -1 where it is not known; those images are left out.
        """
        known = np.flatnonzero(positive >= 0)
        order = np.argsort(-scores[known], kind="stable")
        self._places = known[order]
        self._positive = positive[self._places] == 1
        ranked = scores[self._places]
        # Images of one score come together: a threshold cannot tell them apart.
        self._starts = np.flatnonzero(np.r_[True, ranked[1:] != ranked[:-1]]) if ranked.size else np.empty(0, int)

    def auroc(self, counts: np.ndarray | None = None) -> float | None:
        """Return the area under the ROC curve, ties counting half; None where only one kind occurs.

        Args:
            counts: (images,) how often each image counts; None counts each once.
        """
        positive, negative = self._by_score(counts)
        if not (positive.sum() > 0 and negative.sum() > 0):
            return None
        above = np.cumsum(positive) - positive / 2
        return float((negative * above).sum() / (positive.sum() * negative.sum()))

    def average_precision(self, counts: np.ndarray | None = None) -> float | None:
        """Return the mean of the precision at each threshold, weighted by the gain in recall; None without positives.

        Args:
            counts: (images,) how often each image counts; None counts each once.
        """
        positive, negative = self._by_score(counts)
        if not positive.sum() > 0:
            return None
        found = np.cumsum(positive)
        precision = found / np.maximum(found + np.cumsum(negative), 1e-12)
        return float((positive * precision).sum() / positive.sum())

    def _by_score(self, counts: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Return how many positives and negatives have each of the different scores, from the highest down."""
        if not self._places.size:
            return np.zeros(0), np.zeros(0)
        weight = np.ones(len(self._places)) if counts is None else counts[self._places].astype(np.float64)
        kinds = np.stack([weight * self._positive, weight * ~self._positive])
        return tuple(np.add.reduceat(kinds, self._starts, axis=1))
