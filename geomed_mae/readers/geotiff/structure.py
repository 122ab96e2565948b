"""What a TIFF says about itself, parsed here before any native code sees the file, and the limits it must keep.

GDAL and libtiff trust sizes that a 150-byte file can declare: a million rows and columns, 65,529 bands (435 s of
work for one read), one block of a gigabyte. This module reads the first image directory (TIFF 6.0, section 2, and
the BigTIFF layout of libtiff) with the standard library and refuses such files by their numbers alone.
It also knows three things that GDAL does not report: blocks that lie beyond the end of the file, blocks that were
never written (which GDAL returns as zeros without a word), and whether the tags hold a grid at all (a file with ground
control points alone has a transform to GDAL, of numbers that nobody has set).
"""

from __future__ import annotations

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import quoted, shown

MAX_PIXELS = 1 << 34
"""Rows x columns: a mosaic of 131,072 squared passes, the declared million squared does not."""
MAX_BANDS = 512
"""Imaging spectrometers have up to about 430 bands."""
MAX_BLOCK_BYTES = 256 << 20
"""One block is decoded as a whole, whatever part of it is wanted."""
MAX_RATIO = 10_000
"""Decoded size over file size; deflate reaches 1,032 at most, so beyond this a file is nearly all holes."""
RATIO_FREE_BYTES = 64 << 20
"""An image this small is harmless at any ratio."""
MAX_TAGS = 4096
"""Entries of an image directory; real ones have some thirty."""
MAX_TAG_BYTES = 256 << 20
"""Size of one tag's value: 16 million 16-byte block positions."""

MAGICS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
"""First four bytes of classic TIFF and BigTIFF, little and big endian."""

_TYPES = {1: "u1", 2: "S1", 3: "u2", 4: "u4", 6: "i1", 7: "u1", 8: "i2", 9: "i4", 11: "f4", 12: "f8", 13: "u4"}
_TYPES |= {16: "u8", 17: "i8", 18: "u8"}

_KIND, _WIDTH, _HEIGHT, _BITS, _COMPRESSION, _PHOTOMETRIC, _OFFSETS, _SAMPLES = 254, 256, 257, 258, 259, 262, 273, 277
_STRIP_ROWS, _COUNTS, _PLANAR, _TILE_WIDTH, _TILE_HEIGHT = 278, 279, 284, 322, 323
_TILE_OFFSETS, _TILE_COUNTS, _SAMPLE_FORMAT, _NODATA = 324, 325, 339, 42113
_PIXEL_SCALE, _TIE_POINTS, _MATRIX = 33550, 33922, 34264
_WANTED = frozenset(
    {_KIND, _WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _OFFSETS, _SAMPLES, _STRIP_ROWS, _COUNTS, _PLANAR, _TILE_WIDTH}
    | {_TILE_HEIGHT, _TILE_OFFSETS, _TILE_COUNTS, _SAMPLE_FORMAT, _NODATA, _COMPRESSION}
    | {_PIXEL_SCALE, _TIE_POINTS, _MATRIX}
)

PHOTOMETRIC_NAMES = {0: "white is zero", 3: "palette", 4: "mask", 5: "CMYK", 6: "YCbCr", 8: "CIELab", 9: "ICCLab"}
CODECS = {
    6: "JPEG",
    7: "JPEG",
    33003: "JPEG 2000",
    33005: "JPEG 2000",
    34712: "JPEG 2000",
    34887: "LERC",
    34892: "JPEG",
    50001: "WEBP",
    50002: "JPEG XL",
    52546: "JPEG XL",
}
"""Compression values of TIFF and GDAL that name an image codec; the others pack bytes without loss."""
OVERVIEW_OR_MASK = 1 | 4
"""Bits of NewSubfileType: what a side-car (.ovr, .msk) starts with."""
UNSIGNED, SIGNED, FLOAT = 1, 2, 3
"""SampleFormat values with a meaning here; 5 and 6 are complex numbers."""


@dataclass(frozen=True, slots=True, eq=False)
class Structure:
    """The first image directory. `missing` is bool (planes, block rows, block columns): blocks never written.

    `planes` of blocks is 1 for pixel-interleaved files and the number of bands otherwise. `nodata` is GDAL's tag as
    text, or None. `photometric` is None where the tag is absent. `georeferenced`: the file itself holds a grid (for
    JPEG 2000 known only after GDAL has looked).
    `codec` is the name of the image codec that blocks need, or "".
    """

    width: int
    height: int
    bands: int
    bits: int
    sample_format: int
    photometric: int | None
    block: tuple[int, int]
    nodata: str | None
    missing: np.ndarray
    end: int
    file_size: int
    georeferenced: bool = True
    codec: str = ""

    @property
    def block_bytes(self) -> int:
        """Decoded bytes of one block."""
        interleaved = self.bands if self.missing.shape[0] == 1 else 1
        return self.block[0] * self.block[1] * interleaved * -(-self.bits // 8)

    @property
    def sparse(self) -> bool:
        """Whether any block was never written."""
        return bool(self.missing.any())

    def written(self, rows: slice, columns: slice) -> np.ndarray:
        """Return bool (planes, rows, columns): True where the file holds a block for the pixel."""
        in_row = np.arange(rows.start, rows.stop) // self.block[0]
        in_column = np.arange(columns.start, columns.stop) // self.block[1]
        return ~self.missing[:, in_row[:, None], in_column[None, :]]


def read_structure(path: Path, *, labels: bool = False) -> Structure:
    """Parse and check the first image directory of `path`.

    With `labels`, one-bit, white-is-zero and palette rasters pass: class numbers need no physical meaning.

    Raises:
        ReadError: NOT_TIFF, MALFORMED, TOO_LARGE, TOO_MANY_BANDS, BLOCK_TOO_LARGE, RATIO, DTYPE_UNSUPPORTED,
            TRUNCATED, PERMISSION or VANISHED.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            tags = _Directory(file, size, shown(path)).tags()
    except PermissionError:
        raise ReadError(f"{shown(path)} may not be read by this user", Reason.PERMISSION.name) from None
    except OSError as error:
        raise ReadError(f"{shown(path)} cannot be read: {error.strerror}", Reason.VANISHED.name) from None
    structure = _structure(tags, size, shown(path))
    _check(structure, shown(path), labels=labels)
    return structure


class _Directory:
    """Reads the tags of the first image directory; every position and size is checked against the file's size."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name = file, size, name
        magic = file.read(4)
        if magic not in MAGICS:
            raise ReadError(f"{name} is not a TIFF: its first bytes are {quoted(magic)}", Reason.NOT_TIFF.name)
        self.order = "<" if magic[:1] == b"I" else ">"
        self.big = magic in MAGICS[2:]

    def _take(self, position: int, length: int) -> bytes:
        if position < 0 or position + length > self.size:
            raise ReadError(
                f"{self.name} ends at byte {self.size}; its directory points to {position + length}",
                Reason.TRUNCATED.name,
            )
        self.file.seek(position)
        return self.file.read(length)

    def _number(self, position: int, code: str) -> int:
        return struct.unpack(self.order + code, self._take(position, struct.calcsize(code)))[0]

    def tags(self) -> dict[int, np.ndarray | str]:
        """Return the wanted tags: numbers as integer or float arrays, text as str."""
        start = self._number(8, "Q") if self.big else self._number(4, "I")
        count = self._number(start, "Q" if self.big else "H")
        if not 0 < count <= MAX_TAGS:
            raise ReadError(f"{self.name} has an image directory of {count} tags", Reason.MALFORMED.name)
        entry = 20 if self.big else 12
        table = self._take(start + (8 if self.big else 2), count * entry)
        found = {}
        for index in range(count):
            code, kind, length = struct.unpack_from(self.order + ("HHQ" if self.big else "HHI"), table, index * entry)
            if code in _WANTED and code not in found and kind in _TYPES:
                inline = table[index * entry + (12 if self.big else 8) : (index + 1) * entry]
                found[code] = self._value(kind, length, inline)
        return found

    def _value(self, kind: int, length: int, inline: bytes) -> np.ndarray | str:
        dtype = np.dtype(_TYPES[kind]).newbyteorder(self.order)
        nbytes = length * dtype.itemsize
        if nbytes > MAX_TAG_BYTES:
            raise ReadError(f"{self.name} declares a tag of {nbytes} bytes", Reason.MALFORMED.name)
        if nbytes > len(inline):
            inline = self._take(struct.unpack(self.order + ("Q" if self.big else "I"), inline)[0], nbytes)
        if kind == 2:
            return inline[:length].split(b"\0", 1)[0].decode("latin-1")
        return np.frombuffer(inline, dtype, count=length)


def _structure(tags: dict[int, np.ndarray | str], size: int, name: str) -> Structure:
    def number(tag: int, default: int | None) -> int | None:
        value = tags.get(tag)
        return int(value[0]) if isinstance(value, np.ndarray) and value.size else default

    width, height = number(_WIDTH, 0), number(_HEIGHT, 0)
    bands = number(_SAMPLES, 1)
    if number(_KIND, 0) & OVERVIEW_OR_MASK:
        raise ReadError(f"{name} holds an overview or a mask of another image", Reason.NON_IMAGE.name)
    if not width or not height or not bands or min(width, height, bands) < 0:
        raise ReadError(f"{name} declares {height} rows, {width} columns and {bands} bands", Reason.MALFORMED.name)
    # Before anything whose size follows from these numbers.
    if bands > MAX_BANDS:
        raise ReadError(f"{name} declares {bands} bands; the limit is {MAX_BANDS}", Reason.TOO_MANY_BANDS.name)
    if width * height > MAX_PIXELS:
        raise ReadError(f"{name} declares {height} x {width} pixels; the limit is {MAX_PIXELS}", Reason.TOO_LARGE.name)
    tiled = _TILE_WIDTH in tags
    if tiled:
        block = (number(_TILE_HEIGHT, 0), number(_TILE_WIDTH, 0))
    else:
        block = (min(number(_STRIP_ROWS, height), height), width)
    if min(block) <= 0:
        raise ReadError(f"{name} declares blocks of {block[0]} x {block[1]} pixels", Reason.MALFORMED.name)
    planes = bands if number(_PLANAR, 1) == 2 else 1
    grid = (planes, math.ceil(height / block[0]), math.ceil(width / block[1]))
    missing, end = _blocks(tags, tiled, grid, name)
    nodata = tags.get(_NODATA)
    return Structure(
        width=width,
        height=height,
        bands=bands,
        bits=_same_for_all(tags, _BITS, 1, name),
        sample_format=_same_for_all(tags, _SAMPLE_FORMAT, UNSIGNED, name),
        photometric=number(_PHOTOMETRIC, None),
        block=block,
        nodata=nodata.strip() if isinstance(nodata, str) and nodata.strip() else None,
        missing=missing,
        end=end,
        file_size=size,
        georeferenced=_has_grid(tags),
        codec=CODECS.get(number(_COMPRESSION, 1), ""),
    )


def _has_grid(tags: dict[int, np.ndarray | str]) -> bool:
    """Whether the tags hold an affine grid: pixel size and a tie point, or a matrix (OGC GeoTIFF 1.1, section 7.4)."""

    def numbers(tag: int) -> np.ndarray:
        value = tags.get(tag)
        return value if isinstance(value, np.ndarray) else np.empty(0)

    scale = numbers(_PIXEL_SCALE)
    if scale.size >= 2 and scale[:2].all():
        return numbers(_TIE_POINTS).size >= 6
    return numbers(_MATRIX).size == 16


def _same_for_all(tags: dict[int, np.ndarray | str], tag: int, default: int, name: str) -> int:
    values = tags.get(tag)
    if not isinstance(values, np.ndarray) or not values.size:
        return default
    if (values != values[0]).any():
        raise ReadError(f"{name} has bands of different pixel types", Reason.DTYPE_UNSUPPORTED.name)
    return int(values[0])


def _blocks(
    tags: dict[int, np.ndarray | str], tiled: bool, grid: tuple[int, int, int], name: str
) -> tuple[np.ndarray, int]:
    """Return which blocks were never written, (planes, rows, columns), and the last byte that any block needs."""
    total = math.prod(grid)
    offsets = tags.get(_TILE_OFFSETS if tiled else _OFFSETS)
    if offsets is None and tiled:
        offsets = tags.get(_OFFSETS)
    counts = tags.get(_TILE_COUNTS if tiled else _COUNTS)
    if counts is None and tiled:
        counts = tags.get(_COUNTS)
    if not isinstance(offsets, np.ndarray) or offsets.size < total:
        have = offsets.size if isinstance(offsets, np.ndarray) else 0
        raise ReadError(f"{name} lists {have} blocks; its size needs {total}", Reason.MALFORMED.name)
    offsets = offsets[:total].astype(np.uint64)
    written = offsets > 0
    if isinstance(counts, np.ndarray) and counts.size >= total:
        counts = counts[:total].astype(np.uint64)
        written &= counts > 0
    else:
        counts = np.ones(total, np.uint64)
    # Python integers: the sum of two hostile 64-bit numbers may wrap.
    end = int(offsets[written].max()) if written.any() else 0
    if end < 1 << 62:
        end = int((offsets + np.minimum(counts, np.uint64(1 << 62)))[written].max(initial=0))
    return ~written.reshape(grid), end


def _check(structure: Structure, name: str, *, labels: bool) -> None:
    """Refuse what is too large to decode, impossible, or without physical meaning."""
    if structure.sample_format not in (UNSIGNED, SIGNED, FLOAT, 4):
        raise ReadError(f"{name} holds complex numbers", Reason.DTYPE_UNSUPPORTED.name)
    if structure.bits > 64 or (structure.bits < 8 and not labels):
        raise ReadError(f"{name} has {structure.bits}-bit pixels; images have 8 to 64", Reason.DTYPE_UNSUPPORTED.name)
    allowed = (None, 0, 1, 3) if labels else (None, 1, 2)
    if structure.photometric not in allowed:
        meaning = PHOTOMETRIC_NAMES.get(structure.photometric or 0, str(structure.photometric))
        raise ReadError(
            f"{name} stores colours as {meaning}; convert it to plain bands first", Reason.DTYPE_UNSUPPORTED.name
        )
    if structure.block_bytes > MAX_BLOCK_BYTES:
        raise ReadError(
            f"{name} has blocks of {structure.block[0]} x {structure.block[1]} pixels, {structure.block_bytes} bytes "
            f"each; the limit is {MAX_BLOCK_BYTES}. Rewrite it tiled",
            Reason.BLOCK_TOO_LARGE.name,
        )
    decoded = structure.width * structure.height * structure.bands * -(-structure.bits // 8)
    if decoded > max(RATIO_FREE_BYTES, MAX_RATIO * structure.file_size):
        raise ReadError(
            f"{name} has {structure.file_size} bytes and decodes to {decoded}; the limit is {MAX_RATIO} times",
            Reason.RATIO.name,
        )
    if structure.end > structure.file_size:
        raise ReadError(
            f"{name} has {structure.file_size} bytes; its pixel data ends at byte {structure.end}",
            Reason.TRUNCATED.name,
        )


def nodata_value(text: str, dtype: str) -> np.generic | None:
    """Return a nodata text as a value of the pixel type, or None where no pixel can have it."""
    kind = np.dtype(dtype)
    try:
        value = float(text)
        if kind.kind == "f":
            with np.errstate(over="ignore"):
                stored = kind.type(value)
            return None if math.isfinite(value) and not np.isfinite(stored) else stored
        exact = int(text) if text.lstrip("+-").isdigit() else int(value)
    except (ValueError, OverflowError):
        return None
    limits = np.iinfo(kind)
    return kind.type(exact) if exact == value and limits.min <= exact <= limits.max else None
