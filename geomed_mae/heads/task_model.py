"""TaskModel: encoder + head + contract. What `finetune` leaves in RUN/model and what `evaluate` and `predict` open.

    config.json         encoder and head shapes, classes, modality, crop
    model.safetensors   weights, under `encoder.` and `head.`
    contract.json       what the model may be fed, as in an encoder folder
    trained_on.json     what it has seen, the encoder's pretraining included (`archives.seen`), to refuse scores over it
    MANIFEST.sha256     vouches for the others

Written whole or not at all, verified byte by byte when read; no pickle, no identifier.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from geomed_mae.archives.index import Row
from geomed_mae.archives.seen import Seen, load_seen, save_private
from geomed_mae.archives.statistics import ChannelStatistics
from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.heads import HeadInputs, HeadSpec, head_module
from geomed_mae.heads.losses import Loss, loss_of
from geomed_mae.models.contract import Contract, normalise, scaling
from geomed_mae.models.encoder_folder import CONFIG, CONTRACT, TRAINED_ON, WEIGHTS, stored_tensors
from geomed_mae.models.encoder_folder import TASK_FORMAT as FORMAT
from geomed_mae.models.encoder_folder import TASK_VERSION as VERSION
from geomed_mae.models.manifest import MANIFEST, read_folder, write_folder
from geomed_mae.models.pretrained import read_out
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.untrusted import filled, json_object
from geomed_mae.models.vit import Encoder

FOLDER = "model"
"""Name of the folder inside a fine-tuning run."""
MOST_PIXELS = 1 << 28
"""Of a crop that is read from a file: far beyond any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSpec:
    """What a task model is for.

    Attributes:
        head: shape of the head, class names included.
        modality: of the images.
        channels: names of the channels, in the order that the head was trained with.
        crop: training crop in pixels or voxels, the window of inference.
    """

    head: HeadSpec
    modality: str
    channels: tuple[str, ...]
    crop: tuple[int, ...]

    @classmethod
    def from_json(cls, data: Any) -> TaskSpec:
        """Read the task of a model folder, which somebody else may have made.

        Raises:
            ConfigError: it is none.
        """
        try:
            head, crop = HeadSpec.from_json(data["head"]), tuple(data["crop"])
            spec = cls(head=head, modality=data["modality"], channels=tuple(data["channels"]), crop=crop)
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"the description of a task cannot be read: {error!r}") from error
        names = (head.name, spec.modality, *spec.channels, *head.classes)
        if not all(isinstance(name, str) for name in names):
            raise ConfigError("the description of a task cannot be read: a name is no text")
        if not all(type(size) is int and size > 0 for size in crop) or math.prod(crop) > MOST_PIXELS:
            raise ConfigError(f"the description of a task cannot be read: {str(crop)[:80]} is no crop")
        return spec


class TaskModel(nn.Module):
    """An encoder and a head behind one contract: physical values in, logits out."""

    def __init__(self, encoder: Encoder, contract: Contract, spec: TaskSpec) -> None:
        """Build the head that `spec` names, with fresh weights.

        Raises:
            ConfigError: unknown head or one of another task, a channel outside the contract, a crop that is no multiple
                of the patch, or a number of maps that the encoder does not have.
        """
        super().__init__()
        patch = encoder.spec.patch(len(spec.crop))
        if any(size % step for size, step in zip(spec.crop, patch, strict=True)):
            raise ConfigError(
                f"data.crop_{len(spec.crop)}d {list(spec.crop)} is not a multiple of the encoder's patch {list(patch)}"
            )
        known = {entry.channel.name: entry for entry in contract.of(spec.modality)}
        if missing := [name for name in spec.channels if name not in known]:
            raise ConfigError(
                f"channels {missing} of modality '{spec.modality}' are not in the contract: {list(known)}"
            )
        self.layers = read_out("last" if spec.head.maps == 1 else "several", encoder.spec.depth)
        if len(self.layers) != spec.head.maps:
            raise ConfigError(
                f"the head reads {spec.head.maps} maps of an encoder that gives {len(self.layers)} or 1; set "
                "head.read_out to last, or take the encoder that the head was made for"
            )
        self.encoder = encoder
        self.head = head_module(spec.head.name, spec.head.task).build(spec.head)
        self.contract, self.spec = contract, spec
        self.entries = tuple(known[name] for name in spec.channels)
        # One physics a channel, the contract's: a head is trained with it, whatever the header of each file says of
        # echo times and the like.
        self.physics = tuple(entry.channel for entry in self.entries)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return self.spec.head.classes

    @property
    def frozen(self) -> bool:
        """Whether the head alone learns."""
        return not any(parameter.requires_grad for parameter in self.encoder.parameters())

    @property
    def digest(self) -> str:
        """SHA-256 of weights, spec and contract: the same for models that compute the same, wherever they lie."""
        total = hashlib.sha256(json.dumps(asdict(self.spec), sort_keys=True, default=str).encode())
        total.update(self.encoder.spec.to_json().encode())
        total.update(self.contract.to_json().encode())
        for name, tensor in sorted(self.state_dict().items()):
            total.update(name.encode())
            total.update(tensor.detach().cpu().contiguous().numpy().data)
        return total.hexdigest()

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.encoder.cls_token.device

    def forward(
        self,
        raw: Float[Tensor, "b c *s"],
        valid: Bool[Tensor, "b c *s"],
        spacing: Float[Tensor, "b axes"] | None,
        statistics: Sequence[Sequence[ChannelStatistics]],
    ) -> Float[Tensor, "b class *t"]:
        """Return logits, (b, class, *s) to segment and (b, class) to classify.

        Args:
            raw: physical values of the channels `spec.channels`.
            valid: which of them mean something.
            spacing: distance between samples per axis, metres (rasters) or mm; None counts patches.
            statistics: per sample those of its whole image, one a channel.
        """
        pairs = [scaling(self.entries, own)[:2] for own in statistics]
        center, scale = (torch.from_numpy(np.stack(part)).to(raw.device) for part in zip(*pairs, strict=True))
        pixels = normalise(raw, valid, center, scale, [entry.value_range for entry in self.entries])
        found = self.encoder(pixels, valid, self.physics, spacing, layers=self.layers)
        known = found.token_valid.unflatten(-1, found.grid)
        maps = tuple(torch.where(known[:, None], tokens, 0.0) for tokens in found.maps)
        return self.head(HeadInputs(maps, known, pixels, valid))

    def loss(self, logits: Float[Tensor, "b class *s"], target: Int[Tensor, " b *u"]) -> Loss:
        """Return (loss, its parts by name, detached), over what is known alone; see `losses.loss_of`.

        Args:
            logits: as `forward` gives them.
            target: int64 class numbers, (b, *s) to segment and (b,) to classify, IGNORE where unknown; multi-label
                (b, class) of 1, 0 and UNKNOWN.
        """
        return loss_of(self.spec.head, logits, target)

    def freeze(self, frozen: bool) -> None:
        """Keep the encoder as it is, or let it learn again.

        An optimiser that holds the encoder's parameters leaves frozen ones alone, weight decay included: they have no
        gradient, not one of 0.
        """
        self.encoder.requires_grad_(not frozen)
        if frozen:
            self.encoder.zero_grad(set_to_none=True)

    def check(self, row: Row) -> tuple[str, ...]:
        """Return the names of the model's channels, after making sure that an image has them.

        Raises:
            ConfigError: another modality, number of axes or unit, or a missing channel.
        """
        if row.modality != self.spec.modality or len(row.shape) != len(self.spec.crop):
            raise ConfigError(
                f"the model is made for {len(self.spec.crop)}D images of modality '{self.spec.modality}', not for "
                f"{len(row.shape)}D images of '{row.modality}'"
            )
        have = {channel.name: channel for channel in row.channels}
        if missing := [name for name in self.spec.channels if name not in have]:
            raise ConfigError(
                f"an image of modality '{row.modality}' lacks channels {missing}, which the model was trained with; "
                f"it has {list(have)}"
            )
        self.contract.entries(row.modality, [have[name] for name in self.spec.channels])
        return self.spec.channels

    @torch.inference_mode()
    def probabilities(self, raw: np.ndarray, valid: np.ndarray, row: Row) -> Float[Tensor, "b class *s"]:
        """Return class probabilities of crops (b, C, *crop) of the image `row`, fp32 on the model's device.

        They sum to 1 over the classes; where an image may have several, each is a probability of its own.
        """
        have = {channel.name: entry for channel, entry in zip(row.channels, row.statistics, strict=True)}
        own = [have[name] for name in self.spec.channels]
        spacing = None if row.spacing is None else torch.tensor([row.spacing], dtype=torch.float32).expand(len(raw), -1)
        logits = self(
            torch.from_numpy(raw).to(self.device),
            torch.from_numpy(valid).to(self.device),
            None if spacing is None else spacing.to(self.device),
            [own] * len(raw),
        )
        return logits.float().sigmoid() if self.spec.head.multi_label else logits.float().softmax(dim=1)


def save_task_model(run: Path, model: TaskModel, seen: Seen) -> None:
    """Write RUN/model, atomically, and the private part of what the model has seen beside it.

    Raises:
        OutputError: it cannot be written.
    """
    write_task_model(run / FOLDER, model, seen)
    save_private(run, seen)


def write_task_model(folder: Path, model: TaskModel, seen: Seen) -> None:
    """Write the folder of a task model, atomically: what may be handed on, so nothing private.

    Raises:
        OutputError: it cannot be written.
    """
    spec = {**asdict(model.spec), "head": model.spec.head.to_json()}
    config = {
        "format": FORMAT,
        "version": VERSION,
        "encoder": json.loads(model.encoder.spec.to_json()),
        "task": spec,
    }
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_folder(
        folder,
        {
            CONFIG: json.dumps(config, indent=2).encode(),
            WEIGHTS: tensor_bytes(tensors),
            CONTRACT: model.contract.to_json().encode(),
            TRAINED_ON: seen.public(),
        },
    )


def load_task_model(path: str | Path) -> tuple[TaskModel, Seen]:
    """Open the task model of a fine-tuning run, or the model folder itself, in evaluation mode on the CPU.

    Returns it with what it has seen, which includes the private part where that lies beside it.

    Raises:
        ConfigError: there is none, or one of another version.
        IntegrityError: a file is not what was written, or does not fit the others.
    """
    folder = Path(path)
    if (folder / FOLDER / MANIFEST).is_file():
        folder = folder / FOLDER
    if not (folder / MANIFEST).is_file():
        raise ConfigError(
            f"'{path}' holds no fine-tuned model (no {FOLDER}/{MANIFEST}); give a run that `finetune` has finished"
        )
    files = read_folder(folder)
    if missing := [name for name in (CONFIG, WEIGHTS, CONTRACT, TRAINED_ON) if name not in files]:
        raise (ConfigError if CONTRACT in files else IntegrityError)(
            f"'{path}' is no fine-tuned model: it has no {missing[0]}"
        )
    config = json_object(files[CONFIG], folder, CONFIG)
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ConfigError(
            f"'{path}' is '{config.get('format')}' version {config.get('version')}, not '{FORMAT}' version {VERSION}"
        )
    spec, shape = TaskSpec.from_json(config.get("task")), ModelSpec.from_json(json.dumps(config.get("encoder")))
    contract = Contract.from_json(files[CONTRACT].decode(errors="replace"))
    tensors = stored_tensors(files[WEIGHTS], folder)
    model = filled(lambda: TaskModel(Encoder(shape), contract, spec), tensors, folder)
    return model.eval(), load_seen(files[TRAINED_ON], folder, TRAINED_ON)
