"""Tables of images with their place: GeoParquet 1.1 (geoparquet.org/releases/v1.1.0), Parquet where nothing has one.

Images with a place have `geometry` (WKB, longitude and latitude on WGS84) and its `bbox` covering column, so that
readers skip row groups by place; in a table with both kinds those without have neither. File metadata: `geo` as the
standard says. Compression: ZSTD.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.writers import complete_file

GEO_VERSION = "1.1.0"
BOUNDS = ("xmin", "ymin", "xmax", "ymax")
WKB_POLYGON, WKB_MULTIPOLYGON = 3, 6
"""Geometry codes of OGC 06-103r4, section 8.2.8."""
HALF_TURN = 180.0

Ring = Sequence[tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Placed:
    """A footprint as the table holds it.

    Attributes:
        wkb: well-known binary.
        bounds: (xmin, ymin, xmax, ymax) in degrees.
        parts: 1, or 2 where it is cut at the antimeridian.
        centre: (longitude, latitude) of the middle of its corners.
    """

    wkb: bytes
    bounds: tuple[float, float, float, float]
    parts: int
    centre: tuple[float, float]

    @classmethod
    def of(cls, ring: Ring) -> Placed:
        """Return a ring of corners (longitude, latitude), in degrees, as it goes into the table."""
        parts = split_at_antimeridian(ring)
        xs, ys = zip(*_open(ring), strict=True)
        longitude = (sum(xs) / len(xs) + HALF_TURN) % (2 * HALF_TURN) - HALF_TURN
        return cls(wkb(parts), _bounds(parts), len(parts), (longitude, sum(ys) / len(ys)))


def write_columns(
    path: Path, columns: Mapping[str, Any], footprints: Sequence[Ring | None] | None, about: Mapping[str, str]
) -> Path:
    """Write any columns of one value an image, and with `footprints` where the images lie.

    Args:
        path: file to write.
        columns: name -> values, or a pyarrow array.
        footprints: corners (longitude, latitude) of each image in ring order, None for an image without a place;
            None instead of a list writes plain Parquet.
        about: further metadata of the file.

    Raises:
        OutputError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, metadata = dict(columns), dict(about)
    if footprints is not None:
        placed = [None if ring is None else Placed.of(ring) for ring in footprints]
        columns |= place_columns(placed)
        metadata["geo"] = geo_metadata([place for place in placed if place is not None])
    table = pa.table(columns).replace_schema_metadata(metadata)
    with complete_file(path) as final:
        pq.write_table(table, final, compression="zstd")
    return path


def place_columns(placed: Sequence[Placed | None]) -> dict[str, Any]:
    """Return the columns `geometry` and `bbox` as pyarrow arrays, null where there is no place."""
    import pyarrow as pa

    box = pa.struct([(name, pa.float64()) for name in BOUNDS])
    bounds = [None if place is None else dict(zip(BOUNDS, place.bounds, strict=True)) for place in placed]
    return {
        "geometry": pa.array([None if place is None else place.wkb for place in placed], type=pa.binary()),
        "bbox": pa.array(bounds, type=box),
    }


def geo_metadata(placed: Sequence[Placed]) -> str:
    """Return the file's `geo` metadata; without a `crs` the standard says OGC:CRS84, longitude first."""
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": sorted({"Polygon" if place.parts == 1 else "MultiPolygon" for place in placed}),
        "orientation": "counterclockwise",
        "covering": {"bbox": {name: ["bbox", name] for name in BOUNDS}},
    }
    if placed:
        sides = np.array([place.bounds for place in placed])
        column["bbox"] = [*sides[:, :2].min(axis=0).tolist(), *sides[:, 2:].max(axis=0).tolist()]
    return json.dumps({"version": GEO_VERSION, "primary_column": "geometry", "columns": {"geometry": column}})


def split_at_antimeridian(ring: Ring) -> list[list[tuple[float, float]]]:
    """Return the ring, counter-clockwise and closed, or its two parts where it crosses longitude 180.

    Longitudes of a ring that crosses run on past 180, as those of `Row.footprint` do: a ring from -179 to 179 is a map
    of the world. It is cut as RFC 7946, section 3.1.9, says.
    """
    corners = _open(ring)
    if min(x for x, _ in corners) < -HALF_TURN:
        corners = [(x + 2 * HALF_TURN, y) for x, y in corners]
    if max(x for x, _ in corners) <= HALF_TURN:
        return [_closed(corners)]
    east = _clipped(corners, keep_below=True)
    west = [(x - 2 * HALF_TURN, y) for x, y in _clipped(corners, keep_below=False)]
    return [_closed(part) for part in (east, west) if len(part) >= 3]


def _open(ring: Ring) -> list[tuple[float, float]]:
    """Return the corners, the first of them once."""
    corners = [(float(x), float(y)) for x, y in ring]
    return corners[:-1] if corners[0] == corners[-1] else corners


def _clipped(corners: list[tuple[float, float]], *, keep_below: bool) -> list[tuple[float, float]]:
    """Clip a ring at x = 180 (Sutherland & Hodgman 1974, one edge)."""
    kept = []
    for (x0, y0), (x1, y1) in zip(corners, [*corners[1:], corners[0]], strict=True):
        inside0, inside1 = (x0 <= HALF_TURN) == keep_below, (x1 <= HALF_TURN) == keep_below
        if inside0:
            kept.append((x0, y0))
        if inside0 != inside1:
            kept.append((HALF_TURN, y0 + (y1 - y0) * (HALF_TURN - x0) / (x1 - x0)))
    return kept


def _closed(corners: list[tuple[float, float]]) -> list[tuple[float, float]]:
    following = [*corners[1:], corners[0]]
    area = sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in zip(corners, following, strict=True))
    ordered = corners if area >= 0 else corners[::-1]
    return [*ordered, ordered[0]]


def wkb(parts: list[list[tuple[float, float]]]) -> bytes:
    """Return little-endian well-known binary: a polygon, or a multipolygon when there are several parts."""
    polygons = [
        struct.pack("<BIII", 1, WKB_POLYGON, 1, len(ring)) + b"".join(struct.pack("<2d", *corner) for corner in ring)
        for ring in parts
    ]
    if len(polygons) == 1:
        return polygons[0]
    return struct.pack("<BII", 1, WKB_MULTIPOLYGON, len(polygons)) + b"".join(polygons)


def _bounds(parts: list[list[tuple[float, float]]]) -> tuple[float, float, float, float]:
    """Two parts of a cut polygon span the globe here: a reader that prunes by this box then keeps the row."""
    xs, ys = zip(*(corner for ring in parts for corner in ring), strict=True)
    return min(xs), min(ys), max(xs), max(ys)
