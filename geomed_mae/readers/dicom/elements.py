"""Walk the elements of a DICOM data set in raw bytes, keeping a few and stepping over the rest.

Several times faster than building a pydicom Dataset, and it decodes nothing that is not asked for, so no warning can
quote a value. Layout: PS3.5 section 7.1 (elements), 7.5 (sequences), 6.2.2 (UN of undefined length is implicit VR).
Damage ends the walk as the end of a file would; nesting and the number of elements are bounded.
"""

from __future__ import annotations

import struct
from collections.abc import Collection
from typing import BinaryIO, NamedTuple

from geomed_mae.errors import ReadError
from geomed_mae.readers.reasons import Reason

UNDEFINED_LENGTH = 0xFFFFFFFF
ITEM = 0xFFFEE000
ITEM_END = 0xFFFEE00D
SEQUENCE_END = 0xFFFEE0DD
ITEM_ENDS = (ITEM_END, SEQUENCE_END)

LONG_VR = frozenset({b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"})
"""Value representations whose explicit header is 12 bytes with a length of 4 (PS3.5 table 7.1-1)."""

CHUNK_BYTES = 1 << 14
"""How much is read at once: the header of nearly every single-frame file."""

MAX_DEPTH = 32
"""Sequences inside sequences; real objects stay below ten."""

MAX_ELEMENTS = 1 << 22
"""Elements walked over in one file: 65,536 frames with sixty attributes each, some seconds at worst."""

MAX_VALUE_BYTES = 1 << 28
"""A wanted value or sequence may have 256 MiB; the pixel data is not read here."""

_HEADS = {
    order: (struct.Struct(f"{order}HHL"), struct.Struct(f"{order}H"), struct.Struct(f"{order}L")) for order in "<>"
}


class Window:
    """Bytes of a file (or of a value) by absolute offset, read in chunks as they are needed."""

    def __init__(self, file: BinaryIO | None, size: int, buffer: bytes = b"") -> None:
        self.file, self.size, self.buffer, self.base = file, size, buffer, 0
        self.walked = 0

    @classmethod
    def over(cls, content: bytes) -> Window:
        """Return a window over bytes in memory."""
        return cls(None, len(content), content)

    def load(self, offset: int, length: int) -> None:
        """Make `length` bytes from `offset` on part of the buffer, fewer where the file ends before."""
        if self.file is None or (self.base <= offset and offset + length <= self.base + len(self.buffer)):
            return
        self.file.seek(offset)
        self.buffer, self.base = self.file.read(max(length, CHUNK_BYTES)), offset

    def take(self, offset: int, length: int) -> bytes:
        """Return `length` bytes from `offset` on, fewer where the file ends before.

        Raises:
            ReadError: TOO_LARGE beyond MAX_VALUE_BYTES.
        """
        if length > MAX_VALUE_BYTES:
            raise ReadError(f"one attribute has {length} bytes", Reason.TOO_LARGE.name)
        self.load(offset, length)
        start = offset - self.base
        return self.buffer[start : start + length]

    def count(self) -> None:
        """Count one more element.

        Raises:
            ReadError: MALFORMED beyond MAX_ELEMENTS.
        """
        self.walked += 1
        if self.walked > MAX_ELEMENTS:
            raise ReadError(f"more than {MAX_ELEMENTS} attributes", Reason.MALFORMED.name)


class Elements(NamedTuple):
    """Raw values by tag; the tags that came as UN, whose sequences are implicit VR; and how the values are encoded."""

    raw: dict[int, bytes]
    unknown: frozenset[int]
    implicit: bool
    big: bool


class Head(NamedTuple):
    """Header of one element: its tag, VR (b"" in implicit VR), declared length, and where its value starts."""

    tag: int
    vr: bytes
    length: int
    start: int


def is_implicit(window: Window, offset: int, *, declared: bool) -> bool:
    """Say whether the element at `offset` has no VR, whatever the transfer syntax declares: writers confuse the two.

    In implicit VR the two bytes are half of a length, which makes two capital letters only from 16 kB on.
    """
    vr = window.take(offset, 8)[4:6]
    return declared if len(vr) < 2 else not _is_vr(vr)


def _is_vr(vr: bytes) -> bool:
    return 0x41 <= vr[0] <= 0x5A and 0x41 <= vr[1] <= 0x5A


def head_at(window: Window, offset: int, *, implicit: bool, big: bool) -> Head | None:
    """Return the header of the element at `offset`, None at the end of the file."""
    window.load(offset, 12)
    at, buffer = offset - window.base, window.buffer
    if at + 8 > len(buffer):
        return None
    head, short, long = _HEADS[">" if big else "<"]
    group, element, length = head.unpack_from(buffer, at)
    tag = group << 16 | element
    if implicit or group == 0xFFFE:
        return Head(tag, b"", length, offset + 8)
    vr = buffer[at + 4 : at + 6]
    if vr in LONG_VR:
        if at + 12 > len(buffer):
            return None
        return Head(tag, vr, long.unpack_from(buffer, at + 8)[0], offset + 12)
    if _is_vr(vr):
        return Head(tag, vr, short.unpack_from(buffer, at + 6)[0], offset + 8)
    # Some writers leave single elements without a VR in explicit files; pydicom reads them so, too.
    return Head(tag, b"", length, offset + 8)


def walk(
    window: Window, offset: int, *, implicit: bool, big: bool, wanted: Collection[int], stop: Collection[int]
) -> tuple[Elements, Head | None, int]:
    """Collect the wanted elements from `offset` on, up to an element in `stop`, the end of an item, or of the bytes.

    Returns:
        (elements, header of the element that stopped the walk or None, the offset reached).

    Raises:
        ReadError: MALFORMED (nested or many beyond reason), TOO_LARGE.
    """
    raw: dict[int, bytes] = {}
    unknown = set()
    found: Head | None = None
    # This loop is the cost of scanning an archive's headers: `head_at` is written out here.
    head, short, long = _HEADS[">" if big else "<"]
    buffer, base = window.buffer, window.base
    while True:
        at = offset - base
        if at < 0 or at + 12 > len(buffer):
            window.load(offset, 12)
            buffer, base = window.buffer, window.base
            at = offset - base
            if at + 8 > len(buffer):
                break
        group, element, length = head.unpack_from(buffer, at)
        tag = group << 16 | element
        start, vr = offset + 8, b""
        if not implicit and group != 0xFFFE:
            vr = buffer[at + 4 : at + 6]
            if vr in LONG_VR:
                if at + 12 > len(buffer):
                    break
                start, length = offset + 12, long.unpack_from(buffer, at + 8)[0]
            elif _is_vr(vr):
                length = short.unpack_from(buffer, at + 6)[0]
        if tag in stop or tag in ITEM_ENDS:
            found = Head(tag, vr, length, start)
            break
        window.walked += 1
        if window.walked > MAX_ELEMENTS:
            raise ReadError(f"more than {MAX_ELEMENTS} attributes", Reason.MALFORMED.name)
        if length == UNDEFINED_LENGTH:
            end, inner = _sequence_end(window, start, implicit=implicit or vr == b"UN", big=big, depth=1)
        else:
            end = inner = start + length
        if end > window.size:
            break
        if tag in wanted:
            raw[tag] = window.take(start, inner - start)
            if vr == b"UN":
                unknown.add(tag)
        if window.base != base:
            buffer, base = window.buffer, window.base
        offset = end
    return Elements(raw, frozenset(unknown), implicit, big), found, offset


def _sequence_end(window: Window, offset: int, *, implicit: bool, big: bool, depth: int) -> tuple[int, int]:
    """Return where a sequence of undefined length ends: (after, before) its delimiter."""
    if depth > MAX_DEPTH:
        raise ReadError(f"sequences are nested more than {MAX_DEPTH} deep", Reason.MALFORMED.name)
    while (head := head_at(window, offset, implicit=True, big=big)) is not None:
        window.count()
        if head.tag == SEQUENCE_END:
            return head.start, offset
        if head.tag != ITEM:
            raise ReadError("a sequence holds something else than items", Reason.MALFORMED.name)
        if head.length == UNDEFINED_LENGTH:
            offset = _item_end(window, head.start, implicit=implicit, big=big, depth=depth)
        else:
            offset = head.start + head.length
    return window.size + 1, window.size


def _item_end(window: Window, offset: int, *, implicit: bool, big: bool, depth: int) -> int:
    """Return the offset after the delimiter of an item of undefined length."""
    implicit = implicit or _item_is_implicit(window, offset)
    head, short, long = _HEADS[">" if big else "<"]
    buffer, base = window.buffer, window.base
    while True:
        # As in `walk`: writers that leave lengths undefined make this loop as hot as that one.
        at = offset - base
        if at < 0 or at + 12 > len(buffer):
            window.load(offset, 12)
            buffer, base = window.buffer, window.base
            at = offset - base
            if at + 8 > len(buffer):
                return window.size + 1
        group, element, length = head.unpack_from(buffer, at)
        start, unknown = offset + 8, False
        if group == 0xFFFE:
            if element == ITEM_END & 0xFFFF:
                return start
        elif not implicit:
            vr = buffer[at + 4 : at + 6]
            if vr in LONG_VR:
                if at + 12 > len(buffer):
                    return window.size + 1
                start, length, unknown = offset + 12, long.unpack_from(buffer, at + 8)[0], vr == b"UN"
            elif _is_vr(vr):
                length = short.unpack_from(buffer, at + 6)[0]
        window.count()
        if length == UNDEFINED_LENGTH:
            offset, _ = _sequence_end(window, start, implicit=implicit or unknown, big=big, depth=depth + 1)
            buffer, base = window.buffer, window.base
        else:
            offset = start + length


def _item_is_implicit(window: Window, offset: int) -> bool:
    head = window.take(offset, 8)
    return head[:2] not in (b"\xfe\xff", b"\xff\xfe") and is_implicit(window, offset, declared=False)


def items_of(content: bytes, *, implicit: bool, big: bool, wanted: Collection[int]) -> list[Elements]:
    """Return the wanted elements of each item in the value of a sequence.

    Raises:
        ReadError: MALFORMED, TOO_LARGE.
    """
    window = Window.over(content)
    found, offset = [], 0
    while (head := head_at(window, offset, implicit=True, big=big)) is not None:
        if head.tag != ITEM:
            break
        if head.length == UNDEFINED_LENGTH:
            inner = implicit or _item_is_implicit(window, head.start)
            elements, end, offset = walk(window, head.start, implicit=inner, big=big, wanted=wanted, stop=())
            offset = offset if end is None else end.start
        else:
            item = Window.over(content[head.start : head.start + head.length])
            inner = implicit or _item_is_implicit(item, 0)
            elements, _, _ = walk(item, 0, implicit=inner, big=big, wanted=wanted, stop=())
            offset = head.start + head.length
        found.append(elements)
        if offset >= len(content):
            break
    return found
