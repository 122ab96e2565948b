"""Where a raster lies: its native grid as the file states it, pixel sizes in metres, corners on the globe."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from geomed_mae.errors import ReadError
from geomed_mae.image import RasterGeometry, degree_gsd_m
from geomed_mae.readers.geotiff.open import gdal_errors, rasterio
from geomed_mae.readers.geotiff.structure import Structure
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

if TYPE_CHECKING:
    from rasterio.crs import CRS
    from rasterio.io import DatasetReader

HALF_EQUATOR_M = 2.0e7
"""Nothing shorter spans half the globe."""
SPHERE_RADIUS_M = 6378137.0
"""Radius of the sphere of EPSG:3857 (IOGP Guidance Note 7-2, method 1024)."""


def native_grid(dataset: DatasetReader, structure: Structure, path: Path) -> tuple[RasterGeometry, list[str]]:
    """Return the native grid and flags about it: ROTATED, GCPS_IGNORED, GRID_MISSING, CRS_UNREADABLE.

    Control points are no grid, nor is a coordinate system alone: the grid is the pixels then, placed nowhere.

    Raises:
        ReadError: BAD_TRANSFORM when the transform is not finite or not invertible.
    """
    # Without a grid rasterio may hand out numbers that nobody has set.
    grid = tuple(dataset.transform)[:6] if structure.georeferenced else (1, 0, 0, 0, 1, 0)
    transform = tuple(float(value) for value in grid)
    a, b, _, d, e, _ = transform
    if not all(map(math.isfinite, transform)) or a * e - b * d == 0:
        raise ReadError(f"{shown(path)} has the transform {transform}", Reason.BAD_TRANSFORM.name)
    flags = ["ROTATED"] if b or d else []
    if dataset.gcps[0]:
        flags.append("GCPS_IGNORED")
    try:
        crs = dataset.crs
        if not structure.georeferenced:
            return RasterGeometry(None, transform, None), [*flags, "GRID_MISSING"] if crs else flags
        wkt = crs.to_wkt() if crs else None
        gsd = _gsd_m(crs, transform, (dataset.height, dataset.width)) if crs else None
    except gdal_errors():
        return RasterGeometry(None, transform, None), [*flags, "CRS_UNREADABLE"]
    return RasterGeometry(wkt, transform, gsd), flags


def _gsd_m(crs: CRS, transform: Sequence[float], shape: tuple[int, int]) -> tuple[float, float] | None:
    """Return the lengths (row step, column step) in metres at the image's centre, or None where units are unknown."""
    a, b, _, d, e, f = transform
    centre_y = d * shape[1] / 2 + e * shape[0] / 2 + f
    if crs.is_geographic:
        degrees = math.degrees(crs.units_factor[1])
        latitude = centre_y * degrees
        if abs(latitude) >= 90:
            return None
        unit_y, unit_x = degree_gsd_m(latitude, degrees, degrees)
    elif crs.is_projected:
        unit_x = crs.linear_units_factor[1]
        if 'PROJECTION["Mercator' in crs.to_wkt():
            # A Mercator metre is longer than a metre on the ground by 1 / cos(latitude): Snyder (1987), eq. 7-1.
            unit_x /= math.cosh(centre_y * unit_x / SPHERE_RADIUS_M)
        unit_y = unit_x
    else:
        return None
    return math.hypot(b * unit_x, e * unit_y), math.hypot(a * unit_x, d * unit_y)


def footprint(geometry: RasterGeometry, shape: Sequence[int]) -> tuple[tuple[float, float], ...] | None:
    """Return the four corners of a raster of `shape` (rows, columns) as WGS84 (longitude, latitude) in degrees.

    Order: upper left, upper right, lower right, lower left of the array. Longitudes run on past 180 where the raster
    crosses the antimeridian. None where there is no coordinate system or it does not reach the corners.
    """
    return footprints(geometry, shape, [(0, shape[0], 0, shape[1])])[0]


def footprints(
    geometry: RasterGeometry, shape: Sequence[int], boxes: Sequence[tuple[int, int, int, int]]
) -> list[tuple[tuple[float, float], ...] | None]:
    """Return `footprint` of parts of a raster of `shape`, each (first row, end of rows, first column, end of columns).

    All corners are projected together, which is many times faster than one part after the other.
    """
    if geometry.crs is None or not boxes:
        return [None] * len(boxes)
    rio = rasterio()
    a, b, c, d, e, f = geometry.transform
    corners = [
        corner
        for top, bottom, left, right in boxes
        for corner in ((top, left), (top, right), (bottom, right), (bottom, left))
    ]
    xs = [a * column + b * row + c for row, column in corners]
    ys = [d * column + e * row + f for row, column in corners]
    try:
        with rio.Env():
            lons, lats = rio.warp.transform(rio.crs.CRS.from_wkt(geometry.crs), "EPSG:4326", xs, ys)
    except gdal_errors():
        # No way to WGS84: a map of another planet, or a datum that PROJ cannot relate.
        return [None] * len(boxes)
    # Corners on both sides of the antimeridian look half a world apart, which a small raster cannot be.
    small = (
        geometry.gsd_m is not None and max(g * n for g, n in zip(geometry.gsd_m, shape, strict=True)) < HALF_EQUATOR_M
    )
    found: list[tuple[tuple[float, float], ...] | None] = []
    for first in range(0, len(lons), 4):
        four, north = lons[first : first + 4], lats[first : first + 4]
        if not all(map(math.isfinite, (*four, *north))):
            found.append(None)
            continue
        if small and max(four) - min(four) > 180:
            four = [lon + 360 if lon < 0 else lon for lon in four]
        found.append(tuple(zip(four, north, strict=True)))
    return found
