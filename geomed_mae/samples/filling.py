"""Filling: crops become the arrays of batches, one by one, in the type that they are stored in."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from geomed_mae.archives.index import Row
from geomed_mae.samples.augment import Symmetry
from geomed_mae.samples.batch import Batch, Stored
from geomed_mae.samples.buckets import Bucket
from geomed_mae.samples.piece import STORED, Piece

KEPT_ARRAYS = 6
"""Arrays given out before that may be given out again; see `Memory`."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """One crop, before `symmetry`: a Piece of the crop's shape with the bucket's channels, and its valid share."""

    row: Row
    piece: Piece
    symmetry: Symmetry
    share: float


class Memory:
    """Arrays that nobody holds any more, given out again: to touch fresh memory costs as much as to fill it.

    What is given out is a view, and a tensor made of it holds that view; when the view is gone, all tensors are.
    """

    def __init__(self) -> None:
        self.given: list[tuple[np.ndarray, weakref.ref]] = []

    def __reduce__(self) -> tuple[type, tuple]:
        return Memory, ()  # another process starts with none

    def array(self, shape: tuple[int, ...], dtype: np.dtype | type) -> np.ndarray:
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


class Filling:
    """Batches in the making: places for `count` crops of a bucket, filled in any order.

    Crops are copied in one by one, so that each can leave its memory to the next. As long as all are integers they
    stay what they are; the widest type holds all. Once one is float32, all are: physical values, turned.
    """

    def __init__(self, bucket: Bucket, count: int, memory: Memory) -> None:
        self.bucket, self.count, self.memory = bucket, count, memory
        self.names = [channel.name for channel in bucket.channels]
        channels = len(self.names)
        self.raw: np.ndarray | None = None
        self.valid = memory.array((count, 1, *bucket.crop), np.bool_)
        self.scale, self.offset = np.ones((count, channels)), np.zeros((count, channels))
        self.rows: list[Row | None] = [None] * count
        self.symmetries = [Symmetry()] * count

    def put(self, place: int, crop: Drawn) -> None:
        """Copy a crop to its place."""
        values, valid = crop.piece.values, crop.piece.valid
        self._fit(values.dtype)
        if len(valid) > self.valid.shape[1]:
            self.valid = np.repeat(self.valid, len(valid), axis=1)
        self.rows[place], self.symmetries[place] = crop.row, crop.symmetry
        if self.raw.dtype == np.float32:
            self.raw[place] = crop.symmetry.view(crop.piece.physical()[0])
            valid = crop.symmetry.view(valid)
        else:
            self.raw[place] = values
            self.scale[place], self.offset[place] = crop.piece.scale, crop.piece.offset
        self.valid[place] = True if crop.share == 1 else valid

    def _fit(self, dtype: np.dtype) -> None:
        """See that `raw` can hold numbers of this type as well."""
        if self.raw is None:
            self.raw = self.memory.array((self.count, len(self.names), *self.bucket.crop), dtype)
        elif self.raw.dtype != dtype:
            common = np.promote_types(self.raw.dtype, dtype)
            if common.name not in STORED:  # uint16 and int16
                common = np.dtype(np.float32)
            if common == np.float32 != self.raw.dtype:
                self._to_physical()
            elif common != self.raw.dtype:
                self.raw = self.raw.astype(common)

    def _to_physical(self) -> None:
        """Turn what is there into physical values."""
        stored, valid = self.raw, self.valid
        self.raw = self.memory.array(stored.shape, np.float32)
        self.valid = self.memory.array(valid.shape, np.bool_)
        for place, (row, symmetry) in enumerate(zip(self.rows, self.symmetries, strict=True)):
            if row is not None:
                piece = Piece(stored[place], valid[place], self.scale[place], self.offset[place])
                values, mask = piece.physical()
                self.raw[place], self.valid[place] = symmetry.view(values), symmetry.view(mask)

    @cached_property
    def _tensors(self) -> tuple[Tensor, Tensor]:
        """The arrays as tensors, once full; batches are slices of these.

        Slices of the arrays would not hold the view that `Memory` watches, and tensors of their own would each take all
        of the memory along to another process.
        """
        return torch.from_numpy(self.raw), torch.from_numpy(self.valid)

    def batch(self, places: range, step: int, *, samples: Sequence[int] = (), failed: Sequence[str] = ()) -> Batch:
        """Return the crops at `places` as the Batch of a step; it shares the memory of this filling."""
        part = slice(places.start, places.stop)
        rows = [row for row in self.rows[part] if row is not None]
        if self.raw is None or len(rows) < len(places):
            raise ValueError(f"step {step} has {len(rows)} of {len(places)} crops")
        symmetries = self.symmetries[part]
        spacings = [
            None if row.spacing is None else symmetry.spacing(row.spacing)
            for row, symmetry in zip(rows, symmetries, strict=True)
        ]
        stored = None
        if self.raw.dtype != np.float32:
            numbers = (torch.from_numpy(value[part]) for value in (self.scale, self.offset))
            stored = Stored(*numbers, tuple(symmetries))
        return Batch(
            raw=self._tensors[0][part],
            valid=self._tensors[1][part],
            channels=self.bucket.channels,
            modality=self.bucket.modality,
            spacing=None if spacings[0] is None else torch.tensor(spacings, dtype=torch.float32),
            keys=tuple(row.key for row in rows),
            statistics=tuple(statistics_of(row, self.names) for row in rows),
            step=step,
            failed=tuple(failed),
            samples=tuple(samples),
            stored=stored,
        )


def statistics_of(row: Row, names: Sequence[str]) -> tuple:
    """Return the ChannelStatistics of the channels `names` of an image, in that order."""
    have = {channel.name: entry for channel, entry in zip(row.channels, row.statistics, strict=True)}
    return tuple(have[name] for name in names)
