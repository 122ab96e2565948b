"""DICOM: files to Sources to Images. The parts are

    file           open with limits: magic, transfer syntax, deflate, where the pixel data lies
    values         the whitelist of attributes, decoded from raw bytes
    private        what vendors say in private attributes only
    image_header   one file's Header
    frames         what differs from frame to frame, multiframe what tells frames apart
    mosaic         mosaics of Siemens, cut by what csa finds in the private headers, and of UIH
    limits         not an image, too large, too short: refused before any decoder runs
    geometry       order along the normal, uniform runs, tilt, named tolerances
    repeats        time points, echoes and b-values of one series taken apart
    channels       the Channel, from the header's physics
    select         which modality a file belongs to
    duplicates     the same instance, or the same pixels, twice
    series         headers to Sources
    bind           series of one study as channels of one Image
    elements       the walk over raw elements, without pydicom
    spacing        pixel spacing of 2D images
    suv            PET: standardised uptake values
    lut            modality LUT and palettes
    codestream     what compressed frames say of themselves, before they are decoded
    pixels         decoding, padding, rescale, colour
    labels         SEG (seg, seg_frames) and RTSTRUCT (rtstruct) onto the voxels of an image
    text           names in the character set of their file
    origin         patient, study and slices, for objects derived from an image

An accepted volume puts every slice within `dicom.geometry.POSITION_TOLERANCE_MM` of the file's own position; gantry
tilt stays in the affine as shear, nothing is resampled. Values are what the rescale of each slice's own file gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, VolumeGeometry
from geomed_mae.modalities import Modality
from geomed_mae.readers.dicom.bind import is_bound, read_bound
from geomed_mae.readers.dicom.file import looks_like_dicom, open_dicom
from geomed_mae.readers.dicom.geometry import POSITION_TOLERANCE_MM
from geomed_mae.readers.dicom.image_header import Header, parse_header, read_header
from geomed_mae.readers.dicom.labels import label_references, read_labels
from geomed_mae.readers.dicom.mosaic import cut, tiled
from geomed_mae.readers.dicom.pixels import codec_problem, decode
from geomed_mae.readers.dicom.series import group_headers
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import check_regular
from geomed_mae.readers.source import Refusal, Source, Survey, whole_window

__all__ = ["Header", "group", "header", "label_references", "read", "read_labels", "sniff"]

SUFFIXES = (".dcm", ".dicom", ".dic", ".ima")
EXTRA = "med"
PACKAGE = "pydicom"
NOT_THIS_FORMAT = Reason.NOT_DICOM


def sniff(path: Path, head: bytes) -> bool:
    """Say whether the first bytes are DICOM's, whatever the file is called."""
    return looks_like_dicom(head)


def header(path: Path) -> Header | Refusal:
    """Read one file's header, no pixels; refuse what is no readable image."""
    try:
        found = read_header(path)
    except ReadError as error:
        return Refusal(path, Reason[error.reason], str(error))
    if problem := codec_problem(found.syntax):
        return Refusal(path, Reason.CODEC_MISSING, problem)
    return found


def group(headers: Sequence[Header], modalities: Sequence[Modality]) -> Survey:
    """Group headers into future Images; see `dicom.series`."""
    return group_headers(headers, modalities)


def read(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """Read a Source, or a window of it; only the slices of the window are decoded.

    Returns:
        an Image: (1, slices, rows, columns) in LPS for volumes, (channels, slices, rows, columns) for bound series,
        (1 or 3, rows, columns) for planes.

    Raises:
        ReadError: a file is gone, changed, or does not decode; the text names a slice's number, never a file.
    """
    if is_bound(source):
        return read_bound(source, window, read)
    volume = isinstance(source.geometry, VolumeGeometry)
    ranges = [(part.start, part.stop) for part in whole_window(window, source.shape)]
    planes = range(*ranges[0]) if volume else range(1)
    (top, bottom), (left, right) = ranges[-2:]
    array = np.zeros((len(source.channels), len(planes), bottom - top, right - left), dtype=np.float32)
    valid = np.zeros((1, *array.shape[1:]), dtype=bool)
    for file, wanted in _by_file(source, planes).items():
        for plane, values, mask in _read_file(source, file, wanted):
            array[:, plane - planes.start] = values[..., top:bottom, left:right]
            valid[0, plane - planes.start] = mask[top:bottom, left:right]
    if not volume:
        array, valid = array[:, 0], valid[:, 0]
    geometry = source.geometry
    starts = [start for start, _ in ranges]
    return Image(
        array=array,
        valid=valid,
        channels=source.channels,
        geometry=geometry if not any(starts) else geometry.shifted(*starts),
        modality=source.modality,
    )


def _by_file(source: Source, planes: range) -> dict[Path, list[tuple[int, int]]]:
    """Return, per file, the wanted (plane, frame) pairs."""
    frames = source.selector.get("frames")
    files = source.selector.get("files")
    found: dict[Path, list[tuple[int, int]]] = {}
    for plane in planes:
        if files is not None:
            file = source.files[files[plane]]
        else:
            file = source.files[0] if frames is not None else source.files[plane]
        found.setdefault(file, []).append((plane, 0 if frames is None else frames[plane]))
    return found


def _read_file(
    source: Source, file: Path, wanted: Sequence[tuple[int, int]]
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Decode the wanted frames of one file: (plane, values, valid) each, checked against what was indexed."""
    place = f"slice {wanted[0][0] + 1} of {source.shape[0]}" if len(source.shape) == 3 else "the image"
    try:
        path = check_regular(file)
    except ReadError as error:
        raise ReadError(f"{place}: {Reason[error.reason].value}", error.reason) from None
    try:
        # The header is checked again: files change between indexing and reading, and limits must hold when they do.
        opened = open_dicom(path)
        found = parse_header(opened)
        _check_unchanged(source, tiled(found), wanted)
        frames = [0] if found.mosaic else [frame for _, frame in wanted]
        decoded = decode(
            opened,
            found,
            frames,
            invert=not isinstance(source.geometry, VolumeGeometry),
            channels=len(source.channels),
            factor=source.selector.get("factor", 1.0),
        )
    except ReadError as error:
        raise ReadError(f"{place}: {error}", error.reason) from None
    if found.mosaic:
        sheets = decoded[0]
        return [(plane, *(cut(sheet, found.mosaic, tile) for sheet in sheets)) for plane, tile in wanted]
    return [(plane, *pair) for (plane, _), pair in zip(wanted, decoded, strict=True)]


def _check_unchanged(source: Source, found: Header, wanted: Sequence[tuple[int, int]]) -> None:
    if (found.rows, found.columns) != source.shape[-2:] or max(frame for _, frame in wanted) >= len(found.frames):
        raise ReadError("the file is not the one that was indexed: its size differs", Reason.LENGTH_MISMATCH.name)
    if not isinstance(source.geometry, VolumeGeometry):
        return
    for plane, frame in wanted:
        position = found.frames[frame].position
        expected = source.geometry.affine @ (plane, 0, 0, 1)
        if (
            position is None
            or len(position) != 3
            or not np.linalg.norm(np.subtract(position, expected[:3])) <= 1.001 * POSITION_TOLERANCE_MM
        ):
            raise ReadError("the file is not the one that was indexed: its position differs", Reason.BAD_GEOMETRY.name)
