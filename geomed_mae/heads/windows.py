"""A whole image from overlapping windows: rasters of any height and volumes, in 2D and 3D by one code path.

Windows are those of training, half a window apart. The class probabilities of overlapping windows are averaged with a
Gaussian weight (nnU-Net, Isensee et al. 2021), because a token map is least sure at a window's border. Only one band of
windows is in memory at a time: memory grows with the image's width (for volumes, with the slice), not with its height.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from geomed_mae.archives.index import Index, Row
from geomed_mae.samples.crops import cut
from geomed_mae.samples.memory import CACHE_SHARE, ImageCache

if TYPE_CHECKING:
    from geomed_mae.heads.task_model import TaskModel

INVALID = 255
"""Number of pixels without any valid channel in a class map."""
WHOLE_MB = 512
"""Decoded images up to this size are decoded once; larger ones are read band by band."""
SIGMA = 1 / 8
"""Standard deviation of the blending weight as a share of the window."""
LEAST_WEIGHT = 1e-3
"""Smallest weight along an axis: the image's corners are seen by one window's corner alone."""


def window_starts(size: int, window: int) -> list[int]:
    """Return the first pixel of each window along an axis: half a window apart, the last flush with the end."""
    if size <= window:
        return [0]
    return [*range(0, size - window, max(window // 2, 1)), size - window]


def blending_weight(window: Sequence[int]) -> np.ndarray:
    """Return the float32 weight of a window's pixels, 1 in the middle."""
    axes = [np.exp(-0.5 * ((np.arange(size) - (size - 1) / 2) / (SIGMA * size)) ** 2) for size in window]
    weight = np.ones(())
    for axis in axes:
        weight = np.multiply.outer(weight, np.maximum(axis / axis.max(), LEAST_WEIGHT))
    return weight.astype(np.float32)


def class_map(model: TaskModel, index: Index, row: Row, *, batch: int = 8) -> Iterator[np.ndarray]:
    """Yield an image's class numbers from the first row (or slice) to the last, in bands.

    Args:
        model: in evaluation mode, on its device.
        index: archive of the image.
        row: the image; it needs all channels of the model.
        batch: windows computed at a time.

    Yields:
        uint8 (rows, columns) or (slices, rows, columns), INVALID where no channel is valid. The bands put together
        have the image's spatial shape.

    Raises:
        ConfigError: the image lacks a channel of the model, or is of another modality or unit.
        ReadError: the image no longer decodes.
    """
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
            chances = model.probabilities(np.stack([raw for raw, _ in crops]), np.stack([ok for _, ok in crops]), row)
            for start, chance in zip(some, chances, strict=True):
                place = tuple(slice(at, at + size) for at, size in zip(start[1:], crop[1:], strict=True))
                sums[(slice(None), slice(None), *place)] += chance * weight
        # No later window reaches the rows before its start: they are final.
        done = following - first
        numbers = sums[(slice(None), slice(0, done), *(slice(0, size) for size in shape[1:]))].argmax(dim=0)
        numbers = numbers.to(torch.uint8).cpu().numpy()
        valid = np.broadcast_to(image.valid, image.array.shape)[:, :done].any(axis=0)
        yield np.where(valid, numbers, np.uint8(INVALID))
        kept = sums[:, done:].clone()
        sums.zero_()
        sums[:, : kept.shape[1]] = kept


def whole_class_map(model: TaskModel, index: Index, row: Row) -> np.ndarray:
    """Return the class map of `class_map` in one piece, uint8 of the image's spatial shape."""
    return np.concatenate(list(class_map(model, index, row)), axis=0)
