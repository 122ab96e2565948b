"""Reading a scene of several files as one Image: each band decoded on its own grid, then repeated on the scene's.

A pixel of a 20 or 60 m band is the same number in every 10 m pixel that it covers, and so is its validity: nothing is
interpolated. Only the coarse pixels under a window are decoded. Memory is that of the result and of one band.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown
from geomed_mae.readers.source import Source, whole_window

ReadMany = Callable[[Source, Sequence[tuple[slice, ...] | None]], Iterable[Image]]
"""`read_many` of a format, for a Source of one file."""

MAX_READ_VALUES = 1 << 31
"""Values in one read: 8 GiB of float32. A larger scene is read in windows."""


def is_scene(source: Source) -> bool:
    """Whether a Source is a scene of several files."""
    return "parts" in source.selector


def read_scene(source: Source, windows: Sequence[tuple[slice, ...] | None], read_many: ReadMany) -> list[Image]:
    """Read windows (rows, columns) of a scene; None is all of it.

    Args:
        source: made by grouping, with `parts` in its selector.
        windows: inside the scene's grid.
        read_many: reads windows of one of the files.

    Raises:
        ReadError: TOO_LARGE, or any reason of a band's file: a scene with a band that does not decode is refused.
    """
    whole = [whole_window(window, source.shape) for window in windows]
    shapes = [(len(source.channels), *(part.stop - part.start for part in window)) for window in whole]
    if sum(math.prod(shape) for shape in shapes) > MAX_READ_VALUES:
        raise ReadError(
            f"{shown(source.files[0])}: a scene of {shapes[0]} values (channels, rows, columns) does not fit one read; "
            "read windows of it",
            Reason.TOO_LARGE.name,
        )
    arrays = [np.empty(shape, np.float32) for shape in shapes]
    valids = [np.empty(shape, np.bool_) for shape in shapes]
    for band, part in enumerate(source.selector["parts"]):
        found = _read_part(source, part, source.channels[band : band + 1], whole, read_many)
        for array, valid, image, window in zip(arrays, valids, found, whole, strict=True):
            _repeat(image.array[0], array[band], part["ratio"], window)
            _repeat(image.valid[0], valid[band], part["ratio"], window)
    mask = source.selector["mask"]
    if mask is not None:
        _apply_flags(source, mask, whole, arrays, valids, read_many)
    return [
        Image(
            array, _shared(valid), source.channels, source.geometry.shifted(*(s.start for s in window)), source.modality
        )
        for array, valid, window in zip(arrays, valids, whole, strict=True)
    ]


def _read_part(
    source: Source,
    part: dict[str, Any],
    channels: tuple,
    windows: Sequence[tuple[slice, ...]],
    read_many: ReadMany,
) -> Iterable[Image]:
    """Read the pixels of one file under the windows of the scene."""
    alone = Source(
        reader=source.reader,
        files=(source.files[part["file"]],),
        selector=part["selector"],
        modality=source.modality,
        channels=channels,
        shape=tuple(part["shape"]),
        dtype=part["dtype"],
        geometry=source.geometry,
        codec=source.codec,
    )
    under = [
        tuple(slice(s.start // n, -(-s.stop // n)) for s, n in zip(window, part["ratio"], strict=True))
        for window in windows
    ]
    return read_many(alone, under)


def _repeat(coarse: np.ndarray, out: np.ndarray, ratio: Sequence[int], window: tuple[slice, ...]) -> None:
    """Fill `out` (rows, columns) of the window with each coarse pixel repeated `ratio` times."""
    if tuple(ratio) == (1, 1):
        out[...] = coarse
        return
    rows, columns = (np.arange(s.start, s.stop) // n - s.start // n for s, n in zip(window, ratio, strict=True))
    np.take(np.take(coarse, columns, axis=1), rows, axis=0, out=out)


def _apply_flags(
    source: Source,
    mask: dict[str, Any],
    windows: Sequence[tuple[slice, ...]],
    arrays: Sequence[np.ndarray],
    valids: Sequence[np.ndarray],
    read_many: ReadMany,
) -> None:
    """Make pixels invalid, in all bands, that have one of the flag file's bits."""
    bits = sum(1 << bit for bit in mask["bits"])
    found = _read_part(source, mask, source.channels[:1], windows, read_many)
    for array, valid, image, window in zip(arrays, valids, found, windows, strict=True):
        good = image.valid[0] & ((image.array[0].astype(np.int64) & bits) == 0)
        fine = np.empty(array.shape[1:], np.bool_)
        _repeat(good, fine, mask["ratio"], window)
        valid &= fine
        np.copyto(array, 0.0, where=~valid)


def _shared(valid: np.ndarray) -> np.ndarray:
    """Return one validity for all channels where they agree."""
    return valid[:1].copy() if all(np.array_equal(band, valid[0]) for band in valid[1:]) else valid
