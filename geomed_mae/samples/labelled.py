"""Crops of label maps: steps to batches of pixels and class numbers, stateless like those of pretraining.

Crops are balanced towards labels: half of them are centred near a labelled pixel chosen evenly over the labelled area,
half near a pixel of a class chosen evenly among the image's classes (nnU-Net oversamples foreground in the same
spirit), so that a rare class is seen and a frequent one not forgotten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from torch.utils.data import Dataset

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import IGNORE
from geomed_mae.samples.batch import Batch
from geomed_mae.samples.buckets import Bucket, make_buckets
from geomed_mae.samples.crops import bounding_window, counter_rng, cut
from geomed_mae.samples.filling import statistics_of
from geomed_mae.samples.label_augment import Augmentation, Crop
from geomed_mae.samples.memory import ImageCache

if TYPE_CHECKING:
    from geomed_mae.config import DataConfig

CLASS_BALANCED = 0.5
"""Share of crops that are centred near a pixel of a class chosen evenly among the image's classes."""
MAX_POSITIONS = 100_000
"""Labelled pixels of a class remembered per image; of more, one of each of so many equal runs."""
GOLDEN = 0.6180339887498949
"""Multiples of it, modulo 1, are spread evenly (Weyl)."""
PURPOSE_LABELLED = 2
"""Stream of `counter_rng`; 0 and 1 belong to pretraining's."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledBatch:
    """Crops and what is known of them, int64.

    Of label maps class numbers (b, [z,] y, x), IGNORE where no class is known or no pixel valid. Of images with classes
    (b,) class numbers, or (b, classes) 1, 0 and UNKNOWN.
    """

    images: Batch
    target: Int[Tensor, " b *s"]

    def __len__(self) -> int:
        return len(self.images)

    @property
    def keys(self) -> tuple[str, ...]:
        """The image of every crop, an opaque key."""
        return self.images.keys

    def part(self, first: int, stop: int) -> LabelledBatch:
        """Return the crops `first` to `stop` - 1 as a batch of the same step, without a copy."""
        return replace(self, images=self.images.part(first, stop), target=self.target[first:stop])

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that computation uses."""
        return (*self.images.tensors, self.target)

    def to(self, device: torch.device | str) -> LabelledBatch:
        """Return the batch with its tensors on `device`."""
        return replace(self, images=self.images.to(device), target=self.target.to(device, non_blocking=True))

    def pin_memory(self) -> LabelledBatch:
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        return replace(self, images=self.images.pin_memory(), target=self.target.pin_memory())


@dataclass(frozen=True, slots=True, eq=False)
class _Example:
    """An image, its class numbers, and where each class that occurs can be found (flat pixel numbers, counts)."""

    row: Row
    target: np.ndarray
    positions: tuple[np.ndarray, ...]
    shares: np.ndarray


def _example(row: Row, target: np.ndarray) -> _Example:
    flat = target.ravel()
    found = [np.flatnonzero(flat == number) for number in np.unique(flat) if number != IGNORE]
    counts = np.array([positions.size for positions in found], dtype=np.float64)
    kept = tuple(_thinned(positions) for positions in found)
    return _Example(row, target, kept, np.cumsum(counts / counts.sum()) if counts.size else counts)


def _thinned(positions: np.ndarray) -> np.ndarray:
    """Return at most MAX_POSITIONS of some pixel numbers, spread over all of them.

    Not every n-th: of a raster that is 10,000 pixels wide every thousandth lies in one of ten columns.
    """
    if positions.size <= MAX_POSITIONS:
        return positions
    runs = np.arange(MAX_POSITIONS)
    return positions[((runs + (runs * GOLDEN) % 1) * (positions.size / MAX_POSITIONS)).astype(np.int64)]


class LabelledSteps(Dataset):
    """Map-style data set whose index is the step and whose items are LabelledBatches. Picklable.

    Args:
        index: archive that the rows belong to.
        labelled: (row, class numbers int16 of the row's shape, IGNORE where unknown); rows without any are left out.
        config: crop, channels and cache.
        seed, batch_size: as in the recipe.
        augmented: whether crops are changed as their modality allows, see `label_augment`.

    Raises:
        ConfigError: nothing is labelled, or images differ in modality, channels or axes, which one head cannot serve.
    """

    def __init__(
        self,
        index: Index,
        labelled: Sequence[tuple[Row, np.ndarray]],
        config: DataConfig,
        *,
        seed: int,
        batch_size: int,
        augmented: bool = True,
    ) -> None:
        rows = same_physics([row for row, _ in labelled])
        made = (_example(row, target) for row, (_, target) in zip(rows, labelled, strict=True))
        self.examples = [entry for entry in made if entry.positions]
        if not self.examples:
            raise ConfigError("no pixel of the training images has a class; look at labels.values and the label files")
        modalities = {modality.name: modality for modality in resolve_modalities(config.modality)}
        self.bucket = one_bucket([entry.row for entry in self.examples], config, modalities)
        self.seed, self.batch_size = seed, batch_size
        self.augmentation = Augmentation.of(self.bucket, modalities[self.bucket.modality]) if augmented else None
        self.cache = ImageCache(index, config.cache_mb)

    def __getitem__(self, step: int) -> LabelledBatch:
        """Return the batch of `step`.

        Raises:
            ReadError: an image no longer decodes.
        """
        made = [self._crop(counter_rng(self.seed, step, number, PURPOSE_LABELLED)) for number in range(self.batch_size)]
        images = assembled(self.bucket, [row for row, _ in made], [crop for _, crop in made], step)
        return LabelledBatch(images, torch.from_numpy(np.stack([crop[2] for _, crop in made])).long())

    def _crop(self, rng: np.random.Generator) -> tuple[Row, Crop]:
        example = self.examples[int(rng.integers(len(self.examples)))]
        start = draw_labelled_start(rng, example.target.shape, self.bucket.crop, self._position(rng, example))
        raw, valid = read_crop(self.cache, self.bucket, example.row, start)
        target = np.full(self.bucket.crop, IGNORE, dtype=np.int16)
        inside = example.target[bounding_window([start], self.bucket.crop, example.row.shape)]
        target[tuple(slice(size) for size in inside.shape)] = inside
        target[~valid.any(axis=0)] = IGNORE
        crop = (raw, valid, target)
        return example.row, self.augmentation(crop, example.row, rng) if self.augmentation else crop

    @staticmethod
    def _position(rng: np.random.Generator, example: _Example) -> int:
        balanced, choice, place = rng.random(3)
        if balanced < CLASS_BALANCED:
            number = int(choice * len(example.positions))
        else:
            number = min(int(np.searchsorted(example.shares, choice, side="right")), len(example.positions) - 1)
        return int(example.positions[number][int(place * example.positions[number].size)])


def read_crop(cache: ImageCache, bucket: Bucket, row: Row, start: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return (raw, valid), each (c, *crop), of one crop of an image, with the bucket's channels; see `crops.cut`.

    Raises:
        ReadError: the image no longer decodes.
    """
    window = bounding_window([tuple(start)], bucket.crop, row.shape)
    image = cache.read(row, window)
    if image.channels != bucket.channels:
        image = image.select(tuple(channel.name for channel in bucket.channels))
    return cut(image, [part.start for part in window], start, bucket.crop)


def assembled(bucket: Bucket, rows: Sequence[Row], crops: Sequence[Crop], step: int) -> Batch:
    """Return crops of images, one a row, as the batch of a step."""
    spacing = None if rows[0].spacing is None else torch.tensor([row.spacing for row in rows], dtype=torch.float32)
    names = [channel.name for channel in bucket.channels]
    return Batch(
        raw=torch.from_numpy(np.stack([crop[0] for crop in crops])),
        valid=torch.from_numpy(np.stack([crop[1] for crop in crops])),
        channels=bucket.channels,
        modality=bucket.modality,
        spacing=spacing,
        keys=tuple(row.key for row in rows),
        statistics=tuple(statistics_of(row, names) for row in rows),
        step=step,
    )


def draw_labelled_start(
    rng: np.random.Generator, shape: Sequence[int], crop: Sequence[int], position: int
) -> tuple[int, ...]:
    """Return the first pixel of a crop that holds pixel number `position`, which lies anywhere in it."""
    at = np.unravel_index(position, tuple(shape))
    room = np.maximum(np.array(shape) - np.array(crop), 0)
    start = np.array(at) - (rng.random(len(crop)) * np.array(crop)).astype(int)
    return tuple(int(value) for value in np.clip(start, 0, room))


def same_physics(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with the channels of the first row of the same modality, channel names and units.

    MR scans of one protocol differ a little in their echo times, say. To a head they are the same channels, and the
    model gives each channel the physics that its contract states.
    """
    first: dict[tuple, tuple[Channel, ...]] = {}
    keys = [(row.modality, *((channel.name, channel.unit) for channel in row.channels)) for row in rows]
    return [replace(row, channels=first.setdefault(key, row.channels)) for key, row in zip(keys, rows, strict=True)]


def one_bucket(rows: Sequence[Row], config: DataConfig, modalities: dict) -> Bucket:
    """Return the one bucket of all rows.

    Raises:
        ConfigError: rows differ in modality, channels or number of axes.
    """
    buckets = make_buckets(rows, config, modalities)
    if len(buckets) > 1:
        kinds = "; ".join(
            f"{len(bucket.rows)} x {bucket.modality} ({', '.join(channel.name for channel in bucket.channels)})"
            for bucket in buckets[:4]
        )
        raise ConfigError(
            f"the labelled images are of {len(buckets)} kinds, but a head is made for one: {kinds}; "
            "choose with data.modality and data.channels"
        )
    return buckets[0]
