"""Heads: what turns tokens into an answer. One file each, its loss inside.

A head is a module in this folder (or an entry point of group `geomed_mae.heads`) with one name:

    build(spec: HeadSpec) -> Head          a torch module with `forward(inputs) -> logits` and `loss(logits, target)`

A head is given widths and shapes, never the encoder: it works behind any encoder that fills `HeadInputs`.

    segment.py      a class a pixel or voxel, at the image's resolution
    classify.py     a class an image
    task_model.py   encoder + head + contract: what `finetune` leaves behind
    windows.py      a whole image from overlapping windows, in constant memory
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from types import ModuleType
from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor

from geomed_mae.plugins import load_plugin

MARKER = "build"


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadSpec:
    """What a head is built from; plain values, stored beside the weights.

    Attributes:
        name: name of the head's module.
        embed_dim: width of the encoder's tokens.
        classes: class names in the order of their numbers.
        channels: number of image channels.
        patch: pixels or voxels a token stands for, per spatial axis; its length is the number of spatial axes.
        width: width of the head's own layers.
    """

    name: str
    embed_dim: int
    classes: tuple[str, ...]
    channels: int
    patch: tuple[int, ...]
    width: int = 64

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> HeadSpec:
        """Inverse of `to_json`."""
        return cls(**{**data, "classes": tuple(data["classes"]), "patch": tuple(data["patch"])})


@dataclass(frozen=True, slots=True, eq=False)
class HeadInputs:
    """What every head is given; a head uses what it needs.

    Attributes:
        tokens: the encoder's last tokens on their grid, zero where a token is not valid.
        token_valid: whether a token saw enough valid pixels to be encoded.
        pixels: the encoder's own input: scaled by its contract, zero where not valid.
        valid: validity of `pixels`.
    """

    tokens: Float[Tensor, "batch embed *grid"]
    token_valid: Bool[Tensor, " batch *grid"]
    pixels: Float[Tensor, "batch channel *space"]
    valid: Bool[Tensor, "batch channel *space"]


def head_module(name: str) -> ModuleType:
    """Return the module of head `name`.

    Raises:
        ConfigError: there is no such head; the nearest name is given.
    """
    return load_plugin("heads", name, marker=MARKER)
