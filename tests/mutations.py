"""Damage to files: to their bytes, and to what their structure says while the structure itself stays whole.

Random bytes seldom get past the first check of a format: a checksum is wrong, a length leads nowhere, the file is cut.
So each format has a second way to be damaged that keeps what the first checks look at: numbers in a TIFF's directory,
values of DICOM elements under right lengths, PNG chunks under right checksums, the inside of a gzip. All functions take
and return whole files as bytes, and draw all they do from the generator.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import sqlite3
import struct
import zlib
from collections.abc import Callable
from typing import Any

import numpy as np

EXTREMES = (
    0,
    1,
    2,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x7FFFFFFF,
    0x80000000,
    0xFFFFFFFF,
    0x7F800000,
    2**63 - 1,
    2**64 - 1,
)
FLOATS = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    1e-300,
    1e-40,
    1e38,
    3.5e38,
    1e300,
    float("nan"),
    float("inf"),
    float("-inf"),
    0.5,
    2.0**63,
)

Rng = np.random.Generator


def _pick(rng: Rng, options: Any) -> Any:
    return options[int(rng.integers(0, len(options)))]


def _integer(rng: Rng, width: int) -> int:
    value = int(_pick(rng, EXTREMES)) if rng.random() < 0.6 else int(rng.integers(0, 1 << min(8 * width, 63)))
    return (value + int(rng.integers(-2, 3))) % (1 << 8 * width)


def damage(content: bytes, rng: Rng, low: int = 0, high: int | None = None) -> bytes:
    """Damage bytes low to high in one to four places: bits, extreme numbers, noise; rarely missing or doubled parts."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 5))):
        end = min(len(data), high or len(data))
        if end <= low:
            return bytes(data)
        # Headers decide what is done with the rest, so half of the damage goes to the first kilobytes.
        reach = min(end, low + 2048) if rng.random() < 0.5 else end
        at, kind = int(rng.integers(low, reach)), rng.random()
        if kind < 0.35:
            data[at] ^= 1 << int(rng.integers(0, 8))
        elif kind < 0.45:
            size = min(8, end - at)
            data[at : at + size] = rng.bytes(size)
        elif kind < 0.9:
            width = min(int(rng.choice([1, 2, 4, 8])), end - at)
            data[at : at + width] = _integer(rng, width).to_bytes(width, "little" if rng.random() < 0.6 else "big")
        elif kind < 0.94:
            del data[at : min(at + int(rng.integers(1, 65)), end)]
        elif kind < 0.98:
            data[at:at] = data[at : min(at + int(rng.integers(1, 65)), end)]
        else:
            del data[max(at, 1) :]
    return bytes(data)


# ------------------------------------------------------------------------------------------------------------- TIFF

_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4, 16: 8, 17: 8, 18: 8}


def _tiff_entries(data: bytes) -> list[tuple[int, int, int, int]]:
    """Return (offset of the entry, type, count, offset of the values) of all directories."""
    big = data[2] == 43
    step, head, number = (20, 8, "<Q") if big else (12, 2, "<H")
    found, seen = [], set()
    at = struct.unpack_from("<Q", data, 8)[0] if big else struct.unpack_from("<I", data, 4)[0]
    while 0 < at < len(data) - step and at not in seen:
        seen.add(at)
        count = struct.unpack_from(number, data, at)[0]
        for entry in range(at + head, at + head + count * step, step):
            kind, values = struct.unpack_from("<HQ" if big else "<HI", data, entry + 2)
            inline = entry + (12 if big else 8)
            small = values * _TIFF_SIZES.get(kind, 1) <= (8 if big else 4)
            where = inline if small else struct.unpack_from("<Q" if big else "<I", data, inline)[0]
            found.append((entry, kind, values, where))
        at = struct.unpack_from("<Q" if big else "<I", data, at + head + count * step)[0]
    return found


def tiff(content: bytes, rng: Rng) -> bytes:
    """Change values, types, counts and numbers of tags; exchange the values of two tags."""
    data, entries = bytearray(content), _tiff_entries(content)
    for _ in range(int(rng.integers(1, 4))):
        entry, kind, count, where = _pick(rng, entries)
        size, choice = _TIFF_SIZES.get(kind, 1), rng.random()
        at = where + size * int(rng.integers(0, max(count, 1)))
        if choice < 0.6 and at + size <= len(data):
            if kind in (11, 12) and rng.random() < 0.7:
                with np.errstate(all="ignore"):
                    value = np.array(_pick(rng, FLOATS)).astype("<f4" if kind == 11 else "<f8").tobytes()
            else:
                value = _integer(rng, size).to_bytes(size, "little")
            data[at : at + size] = value
        elif choice < 0.7:
            struct.pack_into("<H", data, entry + 2, int(rng.integers(0, 20)))
        elif choice < 0.8:
            struct.pack_into("<I", data, entry + 4, _integer(rng, 2 if rng.random() < 0.7 else 4))
        elif choice < 0.9:
            struct.pack_into("<H", data, entry, int(_pick(rng, (262, 258, 277, 284, 317, 322, 338, 339, 42113, 33550))))
        else:
            other = _pick(rng, entries)[0]
            data[entry + 8 : entry + 12], data[other + 8 : other + 12] = (
                data[other + 8 : other + 12],
                data[entry + 8 : entry + 12],
            )
    return bytes(data)


# ------------------------------------------------------------------------------------------------------------ DICOM

_VRS = b"AE AS AT CS DA DS DT FD FL IS LO LT OB OD OF OL OV OW PN SH SL SQ SS ST SV TM UC UI UL UN UR US UT UV".split()
_LONG = frozenset(b"OB OD OF OL OV OW SQ UC UN UR UT SV UV".split())
_ELEMENT = re.compile(b"(?s)(?=[\x02\x08\x10\x18\x20\x28\x40\x54\x60\x62\x06\x30]\x00..(" + b"|".join(_VRS) + b"))")
_TEXTS = (
    *b"\x00,,nan,inf,1e400,1e-320,-1,-0,0,abc,two,1.2.3,..,^,\xff\xfe,2\\3,\\\\,65536,99999999999999".split(b","),
    *(b"1,5", b"0\\0\\0", b"1\\0\\0\\0\\1\\0", b"0\\0\\0\\0\\0\\0", b"5\\1\\0\\0", b"-90\\1e9\\3"),
)


def dicom(content: bytes, rng: Rng) -> bytes:
    """Change values under right lengths, VRs, lengths, tags; leave out, double and exchange elements (explicit VR)."""
    meta = 132
    if content[128:132] == b"DICM" and b"1.2.840.10008.1.2.1.99" in content[:400] and rng.random() < 0.9:
        start = 144 + struct.unpack_from("<I", content, 140)[0]
        inner = dicom(zlib.decompress(content[start:], -15), rng)
        packer = zlib.compressobj(1, zlib.DEFLATED, -15)
        return content[:start] + packer.compress(inner) + packer.flush()
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        places = [
            match.start() for match in _ELEMENT.finditer(bytes(data)) if match.start() >= meta or meta > len(data)
        ]
        if not places:
            return damage(content, rng)
        at, choice = _pick(rng, places), rng.random()
        vr = bytes(data[at + 4 : at + 6])
        head = 12 if vr in _LONG else 8
        length = int.from_bytes(data[at + 8 : at + 12] if head == 12 else data[at + 6 : at + 8], "little")
        end = at + head + length
        if choice < 0.65 and end <= len(data) and vr != b"SQ":
            data[at:end] = data[at : at + 4] + _valued(vr, bytes(data[at + head : end]), rng)
        elif choice < 0.75:
            data[at + 4 : at + 6] = _pick(rng, _VRS)
        elif choice < 0.8:
            width = 4 if head == 12 else 2
            data[at + head - width : at + head] = _integer(rng, width).to_bytes(width, "little")
        elif choice < 0.87:
            data[at : at + 4] = data[(other := _pick(rng, places)) : other + 4]
        elif choice < 0.93 and end <= len(data):
            del data[at:end]
        elif end <= len(data):
            other = _pick(rng, places)
            data[other:other] = data[at:end]
    return bytes(data)


def _valued(vr: bytes, old: bytes, rng: Rng) -> bytes:
    """Return VR, length and value of an element whose value is hostile and whose length is right."""
    if vr in (b"US", b"SS", b"AT"):
        value = b"".join(_integer(rng, 2).to_bytes(2, "little") for _ in range(max(1, len(old) // 2)))
    elif vr in (b"UL", b"SL"):
        value = _integer(rng, 4).to_bytes(4, "little")
    elif vr in (b"FD", b"FL"):
        with np.errstate(all="ignore"):
            value = np.array(_pick(rng, FLOATS)).astype("<f8" if vr == b"FD" else "<f4").tobytes()
            value *= max(1, len(old) // len(value))
    elif vr in _LONG:
        value = damage(old, rng) if old else rng.bytes(4)
    elif rng.random() < 0.3 and b"\\" in old:
        parts = old.split(b"\\")
        parts[int(rng.integers(0, len(parts)))] = _pick(rng, _TEXTS)
        value = b"\\".join(parts)
    else:
        value = _pick(rng, _TEXTS) if rng.random() < 0.7 else damage(old, rng)
    value += b"\0" * (len(value) % 2)
    if vr in _LONG:
        return vr + b"\0\0" + struct.pack("<I", len(value)) + value
    return vr + struct.pack("<H", len(value) & 0xFFFF) + value


# ------------------------------------------------------------------------------------------------------------ NIfTI

_NIFTI_FIELDS = {
    1: ((40, "h", 8), (70, "h", 1), (72, "h", 1), (76, "f", 8), (108, "f", 3), (252, "h", 2), (256, "f", 18)),
    2: ((12, "h", 2), (16, "q", 8), (104, "d", 8), (168, "q", 1), (176, "d", 2), (344, "i", 2), (352, "d", 18)),
}
"""Offset, type and number of the fields that say what the voxels are and where: nifti1.h and nifti2.h."""


def nifti(content: bytes, rng: Rng) -> bytes:
    """Change the fields of the header; of a compressed file inside it."""
    if content[:2] == b"\x1f\x8b":
        inner = gzip.decompress(content)
        return gzip.compress(damage(inner, rng) if rng.random() < 0.3 else nifti(inner, rng), 1)
    data = bytearray(content)
    fields = _NIFTI_FIELDS[2 if data[0] == 0x1C else 1]
    for _ in range(int(rng.integers(1, 4))):
        offset, kind, count = _pick(rng, fields)
        size = struct.calcsize(kind)
        at = offset + size * int(rng.integers(0, count))
        if kind in "fd":
            with np.errstate(all="ignore"):
                data[at : at + size] = np.array(_pick(rng, FLOATS)).astype("<f4" if kind == "f" else "<f8").tobytes()
        else:
            value = int(rng.integers(0, 20)) if rng.random() < 0.5 else _integer(rng, size)
            data[at : at + size] = value.to_bytes(size, "little")
    return bytes(data)


# --------------------------------------------------------------------------------------------------------- pictures


def picture(content: bytes, rng: Rng) -> bytes:
    """Damage PNG chunks under right checksums, the rows inside the compression too, and JPEG segments."""
    return _png(content, rng) if content[:4] == b"\x89PNG" else _jpeg(content, rng)


def _png(content: bytes, rng: Rng) -> bytes:
    chunks, at = [], 8
    while at + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, at)
        chunks.append((kind, content[at + 8 : at + 8 + length]))
        at += 12 + length
    for _ in range(int(rng.integers(1, 3))):
        # Mostly the image data: what is wrong with the first chunk and the last is seen at once.
        data = [number for number, (kind, _) in enumerate(chunks) if kind == b"IDAT"]
        number = _pick(rng, data) if data and rng.random() < 0.75 else int(rng.integers(0, len(chunks)))
        choice = rng.random()
        kind, body = chunks[number]
        if choice < 0.15:
            chunks[0] = (b"IHDR", _png_header(chunks[0][1], rng))
        elif kind == b"IDAT" and choice < 0.65:
            try:
                chunks[number] = (kind, zlib.compress(damage(zlib.decompress(body), rng)))
            except zlib.error:
                chunks[number] = (kind, damage(body, rng))
        elif choice < 0.85:
            chunks[number] = (kind, damage(body, rng) if body else rng.bytes(int(rng.integers(1, 20))))
        elif choice < 0.9:
            extra = _pick(
                rng, (b"tRNS", b"PLTE", b"gAMA", b"iCCP", b"zTXt", b"acTL", b"eXIf", b"sBIT", b"IDAT", b"cHRM")
            )
            chunks.insert(number, (extra, rng.bytes(int(rng.integers(0, 64)))))
        elif len(chunks) > 1:
            chunks.append(chunks.pop(number))
    made = (struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return content[:8] + b"".join(made)


def _png_header(body: bytes, rng: Rng) -> bytes:
    header = bytearray(body.ljust(13, b"\0"))
    at = int(rng.integers(0, 7))
    if at < 2:
        size = _integer(rng, 4) if rng.random() < 0.4 else int(rng.integers(0, 200))
        struct.pack_into(">I", header, 4 * at, size)
    else:
        header[6 + at] = int(_pick(rng, (0, 1, 2, 3, 4, 6, 8, 16, 255)))
    return bytes(header)


def _jpeg(content: bytes, rng: Rng) -> bytes:
    data = bytearray(content)
    places = [m.start() for m in re.finditer(b"(?s)\xff[\xc0-\xfe]", content)]
    for _ in range(int(rng.integers(1, 4))):
        at, choice = _pick(rng, places), rng.random()
        if choice < 0.5:
            spot = min(at + int(rng.integers(2, 24)), len(data) - 1)
            data[spot] = (
                int(_pick(rng, (0, 1, 2, 3, 4, 7, 8, 16, 0x11, 0x22, 0x7F, 0xFE))) if rng.random() < 0.6 else 255
            )
        elif choice < 0.7:
            data[min(at + 1, len(data) - 1)] = int(rng.integers(0xC0, 0xFF))
        else:
            data = bytearray(damage(bytes(data), rng, at))
    return bytes(data)


# -------------------------------------------------------------------------------------------------------- JPEG 2000


def jp2(content: bytes, rng: Rng) -> bytes:
    """Damage marker segments of the codestream, packets, and boxes."""
    start = content.find(b"\xff\x4f\xff\x51")
    if start < 0 or rng.random() < 0.2:
        return damage(content, rng, 12, max(start, 60))
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        marks = [m.start() for m in re.finditer(b"(?s)\xff[\x51-\x64\x90]", bytes(data)) if m.start() >= start]
        at = _pick(rng, marks[:40])
        length = int.from_bytes(data[at + 2 : at + 4], "big")
        choice = rng.random()
        if choice < 0.65:
            spot = min(at + 4 + int(rng.integers(0, min(length, 60) + 1)), len(data) - 4)
            width = int(rng.choice([1, 2, 4]))
            value = int(rng.integers(0, 300)) if rng.random() < 0.5 else _integer(rng, width)
            data[spot : spot + width] = (value % (1 << 8 * width)).to_bytes(width, "big")
        elif choice < 0.75:
            data[at + 2 : at + 4] = _integer(rng, 2).to_bytes(2, "big")
        else:
            data = bytearray(damage(bytes(data), rng, start + 60))
    return bytes(data)


# ---------------------------------------------------------------------------------------------------------- vectors

_JSON: tuple[Any, ...] = (
    *(None, [], {}, True, -1, 0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 2**80, "", "x" * 99, "EPSG:4326"),
    *("EPSG:0", "\x1b[31m", [[]], [0], {"type": 1}, "Polygon", "Point", 181.0, -91.0),
)


def geojson(content: bytes, rng: Rng) -> bytes:
    """Replace, leave out and double parts of the tree."""
    tree = json.loads(content)
    for _ in range(int(rng.integers(1, 4))):
        holders: list[Any] = []
        _walk(tree, holders)
        if not holders:
            break
        holder = _pick(rng, holders)
        keys = list(holder) if isinstance(holder, dict) else range(len(holder))
        key, choice = _pick(rng, list(keys)), rng.random()
        if isinstance(holder[key], int | float) and choice < 0.8:
            holder[key] = _number(rng, holder[key])
        elif choice < 0.7:
            holder[key] = _pick(rng, _JSON)
        elif choice < 0.8:
            del holder[key]
        elif choice < 0.9 and isinstance(holder, list):
            holder.extend([holder[key]] * int(rng.integers(1, 400)))
        else:
            for _ in range(int(rng.choice([1, 2, 40, 1500]))):
                holder[key] = [holder[key]]
    try:
        made = json.dumps(tree).encode()
        # A file of megabytes may take its time; these are the damaged ones of a few hundred bytes.
        return made if len(made) < 1 << 17 else damage(content, rng)
    except RecursionError:
        return b"[" * 100000


def _number(rng: Rng, old: float) -> Any:
    """Return another number: near the old one in four cases of five."""
    if rng.random() < 0.8:
        return old + float(rng.normal()) * float(_pick(rng, (1e-9, 1.0, 100.0)))
    return _pick(rng, (0, 181.0, -91.0, 1e308, -1e308, 1e-320, float("nan"), float("inf"), 2**80))


def _walk(node: Any, found: list[Any], depth: int = 0) -> None:
    if isinstance(node, dict | list) and node and depth < 100:
        found.append(node)
        for part in node.values() if isinstance(node, dict) else node:
            _walk(part, found, depth + 1)


_CELLS = (None, -1, 0, 2**62, 1e308, "", "x" * 5000, "1;drop", b"GP\0\1", "\x1b[0m", 4326, "POINT", "water", "liver")


def gpkg(content: bytes, rng: Rng) -> bytes:
    """Change cells of the tables, geometry blobs above all, with the database itself whole."""
    base = sqlite3.connect(":memory:")
    base.deserialize(content)
    for (trigger,) in base.execute("select name from sqlite_master where type = 'trigger'").fetchall():
        base.execute(f'drop trigger "{trigger}"')
    tables = [name for (name,) in base.execute("select name from sqlite_master where type = 'table'")]
    tables = [name for name in tables if not name.startswith(("rtree", "sqlite"))]
    for _ in range(int(rng.integers(1, 3))):
        table = "one" if rng.random() < 0.6 else _pick(rng, tables)
        column = _pick(rng, [row[1] for row in base.execute(f'pragma table_info("{table}")')])
        rows = base.execute(f'select rowid, "{column}" from "{table}"').fetchall()
        if not rows:
            continue
        row, value = _pick(rng, rows)
        value = damage(value, rng) if isinstance(value, bytes) else _pick(rng, _CELLS)
        with contextlib.suppress(sqlite3.Error):
            base.execute(f'update "{table}" set "{column}" = ? where rowid = ?', (value, row))
    base.commit()
    made = base.serialize()
    base.close()
    return made


def shape(content: bytes, rng: Rng) -> bytes:
    """Change the 4-byte and 8-byte numbers of a .shp or .shx."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        at = int(rng.integers(0, max(1, len(data) // 4 - 2))) * 4
        if rng.random() < 0.4:
            struct.pack_into("<d", data, at, float(_pick(rng, FLOATS)))
        else:
            value = int(rng.integers(0, 40)) if rng.random() < 0.5 else _integer(rng, 4)
            struct.pack_into("<I" if rng.random() < 0.6 else ">I", data, at, value)
    return bytes(data)


STRUCTURED: dict[str, Callable[[bytes, Rng], bytes]] = {
    "geotiff": tiff,
    "dicom": dicom,
    "nifti": nifti,
    "picture": picture,
    "jp2": jp2,
    "seg": dicom,
    "rtstruct": dicom,
    "geojson": geojson,
    "gpkg": gpkg,
    "shapefile": shape,
}
"""Format -> damage that keeps its structure."""
