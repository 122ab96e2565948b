"""The answer for one block of an image, on disk until the whole image is put together.

One line of JSON (mark, SHA-256 of the rest, sizes of the strips), then strips of rows: class numbers, and where
they are asked for probabilities in steps of 1/65535, both compressed. Strips keep small what is in memory while blocks
that lie side by side are put together. Probabilities are thirty times finer than any format of ours stores them.
"""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np

from geomed_mae.errors import IntegrityError
from geomed_mae.heads.blocks import INVALID, Answer
from geomed_mae.heads.tiling import Block

STEPS = 65535
"""Steps between the probabilities 0 and 1."""
LEVEL = 1
"""Of zlib: class maps shrink a hundredfold at any level, probabilities hardly at any."""
STRIP_BYTES = 32 << 20
"""Memory for a strip of an image that is put together."""
BYTES_PER_CHANCE = 12
"""Of a probability that is put together: read, as float32, and as the writer turns it into what it stores."""


def strip_rows(shape: Sequence[int], classes: int, *, chances: bool) -> int:
    """Return the rows (or slices) of a strip of an image of spatial `shape`."""
    across = int(np.prod(shape[1:])) * (BYTES_PER_CHANCE * classes if chances else 4)
    return max(1, STRIP_BYTES // across)


def write_block(path: Path, answer: Answer, mark: str, *, rows: int, chances: bool) -> None:
    """Write an answer in strips of `rows` under a mark (`work.block_mark`); the file appears whole or not at all.

    Raises:
        OSError: the disk is full or the folder is gone.
    """
    strips, parts = [], []
    for first in range(0, answer.block.shape[0], rows):
        some = slice(first, min(first + rows, answer.block.shape[0]))
        numbers = zlib.compress(np.ascontiguousarray(answer.numbers(some)), LEVEL)
        more = b""
        if chances:
            more = zlib.compress(np.rint(answer.chances(some) * STEPS).astype("<u2"), LEVEL)
        strips.append([some.stop - first, len(numbers), len(more)])
        parts += [numbers, more]
    total = hashlib.sha256()
    for part in parts:
        total.update(part)
    head = {"mark": mark, "sha256": total.hexdigest(), "strips": strips}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}.partial")
    try:
        with partial.open("wb") as file:
            file.write(json.dumps(head).encode() + b"\n")
            file.writelines(parts)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def strips_of(path: Path, block: Block, classes: int) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield uint8 (rows, ...) class numbers and float32 (class, rows, ...) probabilities, None where there are none.

    Where no channel is valid the number is INVALID and the probabilities are NaN.

    Raises:
        IntegrityError: the file is not what was written.
    """
    try:
        with path.open("rb") as file:
            for rows, size, more in json.loads(file.readline())["strips"]:
                shape = (rows, *block.shape[1:])
                numbers = np.frombuffer(zlib.decompress(file.read(size)), np.uint8).reshape(shape)
                if not more:
                    yield numbers, None
                    continue
                steps = np.frombuffer(zlib.decompress(file.read(more)), "<u2").reshape((classes, *shape))
                chances = steps.astype(np.float32)
                chances /= STEPS
                chances[:, numbers == INVALID] = np.nan
                yield numbers, chances
    except (zlib.error, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"half-finished work, block {path.stem}, is damaged ({error}): run the same command again with --overwrite"
        ) from error


def put_together(
    files: Sequence[Path], blocks: Sequence[Block], shape: Sequence[int], classes: int
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """Yield an image's strips from the first row to the last, each as `strips_of` but of whole rows.

    Args:
        files: one a block.
        blocks: of the image, in row-major order.
        shape: spatial shape of the image.
        classes: of the model.

    Raises:
        IntegrityError, OSError: a file is damaged or gone.
    """
    by_row: dict[int, list[tuple[Path, Block]]] = {}
    for path, block in zip(files, blocks, strict=True):
        by_row.setdefault(block.start[0], []).append((path, block))
    for beside in by_row.values():
        with ExitStack() as stack:
            readers = [strips_of(path, block, classes) for path, block in beside]
            for reader in readers:
                stack.callback(reader.close)
            for strips in zip(*readers, strict=True):
                yield _beside([block for _, block in beside], strips, shape[1:], classes)


def _beside(
    blocks: Sequence[Block], strips: Sequence[tuple[np.ndarray, np.ndarray | None]], across: Sequence[int], classes: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """Join strips of the same rows."""
    if len(strips) == 1:
        return strips[0]
    rows = len(strips[0][0])
    numbers = np.empty((rows, *across), np.uint8)
    chances = None if strips[0][1] is None else np.empty((classes, rows, *across), np.float32)
    for block, (some, theirs) in zip(blocks, strips, strict=True):
        place = tuple(slice(start, stop) for start, stop in zip(block.start[1:], block.stop[1:], strict=True))
        numbers[(slice(None), *place)] = some
        if chances is not None:
            chances[(slice(None), slice(None), *place)] = theirs
    return numbers, chances
