"""What a DICOM image's numbers mean: its Channel, from the physics that the header states.

An MR image is named T1, T1C, T2, FLAIR, PD or DWI where repetition, echo and inversion times decide it, and MR where
they do not: a wrong name is worse than none, since times travel with the channel anyway.
Contrast from TR and TE: Nitz and Reimer, "Contrast mechanisms in MR imaging", Eur Radiol 9 (1999) 1032. The limits
below are the usual clinical ones (short TR under about 500 to 800 ms, long over 1500 ms; short TE under 30 ms, long
over 60 to 90 ms: IMAIOS e-MRI, "Signal weighting"), with the doubtful zones between them left unnamed.
"""

from __future__ import annotations

import math
from dataclasses import replace

from geomed_mae.image import Channel
from geomed_mae.modalities import Modality
from geomed_mae.readers.dicom_header import Frame, Header

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

SPOILED_FLIP_DEGREES = 8.0
"""Below this flip angle a spoiled gradient echo tends to proton density."""

DIFFUSION_B = 50.0
"""s/mm^2; what is acquired with less is the unweighted image of a diffusion series."""

ACQUISITION_CONTRAST = {
    "T1": "T1",
    "T2": "T2",
    "PROTON_DENSITY": "PD",
    "FLUID_ATTENUATED": "FLAIR",
    "DIFFUSION": "DWI",
}
"""AcquisitionContrast (0008,9209) of enhanced MR, PS3.3 C.8.13.3.1.3, where it decides the name."""

PET_UNITS = {"BQML": "Bq/ml", "GML": "g/ml", "CNTS": "counts", "CPS": "counts/s", "CM2ML": "cm2/ml", "PCNT": "%"}
"""Units (0054,1001) of PS3.3 C.8.9.1.1.3 as we spell them; GML is a standardised uptake value."""


def channel_of(header: Header, frame: Frame, modality: Modality) -> Channel:
    """Describe the one channel of an image from one of its slices."""
    base = modality.channels[0] if modality.channels else Channel(name=modality.name, unit=modality.unit)
    if base.kind == "ct":
        return replace(base, tube_kv=header.tube_kv)
    if base.kind == "xray":
        return replace(base, tube_kv=header.tube_kv)
    if base.kind == "pet":
        return replace(base, unit=PET_UNITS.get(header.units, "unknown"))
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


def mr_name(header: Header, frame: Frame) -> str:
    """Name the weighting of an MR slice: T1, T1C (after contrast agent), T2, FLAIR, PD, DWI, or MR when in doubt."""
    if frame.b_value is not None and frame.b_value > DIFFUSION_B:
        return "DWI"
    name = ACQUISITION_CONTRAST.get(frame.contrast) or _weighting(header, frame)
    return "T1C" if name == "T1" and header.contrast_agent else name


def _weighting(header: Header, frame: Frame) -> str:
    repetition, echo, inversion = frame.repetition_time_ms, frame.echo_time_ms, frame.inversion_time_ms
    if repetition is None or echo is None or "EP" in header.scanning:
        return "MR"
    if "IR" in header.scanning or (inversion is not None and "GR" in header.scanning):
        return _inversion_weighting(repetition, echo, inversion)
    if "GR" in header.scanning:
        flip = header.flip_angle if header.flip_angle is not None else math.nan
        spoiled = "SP" in header.variant and flip >= SPOILED_FLIP_DEGREES
        return "T1" if spoiled and repetition <= SPOILED_TR_MS and echo <= SPOILED_TE_MS else "MR"
    if repetition <= SHORT_TR_MS:
        return "T1" if echo <= SHORT_TE_MS else "MR"
    if repetition >= LONG_TR_MS:
        return "T2" if echo >= LONG_TE_MS else "PD" if echo <= SHORT_TE_MS else "MR"
    return "MR"


def _inversion_weighting(repetition: float, echo: float, inversion: float | None) -> str:
    if inversion is None:
        return "MR"
    if inversion >= FLAIR_TI_MS and repetition >= FLAIR_TR_MS:
        return "FLAIR" if echo >= LONG_TE_MS else "MR"
    return "T1" if T1_TI_MS[0] <= inversion <= T1_TI_MS[1] and echo <= SHORT_TE_MS else "MR"
