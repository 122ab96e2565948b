"""One full decode of an image: what a scan learns from its pixels. Runs in decoding processes.

Decoding everything once is what makes the later promises cheap: a file that is damaged is found here, not in the third
night of training; statistics and content keys come from the very pixels that training will see.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from geomed_mae.archives.duplicates import PerceptualHash
from geomed_mae.archives.identity import PixelDigest
from geomed_mae.archives.statistics import ChannelStatistics, Running
from geomed_mae.errors import ReadError
from geomed_mae.image import Image
from geomed_mae.readers import limits, read, reader
from geomed_mae.readers.child import in_child
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.source import Refusal, Source
from geomed_mae.readers.windows import read_many

PART_VALUES = 1 << 24
"""Values of a raster that are decoded at a time."""
MOST_AT_ONCE = 12 * PART_VALUES
"""As many where this is one row of blocks, of which a smaller part would be decoded several times."""
PIECE_VALUES = 1 << 21
"""Values of a decoded part that are looked at at a time: what is computed of them takes ten times their memory."""


@dataclass(frozen=True, slots=True)
class Examination:
    """What the pixels of one image say.

    Attributes:
        digest: of `PixelDigest`; private.
        look: of `PerceptualHash`, "" where there is none; private.
        valid_fraction: share of valid values, above 0 to 1.
        statistics: one a channel, over valid pixels.
        flags: notes that its reader makes of the pixels, beside those of the source.
    """

    digest: str
    look: str
    valid_fraction: float
    statistics: tuple[ChannelStatistics, ...]
    flags: tuple[str, ...] = ()


def parts(source: Source) -> Iterator[tuple[slice, ...] | None]:
    """Yield windows that cover an image: bands of rows of a raster too large to decode at once, else all of it."""
    rows, columns = source.shape[-2:]
    height = max(1, PART_VALUES // (columns * len(source.channels)))
    if len(source.shape) != 2 or rows <= height:
        yield None
        return
    # Whole rows of blocks, where not too large: a part that ends inside one decodes it twice.
    step = source.block[0] if source.block else 1
    height = height // step * step or (step if step * columns * len(source.channels) <= MOST_AT_ONCE else height)
    for top in range(0, rows, height):
        yield slice(top, min(top + height, rows)), slice(0, columns)


def pieces(source: Source) -> Iterator[Image]:
    """Yield an image in pieces, whole rows from the first to the last; a volume in one piece.

    Raises:
        ReadError: the image does not decode.
    """
    rows = max(1, PIECE_VALUES // (source.shape[-1] * len(source.channels)))
    for window in parts(source):
        if len(source.shape) != 2:
            yield read(source, window)
            continue
        down, across = window or tuple(slice(0, size) for size in source.shape)
        cuts = [(slice(top, min(top + rows, down.stop)), across) for top in range(down.start, down.stop, rows)]
        # Decoded once for all of them, as stored; they become numbers one by one.
        yield from read_many(source, cuts)


def examine(source: Source) -> Examination | Refusal:
    """Decode one image in this process; a refusal names its first file."""
    digest = PixelDigest((len(source.channels), *source.shape))
    look = PerceptualHash(len(source.channels), source.shape)
    running = Running(len(source.channels), math.prod(source.shape))
    try:
        for image in pieces(source):
            digest.add(image)
            look.add(image)
            running.add(image.array, image.valid)
        statistics = running.result()
        check = getattr(reader(source.reader), "verify", None)
        flags = check(source, statistics) if check is not None else ()
    except ReadError as error:
        return Refusal(source.files[0], Reason[error.reason], str(error))
    valid = sum(entry.count for entry in statistics)
    if not valid:
        return Refusal(source.files[0], Reason.ALL_INVALID)
    if all(entry.minimum == entry.maximum for entry in statistics):
        return Refusal(source.files[0], Reason.NO_INFORMATION, "a constant image teaches nothing")
    fraction = valid / (len(statistics) * math.prod(source.shape))
    return Examination(digest.hex(), look.text(), fraction, statistics, flags)


def examine_apart(source: Source) -> Examination | Refusal:
    """Decode one image in a child process: a codec that crashes or hangs there costs this image and no more."""
    values = len(source.channels) * math.prod(source.shape)
    at_once = values if len(source.shape) == 3 else min(values, MOST_AT_ONCE)
    try:
        return in_child(examine, source, **limits(values, at_once=at_once))
    except ReadError as error:
        return Refusal(source.files[0], Reason[error.reason], str(error))
