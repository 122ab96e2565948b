"""NIfTI-1 outputs (nifti.nimh.nih.gov, nifti1.h): class maps and dense embeddings on the volume's own grid.

NIfTI's axes are (column, row, slice) and its millimetres RAS (x to the Right, y Anterior); ours are (slice, row,
column) and LPS. Both differences are undone without resampling: the array is transposed, the first two world axes
change sign. The affine is stored in the sform, sheared ones (gantry tilt) included; the qform, which holds no shear, is
set only when it says the same. Both are float32 in the format, which costs less than 1e-4 mm.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.errors import MissingExtraError
from geomed_mae.image import PlaneGeometry, VolumeGeometry
from geomed_mae.writers import check_classes, complete_file

SUFFIX = ".nii.gz"
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
REVERSED = [2, 1, 0, 3]
"""Columns of an affine in the order (column, row, slice, origin)."""
SHEAR_TOLERANCE = 1e-5
"""Largest cosine between two axes that counts as a right angle: float32 affines are no better."""
SCANNER = 1
"""NIFTI_XFORM_SCANNER_ANAT: the affine leads to the scanner's coordinates."""
LABEL_INTENT = 1002
"""NIFTI_INTENT_LABEL: voxels are indices into a set of labels."""


class ClassVolume:
    """A class map that is being collected, from the first slice to the last; a plane is collected by rows."""

    def __init__(self, shape: tuple[int, ...], classes: tuple[str, ...]) -> None:
        self.array = np.zeros(shape, dtype=np.uint8)
        self._classes = classes
        self._next = 0

    def put(self, slices: np.ndarray) -> None:
        """Take the next slices: uint8 (slices, rows, columns), or rows (rows, columns) of a plane.

        Raises:
            ValueError: not uint8, or a number that is no class.
        """
        check_classes(slices, self._classes)
        self.array[self._next : self._next + slices.shape[0]] = slices
        self._next += slices.shape[0]


@contextmanager
def stream(
    path: Path, shape: tuple[int, ...], geometry: VolumeGeometry | PlaneGeometry, classes: tuple[str, ...]
) -> Iterator[ClassVolume]:
    """Collect a class map of `shape` ([slices,] rows, columns) and write it when the block ends.

    Volumes are read whole, so their uint8 maps (a quarter of the size) are kept whole too.

    Raises:
        OutputError: the file cannot be written.
    """
    volume = ClassVolume(shape, classes)
    yield volume
    write(path, volume.array, geometry, classes)


def write(path: Path, array: np.ndarray, geometry: VolumeGeometry | PlaneGeometry, classes: tuple[str, ...]) -> Path:
    """Write a class map, uint8 ([slices,] rows, columns).

    Raises:
        OutputError: the file cannot be written.
        MissingExtraError: nibabel is not installed.
    """
    check_classes(array, classes)
    image = _image(array.transpose(), geometry)
    image.header.set_intent(LABEL_INTENT, allow_unknown=True, name="classes")
    return _save(image, path)


def write_features(path: Path, array: np.ndarray, geometry: VolumeGeometry | PlaneGeometry) -> Path:
    """Write float32 (features, [slices,] rows, columns) as NIfTI with features on the fourth axis, one a "time point".

    Raises:
        OutputError: the file cannot be written.
    """
    axes = array.transpose()  # (column, row, [slice,] feature)
    return _save(_image(axes if array.ndim == 4 else axes[:, :, None, :], geometry), path)


def _image(axes: np.ndarray, geometry: VolumeGeometry | PlaneGeometry) -> Any:
    try:
        import nibabel
    except ImportError:
        raise MissingExtraError("writing NIfTI", "nibabel", "med") from None

    if isinstance(geometry, PlaneGeometry):
        return _plane(nibabel, axes, geometry)
    affine = LPS_TO_RAS @ geometry.affine[:, REVERSED]
    image = nibabel.Nifti1Image(np.ascontiguousarray(axes), affine)
    image.set_sform(affine, code=SCANNER)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    orthogonal = np.abs(directions.T @ directions - np.eye(3)).max() < SHEAR_TOLERANCE
    image.set_qform(affine if orthogonal else None, code=SCANNER if orthogonal else 0)
    image.header.set_xyzt_units("mm")
    return image


def _plane(nibabel: Any, axes: np.ndarray, geometry: PlaneGeometry) -> Any:
    """A projection has a pixel size at most, and no place: both transforms keep the code for "unknown"."""
    image = nibabel.Nifti1Image(np.ascontiguousarray(axes), None)
    if geometry.spacing_mm is not None:
        row, column = geometry.spacing_mm
        image.header.set_zooms((column, row, *image.header.get_zooms()[2:]))
        image.header.set_xyzt_units("mm")
    return image


def _save(image: Any, path: Path) -> Path:
    with complete_file(path) as final:
        image.to_filename(final)
    return path
