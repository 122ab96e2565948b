"""Mosaics: one 2D image whose tiles are the slices of a volume, row by row from the upper left corner.

United Imaging (ImageType VFRAME) lists the tiles in the private sequence (0065,1051), each with its own
ImagePositionPatient; PixelSpacing and ImageOrientationPatient of the file hold for all of them, and there are no more
rows of tiles than needed. Siemens (ImageType MOSAIC) says less, and the rest of this page is about it.

The standard attributes describe the sheet, not its slices. PixelSpacing, ImageOrientationPatient and
SpacingBetweenSlices are those of the slices. ImagePositionPatient is where the sheet's corner would lie if the sheet
were centred on the first slice, and so the first slice's corner is

    position + (columns - tile columns) / 2 * column step + (rows - tile rows) / 2 * row step

(nibabel, "DICOM Mosaic"). How many tiles are slices, and whether slices follow the normal or run against it, is said in
private attributes alone: NumberOfImagesInMosaic (0019,100A) and the CSA image header (0029,1010) with
SliceNormalVector. Where that header is gone, the protocol in the CSA series header (0029,1020) lists the slices'
centres: the sheet's own depth along the normal is that of the first slice, which is the lowest or the highest of them.
Nothing else decides the direction: many protocols count from head to feet or from right to left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.csa import csa_texts, protocol_positions
from geomed_mae.readers.dicom.geometry import SPACING_MM, normal_of, slice_error
from geomed_mae.readers.dicom.private import keyword_of, private_raw
from geomed_mae.readers.reasons import Reason

if TYPE_CHECKING:
    from geomed_mae.readers.dicom.frames import Frame
    from geomed_mae.readers.dicom.image_header import Header
    from geomed_mae.readers.dicom.values import Values

MAX_TILES = 1024
"""Slices on one sheet; scanners write up to some hundred."""

PARALLEL = 1e-3
"""How far the cosine between the private normal and the orientation's own may be from 1."""

DEPTH_TOLERANCE_MM = 0.05
"""How far the protocol's slice centres may be from the sheet along the normal: both are rounded, neither to 0.05 mm."""

COUNT = "NumberOfImagesInMosaic"
"""Name of the number of slices in a CSA image header."""

KEEP = "keep private groups 0019, 0029 and 0065 when de-identifying, or export the series without mosaics"
"""The way out for a mosaic that has lost its private attributes."""


@dataclass(frozen=True, slots=True)
class Mosaic:
    """How a sheet is cut: `count` slices of (rows, columns) pixels, `across` tiles a row; `sign` is 1 where they follow
    the normal, -1 where they run against it. `positions` are the slices' own where the sheet lists them.
    """

    count: int
    across: int
    rows: int
    columns: int
    sign: int
    positions: tuple[tuple[float, ...], ...] = ()

    def corner(self, tile: int) -> tuple[int, int]:
        """Return the (row, column) of a tile's first pixel on the sheet."""
        return tile // self.across * self.rows, tile % self.across * self.columns


def is_mosaic(header: Header, values: Values) -> bool:
    """Say whether an image is a mosaic; enhanced objects keep the word and hold plain frames.

    Args:
        header: of the image.
        values: its whitelisted attributes; with the CSA headers where ImageType is missing, which then decide.

    Raises:
        ReadError: BAD_FRAMES, when ImageType says something else than the private NumberOfImagesInMosaic; MISSING_TAG,
            when it is one of United Imaging that has lost its list.
    """
    if len(header.frames) > 1 or header.modality != "MR":
        return False
    if "MOSAIC" in header.image_type or _is_listed(header, values):
        return True
    if "VFRAME" in header.image_type and header.frames[0].position is None:
        raise ReadError(f"a UIH mosaic without the private list of its slices: {KEEP}", Reason.MISSING_TAG.name)
    words = values.words(keyword) if (keyword := keyword_of(values, "SiemensImages")) else None
    if not words and (blob := private_raw(values, "SiemensImageCsa")):
        words = [int(text) for text in csa_texts(blob, (COUNT,)).get(COUNT, ())[:1] if text.isdecimal()]
    if not words or words[0] < 2:
        return False
    if header.image_type:
        raise ReadError(
            f"ImageType says no mosaic, the private NumberOfImagesInMosaic says {words[0]} slices",
            Reason.BAD_FRAMES.name,
        )
    return True


def _is_listed(header: Header, values: Values) -> bool:
    """Say whether an image is a sheet of United Imaging: it has a list of tiles and no position of its own."""
    return header.frames[0].position is None and bool(keyword_of(values, "UnitedTiles"))


def _listed_mosaic(header: Header, values: Values) -> Mosaic:
    tiles = values.items(keyword_of(values, "UnitedTiles"))
    counted = values.number(keyword) if (keyword := keyword_of(values, "UnitedCount")) else len(tiles)
    if not 0 < len(tiles) <= MAX_TILES or counted != len(tiles):
        raise ReadError(f"a UIH mosaic that lists {len(tiles)} slices", Reason.BAD_FRAMES.name)
    frame = header.frames[0]
    positions = tuple(tile.numbers("ImagePositionPatient") for tile in tiles)
    for position in positions:
        if problem := slice_error(frame.orientation, position, frame.spacing):
            raise ReadError(f"a UIH mosaic: {problem}", Reason.BAD_GEOMETRY.name)
    across = math.isqrt(len(tiles) - 1) + 1
    down = -(-len(tiles) // across)
    if header.rows % down or header.columns % across:
        raise ReadError(
            f"a sheet of {header.rows} x {header.columns} pixels does not hold {down} x {across} tiles of a mosaic",
            Reason.BAD_GEOMETRY.name,
        )
    return Mosaic(len(tiles), across, header.rows // down, header.columns // across, 1, positions)


def read_mosaic(header: Header, values: Values) -> Mosaic:
    """Find out how a sheet is cut.

    Args:
        header: of the sheet.
        values: its whitelisted attributes, the CSA headers with them.

    Raises:
        ReadError: MISSING_TAG where the private attributes are gone, BAD_GEOMETRY where they contradict each other or
            the sheet, BAD_FRAMES, MALFORMED.
    """
    if _is_listed(header, values):
        return _listed_mosaic(header, values)
    frame = header.frames[0]
    if problem := slice_error(frame.orientation, frame.position, frame.spacing):
        raise ReadError(f"a Siemens mosaic: {problem}", Reason.BAD_GEOMETRY.name)
    if frame.slice_spacing_mm is None:
        raise ReadError("a Siemens mosaic without SpacingBetweenSlices", Reason.MISSING_TAG.name)
    if not SPACING_MM[0] <= frame.slice_spacing_mm <= SPACING_MM[1]:
        raise ReadError("a Siemens mosaic with an impossible SpacingBetweenSlices", Reason.BAD_GEOMETRY.name)
    image_csa, series_csa = (private_raw(values, name) for name in ("SiemensImageCsa", "SiemensSeriesCsa"))
    texts = csa_texts(image_csa, (COUNT, "SliceNormalVector")) if image_csa else {}
    listed = protocol_positions(series_csa) if series_csa else None
    count = _count(values, texts, listed)
    across = math.isqrt(count - 1) + 1
    if header.rows % across or header.columns % across:
        raise ReadError(
            f"a sheet of {header.rows} x {header.columns} pixels does not hold {across} x {across} tiles of a mosaic",
            Reason.BAD_GEOMETRY.name,
        )
    sign = _sign(frame, texts, listed if listed is not None and len(listed) == count else None)
    return Mosaic(count, across, header.rows // across, header.columns // across, sign)


def _count(values: Values, texts: dict[str, list[str]], listed: np.ndarray | None) -> int:
    keyword = keyword_of(values, "SiemensImages")
    words = values.words(keyword) if keyword else None
    said = [words[0]] if words else []
    for text in texts.get(COUNT, ())[:1]:
        said.append(int(text) if text.isdecimal() and len(text) < 6 else 0)
    if len(set(said)) > 1:
        raise ReadError(f"a Siemens mosaic of {said[0]} or of {said[1]} slices", Reason.BAD_GEOMETRY.name)
    if not said and listed is not None:
        said = [len(listed)]
    if not said:
        raise ReadError(f"a Siemens mosaic that does not say how many slices it holds: {KEEP}", Reason.MISSING_TAG.name)
    if not 0 < said[0] <= MAX_TILES:
        raise ReadError(f"a Siemens mosaic of {said[0]} slices", Reason.BAD_GEOMETRY.name)
    return said[0]


def _sign(frame: Frame, texts: dict[str, list[str]], listed: np.ndarray | None) -> int:
    normal = normal_of(frame.orientation)
    said = []
    if vector := texts.get("SliceNormalVector"):
        try:
            cosine = float(normal @ np.array([float(part) for part in vector[:3]]))
        except ValueError:
            cosine = math.nan
        if not abs(abs(cosine) - 1) <= PARALLEL:
            raise ReadError("a Siemens mosaic whose normal is not its orientation's", Reason.BAD_GEOMETRY.name)
        said.append(1 if cosine > 0 else -1)
    if listed is not None and len(listed) > 1:
        depths, depth = listed @ normal, float(normal @ frame.position)
        spans = np.ptp(depths) / (len(listed) - 1)
        if abs(spans - frame.slice_spacing_mm) <= DEPTH_TOLERANCE_MM:
            said += [1] if abs(depth - depths.min()) <= DEPTH_TOLERANCE_MM else []
            said += [-1] if abs(depth - depths.max()) <= DEPTH_TOLERANCE_MM else []
    if len(set(said)) > 1:
        raise ReadError("a Siemens mosaic whose normal and protocol contradict each other", Reason.BAD_GEOMETRY.name)
    if not said:
        raise ReadError(f"a Siemens mosaic that does not say which way its slices run: {KEEP}", Reason.MISSING_TAG.name)
    return said[0]


def tiled(header: Header) -> Header:
    """Return the header with a mosaic's slices as its frames; any other header as it is."""
    mosaic = header.mosaic
    if mosaic is None:
        return header
    frame = header.frames[0]
    if mosaic.positions:
        frames = tuple(replace(frame, position=position) for position in mosaic.positions)
        return replace(header, rows=mosaic.rows, columns=mosaic.columns, frames=frames, grouped=True)
    first, second = np.reshape(frame.orientation, (2, 3))
    down, right = second * frame.spacing[0], first * frame.spacing[1]
    corner = (
        np.asarray(frame.position)
        + (header.rows - mosaic.rows) / 2 * down
        + (header.columns - mosaic.columns) / 2 * right
    )
    step = normal_of(frame.orientation) * frame.slice_spacing_mm * mosaic.sign
    frames = tuple(replace(frame, position=tuple((corner + number * step).tolist())) for number in range(mosaic.count))
    return replace(header, rows=mosaic.rows, columns=mosaic.columns, frames=frames, grouped=True)


def cut(sheet: np.ndarray, mosaic: Mosaic, tile: int) -> np.ndarray:
    """Return one tile (rows, columns) of a decoded sheet."""
    top, left = mosaic.corner(tile)
    return sheet[top : top + mosaic.rows, left : left + mosaic.columns]
