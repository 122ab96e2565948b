"""Segmentation head: a class a pixel, in 2D and 3D by one code path.

Tokens are coarse (one a patch), so a shallow convolutional stem on the input pixels gives the fine edges and the
upsampled token map the meaning. Interpolation followed by convolution is used instead of transposed convolution, which
was measured worse behind a plain ViT and leaves a checkerboard (arXiv 2507.01744; Odena et al. 2016, distill 00003).
The loss is Dice plus cross entropy (nnU-Net, Isensee et al. 2021), both over labelled pixels only and in fp32.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from geomed_mae.heads import HeadInputs, HeadSpec
from geomed_mae.readers import IGNORE

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}
INTERPOLATION = {2: "bilinear", 3: "trilinear"}
MIN_WIDTH = 16
"""The token map's width is halved from stage to stage, but not below this."""
DICE_SMOOTHING = 1.0
"""Pixels added to numerator and denominator: bounds the gradient where a class hardly occurs in a batch."""


def build(spec: HeadSpec) -> SegmentHead:
    """Return a segmentation head for 2 or 3 spatial axes, by the length of `spec.patch`."""
    return SegmentHead(spec)


class SegmentHead(nn.Module):
    """Token map, upsampled in steps of two, fused with a convolutional stem at the image's resolution."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        axes = len(spec.patch)
        self.mode = INTERPOLATION[axes]
        stages = max(size - 1 for size in spec.patch).bit_length()
        widths = [max(spec.width >> stage, MIN_WIDTH) for stage in range(stages + 1)]
        self.project = _block(axes, spec.embed_dim, widths[0], kernel=1)
        self.stages = nn.ModuleList(_block(axes, before, after) for before, after in itertools.pairwise(widths))
        # The stem is shown which pixels are valid: a scaled value of 0 alone does not say so.
        self.stem = nn.Sequential(_block(axes, spec.channels + 1, MIN_WIDTH), _block(axes, MIN_WIDTH, MIN_WIDTH))
        self.fuse = _block(axes, widths[-1] + MIN_WIDTH, max(widths[-1], MIN_WIDTH))
        self.classify = CONVOLUTIONS[axes](max(widths[-1], MIN_WIDTH), len(spec.classes), 1)

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "batch class *space"]:
        """Return logits at the resolution of `inputs.pixels`."""
        shape = inputs.pixels.shape[2:]
        features = self.project(inputs.tokens)
        for stage in self.stages:
            larger = tuple(min(2 * have, want) for have, want in zip(features.shape[2:], shape, strict=True))
            features = stage(F.interpolate(features, size=larger, mode=self.mode, align_corners=False))
        features = F.interpolate(features, size=shape, mode=self.mode, align_corners=False)
        seen = inputs.valid.to(inputs.pixels.dtype).mean(dim=1, keepdim=True)
        stem = self.stem(torch.cat([inputs.pixels, seen], dim=1))
        return self.classify(self.fuse(torch.cat([features, stem], dim=1)))

    def loss(
        self, logits: Float[Tensor, "batch class *space"], target: Int[Tensor, " batch *space"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return (Dice + cross entropy, its parts); pixels of class IGNORE count in neither. Zero if there are none."""
        logits = logits.float()
        labelled = target != IGNORE
        entropy = F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="sum") / labelled.sum().clamp(min=1)
        dice = dice_loss(logits, target)
        return dice + entropy, {"dice_loss": dice.detach(), "cross_entropy": entropy.detach()}


def dice_loss(logits: Float[Tensor, "batch class *space"], target: Int[Tensor, " batch *space"]) -> Float[Tensor, ""]:
    """Return 1 minus the soft Dice coefficient (Milletari et al., arXiv 1606.04797), mean over the classes present.

    The sums run over the whole batch, so that a class that a small crop lacks does not decide the loss. A class is
    present if a labelled pixel of the batch has it. MONAI's DiceCELoss has no ignored class, hence this function.
    """
    labelled = target != IGNORE
    truth = F.one_hot(target.masked_fill(~labelled, 0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    mask = labelled.unsqueeze(1).to(logits.dtype)
    truth, chance = truth * mask, logits.softmax(dim=1) * mask
    over = (0, *range(2, logits.ndim))
    shared, total = (truth * chance).sum(over), (truth + chance).sum(over)
    scores = (2 * shared + DICE_SMOOTHING) / (total + DICE_SMOOTHING)
    present = truth.sum(over) > 0
    return ((1 - scores) * present).sum() / present.sum().clamp(min=1)


def _block(axes: int, before: int, after: int, kernel: int = 3) -> nn.Sequential:
    """Convolution, normalisation per sample (batches are small, and inference must not depend on neighbours), GELU."""
    convolution = CONVOLUTIONS[axes](before, after, kernel, padding=kernel // 2)
    return nn.Sequential(convolution, nn.GroupNorm(min(8, after), after), nn.GELU())
