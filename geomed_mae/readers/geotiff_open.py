"""The one place where a GeoTIFF is opened: hardened, so that nothing found in a file is followed.

Guards, each against something that was seen to work on GDAL 3.10: `driver="GTiff"` (a VRT named .tif reads any local
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

from geomed_mae.errors import ReadError
from geomed_mae.readers.geotiff_structure import Structure, read_structure
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

GDAL_OPTIONS = {
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "GDAL_PAM_ENABLED": "NO",
    "GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR",
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
}
"""Options that hold while a file is open, whatever the process has set."""

_ENVIRONMENT = {
    **GDAL_OPTIONS,
    "GDAL_SKIP": "VRT,MRF,WMS,WCS,WFS,WMTS,HTTP,GTI,STACTA,STACIT,PLMOSAIC,DERIVED",
    "GDAL_CACHEMAX": "64",
}
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


@contextmanager
def opened(path: Path, *, labels: bool = False) -> Iterator[tuple[DatasetReader, Structure]]:
    """Open a checked regular file as (rasterio dataset, its structure); rasterio's errors inside become ReadError.

    Raises:
        ReadError: the reasons of `read_structure`; MALFORMED when GDAL cannot open it; DECODE_FAILED when the pixel
            data does not decode. Messages name the file, never its folder.
    """
    structure = read_structure(path, labels=labels)
    rio = rasterio()
    with ExitStack() as stack:
        # NONE hides overviews: an OVERVIEW_FILE tag redirects to any path or URL.
        dataset, georeferenced = _open(rio, path, stack, OVERVIEW_LEVEL="NONE")
        structure = replace(structure, georeferenced=georeferenced)
        found = (dataset.count, dataset.height, dataset.width)
        if found != (structure.bands, structure.height, structure.width):
            raise ReadError(
                f"{shown(path)} is {found} (bands, rows, columns) to GDAL, "
                f"{(structure.bands, structure.height, structure.width)} by its tags",
                Reason.MALFORMED.name,
            )
        try:
            yield dataset, structure
        except (rio.errors.RasterioError, UnicodeDecodeError):
            raise ReadError(f"the pixel data of {shown(path)} does not decode", Reason.DECODE_FAILED.name) from None


def band_descriptions(path: Path) -> tuple[str | None, ...]:
    """Return the description of each band of a file that `opened` accepted.

    A second look, without pixels: GDAL 3.10's view without overviews drops them.
    """
    with ExitStack() as stack:
        dataset, _ = _open(rasterio(), path, stack)
        try:
            return dataset.descriptions
        except UnicodeDecodeError:
            return (None,) * dataset.count


def _open(rio: ModuleType, path: Path, stack: ExitStack, **options: str) -> tuple[DatasetReader, bool]:
    """Return the dataset, closed with `stack`, and whether the file places it on the ground."""
    target = path
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        # GDAL takes UTF-8 names only; any other name is reached through its descriptor.
        descriptor = os.open(path, os.O_RDONLY)
        stack.callback(os.close, descriptor)
        target = Path(f"/proc/self/fd/{descriptor}")
    stack.enter_context(rio.Env(**GDAL_OPTIONS))
    try:
        # catch_warnings changes the state of the whole process: one thread at a time.
        with _opening, warnings.catch_warnings(record=True) as raised:
            warnings.simplefilter("always")
            # A Path, never a str: rasterio does not look for URL schemes in it.
            dataset = rio.open(target, driver="GTiff", sharing=False, **options)
    except (rio.errors.RasterioError, UnicodeDecodeError, ValueError, OverflowError):
        raise ReadError(f"{shown(path)} does not open as a GeoTIFF", Reason.MALFORMED.name) from None
    stack.enter_context(dataset)
    return dataset, not any(issubclass(w.category, rio.errors.NotGeoreferencedWarning) for w in raised)
