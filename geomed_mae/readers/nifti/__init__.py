"""NIfTI-1 and NIfTI-2 (.nii, .nii.gz): volumes in the unit of their rescaling, placed in LPS millimetres.

NIfTI's axes are (i, j, k) to RAS; an Image's are (slice, row, column) = (k, j, i) to LPS, so the affine's columns are
reversed and x and y change sign. Several volumes in one file (a fourth axis) become one Source each.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Channel, Image, VolumeGeometry
from geomed_mae.modalities import Modality
from geomed_mae.readers.nifti.file import GZIP_MAGIC, NIFTI1_BYTES, NIFTI2_MAGIC, Header, header, voxels
from geomed_mae.readers.nifti.labels import read_labels
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown
from geomed_mae.readers.source import Refusal, Source, Survey, whole_window

__all__ = ["Header", "group", "header", "read", "read_labels", "sniff"]

SUFFIXES = (".nii", ".nii.gz")
EXTRA, PACKAGE = "med", "nibabel"
NOT_THIS_FORMAT = Reason.MALFORMED


def sniff(path: Path, head: bytes) -> bool:
    """Whether the (decompressed) first bytes hold the magic of a single-file NIfTI-1 or NIfTI-2."""
    if head[:2] == GZIP_MAGIC:
        if path.name.lower().endswith(SUFFIXES[1]):
            return True  # damaged beyond the magic is still a damaged NIfTI, not an unknown format
        try:
            head = zlib.decompressobj(wbits=31).decompress(head, NIFTI1_BYTES)
        except zlib.error:
            return False
    return head[344:348] == b"n+1\0" or head[4:12] == NIFTI2_MAGIC


def group(headers: Sequence[Header], modalities: Sequence[Modality]) -> Survey:
    """Make one Source a volume. NIfTI does not say what was imaged, so the modality is the one given, or none."""
    volumes = [m for m in modalities if m.geometry == "volume" and "nifti" in m.formats]
    unnamed = next((m for m in volumes if not m.channels), None)
    modality = volumes[0] if len(volumes) == 1 else unnamed
    sources: list[Source] = []
    refusals: list[Refusal] = []
    for found in headers:
        if found.label:
            refusals.append(Refusal(found.path, Reason.LABEL, "its intent code says that it holds labels"))
        elif modality is None:
            names = ", ".join(m.name for m in volumes or modalities)
            why = "NIfTI does not say which it is; give one" if volumes else "none of them comes as NIfTI"
            refusals.append(Refusal(found.path, Reason.MODALITY_MISMATCH, f"chosen modalities: {names}; {why}"))
        else:
            sources.extend(_source(found, modality, volume) for volume in range(found.volumes))
    return Survey(sources, refusals)


def _source(found: Header, modality: Modality, volume: int) -> Source:
    own = (found.slope, found.inter) != (1.0, 0.0)
    channel = modality.channels[0] if modality.channels else Channel(name="volume", unit=modality.unit)
    return Source(
        reader="nifti",
        files=(found.path,),
        selector={
            "volume": volume,
            "scale": found.slope if own else modality.scale,
            "offset": found.inter if own else modality.offset,
            "nodata": modality.nodata,
        },
        modality=modality.name,
        channels=(channel,),
        shape=found.shape,
        dtype=np.dtype(found.dtype).name,
        geometry=VolumeGeometry(found.affine),
        flags=found.flags if modality.channels else (*found.flags, "MODALITY_UNNAMED"),
    )


def read(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """Read the volume, or a window (slices, rows, columns) of it, as float32 physical values.

    Raises:
        ReadError: TRUNCATED, DECODE_FAILED, MALFORMED (changed since its header was read), or a reason of `header`.
    """
    path, selector = source.files[0], source.selector
    found = header(path)
    if found.shape != tuple(source.shape) or np.dtype(found.dtype).name != source.dtype:
        raise ReadError(f"{shown(path)} has changed since its header was read", Reason.MALFORMED.name)
    parts = whole_window(window, found.shape)
    stored = voxels(found, selector["volume"], parts[0])[:, parts[1], parts[2]]
    valid = np.ones(stored.shape, np.bool_) if selector["nodata"] is None else stored != selector["nodata"]
    scale, offset = selector["scale"], selector["offset"]
    with np.errstate(over="ignore", invalid="ignore"):
        same = (scale, offset) == (1.0, 0.0)
        values = (stored if same else stored.astype(np.float64) * scale + offset).astype(np.float32)
    valid &= np.isfinite(values)
    values[~valid] = 0.0
    geometry = source.geometry.shifted(*(part.start for part in parts))
    return Image(values[None], valid[None], source.channels, geometry, source.modality)
