"""GeoTIFF: rasters on their native grid, in physical units, with every kind of nodata in one validity mask.

Pixels are stored * scale + offset (the file's, else the modality's), never warped, resampled or read from overviews.
A pixel is invalid where it equals nodata (compared, also NaN), is NaN or infinite, is transparent (alpha 0), is masked
by an internal mask, or lies in a block that was never written. Invalid pixels are 0 in the array.

Sources: GDAL raster data model (affine transform, colour interpretation, mask flags), OGC GeoTIFF 1.1, TIFF 6.0.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from geomed_mae.image import Image
from geomed_mae.modalities import Modality
from geomed_mae.readers.geotiff import pixels
from geomed_mae.readers.geotiff.grid import footprint
from geomed_mae.readers.geotiff.labels import read_labels
from geomed_mae.readers.geotiff.metadata import Header, raster_header
from geomed_mae.readers.geotiff.source import group_rasters
from geomed_mae.readers.geotiff.structure import MAGICS
from geomed_mae.readers.plausible import verify
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.scenes.pixels import is_scene, read_scene
from geomed_mae.readers.source import Source, StoredWindow, Survey

__all__ = [
    "Header",
    "footprint",
    "group",
    "header",
    "read",
    "read_labels",
    "read_many",
    "read_many_stored",
    "sniff",
    "verify",
]

SUFFIXES = (".tif", ".tiff", ".gtiff")
EXTRA, PACKAGE = "geo", "rasterio"
NOT_THIS_FORMAT = Reason.NOT_TIFF


def sniff(path: Path, head: bytes) -> bool:
    """Whether the first bytes are a TIFF's, classic or Big, of either byte order."""
    return head[:4] in MAGICS


def header(path: Path) -> Header:
    """Read the metadata of one file, no pixels.

    Raises:
        ReadError: any reason of `geotiff.structure`, MALFORMED, DTYPE_UNSUPPORTED, BAD_TRANSFORM or UNIT_CONFLICT.
    """
    return raster_header(path)


def group(headers: Sequence[Header], modalities: Sequence[Modality]) -> Survey:
    """Make one Source of each scene and of each single file, bands named by the modality that fits.

    See `scenes` for which files are one scene, `geotiff.bands` for the names.
    """
    return group_rasters(headers, modalities, reader="geotiff")


def read(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """Read the raster or scene, or a window (rows, columns) of it, as float32 physical values.

    Raises:
        ReadError: TRUNCATED, DECODE_FAILED, TOO_LARGE, MALFORMED (changed since its header was read), or any reason
            of the checks on opening.
    """
    (image,) = read_many(source, [window])
    return image


def read_many(source: Source, windows: Sequence[tuple[slice, ...] | None]) -> Iterable[Image]:
    """Read several windows of one raster or scene; blocks that several of them need are decoded once.

    Raises:
        ReadError: as `read`; the limit of values is that of all windows together.
    """
    if is_scene(source):
        return read_scene(source, windows, pixels.read_many)
    return pixels.read_many(source, windows)


def read_many_stored(source: Source, windows: Sequence[tuple[slice, ...] | None]) -> Iterable[StoredWindow] | None:
    """Read several windows of one raster as the integers that it holds; None for scenes and for other types.

    Raises:
        ReadError: as `read_many`.
    """
    return None if is_scene(source) else pixels.read_many_stored(source, windows)
