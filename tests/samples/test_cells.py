"""Cells of places: which crops are read together, and that no place of an image is favoured by it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from geomed_mae.samples.cells import _edges, _plan, draw_cell
from geomed_mae.samples.crops import draw_places

LAYOUTS = [
    # shape, crop, block: tiles larger than, as large as and smaller than the crop; strips; one block; a small image
    ((200, 300), (32, 32), (64, 64)),
    ((128, 128), (32, 48), (32, 32)),
    ((130, 97), (40, 40), (16, 16)),
    ((150, 90), (32, 24), (1, 90)),
    ((150, 90), (32, 24), (16, 90)),
    ((100, 80), (32, 24), (100, 80)),
    ((20, 200), (32, 32), (16, 16)),
]


def places(shape, crop, block, *, count, reads, seed=0):
    rng = np.random.default_rng(seed)
    return np.array([draw_cell(rng, shape, crop, count, block=block) for _ in range(reads)])


@pytest.mark.parametrize(("shape", "crop", "block"), LAYOUTS)
@pytest.mark.parametrize("count", [1, 3, 16])
def test_each_crop_is_anywhere_with_equal_probability(shape, crop, block, count):
    drawn = places(shape, crop, block, count=count, reads=6000)
    for number, axis in itertools.product({0, count - 1}, range(2)):
        room = max(shape[axis] - crop[axis], 0) + 1
        starts = drawn[:, number, axis]
        assert starts.min() >= 0 and starts.max() < room
        # Kolmogorov and Smirnov's distance: 1.95 / sqrt(n) is exceeded in one case of a thousand, were it continuous.
        steps = np.cumsum(np.bincount(starts, minlength=room)) / len(starts)
        assert np.abs(steps - np.arange(1, room + 1) / room).max() < 1.95 / np.sqrt(len(starts))


@pytest.mark.parametrize(("shape", "crop", "block"), [((40, 44), (16, 16), (16, 16)), ((30, 40), (12, 16), (1, 40))])
def test_each_pair_of_row_and_column_is_as_likely_as_any_other(shape, crop, block):
    drawn = places(shape, crop, block, count=8, reads=20_000)
    rows, columns = (size - part + 1 for size, part in zip(shape, crop, strict=True))
    counts = np.zeros((rows, columns))
    np.add.at(counts, (drawn[:, 5, 0], drawn[:, 5, 1]), 1)
    assert counts.min() > 0, "every place is reached"
    expected = drawn.shape[0] / counts.size
    chi2 = ((counts - expected) ** 2 / expected).sum()
    # Mean and standard deviation of chi-squared with n - 1 degrees of freedom; five deviations are beyond chance.
    freedom = counts.size - 1
    assert abs(chi2 - freedom) < 5 * np.sqrt(2 * freedom)


def test_pixels_are_covered_as_by_independent_crops_across_the_borders_of_blocks():
    shape, crop, block = (96, 96), (24, 24), (32, 32)
    rng, counts = np.random.default_rng(1), np.zeros((2, *shape))
    for _ in range(3000):
        for row, column in draw_cell(rng, shape, crop, 8, block=block):
            counts[0, row : row + 24, column : column + 24] += 1
        for _ in range(8):
            row, column = rng.integers(0, 96 - 24 + 1, 2)
            counts[1, row : row + 24, column : column + 24] += 1
    assert counts.min() > 0
    # At the corners few crops reach a pixel; inside, the two histograms agree within chance.
    inside = counts[:, 12:-12, 12:-12]
    assert np.abs(inside[0] / inside[1] - 1).max() < 0.2
    profile = inside.sum(axis=1)
    assert np.abs(profile[0] / profile[1] - 1).max() < 0.05


@pytest.mark.parametrize(
    ("shape", "crop", "block", "count", "most"),
    [
        ((5120, 5120), (256, 256), (512, 512), 16, 4),  # 2 x 2 tiles
        ((5120, 5120), (256, 256), (256, 256), 8, 4),
        ((5120, 5120), (256, 256), (16, 5120), 16, (256 + 32) // 16 + 1),
        ((5120, 5120), (256, 256), (1, 5120), 16, 256 + 32),
    ],
)
def test_a_read_needs_few_blocks(shape, crop, block, count, most):
    for starts in places(shape, crop, block, count=count, reads=60):
        touched = {
            (row, column)
            for start in starts
            for row in range(start[0] // block[0], -(-(start[0] + crop[0]) // block[0]))
            for column in range(start[1] // block[1], -(-(start[1] + crop[1]) // block[1]))
        }
        assert len(touched) <= most


def test_crops_of_a_read_spread_over_their_cell():
    for starts in places((4096, 4096), (256, 256), (512, 512), count=8, reads=100):
        assert len({tuple(start) for start in starts}) == 8
        assert (starts.max(axis=0) - starts.min(axis=0) >= 127).all()


def test_cells_grow_with_the_crops_that_are_read_together():
    least, more = (_plan((8192, 8192), (256, 256), (256, 256), count) for count in (4, 64))
    assert all(len(a) > len(b) for a, b in zip(least, more, strict=True))


@pytest.mark.parametrize("block", [1, 7, 64, 100, 5000])
@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_edges_cover_all_places_without_a_sliver(block, blocks):
    for length, crop in itertools.product((10, 64, 65, 300, 1000), (1, 16, 64, 100)):
        edges = _edges(length, crop, block, blocks=blocks)
        assert edges[0] == 0 and edges[-1] == max(length - crop, 0) + 1
        widths = np.diff(edges)
        assert (widths >= (max(1, crop // 8) if len(widths) > 1 else 1)).all()


def test_images_without_blocks_keep_the_neighbourhood(memory_index):
    plain, blocked = memory_index.add(np.ones((1, 500, 500))), memory_index.add(np.ones((1, 500, 500)), block=(1, 500))
    rows = {row.key: row for row in memory_index.rows}
    apart = {}
    for key in (plain, blocked):
        drawn = [draw_places(np.random.default_rng(n), rows[key], (32, 32), 8) for n in range(50)]
        apart[key] = max(np.ptp([column for _, column in starts]) for starts in drawn)
    assert apart[plain] <= 32 < 300 < apart[blocked], "strips are read whole, so that crops lie anywhere in them"
