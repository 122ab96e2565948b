"""Polygons onto a grid of pixels: reprojected point by point, long edges cut so that they bend as the map does.

An edge is straight in the file's own coordinate system (RFC 7946, 3.1.1, for GeoJSON). In the image's system it is a
curve, so it gets points until no part of it is further than EDGE_TOLERANCE_PX from that curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, RasterGeometry
from geomed_mae.readers.geotiff.open import GDAL_OPTIONS, rasterio
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown
from geomed_mae.readers.vector.file import Layer

if TYPE_CHECKING:
    from rasterio.crs import CRS

EDGE_TOLERANCE_PX = 0.01
"""How far an edge may lie off its true curve, in pixels of the image."""
MAX_POINTS = 20_000_000
"""Points of all outlines on one image, once their edges are cut."""
SAMPLES = 33
"""Points a side at which an image's extent is carried over into the file's coordinate system."""
MARGIN = 0.1
"""Share by which that extent is widened before outlines are cut to it, so that the cuts lie outside the image."""
_FRACTIONS = (0.25, 0.5, 0.75)
_TURN = 360.0

_Points: TypeAlias = Callable[[np.ndarray], np.ndarray]


def burn(found: Layer, numbers: Sequence[int | None], background: int, onto: Image, *, path: Path) -> np.ndarray:
    """Return class numbers int16 (Y, X) on the grid of `onto`.

    Args:
        found: polygons, in any coordinate system.
        numbers: class number of each feature, None for those that are left out.
        background: number of pixels whose centre no polygon contains.
        onto: an image with a RasterGeometry; its pixels are not looked at.
        path: label file, for messages.

    Raises:
        ReadError: BAD_GEOMETRY (nothing touches the image, or one of the two has no coordinate system), MALFORMED (an
            edge around the world, or a coordinate system that is not known), TOO_LARGE.
    """
    import shapely
    from rasterio._err import CPLE_BaseError
    from rasterio.features import rasterize

    rio = rasterio()
    with rio.Env(**GDAL_OPTIONS), np.errstate(all="ignore"):
        try:
            outlines, features = _in_pixels(found, onto, path)
        except (CPLE_BaseError, rio.errors.RasterioError):
            raise ReadError(
                f"{shown(path)} cannot be placed: nothing leads from its coordinate system to the image's",
                Reason.MALFORMED.name,
            ) from None
        rows, columns = onto.spatial_shape
        frame = shapely.box(0, 0, columns, rows)
        # The outline of a neighbouring tile meets the frame, and says nothing of what is inside.
        touching = shapely.intersects(outlines, frame) & ~shapely.touches(outlines, frame)
        if not touching.any():
            raise ReadError(f"no polygon of {shown(path)} touches the image", Reason.BAD_GEOMETRY.name)
        classes = [
            (outline, numbers[feature]) for outline, feature in zip(outlines[touching], features[touching], strict=True)
        ]
        # Later shapes are burnt over earlier ones.
        shapes = sorted(((outline, n) for outline, n in classes if n is not None), key=lambda entry: entry[1])
        if not shapes:
            return np.full((rows, columns), background, np.int16)
        return rasterize(shapes, out_shape=(rows, columns), fill=background, dtype="int16", all_touched=False)


def _in_pixels(found: Layer, onto: Image, path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return polygons in (column, row) of the image, from the corner of its first pixel, and the feature of each."""
    geometry = onto.geometry
    crs, own = _system(found.crs, path), _image_system(geometry)
    if (crs is None) != (own is None):
        lacking = f"{shown(path)} (a shapefile states it in its .prj)" if crs is None else "the image"
        raise ReadError(
            f"{shown(path)} cannot be placed on the image: {lacking} has no coordinate system",
            Reason.BAD_GEOMETRY.name,
        )
    to_pixel, to_file = _maps(geometry, crs, own)
    polygons, features = found.polygons, found.features
    degrees = crs is not None and crs.is_geographic
    parts = list(_near(polygons, _extent(to_file, onto.spatial_shape, degrees=degrees, path=path), degrees, crs == own))
    if not parts:
        raise ReadError(f"no polygon of {shown(path)} lies near the image", Reason.BAD_GEOMETRY.name)
    near = np.concatenate([polygons for polygons, _ in parts])
    which = np.concatenate([index for _, index in parts])
    if degrees:
        _check_edges(polygons[np.unique(which)], path)
    if crs != own:
        near = _densified(near, to_pixel, path)
    import shapely

    moved = shapely.transform(near, to_pixel)
    if not np.isfinite(shapely.get_coordinates(moved)).all():
        raise ReadError(
            f"a polygon of {shown(path)} reaches beyond where the image's coordinate system is defined; cut it to the "
            "region of the images",
            Reason.MALFORMED.name,
        )
    return moved, features[which]


def _system(text: str | None, path: Path) -> CRS | None:
    rio = rasterio()
    if text is None:
        return None
    try:
        epsg = text.removeprefix("EPSG:") if text.startswith("EPSG:") else None
        found = rio.crs.CRS.from_epsg(int(epsg)) if epsg else rio.crs.CRS.from_wkt(text)
        # GeoPackage has an "undefined" system for plain coordinates (OGC 12-128r19, requirement 11).
        return found if found.is_geographic or found.is_projected else None
    except (rio.errors.CRSError, ValueError):
        raise ReadError(f"{shown(path)} states a coordinate system that is not known", Reason.MALFORMED.name) from None


def _image_system(geometry: RasterGeometry) -> CRS | None:
    return rasterio().crs.CRS.from_wkt(geometry.crs) if geometry.crs else None


def _maps(geometry: RasterGeometry, crs: CRS | None, own: CRS | None) -> tuple[_Points, _Points]:
    """Return the maps of points (N, 2): from the file's (x, y) to (column, row), and back."""
    warp = rasterio().warp
    ground = np.array([*geometry.transform, 0, 0, 1], np.float64).reshape(3, 3)
    pixel = np.linalg.inv(ground)

    def project(points: np.ndarray, start: CRS, end: CRS) -> np.ndarray:
        return np.column_stack([np.array(axis) for axis in warp.transform(start, end, points[:, 0], points[:, 1])])

    def to_pixel(points: np.ndarray) -> np.ndarray:
        if not len(points):
            return points
        moved = points if crs == own else project(points, crs, own)
        return moved @ pixel[:2, :2].T + pixel[:2, 2]

    def to_file(points: np.ndarray) -> np.ndarray:
        moved = points @ ground[:2, :2].T + ground[:2, 2]
        return moved if crs == own else project(moved, own, crs)

    return to_pixel, to_file


def _extent(to_file: _Points, shape: tuple[int, ...], *, degrees: bool, path: Path) -> tuple[float, ...]:
    """Return (left, bottom, right, top) around the image in the file's system, longitudes running on past 180."""
    columns, rows = np.meshgrid(np.linspace(0, shape[1], SAMPLES), np.linspace(0, shape[0], SAMPLES))
    points = to_file(np.column_stack([columns.ravel(), rows.ravel()]))
    points = points[np.isfinite(points).all(axis=1)]
    if not len(points):
        raise ReadError(
            f"{shown(path)} cannot be placed: the image lies where its coordinate system is not defined",
            Reason.BAD_GEOMETRY.name,
        )
    if degrees:
        middle = points[len(points) // 2, 0]
        points[:, 0] = middle + (points[:, 0] - middle + _TURN / 2) % _TURN - _TURN / 2
    low, high = points.min(axis=0), points.max(axis=0)
    if degrees and high[0] - low[0] > _TURN / 2:
        # Around a pole: all longitudes, and the pole itself, which no sample need hit.
        low[0], high[0] = -_TURN / 2, _TURN / 2
        if points[:, 1].mean() > 0:
            high[1] = 90.0
        else:
            low[1] = -90.0
    spare = (high - low) * MARGIN
    return (*(low - spare), *(high + spare))


def _near(
    polygons: np.ndarray, extent: tuple[float, ...], degrees: bool, same: bool
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield (polygons near the image, their numbers), in degrees once for each turn around the globe that meets it.

    Where they will be reprojected they are cut to the extent: a country's border has no business in a chip's pixels.
    """
    import shapely

    box = shapely.box(*extent)
    for turn in (0.0, -_TURN, _TURN) if degrees else (0.0,):
        frame = shapely.box(extent[0] - turn, extent[1], extent[2] - turn, extent[3])
        index = np.flatnonzero(shapely.intersects(polygons, frame))
        if not len(index):
            continue
        near = shapely.transform(polygons[index], lambda points, turn=turn: points + np.array([turn, 0.0]))
        if not same:
            whole = shapely.covered_by(near, box)
            cut, owner = shapely.get_parts(shapely.intersection(near[~whole], box), return_index=True)
            near = np.concatenate([near[whole], cut])
            index = np.concatenate([index[whole], index[~whole][owner]])
        areas = (shapely.get_type_id(near) == 3) & ~shapely.is_empty(near)
        if areas.any():
            yield near[areas], index[areas]


def _check_edges(polygons: np.ndarray, path: Path) -> None:
    """Refuse edges of more than half the globe, save those of boxes around all of it.

    They are polygons that cross the antimeridian and were not cut there (RFC 7946, 3.1.9): taken literally, they cover
    the rest of the world.
    """
    import shapely

    rings, _ = shapely.get_rings(polygons, return_index=True)
    points, owner = shapely.get_coordinates(rings, return_index=True)
    long = (np.abs(np.diff(points[:, 0])) > _TURN / 2) & (np.diff(owner) == 0)
    around = np.abs(np.abs(points[:, 0]) - _TURN / 2) < 1e-6
    if (long & ~(around[:-1] & around[1:])).any():
        raise ReadError(
            f"a polygon of {shown(path)} has an edge of more than 180 degrees of longitude; cut it at the antimeridian "
            "(RFC 7946, 3.1.9)",
            Reason.MALFORMED.name,
        )


def _densified(polygons: np.ndarray, to_pixel: _Points, path: Path) -> np.ndarray:
    """Return the polygons with points added, so that the moved edges keep to EDGE_TOLERANCE_PX."""
    import shapely

    dense, step = polygons, np.inf
    while True:
        rings = shapely.get_rings(dense)
        points, owner = shapely.get_coordinates(rings, return_index=True)
        edges = np.flatnonzero(np.diff(owner) == 0)
        start, end = points[edges], points[edges + 1]
        moved = to_pixel(points)
        off = np.zeros(len(edges))
        for fraction in _FRACTIONS:
            true = to_pixel(start + (end - start) * fraction)
            straight = moved[edges] + (moved[edges + 1] - moved[edges]) * fraction
            off = np.maximum(off, np.linalg.norm(true - straight, axis=1))
        worst = float(np.max(off, initial=0.0))
        if worst <= EDGE_TOLERANCE_PX or not np.isfinite(worst):
            return dense
        lengths = np.linalg.norm(end - start, axis=1)
        # The distance between a chord and its arc goes with the square of the chord's length.
        step = min(step, float(lengths.max())) * min(0.7, 0.9 * (EDGE_TOLERANCE_PX / worst) ** 0.5)
        if np.ceil(lengths / step).sum() > MAX_POINTS:
            raise ReadError(
                f"the edges of {shown(path)} need more than {MAX_POINTS} points on this image; cut its polygons to the "
                "region of the images",
                Reason.TOO_LARGE.name,
            )
        dense = shapely.segmentize(polygons, step)
