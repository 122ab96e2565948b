"""Model folders that somebody else has made: nothing in them is believed before it is looked at.

A manifest says that bytes are those that were written, not that whoever wrote them meant well. JSON is parsed into an
object or refused, and a network gets memory only when the stored weights have the shapes that its configuration asks
for: what a folder costs is bounded by its size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from geomed_mae.errors import ConfigError, IntegrityError

Made = TypeVar("Made", bound=nn.Module)


def json_object(data: bytes, folder: Path, name: str) -> dict[str, Any]:
    """Return the object that a JSON file holds.

    Raises:
        IntegrityError: it is no JSON, or no object.
    """
    try:
        found = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"'{folder}': {name} is not JSON: {str(error)[:200]}") from error
    if not isinstance(found, dict):
        raise IntegrityError(f"'{folder}': {name} holds no JSON object")
    return found


def filled(build: Callable[[], Made], tensors: Mapping[str, Tensor], folder: Path) -> Made:
    """Return the module that `build` makes, with `tensors` as its state.

    Raises:
        ConfigError: as `build`.
        IntegrityError: the tensors are not those of such a module, or the configuration is none.
    """
    try:
        with torch.device("meta"):  # shapes without memory
            build().load_state_dict({name: tensor.to("meta") for name, tensor in tensors.items()}, assign=True)
        module = build()
        module.load_state_dict(tensors)
    except ConfigError:
        raise
    except (RuntimeError, KeyError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        raise IntegrityError(
            f"'{folder}': model.safetensors does not fit config.json, or that is none: "
            f"{' '.join(f'{type(error).__name__} {error}'.split())[:300]}"
        ) from error
    return module
