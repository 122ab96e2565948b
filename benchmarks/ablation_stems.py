"""Rivals of the generated patch embedding and heads, for `ablations.py`: same inputs, same outputs.

`FixedEmbed` and `FixedHeads` have one weight a channel, as an ordinary ViT for this sensor: the upper bound there.
`PooledEmbed` has one projection for all channels and pools them by attention with learned queries, after Panopticon
(arXiv 2503.10845), without its projections of keys and values: a channel's weight in a token depends on its content, so
that it cannot be folded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from geomed_mae.image import Channel
from geomed_mae.models.channels import CODE_WIDTH, ChannelCodes
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.patch_embed import HEAD_STD
from geomed_mae.models.spec import ModelSpec

QUERIES = 8


class FixedEmbed(nn.Module):
    """Patches of a fixed list of channels to tokens: one weight (p, d) a channel.

    `rate` is a factor of its learning rate. A generated weight is a sum over K basis filters with coefficients of unit
    length, each of which a step of Adam moves by the learning rate: it moves sqrt(2 K / pi) times as far, 3 with 16.
    """

    def __init__(self, spec: ModelSpec, channels: int, pixels: int, rate: float = 1.0) -> None:
        super().__init__()
        self.rate = rate
        self.weight = nn.Parameter(torch.randn(channels, pixels, spec.dim) / math.sqrt(pixels) / rate)
        self.bias = nn.Parameter(torch.zeros(spec.dim))

    def forward(
        self,
        patches: Float[Tensor, "b n c p"],
        channels: Sequence[Channel],
        patch: Sequence[int],
        shown: Bool[Tensor, "b c"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Embed patches; channels not `shown` are as if they were not there."""
        if shown is None:
            scale: float | Tensor = len(channels) ** -0.5
        else:
            patches = torch.where(shown[:, None, :, None], patches, torch.zeros_like(patches))
            scale = shown.sum(1).clamp(min=1).rsqrt()[:, None, None]
        return patches.flatten(2) @ (self.rate * self.weight).flatten(0, 1) * scale + self.bias


class PooledEmbed(nn.Module):
    """Patches of any channels to tokens: one projection, plus the channel's code, pooled by attention over channels."""

    def __init__(self, spec: ModelSpec, pixels: int) -> None:
        super().__init__()
        self.codes = ChannelCodes(spec.basis)
        self.project = nn.Linear(pixels, spec.dim)
        self.place = nn.Linear(CODE_WIDTH, spec.dim)
        self.query = nn.Parameter(torch.randn(QUERIES, spec.dim // QUERIES) / math.sqrt(spec.dim // QUERIES))
        self.out = nn.Linear(spec.dim, spec.dim)
        nn.init.normal_(self.project.weight, std=pixels**-0.5)
        nn.init.zeros_(self.project.bias)

    def forward(
        self,
        patches: Float[Tensor, "b n c p"],
        channels: Sequence[Channel],
        patch: Sequence[int],
        shown: Bool[Tensor, "b c"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Embed patches; channels not `shown` get no attention."""
        items = self.project(patches) + self.place(self.codes.codes(channels))
        split = items.unflatten(-1, self.query.shape)  # b n c q d/q
        logits = (split * self.query).sum(-1)  # b n c q
        if shown is not None:
            logits = logits.masked_fill(~shown[:, None, :, None], float("-inf"))
        return self.out((logits.softmax(2)[..., None] * split).sum(2).flatten(-2))


class FixedHeads(nn.Module):
    """Tokens to the pixels, mean and log standard deviation of a fixed list of channels."""

    def __init__(self, spec: ModelSpec, channels: int, pixels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(channels, pixels + 2, spec.decoder_dim) * HEAD_STD)
        self.bias = nn.Parameter(torch.zeros(channels, pixels + 2))

    def forward(
        self, tokens: Float[Tensor, "b h d"], channels: Sequence[Channel], patch: Sequence[int]
    ) -> Float[Tensor, "b h c p+2"]:
        """Predict as `ChannelHeads.forward`."""
        return (tokens @ self.weight.flatten(0, 1).T + self.bias.flatten()).unflatten(-1, self.bias.shape)


def replace_parts(mae: MaskedAutoencoder, stem: str, heads: str, channels: int, pixels: int) -> None:
    """Put rivals in place of a model's patch embedding (`fixed`, `fixed x 3`, `pooled`) and heads (`fixed`)."""
    if stem.startswith("fixed"):
        mae.encoder.patch_embed = FixedEmbed(mae.spec, channels, pixels, rate=3.0 if stem == "fixed x 3" else 1.0)
    if stem == "pooled":
        mae.encoder.patch_embed = PooledEmbed(mae.spec, pixels)
    if heads == "fixed":
        mae.decoder.heads = FixedHeads(mae.spec, channels, pixels)
