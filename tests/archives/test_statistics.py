"""Statistics over valid pixels."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.archives.statistics import summarise


def test_invalid_pixels_are_not_looked_at():
    values = np.random.default_rng(0).normal(50, 5, (1, 40, 40)).astype(np.float32)
    valid = np.ones((1, 40, 40), bool)
    valid[:, :, 20:] = False
    spoiled = np.where(valid, values, np.nan).astype(np.float32)
    assert summarise(spoiled, valid) == summarise(np.where(valid, values, 1e9).astype(np.float32), valid)
    assert summarise(spoiled, valid)[0].count == 800


def test_the_robust_spread_of_a_normal_distribution_is_its_standard_deviation():
    values = np.random.default_rng(0).normal(-3, 7, (1, 300, 300)).astype(np.float32)
    assert summarise(values, np.ones((1, 1, 1), bool))[0].spread == pytest.approx(7, rel=0.02)


def test_spread_is_positive_even_where_nearly_everything_is_one_value():
    sparse = np.zeros((1, 100, 100), np.float32)
    sparse[0, 0, :10] = 5
    assert summarise(sparse, np.ones((1, 1, 1), bool))[0].spread > 0
    assert summarise(np.zeros((1, 4, 4), np.float32), np.ones((1, 1, 1), bool))[0].spread == 1.0


def test_a_channel_without_a_valid_pixel_has_zero_counts():
    assert summarise(np.full((1, 2, 2), np.nan, np.float32), np.zeros((1, 2, 2), bool))[0].count == 0


def test_percentiles_of_large_channels_stay_within_a_thousandth(monkeypatch):
    monkeypatch.setattr("geomed_mae.archives.statistics.MAX_SAMPLES", 50_000)
    values = np.random.default_rng(1).normal(0, 1, (1, 1000, 1000)).astype(np.float32)
    entry = summarise(values, np.ones((1, 1, 1), bool))[0]
    assert entry.median == pytest.approx(np.median(values), abs=0.02)
    assert entry.count == 1_000_000
