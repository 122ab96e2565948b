"""Calibration counted by hand, and in parts."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.calibration import calibration_curve

from geomed_mae.scoring.calibration import BINS, calibration_error, curve, histogram, histograms


def test_expected_calibration_error_is_that_counted_by_hand():
    # Two bins: 0.9 said four times and right twice, 0.5 said twice and right once.
    counts = histogram(np.array([0.9, 0.9, 0.9, 0.9, 0.5, 0.5]), np.array([1, 1, 0, 0, 1, 0], bool))
    assert calibration_error(counts) == pytest.approx(4 / 6 * 0.4)
    assert curve(counts) == [
        {"cases": 2, "confidence": 0.5, "true": 0.5},
        {"cases": 4, "confidence": 0.9, "true": 0.5},
    ]
    assert calibration_error(np.zeros((3, BINS))) is None


def test_the_curve_is_that_of_scikit_learn():
    rng = np.random.default_rng(0)
    said = rng.random(2000)
    true = rng.random(2000) < said**2
    share, confidence = calibration_curve(true, said, n_bins=BINS)
    points = curve(histogram(said, true))
    np.testing.assert_allclose([point["true"] for point in points], share, atol=1e-6)
    np.testing.assert_allclose([point["confidence"] for point in points], confidence, atol=1e-6)


def test_parts_add_up_to_the_whole_and_certainty_lies_in_the_last_bin():
    rng = np.random.default_rng(1)
    chances = rng.dirichlet((1, 1, 1), size=300).T
    truth = rng.integers(0, 3, 300)
    np.testing.assert_allclose(
        histograms(chances[:, :100], truth[:100]) + histograms(chances[:, 100:], truth[100:]),
        histograms(chances, truth),
    )
    assert histogram(np.array([1.0, 1.0000001]), np.array([True, True]))[0, -1] == 2


def test_each_class_has_a_histogram_of_its_own():
    chances = np.array([[0.8, 0.3], [0.2, 0.7]], np.float32)
    found = histograms(chances, np.array([0, 0]))
    assert calibration_error(found[0]) == pytest.approx((0.2 + 0.7) / 2, abs=1e-6)
    assert calibration_error(found[1]) == pytest.approx((0.2 + 0.7) / 2, abs=1e-6)
    assert found[2, 2].sum() == 0
