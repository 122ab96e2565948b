"""Plain values of scores: None is "not defined", and is neither 0 nor 1."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DIGITS = 6
"""Decimals of the numbers in files of scores."""


def mean_known(values: Sequence[float | None]) -> float | None:
    """Return the mean of the values that are neither None nor NaN, or None."""
    known = [value for value in values if value is not None and not np.isnan(value)]
    return float(np.mean(known)) if known else None


def r_squared(prediction: np.ndarray, truth: np.ndarray) -> float | None:
    """Return 1 - residual / total sum of squares of float arrays (n,), None where the truth is constant."""
    total = float(((truth - truth.mean()) ** 2).sum())
    return 1.0 - float(((truth - prediction) ** 2).sum()) / total if total > 0 else None


def ratio(above: float, below: float) -> float | None:
    """Return above / below, None where `below` is 0."""
    return float(above / below) if below > 0 else None


def rounded(value: float | None) -> float | None:
    """Return a value for a file: DIGITS decimals; None and NaN are None."""
    return None if value is None or not np.isfinite(value) else round(float(value), DIGITS)
