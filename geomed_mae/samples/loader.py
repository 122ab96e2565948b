"""Steps to batches: batch t is a pure function of (archive, recipe, seed, t), computed here or in workers.

There is no epoch and no sampler state: a resumed run asks for batch t and gets the bits that it would have got. Steps
are made in windows of `data.shuffle_steps`: the crops of a read are dealt out to all steps of the window that draw the
same bucket (see `dealing`). Window n is steps n * shuffle_steps to (n + 1) * shuffle_steps - 1, wherever a run begins.

Memory: one window of crops as they are stored (shuffle_steps times a batch, of a process's own samples), each with a
byte of validity; for a moment two, while a batch of the last is still in use. Every worker has as much.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.samples.augment import draw_symmetry
from geomed_mae.samples.batch import Batch
from geomed_mae.samples.buckets import Bucket, draw_bucket, make_buckets, shares
from geomed_mae.samples.crops import bounding_window, counter_rng, draw_places, seen
from geomed_mae.samples.dealing import Read, crops_per_read, deal
from geomed_mae.samples.filling import Drawn, Filling, Memory
from geomed_mae.samples.memory import ImageCache
from geomed_mae.samples.workers import load_steps

if TYPE_CHECKING:
    from geomed_mae.config import DataConfig
    from geomed_mae.samples.store import Store

REDRAWS = 8
"""Attempts at crops with enough valid pixels, or at an image that reads; then the best crops so far are taken."""

PURPOSE_BUCKET, PURPOSE_CROP = 0, 1
"""Streams of `counter_rng`: the choice of bucket, and everything about one read."""

EXAMPLE_STEP = 1 << 40
"""Number of the step that pictures belong to; no run is that long."""


class Steps(Dataset):
    """Map-style data set whose index is the step and whose items are whole Batches. Picklable; opens files lazily.

    The window of the last item is kept, so that steps in order cost no more than they must.

    Args:
        index: archive.
        config: what is read, and how.
        seed, batch_size: of the recipe; `batch_size` counts the samples of all processes.
        augment: whether crops are moved by the symmetries of their modality.
        rank, world: number of this process and of all: a batch is samples rank * batch_size / world and following.
            Sample n of a step is the same for any world.
        store: cache on disk.

    Raises:
        ConfigError: weights or crops do not fit the archive, or `world` does not divide `batch_size`.
    """

    def __init__(
        self,
        index: Index,
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        augment: bool = True,
        rank: int = 0,
        world: int = 1,
        store: Store | None = None,
    ) -> None:
        if batch_size % world or not 0 <= rank < world:
            raise ConfigError(
                f"train.batch_size {batch_size} cannot be shared evenly by {world} processes (this is number {rank}); "
                f"set it to a multiple of {world}"
            )
        modalities = {modality.name: modality for modality in resolve_modalities(config.modality)}
        buckets = make_buckets(index.rows, config, modalities)
        self.buckets = buckets if augment else tuple(replace(bucket, flips=()) for bucket in buckets)
        shares(self.buckets, config.weights)  # weights that do not fit the archive are an error now, not at a step
        self.config, self.seed, self.batch_size = config, seed, batch_size
        self.samples = range(rank * batch_size // world, (rank + 1) * batch_size // world)
        self.cache = ImageCache(index, config.cache_mb, store)
        self.memory = Memory()
        self._window: _Window | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Another process makes windows of its own."""
        return {**self.__dict__, "_window": None}

    @property
    def window_steps(self) -> int:
        """Steps that are made together."""
        return self.config.shuffle_steps

    @property
    def crops_per_read(self) -> int:
        """Crops that are read together where all steps of a window draw the same bucket."""
        return crops_per_read(self.window_steps, self.batch_size, self.config.crops_per_read)

    def __getitem__(self, step: int) -> Batch:
        """Return this process's part of the batch of `step`.

        Raises:
            ReadError: none of several images in a row could be read.
        """
        number = step // self.window_steps
        if self._window is None or self._window.number != number:
            self._window = None  # leaves its memory to the next
            self._window = _Window(self, number)
        return self._window.batch(step)

    def bucket_of(self, step: int) -> Bucket:
        """Return the bucket that a step draws."""
        luck = counter_rng(self.seed, step, purpose=PURPOSE_BUCKET).random()
        return draw_bucket(self.buckets, luck, self.config.weights)

    def make(self, bucket: Bucket, steps: Sequence[int]) -> list[Batch]:
        """Return the batches of the steps of a window that draw `bucket`.

        Raises:
            ReadError: none of several images in a row could be read.
        """
        own, first = len(self.samples), steps[0]
        filling = Filling(bucket, len(steps) * own, self.memory)
        failed: list[list[str]] = [[] for _ in steps]
        crops = crops_per_read(len(steps), self.batch_size, self.config.crops_per_read)
        for read in deal(self.seed, first, len(steps), batch_size=self.batch_size, crops=crops):
            places = self._places(read)
            mine = [place for place in places if place is not None]
            if mine:
                rng = counter_rng(self.seed, first, read.number, PURPOSE_CROP)
                failed[min(mine) // own] += self._fill(filling, places, rng)
        return [
            filling.batch(range(n * own, (n + 1) * own), step, samples=self.samples, failed=failed[n])
            for n, step in enumerate(steps)
        ]

    def _places(self, read: Read) -> list[int | None]:
        """Return the place of each crop of a read among this process's own, None for those of other processes."""
        own = self.samples
        return [
            step * len(own) + sample - own.start if sample in own else None
            for step, sample in zip(read.steps.tolist(), read.samples.tolist(), strict=True)
        ]

    def examples(self, bucket: Bucket, count: int) -> Batch:
        """Return `count` crops of a bucket, unturned, from a stream that training never reaches: for pictures."""
        filling = Filling(replace(bucket, flips=()), count, self.memory)
        failed: list[str] = []
        for sample in range(count):
            failed += self._fill(filling, [sample], counter_rng(self.seed, EXAMPLE_STEP, sample, PURPOSE_CROP))
        return filling.batch(range(count), EXAMPLE_STEP, failed=failed).physical()

    def _fill(self, filling: Filling, places: Sequence[int | None], rng: np.random.Generator) -> list[str]:
        """Put crops of an image to `places`; those with too few valid pixels are drawn again from another place.

        Bounded: after REDRAWS attempts the best of the refused crops fill the gap. Returns what could not be read.
        """
        bucket, open_places = filling.bucket, list(places)
        refused: list[Drawn] = []
        trouble: dict[str, ReadError] = {}
        for _ in range(REDRAWS):
            row = bucket.draw(rng.random(), frozenset(trouble))
            if row is None:
                break
            starts = draw_places(rng, row, bucket.crop, len(open_places))
            enough = self.config.min_valid * _reach(row, bucket.crop)
            try:
                for crop in self._cut(bucket, row, starts, rng):
                    if crop.share >= enough:
                        _put(filling, open_places.pop(0), crop)
                    else:
                        refused.append(crop)
            except ReadError as error:
                # The file was whole when the archive was scanned. One image must not end a run, and must not be
                # dropped unseen either: it is named in the batch, and the run's error budget decides.
                trouble[row.key] = error
            if not open_places:
                break
        # A read that succeeds gives all that is missing, so there are too few only if none did.
        if len(refused) < len(open_places):
            last = list(trouble.values())[-1].reason
            raise ReadError(
                f"{len(trouble)} images in a row could not be read while making a batch (last: {last}); is the archive "
                "still in place? scan it again",
                last,
            )
        best = sorted(refused, key=lambda crop: -crop.share)
        for place, crop in zip(open_places, best, strict=False):
            _put(filling, place, crop)
        return [f"{key}: {error.reason}" for key, error in trouble.items()]

    def _cut(
        self, bucket: Bucket, row: Row, starts: Sequence[tuple[int, ...]], rng: np.random.Generator
    ) -> Iterator[Drawn]:
        windows = [bounding_window([start], bucket.crop, row.shape) for start in starts]
        wanted = [channel.name for channel in bucket.channels]
        have = [channel.name for channel in row.channels]
        order = None if have == wanted else [have.index(name) for name in wanted]
        for start, window, piece in zip(starts, windows, self.cache.read_pieces(row, windows), strict=True):
            part = seen(piece, [side.start for side in window], start, bucket.crop)
            if order is not None:
                part = part.select(order)
            symmetry = draw_symmetry(rng, bucket.flips, bucket.crop)
            yield Drawn(row, part, symmetry, np.count_nonzero(part.valid) / part.valid.size)


def _put(filling: Filling, place: int | None, crop: Drawn) -> None:
    """Put a crop to its place; that of another process goes nowhere, but had to be drawn with its read."""
    if place is not None:
        filling.put(place, crop)


class _Window:
    """The batches of a window of steps, those of a bucket made when the first of them is asked for."""

    def __init__(self, steps: Steps, number: int) -> None:
        self.steps, self.number = steps, number
        self.made: dict[int, Batch] = {}
        first = number * steps.window_steps
        self.buckets = {step: steps.bucket_of(step) for step in range(first, first + steps.window_steps)}

    def batch(self, step: int) -> Batch:
        """Return the batch of one of its steps."""
        if step not in self.made:
            bucket = self.buckets[step]
            together = [other for other, its in self.buckets.items() if its is bucket]
            self.made.update(zip(together, self.steps.make(bucket, together), strict=True))
        return self.made[step]


def _reach(row: Row, crop: Sequence[int]) -> float:
    """Return the largest share of a crop that an image can fill, less than 1 where it is smaller than the crop."""
    return math.prod(min(size, wanted) / wanted for size, wanted in zip(row.shape, crop, strict=True))


def batches(
    index: Index, config: DataConfig, *, seed: int, start_step: int, steps: int, batch_size: int
) -> Iterator[Batch]:
    """Yield the batches of steps `start_step` to `steps` - 1; see `Steps` and `load_steps`."""
    made = Steps(index, config, seed=seed, batch_size=batch_size)
    return load_steps(made, start_step, steps, workers=config.workers)
