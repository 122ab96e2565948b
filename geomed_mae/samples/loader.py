"""Steps to batches: batch t is a pure function of (archive, recipe, seed, t), computed here or in workers.

There is no epoch and no sampler state: a resumed run asks for batch t and gets the bits that it would have got.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import GeomedError, OutputError, ReadError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.samples.augment import draw_symmetry
from geomed_mae.samples.batch import Batch
from geomed_mae.samples.buckets import Bucket, draw_bucket, make_buckets, shares
from geomed_mae.samples.crops import ImageCache, bounding_window, counter_rng, cut, draw_starts

if TYPE_CHECKING:
    from geomed_mae.config import DataConfig

REDRAWS = 8
"""Attempts at a crop with enough valid pixels, or at an image that reads; then the best crop so far is taken."""

WORKER_TIMEOUT_S = 900
"""A worker that gives nothing for so long hangs (a dead network drive, for example) and is replaced."""

WORKER_RESTARTS = 2
"""Times that workers which died (killed for memory, mostly) are replaced before the run stops."""

PURPOSE_BUCKET, PURPOSE_CROP = 0, 1
"""Streams of `counter_rng`: the choice of bucket, and everything about one read."""

EXAMPLE_STEP = 1 << 40
"""Number of the step that pictures belong to; no run is that long."""

log = logging.getLogger(__name__)


@dataclass
class _Drawn:
    """Crops of one read, arrays (C, *crop), and the share of valid pixels of each."""

    row: Row
    crops: list[tuple[np.ndarray, np.ndarray]]
    spacings: list[tuple[float, ...] | None]

    @property
    def valid_share(self) -> float:
        """Share of valid values, over all crops."""
        return float(np.mean([valid.mean() for _, valid in self.crops]))


class Steps(Dataset):
    """Map-style data set whose index is the step and whose items are whole Batches. Picklable; opens files lazily."""

    def __init__(self, index: Index, config: DataConfig, *, seed: int, batch_size: int, augment: bool = True) -> None:
        modalities = {modality.name: modality for modality in resolve_modalities(config.modality)}
        self.buckets = make_buckets(index.rows, config, modalities)
        shares(self.buckets, config.weights)  # weights that do not fit the archive are an error now, not at a step
        self.config, self.seed, self.batch_size = config, seed, batch_size
        self.cache = ImageCache(index, config.cache_mb)

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of `step`.

        Raises:
            ReadError: none of several images in a row could be read.
        """
        luck = counter_rng(self.seed, step, purpose=PURPOSE_BUCKET).random()
        bucket = draw_bucket(self.buckets, luck, self.config.weights)
        failed: list[str] = []
        reads: list[_Drawn] = []
        for first in range(0, self.batch_size, self.config.crops_per_read):
            count = min(self.config.crops_per_read, self.batch_size - first)
            rng = counter_rng(self.seed, step, sample=first, purpose=PURPOSE_CROP)
            reads.append(self._draw(bucket, rng, count, failed))
        return _collate(bucket, reads, step, tuple(failed))

    def examples(self, bucket: Bucket, count: int) -> Batch:
        """Return `count` crops of a bucket, unturned, from a stream that training never reaches: for pictures."""
        plain = replace(bucket, flips=())
        failed: list[str] = []
        rngs = [counter_rng(self.seed, EXAMPLE_STEP, sample, PURPOSE_CROP) for sample in range(count)]
        return _collate(plain, [self._draw(plain, rng, 1, failed) for rng in rngs], EXAMPLE_STEP, tuple(failed))

    def _draw(self, bucket: Bucket, rng: np.random.Generator, count: int, failed: list[str]) -> _Drawn:
        """Draw an image and `count` crops of it until enough of them is valid; bounded, the best attempt is kept."""
        best: _Drawn | None = None
        trouble: dict[str, ReadError] = {}
        for _ in range(REDRAWS):
            row = bucket.draw(rng.random(), frozenset(trouble))
            if row is None:
                break
            starts = draw_starts(rng, row.shape, bucket.crop, count)
            try:
                drawn = self._cut(bucket, row, starts, rng)
            except ReadError as error:
                # The file was whole when the archive was scanned. One image must not end a run, and must not be
                # dropped unseen either: it is named in the batch, and the run's error budget decides.
                failed.append(f"{row.key}: {error.reason}")
                trouble[row.key] = error
                continue
            if best is None or drawn.valid_share > best.valid_share:
                best = drawn
            if drawn.valid_share >= self.config.min_valid:
                break
        if best is None:
            last = list(trouble.values())[-1].reason
            raise ReadError(
                f"{len(trouble)} images in a row could not be read while making a batch (last: {last}); is the archive "
                "still in place? scan it again",
                last,
            )
        return best

    def _cut(self, bucket: Bucket, row: Row, starts: Sequence[tuple[int, ...]], rng: np.random.Generator) -> _Drawn:
        window = bounding_window(starts, bucket.crop, row.shape)
        image = self.cache.read(row, window)
        if image.channels != bucket.channels:
            image = image.select(tuple(channel.name for channel in bucket.channels))
        origin = [part.start for part in window]
        drawn = _Drawn(row, [], [])
        for start in starts:
            raw, valid = cut(image, origin, start, bucket.crop)
            symmetry = draw_symmetry(rng, bucket.flips, bucket.crop)
            drawn.crops.append((symmetry.apply(raw), symmetry.apply(valid)))
            drawn.spacings.append(None if row.spacing is None else symmetry.spacing(row.spacing))
        return drawn


def _collate(bucket: Bucket, reads: Sequence[_Drawn], step: int, failed: tuple[str, ...]) -> Batch:
    crops = [crop for read in reads for crop in read.crops]
    rows = [read.row for read in reads for _ in read.crops]
    spacings = [spacing for read in reads for spacing in read.spacings]
    names = [channel.name for channel in bucket.channels]
    return Batch(
        raw=torch.from_numpy(np.stack([raw for raw, _ in crops])),
        valid=torch.from_numpy(np.stack([valid for _, valid in crops])),
        channels=bucket.channels,
        modality=bucket.modality,
        spacing=None if spacings[0] is None else torch.tensor(spacings, dtype=torch.float32),
        keys=tuple(row.key for row in rows),
        statistics=tuple(_statistics(row, names) for row in rows),
        step=step,
        failed=failed,
    )


def _statistics(row: Row, names: Sequence[str]) -> tuple:
    have = {channel.name: entry for channel, entry in zip(row.channels, row.statistics, strict=True)}
    return tuple(have[name] for name in names)


class _Guarded(Dataset):
    """Gives an expected error as an item: torch would print a worker's traceback, with paths, and lose its type."""

    def __init__(self, inner: Mapping[int, Batch] | Dataset) -> None:
        self.inner = inner

    def __getitem__(self, step: int) -> Batch | GeomedError:
        try:
            return self.inner[step]
        except GeomedError as error:
            return error


def _unchanged(item: Batch | GeomedError) -> Batch | GeomedError:
    return item


def load_steps(steps: Dataset, first: int, stop: int, *, workers: int = 0, pin_memory: bool = False) -> Iterator[Batch]:
    """Yield `steps[first]` to `steps[stop - 1]`, in this order, made here (`workers` 0) or ahead in processes.

    Workers that die or hang are replaced and asked again: what they make depends on the step alone.

    Raises:
        ReadError and others: as raised by the item, whichever process made it.
        OutputError: workers keep dying; the message says what to do.
    """
    restarts = 0
    while first < stop:
        loader = DataLoader(
            _Guarded(steps),
            batch_size=None,
            sampler=range(first, stop),
            num_workers=workers,
            collate_fn=_unchanged,
            pin_memory=pin_memory,
            timeout=WORKER_TIMEOUT_S if workers else 0,
            prefetch_factor=2 if workers else None,
        )
        try:
            for item in loader:
                if isinstance(item, GeomedError):
                    raise item
                yield item
                first += 1
        except RuntimeError as error:
            if "DataLoader" not in str(error):
                raise
            restarts += 1
            if restarts > WORKER_RESTARTS:
                raise OutputError(
                    f"loader workers died {restarts} times, last at step {first}: memory or shared memory is short; "
                    "lower data.cache_mb, or set data.workers=0"
                ) from None
            log.warning("a loader worker died at step %d; workers are started again", first)


def batches(
    index: Index, config: DataConfig, *, seed: int, start_step: int, steps: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the batches of steps `start_step` to `steps` - 1; see `Steps` and `load_steps`."""
    made = Steps(index, config, seed=seed, batch_size=batch_size)
    return load_steps(made, start_step, steps, workers=config.workers)


def measure_rate(steps: Steps, count: int = 3, clock: Callable[[], float] = time.perf_counter) -> float:
    """Return samples per second of making `count` batches in this process, the first (cold) one included."""
    begin = clock()
    made = sum(len(steps[step]) for step in range(count))
    return made / max(clock() - begin, 1e-9)
