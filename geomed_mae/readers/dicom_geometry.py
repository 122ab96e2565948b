"""Where slices lie: orientation, order along the normal, gaps, tilt, repeated positions. numpy only.

Order and spacing come from ImagePositionPatient and ImageOrientationPatient alone (PS3.3 C.7.6.2.1.1), never from
InstanceNumber, SliceLocation or SliceThickness, which files contradict. All lengths are mm in LPS.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

POSITION_TOLERANCE_MM = 0.01
"""How far a slice of an accepted volume may lie from where the volume's affine puts it. Two slices nearer to each other
than this are at one position."""

COSINE_TOLERANCE = 1e-3
"""How far direction cosines may be from unit length and right angles: rounding of three decimals, nothing worse."""

ORIENTATION_TOLERANCE = 1e-4
"""Largest difference of direction cosines within a volume: 0.025 mm at 250 mm from the centre."""

SPACING_TOLERANCE = 1e-4
"""Largest relative difference of pixel spacing within a volume."""

TILT_DEGREES = 0.1
"""Angle between slice step and normal from which a volume is called sheared (gantry tilt)."""

MIN_RUN = 3
"""When a series falls apart at gaps, fewer slices than this do not make a volume: two always look uniform."""


def orientation_error(orientation: Sequence[float] | None) -> str:
    """Say what is wrong with six direction cosines, "" when nothing is."""
    if orientation is None:
        return "ImageOrientationPatient is missing"
    if len(orientation) != 6 or not np.isfinite(orientation).all():
        return "ImageOrientationPatient is not six finite numbers"
    first, second = np.reshape(orientation, (2, 3))
    lengths = abs(np.linalg.norm(first) - 1), abs(np.linalg.norm(second) - 1)
    if max(*lengths, abs(first @ second)) > COSINE_TOLERANCE:
        return "ImageOrientationPatient is not two perpendicular unit vectors"
    return ""


def position_error(position: Sequence[float] | None) -> str:
    """Say what is wrong with a slice's position, "" when nothing is."""
    if position is None:
        return "ImagePositionPatient is missing"
    if len(position) != 3 or not np.isfinite(position).all():
        return "ImagePositionPatient is not three finite numbers"
    return ""


def spacing_error(spacing: Sequence[float] | None) -> str:
    """Say what is wrong with a pixel spacing (row, column), "" when nothing is."""
    if spacing is None:
        return "PixelSpacing is missing"
    if len(spacing) != 2 or not np.isfinite(spacing).all() or min(spacing) <= 0:
        return "PixelSpacing is not two positive numbers"
    return ""


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    """Return the unit normal (3,), first direction x second direction."""
    first, second = np.reshape(orientation, (2, 3))
    normal = np.cross(first, second)
    return normal / np.linalg.norm(normal)


def same_grid(one: tuple[Sequence[float], Sequence[float]], other: tuple[Sequence[float], Sequence[float]]) -> bool:
    """Say whether two (orientation, spacing) pairs belong to one volume, within the tolerances."""
    turned = np.abs(np.subtract(one[0], other[0])).max()
    scaled = np.abs(np.divide(one[1], other[1]) - 1).max()
    return bool(turned <= ORIENTATION_TOLERANCE and scaled <= SPACING_TOLERANCE)


def place_numbers(positions: np.ndarray, normal: np.ndarray) -> np.ndarray:
    """Number the distinct positions of (n, 3) slices along the normal; slices at one position share a number."""
    depth = positions @ normal
    numbers = np.zeros(len(positions), dtype=np.int64)
    order = np.argsort(depth, kind="stable")
    current = 0
    anchors: list[int] = []
    for index in order:
        near = [
            anchor
            for anchor in anchors
            if np.linalg.norm(positions[index] - positions[anchor]) <= POSITION_TOLERANCE_MM
        ]
        if near:
            numbers[index] = numbers[near[0]]
            continue
        anchors = [anchor for anchor in anchors if depth[index] - depth[anchor] <= POSITION_TOLERANCE_MM]
        anchors.append(int(index))
        numbers[index] = current
        current += 1
    return numbers


def _uniform(positions: np.ndarray, normal: np.ndarray) -> bool:
    """Say whether (n, 3) sorted positions lie on a line at equal steps, each within the tolerance."""
    count = len(positions)
    if count == 1:
        return True
    step = (positions[-1] - positions[0]) / (count - 1)
    line = positions[0] + np.arange(count)[:, None] * step
    return bool(
        step @ normal > POSITION_TOLERANCE_MM
        and np.linalg.norm(positions - line, axis=1).max() <= POSITION_TOLERANCE_MM
    )


def uniform_runs(positions: np.ndarray, normal: np.ndarray) -> list[tuple[int, int]]:
    """Split (n, 3) positions, sorted along `normal`, into (start, stop) runs of equal steps, the longest first served.

    Longest first and not left to right: a stray slice before a regular stack must not take the stack's first slice.
    """
    count = len(positions)
    candidates: list[tuple[int, int, int]] = []
    stop = 1
    for start in range(count):
        stop = _last_uniform(positions, normal, start, max(stop, start + 1))
        while stop < count and _uniform(positions[start : stop + 1], normal):
            stop += 1
        candidates.append((start - stop, start, stop))
    heapq.heapify(candidates)
    taken = np.zeros(count, dtype=bool)
    runs = []
    while candidates:
        _, start, stop = heapq.heappop(candidates)
        if taken[start]:
            continue
        if taken[start:stop].any():
            stop = _last_uniform(positions, normal, start, start + int(np.argmax(taken[start:stop])))
            heapq.heappush(candidates, (start - stop, start, stop))
            continue
        taken[start:stop] = True
        runs.append((start, stop))
    return sorted(runs)


def _last_uniform(positions: np.ndarray, normal: np.ndarray, start: int, stop: int) -> int:
    """Shrink `stop` until the run from `start` is uniform."""
    while stop > start + 1 and not _uniform(positions[start:stop], normal):
        stop -= 1
    return stop


def volume_affine(
    positions: np.ndarray, orientation: Sequence[float], spacing: Sequence[float], *, single_step_mm: float
) -> np.ndarray:
    """Return the affine (4, 4) from (slice, row, column) to LPS mm of sorted positions (n, 3).

    Columns are the slice step (last - first) / (n - 1), sheared where the gantry was tilted; the step between rows,
    along the *second* direction cosine by the first PixelSpacing; and the step between columns (PS3.3 C.7.6.2.1.1).
    A single slice steps `single_step_mm` along its normal.
    """
    first, second = np.reshape(np.asarray(orientation, dtype=np.float64), (2, 3))
    affine = np.eye(4)
    if len(positions) > 1:
        affine[:3, 0] = (positions[-1] - positions[0]) / (len(positions) - 1)
    else:
        affine[:3, 0] = normal_of(orientation) * single_step_mm
    affine[:3, 1] = second * spacing[0]
    affine[:3, 2] = first * spacing[1]
    affine[:3, 3] = positions[0]
    return affine


def tilt_degrees(affine: np.ndarray) -> float:
    """Return the angle between the slice step and the normal of the slices."""
    step = affine[:3, 0] / np.linalg.norm(affine[:3, 0])
    normal = np.cross(affine[:3, 1], affine[:3, 2])
    normal /= np.linalg.norm(normal)
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(step, normal)), abs(step @ normal))))
