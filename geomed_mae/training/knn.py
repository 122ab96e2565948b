"""Answers of the nearest neighbours: the read-out that fits nothing at all.

Features are standardised by the training side and compared by their angle; the nearest vote with the weight
exp(cosine / TEMPERATURE), as in Wu et al. (arXiv 1805.01978) and DINO.
"""

from __future__ import annotations

import numpy as np

NEIGHBOURS = 20
"""Training rows that are asked; all where there are fewer."""
TEMPERATURE = 0.07
"""Of the weights of votes (Wu et al.)."""
BANK = 20_000
"""Training rows that are kept to compare with; of more a fixed random choice."""
WORKING_MIB = 64
"""Memory for distances; scikit-learn would take a GiB."""
SEED = 0


def nearest(
    train: np.ndarray,
    values: np.ndarray,
    known: np.ndarray | None,
    asked: np.ndarray,
    *,
    neighbours: int = NEIGHBOURS,
    bank: int = BANK,
) -> np.ndarray:
    """Return the weighted mean of the values of the nearest training rows, float64 (m, t).

    Args:
        train: (n, f) features of the training side.
        values: (n, t) what is known of them: shares, or 1 and 0.
        known: bool (n, t), which values count; None counts all. Where no neighbour of a row is known, the mean of the
            training side is the answer.
        asked: (m, f) features.
        neighbours: how many are asked.
        bank: training rows that are kept.
    """
    from sklearn import config_context  # slow to import
    from sklearn.neighbors import NearestNeighbors

    if len(train) > bank:
        chosen = np.sort(np.random.default_rng(SEED).choice(len(train), bank, replace=False))
        train, values, known = train[chosen], values[chosen], None if known is None else known[chosen]
    mean, spread = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    spread = np.where(spread > 0, spread, 1.0)
    known_rows, asked = (((rows - mean) / spread).astype(np.float32) for rows in (train, asked))
    count = min(neighbours, len(known_rows))
    with config_context(working_memory=WORKING_MIB):
        search = NearestNeighbors(n_neighbors=count, metric="cosine", algorithm="brute").fit(known_rows)
        distances, places = search.kneighbors(asked)
    # From the nearest on, so that the exponent neither overflows nor vanishes.
    weights = np.exp((distances[:, :1] - distances) / TEMPERATURE)[..., None]
    if known is None:
        return (weights * values[places]).sum(axis=1) / weights.sum(axis=1)
    weights = weights * known[places]
    total = weights.sum(axis=1)
    fallback = np.where(known, values, 0).sum(axis=0) / np.maximum(known.sum(axis=0), 1)
    answers = (weights * np.where(known, values, 0)[places]).sum(axis=1) / np.where(total > 0, total, 1.0)
    return np.where(total > 0, answers, fallback)
