"""Open one DICOM file with limits: file meta, transfer syntax, wanted attributes, and where its pixel data lies.

Never `dcmread`: it inflates a deflated file without bound, accepts text with `force`, and says nothing when a file ends
before its pixel data. `dicom.elements` walks the bytes; limits and checks are here.
Layout of a file: PS3.10 section 7.1. Transfer syntaxes: PS3.5 annex A. Pixel data in fragments: PS3.5 A.4.
"""

from __future__ import annotations

import io
import logging
import struct
import threading
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.elements import (
    ITEM,
    UNDEFINED_LENGTH,
    Head,
    Window,
    head_at,
    is_implicit,
    walk,
)
from geomed_mae.readers.dicom.values import WANTED, Values
from geomed_mae.readers.reasons import Reason

PREAMBLE_BYTES = 128
"""Bytes before the magic `DICM` (PS3.10 section 7.1)."""

MAX_INFLATED_BYTES = 1 << 25
"""A deflated data set may become 32 MiB: far more than one uncompressed slice, far less than a bomb."""
INFLATED_PART = 1 << 20
"""Bytes that are inflated at a time."""

IMPLICIT_LITTLE = "1.2.840.10008.1.2"
EXPLICIT_LITTLE = "1.2.840.10008.1.2.1"
DEFLATED_LITTLE = "1.2.840.10008.1.2.1.99"
EXPLICIT_BIG = "1.2.840.10008.1.2.2"
NATIVE_SYNTAXES = frozenset({IMPLICIT_LITTLE, EXPLICIT_LITTLE, DEFLATED_LITTLE, EXPLICIT_BIG})
"""Transfer syntaxes whose pixels are plain samples; every other one holds fragments of a codec's stream."""

PIXEL_DATA = 0x7FE00010
FLOAT_PIXELS = 0x7FE00008
DOUBLE_PIXELS = 0x7FE00009
PIXEL_TAGS = frozenset({PIXEL_DATA, FLOAT_PIXELS, DOUBLE_PIXELS})
"""PixelData, FloatPixelData and DoubleFloatPixelData."""

BARE_VR = frozenset({b"UL", b"CS", b"UI", b"DA", b"TM", b"LO", b"SH", b"OB"})
"""Value representations with which a data set without file meta can begin in explicit VR (groups 2 and 8, PS3.6)."""

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
class Fragments:
    """Items of an encapsulated stream.

    Attributes:
        table: (start, length) of the basic offset table's value.
        spans: (start, length) of each fragment, without its item header.
        complete: False when the last one runs past the file's end.
    """

    table: tuple[int, int] = (0, 0)
    spans: tuple[tuple[int, int], ...] = ()
    complete: bool = True


@dataclass(frozen=True, slots=True)
class Opened:
    """A parsed header and where the pixel element lies; nothing is held open.

    Attributes:
        path: the file.
        values: the whitelisted attributes.
        syntax: UID of the transfer syntax.
        meta_class: MediaStorageSOPClassUID of the file meta, "" when absent.
        pixel_tag: tag of the pixel element, or None.
        pixel_vr: its VR, b"" in implicit VR.
        pixel_length: its declared length in bytes, UNDEFINED_LENGTH for fragments, 0 without pixel data.
        pixel_start: offset of its value in the (inflated) file.
        bytes_left: how many bytes of the (inflated) file follow the pixel element's header.
        fragments: the items of an encapsulated stream.
        flags: NO_PREAMBLE, SYNTAX_ASSUMED.
        inflated: the whole data set of a deflated file, else b"".
    """

    path: Path
    values: Values
    syntax: str
    meta_class: str
    pixel_tag: int | None
    pixel_vr: bytes
    pixel_length: int
    pixel_start: int
    bytes_left: int
    fragments: Fragments
    flags: tuple[str, ...]
    inflated: bytes

    @contextmanager
    def body(self) -> Iterator[BinaryIO]:
        """Open the (inflated) file, so that `pixel_start` and the fragments can be read from it."""
        with io.BytesIO(self.inflated) if self.inflated else self.path.open("rb", buffering=0) as file:
            yield file


class _Silence:
    """Counts who is inside `quiet`: the first one in silences, the last one out restores."""

    lock = threading.Lock()
    inside = 0
    context = warnings.catch_warnings()
    level = logging.NOTSET


@contextmanager
def quiet() -> Iterator[None]:
    """Silence pydicom's warnings and log records here: they quote raw values (PS3.15 annex E lists whose).

    Python's warning filters are the process's own: while any thread is inside, warnings of all threads are silenced,
    and the filters are back when the last one leaves, in whatever order they leave.
    """
    logger = logging.getLogger("pydicom")
    with _Silence.lock:
        if _Silence.inside == 0:
            _Silence.context, _Silence.level = warnings.catch_warnings(), logger.level
            _Silence.context.__enter__()
            warnings.simplefilter("ignore")
            logger.setLevel(logging.CRITICAL + 1)
        _Silence.inside += 1
    try:
        yield
    finally:
        with _Silence.lock:
            _Silence.inside -= 1
            if _Silence.inside == 0:
                _Silence.context.__exit__(None, None, None)
                logger.setLevel(_Silence.level)


def looks_like_dicom(head: bytes) -> bool:
    """Say whether the first bytes are a DICOM file's: `DICM` at 128, or a plausible first element of group 2 or 8.

    Without a preamble, implicit and explicit little endian are taken; ACR-NEMA files begin in the same way.
    """
    if head[PREAMBLE_BYTES : PREAMBLE_BYTES + 4] == b"DICM":
        return True
    if len(head) < 16:
        return False
    group, element, length = struct.unpack("<HHL", head[:8])
    if group not in (0x0002, 0x0008) or element > 0x0018:
        return False
    if head[4:6] in BARE_VR:
        length = struct.unpack("<H", head[6:8])[0]
    return length <= 64 and length % 2 == 0 and (group == 0x0008 or head[4:6] in BARE_VR)


def open_dicom(path: Path, *, wanted: frozenset[int] = WANTED) -> Opened:
    """Parse a checked regular file up to its pixel data, keeping the `wanted` attributes.

    Raises:
        ReadError: NOT_DICOM, MALFORMED, DEFLATE_LIMIT, TOO_LARGE or VANISHED; the text holds nothing of the contents.
    """
    try:
        with path.open("rb", buffering=0) as file:
            return _parse(file, path, wanted)
    except PARSE_ERRORS as error:
        if isinstance(error, ReadError):
            raise
        if isinstance(error, OSError):
            raise ReadError("the file cannot be read (any more)", Reason.VANISHED.name) from None
        raise ReadError(f"the DICOM structure does not parse ({type(error).__name__})", Reason.MALFORMED.name) from None


def _parse(file: BinaryIO, path: Path, wanted: frozenset[int]) -> Opened:
    window = Window(file, file.seek(0, io.SEEK_END))
    flags: tuple[str, ...] = ()
    offset = PREAMBLE_BYTES + 4
    if window.take(0, offset)[PREAMBLE_BYTES:] != b"DICM":
        offset, flags = 0, ("NO_PREAMBLE",)
    syntax, meta_class, offset = _file_meta(window, offset)
    inflated = b""
    if syntax == DEFLATED_LITTLE:
        file.seek(offset)
        inflated = _inflate(file)
        window, offset = Window.over(inflated), 0
    big = syntax == EXPLICIT_BIG
    implicit = is_implicit(window, offset, declared=syntax in ("", IMPLICIT_LITTLE))
    if not syntax:
        syntax = IMPLICIT_LITTLE if implicit else EXPLICIT_LITTLE
        flags = flags or ("SYNTAX_ASSUMED",)
    elements, head, _ = walk(window, offset, implicit=implicit, big=big, wanted=wanted, stop=PIXEL_TAGS)
    if head is None or head.tag not in PIXEL_TAGS:
        head = None
    left = 0 if head is None else window.size - head.start
    fragments = Fragments()
    if head is not None and head.length == UNDEFINED_LENGTH and syntax not in NATIVE_SYNTAXES:
        fragments = _fragments(window, head.start)
    tag, vr, length, start = head or Head(0, b"", 0, 0)
    return Opened(
        path, Values(elements), syntax, meta_class, tag or None, vr, length, start, left, fragments, flags, inflated
    )


def _file_meta(window: Window, offset: int) -> tuple[str, str, int]:
    """Return (transfer syntax or "", SOP class or "", where the data set starts) of group 2, explicit VR by rule."""
    found = {0x00020002: "", 0x00020010: ""}
    implicit = is_implicit(window, offset, declared=False)
    while (head := head_at(window, offset, implicit=implicit, big=False)) is not None and head.tag >> 16 == 0x0002:
        if head.tag in found:
            found[head.tag] = window.take(head.start, min(head.length, 1024)).decode("latin-1").strip("\0 ")
        window.count()
        offset = head.start + head.length
    return found[0x00020010], found[0x00020002], offset


def _inflate(file: BinaryIO) -> bytes:
    """Return the rest of `file` inflated (PS3.5 A.5: a raw deflate stream), bounded in memory and time."""
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    inflated = bytearray()
    while not inflater.eof:
        chunk = inflater.unconsumed_tail or file.read(1 << 16)
        # In small parts: a part is held twice, and zlib makes room for as much as it is allowed to give. It may keep
        # some bytes back where a part ends, so that the end of the file is not yet the end.
        part = inflater.decompress(chunk, min(INFLATED_PART, MAX_INFLATED_BYTES + 1 - len(inflated)))
        if not chunk and not part:
            break
        inflated += part
        if len(inflated) > MAX_INFLATED_BYTES:
            raise ReadError(f"the data set inflates beyond {MAX_INFLATED_BYTES >> 20} MiB", Reason.DEFLATE_LIMIT.name)
    return bytes(inflated)


def _fragments(window: Window, offset: int) -> Fragments:
    """Walk the items of an encapsulated stream; the first is the offset table, the others fragments."""
    spans: list[tuple[int, int]] = []
    complete = True
    while (head := head_at(window, offset, implicit=True, big=False)) is not None and head.tag == ITEM:
        if head.start + head.length > window.size:
            complete = False
            break
        if head.length or not spans:
            spans.append((head.start, head.length))
        window.count()
        offset = head.start + head.length
    # Without a sequence delimiter the stream is whole as long as its last item is.
    return Fragments(spans[0] if spans else (0, 0), tuple(spans[1:]), complete)
