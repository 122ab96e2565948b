"""Tiny PNG files by hand, in every colour type, depth, filter and interlacing: what no writer at hand writes."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geomed_mae.readers.picture.png import ADAM7, MAGIC

SAMPLES = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def _paeth(left: int, up: int, corner: int) -> int:
    guess = left + up - corner
    return min((left, up, corner), key=lambda value: abs(guess - value))  # ties go to the first


def _filtered(line: bytes, above: bytes, kind: int, width: int) -> bytes:
    """One row filtered by the letter of PNG clause 9, byte by byte."""
    out = bytearray([kind])
    for at, value in enumerate(line):
        left = line[at - width] if at >= width else 0
        up, corner = above[at], above[at - width] if at >= width else 0
        guess = (0, left, up, (left + up) // 2, _paeth(left, up, corner))[kind]
        out.append((value - guess) % 256)
    return bytes(out)


def _packed(row: np.ndarray, depth: int) -> bytes:
    """Samples (columns, channels) of one row as bytes, most significant bits first."""
    if depth == 16:
        return row.astype(">u2").tobytes()
    bits = (row.reshape(-1, 1) >> np.arange(depth - 1, -1, -1)) & 1
    return np.packbits(bits.astype(np.uint8).ravel()).tobytes()


def rows_of(samples: np.ndarray, depth: int, filters: Sequence[int], interlaced: bool) -> bytes:
    """Filtered rows, before compression, of samples (rows, columns, channels)."""
    width = max(1, samples.shape[2] * depth // 8)
    raw, number = b"", 0
    for top, left, down, right in ADAM7 if interlaced else ((0, 0, 1, 1),):
        part = samples[top::down, left::right]
        if 0 in part.shape:
            continue
        above = bytes(len(_packed(part[0], depth)))
        for row in part:
            line = _packed(row, depth)
            raw += _filtered(line, above, filters[number % len(filters)], width)
            above, number = line, number + 1
    return raw


def write_png(
    path: Path,
    samples: np.ndarray,
    colour: int,
    depth: int = 8,
    *,
    interlaced: bool = False,
    filters: Sequence[int] = (0, 1, 2, 3, 4),
    before: Sequence[tuple[bytes, bytes]] = (),
    after: Sequence[tuple[bytes, bytes]] = (),
    raw: bytes | None = None,
    size: tuple[int, int] | None = None,
    split: int = 1 << 30,
) -> Path:
    """Write samples (rows, columns[, channels]); `before` and `after` are chunks around the image data.

    `raw` replaces the rows, `size` (rows, columns) the header's, `split` bytes of data go into one IDAT chunk.
    """
    samples = samples[..., None] if samples.ndim == 2 else samples
    assert samples.shape[2] == SAMPLES[colour]
    rows, columns = size or samples.shape[:2]
    raw = rows_of(samples, depth, filters, interlaced) if raw is None else raw
    data = zlib.compress(raw)
    parts = [data[at : at + split] for at in range(0, len(data), split)]
    header = struct.pack(">IIBBBBB", columns, rows, depth, colour, 0, 0, interlaced)
    chunks = [(b"IHDR", header), *before, *((b"IDAT", part) for part in parts), *after, (b"IEND", b"")]
    path.write_bytes(MAGIC + b"".join(chunk(*entry) for entry in chunks))
    return path


def exif(orientation: int, order: str = "<") -> bytes:
    """An EXIF block, from its TIFF header on, that states an orientation."""
    magic = b"II*\0" if order == "<" else b"MM\0*"
    entry = struct.pack(order + "HHIHH", 0x0112, 3, 1, orientation, 0)
    return magic + struct.pack(order + "IH", 8, 1) + entry + struct.pack(order + "I", 0)
