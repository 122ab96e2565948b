"""What a person sees of an image: a natural-colour or grey plane of a raster, three anatomical planes of a volume.

Rasters of any size are seen through a coarse grid of cell means, so that they can be fed part by part. Planes keep the
image's true proportions. Volumes are turned by whole axes into the radiological convention (the patient's right on the
left of the picture, anterior and superior at the top): nothing is resampled, oblique volumes stay oblique.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geomed_mae.archives.statistics import BlockMeans
from geomed_mae.image import Channel, Geometry, Image, VolumeGeometry

if TYPE_CHECKING:
    from PIL.Image import Image as Picture

NATURAL_NM = (665.0, 560.0, 490.0)
"""Red, green and blue of a natural-colour composite: the channels with the nearest wavelengths are shown."""

NATURAL_TOLERANCE_NM = 60.0
"""A channel further off than this is not a colour of the composite."""

STRETCH = (1.0, 99.0)
"""Percentiles of the valid values that become black and white."""

INVALID = (214, 40, 140)
"""Colour (8-bit red, green, blue) of what is not valid: neither tissue, land nor cloud has it."""

BLOCKY = 8
"""Enlargement from which on pixels are drawn as squares."""

MAX_CHANNELS = 4
"""Channels of a volume that are shown: the first in three planes, the others in one."""

LETTERS = ("RL", "AP", "IS")
"""From where to where the patient axes x, y and z of LPS coordinates run (DICOM PS3.3 C.7.6.2.1.1)."""


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """One plane to look at.

    Attributes:
        values: float32 (y, x, 1) or (y, x, 3) in physical units; anything where not valid.
        valid: bool (y, x).
        limits: (black, white) of each of the last axis' entries.
        size: (height, width) on the ground or in the body, in one unit.
        label: what it shows, for example "axial".
        edges: letters of the patient's sides at the left, right, top and bottom; "" without.
    """

    values: np.ndarray
    valid: np.ndarray
    limits: tuple[tuple[float, float], ...]
    size: tuple[float, float]
    label: str = ""
    edges: str = ""

    def pixels(self, side: int) -> tuple[int, int]:
        """Return (height, width) in picture pixels, the longer one `side`, in true proportion."""
        longest = max(self.size)
        return tuple(max(1, round(side * length / longest)) for length in self.size)

    def grey(self, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
        """Return brightness 0 to 1, float32 (height, width), and where it is valid."""
        shape = (width, height)
        stretched, valid = _resized(_stretched(self), shape), _resized(self.valid[..., None] * np.float32(1), shape)
        return stretched.mean(axis=-1) / np.maximum(valid[..., 0], 1e-3), valid[..., 0] > 0.5

    def picture(self, side: int) -> Picture:
        """Return an 8-bit RGB picture whose longer side has `side` pixels; INVALID where nothing is valid."""
        from PIL import Image as Pillow

        height, width = self.pixels(side)
        colours = _resized(_stretched(self), (width, height))
        known = _resized(self.valid[..., None] * np.float32(1), (width, height))
        colours = np.where(known > 0.5, colours / np.maximum(known, 1e-3), np.array(INVALID) / 255)
        colours = np.broadcast_to(colours, (height, width, 3))
        return Pillow.fromarray((np.clip(colours, 0, 1) * 255).round().astype(np.uint8))


def _stretched(view: View) -> np.ndarray:
    """Values as 0 to 1 between the limits, 0 where not valid, so that resampling does not mix in what means nothing."""
    low, high = np.array(view.limits, dtype=np.float64).T
    scale = np.where(high > low, high - low, 1.0)
    stretched = (np.where(view.valid[..., None], view.values, low) - low) / scale
    return np.clip(stretched, 0, 1).astype(np.float32)


def _resized(planes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resample (y, x, k) to (width, height) with a triangle filter that widens when it shrinks.

    An image of a few pixels is not smoothed: its pixels are what there is to see.
    """
    from PIL import Image as Pillow

    few = min(size[0] / planes.shape[1], size[1] / planes.shape[0]) >= BLOCKY
    method = Pillow.Resampling.NEAREST if few else Pillow.Resampling.BILINEAR
    layers = [Pillow.fromarray(np.ascontiguousarray(planes[..., layer])) for layer in range(planes.shape[-1])]
    return np.stack([np.asarray(layer.resize(size, method)) for layer in layers], axis=-1)


def shown_channels(channels: Sequence[Channel]) -> tuple[int, ...]:
    """Return the channels to show: three for a natural-colour composite where there are such, else the first."""
    optical = [n for n, channel in enumerate(channels) if channel.kind == "optical" and channel.wavelength_nm]
    picked = []
    for wanted in NATURAL_NM:
        nearest = min(optical, key=lambda n, nm=wanted: abs(channels[n].wavelength_nm - nm), default=None)
        if nearest is None or abs(channels[nearest].wavelength_nm - wanted) > NATURAL_TOLERANCE_NM:
            return (0,)
        picked.append(nearest)
    return tuple(picked) if len(set(picked)) == len(picked) else (0,)


def shown_as(channels: Sequence[Channel]) -> str:
    """Say in words what `shown_channels` are drawn as."""
    names = [channels[number].name for number in shown_channels(channels)]
    colours = ["red", "green", "blue"]
    if [name.lower() for name in names] == colours:
        return "natural colours"
    return f"{', '.join(names)} as {', '.join(colours)}" if len(names) == 3 else f"{names[0]} as grey"


def axis_letters(affine: np.ndarray) -> tuple[str, str, str]:
    """Return where slices, rows and columns run, as patient letters: ("IS", "AP", "RL") for slices from feet to head.

    Args:
        affine: (4, 4) from (slice, row, column) to LPS mm. Each axis is named after the nearest patient axis, each
            patient axis once.
    """
    return tuple(LETTERS[axis][:: 1 if forward else -1] for axis, forward in _patient_axes(affine))


def _patient_axes(affine: np.ndarray) -> tuple[tuple[int, bool], ...]:
    """Return per array axis (patient axis 0 to 2, whether it runs towards its positive end)."""
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    best = max(
        itertools.permutations(range(3)), key=lambda order: sum(abs(directions[a, n]) for n, a in enumerate(order))
    )
    return tuple((axis, bool(directions[axis, number] > 0)) for number, axis in enumerate(best))


class Sketch:
    """The views of one image, fed part by part: rasters and planes in bands of rows, volumes whole.

    Args:
        channels: of the image.
        shape: spatial shape of what is fed.
        geometry: of the image; decides proportions and sides.
        side: cells of the longer side of a raster's grid.
    """

    def __init__(self, channels: Sequence[Channel], shape: Sequence[int], geometry: Geometry, side: int = 256) -> None:
        self._geometry, self._shape = geometry, tuple(shape)
        self._shown = list(shown_channels(channels)) if len(shape) == 2 else list(range(len(channels)))[:MAX_CHANNELS]
        self._names = [channels[number].name for number in self._shown]
        self._views: list[View] = []
        if len(shape) == 2:
            spacing = geometry.spacing or (1.0, 1.0)
            self._size = (shape[0] * spacing[0], shape[1] * spacing[1])
            grid = [max(1, round(side * length / max(self._size))) for length in self._size]
            self._means = BlockMeans(len(self._shown), shape, grid)

    def add(self, image: Image) -> None:
        """Take the next part."""
        # Not `Image.select`, which would copy a part that may be large.
        whole = self._shown == list(range(image.array.shape[0]))
        array = image.array if whole else image.array[self._shown]
        valid = image.valid if whole or image.valid.shape[0] == 1 else image.valid[self._shown]
        if len(self._shape) == 2:
            self._means.add(array, valid)
        else:
            self._views = self._planes(array, np.broadcast_to(valid, array.shape))

    def views(self) -> list[View]:
        """Return the views of all that was fed, at least one; the first shows most."""
        if len(self._shape) != 2:
            return self._views
        means, _ = self._means.result()
        known = np.isfinite(means).all(axis=0)
        limits = tuple(_limits(layer[known]) for layer in means)
        values = np.moveaxis(np.nan_to_num(means), 0, -1).astype(np.float32)
        return [View(values, known, limits, self._size)]

    def _planes(self, array: np.ndarray, valid: np.ndarray) -> list[View]:
        """Cut (C, Z, Y, X) through the middle of what is valid, turned into the radiological convention."""
        assert isinstance(self._geometry, VolumeGeometry)
        axes = _patient_axes(self._geometry.affine)
        lengths = [size * step for size, step in zip(self._shape, self._geometry.spacing, strict=True)]
        order = [next(n for n, (axis, _) in enumerate(axes) if axis == wanted) for wanted in (2, 1, 0)]
        # From superior down, from anterior back, from the patient's right to the left.
        turned = [axes[n][1] == (axes[n][0] == 2) for n in order]
        flips = (slice(None), *(slice(None, None, -1 if turn else 1) for turn in turned))
        moved = (0, *(n + 1 for n in order))
        array, valid = array.transpose(moved)[flips], valid.transpose(moved)[flips]
        height, depth, width = (lengths[n] for n in order)
        middle = [_middle(valid.any(axis=tuple({0, 1, 2, 3} - {n}))) for n in (1, 2, 3)]
        cuts = {
            "axial": ((slice(None), middle[0]), (depth, width), "RLAP"),
            "coronal": ((slice(None), slice(None), middle[1]), (height, width), "RLSI"),
            "sagittal": ((slice(None), slice(None), slice(None), middle[2]), (height, depth), "APSI"),
        }
        # The plane in which the slices were acquired has the finest pixels: it is shown first.
        finest = ("axial", "coronal", "sagittal")[order.index(0)]
        names = sorted(cuts, key=lambda name: name != finest)
        views = []
        for number, channel in enumerate(self._names):
            inside = valid[number]
            limits = (_limits(array[number][inside][:: max(1, inside.size // 500_000)]),)
            for name in names if number == 0 else names[:1]:
                cut, size, edges = cuts[name]
                values, known = np.array(array[cut][number]), np.array(valid[cut][number])
                label = f"{channel} {name}" if len(self._names) > 1 else name
                views.append(View(np.nan_to_num(values)[..., None], known, limits, size, label, edges))
        return views


def _limits(values: np.ndarray) -> tuple[float, float]:
    """Return black and white for valid values."""
    if not values.size:
        return 0.0, 1.0
    low, high = (float(value) for value in np.percentile(values, STRETCH))
    return (low, high) if high > low else (float(values.min()), float(values.max()))


def _middle(occupied: np.ndarray) -> int:
    places = np.flatnonzero(occupied)
    return int(places[0] + places[-1]) // 2 if places.size else len(occupied) // 2
