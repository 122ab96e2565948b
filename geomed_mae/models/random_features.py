"""Random convolutional features: a floor that has seen no label and has learned no weight.

Random filters slide over an image, both signs of what they answer are rectified, and the mean over an area is its
feature (Rahimi & Recht 2007; for satellite images Rolf et al. 2021, s41467-021-24638-z). Two kinds of filters:

    gaussian   independent normal weights, as torchgeo's RCF has them by default
    data       small cut-outs of the images themselves, whitened, as in MOSAIKS

They need no training and take a few lines, so an encoder that is not above them has not been worth its pretraining.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

FILTERS = 256
"""Number of filters; each gives two features, one a sign."""

KERNEL = 3
"""Pixels or voxels of a filter along each axis."""

BIAS = -1.0
"""Added to a filter's answer before it is rectified: what is near 0 says nothing (torchgeo's RCF)."""

WHITENING = 1e-3
"""Added to the variance of each direction when cut-outs are whitened (Coates & Ng 2012)."""

MAX_VALUES = 1 << 24
"""Values of all filters that are in memory together, 64 MiB; an image is worked through in strips."""


class RandomFeatures:
    """A bank of filters.

    Attributes:
        weights: (filters, channels, *kernel).
    """

    def __init__(self, weights: Float[Tensor, "filter channel *kernel"]) -> None:
        self.weights = weights

    @property
    def width(self) -> int:
        """Number of features."""
        return 2 * len(self.weights)

    @classmethod
    def gaussian(cls, channels: int, ndim: int, *, filters: int = FILTERS, seed: int = 0) -> RandomFeatures:
        """Return filters of independent normal weights, of variance 1 / number of weights."""
        generator = torch.Generator().manual_seed(seed)
        shape = (filters, channels, *(KERNEL,) * ndim)
        return cls(torch.randn(shape, generator=generator) / float(np.sqrt(np.prod(shape[1:]))))

    @classmethod
    def of_data(cls, cut_outs: Float[Tensor, "n channel *kernel"], *, filters: int = FILTERS) -> RandomFeatures:
        """Return cut-outs as filters: whitened over all of them (ZCA), each of length 1; the first `filters` of them.

        Args:
            cut_outs: in model units, in random order; more than `filters` of them make the whitening better.
            filters: number of filters; repeated where there are fewer cut-outs.
        """
        flat = cut_outs.flatten(1).double()
        centred = flat - flat.mean(dim=0)
        values, vectors = torch.linalg.eigh(centred.T @ centred / max(len(flat) - 1, 1))
        whitening = vectors @ torch.diag((values.clamp_min(0) + WHITENING).rsqrt()) @ vectors.T
        chosen = (centred @ whitening)[torch.arange(filters) % len(flat)]
        # A filter answers whitened pixels: the whitening is applied to it once more, and not to every image.
        found = functional.normalize(chosen, dim=1) @ whitening
        return cls(found.float().unflatten(1, cut_outs.shape[1:]))

    @torch.inference_mode()
    def grid(
        self, pixels: Float[Tensor, "#c *space"], valid: Bool[Tensor, "*space"], patch: Sequence[int]
    ) -> Float[np.ndarray, "#features *grid"]:
        """Return the mean of each feature over the valid pixels of each patch, NaN where a patch has none.

        Args:
            pixels: model units, 0 where invalid.
            valid: which pixels count.
            patch: its size in pixels; patches at the far border hold the pixels that are there.
        """
        sums, counts = self._pooled(pixels, valid, patch)
        return np.where(counts > 0, sums / np.maximum(counts, 1), np.nan).astype(np.float32)

    def vector(
        self, pixels: Float[Tensor, "#c *space"], valid: Bool[Tensor, "*space"]
    ) -> Float[np.ndarray, "#features"]:
        """Return the mean of each feature over all valid pixels, NaN where there is none."""
        sums, counts = self._pooled(pixels, valid, [min(size, 32) for size in valid.shape])
        inner = tuple(range(1, sums.ndim))
        total = counts.sum()
        return (sums.sum(axis=inner) / total if total else np.full(len(sums), np.nan)).astype(np.float32)

    @torch.inference_mode()
    def _pooled(self, pixels: Tensor, valid: Tensor, patch: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 sums (features, *grid) over patches, and the number of valid pixels (*grid)."""
        space, half = valid.shape, KERNEL // 2
        convolve = functional.conv2d if len(space) == 2 else functional.conv3d
        grid = [-(-size // step) for size, step in zip(space, patch, strict=True)]
        whole = [count * step for count, step in zip(grid, patch, strict=True)]
        # From the last axis to the first, as torch wants it: half a kernel on both sides, and up to a whole patch.
        gaps = [(half, full - size + half) for size, full in zip(space, whole, strict=True)]
        padded = functional.pad(pixels, [gap for pair in reversed(gaps) for gap in pair])
        known = functional.pad(
            valid.float(), [gap for full, size in _last_first(whole, space) for gap in (0, full - size)]
        )
        rows = max(MAX_VALUES // (self.width * int(np.prod(whole[1:]))) // patch[0], 1) * patch[0]
        sums, counts = [], []
        for first in range(0, whole[0], rows):
            last = min(first + rows, whole[0])
            answers = convolve(padded[None, :, first : last + 2 * half], self.weights)[0]
            here = known[first:last]
            sides = torch.cat([functional.relu(answers + BIAS), functional.relu(-answers + BIAS)])
            sums.append(_sum_patches(sides * here, patch))
            counts.append(_sum_patches(here[None], patch)[0])
        return np.concatenate(sums, axis=1), np.concatenate(counts)


def _last_first(whole: Sequence[int], space: Sequence[int]) -> list[tuple[int, int]]:
    return list(zip(reversed(whole), reversed(space), strict=True))


def _sum_patches(values: Tensor, patch: Sequence[int]) -> np.ndarray:
    """Sum (features, *space), whole patches, over each patch; float64, of float32 means, which pooling is fast at."""
    pool = functional.avg_pool2d if len(patch) == 2 else functional.avg_pool3d
    return pool(values[None], tuple(patch))[0].double().numpy() * float(np.prod(patch))
