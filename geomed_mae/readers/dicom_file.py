"""Open one DICOM file with limits: file meta, transfer syntax, data set, and where its pixel data lies.

Never `dcmread`: it inflates a deflated file without bound, accepts text with `force`, and says nothing when a file ends
before its pixel data. Its building block `read_dataset` parses the elements here; limits and checks are ours.
Layout of a file: PS3.10 section 7.1. Transfer syntaxes: PS3.5 annex A. Pixel data in fragments: PS3.5 A.4.
"""

from __future__ import annotations

import io
import logging
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from geomed_mae.errors import ReadError
from geomed_mae.readers.reasons import Reason

if TYPE_CHECKING:
    from pydicom.dataset import Dataset

PREAMBLE_BYTES = 128
"""Bytes before the magic `DICM` (PS3.10 section 7.1)."""

MAX_INFLATED_BYTES = 1 << 25
"""A deflated data set may become 32 MiB: far more than one uncompressed slice, far less than a bomb."""

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
DEFLATED_LITTLE = "1.2.840.10008.1.2.1.99"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
NATIVE_SYNTAXES = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED_LITTLE, EXPLICIT_BIG})
"""Transfer syntaxes whose pixels are plain samples; every other one holds fragments of a codec's stream."""

PIXEL_TAGS = frozenset({0x7FE00008, 0x7FE00009, 0x7FE00010})
"""FloatPixelData, DoubleFloatPixelData and PixelData."""

UNDEFINED_LENGTH = 0xFFFFFFFF
ITEM_TAG = (0xFFFE, 0xE000)

PARSE_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
    struct.error,
    zlib.error,
)
"""What pydicom and its decoders raise on damaged bytes (RecursionError and NotImplementedError are RuntimeErrors).
Their texts quote raw values, which may be a patient's: only the type's name is ever passed on."""


@dataclass(frozen=True, slots=True)
class Opened:
    """A parsed data set and its pixel element.

    Attributes:
        dataset: every element before the pixel data, and the pixel data too where they were asked for.
        syntax: UID of the transfer syntax.
        pixel_tag: tag of the pixel element, or None.
        pixel_length: its declared length in bytes, UNDEFINED_LENGTH for fragments, 0 without pixel data.
        bytes_left: how many bytes of the (inflated) file follow the pixel element's header.
        fragments: (count, complete) of an encapsulated stream; complete is False when it runs past the file's end.
        flags: NO_PREAMBLE.
    """

    dataset: Dataset
    syntax: str
    pixel_tag: int | None
    pixel_length: int
    bytes_left: int
    fragments: tuple[int, bool]
    flags: tuple[str, ...]


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings and log records here: they quote raw values (PS3.15 annex E lists whose)."""
    logger = logging.getLogger("pydicom")
    level = logger.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logger.setLevel(logging.CRITICAL + 1)
        try:
            yield
        finally:
            logger.setLevel(level)


def looks_like_dicom(head: bytes) -> bool:
    """Say whether the first bytes are a DICOM file's: `DICM` at 128, or a plausible implicit VR element of group 8."""
    if head[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == b"DICM":
        return True
    if len(head) < 16:
        return False
    group, element, length = struct.unpack("<HHL", head[:8])
    return group == 0x0008 and element <= 0x0018 and length <= 64 and length % 2 == 0


def open_dicom(path: Path, *, pixels: bool) -> Opened:
    """Parse a checked regular file, to its pixel data or, with `pixels`, through them.

    Raises:
        ReadError: NOT_DICOM, MALFORMED, DEFLATE_LIMIT or VANISHED; the text holds nothing of the file's contents.
    """
    try:
        with quiet(), path.open("rb") as file:
            return _parse(file, pixels)
    except PARSE_ERRORS as error:
        if isinstance(error, ReadError):
            raise
        if isinstance(error, OSError):
            raise ReadError("the file cannot be read (any more)", Reason.VANISHED.name) from None
        raise ReadError(f"the DICOM structure does not parse ({type(error).__name__})", Reason.MALFORMED.name) from None


def _parse(file: BinaryIO, pixels: bool) -> Opened:
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.filereader import read_dataset
    from pydicom.uid import UID

    flags: tuple[str, ...] = ()
    meta = Dataset()
    if file.read(PREAMBLE_BYTES + 4)[PREAMBLE_BYTES:] == b"DICM":
        meta = read_dataset(file, False, True, stop_when=lambda tag, vr, length: tag >> 16 != 0x0002)
        syntax = str(meta.get("TransferSyntaxUID", "")).strip("\0 ") or IMPLICIT_LITTLE
    else:
        file.seek(0)
        syntax, flags = IMPLICIT_LITTLE, ("NO_PREAMBLE",)
    body = _inflate(file) if syntax == DEFLATED_LITTLE else file
    little = syntax != EXPLICIT_BIG
    dataset = read_dataset(body, syntax == IMPLICIT_LITTLE, little, stop_when=lambda tag, vr, length: tag in PIXEL_TAGS)
    if flags and not all(keyword in dataset for keyword in ("SOPClassUID", "Rows", "Columns")):
        raise ReadError("it has no DICM magic and does not parse as an implicit VR image", Reason.NOT_DICOM.name)
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = UID(syntax)
    if "MediaStorageSOPClassUID" in meta:
        dataset.file_meta.MediaStorageSOPClassUID = meta.MediaStorageSOPClassUID
    implicit, element = bool(dataset.original_encoding[0]), body.tell()
    tag, length = _pixel_element(body, implicit=implicit, big=not little)
    start = body.tell()
    left = body.seek(0, io.SEEK_END) - start
    fragments = (0, True)
    if length == UNDEFINED_LENGTH and syntax not in NATIVE_SYNTAXES:
        body.seek(start)
        fragments = _count_fragments(body, left)
    if pixels and tag in PIXEL_TAGS:
        body.seek(element)
        dataset.update(read_dataset(body, implicit, little, stop_when=lambda found, vr, length: found > tag))
    return Opened(dataset, syntax, tag, length, left, fragments, flags)


def _inflate(file: BinaryIO) -> BinaryIO:
    """Return the rest of `file` inflated (PS3.5 A.5: a raw deflate stream), bounded in memory and time."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = bytearray()
    while not inflater.eof:
        chunk = inflater.unconsumed_tail or file.read(1 << 16)
        if not chunk:
            break
        inflated += inflater.decompress(chunk, MAX_INFLATED_BYTES + 1 - len(inflated))
        if len(inflated) > MAX_INFLATED_BYTES:
            raise ReadError(f"the data set inflates beyond {MAX_INFLATED_BYTES >> 20} MiB", Reason.DEFLATE_LIMIT.name)
    return io.BytesIO(inflated)


def _pixel_element(file: BinaryIO, *, implicit: bool, big: bool) -> tuple[int | None, int]:
    """Read the element header at the file's position; return (tag, length), or (None, 0) at the end of the file."""
    head = file.read(8)
    if len(head) < 8:
        return None, 0
    order = ">" if big else "<"
    group, element = struct.unpack(f"{order}HH", head[:4])
    if implicit:
        return group << 16 | element, struct.unpack(f"{order}L", head[4:])[0]
    if head[4:6] in (b"OB", b"OW", b"OF", b"OD", b"OL", b"OV", b"UN"):
        longer = file.read(4)
        return (group << 16 | element, struct.unpack(f"{order}L", longer)[0]) if len(longer) == 4 else (None, 0)
    return group << 16 | element, struct.unpack(f"{order}H", head[6:])[0]


def _count_fragments(file: BinaryIO, left: int) -> tuple[int, bool]:
    """Walk the items of an encapsulated stream by seeking; the first is the offset table, the others fragments."""
    count = -1
    while left >= 8:
        group, element, length = struct.unpack("<HHL", file.read(8))
        left -= 8
        if (group, element) != ITEM_TAG:
            return max(count, 0), True
        if length > left:
            return max(count + 1, 0), False
        file.seek(length, io.SEEK_CUR)
        left -= length
        count += 1
    # Without a sequence delimiter the stream is whole as long as its last item is.
    return max(count, 0), True
