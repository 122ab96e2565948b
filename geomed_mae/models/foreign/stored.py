"""The files of a foreign folder: JSON with a size limit, and safetensors in one piece or in shards.

The header of a safetensors file lists names, types and shapes, and its offsets must cover the file exactly
(https://huggingface.co/docs/safetensors), so what a tensor takes in memory is bounded by the size of its file. Sharded
folders have an index `model.safetensors.index.json` whose `weight_map` names the file of each tensor.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from safetensors import SafetensorError, safe_open
from torch import Tensor

from geomed_mae.errors import ConfigError, IntegrityError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 32 << 20
"""The index of a model with hundreds of thousands of tensors is smaller."""

FLOATS = ("F64", "F32", "F16", "BF16")


def read_json(folder: Path, name: str) -> dict[str, Any]:
    """Return the object in a JSON file of the folder.

    Raises:
        IntegrityError: no such file, or none that holds one JSON object of a sane size.
    """
    try:
        with (folder / name).open("rb") as stream:
            text = stream.read(MAX_JSON_BYTES + 1)
        data = json.loads(text) if len(text) <= MAX_JSON_BYTES else None
    except OSError as error:
        raise IntegrityError(f"'{folder}': {name} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise IntegrityError(f"'{folder}': {name} is not JSON: {str(error)[:200]}") from error
    if not isinstance(data, dict):
        raise IntegrityError(f"'{folder}': {name} holds no JSON object, or one of more than {MAX_JSON_BYTES} bytes")
    return data


def whole(config: dict[str, Any], key: str, default: int | None, limit: int) -> int:
    """Return a whole number from 1 to `limit` of a foreign config.

    Raises:
        ConfigError: it is missing without a default, or something else.
    """
    value = config.get(key, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= limit:
        raise ConfigError(f"{CONFIG}: {key} is {repr(value)[:80]}, not a whole number from 1 to {limit}")
    return value


def pair(config: dict[str, Any], key: str, default: int | None, limit: int) -> tuple[int, int]:
    """Return (rows, columns) from a whole number, or a list of two, of a foreign config.

    Raises:
        ConfigError: as `whole`.
    """
    value = config.get(key, default)
    parts = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    rows, columns = (whole({key: part}, key, None, limit) for part in parts)
    return rows, columns


def grid_of(folder: Path, size: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
    """Return the number of whole patches along each axis.

    Raises:
        ConfigError: an image that is smaller than a patch.
    """
    grid = tuple(length // step for length, step in zip(size, patch, strict=True))
    if not min(grid):
        raise ConfigError(f"'{folder}': images of {list(size)} pixels hold no patch of {list(patch)}")
    return grid


class StoredTensors:
    """Tensors of a folder by name; knows which have been taken.

    Attributes:
        shapes: of all tensors.
    """

    def __init__(self, folder: Path) -> None:
        """Read the headers, and nothing else.

        Raises:
            IntegrityError: no weights, an index that points elsewhere, or a header that does not fit its file.
        """
        self.folder = folder
        self._files = _files(folder)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._types: dict[str, str] = {}
        self._taken: set[str] = set()
        names_of: dict[str, list[str]] = {}
        for name, file in self._files.items():
            names_of.setdefault(file, []).append(name)
        for file, names in names_of.items():
            with self._open(file) as content:
                if missing := sorted(set(names) - set(content.keys())):
                    raise IntegrityError(
                        f"'{folder}': {file} holds no tensor '{missing[0]}', which {INDEX} says it has"
                    )
                for name in names:
                    part = content.get_slice(name)
                    self.shapes[name], self._types[name] = tuple(part.get_shape()), part.get_dtype()

    def _open(self, file: str) -> Any:
        try:
            return safe_open(self.folder / file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"'{self.folder}': {file} is no whole safetensors file: {str(error)[:200]}") from error

    def __contains__(self, name: str) -> bool:
        return name in self.shapes

    def take(self, spellings: Sequence[str], shape: Sequence[int]) -> Shaped[Tensor, "*shape"]:
        """Return a tensor as float32, under the first of its spellings that is stored.

        Raises:
            IntegrityError: under none of them, with another shape, or with values that are no finite numbers.
        """
        name = next((name for name in spellings if name in self.shapes and name not in self._taken), None)
        if name is None:
            raise IntegrityError(f"'{self.folder}' has no tensor '{spellings[0]}', which its {CONFIG} asks for")
        if self.shapes[name] != tuple(shape):
            raise IntegrityError(
                f"'{self.folder}': tensor '{name}' has shape {list(self.shapes[name])}, {CONFIG} asks for {list(shape)}"
            )
        if self._types[name] not in FLOATS:
            raise IntegrityError(
                f"'{self.folder}': tensor '{name}' is stored as {self._types[name]}, not as one of {', '.join(FLOATS)}"
            )
        with self._open(self._files[name]) as content:
            tensor = content.get_tensor(name).to(torch.float32)
        if not torch.isfinite(tensor).all():
            raise IntegrityError(f"'{self.folder}': tensor '{name}' holds values that are no finite numbers")
        self._taken.add(name)
        return tensor

    def is_half(self, name: str) -> bool:
        """Return whether a tensor is stored in 16 bits."""
        return self._types.get(name) in ("F16", "BF16")

    def leave(self, prefixes: Sequence[str]) -> list[str]:
        """Count tensors as taken that nobody needs; return their names."""
        left = [name for name in self.shapes if name not in self._taken and name.startswith(tuple(prefixes))]
        self._taken.update(left)
        return left

    def finish(self) -> None:
        """Make sure that every tensor has been taken.

        Raises:
            IntegrityError: one has not: the weights are those of another model.
        """
        if left := sorted(set(self.shapes) - self._taken):
            raise IntegrityError(
                f"'{self.folder}': tensor '{left[0]}' (and {len(left) - 1} more) belongs to no part of the model that "
                f"{CONFIG} describes"
            )


def _files(folder: Path) -> dict[str, str]:
    """Return the file of each tensor."""
    if not (folder / INDEX).is_file() or (folder / WEIGHTS).is_file():
        try:
            with safe_open(folder / WEIGHTS, framework="pt") as content:
                return dict.fromkeys(content.keys(), WEIGHTS)
        except (SafetensorError, OSError) as error:
            raise IntegrityError(f"'{folder}': {WEIGHTS} is no whole safetensors file: {str(error)[:200]}") from error
    files = read_json(folder, INDEX).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise IntegrityError(f"'{folder}': {INDEX} has no weight_map")
    for file in files.values():
        if not isinstance(file, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*\.safetensors", file):
            raise IntegrityError(f"'{folder}': {INDEX} names {str(file)[:80]!r}, which is no plain safetensors file")
    return files
