"""The encoder: timm's ViT blocks over the visible patches of images with any channels, in 2D or 3D.

Attribute names (`blocks`, `norm`, `cls_token`) are those of timm's VisionTransformer, which an encoder becomes when its
channels are fixed (`geomed_mae.exporters.timm`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from jaxtyping import Bool, Float
from timm.layers.pos_embed import resample_abs_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel
from geomed_mae.models.attention import SelfAttention
from geomed_mae.models.masking import MaskPlan, valid_tokens
from geomed_mae.models.patch_embed import ChannelPatchEmbed
from geomed_mae.models.patches import clean, patch_grid, patchify, select
from geomed_mae.models.positions import position_table
from geomed_mae.models.spec import ModelSpec

INIT_STD = 0.02
"""Of class and mask tokens: timm's trunc_normal_(std=.02) is effectively normal, as the cut-off is at 2."""


@dataclass(frozen=True, slots=True)
class Tokens:
    """What the encoder makes of a batch.

    Attributes:
        tokens: class token first, then the visible patches (all patches, in grid order, without a plan), normalised.
        grid: patches per spatial axis.
        token_valid: patches with enough valid area, the others' tokens mean nothing; None with a plan, which knows.
        maps: feature maps of the blocks asked for with `layers`, each normalised.
    """

    tokens: Float[Tensor, "b 1+v d"]
    grid: tuple[int, ...]
    token_valid: Bool[Tensor, "b n"] | None
    maps: tuple[Float[Tensor, "b d *grid"], ...] = ()


def make_blocks(dim: int, depth: int, heads: int, *, eps: float, last: type[Block] = Block) -> nn.ModuleList:
    """Return timm's pre-norm transformer blocks, initialised as in MAE: Xavier-uniform weights, zero biases."""
    shape = {"qkv_bias": True, "norm_layer": partial(nn.LayerNorm, eps=eps), "attn_layer": SelfAttention}
    kinds = [Block] * (depth - 1) + [last]
    return nn.ModuleList(kind(dim, heads, **shape) for kind in kinds).apply(init_linear)


def init_linear(module: nn.Module) -> None:
    """Initialise a linear layer as MAE does; leave other modules as they are."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def attention_bias(
    pad: Bool[Tensor, "b k"] | None, like: Float[Tensor, "b k+1 d"]
) -> Float[Tensor, "b 1 1 k+1"] | None:
    """Return -inf for padding tokens and 0 for others (the class token first), or None when nothing is padding."""
    if pad is None:
        return None
    bias = torch.zeros(pad.shape[0], 1, 1, pad.shape[1] + 1, dtype=like.dtype, device=like.device)
    return bias.masked_fill(nn.functional.pad(pad, (1, 0))[:, None, None], float("-inf"))


class Encoder(nn.Module):
    """Vision transformer (arXiv 2010.11929) whose patch embedding knows channels by their physics."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.patch_embed = ChannelPatchEmbed(spec)
        self.cls_token = nn.Parameter(torch.randn(1, 1, spec.dim) * INIT_STD)
        if spec.learned_positions is not None:
            self.pos_embed = nn.Parameter(torch.randn(1, math.prod(spec.learned_positions), spec.dim) * INIT_STD)
        self.blocks = make_blocks(spec.dim, spec.depth, spec.heads, eps=spec.norm_eps)
        self.norm = nn.LayerNorm(spec.dim, eps=spec.norm_eps)

    def positions(
        self,
        grid: Sequence[int],
        channels: Sequence[Channel],
        spacing: Float[Tensor, "b axes"] | None = None,
        device: torch.device | str | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Return the position codes of a grid of patches: sines and cosines, or a learned table (of images only).

        Raises:
            ConfigError: volumes, for an encoder whose learned table is of images.
        """
        if self.spec.learned_positions is None:
            reference = self.spec.reference(channels, len(grid))
            return position_table(grid, self.spec.dim, spacing=spacing, reference=reference, device=device)
        own = self.spec.learned_positions
        if len(grid) != len(own):
            raise ConfigError(
                f"this encoder has learned positions of a grid of {' x '.join(map(str, own))} patches and cannot take "
                f"inputs with {len(grid)} spatial axes"
            )
        # Patches are counted, whatever their spacing: that is what such a model was trained with.
        return resample_abs_pos_embed(self.pos_embed, list(grid), list(own), num_prefix_tokens=0)

    def forward(
        self,
        pixels: Float[Tensor, "b c *space"],
        valid: Bool[Tensor, "#b #c *space"],
        channels: Sequence[Channel],
        spacing: Float[Tensor, "b axes"] | None = None,
        plan: MaskPlan | None = None,
        *,
        layers: Sequence[int] | None = None,
    ) -> Tokens:
        """Encode images.

        Args:
            pixels: in model units (see `contract.normalise`); what stands at invalid places has no influence.
            valid: which values mean something.
            channels: one a channel of `pixels`, any set and order.
            spacing: distance between pixels per axis, metres (rasters) or mm; None counts patches.
            plan: patches to encode; None encodes all that have enough valid area.
            layers: numbers of blocks whose output is wanted as maps (negative from the end); only without a plan.

        Raises:
            ConfigError: a size that is no multiple of the patch, a channel without the physics that its kind needs,
                or a number of axes that the model was not made for.
        """
        space = pixels.shape[2:]
        patch = self.spec.patch(len(space))
        grid = patch_grid(space, patch)
        token_valid = None
        patches = patchify(clean(pixels, valid), patch)
        position = self.positions(grid, channels, spacing, pixels.device)
        if plan is None:
            token_valid = valid_tokens(valid, patch)
            pad = None if bool(token_valid.all()) else ~token_valid
            x = self.patch_embed(patches, channels, patch) + position
        else:
            pad = plan.visible_pad
            patches, position = select(patches, plan.visible), select(position, plan.visible)
            x = self.patch_embed(patches, channels, patch, plan.shown_channels) + position
        x = torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1)
        bias = attention_bias(pad, x)
        wanted = {index % len(self.blocks) for index in layers or ()}
        outputs = {}
        for index, block in enumerate(self.blocks):
            x = block(x, attn_mask=bias)
            if index in wanted:
                outputs[index] = self.norm(x)[:, 1:].transpose(1, 2).unflatten(-1, grid)
        maps = tuple(outputs[index % len(self.blocks)] for index in layers or ())
        return Tokens(self.norm(x), grid, token_valid, maps)
