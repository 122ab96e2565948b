"""Positions: the published table in 2D at the reference, physical coordinates elsewhere."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

from geomed_mae.models.positions import position_table


def published(rows: int, columns: int, width: int) -> torch.Tensor:
    """MAE's table: its released code has columns in the first half, transformers builds rows first and swaps."""
    table = build_2d_sinusoidal_position_embedding(rows, columns, width)
    return torch.cat([table[:, width // 2 :], table[:, : width // 2]], dim=1)


@pytest.mark.parametrize("grid", [(14, 14), (3, 7)])
def test_2d_at_the_reference_is_the_published_table(grid):
    assert torch.allclose(position_table(grid, 64)[0], published(*grid, 64), atol=1e-7)
    at_reference = position_table(grid, 64, spacing=torch.tensor([[10.0, 10.0]]), reference=(10.0, 10.0))
    assert torch.equal(at_reference, position_table(grid, 64))


def test_pixels_twice_as_coarse_lie_twice_as_far_apart():
    fine = position_table((8, 8), 32, spacing=torch.tensor([[10.0, 10.0]]), reference=(10.0, 10.0)).reshape(8, 8, 32)
    coarse = position_table((4, 4), 32, spacing=torch.tensor([[20.0, 20.0]]), reference=(10.0, 10.0)).reshape(4, 4, 32)
    assert torch.allclose(coarse, fine[::2, ::2], atol=1e-6)


def test_each_sample_has_its_own_spacing():
    spacing = torch.tensor([[10.0, 10.0], [20.0, 10.0]])
    both = position_table((2, 3), 32, spacing=spacing, reference=(10.0, 10.0))
    assert both.shape == (2, 6, 32)
    assert torch.equal(both[:1], position_table((2, 3), 32))
    assert torch.allclose(both[1, 3, 16:], position_table((3, 1), 32)[0, 2, 16:], atol=1e-6)


def test_three_axes_share_the_width_evenly_and_leave_the_rest_zero():
    table = position_table((2, 3, 4), 32)[0].reshape(2, 3, 4, 32)  # 3 parts of 10, 2 left
    assert (table[..., 30:] == 0).all()
    assert (table[:, :, 0, :10] == table[0, 0, 0, :10]).all()
    assert (table[0, 0, 0, :10] != table[0, 0, 1, :10]).any()
    assert (table[0, 0, 0, 10:20] != table[0, 1, 0, 10:20]).any()
    assert (table[0, 0, 0, 20:30] != table[1, 0, 0, 20:30]).any()


@pytest.mark.parametrize("grid", [(8, 8), (4, 4, 4)])
def test_positions_are_distinct(grid):
    table = torch.nn.functional.normalize(position_table(grid, 48)[0], dim=-1)
    closest = max(float(one @ other) for one, other in itertools.combinations(table, 2))
    assert closest < 0.99
