"""Crops: where they lie and how they are read. Everything random comes from `counter_rng`, nothing from a state.

Several crops can be read together (`crops_per_read`). In an image that is stored in blocks they share a cell of it
(see `cells`). In any other they are cut from the neighbourhood of one: the first lies anywhere with equal probability,
the others up to half a crop away, mirrored at the border of the image. A symmetric step with mirrored borders leaves
the uniform distribution uniform (a reflected random walk), so every place of an image is as likely as with independent
crops, while one decoded window of at most twice the crop serves them all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.image import Image
from geomed_mae.samples.cells import draw_cell

CACHE_SHARE = 8
"""An image is kept in memory whole where at least this many of its size fit into the cache; larger ones are read by
window. Either way gives the same pixels."""

BYTES_PER_VALUE = 5
"""Memory of a decoded value: float32 and one byte of validity (an upper bound, validity may be shared by channels)."""


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


class ImageCache:
    """Reads windows through a least-recently-used cache of whole decoded images, one cache a process.

    Rasters and volumes alike: what is small enough for `CACHE_SHARE` to fit is decoded once and kept, what is not is
    read by window every time. The cache changes speed, never pixels.
    """

    def __init__(self, index: Index, cache_mb: int) -> None:
        self.index = index
        self.capacity = cache_mb << 20
        self.held: OrderedDict[str, Image] = OrderedDict()

    def read(self, row: Row, window: tuple[slice, ...]) -> Image:
        """Return the window of an image; one slice a spatial axis, inside the image.

        Raises:
            ReadError: the image no longer decodes.
        """
        whole = self._whole(row)
        return self.index.read(row.key, window) if whole is None else whole.crop(window)

    def read_many(self, row: Row, windows: Sequence[tuple[slice, ...]]) -> Iterable[Image]:
        """Give several windows of an image, each as `read` does; large images are read once for all of them.

        Raises:
            ReadError: the image no longer decodes.
        """
        whole = self._whole(row)
        return self.index.read_many(row.key, windows) if whole is None else (whole.crop(part) for part in windows)

    def _whole(self, row: Row) -> Image | None:
        """Return the whole image from the cache, read into it where it fits; None where it does not."""
        size = BYTES_PER_VALUE * len(row.channels) * int(np.prod(row.shape, dtype=np.int64))
        if size * CACHE_SHARE > self.capacity:
            return None
        if row.key in self.held:
            self.held.move_to_end(row.key)
        else:
            self.held[row.key] = self.index.read(row.key)
            while sum(_bytes(image) for image in self.held.values()) > self.capacity:
                self.held.popitem(last=False)
        return self.held.get(row.key)


def _bytes(image: Image) -> int:
    return image.array.nbytes + image.valid.nbytes


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
    raw, valid = seen(image, origin, start, crop)
    return raw.copy(), np.broadcast_to(valid, raw.shape).copy()


def seen(
    image: Image, origin: Sequence[int], start: Sequence[int], crop: Sequence[int]
) -> tuple[np.ndarray, np.ndarray]:
    """As `cut`, without copies where none is needed: to be read only, and `valid` may have one channel for all."""
    window = tuple(
        slice(begin - first, min(begin - first + size, length))
        for begin, first, size, length in zip(start, origin, crop, image.spatial_shape, strict=True)
    )
    values = image.array[(slice(None), *window)]
    mask = np.broadcast_to(image.valid, (len(image.valid), *image.spatial_shape))[(slice(None), *window)]
    # Zeroed here, so that NaN and nodata numbers cannot reach any arithmetic later on.
    raw = values if mask.all() else np.where(mask, values, np.float32(0))
    if raw.shape[1:] == tuple(crop):
        return raw, mask
    padding = [(0, 0), *((0, size - have) for size, have in zip(crop, raw.shape[1:], strict=True))]
    return np.pad(raw, padding), np.pad(mask, padding)


def bounding_window(starts: Sequence[tuple[int, ...]], crop: Sequence[int], shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the smallest window, inside the image, that holds all crops."""
    return tuple(
        slice(min(start[axis] for start in starts), min(max(start[axis] for start in starts) + crop[axis], shape[axis]))
        for axis in range(len(crop))
    )
