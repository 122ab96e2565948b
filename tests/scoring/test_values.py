"""Values that are not defined stay out of means."""

from __future__ import annotations

import numpy as np
from sklearn.metrics import r2_score

from geomed_mae.scoring.values import mean_known, r_squared, ratio, rounded


def test_r_squared_is_one_for_the_truth_and_zero_for_its_mean():
    truth = np.array([0.0, 1.0, 2.0])
    assert r_squared(truth, truth) == 1.0
    assert r_squared(np.full(3, 1.0), truth) == 0.0
    assert r_squared(np.array([0.5, 1.0, 1.0]), truth) == r2_score(truth, [0.5, 1.0, 1.0])
    assert r_squared(truth, np.ones(3)) is None


def test_what_is_not_defined_is_none_and_no_part_of_a_mean():
    assert mean_known([None, 0.5, float("nan"), 1.0]) == 0.75
    assert mean_known([None]) is None and mean_known([]) is None
    assert ratio(1, 0) is None and ratio(1, 4) == 0.25
    assert rounded(float("nan")) is None and rounded(None) is None and rounded(1 / 3) == 0.333333
