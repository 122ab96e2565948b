"""Many windows of one source in one call: a reader that can decodes what they share once.

A reader may define `read_many(source, windows) -> Iterable[Image]`, each Image equal to what its `read` gives, every
error raised by the call itself; and `read_many_stored`, the same as stored integers where these are short, else None.
For those without them, windows near each other are cut from one read of their bounding window.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from types import ModuleType

from geomed_mae.image import Image
from geomed_mae.readers import limits, reader
from geomed_mae.readers.child import in_child
from geomed_mae.readers.regular import believed
from geomed_mae.readers.source import Source, StoredWindow, decoded_values, whole_window

MAX_WASTE = 4
"""A bounding window is read where it has less than so many times the pixels of the windows that it bounds."""

Spans = tuple[tuple[int, int], ...]
"""(start, stop) per spatial axis: a window as plain numbers, which pass to a child process."""


def read_many(source: Source, windows: Sequence[tuple[slice, ...]]) -> Iterable[Image]:
    """Read windows (one slice a spatial axis, inside the image) of a source; equal to `read` of each, and faster.

    Raises:
        ReadError: as `read`, when any of them cannot be read.
    """
    module = reader(source.reader)
    whole = [whole_window(window, source.shape) for window in windows]
    own = getattr(module, "read_many", None)
    if own is not None:
        return believed(lambda: own(source, whole), source.files)
    return believed(lambda: _bounded(module, source, whole), source.files)


def read_many_stored(source: Source, windows: Sequence[tuple[slice, ...]]) -> Iterable[StoredWindow] | None:
    """As `read_many`, but integers as stored; None where the reader cannot give these, or an image codec is needed.

    Raises:
        ReadError: as `read`, when any of them cannot be read.
    """
    own = getattr(reader(source.reader), "read_many_stored", None)
    if own is None or source.codec:
        return None
    whole = [whole_window(window, source.shape) for window in windows]
    return believed(lambda: own(source, whole), source.files)


def read_many_guarded(source: Source, windows: Sequence[tuple[slice, ...]]) -> Iterable[Image]:
    """As `read_many`, but what needs an image codec is decoded in a child process (see `readers.read_guarded`).

    Raises:
        ReadError: as `readers.read_guarded`.
    """
    if not source.codec:
        return read_many(source, windows)
    whole = [whole_window(window, source.shape) for window in windows]
    spans = tuple(tuple((part.start, part.stop) for part in window) for window in whole)
    values = len(source.channels) * max(_pixels(_bounding(whole)), sum(map(_pixels, whole)))
    return in_child(_read_spans, source, spans, **limits(decoded_values(source, whole), at_once=values))


def _read_spans(source: Source, spans: tuple[Spans, ...]) -> list[Image]:
    return list(read_many(source, [tuple(slice(*span) for span in window) for window in spans]))


def _bounded(module: ModuleType, source: Source, windows: Sequence[tuple[slice, ...]]) -> list[Image]:
    outer = _bounding(windows)
    if len(windows) < 2 or _pixels(outer) > MAX_WASTE * sum(map(_pixels, windows)):
        return [module.read(source, window) for window in windows]
    image = module.read(source, outer)
    return [image.crop(_inside(window, outer)) for window in windows]


def _inside(window: Sequence[slice], outer: Sequence[slice]) -> tuple[slice, ...]:
    return tuple(slice(part.start - o.start, part.stop - o.start) for part, o in zip(window, outer, strict=True))


def _bounding(windows: Sequence[tuple[slice, ...]]) -> tuple[slice, ...]:
    return tuple(
        slice(min(part.start for part in axis), max(part.stop for part in axis)) for axis in zip(*windows, strict=True)
    )


def _pixels(window: Sequence[slice]) -> int:
    return math.prod(part.stop - part.start for part in window)
