"""Export to TorchGeo: a checkpoint that its trainers take as `weights`, beside the timm folder of the same encoder.

    ClassificationTask(model="vit_small_patch16_224", weights="FOLDER/model.ckpt", in_channels=6, num_classes=10)

TorchGeo's trainers build a timm model by its name, with its own size and patch. An encoder of another shape has no such
name: there the folder itself is the model, `model="local-dir:FOLDER"`, which timm builds as the folder's config.json
says. The convention of the checkpoint is that of Lightning, as TorchGeo reads it (trainers/utils.py, extract_backbone,
the same in 0.7 to 0.10): `hyper_parameters.model` and weights under `model.`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import timm as timm_library
import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.exporters import timm
from geomed_mae.exporters.card import NORMALISED, README, model_card
from geomed_mae.exporters.folder import building, outcome
from geomed_mae.exporters.proof import Trial, ours, prove, trial
from geomed_mae.exporters.request import Request
from geomed_mae.models.manifest import MANIFEST

TAKES = ("encoder",)
CHECKPOINT = "model.ckpt"
PREFIX = "model."
KINDS = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}
"""Width, depth and heads -> what timm calls a ViT of that shape."""


def export(request: Request, out: Path) -> dict[str, Any]:
    """Write `out` with model.ckpt and the timm folder's files, load it as TorchGeo does, and compare.

    Returns:
        folder, files, channels, input_size, parity, `model` (what to give a trainer as `model`: timm's name, or
        "local-dir:" and the folder) and `by_name` (whether it is a name).

    Raises:
        ConfigError: volumes, or an encoder whose LayerNorms are not timm's.
        IntegrityError: the checkpoint does not compute the same; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    if len(request.size) != 2:
        raise ConfigError("TorchGeo takes images, not volumes; take --to monai-bundle, timm or onnx")
    if request.encoder.spec.norm_eps != timm.TIMM_EPS:
        raise ConfigError(
            f"the encoder's LayerNorms have epsilon {request.encoder.spec.norm_eps:g}, and the models that TorchGeo "
            f"builds have {timm.TIMM_EPS:g}: its features would differ. Take --to timm, which says by how much"
        )
    given = trial(request)
    with building(out) as folder:
        _timm_folder(request, folder)
        tensors = load_file(folder / "model.safetensors")
        named = _plain_name(request, tensors)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        torch.save(
            {
                "hyper_parameters": {"model": named or config["architecture"], "in_channels": len(request.entries)},
                "state_dict": {f"{PREFIX}{name}": tensor for name, tensor in tensors.items()},
            },
            folder / CHECKPOINT,
        )
        (folder / README).write_text(_card(request, named), encoding="utf-8")
        parity = prove(
            "torchgeo",
            ours(request, given).tokens,
            _tokens(folder, named, given),
            runtime=f"timm {timm_library.__version__}, as TorchGeo loads it",
            compared=f"tokens of {given.source} and of noise",
        )
    return outcome(
        request,
        out,
        model=named or f"local-dir:{out}",
        by_name=named is not None,
        parity=parity,
    )


def _timm_folder(request: Request, folder: Path) -> None:
    """Put what the target `timm` writes, proven, straight into `folder`."""
    inner = folder / "timm"
    timm.export(request, inner)
    (inner / MANIFEST).unlink()
    for path in inner.iterdir():
        path.rename(folder / path.name)
    inner.rmdir()


def _plain_name(request: Request, tensors: dict[str, Tensor]) -> str | None:
    """Return the name by which timm builds this very shape, or None."""
    spec, (rows, columns), (high, wide) = request.encoder.spec, request.size, request.patch
    kind = KINDS.get((spec.dim, spec.depth, spec.heads))
    name = f"vit_{kind}_patch{high}_{rows}"
    if kind is None or rows != columns or high != wide or not timm_library.is_model(name):
        return None
    with torch.device("meta"):
        twin = timm_library.create_model(name, in_chans=len(request.entries), num_classes=0)
    shapes = {key: tensor.shape for key, tensor in twin.state_dict().items()}
    return name if shapes == {key: tensor.shape for key, tensor in tensors.items()} else None


@torch.inference_mode()
def _tokens(folder: Path, named: str | None, given: Trial) -> Float[Tensor, "b 1+n d"]:
    """Load the checkpoint as TorchGeo's trainers do and return the tokens of a trial."""
    stored = torch.load(folder / CHECKPOINT, map_location="cpu", weights_only=True)
    state = {key.replace(PREFIX, ""): value for key, value in stored["state_dict"].items() if PREFIX in key}
    model = timm_library.create_model(
        named or f"local-dir:{folder.resolve()}",
        in_chans=stored["hyper_parameters"]["in_channels"],
        num_classes=0,
        pretrained=False,
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    if missing or unexpected:
        raise IntegrityError(
            f"the checkpoint lacks {missing[:3]} and has {unexpected[:3]} too many for timm's "
            f"'{named}'; nothing was written: please report this with the encoder's config.json"
        )
    return model.eval().forward_features(given.normalised)


def _card(request: Request, named: str | None) -> str:
    channels, (rows, columns) = len(request.entries), request.size
    model = named or "local-dir:/path/to/this/folder"
    shown = [[f"{getattr(entry, part):g}" for entry in request.entries] for part in ("center", "scale")]
    how = (
        f"`{named}` is timm's name of this very network; its classifier reads the class token. With "
        '`model="local-dir:/path/to/this/folder"` timm builds it from config.json, and the classifier reads the mean '
        "of the patch tokens, which masked autoencoders are better at."
        if named
        else "timm has no name for this network, so that the folder is the model; the classifier reads the mean of the "
        "patch tokens."
    )
    opening = f"""\
Weights for TorchGeo's trainers that build a timm model (classification, regression, self-supervision):

    from torchgeo.trainers import ClassificationTask
    task = ClassificationTask(
        model="{model}", weights="/path/to/this/folder/{CHECKPOINT}",
        in_channels={channels}, num_classes=10,
    )

{how} Its segmentation trainers have convolutional networks inside and do not take a plain vision transformer.

The folder opens in timm, transformers and TerraTorch too (`timm.create_model("local-dir:/path/to/this/folder",
pretrained=True)`). The model is for images of {rows} x {columns} pixels; resize or crop to that.

What TorchGeo calls the transforms of its weights, with Kornia:

    import kornia.augmentation as K
    transforms = K.AugmentationSequential(
        K.Normalize(mean=[{", ".join(shown[0])}], std=[{", ".join(shown[1])}]), data_keys=None
    )

with bands {", ".join(f'"{channel.name}"' for channel in request.channels)} in this order."""
    notes = []
    if request.per_image:
        notes.append("`mean` 0 and `std` 1 above mean that the input is scaled already, as said here.")
    return model_card(
        request,
        title=f"{named or 'A vision transformer'} for TorchGeo, {channels}x{rows}x{columns}",
        opening=opening,
        library="timm",
        tags=["torchgeo", "timm"],
        values=NORMALISED,
        notes=notes,
    )
