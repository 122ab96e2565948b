"""GeoTIFF outputs: class maps as cloud-optimised GeoTIFF, dense embeddings as tiled GeoTIFF.

The grid is the image's own, never warped: coordinate system and transform are written as they were read, rotated,
south-up or absent ones included. A class map has NODATA as nodata value, a colour table, and its class names as tags of
its band (CLASS_0=background ...). Overviews take the nearest pixel, because classes cannot be averaged.
"""

from __future__ import annotations

import colorsys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.errors import OutputError
from geomed_mae.image import RasterGeometry
from geomed_mae.writers import NODATA, check_classes, complete_file

SUFFIX = ".tif"
TILE_PX = 512
"""Side of a tile, the COG driver's default."""
GOLDEN = 0.61803398875
"""Hue step between classes: multiples of the golden ratio never come close to one another."""


class ClassRaster:
    """A class map that is being written, from the first row to the last."""

    def __init__(self, dataset: Any, classes: tuple[str, ...]) -> None:
        self._dataset = dataset
        self._classes = classes
        self._next_row = 0

    def put(self, rows: np.ndarray) -> None:
        """Write the next rows: uint8 (rows, columns).

        Raises:
            ValueError: not uint8, or a number that is no class.
            OutputError: the disk is full or gone.
        """
        from rasterio.errors import RasterioError
        from rasterio.windows import Window

        check_classes(rows, self._classes)
        window = Window(0, self._next_row, rows.shape[1], rows.shape[0])
        try:
            self._dataset.write(rows, 1, window=window)
        except RasterioError as error:
            raise OutputError(f"rows {self._next_row} and following cannot be written: {error}") from error
        self._next_row += rows.shape[0]


@contextmanager
def stream(
    path: Path, shape: tuple[int, ...], geometry: RasterGeometry, classes: tuple[str, ...]
) -> Iterator[ClassRaster]:
    """Open a class map of `shape` (rows, columns) for writing in row order; it becomes a COG when the block ends.

    A COG cannot be written in pieces, so the rows go to a tiled file first; memory does not grow with the image.

    Raises:
        OutputError: the file cannot be written.
    """
    import rasterio
    from rasterio.shutil import copy

    names = {f"CLASS_{number}": name for number, name in enumerate(classes)}
    with complete_file(path) as final, _quiet(), rasterio.Env(GDAL_PAM_ENABLED="NO"):
        pieces = final.with_name("pieces.tif")
        tiling = _tiling(shape)
        profile = {"dtype": "uint8", "count": 1, "nodata": NODATA, "compress": "deflate", **tiling}
        with rasterio.open(pieces, "w", driver="GTiff", **profile, **_grid(shape, geometry)) as dataset:
            dataset.write_colormap(1, colours(len(classes)))
            dataset.set_band_description(1, "class")
            dataset.update_tags(1, **names)
            yield ClassRaster(dataset, classes)
        try:
            copy(
                pieces,
                final,
                driver="COG",
                compress="DEFLATE",
                predictor="NO",
                blocksize=TILE_PX,
                overview_resampling="NEAREST",
                bigtiff="IF_SAFER",
            )
        except rasterio.errors.RasterioError as error:
            raise OutputError(f"'{path.name}' cannot be written: {error}") from error


def write(path: Path, array: np.ndarray, geometry: RasterGeometry, classes: tuple[str, ...]) -> Path:
    """Write a class map, uint8 (rows, columns), as COG.

    Raises:
        OutputError: the file cannot be written.
    """
    with stream(path, array.shape, geometry, classes) as raster:
        raster.put(array)
    return path


def write_bands(path: Path, array: np.ndarray, geometry: RasterGeometry, tags: dict[str, str]) -> Path:
    """Write float32 (bands, rows, columns) with NaN as nodata: dense embeddings, one band a dimension.

    float32, because GDAL before 3.11 has no half precision.

    Raises:
        OutputError: the file cannot be written.
    """
    import rasterio

    profile = {"dtype": "float32", "count": array.shape[0], "nodata": float("nan"), "interleave": "band"}
    packing = {"compress": "deflate", "predictor": 3, **_tiling(array.shape[1:])}
    with complete_file(path) as final, _quiet(), rasterio.Env(GDAL_PAM_ENABLED="NO"):
        try:
            grid = _grid(array.shape[1:], geometry)
            with rasterio.open(final, "w", driver="GTiff", **profile, **packing, **grid) as dataset:
                dataset.write(array)
                dataset.update_tags(**tags)
        except rasterio.errors.RasterioError as error:
            raise OutputError(f"'{path.name}' cannot be written: {error}") from error
    return path


def colours(classes: int) -> dict[int, tuple[int, int, int, int]]:
    """Return a colour table (red, green, blue, alpha of 0 to 255): class 0 grey, the others far apart in hue."""
    table = {0: (190, 190, 190, 255)}
    for number in range(1, classes):
        red, green, blue = colorsys.hsv_to_rgb((0.6 + number * GOLDEN) % 1.0, 0.75, 0.9)
        table[number] = (round(255 * red), round(255 * green), round(255 * blue), 255)
    return {**table, NODATA: (0, 0, 0, 0)}


def _grid(shape: tuple[int, ...], geometry: RasterGeometry) -> dict[str, Any]:
    from affine import Affine
    from rasterio.crs import CRS

    crs = None if geometry.crs is None else CRS.from_wkt(geometry.crs)
    transform = Affine(*geometry.transform)
    # Written out, the identity would claim a place for an image that has none.
    place = {} if crs is None and transform == Affine.identity() else {"crs": crs, "transform": transform}
    return {"height": shape[0], "width": shape[1], **place}


def _tiling(shape: tuple[int, ...]) -> dict[str, Any]:
    """Tile what is larger than a tile; GDAL pads smaller images to whole tiles, which only costs space."""
    if max(shape) <= TILE_PX:
        return {}
    return {"tiled": True, "blockxsize": TILE_PX, "blockysize": TILE_PX}


@contextmanager
def _quiet() -> Iterator[None]:
    """Let an image without a coordinate system stay without one: that is no news here."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
