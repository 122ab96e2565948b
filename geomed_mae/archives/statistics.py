"""Robust per-channel statistics over valid pixels: the numbers behind normalisation, noise floors and `inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

NORMAL_SPAN = 3.29
"""Standard deviations between the 5th and the 95th percentile of a normal distribution."""

MAX_SAMPLES = 4_000_000
"""Percentiles of larger channels are taken on a regular subset of this many pixels: their error is then below 0.1 %."""

_PERCENTILES = (0.5, 5.0, 50.0, 95.0, 99.5)


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """Statistics of one channel's valid pixels in physical units; all zero when no pixel is valid.

    `p005` is the 0.5th percentile, `p05` the 5th, `p95` the 95th, `p995` the 99.5th.
    """

    count: int
    minimum: float
    p005: float
    p05: float
    median: float
    p95: float
    p995: float
    maximum: float
    mean: float
    std: float

    @property
    def spread(self) -> float:
        """Robust standard deviation: (p95 - p05) / 3.29, else std, else 1, so that it is always positive.

        The fall-backs serve images that are constant over more than nine tenths of their pixels.
        """
        robust = (self.p95 - self.p05) / NORMAL_SPAN
        return robust if robust > 0 else self.std if self.std > 0 else 1.0

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)


def summarise(array: np.ndarray, valid: np.ndarray) -> tuple[ChannelStatistics, ...]:
    """Return the statistics of each channel.

    Args:
        array: float32 (C, [Z,] Y, X) in physical units.
        valid: bool, broadcastable to `array`; the other pixels are not looked at.
    """
    running = Running(array.shape[0], array[0].size)
    running.add(array, valid)
    return running.result()


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of one channel's valid pixels between `edges` (one more than there are counts), in physical units.

    `every` is 1 where all pixels were counted, n where every n-th was (see MAX_SAMPLES). Values outside the edges are
    not counted. A constant channel has one bin without width.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    every: int


class Running:
    """Statistics of an image that is read part by part: memory does not grow with it.

    Args:
        channels: number of channels.
        pixels: pixels of one channel of the whole image; sets how dense the subset for percentiles is.
    """

    def __init__(self, channels: int, pixels: int) -> None:
        self._step = max(1, -(-pixels // MAX_SAMPLES))
        self._subsets: list[list[np.ndarray]] = [[] for _ in range(channels)]
        self._count = np.zeros(channels, dtype=np.int64)
        self._sums = np.zeros((channels, 2))
        self._range = np.array([[np.inf, -np.inf]] * channels)

    def add(self, array: np.ndarray, valid: np.ndarray) -> None:
        """Count one part, as `summarise` takes it."""
        valid = np.broadcast_to(valid, array.shape)
        for channel, (values, mask) in enumerate(zip(array, valid, strict=True)):
            kept = values[mask]
            if not kept.size:
                continue
            exact = kept.astype(np.float64)
            self._count[channel] += kept.size
            self._sums[channel] += exact.sum(), np.square(exact).sum()
            low, high = self._range[channel]
            self._range[channel] = min(low, kept.min()), max(high, kept.max())
            # A copy: a view would keep all of the part in memory.
            self._subsets[channel].append(kept[:: self._step].copy())

    def result(self) -> tuple[ChannelStatistics, ...]:
        """Return the statistics of all parts together."""
        return tuple(self._channel(number) for number in range(len(self._count)))

    def histogram(self, channel: int, bins: int) -> Histogram:
        """Return the histogram of a channel between its 0.5th and 99.5th percentile; call it after the last part."""
        if not self._count[channel]:
            return Histogram((0.0, 1.0), (0,), self._step)
        values = np.concatenate(self._subsets[channel])
        low, high = (float(value) for value in np.percentile(values, (_PERCENTILES[0], _PERCENTILES[-1])))
        if not high > low:
            return Histogram((low, high), (int(values.size),), self._step)
        counts, edges = np.histogram(values.astype(np.float64), bins, (low, high))
        return Histogram(tuple(map(float, edges)), tuple(map(int, counts)), self._step)

    def _channel(self, number: int) -> ChannelStatistics:
        count = int(self._count[number])
        if count == 0:
            return ChannelStatistics(0, *([0.0] * 9))
        subset = np.concatenate(self._subsets[number])
        p005, p05, median, p95, p995 = (float(value) for value in np.percentile(subset, _PERCENTILES))
        mean, square = self._sums[number] / count
        return ChannelStatistics(
            count=count,
            minimum=float(self._range[number, 0]),
            p005=p005,
            p05=p05,
            median=median,
            p95=p95,
            p995=p995,
            maximum=float(self._range[number, 1]),
            mean=float(mean),
            std=float(np.sqrt(max(square - mean * mean, 0.0))),
        )


class BlockMeans:
    """Means of an image over a coarse grid of cells, valid pixels only, fed part by part: thumbnails and what they see.

    Parts come in order along the first spatial axis, each whole along the others. The cells do not depend on how the
    image is cut into parts: cell k of g along an axis of n pixels begins at pixel floor(k * n / g).

    Args:
        channels: number of channels.
        shape: spatial shape of the whole image.
        grid: wanted number of cells per spatial axis; an axis with fewer pixels has one cell a pixel.
    """

    def __init__(self, channels: int, shape: Sequence[int], grid: Sequence[int]) -> None:
        self.grid = tuple(min(cells, size) for cells, size in zip(grid, shape, strict=True))
        self._starts = [np.arange(cells) * size // cells for cells, size in zip(self.grid, shape, strict=True)]
        self._sums = np.zeros((channels, *self.grid))
        self._counts = np.zeros((channels, *self.grid))
        self._sizes = np.ones(self.grid)
        for axis, (starts, size) in enumerate(zip(self._starts, shape, strict=True)):
            sides = np.diff(np.append(starts, size)).reshape([-1 if axis == other else 1 for other in range(len(grid))])
            self._sizes = self._sizes * sides
        self._done = 0

    def add(self, array: np.ndarray, valid: np.ndarray) -> None:
        """Count the next part, (C, [Z,] Y, X) and a mask that is broadcastable to it."""
        depth = array.shape[1]
        rows = np.searchsorted(self._starts[0], np.arange(self._done, self._done + depth), side="right") - 1
        starts = [np.flatnonzero(np.diff(rows, prepend=-1)), *self._starts[1:]]
        self._done += depth
        mask = np.broadcast_to(valid, (valid.shape[0], *array.shape[1:]))
        # NaN times zero is NaN: invalid values are replaced, not multiplied away.
        values = array if mask.all() else np.where(mask, array, np.float32(0))
        place = (slice(None), rows[starts[0]])
        self._sums[place] += _cell_sums(values, starts)
        self._counts[place] += _cell_sums(mask, starts)

    def result(self) -> tuple[np.ndarray, np.ndarray]:
        """Return (means, share of valid pixels), float64 (C, *grid); the mean is NaN in cells without a valid pixel."""
        with np.errstate(invalid="ignore"):
            return self._sums / self._counts, self._counts / self._sizes


def _cell_sums(values: np.ndarray, starts: Sequence[np.ndarray]) -> np.ndarray:
    """Sum (C, *S) over cells that begin at `starts` along each spatial axis, in float64."""
    for axis in range(values.ndim - 1, 0, -1):
        values = np.add.reduceat(values, starts[axis - 1], axis=axis, dtype=np.float64)
    return values
