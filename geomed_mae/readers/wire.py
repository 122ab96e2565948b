"""Values as text and raw buffers: what passes between a process and its decoding child, and what a journal keeps.

No pickle, in either direction: a child that a hostile file has taken over must not be able to run code in its parent,
nor may a journal file. Plain JSON carries None, bool, int, str and float (NaN and infinities included, shortest exact
digits); a tuple, by far the most frequent container here, is a JSON array; everything else is an object with one
letter for its kind:

    {"l": [...]} list        {"d": [[key, value], ...]} dict       {"s": [...]} frozenset      {"p": "..."} Path
    {"b": "hex"} bytes       {"e": [class, name]} Enum             {"c": [class, fields...]} dataclass
    {"n": [dtype, number]} numpy scalar       {"a": [dtype, shape, values or number of the buffer]} numpy array

Classes are looked up by name among the dataclasses and enums of this package, and of packages whose modules are
readers by an entry point; nothing is imported for a name.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from geomed_mae.plugins import PACKAGE

INLINE_VALUES = 64
"""Larger arrays travel as raw buffers, where the caller takes any."""
ARRAY_KINDS = "biuf"
"""Bool, integers and floats: no objects, no strings."""


def pack(value: Any, buffers: list[memoryview] | None = None) -> str:
    """Return `value` as ASCII text; arrays beyond INLINE_VALUES are appended to `buffers`, where it is given.

    Raises:
        TypeError: the value, or something in it, has no plain form.
    """
    return json.dumps(_plain(value, buffers), separators=(",", ":"))


def unpack(text: str, buffers: Sequence[np.ndarray] = ()) -> Any:
    """Inverse of `pack`; `buffers` are uint8 arrays, which become parts of the result without a copy.

    Raises:
        ValueError: the text is not what `pack` writes, names an unknown class, or disagrees with its buffers.
    """
    try:
        return _value(json.loads(text), buffers)
    except (KeyError, IndexError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not a packed value: {type(error).__name__}") from None


def _plain(value: Any, buffers: list[memoryview] | None) -> Any:
    kind = type(value)
    if value is None or kind in (bool, int, str, float):
        return value
    if kind is tuple:
        return [_plain(part, buffers) for part in value]
    if kind is list:
        return {"l": [_plain(part, buffers) for part in value]}
    if kind is dict:
        return {"d": [[_plain(key, buffers), _plain(part, buffers)] for key, part in value.items()]}
    if is_dataclass(kind):
        return {"c": [_name(kind), *(_plain(getattr(value, name), buffers) for name in _fields(kind))]}
    if isinstance(value, PurePath):
        return {"p": os.fspath(value)}
    if isinstance(value, Enum):
        return {"e": [_name(kind), value.name]}
    if isinstance(value, np.ndarray):
        return {"a": _array(value, buffers)}
    if isinstance(value, np.generic) and value.dtype.kind in ARRAY_KINDS:
        return {"n": [value.dtype.str, value.item()]}
    if isinstance(value, set | frozenset):
        return {"s": sorted((_plain(part, buffers) for part in value), key=repr)}
    if isinstance(value, bytes | bytearray):
        return {"b": bytes(value).hex()}
    if isinstance(value, str | int | float | tuple):
        # A subclass (pydicom's DSfloat, a named tuple): what it is worth, not what made it.
        base = next(base for base in (str, int, float, tuple) if isinstance(value, base))
        return _plain(base(value), buffers)
    raise TypeError(f"a {kind.__module__}.{kind.__qualname__} has no plain form")


def _array(array: np.ndarray, buffers: list[memoryview] | None) -> list[Any]:
    if array.dtype.kind not in ARRAY_KINDS:
        raise TypeError(f"an array of {array.dtype} has no plain form")
    if buffers is None or array.size <= INLINE_VALUES:
        return [array.dtype.str, list(array.shape), array.ravel().tolist()]
    buffers.append(memoryview(np.ascontiguousarray(array)).cast("B"))
    return [array.dtype.str, list(array.shape), len(buffers) - 1]


def _value(plain: Any, buffers: Sequence[np.ndarray]) -> Any:
    if isinstance(plain, list):
        return tuple([_value(part, buffers) for part in plain])
    if not isinstance(plain, dict):
        return plain
    ((kind, body),) = plain.items()
    return _KINDS[kind](body, buffers)


def _instance(body: list[Any], buffers: Sequence[np.ndarray]) -> Any:
    cls = _class(body[0])
    names = _fields(cls)
    if len(names) != len(body) - 1:
        raise ValueError(f"{body[0]} has {len(names)} fields, not {len(body) - 1}")
    # Fields are set as they were: what a constructor derives or checks was derived and checked before.
    made = object.__new__(cls)
    for name, part in zip(names, body[1:], strict=True):
        object.__setattr__(made, name, _value(part, buffers))
    return made


def _to_array(body: list[Any], buffers: Sequence[np.ndarray]) -> np.ndarray:
    dtype, shape, values = np.dtype(body[0]), tuple(int(size) for size in body[1]), body[2]
    if dtype.kind not in ARRAY_KINDS or min(shape, default=0) < 0:
        raise ValueError(f"no plain array is of {dtype} and shape {shape}")
    if isinstance(values, list):
        array = np.array(values, dtype=dtype).reshape(shape)
    else:
        raw = buffers[int(values)]
        if raw.nbytes != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"a buffer of {raw.nbytes} bytes is no array of {dtype} and shape {shape}")
        array = raw.view(dtype).reshape(shape)
    array.flags.writeable = False
    return array


_KINDS: dict[str, Callable[[Any, Sequence[np.ndarray]], Any]] = {
    "l": lambda body, buffers: [_value(part, buffers) for part in body],
    "d": lambda body, buffers: {_value(key, buffers): _value(part, buffers) for key, part in body},
    "s": lambda body, buffers: frozenset(_value(part, buffers) for part in body),
    "p": lambda body, buffers: Path(body),
    "b": lambda body, buffers: bytes.fromhex(body),
    "e": lambda body, buffers: _class(body[0], Enum)[body[1]],
    "c": _instance,
    "a": _to_array,
    "n": lambda body, buffers: np.dtype(body[0]).type(body[1]),
}


@cache
def _name(cls: type) -> str:
    return f"{cls.__module__}:{cls.__qualname__}"


@cache
def _fields(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls))


_trusted = {PACKAGE}


def trust(module: str) -> None:
    """Let classes of this module's package be unpacked; for readers that come by an entry point."""
    _trusted.add(module.partition(".")[0])


@cache
def _class(name: str, base: type | None = None) -> Any:
    module, _, qualified = name.partition(":")
    if module.partition(".")[0] not in _trusted:
        raise ValueError(f"'{name}' is no class of a reader")
    found: Any = sys.modules[module]
    for part in qualified.split("."):
        found = getattr(found, part)
    if not isinstance(found, type) or not (is_dataclass(found) if base is None else issubclass(found, base)):
        raise ValueError(f"'{name}' is no {'dataclass' if base is None else base.__name__}")
    return found
