"""The worst cases, kept while images are scored: no image is predicted twice for a picture.

Of an image that is too large to look at, the window with the most wrong pixels is kept.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.readers import IGNORE
from geomed_mae.scoring.image_score import Band

SHOWN = {"segment": 4, "classify": 8}
"""Cases that are kept, by task."""
SIDE = 512
"""Longest side, in pixels, of what is kept of a plane; volumes are kept whole."""


@dataclass(frozen=True, slots=True, eq=False)
class Case:
    """One image that was scored badly.

    Attributes:
        row: the image.
        window: which part of it is kept, one slice a spatial axis.
        value: its score, 0 to 1.
        truth: class numbers of the window, IGNORE where unknown; or what is so of the image, 1, 0 or UNKNOWN a class.
        found: class numbers of the window as predicted; or the probabilities of the classes.
    """

    row: Row
    window: tuple[slice, ...]
    value: float
    truth: np.ndarray
    found: np.ndarray


class Worst:
    """The cases of lowest value."""

    def __init__(self, count: int) -> None:
        """Start without cases; `count` of them are kept."""
        self._count = count
        self._heap: list[tuple[float, int, Case]] = []
        self._offered = 0

    def offer(self, value: float | None, case: Callable[[], Case]) -> None:
        """Keep a case if it is bad enough; it is made only then. One without a value is not."""
        self._offered += 1
        if value is None or (len(self._heap) == self._count and -value <= self._heap[0][0]):
            return
        # The best of the kept lies on top; of equal ones the earlier stays. The number breaks ties before cases do.
        heapq.heappush(self._heap, (-value, -self._offered, case()))
        if len(self._heap) > self._count:
            heapq.heappop(self._heap)

    @property
    def cases(self) -> list[Case]:
        """The kept cases, the worst first."""
        return [case for *_, case in sorted(self._heap, key=lambda entry: (-entry[0], -entry[1]))]


BandKind = TypeVar("BandKind", bound=Band)


def kept(bands: Iterable[BandKind], whole: np.ndarray) -> Iterator[BandKind]:
    """Pass bands on, and put their numbers into `whole`, uint8 of the image's shape."""
    for band in bands:
        whole[band.first : band.first + len(band.numbers)] = band.numbers
        yield band


def map_case(row: Row, value: float, truth: np.ndarray, found: np.ndarray) -> Case:
    """Return the case of a class map: of a large plane the window with the most wrong pixels."""
    window = tuple(slice(0, size) for size in truth.shape)
    if truth.ndim == 2 and max(truth.shape) > SIDE:
        window = _fullest((truth != IGNORE) & (truth != found))
    return Case(row, window, value, truth[window].copy(), found[window].copy())


def _fullest(wrong: np.ndarray) -> tuple[slice, ...]:
    """Return the window of SIDE pixels, on a grid of half its size, that holds the most wrong pixels."""
    step = SIDE // 2
    starts = [np.arange(0, size, step) for size in wrong.shape]
    cells = np.add.reduceat(np.add.reduceat(wrong.astype(np.int64), starts[0], axis=0), starts[1], axis=1)
    padded = np.pad(cells, ((0, 1), (0, 1)))
    sums = padded[:-1, :-1] + padded[1:, :-1] + padded[:-1, 1:] + padded[1:, 1:]
    place = np.unravel_index(int(sums.argmax()), sums.shape)
    window = []
    for number, size in zip(place, wrong.shape, strict=True):
        first = max(0, min(int(number) * step, size - SIDE))
        window.append(slice(first, min(first + SIDE, size)))
    return tuple(window)
