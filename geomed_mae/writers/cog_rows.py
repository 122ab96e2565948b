"""Cloud-optimised GeoTIFF from rows: the one place that writes rasters, in memory that does not grow with the image.

A COG cannot be written in pieces: its overviews come first. So rows go to a tiled file in a hidden folder beside the
result, and GDAL's COG driver copies it. What was put is then read back and compared by checksums, because GDAL does not
always say that a disk was full. The grid is the image's own, never warped: coordinate system and transform are written
as they were read, rotated, south-up or absent ones included.

No file holds a date or a path: the same rows give the same bytes.
"""

from __future__ import annotations

import itertools
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.errors import OutputError
from geomed_mae.image import RasterGeometry
from geomed_mae.writers import complete_file, legend

TILE_PX = 512
"""Side of a tile, the COG driver's default."""
PIECE_ROWS = 64
"""Height of the tiles of the first file: so many rows are collected until they can be written as whole tiles."""
CACHE_BYTES = 64 << 20
"""GDAL's block cache while a raster is written; its own default is a share of the machine's memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bands:
    """What a raster's bands hold.

    Attributes:
        names: description of each band.
        dtype: of all bands, as numpy names it.
        nodata: value of pixels that are not known.
        classes: names of the class numbers of a class map (one band); empty for measurements.
        scales, offsets: one a band: meaning = stored * scale + offset. None is as it stands.
        tags: texts about the whole file.
        overviews: how overviews are made: classes cannot be averaged.
        tile_px: side of a tile, a multiple of PIECE_ROWS; all bands of a tile are decoded at once.
        compress: codec of the COG.
        photometric: "RGB" for three bands that are colours.
    """

    names: tuple[str, ...]
    dtype: str = "uint8"
    nodata: float | None = None
    classes: tuple[str, ...] = ()
    scales: tuple[float, ...] | None = None
    offsets: tuple[float, ...] | None = None
    tags: Mapping[str, str] = field(default_factory=dict)
    overviews: str = "NEAREST"
    tile_px: int = TILE_PX
    compress: str = "DEFLATE"
    photometric: str = "MINISBLACK"


class Rows:
    """A raster that is being written, from the first row to the last."""

    def __init__(self, dataset: Any, shape: tuple[int, int], bands: Bands) -> None:
        self.checksums: list[int] = []
        """Of each tile of the first file, all bands, from left to right and row of tiles by row of tiles."""
        self._dataset, self._tile_px = dataset, bands.tile_px
        self._shape = (len(bands.names), *shape)
        self._waiting = np.empty((len(bands.names), 0, shape[1]), dtype=bands.dtype)
        self._written = 0

    def put(self, rows: np.ndarray) -> None:
        """Write the next rows: (bands, rows, columns) of the raster's type.

        Raises:
            ValueError: more rows than the raster has, or of another width or type.
            OutputError: the disk is full or gone.
        """
        bands, height, width = self._shape
        got = self._written + self._waiting.shape[1] + rows.shape[1]
        if (rows.shape[0], rows.shape[2]) != (bands, width) or rows.dtype != self._waiting.dtype or got > height:
            raise ValueError(f"{rows.dtype} {rows.shape} does not continue {self._shape} at row {got - rows.shape[1]}")
        waiting = np.concatenate([self._waiting, rows], axis=1) if self._waiting.size else rows
        ready = waiting.shape[1] if got == height else waiting.shape[1] // PIECE_ROWS * PIECE_ROWS
        for first in range(0, ready, PIECE_ROWS):
            self._write(waiting[:, first : min(first + PIECE_ROWS, ready)])
        self._waiting = waiting[:, ready:].copy()

    def missing(self) -> int:
        """Return how many rows have not been put yet."""
        return self._shape[1] - self._written - self._waiting.shape[1]

    def _write(self, rows: np.ndarray) -> None:
        from rasterio.windows import Window

        with _as_output_error(f"rows {self._written} and following"):
            self._dataset.write(rows, window=Window(0, self._written, rows.shape[2], rows.shape[1]))
        self._written += rows.shape[1]
        for first in range(0, rows.shape[2], self._tile_px):
            self.checksums.append(_checksum(rows[:, :, first : first + self._tile_px]))


@contextmanager
def rows_to_cog(path: Path, shape: tuple[int, int], geometry: RasterGeometry, bands: Bands) -> Iterator[Rows]:
    """Open a raster of `shape` (rows, columns) for writing in row order; it becomes a COG when the block ends.

    A class map gets its legends beside it (see `writers.legend`), which are in place before the map has its name.

    Raises:
        ValueError: the block ends before the last row.
        OutputError: the file cannot be written, or is not what was put.
    """
    import rasterio

    with ExitStack() as stack:
        final = stack.enter_context(complete_file(path))
        stack.enter_context(_quiet())
        # One thread: blocks would otherwise be compressed in an order that is another one each time.
        stack.enter_context(rasterio.Env(GDAL_PAM_ENABLED="NO", GDAL_CACHEMAX=CACHE_BYTES, GDAL_NUM_THREADS="1"))
        pieces = final.with_name("pieces.tif")
        with _as_output_error(f"'{path.name}'"):
            dataset = _pieces(pieces, shape, geometry, bands)
        rows = Rows(dataset, shape, bands)
        try:
            yield rows
        finally:
            with _as_output_error(f"'{path.name}'"):
                dataset.close()
        if rows.missing():
            raise ValueError(f"'{path.name}' has {shape[0]} rows, of which {rows.missing()} were not put")
        with _as_output_error(f"'{path.name}'"):
            _copy(pieces, final, bands)
            pieces.unlink()
            crs = _verified(final, rows.checksums, geometry, bands.tile_px)
        _write_legends(path, bands.classes, crs)


def _pieces(path: Path, shape: tuple[int, int], geometry: RasterGeometry, bands: Bands) -> Any:
    """Open the first file: tiles as wide as the COG's, but flat, so that few rows are in memory."""
    import rasterio

    tiling = {"tiled": True, "blockxsize": bands.tile_px, "blockysize": PIECE_ROWS, "interleave": "band"}
    # Unless told, GDAL takes three or four bands of uint8 for colours.
    packing = {"compress": "deflate", "zlevel": 1, "bigtiff": "IF_SAFER", "photometric": bands.photometric, **tiling}
    size = {"count": len(bands.names), "height": shape[0], "width": shape[1]}
    kind = {"driver": "GTiff", "dtype": bands.dtype, "nodata": bands.nodata}
    dataset = rasterio.open(path, "w", **kind, **size, **packing, **_place(geometry))
    dataset.descriptions = bands.names
    dataset.update_tags(**bands.tags)
    if bands.scales is not None:
        dataset.scales = bands.scales
    if bands.offsets is not None:
        dataset.offsets = bands.offsets
    if bands.classes:
        dataset.write_colormap(1, legend.colours(len(bands.classes)))
        dataset.update_tags(1, **{f"CLASS_{number}": name for number, name in enumerate(bands.classes)})
    return dataset


def _copy(pieces: Path, final: Path, bands: Bands) -> None:
    from rasterio.shutil import copy

    # Neighbouring classes are equal more often than their differences are; neighbouring measurements are not, and are
    # too noisy for more than the fastest level (20 bands of probabilities: 6 s and 102 MB, the default 16 s and 96 MB).
    effort = {"predictor": "NO"} if bands.classes else {"predictor": "YES", "level": 1}
    packing = {"compress": bands.compress, "bigtiff": "IF_SAFER", **effort}
    copy(pieces, final, driver="COG", blocksize=bands.tile_px, overview_resampling=bands.overviews, **packing)


def _verified(path: Path, checksums: list[int], geometry: RasterGeometry, tile_px: int) -> str | None:
    """Demand that a COG holds what was put; return the coordinate system where the file cannot hold it, else None.

    Raises:
        OutputError: other pixels or another transform.
    """
    import rasterio
    from affine import Affine
    from rasterio.windows import Window

    with rasterio.open(path) as dataset:
        across = -(-dataset.width // tile_px)
        for row, column in itertools.product(range(0, dataset.height, tile_px), range(0, dataset.width, tile_px)):
            size = min(tile_px, dataset.width - column), min(tile_px, dataset.height - row)
            tile = dataset.read(window=Window(column, row, *size))
            for first in range(0, size[1], PIECE_ROWS):
                number = (row + first) // PIECE_ROWS * across + column // tile_px
                if _checksum(tile[:, first : first + PIECE_ROWS]) != checksums[number]:
                    raise OutputError(f"what was written differs at row {row}, column {column}: is the disk full?")
        if dataset.transform != Affine(*geometry.transform):
            raise OutputError(f"the transform {geometry.transform} came back as {tuple(dataset.transform)[:6]}")
        kept = dataset.crs
    wanted = None if geometry.crs is None else rasterio.crs.CRS.from_wkt(geometry.crs)
    return None if kept == wanted or wanted is None else geometry.crs


def _write_legends(path: Path, classes: tuple[str, ...], crs: str | None) -> None:
    beside = {}
    if classes:
        beside[path.with_suffix(legend.QML)] = legend.qgis_style(classes)
    if classes or crs is not None:
        beside[path.with_name(path.name + legend.PAM)] = legend.gdal_sidecar(classes, crs)
    for name, text in beside.items():
        with complete_file(name) as temporary:
            temporary.write_text(text, encoding="utf-8")


def _checksum(tile: np.ndarray) -> int:
    return zlib.crc32(np.ascontiguousarray(tile))


def _place(geometry: RasterGeometry) -> dict[str, Any]:
    from affine import Affine
    from rasterio.crs import CRS

    crs = None if geometry.crs is None else CRS.from_wkt(geometry.crs)
    transform = Affine(*geometry.transform)
    # Written out, the identity would claim a place for an image that has none.
    return {} if crs is None and transform == Affine.identity() else {"crs": crs, "transform": transform}


@contextmanager
def _as_output_error(what: str) -> Iterator[None]:
    """Turn errors of rasterio, and the bare ones of GDAL that it lets through, into OutputError."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    try:
        yield
    except (RasterioError, CPLE_BaseError) as error:
        raise OutputError(f"{what} cannot be written: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Let an image without a coordinate system stay without one: that is no news here."""
    from rasterio.errors import NotGeoreferencedWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield
