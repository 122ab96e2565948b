"""Export to timm: an encoder with a fixed channel list and input size becomes an ordinary VisionTransformer.

The channel-flexible patch embedding folds into one convolution and the positions into a table, exactly. The folder
opens with `timm.create_model("local-dir:FOLDER", pretrained=True)`, and with transformers' AutoModel.

Volumes too: a (c, z, y, x) volume is presented as an image with c * pz channels and (z / pz) * y rows, see
`as_timm_input`. Its patches are the volume's, in the same order (slab, row, column), and the table holds their 3D
positions.

A table of positions is of one spacing. Where the encoder's positions are physical (its spec has a reference spacing),
an exported model is for images of that reference, or of the spacing that is stated; the folder says which.
"""

from __future__ import annotations

import json
import logging
import math
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.image import Channel
from geomed_mae.models.contract import ChannelContract, Contract
from geomed_mae.models.encoder_folder import PRETRAINED_ON
from geomed_mae.models.manifest import write_folder
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import GROUND_KINDS
from geomed_mae.models.vit import Encoder

TOLERANCE = 1e-5
"""Largest difference of features, relative to their largest value, between the encoder and its export."""

TIMM_EPS = 1e-6
"""Of the LayerNorms of timm's vit_*; a config.json has no key for it."""

VOLUME_KINDS = ("ct", "mr", "pet")
ARCHITECTURES = {
    (192, 12, 3): "vit_tiny_patch16_224",
    (384, 12, 6): "vit_small_patch16_224",
    (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
}
"""timm's name for (width, depth, heads); other shapes take the tiny one, whose every dimension is then overridden."""

log = logging.getLogger(__name__)


def export(
    encoder: PretrainedEncoder,
    out: Path,
    *,
    modality: str,
    channels: Sequence[str] | None = None,
    size: Sequence[int] | None = None,
    spacing: Sequence[float] | None = None,
) -> dict[str, Any]:
    """Write `out` as a timm model folder, open it with timm, and compare.

    Args:
        encoder: what to export.
        out: folder to write: config.json, model.safetensors, contract.json, README.md, MANIFEST.sha256, and what the
            encoder has seen (pretrained_on.json), where that is recorded.
        modality: whose channels the model takes.
        channels: their names in the order of the input; None takes all of the modality's.
        size: input size in pixels (rows, columns) or voxels (slices, rows, columns); None takes the pretraining crop.
        spacing: distance between pixels along each axis of the input, metres for rasters and mm for the others; None
            takes the encoder's reference.

    Returns:
        folder, architecture, channels, input_size, and the largest relative difference of features. It is at most
        TOLERANCE, unless the encoder's LayerNorms have another epsilon than timm's: then a warning says so, and what
        is held against TOLERANCE is the encoder with timm's.

    Raises:
        ConfigError: unknown modality or channel, a size that is no multiple of the patch, or a spacing that is not one
            positive number an axis, or that an encoder whose positions count patches cannot tell from another.
        IntegrityError: the exported model does not compute the same; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    entries = _entries(encoder.contract, modality, channels)
    size = tuple(size or _default_size(encoder, entries))
    module = _with_eps_of_timm(encoder.module)
    model_args, tensors = fold(module, [entry.channel for entry in entries], size, spacing)
    config = _config(entries, model_args)
    contract = _contract(encoder, entries, size, spacing)
    files = {
        "config.json": json.dumps(config, indent=2).encode(),
        "model.safetensors": tensor_bytes(tensors, metadata={"format": "pt"}),
        "contract.json": json.dumps(contract, indent=2).encode(),
        "README.md": _card(config, contract).encode(),
        # The weights have seen these images whatever folder they are in.
        **({} if encoder.seen is None else {PRETRAINED_ON: encoder.seen.public()}),
    }
    with tempfile.TemporaryDirectory() as trial:
        write_folder(Path(trial) / "export", files)
        difference = _difference(module, Path(trial) / "export", contract)
        apart = (
            difference if module is encoder.module else _difference(encoder.module, Path(trial) / "export", contract)
        )
    if not difference <= TOLERANCE:
        raise IntegrityError(
            f"the timm model differs from the encoder by {difference:.1e} (at most {TOLERANCE:.0e} is accepted); "
            "nothing was written: please report this with the encoder's config.json"
        )
    write_folder(out, files)
    return {
        "folder": str(out),
        "architecture": config["architecture"],
        "channels": [entry.channel.name for entry in entries],
        "input_size": config["pretrained_cfg"]["input_size"],
        "largest_relative_difference": apart,
    }


def fold(
    module: Encoder, channels: Sequence[Channel], size: Sequence[int], spacing: Sequence[float] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments and the state dict of the timm VisionTransformer that computes what `module` computes.

    Arguments as `export`: without a spacing, positions are those of the reference, which are those of counted patches.

    Raises:
        ConfigError: a size that is no multiple of the patch, or a spacing that cannot be taken.
    """
    spec = module.spec
    patch = spec.patch(len(size))
    if any(length % step for length, step in zip(size, patch, strict=True)):
        raise ConfigError(f"size {list(size)} is not a multiple of the patch {list(patch)}; choose another --size")
    grid = tuple(length // step for length, step in zip(size, patch, strict=True))
    distance = None if spacing is None else _checked_spacing(module, channels, size, spacing)
    with torch.no_grad():
        weight, bias = module.patch_embed.fold(channels, patch)
        table = module.positions(grid, channels, distance).cpu()
    depth_px = math.prod(patch[:-2])  # voxels of a patch along the slice axis; 1 in 2D
    tensors = {
        "cls_token": module.cls_token,
        "pos_embed": torch.cat([torch.zeros(1, 1, spec.dim), table], dim=1),
        "patch_embed.proj.weight": weight.flatten(1, -3),  # d (c pz) py px
        "patch_embed.proj.bias": bias,
        **{f"blocks.{name}": tensor for name, tensor in module.blocks.state_dict().items()},
        **{f"norm.{name}": tensor for name, tensor in module.norm.state_dict().items()},
    }
    model_args = {
        "img_size": [math.prod(size[:-1]) // depth_px, size[-1]],
        "patch_size": list(patch[-2:]),
        "in_chans": len(channels) * depth_px,
        "embed_dim": spec.dim,
        "depth": spec.depth,
        "num_heads": spec.heads,
        "class_token": True,
        "global_pool": "avg",
        "fc_norm": False,
    }
    return model_args, {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _checked_spacing(
    module: Encoder, channels: Sequence[Channel], size: Sequence[int], spacing: Sequence[float]
) -> Float[Tensor, "1 axes"]:
    """Return the spacing as the encoder takes it; errors as `export`."""
    if len(spacing) != len(size) or not all(0 < step < math.inf for step in spacing):
        raise ConfigError(
            f"spacing {list(spacing)} does not fit the size {list(size)}; give one positive number (metres or mm) for "
            "each axis"
        )
    if _reference(module, channels, len(size)) is None:
        raise ConfigError(
            f"spacing {list(spacing)} means nothing to this encoder, whose positions count patches; export without it"
        )
    return torch.tensor([list(spacing)], dtype=torch.float64)


def _reference(module: Encoder, channels: Sequence[Channel], axes: int) -> tuple[float, ...] | None:
    """Return the spacing that positions are relative to, None where they count patches."""
    return module.spec.reference(channels, axes) if module.spec.learned_positions is None else None


def as_timm_input(pixels: Float[Tensor, "b c *space"], patch: Sequence[int]) -> Float[Tensor, "b cpz rows x"]:
    """Present a batch to an exported model: images as they are, volumes as `c (n pz) y x -> (c pz) (n y) x`.

    Args:
        pixels: normalised images (b, c, y, x) or volumes (b, c, z, y, x).
        patch: of the encoder, (py, px) or (pz, py, px).
    """
    if len(patch) == 2:
        return pixels
    batch, channels, slices, rows, columns = pixels.shape
    slabs = pixels.reshape(batch, channels, slices // patch[0], patch[0], rows, columns)
    return slabs.transpose(2, 3).reshape(batch, channels * patch[0], -1, columns)


def _entries(contract: Contract, modality: str, names: Sequence[str] | None) -> tuple[ChannelContract, ...]:
    known = {entry.channel.name: entry for entry in contract.of(modality)}
    if unknown := [name for name in names or () if name not in known]:
        raise ConfigError(f"--channels {unknown}: modality '{modality}' has {list(known)} in the encoder's contract")
    return tuple(known[name] for name in names or known)


def _default_size(encoder: PretrainedEncoder, entries: Sequence[ChannelContract]) -> tuple[int, ...]:
    contract = encoder.contract
    volumes = contract.crop_3d is not None and (
        contract.crop_2d is None or all(entry.channel.kind in VOLUME_KINDS for entry in entries)
    )
    crop = contract.crop_3d if volumes else contract.crop_2d
    if crop is None:
        raise ConfigError("the encoder's contract states no crop; give --size")
    return crop


def _config(entries: Sequence[ChannelContract], model_args: dict[str, Any]) -> dict[str, Any]:
    """Return timm's config.json.

    `num_classes` stands outside model_args alone: inside them it makes transformers' TimmWrapper fail.
    """
    shape = (model_args["embed_dim"], model_args["depth"], model_args["num_heads"])
    repeat = model_args["in_chans"] // len(entries)
    return {
        "architecture": ARCHITECTURES.get(shape, "vit_tiny_patch16_224"),
        "num_classes": 0,
        "num_features": model_args["embed_dim"],
        "global_pool": "avg",
        "model_args": model_args,
        "pretrained_cfg": {
            "tag": "geomed_mae",
            "custom_load": False,
            "input_size": [model_args["in_chans"], *model_args["img_size"]],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [entry.center for entry in entries for _ in range(repeat)],
            "std": [entry.scale for entry in entries for _ in range(repeat)],
            "num_classes": 0,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
    }


def _contract(
    encoder: PretrainedEncoder,
    entries: tuple[ChannelContract, ...],
    size: tuple[int, ...],
    spacing: Sequence[float] | None,
) -> dict[str, Any]:
    """Return the encoder's contract, for these channels alone and in their order, with the input layout.

    `spacing` in it is None where positions count patches, so that any is as good.
    """
    contract, patch = encoder.contract, encoder.spec.patch(len(size))
    spacing = spacing or _reference(encoder.module, [entry.channel for entry in entries], len(size))
    own = Contract(
        channels=entries,
        crop_2d=contract.crop_2d,
        crop_3d=contract.crop_3d,
        pooling=contract.pooling,
        fingerprint=contract.fingerprint,
        images=contract.images,
        steps=contract.steps,
    )
    layout = "c y x" if len(size) == 2 else "c (n pz) y x -> (c pz) (n y) x"
    timm_input = {"layout": layout, "size": list(size), "patch": list(patch)}
    return {**json.loads(own.to_json()), "timm": timm_input | {"spacing": None if spacing is None else list(spacing)}}


def _with_eps_of_timm(module: Encoder) -> Encoder:
    """Return an encoder whose LayerNorms have timm's epsilon: itself, or a copy, and then a warning."""
    if module.spec.norm_eps == TIMM_EPS:
        return module
    log.warning(
        "the encoder's LayerNorms have epsilon %g and timm's %g: where tokens vary little, features differ a little",
        module.spec.norm_eps,
        TIMM_EPS,
    )
    twin = Encoder(replace(module.spec, norm_eps=TIMM_EPS)).eval()
    twin.load_state_dict(module.state_dict())
    return twin


@torch.inference_mode()
def _difference(module: Encoder, folder: Path, contract: dict[str, Any]) -> float:
    """Open the folder with timm and return the largest difference of features, relative to the largest feature.

    Random input in model units: it excites every channel and patch, which one crop of a scene may not.
    """
    twin = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    layout, channels = contract["timm"], [Channel(**entry["channel"]) for entry in contract["channels"]]
    pixels = torch.randn(2, len(channels), *layout["size"], generator=torch.Generator().manual_seed(0))
    device = module.cls_token.device
    spacing = None if layout["spacing"] is None else torch.tensor([layout["spacing"]] * 2, device=device)
    valid = torch.ones_like(pixels, dtype=torch.bool).to(device)
    ours = module(pixels.to(device), valid, channels, spacing).tokens.float().cpu()
    theirs = twin.forward_features(as_timm_input(pixels, layout["patch"]))
    return float((ours - theirs).abs().max() / ours.abs().max())


def _card(config: dict[str, Any], contract: dict[str, Any]) -> str:
    """Return README.md: how to open the model and how to feed it."""
    layout = contract["timm"]
    size = config["pretrained_cfg"]["input_size"]
    rows = "\n".join(
        f"| {index} | {entry['channel']['name']} | {entry['channel']['unit']} | "
        + (f"{entry['center']:g} | {entry['scale']:g}" if entry["method"] == "fixed" else "its median | its spread")
        + f" | {'none' if entry['value_range'] is None else '{:g} to {:g}'.format(*entry['value_range'])} |"
        for index, entry in enumerate(contract["channels"])
    )
    per_image = any(entry["method"] == "image" for entry in contract["channels"])
    volume = len(layout["size"]) == 3
    pz = layout["patch"][0]
    notes = []
    if layout["spacing"] is not None:
        ground = all(entry["channel"]["kind"] in GROUND_KINDS for entry in contract["channels"]) and not volume
        notes.append(
            f"Positions are physical: the model is for pixels {' x '.join(f'{step:g}' for step in layout['spacing'])} "
            f"{'m' if ground else 'mm'} apart. For images of another spacing export again with that spacing."
        )
    if per_image:
        notes.append(
            "Where mean and std are the image's own, take each image's median and spread = (p95 - p5) / 3.29 over its "
            "valid pixels; `mean` 0 and `std` 1 in config.json then mean that the input is scaled already."
        )
    if volume:
        slices, rows_px, columns = layout["size"]
        notes.append(
            f"The input is a volume of {slices} slices, {rows_px} rows and {columns} columns, presented as an image: "
            f"`c (n {pz}) y x -> (c {pz}) (n y) x`, in numpy\n\n"
            f"    volume.reshape(c, n, {pz}, y, x).swapaxes(1, 2).reshape(c * {pz}, n * y, x) # n = {slices} / {pz}\n\n"
            "or `geomed_mae.exporters.timm.as_timm_input`. Tokens come in the order slab, row, column."
        )
    shape = "x".join(map(str, size))
    return f"""---
library_name: timm
tags: [timm, transformers, masked-autoencoder, self-supervised, geomed-mae]
---
# {config["architecture"]}, {shape}, pretrained with geomed-mae

An ordinary timm VisionTransformer for one fixed list of channels and one input size, folded exactly from a
channel-flexible encoder that was pretrained as a masked autoencoder on {contract["images"]} images for
{contract["steps"]} steps.

    import timm
    model = timm.create_model("local-dir:/path/to/this/folder", pretrained=True)
    tokens = model.forward_features(x)     # x ({shape}) per image; class token first, then patches
    vector = model(x)                      # mean of the patch tokens

The input is (value - mean) / std per channel, with values in the unit below, clipped first where a range is given, and
0 where a pixel is invalid.

| channel | name | unit | mean | std | clipped to |
|---|---|---|---|---|---|
{rows}

{chr(10).join(notes) or "The input layout is (channel, row, column)."}

contract.json holds the same in machine-readable form, with each channel's physics.
"""
