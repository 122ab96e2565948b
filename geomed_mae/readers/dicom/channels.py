"""What a DICOM image's numbers mean: its Channel, from the physics that the header states.

An MR image is named T1, T1C, T2, FLAIR, PD or DWI where repetition, echo and inversion times decide it, and MR where
they do not: a wrong name is worse than none, since times travel with the channel anyway. Echo planar images are DWI or
MR, diffusion series without weighting among them: their contrast is T2* or T2 with distortions that no T2 image has.
Contrast from TR and TE: Nitz and Reimer, "Contrast mechanisms in MR imaging", Eur Radiol 9 (1999) 1032. The limits
below are the usual clinical ones (short TR under about 500 to 800 ms, long over 1500 ms; short TE under 30 ms, long
over 60 to 90 ms: IMAIOS e-MRI, "Signal weighting"), with the doubtful zones between them left unnamed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from geomed_mae.image import Channel
from geomed_mae.modalities import Modality
from geomed_mae.readers.dicom.image_header import Frame, Header

SHORT_TR_MS, LONG_TR_MS = 1000.0, 1500.0
"""Spin echo: T1 weighting below the first, proton density or T2 weighting above the second."""

SHORT_TE_MS, LONG_TE_MS = 30.0, 60.0
"""Spin echo: T1 or proton density weighting up to the first, T2 weighting from the second."""

FLAIR_TI_MS, FLAIR_TR_MS = 1500.0, 4000.0
"""Inversion that nulls cerebrospinal fluid needs at least these."""

T1_TI_MS = (500.0, 1500.0)
"""Inversion times of T1-weighted prepared gradient echo (MPRAGE and its kin)."""

SPOILED_TE_MS, SPOILED_TR_MS = 10.0, 300.0
"""A spoiled gradient echo with both shorter than this is T1-weighted."""

TISSUE_T1_MS = 1000.0
"""Relaxation time of soft tissue at 1.5 to 3 T, for its Ernst angle (Ernst and Anderson, Rev Sci Instrum 37 (1966) 93):
a spoiled gradient echo of a smaller flip angle is weighted by proton density, of a larger one by T1."""

SATURATING_FLIP_DEGREES = 60.0
"""From this flip angle on, a repetition time below SHORT_TR_MS saturates tissue, whatever refocuses the echo."""

DIFFUSION_B = 50.0
"""s/mm^2; what is acquired with less is the unweighted image of a diffusion series."""

ACQUISITION_CONTRAST = {"T1": "T1", "T2": "T2", "PROTON_DENSITY": "PD", "FLUID_ATTENUATED": "FLAIR"}
"""AcquisitionContrast (0008,9209) of enhanced MR, PS3.3 C.8.13.3.1.3, where it names a weighting. Vendors write it by
the protocol, so that field maps are T1 and BOLD series T2: it decides where the times leave doubt, never against them.
"""

DIFFUSION_CONTRAST = "DIFFUSION"
"""AcquisitionContrast of a diffusion series, also of its images without weighting."""

UNSAID = frozenset({"", "UNKNOWN"})
"""Values of AcquisitionContrast that say nothing; any other one outside ACQUISITION_CONTRAST says "no weighting"."""

KINDS = {"CT": "ct", "MR": "mr", "PT": "pet"}
"""Kind of channel by DICOM's Modality, where a modality file has several kinds."""

PARAMETER_MAPS = frozenset(
    {"ADC", "ADC UNSPECIFIED", "FA", "CBF", "CBV", "MTT", "TTP", "RCBV", "RCBF", "RMTT", "KTRANS", "SWI", "TENSOR"}
    | {"TENSOR_B0", "PHASE", "REAL", "IMAGINARY", "MIP", "PROJECTION IMAGE", "SUBTRACTION", "SUBTRACT", "SUB"}
    | {"WATER", "FAT", "IN_PHASE", "OUT_PHASE"}
)
"""Values of ImageType or FrameType from the second on that name no weighting: maps and images computed from several."""

PET_UNITS = {"BQML": "Bq/ml", "GML": "g/ml", "CNTS": "counts", "CPS": "counts/s", "CM2ML": "cm2/ml", "PCNT": "%"}
"""Units (0054,1001) of PS3.3 C.8.9.1.1.3 as we spell them; GML is a standardised uptake value. A header's `factor`
has a unit of its own, g/ml where the series allows SUV (see `dicom.suv`)."""


def plain_channel(header: Header, modality: Modality) -> Channel:
    """Return the modality's channel for an image, without what its header adds.

    A modality that binds series has channels of several kinds; any other one has one channel, or none.
    """
    fallback = modality.channels[0] if modality.channels else Channel(name=modality.name, unit=modality.unit)
    kind = KINDS.get(header.modality)
    return next((channel for channel in modality.channels if channel.kind == kind), fallback)


def channel_of(header: Header, frame: Frame, modality: Modality) -> Channel:
    """Describe the one channel of an image from one of its slices."""
    base = plain_channel(header, modality)
    if base.kind == "ct":
        return replace(base, tube_kv=header.tube_kv)
    if base.kind == "xray":
        return replace(base, tube_kv=header.tube_kv)
    if base.kind == "pet":
        return replace(base, unit=header.factor[1] if header.factor else PET_UNITS.get(header.units, "unknown"))
    if base.kind == "mr":
        name = mr_name(header, frame)
        return replace(
            base,
            name=name,
            sequence=None if name == "MR" else name,
            echo_time_ms=frame.echo_time_ms,
            repetition_time_ms=frame.repetition_time_ms,
            inversion_time_ms=frame.inversion_time_ms,
        )
    return base


def with_diffusion(headers: Sequence[Header]) -> Sequence[Header]:
    """Mark the slices without weighting in a diffusion series as such: vendors do not, and by their times they are T2.

    Args:
        headers: of one series.
    """
    if not any(_is_weighted(frame) for one in headers for frame in one.frames):
        return headers
    return [
        replace(
            one,
            frames=tuple(
                frame if _is_weighted(frame) else replace(frame, contrast=DIFFUSION_CONTRAST) for frame in one.frames
            ),
        )
        for one in headers
    ]


def _is_weighted(frame: Frame) -> bool:
    return frame.b_value is not None and frame.b_value > DIFFUSION_B


def mr_name(header: Header, frame: Frame) -> str:
    """Name the weighting of an MR slice: T1, T1C (after contrast agent), T2, FLAIR, PD, DWI, or MR when in doubt.

    Phases, real and imaginary parts, angiograms (bright inflow), and maps computed from several images have the times
    of a weighting and are none.
    """
    kinds = frame.frame_type[1:]
    if (
        header.angiography
        or frame.component
        or PARAMETER_MAPS & set(kinds)
        or any(kind.endswith(" MAP") for kind in kinds)
    ):
        return "MR"
    if _is_weighted(frame):
        return "DWI"
    name = _weighting(frame)
    if frame.contrast not in UNSAID:
        declared = ACQUISITION_CONTRAST.get(frame.contrast, "MR")
        name = declared if name == declared or (name == "MR" and _allows(declared, frame)) else "MR"
    return "T1C" if name == "T1" and header.contrast_agent else name


def _weighting(frame: Frame) -> str:
    """Name the weighting by pulse sequence and times alone, MR where they leave doubt."""
    repetition, echo, inversion = frame.repetition_time_ms, frame.echo_time_ms, frame.inversion_time_ms
    if repetition is None or echo is None or "EP" in frame.pulse:
        return "MR"
    if "IR" in frame.pulse or (inversion is not None and "GR" in frame.pulse):
        return _inversion_weighting(repetition, echo, inversion)
    if "GR" in frame.pulse:
        short = repetition <= SPOILED_TR_MS and echo <= SPOILED_TE_MS
        return "T1" if short and _is_saturated_spoiled(frame) else "MR"
    if "SE" not in frame.pulse:
        # Research mode (RM), or unsaid: with a large flip angle, such times are T1 for spin and gradient echoes alike.
        saturated = frame.flip_degrees is not None and frame.flip_degrees >= SATURATING_FLIP_DEGREES
        return "T1" if saturated and SPOILED_TR_MS <= repetition <= SHORT_TR_MS and echo <= SPOILED_TE_MS else "MR"
    if repetition <= SHORT_TR_MS:
        return "T1" if echo <= SHORT_TE_MS else "MR"
    if repetition >= LONG_TR_MS:
        return "T2" if echo >= LONG_TE_MS else "PD" if echo <= SHORT_TE_MS else "MR"
    return "MR"


def _is_saturated_spoiled(frame: Frame) -> bool:
    """Say whether a gradient echo is spoiled, and its flip angle beyond the Ernst angle of tissue."""
    if "SP" not in frame.pulse or frame.repetition_time_ms is None or frame.flip_degrees is None:
        return False
    return frame.flip_degrees > math.degrees(math.acos(math.exp(-frame.repetition_time_ms / TISSUE_T1_MS)))


def _inversion_weighting(repetition: float, echo: float, inversion: float | None) -> str:
    if inversion is None:
        return "MR"
    if inversion >= FLAIR_TI_MS and repetition >= FLAIR_TR_MS:
        return "FLAIR" if echo >= LONG_TE_MS else "MR"
    return "T1" if T1_TI_MS[0] <= inversion <= T1_TI_MS[1] and echo <= SHORT_TE_MS else "MR"


def _allows(name: str, frame: Frame) -> bool:
    """Say whether a declared weighting goes with what is known of pulse sequence and times."""
    repetition, echo = frame.repetition_time_ms, frame.echo_time_ms
    if echo is None or "EP" in frame.pulse:
        return False
    inverted = "IR" in frame.pulse or frame.inversion_time_ms is not None
    gradient = "GR" in frame.pulse and "SE" not in frame.pulse
    if name == "T1":
        # A long repetition, or a gradient echo without spoiling, is weighted by T1 only through an inversion.
        plain = _is_saturated_spoiled(frame) if gradient else repetition is not None and repetition < LONG_TR_MS
        return echo <= SHORT_TE_MS and (inverted or plain)
    if name == "FLAIR":
        return inverted and echo >= LONG_TE_MS
    late = echo >= LONG_TE_MS if name == "T2" else name == "PD" and echo <= SHORT_TE_MS
    return late and not (gradient or inverted) and repetition is not None and repetition >= LONG_TR_MS
