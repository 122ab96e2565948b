"""Robust per-channel statistics over valid pixels: the numbers behind normalisation, noise floors and `inspect`."""

from __future__ import annotations

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
            self._subsets[channel].append(kept[:: self._step])

    def result(self) -> tuple[ChannelStatistics, ...]:
        """Return the statistics of all parts together."""
        return tuple(self._channel(number) for number in range(len(self._count)))

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
