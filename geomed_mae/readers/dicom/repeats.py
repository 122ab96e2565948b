"""Take a series with several slices at the same positions apart into its volumes: time points, echoes, b-values.

Attributes are tried from the most to the least meaningful; one is believed only where the parts it makes are complete,
that is, where most of them cover every position. AcquisitionTime, for example, tells volumes apart in one series and
single slices in another.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

from geomed_mae.readers.dicom.geometry import MIN_RUN
from geomed_mae.readers.dicom.image_header import Frame, Header


@dataclass(frozen=True, slots=True)
class Slice:
    """One frame of one file, and which frame of the file it is."""

    header: Header
    number: int

    @property
    def frame(self) -> Frame:
        """The frame's own attributes."""
        return self.header.frames[self.number]


Key = Callable[[Slice], Hashable]

STRONG_KEYS: tuple[Key, ...] = (
    lambda one: one.frame.temporal,
    lambda one: (one.frame.b_value, one.frame.gradient),
    lambda one: one.frame.echo_time_ms,
    lambda one: one.frame.inversion_time_ms,
    lambda one: one.frame.labelling,
    lambda one: one.frame.trigger_ms,
    lambda one: one.header.cardiac_phase,
    lambda one: one.frame.indices,
    lambda one: one.frame.frame_type,
)
"""TemporalPosition, diffusion weighting, EchoTime, InversionTime, spin labelling, trigger time, cardiac phase,
dimension indices or vectors, ImageType or FrameType: each says what is different, and so tells even slices at one
single position apart."""

SETTING_KEYS: tuple[Key, ...] = (
    lambda one: one.header.kernel,
    lambda one: one.header.tube_kv,
    lambda one: one.frame.thickness_mm,
)
"""ConvolutionKernel, KVP, SliceThickness: several reconstructions in one series. Thick and thin slices share few
positions, so parts that cover different ones are believed when none of them holds a position twice."""

WEAK_KEYS: tuple[Key, ...] = (
    lambda one: one.header.acquisition,
    lambda one: one.header.reference_time,
    lambda one: one.frame.acquired,
    lambda one: one.header.content_time,
)
"""AcquisitionNumber, FrameReferenceTime, acquisition time, ContentTime: they say only that something is different,
which is enough between complete stacks and not enough for slices at one single position (bolus tracking, for example).
"""


def split_repeats(slices: Sequence[Slice], places: np.ndarray) -> tuple[list[list[Slice]], list[Slice]]:
    """Split slices into volumes without repeated positions.

    Args:
        slices: of one grid.
        places: number of each slice's position, see `dicom.geometry.place_numbers`.

    Returns:
        (volumes, untold): the volumes in the order of what tells them apart, and the slices that share a position with
        another one and cannot be told apart.
    """
    counts = np.bincount(places)
    if counts.max() == 1:
        return [list(slices)], []
    single = len(counts) == 1
    for key in (*STRONG_KEYS, *SETTING_KEYS) if single else (*STRONG_KEYS, *SETTING_KEYS, *WEAK_KEYS):
        parts = _parts(slices, key)
        if len(parts) == 1:
            continue
        if _complete(parts, places, len(counts)) or (key in SETTING_KEYS and _distinct(parts, places)):
            return _split_each(slices, places, parts)
    if (parts := _trigger_parts(slices, places)) is not None:
        return _split_each(slices, places, parts)
    if not single and (ranks := _ranks(slices, places)) is not None:
        return [[slices[index] for index in np.flatnonzero(ranks == rank)] for rank in range(ranks.max() + 1)], []
    untold = [one for one, place in zip(slices, places, strict=True) if counts[place] > 1]
    rest = [one for one, place in zip(slices, places, strict=True) if counts[place] == 1]
    return ([rest] if rest else []), untold


def _parts(slices: Sequence[Slice], key: Key) -> list[list[int]]:
    found: dict[Hashable, list[int]] = {}
    for index, one in enumerate(slices):
        found.setdefault(key(one), []).append(index)
    # Mixed types (a number beside None) have no order of their own; numbers in text sort by value, not by letter.
    return [found[value] for value in sorted(found, key=_order)]


def _order(value: Hashable) -> tuple:
    if isinstance(value, tuple):
        return (2, *(_order(part) for part in value))
    if value is None or value == "":
        return (0, 0.0, "")
    text = str(value)
    return (1, float(text), "") if text.replace(".", "", 1).isdecimal() else (1, float("inf"), text)


def _trigger_parts(slices: Sequence[Slice], places: np.ndarray) -> list[list[int]] | None:
    """Return the phases of a cine whose slices were triggered one after the other, or None.

    Each position then has trigger times of its own, as many as all the others: the first ones are the first phase.
    """
    times: list[list[float]] = [[] for _ in range(int(places.max()) + 1)]
    for one, place in zip(slices, places.tolist(), strict=True):
        if one.frame.trigger_ms is None or not math.isfinite(one.frame.trigger_ms):
            return None
        times[place].append(one.frame.trigger_ms)
    ordered = [sorted(set(found)) for found in times]
    count = len(ordered[0])
    if count < 2 or any(len(found) != count for found in ordered):
        return None
    parts: list[list[int]] = [[] for _ in range(count)]
    for index, (one, place) in enumerate(zip(slices, places.tolist(), strict=True)):
        parts[ordered[place].index(one.frame.trigger_ms)].append(index)
    return parts


def _complete(parts: list[list[int]], places: np.ndarray, count: int) -> bool:
    """Most parts cover all positions: an aborted last volume is allowed, a part per slice is not."""
    full = sum(len(set(places[part].tolist())) == count for part in parts)
    return 2 * full >= len(parts)


def _distinct(parts: list[list[int]], places: np.ndarray) -> bool:
    """Each part is a stack of its own, without a position that it holds twice."""
    return all(len(part) >= MIN_RUN and len(set(places[part].tolist())) == len(part) for part in parts)


def _split_each(
    slices: Sequence[Slice], places: np.ndarray, parts: list[list[int]]
) -> tuple[list[list[Slice]], list[Slice]]:
    volumes, untold = [], []
    for part in parts:
        # Positions are renumbered without holes, so that a part of one position is seen as such.
        renumbered = np.unique(places[part], return_inverse=True)[1]
        more, left = split_repeats([slices[index] for index in part], renumbered)
        volumes += more
        untold += left
    return volumes, untold


def _ranks(slices: Sequence[Slice], places: np.ndarray) -> np.ndarray | None:
    """Return each slice's volume by the order of InstanceNumber (and of frames), the last resort, or None.

    Only where that order walks either through whole volumes one after the other, or through the repeats of one position
    after the other; anything else is no order.
    """
    count = int(places.max()) + 1
    repeats, rest = divmod(len(slices), count)
    numbers = [(one.header.instance, one.number) for one in slices]
    if rest or len(set(numbers)) != len(numbers) or any(instance is None for instance, _ in numbers):
        return None
    order = np.array(sorted(range(len(slices)), key=lambda index: numbers[index]))
    ranks = np.empty(len(slices), dtype=np.int64)
    by_volume = places[order].reshape(repeats, count)
    if all(len(set(row)) == count for row in by_volume.tolist()):
        ranks[order] = np.repeat(np.arange(repeats), count)
        return ranks
    by_place = places[order].reshape(count, repeats)
    if all(len(set(row)) == 1 for row in by_place.tolist()):
        ranks[order] = np.tile(np.arange(repeats), count)
        return ranks
    return None
