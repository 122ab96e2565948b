"""Pixel spacing of an image without a place in the patient: radiographs, captures, ultrasound. mm, (row, column).

PS3.3 10.7.1.3 tells PixelSpacing (in the patient, calibrated) from ImagerPixelSpacing (at the detector, larger than in
the patient by the magnification); C.8.5.5 gives ultrasound its regions. What contradicts itself is not known: None.
"""

from __future__ import annotations

import math

from geomed_mae.readers.dicom.values import Values

TWO_DIMENSIONAL = 1
"""RegionSpatialFormat (0018,6012) of an image; spectra, M-mode, waveforms and graphics have other values."""

CENTIMETRES = 3
"""PhysicalUnitsXDirection and YDirection (0018,6024 and 6026), PS3.3 table C.8-17."""

REGION_TOLERANCE = 1e-4
"""Largest relative difference of the spacing of regions that agree."""


def plane_spacing(values: Values, *, pixel_spacing: tuple[float, ...] | None) -> tuple[float, ...] | None:
    """Return the spacing of a 2D image; None where it is not stated, NaN inside where it is unreadable.

    PixelSpacing first; where it only repeats ImagerPixelSpacing it is not calibrated (PS3.3 10.7.1.3) and is divided by
    EstimatedRadiographicMagnificationFactor as that is. Then ImagerPixelSpacing, NominalScannedPixelSpacing, and the
    regions of an ultrasound image.

    Args:
        values: the attributes at the place where the frame has them.
        pixel_spacing: of the frame, from wherever its functional groups have it.
    """
    pixels = _first_group(values, "FramePixelDataPropertiesSequence")
    imager = pixels.numbers("ImagerPixelSpacing") or values.numbers("ImagerPixelSpacing")
    factor = _magnification(values)
    if pixel_spacing is not None and pixel_spacing != imager:
        return pixel_spacing
    if imager is not None:
        return tuple(value / factor for value in imager)
    return values.numbers("NominalScannedPixelSpacing") or _region_spacing(values)


def _first_group(values: Values, keyword: str) -> Values:
    """Return the item of a functional group, shared by all frames, or of the top level."""
    for place in (*values.items("SharedFunctionalGroupsSequence")[:1], values):
        if found := place.items(keyword):
            return found[0]
    return values


def _magnification(values: Values) -> float:
    """Return how much larger the detector's image is than the patient, at least 1; 1 where unknown or impossible."""
    keyword = "EstimatedRadiographicMagnificationFactor"
    geometry = _first_group(values, "XRayGeometrySequence")
    factor = geometry.number(keyword) if keyword in geometry else values.number(keyword)
    return factor if factor is not None and math.isfinite(factor) and factor >= 1 else 1.0


def _region_spacing(values: Values) -> tuple[float, float] | None:
    found = []
    for region in values.items("SequenceOfUltrasoundRegions"):
        if region.whole("RegionSpatialFormat") != TWO_DIMENSIONAL:
            continue
        units = (region.whole("PhysicalUnitsYDirection"), region.whole("PhysicalUnitsXDirection"))
        deltas = (region.double("PhysicalDeltaY"), region.double("PhysicalDeltaX"))
        if units != (CENTIMETRES, CENTIMETRES) or any(not _usable(delta) for delta in deltas):
            return None
        found.append((10 * abs(deltas[0]), 10 * abs(deltas[1])))
    if not found:
        return None
    agree = all(
        abs(one / first - 1) <= REGION_TOLERANCE for pair in found for one, first in zip(pair, found[0], strict=True)
    )
    return found[0] if agree else None


def _usable(delta: float | None) -> bool:
    return delta is not None and math.isfinite(delta) and delta != 0
