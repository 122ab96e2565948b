"""Vector labels: polygons with a class, in GeoJSON, GeoPackage or Shapefile, burnt onto an image's grid.

A pixel belongs to a polygon that contains its centre. Where polygons overlap, the class with the higher number lies on
top; what none covers is the query's background. The class is read from `LabelQuery.column`, or from the only text or
integer attribute there is. A polygon without a class is IGNORE: something is there, and nobody said what.

Vector files are never images. One file may cover a whole archive: it is parsed once and kept while it does not change.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomed_mae.errors import MissingExtraError, ReadError
from geomed_mae.image import Image, RasterGeometry
from geomed_mae.modalities import Modality
from geomed_mae.readers.labels import IGNORE, ClassNumbers, LabelQuery, Labels, shown_name
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown
from geomed_mae.readers.source import Refusal, Source, Survey
from geomed_mae.readers.vector.file import GEOPACKAGE_IDS, SHAPE_MAGIC, SQLITE_MAGIC, Layer, Value, layer
from geomed_mae.readers.vector.raster import burn

__all__ = ["group", "header", "read", "read_labels", "sniff"]

SUFFIXES = (".geojson", ".gpkg", ".shp")
# Telling that a file holds labels takes no package; `read_labels` asks for its own.
EXTRA, PACKAGE = "geo", "json"
NEEDED = ("shapely", "pyogrio", "rasterio")
MAX_LISTED = 20
"""Columns that a message lists."""


def sniff(path: Path, head: bytes) -> bool:
    """Whether the first bytes (for GeoJSON, with the suffix) are those of a vector file that is read here."""
    suffix = path.suffix.lower()
    if head.startswith(SQLITE_MAGIC):
        return head[68:72] in GEOPACKAGE_IDS
    if head.startswith(SHAPE_MAGIC):
        return suffix == ".shp"  # its index, .shx, begins with the same bytes
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if not text.startswith(b"{"):
        return False
    return suffix == ".geojson" or b'"FeatureCollection"' in text or (suffix == ".json" and b'"Feature"' in text)


def header(path: Path) -> Refusal:
    """Return why a vector file is no image: it holds labels, or something else that is drawn on a map."""
    return Refusal(path, Reason.LABEL, "a vector file; give it as labels")


def group(headers: Sequence[Any], modalities: Sequence[Modality]) -> Survey:
    """Return an empty survey: no vector file becomes an image."""
    return Survey([], [])


def read(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """Refuse: no Source is ever made of a vector file.

    Raises:
        ReadError: LABEL.
    """
    raise ReadError(f"{shown(source.files[0])} is a vector file, not an image", Reason.LABEL.name)


def read_labels(path: Path, onto: Image, query: LabelQuery) -> Labels:
    """Burn the polygons at `path` as class numbers int16 (Y, X) onto the grid of `onto`, by coordinates.

    Raises:
        ReadError: BAD_GEOMETRY (no polygon touches the image, or one of the two has no coordinate system), MISSING_TAG
            (no such column, or several that could be it; side files are missing), CLASS_UNKNOWN, DTYPE_UNSUPPORTED
            (points or lines), or a reason of opening: TRUNCATED, MALFORMED, TOO_LARGE, NOT_REGULAR, NON_IMAGE.
        MissingExtraError: a package of the extra `geo` is not installed.
    """
    for package in NEEDED:
        try:
            importlib.import_module(package)
        except ImportError:
            raise MissingExtraError("reading vector labels", package, EXTRA) from None
    if not isinstance(onto.geometry, RasterGeometry):
        raise ReadError(
            f"{shown(path)} holds outlines on a map; the image is not a raster on the ground", Reason.BAD_GEOMETRY.name
        )
    found = layer(path)
    values = found.columns[_column(found, query, path)]
    classes = ClassNumbers(query, shown(path))
    known = {value: _number(value, classes, query) for value in dict.fromkeys(values)}
    numbers = [known[value] for value in values]
    return Labels(burn(found, numbers, classes.background, onto, path=path), classes.names)


def _column(found: Layer, query: LabelQuery, path: Path) -> str:
    """Return the name of the column that holds the class."""
    names = list(found.columns)
    listed = ", ".join(f"'{shown_name(name)}'" for name in names[:MAX_LISTED]) or "none"
    more = " ..." if len(names) > MAX_LISTED else ""
    if query.column is not None:
        if query.column in names:
            return query.column
        folded = [name for name in names if name.casefold() == query.column.casefold()]
        if len(folded) == 1:
            return folded[0]
        raise ReadError(
            f"{shown(path)} has no column '{shown_name(query.column)}'; its columns are {listed}{more}",
            Reason.MISSING_TAG.name,
        )
    candidates = [name for name, values in found.columns.items() if _could_be_class(values)]
    if len(candidates) == 1:
        return candidates[0]
    what = "no" if not candidates else f"{len(candidates)}"
    raise ReadError(
        f"{shown(path)} has {what} columns of text or whole numbers that could hold the class; set labels.column to "
        f"one of its columns: {listed}{more}",
        Reason.MISSING_TAG.name,
    )


def _could_be_class(values: Sequence[Value]) -> bool:
    kinds = {type(value) for value in values if value is not None}
    return kinds in ({str}, {int})


def _number(value: Value, classes: ClassNumbers, query: LabelQuery) -> int | None:
    """Return a class number, IGNORE where no class is stated, None for a class that is to be left out.

    A whole number is first looked for among the names, and only then taken for a class number itself.
    """
    if value is None or (isinstance(value, str) and not value.strip()):
        return IGNORE
    text = str(value)
    if isinstance(value, int) and query.classes and query.values is None:
        names = {name.strip().casefold() for name in query.classes}
        if text not in names and 0 <= value < len(query.classes):
            return value
    if isinstance(value, int) and (value == IGNORE or value in query.ignore):
        return IGNORE
    return classes.number_of(text)
