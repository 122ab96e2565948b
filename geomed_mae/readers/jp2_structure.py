"""What a JPEG 2000 file says about itself, parsed here before any native code sees it, and the limits it must keep.

OpenJPEG trusts the sizes of a codestream, and GDAL hands out zeros where one is cut short and several threads decode.
This module reads the boxes of a JP2 file and the main header and tile-parts of its codestream with the standard
library: a file that is too large, cut or inconsistent is refused by its numbers alone.

Source: ISO/IEC 15444-1 (ITU-T T.800), Annex A (codestream syntax) and Annex I (JP2 file format).
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import BinaryIO

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.geotiff.structure import (
    MAX_BANDS,
    MAX_PIXELS,
    MAX_RATIO,
    RATIO_FREE_BYTES,
    SIGNED,
    UNSIGNED,
    Structure,
)
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import as_read_error, shown

MAGIC = b"\0\0\0\x0cjP  \r\n\x87\n"
"""The signature box that every JP2 file starts with (I.5.1)."""
CODEC = "JPEG 2000"
MAX_TILE_BYTES = 512 << 20
"""One tile decodes to 32-bit integers as a whole: an untiled Sentinel-2 band (482 MB) passes."""
MAX_BOXES = 256
"""Boxes of a file; real ones have some ten."""
MAX_TILE_PARTS = 1 << 20
"""A tile has at most 255 parts (A.4.2), an image at most 65,535 tiles."""
MAX_MARKER_BYTES = 1 << 20
"""All of the main header; real ones have some hundred bytes."""

OTHER_COLOURS = {
    1: "YCbCr",
    3: "YCbCr",
    4: "YCbCr",
    9: "PhotoYCC",
    11: "CMY",
    12: "CMYK",
    13: "YCCK",
    14: "CIELab",
    18: "sYCC",
    24: "e-sYCC",
}
"""Enumerated colour spaces that are neither grey nor red, green and blue (I.5.3.3; ISO/IEC 15444-2, M.11.7.3.1)."""

_SOC, _SIZ, _SOT, _EOC = 0xFF4F, 0xFF51, 0xFF90, 0xFFD9


def read_codestream(path: Path) -> Structure:
    """Parse and check the boxes and the codestream of `path`; tiles are the structure's blocks.

    Raises:
        ReadError: MALFORMED, TRUNCATED, TOO_LARGE, TOO_MANY_BANDS, BLOCK_TOO_LARGE, RATIO, DTYPE_UNSUPPORTED,
            PERMISSION or VANISHED.
    """
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _Codestream(file, size, shown(path)).structure()
    except OSError as error:
        raise as_read_error(error, path) from None


class _Codestream:
    """Reads boxes and markers; every position and length is checked against the file's size."""

    def __init__(self, file: BinaryIO, size: int, name: str) -> None:
        self.file, self.size, self.name = file, size, name

    def _take(self, position: int, length: int) -> bytes:
        if position < 0 or position + length > self.size:
            raise ReadError(
                f"{self.name} ends at byte {self.size}; it points to {position + length}", Reason.TRUNCATED.name
            )
        self.file.seek(position)
        return self.file.read(length)

    def _malformed(self, what: str) -> ReadError:
        return ReadError(f"{self.name} {what}", Reason.MALFORMED.name)

    def _codestream_box(self) -> tuple[int, int]:
        """Return where the codestream starts and ends."""
        position = 0
        for _ in range(MAX_BOXES):
            length, kind = struct.unpack(">I4s", self._take(position, 8))
            start = position + 8
            if length == 1:
                length = struct.unpack(">Q", self._take(start, 8))[0]
                start += 8
            elif length == 0:
                length = self.size - position
            if length < start - position:
                raise self._malformed(f"has a box of {length} bytes")
            if position + length > self.size:
                raise ReadError(
                    f"{self.name} has {self.size} bytes; a box ends at byte {position + length}", Reason.TRUNCATED.name
                )
            if kind == b"jp2h":
                self._refuse_colours(start, position + length)
            if kind == b"jp2c":
                return start, position + length
            position += length
        raise self._malformed(f"has no codestream in its first {MAX_BOXES} boxes")

    def _refuse_colours(self, position: int, end: int) -> None:
        """Refuse numbers that are no bands: of a palette, or of a colour space without red, green and blue."""
        for _ in range(MAX_BOXES):
            if position + 8 > end:
                return
            length, kind = struct.unpack(">I4s", self._take(position, 8))
            if kind == b"pclr":
                raise ReadError(f"{self.name} stores colours as palette", Reason.DTYPE_UNSUPPORTED.name)
            if kind == b"colr" and length >= 15:
                method, space = struct.unpack(">BxxI", self._take(position + 8, 7))
                if method == 1 and space in OTHER_COLOURS:
                    raise ReadError(
                        f"{self.name} stores colours as {OTHER_COLOURS[space]}; convert it to plain bands first",
                        Reason.DTYPE_UNSUPPORTED.name,
                    )
            if length < 8:
                return
            position += length

    def structure(self) -> Structure:
        """Return the image's numbers.

        Raises:
            ReadError: as `read_codestream`.
        """
        if self._take(0, len(MAGIC)) != MAGIC:
            raise self._malformed("is no JP2 file by its first bytes")
        start, end = self._codestream_box()
        if self._take(start, 4) != struct.pack(">HH", _SOC, _SIZ):
            raise self._malformed("has a codestream that does not start with its sizes")
        length, _, *sizes, bands = struct.unpack(">HH8IH", self._take(start + 4, 38))
        right, bottom, left, top, tile_width, tile_height, tile_left, tile_top = sizes
        if length != 38 + 3 * bands or not bands or right <= left or bottom <= top or not (tile_width and tile_height):
            raise self._malformed(
                f"declares {bottom} x {right} pixels, {bands} bands, tiles {tile_height} x {tile_width}"
            )
        # ISO/IEC 15444-1, B-3 and B-4: the first tile holds the image's first pixel.
        if tile_left > left or tile_top > top or tile_left + tile_width <= left or tile_top + tile_height <= top:
            raise self._malformed("has tiles that do not cover its upper left corner")
        width, height = right - left, bottom - top
        grid = (-(-(bottom - tile_top) // tile_height), -(-(right - tile_left) // tile_width))
        block = (min(tile_height, height), min(tile_width, width))
        bits, signed = self._components(start + 42, bands)
        self._check(width, height, bands, bits, block)
        if grid[0] * grid[1] > 65535:
            raise self._malformed(f"declares {grid[0]} x {grid[1]} tiles; a codestream has at most 65535")
        self._tile_parts(start + 4 + length, end, grid[0] * grid[1])
        return Structure(
            width=width,
            height=height,
            bands=bands,
            bits=8 if bits <= 8 else 16 if bits <= 16 else 32,
            sample_format=SIGNED if signed else UNSIGNED,
            photometric=None,
            block=block,
            nodata=None,
            missing=np.zeros((1, -(-height // block[0]), -(-width // block[1])), np.bool_),
            end=end,
            file_size=self.size,
            codec=CODEC,
        )

    def _components(self, position: int, bands: int) -> tuple[int, bool]:
        """Return the bits a sample and whether they are signed, the same for all components."""
        if bands > MAX_BANDS:
            raise ReadError(f"{self.name} declares {bands} bands; the limit is {MAX_BANDS}", Reason.TOO_MANY_BANDS.name)
        found = np.frombuffer(self._take(position, 3 * bands), np.uint8).reshape(bands, 3)
        if (found != found[0]).any() or tuple(found[0, 1:]) != (1, 1):
            raise ReadError(f"{self.name} has bands of different size or pixel type", Reason.DTYPE_UNSUPPORTED.name)
        bits = (int(found[0, 0]) & 0x7F) + 1
        if not 8 <= bits <= 32:
            raise ReadError(f"{self.name} has {bits}-bit pixels; images have 8 to 32", Reason.DTYPE_UNSUPPORTED.name)
        return bits, bool(found[0, 0] & 0x80)

    def _check(self, width: int, height: int, bands: int, bits: int, block: tuple[int, int]) -> None:
        if width * height > MAX_PIXELS:
            detail = f"{self.name} declares {height} x {width} pixels; the limit is {MAX_PIXELS}"
            raise ReadError(detail, Reason.TOO_LARGE.name)
        tile = block[0] * block[1] * bands * 4
        if tile > MAX_TILE_BYTES:
            raise ReadError(
                f"{self.name} has tiles of {block[0]} x {block[1]} pixels, which decode to {tile} bytes; the limit is "
                f"{MAX_TILE_BYTES}. Rewrite it with smaller tiles",
                Reason.BLOCK_TOO_LARGE.name,
            )
        decoded = width * height * bands * -(-bits // 8)
        if decoded > max(RATIO_FREE_BYTES, MAX_RATIO * self.size):
            raise ReadError(
                f"{self.name} has {self.size} bytes and decodes to {decoded}; the limit is {MAX_RATIO} times",
                Reason.RATIO.name,
            )

    def _tile_parts(self, position: int, end: int, tiles: int) -> None:
        """Follow the codestream from its main header to its end: every tile is there and nothing is cut off."""
        limit = min(end, position + MAX_MARKER_BYTES)
        while True:
            marker, length = struct.unpack(">HH", self._take(position, 4))
            if marker == _SOT:
                break
            if marker < 0xFF00 or length < 2 or position + 2 + length > limit:
                raise self._malformed(f"has no tile after its main header (marker {marker:#06x})")
            position += 2 + length
        seen = set()
        for _ in range(MAX_TILE_PARTS):
            if position + 12 > end:
                raise ReadError(f"{self.name} ends before its last tile", Reason.TRUNCATED.name)
            marker, _, tile, length = struct.unpack(">HHHI", self._take(position, 10))
            if marker != _SOT or tile >= tiles:
                raise self._malformed(f"has marker {marker:#06x} where a tile starts")
            seen.add(tile)
            if length == 0:
                # Up to the end of the codestream, by definition (A.4.2).
                position = end - 2
            elif length < 14:
                raise self._malformed(f"has a tile of {length} bytes")
            else:
                position += length
            if position + 2 > end:
                detail = f"{self.name} ends inside tile {tile} of {tiles}"
                raise ReadError(detail, Reason.TRUNCATED.name)
            if self._take(position, 2) == struct.pack(">H", _EOC):
                break
        if len(seen) < tiles:
            raise ReadError(f"{self.name} has {len(seen)} of its {tiles} tiles", Reason.TRUNCATED.name)
