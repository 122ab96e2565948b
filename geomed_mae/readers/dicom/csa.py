"""Siemens' CSA headers: what the private attributes (0029,1010) and (0029,1020) hold, read with strict bounds.

The layout is not published; it is known from nibabel's `nicom` documentation ("Siemens format DICOM with CSA header")
and from SPM. Every length comes from the file: a value outside the bytes at hand ends the reading.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Collection

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.reasons import Reason

MAX_TAGS = 1000
"""Tags in one header, and items of one tag; scanners write some hundred."""

MAX_SLICES = 1024
"""Slices that a protocol may list."""

_TAG = struct.Struct("<64si4s3i")
_ITEM = struct.Struct("<4i")

_PROTOCOL = (b"### ASCCONV BEGIN", b"### ASCCONV END")
_POSITION = re.compile(
    rb"^\s*sSliceArray\.asSlice\[(\d{1,4})\]\.sPosition\.d(Sag|Cor|Tra)\s*=\s*([-+.\deE]{1,40})\s*$", re.M
)
_COUNT = re.compile(rb"^\s*sSliceArray\.lSize\s*=\s*(\d{1,4}|0x[\da-fA-F]{1,3})\s*$", re.M)


def csa_texts(blob: bytes, wanted: Collection[str]) -> dict[str, list[str]]:
    """Return the items of the wanted tags of a CSA header (either version), as texts without padding.

    In version 1 a constant is added to every length: the number of items of the first tag that has any (SPM and nibabel
    count differently where the first tag has none). A constant is right when every wanted item reads as a number.

    Raises:
        ReadError: MALFORMED.
    """
    second = blob[:4] == b"SV10"
    try:
        shifts: list[int | None] = [None] if second else list(_shifts(blob))
        for shift in shifts[:-1]:
            try:
                found = _walk(blob, wanted, shift)
            except (struct.error, ReadError):
                continue
            if found and all(_is_number(text) for texts in found.values() for text in texts):
                return found
        return _walk(blob, wanted, shifts[-1])
    except struct.error:
        raise ReadError("the private CSA header does not parse", Reason.MALFORMED.name) from None


def _shifts(blob: bytes) -> tuple[int, int]:
    first = _TAG.unpack_from(blob, 8)[4]
    return first or _TAG.unpack_from(blob, 8 + _TAG.size)[4], 0


def _is_number(text: str) -> bool:
    try:
        return bool(np.isfinite(float(text)))
    except ValueError:
        return False


def _walk(blob: bytes, wanted: Collection[str], shift: int | None) -> dict[str, list[str]]:
    offset = 8 if shift is None else 0
    (count,) = struct.unpack_from("<I", blob, offset)
    if not 0 < count <= MAX_TAGS:
        raise ReadError(f"the private CSA header says {count} tags", Reason.MALFORMED.name)
    offset += 8
    found: dict[str, list[str]] = {}
    for _ in range(count):
        name, _, _, _, items, _ = _TAG.unpack_from(blob, offset)
        offset += _TAG.size
        if not 0 <= items <= MAX_TAGS:
            raise ReadError(f"the private CSA header says {items} items", Reason.MALFORMED.name)
        texts, offset = _items(blob, offset, items, shift)
        label = name.split(b"\0", 1)[0].decode("latin-1")
        if label in wanted:
            found[label] = [text for text in texts if text]
    return found


def _items(blob: bytes, offset: int, count: int, shift: int | None) -> tuple[list[str], int]:
    """Return (texts, offset after them). `shift` corrects the lengths of version 1, None is version 2."""
    texts = []
    for _ in range(count):
        lengths = _ITEM.unpack_from(blob, offset)
        offset += _ITEM.size
        length = lengths[1] if shift is None else lengths[0] - shift
        if length < 0 or offset + length > len(blob):
            if shift is None:
                raise ReadError("an item of the private CSA header is too long", Reason.MALFORMED.name)
            # Version 1 ends a tag early with lengths that mean nothing.
            break
        texts.append(blob[offset : offset + length].split(b"\0", 1)[0].decode("latin-1").strip())
        offset += length + -length % 4
    return texts, offset


def protocol_positions(blob: bytes) -> np.ndarray | None:
    """Return the centres (n, 3) of the slices in LPS mm, as the protocol in a CSA series header lists them, or None.

    Coordinates that are 0 are left out in a protocol (Sag, Cor, Tra are x, y, z of the patient).
    """
    start = blob.find(_PROTOCOL[0])
    stop = blob.find(_PROTOCOL[1], start + 1)
    if start < 0 or stop < 0:
        return None
    text = blob[start:stop]
    counted = _COUNT.search(text)
    count = int(counted[1], 16 if counted[1].startswith(b"0x") else 10) if counted else 0
    if not 0 < count <= MAX_SLICES:
        return None
    positions = np.zeros((count, 3))
    for number, axis, value in _POSITION.findall(text):
        try:
            place = float(value)
        except ValueError:
            return None
        if int(number) < count:
            positions[int(number), (b"Sag", b"Cor", b"Tra").index(axis)] = place
    return positions if np.isfinite(positions).all() else None
