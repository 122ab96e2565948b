"""Tables that stored values are looked up in: the modality LUT and the palettes of PALETTE COLOR.

Modality LUT: PS3.3 C.11.1.1. Palettes: PS3.3 C.7.6.3.1.5 and C.7.6.3.1.6, segmented ones C.7.9.2. A value below the
first mapped one takes the first entry, a value above the last takes the last. A table whose length does not follow from
its descriptor is refused: reading past a palette's end has been a hole in other software (CVE-2024-22100, for example).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.values import Values
from geomed_mae.readers.reasons import Reason

COLOURS = ("Red", "Green", "Blue")

MAX_ENTRIES = 1 << 16
"""A descriptor's number of entries has 16 bits, and 0 stands for 65,536."""


class Table(NamedTuple):
    """`entries` (n,) uint16; the stored value of the first; bits an entry has."""

    entries: np.ndarray
    first: int
    bits: int

    def look_up(self, stored: np.ndarray) -> np.ndarray:
        """Return the entries of integer `stored` values, clamped to the table's ends."""
        index = stored.astype(np.int64) - self.first
        return self.entries[np.clip(index, 0, len(self.entries) - 1, out=index)]


def modality_table(values: Values, *, signed: bool) -> Table:
    """Read the first item of ModalityLUTSequence; entries are unsigned, the first value has the pixels' sign.

    Raises:
        ReadError: BAD_RESCALE, when descriptor and data do not fit.
    """
    items = values.items("ModalityLUTSequence")
    if not items:
        raise ReadError("ModalityLUTSequence is empty", Reason.BAD_RESCALE.name)
    item = items[0]
    return _table(item, "LUTDescriptor", item.raw("LUTData"), signed=signed, reason=Reason.BAD_RESCALE)


def palette_tables(values: Values, *, signed: bool) -> tuple[Table, Table, Table]:
    """Read the three palettes, plain or segmented.

    Raises:
        ReadError: DECODE_FAILED, when a palette is missing, malformed or longer than its descriptor says.
    """
    red, green, blue = (_palette(values, colour, signed=signed) for colour in COLOURS)
    if (red.first, len(red.entries)) != (green.first, len(green.entries)) or (red.first, len(red.entries)) != (
        blue.first,
        len(blue.entries),
    ):
        raise ReadError("the three palettes differ in length", Reason.DECODE_FAILED.name)
    bits = max(table.bits for table in (red, green, blue))
    return red._replace(bits=bits), green._replace(bits=bits), blue._replace(bits=bits)


def _palette(values: Values, colour: str, *, signed: bool) -> Table:
    descriptor = f"{colour}PaletteColorLookupTableDescriptor"
    plain = values.raw(f"{colour}PaletteColorLookupTableData")
    if plain:
        return _table(values, descriptor, plain, signed=signed, reason=Reason.DECODE_FAILED)
    count, first, bits = _descriptor(values, descriptor, signed=signed, reason=Reason.DECODE_FAILED)
    data = values.raw(f"Segmented{colour}PaletteColorLookupTableData")
    size = 1 if bits <= 8 else 2
    words = np.frombuffer(data[: len(data) // size * size], dtype=_order(values, size)).tolist()
    entries: list[int] = []
    try:
        for value in _expanded(words, size):
            entries.append(value)
            if len(entries) > count:
                break
    except IndexError:
        entries.clear()
    if len(entries) != count:
        raise ReadError("a segmented palette does not expand to its length", Reason.DECODE_FAILED.name)
    return Table(np.array(entries, dtype=np.uint16), first, bits)


def _order(values: Values, size: int) -> str:
    return f"{'>' if values.big else '<'}u{size}"


def _descriptor(values: Values, keyword: str, *, signed: bool, reason: Reason) -> tuple[int, int, int]:
    """Return (number of entries, first stored value, bits an entry)."""
    words = values.words(keyword)
    if words is None or len(words) != 3 or not 1 <= words[2] <= 16:
        raise ReadError(f"{keyword} is not the description of a table", reason.name)
    first = words[1] - (1 << 16) if signed and words[1] >> 15 else words[1]
    return words[0] or MAX_ENTRIES, first, words[2]


def _table(values: Values, keyword: str, data: bytes, *, signed: bool, reason: Reason) -> Table:
    count, first, bits = _descriptor(values, keyword, signed=signed, reason=reason)
    # Entries of 8 bits come packed or in words of 16, and the data's length alone says which; one byte may pad it.
    if len(data) == 2 * count:
        entries = np.frombuffer(data, dtype=_order(values, 2)).astype(np.uint16)
    elif bits <= 8 and len(data) in (count, count + 1):
        entries = np.frombuffer(data[:count], dtype=np.uint8).astype(np.uint16)
    else:
        raise ReadError(f"{len(data)} bytes hold no table of {count} entries", reason.name)
    return Table(entries, first, 16 if int(entries.max()) >> bits else bits)


def _expanded(words: list[int], size: int) -> Iterator[int]:
    """Yield the entries of a segmented palette (PS3.3 C.7.9.2): discrete, linear and indirect segments.

    Raises:
        IndexError: a segment is cut, of an unknown kind, empty, or points outside or at another indirect one.
    """
    last: int | None = None
    at = 0
    while at + 1 < len(words):
        kind, count = words[at], words[at + 1]
        if kind == 2:
            parts = words[at + 2 : at + 2 + 4 // size]
            offset = sum(part << (8 * size * index) for index, part in enumerate(parts))
            at, start = at + 2 + 4 // size, offset // size
            for _ in range(count):
                values, start = _segment(words, start, last)
                yield from values
                last = values[-1]
        else:
            values, at = _segment(words, at, last)
            yield from values
            last = values[-1]


def _segment(words: list[int], at: int, last: int | None) -> tuple[list[int], int]:
    """Return the entries of the discrete or linear segment at a word, and where the next one starts."""
    kind, count = words[at], words[at + 1]
    if kind == 0 and 0 < count <= len(words) - at - 2:
        return words[at + 2 : at + 2 + count], at + 2 + count
    if kind == 1 and count > 0 and last is not None:
        end = words[at + 2]
        steps = np.arange(1, count + 1) * ((end - last) / count) + last
        return np.around(steps).astype(int).tolist(), at + 3
    raise IndexError
