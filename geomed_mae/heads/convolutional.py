"""Convolutional head: a class a pixel, in 2D and 3D by one code path. The default of head.task segment.

Tokens are coarse (one a patch), so a shallow convolutional stem on the input pixels gives the fine edges and the
upsampled token maps the meaning. Interpolation followed by convolution is used instead of transposed convolution, which
was measured worse behind a plain ViT and leaves a checkerboard (arXiv 2507.01744; Odena et al. 2016, distill 00003).
"""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from geomed_mae.heads import HeadInputs, HeadSpec

TASKS = ("segment",)
CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
INTERPOLATION = {2: "bilinear", 3: "trilinear"}
MIN_WIDTH = 16
"""The token map's width is halved from stage to stage, but not below this."""

GROUPS = 8
"""Channels are normalised in so many groups, or in as many as divide both this and the width."""


def build(spec: HeadSpec) -> ConvolutionalHead:
    """Return a convolutional head for 2 or 3 spatial axes, by the length of `spec.patch`."""
    return ConvolutionalHead(spec)


class ConvolutionalHead(nn.Module):
    """Token maps side by side, upsampled in steps of two, fused with a convolutional stem at the image's resolution."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        axes = len(spec.patch)
        self.mode = INTERPOLATION[axes]
        stages = max(size - 1 for size in spec.patch).bit_length()
        widths = [max(spec.width >> stage, MIN_WIDTH) for stage in range(stages + 1)]
        self.project = _block(axes, spec.maps * spec.embed_dim, widths[0], kernel=1)
        self.stages = nn.ModuleList(_block(axes, before, after) for before, after in itertools.pairwise(widths))
        # The stem is shown which pixels are valid: a scaled value of 0 alone does not say so.
        self.stem = nn.Sequential(_block(axes, spec.channels + 1, MIN_WIDTH), _block(axes, MIN_WIDTH, MIN_WIDTH))
        self.fuse = _block(axes, widths[-1] + MIN_WIDTH, max(widths[-1], MIN_WIDTH))
        self.classify = CONVOLUTIONS[axes](max(widths[-1], MIN_WIDTH), len(spec.classes), 1)

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "batch class *space"]:
        """Return logits at the resolution of `inputs.pixels`."""
        shape = inputs.pixels.shape[2:]
        features = self.project(torch.cat(inputs.maps, dim=1))
        for stage in self.stages:
            larger = tuple(min(2 * have, want) for have, want in zip(features.shape[2:], shape, strict=True))
            features = stage(F.interpolate(features, size=larger, mode=self.mode, align_corners=False))
        features = F.interpolate(features, size=shape, mode=self.mode, align_corners=False)
        seen = inputs.valid.to(inputs.pixels.dtype).mean(dim=1, keepdim=True)
        stem = self.stem(torch.cat([inputs.pixels, seen], dim=1))
        return self.classify(self.fuse(torch.cat([features, stem], dim=1)))


def _block(axes: int, before: int, after: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, normalisation per sample (batches are small, and inference must not depend on neighbours), GELU."""
    convolution = CONVOLUTIONS[axes](before, after, kernel, padding=kernel // 2)
    return nn.Sequential(convolution, nn.GroupNorm(math.gcd(GROUPS, after), after), nn.GELU())
