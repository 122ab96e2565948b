"""What the tests of the exporters are given: encoders and task models of a few weights, for images and for volumes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from geomed_mae.archives.seen import Seen
from geomed_mae.exporters.request import Request, ask
from geomed_mae.heads.task_model import TaskModel, TaskSpec
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from tests.heads.given import spec_of

S2, CT, MR, RGB = (load_modality(name) for name in ("sentinel2-l2a", "ct", "mr", "rgb"))
SPEC = ModelSpec(
    dim=24, depth=3, heads=2, patch_2d=(8, 8), patch_3d=(2, 4, 4), basis=8,
    decoder_dim=32, decoder_depth=2, decoder_heads=2,
)  # fmt: skip


def contract() -> Contract:
    """Every channel of Sentinel-2, RGB, CT and MR."""
    entries = [entry for one in (S2, RGB, CT, MR) for entry in contract_entries(one, one.channels, [])]
    return Contract(channels=tuple(entries), crop_2d=(32, 32), crop_3d=(4, 16, 16), images=7, steps=11)


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Give biases values: at the zeros that they start with a mix-up would not show."""
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or "bias" in name or "token" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return module.eval()


def autoencoder(**changes: Any) -> MaskedAutoencoder:
    """A whole masked autoencoder."""
    torch.manual_seed(0)
    return shaken(MaskedAutoencoder.from_spec(replace(SPEC, **changes)))


def encoder(*, seen: Seen | None = None, **changes: Any) -> PretrainedEncoder:
    """An encoder whose spec is SPEC with `changes`."""
    torch.manual_seed(0)
    return PretrainedEncoder(shaken(Encoder(replace(SPEC, **changes))), contract(), seen=seen)


def asked(name: str, task: str, modality: str = "sentinel2-l2a", *, seen: Seen | None = None, **more: Any) -> Request:
    """A request for a task model, as `task_model` makes it; `seen` is of an unrecorded pretraining by default."""
    model = task_model(name, task, modality=modality, **more)
    return ask(PretrainedEncoder(model.encoder, model.contract, seen=seen or Seen.unknown()), task=model)


def task_model(name: str, task: str, *, modality: str = "sentinel2-l2a", **more: Any) -> TaskModel:
    """A task model with a head of that name; `more` goes to its HeadSpec."""
    whole = contract()
    names = tuple(entry.channel.name for entry in whole.of(modality))[:4]
    crop = whole.crop_2d if modality in ("sentinel2-l2a", "rgb") else whole.crop_3d
    more.setdefault("maps", 3)
    head = spec_of(name, task, SPEC.patch(len(crop)), channels=len(names), **more)
    spec = TaskSpec(head=head, modality=modality, channels=names, crop=crop)
    return shaken(TaskModel(encoder().module, whole, spec))
