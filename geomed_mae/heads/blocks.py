"""The answer of a segmentation model for one block of an image, blended from all windows that reach into it.

Class probabilities of overlapping windows are averaged with a Gaussian weight (nnU-Net, Isensee et al. 2021), because a
token map is least sure at a window's border; here it falls to 0 there (`tiling.MARGIN`), so that the middle of a window
is answered by that window alone. Windows are computed in an order and in batches that follow from the block
alone, so that the same block gives the same bits again.
"""

from __future__ import annotations

import itertools
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geomed_mae.archives.index import Index, Row
from geomed_mae.heads.tiling import Block, Start, blending_weight, blocks_of, starts_within
from geomed_mae.samples.crops import seen
from geomed_mae.samples.memory import CACHE_SHARE, ImageCache
from geomed_mae.samples.piece import Piece

if TYPE_CHECKING:
    from geomed_mae.heads.task_model import TaskModel

Crop = tuple[np.ndarray, np.ndarray]
"""Physical values and validity of a window, each (c, *crop)."""

INVALID = 255
"""Number of pixels without any valid channel in a class map."""
WHOLE_MB = {"raster": 64}
"""Decoded rasters up to this size are decoded once and kept; larger ones are read by window, which costs little."""
WHOLE_VOLUME_MB = 512
"""The same for volumes and planes, of which a compressed file decodes whole or not at all."""


class Answer:
    """What a model says of one block.

    Attributes:
        block: the box.
        sums: float32 (class, *block) weighted sums of probabilities, on the model's device.
        valid: bool (*block), whether any channel is valid there.
    """

    def __init__(self, block: Block, classes: int, device: torch.device) -> None:
        self.block = block
        self.sums: Float[Tensor, "class row *rest"] = torch.zeros((classes, *block.shape), device=device)
        self.valid = np.zeros(block.shape, dtype=bool)

    def add(self, start: Start, chances: Float[Tensor, "class *s"], weight: Float[Tensor, "*s"]) -> None:
        """Add what a window at `start` says, as far as it lies in the block."""
        inside, part = _overlap(self.block, start, weight.shape)
        self.sums[(slice(None), *inside)] += chances[(slice(None), *part)] * weight[part]

    def note(self, start: Start, valid: np.ndarray) -> None:
        """Note which pixels (*s) of the image from `start` on have a valid channel."""
        inside, part = _overlap(self.block, start, valid.shape)
        self.valid[inside] = valid[part]

    def numbers(self, rows: slice) -> np.ndarray:
        """Return uint8 (rows, ...) class numbers of some rows of the block, INVALID where no channel is valid."""
        found = self.sums[:, rows].argmax(dim=0).to(torch.uint8).cpu().numpy()
        return np.where(self.valid[rows], found, np.uint8(INVALID))

    def chances(self, rows: slice) -> np.ndarray:
        """Return float32 (class, rows, ...) probabilities of some rows, which sum to 1; 0 where nothing is valid."""
        sums = self.sums[:, rows]
        unknown = torch.from_numpy(~self.valid[rows]).to(sums.device)
        return (sums / sums.sum(dim=0)).masked_fill(unknown, 0).cpu().numpy()


def cache_of(index: Index, row: Row) -> ImageCache:
    """Return the cache through which the blocks of an image are read, one a process and image."""
    return ImageCache(index, WHOLE_MB.get(row.geometry, WHOLE_VOLUME_MB) * CACHE_SHARE)


def batches_of(row: Row, size: Sequence[int], crop: Sequence[int], batch: int) -> list[int]:
    """Return how many batches of windows each block of an image takes, in the order of `blocks_of`."""
    counts = []
    for block in blocks_of(row.shape, size):
        first, *others = (len(starts) for starts in starts_within(block, row.shape, crop))
        counts.append(first * -(-int(np.prod(others)) // batch))
    return counts


def answer(
    model: TaskModel, cache: ImageCache, row: Row, block: Block, *, batch: int = 8
) -> Generator[None, None, Answer]:
    """Compute a block; yield after each batch of windows, and return its answer.

    Args:
        model: to segment, in evaluation mode, on its device.
        cache: of `cache_of`.
        row: the image; it needs all channels of the model.
        block: of the image.
        batch: windows computed at a time.

    Raises:
        ConfigError: the image lacks a channel of the model, or is of another modality or unit.
        ReadError: the image no longer decodes.
    """
    crop, names = model.spec.crop, model.check(row)
    order = [[channel.name for channel in row.channels].index(name) for name in names]
    made = Answer(block, len(model.classes), model.device)
    weight = torch.from_numpy(blending_weight(crop)).to(model.device)
    firsts, *others = starts_within(block, row.shape, crop)
    across = list(itertools.product(*others))
    for first in firsts:
        corner = (first, *(starts[0] for starts in others))
        ends = [first, *(starts[-1] for starts in others)]
        region = tuple(
            slice(at, min(end + window, size))
            for at, end, window, size in zip(corner, ends, crop, row.shape, strict=True)
        )
        # As stored, a half or a quarter of physical values: a row of windows of a wide scene is what is large here.
        (piece,) = cache.read_pieces(row, [region])
        piece = piece.select(order)
        made.note(corner, piece.valid.any(axis=0))
        for at_once in range(0, len(across), batch):
            starts = [(first, *rest) for rest in across[at_once : at_once + batch]]
            crops = ((start, _physical(seen(piece, corner, start, crop))) for start in starts)
            for start, chances in answers(model, row, crops):
                made.add(start, chances, weight)
            yield
    return made


def _physical(piece: Piece) -> Crop:
    """Return physical values, 0 where not valid, and the validity of each channel."""
    array, valid = piece.physical()
    return array, np.broadcast_to(valid, array.shape)


def finished(steps: Generator[None, None, Answer]) -> Answer:
    """Run a computation to its end and return the answer."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def answers(model: TaskModel, row: Row, crops: Iterable[tuple[Start, Crop]]) -> Iterator[tuple[Start, Tensor]]:
    """Yield (start, probabilities) of the windows that have a valid pixel; the others are not computed."""
    useful = [(start, raw, valid) for start, (raw, valid) in crops if valid.any()]
    if useful:
        starts, raws, valids = zip(*useful, strict=True)
        yield from zip(starts, model.probabilities(np.stack(raws), np.stack(valids), row), strict=True)


def _overlap(block: Block, start: Start, shape: Sequence[int]) -> tuple[tuple[slice, ...], tuple[slice, ...]]:
    """Return where a box of `shape` at `start` meets a block: as slices of the block, and of the box."""
    inside, part = [], []
    for begin, end, at, size in zip(block.start, block.stop, start, shape, strict=True):
        low, high = max(begin, at), min(end, at + size)
        inside.append(slice(low - begin, high - begin))
        part.append(slice(low - at, high - at))
    return tuple(inside), tuple(part)
