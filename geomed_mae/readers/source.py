"""What readers find before any pixel is read: a Source (a future Image) or a Refusal (a file and the reason)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.image import Channel, Geometry, PlaneGeometry, RasterGeometry, VolumeGeometry
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import stored_path

SHORT_INTEGERS = ("uint8", "int8", "uint16", "int16")
"""Stored types that a `StoredWindow` may have."""

_GEOMETRIES = {"raster": RasterGeometry, "volume": VolumeGeometry, "plane": PlaneGeometry}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A file that is not part of any Source. `detail` may name values, never identifiers of a person."""

    path: Path
    reason: Reason
    detail: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class StoredWindow:
    """A window as the integers that its files hold: physical = float32(float64(values) * scale + offset).

    Attributes:
        values: (C, *s) of a type in SHORT_INTEGERS, 0 where not valid.
        valid: bool (1 or C, *s); one channel stands for all.
        scale, offset: float64 (C,).
    """

    values: np.ndarray
    valid: np.ndarray
    scale: np.ndarray
    offset: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Source:
    """One future Image, from headers alone.

    Attributes:
        reader: name of the reader module that made it and will read it.
        files: the files in reading order.
        selector: what `read` needs beside the files (frame numbers, band numbers, a time point); plain JSON values.
        modality: name of the modality (or path of the user's modality file).
        channels: as the Image will have them, in order.
        shape: spatial shape ([slices,] rows, columns).
        dtype: numpy name of the stored type, for example "uint16".
        geometry: as the Image will have it; keys may be empty until `read`.
        identity: private (kind, value) pairs that tie images of one subject together, and labels to images: ("patient",
            ...), ("study", ...), ("frame", ...), ("series", ...), ("instance", ...). They reach keyed hashes only.
        flags: notes for the index, for example "ORDER_ASSUMED" when bands were named by their number alone.
        block: (rows, columns) of a raster's stored blocks, the unit in which it decodes; None where there is none.
        codec: name of the image codec that its pixels need (JPEG, JPEG 2000, LERC ...), "" for plain and losslessly
            packed samples. Codecs are native code fed with unchecked bytes: such sources are decoded in a child process
            at scan time and under a trainer (see `child`).
    """

    reader: str
    files: tuple[Path, ...]
    selector: dict[str, Any] = field(default_factory=dict)
    modality: str
    channels: tuple[Channel, ...]
    shape: tuple[int, ...]
    dtype: str
    geometry: Geometry
    identity: tuple[tuple[str, str], ...] = ()
    flags: tuple[str, ...] = ()
    block: tuple[int, int] | None = None
    codec: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values. They hold paths and identifiers: for private files only."""
        kind = next(name for name, kind in _GEOMETRIES.items() if isinstance(self.geometry, kind))
        geometry = {
            key: value.tolist() if isinstance(value, np.ndarray) else value
            for key, value in asdict(self.geometry).items()
        }
        return {
            "reader": self.reader,
            "files": [str(path) for path in self.files],
            "selector": self.selector,
            "modality": self.modality,
            "channels": [asdict(channel) for channel in self.channels],
            "shape": list(self.shape),
            "dtype": self.dtype,
            "geometry": {"kind": kind, **geometry},
            "identity": [list(pair) for pair in self.identity],
            "flags": list(self.flags),
            "block": None if self.block is None else list(self.block),
            "codec": self.codec,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Source:
        """Inverse of `to_json`.

        Raises:
            SecurityError: a file is no plain absolute path, see `stored_path`.
        """
        geometry = dict(data["geometry"])
        kind = _GEOMETRIES[geometry.pop("kind")]
        if kind is VolumeGeometry:
            geometry["affine"] = np.array(geometry["affine"])
        geometry = {key: tuple(value) if isinstance(value, list) else value for key, value in geometry.items()}
        return cls(
            **{
                **data,
                "files": tuple(stored_path(path) for path in data["files"]),
                "channels": tuple(Channel(**channel) for channel in data["channels"]),
                "shape": tuple(data["shape"]),
                "geometry": kind(**geometry),
                "identity": tuple((pair[0], pair[1]) for pair in data["identity"]),
                "flags": tuple(data["flags"]),
                "block": None if data["block"] is None else tuple(data["block"]),
            }
        )


@dataclass(frozen=True, slots=True)
class Survey:
    """Outcome of looking at headers. Every file looked at is in a Source or in exactly one Refusal."""

    sources: Sequence[Source]
    refusals: Sequence[Refusal]


def whole_window(window: tuple[slice, ...] | None, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return `window` with start and stop filled in, one slice a spatial axis; None is the whole image.

    Raises:
        ValueError: the window is empty or not inside `shape`.
    """
    window = window or (slice(None),) * len(shape)
    parts = tuple(slice(*part.indices(size)[:2]) for part, size in zip(window, shape, strict=True))
    for part, wanted, size in zip(parts, window, shape, strict=True):
        if part.start >= part.stop or (wanted.start or 0) < 0 or not 0 <= (wanted.stop or 0) <= size:
            raise ValueError(f"window {wanted.start}:{wanted.stop} is empty or not inside 0:{size}")
    return parts


def decoded_values(source: Source, windows: Sequence[tuple[slice, ...]]) -> int:
    """Return about how many values decode for windows with start and stop: whole blocks, of every channel."""
    total = 0
    for window in windows:
        *outer, rows, columns = window
        sizes = [part.stop - part.start for part in outer]
        block = source.block or (1, 1)
        sizes += [
            (-(-part.stop // size) - part.start // size) * size
            for part, size in zip((rows, columns), block, strict=True)
        ]
        total += len(source.channels) * math.prod(sizes)
    return total
