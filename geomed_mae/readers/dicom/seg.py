"""DICOM SEG: frames of segments become class numbers on an image's voxels (PS3.3 C.8.20).

Every frame is placed by its own position, orientation and spacing on the voxels of the image, so that order, missing
frames (writers leave empty ones out: they are background), flips, other slice directions and gantry tilt need no care.
A frame must fall onto voxels of the image, within `label_grid.tolerance_mm`. Segmentations of projections and
photographs have no place in space; their frames belong to the image by SOP instance (and frame number) and must have
its Rows and Columns.

pydicom's codecs decode, and highdicom is the oracle of the tests and not the parser: it refuses SEGs without a frame of
reference, and its volumes do not exist for tilted series, which are placed here frame by frame.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, VolumeGeometry
from geomed_mae.readers.dicom.file import Opened
from geomed_mae.readers.dicom.geometry import position_error
from geomed_mae.readers.dicom.seg_frames import NOTHING, Segmentation
from geomed_mae.readers.label_grid import tolerance_mm
from geomed_mae.readers.labels import ClassNumbers, LabelQuery, Labels
from geomed_mae.readers.reasons import Reason


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where a frame lies in the image's index space: voxel (3,) of its first pixel, steps (3,) per row and column."""

    start: np.ndarray
    down: np.ndarray
    right: np.ndarray


def read_segments(opened: Opened, onto: Image, query: LabelQuery, place: str) -> Labels:
    """Return class numbers int16 ([Z,] Y, X) of the segments of a SEG on the grid of `onto`.

    Raises:
        ReadError: BAD_GEOMETRY, CLASS_UNKNOWN, MISSING_TAG, BAD_FRAMES, TOO_LARGE, TRUNCATED, LENGTH_MISMATCH,
            DTYPE_UNSUPPORTED, CODEC_MISSING, DECODE_FAILED or MALFORMED; the text starts with `place`.
    """
    seg = Segmentation(opened, place)
    numbers = ClassNumbers(query, place)
    volume = isinstance(onto.geometry, VolumeGeometry)
    painted = np.full(onto.spatial_shape if volume else (1, *onto.spatial_shape), NOTHING, np.int16)
    locate = _Locator(seg, onto, query)
    outside, touched = 0, False
    for frame in range(seg.frames):
        where = locate(frame)
        if where is None:
            continue
        pixels = seg.classes(frame, numbers)
        if pixels is None:
            touched |= _paint(painted, np.full((seg.rows, seg.columns), NOTHING, np.int16), where)[0]
            continue
        inside, left_out = _paint(painted, pixels, where)
        touched |= inside
        outside += left_out
    if not touched:
        raise ReadError(f"the labels of {place} do not overlap the image", Reason.BAD_GEOMETRY.name)
    painted[painted == NOTHING] = numbers.background
    counts = (("label_voxels_outside_image", outside),)
    return Labels(painted if volume else painted[0], numbers.names, counts)


def _paint(painted: np.ndarray, pixels: np.ndarray, where: _Place) -> tuple[bool, int]:
    """Put a frame onto the voxels, higher numbers on top; return whether it touches, and how many labels lie off."""
    row_axis, column_axis = int(np.flatnonzero(where.down)[0]), int(np.flatnonzero(where.right)[0])
    depth_axis = 3 - row_axis - column_axis
    labelled = int(np.count_nonzero(pixels != NOTHING))
    depth = int(where.start[depth_axis])
    rows, in_rows = _overlap(
        int(where.start[row_axis]), int(where.down[row_axis]), painted.shape[row_axis], len(pixels)
    )
    columns, in_columns = _overlap(
        int(where.start[column_axis]), int(where.right[column_axis]), painted.shape[column_axis], pixels.shape[1]
    )
    kept = pixels[in_rows, in_columns]
    if not 0 <= depth < painted.shape[depth_axis] or kept.size == 0:
        return False, labelled
    plane = np.moveaxis(painted, depth_axis, 0)[depth]
    target = (plane if row_axis < column_axis else plane.T)[rows, columns]
    np.maximum(target, kept, out=target)
    return True, labelled - (labelled if kept.size == pixels.size else int(np.count_nonzero(kept != NOTHING)))


def _overlap(start: int, step: int, size: int, count: int) -> tuple[slice, slice]:
    """Return which of `size` voxels, in ascending order, meet which of `count` pixels at start + n * step (1 or -1)."""
    if step > 0:
        first, last = max(start, 0), min(start + count, size)
        return slice(first, max(last, first)), slice(first - start, max(last, first) - start)
    first, last = max(start - count + 1, 0), min(start + 1, size)
    if first >= last:
        return slice(0, 0), slice(0, 0)
    stop = start - last  # the pixel before the one that meets the highest voxel
    return slice(first, last), slice(start - first, stop if stop >= 0 else None, -1)


class _Locator:
    """Says where each frame of a SEG lies on the image, None for one that belongs to another image."""

    def __init__(self, seg: Segmentation, onto: Image, query: LabelQuery) -> None:
        self._seg, self._shape = seg, onto.spatial_shape
        self._instances = [value for kind, value in query.identity if kind == "instance"]
        self._affine = onto.geometry.affine if isinstance(onto.geometry, VolumeGeometry) else None
        self._inverse = None if self._affine is None else np.linalg.inv(self._affine)
        if self._affine is None and not self._instances:
            raise ReadError(
                f"{seg.place} can only belong to the image by its SOP instance, which the image does not say",
                Reason.BAD_GEOMETRY.name,
            )

    def __call__(self, frame: int) -> _Place | None:
        """Raises ReadError: BAD_GEOMETRY, when a frame falls between voxels or its place is unknown."""
        position = None if self._affine is None else self._seg.position(frame)
        return self._by_instance(frame) if position is None else self._by_position(frame, position)

    def _by_position(self, frame: int, position: Sequence[float]) -> _Place:
        place, affine = self._seg.place, self._affine
        if problem := position_error(position):
            raise ReadError(f"{place}: {problem}", Reason.BAD_GEOMETRY.name)
        down, right = self._seg.steps(frame)
        exact = self._inverse[:3, :3] @ np.stack([np.array(position), down, right], axis=1)
        exact[:, 0] += self._inverse[:3, 3]
        whole = np.rint(exact)
        axes = np.abs(whole[:, 1:])
        last_row, last_column = self._seg.rows - 1, self._seg.columns - 1
        ends = np.array([[1, r, c] for r in (0, last_row) for c in (0, last_column)]).T
        apart = np.linalg.norm(affine[:3, :3] @ ((exact - whole) @ ends), axis=0).max()
        if not (np.array_equal(axes.sum(axis=0), [1, 1]) and axes.sum(axis=1).max() == 1):
            raise ReadError(
                f"the grid of {place} differs from the image's in its pixel spacing or orientation; make the "
                "segmentation on this image, or resample it",
                Reason.BAD_GEOMETRY.name,
            )
        if apart > tolerance_mm(affine):
            raise ReadError(
                f"frame {frame + 1} of {place} lies {apart:.3f} mm beside the voxels of the image; make the "
                "segmentation on this image, or resample it",
                Reason.BAD_GEOMETRY.name,
            )
        start, down, right = whole.T.astype(np.int64)
        return _Place(start, down, right)

    def _by_instance(self, frame: int) -> _Place | None:
        """Place a frame by the instance that it refers to: a plane, or a slice of a volume of single-frame files."""
        seg = self._seg
        wanted = seg.sources(frame)
        if not wanted:
            raise ReadError(f"frame {frame + 1} of {seg.place} says nowhere where it lies", Reason.BAD_GEOMETRY.name)
        if self._affine is None:
            if not any(_is_one_of(uid, number, self._instances) for uid, number in wanted):
                return None
            plane = 0
        else:
            # Whole files come once, in the order of their slices; frames of a file come with their numbers.
            listed = [value for value in self._instances if "#" not in value]
            listed = listed if len(listed) == self._shape[0] else [v for v in self._instances if "#" in v]
            found = {
                listed.index(name) for uid, number in wanted for name in (uid, f"{uid}#{number}") if name in listed
            }
            if len(listed) != self._shape[0] or len(found) > 1:
                raise ReadError(
                    f"frame {frame + 1} of {seg.place} has no position, and no one slice it belongs to",
                    Reason.BAD_GEOMETRY.name,
                )
            if not found:
                return None
            plane = found.pop()
        if (seg.rows, seg.columns) != tuple(self._shape[-2:]):
            raise ReadError(
                f"{seg.place} has {seg.rows} x {seg.columns} pixels, the image that it refers to "
                f"{self._shape[-2]} x {self._shape[-1]}",
                Reason.BAD_GEOMETRY.name,
            )
        return _Place(*np.array([[plane, 0, 0], [0, 1, 0], [0, 0, 1]]))


def _is_one_of(uid: str, number: int | None, instances: Sequence[str]) -> bool:
    """Say whether a reference means an image whose instances are given, with "#frame" where it is one of several."""
    numbered = any(value.startswith(f"{uid}#") for value in instances)
    return f"{uid}#{number}" in instances if numbered and number is not None else uid in instances
