"""Tokens of one image on their way to a file: they come window by window and are wanted by rows, once all are there.

They wait in a file without a name, 4 bytes a value, which the system removes when the process ends, however it ends.
"""

from __future__ import annotations

import math
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from geomed_mae.errors import OutputError

BAND_BYTES = 64 << 20
"""Size of the bands in which tokens are given back."""


class TokenSpool:
    """The token grid of an image.

    Args:
        folder: where tokens wait; it exists.
        width: values of a token.
        grid: number of tokens along each axis.

    Attributes:
        low, high: float32 (width,), smallest and largest value of each dimension; inf and -inf before the first token.
        count: number of tokens with a value.
    """

    def __init__(self, folder: Path, width: int, grid: Sequence[int]) -> None:
        self.width, self.grid = width, tuple(grid)
        self.low = np.full(width, np.inf, dtype=np.float32)
        self.high = np.full(width, -np.inf, dtype=np.float32)
        self.count = 0
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by close)
        # First token row -> (start, shape, byte) of the blocks that begin there; they end together too.
        self._blocks: dict[int, list[tuple[tuple[int, ...], tuple[int, ...], int]]] = defaultdict(list)

    def __enter__(self) -> TokenSpool:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Give the disk back."""
        self._file.close()

    def put(self, start: Sequence[int], tokens: np.ndarray) -> None:
        """Take a block of tokens, float32 (width, *block) with NaN where there is none, at its place in the grid.

        What reaches beyond the grid is dropped. Blocks that begin in the same row of tokens have the same height.

        Raises:
            OutputError: the disk is full.
        """
        inside = tuple(slice(0, size - at) for at, size in zip(start, self.grid, strict=True))
        tokens = tokens[(slice(None), *inside)]
        known = tokens[:, np.isfinite(tokens[0])]
        if not known.shape[1]:
            return
        self.low, self.high = np.minimum(self.low, known.min(axis=1)), np.maximum(self.high, known.max(axis=1))
        self.count += known.shape[1]
        # Rows first, so that some rows of a block lie together.
        rows = np.ascontiguousarray(np.moveaxis(tokens, 1, 0), dtype=np.float32)
        try:
            at = self._file.seek(0, 2)
            self._file.write(rows.tobytes())
        except OSError as error:
            raise OutputError(f"no room for {rows.nbytes} bytes of tokens: {error.strerror}") from error
        self._blocks[start[0]].append((tuple(start), rows.shape, at))

    def bands(self) -> Iterator[tuple[int, np.ndarray]]:
        """Yield (first row of tokens, float32 (width, rows, *rest)) in order; rows without any token are left out."""
        across = self.width * math.prod(self.grid[1:])
        step = max(1, BAND_BYTES // (4 * across))
        for first, blocks in sorted(self._blocks.items()):
            height = blocks[0][1][0]
            for top in range(0, height, step):
                rows = min(step, height - top)
                band = np.full((self.width, rows, *self.grid[1:]), np.nan, dtype=np.float32)
                for start, shape, at in blocks:
                    size = 4 * math.prod(shape[1:])
                    self._file.seek(at + top * size)
                    part = np.frombuffer(self._file.read(rows * size), dtype=np.float32).reshape(rows, *shape[1:])
                    place = (slice(one, one + length) for one, length in zip(start[1:], shape[2:], strict=True))
                    band[(slice(None), slice(None), *place)] = np.moveaxis(part, 0, 1)
                yield first + top, band

    def array(self) -> np.ndarray:
        """Return all tokens, float32 (width, *grid), NaN where there is none."""
        whole = np.full((self.width, *self.grid), np.nan, dtype=np.float32)
        for first, band in self.bands():
            whole[:, first : first + band.shape[1]] = band
        return whole

    def sample(self, most: int) -> Iterator[np.ndarray]:
        """Yield about `most` tokens, evenly spread, in parts (tokens, width); all where there are fewer."""
        step, seen = max(1, -(-self.count // most)), 0
        for _, band in self.bands():
            known = band[:, np.isfinite(band[0])]
            yield known[:, -seen % step :: step].T
            seen += known.shape[1]
