"""Piece: a part of an image as it is kept and moved, stored numbers and how to read them.

What a Piece says is the physical values of an Image, bit by bit, in half or a quarter of the memory: most files hold
integers, and a reader's float32 are made of them. The arithmetic is the readers' own,

    physical = float32(float64(values) * scale + offset)

a multiplication and an addition in float64, each rounded, and one rounding to float32. In float32 it would not do:
n * float32(0.0001) differs from what readers give in the last bit of about every third value. Where scale is 1 and
offset 0 this is float32(values). Pieces of float32 are physical already: nothing is computed on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from geomed_mae.image import Image
from geomed_mae.samples.integers import Scaling, integer_form, to_physical

STORED = ("uint8", "int8", "uint16", "int16", "float32")
"""Types that a Piece's values may have."""


@dataclass(frozen=True, slots=True, eq=False)
class Piece:
    """Stored numbers of an image or a part of it, to be read only.

    Attributes:
        values: (C, *s) of a type in STORED, 0 where not valid.
        valid: bool (1 or C, *s); one channel stands for all.
        scale, offset: float64 (C,); 1 and 0 where values are float32.
    """

    values: np.ndarray
    valid: np.ndarray
    scale: np.ndarray
    offset: np.ndarray

    @classmethod
    def from_image(cls, image: Image, scalings: Sequence[Scaling] = (), *, guess: bool = True) -> Piece:
        """Return an image in the smallest integers that give its valid values bit by bit, else in float32.

        Args:
            image: any image; what it holds where not valid is dropped.
            scalings: (scale, offset) that its values may have been computed with (see `Index.scaling`), each a number
                or one a channel. 1 and 0 is tried first.
            guess: try a scale read off the values last, which takes longer.
        """
        valid = _plain(image.valid, image.spatial_shape)
        array = image.array
        if not valid.all():
            array = np.where(valid, array, np.float32(0))
        found = integer_form(array, valid, scalings, guess=guess)
        if found is None:
            ones = np.ones(len(array))
            return cls(array, valid, ones, np.zeros_like(ones))
        values, scale, offset = found
        return cls(values, valid, scale, offset)

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """([slices,] rows, columns)."""
        return self.values.shape[1:]

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the arrays take."""
        return self.values.nbytes + self.valid.nbytes

    def crop(self, window: Sequence[slice]) -> Piece:
        """Return a window (one slice a spatial axis, inside the piece) without copying: it keeps the whole alive."""
        inside = (slice(None), *window)
        return replace(self, values=self.values[inside], valid=self.valid[inside])

    def select(self, order: Sequence[int]) -> Piece:
        """Return the channels of these numbers, in that order."""
        order = list(order)
        valid = self.valid if len(self.valid) == 1 else self.valid[order]
        return Piece(self.values[order], valid, self.scale[order], self.offset[order])

    def copy(self) -> Piece:
        """Return the piece in memory of its own."""
        return replace(self, values=self.values.copy(), valid=self.valid.copy())

    def physical(self) -> tuple[np.ndarray, np.ndarray]:
        """Return float32 (C, *s) physical values, 0 where not valid, and bool (1 or C, *s), to be read only."""
        if self.values.dtype == np.float32:
            return self.values, self.valid
        array = to_physical(self.values, self.scale, self.offset)
        if self.offset.any() and not self.valid.all():
            np.copyto(array, np.float32(0), where=~self.valid)
        return array, self.valid


def joined(parts: Sequence[tuple[Sequence[slice], Piece]], shape: Sequence[int]) -> Piece:
    """Return one piece of spatial `shape` made of several, each with its place (one slice a spatial axis).

    Together they cover it. Where they are not stored alike the result is in the widest of their types, or in float32.
    """
    pieces = [piece for _, piece in parts]
    first = pieces[0]
    if len(parts) == 1:
        return first
    alike = all(np.array_equal(one.scale, first.scale) and np.array_equal(one.offset, first.offset) for one in pieces)
    dtype = np.result_type(*(one.values.dtype for one in pieces))
    if not alike or dtype.name not in STORED:
        dtype, first = np.dtype(np.float32), None
    values = np.empty((len(pieces[0].values), *shape), dtype)
    valid = np.empty((max(len(one.valid) for one in pieces), *shape), np.bool_)
    for place, piece in parts:
        values[(slice(None), *place)] = piece.physical()[0] if first is None else piece.values
        valid[(slice(None), *place)] = piece.valid
    ones = np.ones(len(values))
    return Piece(values, valid, *((ones, ones * 0) if first is None else (first.scale, first.offset)))


def _plain(valid: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return validity as bool (1 or C, *shape) that takes the memory it seems to, one channel where all agree."""
    valid = np.broadcast_to(valid, (len(valid), *shape))
    if len(valid) > 1 and all(np.array_equal(one, valid[0]) for one in valid[1:]):
        valid = valid[:1]
    return np.ascontiguousarray(valid)
