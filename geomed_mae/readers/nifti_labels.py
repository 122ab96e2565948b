"""Class numbers from a NIfTI label map, placed on an image's voxels by coordinates; nothing is resampled."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, VolumeGeometry
from geomed_mae.readers.labels import IGNORE, LabelQuery, Labels
from geomed_mae.readers.nifti_file import Header, header, voxels
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

GRID_TOLERANCE_MM = 1e-2
"""Two grids are one where no corner differs by more: affines are often stored as float32."""


def read_labels(path: Path, onto: Image, query: LabelQuery) -> Labels:
    """Read stored values int16 (Z, Y, X), placed on the grid of `onto` by coordinates; IGNORE outside the label map.

    The two grids may be cropped, flipped or permuted against each other; nothing is resampled.

    Raises:
        ReadError: BAD_GEOMETRY (grids that do not coincide or overlap), BAND_MISMATCH (several volumes),
            DTYPE_UNSUPPORTED (not integers, or out of range), or a reason of `header`.
    """
    found = header(path)
    if not isinstance(onto.geometry, VolumeGeometry):
        raise ReadError(f"{shown(path)} is a volume of labels; the image is not a volume", Reason.BAD_GEOMETRY.name)
    if found.volumes != 1:
        raise ReadError(f"{shown(path)} holds {found.volumes} volumes; labels have one", Reason.BAND_MISMATCH.name)
    classes = _classes(found)
    # Voxel index of the image -> voxel index of the label map.
    step = np.linalg.solve(found.affine, onto.geometry.affine)
    exact = np.rint(step)
    size = np.array(onto.spatial_shape)
    corners = np.array([[z, y, x, 1] for z in (0, 1) for y in (0, 1) for x in (0, 1)]) * [*(size - 1), 1]
    gap = np.abs(found.affine @ exact @ corners.T - onto.geometry.affine @ corners.T).max()
    permuted = np.array_equal(np.abs(exact[:3, :3]).sum(axis=0), [1, 1, 1]) and abs(np.linalg.det(exact[:3, :3])) == 1
    if not permuted or gap > GRID_TOLERANCE_MM:
        raise ReadError(
            f"the grid of {shown(path)} differs from the image's; resample the labels onto the image first",
            Reason.BAD_GEOMETRY.name,
        )
    placed = np.full(onto.spatial_shape, IGNORE, np.int16)
    axes = [int(np.flatnonzero(exact[:3, axis])[0]) for axis in range(3)]  # label axis of each image axis
    indices = []
    for axis, label_axis in enumerate(axes):
        index = np.arange(size[axis]) * int(exact[label_axis, axis]) + int(exact[label_axis, 3])
        indices.append((index, (index >= 0) & (index < classes.shape[label_axis])))
    if not all(inside.any() for _, inside in indices):
        raise ReadError(f"the labels of {shown(path)} do not overlap the image", Reason.BAD_GEOMETRY.name)
    turned = classes.transpose(axes)
    placed[np.ix_(*(inside for _, inside in indices))] = turned[np.ix_(*(index[inside] for index, inside in indices))]
    return Labels(placed)


def _classes(found: Header) -> np.ndarray:
    """Return the whole label map as int16 (Z, Y, X); floats are fine where every value is a whole number."""
    values = voxels(found, 0, slice(0, found.shape[0])).astype(np.float64) * found.slope + found.inter
    with np.errstate(invalid="ignore"):
        whole = np.isfinite(values) & (np.rint(values) == values)
    if not whole.all() or values.min() < IGNORE or values.max() > np.iinfo(np.int16).max:
        raise ReadError(
            f"{shown(found.path)} holds values that are no class numbers from {IGNORE} (ignore) to "
            f"{np.iinfo(np.int16).max}",
            Reason.DTYPE_UNSUPPORTED.name,
        )
    return values.astype(np.int16)
