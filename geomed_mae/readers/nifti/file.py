"""Bytes of a NIfTI file: its header, checked, and its voxels, never more of them than the header promises.

nibabel parses the header's fixed part; voxels are read here, so that a compressed bomb costs what a volume of the
promised size costs and no more, and damage ends in a typed reason.

Source: the NIfTI-1.1 and NIfTI-2 headers (nifti1.h, nifti2.h of the NIfTI DFWG); RFC 1951 and 1952 (deflate, gzip).
"""

from __future__ import annotations

import contextlib
import gzip
import io
import logging
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import VolumeGeometry
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import first_bytes, shown

MAX_VOXELS = 1 << 31
"""8 GiB of float32 in one volume."""
MAX_GZIP_RATIO = 1032
"""Deflate cannot expand further: a match of 258 bytes takes two bits (RFC 1951, section 3.2.5)."""
MAX_VOXEL_OFFSET = 64 << 20
"""Header extensions (comments, protocol text) lie between header and voxels."""
MAX_TAIL_BYTES = 1 << 20
"""What may follow the voxels in a compressed file before its checksum is given up."""
READ_BYTES = 1 << 20

GZIP_MAGIC = b"\x1f\x8b"
NIFTI1_BYTES, NIFTI2_BYTES = 348, 540
NIFTI2_MAGIC = b"n+2\0\r\n\x1a\n"
INTENT_LABEL = 1002
"""nifti1.h, NIFTI_INTENT_LABEL: the values index a list of names."""
MILLIMETRES = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}
"""Length units of xyzt_units, bits 0 to 2: unknown (taken as mm), metre, millimetre, micron."""
PIXEL_TYPES = ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64", "float32", "float64")
RAS_TO_LPS = np.diag([-1.0, -1.0, 1.0, 1.0])


@dataclass(frozen=True, slots=True, eq=False)
class Header:
    """What a NIfTI file says without its voxels.

    `shape` is (slices, rows, columns), `volumes` the length of the fourth axis, `affine` (4, 4) from
    (slice, row, column) to LPS mm, `dtype` numpy's name with byte order, `slope` and `inter` 1 and 0 where the file
    declares no rescaling, `start` the byte of the first voxel in the uncompressed file.
    """

    path: Path
    shape: tuple[int, int, int]
    volumes: int
    dtype: str
    affine: np.ndarray
    slope: float
    inter: float
    start: int
    label: bool
    flags: tuple[str, ...]


def header(path: Path) -> Header:
    """Read the header of one file, no voxels.

    Raises:
        ReadError: MALFORMED, TRUNCATED, TOO_LARGE, RATIO, DTYPE_UNSUPPORTED, BAD_GEOMETRY or BAD_RESCALE.
    """
    raw = _header_bytes(path)
    parsed = _parse(raw, path)
    dims = [int(size) for size in parsed["dim"][1 : 1 + int(parsed["dim"][0])]]
    while len(dims) > 3 and dims[-1] == 1:
        dims.pop()
    dims += [1] * (3 - len(dims))
    if min(dims) < 1:
        raise ReadError(f"{shown(path)} declares the axes {dims}", Reason.MALFORMED.name)
    if len(dims) > 4:
        raise ReadError(
            f"{shown(path)} has {len(dims)} axes {dims}; a vector a voxel is no image", Reason.DTYPE_UNSUPPORTED.name
        )
    if math.prod(dims[:3]) > MAX_VOXELS:
        raise ReadError(f"{shown(path)} declares {dims[:3]} voxels; the limit is {MAX_VOXELS}", Reason.TOO_LARGE.name)
    dtype = parsed.get_data_dtype()
    if dtype.name not in PIXEL_TYPES:
        raise ReadError(f"{shown(path)} has voxels of {dtype}", Reason.DTYPE_UNSUPPORTED.name)
    slope, inter = _rescaling(float(parsed["scl_slope"]), float(parsed["scl_inter"]), path)
    start = float(parsed["vox_offset"])
    if not len(raw) <= start <= MAX_VOXEL_OFFSET:
        raise ReadError(f"{shown(path)} places its voxels at byte {start}", Reason.MALFORMED.name)
    _check_size(path, int(start) + math.prod(dims) * dtype.itemsize)
    oriented = int(parsed["sform_code"]) > 0 or int(parsed["qform_code"]) > 0
    return Header(
        path=path,
        shape=(dims[2], dims[1], dims[0]),
        volumes=dims[3] if len(dims) == 4 else 1,
        dtype=dtype.str,
        affine=_lps(parsed.get_best_affine(), MILLIMETRES.get(int(parsed["xyzt_units"]) & 7, 1.0), path),
        slope=slope,
        inter=inter,
        start=int(start),
        label=int(parsed["intent_code"]) == INTENT_LABEL,
        flags=() if oriented else ("ORIENTATION_ASSUMED",),
    )


def _header_bytes(path: Path) -> bytes:
    """Return the fixed part of the header, decompressed; its length tells the version."""
    with _stream(path) as file:
        head = _exactly(file, NIFTI1_BYTES, path)
        if head[344:348] == b"n+1\0":
            return head
        if head[4:12] == NIFTI2_MAGIC:
            return head + _exactly(file, NIFTI2_BYTES - NIFTI1_BYTES, path)
    raise ReadError(f"{shown(path)} has no NIfTI magic in its first bytes", Reason.MALFORMED.name)


def _parse(raw: bytes, path: Path) -> Any:
    """Let nibabel parse the header's bytes; what it only warns of is judged by our own checks."""
    import nibabel

    kind = nibabel.Nifti1Header if len(raw) == NIFTI1_BYTES else nibabel.Nifti2Header
    # nibabel logs and repairs; a repaired header is a guess, so `check` stays off.
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    try:
        parsed = kind.from_fileobj(io.BytesIO(raw), check=False)
        parsed.get_data_dtype()
    except (nibabel.spatialimages.HeaderDataError, ValueError, KeyError):
        raise ReadError(f"the header of {shown(path)} does not parse", Reason.MALFORMED.name) from None
    if not 1 <= int(parsed["dim"][0]) <= 7:
        raise ReadError(f"{shown(path)} declares {int(parsed['dim'][0])} axes", Reason.MALFORMED.name)
    return parsed


def _rescaling(slope: float, inter: float, path: Path) -> tuple[float, float]:
    """Return (slope, inter); a slope of 0 or NaN means "none" (nifti1.h, and nibabel writes NaN)."""
    if slope == 0 or math.isnan(slope):
        return 1.0, 0.0
    inter = 0.0 if math.isnan(inter) else inter
    if not math.isfinite(slope) or not math.isfinite(inter):
        raise ReadError(f"{shown(path)} declares slope {slope}, intercept {inter}", Reason.BAD_RESCALE.name)
    return slope, inter


def _check_size(path: Path, promised: int) -> None:
    """Refuse a file that cannot hold what its header promises."""
    size = path.stat().st_size
    if first_bytes(path)[:2] != GZIP_MAGIC:
        if promised > size:
            raise ReadError(f"{shown(path)} has {size} bytes of {promised}", Reason.TRUNCATED.name)
    elif promised > MAX_GZIP_RATIO * size:
        raise ReadError(
            f"{shown(path)} has {size} bytes and declares {promised}, more than gzip can hold", Reason.RATIO.name
        )


def _lps(ras: np.ndarray, millimetres: float, path: Path) -> np.ndarray:
    """Return the affine from (slice, row, column) to LPS mm of one from (i, j, k) to RAS."""
    ras = np.array(ras, np.float64)
    ras[:3] *= millimetres
    affine = (RAS_TO_LPS @ ras)[:, [2, 1, 0, 3]]
    try:
        return VolumeGeometry(affine).affine
    except ValueError:
        raise ReadError(f"{shown(path)} has the singular affine {ras[:3].tolist()}", Reason.BAD_GEOMETRY.name) from None


def voxels(found: Header, volume: int, slices: slice) -> np.ndarray:
    """Return stored values (slices, Y, X) of one volume, and check the checksum when the last byte was reached."""
    dtype = np.dtype(found.dtype)
    plane = found.shape[1] * found.shape[2] * dtype.itemsize
    first = found.start + (volume * found.shape[0] + slices.start) * plane
    count = slices.stop - slices.start
    with _stream(found.path) as file:
        if file.seekable() and not isinstance(file, gzip.GzipFile):
            file.seek(first)
        else:
            _skip(file, first, found.path)
        data = _exactly(file, count * plane, found.path)
        if isinstance(file, gzip.GzipFile) and volume == found.volumes - 1 and slices.stop == found.shape[0]:
            file.read(MAX_TAIL_BYTES)  # gzip compares its checksum at the end of the file only
    return np.frombuffer(data, dtype).reshape(count, *found.shape[1:])


@contextlib.contextmanager
def _stream(path: Path) -> Iterator[BinaryIO]:
    """Open a plain or compressed file; what goes wrong inside becomes a ReadError."""
    try:
        with path.open("rb") as file:
            compressed = file.read(2) == GZIP_MAGIC
            file.seek(0)
            if compressed:
                with gzip.GzipFile(fileobj=file) as plain:
                    yield plain
            else:
                yield file
    except EOFError:
        raise ReadError(f"{shown(path)} ends inside its compressed data", Reason.TRUNCATED.name) from None
    except (zlib.error, gzip.BadGzipFile):
        raise ReadError(f"the compressed data of {shown(path)} does not decode", Reason.DECODE_FAILED.name) from None
    except PermissionError:
        raise ReadError(f"{shown(path)} may not be read by this user", Reason.PERMISSION.name) from None
    except OSError as error:
        raise ReadError(f"{shown(path)} cannot be read: {error.strerror}", Reason.VANISHED.name) from None


def _exactly(file: BinaryIO, count: int, path: Path) -> bytearray:
    """Return the next `count` bytes; memory grows with what the file delivers, not with what its header promises."""
    data = bytearray()
    while len(data) < count:
        part = file.read(min(READ_BYTES, count - len(data)))
        if not part:
            raise ReadError(f"{shown(path)} ends before its header's promise", Reason.TRUNCATED.name)
        data += part
    return data


def _skip(file: BinaryIO, count: int, path: Path) -> None:
    while count > 0:
        part = file.read(min(READ_BYTES, count))
        if not part:
            raise ReadError(f"{shown(path)} ends before its header's promise", Reason.TRUNCATED.name)
        count -= len(part)
