"""Linear head, for both tasks: one linear layer on the encoder's tokens. What features say without any help.

A class a pixel: a linear layer a token, its logits interpolated to the image's resolution (the linear segmentation
probe of DINOv2, Oquab et al., arXiv 2304.07193). A class an image: a linear layer on the mean of the valid tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from geomed_mae.heads import HeadInputs, HeadSpec

TASKS = ("segment", "classify")
INTERPOLATION = {2: "bilinear", 3: "trilinear"}


def build(spec: HeadSpec) -> nn.Module:
    """Return a linear head for the task of `spec`; it works for any number of spatial axes."""
    return LinearPixels(spec) if spec.task == "segment" else LinearImage(spec)


class LinearPixels(nn.Module):
    """A linear layer on every token, interpolated."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.classify = nn.Linear(spec.maps * spec.embed_dim, len(spec.classes))

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "batch class *space"]:
        """Return logits at the resolution of `inputs.pixels`."""
        shape = inputs.pixels.shape[2:]
        logits = self.classify(torch.cat(inputs.maps, dim=1).movedim(1, -1)).movedim(-1, 1)
        return F.interpolate(logits, size=shape, mode=INTERPOLATION[len(shape)], align_corners=False)


class LinearImage(nn.Module):
    """A linear layer on the mean of the valid tokens."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.classify = nn.Linear(spec.maps * spec.embed_dim, len(spec.classes))

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "batch class"]:
        """Return logits; without any valid token those of a mean of 0."""
        tokens, valid = torch.cat(inputs.maps, dim=1).flatten(2), inputs.token_valid.flatten(1)[:, None]
        return self.classify((tokens * valid).sum(dim=2) / valid.sum(dim=2).clamp(min=1))
