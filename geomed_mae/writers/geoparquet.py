"""Embedding tables: GeoParquet 1.1 (geoparquet.org/releases/v1.1.0) where images have a place, Parquet where not.

Columns: `id` (the image's opaque key), `embedding` (list of float32), and for rasters `geometry` (WKB, longitude and
latitude on WGS84) with its `bbox` covering column, so that readers skip row groups by place. File metadata: `geo` as
the standard says, and `emb` in the form of the CNG's embedding products (version, model, embedding). Compression: ZSTD.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.writers import complete_file

GEO_VERSION = "1.1.0"
EMB_VERSION = "0.0.1"
WKB_POLYGON, WKB_MULTIPOLYGON = 3, 6
"""Geometry codes of OGC 06-103r4, section 8.2.8."""
HALF_TURN = 180.0

Ring = Sequence[tuple[float, float]]


def write(
    path: Path,
    keys: Sequence[str],
    embeddings: np.ndarray,
    footprints: Sequence[Ring | None] | None,
    model: dict[str, Any],
) -> Path:
    """Write one row an image.

    Args:
        path: file to write.
        keys: opaque keys, one a row.
        embeddings: float32 (rows, dimensions).
        footprints: corners (longitude, latitude) of each image in ring order, None for an image without a place;
            None instead of a list writes plain Parquet.
        model: plain values that say which encoder made the numbers; stored under `emb.model`.

    Raises:
        OutputError: the file cannot be written.
    """
    import pyarrow as pa

    vectors = pa.ListArray.from_arrays(
        pa.array(np.arange(len(keys) + 1) * embeddings.shape[1], type=pa.int32()),
        pa.array(np.ascontiguousarray(embeddings, dtype=np.float32).ravel()),
    )
    size = {"dim": int(embeddings.shape[1]), "quantization": "none"}
    about = json.dumps({"version": EMB_VERSION, "model": model, "embedding": size})
    return write_columns(path, {"id": list(keys), "embedding": vectors}, footprints, {"emb": about})


def write_columns(
    path: Path, columns: Mapping[str, Any], footprints: Sequence[Ring | None] | None, about: Mapping[str, str]
) -> Path:
    """Write any columns of one value an image, and with `footprints` where the images lie; see `write`.

    Args:
        path: file to write.
        columns: name -> values, or a pyarrow array.
        footprints: as of `write`.
        about: further metadata of the file.

    Raises:
        OutputError: the file cannot be written.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, metadata = dict(columns), dict(about)
    if footprints is not None:
        parts = [None if ring is None else split_at_antimeridian(ring) for ring in footprints]
        columns["geometry"] = pa.array([None if p is None else wkb(p) for p in parts], type=pa.binary())
        box = pa.struct([(name, pa.float64()) for name in ("xmin", "ymin", "xmax", "ymax")])
        columns["bbox"] = pa.array([None if p is None else _bounds(p) for p in parts], type=box)
        metadata["geo"] = json.dumps(_geo([p for p in parts if p is not None]))
    table = pa.table(columns).replace_schema_metadata(metadata)
    with complete_file(path) as final:
        pq.write_table(table, final, compression="zstd")
    return path


def split_at_antimeridian(ring: Ring) -> list[list[tuple[float, float]]]:
    """Return the ring, counter-clockwise and closed, or its two parts where it crosses longitude 180.

    A ring is taken to cross when it spans more than half the globe (RFC 7946, section 3.1.9, says to cut there).
    """
    corners = [(float(x), float(y)) for x, y in ring]
    corners = corners[:-1] if corners[0] == corners[-1] else corners
    longitudes = [x for x, _ in corners]
    if max(longitudes) - min(longitudes) <= HALF_TURN:
        return [_closed(corners)]
    eastward = [(x + 360.0 if x < 0 else x, y) for x, y in corners]
    east = _clipped(eastward, keep_below=True)
    west = [(x - 360.0, y) for x, y in _clipped(eastward, keep_below=False)]
    return [_closed(part) for part in (east, west) if len(part) >= 3]


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


def _bounds(parts: list[list[tuple[float, float]]]) -> dict[str, float]:
    """Two parts of a cut polygon span the globe here: a reader that prunes by this box then keeps the row."""
    xs, ys = zip(*(corner for ring in parts for corner in ring), strict=True)
    return {"xmin": min(xs), "ymin": min(ys), "xmax": max(xs), "ymax": max(ys)}


def _geo(parts: list[list[list[tuple[float, float]]]]) -> dict[str, Any]:
    """The `geo` metadata; without a `crs` the standard says OGC:CRS84, longitude first."""
    types = sorted({"Polygon" if len(entry) == 1 else "MultiPolygon" for entry in parts})
    column: dict[str, Any] = {
        "encoding": "WKB",
        "geometry_types": types,
        "orientation": "counterclockwise",
        "covering": {"bbox": {name: ["bbox", name] for name in ("xmin", "ymin", "xmax", "ymax")}},
    }
    if parts:
        column["bbox"] = list(_bounds([ring for entry in parts for ring in entry]).values())
    return {"version": GEO_VERSION, "primary_column": "geometry", "columns": {"geometry": column}}
