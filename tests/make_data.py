"""Tiny real files for tests: GeoTIFF and NIfTI as the usual libraries write them, and TIFFs by hand."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.readers.geotiff.open import rasterio

UTM_10M = (10.0, 0.0, 500000.0, 0.0, -10.0, 4000000.0)
"""A north-up grid of 10 m pixels."""


def write_geotiff(
    path: Path,
    array: np.ndarray,
    *,
    nodata: float | None = None,
    crs: str | None = "EPSG:32611",
    transform: Sequence[float] | None = UTM_10M,
    descriptions: Sequence[str] | None = None,
    scales: Sequence[float] | None = None,
    offsets: Sequence[float] | None = None,
    colours: Sequence[str] | None = None,
    colormap: dict[int, tuple[int, ...]] | None = None,
    mask: np.ndarray | None = None,
    namespaces: dict[str, dict[str, str]] | None = None,
    **creation: Any,
) -> Path:
    """Write (bands, rows, columns) or (rows, columns) with rasterio; `creation` are options of the GTiff driver.

    `colours` are names of rasterio's ColorInterp, `mask` (rows, columns) True where valid becomes an internal mask,
    `namespaces` metadata by GDAL domain.
    """
    rio = rasterio()
    array = array[None] if array.ndim == 2 else array
    profile = {"driver": "GTiff", "count": array.shape[0], "height": array.shape[1], "width": array.shape[2]}
    # Several bands are data, not colours, unless a test says so: GDAL takes three bytes for RGB.
    if colours is None and array.shape[0] > 1 and "photometric" not in creation:
        creation["photometric"] = "MINISBLACK"
    profile |= {"dtype": array.dtype, "nodata": nodata, "crs": crs, **creation}
    if transform is not None:
        profile["transform"] = rio.Affine(*transform)
    with rio.Env(GDAL_TIFF_INTERNAL_MASK=True), rio.open(path, "w", **profile) as file:
        file.write(array)
        if descriptions is not None:
            file.descriptions = tuple(descriptions)
        if scales is not None:
            file.scales = tuple(scales)
        if offsets is not None:
            file.offsets = tuple(offsets)
        if colours is not None:
            file.colorinterp = [rio.enums.ColorInterp[name] for name in colours]
        if colormap is not None:
            file.write_colormap(1, colormap)
        if mask is not None:
            file.write_mask(mask)
        for domain, items in (namespaces or {}).items():
            file.update_tags(ns=domain, **items)
    return path


def write_nifti(
    path: Path,
    array: np.ndarray,
    affine: np.ndarray | None = None,
    *,
    slope: float | None = None,
    inter: float | None = None,
    version: int = 1,
    **fields: Any,
) -> Path:
    """Write stored voxels (i, j, k[, t]) with nibabel; `slope` and `inter` are put into the header as they are."""
    import nibabel

    kind = {1: nibabel.Nifti1Image, 2: nibabel.Nifti2Image}[version]
    image = kind(array, np.eye(4) if affine is None else affine, dtype=array.dtype)
    for name, value in fields.items():
        image.header[name] = value
    data = bytearray(image.to_bytes())
    # nibabel rescales what it writes; a test wants exactly these numbers.
    if slope is not None:
        at, code = (112, "<ff") if version == 1 else (176, "<dd")
        struct.pack_into(code, data, at, slope, inter or 0.0)
    for name, value in fields.items():
        at = {"qform_code": (252, "<h"), "sform_code": (254, "<h")}.get(name) if version == 1 else None
        if at:
            struct.pack_into(at[1], data, at[0], value)
    if path.name.endswith(".gz"):
        import gzip

        path.write_bytes(gzip.compress(bytes(data), mtime=0))
    else:
        path.write_bytes(bytes(data))
    return path


_CODES = {2: "s", 3: "H", 4: "I", 5: "II", 12: "d", 16: "Q"}


def write_raw_tiff(path: Path, tags: dict[int, tuple[int, Any]], *, order: str = "<", tail: bytes = b"") -> Path:
    """Write a classic TIFF by hand: tag -> (TIFF type, value or values). `tail` lies at byte 8, the directory after it.

    The only way to make the lies that no library writes.
    """
    start = 8 + len(tail) + len(tail) % 2
    body = start + 2 + 12 * len(tags) + 4
    entries, extra = b"", b""
    for tag in sorted(tags):
        kind, values = tags[tag]
        if kind == 2:
            raw, count = values.encode() + b"\0", len(values) + 1
        else:
            values = values if isinstance(values, list | tuple) else [values]
            raw, count = struct.pack(order + _CODES[kind] * len(values), *values), len(values)
        if len(raw) > 4:
            entries += struct.pack(order + "HHII", tag, kind, count, body + len(extra))
            extra += raw + b"\0" * (len(raw) % 2)
        else:
            entries += struct.pack(order + "HHI", tag, kind, count) + raw.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    head = magic + struct.pack(order + "I", start) + tail.ljust(start - 8, b"\0")
    path.write_bytes(head + struct.pack(order + "H", len(tags)) + entries + b"\0" * 4 + extra)
    return path


def plain_tags(width: int, height: int, *, bands: int = 1, bits: int = 8, **more: tuple[int, Any]) -> dict:
    """Tags of a one-strip, uncompressed, black-is-zero TIFF whose pixels start at byte 8; override by `t<number>`."""
    tags = {
        256: (4, width),
        257: (4, height),
        258: (3, [bits] * min(bands, 600)),
        259: (3, 1),
        262: (3, 1),
        273: (4, 8),
        277: (3, bands),
        278: (4, height),
        279: (4, min(width * height * bands * bits // 8, 2**32 - 1)),
    }
    return {**tags, **{int(name[1:]): value for name, value in more.items()}}
