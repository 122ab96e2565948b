"""JPEG 2000 (.jp2): single rasters, and the band files of Sentinel-2 products, which come so.

Read by the same code as GeoTIFF, on its native grid at full resolution, through GDAL's JP2OpenJPEG driver and no other;
georeferencing is what the file itself holds (GeoJP2 or GMLJP2 boxes), no side-car is looked at. The sizes of the
codestream are checked before (see `jp2_structure`). JPEG 2000 has no nodata: the modality's counts.

Sources: ISO/IEC 15444-1; OGC 05-047r3 (GMLJP2).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geomed_mae.modalities import Modality
from geomed_mae.readers.geotiff import read, read_many
from geomed_mae.readers.geotiff.grid import footprint
from geomed_mae.readers.geotiff.metadata import Header, raster_header
from geomed_mae.readers.geotiff.source import group_rasters
from geomed_mae.readers.jp2_structure import MAGIC
from geomed_mae.readers.plausible import verify
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.source import Survey

__all__ = ["footprint", "group", "header", "read", "read_many", "sniff", "verify"]

SUFFIXES = (".jp2",)
EXTRA, PACKAGE = "geo", "rasterio"
NOT_THIS_FORMAT = Reason.MALFORMED


def sniff(path: Path, head: bytes) -> bool:
    """Whether the file starts with the signature box of JP2."""
    return head.startswith(MAGIC)


def header(path: Path) -> Header:
    """Read the metadata of one file, no pixels.

    Raises:
        ReadError: any reason of `jp2_structure`, MALFORMED, DTYPE_UNSUPPORTED or BAD_TRANSFORM.
    """
    return raster_header(path)


def group(headers: Sequence[Header], modalities: Sequence[Modality]) -> Survey:
    """Make one Source of each scene and of each single file (see `scenes` and `geotiff.bands`)."""
    return group_rasters(headers, modalities, reader="jp2")
