"""Class maps and probabilities as cloud-optimised GeoTIFF, on the image's own grid (`writers.cog_rows`).

A class map (uint8) has NODATA as nodata value, a colour table, and its class names three times, because no two programs
look in the same place: as tags of its band (CLASS_0=background ...), in a style for QGIS and in GDAL's side-car (see
`writers.legend`). Probabilities are uint8 with scale 1/250, one band a class with its name as description. Overviews
take the nearest class, and the mean probability.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from geomed_mae.image import RasterGeometry
from geomed_mae.writers import CHANCE_STEPS, NODATA, check_classes, stored_chances
from geomed_mae.writers.cog_rows import PIECE_ROWS, Bands, Rows, rows_to_cog

SUFFIX = ".tif"
GEOMETRIES = ("raster",)


class ClassRaster:
    """A class map that is being written, from the first row to the last."""

    def __init__(self, rows: Rows, classes: tuple[str, ...]) -> None:
        self._rows, self._classes = rows, classes

    def put(self, rows: np.ndarray) -> None:
        """Write the next rows: uint8 (rows, columns).

        Raises:
            ValueError: not uint8, or a number that is no class.
            OutputError: the disk is full or gone.
        """
        check_classes(rows, self._classes)
        self._rows.put(rows[None])


class ChanceRaster:
    """Probabilities that are being written, from the first row to the last."""

    def __init__(self, rows: Rows) -> None:
        self._rows = rows

    def put(self, chances: np.ndarray) -> None:
        """Write the next rows: float32 (class, rows, columns), 0 to 1; all 0, or NaN, where nothing is known.

        Raises:
            OutputError: the disk is full or gone.
        """
        # Few rows at a time: a copy of all of them would be as large as what is given.
        for first in range(0, chances.shape[1], PIECE_ROWS):
            stored, known = stored_chances(chances[:, first : first + PIECE_ROWS])
            stored[:, ~known] = NODATA
            self._rows.put(stored)


@contextmanager
def stream(
    path: Path, shape: tuple[int, ...], geometry: RasterGeometry, classes: tuple[str, ...]
) -> Iterator[ClassRaster]:
    """Open a class map of `shape` (rows, columns) for writing in row order; it becomes a COG when the block ends.

    Raises:
        ValueError: the block ends before the last row.
        OutputError: the file cannot be written.
    """
    bands = Bands(names=("class",), nodata=NODATA, classes=classes)
    with rows_to_cog(path, (shape[0], shape[1]), geometry, bands) as rows:
        yield ClassRaster(rows, classes)


@contextmanager
def stream_chances(
    path: Path, shape: tuple[int, ...], geometry: RasterGeometry, classes: tuple[str, ...]
) -> Iterator[ChanceRaster]:
    """Open the probabilities of an image of `shape` (rows, columns) for writing in row order, one band a class.

    Stored 0 to 250 mean 0 to 1 (scale 1/250, so exact to 0.002); NODATA where nothing is known.

    Raises:
        ValueError: the block ends before the last row.
        OutputError: the file cannot be written.
    """
    scales = (1 / CHANCE_STEPS,) * len(classes)
    bands = Bands(names=classes, nodata=NODATA, scales=scales, overviews="AVERAGE")
    with rows_to_cog(path, (shape[0], shape[1]), geometry, bands) as rows:
        yield ChanceRaster(rows)


def write(path: Path, array: np.ndarray, geometry: RasterGeometry, classes: tuple[str, ...]) -> Path:
    """Write a class map, uint8 (rows, columns), as COG.

    Raises:
        OutputError: the file cannot be written.
    """
    with stream(path, array.shape, geometry, classes) as raster:
        raster.put(array)
    return path
