"""What differs from frame to frame: place, rescale, timing, from functional groups or from the top level of a file.

Attributes and their types: PS3.3 C.7.6.2 (image plane), C.7.6.16 (functional groups), C.11.1 (modality LUT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.limits import MAX_FRAMES
from geomed_mae.readers.dicom.multiframe import dimension_indices, tomogram_frames
from geomed_mae.readers.dicom.private import component, is_echo_planar, label_type
from geomed_mae.readers.dicom.private import diffusion as private_diffusion
from geomed_mae.readers.dicom.values import Values
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
    "RealWorldValueMappingSequence",
    "CardiacSynchronizationSequence",
    "TemporalPositionSequence",
    "MRArterialSpinLabelingSequence",
)
"""Functional groups that are looked into; a frame's own group stands before the shared one (PS3.3 C.7.6.16.1)."""

UNITS = {"[hnsf'U]": "HU", "1": ""}
"""UCUM codes of real world values as RescaleType spells them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """One frame's place, rescale and what tells it from others at the same place. None is absent, NaN unreadable.

    `position` in mm, `spacing` (row, column) in mm, times in ms, `b_value` in s/mm^2. With `lut` the modality LUT
    stands for slope and intercept, and `rescale_type` is its ModalityLUTType. `component` is PHASE, REAL or IMAGINARY
    where an MR image is no magnitude; `pulse` holds codes of ScanningSequence and SequenceVariant (SE, GR, IR, EP, SP,
    ...), also where an enhanced object says them otherwise; `labelling` is LABEL or CONTROL (arterial spin labelling);
    `indices` are what else a multi-frame object tells its frames apart by.
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
    lut: bool
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
    trigger_ms: float | None
    component: str
    pulse: frozenset[str]
    flip_degrees: float | None
    labelling: str
    indices: tuple[int, ...] = ()


def frames_of(values: Values, *, floating: bool) -> tuple[tuple[Frame, ...], bool]:
    """Return the frames, and whether each has attributes of its own.

    Raises:
        ReadError: BAD_FRAMES, TOO_LARGE, BAD_RESCALE.
    """
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
        frame = _frame(values, {}, floating=floating)
        placed = tomogram_frames(values, frame, count) if "SliceVector" in values else None
        return placed or (frame,) * count, placed is not None
    shared = _groups(values.items("SharedFunctionalGroupsSequence"))
    groups = [{**shared, **_groups([item])} for item in per_frame]
    indices = dimension_indices(values, [group.get("FrameContentSequence", values) for group in groups])
    return (
        tuple(
            replace(_frame(values, group, floating=floating), indices=told)
            for group, told in zip(groups, indices, strict=True)
        ),
        True,
    )


def _groups(items: list[Values]) -> dict[str, Values]:
    found = {}
    for name in GROUPS:
        inner = items[0].items(name) if items else []
        if inner:
            found[name] = inner[0]
    return found


def _frame(values: Values, groups: dict[str, Values], *, floating: bool) -> Frame:
    """Describe one frame from its functional groups, or from the top level where it has none."""

    def at(group: str) -> Values:
        return groups.get(group, values)

    measures, content, rescale = (at(GROUPS[index]) for index in (3, 0, 4))
    echo, timing, diffusion = at("MREchoSequence"), at("MRTimingAndRelatedParametersSequence"), at(GROUPS[8])
    kind = groups.get("MRImageFrameTypeSequence") or groups.get("CTImageFrameTypeSequence") or values
    directions = diffusion.items("DiffusionGradientDirectionSequence") or [diffusion]
    weight, gradient = diffusion.double("DiffusionBValue"), directions[0].doubles("DiffusionGradientOrientation")
    if weight is None and not groups:
        weight, gradient = private_diffusion(values)
    types = kind.texts("FrameType") or values.texts("ImageType")
    slope, intercept, unit = _real_world(at("RealWorldValueMappingSequence")) if floating else _rescale(rescale)
    # There is no functional group for it: at the top level, it holds for every frame.
    lut = not floating and bool(values.raw("ModalityLUTSequence"))
    if lut and (slope, intercept) != (1.0, 0.0):
        raise ReadError("a modality LUT and a rescale contradict each other", Reason.BAD_RESCALE.name)
    if lut:
        unit = values.items("ModalityLUTSequence")[0].text("ModalityLUTType").upper() or "US"
    return Frame(
        position=at("PlanePositionSequence").numbers("ImagePositionPatient"),
        orientation=at("PlaneOrientationSequence").numbers("ImageOrientationPatient"),
        spacing=measures.numbers("PixelSpacing"),
        thickness_mm=positive(measures.number("SliceThickness")),
        slice_spacing_mm=positive(measures.number("SpacingBetweenSlices")),
        slope=slope,
        intercept=intercept,
        rescaled=lut or floating or "RescaleSlope" in rescale,
        rescale_type=unit,
        lut=lut,
        stack=content.text("StackID"),
        frame_type=types,
        contrast=kind.text("AcquisitionContrast").upper(),
        temporal=str(
            _first(
                content.whole("TemporalPositionIndex"),
                at("TemporalPositionSequence").double("TemporalPositionTimeOffset"),
                values.text("TemporalPositionIdentifier"),
            )
        ),
        b_value=weight,
        gradient=gradient,
        echo_time_ms=_first(positive(echo.double("EffectiveEchoTime")), positive(values.number("EchoTime"))),
        repetition_time_ms=positive(timing.number("RepetitionTime")),
        inversion_time_ms=_first(
            positive(at("MRModifierSequence").double("InversionTimes")), positive(values.number("InversionTime"))
        ),
        acquired=content.text("FrameAcquisitionDateTime")
        or values.text("AcquisitionDateTime")
        or values.text("AcquisitionDate") + values.text("AcquisitionTime"),
        trigger_ms=_first(
            at("CardiacSynchronizationSequence").double("NominalCardiacTriggerDelayTime"), values.number("TriggerTime")
        ),
        component=component(values, types, kind.text("ComplexImageComponent").upper()),
        pulse=_pulse(values, at("MRModifierSequence")),
        flip_degrees=timing.number("FlipAngle"),
        labelling=at("MRArterialSpinLabelingSequence").text("ASLContext").upper() or label_type(values),
    )


def _pulse(values: Values, modifier: Values) -> frozenset[str]:
    """Return the codes of the pulse sequence: those of classic MR, and those that mean the same in enhanced MR.

    PS3.3 C.8.3.1 (ScanningSequence, SequenceVariant), C.8.13.4 (MR pulse sequence), C.8.13.5.5 (MR modifier).
    """
    codes = {*values.texts("ScanningSequence"), *values.texts("SequenceVariant")}
    echo = values.text("EchoPulseSequence").upper()
    codes |= {"SE"} if echo in ("SPIN", "BOTH") else set()
    codes |= {"GR"} if echo in ("GRADIENT", "BOTH") else set()
    if values.text("EchoPlanarPulseSequence").upper() == "YES" or is_echo_planar(values):
        codes.add("EP")
    if modifier.text("InversionRecovery").upper() == "YES":
        codes.add("IR")
    if modifier.text("Spoiling").upper() in ("RF", "RF_AND_GRADIENT"):
        codes.add("SP")
    return frozenset(codes)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _real_world(values: Values) -> tuple[float, float, str]:
    """Return (slope, intercept, unit) of a floating point image's real world values (PS3.3 C.7.6.16.2.11)."""
    units = values.items("MeasurementUnitsCodeSequence")
    code = units[0].text("CodeValue") if units else "unknown"
    pair = []
    for keyword, default in (("RealWorldValueSlope", 1.0), ("RealWorldValueIntercept", 0.0)):
        value = values.double(keyword) if keyword in values else default
        if value is None or not math.isfinite(value) or (keyword == "RealWorldValueSlope" and value == 0):
            raise ReadError(f"{keyword} is not a usable number", Reason.BAD_RESCALE.name)
        pair.append(value)
    return pair[0], pair[1], UNITS.get(code, code.upper())


def _rescale(values: Values) -> tuple[float, float, str]:
    """Return (slope, intercept, unit) of PS3.3 C.11.1; identity where the file declares none."""
    pair = []
    for keyword, default in (("RescaleSlope", 1.0), ("RescaleIntercept", 0.0)):
        value = values.number(keyword) if keyword in values else default
        if value is None or not math.isfinite(value) or (keyword == "RescaleSlope" and value == 0):
            raise ReadError(f"{keyword} is not a usable number", Reason.BAD_RESCALE.name)
        pair.append(value)
    return pair[0], pair[1], values.text("RescaleType").upper()


def positive(value: float | None) -> float | None:
    """Return a number that is finite and above zero, None for anything else."""
    return value if value is not None and math.isfinite(value) and value > 0 else None
