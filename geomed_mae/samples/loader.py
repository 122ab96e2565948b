"""Steps to batches: batch t is a pure function of (archive, recipe, seed, t), computed here or in workers.

There is no epoch and no sampler state: a resumed run asks for batch t and gets the bits that it would have got.
"""

from __future__ import annotations

import logging
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import GeomedError, OutputError, ReadError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.samples.augment import Symmetry, draw_symmetry
from geomed_mae.samples.batch import Batch
from geomed_mae.samples.buckets import Bucket, draw_bucket, make_buckets, shares
from geomed_mae.samples.crops import ImageCache, bounding_window, counter_rng, draw_places, seen

if TYPE_CHECKING:
    from geomed_mae.config import DataConfig

REDRAWS = 8
"""Attempts at crops with enough valid pixels, or at an image that reads; then the best crops so far are taken."""

PLACES, MOST_CROPS = 4, 16
"""Where the recipe does not say how many crops are read together: a batch has at least so many places, and a read at
most so many crops."""

WORKER_TIMEOUT_S = 900
"""A worker that gives nothing for so long hangs (a dead network drive, for example) and is replaced."""

WORKER_RESTARTS = 2
"""Times that workers which died (killed for memory, mostly) are replaced before the run stops."""

KEPT_ARRAYS = 6
"""Arrays of past batches kept for the next: two a batch; while one batch is made, one or two others are in use."""

PURPOSE_BUCKET, PURPOSE_CROP = 0, 1
"""Streams of `counter_rng`: the choice of bucket, and everything about one read."""

EXAMPLE_STEP = 1 << 40
"""Number of the step that pictures belong to; no run is that long."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Drawn:
    """One crop: raw (C, *crop), valid (C or 1, *crop), both before `symmetry`, and its share of valid values."""

    row: Row
    raw: np.ndarray
    valid: np.ndarray
    symmetry: Symmetry
    share: float


class _Memory:
    """Arrays of batches that nobody holds any more, given out again: to touch fresh memory costs as much as to fill it.

    What is given out is a view, and a tensor made of it holds that view; when the view is gone, all tensors are.
    """

    def __init__(self) -> None:
        self.given: list[tuple[np.ndarray, weakref.ref]] = []

    def __reduce__(self) -> tuple[type, tuple]:
        return _Memory, ()  # another process starts with none

    def array(self, shape: tuple[int, ...], dtype: type) -> np.ndarray:
        """Return an array of this shape and type, with any content."""
        base = None
        for number, (held, view) in enumerate(self.given):
            if view() is None and held.shape == shape and held.dtype == dtype:
                base = held
                del self.given[number]
                break
        base = np.empty(shape, dtype) if base is None else base
        view = base.view()
        self.given = [*self.given[-KEPT_ARRAYS + 1 :], (base, weakref.ref(view))]
        return view


class _Filling:
    """A batch in the making. Crops are copied in one by one, so that each can leave its memory to the next."""

    def __init__(self, bucket: Bucket, size: int, memory: _Memory) -> None:
        self.bucket = bucket
        self.raw = memory.array((size, len(bucket.channels), *bucket.crop), np.float32)
        self.valid = memory.array(self.raw.shape, np.bool_)
        self.crops: list[tuple[Row, Symmetry]] = []

    def add(self, crop: _Drawn) -> None:
        """Copy in the next crop."""
        number = len(self.crops)
        self.raw[number] = crop.symmetry.view(crop.raw)
        self.valid[number] = True if crop.share == 1 else crop.symmetry.view(crop.valid)
        self.crops.append((crop.row, crop.symmetry))

    def batch(self, step: int, failed: Sequence[str]) -> Batch:
        """Return what has been added as a Batch."""
        spacings = [None if row.spacing is None else symmetry.spacing(row.spacing) for row, symmetry in self.crops]
        names = [channel.name for channel in self.bucket.channels]
        return Batch(
            raw=torch.from_numpy(self.raw),
            valid=torch.from_numpy(self.valid),
            channels=self.bucket.channels,
            modality=self.bucket.modality,
            spacing=None if spacings[0] is None else torch.tensor(spacings, dtype=torch.float32),
            keys=tuple(row.key for row, _ in self.crops),
            statistics=tuple(_statistics(row, names) for row, _ in self.crops),
            step=step,
            failed=tuple(failed),
        )


class Steps(Dataset):
    """Map-style data set whose index is the step and whose items are whole Batches. Picklable; opens files lazily."""

    def __init__(self, index: Index, config: DataConfig, *, seed: int, batch_size: int, augment: bool = True) -> None:
        modalities = {modality.name: modality for modality in resolve_modalities(config.modality)}
        self.buckets = make_buckets(index.rows, config, modalities)
        shares(self.buckets, config.weights)  # weights that do not fit the archive are an error now, not at a step
        self.config, self.seed, self.batch_size = config, seed, batch_size
        self.cache = ImageCache(index, config.cache_mb)
        self.memory = _Memory()

    def __getitem__(self, step: int) -> Batch:
        """Return the batch of `step`.

        Raises:
            ReadError: none of several images in a row could be read.
        """
        luck = counter_rng(self.seed, step, purpose=PURPOSE_BUCKET).random()
        bucket = draw_bucket(self.buckets, luck, self.config.weights)
        failed: list[str] = []
        filling = _Filling(bucket, self.batch_size, self.memory)
        for first in range(0, self.batch_size, self.crops_per_read):
            count = min(self.crops_per_read, self.batch_size - first)
            failed += self._fill(filling, counter_rng(self.seed, step, sample=first, purpose=PURPOSE_CROP), count)
        return filling.batch(step, failed)

    @property
    def crops_per_read(self) -> int:
        """Crops that are read together: the recipe's number, or one that leaves a batch PLACES places."""
        return self.config.crops_per_read or min(MOST_CROPS, max(1, self.batch_size // PLACES))

    def examples(self, bucket: Bucket, count: int) -> Batch:
        """Return `count` crops of a bucket, unturned, from a stream that training never reaches: for pictures."""
        filling = _Filling(replace(bucket, flips=()), count, self.memory)
        failed: list[str] = []
        for sample in range(count):
            failed += self._fill(filling, counter_rng(self.seed, EXAMPLE_STEP, sample, PURPOSE_CROP), 1)
        return filling.batch(EXAMPLE_STEP, failed)

    def _fill(self, filling: _Filling, rng: np.random.Generator, count: int) -> list[str]:
        """Add `count` crops of an image; those with too few valid pixels are drawn again from another place.

        Bounded: after REDRAWS attempts the best of the refused crops fill the gap. Returns what could not be read.
        """
        bucket, missing = filling.bucket, count
        refused: list[_Drawn] = []
        trouble: dict[str, ReadError] = {}
        for _ in range(REDRAWS):
            row = bucket.draw(rng.random(), frozenset(trouble))
            if row is None:
                break
            starts = draw_places(rng, row, bucket.crop, missing)
            try:
                for crop in self._cut(bucket, row, starts, rng):
                    if crop.share >= self.config.min_valid:
                        filling.add(crop)
                        missing -= 1
                    else:
                        refused.append(crop)
            except ReadError as error:
                # The file was whole when the archive was scanned. One image must not end a run, and must not be
                # dropped unseen either: it is named in the batch, and the run's error budget decides.
                trouble[row.key] = error
            if missing == 0:
                break
        # A read that succeeds gives all that is missing, so there are too few only if none did.
        if len(refused) < missing:
            last = list(trouble.values())[-1].reason
            raise ReadError(
                f"{len(trouble)} images in a row could not be read while making a batch (last: {last}); is the archive "
                "still in place? scan it again",
                last,
            )
        for crop in sorted(refused, key=lambda crop: -crop.share)[:missing]:
            filling.add(crop)
        return [f"{key}: {error.reason}" for key, error in trouble.items()]

    def _cut(
        self, bucket: Bucket, row: Row, starts: Sequence[tuple[int, ...]], rng: np.random.Generator
    ) -> Iterator[_Drawn]:
        windows = [bounding_window([start], bucket.crop, row.shape) for start in starts]
        for start, window, whole in zip(starts, windows, self.cache.read_many(row, windows), strict=True):
            image = whole
            if image.channels != bucket.channels:
                image = image.select(tuple(channel.name for channel in bucket.channels))
            raw, valid = seen(image, [part.start for part in window], start, bucket.crop)
            symmetry = draw_symmetry(rng, bucket.flips, bucket.crop)
            yield _Drawn(row, raw, valid, symmetry, np.count_nonzero(valid) / valid.size)


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
