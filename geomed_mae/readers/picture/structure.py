"""What a picture says about itself, parsed here before Pillow sees a byte of it, and the limits that it must keep.

Pillow and the libraries under it get only the parts of a file that are needed to decode its pixels: no text, no colour
profile, no EXIF, no second picture. What is never handed over can neither expand, nor be followed, nor be repeated in
a message. `picture.png` and `picture.jpeg` know the two formats; this module holds what they have in common.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

MAX_VALUES = 1 << 28
"""Rows x columns x colours: 1 GiB as float32, 89 megapixels in colour. A picture is decoded as a whole."""
MAX_FILE_BYTES = 1 << 30
"""Larger than MAX_VALUES of 16 bits need when nothing is compressed."""
MAX_RATIO = 500
"""Decoded bytes over file bytes. A black page can reach deflate's 1,032; photographs and radiographs stay below 100."""
RATIO_FREE_BYTES = 64 << 20
"""A picture this small is harmless at any ratio."""

UPRIGHT = 1
ORIENTATION_TAG = 0x0112
MAX_EXIF_ENTRIES = 512
"""Entries of an EXIF directory; cameras write some sixty."""
_SHORT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """A picture as stored, before its EXIF orientation is applied.

    Attributes:
        codec: "" for PNG, "JPEG" for JPEG.
        rows: stored rows.
        columns: stored columns.
        bands: colours a pixel has once a palette is looked up: 1 or 3, alpha not counted.
        bits: bits a sample: 1, 2, 4, 8 or 16.
        alpha: whether transparency is stored a pixel.
        orientation: EXIF orientation 1 to 8 (CIPA DC-008, 4.6.4), 1 where none is stated.
        several: the file holds more pictures after the first one (APNG, MPO).
    """

    codec: str
    rows: int
    columns: int
    bands: int
    bits: int
    alpha: bool = False
    orientation: int = UPRIGHT
    several: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, columns) once the picture stands upright."""
        return (self.columns, self.rows) if self.orientation > 4 else (self.rows, self.columns)

    @property
    def dtype(self) -> str:
        """Name of the stored type; samples of less than a byte are spread over 0 to 255 when they are read."""
        return "uint16" if self.bits == 16 else "uint8"


def check_size(structure: Structure, file_bytes: int, path: Path) -> None:
    """Refuse sizes beyond the limits, from the header's numbers alone.

    Raises:
        ReadError: MALFORMED (no rows or columns), TOO_LARGE, RATIO.
    """
    values = structure.rows * structure.columns * (structure.bands + structure.alpha)
    if values <= 0:
        raise ReadError(
            f"{shown(path)} declares {structure.rows} rows and {structure.columns} columns", Reason.MALFORMED.name
        )
    if values > MAX_VALUES or file_bytes > MAX_FILE_BYTES:
        raise ReadError(
            f"{shown(path)} has {structure.rows} x {structure.columns} pixels in {file_bytes} bytes; pictures may have "
            f"{MAX_VALUES} values in {MAX_FILE_BYTES} bytes: store large images as tiled GeoTIFF",
            Reason.TOO_LARGE.name,
        )
    decoded = values * max(structure.bits, 8) // 8
    if decoded > RATIO_FREE_BYTES and decoded > MAX_RATIO * file_bytes:
        raise ReadError(
            f"{shown(path)} is {file_bytes} bytes and would become {decoded}, more than {MAX_RATIO} times as many",
            Reason.RATIO.name,
        )


def truncated(path: Path, what: str) -> ReadError:
    """Return the error for a file that ends too early, or whose data does: `what` says where."""
    return ReadError(f"{shown(path)} is cut: {what}", Reason.TRUNCATED.name)


def malformed(path: Path, what: str) -> ReadError:
    """Return the error for a file that breaks the rules of its format: `what` says how."""
    return ReadError(f"{shown(path)} is damaged: {what}", Reason.MALFORMED.name)


def exif_orientation(exif: bytes) -> int:
    """Return the orientation (1 to 8) that an EXIF block states in its first directory; 1 where it states none.

    `exif` starts with the TIFF header (CIPA DC-008, 4.5.2). A damaged block is as good as none: pixels do not need it.
    """
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(exif[:4])
    if order is None or len(exif) < 8:
        return UPRIGHT
    start = struct.unpack_from(order + "I", exif, 4)[0]
    if start + 2 > len(exif):
        return UPRIGHT
    count = min(struct.unpack_from(order + "H", exif, start)[0], MAX_EXIF_ENTRIES)
    for at in range(start + 2, min(start + 2 + 12 * count, len(exif) - 11), 12):
        tag, kind, _, value = struct.unpack_from(order + "HHIH", exif, at)
        if tag == ORIENTATION_TAG and kind == _SHORT:
            return value if 1 <= value <= 8 else UPRIGHT
    return UPRIGHT


def upright(array: np.ndarray, orientation: int) -> np.ndarray:
    """Return `array` (..., rows, columns) as it is to be looked at, a view (CIPA DC-008, table of tag 274)."""
    if orientation > 4:
        array = np.swapaxes(array, -1, -2)
    # What is left after the transposition of 5 to 8: which of the two axes runs backwards.
    rows_back = orientation in (3, 4, 7, 8)
    columns_back = orientation in (2, 3, 6, 7)
    return array[..., :: -1 if rows_back else 1, :: -1 if columns_back else 1]
