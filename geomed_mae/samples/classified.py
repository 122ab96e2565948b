"""Crops of images that have a class, or several: steps to batches, stateless like those of pretraining.

Draws are balanced towards rare classes as those of label maps are (`labelled`): half of the images are drawn evenly,
half by a class that is drawn evenly first. An image not larger than the crop is in it whole; of a larger one a crop is
drawn anywhere, and prediction averages over such crops that tile the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.data import Dataset

from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import IGNORE
from geomed_mae.samples.crops import counter_rng, draw_starts
from geomed_mae.samples.label_augment import Augmentation, Crop
from geomed_mae.samples.labelled import (
    CLASS_BALANCED,
    PURPOSE_LABELLED,
    LabelledBatch,
    assembled,
    one_bucket,
    read_crop,
    same_physics,
)
from geomed_mae.samples.memory import ImageCache

if TYPE_CHECKING:
    from geomed_mae.config import DataConfig


class ClassifiedSteps(Dataset):
    """Map-style data set whose index is the step and whose items are LabelledBatches. Picklable.

    Args:
        index: archive that the rows belong to.
        labelled: (row, target): a class number () or, multi-label, (classes,) of 1, 0 and UNKNOWN; images of which
            nothing is known are left out.
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
        known = [(row, np.asarray(target)) for row, target in labelled if _known(np.asarray(target))]
        if not known:
            raise ConfigError("no training image has a class; look at labels.values and the label file")
        self.rows = same_physics([row for row, _ in known])
        self.targets = np.stack([target for _, target in known]).astype(np.int64)
        modalities = {modality.name: modality for modality in resolve_modalities(config.modality)}
        self.bucket = one_bucket(self.rows, config, modalities)
        self.seed, self.batch_size = seed, batch_size
        self.augmentation = Augmentation.of(self.bucket, modalities[self.bucket.modality]) if augmented else None
        self.cache = ImageCache(index, config.cache_mb)
        self._members = _members(self.targets)

    def __getitem__(self, step: int) -> LabelledBatch:
        """Return the batch of `step`.

        Raises:
            ReadError: an image no longer decodes.
        """
        rngs = [counter_rng(self.seed, step, number, PURPOSE_LABELLED) for number in range(self.batch_size)]
        places = [self._draw(rng) for rng in rngs]
        rows = [self.rows[place] for place in places]
        crops = [self._crop(row, rng) for row, rng in zip(rows, rngs, strict=True)]
        return LabelledBatch(assembled(self.bucket, rows, crops, step), torch.from_numpy(self.targets[places]))

    def _draw(self, rng: np.random.Generator) -> int:
        balanced, choice, place = rng.random(3)
        members = self._members[int(choice * len(self._members))] if balanced < CLASS_BALANCED else None
        return int(place * len(self.rows)) if members is None else int(members[int(place * len(members))])

    def _crop(self, row: Row, rng: np.random.Generator) -> Crop:
        (start,) = draw_starts(rng, row.shape, self.bucket.crop, 1)
        raw, valid = read_crop(self.cache, self.bucket, row, start)
        crop = (raw, valid, np.zeros(self.bucket.crop, dtype=np.int16))
        return self.augmentation(crop, row, rng) if self.augmentation else crop


def _known(target: np.ndarray) -> bool:
    return bool((target != (UNKNOWN if target.ndim else IGNORE)).any())


def _members(targets: np.ndarray) -> list[np.ndarray]:
    """Return the places of the images of each class that occurs; multi-label: where it is there, and of none at all."""
    if targets.ndim == 1:
        return [np.flatnonzero(targets == number) for number in np.unique(targets)]
    present = targets == 1
    found = [np.flatnonzero(column) for column in (*present.T, ~present.any(axis=1))]
    return [places for places in found if places.size]
