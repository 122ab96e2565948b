"""A Hugging Face ViTMAE folder: config.json, model.safetensors, and preprocessor_config.json where there is one.

Format: transformers, models/vit_mae (configuration_vit_mae.py, modeling_vit_mae.py); the model is that of arXiv
2111.06377. Three spellings of tensors are in use, all from that library: releases up to 4 and the folders on the hub
(`vit.encoder.layer.0.attention.attention.query`, `decoder.decoder_layers.0...`), the modules of release 5
(`vit.layers.0.attention.q_proj`), and what release 5.23 saves (the first, but `decoder.decoder_encoder.layer.0...`).
A ViTMAEModel has the same names without `vit.`.

Both position tables are stored. MAE's sines and cosines are recognised and made anew for any size; a learned table of
the encoder is kept. `layer_norm_eps` is kept too: the hub's folders say 1e-12, a default of transformers, of weights
that MAE's code trained with 1e-6, and features follow transformers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from geomed_mae.errors import ConfigError
from geomed_mae.models.contract import Contract
from geomed_mae.models.foreign import feed
from geomed_mae.models.foreign.fixed import FixedDecoder, FixedViT, is_published_table
from geomed_mae.models.foreign.stored import StoredTensors, grid_of, pair, read_json, whole

MODEL_TYPE = "vit_mae"
PREPROCESSOR = "preprocessor_config.json"
WITH_DECODER = "ViTMAEForPreTraining"

STEMS = ("vit.", "")
LAYERS = ("vit.encoder.layer.", "vit.layers.", "encoder.layer.", "layers.")
DECODER_LAYERS = ("decoder.decoder_layers.", "decoder.decoder_encoder.layer.")
PARTS = {
    "norm1": ("layernorm_before",),
    "attn.q": ("attention.attention.query", "attention.q_proj"),
    "attn.k": ("attention.attention.key", "attention.k_proj"),
    "attn.v": ("attention.attention.value", "attention.v_proj"),
    "attn.proj": ("attention.output.dense", "attention.o_proj"),
    "norm2": ("layernorm_after",),
    "mlp.fc1": ("intermediate.dense", "mlp.fc1"),
    "mlp.fc2": ("output.dense", "mlp.fc2"),
}
"""Parts of a block under timm's names, with their spellings."""

MAX_WIDTH, MAX_BLOCKS, MAX_CHANNELS, MAX_PATCH, MAX_PIXELS = 16384, 256, 4096, 4096, 1 << 16


def read(folder: Path, config: dict[str, Any]) -> tuple[FixedViT, Contract]:
    """Read a ViTMAEForPreTraining or ViTMAEModel folder.

    Raises:
        ConfigError: a setting that does not map exactly, or channels that are not described.
        IntegrityError: a tensor that is missing, left over, of another shape, or no finite numbers.
    """
    dim = whole(config, "hidden_size", 768, MAX_WIDTH)
    depth = whole(config, "num_hidden_layers", 12, MAX_BLOCKS)
    heads = whole(config, "num_attention_heads", 12, MAX_WIDTH)
    channels = whole(config, "num_channels", 3, MAX_CHANNELS)
    patch, size = pair(config, "patch_size", 16, MAX_PATCH), pair(config, "image_size", 224, MAX_PIXELS)
    rows, columns = grid = grid_of(folder, size, patch)
    _check(folder, config, dim, heads)
    known = feed.described(folder, channels)
    contract = known[0] if known else _contract(folder, channels, (rows * patch[0], columns * patch[1]))
    if len(contract.channels) != channels:
        raise ConfigError(f"'{folder}' takes images; its contract.json presents volumes")

    stored = StoredTensors(folder)
    kernel, bias = (
        stored.take(_stems(f"embeddings.patch_embeddings.projection.{kind}"), shape)
        for kind, shape in (("weight", (dim, channels, *patch)), ("bias", (dim,)))
    )
    table = stored.take(_stems("embeddings.position_embeddings"), (1, 1 + rows * columns, dim))
    half = any(map(stored.is_half, _stems("embeddings.position_embeddings")))
    cls_token = stored.take(_stems("embeddings.cls_token"), (1, 1, dim)) + table[:, :1]
    learned = None if is_published_table(table[:, 1:], grid, half=half) else table[:, 1:]
    vit = {
        "channels": tuple(entry.channel for entry in contract.channels),
        "heads": heads,
        "kernel": kernel,
        "bias": bias,
        "cls_token": cls_token,
        "grid": grid,
        "positions": learned,
        "blocks": dict(_blocks(stored, LAYERS, config, (dim, depth))),
        "norm": {kind: stored.take(_stems(f"layernorm.{kind}"), (dim,)) for kind in ("weight", "bias")},
        "norm_eps": float(config.get("layer_norm_eps", 1e-12)),
        "target": "patch" if config.get("norm_pix_loss") else "none",
    }
    decoder = None
    if config.get("architectures") == [WITH_DECODER] or "decoder.mask_token" in stored:
        decoder = _decoder(stored, config, kernel, grid)
    stored.finish()
    return FixedViT(**vit, decoder=decoder), contract


def _stems(name: str) -> list[str]:
    return [stem + name for stem in STEMS]


def _check(folder: Path, config: dict[str, Any], dim: int, heads: int) -> None:
    """Refuse settings that our blocks do not have.

    Raises:
        ConfigError: with the setting, what was found and what is supported.
    """
    eps = config.get("layer_norm_eps", 1e-12)
    checks = (
        ("hidden_act", config.get("hidden_act", "gelu"), "gelu", config.get("hidden_act", "gelu") == "gelu"),
        ("layer_norm_eps", eps, "0 to 1e-3", isinstance(eps, int | float) and 0 <= eps <= 1e-3),
        ("intermediate_size", config.get("intermediate_size", 3072), f"4 x hidden_size = {4 * dim}",
         config.get("intermediate_size", 3072) == 4 * dim),
        ("num_attention_heads", heads, f"a divisor of hidden_size {dim}", dim % heads == 0),
        ("hidden_size", dim, "a multiple of 4", dim % 4 == 0),
        ("head_dim", config.get("head_dim"), "hidden_size / num_attention_heads",
         config.get("head_dim") in (None, dim // heads)),
        ("qkv_bias", config.get("qkv_bias", True), "true or false", isinstance(config.get("qkv_bias", True), bool)),
    )  # fmt: skip
    for key, found, supported, fits in checks:
        if not fits:
            raise ConfigError(f"'{folder}' has {key} {found!r}, which cannot be represented; supported: {supported}")


def _blocks(
    stored: StoredTensors, layers: Sequence[str], config: dict[str, Any], shape: tuple[int, int]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of transformer blocks of shape (width, number) under timm's names, query, key, value joined."""
    width, depth = shape
    rows = {"mlp.fc1": 4 * width}
    columns = {"mlp.fc2": 4 * width}
    with_bias = config.get("qkv_bias", True)

    def take(number: int, part: str, kind: str) -> Tensor:
        spellings = [f"{stem}{number}.{name}.{kind}" for stem, name in itertools.product(layers, PARTS[part])]
        of_vector = kind == "bias" or part.startswith("norm")
        size = (rows.get(part, width),) if of_vector else (rows.get(part, width), columns.get(part, width))
        return stored.take(spellings, size)

    for number in range(depth):
        for kind in ("weight", "bias"):
            if kind == "bias" and not with_bias:
                yield f"{number}.attn.qkv.bias", torch.zeros(3 * width)
            else:
                joined = [take(number, f"attn.{letter}", kind) for letter in "qkv"]
                yield f"{number}.attn.qkv.{kind}", torch.cat(joined)
            for part in ("norm1", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
                yield f"{number}.{part}.{kind}", take(number, part, kind)


def _decoder(
    stored: StoredTensors, config: dict[str, Any], kernel: Float[Tensor, "d c y x"], grid: tuple[int, ...]
) -> FixedDecoder | None:
    """Read the decoder; None, and its tensors left, where ours cannot compute the same.

    Raises:
        IntegrityError: as `read`.
    """
    dim, channels, *patch = kernel.shape
    width = whole(config, "decoder_hidden_size", 512, MAX_WIDTH)
    depth = whole(config, "decoder_num_hidden_layers", 8, MAX_BLOCKS)
    heads = whole(config, "decoder_num_attention_heads", 16, MAX_WIDTH)
    if config.get("decoder_intermediate_size", 2048) != 4 * width or width % heads or width % 4:
        stored.leave(["decoder."])
        return None
    name, pixels = "decoder.decoder_pos_embed", patch[0] * patch[1]
    half = stored.is_half(name)
    table = stored.take([name], (1, 1 + grid[0] * grid[1], width))
    tensors = {
        "mask_token": stored.take(["decoder.mask_token"], (1, 1, width)),
        "embed.weight": stored.take(["decoder.decoder_embed.weight"], (width, dim)),
        "embed.bias": stored.take(["decoder.decoder_embed.bias"], (width,)),
        "norm.weight": stored.take(["decoder.decoder_norm.weight"], (width,)),
        "norm.bias": stored.take(["decoder.decoder_norm.bias"], (width,)),
    }
    tensors |= {f"blocks.{key}": value for key, value in _blocks(stored, DECODER_LAYERS, config, (width, depth))}
    weight = stored.take(["decoder.decoder_pred.weight"], (pixels * channels, width))
    bias = stored.take(["decoder.decoder_pred.bias"], (pixels * channels,))
    published = table[:, 0].abs().max() == 0 and is_published_table(table[:, 1:], grid, half=half)
    return FixedDecoder(
        heads=heads,
        positions=None if published else table,
        tensors=tensors,
        weight=weight.reshape(pixels, channels, width).transpose(0, 1),  # published order: row, column, channel
        bias=bias.reshape(pixels, channels).T,
    )


def _contract(folder: Path, channels: int, size: Sequence[int]) -> Contract:
    """Return the contract of RGB images, scaled as preprocessor_config.json says."""
    if not (folder / PREPROCESSOR).is_file():
        return feed.rgb(folder, channels, size)
    found = read_json(folder, PREPROCESSOR)
    rescale = found.get("rescale_factor", feed.RESCALE) if found.get("do_rescale", True) else 1.0
    if not found.get("do_normalize", True):
        return feed.rgb(folder, channels, size, mean=0.0, std=1.0, rescale=rescale)
    return feed.rgb(folder, channels, size, mean=found.get("image_mean"), std=found.get("image_std"), rescale=rescale)
