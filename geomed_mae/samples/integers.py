"""Finding the integers that an image's float32 values were computed from, verified bit by bit.

Nothing here is believed: a candidate (scale, offset) is tried on some thousand values, then on all of them, and one bit
of difference refuses it. Work is done in parts of a channel that fit a core's own cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

Scaling = tuple["float | Sequence[float]", "float | Sequence[float]"]
"""(scale, offset), each a number for all channels or one a channel."""

INTEGERS = tuple(np.dtype(name) for name in ("uint8", "int8", "uint16", "int16"))
"""Smallest first."""
SAMPLE = 4096
"""Values of a channel that a candidate is tried on before all of them."""
PART = 1 << 16
"""Values converted at a time."""
MOST = (1 << 16) - 1
"""Largest number that 16 bits hold."""
DIGITS = 16
"""Characters of a decimal number in DICOM (PS3.5 VR DS): scales that files state have no more digits."""


def to_physical(values: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return float32 (C, *s): float32(float64(values) * scale + offset), the product rounded before the sum.

    Args:
        values: integers (C, *s).
        scale: float64 (C,).
        offset: float64 (C,).
    """
    if _neutral(scale, offset):
        return values.astype(np.float32)
    out = np.empty(values.shape, np.float32)
    for channel, (stored, into) in enumerate(zip(values, out, strict=True)):
        if into.size <= PART or not stored.flags.c_contiguous:
            _forward(stored, scale[channel], offset[channel], into)
            continue
        stored, into = stored.reshape(-1), into.reshape(-1)
        for part in _parts(into.size):
            _forward(stored[part], scale[channel], offset[channel], into[part])
    return out


def _forward(stored: np.ndarray, scale: float, offset: float, out: np.ndarray) -> None:
    exact = np.multiply(stored, scale, dtype=np.float64)
    exact += offset
    out[...] = exact


def integer_form(
    array: np.ndarray, valid: np.ndarray, scalings: Sequence[Scaling] = (), *, guess: bool = True
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Return (integers (C, *s), scale, offset), 0 where not valid, that give `array` by `to_physical`; None if none do.

    Args:
        array: float32 (C, *s), 0 where not valid.
        valid: bool (1 or C, *s).
        scalings: candidates, beside 1 and 0.
        guess: whether a scale read off the values (with offset 0) is a candidate too.
    """
    channels = len(array)
    flat, mask = array.reshape(channels, -1), valid.reshape(len(valid), -1)
    mask = None if mask.all() else mask
    # An odd step does not run along a column of an image of even width.
    step = slice(None, None, max(1, flat.shape[1] // SAMPLE) | 1)
    few, few_mask = flat[:, step], None if mask is None else mask[:, step]
    known = [(1.0, 0.0), *scalings]
    for scale, offset in dict.fromkeys(_per_channel(one, channels) for one in known):
        both = np.array(scale), np.array(offset)
        if _integers(few, few_mask, *both) is None:
            continue
        found = _integers(flat, mask, *both)
        if found is not None:
            return found.reshape(array.shape), *both
    scale = _scale_of(few, flat) if guess else None
    if scale is None:
        return None
    offset = np.zeros(channels)
    found = _integers(flat, mask, scale, offset)
    return None if found is None else (found.reshape(array.shape), scale, offset)


def _per_channel(scaling: Scaling, channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    scale, offset = (np.broadcast_to(np.asarray(one, np.float64), channels) for one in scaling)
    return tuple(scale.tolist()), tuple(offset.tolist())


def _neutral(scale: np.ndarray, offset: np.ndarray) -> bool:
    return bool((scale == 1).all() and not offset.any())


def _parts(size: int) -> Iterator[slice]:
    return (slice(start, min(size, start + PART)) for start in range(0, size, PART))


def _integers(flat: np.ndarray, mask: np.ndarray | None, scale: np.ndarray, offset: np.ndarray) -> np.ndarray | None:
    """Return the integers of `flat` (C, n) under one candidate, None where they do not give it bit by bit."""
    neutral = _neutral(scale, offset)
    if not (np.isfinite(scale).all() and np.isfinite(offset).all() and (scale != 0).all()):
        return None
    dtype = _smallest(flat, scale, offset)
    if dtype is None:
        return None
    out = np.empty(flat.shape, dtype)
    for channel, values in enumerate(flat):
        ok = None if mask is None else mask[min(channel, len(mask) - 1)]
        for part in _parts(flat.shape[1]):
            wanted, into = values[part], out[channel, part]
            if neutral:
                into[...] = wanted
                again = into.astype(np.float32)
            else:
                numbers = np.subtract(wanted, offset[channel], dtype=np.float64)
                numbers /= scale[channel]
                np.rint(numbers, out=numbers)
                into[...] = numbers
                if ok is not None:
                    into *= ok[part]
                again = np.empty(wanted.shape, np.float32)
                _forward(into, scale[channel], offset[channel], again)
            same = again.view(np.uint32) == np.ascontiguousarray(wanted).view(np.uint32)
            if not same.all() and (neutral or ok is None or not (same | ~ok[part]).all()):
                return None
    return out


def _smallest(flat: np.ndarray, scale: np.ndarray, offset: np.ndarray) -> np.dtype | None:
    """Return the smallest integer type that holds 0 and what the values would be; None if none does."""
    low = high = 0.0
    for channel, values in enumerate(flat):
        # Where not valid, values are 0. What that would be counts too: it is cheaper than to look where they are.
        ends = np.array([values.min(), values.max()], np.float64)
        ends = np.rint((ends - offset[channel]) / scale[channel])
        # A NaN fails the comparisons and refuses the candidate.
        if not (ends >= -MOST).all() or not (ends <= MOST).all():
            return None
        low, high = min(low, *ends), max(high, *ends)
    return next((kind for kind in INTEGERS if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max), None)


def _scale_of(few: np.ndarray, flat: np.ndarray) -> np.ndarray | None:
    """Return per channel a scale of which all values look like multiples, read off the values; None if there is none.

    Rescaled MR and PET: a slope such as 1.2345 and no intercept. float32 values n * scale bound the scale from both
    sides, each to half a unit in its last place; of what all values together leave, the shortest decimal is taken.
    """
    scales = []
    for some, values in zip(few, flat, strict=True):
        scale = _spacing(some)
        bounds = None if scale is None else _bounds(some, scale)
        if bounds is None:
            return None
        for part in _parts(values.size):
            within = _bounds(values[part], scale)
            bounds = None if within is None else (max(bounds[0], within[0]), min(bounds[1], within[1]))
            if bounds is None or bounds[0] > bounds[1]:
                return None
        scales.append(_shortest(*bounds))
    return np.array(scales)


def _spacing(values: np.ndarray) -> float | None:
    """Return about the distance of neighbouring values; 1 where all are 0."""
    sizes = np.unique(np.abs(values[values != 0]).astype(np.float64))
    if not sizes.size:
        return 1.0
    scale = float(np.diff(sizes, prepend=0.0).min())
    if not np.isfinite(sizes[-1]) or scale <= 0 or sizes[-1] > MOST * 1.1 * scale:
        return None
    # A difference of large values is a rough scale: enough for small multiples, which give a better one for larger.
    reach = 32.0
    while reach < 32 * MOST:
        near = sizes[sizes <= reach * scale]
        counts = np.rint(near / scale)
        if counts.any():
            scale = float(near @ counts / (counts @ counts))
        reach *= 32
    return scale


def _bounds(values: np.ndarray, scale: float) -> tuple[float, float] | None:
    """Return the smallest and the largest scale whose multiples round to `values`; None where there is none."""
    sizes = np.abs(values[values != 0])
    if not sizes.size:
        return 0.0, np.inf
    counts = np.rint(sizes.astype(np.float64) / scale)
    if not counts.all() or not counts.max() <= MOST:
        return None
    # A hair beyond half a unit in the last place: scales of few digits have multiples that are ties.
    half = np.spacing(sizes).astype(np.float64) * 0.5000001
    low, high = float(((sizes - half) / counts).max()), float(((sizes + half) / counts).min())
    return (low, high) if low <= high else None


def _shortest(low: float, high: float) -> float:
    """Return the decimal with the fewest digits between two numbers, their middle where DIGITS are too few."""
    if not np.isfinite(high):
        return 1.0  # a channel of zeros
    middle = (low + high) / 2
    texts = (f"{middle:.{digits}g}" for digits in range(1, DIGITS + 1))
    return next((float(text) for text in texts if low <= float(text) <= high), middle)
