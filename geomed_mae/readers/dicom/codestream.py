"""What a compressed frame says about itself, compared with the DICOM header before any decoder sees it.

A codec allocates what its own stream declares: a file of 73 bytes may declare a JPEG 2000 image of 65535 x 65535, and
one whose stream is smaller than Rows x Columns shifts every pixel. Streams: JPEG ITU-T T.81 annex B, JPEG-LS T.87 annex
C, JPEG 2000 T.800 annex A (its high-throughput form T.814 shares the header), RLE PS3.5 annex G.
"""

from __future__ import annotations

import struct
from importlib.util import find_spec
from typing import NamedTuple

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.elements import UNDEFINED_LENGTH
from geomed_mae.readers.dicom.file import NATIVE_SYNTAXES, Fragments
from geomed_mae.readers.reasons import Reason

RLE = "1.2.840.10008.1.2.5"
JPEG_EXTENDED = "1.2.840.10008.1.2.4.51"
CODECS = {
    "1.2.840.10008.1.2.4.50": "JPEG",
    JPEG_EXTENDED: "JPEG",
    "1.2.840.10008.1.2.4.57": "JPEG lossless",
    "1.2.840.10008.1.2.4.70": "JPEG lossless",
    "1.2.840.10008.1.2.4.80": "JPEG-LS",
    "1.2.840.10008.1.2.4.81": "JPEG-LS",
    "1.2.840.10008.1.2.4.90": "JPEG 2000",
    "1.2.840.10008.1.2.4.91": "JPEG 2000",
    "1.2.840.10008.1.2.4.201": "HTJ2K",
    "1.2.840.10008.1.2.4.202": "HTJ2K",
    "1.2.840.10008.1.2.4.203": "HTJ2K",
    RLE: "RLE",
}
"""Transfer syntaxes (PS3.5 annex A.4) by the name of their codec."""

JPEG_START, J2K_START, JP2_BOX = b"\xff\xd8", b"\xff\x4f\xff\x51", b"\0\0\0\x0cjP  "
NO_LENGTH_MARKERS = frozenset({0x01, *range(0xD0, 0xD9)})
"""TEM, RSTn and SOI stand alone (T.81 table B.1)."""

SOF_MARKERS = frozenset({*range(0xC0, 0xD0), 0xF7}) - {0xC4, 0xC8, 0xCC}
"""Start-of-frame markers; 0xF7 is that of JPEG-LS (SOF55)."""

JPEG_NOISE = b"\xaa" * 64
"""Bytes that decode to something else than the zeros that libjpeg makes up."""
RLE_HEADER_BYTES = 64
"""Number of segments and fifteen offsets (PS3.5 G.5)."""


class Stream(NamedTuple):
    """Size of one compressed frame: rows and columns in pixels, samples a pixel, bits a sample."""

    rows: int
    columns: int
    samples: int
    bits: int


def codec_name(syntax: str) -> str:
    """Return the codec's name for `Source.codec`: "" for native syntaxes, "unknown" outside the list."""
    return "" if syntax in NATIVE_SYNTAXES else CODECS.get(syntax, "unknown")


def stream_of(frame: bytes) -> Stream | None:
    """Read the size that a JPEG, JPEG-LS or JPEG 2000 stream declares; None where it declares none readably."""
    if frame[:8] == JP2_BOX:
        at = frame.find(J2K_START)
        return None if at < 0 else _jpeg_2000(frame[at:])
    if frame[:4] == J2K_START:
        return _jpeg_2000(frame)
    return _jpeg(frame) if frame[:2] == JPEG_START else None


def _jpeg_2000(frame: bytes) -> Stream | None:
    """Read the SIZ segment (T.800 A.5.1); a component's own subsampling is not for DICOM and makes it unreadable."""
    if len(frame) < 45:
        return None
    right, lower, left, upper = struct.unpack_from(">4L", frame, 8)
    samples = struct.unpack_from(">H", frame, 40)[0]
    components = frame[42 : 42 + 3 * samples]
    if len(components) < 3 * samples or any(step != 1 for at in (1, 2) for step in components[at::3]):
        return None
    return Stream(lower - upper, right - left, samples, 1 + max((part & 0x7F for part in components[::3]), default=0))


def _jpeg(frame: bytes) -> Stream | None:
    """Walk the segments to the start of frame (T.81 B.2.2, T.87 C.2.2)."""
    at = 2
    while at + 4 <= len(frame):
        if frame[at] != 0xFF:
            return None
        marker = frame[at + 1]
        if marker == 0xFF or marker in NO_LENGTH_MARKERS:
            at += 1 if marker == 0xFF else 2
            continue
        length = struct.unpack_from(">H", frame, at + 2)[0]
        if marker in SOF_MARKERS:
            if at + 10 > len(frame):
                return None
            bits, rows, columns, samples = struct.unpack_from(">BHHB", frame, at + 4)
            return Stream(rows, columns, samples, bits)
        if marker in (0xD9, 0xDA) or length < 2:
            return None
        at += 2 + length
    return None


def check_stream(frame: bytes, syntax: str, expected: Stream, *, limit: int) -> None:
    """Refuse a compressed frame that is not what the header says.

    Args:
        frame: its bytes, whole.
        syntax: transfer syntax.
        expected: from the header; `bits` is BitsAllocated, the most that fits.
        limit: pixels that a frame may have.

    Raises:
        ReadError: TOO_LARGE, LENGTH_MISMATCH (another size), DECODE_FAILED (not this codec's stream), CODEC_MISSING.
    """
    if syntax == RLE:
        _check_rle(frame, expected)
        return
    found = stream_of(frame)
    if found is None:
        raise ReadError(
            "the pixel data does not decode: a frame does not begin as its codec's stream", Reason.DECODE_FAILED.name
        )
    if found.rows * found.columns > limit:
        raise ReadError(
            f"the compressed stream declares {found.rows} x {found.columns} pixels; a frame may have {limit}",
            Reason.TOO_LARGE.name,
        )
    if found[:3] != expected[:3] or found.bits > expected.bits:
        raise ReadError(
            f"the compressed stream has {found.rows} x {found.columns} pixels of {found.samples} x {found.bits} bits, "
            f"the header {expected.rows} x {expected.columns} of {expected.samples} x {expected.bits}",
            Reason.LENGTH_MISMATCH.name,
        )
    if syntax == JPEG_EXTENDED and found.bits > 8 and find_spec("libjpeg") is None:
        # GDCM and Pillow decode its 8-bit form alone; the package that decodes 12 bits is under the GPL.
        raise ReadError(
            "JPEG Extended of 12 bits needs a codec: pip install pylibjpeg-libjpeg", Reason.CODEC_MISSING.name
        )


def followed_by_noise(frame: bytes) -> bytes:
    """Return a JPEG frame with bytes in front of its end marker that a decoder reaches only where data is missing.

    libjpeg fills what is missing with grey and goes on. What follows complete data cannot change a pixel: this stream
    decodes to the same pixels if, and only if, nothing is missing.
    """
    end = frame.rfind(b"\xff\xd9")
    return frame if end < 0 else frame[:end] + JPEG_NOISE + frame[end:]


def _check_rle(frame: bytes, expected: Stream) -> None:
    segments = expected.samples * expected.bits // 8
    if len(frame) < RLE_HEADER_BYTES:
        raise ReadError("the pixel data does not decode: no RLE header", Reason.DECODE_FAILED.name)
    count, *offsets = struct.unpack_from("<16L", frame)
    if not 0 < count <= len(offsets):
        raise ReadError(f"the pixel data does not decode: {count} RLE segments", Reason.DECODE_FAILED.name)
    if count != segments:
        raise ReadError(
            f"the RLE stream has {count} segments, the header asks for {segments}", Reason.LENGTH_MISMATCH.name
        )
    used = offsets[:count]
    if used[0] < RLE_HEADER_BYTES or used != sorted(set(used)) or used[-1] >= len(frame):
        raise ReadError("the pixel data does not decode: impossible offsets of RLE segments", Reason.DECODE_FAILED.name)


def frame_spans(
    fragments: Fragments, frames: int, *, table: bytes, extended: tuple[bytes, bytes], starts: list[bytes]
) -> list[list[tuple[int, int]]]:
    """Return which fragments make each frame (PS3.5 A.4).

    One fragment a frame is the rule; else the offset tables decide, then the streams' own first bytes.

    Args:
        fragments: of the stream.
        frames: how many the header declares.
        table: value of the basic offset table.
        extended: values of ExtendedOffsetTable and ExtendedOffsetTableLengths, or empty.
        starts: the first bytes of each fragment.

    Raises:
        ReadError: LENGTH_MISMATCH, when fragments cannot be told apart or hold more frames than declared.
    """
    spans = fragments.spans
    begins = [index for index, head in enumerate(starts) if head[:3] == b"\xff\xd8\xff" or head[:4] == J2K_START]
    if len(spans) == frames:
        return [[span] for span in spans]
    if frames == 1 and len(begins) <= 1:
        return [list(spans)]
    offsets = _offsets(table, extended, frames)
    if offsets is not None:
        first = spans[0][0] - 8
        where = {start - 8 - first: index for index, (start, _) in enumerate(spans)}
        if all(offset in where for offset in offsets):
            begins = [where[offset] for offset in offsets]
    if len(begins) != frames or begins[0] != 0 or begins != sorted(set(begins)):
        raise ReadError(f"{len(spans)} fragments do not divide into {frames} frames", Reason.LENGTH_MISMATCH.name)
    return [list(spans[start:stop]) for start, stop in zip(begins, [*begins[1:], len(spans)], strict=True)]


def _offsets(table: bytes, extended: tuple[bytes, bytes], frames: int) -> list[int] | None:
    """Return the frames' offsets from the first fragment's item, None where no table has one for each frame."""
    if len(extended[0]) == 8 * frames:
        return list(struct.unpack(f"<{frames}Q", extended[0]))
    if len(table) == 4 * frames:
        offsets = list(struct.unpack(f"<{frames}L", table))
        return None if UNDEFINED_LENGTH in offsets else offsets
    return None
