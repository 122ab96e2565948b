"""Decode frames of an opened DICOM file into physical values and a validity mask.

pydicom and its plug-ins decode; what pydicom leaves to its caller is done here, once: unused high bits, padding,
rescale, inversion, colour. Order of PS3.3 C.7.6.3 and C.11.1: stored value, padding, modality transform.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom_file import NATIVE_SYNTAXES, PARSE_ERRORS, Opened, quiet
from geomed_mae.readers.dicom_header import Header
from geomed_mae.readers.reasons import Reason

LUMA = np.array([0.299, 0.587, 0.114])
"""Weights of red, green and blue in luminance (ITU-R BT.601), for colour ultrasound as one channel."""


@lru_cache(maxsize=64)
def codec_problem(syntax: str) -> str:
    """Say why a transfer syntax cannot be decoded on this machine, "" when it can."""
    if syntax in NATIVE_SYNTAXES:
        return ""
    from pydicom.pixels import get_decoder
    from pydicom.uid import UID

    try:
        with quiet():
            available = get_decoder(UID(syntax)).is_available
    except (NotImplementedError, ValueError):
        return "no decoder exists for its (private, video or unknown) transfer syntax"
    if available:
        return ""
    return f"transfer syntax {syntax} needs a codec: pip install 'geomed-mae[med]'"


def decode(
    opened: Opened, header: Header, frames: Sequence[int], *, invert: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Decode frames of a file that was opened with its pixels.

    Args:
        opened: the file.
        header: what the file says about itself.
        frames: numbers of the wanted frames.
        invert: turn MONOCHROME1 round. For projections, whose values mean brightness only; never for volumes, where it
            concerns display and not the values (PS3.3 C.7.6.3.1.2).

    Returns:
        per frame, float32 (rows, columns) in physical units and bool (rows, columns), False where padded or not finite.

    Raises:
        ReadError: CODEC_MISSING, DECODE_FAILED or LENGTH_MISMATCH.
    """
    if problem := codec_problem(header.syntax):
        raise ReadError(problem, Reason.CODEC_MISSING.name)
    native = header.syntax in NATIVE_SYNTAXES
    try:
        with quiet():
            from pydicom.pixels import iter_pixels

            # Native words come with their unused bits, which padding may use. pydicom converts YBR to RGB (raw=False).
            stored = list(
                iter_pixels(
                    opened.dataset, indices=list(frames), raw=header.samples == 1, correct_unused_bits=not native
                )
            )
    except PARSE_ERRORS as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"the pixel data does not decode ({type(error).__name__})", Reason.DECODE_FAILED.name) from None
    expected = (header.rows, header.columns, header.samples)[: 2 if header.samples == 1 else 3]
    if len(stored) != len(frames) or any(array.shape != expected for array in stored):
        raise ReadError(f"the decoded pixels are not {expected}", Reason.LENGTH_MISMATCH.name)
    return [physical(array, header, frame, invert=invert) for array, frame in zip(stored, frames, strict=True)]


def physical(stored: np.ndarray, header: Header, frame: int, *, invert: bool) -> tuple[np.ndarray, np.ndarray]:
    """Turn one frame's stored words into float32 physical values and a validity mask, both (rows, columns)."""
    if stored.dtype.byteorder == ">":
        stored = stored.astype(stored.dtype.newbyteorder("="))
    if header.samples == 3:
        return (stored @ LUMA).astype(np.float32), np.ones(stored.shape[:2], dtype=bool)
    values = stored_values(stored, header)
    valid = ~padding_mask(stored, values, header)
    numbers = values.astype(np.float64)
    if invert and header.photometric == "MONOCHROME1":
        # Mirror within the range of the stored bits: 0 and 2^n - 1 change places, signed -1 and 0.
        numbers = (-1.0 if header.signed else 2.0**header.bits_stored - 1.0) - numbers
    # PET slopes reach 1e-8 and differ from slice to slice: float64 until the result is there.
    described = header.frames[frame]
    with np.errstate(over="ignore"):
        result = (numbers * described.slope + described.intercept).astype(np.float32)
    finite = np.isfinite(result)
    if not finite.all():
        result[~finite] = 0
        valid &= finite
    return result, valid


def stored_values(words: np.ndarray, header: Header) -> np.ndarray:
    """Cut words down to their stored bits, sign extended where signed; bits above may hold anything (PS3.5 8.1.1)."""
    unused = header.bits_allocated - header.bits_stored
    return words if unused == 0 else (words << unused) >> unused


def padding_mask(words: np.ndarray, values: np.ndarray, header: Header) -> np.ndarray:
    """Return where pixels are padding (PS3.3 C.7.5.1.1.2): PixelPaddingValue, up to PixelPaddingRangeLimit.

    The value's own VR (US or SS) is often wrong, so its bits are read as the pixels' type: 63536 is -2000 when pixels
    are signed. A value outside the stored bits can only be meant for the whole word, unused bits included.
    """
    if header.padding is None:
        return np.zeros(words.shape, dtype=bool)
    bits, kind = header.bits_allocated, words.dtype
    ends = np.array([end & ((1 << bits) - 1) for end in header.padding], dtype=np.uint64)
    ends = ends.astype(f"u{bits // 8}").view(f"{kind.kind}{bits // 8}")
    if (stored_values(ends, header) == ends).all():
        return (values >= ends.min()) & (values <= ends.max())
    return (words >= ends.min()) & (words <= ends.max())
