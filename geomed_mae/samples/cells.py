"""Cells: where crops lie that are read together, so that whole stored blocks are decoded for several crops at once.

Compressed rasters decode by block (a tile, or a strip as wide as the image), whatever part of it is wanted. So the
places of crops on each axis, 0 to length - crop, are cut into consecutive ranges at multiples of the block, and a cell
is one range of rows times one of columns: all of its crops need the same few blocks. The crops of one read lie in one
cell, which is drawn with probability proportional to its number of places; within it each crop's place is uniform.
Every place of an image is therefore exactly as likely for each crop as without cells (tested), and crops that cross
the border of a block are as frequent as they should be; what changes is that crops of one read are neighbours.

They spread over their cell as a Latin hypercube (McKay et al. 1979, doi 10.2307/1268522): each of the n crops has one
n-th of the rows, and one of the columns, to itself. That keeps them apart, and each of them uniform.

Cells are as small as they can be, so that few blocks serve a read, until a read would decode less than half the
pixels that its crops have: from there on they grow with the number of crops, which would lie upon each other otherwise.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

OVERLAP = 2
"""Crops of a read have at most so many times the pixels that are decoded for it, where the image is large enough."""
SMALLEST = 8
"""A cell is at least one part in so many of the crop wide: strips of a single row would give each read one row only."""


def draw_cell(
    rng: np.random.Generator, shape: Sequence[int], crop: Sequence[int], count: int, *, block: Sequence[int]
) -> list[tuple[int, ...]]:
    """Draw the first pixel of `count` crops of one cell, in an image of spatial `shape` with stored blocks of `block`.

    One entry an axis in each of `shape`, `crop`, `block`, in pixels. An axis on which the image is not larger than the
    crop gives 0.
    """
    axes = []
    for edges in _plan(tuple(shape), tuple(crop), tuple(block), count):
        first = int(rng.random() * edges[-1])
        cell = bisect.bisect_right(edges, first) - 1
        low, high = edges[cell], edges[cell + 1]
        places = low + (rng.permutation(count) + rng.random(count)) / count * (high - low)
        axes.append(np.minimum(places.astype(np.int64), high - 1))  # a float just below 1 may round up to it
    return [tuple(int(place) for place in places) for places in zip(*axes, strict=True)]


@lru_cache(maxsize=1024)
def _plan(shape: tuple[int, ...], crop: tuple[int, ...], block: tuple[int, ...], count: int) -> list[tuple[int, ...]]:
    """Return the edges of the cells per axis: smallest first, then the shorter side grows, up to what OVERLAP allows.

    The last edge of an axis is its number of places.
    """
    axes = list(zip(shape, crop, block, strict=True))
    wanted = count / OVERLAP * math.prod(min(size, length) for length, size, _ in axes)
    grown = [0] * len(axes)
    while True:
        plan = [_edges(*axis, blocks=size) for axis, size in zip(axes, grown, strict=True)]
        spans = [_span(*axis, edges=edges) for axis, edges in zip(axes, plan, strict=True)]
        growing = [number for number, edges in enumerate(plan) if len(edges) > 2]
        if math.prod(spans) >= wanted or not growing:
            return plan
        grown[min(growing, key=spans.__getitem__)] += 1


def _edges(length: int, crop: int, block: int, *, blocks: int) -> tuple[int, ...]:
    """Return the edges of the cells of one axis: 0, ..., number of places. Cells of `blocks` blocks; 0 is the least."""
    places = max(length - crop, 0) + 1
    least = max(1, crop // SMALLEST)
    unit = block * math.ceil(least / block)
    edges = np.arange(0, places, unit * max(blocks, 1))
    if blocks == 0:
        # From this place of a block on, a crop reaches into one block more.
        reaches = unit - (crop - 1) % unit
        if min(reaches, unit - reaches) >= least:
            edges = np.sort(np.concatenate([edges, edges + reaches]))
    edges = edges[edges < places]
    if len(edges) > 1 and places - edges[-1] < least:
        edges = edges[:-1]  # a last cell of a few places joins the one before it
    return (*edges.tolist(), places)


def _span(length: int, crop: int, block: int, *, edges: Sequence[int]) -> float:
    """Return how many pixels of one axis a read decodes: the mean over places of the blocks that their cell needs."""
    low, high = np.array(edges[:-1]), np.array(edges[1:])
    last = np.minimum(-(-(high - 1 + crop) // block) * block, length)
    return float(((last - low // block * block) * (high - low)).sum() / edges[-1])
