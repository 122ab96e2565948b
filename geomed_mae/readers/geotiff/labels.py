"""Class numbers from a GeoTIFF, placed on an image's grid by coordinates. Only labels are ever resampled, by nearest.

The class of a pixel is that of the label pixel which contains the pixel's centre. Each centre is projected by itself
(PROJ, through GDAL) where the two have different coordinate systems: GDAL's warper would interpolate positions, and
its virtual data sets are a driver that `geotiff.open` switches off.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, RasterGeometry
from geomed_mae.readers.geotiff.grid import native_grid
from geomed_mae.readers.geotiff.open import opened, rasterio
from geomed_mae.readers.geotiff.structure import nodata_value
from geomed_mae.readers.labels import IGNORE, LabelQuery, Labels
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

MAX_CLASS = np.iinfo(np.int16).max
GRID_TOLERANCE_PX = 1e-6
"""Pixel centres that fall this close before a label pixel's edge belong to the next: rounding of transforms."""
CHUNK_PIXELS = 1 << 18
"""Pixels placed at a time, so that coordinates of a large image do not fill memory."""

_ToLabel: TypeAlias = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


def read_labels(path: Path, onto: Image, query: LabelQuery) -> Labels:
    """Read the single band of integers at `path` as stored values int16 (Y, X) on the grid of `onto`.

    Pixels outside the label raster, at its nodata or at a value in `query.ignore`, or masked or transparent in it are
    IGNORE. A colour map is fine.

    Raises:
        ReadError: BAD_GEOMETRY (no overlap, or only one of the two has a coordinate system), BAND_MISMATCH (several
            bands), BAD_TRANSFORM, DTYPE_UNSUPPORTED (not integers, or a class number out of range), or a reason of
            opening.
    """
    if not isinstance(onto.geometry, RasterGeometry):
        raise ReadError(f"{shown(path)} is a raster of labels; the image is not a raster", Reason.BAD_GEOMETRY.name)
    with opened(path, labels=True) as (dataset, structure):
        bands = [n for n, colour in enumerate(dataset.colorinterp, start=1) if colour.name != "alpha"]
        if len(bands) != 1:
            raise ReadError(f"{shown(path)} has {len(bands)} bands; labels have one", Reason.BAND_MISMATCH.name)
        dtype = np.dtype(dataset.dtypes[bands[0] - 1])
        if dtype.kind not in "iu":
            raise ReadError(f"{shown(path)} has {dtype} pixels; labels are integers", Reason.DTYPE_UNSUPPORTED.name)
        nodata = None if structure.nodata is None else nodata_value(structure.nodata, dtype.name)
        unknown = query.ignore if nodata is None else (*query.ignore, nodata)
        grid, _ = native_grid(dataset, structure, path)
        classes = _placed(dataset, bands[0], onto, path, grid=grid, unknown=unknown)
    return Labels(classes)


def _placed(
    dataset: DatasetReader,
    band: int,
    onto: Image,
    path: Path,
    *,
    grid: RasterGeometry,
    unknown: Sequence[np.generic | int],
) -> np.ndarray:
    """Return int16 (Y, X) classes on the grid of `onto`, IGNORE where the label raster holds a value in `unknown`.

    `grid` is the label raster's own.
    """
    geometry, shape = onto.geometry, onto.spatial_shape
    if bool(geometry.crs) != bool(grid.crs):
        lacking = shown(path) if geometry.crs else "the image"
        raise ReadError(
            f"{shown(path)} cannot be placed on the image: {lacking} has no coordinate system",
            Reason.BAD_GEOMETRY.name,
        )
    found, known, touched = _under_centres(dataset, band, _to_label(grid, geometry), shape)
    if not touched:
        raise ReadError(f"the labels of {shown(path)} do not overlap the image", Reason.BAD_GEOMETRY.name)
    for value in unknown:
        known &= found != value
    values = found[known]
    if values.size and (int(values.min()) < IGNORE or int(values.max()) > MAX_CLASS):
        raise ReadError(
            f"{shown(path)} has class numbers from {values.min()} to {values.max()}; they go from {IGNORE} (ignore) "
            f"to {MAX_CLASS}. Declare the number that means 'no label' as nodata, or list it in labels.ignore",
            Reason.DTYPE_UNSUPPORTED.name,
        )
    classes = np.full(shape, IGNORE, np.int16)
    classes[known] = values.astype(np.int16)
    return classes


def _under_centres(
    dataset: DatasetReader, band: int, to_label: _ToLabel, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, bool]:
    """Return (stored value, whether it is valid), both (Y, X), by containing label pixel, and whether any is inside."""
    found, valid = np.zeros(shape, dataset.dtypes[band - 1]), np.zeros(shape, np.bool_)
    touched = False
    columns = np.arange(shape[1])[None, :] + 0.5
    step = max(1, CHUNK_PIXELS // shape[1])
    for start in range(0, shape[0], step):
        rows = np.arange(start, min(start + step, shape[0]))[:, None] + 0.5
        at_row, at_column = (np.floor(value + GRID_TOLERANCE_PX) for value in to_label(rows, columns))
        hit = (at_row >= 0) & (at_row < dataset.height) & (at_column >= 0) & (at_column < dataset.width)
        if not hit.any():
            continue
        touched = True
        at_row, at_column = at_row[hit].astype(np.intp), at_column[hit].astype(np.intp)
        # Only the part under these rows is read: the label raster may be a country, the image a chip.
        top, left = int(at_row.min()), int(at_column.min())
        window = rasterio().windows.Window(left, top, int(at_column.max()) - left + 1, int(at_row.max()) - top + 1)
        part = slice(start, start + rows.shape[0])
        found[part][hit] = dataset.read(band, window=window)[at_row - top, at_column - left]
        valid[part][hit] = dataset.read_masks(band, window=window)[at_row - top, at_column - left] > 0
    return found, valid, touched


def _to_label(grid: RasterGeometry, geometry: RasterGeometry) -> _ToLabel:
    """Return the map from image (row, column) to label (row, column), in pixels from the upper left corners."""
    rio = rasterio()
    ground = np.array([*geometry.transform, 0, 0, 1], np.float64).reshape(3, 3)
    label = np.linalg.inv(np.array([*grid.transform, 0, 0, 1], np.float64).reshape(3, 3))
    crs, label_crs = (rio.crs.CRS.from_wkt(place.crs) if place.crs else None for place in (geometry, grid))

    def affine(matrix: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return matrix[0, 0] * x + matrix[0, 1] * y + matrix[0, 2], matrix[1, 0] * x + matrix[1, 1] * y + matrix[1, 2]

    def one_system(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        column, row = affine(label @ ground, columns, rows)
        return row, column

    def two_systems(rows: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        xs, ys = affine(ground, columns, rows)
        moved = rio.warp.transform(crs, label_crs, xs.ravel(), ys.ravel())
        column, row = affine(label, *(np.array(values).reshape(xs.shape) for values in moved))
        return row, column

    return one_system if crs is None or crs == label_crs else two_systems
