"""The encoder folder: what `pretrain` leaves for others.

    config.json         the ModelSpec, and the folder's format and version
    model.safetensors   the encoder's weights; the decoder's too where asked for, under `decoder.`
    contract.json       what the encoder may be fed
    pretrained_on.json  keyed hashes and footprints of the images that it has seen (`archives.seen`)
    README.md           model card
    MANIFEST.sha256     vouches for the others

No pickle, no code, no identifiers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as read_tensors
from safetensors.torch import save as tensor_bytes
from torch import nn

from geomed_mae.archives.seen import Seen, load_seen
from geomed_mae.errors import ConfigError, IntegrityError, SecurityError
from geomed_mae.models.contract import Contract
from geomed_mae.models.foreign import load_foreign
from geomed_mae.models.foreign.stored import INDEX
from geomed_mae.models.manifest import MANIFEST, read_folder, write_folder
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.untrusted import filled, json_object
from geomed_mae.models.vit import Encoder

FORMAT = "geomed-mae encoder"
VERSION = 1
CONFIG, WEIGHTS, CONTRACT, CARD = "config.json", "model.safetensors", "contract.json", "README.md"
PRETRAINED_ON, TRAINED_ON = "pretrained_on.json", "trained_on.json"
TASK_FORMAT, TASK_VERSION = "geomed-mae task model", 2
"""Of what `finetune` leaves (`heads.task_model`), whose encoder is opened as well."""
HOMES = ("encoder", "model")
"""Folders of a run or an export that hold an encoder: as it is, or with a head."""
STUDY, RUN_MARK = "study.json", "recipe.resolved.yaml"
"""Files by which a study of several runs, and a run, are known (`training.study_files`, `training.run`)."""
SHOWN = 6
"""Runs that an error names."""
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl", ".pickle", ".joblib")
"""Suffixes of files that can run code when they are loaded."""


def save_encoder(
    folder: str | Path,
    encoder: Encoder,
    contract: Contract,
    *,
    decoder: nn.Module | None = None,
    seen: Seen | None = None,
) -> None:
    """Write an encoder folder, atomically; an older encoder folder in its place is replaced.

    Args:
        folder: where to.
        encoder: its weights are stored in the precision that they have.
        contract: what it was trained on.
        decoder: stored too when given, for `reconstruct` and continued pretraining.
        seen: what it was trained on, of which the public part is stored; None where nobody knows.

    Raises:
        OutputError: the folder holds something else, or cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in encoder.state_dict().items()}
    if decoder is not None:
        tensors |= {
            f"decoder.{name}": tensor.detach().cpu().contiguous() for name, tensor in decoder.state_dict().items()
        }
    config = {"format": FORMAT, "version": VERSION, "spec": json.loads(encoder.spec.to_json())}
    write_folder(
        Path(folder),
        {
            CONFIG: json.dumps(config, indent=2).encode(),
            WEIGHTS: tensor_bytes(tensors),
            CONTRACT: contract.to_json().encode(),
            **({} if seen is None else {PRETRAINED_ON: seen.public()}),
            CARD: model_card(encoder, contract).encode(),
        },
    )


def encoder_home(path: str | Path) -> Path:
    """Return the folder whose weights `load_encoder` opens: inside a run or an export, or the path itself.

    A pretraining run and an export of an encoder have it in `encoder`, a fine-tuning run and an export of its model in
    `model`. What an export holds beside that, in whatever format, is for other tools.
    """
    path = Path(path)
    return next((path / name for name in HOMES if (path / name / MANIFEST).is_file()), path)


def load_encoder(path: str | Path) -> PretrainedEncoder:
    """Open the encoder of a run, of whatever `export` wrote, or of a folder of another library (`models.foreign`).

    Of a fine-tuning run it is the fine-tuned encoder, which has seen labels too. Where there is a manifest, every byte
    is checked against it first.

    Raises:
        ConfigError: there is no encoder, one of a version that cannot be read yet, or a foreign one that does not map
            exactly onto this package's blocks (the setting is named); or a study, whose runs are named.
        IntegrityError: a file is missing or is not what was written (it is named).
        SecurityError: a pickle, which could run code; the message says how to convert it.
    """
    folder = encoder_home(path)
    _refuse_pickles(folder)
    if not folder.is_dir():
        raise ConfigError(
            f"'{path}' is a file; give the folder that it lies in"
            if folder.is_file()
            else f"there is no run or encoder folder '{path}'"
        )
    if not (folder / MANIFEST).is_file():
        if (folder / CONFIG).is_file():
            return load_foreign(folder)
        raise ConfigError(_why_no_encoder(folder))
    files = read_folder(folder)
    config = json_object(files.get(CONFIG, b"{}"), folder, CONFIG)
    if CONFIG in files and "format" not in config:
        exported = load_foreign(folder)  # what `geomed-mae export` wrote for timm or transformers
        exported.seen = _seen(files, folder)
        return exported
    if missing := [name for name in (CONFIG, WEIGHTS, CONTRACT) if name not in files]:
        raise IntegrityError(
            f"'{folder}' has no {missing[0]} in its {MANIFEST}; it is no encoder folder, or half of one"
        )
    if (config["format"], config.get("version")) not in ((FORMAT, VERSION), (TASK_FORMAT, TASK_VERSION)):
        raise ConfigError(
            f"'{path}' is '{config['format']}' version {config.get('version')}, not '{FORMAT}' version {VERSION} or "
            f"'{TASK_FORMAT}' version {TASK_VERSION}"
        )
    encoder = _built(folder, config, files[WEIGHTS])
    return PretrainedEncoder(encoder, Contract.from_json(files[CONTRACT].decode()), seen=_seen(files, folder))


def _built(folder: Path, config: Mapping[str, Any], weights: bytes) -> Encoder:
    """Return the encoder of an encoder folder, without its decoder, or of a task model, without its head."""
    task = config["format"] == TASK_FORMAT
    spec = ModelSpec.from_json(json.dumps(config.get("encoder" if task else "spec")))
    tensors = stored_tensors(weights, folder)
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("decoder.")}
    if task:
        start = "encoder."
        own = {name.removeprefix(start): tensor for name, tensor in own.items() if name.startswith(start)}
    return filled(lambda: Encoder(spec), own, folder)


def stored_tensors(weights: bytes, folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a safetensors file.

    Raises:
        IntegrityError: it is none.
    """
    try:
        return read_tensors(weights)
    except SafetensorError as error:
        raise IntegrityError(f"'{folder}': {WEIGHTS} is no safetensors file: {str(error)[:200]}") from error


def _why_no_encoder(folder: Path) -> str:
    """Return what to say of a folder without an encoder."""
    if (folder / STUDY).is_file():
        runs = [str(model.parent) for model in sorted(folder.glob(f"*/seed-*/{HOMES[1]}"))]
        shown = ", ".join(runs[:SHOWN]) + (", ..." if len(runs) > SHOWN else "")
        return f"'{folder}' is a study of several runs; give one of them: {shown or 'none has finished yet'}"
    if (folder / RUN_MARK).is_file():
        return f"the run '{folder}' has left no encoder yet; finish it with --resume"
    return (
        f"'{folder}' holds no encoder (no {CONFIG}, no {MANIFEST}); give a run, an encoder folder, a folder that "
        "`geomed-mae export` wrote, or that of a Hugging Face ViTMAE or timm ViT"
    )


def _seen(files: Mapping[str, bytes], folder: Path) -> Seen | None:
    """Return what a folder says that its weights have seen; None where it says nothing."""
    name = next((name for name in (PRETRAINED_ON, TRAINED_ON) if name in files), None)
    return None if name is None else load_seen(files[name], folder, name)


def _refuse_pickles(path: Path) -> None:
    """Raise SecurityError for a pickled file, or a folder whose only weights are pickled."""
    found = path if path.suffix.lower() in PICKLES else None
    if path.is_dir() and not any((path / name).is_file() for name in (WEIGHTS, INDEX)):
        found = next((entry for entry in sorted(path.iterdir()) if entry.suffix.lower() in PICKLES), found)
    if found is not None:
        raise SecurityError(
            f"'{found}' is a pickle, which can run any code when it is opened; convert it where that may happen: "
            "safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors'), or for a Hugging "
            "Face model model.save_pretrained(DIR, safe_serialization=True), or for a timm model "
            "timm.models.save_for_hf(model, DIR, safe_serialization=True)"
        )


def model_card(encoder: Encoder, contract: Contract) -> str:
    """Return the README.md of an encoder folder: front matter for the Hugging Face hub, then prose and tables."""
    spec = encoder.spec
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    patches = " and ".join("x".join(map(str, patch)) for patch in (spec.patch_2d, spec.patch_3d) if patch is not None)
    crops = " and ".join("x".join(map(str, crop)) for crop in (contract.crop_2d, contract.crop_3d) if crop is not None)
    rows = "\n".join(
        f"| {entry.modality} | {entry.channel.name} | {entry.channel.kind} | {entry.channel.unit} | "
        + (f"(value - {entry.center:g}) / {entry.scale:g}" if entry.method == "fixed" else "(value - median) / spread")
        + f" | {'none' if entry.value_range is None else '{:g} to {:g}'.format(*entry.value_range)} |"
        for entry in contract.channels
    )
    references = {
        "ground sampling distance": f"{spec.reference_gsd_m:g} m" if spec.reference_gsd_m else None,
        "voxel spacing": " x ".join(f"{value:g}" for value in spec.reference_spacing_mm or ()) + " mm",
    }
    if spec.reference_spacing_mm is None:
        references.pop("voxel spacing")
    stated = ", ".join(f"{name} {value}" for name, value in references.items() if value)
    # An encoder of another package has no images: what it was trained on is not ours to say.
    own = contract.images > 0
    tags = "masked-autoencoder, vision-transformer, self-supervised" if own else "vision-transformer"
    title = "Encoder pretrained with geomed-mae" if own else "Encoder in the form of geomed-mae"
    history = (
        f"pretrained as a masked autoencoder on {contract.images} images for {contract.steps} steps"
        if own
        else "whose training is not recorded"
    )
    trained = "Trained without labels; how" if own else "How"
    return f"""---
library_name: geomed-mae
tags: [{tags}]
---
# {title}

A vision transformer (width {spec.dim}, {spec.depth} blocks, {spec.heads} heads, {parameters / 1e6:.1f} M parameters),
{history}. Patches: {patches}; crops:
{crops or "not recorded"}; positions count {f"patches at the reference {stated}" if stated else "patches"}.
Torch {torch.__version__.split("+")[0]} wrote the weights.

    import geomed_mae as gm
    encoder = gm.load_encoder("this/folder")
    vector = encoder.embed(image)       # ({spec.dim},)
    grid = encoder.features(image)      # ({spec.dim}, [z,] y, x), with its own geometry

## Input

Values in these units, scaled as stated; what is invalid has no influence. Where scaling names median and spread, both
are the image's own per channel; spread is (p95 - p5) / 3.29 of valid pixels.

| modality | channel | kind | unit | scaling | clipped to |
|---|---|---|---|---|---|
{rows}

## Limits

{trained} well it serves a task is measured by `geomed-mae finetune --twin` or `geomed-mae probe` on
data of that task. Other sensors, units or scales than those above are refused rather than guessed. The pretraining
images are known by the fingerprint `{contract.fingerprint or "not recorded"}` and by {PRETRAINED_ON}: keyed hashes of
pixels, by which whoever has an image can tell whether it was among them, and corners of rasters on the ground. Scores
over these images are refused. No identifier is stored.
"""
