"""JPEG (ITU-T T.81, JFIF): its segments walked here, its data decoded by Pillow, and cut data told from whole data.

libjpeg fills what is missing with grey and goes on; Pillow does not pass its warning on. A file without its end marker
is easy to see. One whose data is short but which ends properly (recovered, or patched by a download tool) is found by
decoding twice: what follows complete data cannot change a pixel, so a second decoding with other bytes in front of the
end marker is the same if, and only if, nothing was missing. Damage in the middle of the data cannot be found: JPEG has
no checksum.
"""

from __future__ import annotations

import io
import os
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.picture.structure import UPRIGHT, Structure, check_size, exif_orientation, malformed, truncated
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

MAGIC = b"\xff\xd8\xff"
MAX_SEGMENTS = 4096
"""Segments before the image data; colour profiles and previews take a few dozen of 64 KiB each."""
MAX_SCANS = 256
"""Progressive files have about ten; thousands of empty ones are a known way to make decoders work for hours."""

_SOI, _EOI, _SOS, _DQT, _DNL, _DRI, _DHT, _DAC = 0xD8, 0xD9, 0xDA, 0xDB, 0xDC, 0xDD, 0xC4, 0xCC
_APP0, _APP1, _APP2, _APP14, _COM = 0xE0, 0xE1, 0xE2, 0xEE, 0xFE
_HUFFMAN = {0xC0: "baseline", 0xC1: "extended", 0xC2: "progressive"}
_FRAMES = {*range(0xC0, 0xD0), 0xF7} - {_DHT, _DAC, 0xC8}
"""Markers of frame headers (T.81 table B.1); 0xF7 is JPEG-LS."""
_KEPT = {_DQT, _DRI, _DHT}
"""Segments that decoding needs, beside the frame and scan headers; JFIF's APP0 and Adobe's APP14 say which colours."""

_NEXT_MARKER = re.compile(rb"\xff+([^\x00\xff\xd0-\xd7])")
"""A marker in entropy-coded data that is neither a stuffed byte nor a restart (T.81 B.1.1.5)."""
_RESTART = re.compile(rb"\xff([\xd0-\xd7])")
_PADDING = b"\xaa" * 64
"""Bytes that decode to something else than the zeros that libjpeg makes up."""


@dataclass(slots=True)
class _Parts:
    """What was collected on the way: the frame header, segments for the decoder, orientation, restarts, scans."""

    frame: tuple[int, bytes] | None = None
    kept: list[bytes] = field(default_factory=list)
    orientation: int = UPRIGHT
    several: bool = False
    interval: int = 0
    scans: int = 0
    known_bits: dict[tuple[int, int], int] = field(default_factory=dict)


def structure(path: Path) -> Structure:
    """Return what the segments before the image data say.

    Raises:
        ReadError: TRUNCATED, MALFORMED, DTYPE_UNSUPPORTED, CODEC_MISSING, TOO_LARGE or RATIO.
    """
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        return _structure(_until_scan(file, path), size, path)


def _segments(file: BinaryIO, path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (marker, content) up to and with the next start of scan or the end of the image."""
    for _ in range(MAX_SEGMENTS):
        lead, marker = file.read(1), b"\xff"
        while marker == b"\xff":
            marker = file.read(1)
        if lead != b"\xff" or marker == b"\x00":
            raise truncated(path, "it ends in its header") if not marker else malformed(path, "a marker is missing")
        if not marker:
            raise truncated(path, "it ends in its header")
        if marker[0] == _EOI:
            yield _EOI, b""
            return
        if marker[0] == _SOI or 0xD0 <= marker[0] <= 0xD7 or marker[0] == 0x01:
            raise malformed(path, "a marker stands where it must not")
        length = int.from_bytes(file.read(2), "big")
        content = file.read(max(length - 2, 0))
        if length < 2 or len(content) < length - 2:
            raise truncated(path, "a segment of its header reaches beyond its end")
        yield marker[0], content
        if marker[0] == _SOS:
            return
    raise malformed(path, f"it has more than {MAX_SEGMENTS} segments")


def _until_scan(file: BinaryIO, path: Path) -> _Parts:
    """Collect everything up to the first start of scan, this included."""
    if file.read(2) != MAGIC[:2]:
        raise malformed(path, "it does not begin as a JPEG")
    parts = _Parts()
    for marker, content in _segments(file, path):
        _collect(parts, marker, content, path)
    return parts


def _collect(parts: _Parts, marker: int, content: bytes, path: Path) -> None:
    """Note one segment, and keep it for the decoder where that needs it."""
    if marker in _FRAMES:
        if parts.frame is not None:
            raise malformed(path, "it has two frame headers")
        parts.frame = (marker, content)
    elif marker == _EOI:
        raise truncated(path, "it has no image data")
    elif marker == _DRI:
        parts.interval = int.from_bytes(content[:2], "big")
    elif marker == _APP1 and content.startswith(b"Exif\0\0"):
        parts.orientation = exif_orientation(content[6:])
    elif marker == _APP2 and content.startswith(b"MPF\0"):
        parts.several = True
    elif marker == _SOS:
        _note_scan(parts, content, path)
    colours = (marker == _APP0 and content[:5] == b"JFIF\0") or (marker == _APP14 and content[:5] == b"Adobe")
    if marker in _KEPT or marker in _FRAMES or marker == _SOS or colours:
        parts.kept.append(struct.pack(">BBH", 0xFF, marker, len(content) + 2) + content)


def _note_scan(parts: _Parts, content: bytes, path: Path) -> None:
    """Note which coefficients of which component a scan brings, and down to which bit (T.81 B.2.3, G.1.1.1)."""
    count = content[0] if content else 0
    if parts.frame is None or len(content) != 4 + 2 * count:
        raise malformed(path, "the header of its image data has a wrong length")
    parts.scans += 1
    if parts.scans > MAX_SCANS:
        raise malformed(path, f"it has more than {MAX_SCANS} scans")
    # Sequential scans bring everything, whatever some encoders write there.
    first, last, bits = content[-3:] if _HUFFMAN.get(parts.frame[0]) == "progressive" else (0, 63, 0)
    for component in content[1:-3:2]:
        for coefficient in range(first, min(last, 63) + 1):
            parts.known_bits[component, coefficient] = bits & 15


def _structure(parts: _Parts, size: int, path: Path) -> Structure:
    if parts.frame is None:
        raise malformed(path, "it has no frame header")
    marker, content = parts.frame
    if marker not in _HUFFMAN:
        raise ReadError(
            f"{shown(path)} is a JPEG of a lossless, hierarchical or arithmetic-coded kind, which is not decoded here",
            Reason.CODEC_MISSING.name,
        )
    if len(content) < 6 or len(content) != 6 + 3 * content[5]:
        raise malformed(path, "its frame header has a wrong length")
    bits, rows, columns, components = struct.unpack(">BHHB", content[:6])
    if bits != 8:
        raise ReadError(f"{shown(path)} is a JPEG of {bits} bits; 8 are read", Reason.DTYPE_UNSUPPORTED.name)
    if components not in (1, 3):
        raise ReadError(
            f"{shown(path)} has {components} colours (CMYK has 4): what they look like depends on inks; save it as RGB",
            Reason.DTYPE_UNSUPPORTED.name,
        )
    found = Structure(
        codec="JPEG",
        rows=rows,
        columns=columns,
        bands=components,
        bits=bits,
        orientation=parts.orientation,
        several=parts.several,
    )
    check_size(found, size, path)
    return found


def pixels(path: Path) -> tuple[Structure, np.ndarray, None]:
    """Decode `path`: its structure, samples uint8 (bands, rows, columns), and None (a JPEG is never transparent).

    Raises:
        ReadError: TRUNCATED, DECODE_FAILED, or a reason of `structure`.
    """
    content = path.read_bytes()
    file = io.BytesIO(content)
    parts = _until_scan(file, path)
    found = _structure(parts, len(content), path)
    while True:
        start = file.tell()
        end = _NEXT_MARKER.search(content, start)
        if end is None:
            raise truncated(path, "it ends in its image data, without an end marker")
        data = content[start : end.start()]
        _check_restarts(parts, found, data, path)
        parts.kept.append(data)
        if end[1][0] == _EOI:
            break
        file.seek(end.end() - 2)
        markers = 0
        for marker, segment in _segments(file, path):
            markers = marker
            _collect(parts, marker, segment, path)
        if markers != _SOS:
            raise truncated(path, "its last scan is missing")
    _check_scans(parts, path)
    body = MAGIC[:2] + b"".join(parts.kept)
    samples = _decoded(body + b"\xff\xd9", found, path)
    if not np.array_equal(samples, _decoded(body + _PADDING + b"\xff\xd9", found, path)):
        raise truncated(path, "its image data ends before the last row")
    return found, samples[None] if samples.ndim == 2 else np.moveaxis(samples, -1, 0), None


def _check_restarts(parts: _Parts, found: Structure, data: bytes, path: Path) -> None:
    """Compare the restart markers of a single-scan picture with the number that its size asks for (T.81 E.1.4)."""
    if not parts.interval or parts.frame is None or _HUFFMAN[parts.frame[0]] == "progressive" or parts.scans != 1:
        return
    factors = [parts.frame[1][7 + 3 * n] for n in range(found.bands)]
    wide, high = (max(f >> 4 for f in factors), max(f & 15 for f in factors)) if found.bands > 1 else (1, 1)
    units = -(-found.columns // (8 * wide)) * -(-found.rows // (8 * high)) if wide and high else 0
    expected = max(0, -(-units // parts.interval) - 1)
    if len(_RESTART.findall(data)) < expected:
        raise truncated(path, "parts between its restart markers are missing")


def _check_scans(parts: _Parts, path: Path) -> None:
    """Refuse a picture of several scans whose last ones are missing: it decodes, but coarsely."""
    if parts.frame is None:
        return
    components = parts.frame[1][6::3]
    for component in components:
        if any(parts.known_bits.get((component, coefficient), 1) for coefficient in range(64)):
            raise truncated(path, "scans that refine it are missing")


def _decoded(content: bytes, found: Structure, path: Path) -> np.ndarray:
    """Return uint8 (rows, columns[, 3]) of a JPEG that holds nothing but what decoding needs."""
    from PIL.JpegImagePlugin import JpegImageFile

    try:
        with JpegImageFile(io.BytesIO(content)) as image:
            samples = np.array(image)
    except (OSError, SyntaxError, ValueError, struct.error, IndexError, KeyError):
        raise ReadError(f"the pixel data of {shown(path)} does not decode", Reason.DECODE_FAILED.name) from None
    if samples.shape != (found.rows, found.columns, *([3] if found.bands == 3 else [])):
        raise ReadError(f"{shown(path)} decodes to {samples.shape}", Reason.DECODE_FAILED.name)
    return samples
