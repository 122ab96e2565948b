"""A regular grid over an image of two or three axes: the cells of the cache, and the tiles of a cell."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

Window = tuple[slice, ...]
Place = tuple[int, ...]

WHOLE_BYTES = 64 << 20
"""An image of at most so many decoded bytes is one cell."""
CELL_BYTES = 16 << 20
"""Decoded bytes of a cell of a larger one, about."""
MAX_EDGE = 2048
"""One crop must not decode a whole scene."""


@dataclass(frozen=True)
class Grid:
    """Boxes of `edges` over `shape`, one entry a spatial axis each; those at the far border are smaller."""

    shape: tuple[int, ...]
    edges: tuple[int, ...]

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Boxes per axis."""
        return tuple(-(-size // edge) for size, edge in zip(self.shape, self.edges, strict=True))

    def places(self, window: Window) -> Iterator[Place]:
        """Yield the places of the boxes that a window (with start and stop) touches, in row-major order."""
        axes = (range(part.start // edge, -(-part.stop // edge)) for part, edge in zip(window, self.edges, strict=True))
        return itertools.product(*axes)

    def window(self, place: Place) -> Window:
        """Return what the box at `place` covers."""
        return tuple(
            slice(number * edge, min(size, (number + 1) * edge))
            for number, edge, size in zip(place, self.edges, self.shape, strict=True)
        )

    def number(self, place: Place) -> int:
        """Return the row-major number of a box."""
        return int(np.ravel_multi_index(place, self.counts))

    def pixels(self) -> np.ndarray:
        """Return the number of pixels of each box, in row-major order."""
        pixels = np.ones(1, np.int64)
        for size, edge, count in zip(self.shape, self.edges, self.counts, strict=True):
            pixels = np.multiply.outer(pixels, np.minimum(edge, size - edge * np.arange(count))).ravel()
        return pixels


def shared(window: Window, box: Window) -> tuple[Window, Window]:
    """Return the part that a window and a box have in common, as a window of the window and as one of the box."""
    inside, out = [], []
    for part, other in zip(window, box, strict=True):
        start, stop = max(part.start, other.start), min(part.stop, other.stop)
        inside.append(slice(start - part.start, stop - part.start))
        out.append(slice(start - other.start, stop - other.start))
    return tuple(inside), tuple(out)


def cell_edges(shape: Sequence[int], bytes_per_pixel: int, block: tuple[int, int] | None) -> tuple[int, ...]:
    """Return the edges of the cells of an image: units that are decoded whole and of which little is decoded twice.

    An image of up to WHOLE_BYTES is one cell. Of a larger one, cells have about CELL_BYTES. Rasters with stored blocks
    are cut at multiples of them, with at most MAX_EDGE pixels on an axis where a block is not larger. Anything else is
    cut into bands across its first axis: slices of a volume decode as a whole, and so do rows.
    """
    if math.prod(shape) * bytes_per_pixel <= WHOLE_BYTES:
        return tuple(shape)
    room = max(1, CELL_BYTES // bytes_per_pixel)
    *outer, rows, columns = shape
    if outer or block is None:
        across = math.prod(shape[1:])
        return max(1, min(shape[0], room // across)), *shape[1:]
    height, width = block
    side = min(MAX_EDGE, math.isqrt(room))
    width = min(columns, max(1, side // width) * width)
    height = min(rows, max(1, min(MAX_EDGE, room // width) // height) * height)
    return height, width
