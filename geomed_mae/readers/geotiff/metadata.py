"""What a raster file (GeoTIFF or JPEG 2000) says without its pixels."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from geomed_mae.errors import ReadError
from geomed_mae.image import RasterGeometry
from geomed_mae.readers.geotiff.grid import native_grid
from geomed_mae.readers.geotiff.open import band_descriptions, opened
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

PIXEL_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
SIDE_CARS = (".aux.xml", ".msk", ".ovr")
WORLD_FILES = (".tfw", ".tifw", ".tiffw", ".wld", ".j2w")


@dataclass(frozen=True, slots=True)
class Header:
    """What a raster says without its pixels; `nodata` is the tag's text, band tuples have one entry a band.

    `block` (rows, columns) is the unit in which it decodes, `codec` the image codec that this needs, or "".
    """

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
    block: tuple[int, int] | None = None
    codec: str = ""


def raster_header(path: Path) -> Header:
    """Read the metadata of one file, no pixels.

    Raises:
        ReadError: any reason of `geotiff.structure` or `jp2_structure`, MALFORMED, NON_IMAGE, DTYPE_UNSUPPORTED,
            BAD_TRANSFORM or UNIT_CONFLICT.
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
        tiff = dataset.driver == "GTiff"
        return Header(
            path=path,
            shape=(dataset.height, dataset.width),
            dtype=dataset.dtypes[0],
            geometry=geometry,
            descriptions=band_descriptions(path) if tiff else (None,) * dataset.count,
            colours=colours,
            nodata=structure.nodata,
            scales=scales,
            offsets=offsets,
            masked=any("per_dataset" in names and "alpha" not in names for names in mask_flags),
            sparse=structure.sparse,
            flags=tuple(flags),
            block=structure.block,
            codec=structure.codec,
        )
