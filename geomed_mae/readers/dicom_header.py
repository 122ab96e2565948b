"""What one DICOM file says about itself, from a whitelist of attributes and without reading pixels.

Attributes and their types: PS3.3 C.7.6.3 (image pixel), C.7.6.2 (image plane), C.7.6.16 (functional groups).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom_file import EXPLICIT_BIG, PARSE_ERRORS, Opened, open_dicom, quiet
from geomed_mae.readers.dicom_limits import MAX_FRAMES, check_kind, check_pixels
from geomed_mae.readers.dicom_values import Values
from geomed_mae.readers.reasons import Reason

GROUPS = (
    "FrameContentSequence",
    "PlanePositionSequence",
    "PlaneOrientationSequence",
    "PixelMeasuresSequence",
    "PixelValueTransformationSequence",
    "MREchoSequence",
    "MRTimingAndRelatedParametersSequence",
    "MRModifierSequence",
    "MRDiffusionSequence",
    "MRImageFrameTypeSequence",
    "CTImageFrameTypeSequence",
)
"""Functional groups that are looked into; a frame's own group stands before the shared one (PS3.3 C.7.6.16.1)."""

REQUIRED = (
    "Rows",
    "Columns",
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "HighBit",
    "PixelRepresentation",
)
"""Type 1 attributes of the image pixel module without which samples cannot be told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame's place, rescale and what tells it from others at the same place. None is absent, NaN unreadable.

    `position` in mm, `spacing` (row, column) in mm, times in ms, `b_value` in s/mm^2.
    """

    position: tuple[float, ...] | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness_mm: float | None
    slice_spacing_mm: float | None
    slope: float
    intercept: float
    rescaled: bool
    rescale_type: str
    stack: str
    frame_type: tuple[str, ...]
    contrast: str
    temporal: str
    b_value: float | None
    gradient: tuple[float, ...] | None
    echo_time_ms: float | None
    repetition_time_ms: float | None
    inversion_time_ms: float | None
    acquired: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The whitelist of one file. UIDs and patient identifiers are private: for grouping and keyed hashes only."""

    path: Path
    syntax: str
    flags: tuple[str, ...]
    modality: str
    sop_class: str
    sop_uid: str
    series_uid: str
    study_uid: str
    frame_uid: str
    patient: str
    image_type: tuple[str, ...]
    burned_in: str
    rows: int
    columns: int
    samples: int
    bits_allocated: int
    bits_stored: int
    high_bit: int
    signed: bool
    photometric: str
    frames: tuple[Frame, ...]
    grouped: bool
    imager_spacing: tuple[float, ...] | None
    padding: tuple[int, int] | None
    instance: int | None
    acquisition: str
    content_time: str
    trigger_time: float | None
    scanning: tuple[str, ...]
    variant: tuple[str, ...]
    flip_angle: float | None
    contrast_agent: bool
    tube_kv: float | None
    units: str

    @property
    def dtype(self) -> str:
        """Numpy name of the stored samples."""
        return f"{'' if self.signed else 'u'}int{self.bits_allocated}"


def read_header(path: Path) -> Header:
    """Read one file's header.

    Raises:
        ReadError: NOT_DICOM, MALFORMED, NON_IMAGE, NO_PIXEL_DATA, MISSING_TAG, BAD_FRAMES, TOO_LARGE, LENGTH_MISMATCH,
            TRUNCATED, DTYPE_UNSUPPORTED, BAD_RESCALE, DEFLATE_LIMIT; the text names attributes, never their contents
            where these could identify a person.
    """
    return parse_header(open_dicom(path, pixels=False), path)


def parse_header(opened: Opened, path: Path) -> Header:
    """Turn an opened file into a Header, checked against the limits and the length of its pixel data.

    Raises:
        ReadError: as `read_header`.
    """
    try:
        with quiet():
            values = Values(opened.dataset, big=opened.syntax == EXPLICIT_BIG)
            # The file meta's copy first: it is whole even where the file is cut soon after.
            sop_class = str(opened.dataset.file_meta.get("MediaStorageSOPClassUID", "")) or values.text("SOPClassUID")
            check_kind(sop_class, values.text("Modality").upper(), opened)
            missing = [keyword for keyword in REQUIRED if not _present(values, keyword)]
            if missing:
                raise ReadError(f"{missing[0]} is missing", Reason.MISSING_TAG.name)
            header = _header(values, opened, path, sop_class)
        check_pixels(header, opened)
        return header
    except PARSE_ERRORS as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"the DICOM structure does not parse ({type(error).__name__})", Reason.MALFORMED.name) from None


def _present(values: Values, keyword: str) -> bool:
    if keyword == "PhotometricInterpretation":
        return bool(values.text(keyword))
    return values.whole(keyword) is not None


def _header(values: Values, opened: Opened, path: Path, sop_class: str) -> Header:
    patient, issuer = values.text("PatientID"), values.text("IssuerOfPatientID")
    padding = values.whole("PixelPaddingValue")
    limit = values.whole("PixelPaddingRangeLimit")
    instance = values.number("InstanceNumber")
    frames, grouped = _frames(values)
    return Header(
        path=path,
        syntax=opened.syntax,
        flags=opened.flags,
        modality=values.text("Modality").upper(),
        sop_class=sop_class,
        sop_uid=values.text("SOPInstanceUID"),
        series_uid=values.text("SeriesInstanceUID"),
        study_uid=values.text("StudyInstanceUID"),
        frame_uid=values.text("FrameOfReferenceUID"),
        patient=f"{patient}|{issuer}" if patient else "",
        image_type=values.texts("ImageType"),
        burned_in=values.text("BurnedInAnnotation").upper(),
        rows=_whole(values, "Rows"),
        columns=_whole(values, "Columns"),
        samples=_whole(values, "SamplesPerPixel"),
        bits_allocated=_whole(values, "BitsAllocated"),
        bits_stored=_whole(values, "BitsStored"),
        high_bit=_whole(values, "HighBit"),
        signed=_whole(values, "PixelRepresentation") == 1,
        photometric=values.text("PhotometricInterpretation").upper(),
        frames=frames,
        grouped=grouped,
        imager_spacing=values.numbers("ImagerPixelSpacing"),
        padding=None if padding is None else (padding, padding if limit is None else limit),
        instance=int(instance) if instance is not None and math.isfinite(instance) else None,
        acquisition=values.text("AcquisitionNumber"),
        content_time=values.text("ContentTime"),
        trigger_time=values.number("TriggerTime"),
        scanning=values.texts("ScanningSequence"),
        variant=values.texts("SequenceVariant"),
        flip_angle=values.number("FlipAngle"),
        contrast_agent=bool(values.text("ContrastBolusAgent")),
        tube_kv=_positive(values.number("KVP")),
        units=values.text("Units").upper(),
    )


def _whole(values: Values, keyword: str) -> int:
    value = values.whole(keyword)
    if value is None:
        raise ReadError(f"{keyword} is missing", Reason.MISSING_TAG.name)
    return value


def _positive(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and value > 0 else None


def _frames(values: Values) -> tuple[tuple[Frame, ...], bool]:
    """Return the frames, and whether functional groups describe them."""
    count = 1
    if "NumberOfFrames" in values and (text := values.text("NumberOfFrames")):
        count = int(text) if text.isdecimal() and len(text) < 10 else 0
        if count < 1:
            raise ReadError("NumberOfFrames is not a positive number", Reason.BAD_FRAMES.name)
    if count > MAX_FRAMES:
        raise ReadError(f"{count} frames, the limit is {MAX_FRAMES}", Reason.TOO_LARGE.name)
    per_frame = values.items("PerFrameFunctionalGroupsSequence")
    if per_frame and len(per_frame) != count:
        raise ReadError(f"{len(per_frame)} functional groups describe {count} frames", Reason.BAD_FRAMES.name)
    if not per_frame:
        return (_frame(values, {}),) * count, False
    shared = _groups(values.items("SharedFunctionalGroupsSequence"))
    return tuple(_frame(values, {**shared, **_groups([item])}) for item in per_frame), True


def _groups(items: list[Values]) -> dict[str, Values]:
    found = {}
    for name in GROUPS:
        inner = items[0].items(name) if items else []
        if inner:
            found[name] = inner[0]
    return found


def _frame(values: Values, groups: dict[str, Values]) -> Frame:
    """Describe one frame from its functional groups, or from the top level where it has none."""

    def at(group: str) -> Values:
        return groups.get(group, values)

    measures, content, rescale = (at(GROUPS[index]) for index in (3, 0, 4))
    echo, timing, diffusion = at("MREchoSequence"), at("MRTimingAndRelatedParametersSequence"), at(GROUPS[8])
    kind = groups.get("MRImageFrameTypeSequence") or groups.get("CTImageFrameTypeSequence") or values
    directions = diffusion.items("DiffusionGradientDirectionSequence") or [diffusion]
    slope, intercept = _rescale(rescale)
    return Frame(
        position=at("PlanePositionSequence").numbers("ImagePositionPatient"),
        orientation=at("PlaneOrientationSequence").numbers("ImageOrientationPatient"),
        spacing=measures.numbers("PixelSpacing"),
        thickness_mm=_positive(measures.number("SliceThickness")),
        slice_spacing_mm=_positive(measures.number("SpacingBetweenSlices")),
        slope=slope,
        intercept=intercept,
        rescaled="RescaleSlope" in rescale,
        rescale_type=rescale.text("RescaleType").upper(),
        stack=content.text("StackID"),
        frame_type=kind.texts("FrameType") or values.texts("ImageType"),
        contrast=kind.text("AcquisitionContrast").upper(),
        temporal=str(_first(content.whole("TemporalPositionIndex"), values.text("TemporalPositionIdentifier"))),
        b_value=diffusion.double("DiffusionBValue"),
        gradient=directions[0].doubles("DiffusionGradientOrientation"),
        echo_time_ms=_first(_positive(echo.double("EffectiveEchoTime")), _positive(values.number("EchoTime"))),
        repetition_time_ms=_positive(timing.number("RepetitionTime")),
        inversion_time_ms=_first(
            _positive(at("MRModifierSequence").double("InversionTimes")), _positive(values.number("InversionTime"))
        ),
        acquired=content.text("FrameAcquisitionDateTime")
        or values.text("AcquisitionDateTime")
        or values.text("AcquisitionDate") + values.text("AcquisitionTime"),
    )


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _rescale(values: Values) -> tuple[float, float]:
    """Return (slope, intercept) of PS3.3 C.11.1; identity where the file declares none."""
    if "ModalityLUTSequence" in values and not values.text("RescaleSlope"):
        raise ReadError("a modality LUT, which is not read, stands for the rescale", Reason.BAD_RESCALE.name)
    pair = []
    for keyword, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        value = values.number(keyword) if keyword in values else default
        if value is None or not math.isfinite(value) or (keyword == "RescaleSlope" and value == 0):
            raise ReadError(f"{keyword} is not a usable number", Reason.BAD_RESCALE.name)
        pair.append(value)
    return pair[0], pair[1]
