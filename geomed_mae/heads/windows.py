"""Whole images from windows: rasters of any height and volumes, in 2D and 3D by one code path.

Windows are those of training. To segment they lie half a window apart and are blended (see `blocks`). Only one block of
them is in memory at a time. To classify they lie side by side, and their probabilities are averaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ReadError
from geomed_mae.heads.blocks import INVALID, answer, answers, cache_of, finished
from geomed_mae.heads.tiling import SUMS_BYTES, Block, blending_weight, step_of, tile_starts, window_starts
from geomed_mae.readers.reasons import Reason
from geomed_mae.samples.crops import bounding_window, cut

if TYPE_CHECKING:
    from geomed_mae.heads.task_model import TaskModel

__all__ = [
    "INVALID",
    "Band",
    "bands",
    "blending_weight",
    "class_map",
    "image_chances",
    "tile_starts",
    "whole_class_map",
    "window_starts",
]


@dataclass(frozen=True, slots=True, eq=False)
class Band:
    """Some rows (or slices) of an image's answer.

    Attributes:
        first: number of the first of them in the image.
        numbers: uint8 (rows, columns) or (slices, rows, columns) class numbers, INVALID where no channel is valid.
        chances: float32 (class, ...) probabilities that sum to 1 over the classes; 0 where `numbers` is INVALID.
    """

    first: int
    numbers: np.ndarray
    chances: np.ndarray


def bands(model: TaskModel, index: Index, row: Row, *, batch: int = 8, memory: int = SUMS_BYTES) -> Iterator[Band]:
    """Yield an image's class numbers and probabilities from the first row (or slice) to the last, in bands.

    Args:
        model: to segment, in evaluation mode, on its device.
        index: archive of the image.
        row: the image; it needs all channels of the model.
        batch: windows computed at a time.
        memory: bytes for what is computed at a time; half a window of whole rows (or slices) is the least.

    Yields:
        Bands of at most half a window that put together have the image's spatial shape.

    Raises:
        ConfigError: the image lacks a channel of the model, or is of another modality or unit.
        ReadError: the image no longer decodes.
    """
    cache, step = cache_of(index, row), step_of(model.spec.crop[0])
    across = 4 * len(model.classes) * step * int(np.prod(row.shape[1:]))
    height = max(memory // across, 1) * step
    for first in range(0, row.shape[0], height):
        stop = (min(first + height, row.shape[0]), *row.shape[1:])
        made = finished(answer(model, cache, row, Block((first, *(0 for _ in stop[1:])), stop), batch=batch))
        for at in range(0, stop[0] - first, step):
            rows = slice(at, min(at + step, stop[0] - first))
            yield Band(first + at, made.numbers(rows), made.chances(rows))


def class_map(
    model: TaskModel, index: Index, row: Row, *, batch: int = 8, memory: int = SUMS_BYTES
) -> Iterator[np.ndarray]:
    """Yield the class numbers of `bands` alone: uint8 (rows, columns) or (slices, rows, columns).

    Raises:
        ConfigError, ReadError: as `bands`.
    """
    for band in bands(model, index, row, batch=batch, memory=memory):
        yield band.numbers


def whole_class_map(model: TaskModel, index: Index, row: Row) -> np.ndarray:
    """Return the class map of `class_map` in one piece, uint8 of the image's spatial shape."""
    return np.concatenate(list(class_map(model, index, row)), axis=0)


def image_chances(model: TaskModel, index: Index, row: Row, *, batch: int = 8) -> np.ndarray:
    """Return the probability of every class of a whole image, float32 (classes,).

    The image is covered by windows of the training crop with as little overlap as there can be, and the windows'
    probabilities are averaged; windows without any valid pixel are left out. An image that is not larger than the crop
    is one window.

    Args:
        model: to classify, in evaluation mode, on its device.
        index: archive of the image.
        row: the image; it needs all channels of the model.
        batch: windows computed at a time.

    Raises:
        ConfigError: as `bands`.
        ReadError: the image no longer decodes, or no pixel of the model's channels is valid.
    """
    crop, names = model.spec.crop, model.check(row)
    cache = cache_of(index, row)
    axes = [tile_starts(size, window) for size, window in zip(row.shape, crop, strict=True)]
    places = itertools.product(*axes)
    total, count = np.zeros(len(model.classes)), 0
    while some := list(itertools.islice(places, batch)):
        images = [cache.read(row, bounding_window([start], crop, row.shape)).select(names) for start in some]
        crops = [cut(image, start, start, crop) for image, start in zip(images, some, strict=True)]
        for _, chances in answers(model, row, zip(some, crops, strict=True)):
            total += chances.double().cpu().numpy()
            count += 1
    if count == 0:
        raise ReadError("no pixel of the channels that the model takes is valid", Reason.ALL_INVALID.name)
    return (total / count).astype(np.float32)
