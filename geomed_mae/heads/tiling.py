"""Where windows lie and how an image is cut into blocks; arithmetic alone.

A block is a box of pixels. It is answered by the windows that reach into it and by nothing else, so its answer depends
on the image and the model, not on which blocks were answered before, where, or by how many processes. The price is that
windows across a border are computed on both sides: (n + 1) / n times the work along an axis on which a block is n steps
long. Blocks are as large as a fixed amount of memory allows, for that reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Start = tuple[int, ...]
"""First pixel of a window in its image."""

SIGMA = 1 / 8
"""Standard deviation of the blending weight as a share of the window."""
MARGIN = 1 / 8
"""Share of the window at each of its ends that has no say where another window has: with windows half apart, the middle
quarter of each is answered by that window alone."""
LEAST_WEIGHT = 1e-6
"""Weight along an axis within the margin: the image's corners are seen by one window's corner alone."""
AT_MARGIN = math.exp(-0.5 * ((0.5 - MARGIN) / SIGMA) ** 2)
"""The Gaussian where the margin begins."""
SUMS_BYTES = 64 << 20
"""Memory for a block's weighted sums, 4 bytes a class and pixel."""
VOLUME_SUMS_BYTES = 512 << 20
"""The same for volumes, which are in memory themselves, and whose blocks have more border for their size."""
READ_BYTES = 128 << 20
"""Memory for what is read at a time, a row of a block's windows."""
BYTES_PER_VALUE = 10
"""Of a value that is read: as stored and valid, all channels and once more those of the model."""
STEPS = (6, 4, 2, 1)
"""Steps that a block keeps along each axis, as long as that fits the memory."""


@dataclass(frozen=True, slots=True)
class Block:
    """A box of an image's pixels: `start` is its first pixel and `stop` the one after its last, one a spatial axis."""

    start: Start
    stop: Start

    @property
    def shape(self) -> tuple[int, ...]:
        """Pixels per axis."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))


def window_starts(size: int, window: int) -> list[int]:
    """Return the first pixel of each window along an axis: half a window apart, the last flush with the end."""
    if size <= window:
        return [0]
    return [*range(0, size - window, step_of(window)), size - window]


def step_of(window: int) -> int:
    """Return the distance between windows of that size: half of it."""
    return max(window // 2, 1)


def tile_starts(size: int, window: int) -> list[int]:
    """Return the first pixel of the fewest windows that cover an axis, evenly spaced, the last flush with the end."""
    count = -(-size // window)
    if count <= 1:
        return [0]
    return [number * (size - window) // (count - 1) for number in range(count)]


def blending_weight(window: Sequence[int]) -> np.ndarray:
    """Return the float32 weight of a window's pixels: a Gaussian, 1 in the middle, that falls to 0 at the margin.

    It has no step there, which would be seen as a seam.
    """
    axes = [np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (SIGMA * size)) ** 2) for size in window]
    weight = np.ones(())
    for axis in axes:
        inside = (axis / axis.max() - AT_MARGIN) / (1 - AT_MARGIN)
        weight = np.multiply.outer(weight, np.maximum(inside, LEAST_WEIGHT))
    return weight.astype(np.float32)


def block_size(
    shape: Sequence[int], crop: Sequence[int], *, classes: int, channels: int, memory: int | None = None
) -> tuple[int, ...]:
    """Return the pixels per axis of an image's blocks: whole steps, as large as fixed amounts of memory allow.

    Rows stay whole where they can, because striped files decode whole rows. The size depends on nothing but the
    arguments: neither on the machine nor on the number of processes.

    Args:
        shape: spatial shape of the image.
        crop: window of the model.
        classes: of the model.
        channels: of the image, all of which are decoded.
        memory: bytes for the block's sums; None takes SUMS_BYTES, or VOLUME_SUMS_BYTES.
    """
    if memory is None:
        memory = SUMS_BYTES if len(shape) == 2 else VOLUME_SUMS_BYTES
    steps = [step_of(window) for window in crop]
    most = [-(-size // step) for size, step in zip(shape, steps, strict=True)]
    counts = list(most)
    axes = range(len(counts))
    _shrink(counts, steps, axes[1:], READ_BYTES // (BYTES_PER_VALUE * channels * crop[0]))
    _shrink(counts, steps, axes, memory // (4 * classes))
    # Blocks of about the same size: a narrow last one would be nothing but border.
    even = [-(-whole // -(-whole // count)) for whole, count in zip(most, counts, strict=True)]
    return tuple(count * step for count, step in zip(even, steps, strict=True))


def _shrink(counts: list[int], steps: Sequence[int], axes: Sequence[int], pixels: int) -> None:
    """Lower the counts of `axes`, the first before the others, until a box of so many steps has at most `pixels`."""
    for least in STEPS:
        for axis in axes:
            across = math.prod(counts[other] * steps[other] for other in axes if other != axis)
            fitting = pixels // (across * steps[axis])
            counts[axis] = min(counts[axis], max(least, fitting))


def blocks_of(shape: Sequence[int], size: Sequence[int]) -> list[Block]:
    """Cut an image of spatial `shape` into blocks of `size`, in row-major order; the last ones may be smaller."""
    firsts = itertools.product(*(range(0, whole, part) for whole, part in zip(shape, size, strict=True)))
    return [
        Block(start, tuple(min(at + part, end) for at, part, end in zip(start, size, shape, strict=True)))
        for start in firsts
    ]


def starts_within(block: Block, shape: Sequence[int], crop: Sequence[int]) -> list[list[int]]:
    """Return per axis the first pixels of the windows that reach into a block."""
    axes = zip(block.start, block.stop, shape, crop, strict=True)
    return [
        [at for at in window_starts(size, window) if at < stop and at + window > start]
        for start, stop, size, window in axes
    ]
