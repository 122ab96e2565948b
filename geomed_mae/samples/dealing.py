"""Dealing: which crops of a window of steps are read together, and which sample of which step each becomes.

Crops that are read together are neighbours, and a batch made of few reads has few places. So the steps of a window
that draw the same bucket share their reads: a read's crops are dealt out to all of these steps, and each step has crops
of as many reads, while every block is still decoded once.

Samples are numbered 0 to batch_size - 1 within a step. Consecutive numbers form a lane, and a read deals to one lane
alone: processes that share a batch by consecutive numbers then share its reads too, as long as their number divides
that of the lanes. Lanes depend on the recipe alone, never on the number of processes. There are as many as can be had
without more reads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from geomed_mae.samples.crops import counter_rng

PURPOSE_DEAL = 3
"""Stream of `counter_rng`: the order of a lane's slots; 0 to 2 belong to buckets, crops and labelled crops."""

MOST_CROPS = 16
"""Where the recipe does not say how many crops are read together: at most so many, because more decode hardly less."""

PLACES, MOST_PLACES = 4, 16
"""A batch has crops of at least so many reads: PLACES for each step that shares them, up to MOST_PLACES."""


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """Crops that are read together.

    Attributes:
        number: of its first slot in the order of dealing; with the first step, the key of its random numbers.
        steps: (k,) which of the steps that share reads each crop belongs to, 0 for the first.
        samples: (k,) its sample number within that step.
    """

    number: int
    steps: np.ndarray
    samples: np.ndarray

    def __len__(self) -> int:
        return len(self.samples)


def crops_per_read(steps: int, batch_size: int, asked: int | None) -> int:
    """Return how many crops are read together where `steps` steps share their reads: `asked`, the recipe's, or ours."""
    if asked is not None:
        return asked
    return min(MOST_CROPS, max(1, steps * batch_size // min(MOST_PLACES, PLACES * steps)))


@lru_cache(maxsize=1024)
def lanes(steps: int, batch_size: int, crops: int) -> int:
    """Return the largest number of equal lanes that needs no more reads of `crops` crops than a single lane does."""
    fewest = -(-steps * batch_size // crops)
    sizes = (size for size in range(1, batch_size + 1) if batch_size % size == 0)
    return next(batch_size // size for size in sizes if batch_size // size * -(-steps * size // crops) == fewest)


def deal(seed: int, first: int, steps: int, *, batch_size: int, crops: int) -> Iterator[Read]:
    """Yield the reads that make `steps` steps of one bucket, `first` being the number of the first of them.

    Every (step, sample) is in exactly one read. Within a lane the order of slots is a random permutation, a pure
    function of (seed, first, lane); a single step needs none.
    """
    count = lanes(steps, batch_size, crops)
    size = batch_size // count
    for lane in range(count):
        order = np.arange(steps * size)
        if steps > 1:
            order = counter_rng(seed, first, lane, PURPOSE_DEAL).permutation(order)
        for begin in range(0, len(order), crops):
            slots = order[begin : begin + crops]
            yield Read(lane * len(order) + begin, slots // size, lane * size + slots % size)
