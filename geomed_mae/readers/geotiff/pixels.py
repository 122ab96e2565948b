"""Pixels of a GeoTIFF: stored numbers to float32 physical values and one validity mask, in chunks of whole blocks.

What a value is: float32(float64(stored) * scale + offset), or float32(stored) where scale is 1 and offset 0. It is
computed in pieces that fit a core's own cache, which is twice as fast as in whole arrays, and as fast as a table of the
65,536 values that 16 bits can have.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image
from geomed_mae.readers.geotiff.held import held
from geomed_mae.readers.geotiff.open import rasterio
from geomed_mae.readers.geotiff.structure import Structure, nodata_value
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown
from geomed_mae.readers.source import SHORT_INTEGERS, Source, StoredWindow, whole_window

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

MAX_READ_VALUES = 1 << 31
"""Values in one read: 8 GiB of float32. A larger image is read in windows."""
CHUNK_BYTES = 16 << 20
"""Stored bytes converted at a time, so that memory is the result's and little more."""
PIECE_VALUES = 1 << 16
"""Values of a band converted at a time: what they need meanwhile stays in a core's own cache."""
MAX_COUNTED = 1 << 14
"""Blocks of one window above which it is read by itself: others share few of so many."""
MAX_WASTE = 2
"""Windows are read as one where this takes less than so many times the blocks that they need each by itself."""


def read(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """Read the raster, or a window (rows, columns) of it, as float32 physical values.

    Raises:
        ReadError: TRUNCATED, DECODE_FAILED, TOO_LARGE, MALFORMED (changed since its header was read), or any reason
            of the checks on opening.
    """
    return next(read_many(source, [window]))


def read_many(source: Source, windows: Sequence[tuple[slice, ...] | None]) -> Iterator[Image]:
    """Read several windows of one raster; blocks that several of them need are decoded once. Each equals `read`'s.

    All is decoded, and every error raised, before this returns. What is little waits as stored numbers and becomes an
    Image when the iterator comes to it, in memory that the Image before it has left.

    Raises:
        ReadError: as `read`; MAX_READ_VALUES is the limit of all windows together.
    """
    parts = [_Part(source, whole_window(window, source.shape)) for window in windows]
    _decode(source, parts)
    return (part.image() for part in parts)


def read_many_stored(source: Source, windows: Sequence[tuple[slice, ...] | None]) -> Iterator[StoredWindow] | None:
    """As `read_many`, but give the integers that the file holds, not converted; None where these are not short ones.

    Raises:
        ReadError: as `read_many`.
    """
    # A negative scale makes -0.0 of 0, which an offset of 0 would turn into 0.0.
    if source.dtype not in SHORT_INTEGERS or min(source.selector["scale"]) < 0:
        return None
    parts = [_Part(source, whole_window(window, source.shape), np.dtype(source.dtype)) for window in windows]
    _decode(source, parts)
    return (part.stored() for part in parts)


def _decode(source: Source, parts: Sequence[_Part]) -> None:
    """Decode what the parts need, each block once, and give it to them."""
    path = source.files[0]
    total = sum(math.prod(part.shape) for part in parts)
    if total > MAX_READ_VALUES:
        raise ReadError(
            f"{shown(path)}: {' + '.join(str(part.shape) for part in parts)} values (channels, rows, columns) do not "
            "fit one read; read windows of it",
            Reason.TOO_LARGE.name,
        )
    with held(path) as (dataset, structure):
        if dataset.shape != tuple(source.shape) or dataset.dtypes[0] != source.dtype:
            raise ReadError(f"{shown(path)} has changed since its header was read", Reason.MALFORMED.name)
        for together in _groups(parts, structure):
            columns = _span([part.columns for part in together])
            for rows in _row_chunks(_span([part.rows for part in together]), columns, structure):
                wanted = [part for part in together if part.rows.start < rows.stop and rows.start < part.rows.stop]
                if wanted:
                    chunk = _Chunk.read(dataset, structure, source.selector, rows, columns)
                    for part in wanted:
                        part.add(chunk)


def _span(parts: Sequence[slice]) -> slice:
    return slice(min(part.start for part in parts), max(part.stop for part in parts))


def _groups(parts: Sequence[_Part], structure: Structure) -> list[Sequence[_Part]]:
    """Return all windows as one group where their bounding window costs little more to decode, else one by one."""
    if len(parts) == 1:
        return [parts]
    needed: set[tuple[int, int]] = set()
    for part in parts:
        rows, columns = (_blocks(part.rows, structure.block[0]), _blocks(part.columns, structure.block[1]))
        if len(rows) * len(columns) > MAX_COUNTED:
            return [[part] for part in parts]
        needed |= {(row, column) for row in rows for column in columns}
    rows, columns = (_span([part.rows for part in parts]), _span([part.columns for part in parts]))
    bounding = len(_blocks(rows, structure.block[0])) * len(_blocks(columns, structure.block[1]))
    return [parts] if bounding <= MAX_WASTE * len(needed) else [[part] for part in parts]


def _blocks(part: slice, block: int) -> range:
    return range(part.start // block, -(-part.stop // block))


def _row_chunks(rows: slice, columns: slice, structure: Structure) -> Iterator[slice]:
    """Cut rows into parts of whole blocks with at most CHUNK_BYTES stored bytes, but at least one row of blocks."""
    bytes_per_row = (columns.stop - columns.start) * structure.bands * -(-structure.bits // 8)
    block = structure.block[0]
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row) // block) * block
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, (start // step + 1) * step)
        yield slice(start, stop)
        start = stop


@dataclass(frozen=True, slots=True, eq=False)
class _Chunk:
    """Decoded rows: `stored` (bands, rows, columns) as in the file, `masks` bool, each (1 or bands, rows, columns)."""

    rows: slice
    columns: slice
    stored: np.ndarray
    nodata: np.generic | None
    masks: tuple[np.ndarray, ...]

    @classmethod
    def read(
        cls, dataset: DatasetReader, structure: Structure, selector: dict[str, Any], rows: slice, columns: slice
    ) -> _Chunk:
        """Decode rows and columns of the bands that `selector` names, and what masks them."""
        window = rasterio().windows.Window(
            columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start
        )
        stored = dataset.read(selector["bands"], window=window)
        masks = [dataset.read([alpha], window=window) > 0 for alpha in selector["alpha"]]
        if selector["masked"]:
            masks.append(dataset.read_masks(1, window=window)[None] > 0)
        if selector["sparse"]:
            written = structure.written(rows, columns)
            masks.append(written if written.shape[0] == 1 else written[np.array(selector["bands"]) - 1])
        text = selector["nodata"]
        nodata = None if text is None else nodata_value(text, stored.dtype.name)
        return cls(rows, columns, stored, nodata, tuple(masks))


class _Part:
    """One window of the result, filled chunk by chunk."""

    def __init__(self, source: Source, window: tuple[slice, ...], stored_as: np.dtype | None = None) -> None:
        self.source, self.stored_as = source, stored_as
        self.rows, self.columns = window
        self.shape = (
            len(source.channels),
            self.rows.stop - self.rows.start,
            self.columns.stop - self.columns.start,
        )
        self.scaling = list(zip(source.selector["scale"], source.selector["offset"], strict=True))
        self.array: np.ndarray | None = None
        self.valid: np.ndarray | None = None
        self.waiting: _Chunk | None = None

    def add(self, chunk: _Chunk) -> None:
        """Take the chunk: later, where it is all of this window."""
        if chunk.rows.start <= self.rows.start and self.rows.stop <= chunk.rows.stop:
            self.waiting = chunk
        else:
            self._take(chunk)

    def _take(self, chunk: _Chunk) -> None:
        """Convert the chunk's part of this window."""
        if self.array is None:
            self.array = np.empty(self.shape, self.stored_as or np.float32)
        rows = slice(max(self.rows.start, chunk.rows.start), min(self.rows.stop, chunk.rows.stop))
        width = self.columns.stop - self.columns.start
        left = self.columns.start - chunk.columns.start
        # Whole rows at a time, as many as make a piece.
        step = max(1, PIECE_VALUES // width)
        shifted = self.stored_as is None and any(offset for _, offset in self.scaling)
        scratch = np.empty(min(step, rows.stop - rows.start) * width) if shifted else None
        for top in range(rows.start, rows.stop, step):
            bottom = min(rows.stop, top + step)
            inside = (slice(None), slice(top - chunk.rows.start, bottom - chunk.rows.start), slice(left, left + width))
            at = slice(top - self.rows.start, bottom - self.rows.start)
            stored, values = chunk.stored[inside], self.array[:, at]
            if self.stored_as is not None:
                values[...] = stored
            else:
                with np.errstate(over="ignore", invalid="ignore"):
                    for band, (scale, offset) in enumerate(self.scaling):
                        physical(stored[band], scale, offset, out=values[band], scratch=scratch)
            masks = [mask[inside] for mask in chunk.masks]
            if chunk.nodata is not None:
                masks.append(stored != chunk.nodata)
            if stored.dtype.kind == "f":
                masks.append(np.isfinite(values))
            self._mask(masks, at)

    def _mask(self, masks: Sequence[np.ndarray], at: slice) -> None:
        """Note which of the rows `at` are valid, and write 0 where they are not."""
        if all(mask.all() for mask in masks):
            if self.valid is not None:
                self.valid[:, at] = True
            return
        valid = np.logical_and.reduce(np.broadcast_arrays(*masks)) if len(masks) > 1 else masks[0]
        np.copyto(self.array[:, at], self.array.dtype.type(0), where=~valid)
        if self.valid is None or len(self.valid) < len(valid):
            before = True if self.valid is None else self.valid
            self.valid = np.ones((len(valid), *self.shape[1:]), np.bool_)
            self.valid &= before
        self.valid[:, at] = valid

    def image(self) -> Image:
        """Return the filled window."""
        array, valid = self._filled()
        geometry = self.source.geometry.shifted(self.rows.start, self.columns.start)
        return Image(array, valid, self.source.channels, geometry, self.source.modality)

    def stored(self) -> StoredWindow:
        """Return the filled window of numbers as stored."""
        scale, offset = np.array(self.scaling, np.float64).T
        return StoredWindow(*self._filled(), scale, offset)

    def _filled(self) -> tuple[np.ndarray, np.ndarray]:
        if self.waiting is not None:
            self._take(self.waiting)
            self.waiting = None
        array, valid = self.array, self.valid
        self.array = self.valid = None
        if valid is None:
            valid = np.ones((1, *self.shape[1:]), np.bool_)
        elif all(np.array_equal(band, valid[0]) for band in valid[1:]):
            valid = valid[:1].copy()
        return array, valid


def physical(
    stored: np.ndarray, scale: float, offset: float, *, out: np.ndarray, scratch: np.ndarray | None = None
) -> None:
    """Write the physical values of `stored` into `out` (float32, same shape). What exceeds float32 becomes infinite.

    `scratch` is float64 memory of at least that many values to work in.
    """
    if (scale, offset) == (1.0, 0.0):
        out[...] = stored
        return
    if not offset:
        # numpy works in float64 through small buffers and rounds once, on the way out.
        np.multiply(stored, scale, out=out, dtype=np.float64, casting="same_kind")
        return
    room = np.empty(stored.size) if scratch is None else scratch[: stored.size]
    exact = room.reshape(stored.shape)
    exact[...] = stored
    exact *= scale
    exact += offset
    out[...] = exact
