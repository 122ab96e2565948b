"""Vector files opened, each format at one place: GeoJSON by the standard library, the other two by pyogrio (GDAL).

GDAL chooses a driver by content and has drivers that follow paths, URLs or whole command lines found in a file (VRT,
streamed algorithms in JSON, virtual tables in SQLite). So JSON never reaches it, and GeoPackage and Shapefile only
after their structure has been checked here: magic, lengths, regular side files, no virtual tables, no views.

Sources: RFC 7946 (GeoJSON), OGC 12-128r19 (GeoPackage 1.4), ESRI Shapefile Technical Description (1998).
"""

from __future__ import annotations

import json
import os
import re
import sqlite3
import struct
import threading
import warnings
from contextlib import closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

SQLITE_MAGIC = b"SQLite format 3\0"
GEOPACKAGE_IDS = (b"GPKG", b"GP10", b"GP11")
"""SQLite's application_id at byte 68 (OGC 12-128r19, requirement 2)."""
SHAPE_MAGIC = b"\0\0\x27\x0a"

MAX_JSON_BYTES = 256 << 20
"""Python values take some ten times the text."""
MAX_BYTES = 2 << 30
"""Size of any one file of a GeoPackage or Shapefile; a .shp cannot be larger."""
KEPT_FILES = 4
"""Parsed files that are kept: a file of labels is asked for once an image."""

WGS84 = "EPSG:4326"
"""What GeoJSON is in (RFC 7946, section 4), longitude first."""
_LEGACY = re.compile(r"(?:urn:ogc:def:crs:EPSG:[\d.]*:|EPSG:)(\d{4,6})", re.IGNORECASE)
_CRS84 = re.compile(r"(?:urn:ogc:def:crs:)?OGC:[\d.]*:?CRS84|WGS ?84", re.IGNORECASE)
_SHAPE_SIDES = (".shx", ".dbf", ".prj", ".cpg", ".qpj", ".cst", ".qix", ".sbn", ".sbx", ".idm", ".ind")
_GDAL_OPTIONS = {
    "CPL_VSIL_CURL_ALLOWED_EXTENSIONS": ".none",
    "GDAL_VRT_ENABLE_PYTHON": "NO",
    "OGR_SQLITE_LIST_VIRTUAL_OGR": "NO",
    "OGR_SQLITE_LOAD_EXTENSIONS": "",
    "SHAPE_RESTORE_SHX": "NO",
}

Value: TypeAlias = str | int | float | None
_opening = threading.Lock()


@dataclass(frozen=True, slots=True, eq=False)
class Layer:
    """Features with polygons.

    Attributes:
        crs: "EPSG:number" or WKT, or None; coordinates are (x, y), which is (longitude, latitude) in degrees.
        columns: attribute values by name, one a feature; whole numbers are int.
        polygons: shapely Polygons, valid, of two dimensions, not empty; a feature may have several, or none.
        features: number of the feature of each polygon.
    """

    crs: str | None
    columns: dict[str, list[Value]]
    polygons: np.ndarray
    features: np.ndarray


def layer(path: Path) -> Layer:
    """Return the one layer of a checked vector file, from memory where the file has not changed since.

    Raises:
        ReadError: TOO_LARGE, TRUNCATED, MALFORMED, MISSING_TAG (side files, several layers), NOT_REGULAR, NON_IMAGE (no
            layer of features), DTYPE_UNSUPPORTED (points or lines).
    """
    sides = [path, *_sides(path)]
    return _layer(path, tuple((side.stat().st_mtime_ns, side.stat().st_size) for side in sides))


@lru_cache(maxsize=KEPT_FILES)
def _layer(path: Path, states: tuple[tuple[int, int], ...]) -> Layer:
    with path.open("rb") as file:
        head = file.read(100)
    limit = MAX_BYTES if head.startswith((SQLITE_MAGIC, SHAPE_MAGIC)) else MAX_JSON_BYTES
    if max(size for _, size in states) > limit:
        raise ReadError(
            f"{shown(path)} has more than {limit >> 20} MiB; cut it into parts, or burn it into a GeoTIFF",
            Reason.TOO_LARGE.name,
        )
    if head.startswith(SQLITE_MAGIC):
        return _by_gdal(path, "GPKG", _only_table(path))
    if head.startswith(SHAPE_MAGIC):
        _check_shapefile(path, head)
        return _by_gdal(path, "ESRI Shapefile", None)
    return _geojson(path)


def _malformed(path: Path, what: str) -> ReadError:
    return ReadError(f"{shown(path)} cannot be read as vectors: {what}", Reason.MALFORMED.name)


# ---------------------------------------------------------------------------------------------------------- GeoJSON


def _geojson(path: Path) -> Layer:
    """Parse a FeatureCollection, a Feature or a bare geometry."""
    try:
        data = json.loads(path.read_bytes().decode("utf-8-sig"))
    except (ValueError, RecursionError):
        raise _malformed(path, "it is not JSON") from None
    if not isinstance(data, dict):
        raise _malformed(path, "it is no GeoJSON object")
    features = {"FeatureCollection": data.get("features"), "Feature": [data]}.get(
        str(data.get("type")), [{"geometry": data, "properties": None}]
    )
    if not isinstance(features, list) or not all(isinstance(feature, dict) for feature in features):
        raise _malformed(path, "its features are no list of objects")
    properties = [feature.get("properties") or {} for feature in features]
    if not all(isinstance(entry, dict) for entry in properties):
        raise _malformed(path, "the properties of a feature are no object")
    names = dict.fromkeys(name for entry in properties for name in entry)
    columns = {name: [_value(entry.get(name)) for entry in properties] for name in names}
    geometries = np.array([_shape(feature.get("geometry"), path) for feature in features], dtype=object)
    return _assembled(path, _legacy_crs(data.get("crs"), path), columns, geometries)


def _shape(geometry: Any, path: Path) -> Any:
    """Return the shapely geometry of a GeoJSON one, None for none; coordinates after the second are dropped."""
    import shapely

    if geometry is None:
        return None
    try:
        kind = geometry["type"]
        if kind == "GeometryCollection":
            return shapely.GeometryCollection([_shape(part, path) for part in geometry["geometries"]])
        coordinates = geometry["coordinates"]
        if kind in ("Polygon", "MultiPolygon"):
            parts = [coordinates] if kind == "Polygon" else coordinates
            polygons = [_polygon(part) for part in parts if part and part[0]]
            return polygons[0] if len(polygons) == 1 else shapely.MultiPolygon(polygons)
        if kind in ("Point", "MultiPoint", "LineString", "MultiLineString"):
            # Refused later, with the others of its kind counted: where it lies does not matter.
            return shapely.Point(0, 0) if "Point" in kind else shapely.LineString([(0, 0), (1, 1)])
    except (TypeError, KeyError, IndexError, ValueError, RecursionError, shapely.errors.ShapelyError):
        raise _malformed(path, "the coordinates of a feature do not form a geometry") from None
    raise _malformed(path, "a geometry has an unknown type")


def _polygon(rings: list[Any]) -> Any:
    import shapely

    arrays = [np.array(ring, np.float64) for ring in rings]
    if any(array.ndim != 2 or array.shape[1] < 2 for array in arrays):
        raise ValueError("a position has two numbers or three")
    return shapely.Polygon(arrays[0][:, :2], [array[:, :2] for array in arrays[1:]])


def _legacy_crs(member: Any, path: Path) -> str:
    """Return the coordinate system of the 2008 specification's `crs` member; without one it is WGS84."""
    if member is None:
        return WGS84
    properties = member.get("properties") if isinstance(member, dict) else None
    name = properties.get("name") if isinstance(properties, dict) else None
    # Only names of a known form: GDAL would take a path or a URL here.
    if isinstance(name, str) and (match := _LEGACY.fullmatch(name.strip())):
        return f"EPSG:{match[1]}"
    if isinstance(name, str) and _CRS84.fullmatch(name.strip()):
        return WGS84
    raise _malformed(path, "its crs member names no EPSG code; RFC 7946 wants WGS84 without such a member")


def _value(value: Any) -> Value:
    """Return an attribute as text or number, whole numbers as int, None for null, NaN, lists and objects."""
    if isinstance(value, bool | np.bool_):
        return str(bool(value)).lower()
    if isinstance(value, str):
        return value
    if isinstance(value, int | np.integer):
        return int(value)
    if isinstance(value, float | np.floating):
        return None if np.isnan(value) else int(value) if float(value).is_integer() else float(value)
    return None


# ------------------------------------------------------------------------------------------- GeoPackage, Shapefile


def _only_table(path: Path) -> str:
    """Return the name of a GeoPackage's one table of features, seen through SQLite alone: nothing is executed."""
    wal = path.with_name(path.name + "-wal")
    if os.path.lexists(wal) and wal.stat().st_size:
        raise _malformed(path, "changes of it are not written yet (a -wal file lies beside it); close the program")
    try:
        # immutable: a database in WAL mode would otherwise get files written beside it.
        with closing(sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True)) as database:
            database.execute("PRAGMA trusted_schema = OFF")
            schema = database.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
            named = "SELECT c.table_name FROM gpkg_contents c WHERE c.data_type = 'features'"
            tables = [str(row[0]) for row in database.execute(named).fetchall()]
    except (sqlite3.Error, UnicodeDecodeError):
        raise _malformed(path, "its database is damaged or is no GeoPackage") from None
    for _, _, sql in schema:
        if re.match(r"\s*CREATE\s+VIRTUAL", str(sql or ""), re.IGNORECASE) and not re.search(
            r"\bUSING\s+\W?(rtree|fts[345])\b", str(sql), re.IGNORECASE
        ):
            raise _malformed(path, "it has virtual tables, which may lead outside the file")
    if not tables:
        raise ReadError(f"{shown(path)} has no layer of features", Reason.NON_IMAGE.name)
    if len(tables) > 1:
        raise ReadError(
            f"{shown(path)} has {len(tables)} layers; labels have one: save the layer with the classes as a file of "
            "its own",
            Reason.MISSING_TAG.name,
        )
    if not any(kind == "table" and name.casefold() == tables[0].casefold() for kind, name, _ in schema):
        raise _malformed(path, "its layer is a view; save it as a table")
    return tables[0]


def _sides(path: Path) -> list[Path]:
    """Return the files that make up a shapefile together with its .shp; [] for other files."""
    if path.suffix.lower() != ".shp":
        return []
    return [
        side for end in _SHAPE_SIDES for side in (path.with_suffix(end), path.with_suffix(end.upper())) if side.exists()
    ]


def _check_shapefile(path: Path, head: bytes) -> None:
    """Check that the parts of a shapefile are there, whole, and of one count of features."""
    sides = {side.suffix.lower(): side for side in _sides(path)}
    if missing := [end for end in (".shx", ".dbf") if end not in sides]:
        raise ReadError(
            f"{shown(path)} lies without {' and '.join(missing)} beside it; copy all files of the shapefile",
            Reason.MISSING_TAG.name,
        )
    if any(not side.is_file() for side in sides.values()):
        raise ReadError(f"a part of {shown(path)} is not a regular file", Reason.NOT_REGULAR.name)
    with sides[".dbf"].open("rb") as file:
        table = file.read(32)
    if len(head) < 100 or len(table) < 32:
        raise ReadError(f"{shown(path)} is cut: a header is missing", Reason.TRUNCATED.name)
    declared = 2 * struct.unpack(">I", head[24:28])[0]
    records, header_bytes, record_bytes = struct.unpack("<IHH", table[4:12])
    if path.stat().st_size < declared or sides[".dbf"].stat().st_size < header_bytes + records * record_bytes:
        raise ReadError(f"{shown(path)} or its .dbf is shorter than it declares", Reason.TRUNCATED.name)
    shapes = max(sides[".shx"].stat().st_size - 100, 0) // 8
    if shapes != records:
        raise _malformed(path, f"it has {shapes} shapes, its .dbf has {records} records")
    if not _index_fits(path, sides[".shx"], shapes):
        raise _malformed(path, "its .shx does not belong to it")


def _index_fits(path: Path, index: Path, count: int) -> bool:
    """Whether the index leads to records of the lengths it states, which do not overlap.

    GDAL takes what it does not find for no shape.
    """
    words = np.fromfile(index, ">i4", 2 * count, offset=100).reshape(-1, 2).astype(np.int64) * 2
    starts, lengths = words[(words != 0).any(axis=1)].T  # zeros stand for a null shape
    content = np.memmap(path, np.uint8, mode="r")
    if (starts < 100).any() or (lengths < 4).any() or (starts + 8 + lengths > len(content)).any():
        return False
    stated = content[starts[:, None] + np.arange(4, 8)].view(">i4")[:, 0].astype(np.int64) * 2
    order = np.argsort(starts)
    apart = (starts + 8 + lengths)[order][:-1] <= starts[order][1:]
    return bool((stated == lengths).all() and apart.all())


def _by_gdal(path: Path, driver: str, table: str | None) -> Layer:
    """Read a checked file with pyogrio."""
    import pyogrio
    import shapely

    options = {"IMMUTABLE": "YES"} if driver == "GPKG" else {}
    try:
        # catch_warnings changes the state of the whole process: one thread at a time.
        with _opening, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            pyogrio.set_gdal_config_options(_GDAL_OPTIONS)
            if pyogrio.read_info(path, layer=table)["driver"] != driver:
                raise _malformed(path, f"it is no {driver}")
            meta, _, geometries, fields = pyogrio.raw.read(path, layer=table, force_2d=True, **options)
    except (pyogrio.errors.DataSourceError, pyogrio.errors.DataLayerError, ValueError, RuntimeError, UnboundLocalError):
        # The last one is what pyogrio 0.13 raises for a coordinate system that does not parse.
        raise _malformed(path, f"it does not open as {driver}") from None
    columns = {
        str(name): [_value(value) for value in values] for name, values in zip(meta["fields"], fields, strict=True)
    }
    if geometries is None:
        raise ReadError(f"{shown(path)} has no geometries", Reason.NON_IMAGE.name)
    try:
        with np.errstate(all="ignore"):
            shapes = shapely.from_wkb(geometries)
    except shapely.errors.ShapelyError:
        raise _malformed(path, "a geometry is damaged, or is made of curves") from None
    return _assembled(path, meta["crs"] or None, columns, np.asarray(shapes, dtype=object))


# ---------------------------------------------------------------------------------------------------------- polygons


def _assembled(path: Path, crs: str | None, columns: dict[str, list[Value]], geometries: np.ndarray) -> Layer:
    """Return the layer of features whose geometries are polygons; invalid ones are repaired, null ones skipped.

    A ring that crosses itself is repaired by its lines (OGC Simple Features: the parts between them that are inside).
    """
    import shapely

    geometries = shapely.force_2d(geometries)
    if not np.isfinite(shapely.get_coordinates(geometries)).all():
        raise _malformed(path, "coordinates of it are not finite numbers")
    features = np.arange(len(geometries))
    # Collections may hold collections.
    for _ in range(4):
        geometries, index = shapely.get_parts(geometries, return_index=True)
        features = features[index]
    kinds = shapely.get_type_id(geometries)
    others = {"points": (kinds == 0) | (kinds == 4), "lines": np.isin(kinds, (1, 2, 5)), "collections": kinds == 7}
    counts = {name: int(mask.sum()) for name, mask in others.items() if mask.any()}
    if counts:
        what = " and ".join(f"{name} ({count})" for name, count in counts.items())
        raise ReadError(
            f"{shown(path)} holds {what}; classes are taken from polygons: buffer them to the area that they stand for",
            Reason.DTYPE_UNSUPPORTED.name,
        )
    # Coordinates near the largest float overflow in what is computed from them.
    try:
        with np.errstate(all="ignore"):
            broken = ~shapely.is_valid(geometries)
            mended = shapely.make_valid(geometries[broken])
    except shapely.errors.ShapelyError:
        raise _malformed(path, "a polygon crosses itself and cannot be repaired") from None
    if broken.any():
        repaired, index = shapely.get_parts(mended, return_index=True)
        repaired, deeper = shapely.get_parts(repaired, return_index=True)
        features = np.concatenate([features[~broken], features[broken][index][deeper]])
        geometries = np.concatenate([geometries[~broken], repaired])
    areas = (shapely.get_type_id(geometries) == 3) & ~shapely.is_empty(geometries)
    return Layer(crs, columns, geometries[areas], features[areas])
