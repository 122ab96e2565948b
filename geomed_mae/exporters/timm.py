"""Export to timm: an encoder with a fixed channel list and input size becomes an ordinary VisionTransformer.

The channel-flexible patch embedding folds into one convolution and the positions into a table, exactly. The folder
opens with `timm.create_model("local-dir:FOLDER", pretrained=True)`, with transformers' AutoModel, and as TerraTorch's
backbone `timm_local-dir:FOLDER`.

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
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
from jaxtyping import Float
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from geomed_mae.exporters.card import CONTRACT, NORMALISED, README, contract_json, model_card
from geomed_mae.exporters.folder import building, carry_record, outcome
from geomed_mae.exporters.proof import Trial, clipped, difference, ours, prove, prove_contract, trial
from geomed_mae.exporters.request import Request
from geomed_mae.image import Channel
from geomed_mae.models.contract import ChannelContract
from geomed_mae.models.patches import patch_grid
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.vit import Encoder

TAKES = ("encoder",)

TIMM_EPS = 1e-6
"""Of the LayerNorms of timm's vit_*; a config.json has no key for it."""

ARCHITECTURES = {
    (192, 12, 3): "vit_tiny_patch16_224",
    (384, 12, 6): "vit_small_patch16_224",
    (768, 12, 12): "vit_base_patch16_224",
    (1024, 24, 16): "vit_large_patch16_224",
}
"""timm's name for (width, depth, heads); other shapes take the tiny one, whose every dimension is then overridden."""

log = logging.getLogger(__name__)


def export(request: Request, out: Path) -> dict[str, Any]:
    """Write `out` as a timm model folder, open it with timm, and compare.

    The folder holds config.json, model.safetensors, contract.json, README.md, MANIFEST.sha256, and what the encoder
    has seen (pretrained_on.json), where that is recorded.

    Returns:
        folder, files, architecture, channels, input_size, parity, and the largest relative difference of features to
        the encoder's. It is that of `parity`, unless the encoder's LayerNorms have another epsilon than timm's: then a
        warning says so, and parity is that with the encoder with timm's.

    Raises:
        IntegrityError: the exported model does not compute the same; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    held = replace(request, encoder=_with_eps_of_timm(request.encoder))
    model_args, tensors = fold(held.encoder.module, request.channels, request.size, request.spacing)
    config = _config(request.entries, model_args)
    layout = "c y x" if len(request.size) == 2 else "c (n pz) y x -> (c pz) (n y) x"
    contract = contract_json(request, values=NORMALISED, layout=layout)
    given = trial(request)
    with building(out) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        (folder / "model.safetensors").write_bytes(tensor_bytes(tensors, metadata={"format": "pt"}))
        (folder / CONTRACT).write_text(json.dumps(contract, indent=2), encoding="utf-8")
        (folder / README).write_text(_card(request, config), encoding="utf-8")
        carry_record(request, folder)
        prove_contract("timm", folder, request)
        theirs = _tokens(folder, request, given)
        parity = prove(
            "timm",
            ours(held, given).tokens,
            theirs,
            runtime=f"timm {timm.__version__}",
            compared=f"tokens of {given.source} and of noise",
        )
        apart = difference(ours(request, given).tokens, theirs)
    return outcome(
        request,
        out,
        input_size=config["pretrained_cfg"]["input_size"],  # of the plain ViT: a volume goes in as planes
        architecture=config["architecture"],
        largest_relative_difference=apart,
        parity=parity,
    )


def fold(
    module: Encoder, channels: Sequence[Channel], size: Sequence[int], spacing: Sequence[float] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the arguments and the state dict of the timm VisionTransformer that computes what `module` computes.

    Args:
        module: the encoder.
        channels: of the input, in order.
        size: of the input in pixels (rows, columns) or voxels (slices, rows, columns), a multiple of the patch.
        spacing: distance between pixels per axis, m or mm; without one, positions are those of the reference, which
            are those of counted patches.
    """
    spec = module.spec
    patch = spec.patch(len(size))
    grid = patch_grid(size, patch)
    distance = None if spacing is None else torch.tensor([list(spacing)], dtype=torch.float64)
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


def architecture(width: int, depth: int, heads: int) -> str:
    """Return timm's name of a ViT of this shape, or that of the one whose dimensions are then overridden."""
    return ARCHITECTURES.get((width, depth, heads), "vit_tiny_patch16_224")


def _config(entries: Sequence[ChannelContract], model_args: dict[str, Any]) -> dict[str, Any]:
    """Return timm's config.json.

    `num_classes` stands outside model_args alone: inside them it makes transformers' TimmWrapper fail.
    """
    repeat = model_args["in_chans"] // len(entries)
    return {
        "architecture": architecture(model_args["embed_dim"], model_args["depth"], model_args["num_heads"]),
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


def _with_eps_of_timm(encoder: PretrainedEncoder) -> PretrainedEncoder:
    """Return an encoder whose LayerNorms have timm's epsilon: itself, or a copy, and then a warning."""
    module = encoder.module
    if module.spec.norm_eps == TIMM_EPS:
        return encoder
    log.warning(
        "the encoder's LayerNorms have epsilon %g and timm's %g: where tokens vary little, features differ a little",
        module.spec.norm_eps,
        TIMM_EPS,
    )
    twin = Encoder(replace(module.spec, norm_eps=TIMM_EPS)).eval()
    twin.load_state_dict(module.state_dict())
    return PretrainedEncoder(twin, encoder.contract, origin=encoder.origin, seen=encoder.seen)


@torch.inference_mode()
def _tokens(folder: Path, request: Request, given: Trial) -> Float[Tensor, "b 1+n d"]:
    """Open the folder with timm and return its tokens of a trial, scaled by the mean and std that timm found there."""
    model = timm.create_model(f"local-dir:{folder.resolve()}", pretrained=True).eval()
    mean, std = (torch.tensor(model.pretrained_cfg[name]).reshape(1, -1, 1, 1) for name in ("mean", "std"))
    return model.forward_features((as_timm_input(clipped(request, given), request.patch) - mean) / std)


def _card(request: Request, config: dict[str, Any]) -> str:
    """Return README.md: how to open the model and how to feed it."""
    shape = "x".join(map(str, config["pretrained_cfg"]["input_size"]))
    blocks = sorted({max(1, request.encoder.spec.depth * part // 4) - 1 for part in (1, 2, 3, 4)})
    opening = f"""\
An ordinary timm VisionTransformer for one fixed list of channels and one input size, folded exactly from a
channel-flexible encoder.

    import timm
    model = timm.create_model("local-dir:/path/to/this/folder", pretrained=True)
    tokens = model.forward_features(x)     # x ({shape}) per image; class token first, then patches
    vector = model(x)                      # mean of the patch tokens

The same folder opens in transformers: `AutoModel.from_pretrained("/path/to/this/folder")`."""
    if len(request.size) == 2:
        opening += f"""

In TerraTorch it is a backbone: `backbone: timm_local-dir:/path/to/this/folder`, `backbone_pretrained: true`,
`backbone_out_indices: {blocks}`."""
    notes = ["The input layout is (channel, row, column)."]
    if len(request.size) == 3:
        slices, rows, columns = request.size
        pz = request.patch[0]
        notes = [
            f"The input is a volume of {slices} slices, {rows} rows and {columns} columns, presented as an image: "
            f"`c (n {pz}) y x -> (c {pz}) (n y) x`, in numpy\n\n"
            f"    volume.reshape(c, n, {pz}, y, x).swapaxes(1, 2).reshape(c * {pz}, n * y, x) # n = {slices} / {pz}\n\n"
            "or `geomed_mae.exporters.timm.as_timm_input`. Tokens come in the order slab, row, column."
        ]
    if request.per_image:
        notes.append("`mean` 0 and `std` 1 in config.json mean that the input is scaled already.")
    return model_card(
        request,
        title=f"{config['architecture']}, {shape}, exported by geomed-mae",
        opening=opening,
        library="timm",
        tags=["timm", "transformers"],
        values=NORMALISED,
        notes=notes,
    )
