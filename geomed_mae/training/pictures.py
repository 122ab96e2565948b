"""From crops to the planes that a panel shows, with the true proportions of their pixels; see `archives.planes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomed_mae.archives.planes import Letters, Plane, Window, plane_across, shown_groups, window_of
from geomed_mae.image import Channel

SLIVER = 0.15
"""A plane that is thinner than this share of its width is not drawn."""

FULL = 0.9
"""A plane with this share of the fullest one's valid voxels counts as full."""


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One row of a panel: `image` and `answer` (y, x, 1 or 3) in physical units, three masks (y, x).

    `aspect` is the height of a pixel over its width; `edges` the patient's sides at the left, right, top and bottom.
    """

    label: str
    image: np.ndarray
    answer: np.ndarray
    valid: np.ndarray
    seen: np.ndarray
    asked: np.ndarray
    aspect: float
    window: Window
    unit: str
    edges: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Crop:
    """One crop before it is cut into planes: arrays (c, *space) in physical units, and masks.

    `valid` and `asked` are (c, *space), `seen` is (*space); `spacing` is per spatial axis, `letters` those of a volume
    whose orientation is known.
    """

    image: np.ndarray
    answer: np.ndarray
    valid: np.ndarray
    seen: np.ndarray
    asked: np.ndarray
    spacing: Sequence[float]
    letters: Letters | None = None


def rows_of(crop: Crop, channels: Sequence[Channel], place: int) -> list[Picture]:
    """Cut the rows that show one crop: all planes of the first shown channels, the first plane of the others."""
    inside = _extent(crop.valid.any(axis=0))
    rows = []
    for number, group in enumerate(shown_groups(channels)):
        chosen, picked = list(group), [channels[one] for one in group]
        valid = crop.valid[chosen].all(axis=0)[inside]
        image, answer = (np.moveaxis(one[chosen], 0, -1)[inside] for one in (crop.image, crop.answer))
        masks = valid, crop.seen[inside], crop.asked[chosen].any(axis=0)[inside]
        window = window_of(picked, image[valid])
        several = len(channels) > 1 and len(group) == 1
        planes = planes_of(image[..., 0], valid, window, crop) if valid.ndim == 3 else [None]
        for plane in planes if number == 0 else planes[:1]:
            cut = (lambda array: array) if plane is None else plane.cut
            height, width = (crop.spacing[0], crop.spacing[1]) if plane is None else plane.size
            words = (f"example {place}", picked[0].name if several else "", "" if plane is None else plane.label)
            rows.append(
                Picture(
                    " · ".join(word for word in words if word),
                    cut(image),
                    cut(answer),
                    *(cut(mask) for mask in masks),
                    aspect=height / width,
                    window=window,
                    unit=picked[0].unit,
                    edges="" if plane is None else plane.edges,
                )
            )
    return rows


def planes_of(image: np.ndarray, valid: np.ndarray, window: Window, crop: Crop) -> list[Plane]:
    """Return the planes of a volume (z, y, x) to show: the one that was acquired, then the others that are no slivers.

    Across each axis the plane with the most structure through `window` is taken of those that are nearly the fullest,
    the one next to the middle where several are equal: half of the planes of a crop may be air.
    """
    letters, spacing, planes = crop.letters, crop.spacing, []
    seen = np.where(valid, np.clip(image, window.low[0], window.high[0]), window.low[0])
    for axis in range(3):
        rest = [other for other in range(3) if other != axis]
        lengths = sorted(valid.shape[other] * spacing[other] for other in rest)
        if axis > 0 and lengths[0] < SLIVER * lengths[1]:
            continue
        count, structure = valid.sum(axis=tuple(rest)), seen.std(axis=tuple(rest))
        structure = np.where(count >= FULL * count.max(), structure, -1.0)
        best = np.flatnonzero(structure == structure.max())
        at = int(best[np.abs(best - valid.shape[axis] // 2).argmin()])
        planes.append(plane_across(axis, at, spacing, letters))
    return planes


def _extent(valid: np.ndarray) -> tuple[slice, ...]:
    """Return the box around all valid pixels of a crop (all of it when there are none): padding shows nothing."""
    box = []
    for axis in range(valid.ndim):
        places = np.flatnonzero(valid.any(axis=tuple(other for other in range(valid.ndim) if other != axis)))
        box.append(slice(places[0], places[-1] + 1) if places.size else slice(None))
    return tuple(box)
