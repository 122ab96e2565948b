"""Positions: sines and cosines of physical coordinates, fixed, without parameters.

A patch's coordinate along an axis is its index times spacing / reference spacing: 1 per patch where an image has the
reference spacing, 2 where its pixels are twice as coarse (Scale-MAE, arXiv 2212.14532). For 2D images at the reference
the table is the published one of MAE (arXiv 2111.06377), whose first half encodes columns and second half rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

BASE = 10000.0
"""Ratio of the longest to the shortest period (arXiv 1706.03762)."""


def sincos(coordinate: Float[Tensor, "*shape"], width: int) -> Float[Tensor, "*shape width"]:
    """Return `width` / 2 sines, then as many cosines, of one coordinate, computed in float64."""
    half = width // 2
    omega = BASE ** -(torch.arange(half, dtype=torch.float64, device=coordinate.device) / half)
    angle = coordinate.double()[..., None] * omega
    return torch.cat([angle.sin(), angle.cos()], dim=-1)


def position_table(
    grid: Sequence[int],
    width: int,
    *,
    spacing: Float[Tensor, "b axes"] | None = None,
    reference: Sequence[float] | None = None,
    device: torch.device | str | None = None,
) -> Float[Tensor, "b n width"]:
    """Return the codes of all patches of a grid, in row-major order.

    Args:
        grid: patches per spatial axis, ([slices,] rows, columns).
        width: of the model. It is split evenly (in even parts) between the axes, columns first; the rest stays 0.
        spacing: distance between pixels per sample and axis, metres or mm; None counts patches.
        reference: spacing at which neighbouring patches are 1 apart; None counts patches.
        device: where to make the table; that of `spacing` by default.

    Returns:
        float32, with a batch of 1 where all samples share one table.
    """
    device = device if device is not None or spacing is None else spacing.device
    if spacing is None or reference is None:
        ratio = torch.ones(1, len(grid), dtype=torch.float64, device=device)
    else:
        ratio = spacing.to(device).double() / torch.tensor(reference, dtype=torch.float64, device=device)
    part = width // len(grid) // 2 * 2
    codes = []
    for axis in reversed(range(len(grid))):
        line = torch.arange(grid[axis], dtype=torch.float64, device=device) * ratio[:, axis, None]
        code = sincos(line, part)  # b grid[axis] part
        shape = [1] * len(grid)
        shape[axis] = grid[axis]
        codes.append(code.reshape(len(code), *shape, part).expand(-1, *grid, -1).flatten(1, -2))
    table = torch.cat(codes, dim=-1).float()
    return torch.nn.functional.pad(table, (0, width - table.shape[-1]))
