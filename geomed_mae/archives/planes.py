"""Which channels and which planes of an image are looked at, which way up, and in which grey values.

Rasters: natural colours where the bands are there, else false colours of the three shortest wavelengths, else each
channel in grey. Volumes: axial, coronal and sagittal planes in the radiological convention (patient's right on the left
of the picture, anterior and superior on top). CT is seen through the windows of a reading room.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from geomed_mae.archives.views import axis_letters
from geomed_mae.archives.views import shown_channels as natural_colours
from geomed_mae.image import Channel, VolumeGeometry

STRETCH = (2.0, 98.0)
"""Percentiles of the shown values that become black and white."""

SOFT_TISSUE, LUNG = (-160.0, 240.0), (-1350.0, 150.0)
"""CT windows in HU: level 40 width 400, and level -600 width 1500."""

AIR_HU, AERATED_HU = -950.0, -400.0
"""Below the first lies air around a patient, which says nothing; between the two, lung."""

MAX_GREYS = 3
"""Channels that are shown each in a grey of its own."""

PET_WHITE = 99.5
"""Percentile of the activity that is drawn black: PET is read in inverted greys from zero."""

PLANES = (("IS", "axial", "AP", "RL"), ("AP", "coronal", "SI", "RL"), ("RL", "sagittal", "SI", "AP"))
"""Patient axis across a plane, its name, and from where to where the picture's rows and columns run."""

UNTOLD = ("row x column", "slice x column", "slice x row")
"""Names of the planes across the slice, row and column axes where the orientation is not known."""

Letters = tuple[str, str, str]
"""Where slices, rows and columns run in the patient, see `archives.views.axis_letters`."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """From values to brightness: `low` and `high` (1 or 3 entries) are black and white; `name` says so in words."""

    low: np.ndarray
    high: np.ndarray
    name: str
    colours: str = "gray"


@dataclass(frozen=True, slots=True)
class Plane:
    """A cut through a volume, at `at` of the array axis `across`; rows and columns are array axes, maybe turned."""

    label: str
    across: int
    at: int
    axes: tuple[int, int]
    turned: tuple[bool, bool]
    size: tuple[float, float]
    edges: str

    def cut(self, array: np.ndarray) -> np.ndarray:
        """Return the plane (y, x, ...) of an array (z, y, x, ...)."""
        plane = np.moveaxis(array, self.across, 0)[self.at]
        if self.axes[0] > self.axes[1]:
            plane = plane.swapaxes(0, 1)
        return plane[:: -1 if self.turned[0] else 1, :: -1 if self.turned[1] else 1]


def plane_across(axis: int, at: int, spacing: Sequence[float], letters: Letters | None) -> Plane:
    """Return the plane of a volume at `at` of an array axis, turned as a radiologist expects it.

    Args:
        axis: slice, row or column axis of the array.
        at: place along it.
        spacing: mm, one an axis.
        letters: see `Letters`; None leaves the plane as it is stored.
    """
    rest = [other for other in range(3) if other != axis]
    label, axes, turned, edges = UNTOLD[axis], (rest[0], rest[1]), (False, False), ""
    if letters is not None:
        label, down, right = next(names for across, *names in PLANES if set(across) == set(letters[axis]))
        axes = tuple(_axis(letters, way) for way in (down, right))
        turned = tuple(letters[one] != way for one, way in zip(axes, (down, right), strict=True))
        edges = right + down
    return Plane(label, axis, at, axes, turned, (spacing[axes[0]], spacing[axes[1]]), edges)


def _axis(letters: Letters, way: str) -> int:
    """Return the array axis that runs along a patient axis, in either direction."""
    return next(number for number, one in enumerate(letters) if set(one) == set(way))


def sides(geometries: Mapping[str, object]) -> dict[str, Letters]:
    """Return key -> letters of the volumes among `geometries` (key -> Geometry)."""
    return {key: axis_letters(one.affine) for key, one in geometries.items() if isinstance(one, VolumeGeometry)}


def shown_groups(channels: Sequence[Channel]) -> list[tuple[int, ...]]:
    """Return what is drawn of an image: one triple of channels as red, green and blue, or up to three in grey."""
    if len(natural := natural_colours(channels)) == 3:
        return [natural]
    optical = [
        (channel.wavelength_nm, number)
        for number, channel in enumerate(channels)
        if channel.kind == "optical" and channel.wavelength_nm is not None
    ]
    if len(optical) >= 3:
        return [tuple(number for _, number in sorted(optical)[:3][::-1])]
    return [(number,) for number in range(min(len(channels), MAX_GREYS))]


def window_of(channels: Sequence[Channel], values: np.ndarray) -> Window:
    """Choose black and white for values (n, 1 or 3) of the shown channels, in their physical unit.

    CT in HU gets the soft-tissue window, or that of the lung where most of what is no free air is aerated. PET runs
    from zero, inverted. All others run between percentiles.
    """
    unit, kind = channels[0].unit, channels[0].kind
    if not len(values):
        values = np.zeros((1, len(channels)))
    if kind == "ct" and unit == "HU":
        inside = values[values > AIR_HU]
        lung = inside.size and (inside < AERATED_HU).mean() > 0.5
        (low, high), name = (LUNG, "lung") if lung else (SOFT_TISSUE, "soft tissue")
        text = f"{name} window: level {(low + high) / 2:g}, width {high - low:g} HU"
        return Window(np.array([low]), np.array([high]), text)
    if kind == "pet":
        high = max(float(np.percentile(values, PET_WHITE)), 1e-6)
        return Window(np.array([0.0]), np.array([high]), f"inverted greys, 0 to {_number(high)} {unit}", "gray_r")
    low, high = np.percentile(values, STRETCH, axis=0)
    high = np.where(high > low, high, low + 1.0)
    if len(channels) == 1:
        return Window(low, high, f"{_number(low[0])} to {_number(high[0])} {unit}")
    spans = ", ".join(f"{one.name} {_number(a)} to {_number(b)}" for one, a, b in zip(channels, low, high, strict=True))
    return Window(low, high, f"{spans} {unit}")


def _number(value: float) -> str:
    """Three digits at least, and no power of ten where people would not write one."""
    return f"{value:.0f}" if 100 <= abs(value) < 1e6 else f"{value:.3g}"
