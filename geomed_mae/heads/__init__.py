"""Heads: what turns an encoder's tokens into an answer. One file each.

A head is a module in this folder (or an entry point of group `geomed_mae.heads`) with two names:

    TASKS: tuple[str, ...]                 what it can answer: "segment", "classify" or both
    build(spec: HeadSpec) -> nn.Module     a module whose `forward(inputs: HeadInputs)` returns logits: (b, class) to
                                           classify, (b, class, *space) at the resolution of the pixels to segment

A head is given widths and shapes, never the encoder: it works behind any encoder that fills `HeadInputs`.

    linear.py           both tasks: one linear layer, the floor of every other head
    attentive.py        a class an image, from tokens pooled by attention (default of classify)
    convolutional.py    a class a pixel: light decoder with a skip at the image's resolution (default of segment)
    unetr.py            a class a pixel: UNETR's decoder, from MONAI
    losses.py           Dice, cross entropy, focal; what is not known counts in none
    task_model.py       encoder + head + contract: what `finetune` leaves behind
    windows.py          whole images from windows: class maps, probabilities, an image's class
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from geomed_mae.config import check_codes
from geomed_mae.errors import ConfigError
from geomed_mae.plugins import load_plugin, plugin_names

MARKER = "build"
DEFAULTS = {"segment": "convolutional", "classify": "attentive"}
"""Task -> name of the head that serves it where a recipe names none."""
LOSSES = {"segment": ("dice_ce", "cross_entropy", "focal"), "classify": ("cross_entropy", "focal")}
"""Task -> losses that it can be trained with; the first one is what `auto` means."""
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff]")
"""Characters that neither XML nor a table of lines can hold."""
MOST_CLASSES = 255
"""Classes of a map, whose numbers are one byte: the last number says that a pixel is not valid."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """What a head and its loss are built from; plain values, stored beside the weights.

    Attributes:
        name: name of the head's module.
        task: "segment" or "classify".
        embed_dim: width of the encoder's tokens.
        maps: number of the encoder's maps that the head reads: 1 is the last block's, more are those of
            `models.pretrained.read_out("several", depth)`.
        classes: class names in the order of their numbers.
        channels: number of image channels.
        patch: pixels or voxels a token stands for, per spatial axis; its length is the number of spatial axes.
        width: width of a convolutional head's own layers.
        multi_label: whether an image may have several classes (classify alone).
        loss: one of LOSSES of the task, or "auto".
        focal_gamma: exponent of the focal loss.
        class_weights: weight of each class in the entropy or focal loss; None weighs all alike.
        label_smoothing: share of the target that cross entropy spreads over all classes.
        codes: class name -> scheme, value, meaning and category of its code in DICOM SEG; None looks names up.

    Raises:
        ConfigError: task, loss, class weights and multi_label do not go together, there are too many classes, or a
            class name has a control character.
    """

    name: str
    task: str
    embed_dim: int
    maps: int = 1
    classes: tuple[str, ...]
    channels: int
    patch: tuple[int, ...]
    width: int = 64
    multi_label: bool = False
    loss: str = "auto"
    focal_gamma: float = 2.0
    class_weights: tuple[float, ...] | None = None
    label_smoothing: float = 0.0
    codes: dict[str, dict[str, str]] | None = None

    def __post_init__(self) -> None:
        if self.task not in LOSSES:
            raise ConfigError(f"head.task '{self.task}' is none of {', '.join(LOSSES)}")
        if self.loss not in ("auto", *LOSSES[self.task]):
            fitting = ", ".join(("auto", *LOSSES[self.task]))
            raise ConfigError(f"head.loss '{self.loss}' does not fit head.task {self.task}, which has {fitting}")
        if strange := [name for name in self.classes if CONTROL.search(name)]:
            raise ConfigError(
                f"head.classes: {strange[0]!r} has a character that cannot be printed; class names go into legends and "
                "tables"
            )
        if self.task == "segment" and len(self.classes) > MOST_CLASSES:
            raise ConfigError(
                f"head.classes has {len(self.classes)} names, and a class map holds {MOST_CLASSES}; join some of them "
                "by labels.values"
            )
        if self.multi_label and self.task != "classify":
            raise ConfigError("labels of several classes a pixel cannot be trained on; head.task classify takes them")
        if self.class_weights is not None:
            if len(self.class_weights) != len(self.classes):
                raise ConfigError(
                    f"head.class_weights has {len(self.class_weights)} numbers for {len(self.classes)} classes "
                    f"({', '.join(self.classes)})"
                )
            if min(self.class_weights) < 0 or max(self.class_weights) == 0:
                raise ConfigError(
                    f"head.class_weights {list(self.class_weights)} must be 0 or more, and not all of them 0"
                )

    @property
    def objective(self) -> str:
        """Name of the loss that is used: `loss`, or the task's own for "auto"."""
        return LOSSES[self.task][0] if self.loss == "auto" else self.loss

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeadSpec:
        """Inverse of `to_json`.

        Raises:
            ConfigError: fields that this version does not know, or that are missing.
        """
        try:
            spec = cls(**{key: tuple(value) if isinstance(value, list) else value for key, value in data.items()})
            check_codes(spec.codes or {}, spec.classes)
            return spec
        except (TypeError, AttributeError, ValueError) as error:
            raise ConfigError(f"the description of a head cannot be read: {error}") from error


@dataclass(frozen=True, slots=True, eq=False)
class HeadInputs:
    """What every head is given; a head uses what it needs.

    Attributes:
        maps: tokens on their grid, of as many blocks of the encoder as `HeadSpec.maps` says, the last block's last;
            zero where a token is not valid.
        token_valid: whether a token saw enough valid pixels to be encoded.
        pixels: the encoder's own input: scaled by its contract, zero where not valid.
        valid: validity of `pixels`.
    """

    maps: tuple[Float[Tensor, "batch embed *grid"], ...]
    token_valid: Bool[Tensor, " batch *grid"]
    pixels: Float[Tensor, "batch channel *space"]
    valid: Bool[Tensor, "batch channel *space"]


def default_head(task: str) -> str:
    """Return the name of the head that serves a task where none is named.

    Raises:
        ConfigError: there is no such task.
    """
    if task not in DEFAULTS:
        raise ConfigError(f"head.task '{task}' is none of {', '.join(DEFAULTS)}")
    return DEFAULTS[task]


def head_module(name: str, task: str) -> ModuleType:
    """Return the module of head `name`, which can answer `task`.

    Raises:
        ConfigError: there is no such head (the nearest name is given), or it is one of another task (those of this one
            are given).
    """
    module = load_plugin("heads", name, marker=MARKER)
    if task not in module.TASKS:
        fitting = [other for other in plugin_names("heads", marker=MARKER) if task in _tasks(other)]
        raise ConfigError(
            f"head '{name}' cannot {task}, it is made for {' and '.join(module.TASKS)}; the heads of head.task {task} "
            f"are {', '.join(fitting)}"
        )
    return module


def _tasks(name: str) -> tuple[str, ...]:
    return load_plugin("heads", name, marker=MARKER).TASKS
