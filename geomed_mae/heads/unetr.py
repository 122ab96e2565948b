"""UNETR head: a class a pixel, by the decoder of UNETR (Hatamizadeh et al., arXiv 2103.10504) from MONAI's blocks.

The published network is made for patches of 16 and twelve blocks, with maps of four of them. Here the decoder follows
the patch, of any size and anisotropic: as many steps as its longest axis has prime factors, the coarsest first, so that
an axis with few factors is finished where the others are still coarse. The last map starts at the bottom, the earlier
ones come in on the way up (where there are more maps than steps, side by side), the image at its own resolution.
With patches of 16 and four maps this is MONAI's UNETR, number by number. MONAI is imported when a head is built: that
takes seconds.
"""

from __future__ import annotations

import itertools

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geomed_mae.heads import HeadInputs, HeadSpec

TASKS = ("segment",)
MIN_WIDTH = 16
"""UNETR's width at the image's resolution; coarser steps have at most `HeadSpec.width`."""
NORM = "instance"
"""UNETR's normalisation, per sample and channel."""


def build(spec: HeadSpec) -> UnetrHead:
    """Return UNETR's decoder for 2 or 3 spatial axes, by the length of `spec.patch`."""
    return UnetrHead(spec)


class UnetrHead(nn.Module):
    """Steps of transposed convolution, each followed by a residual block that takes in a skip of its resolution."""

    def __init__(self, spec: HeadSpec) -> None:
        from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock

        super().__init__()
        axes, steps = len(spec.patch), upsampling_steps(spec.patch)
        widths = [max(spec.width >> step, MIN_WIDTH) for step in range(len(steps))]
        self.bottom, *self.sources = map_sources(spec.maps, len(steps) - 1)
        block = {"kernel_size": 3, "norm_name": NORM, "res_block": True}
        self.skips = nn.ModuleList(
            _skip(len(source) * spec.embed_dim, width, steps[: level + 1])
            for level, (source, width) in enumerate(zip(self.sources, widths, strict=False))
        )
        # The stem is shown which pixels are valid: a scaled value of 0 alone does not say so.
        self.stem = UnetrBasicBlock(axes, spec.channels + 1, widths[-1], stride=1, **block)
        befores = [len(self.bottom) * spec.embed_dim, *widths]
        self.steps = nn.ModuleList(
            UnetrUpBlock(axes, before, width, upsample_kernel_size=step, **block)
            for before, width, step in zip(befores, widths, steps, strict=False)
        )
        self.classify = UnetOutBlock(axes, widths[-1], len(spec.classes))

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "batch class *space"]:
        """Return logits at the resolution of `inputs.pixels`."""
        seen = inputs.valid.to(inputs.pixels.dtype).mean(dim=1, keepdim=True)
        skips = [
            skip(torch.cat([inputs.maps[number] for number in source], dim=1))
            for skip, source in zip(self.skips, self.sources, strict=True)
        ]
        skips.append(self.stem(torch.cat([inputs.pixels, seen], dim=1)))
        features = torch.cat([inputs.maps[number] for number in self.bottom], dim=1)
        for step, skip in zip(self.steps, skips, strict=True):
            features = step(features, skip)
        return self.classify(features)


def upsampling_steps(patch: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the factors per axis of the steps from tokens to pixels, the coarsest first; their product is the patch.

    >>> upsampling_steps((2, 8, 8))
    [(2, 2, 2), (1, 2, 2), (1, 2, 2)]
    """
    factors = [_primes(size) for size in patch]
    return list(itertools.zip_longest(*factors, fillvalue=1)) or [(1,) * len(patch)]


def map_sources(maps: int, levels: int) -> list[tuple[int, ...]]:
    """Return the numbers of the maps that the bottom starts from and that each level of skips, upwards, is made of.

    >>> map_sources(3, 2)
    [(2,), (1,), (0,)]
    """
    earlier = list(range(maps - 1))[::-1] or [0]
    if levels == 0:
        return [tuple(range(maps))]
    skips = [(earlier[min(level, len(earlier) - 1)],) for level in range(levels)]
    skips[-1] = tuple(earlier[levels - 1 :]) or skips[-1]
    return [(maps - 1,), *skips]


def _primes(size: int) -> list[int]:
    """Return the prime factors of a whole number, the largest first."""
    found = []
    for factor in range(2, size + 1):
        while size % factor == 0:
            found.append(factor)
            size //= factor
    return found[::-1]


def _skip(before: int, width: int, steps: list[tuple[int, ...]]) -> nn.Sequential:
    """UnetrPrUpBlock with a factor of its own per step and axis: MONAI's takes one for all of its steps."""
    from monai.networks.blocks import UnetResBlock, UnetrPrUpBlock

    axes = len(steps[0])
    layers: list[nn.Module] = []
    for number, step in enumerate(steps):
        shape = {"num_layer": 0, "kernel_size": 3, "stride": 1, "norm_name": NORM}
        layers.append(UnetrPrUpBlock(axes, width if number else before, width, upsample_kernel_size=step, **shape))
        if number:
            layers.append(UnetResBlock(axes, width, width, kernel_size=3, stride=1, norm_name=NORM))
    return nn.Sequential(*layers)
