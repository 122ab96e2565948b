"""Frames of multi-frame objects told apart: dimension indices of enhanced ones, index vectors of nuclear medicine.

Dimension indices: PS3.3 C.7.6.17. Nuclear medicine: PS3.3 C.8.4.8 (vectors), C.8.4.11 (detectors), C.8.4.15
(reconstructed tomograms: the first slice has the detector's position, the others follow at SpacingBetweenSlices along
the normal, against it where the spacing is negative).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from geomed_mae.readers.dicom.geometry import SPACING_MM, normal_of, slice_error

if TYPE_CHECKING:
    from geomed_mae.readers.dicom.frames import Frame
    from geomed_mae.readers.dicom.values import Values

SPATIAL_POINTERS = frozenset({0x00209057, 0x00209056, 0x00200032, 0x00200037, 0x00209113, 0x00209116, 0x00201041})
"""Dimensions that say where a frame lies, which its position and orientation say better: InStackPositionNumber,
StackID, ImagePositionPatient, ImageOrientationPatient, their sequences, SliceLocation."""

NUCLEAR_VECTORS = ("EnergyWindowVector", "PhaseVector", "RRIntervalVector", "TimeSlotVector", "TimeSliceVector")
"""Vectors that tell frames at one place apart."""


def dimension_indices(values: Values, contents: Sequence[Values]) -> list[tuple[int, ...]]:
    """Return per frame the indices of the dimensions that are not spatial, () where the file has none that fit."""
    pointers = []
    for item in values.items("DimensionIndexSequence"):
        words = item.words("DimensionIndexPointer") or ()
        pointers.append(words[0] << 16 | words[1] if len(words) == 2 else 0)
    kept = [number for number, pointer in enumerate(pointers) if pointer not in SPATIAL_POINTERS]
    found = []
    for content in contents:
        raw = content.raw("DimensionIndexValues")
        if not kept or len(raw) != 4 * len(pointers):
            found.append(())
            continue
        indices = struct.unpack(f"{'>' if content.big else '<'}{len(pointers)}L", raw)
        found.append(tuple(indices[number] for number in kept))
    return found


def tomogram_frames(values: Values, frame: Frame, count: int) -> tuple[Frame, ...] | None:
    """Return the frames of a reconstructed tomogram of nuclear medicine, placed; None for anything else."""
    detectors = values.items("DetectorInformationSequence")
    slices = values.words("SliceVector")
    spacing = values.number("SpacingBetweenSlices")
    tomogram = any(kind.startswith("RECON") and kind.endswith("TOMO") for kind in values.texts("ImageType"))
    if not tomogram or len(detectors) != 1 or slices is None or len(slices) != count:
        return None
    position = detectors[0].numbers("ImagePositionPatient")
    orientation = detectors[0].numbers("ImageOrientationPatient")
    if slice_error(orientation, position, frame.spacing) or spacing is None:
        return None
    if not SPACING_MM[0] <= abs(spacing) <= SPACING_MM[1]:
        return None
    vectors = [vector for name in NUCLEAR_VECTORS if (vector := values.words(name)) and len(vector) == count]
    step = normal_of(orientation) * spacing
    return tuple(
        replace(
            frame,
            position=tuple((np.asarray(position) + (slices[number] - 1) * step).tolist()),
            orientation=orientation,
            slice_spacing_mm=abs(spacing),
            indices=tuple(vector[number] for vector in vectors),
        )
        for number in range(count)
    )
