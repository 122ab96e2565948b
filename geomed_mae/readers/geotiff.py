"""GeoTIFF: rasters on their native grid, in physical units, with every kind of nodata in one validity mask.

Pixels are stored * scale + offset (the file's, else the modality's), never warped, resampled or read from overviews.
A pixel is invalid where it equals nodata (compared, also NaN), is NaN or infinite, is transparent (alpha 0), is masked
by an internal mask, or lies in a block that was never written. Invalid pixels are 0 in the array.

Sources: GDAL raster data model (affine transform, colour interpretation, mask flags), OGC GeoTIFF 1.1, TIFF 6.0.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, RasterGeometry
from geomed_mae.modalities import Modality
from geomed_mae.readers.geotiff_bands import Bands, Choice, NoChoice, choose
from geomed_mae.readers.geotiff_grid import footprint, native_grid
from geomed_mae.readers.geotiff_labels import read_labels
from geomed_mae.readers.geotiff_open import band_descriptions, opened, rasterio
from geomed_mae.readers.geotiff_structure import MAGICS, Structure, nodata_value
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown
from geomed_mae.readers.source import Refusal, Source, Survey, whole_window

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

__all__ = ["Header", "footprint", "group", "header", "read", "read_labels", "sniff"]

SUFFIXES = (".tif", ".tiff", ".gtiff")
EXTRA, PACKAGE = "geo", "rasterio"
NOT_THIS_FORMAT = Reason.NOT_TIFF

MAX_READ_VALUES = 1 << 31
"""Values in one read: 8 GiB of float32. A larger image is read in windows."""
CHUNK_BYTES = 16 << 20
"""Stored bytes converted at a time, so that memory is the result's and little more."""
PIXEL_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
SIDE_CARS = (".aux.xml", ".msk", ".ovr")
WORLD_FILES = (".tfw", ".tifw", ".tiffw", ".wld")


@dataclass(frozen=True, slots=True)
class Header:
    """What a GeoTIFF says without its pixels; `nodata` is the tag's text, band tuples have one entry a band."""

    path: Path
    shape: tuple[int, int]
    dtype: str
    geometry: RasterGeometry
    descriptions: tuple[str | None, ...]
    colours: tuple[str, ...]
    nodata: str | None
    scales: tuple[float, ...]
    offsets: tuple[float, ...]
    masked: bool
    sparse: bool
    flags: tuple[str, ...]


def sniff(path: Path, head: bytes) -> bool:
    """Whether the first bytes are a TIFF's, classic or Big, of either byte order."""
    return head[:4] in MAGICS


def header(path: Path) -> Header:
    """Read the metadata of one file, no pixels.

    Raises:
        ReadError: any reason of `geotiff_structure`, MALFORMED, DTYPE_UNSUPPORTED, BAD_TRANSFORM or UNIT_CONFLICT.
    """
    if path.name.lower().endswith(SIDE_CARS):
        raise ReadError(f"{shown(path)} holds an overview or a mask of another image", Reason.NON_IMAGE.name)
    with opened(path) as (dataset, structure):
        if len(set(dataset.dtypes)) > 1 or dataset.dtypes[0] not in PIXEL_TYPES:
            raise ReadError(f"{shown(path)} has pixels of {dataset.dtypes[0]}", Reason.DTYPE_UNSUPPORTED.name)
        colours = tuple(colour.name for colour in dataset.colorinterp)
        if "palette" in colours:
            raise ReadError(f"{shown(path)} stores colours as palette", Reason.DTYPE_UNSUPPORTED.name)
        scales, offsets = tuple(map(float, dataset.scales)), tuple(map(float, dataset.offsets))
        if not all(map(math.isfinite, (*scales, *offsets))) or 0 in scales:
            raise ReadError(f"{shown(path)} declares scale {scales}, offset {offsets}", Reason.UNIT_CONFLICT.name)
        geometry, flags = native_grid(dataset, structure, path)
        beside = [path.with_name(path.name + end) for end in SIDE_CARS] + [path.with_suffix(end) for end in WORLD_FILES]
        if any(os.path.lexists(side) for side in beside):  # unlike Path.exists, no error for a name too long
            flags.append("SIDE_CAR_IGNORED")
        if structure.sparse:
            flags.append("SPARSE")
        if dataset.subdatasets:
            flags.append("FIRST_PAGE_ONLY")
        mask_flags = [{flag.name for flag in band} for band in dataset.mask_flag_enums]
        return Header(
            path=path,
            shape=(dataset.height, dataset.width),
            dtype=dataset.dtypes[0],
            geometry=geometry,
            descriptions=band_descriptions(path),
            colours=colours,
            nodata=structure.nodata,
            scales=scales,
            offsets=offsets,
            masked=any("per_dataset" in names and "alpha" not in names for names in mask_flags),
            sparse=structure.sparse,
            flags=tuple(flags),
        )


def group(headers: Sequence[Header], modalities: Sequence[Modality]) -> Survey:
    """Make one Source of each file, its bands named by the modality that fits (see `geotiff_bands`)."""
    sources, refusals = [], []
    for found in headers:
        outcome = _source(found, modalities)
        (sources if isinstance(outcome, Source) else refusals).append(outcome)
    return Survey(sources, refusals)


def _source(found: Header, modalities: Sequence[Modality]) -> Source | Refusal:
    numbers = tuple(n for n, colour in enumerate(found.colours, start=1) if colour != "alpha")
    if not numbers:
        return Refusal(found.path, Reason.BAND_MISMATCH, "it has alpha bands only")
    names = tuple(found.descriptions[n - 1] for n in numbers)
    choice = choose(Bands(names, tuple(found.colours[n - 1] for n in numbers), numbers, found.dtype), modalities)
    if isinstance(choice, NoChoice):
        return Refusal(found.path, choice.reason, choice.detail)
    flags = [*found.flags, *choice.flags]
    nodata, default = found.nodata, choice.modality.nodata
    if nodata is not None and nodata_value(nodata, found.dtype) is None:
        if default is None:
            return Refusal(found.path, Reason.NODATA_INVALID, f"nodata {nodata!r} cannot occur in {found.dtype}")
        nodata = None
        flags.append("NODATA_INVALID")
    if nodata is None and default is not None and nodata_value(str(default), found.dtype) is not None:
        nodata = str(default)
    return Source(
        reader="geotiff",
        files=(found.path,),
        selector={
            "bands": list(numbers),
            "alpha": [n for n in range(1, len(found.colours) + 1) if n not in numbers],
            "nodata": nodata,
            **_scaling(found, choice, numbers),
            "masked": found.masked,
            "sparse": found.sparse,
        },
        modality=choice.modality.name,
        channels=choice.channels,
        shape=found.shape,
        dtype=found.dtype,
        geometry=found.geometry,
        flags=tuple(flags),
    )


def _scaling(found: Header, choice: Choice, numbers: Sequence[int]) -> dict[str, list[float]]:
    """Return scale and offset a band: the file's where it declares any, else the modality's."""
    pairs = [(found.scales[n - 1], found.offsets[n - 1]) for n in numbers]
    default = (choice.modality.scale, choice.modality.offset)
    pairs = [default if pair == (1.0, 0.0) else pair for pair in pairs]
    return {"scale": [scale for scale, _ in pairs], "offset": [offset for _, offset in pairs]}


def read(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """Read the raster, or a window (rows, columns) of it, as float32 physical values.

    Raises:
        ReadError: TRUNCATED, DECODE_FAILED, TOO_LARGE, MALFORMED (changed since its header was read), or any reason
            of the checks on opening.
    """
    path, selector = source.files[0], source.selector
    rows, columns = whole_window(window, source.shape)
    shape = (len(source.channels), rows.stop - rows.start, columns.stop - columns.start)
    if math.prod(shape) > MAX_READ_VALUES:
        raise ReadError(
            f"{shown(path)}: {shape} values (channels, rows, columns) do not fit one read; read windows of it",
            Reason.TOO_LARGE.name,
        )
    with opened(path) as (dataset, structure):
        if dataset.shape != tuple(source.shape) or dataset.dtypes[0] != source.dtype:
            raise ReadError(f"{shown(path)} has changed since its header was read", Reason.MALFORMED.name)
        array, valid = np.empty(shape, np.float32), np.empty(shape, np.bool_)
        for part in _row_chunks(rows, columns, structure):
            at = slice(part.start - rows.start, part.stop - rows.start)
            array[:, at], valid[:, at] = _read_part(dataset, structure, selector, part, columns)
    if all(np.array_equal(band, valid[0]) for band in valid[1:]):
        valid = valid[:1].copy()
    geometry = source.geometry.shifted(rows.start, columns.start)
    return Image(array, valid, source.channels, geometry, source.modality)


def _row_chunks(rows: slice, columns: slice, structure: Structure) -> Iterator[slice]:
    """Cut rows into parts of whole blocks with at most CHUNK_BYTES stored bytes, but at least one row of blocks."""
    bytes_per_row = (columns.stop - columns.start) * structure.bands * -(-structure.bits // 8)
    block = structure.block[0]
    step = max(1, CHUNK_BYTES // max(1, bytes_per_row) // block) * block
    start = rows.start
    while start < rows.stop:
        stop = min(rows.stop, (start // step + 1) * step)
        yield slice(start, stop)
        start = stop


def _read_part(
    dataset: DatasetReader, structure: Structure, selector: dict[str, Any], rows: slice, columns: slice
) -> tuple[np.ndarray, np.ndarray]:
    """Return (values float32 with 0 where invalid, validity bool), both (bands, rows, columns)."""
    window = rasterio().windows.Window(columns.start, rows.start, columns.stop - columns.start, rows.stop - rows.start)
    stored = dataset.read(selector["bands"], window=window)
    valid = np.ones(stored.shape, np.bool_)
    if selector["nodata"] is not None:
        valid &= stored != nodata_value(selector["nodata"], stored.dtype.name)
    for alpha in selector["alpha"]:
        valid &= dataset.read(alpha, window=window) > 0
    if selector["masked"]:
        valid &= dataset.read_masks(1, window=window) > 0
    if selector["sparse"]:
        written = structure.written(rows, columns)
        valid &= written if written.shape[0] == 1 else written[np.array(selector["bands"]) - 1]
    values = np.empty(stored.shape, np.float32)
    # A float64 beyond float32's range becomes infinite here, and invalid below.
    with np.errstate(over="ignore", invalid="ignore"):
        for band, (scale, offset) in enumerate(zip(selector["scale"], selector["offset"], strict=True)):
            if (scale, offset) == (1.0, 0.0):
                values[band] = stored[band]
            else:
                exact = np.multiply(stored[band], scale, dtype=np.float64)
                if offset:
                    exact += offset
                values[band] = exact
    if stored.dtype.kind == "f":
        valid &= np.isfinite(values)
    np.copyto(values, 0.0, where=~valid)
    return values, valid
