"""PNG (ISO/IEC 15948:2004): its chunks walked and checked here, its rows unpacked by zlib and filtered back by Pillow.

Three things that Pillow 13 does without a word, each seen: rows that the compressed data does not reach stay black,
the checksum of image data is not compared, and 16-bit colours lose their low byte. So the data is inflated here, to
exactly the size that the header promises, and 16-bit samples of several channels are filtered back here as well.
"""

from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.picture.structure import Structure, check_size, exif_orientation, malformed, truncated
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 1 << 18
"""libpng writes 8 KiB of image data a chunk: 2 GiB of them."""
MAX_EXIF_BYTES = 1 << 16

GREY, COLOUR, PALETTE, GREY_ALPHA, COLOUR_ALPHA = 0, 2, 3, 4, 6
_SAMPLES = {GREY: 1, COLOUR: 3, PALETTE: 1, GREY_ALPHA: 2, COLOUR_ALPHA: 4}
_DEPTHS = {GREY: (1, 2, 4, 8, 16), PALETTE: (1, 2, 4, 8)}
_DEEP = (8, 16)

ADAM7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
"""First row, first column, row step and column step of each pass of an interlaced picture (clause 8.2)."""


@dataclass(frozen=True, slots=True)
class _Chunks:
    """What matters of a file's chunks: header fields, small chunks by name, and (offset, length) of the image data."""

    rows: int
    columns: int
    depth: int
    colour: int
    interlaced: bool
    small: dict[bytes, bytes]
    data: tuple[tuple[int, int], ...]

    @property
    def samples(self) -> int:
        """Samples of a pixel as stored: a colour number is one."""
        return _SAMPLES[self.colour]

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` pixels, its filter type not counted."""
        return -(-columns * self.samples * self.depth // 8)

    def passes(self) -> Iterator[tuple[tuple[slice, slice], int, int]]:
        """Yield (where its pixels go, rows, columns) of each pass that is not empty; one pass unless interlaced."""
        for top, left, down, right in ADAM7 if self.interlaced else ((0, 0, 1, 1),):
            rows, columns = -(-(self.rows - top) // down), -(-(self.columns - left) // right)
            if rows > 0 and columns > 0:
                yield (slice(top, None, down), slice(left, None, right)), rows, columns


def structure(path: Path) -> Structure:
    """Return what the chunks of `path` say; of their content only the first few hundred bytes are read.

    Raises:
        ReadError: TRUNCATED, MALFORMED, TOO_LARGE or RATIO.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        chunks = _walk(file, size, path)
    return _structure(chunks, size, path)


def _structure(chunks: _Chunks, size: int, path: Path) -> Structure:
    alpha = chunks.colour in (GREY_ALPHA, COLOUR_ALPHA)
    found = Structure(
        codec="",
        rows=chunks.rows,
        columns=chunks.columns,
        bands=1 if chunks.colour in (GREY, GREY_ALPHA) else 3,
        bits=chunks.depth,
        alpha=alpha,
        orientation=exif_orientation(chunks.small.get(b"eXIf", b"")),
        several=b"acTL" in chunks.small,
    )
    check_size(found, size, path)
    return found


def _walk(file: BinaryIO, size: int, path: Path) -> _Chunks:
    """Check the order and lengths of the chunks (clause 5.6) and collect those that matter."""
    if file.read(len(MAGIC)) != MAGIC:
        raise malformed(path, "it does not begin as a PNG")
    header: tuple[int, ...] = ()
    small: dict[bytes, bytes] = {}
    data: list[tuple[int, int]] = []
    at = len(MAGIC)
    for _ in range(MAX_CHUNKS):
        head = file.read(8)
        if len(head) < 8:
            raise truncated(path, "it ends without an IEND chunk")
        length, kind = struct.unpack(">I4s", head)
        at += 12 + length
        if not kind.isalpha():
            raise malformed(path, "a chunk has no name")
        if at > size:
            raise truncated(path, "a chunk reaches beyond its end")
        if not header and (kind != b"IHDR" or length != 13):
            raise malformed(path, "its first chunk is no header")
        wanted = {b"IHDR": 13, b"PLTE": 768, b"tRNS": 256, b"acTL": 8, b"eXIf": MAX_EXIF_BYTES, b"IEND": 0}.get(kind)
        if wanted is not None and length <= wanted and kind not in small:
            small[kind] = _checked(kind, file.read(length + 4), path)
            header = header or _header(small[b"IHDR"], path)
            if kind == b"IEND":
                break
        elif kind in (b"IHDR", b"PLTE", b"tRNS", b"IEND"):
            raise malformed(path, f"its {kind.decode()} chunk is repeated or too long")
        elif kind == b"IDAT":
            data.append((at - 4 - length, length))
        elif kind[:1].isupper():
            raise malformed(path, "it has a critical chunk that the standard does not know")
        file.seek(at)
    else:
        raise malformed(path, f"it has more than {MAX_CHUNKS} chunks")
    if not data:
        raise truncated(path, "it has no image data")
    columns, rows, depth, colour, interlaced = header
    if colour == PALETTE and (not small.get(b"PLTE") or len(small[b"PLTE"]) % 3):
        raise malformed(path, "it has colour numbers without a palette")
    return _Chunks(rows, columns, depth, colour, bool(interlaced), small, tuple(data))


def _checked(kind: bytes, content: bytes, path: Path) -> bytes:
    """Return a chunk's content, its four bytes of checksum compared and taken off."""
    if zlib.crc32(kind + content[:-4]) != int.from_bytes(content[-4:], "big"):
        raise malformed(path, f"the checksum of its {kind.decode()} chunk is wrong")
    return content[:-4]


def _header(content: bytes, path: Path) -> tuple[int, ...]:
    """Return (columns, rows, depth, colour type, interlaced) of IHDR (clause 11.2.2)."""
    columns, rows, depth, colour, compression, filters, interlaced = struct.unpack(">IIBBBBB", content)
    if colour not in _SAMPLES or depth not in _DEPTHS.get(colour, _DEEP):
        raise malformed(path, f"its header has {depth} bits of colour type {colour}")
    if compression or filters or interlaced > 1:
        raise malformed(path, "its header names an unknown compression, filter or interlace method")
    return columns, rows, depth, colour, interlaced


def pixels(path: Path) -> tuple[Structure, np.ndarray, np.ndarray | None]:
    """Decode `path`: its structure, samples uint8 or uint16 (bands, rows, columns), and where it is not transparent.

    Greys of 1, 2 and 4 bits are spread over 0 to 255 (clause 13.12), palettes looked up; the last of the three is bool
    (rows, columns), False where alpha is 0 or the colour is the one declared transparent, or None.

    Raises:
        ReadError: TRUNCATED, MALFORMED, DECODE_FAILED, TOO_LARGE or RATIO.
    """
    content = path.read_bytes()
    chunks = _walk(io.BytesIO(content), len(content), path)
    found = _structure(chunks, len(content), path)
    raw = _inflated(content, chunks, path)
    del content
    samples = _deep(chunks, raw, path) if chunks.depth == 16 and chunks.samples > 1 else _by_pillow(chunks, raw, path)
    return found, *_coloured(chunks, samples, path)


def _inflated(content: bytes, chunks: _Chunks, path: Path) -> bytes:
    """Return the filtered rows, exactly as many bytes as the header promises."""
    expected = sum(rows * (1 + chunks.row_bytes(columns)) for _, rows, columns in chunks.passes())
    for at, length in chunks.data:
        _checked(b"IDAT", content[at : at + length + 4], path)
    inflate = zlib.decompressobj()
    try:
        raw = inflate.decompress(b"".join(content[at : at + length] for at, length in chunks.data), expected)
        # One byte more: reaching the end of the stream compares its checksum.
        more = inflate.decompress(inflate.unconsumed_tail, 1)
    except zlib.error:
        raise ReadError(f"the pixel data of {shown(path)} does not decode", Reason.DECODE_FAILED.name) from None
    if len(raw) < expected or not (inflate.eof or more):
        raise truncated(path, f"{len(raw)} of {expected} bytes of rows are there")
    return raw


def _by_pillow(chunks: _Chunks, raw: bytes, path: Path) -> np.ndarray:
    """Return samples (rows, columns[, samples]) as Pillow decodes them from a file that holds nothing else."""
    from PIL.PngImagePlugin import PngImageFile

    depth, colour = chunks.depth, chunks.colour
    fields = struct.pack(">IIBBBBB", chunks.columns, chunks.rows, depth, colour, 0, 0, chunks.interlaced)
    parts = [(b"IHDR", fields), (b"IDAT", zlib.compress(raw, 0)), (b"IEND", b"")]
    if colour == PALETTE:
        parts.insert(1, (b"PLTE", chunks.small[b"PLTE"]))
    rebuilt = MAGIC + b"".join(_chunk(kind, content) for kind, content in parts)
    try:
        with PngImageFile(io.BytesIO(rebuilt)) as image:
            samples = np.array(image)
    except (OSError, SyntaxError, ValueError):
        raise ReadError(f"the pixel data of {shown(path)} does not decode", Reason.DECODE_FAILED.name) from None
    if samples.dtype == np.bool_:
        samples = samples.astype(np.uint8) * (255 if colour == GREY else 1)
    return samples.astype(np.uint16) if depth == 16 else samples


def _chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(content, zlib.crc32(kind)))


def _deep(chunks: _Chunks, raw: bytes, path: Path) -> np.ndarray:
    """Return 16-bit samples (rows, columns, samples) of several channels, which Pillow would cut to 8 bits."""
    out = np.empty((chunks.rows, chunks.columns, chunks.samples), np.uint16)
    at = 0
    for where, rows, columns in chunks.passes():
        size = rows * (1 + chunks.row_bytes(columns))
        lines = np.frombuffer(raw, np.uint8, size, at).reshape(rows, -1)
        at += size
        if lines[:, 0].max() > 4:
            raise ReadError(f"{shown(path)} names a row filter that does not exist", Reason.DECODE_FAILED.name)
        plain = unfiltered(lines[:, 1:].reshape(rows, columns, 2 * chunks.samples), lines[:, 0])
        out[where] = plain.view(">u2")
    return out


def unfiltered(lines: np.ndarray, filters: np.ndarray) -> np.ndarray:
    """Undo the row filters (clause 9) of bytes (rows, columns, bytes a pixel); `filters` (rows,) are types 0 to 4.

    A pixel needs its left, upper and upper left neighbours, so that pixels of one antidiagonal are independent: the
    loop runs over antidiagonals, and each step works on all of one at once.
    """
    rows, columns, width = lines.shape
    # Row 0 and column 0 are the zeros that the standard puts outside the picture.
    plain = np.zeros((rows + 1, columns + 1, width), np.uint8)
    for diagonal in range(rows + columns - 1):
        row = np.arange(max(0, diagonal - columns + 1), min(rows, diagonal + 1))
        column = diagonal - row
        kind = filters[row][:, None]
        left = plain[row + 1, column].astype(np.int16)
        up = plain[row, column + 1].astype(np.int16)
        corner = plain[row, column].astype(np.int16)
        guess = left + up - corner
        off_left, off_up, off_corner = np.abs(guess - left), np.abs(guess - up), np.abs(guess - corner)
        paeth = np.where(
            (off_left <= off_up) & (off_left <= off_corner), left, np.where(off_up <= off_corner, up, corner)
        )
        prediction = np.select([kind == 1, kind == 2, kind == 3, kind == 4], [left, up, (left + up) >> 1, paeth], 0)
        plain[row + 1, column + 1] = lines[row, column] + prediction.astype(np.uint8)
    return np.ascontiguousarray(plain[1:, 1:])


def _coloured(chunks: _Chunks, samples: np.ndarray, path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """Return (bands, rows, columns) colours, and bool (rows, columns) where they are not transparent, or None."""
    transparent = chunks.small.get(b"tRNS", b"")
    if chunks.colour == PALETTE:
        palette = np.frombuffer(chunks.small[b"PLTE"], np.uint8).reshape(-1, 3)
        if samples.max() >= len(palette):
            raise ReadError(f"{shown(path)} has colour numbers beyond its palette", Reason.DECODE_FAILED.name)
        alpha = np.full(len(palette), 255, np.uint8)
        alpha[: len(transparent)] = np.frombuffer(transparent, np.uint8)[: len(palette)]
        return np.moveaxis(palette[samples], -1, 0), (alpha > 0)[samples] if transparent else None
    bands = samples[None] if samples.ndim == 2 else np.moveaxis(samples, -1, 0)
    if chunks.colour in (GREY_ALPHA, COLOUR_ALPHA):
        return bands[:-1], bands[-1] > 0
    if len(transparent) != 2 * len(bands):
        return bands, None
    spread = 255 // ((1 << chunks.depth) - 1) if chunks.depth < 8 else 1
    # Of a transparent colour the low bits count, as many as a sample has (PNG, 11.3.2.1).
    clear = (np.frombuffer(transparent, ">u2").astype(np.int64) & ((1 << chunks.depth) - 1)) * spread
    return bands, (bands != clear[:, None, None]).any(axis=0)
