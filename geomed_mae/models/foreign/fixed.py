"""A vision transformer for one fixed list of channels, in this package's names, and what becomes of it.

As an encoder it computes the same for its own channels, to rounding. As the start of a pretraining run it gives every
block as it is, and its patch filters to the channels of the run: its own exactly, others by wavelength
(`ChannelPatchEmbed.load_kernel`).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from geomed_mae.image import Channel
from geomed_mae.models.contract import Contract
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.positions import position_table
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder

POSITION_TOLERANCE = 1e-5
"""Largest difference between a stored table and MAE's sines and cosines at which the table is taken for them."""

HALF_TOLERANCE = 2**-8
"""The same for tables stored in 16 bits: the rounding of bfloat16 next to 1."""

BASIS = 32
SEED = 0
"""Of the weights that a fixed-channel model does not have (codes, spare filters): every loading gives the same."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FixedDecoder:
    """The decoder of a masked autoencoder for fixed channels.

    Attributes:
        heads: of its attention.
        positions: learned table, class token first; None for MAE's sines and cosines.
        tensors: state dict of `models.decoder.Decoder` without its heads and positions.
        weight, bias: of the pixel predictions, per channel c and pixel p of a patch.
    """

    heads: int
    positions: Float[Tensor, "1 1+n w"] | None
    tensors: dict[str, Tensor]
    weight: Float[Tensor, "c p d"]
    bias: Float[Tensor, "c p"]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(width, blocks, heads)."""
        return self.tensors["embed.bias"].numel(), count_blocks(self.tensors), self.heads


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class FixedViT:
    """A vision transformer for fixed channels, all tensors float32.

    Attributes:
        channels: one an input channel of the kernel.
        heads: of its attention.
        kernel, bias: the patch embedding, a convolution with stride = patch.
        cls_token: class token with its position added.
        grid: patches per axis of its training images.
        positions: learned table of that grid; None for MAE's sines and cosines.
        blocks, norm: state dicts with timm's names (`0.attn.qkv.weight` ...).
        norm_eps: of its LayerNorms.
        target: what its decoder predicts, a target of ModelSpec.
        decoder: the decoder, where there is one.
    """

    channels: tuple[Channel, ...]
    heads: int
    kernel: Float[Tensor, "d c *patch"]
    bias: Float[Tensor, " d"]
    cls_token: Float[Tensor, "1 1 d"]
    grid: tuple[int, ...]
    positions: Float[Tensor, "1 n d"] | None
    blocks: dict[str, Tensor]
    norm: dict[str, Tensor]
    norm_eps: float
    target: str = "patch"
    decoder: FixedDecoder | None = None

    @property
    def patch(self) -> tuple[int, ...]:
        """Patch in pixels (row, column) or voxels (slice, row, column)."""
        return tuple(self.kernel.shape[2:])

    def spec(self) -> ModelSpec:
        """Return its shape, with enough basis filters for its channels."""
        width, depth, heads = self.decoder.shape if self.decoder else (128, 4, 4)
        return ModelSpec(
            dim=self.kernel.shape[0],
            depth=count_blocks({f"blocks.{name}": tensor for name, tensor in self.blocks.items()}),
            heads=self.heads,
            patch_2d=self.patch if len(self.patch) == 2 else None,
            patch_3d=self.patch if len(self.patch) == 3 else None,
            basis=max(BASIS, len(self.channels) + 1),
            decoder_dim=width,
            decoder_depth=depth,
            decoder_heads=heads,
            target=self.target,
            stats_weight=0.0,
            learned_positions=None if self.positions is None else self.grid,
            norm_eps=self.norm_eps,
        )


def count_blocks(tensors: dict[str, Tensor]) -> int:
    """Return the number of different N in names `blocks.N.*`."""
    return len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})


def is_published_table(table: Float[Tensor, "1 n d"], grid: Sequence[int], *, half: bool = False) -> bool:
    """Return whether a table of positions is MAE's for that grid, and so good for any other grid too."""
    difference = (table - position_table(grid, table.shape[-1])).abs().max()
    return bool(difference <= (HALF_TOLERANCE if half else POSITION_TOLERANCE))


def as_encoder(vit: FixedViT, contract: Contract) -> PretrainedEncoder:
    """Return the encoder that computes what `vit` computes, for its channels in any order.

    Raises:
        ConfigError: more channels than `ChannelCodes.pin` can tell apart, or a width that positions cannot be made for.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        encoder = Encoder(vit.spec())
    _copy(encoder, vit)
    encoder.patch_embed.load_kernel(vit.channels, vit.kernel, vit.bias)
    return PretrainedEncoder(encoder, contract, origin=vit)


@torch.no_grad()
def _copy(encoder: Encoder, vit: FixedViT) -> None:
    encoder.cls_token.copy_(vit.cls_token)
    encoder.blocks.load_state_dict(vit.blocks)
    encoder.norm.load_state_dict(vit.norm)
    if vit.positions is not None and encoder.spec.learned_positions is not None:
        encoder.pos_embed.copy_(vit.positions)


def meet(encoder: PretrainedEncoder, images: Sequence[Sequence[Channel]]) -> None:
    """Give an encoder that came from elsewhere filters for the channels of `images`, in place, as `start` does.

    What it computes for its own channels stays the same, to rounding. An encoder that was trained here needs no such
    thing and is left.

    Raises:
        ConfigError: too few basis filters.
    """
    vit = encoder.origin
    if vit is not None and (others := _others(vit.channels, images)):
        encoder.module.patch_embed.load_kernel(vit.channels, vit.kernel, vit.bias, others)


@torch.no_grad()
def start(mae: MaskedAutoencoder, vit: FixedViT, images: Sequence[Sequence[Channel]]) -> None:
    """Give a masked autoencoder of the same encoder shape the weights of `vit`.

    Args:
        mae: its encoder has the width, blocks, heads and, where it has that kind of patch, the patch of `vit`.
        vit: the start.
        images: the channels that will be trained on, one sequence a modality; those that `vit` does not know start from
            its filters.

    Raises:
        ConfigError: too few basis filters.
    """
    _copy(mae.encoder, vit)
    axes = len(vit.patch)
    if (mae.spec.patch_2d if axes == 2 else mae.spec.patch_3d) is None:
        log.info(
            "model.init is of %dD images, the recipe has no such patch; patch filters and decoder are random", axes
        )
        return
    others = _others(vit.channels, images)
    mae.encoder.patch_embed.load_kernel(vit.channels, vit.kernel, vit.bias, others)
    reason = why_no_decoder(mae.spec, vit.decoder)
    if vit.decoder and vit.decoder.positions is not None and mae.spec.learned_decoder_positions != vit.grid:
        reason = reason or "the one of model.init has learned positions, for which this model has no table"
    if vit.decoder is None or reason:
        log.log(logging.WARNING if vit.decoder else logging.INFO, "the decoder starts at random: %s", reason)
        return
    mae.decoder.load_state_dict(vit.decoder.tensors, strict=False)
    if vit.decoder.positions is not None:
        mae.decoder.pos_embed.copy_(vit.decoder.positions)
    mae.decoder.heads.load_kernel(vit.channels, vit.decoder.weight, vit.decoder.bias, axes=axes, others=others)
    other = (
        "" if vit.target == mae.spec.target else f", which was trained for target {vit.target}, not {mae.spec.target}"
    )
    log.info("the decoder starts from the one of model.init%s", other)


def _others(known: Sequence[Channel], images: Sequence[Sequence[Channel]]) -> list[Sequence[Channel]]:
    """Return the images that have other channels than the known ones."""
    return [image for image in images if not set(image) <= set(known)]


def why_no_decoder(spec: ModelSpec, decoder: FixedDecoder | None) -> str:
    """Return why a decoder cannot be taken over, "" if it can."""
    if decoder is None:
        return "model.init has none that could be taken over"
    if spec.mode != "exact":
        return f"model.mode is {spec.mode}; with model.mode=exact the one of model.init is taken"
    own = spec.decoder_dim, spec.decoder_depth, spec.decoder_heads
    if own == decoder.shape:
        return ""
    return (
        f"the recipe's has width {own[0]}, {own[1]} blocks, {own[2]} heads, the one of model.init width "
        f"{decoder.shape[0]}, {decoder.shape[1]} blocks, {decoder.shape[2]} heads (model.decoder_dim, decoder_depth)"
    )
