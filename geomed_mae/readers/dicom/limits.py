"""Is a DICOM object an image at all, is it small enough, and is its pixel data as long as its header promises?

Everything is answered from the header and the file's size, before any decoder runs.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.elements import UNDEFINED_LENGTH
from geomed_mae.readers.dicom.file import NATIVE_SYNTAXES, PIXEL_DATA, Opened
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import quoted

if TYPE_CHECKING:
    from geomed_mae.readers.dicom.image_header import Header

MAX_FRAME_PIXELS = 1 << 26
"""67 megapixels: three times the largest mammogram, and half a GiB as the float64 of the rescale."""

MAX_IMAGE_VALUES = 1 << 30
"""Samples of one file or volume: 4 GiB as float32, a thousand slices of 1024 x 1024."""

MAX_FRAMES = 1 << 16
"""Frames in one file."""

GREY_OR_PALETTE = frozenset({"MONOCHROME1", "MONOCHROME2", "PALETTE COLOR"})
COLOUR = frozenset({"RGB", "YBR_FULL", "YBR_FULL_422", "YBR_ICT", "YBR_RCT"})
"""Values of PhotometricInterpretation (PS3.3 C.7.6.3.1.2) by samples a pixel; others (CMYK, HSV, YBR_PARTIAL) are
retired or belong to video."""

PARAMETRIC_MAP = "1.2.840.10008.5.1.4.1.1.30"
"""Parametric Map Storage: an image of measured values, though its name does not say so (PS3.3 A.75)."""

NON_IMAGE_MODALITIES = frozenset(
    {"AU", "DOC", "ECG", "EPS", "FID", "HD", "KO", "PLAN", "PR", "REG", "RTDOSE", "RTPLAN", "RTRECORD", "RTSTRUCT"}
    | {"RWV", "SEG", "SMR", "SR", "SRF", "STAIN", "TEXTUREMAP"}
)
"""Values of Modality (PS3.3 C.7.3.1.1.1) that are no pictures; they decide where the SOP class is unknown."""

CLASS_MODALITIES = {
    "1.2.840.10008.5.1.4.1.1.1": "CR",
    "1.2.840.10008.5.1.4.1.1.1.1": "DX",
    "1.2.840.10008.5.1.4.1.1.1.2": "MG",
    "1.2.840.10008.5.1.4.1.1.2": "CT",
    "1.2.840.10008.5.1.4.1.1.2.1": "CT",
    "1.2.840.10008.5.1.4.1.1.4": "MR",
    "1.2.840.10008.5.1.4.1.1.4.1": "MR",
    "1.2.840.10008.5.1.4.1.1.3.1": "US",
    "1.2.840.10008.5.1.4.1.1.6.1": "US",
    "1.2.840.10008.5.1.4.1.1.12.1": "XA",
    "1.2.840.10008.5.1.4.1.1.128": "PT",
    "1.2.840.10008.5.1.4.1.1.130": "PT",
}
"""Modality that a SOP class has by its definition (PS3.4 B.5), for files from which Modality was removed."""


def check_kind(sop_class: str, modality: str, opened: Opened) -> None:
    """Refuse what is no image, and a file that ends before its pixels.

    Raises:
        ReadError: NON_IMAGE, NO_PIXEL_DATA, NOT_DICOM (no magic, and not all that an image needs).
    """
    name = _class_name(sop_class)
    values = opened.values
    if "Image Storage" not in name and sop_class != PARAMETRIC_MAP and (name or modality in NON_IMAGE_MODALITIES):
        raise ReadError(f"it holds {name or quoted(modality)}, not an image", Reason.NON_IMAGE.name)
    pixels = opened.pixel_tag is not None and opened.bytes_left > 0
    if "NO_PREAMBLE" in opened.flags:
        old = values.text("RecognitionCode").upper().startswith("ACR-NEMA")
        if not (pixels and "Rows" in values and "Columns" in values and (old or "SOPClassUID" in values)):
            raise ReadError("it has no DICM magic and does not parse as an image", Reason.NOT_DICOM.name)
    if not pixels:
        # With Modality there, the file meta is whole, and a class outside the standard is no cut one.
        if not name and sop_class and "Modality" in values and "Rows" not in values:
            raise ReadError("an object of a private class without pixels", Reason.NON_IMAGE.name)
        raise ReadError("the file ends before its pixel data", Reason.NO_PIXEL_DATA.name)


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
    _check_samples(header, opened)
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


def _check_samples(header: Header, opened: Opened) -> None:
    """Refuse kinds of samples that are not read: packed ones above all."""
    stored, allocated, high = header.bits_stored, header.bits_allocated, header.high_bit
    whole = {PIXEL_DATA: (8, 16, 32, 64)}.get(opened.pixel_tag or 0, (32, 64))
    if allocated not in whole or not 1 <= stored <= high + 1 <= allocated:
        raise ReadError(f"{stored} of {allocated} bits, high bit {high}, are not read", Reason.DTYPE_UNSUPPORTED.name)
    if high + 1 != stored and opened.syntax not in NATIVE_SYNTAXES:
        # A codec's samples have no unused low bits; which bits such a header means cannot be told.
        raise ReadError(f"high bit {high} of compressed {stored} bits", Reason.DTYPE_UNSUPPORTED.name)
    if header.samples not in (1, 3) or (header.samples == 3 and (allocated not in (8, 16) or high + 1 != stored)):
        raise ReadError(
            f"{header.samples} samples a pixel of {stored} of {allocated} bits are not read",
            Reason.DTYPE_UNSUPPORTED.name,
        )
    if header.photometric not in (GREY_OR_PALETTE if header.samples == 1 else COLOUR):
        raise ReadError(
            f"PhotometricInterpretation does not go with {header.samples} samples a pixel",
            Reason.DTYPE_UNSUPPORTED.name,
        )


def _check_native(header: Header, opened: Opened) -> None:
    frame_bytes = header.rows * header.columns * header.samples * header.bits_allocated // 8
    if header.photometric == "YBR_FULL_422":
        if header.columns % 2:
            raise ReadError("YBR_FULL_422 with an odd number of columns", Reason.DTYPE_UNSUPPORTED.name)
        frame_bytes = frame_bytes * 2 // 3  # two pixels share their chroma (PS3.3 C.7.6.3.1.2)
    expected = frame_bytes * len(header.frames)
    declared, left = opened.pixel_length, opened.bytes_left
    if left < expected <= declared != UNDEFINED_LENGTH:
        raise ReadError(f"{left} of {expected} bytes of pixel data are there", Reason.TRUNCATED.name)
    # One odd frame is padded by a byte; some writers pad more, but a whole frame more means a wrong frame count.
    subsampled = header.photometric == "YBR_FULL_422" and declared >= expected * 3 // 2
    if declared < expected or declared > left or declared >= expected + frame_bytes or subsampled:
        raise ReadError(
            f"{declared} bytes of pixel data are declared, {expected} expected", Reason.LENGTH_MISMATCH.name
        )


def _check_fragments(header: Header, opened: Opened) -> None:
    if opened.pixel_length != UNDEFINED_LENGTH:
        raise ReadError("compressed pixel data is not in fragments", Reason.LENGTH_MISMATCH.name)
    count = len(opened.fragments.spans)
    if not opened.fragments.complete:
        raise ReadError("the last fragment of compressed pixel data is cut", Reason.TRUNCATED.name)
    if count < len(header.frames):
        raise ReadError(f"{count} fragments hold {len(header.frames)} frames", Reason.LENGTH_MISMATCH.name)
