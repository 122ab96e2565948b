"""Calibration: whether a model that says 80 % is right in 80 % of the cases, from histograms of constant size.

A histogram is float64 (3, BINS): per bin of confidence the number of cases, the sum of their confidence and the number
that came true. Histograms add up over pixels, images and bootstrap draws, so that no pixel has to be kept.
Expected calibration error: Naeini et al. 2015; for networks Guo et al., arXiv 1706.04599.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from geomed_mae.scoring.values import ratio, rounded

BINS = 15
"""Bins of equal width from 0 to 1, as many as in Guo et al."""


def histogram(confidence: np.ndarray, true: np.ndarray) -> np.ndarray:
    """Return the histogram (3, BINS) of cases.

    Args:
        confidence: probabilities (n,), 0 to 1.
        true: bool (n,), whether what was said with that probability is so.
    """
    # Probabilities of float32 sums can lie a rounding above 1.
    place = np.clip((confidence * BINS).astype(np.int64), 0, BINS - 1)
    return np.stack(
        [
            np.bincount(place, minlength=BINS),
            np.bincount(place, weights=confidence, minlength=BINS),
            np.bincount(place, weights=true, minlength=BINS),
        ]
    ).astype(np.float64)


def histograms(chances: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Return (1 + classes, 3, BINS): of the likeliest class, then of each class against the rest.

    Args:
        chances: probabilities (classes, n).
        truth: class numbers (n,).
    """
    best = chances.argmax(axis=0)
    rows = [histogram(np.take_along_axis(chances, best[None], axis=0)[0], best == truth)]
    rows += [histogram(one, truth == number) for number, one in enumerate(chances)]
    return np.stack(rows)


def calibration_error(counts: np.ndarray) -> float | None:
    """Return the mean gap between confidence and truth over cases, 0 (perfect) to 1; None without cases."""
    return ratio(float(np.abs(counts[1] - counts[2]).sum()), float(counts[0].sum()))


def curve(counts: np.ndarray) -> list[dict[str, Any]]:
    """Return the reliability diagram: per bin with cases their number, mean confidence and share that came true."""
    return [
        {"cases": int(cases), "confidence": rounded(said / cases), "true": rounded(came / cases)}
        for cases, said, came in counts.T
        if cases > 0
    ]
