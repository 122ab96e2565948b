"""The one place where a raster (GeoTIFF or JPEG 2000) is opened: hardened, so that nothing found in a file is followed.

Guards, each against something that was seen to work on GDAL 3.10: one named driver (a VRT named .tif reads any local
file), OVERVIEW_LEVEL=NONE and no decimated reads (an OVERVIEW_FILE tag redirects to any path or URL), no side-cars
(`.aux.xml` silently replaces nodata, CRS and scale), no network, no other raster driver.
"""

from __future__ import annotations

import logging
import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.geotiff.structure import Structure, read_structure
from geomed_mae.readers.jp2_structure import MAGIC, read_codestream
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import first_bytes, shown

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

GDAL_OPTIONS = {
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
    # With more threads, errors of OpenJPEG end in another thread and the pixels are zeros.
    "GDAL_NUM_THREADS": "1",
}
"""Options that hold while a file is open, whatever the process has set."""

_ENVIRONMENT = {
    **GDAL_OPTIONS,
    "GDAL_SKIP": "VRT,MRF,WMS,WCS,WFS,WMTS,HTTP,GTI,STACTA,STACIT,PLMOSAIC,DERIVED",
    "GDAL_CACHEMAX": "64",
}
_FORMATS = {"GTiff": "a GeoTIFF", "JP2OpenJPEG": "JPEG 2000"}
_opening = threading.Lock()


def rasterio() -> ModuleType:
    """Import rasterio with GDAL's risky drivers switched off; GDAL reads GDAL_SKIP only when it is loaded."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import rasterio
    import rasterio.crs
    import rasterio.enums
    import rasterio.errors
    import rasterio.warp
    import rasterio.windows

    # Its messages hold full paths, which can name a person; what matters of them is in our errors.
    logger = logging.getLogger("rasterio")
    if logger.level == logging.NOTSET:
        logger.setLevel(logging.CRITICAL)
    return rasterio


def gdal_errors() -> tuple[type[Exception], ...]:
    """Return what rasterio raises where GDAL or PROJ fails: its own errors and, undocumented, bare ones of GDAL."""
    from rasterio._err import CPLE_BaseError

    return rasterio().errors.RasterioError, CPLE_BaseError


@contextmanager
def opened(path: Path, *, labels: bool = False) -> Iterator[tuple[DatasetReader, Structure]]:
    """Open a checked regular file as (rasterio dataset, its structure); rasterio's errors inside become ReadError.

    Raises:
        ReadError: the reasons of `read_structure`; MALFORMED when GDAL cannot open it; DECODE_FAILED when the pixel
            data does not decode. Messages name the file, never its folder.
    """
    with ExitStack() as stack:
        dataset, structure = open_checked(path, stack, labels=labels)
        with in_use(path):
            yield dataset, structure


def open_checked(path: Path, stack: ExitStack, *, labels: bool = False) -> tuple[DatasetReader, Structure]:
    """Return (dataset, structure) of a file that keeps every limit; `stack` closes it. Use it inside `in_use` only.

    Raises:
        ReadError: as `opened`, but for DECODE_FAILED.
    """
    # NONE hides overviews: an OVERVIEW_FILE tag redirects to any path or URL.
    options = {"OVERVIEW_LEVEL": "NONE"}
    if first_bytes(path)[: len(MAGIC)] == MAGIC:
        structure = read_codestream(path)
        options |= {"driver": "JP2OpenJPEG", "GEOREF_SOURCES": "INTERNAL"}
    else:
        structure = read_structure(path, labels=labels)
    dataset = _open(rasterio(), path, stack, **options)
    found = (dataset.count, dataset.height, dataset.width)
    if found != (structure.bands, structure.height, structure.width):
        raise ReadError(
            f"{shown(path)} is {found} (bands, rows, columns) to GDAL, "
            f"{(structure.bands, structure.height, structure.width)} by its tags",
            Reason.MALFORMED.name,
        )
    if dataset.driver == "JP2OpenJPEG" and structure.block != dataset.block_shapes[0]:
        # GDAL decodes parts of the tiles of a JP2 file, in blocks of its own.
        rows, columns = block = dataset.block_shapes[0]
        grid = (1, -(-structure.height // rows), -(-structure.width // columns))
        structure = replace(structure, block=block, missing=np.zeros(grid, np.bool_))
    if dataset.driver == "JP2OpenJPEG":
        structure = replace(structure, georeferenced=_has_grid(path))
    return dataset, structure


@contextmanager
def in_use(path: Path) -> Iterator[None]:
    """Hold the options of GDAL while a dataset is read; rasterio's errors become ReadError DECODE_FAILED."""
    rio = rasterio()
    with rio.Env(**GDAL_OPTIONS):
        try:
            yield
        except (*gdal_errors(), UnicodeDecodeError):
            raise ReadError(f"the pixel data of {shown(path)} does not decode", Reason.DECODE_FAILED.name) from None


def band_descriptions(path: Path) -> tuple[str | None, ...]:
    """Return the description of each band of a file that `opened` accepted.

    A second look, without pixels: GDAL 3.10's view without overviews drops them.
    """
    with ExitStack() as stack:
        rio = rasterio()
        dataset = _open(rio, path, stack)
        try:
            with rio.Env(**GDAL_OPTIONS):
                return dataset.descriptions
        except UnicodeDecodeError:
            return (None,) * dataset.count


def _has_grid(path: Path) -> bool:
    """Whether a JPEG 2000 file places its pixels on the ground.

    A second look, without pixels: of a file without a grid GDAL 3.10's view without overviews hands out numbers that
    nobody has set, where this one says that the grid is the pixels.
    """
    with ExitStack() as stack:
        dataset = _open(rasterio(), path, stack, driver="JP2OpenJPEG", GEOREF_SOURCES="INTERNAL,PAM")
        return not dataset.transform.is_identity


def _open(rio: ModuleType, path: Path, stack: ExitStack, driver: str = "GTiff", **options: str) -> DatasetReader:
    """Return the dataset, closed with `stack`."""
    target = path
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        # GDAL takes UTF-8 names only; any other name is reached through its descriptor.
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        target = Path(f"/proc/self/fd/{descriptor}")
    try:
        # catch_warnings changes the state of the whole process: one thread at a time.
        with rio.Env(**GDAL_OPTIONS), _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore", rio.errors.NotGeoreferencedWarning)
            # A Path, never a str: rasterio does not look for URL schemes in it.
            dataset = rio.open(target, driver=driver, sharing=False, **options)
    except (*gdal_errors(), UnicodeDecodeError, ValueError, OverflowError):
        raise ReadError(f"{shown(path)} does not open as {_FORMATS[driver]}", Reason.MALFORMED.name) from None
    # Not entered as a context: that would tie its end to rasterio's stack of environments, and a dataset may be kept.
    stack.callback(dataset.close)
    return dataset
