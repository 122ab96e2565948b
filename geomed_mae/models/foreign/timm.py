"""A timm VisionTransformer folder, as timm's save_for_hf and push_to_hf_hub and `geomed-mae export --to timm` write it.

Format: timm, models/_hub.py: config.json with `architecture`, `model_args` and `pretrained_cfg`, and model.safetensors.
An architecture's name stands for arguments that no folder repeats, so the model is built by timm itself, without memory
(torch's device "meta") and with checked arguments alone. What its modules are decides whether the weights map exactly:

- LayerScale (arXiv 2103.17239) multiplies the outputs of attention and MLP: it goes into the weights that make them;
- a missing bias is a bias of zeros; a class token's position is added to the token;
- pooling, classifier and dropout rates come after the tokens or are off: they are left;
- everything else that differs from a plain ViT with a class token is refused.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from timm.layers.attention import Attention
from timm.layers.mlp import Mlp
from timm.layers.patch_embed import PatchEmbed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.models.contract import Contract
from geomed_mae.models.foreign import feed
from geomed_mae.models.foreign.fixed import FixedViT, is_published_table
from geomed_mae.models.foreign.stored import StoredTensors, grid_of

LIMITS = {"embed_dim": 16384, "depth": 256, "num_heads": 1024, "in_chans": 4096, "img_size": 1 << 16}
LIMITS |= {"patch_size": 4096, "reg_tokens": 4096, "num_classes": 1 << 20, "mlp_ratio": 64}
SWITCHES = {
    *("qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias", "class_token", "no_embed_class"),
    *("pre_norm", "final_norm", "fc_norm", "pool_include_prefix", "dynamic_img_size", "dynamic_img_pad", "fix_init"),
}
WORDS = {
    "global_pool": ("", "avg", "avgmax", "max", "token", "map", "prr"),
    "pos_embed": ("", "none", "learn"),
    "weight_init": ("", "skip", "reset", "jax", "jax_nlhb", "moco"),
    "act_layer": ("gelu", "quick_gelu", "gelu_tanh", "relu", "silu", "swish"),
    "norm_layer": ("layernorm", "layernorm2d", "rmsnorm"),
}
"""Arguments of VisionTransformer that a folder may set: numbers up to a limit, switches, and words."""

LARGEST = 1e6
"""Initial value of LayerScale, which the stored one replaces."""

WITHOUT_USE = ("head.", "attn_pool.", "fc_norm.")
"""Tensors behind the patch tokens."""

log = logging.getLogger(__name__)


def read(folder: Path, config: dict[str, Any]) -> tuple[FixedViT, Contract]:
    """Read the folder of a VisionTransformer.

    Raises:
        ConfigError: another architecture, a setting that does not map exactly, or channels that are not described.
        IntegrityError: a tensor that is missing, left over, of another shape, or no finite numbers.
    """
    model = _model(folder, config)
    _check(folder, model)
    size, patch = model.patch_embed.img_size, model.patch_embed.patch_size
    known = feed.described(folder, model.in_chans)
    if known:
        contract, layout = known
    else:
        scaled = config.get("pretrained_cfg") or config  # older folders have one dictionary
        if not isinstance(scaled, dict):
            raise ConfigError(f"'{folder}': pretrained_cfg holds no settings")
        cut = [length * step for length, step in zip(grid_of(folder, size, patch), patch, strict=True)]
        contract = feed.rgb(folder, model.in_chans, cut, mean=scaled.get("mean"), std=scaled.get("std"))
        layout = None
    grid, patch = _layout(folder, layout, size, patch)

    tensors, half = _tensors(folder, model)
    kernel = tensors["patch_embed.proj.weight"]
    kernel = kernel.reshape(len(kernel), len(contract.channels), *patch)
    table, cls_token = tensors["pos_embed"], tensors["cls_token"]
    if not model.no_embed_class:
        cls_token, table = cls_token + table[:, :1], table[:, 1:]
    published = is_published_table(table, grid, half=half)
    if len(grid) == 3 and not published:
        raise ConfigError(f"'{folder}' has learned positions of volumes; only sines and cosines can be taken for them")
    vit = FixedViT(
        channels=tuple(entry.channel for entry in contract.channels),
        heads=model.blocks[0].attn.num_heads,
        kernel=kernel,
        bias=tensors["patch_embed.proj.bias"],
        cls_token=cls_token,
        grid=grid,
        positions=None if published else table,
        blocks=dict(_blocks(model, tensors)),
        norm_eps=float(model.norm.eps),
        norm={kind: tensors[f"norm.{kind}"] for kind in ("weight", "bias")},
    )
    return vit, contract


def _model(folder: Path, config: dict[str, Any]) -> VisionTransformer:
    """Let timm build the model without memory.

    Raises:
        ConfigError: an unknown architecture, one that is no VisionTransformer, or arguments that are not known here.
    """
    name, given = config["architecture"], config.get("model_args") or {}
    if not isinstance(name, str) or not re.fullmatch(r"[a-z0-9_]{1,80}", name) or not timm.is_model(name):
        raise ConfigError(f"'{folder}': architecture {str(name)[:80]!r} is none of timm {timm.__version__}")
    if not name.startswith("vit_"):
        raise ConfigError(
            f"'{folder}' is a '{name}'; of timm's models only VisionTransformer (vit_*) can be taken over"
        )
    if not isinstance(given, dict):
        raise ConfigError(f"'{folder}': model_args holds no arguments")
    # Rates of dropout are off outside training, and a classifier comes after the tokens.
    kept = {key: value for key, value in given.items() if not key.endswith("_rate") and value is not None}
    arguments = {key: _argument(folder, key, value) for key, value in kept.items()}
    arguments |= {"num_classes": 0}
    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False, **arguments)
    except (TypeError, ValueError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ConfigError(
            f"'{folder}': timm cannot build '{name}' with these model_args: {str(error)[:200]}"
        ) from error
    if type(model) is not VisionTransformer:
        raise ConfigError(
            f"'{folder}' is a '{name}' ({type(model).__name__}); only VisionTransformer can be taken over"
        )
    return model


def _argument(folder: Path, key: str, value: Any) -> Any:
    """Return an argument of a folder, or refuse it."""
    numbers = value if isinstance(value, list) and len(value) == 2 else [value]
    is_number = all(
        isinstance(part, int | float) and not isinstance(part, bool) and 0 <= part <= LIMITS.get(key, 0)
        for part in numbers
    )
    if key == "init_values" and isinstance(value, int | float) and abs(value) < LARGEST:
        return float(value)
    if (is_number and key in LIMITS) or (isinstance(value, bool) and key in SWITCHES) or value in WORDS.get(key, ()):
        return tuple(value) if isinstance(value, list) else value
    raise ConfigError(
        f"'{folder}': model_args.{key} is {repr(value)[:80]}, which cannot be represented; known are "
        f"{', '.join(sorted({*LIMITS, *SWITCHES, *WORDS, 'init_values'}))}"
    )


def _check(folder: Path, model: VisionTransformer) -> None:
    """Refuse a model that computes something else than a plain ViT with a class token.

    Raises:
        ConfigError: with the setting, what was found and what is supported.
    """
    dim, blocks = model.embed_dim, list(model.blocks)
    checks = (
        ("depth", len(blocks), "1 or more", bool(blocks)),
        ("class_token", model.has_class_token, "true", model.has_class_token),
        ("reg_tokens", model.num_reg_tokens, "0", model.num_reg_tokens == 0),
        ("pos_embed", model.pos_embed is not None, "learn", model.pos_embed is not None),
        ("pre_norm", True, "false", not _weighs(model.norm_pre)),
        ("final_norm / fc_norm", type(model.norm).__name__,
         "a LayerNorm before pooling (final_norm true, fc_norm false)", isinstance(model.norm, nn.LayerNorm)),
        ("embed_dim", dim, "a multiple of 4", dim % 4 == 0),
        *_kinds("embed_layer", model.patch_embed, PatchEmbed),
        *(check for block in blocks for check in _kinds("block_fn", block, Block)),
    )  # fmt: skip
    _refuse(folder, checks)
    first = blocks[0]  # the others are made alike
    checks = (
        *_kinds("attn_layer", first.attn, Attention),
        *_kinds("mlp_layer", first.mlp, Mlp),
        ("norm_layer", type(first.norm1).__name__, "LayerNorm", isinstance(first.norm1, nn.LayerNorm)),
        ("embed_norm_layer", True, "none", not _weighs(model.patch_embed.norm)),
    )
    _refuse(folder, checks)
    attention, mlp = first.attn, first.mlp
    eps = sorted({norm.eps for part in (model.blocks, model.norm) for norm in part.modules() if hasattr(norm, "eps")})
    exact = isinstance(mlp.act, nn.GELU) and mlp.act.approximate == "none"
    checks = (
        ("act_layer", str(mlp.act), "GELU (exact)", exact),
        ("mlp_ratio", mlp.fc1.out_features / dim, "4", mlp.fc1.out_features == 4 * dim),
        ("num_heads", attention.num_heads, f"a divisor of {dim}", attention.qkv.out_features == 3 * dim),
        ("gated", True, "false", not _weighs(getattr(attention, "gate", None))),
        ("qk_norm", True, "false", not _weighs(attention.q_norm)),
        ("scale_attn_norm", True, "false", not _weighs(attention.norm)),
        ("scale_mlp_norm", True, "false", not _weighs(mlp.norm)),
        ("LayerNorm's eps", eps, "one for all", len(eps) == 1),
    )
    _refuse(folder, checks)


def _weighs(module: nn.Module | None) -> bool:
    return module is not None and any(True for _ in module.parameters())


def _kinds(setting: str, module: nn.Module, wanted: type[nn.Module]) -> list[tuple[str, Any, str, bool]]:
    """Return the check that a module is exactly of a class: a subclass may compute something else."""
    return [(setting, type(module).__name__, wanted.__name__, type(module) is wanted)]


def _refuse(folder: Path, checks: tuple[tuple[str, Any, str, bool], ...]) -> None:
    for key, found, supported, fits in checks:
        if not fits:
            raise ConfigError(f"'{folder}' has {key} {found!r}, which cannot be represented; supported: {supported}")


def _layout(
    folder: Path, layout: feed.Layout | None, size: Sequence[int], patch: Sequence[int]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return (grid, patch) of the images or volumes that were presented to the model (`exporters.timm.as_timm_input`).

    Raises:
        IntegrityError: the contract's layout is not the model's.
    """
    grid = grid_of(folder, size, patch)
    if layout is None or len(layout.patch) == 2:
        return grid, tuple(patch)
    slabs = grid_of(folder, layout.size, layout.patch)
    if layout.patch[1:] != tuple(patch) or (slabs[0] * slabs[1], slabs[2]) != grid:
        raise IntegrityError(
            f"'{folder}': contract.json presents volumes {layout.size} with patch {layout.patch}, the model others"
        )
    return slabs, layout.patch


def _tensors(folder: Path, model: VisionTransformer) -> tuple[dict[str, Tensor], bool]:
    """Read the tensors that the model has, and no others; and whether positions are stored in 16 bits."""
    stored = StoredTensors(folder)
    wrapped = "timm_model."  # transformers' TimmWrapperModel saves the same under this prefix
    wanted = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tensors = {
        name: stored.take([name, wrapped + name], shape)
        for name, shape in wanted.items()
        if not name.startswith(WITHOUT_USE)
    }
    left = stored.leave([stem + prefix for stem in ("", wrapped) for prefix in WITHOUT_USE])
    if left:
        log.info("'%s': %d tensors behind the patch tokens are left (%s ...)", folder, len(left), left[0])
    stored.finish()
    return tensors, any(stored.is_half(stem + "pos_embed") for stem in ("", wrapped))


def _blocks(model: VisionTransformer, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of the blocks, LayerScale multiplied in and missing biases as zeros."""
    for number, block in enumerate(model.blocks):
        for part in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2"):
            weight = tensors[f"blocks.{number}.{part}.weight"]
            bias = tensors.get(f"blocks.{number}.{part}.bias", torch.zeros(len(weight)))
            scaled = {"attn.proj": "ls1", "mlp.fc2": "ls2"}.get(part)
            if scaled and hasattr(getattr(block, scaled), "gamma"):
                gamma = tensors[f"blocks.{number}.{scaled}.gamma"]
                weight, bias = weight * gamma[:, None], bias * gamma
            yield f"{number}.{part}.weight", weight
            yield f"{number}.{part}.bias", bias
