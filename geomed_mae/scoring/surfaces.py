"""Distances between the surfaces of two masks, by MONAI: the 95th percentile Hausdorff distance and the mean distance.

A surface is the outermost pixels of a mask. Distances are Euclidean between pixel centres under the image's spacing;
a sheared grid (gantry tilt) is measured as if it were straight. HD95 is the larger of the two directions' 95th
percentiles, as in MONAI and Metrics Reloaded (Maier-Hein et al. 2024); the mean is over both directions' distances.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

PERCENTILE = 95.0
MAX_PIXELS = 1 << 28
"""Larger images get no surface distances, which need several whole masks in memory: two Sentinel-2 tiles at 10 m."""


@dataclass(frozen=True, slots=True)
class SurfaceDistance:
    """Distances in the unit of the spacing; `hd95` is the larger direction, `assd` the mean over both."""

    hd95: float
    assd: float


def available() -> bool:
    """Return whether MONAI is installed."""
    return importlib.util.find_spec("monai") is not None


def surface_distance(
    found: np.ndarray, truth: np.ndarray, unknown: np.ndarray | None, spacing: Sequence[float]
) -> SurfaceDistance | None:
    """Return the distances between the surfaces of two bool masks of one shape; None where one has no surface.

    Args:
        found: mask of the prediction.
        truth: mask of the truth.
        unknown: where nothing is known, or None: a surface that touches it is no surface of the thing itself.
        spacing: distance between pixels, one a spatial axis.
    """
    from monai.metrics.utils import get_mask_edges, get_surface_distance  # seconds of imports

    box = _box(found | truth)
    if box is None or not (found.any() and truth.any()):
        return None
    found, truth = found[box], truth[box]
    edges = get_mask_edges(found, truth, crop=False)
    if unknown is not None and (near := unknown[box]).any():
        near = _grown(near)
        edges = tuple(edge & ~near for edge in edges)
    if not all(edge.any() for edge in edges):
        return None
    ways = [get_surface_distance(one, other, spacing=tuple(spacing)) for one, other in (edges, edges[::-1])]
    hd95 = max(float(np.percentile(way, PERCENTILE)) for way in ways)
    return SurfaceDistance(hd95, float(np.concatenate(ways).mean()))


def _box(mask: np.ndarray) -> tuple[slice, ...] | None:
    """Return the box around a mask, one pixel wider where the image goes on; None for an empty one."""
    box = []
    for axis, size in enumerate(mask.shape):
        places = np.flatnonzero(mask.any(axis=tuple(other for other in range(mask.ndim) if other != axis)))
        if not places.size:
            return None
        box.append(slice(max(places[0] - 1, 0), min(places[-1] + 2, size)))
    return tuple(box)


def _grown(mask: np.ndarray) -> np.ndarray:
    """Return a mask and the neighbours of its pixels along each axis."""
    grown = mask.copy()
    for axis in range(mask.ndim):
        low, high = ([slice(None)] * mask.ndim for _ in range(2))
        low[axis], high[axis] = slice(None, -1), slice(1, None)
        grown[tuple(low)] |= mask[tuple(high)]
        grown[tuple(high)] |= mask[tuple(low)]
    return grown
