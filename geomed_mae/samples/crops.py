"""Crops: where they lie and how they are read. Everything random comes from `counter_rng`, nothing from a state.

Several crops can be read together (`crops_per_read`). In an image that is stored in blocks they share a cell of it
(see `cells`). In any other they are cut from the neighbourhood of one: the first lies anywhere with equal probability,
the others up to half a crop away, mirrored at the border of the image. A symmetric step with mirrored borders leaves
the uniform distribution uniform (a reflected random walk), so every place of an image is as likely as with independent
crops, while one decoded window of at most twice the crop serves them all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.image import Image
from geomed_mae.samples.cells import draw_cell
from geomed_mae.samples.piece import Piece


def counter_rng(seed: int, step: int, sample: int = 0, purpose: int = 0) -> np.random.Generator:
    """Return the generator of one sample of one step.

    Philox4x64 (Salmon et al. 2011, doi 10.1145/2063384.2063405) with key (seed, step) and (sample, purpose) in the
    upper words of its counter: streams of different arguments never overlap, and none needs another to have been
    drawn before it.
    """
    counter = np.array([0, sample, purpose, 0], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, step], dtype=np.uint64), counter=counter))


def _mirrored(position: float, length: float) -> float:
    """Fold `position` into [0, length] by reflection at both ends."""
    if length <= 0:
        return 0.0
    position %= 2 * length
    return min(position, 2 * length - position)


def draw_starts(
    rng: np.random.Generator, shape: Sequence[int], crop: Sequence[int], count: int
) -> list[tuple[int, ...]]:
    """Draw the first pixel of `count` neighbouring crops in an image of spatial `shape`.

    An axis on which the image is not larger than the crop gives 0. Uniform over all whole pixel positions.
    """
    # One more than the largest start: floor() of a uniform real in [0, room) is a uniform integer.
    room = np.maximum(np.array(shape) - np.array(crop), 0) + 1.0
    first = rng.random(len(crop)) * room
    starts = [first]
    for _ in range(count - 1):
        offset = (rng.random(len(crop)) - 0.5) * np.array(crop)
        starts.append(np.array([_mirrored(at, size) for at, size in zip(first + offset, room, strict=True)]))
    return [tuple(int(min(value, size - 1)) for value, size in zip(start, room, strict=True)) for start in starts]


def draw_places(rng: np.random.Generator, row: Row, crop: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """Draw the first pixel of `count` crops of an image that are read together; each by itself is uniform over it."""
    if row.block is None or count == 1:
        return draw_starts(rng, row.shape, crop, count)
    return draw_cell(rng, row.shape, crop, count, block=row.block)


def cut(
    image: Image, origin: Sequence[int], start: Sequence[int], crop: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Cut one crop out of a window.

    Args:
        image: a window of an image.
        origin: the window's first pixel in the whole image.
        start: first pixel of the crop in the whole image.
        crop: size of the crop; where the image ends before it, pixels that are not valid are appended.

    Returns:
        raw (C, *crop) float32, 0 where not valid; valid (C, *crop) bool.
    """
    window = _inside(origin, start, crop, image.spatial_shape)
    values = image.array[(slice(None), *window)]
    valid = np.broadcast_to(image.valid, image.array.shape)[(slice(None), *window)]
    # Zeroed here, so that NaN and nodata numbers cannot reach any arithmetic later on.
    raw = np.where(valid, values, np.float32(0))
    return _padded(raw, crop), _padded(valid, crop).copy()


def seen(piece: Piece, origin: Sequence[int], start: Sequence[int], crop: Sequence[int]) -> Piece:
    """As `cut`, of a Piece and as a Piece, without copies where none is needed: to be read only."""
    part = piece.crop(_inside(origin, start, crop, piece.spatial_shape))
    if part.spatial_shape == tuple(crop):
        return part
    return replace(part, values=_padded(part.values, crop), valid=_padded(part.valid, crop))


def _inside(
    origin: Sequence[int], start: Sequence[int], crop: Sequence[int], shape: Sequence[int]
) -> tuple[slice, ...]:
    """Return the part of a window of `shape` at `origin` that a crop covers."""
    return tuple(
        slice(begin - first, min(begin - first + size, length))
        for begin, first, size, length in zip(start, origin, crop, shape, strict=True)
    )


def _padded(array: np.ndarray, crop: Sequence[int]) -> np.ndarray:
    """Append zeros (False) to (C, *s) up to the size of the crop."""
    if array.shape[1:] == tuple(crop):
        return array
    return np.pad(array, [(0, 0), *((0, size - have) for size, have in zip(crop, array.shape[1:], strict=True))])


def bounding_window(starts: Sequence[tuple[int, ...]], crop: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the smallest window, inside the image, that holds all crops."""
    return tuple(
        slice(min(start[axis] for start in starts), min(max(start[axis] for start in starts) + crop[axis], shape[axis]))
        for axis in range(len(crop))
    )
