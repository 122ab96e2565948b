"""Put a volume of label values on an image's voxels by coordinates: exactly, or by nearest where that was asked for.

Two grids coincide when one is the other cropped, padded, flipped or with its axes permuted. Both may be sheared
(gantry tilt), as long as they are so in the same way: a grid that straightens a tilted series is another grid.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image
from geomed_mae.readers.labels import IGNORE
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

GRID_TOLERANCE_MM = 0.02
"""Grids are one where no corner of the image differs by more: affines are often stored as float32, positions as text
of a few decimals, and a series may itself leave its affine by 0.01 mm (`dicom.geometry.POSITION_TOLERANCE_MM`)."""

GRID_TOLERANCE_VOXELS = 0.02
"""The same as a share of a voxel's edge, where that is more: quaternions and spacings of four decimals drift that far
over a few hundred slices."""

HALF = 0.5 + 1e-6
"""A voxel centre this far before the border between two label voxels belongs to the next: rounding of affines."""


def tolerance_mm(affine: np.ndarray) -> float:
    """Return how far two grids of `affine` (4, 4) may be apart and still be one: by the shortest voxel edge."""
    return max(GRID_TOLERANCE_MM, GRID_TOLERANCE_VOXELS * float(np.linalg.norm(affine[:3, :3], axis=0).min()))


def place_volume(
    values: np.ndarray, affine: np.ndarray, onto: Image, *, path: Path, resample: str | None
) -> tuple[np.ndarray, int]:
    """Return int16 (Z, Y, X) on the grid of `onto`, IGNORE off the label volume, and how many labels lie off the image.

    Args:
        values: int16 (slices, rows, columns) of the label volume; what is above 0 counts as a label.
        affine: (4, 4) from its (slice, row, column) to LPS mm.
        onto: an image with a VolumeGeometry; its pixels are not looked at.
        path: label file, for messages.
        resample: "nearest" or None.

    Raises:
        ReadError: BAD_GEOMETRY: the grids do not coincide and `resample` is None, or they do not overlap.
    """
    step = exact_step(affine, onto)
    if step is not None:
        placed, taken = _indexed(values, step, onto.spatial_shape)
    elif resample == "nearest":
        placed, taken = _nearest(values, affine, onto)
    else:
        raise ReadError(
            f"the grid of {shown(path)} differs from the image's; resample the labels onto the image first, or set "
            "labels.resample: nearest",
            Reason.BAD_GEOMETRY.name,
        )
    if placed is None:
        raise ReadError(f"the labels of {shown(path)} do not overlap the image", Reason.BAD_GEOMETRY.name)
    return placed, int(np.count_nonzero(values > 0)) - taken


def exact_step(affine: np.ndarray, onto: Image) -> np.ndarray | None:
    """Return the (4, 4) integers from the image's voxel index to the label's, None where the grids do not coincide."""
    exact = np.rint(np.linalg.solve(affine, onto.geometry.affine))
    turn = np.abs(exact[:3, :3])
    if not (np.array_equal(turn.sum(axis=0), [1, 1, 1]) and np.array_equal(turn.sum(axis=1), [1, 1, 1])):
        return None
    size = np.array(onto.spatial_shape)
    corners = np.array([[z, y, x, 1] for z in (0, 1) for y in (0, 1) for x in (0, 1)]) * [*(size - 1), 1]
    gap = np.linalg.norm(((affine @ exact - onto.geometry.affine) @ corners.T)[:3], axis=0).max()
    return exact if gap <= tolerance_mm(onto.geometry.affine) else None


def _indexed(values: np.ndarray, step: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray | None, int]:
    """Return the values at integer positions, and how many labels these hold; None where there is no overlap."""
    axes = [int(np.flatnonzero(step[:3, axis])[0]) for axis in range(3)]  # label axis of each image axis
    indices = []
    for axis, label_axis in enumerate(axes):
        index = np.arange(shape[axis]) * int(step[label_axis, axis]) + int(step[label_axis, 3])
        indices.append((index, (index >= 0) & (index < values.shape[label_axis])))
    if not all(inside.any() for _, inside in indices):
        return None, 0
    placed = np.full(shape, IGNORE, np.int16)
    found = values.transpose(axes)[np.ix_(*(index[inside] for index, inside in indices))]
    placed[np.ix_(*(inside for _, inside in indices))] = found
    return placed, int(np.count_nonzero(found > 0))


def _nearest(values: np.ndarray, affine: np.ndarray, onto: Image) -> tuple[np.ndarray | None, int]:
    """Return the value of the label voxel that holds each image voxel's centre, slice by slice of the image; and how
    many labels have their own centre on the image.
    """
    shape = onto.spatial_shape
    placed = np.full(shape, IGNORE, np.int16)
    touched = False
    to_label = np.linalg.solve(affine, onto.geometry.affine)
    for plane in range(shape[0]):
        index, inside = _under(to_label, plane, shape[1:], values.shape)
        if inside.any():
            touched = True
            placed[plane][inside] = values[tuple(index[axis][inside] for axis in range(3))]
    to_image = np.linalg.solve(onto.geometry.affine, affine)
    on_image = 0
    for plane in np.flatnonzero((values > 0).any(axis=(1, 2))):
        _, inside = _under(to_image, int(plane), values.shape[1:], shape)
        on_image += int(np.count_nonzero(inside & (values[plane] > 0)))
    return (placed if touched else None), on_image


def _under(
    step: np.ndarray, plane: int, size: tuple[int, ...], other: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Return index (3, rows, columns) into a grid of shape `other` of one plane's voxels, and whether it is inside."""
    rows, columns = np.arange(size[0])[:, None], np.arange(size[1])[None, :]
    exact = [step[a, 0] * plane + step[a, 1] * rows + step[a, 2] * columns + step[a, 3] for a in range(3)]
    index = np.floor(np.stack(exact) + HALF).astype(np.int64)
    limits = np.array(other)[:, None, None]
    return index, ((index >= 0) & (index < limits)).all(axis=0)
