"""Is a DICOM object an image at all, is it small enough, and is its pixel data as long as its header promises?

Everything is answered from the header and the file's size, before any decoder runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom_file import NATIVE_SYNTAXES, UNDEFINED_LENGTH, Opened
from geomed_mae.readers.reasons import Reason

if TYPE_CHECKING:
    from geomed_mae.readers.dicom_header import Header

MAX_FRAME_PIXELS = 1 << 26
"""67 megapixels: three times the largest mammogram, and half a GiB as the float64 of the rescale."""

MAX_IMAGE_VALUES = 1 << 30
"""Samples of one file or volume: 4 GiB as float32, a thousand slices of 1024 x 1024."""

MAX_FRAMES = 1 << 16
"""Frames in one file."""

NON_IMAGE_MODALITIES = frozenset(
    {"AU", "DOC", "ECG", "EPS", "FID", "HD", "KO", "PLAN", "PR", "REG", "RTDOSE", "RTPLAN", "RTRECORD", "RTSTRUCT"}
    | {"RWV", "SEG", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP"}
)
"""Values of Modality (PS3.3 C.7.3.1.1.1) that are no pictures; they decide where the SOP class is unknown."""


def check_kind(sop_class: str, modality: str, opened: Opened) -> None:
    """Refuse what is no image, and a file that ends before its pixels.

    Raises:
        ReadError: NON_IMAGE, NO_PIXEL_DATA, DTYPE_UNSUPPORTED (floating point pixel data).
    """
    name = _class_name(sop_class)
    if "Image Storage" not in name and (name or modality in NON_IMAGE_MODALITIES):
        raise ReadError(f"it holds '{name or modality}', not an image", Reason.NON_IMAGE.name)
    if opened.pixel_tag is None or (opened.pixel_tag == 0x7FE00010 and opened.bytes_left == 0):
        # With Modality there, the file meta is whole, and a class outside the standard is no cut one.
        if not name and sop_class and "Modality" in opened.dataset and "Rows" not in opened.dataset:
            raise ReadError("an object of a private class without pixels", Reason.NON_IMAGE.name)
        raise ReadError("the file ends before its pixel data", Reason.NO_PIXEL_DATA.name)
    if opened.pixel_tag != 0x7FE00010:
        raise ReadError("floating point pixel data is not read", Reason.DTYPE_UNSUPPORTED.name)


@lru_cache(maxsize=512)
def _class_name(sop_class: str) -> str:
    """Return the standard's name of a SOP class, "" when it is blank or not in the standard."""
    from pydicom.uid import UID_dictionary

    return UID_dictionary[sop_class][0] if sop_class in UID_dictionary else ""


def check_pixels(header: Header, opened: Opened) -> None:
    """Refuse sizes beyond the limits, unknown sample types and pixel data of the wrong length.

    Raises:
        ReadError: DTYPE_UNSUPPORTED, TOO_LARGE, LENGTH_MISMATCH, TRUNCATED.
    """
    stored, allocated = header.bits_stored, header.bits_allocated
    if allocated not in (8, 16, 32) or not 1 <= stored <= allocated or header.high_bit != stored - 1:
        raise ReadError(
            f"{stored} of {allocated} bits, high bit {header.high_bit}, are not read", Reason.DTYPE_UNSUPPORTED.name
        )
    if header.samples not in (1, 3) or header.photometric.startswith("PALETTE"):
        raise ReadError(
            f"{header.samples} samples a pixel, or palette colours, are not read", Reason.DTYPE_UNSUPPORTED.name
        )
    pixels, frames = header.rows * header.columns, len(header.frames)
    if pixels == 0:
        raise ReadError("Rows or Columns is 0", Reason.MISSING_TAG.name)
    if pixels > MAX_FRAME_PIXELS or pixels * header.samples * frames > MAX_IMAGE_VALUES:
        raise ReadError(
            f"{frames} x {header.rows} x {header.columns} pixels; a frame may have {MAX_FRAME_PIXELS}, "
            f"a file {MAX_IMAGE_VALUES}",
            Reason.TOO_LARGE.name,
        )
    if opened.syntax in NATIVE_SYNTAXES:
        _check_native(header, opened)
    else:
        _check_fragments(header, opened)


def _check_native(header: Header, opened: Opened) -> None:
    frame_bytes = header.rows * header.columns * header.samples * header.bits_allocated // 8
    if header.photometric == "YBR_FULL_422":
        frame_bytes = frame_bytes * 2 // 3  # two pixels share their chroma (PS3.3 C.7.6.3.1.2)
    expected = frame_bytes * len(header.frames)
    declared, left = opened.pixel_length, opened.bytes_left
    if left < expected <= declared != UNDEFINED_LENGTH:
        raise ReadError(f"{left} of {expected} bytes of pixel data are there", Reason.TRUNCATED.name)
    # One odd frame is padded by a byte; some writers pad more, but a whole frame more means a wrong frame count.
    if declared < expected or declared > left or declared >= expected + frame_bytes:
        raise ReadError(
            f"{declared} bytes of pixel data are declared, {expected} expected", Reason.LENGTH_MISMATCH.name
        )


def _check_fragments(header: Header, opened: Opened) -> None:
    if opened.pixel_length != UNDEFINED_LENGTH:
        raise ReadError("compressed pixel data is not in fragments", Reason.LENGTH_MISMATCH.name)
    count, complete = opened.fragments
    if not complete:
        raise ReadError("the last fragment of compressed pixel data is cut", Reason.TRUNCATED.name)
    if count < len(header.frames):
        raise ReadError(f"{count} fragments hold {len(header.frames)} frames", Reason.LENGTH_MISMATCH.name)
