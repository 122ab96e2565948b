"""The verb export: an encoder or a fine-tuned model -> the folder that another tool opens.

One file per target in geomed_mae/exporters. Each proves that what it wrote, opened in its own runtime, computes the
same; a mismatch is an IntegrityError, and nothing is left behind.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from geomed_mae.errors import ConfigError
from geomed_mae.exporters.request import ask
from geomed_mae.heads.task_model import CONFIG, FOLDER, TaskModel, load_task_model
from geomed_mae.heads.task_model import FORMAT as TASK_FORMAT
from geomed_mae.image import Image
from geomed_mae.models.contract import channel_names
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.manifest import MANIFEST
from geomed_mae.models.opening import image_of
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.plugins import load_plugin
from geomed_mae.training.checkpoint import newest_valid
from geomed_mae.training.objective import restore_objective
from geomed_mae.training.study_files import refuse_study

MARKER = "export"
ENCODER, MODEL = "encoder", "model"
"""What an exporter TAKES: an encoder, a fine-tuned model, or either."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Opened:
    """What is exported: an encoder, and the task model or the whole autoencoder around it, where there is one."""

    encoder: PretrainedEncoder
    task: TaskModel | None = None
    mae: MaskedAutoencoder | None = None
    mask_ratio: float = 0.75
    tuned: bool = False


def export(
    source: str | Path,
    target: str,
    out: str | Path,
    *,
    modality: str | None = None,
    channels: str | Sequence[str] | None = None,
    size: str | None = None,
    spacing: str | None = None,
    image: str | Path | None = None,
    decoder: bool = False,
) -> dict[str, Any]:
    """Export a run, an encoder folder, or a folder of another library that `load_encoder` opens.

    Args:
        source: what to export. Of a fine-tuned run, targets that take models get the model, others its encoder.
        target: name of a module in geomed_mae/exporters, for example "timm".
        out: folder to write; must not hold anything yet.
        modality: the modality whose channels are exported; may be left out when there is only one.
        channels: channel names, or text with commas between, in the order of the exported model's input; None takes
            all.
        size: comma-separated input size in pixels or voxels; None takes the crop of training.
        spacing: comma-separated distance between pixels per axis, metres for rasters and mm for others, for encoders
            with physical positions; None takes their reference.
        image: an image of the user's to compare on; None takes the scene that travels with the package.
        decoder: export the decoder of the pretraining run's newest checkpoint too.

    Returns:
        what the exporter says: `folder`, `files`, `channels`, `parity` and more; with `target`, and a `note` where
        something was left out.

    Raises:
        ConfigError: unknown target, modality or channel, a size that does not fit the patch, something that the target
            does not take, or `out` is not empty.
        IntegrityError: the exported model does not compute the same; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    source, out = Path(source), Path(out)
    plugin = load_plugin("exporters", target, marker=MARKER)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"'{out}' is not empty; choose another --out")
    refuse_study(source, "export")
    chosen = {"modality": modality, "channels": channel_names(channels) or None}
    chosen |= {"size": _numbers(size, "size", int), "spacing": _numbers(spacing, "spacing", float)}
    given = [f"--{name}" for name, value in chosen.items() if value is not None]
    if getattr(plugin, "WHOLE", False) and given:
        raise ConfigError(f"--to {target} writes the whole model, whatever {', '.join(given)} would choose; leave out")
    opened = _with_decoder(source, target, plugin) if decoder else _open(source)
    opened, note = _fitting(opened, target, plugin, chosen)
    if getattr(plugin, "WHOLE", False) and opened.task is None:
        chosen["modality"] = opened.encoder.contract.channels[0].modality
    request = ask(
        opened.encoder,
        task=opened.task,
        mae=opened.mae,
        mask_ratio=opened.mask_ratio,
        tuned=opened.tuned,
        image=None if image is None else _image(image, opened, chosen["modality"]),
        **chosen,
    )
    result = plugin.export(request, out)
    return {"target": target, **result, **({"note": note} if note else {})}


def _numbers(text: str | None, name: str, kind: type) -> tuple[Any, ...] | None:
    try:
        return None if text is None else tuple(kind(part) for part in text.split(","))
    except ValueError:
        form = "whole numbers" if kind is int else "numbers"
        example = "224,224" if kind is int else "20,20"
        raise ConfigError(f"--{name} is {form} with commas between, for example {example}, not '{text}'") from None


def _open(source: Path) -> Opened:
    """Open a fine-tuned run or its model folder, or whatever `load_encoder` opens."""
    if not is_task_model(source):
        return Opened(encoder=load_encoder(source))
    task, seen = load_task_model(source)
    return Opened(encoder=PretrainedEncoder(task.encoder, task.contract, seen=seen), task=task)


def is_task_model(path: Path) -> bool:
    """Return whether `path` is a fine-tuned run, an export with its model, or a model folder."""
    if (path / FOLDER / MANIFEST).is_file():
        return True
    if not (path / CONFIG).is_file():  # a pipe would wait for ever
        return False
    try:
        return json.loads((path / CONFIG).read_text(encoding="utf-8")).get("format") == TASK_FORMAT
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def _with_decoder(source: Path, target: str, plugin: ModuleType) -> Opened:
    """Open a pretraining run with its decoder.

    Raises:
        ConfigError: a target without decoder, no pretraining run with a checkpoint, or one whose checkpoint is not
            what its encoder folder was made of.
    """
    if not getattr(plugin, "DECODER", False):
        raise ConfigError(f"--to {target} has no place for a decoder; leave --decoder out")
    encoder = None if is_task_model(source) else load_encoder(source)
    checkpoint = newest_valid(source / "checkpoints") if encoder is not None else None
    if encoder is None or checkpoint is None:
        raise ConfigError(
            f"--decoder: '{source}' has no checkpoint of a pretraining run, where decoders are kept; give the run that "
            "`pretrain` wrote, or leave --decoder out"
        )
    objective = restore_objective(checkpoint)
    mine, theirs = encoder.module.state_dict(), objective.mae.encoder.state_dict()
    if mine.keys() != theirs.keys() or not all(torch.equal(mine[name].cpu(), theirs[name]) for name in mine):
        raise ConfigError(
            f"--decoder: the newest checkpoint of '{source}' (step {checkpoint.step}) is not the one that its encoder "
            "folder was made of; let the run finish (pretrain --resume), or leave --decoder out"
        )
    ratio = objective.masking.ratio
    ratio = sum(ratio) / 2 if isinstance(ratio, tuple) else ratio
    return Opened(encoder=encoder, mae=objective.mae, mask_ratio=ratio)


def _fitting(opened: Opened, target: str, plugin: ModuleType, chosen: dict[str, Any]) -> tuple[Opened, str | None]:
    """Return what the target takes of what was opened, and what is to be said of it.

    Of a fine-tuned run that gives its encoder, `chosen` gets the run's own modality, channels and size where nothing
    else is chosen.

    Raises:
        ConfigError: the target takes fine-tuned models, and this is an encoder.
    """
    takes = getattr(plugin, "TAKES", (ENCODER,))
    if opened.task is None:
        if ENCODER not in takes:
            raise ConfigError(
                f"--to {target} takes a fine-tuned model, and this is an encoder without head; give a run that "
                "`finetune` has finished"
            )
        return opened, None
    if MODEL in takes:
        return opened, None
    spec = opened.task.spec
    if chosen["modality"] in (None, spec.modality):
        chosen["modality"] = spec.modality
        chosen["channels"] = chosen["channels"] or spec.channels
        chosen["size"] = chosen["size"] or spec.crop
    note = f"{target} takes encoders: this is the fine-tuned one, without its head"
    log.warning("%s", note)
    return Opened(encoder=opened.encoder, tuned=True), note


def _image(path: str | Path, opened: Opened, modality: str | None) -> Image:
    """Read the image to compare on as the modality that is exported, or as one that the encoder knows."""
    contract = opened.encoder.contract
    modality = modality or (None if opened.task is None else opened.task.spec.modality)
    return image_of(path, contract if modality is None else replace(contract, channels=contract.of(modality)))
