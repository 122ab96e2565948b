"""Where slices lie: orientation, order along the normal, gaps, tilt, repeated positions. numpy only.

Order and spacing come from ImagePositionPatient and ImageOrientationPatient alone (PS3.3 C.7.6.2.1.1), never from
InstanceNumber, SliceLocation or SliceThickness, which files contradict. All lengths are mm in LPS.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

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

FARTHEST_MM = 1e6
"""No patient is a kilometre from the scanner's centre; such positions are damage."""

SPACING_MM = (1e-3, 1e4)
"""Voxels of one micrometre (micro-CT) to ten metres; what is outside is damage, or no length in mm."""

ROUNDING_MM = 0.1
"""Deviations from equal steps up to this look like positions that the sender has rounded, to 0.1 mm at the worst: each
of three coordinates then errs by up to 0.05 mm."""


def orientation_error(orientation: Sequence[float] | None) -> str:
    """Say what is wrong with six direction cosines, "" when nothing is."""
    if orientation is None:
        return "ImageOrientationPatient is missing"
    return _orientation_error(tuple(orientation))


@lru_cache(maxsize=1024)
def _orientation_error(orientation: tuple[float, ...]) -> str:
    # Cached: all slices of a series have the same one.
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


def slice_error(
    orientation: Sequence[float] | None, position: Sequence[float] | None, spacing: Sequence[float] | None
) -> str:
    """Say why a slice cannot be part of a volume, "" when it can: all three are there, sound and of a body's size."""
    if problem := orientation_error(orientation) or position_error(position) or spacing_error(spacing):
        return problem
    if np.abs(position).max() > FARTHEST_MM:
        return f"ImagePositionPatient is more than {FARTHEST_MM:g} mm away"
    if not (SPACING_MM[0] <= min(spacing) and max(spacing) <= SPACING_MM[1]):
        return f"PixelSpacing is not within {SPACING_MM[0]:g} and {SPACING_MM[1]:g} mm"
    return ""


def normal_of(orientation: Sequence[float]) -> np.ndarray:
    """Return the unit normal (3,), first direction x second direction."""
    first, second = np.reshape(orientation, (2, 3))
    normal = np.cross(first, second)
    return normal / np.linalg.norm(normal)


def same_grid(one: tuple[Sequence[float], Sequence[float]], other: tuple[Sequence[float], Sequence[float]]) -> bool:
    """Say whether two (orientation, spacing) pairs belong to one volume, within the tolerances."""
    if one == other:
        return True
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


def fitted_line(
    positions: np.ndarray, *, limit_mm: float = POSITION_TOLERANCE_MM
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (origin (3,), step (3,), largest distance in mm) of equal steps through (n, 3) sorted positions.

    A distance far beyond `limit_mm` is only an upper bound.

    Through the first and the last position where that holds POSITION_TOLERANCE_MM: the plain and exact case. Otherwise
    the line whose largest deviation is smallest in each coordinate, so that positions rounded to 0.01 mm, the last one
    included, stay one volume.
    """
    count = len(positions)
    if count == 1:
        return positions[0], np.zeros(3), 0.0
    steps = np.arange(count)[:, None]
    origin, step = positions[0], (positions[-1] - positions[0]) / (count - 1)
    error = float(np.linalg.norm(positions - (origin + steps * step), axis=1).max())
    # A line within the limit of both ends is within the limit of this one everywhere: beyond twice it there is none.
    if error <= POSITION_TOLERANCE_MM or error > 2 * limit_mm:
        return origin, step, error
    best_origin, best_step = _minimax_line(positions)
    best = float(np.linalg.norm(positions - (best_origin + steps * best_step), axis=1).max())
    return (best_origin, best_step, best) if best < error else (origin, step, error)


def _minimax_line(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return (origin, step) with the smallest largest deviation per coordinate."""
    step = np.array([_minimax_slope(axis) for axis in positions.T.tolist()])
    rest = positions - np.arange(len(positions))[:, None] * step
    return (rest.min(axis=0) + rest.max(axis=0)) / 2, step


def _minimax_slope(values: list[float]) -> float:
    """Return the slope of the narrowest strip that holds all (index, value): it lies along an edge of their hull."""
    points: list[tuple[int, float]] = []
    slopes: list[float] = []
    for sign in (1.0, -1.0):
        hull: list[tuple[int, float]] = []
        for index, value in enumerate(values):
            while len(hull) > 1 and sign * _turn(hull[-2], hull[-1], (index, value)) <= 0:
                hull.pop()
            hull.append((index, value))
        points += hull
        slopes += [(two[1] - one[1]) / (two[0] - one[0]) for one, two in pairwise(hull)]
    corners = np.array(points)
    widths = np.ptp(corners[:, 1] - np.array(slopes)[:, None] * corners[:, 0], axis=1)
    return slopes[int(np.argmin(widths))]


def _turn(one: tuple[int, float], two: tuple[int, float], three: tuple[int, float]) -> float:
    return (two[0] - one[0]) * (three[1] - one[1]) - (two[1] - one[1]) * (three[0] - one[0])


def _uniform(positions: np.ndarray, normal: np.ndarray, limit_mm: float) -> bool:
    """Say whether (n, 3) sorted positions lie on a line at equal steps, each within the limit."""
    if len(positions) == 1:
        return True
    _, step, error = fitted_line(positions, limit_mm=limit_mm)
    return bool(step @ normal > limit_mm and error <= limit_mm)


def uniform_runs(
    positions: np.ndarray, normal: np.ndarray, *, limit_mm: float = POSITION_TOLERANCE_MM
) -> list[tuple[int, int]]:
    """Split (n, 3) positions, sorted along `normal`, into (start, stop) runs of equal steps, the longest first served.

    Within a run, each position lies within `limit_mm` of the run's line.

    Longest first and not left to right: a stray slice before a regular stack must not take the stack's first slice.
    """
    count = len(positions)
    if _uniform(positions, normal, limit_mm):
        return [(0, count)]
    candidates: list[tuple[int, int, int]] = []
    stop = 1
    for start in range(count):
        stop = _last_uniform(positions[: max(stop, start + 1)], normal, start, limit_mm)
        while stop < count and _uniform(positions[start : stop + 1], normal, limit_mm):
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
            free = start + int(np.argmax(taken[start:stop]))
            stop = _last_uniform(positions[:free], normal, start, limit_mm)
            heapq.heappush(candidates, (start - stop, start, stop))
            continue
        taken[start:stop] = True
        runs.append((start, stop))
    return sorted(runs)


def _last_uniform(positions: np.ndarray, normal: np.ndarray, start: int, limit_mm: float) -> int:
    """Return where the run from `start` ends: the positions' own end, or earlier, where the run is uniform."""
    stop = len(positions)
    while stop > start + 1 and not _uniform(positions[start:stop], normal, limit_mm):
        stop -= 1
    return stop


def rounded_stretches(
    positions: np.ndarray, normal: np.ndarray, runs: Sequence[tuple[int, int]]
) -> list[tuple[int, int, float]]:
    """Return (start, stop, deviation in mm) of stretches that would be one volume but for rounded positions.

    These are equally spaced to within ROUNDING_MM, and fall into pieces (`runs`) of less than half their length under
    POSITION_TOLERANCE_MM: neither one volume that keeps the promise nor volumes of any use.
    """
    found = []
    for start, stop in uniform_runs(positions, normal, limit_mm=ROUNDING_MM):
        longest = max(min(stop, end) - max(start, begin) for begin, end in runs)
        if stop - start >= 2 * MIN_RUN and 2 * longest < stop - start:
            _, _, error = fitted_line(positions[start:stop], limit_mm=ROUNDING_MM)
            found.append((start, stop, error))
    return found


def volume_affine(
    positions: np.ndarray, orientation: Sequence[float], spacing: Sequence[float], *, single_step_mm: float
) -> np.ndarray:
    """Return the affine (4, 4) from (slice, row, column) to LPS mm of sorted positions (n, 3).

    Columns are the slice step of `fitted_line`, sheared where the gantry was tilted; the step between rows,
    along the *second* direction cosine by the first PixelSpacing; and the step between columns (PS3.3 C.7.6.2.1.1).
    A single slice steps `single_step_mm` along its normal.
    """
    first, second = np.reshape(np.asarray(orientation, dtype=np.float64), (2, 3))
    affine = np.eye(4)
    affine[:3, 3], affine[:3, 0], _ = fitted_line(positions)
    if len(positions) == 1:
        affine[:3, 0] = normal_of(orientation) * single_step_mm
    affine[:3, 1] = second * spacing[0]
    affine[:3, 2] = first * spacing[1]
    return affine


def tilt_degrees(affine: np.ndarray) -> float:
    """Return the angle between the slice step and the normal of the slices."""
    step = affine[:3, 0] / np.linalg.norm(affine[:3, 0])
    normal = np.cross(affine[:3, 1], affine[:3, 2])
    normal /= np.linalg.norm(normal)
    return float(np.degrees(np.arctan2(np.linalg.norm(np.cross(step, normal)), abs(step @ normal))))
