"""Footprints on the globe: which overlap, which are closer than a buffer, which block of an equal-area grid has them.

A footprint is a ring of (longitude, latitude) in degrees, as `Row.footprint` has it; longitudes may run on past 180.
Areas and distances are those of a sphere of the Earth's surface area (authalic radius 6371007.2 m, Snyder 1987, table
1), in the Lambert azimuthal equal-area projection centred on the pair that is compared (Snyder 1987, eq. 22-4 and
24-2 to 24-4): no pole and no antimeridian is special. Against the ellipsoid a distance is wrong by at most 0.6 %.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Iterator, Sequence
from types import ModuleType
from typing import Any

import numpy as np

from geomed_mae.archives.components import Components
from geomed_mae.errors import MissingExtraError

Ring = tuple[tuple[float, float], ...]

EARTH_M = 6371007.2
"""Radius in metres of the sphere with the surface area of WGS84."""

MIN_OVERLAP = 0.01
"""Share of the smaller footprint beyond which two images show the same place."""

MIN_SHARED_PIXELS = 64
"""Pixels that the coarser of two images must have in the overlap: a chip of 10 m inside one pixel of a world map is not
the same picture, and one world map must not tie a whole archive into a single group."""

ELLIPSOID_MARGIN = 1.006
"""Distances are compared with a buffer this much wider, so that the ellipsoid never makes it too narrow."""

_EDGE_POINTS = 8
_HALF_GLOBE = math.radians(80)
"""Footprints of a larger angular radius are taken to be everywhere: their corners say little about their outline."""


def shapely() -> ModuleType:
    """Return shapely.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        return importlib.import_module("shapely")
    except ImportError:
        raise MissingExtraError("comparing footprints", "shapely", "geo") from None


def block_of(longitude: float, latitude: float, block_m: float) -> tuple[int, int]:
    """Return the (row, column) of the block of an equal-area grid that a point lies in.

    The globe is cut into rows of equal height, and each row into a whole number of columns whose width at the row's
    middle is nearest to `block_m` (Rossow & Garder 1984, J. Climate Appl. Meteor. 23, 1253-1257): no block is cut by
    the antimeridian, and the rows at the poles have three.
    """
    rows = max(1, round(math.pi * EARTH_M / block_m))
    row = min(int((latitude + 90.0) / 180.0 * rows), rows - 1)
    middle = math.radians((row + 0.5) / rows * 180.0 - 90.0)
    columns = max(1, round(2 * math.pi * EARTH_M * math.cos(middle) / block_m))
    # A longitude a rounding error below 360 must not get a column of its own.
    return row, int((longitude + 180.0) % 360.0 / 360.0 * columns) % columns


class Place:
    """One footprint as points on the unit sphere.

    Attributes:
        outline: float64 (n, 3), the ring's edges cut into eighths.
        centre: float64 (3,).
        radius: angle in radians from the centre to the furthest point.
        everywhere: True for a footprint too large for its corners to describe it.
    """

    def __init__(self, ring: Ring) -> None:
        self.outline = _outline(np.array(ring, dtype=np.float64))
        mean = self.outline.mean(axis=0)
        length = float(np.linalg.norm(mean))
        width = max(lon for lon, _ in ring) - min(lon for lon, _ in ring)
        self.centre = mean / length if length > 1e-6 else np.array([0.0, 0.0, 1.0])
        self.radius = float(np.arccos(np.clip(self.outline @ self.centre, -1, 1)).max())
        self.everywhere = length < 1e-6 or self.radius > _HALF_GLOBE or (width >= 180 and not _rounds_a_pole(ring))

    @property
    def longitude_latitude(self) -> tuple[float, float]:
        """Centre in degrees."""
        x, y, z = self.centre
        return math.degrees(math.atan2(y, x)), math.degrees(math.asin(max(-1.0, min(1.0, z))))

    def boxes(self, margin: float) -> list[tuple[float, float, float, float]]:
        """Return boxes (west, south, east, north) in degrees around all that lies within `margin` radians of it.

        Two where it crosses the antimeridian; the whole width of the map where it reaches a pole.
        """
        lon, lat = self.longitude_latitude
        reach = math.degrees(self.radius + margin)
        south, north = lat - reach, lat + reach
        if self.everywhere:
            return [(-180.0, -90.0, 180.0, 90.0)]
        if south <= -90 or north >= 90:
            return [(-180.0, south, 180.0, north)]
        # The meridians that a small circle touches: Snyder's spherical triangle with the right angle at the contact.
        half = math.degrees(math.asin(math.sin(math.radians(reach)) / math.cos(math.radians(lat))))
        west, east = lon - half, lon + half
        boxes = [(west, south, east, north)]
        if west < -180:
            boxes.append((west + 360, south, 180.0, north))
        if east > 180:
            boxes.append((-180.0, south, east - 360, north))
        return boxes


def _rounds_a_pole(ring: Ring) -> bool:
    lons = np.array([lon for lon, _ in ring])
    turns = (np.diff(np.append(lons, lons[0])) + 180.0) % 360.0 - 180.0
    return bool(abs(turns.sum()) > 180)


def _outline(corners: np.ndarray) -> np.ndarray:
    """Cut edges into eighths, straight in longitude and latitude; around a pole along great circles."""
    following = np.roll(corners, -1, axis=0)
    share = (np.arange(_EDGE_POINTS) / _EDGE_POINTS)[:, None]
    if _rounds_a_pole(tuple(map(tuple, corners))):
        start, end = _on_sphere(corners), _on_sphere(following)
        points = np.concatenate([a + (b - a) * share for a, b in zip(start, end, strict=True)])
        return points / np.linalg.norm(points, axis=1, keepdims=True)
    return _on_sphere(np.concatenate([a + (b - a) * share for a, b in zip(corners, following, strict=True)]))


def _on_sphere(degrees: np.ndarray) -> np.ndarray:
    lon, lat = np.radians(degrees).T
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=1)


def _flat(places: Sequence[Place]) -> list[np.ndarray]:
    """Return the outlines in metres on one Lambert azimuthal equal-area map, float64 (n, 2) each."""
    middle = sum(place.centre for place in places)
    length = float(np.linalg.norm(middle))
    middle = middle / length if length > 1e-6 else places[0].centre
    # Any axis not along the centre will do: areas and distances do not depend on the map's rotation.
    helper = np.eye(3)[np.argmin(np.abs(middle))]
    east = np.cross(helper, middle)
    east /= np.linalg.norm(east)
    north = np.cross(middle, east)
    flat = []
    for place in places:
        cosine = np.clip(place.outline @ middle, -1 + 1e-9, 1)
        factor = EARTH_M * np.sqrt(2 / (1 + cosine))
        flat.append(np.stack([place.outline @ east * factor, place.outline @ north * factor], axis=1))
    return flat


def _polygons(places: Sequence[Place]) -> list:
    library = shapely()
    # A scene that is folded over (corners in a crossed order) has no area of its own; its hull is the honest outline.
    polygons = [library.Polygon(outline) for outline in _flat(places)]
    return [polygon if polygon.is_valid else polygon.convex_hull for polygon in polygons]


def _overlap(one: Place, other: Place, pixel_m2: float) -> bool:
    """Say whether two places overlap by enough ground and by MIN_SHARED_PIXELS of `pixel_m2`."""
    if one.everywhere and other.everywhere:
        return True
    if one.everywhere or other.everywhere:
        shared = _polygons((other if one.everywhere else one,))[0].area
        return shared >= MIN_SHARED_PIXELS * pixel_m2
    if _gap(one, other) > 0:
        return False
    first, second = _polygons((one, other))
    shared, smaller = first.intersection(second).area, min(first.area, second.area)
    return shared > MIN_OVERLAP * smaller and shared >= MIN_SHARED_PIXELS * pixel_m2


def _gap(one: Place, other: Place) -> float:
    """Return the angle in radians between the circles around two footprints: never more than their true distance."""
    between = float(np.arccos(np.clip(one.centre @ other.centre, -1, 1)))
    return max(between - one.radius - other.radius, 0.0)


def distance_m(one: Place, other: Place) -> float:
    """Return the distance in metres between two footprints: 0 where they touch.

    A lower bound beyond a quarter of the globe, where no plane map of both is worth anything.
    """
    if one.everywhere or other.everywhere:
        return 0.0
    if (gap := _gap(one, other)) > math.pi / 2:
        return gap * EARTH_M
    first, second = _polygons((one, other))
    return float(first.distance(second))


def candidates(places: Sequence[Place], within_m: float) -> Iterator[tuple[int, int]]:
    """Yield every pair (i < j) of places that may be within `within_m` of one another, some of them more than once."""
    library = shapely()
    boxes, owners = [], []
    for number, place in enumerate(places):
        for box in place.boxes(within_m * ELLIPSOID_MARGIN / EARTH_M):
            boxes.append(box)
            owners.append(number)
    if not boxes:
        return
    polygons = library.box(*np.array(boxes).T)
    tree = library.STRtree(polygons)
    for number, polygon in zip(owners, polygons, strict=True):
        for found in tree.query(polygon):
            if number < owners[found]:
                yield number, owners[found]


def overlapping(footprints: Sequence[Ring | None], pixels_m2: Sequence[float | None] | None = None) -> list[int | None]:
    """Return a component number per footprint: the same where footprints overlap, directly or through others.

    Overlap is more than 1 % of the smaller area, so that neighbouring tiles that share an edge stay apart, and at least
    MIN_SHARED_PIXELS of the coarser image. None for an image without a footprint.

    Args:
        footprints: corners (longitude, latitude) in degrees of each image, or None.
        pixels_m2: ground area of each image's pixel, None where unknown (any overlap counts then).

    Raises:
        MissingExtraError: shapely is not installed (not asked for fewer than two different footprints).
    """
    sizes = [0.0 if size is None else size for size in pixels_m2 or [None] * len(footprints)]
    different: dict[tuple[Ring, float], int] = {}
    numbers = [
        None if ring is None else different.setdefault((ring, size), len(different))
        for ring, size in zip(footprints, sizes, strict=True)
    ]
    components = Components(len(different))
    if len(different) > 1:
        places, areas = [Place(ring) for ring, _ in different], [size for _, size in different]
        for one, other in candidates(places, 0.0):
            # The exact test is the dear one: pairs that are already together are spared it.
            if components.of(one) == components.of(other):
                continue
            if _overlap(places[one], places[other], max(areas[one], areas[other])):
                components.join(one, other)
    return [None if number is None else components.of(number) for number in numbers]


def closer_than(rings: Sequence[Ring], buffer_m: float, sides: Sequence[Any]) -> list[tuple[int, int]]:
    """Return the pairs (i < j) of footprints on different `sides` that are not more than `buffer_m` apart.

    Raises:
        MissingExtraError: shapely is not installed.
    """
    places = [Place(ring) for ring in rings]
    return sorted(
        (one, other)
        for one, other in set(candidates(places, buffer_m))
        if sides[one] != sides[other] and distance_m(places[one], places[other]) <= buffer_m * ELLIPSOID_MARGIN
    )


def rounded_bounds(footprints: Iterable[Ring | None], degrees: float = 1.0) -> tuple[float, float, float, float] | None:
    """Return (west, south, east, north) around all footprints, widened to whole `degrees`; None without a footprint.

    East is above 180 where the shortest box crosses the antimeridian.
    """
    rings = [ring for ring in footprints if ring is not None]
    if not rings:
        return None
    lats = [lat for ring in rings for _, lat in ring]
    spans = sorted((min(lon for lon, _ in ring), max(lon for lon, _ in ring)) for ring in rings)
    spans = sorted((west % 360.0, west % 360.0 + east - west) for west, east in spans)
    # The box leaves out the widest gap between footprints on the circle of longitudes.
    gap, west, east = 0.0, 180.0, 540.0
    reached = max(end - 360.0 for _, end in spans)
    for start, end in spans:
        if start - reached > gap:
            gap, west, east = start - reached, start, reached + 360.0
        reached = max(reached, end)
    turn = 360.0 * math.floor((west + 180.0) / 360.0)
    low, high = ((west - turn) / degrees, min(lats) / degrees), ((east - turn) / degrees, max(lats) / degrees)
    # A tenth of a millimetre beyond a whole degree is a rounding error of the projection.
    return (*(math.floor(v + 1e-9) * degrees for v in low), *(math.ceil(v - 1e-9) * degrees for v in high))
