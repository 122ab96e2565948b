"""NIfTI-1 outputs (nifti.nimh.nih.gov, nifti1.h): class maps, probabilities and dense embeddings on the image's grid.

NIfTI's axes are (column, row, slice) and its millimetres RAS (x to the Right, y Anterior); ours are (slice, row,
column) and LPS. Both differences are undone without resampling: the array is transposed, the first two world axes
change sign. The affine is stored in the sform, sheared ones (gantry tilt) included; the qform, which holds no shear, is
set only when it says the same. ITK, and with it SimpleITK, refuses sheared NIfTI files: of tilted series, a DICOM SEG
serves more programs. Both transforms are float32 in the format, which costs less than 1e-4 mm.
"""

from __future__ import annotations

import gzip
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from geomed_mae.errors import MissingExtraError
from geomed_mae.image import PlaneGeometry, VolumeGeometry
from geomed_mae.writers import CHANCE_STEPS, check_classes, complete_file, legend, stored_chances

SUFFIX = ".nii.gz"
GEOMETRIES = ("volume", "plane")
LPS_TO_RAS = np.diag([-1.0, -1.0, 1.0, 1.0])
REVERSED = [2, 1, 0, 3]
"""Columns of an affine in the order (column, row, slice, origin)."""
SHEAR_TOLERANCE = 1e-5
"""Largest cosine between two axes that counts as a right angle: float32 affines are no better."""
SCANNER = 1
"""NIFTI_XFORM_SCANNER_ANAT: the affine leads to the scanner's coordinates."""
LABEL_INTENT = 1002
"""NIFTI_INTENT_LABEL: voxels are indices into a set of labels."""
VOXELS_AT = 352
"""Bytes before the voxels: the header and the four that say that no extension follows."""
GZIP_LEVEL = 1
"""As nibabel packs: more takes several times as long and saves a few per cent."""
COPY_BYTES = 1 << 20


class Slices:
    """A file that is being written, from the first slice (of a plane: row) to the last."""

    def __init__(self, files: Sequence[IO[bytes]], shape: tuple[int, ...]) -> None:
        self._files, self._shape = files, shape
        self._next = 0

    def put(self, slices: np.ndarray) -> None:
        """Write the next slices: uint8 (parts, slices, rows, columns), or (parts, rows, columns) of a plane.

        Raises:
            ValueError: not of the shape that was promised.
        """
        if slices.shape[2:] != self._shape[1:] or self._next + slices.shape[1] > self._shape[0]:
            raise ValueError(f"{slices.shape[1:]} does not continue {self._shape} at {self._next}")
        for file, part in zip(self._files, slices, strict=True):
            # (column, row, slice) in Fortran order is (slice, row, column) in C order: slices lie one after another.
            file.write(part.tobytes())
        self._next += slices.shape[1]

    def missing(self) -> int:
        """Return how many slices have not been put yet."""
        return self._shape[0] - self._next


class ClassVolume:
    """A class map that is being written."""

    def __init__(self, slices: Slices, classes: tuple[str, ...]) -> None:
        self._slices, self._classes = slices, classes

    def put(self, slices: np.ndarray) -> None:
        """Write the next slices: uint8 (slices, rows, columns), or rows (rows, columns) of a plane.

        Raises:
            ValueError: not uint8, a number that is no class, or another shape.
        """
        check_classes(slices, self._classes)
        self._slices.put(slices[None])


class ChanceVolume:
    """Probabilities that are being written."""

    def __init__(self, slices: Slices) -> None:
        self._slices = slices

    def put(self, chances: np.ndarray) -> None:
        """Write the next slices: float32 (class, slices, rows, columns), or rows of a plane; 0 to 1.

        NIfTI has no nodata value: where nothing is known, all classes are 0.

        Raises:
            ValueError: another shape.
        """
        self._slices.put(stored_chances(chances)[0])


@contextmanager
def stream(
    path: Path, shape: tuple[int, ...], geometry: VolumeGeometry | PlaneGeometry, classes: tuple[str, ...]
) -> Iterator[ClassVolume]:
    """Open a class map of `shape` ([slices,] rows, columns) for writing in slice order; its colour table lies beside.

    Raises:
        ValueError: the block ends before the last slice.
        OutputError: the file cannot be written.
        MissingExtraError: nibabel is not installed.
    """
    image = _image(np.broadcast_to(np.uint8(0), shape[::-1]), geometry)
    image.header["scl_slope"], image.header["scl_inter"] = 1, 0
    image.header.set_intent(LABEL_INTENT, allow_unknown=True, name="classes")
    with complete_file(path) as final:
        with _packed(final, image) as packed:
            slices = Slices([packed], shape)
            yield ClassVolume(slices, classes)
        _demand_all(path, slices)
        with complete_file(path.with_name(path.name.removesuffix(SUFFIX) + legend.CTBL)) as table:
            table.write_text(legend.slicer_colours(classes), encoding="utf-8")


@contextmanager
def stream_chances(
    path: Path, shape: tuple[int, ...], geometry: VolumeGeometry | PlaneGeometry, classes: tuple[str, ...]
) -> Iterator[ChanceVolume]:
    """Open the probabilities of an image of `shape` for writing in slice order: a class is a "time point".

    Stored 0 to 250 mean 0 to 1 (`scl_slope` 1/250, so exact to 0.002). In the file each class is a volume of its own;
    slices come with all classes at once, so classes are kept in files beside it until the last slice.

    Raises:
        ValueError: the block ends before the last slice.
        OutputError: the file cannot be written.
        MissingExtraError: nibabel is not installed.
    """
    axes = shape[::-1] if len(shape) == 3 else (*shape[::-1], 1)
    image = _image(np.broadcast_to(np.uint8(0), (*axes, len(classes))), geometry)
    image.header["scl_slope"], image.header["scl_inter"] = 1 / CHANCE_STEPS, 0
    with complete_file(path) as final:
        parts = [final.with_name(f"class-{number}") for number in range(len(classes))]
        with ExitStack() as stack:
            slices = Slices([stack.enter_context(part.open("wb")) for part in parts], shape)
            yield ChanceVolume(slices)
        _demand_all(path, slices)
        with _packed(final, image) as packed:
            for part in parts:
                with part.open("rb") as file:
                    shutil.copyfileobj(file, packed, COPY_BYTES)
                part.unlink()


def write(path: Path, array: np.ndarray, geometry: VolumeGeometry | PlaneGeometry, classes: tuple[str, ...]) -> Path:
    """Write a class map, uint8 ([slices,] rows, columns).

    Raises:
        OutputError: the file cannot be written.
        MissingExtraError: nibabel is not installed.
    """
    with stream(path, array.shape, geometry, classes) as volume:
        volume.put(array)
    return path


def write_features(path: Path, array: np.ndarray, geometry: VolumeGeometry | PlaneGeometry) -> Path:
    """Write float32 (features, [slices,] rows, columns) as NIfTI with features on the fourth axis, one a "time point".

    Raises:
        OutputError: the file cannot be written.
    """
    axes = array.transpose()  # (column, row, [slice,] feature)
    return _save(_image(axes if array.ndim == 4 else axes[:, :, None, :], geometry), path)


@contextmanager
def _packed(path: Path, image: Any) -> Iterator[IO[bytes]]:
    """Open a compressed file that begins with an image's header; its voxels are the caller's to write."""
    image.header["vox_offset"], image.header["magic"] = VOXELS_AT, b"n+1"
    # No name and no time in the wrapper: the same voxels give the same bytes.
    with path.open("wb") as file, gzip.GzipFile("", "wb", GZIP_LEVEL, file, mtime=0) as packed:
        packed.write(image.header.binaryblock.ljust(VOXELS_AT, b"\0"))
        yield packed


def _demand_all(path: Path, slices: Slices) -> None:
    if slices.missing():
        raise ValueError(f"'{path.name}' lacks its last {slices.missing()} slices, which were not put")


def _image(axes: np.ndarray, geometry: VolumeGeometry | PlaneGeometry) -> Any:
    try:
        import nibabel
    except ImportError:
        raise MissingExtraError("writing NIfTI", "nibabel", "med") from None

    if isinstance(geometry, PlaneGeometry):
        return _plane(nibabel, axes, geometry)
    affine = LPS_TO_RAS @ geometry.affine[:, REVERSED]
    image = nibabel.Nifti1Image(axes, affine)
    image.set_sform(affine, code=SCANNER)
    directions = affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0)
    orthogonal = np.abs(directions.T @ directions - np.eye(3)).max() < SHEAR_TOLERANCE
    image.set_qform(affine if orthogonal else None, code=SCANNER if orthogonal else 0)
    image.header.set_xyzt_units("mm")
    return image


def _plane(nibabel: Any, axes: np.ndarray, geometry: PlaneGeometry) -> Any:
    """A projection has a pixel size at most, and no place: both transforms keep the code for "unknown"."""
    image = nibabel.Nifti1Image(axes, None)
    if geometry.spacing_mm is not None:
        row, column = geometry.spacing_mm
        image.header.set_zooms((column, row, *image.header.get_zooms()[2:]))
        image.header.set_xyzt_units("mm")
    return image


def _save(image: Any, path: Path) -> Path:
    with complete_file(path) as final:
        image.to_filename(final)
    return path
