"""Statistics over valid pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomed_mae.archives.statistics import BlockMeans, Histogram, Running, summarise


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


def test_a_histogram_counts_all_valid_values_between_its_edges():
    values = np.random.default_rng(0).normal(50, 5, (2, 40, 40)).astype(np.float32)
    valid = np.ones((1, 40, 40), bool)
    valid[:, :10] = False
    running = Running(2, 1600)
    running.add(values[:, :20], valid[:, :20])
    running.add(values[:, 20:], valid[:, 20:])
    found = running.histogram(1, 16)
    expected, edges = np.histogram(values[1, 10:].astype(float), 16, np.percentile(values[1, 10:], (0.5, 99.5)))
    assert found.counts == tuple(expected)
    assert found.edges == pytest.approx(edges)
    assert found.every == 1


def test_a_histogram_of_nothing_or_of_one_value_has_one_bin():
    running = Running(2, 4)
    running.add(np.full((2, 2, 2), 7, np.float32), np.stack([np.ones((2, 2), bool), np.zeros((2, 2), bool)]))
    assert running.histogram(0, 8) == Histogram((7.0, 7.0), (4,), 1)
    assert running.histogram(1, 8).counts == (0,)


@given(st.tuples(st.integers(1, 30), st.integers(1, 30)), st.lists(st.integers(1, 9), min_size=1), st.integers(0, 99))
def test_block_means_are_means_of_valid_pixels_however_the_image_is_cut(shape, heights, seed):
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(2, *shape)).astype(np.float32)
    valid = rng.random((1, *shape)) < 0.8
    array[np.broadcast_to(~valid, array.shape)] = np.nan
    means = BlockMeans(2, shape, (8, 5))
    top = 0
    while top < shape[0]:
        height = heights[top % len(heights)]
        means.add(array[:, top : top + height], valid[:, top : top + height])
        top += height
    found, share = means.result()
    grid = (min(8, shape[0]), min(5, shape[1]))
    assert found.shape == (2, *grid)
    for cell in np.ndindex(grid):
        place = tuple(slice(k * n // g, (k + 1) * n // g) for k, n, g in zip(cell, shape, grid, strict=True))
        inside = valid[0][place]
        assert share[(0, *cell)] == pytest.approx(inside.mean())
        for channel in range(2):
            values = array[channel][place][inside].astype(float)
            if values.size:
                assert found[(channel, *cell)] == pytest.approx(values.mean(), abs=1e-6)
            else:
                assert np.isnan(found[(channel, *cell)])


def test_block_means_of_a_volume():
    array = np.arange(2 * 4 * 6, dtype=np.float32).reshape(1, 2, 4, 6)
    means = BlockMeans(1, (2, 4, 6), (16, 2, 3))
    means.add(array, np.ones((1, 1, 1, 1), bool))
    expected = array[0].reshape(2, 2, 2, 3, 2).mean(axis=(2, 4))
    np.testing.assert_allclose(means.result()[0][0], expected)
