"""Decode frames of an opened DICOM file into physical values and a validity mask.

Plain samples are read here, straight from the frame's place in the file; pydicom and its plug-ins decode what is
compressed or coloured. Then, once: unused bits, padding, modality LUT or rescale, inversion, colour. Order of PS3.3
C.7.6.3 and C.11.1: stored value, padding, modality transform.

Colour becomes red, green and blue in 0..255 (of however many bits, scaled), or their luminance where the modality has
one channel. pydicom turns YBR into RGB itself; palettes are looked up here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from io import BytesIO
from typing import BinaryIO

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.codestream import CODECS, RLE, Stream, check_stream, followed_by_noise, frame_spans
from geomed_mae.readers.dicom.file import EXPLICIT_BIG, EXPLICIT_LITTLE, NATIVE_SYNTAXES, PARSE_ERRORS, Opened, quiet
from geomed_mae.readers.dicom.image_header import Header
from geomed_mae.readers.dicom.limits import MAX_FRAME_PIXELS
from geomed_mae.readers.dicom.lut import Table, modality_table, palette_tables
from geomed_mae.readers.reasons import Reason

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in luminance (ITU-R BT.601), for colour pictures as one channel."""

FULL_SCALE = 255.0
"""Colours are given in 0..255, whatever number of bits they are stored in."""

FLOAT32_MAX = 3.4e38
"""What is larger may not be finite as float32."""

PALETTE = "PALETTE COLOR"

PLUGINS = {"JPEG": "pillow", "JPEG-LS": "pyjpegls", "JPEG 2000": "pylibjpeg", "HTJ2K": "pylibjpeg", "RLE": "pylibjpeg"}
"""pydicom's plug-in for each codec, where it is installed. pydicom itself begins with GDCM, which ends the process on
some damaged streams (an exception that nothing catches); only lossless JPEG has no other decoder here."""


@lru_cache(maxsize=64)
def codec_problem(syntax: str) -> str:
    """Say why a transfer syntax cannot be decoded on this machine, "" when it can."""
    if syntax in NATIVE_SYNTAXES:
        return ""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    try:
        with quiet():
            decoder = get_decoder(UID(syntax))
            available, encapsulated = decoder.is_available, decoder.is_encapsulated
    except (NotImplementedError, ValueError):
        return "no decoder exists for its (private, video or unknown) transfer syntax"
    if available and encapsulated:
        return ""
    return f"transfer syntax {syntax} needs a codec: pip install 'geomed-mae[med]'"


def decode(
    opened: Opened, header: Header, frames: Sequence[int], *, invert: bool, channels: int = 1, factor: float = 1.0
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Decode frames of an opened file.

    Args:
        opened: the file.
        header: what the file says about itself.
        frames: numbers of the wanted frames.
        invert: turn MONOCHROME1 round. For projections, whose values mean brightness only; never for volumes, where it
            concerns display and not the values (PS3.3 C.7.6.3.1.2).
        channels: 1, or 3 for red, green and blue of a colour image.
        factor: what rescaled values are multiplied with (SUV, see `dicom.suv`).

    Returns:
        per frame, float32 (rows, columns), or (3, rows, columns), in physical units, and bool (rows, columns), False
        where padded or not finite.

    Raises:
        ReadError: CODEC_MISSING, DECODE_FAILED, TOO_LARGE, LENGTH_MISMATCH, or DTYPE_UNSUPPORTED (grey for 3 channels).
    """
    if problem := codec_problem(header.syntax):
        raise ReadError(problem, Reason.CODEC_MISSING.name)
    if channels == 3 and not header.coloured:
        raise ReadError("a grey image has no red, green and blue", Reason.DTYPE_UNSUPPORTED.name)
    try:
        stored = _stored_frames(opened, header, frames)
        if header.coloured:
            return [colour_values(array, opened, header, channels=channels) for array in stored]
        lut = any(header.frames[frame].lut for frame in frames)
        table = modality_table(opened.values, signed=header.signed) if lut else None
    except PARSE_ERRORS as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"the pixel data does not decode ({type(error).__name__})", Reason.DECODE_FAILED.name) from None
    return [
        physical(array, header, frame, invert=invert, table=table, factor=factor)
        for array, frame in zip(stored, frames, strict=True)
    ]


def _stored_frames(opened: Opened, header: Header, frames: Sequence[int]) -> list[np.ndarray]:
    """Return frames as stored words (rows, columns), or RGB (rows, columns, 3)."""
    native = header.syntax in NATIVE_SYNTAXES
    with opened.body() as file:
        streams = _native_frames(file, opened, header, frames) if native else _streams(file, opened, header, frames)
    if native and header.samples == 1:
        # Byte order is the data set's own; pixels of another one are turned into this machine's.
        order = ">" if header.syntax == EXPLICIT_BIG else "<"
        kind = np.dtype(header.dtype)
        words = (np.frombuffer(stream, kind.newbyteorder(order)).astype(kind, copy=False) for stream in streams)
        return [array.reshape(header.rows, header.columns) for array in words]
    found = [_by_pydicom(stream, header) for stream in streams]
    expected = (header.rows, header.columns, header.samples)[: 2 if header.samples == 1 else 3]
    if any(array.shape != expected for array in found):
        raise ReadError(f"the decoded pixels are not {expected}", Reason.LENGTH_MISMATCH.name)
    if CODECS.get(header.syntax) == "JPEG":
        for stream, array in zip(streams, found, strict=True):
            if not np.array_equal(array, _by_pydicom(followed_by_noise(stream), header)):
                raise ReadError("the data of a frame ends before its last row", Reason.TRUNCATED.name)
    return found


def _native_frames(file: BinaryIO, opened: Opened, header: Header, frames: Sequence[int]) -> list[bytes]:
    """Read the bytes of frames of plain samples."""
    size = header.rows * header.columns * header.samples * header.bits_allocated // 8
    if header.photometric == "YBR_FULL_422":
        size = size * 2 // 3
    if header.syntax == EXPLICIT_BIG and header.bits_allocated == 8 and opened.pixel_vr == b"OW":
        # Bytes in words of 16 bits: big endian swaps the two pixels of each word (PS3.5 8.1.1).
        file.seek(opened.pixel_start)
        whole = np.frombuffer(_read(file, opened.pixel_length // 2 * 2), dtype=np.uint16).byteswap().tobytes()
        return [whole[frame * size : (frame + 1) * size] for frame in frames]
    found = []
    for frame in frames:
        file.seek(opened.pixel_start + frame * size)
        found.append(_read(file, size))
    return found


def _read(file: BinaryIO, size: int) -> bytes:
    # An unbuffered read returns less than asked for at the end of the file, or beyond 2 GiB.
    parts = [file.read(size)]
    while (left := size - sum(map(len, parts))) > 0:
        if not (more := file.read(left)):
            raise ReadError("the file ends inside its pixel data", Reason.TRUNCATED.name)
        parts.append(more)
    return parts[0] if len(parts) == 1 else b"".join(parts)


def _streams(file: BinaryIO, opened: Opened, header: Header, frames: Sequence[int]) -> list[bytes]:
    """Read the compressed streams of frames, each checked against the header."""

    def bytes_at(span: tuple[int, int]) -> bytes:
        file.seek(span[0])
        return _read(file, span[1])

    fragments, count = opened.fragments, len(header.frames)
    starts = (
        [bytes_at((start, min(4, length))) for start, length in fragments.spans]
        if len(fragments.spans) != count
        else []
    )
    spans = frame_spans(
        fragments,
        count,
        table=bytes_at(fragments.table) if fragments.table[1] else b"",
        extended=(opened.values.raw("ExtendedOffsetTable"), opened.values.raw("ExtendedOffsetTableLengths")),
        starts=starts,
    )
    expected = Stream(header.rows, header.columns, header.samples, header.bits_allocated)
    found = []
    for frame in frames:
        stream = b"".join(bytes_at(span) for span in spans[frame])
        check_stream(stream, header.syntax, expected, limit=MAX_FRAME_PIXELS)
        found.append(stream)
    return found


def _by_pydicom(stream: bytes, header: Header) -> np.ndarray:
    """Decode one frame's bytes, compressed or coloured; YBR becomes RGB here and nowhere else."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    syntax = header.syntax
    if syntax in NATIVE_SYNTAXES:
        if syntax == EXPLICIT_BIG and header.bits_allocated == 16:
            stream = np.frombuffer(stream, dtype=np.uint16).byteswap().tobytes()
        syntax = EXPLICIT_LITTLE
    else:
        stream = encapsulate([stream], has_bot=False)
    decoder = get_decoder(UID(syntax))
    plugin = PLUGINS.get(CODECS.get(syntax, ""), "")
    with quiet(), _panics_caught():
        array, _ = decoder.as_array(
            BytesIO(stream),
            decoding_plugin=plugin if plugin in decoder.available_plugins else "",
            index=0,
            raw=header.samples == 1,
            rows=header.rows,
            columns=header.columns,
            number_of_frames=1,
            samples_per_pixel=header.samples,
            photometric_interpretation=header.photometric,
            planar_configuration=header.planar or 0,
            bits_allocated=header.bits_allocated,
            bits_stored=header.bits_stored,
            pixel_representation=int(header.signed),
            pixel_keyword="PixelData",
            # RLE stores whole words, whose unused bits padding may use, as native data does.
            correct_unused_bits=syntax != RLE,
        )
    return array


@contextmanager
def _panics_caught() -> Iterator[None]:
    """Turn a panic of a codec written in Rust, which is no Exception, into one."""
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise RuntimeError("a codec panicked") from None


def colour_values(
    stored: np.ndarray, opened: Opened, header: Header, *, channels: int
) -> tuple[np.ndarray, np.ndarray]:
    """Turn RGB (rows, columns, 3), or palette indices (rows, columns), into (3, rows, columns) or luminance.

    Returns:
        float32 values in 0..255, and a bool (rows, columns) that is True throughout: colour has no padding value.
    """
    bits = header.bits_stored
    if header.photometric == PALETTE:
        tables = palette_tables(opened.values, signed=header.signed)
        bits = tables[0].bits
        values = stored_values(stored.astype(header.dtype, copy=False), header)
        stored = np.stack([table.look_up(values) for table in tables], axis=-1)
    colours = stored.astype(np.float64) if bits == 8 else stored * (FULL_SCALE / (2.0**bits - 1.0))
    made = colours @ LUMA if channels == 1 else np.moveaxis(colours, -1, 0)
    return made.astype(np.float32), np.ones(stored.shape[:2], dtype=bool)


def physical(
    stored: np.ndarray, header: Header, frame: int, *, invert: bool, table: Table | None = None, factor: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Turn one frame's stored words into float32 physical values and a validity mask, both (rows, columns)."""
    # A codec gives samples in the fewest bytes that hold them: the header's words are what masks are counted in.
    stored = stored.astype(header.dtype, copy=False)
    values = stored if header.floating else stored_values(stored, header)
    valid = ~padding_mask(stored, values, header)
    described = header.frames[frame]
    invert = invert and header.photometric == "MONOCHROME1" and not header.floating
    if table is not None:
        numbers = table.look_up(values).astype(np.float64)
        top = 2.0**table.bits - 1.0
    else:
        numbers = values.astype(np.float64)
        top = -1.0 if header.signed else 2.0**header.bits_stored - 1.0
    if invert:
        # Mirror within the range of the stored bits, or of the table's: 0 and 2^n - 1 change places, signed -1 and 0.
        np.subtract(top, numbers, out=numbers)
    # PET slopes reach 1e-8 and differ from slice to slice: float64 until the result is there.
    with np.errstate(over="ignore", invalid="ignore"):
        for operation, number, neutral in (
            (np.multiply, described.slope, 1.0),
            (np.add, described.intercept, 0.0),
            (np.multiply, factor, 1.0),
        ):
            if number != neutral:
                operation(numbers, number, out=numbers)
        result = numbers.astype(np.float32)
    largest = (2.0**header.bits_allocated * abs(described.slope) + abs(described.intercept)) * abs(factor)
    if header.floating or not largest < FLOAT32_MAX:
        finite = np.isfinite(result)
        result[~finite] = 0
        valid &= finite
    return result, valid


def stored_values(words: np.ndarray, header: Header) -> np.ndarray:
    """Cut words down to their stored bits, sign extended where signed; the others may hold anything (PS3.5 8.1.1).

    Bits lie below HighBit. Old files put them at the top of the word, with room for an overlay below.
    """
    above = header.bits_allocated - 1 - header.high_bit
    unused = header.bits_allocated - header.bits_stored
    return words if unused == 0 else (words << above) >> unused


def padding_mask(words: np.ndarray, values: np.ndarray, header: Header) -> np.ndarray:
    """Return where pixels are padding (PS3.3 C.7.5.1.1.2): PixelPaddingValue, up to PixelPaddingRangeLimit.

    The value's own VR (US or SS) is often wrong, so its bits are read as the pixels' type: 63536 is -2000 when pixels
    are signed. A value outside the stored bits can only be meant for the whole word, unused bits included.
    """
    if header.padding is None:
        return np.zeros(words.shape, dtype=bool)
    if header.floating:
        return (values >= min(header.padding)) & (values <= max(header.padding))
    bits, kind = header.bits_allocated, words.dtype
    ends = np.array([_widened(int(end), bits, signed=header.signed) for end in header.padding], dtype=np.uint64)
    ends = ends.astype(f"u{bits // 8}").view(f"{kind.kind}{bits // 8}")
    if header.high_bit != header.bits_stored - 1:
        return (values >= ends.min()) & (values <= ends.max())
    if (stored_values(ends, header) == ends).all():
        return (values >= ends.min()) & (values <= ends.max())
    return (words >= ends.min()) & (words <= ends.max())


def _widened(end: int, bits: int, *, signed: bool) -> int:
    """Return a padding value's bits in a word of `bits`: the attribute itself has 16, with the pixels' sign."""
    if signed and bits > 16 and 1 << 15 <= end < 1 << 16:
        end -= 1 << 16
    return end & ((1 << bits) - 1)
