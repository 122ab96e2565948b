"""What a dry run says of the loader: samples a second, measured on a few windows; memory and disk, estimated.

Nothing is written: what the cache on disk would save in later epochs is not in the measured rate.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.samples.loader import Steps, load_steps
from geomed_mae.samples.piece import STORED

if TYPE_CHECKING:
    from geomed_mae.config import DataConfig
    from geomed_mae.samples.batch import Batch

SECONDS = 10.0
"""Time that measuring the loader takes, about."""

PATIENCE = 3.0
"""A window that would take so many times SECONDS is not made; single crops stand for it."""

PROBES, MOST_SINGLES = 8, 1000
"""Single crops that tell how long a window will take, and that stand for one at most."""

MOST_ROUNDS = 12
"""Rounds after which enough is known, however quick they are."""

SHARED_MEMORY = Path("/dev/shm")


@dataclass(frozen=True, slots=True)
class LoaderRate:
    """Samples a second that the loader gives where nothing else keeps it waiting.

    Attributes:
        samples_per_second: all samples over all time of the rounds after the first one, or of the only one.
        slow, quick: quartiles of the same rounds.
        rounds: their number; a round is a window of steps from each worker.
        shared_reads: False where a window would have taken too long and single crops were read instead; those of a
            window share what they decode, so that the loader may be quicker than this says.
    """

    samples_per_second: float
    slow: float
    quick: float
    rounds: int
    shared_reads: bool = True

    @classmethod
    def of(cls, rates: Sequence[float], *, shared_reads: bool = True) -> LoaderRate:
        """Sum up the rates of rounds, in their order."""
        counted = rates[1:] or rates  # workers start in the first round
        slow, quick = np.percentile(counted, [25, 75])
        return cls(1 / float(np.mean(1 / np.array(counted))), float(slow), float(quick), len(counted), shared_reads)


def measure_loader(
    steps: Steps, *, workers: int = 0, seconds: float = SECONDS, clock: Callable[[], float] = time.perf_counter
) -> LoaderRate:
    """Make batches for about `seconds`, as training would with this number of workers, and return how fast they came.

    Raises:
        ReadError and others: as `load_steps`.
    """
    singles = _singles(steps)
    rates = _timed(singles, PROBES, seconds, clock)
    # The median: images that are kept in memory are decoded for the first crop of each, and for no other.
    if steps.window_steps * len(steps.samples) / np.median(rates) < PATIENCE * seconds:
        return _measure_windows(steps, workers, seconds, clock)
    rates += _timed(singles, MOST_SINGLES, seconds, clock)
    return LoaderRate.of([rate * max(1, workers) for rate in rates], shared_reads=False)


def _singles(steps: Steps) -> Iterator[Batch]:
    """Yield batches of one crop, each read by itself; the memory of decoded images is that of `steps`."""
    alone = steps.config.model_copy(update={"shuffle_steps": 1, "crops_per_read": 1})
    probe = Steps(steps.cache.index, alone, seed=steps.seed, batch_size=1)
    probe.cache = steps.cache
    return (probe[step] for step in itertools.count())


def _timed(batches: Iterator[Batch], most: int, seconds: float, clock: Callable[[], float]) -> list[float]:
    """Return batches a second, one by one, of `most` batches or until `seconds` have gone by."""
    rates, begin = [], clock()
    last = begin
    while not rates or (len(rates) < most and last - begin < seconds):
        next(batches)
        now = clock()
        rates.append(1 / max(now - last, 1e-9))
        last = now
    return rates


def _measure_windows(steps: Steps, workers: int, seconds: float, clock: Callable[[], float]) -> LoaderRate:
    together = steps.window_steps * max(1, workers)
    rates: list[float] = []
    begin = last = clock()
    # Closed at once: workers must not go on making batches while the model's speed is measured.
    with contextlib.closing(load_steps(steps, 0, MOST_ROUNDS * together, workers=workers)) as made:
        for number, batch in enumerate(made, start=1):
            if number % together == 0:
                now = clock()
                rates.append(together * len(batch) / max(now - last, 1e-9))
                last = now
                if now - begin > seconds:
                    break
    return LoaderRate.of(rates)


def window_bytes(steps: Steps) -> int:
    """Return the bytes of the largest bucket's window of steps as it is kept: stored numbers, a byte of validity."""
    of_crop = max(
        math.prod(bucket.crop) * (1 + len(bucket.channels) * max(_itemsize(row) for row in bucket.rows))
        for bucket in steps.buckets
    )
    return steps.window_steps * len(steps.samples) * of_crop


def loader_memory(steps: Steps, workers: int) -> dict[str, float]:
    """Return MiB of memory that the loader takes at most, all processes together.

    `images` is decoded images, `windows` crops as they wait in the processes that make them, `in_flight` those on their
    way from workers, which lie in shared memory (`/dev/shm`, of which `shared_memory_free` is left).
    """
    makers, window = max(1, workers), window_bytes(steps)
    rows = [row for bucket in steps.buckets for row in bucket.rows]
    images = min(steps.config.cache_mb << 20, sum(_decoded(row) for row in rows))
    ahead = 2 if steps.window_steps == 1 else 1  # windows of each worker, see `load_steps`
    in_flight = (ahead * workers + 1) * window if workers else 0
    found = {"images": makers * images, "windows": makers * 2 * window, "in_flight": in_flight}
    needs = {name: round(value / 2**20, 1) for name, value in found.items()}
    if workers and SHARED_MEMORY.is_dir():
        needs["shared_memory_free"] = round(shutil.disk_usage(SHARED_MEMORY).free / 2**20, 1)
    return needs


def cache_bytes(config: DataConfig, rows: Sequence[Row]) -> int:
    """Return the bytes that the cache on disk takes at most: every image decoded, or its limit; 0 where it is off."""
    if config.cache == "off":
        return 0
    return min(int(config.cache_gb * 2**30), sum(_decoded(row) for row in rows))


def _decoded(row: Row) -> int:
    """Return the bytes of a whole image as it is kept."""
    return math.prod(row.shape) * (1 + len(row.channels) * _itemsize(row))


def _itemsize(row: Row) -> int:
    """Return the bytes of a stored number; what no integer type holds is float32."""
    return np.dtype(row.dtype).itemsize if row.dtype in STORED else 4
