"""The decoders: from the tokens of visible patches to the pixels of those that are asked for.

exact: self-attention over visible tokens and mask tokens together, as published (arXiv 2111.06377).
fast: cross-attention, each mask token looks at the visible tokens and at no other mask token (CrossMAE, arXiv
2401.14391), so that it costs nothing to ask for a part of the hidden patches: `Masking.predict_ratio`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from timm.layers.mlp import Mlp
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from geomed_mae.image import Channel
from geomed_mae.models.attention import CrossAttention
from geomed_mae.models.masking import MaskPlan
from geomed_mae.models.patch_embed import ChannelHeads
from geomed_mae.models.patches import select
from geomed_mae.models.positions import position_table
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import INIT_STD, Tokens, attention_bias, init_linear, make_blocks


@dataclass(frozen=True, slots=True)
class Prediction:
    """The decoder's answer for each asked patch and channel: normalised pixels and the patch's statistics."""

    pixels: Float[Tensor, "b h c p"]
    mean: Float[Tensor, "b h c"]
    log_sigma: Float[Tensor, "b h c"]


class AnsweringBlock(Block):
    """timm's block as the last one of a decoder: nobody reads its visible tokens, so they are keys and values alone."""

    def forward(
        self, x: Float[Tensor, "b n d"], first: int, bias: Float[Tensor, "b 1 1 n"] | None
    ) -> Float[Tensor, "b n-first d"]:
        """Return the tokens from `first` on."""
        x = x[:, first:] + self.attn.rows_from(first, self.norm1(x), bias)
        return x + self.mlp(self.norm2(x))


class CrossBlock(nn.Module):
    """Pre-norm block: queries gather from the visible tokens, then an MLP of four times their width."""

    def __init__(self, dim: int, heads: int, *, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.norm_seen = nn.LayerNorm(dim, eps=eps)
        self.attn = CrossAttention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, 4 * dim)
        self.apply(init_linear)

    def forward(
        self, x: Float[Tensor, "b h d"], seen: Float[Tensor, "b k d"], bias: Float[Tensor, "b 1 1 k"] | None
    ) -> Float[Tensor, "b h d"]:
        """Return the queries, each knowing more of `seen`."""
        x = x + self.attn(self.norm1(x), self.norm_seen(seen), bias)
        return x + self.mlp(self.norm2(x))


class Decoder(nn.Module):
    """Light transformer that answers for the asked patches of a plan; `spec.mode` says which of the two it is."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.embed = nn.Linear(spec.dim, spec.decoder_dim)
        init_linear(self.embed)
        self.mask_token = nn.Parameter(torch.randn(1, 1, spec.decoder_dim) * INIT_STD)
        if spec.learned_decoder_positions is not None:
            entries = 1 + math.prod(spec.learned_decoder_positions)
            self.pos_embed = nn.Parameter(torch.randn(1, entries, spec.decoder_dim) * INIT_STD)
        shape = spec.decoder_dim, spec.decoder_depth, spec.decoder_heads
        make = partial(make_blocks, last=AnsweringBlock) if spec.mode == "exact" else _cross_blocks
        self.blocks = make(*shape, eps=spec.norm_eps)
        self.norm = nn.LayerNorm(spec.decoder_dim, eps=spec.norm_eps)
        self.heads = ChannelHeads(spec)

    def forward(
        self,
        encoded: Tokens,
        channels: Sequence[Channel],
        spacing: Float[Tensor, "b axes"] | None,
        plan: MaskPlan,
    ) -> Prediction:
        """Predict the asked patches of `plan` from the tokens of its visible ones.

        Tokens stand in the order of the plan, not of the grid: attention does not know order, only positions.
        """
        axes = len(encoded.grid)
        seen = self.embed(encoded.tokens)  # b 1+v d
        first, position = self.positions(encoded.grid, channels, spacing, seen.device)
        visible = seen[:, 1:] + select(position, plan.visible)
        seen = torch.cat([seen[:, :1] + first, visible], dim=1)  # the residual stream stays in fp32 under autocast
        asked = self.mask_token + select(position, plan.asked)
        x = self._together(seen, asked, plan) if self.spec.mode == "exact" else self._apart(seen, asked, plan)
        answer = self.heads(self.norm(x), channels, self.spec.patch(axes))  # b h c p+2
        return Prediction(answer[..., :-2], answer[..., -2], answer[..., -1])

    def positions(
        self,
        grid: Sequence[int],
        channels: Sequence[Channel],
        spacing: Float[Tensor, "b axes"] | None,
        device: torch.device,
    ) -> tuple[Float[Tensor, "1 1 d"], Float[Tensor, "b n d"]]:
        """Return the position of the class token, and those of the patches; as `Encoder.positions`."""
        own, width = self.spec.learned_decoder_positions, self.spec.decoder_dim
        if own is None:
            reference = self.spec.reference(channels, len(grid))
            table = position_table(grid, width, spacing=spacing, reference=reference, device=device)
            return torch.zeros(1, 1, width, device=device), table
        table = resample_abs_pos_embed(self.pos_embed, list(grid), list(own))
        return table[:, :1], table[:, 1:]

    def _together(
        self, seen: Float[Tensor, "b 1+v d"], asked: Float[Tensor, "b h d"], plan: MaskPlan
    ) -> Float[Tensor, "b h d"]:
        x = torch.cat([seen, asked], dim=1)
        bias = attention_bias(_joined_pad(plan), x)
        *blocks, last = self.blocks
        for block in blocks:
            x = block(x, attn_mask=bias)
        return last(x, seen.shape[1], bias)

    def _apart(
        self, seen: Float[Tensor, "b 1+v d"], asked: Float[Tensor, "b h d"], plan: MaskPlan
    ) -> Float[Tensor, "b h d"]:
        bias = attention_bias(plan.visible_pad, seen)
        for block in self.blocks:
            asked = block(asked, seen, bias)
        return asked


def _cross_blocks(dim: int, depth: int, heads: int, *, eps: float) -> nn.ModuleList:
    return nn.ModuleList(CrossBlock(dim, heads, eps=eps) for _ in range(depth))


def _joined_pad(plan: MaskPlan) -> Bool[Tensor, "b v+h"] | None:
    """Return the padding of visible and hidden entries together, None when there is none."""
    if plan.visible_pad is None and plan.asked_pad is None:
        return None
    pairs = ((plan.visible, plan.visible_pad), (plan.asked, plan.asked_pad))
    return torch.cat([torch.zeros_like(index, dtype=torch.bool) if pad is None else pad for index, pad in pairs], dim=1)
