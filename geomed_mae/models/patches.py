"""Images to patches and back, in any number of spatial axes: the one place where pixels are rearranged.

Axis names used by the whole folder: b batch, c channel, n patch of the full grid (row-major), p pixel of a patch
(row-major), v visible and h hidden patches, d width. Nothing here knows how many channels or axes there are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from geomed_mae.errors import ConfigError


def patch_grid(space: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return how many patches fit along each spatial axis.

    Raises:
        ConfigError: a size is no multiple of the patch, or the numbers of axes differ.
    """
    if len(space) != len(patch) or any(size % step or size == 0 for size, step in zip(space, patch, strict=True)):
        raise ConfigError(
            f"an input of {' x '.join(map(str, space))} is no multiple of the patch {' x '.join(map(str, patch))}; "
            "crop or pad it (as invalid) to a multiple"
        )
    return tuple(size // step for size, step in zip(space, patch, strict=True))


def patchify(image: Shaped[Tensor, "b c *space"], patch: Sequence[int]) -> Shaped[Tensor, "b n c p"]:
    """Cut images into patches, in row-major order of the grid and of the pixels within a patch."""
    batch, channels, *space = image.shape
    grid = patch_grid(space, patch)
    axes = len(grid)
    split = [size for pair in zip(grid, patch, strict=True) for size in pair]
    cut = image.reshape(batch, channels, *split)  # b c (grid patch)...
    order = [0, *range(2, 2 + 2 * axes, 2), 1, *range(3, 3 + 2 * axes, 2)]
    return cut.permute(order).reshape(batch, math.prod(grid), channels, math.prod(patch))


def unpatchify(
    patches: Shaped[Tensor, "b n c p"], grid: Sequence[int], patch: Sequence[int]
) -> Shaped[Tensor, "b c *space"]:
    """Put patches back together: the inverse of `patchify`."""
    batch, _, channels, _ = patches.shape
    axes = len(grid)
    split = patches.reshape(batch, *grid, channels, *patch)
    order = [0, 1 + axes, *(axis for pair in range(axes) for axis in (1 + pair, 2 + axes + pair))]
    space = [count * step for count, step in zip(grid, patch, strict=True)]
    return split.permute(order).reshape(batch, channels, *space)


def select(items: Shaped[Tensor, "b n *rest"], index: Int[Tensor, "b k"]) -> Shaped[Tensor, "b k *rest"]:
    """Pick `index` along the second axis, per sample; a batch of one serves every sample."""
    if items.shape[0] == 1:
        return items[0][index]
    batch, tokens, *rest = items.shape
    rows = index + tokens * torch.arange(batch, device=index.device)[:, None]
    return items.reshape(batch * tokens, *rest)[rows]


def clean(pixels: Float[Tensor, "*shape"], valid: Bool[Tensor, "*#shape"]) -> Float[Tensor, "*shape"]:
    """Return pixels with exactly 0 where invalid, whatever (NaN, Inf, 1e30) stood there.

    A selection, never a product: 0 * NaN is NaN.
    """
    return torch.where(valid, pixels, torch.zeros((), dtype=pixels.dtype, device=pixels.device))
