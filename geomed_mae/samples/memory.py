"""Decoded images kept in memory, one cache a process: memory, then the store on disk if there is one, then the files.

What is kept are Pieces, integers wherever these are the whole truth, so that the same memory holds two to four times
the images. Speed is all that this changes: the pixels are those of `Index.read`, bit by bit.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.image import Image
from geomed_mae.readers.source import StoredWindow
from geomed_mae.samples.piece import Piece

if TYPE_CHECKING:
    from geomed_mae.samples.store import Store

CACHE_SHARE = 8
"""An image is kept in memory whole where at least this many of its size fit into the cache; larger ones are read by
window. Either way gives the same pixels."""


class ImageCache:
    """Reads windows through a least-recently-used cache of whole decoded images, one cache a process.

    Rasters and volumes alike: what is small enough for `CACHE_SHARE` to fit is decoded once and kept, what is not is
    read by window every time.

    Args:
        index: archive of the images.
        cache_mb: MiB of decoded images that are kept.
        store: cache on disk, shared with other processes; None reads files.
    """

    def __init__(self, index: Index, cache_mb: int, store: Store | None = None) -> None:
        self.index, self.store = index, store
        self.capacity = cache_mb << 20
        self.held: OrderedDict[str, Piece] = OrderedDict()
        self.bytes_held = 0

    def __getstate__(self) -> dict:
        """Another process starts with nothing in memory."""
        return {**self.__dict__, "held": OrderedDict(), "bytes_held": 0}

    def read_pieces(self, row: Row, windows: Sequence[tuple[slice, ...]]) -> Iterable[Piece]:
        """Give windows of an image (one slice a spatial axis, inside it); what they share is decoded once.

        All is decoded before this returns. What is not kept becomes a Piece when its turn comes, in memory that the one
        before it may have left: a quarter faster than all at once.

        The arrays are to be read only, and may be views of an image that is kept: copy what outlives this call's use.

        Raises:
            ReadError: the image no longer decodes, or its pixels are not those that were scanned.
        """
        whole = self._whole(row)
        if whole is not None:
            return [whole.crop(window) for window in windows]
        if self.store is not None:
            return self.store.read_many(row, windows)
        return decoded(self.index, row, windows)

    def read(self, row: Row, window: tuple[slice, ...]) -> Image:
        """Return the window of an image; one slice a spatial axis, inside the image.

        Raises:
            ReadError: as `read_pieces`.
        """
        return next(self.read_many(row, [window]))

    def read_many(self, row: Row, windows: Sequence[tuple[slice, ...]]) -> Iterator[Image]:
        """Give several windows of an image, each as `read` does; large images are read once for all of them.

        Raises:
            ReadError: as `read_pieces`, when called.
        """
        pieces = self.read_pieces(row, windows)
        outline = self.index.outline(row.key)
        return (_image(piece, outline, window) for piece, window in zip(pieces, windows, strict=True))

    def _whole(self, row: Row) -> Piece | None:
        """Return the whole image from the cache, read into it where it fits; None where it does not."""
        if whole_bytes(row) * CACHE_SHARE > self.capacity:
            return None
        if row.key in self.held:
            self.held.move_to_end(row.key)
            return self.held[row.key]
        everything = tuple(slice(0, size) for size in row.shape)
        if self.store is not None:
            (whole,) = self.store.read_many(row, [everything])
        else:
            stored = self.index.read_many_stored(row.key, [everything])
            whole = piece_of(self.index, row, self.index.read(row.key)) if stored is None else first(stored)
        self.held[row.key] = whole
        self.bytes_held += whole.nbytes
        while self.bytes_held > self.capacity:
            self.bytes_held -= self.held.popitem(last=False)[1].nbytes
        return whole


def whole_bytes(row: Row) -> int:
    """Return about how much memory the whole image takes as a Piece, from what its files store."""
    return math.prod(row.shape) * (1 + len(row.channels) * stored_bytes(row))


def stored_bytes(row: Row) -> int:
    """Return about how many bytes a value of the image takes as a Piece."""
    return min(4, np.dtype(row.dtype).itemsize)


def piece_of(index: Index, row: Row, image: Image) -> Piece:
    """Return what was read as a Piece, with what the index knows about how its values were computed."""
    scaling = index.scaling(row.key)
    whole_numbers = np.dtype(row.dtype).kind in "iu"
    return Piece.from_image(image, () if scaling is None else (scaling,), guess=whole_numbers)


def decoded(index: Index, row: Row, windows: Sequence[tuple[slice, ...]]) -> Iterator[Piece]:
    """Decode windows of an image that is not kept: as stored where its reader can give that, else as float32.

    Integers are not looked for here: for a window that is used once this takes as long as to decode it.

    Raises:
        ReadError: the image no longer decodes; when called.
    """
    stored = index.read_many_stored(row.key, windows)
    if stored is not None:
        return (_stored_piece(window) for window in stored)
    return (_float_piece(image) for image in index.read_many(row.key, windows))


def first(stored: Iterable[StoredWindow]) -> Piece:
    """Return the first of some windows of stored integers."""
    return _stored_piece(next(iter(stored)))


def _stored_piece(window: StoredWindow) -> Piece:
    return Piece(window.values, window.valid, window.scale, window.offset)


def _float_piece(image: Image) -> Piece:
    valid = np.broadcast_to(image.valid, (len(image.valid), *image.spatial_shape))
    array = image.array if valid.all() else np.where(valid, image.array, np.float32(0))
    ones = np.ones(len(array))
    return Piece(array, valid, ones, np.zeros_like(ones))


def _image(piece: Piece, outline: Image, window: Sequence[slice]) -> Image:
    array, valid = piece.physical()
    geometry = outline.geometry.shifted(*(part.start or 0 for part in window))
    # An Image's arrays are read-only for good: not those that others look at.
    return replace(outline, array=array.copy(), valid=valid.copy(), geometry=geometry)
