"""Whole images from windows: rasters of any height and volumes, in 2D and 3D by one code path.

Windows are those of training. To segment they lie half a window apart, and the class probabilities of overlapping ones
are averaged with a Gaussian weight (nnU-Net, Isensee et al. 2021), because a token map is least sure at a window's
border. Only one band of windows is in memory at a time: memory grows with the image's width (for volumes, with the
slice), not with its height. To classify they lie side by side, and their probabilities are averaged.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError
from geomed_mae.samples.crops import bounding_window, cut
from geomed_mae.samples.memory import CACHE_SHARE, ImageCache

if TYPE_CHECKING:
    from geomed_mae.heads.task_model import TaskModel

Start = tuple[int, ...]
"""First pixel of a window in its image."""
Crop = tuple[np.ndarray, np.ndarray]
"""Physical values and validity of a window, each (c, *crop)."""

INVALID = 255
"""Number of pixels without any valid channel in a class map."""
WHOLE_MB = 512
"""Decoded images up to this size are decoded once; larger ones are read band by band."""
SIGMA = 1 / 8
"""Standard deviation of the blending weight as a share of the window."""
LEAST_WEIGHT = 1e-3
"""Smallest weight along an axis: the image's corners are seen by one window's corner alone."""


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


def window_starts(size: int, window: int) -> list[int]:
    """Return the first pixel of each window along an axis: half a window apart, the last flush with the end."""
    if size <= window:
        return [0]
    return [*range(0, size - window, max(window // 2, 1)), size - window]


def tile_starts(size: int, window: int) -> list[int]:
    """Return the first pixel of the fewest windows that cover an axis, evenly spaced, the last flush with the end."""
    count = -(-size // window)
    if count <= 1:
        return [0]
    return [number * (size - window) // (count - 1) for number in range(count)]


def blending_weight(window: Sequence[int]) -> np.ndarray:
    """Return the float32 weight of a window's pixels, 1 in the middle."""
    axes = [np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (SIGMA * size)) ** 2) for size in window]
    weight = np.ones(())
    for axis in axes:
        weight = np.multiply.outer(weight, np.maximum(axis / axis.max(), LEAST_WEIGHT))
    return weight.astype(np.float32)


def bands(model: TaskModel, index: Index, row: Row, *, batch: int = 8) -> Iterator[Band]:
    """Yield an image's class numbers and probabilities from the first row (or slice) to the last, in bands.

    Args:
        model: to segment, in evaluation mode, on its device.
        index: archive of the image.
        row: the image; it needs all channels of the model.
        batch: windows computed at a time.

    Yields:
        Bands that put together have the image's spatial shape.

    Raises:
        ConfigError: the image lacks a channel of the model, or is of another modality or unit.
        ReadError: the image no longer decodes.
    """
    for first, numbers, sums in _blended(model, index, row, batch):
        total = sums.sum(dim=0)
        chances = (sums / total).masked_fill(torch.from_numpy(numbers == INVALID).to(sums.device), 0)
        yield Band(first, numbers, chances.cpu().numpy())


def class_map(model: TaskModel, index: Index, row: Row, *, batch: int = 8) -> Iterator[np.ndarray]:
    """Yield the class numbers of `bands` alone: uint8 (rows, columns) or (slices, rows, columns).

    Raises:
        ConfigError, ReadError: as `bands`.
    """
    for _, numbers, _ in _blended(model, index, row, batch):
        yield numbers


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
        ConfigError: as `bands`, or no pixel of the image is valid.
        ReadError: the image no longer decodes.
    """
    crop, names = model.spec.crop, model.check(row)
    cache = ImageCache(index, WHOLE_MB * CACHE_SHARE)
    axes = [tile_starts(size, window) for size, window in zip(row.shape, crop, strict=True)]
    places = itertools.product(*axes)
    total, count = np.zeros(len(model.classes)), 0
    while some := list(itertools.islice(places, batch)):
        images = [cache.read(row, bounding_window([start], crop, row.shape)).select(names) for start in some]
        crops = [cut(image, start, start, crop) for image, start in zip(images, some, strict=True)]
        for _, chances in _answers(model, row, zip(some, crops, strict=True)):
            total += chances.double().cpu().numpy()
            count += 1
    if count == 0:
        raise ConfigError(f"image '{row.key}' has no valid pixel to classify")
    return (total / count).astype(np.float32)


def _answers(model: TaskModel, row: Row, crops: Iterable[tuple[Start, Crop]]) -> Iterator[tuple[Start, Tensor]]:
    """Yield (start, probabilities) of the windows that have a valid pixel; the others are not computed."""
    seen = [(start, raw, valid) for start, (raw, valid) in crops if valid.any()]
    if seen:
        starts, raws, valids = zip(*seen, strict=True)
        yield from zip(starts, model.probabilities(np.stack(raws), np.stack(valids), row), strict=True)


def _blended(
    model: TaskModel, index: Index, row: Row, batch: int
) -> Iterator[tuple[int, np.ndarray, Float[Tensor, "class row *rest"]]]:
    """Yield (first row, class numbers, weighted sums of probabilities) band by band; use the sums before the next."""
    crop, shape = model.spec.crop, row.shape
    names = model.check(row)
    cache = ImageCache(index, WHOLE_MB * CACHE_SHARE)
    weight = torch.from_numpy(blending_weight(crop)).to(model.device)
    extent = tuple(max(size, window) for size, window in zip(shape, crop, strict=True))
    sums = torch.zeros((len(model.classes), crop[0], *extent[1:]), device=model.device)
    across = list(itertools.product(*(window_starts(size, w) for size, w in zip(shape[1:], crop[1:], strict=True))))
    firsts = window_starts(shape[0], crop[0])
    for first, following in itertools.pairwise([*firsts, shape[0]]):
        starts = [(first, *rest) for rest in across]
        band = (slice(first, min(first + crop[0], shape[0])), *(slice(0, size) for size in shape[1:]))
        image = cache.read(row, band).select(names)
        for at_once in range(0, len(starts), batch):
            some = starts[at_once : at_once + batch]
            crops = [cut(image, (first, *(0 for _ in crop[1:])), start, crop) for start in some]
            for start, chance in _answers(model, row, zip(some, crops, strict=True)):
                place = tuple(slice(at, at + size) for at, size in zip(start[1:], crop[1:], strict=True))
                sums[(slice(None), slice(None), *place)] += chance * weight
        # No later window reaches the rows before its start: they are final.
        done = following - first
        final = sums[(slice(None), slice(0, done), *(slice(0, size) for size in shape[1:]))]
        numbers = final.argmax(dim=0).to(torch.uint8).cpu().numpy()
        valid = np.broadcast_to(image.valid, image.array.shape)[:, :done].any(axis=0)
        yield first, np.where(valid, numbers, np.uint8(INVALID)), final
        kept = sums[:, done:].clone()
        sums.zero_()
        sums[:, : kept.shape[1]] = kept
