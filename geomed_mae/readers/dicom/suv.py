"""Standardised uptake values of PET: the factor from stored activity to SUV by body weight, where the header allows.

Follows the Quantitative Imaging Biomarkers Alliance's "Vendor-neutral pseudo-code for SUV calculation" (QIBA FDG-PET/CT
profile, appendix): SUV = activity [Bq/ml] * weight [g] / dose [Bq], the dose decayed to the time to which the images
are decay corrected. Attributes: PS3.3 C.8.9.1 (PET series), C.8.9.2 (isotope), C.8.9.4 (image). One factor holds for a
whole series; where its files disagree, or one of the needed values is missing, images stay in Bq/ml.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING

from geomed_mae.readers.dicom.values import Values

if TYPE_CHECKING:
    from geomed_mae.readers.dicom.image_header import Header

SUV_UNIT = "g/ml"
"""Unit of SUV by body weight (Units GML)."""

PHILIPS = "PHILIPS PET PRIVATE GROUP"
GE = "GEMS_PETD_01"
"""Creators of the private blocks that hold scale factors, and the scan's start."""

LONGEST_HOURS = 24.0
"""No more than a day lies between injection and scan."""


@dataclass(frozen=True, slots=True)
class Pet:
    """What an image says for its SUV; None or "" where it does not.

    `dose` in Bq, `half_life` in s, `weight` in kg; times as DICOM writes them, dates before times in `series`,
    `acquired`, `scanned` and `injected_at`; `injected` is a time without a date. `suv_factor` and `activity_factor`
    are Philips's private ones: counts to SUV, counts to Bq/ml.
    """

    units: str
    suv_type: str
    corrected: tuple[str, ...]
    decay: str
    dose: float | None
    half_life: float | None
    injected: str
    injected_at: str
    weight: float | None
    series: str
    acquired: str
    scanned: str
    suv_factor: float | None
    activity_factor: float | None


def pet_of(values: Values) -> Pet:
    """Collect a PET image's attributes."""
    isotopes = values.items("RadiopharmaceuticalInformationSequence")
    # Two tracers in one image: no single dose is its.
    isotope = isotopes[0] if len(isotopes) == 1 else None
    philips = values.text("PrivateSUVCreator").upper().startswith(PHILIPS)
    return Pet(
        units=values.text("Units").upper(),
        suv_type=values.text("SUVType").upper(),
        corrected=values.texts("CorrectedImage"),
        decay=values.text("DecayCorrection").upper(),
        dose=_positive(isotope.number("RadionuclideTotalDose")) if isotope else None,
        half_life=_positive(isotope.number("RadionuclideHalfLife")) if isotope else None,
        injected=isotope.text("RadiopharmaceuticalStartTime") if isotope else "",
        injected_at=isotope.text("RadiopharmaceuticalStartDateTime") if isotope else "",
        weight=_positive(values.number("PatientWeight")),
        series=values.text("SeriesDate") + values.text("SeriesTime"),
        acquired=values.text("AcquisitionDate") + values.text("AcquisitionTime"),
        scanned=values.text("PrivateScanDateTime") if values.text("PrivateScanCreator").upper() == GE else "",
        suv_factor=_positive(values.number("PrivateSUVFactor")) if philips else None,
        activity_factor=_positive(values.number("PrivateActivityFactor")) if philips else None,
    )


def _positive(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) and value > 0 else None


def suv_factor(images: Sequence[Pet]) -> tuple[float, str] | None:
    """Return (factor, unit) of all images of one series, or None where no SUV can be had.

    The factor multiplies rescaled values; the unit is that of the product.
    """
    first = images[0]
    if any(_constants(image) != _constants(first) for image in images):
        return None
    if first.units == "GML" and first.suv_type in ("", "BW"):
        return 1.0, SUV_UNIT
    if first.units == "CNTS" and first.suv_factor is not None:
        return first.suv_factor, SUV_UNIT
    activity = {"BQML": 1.0, "CNTS": first.activity_factor}.get(first.units)
    dose = _dose(images)
    if activity is None or dose is None or first.weight is None:
        return None
    return activity * first.weight * 1000.0 / dose, SUV_UNIT


def activity_factor(images: Sequence[Pet]) -> tuple[float, str] | None:
    """Return (factor, "Bq/ml") for counts that a private factor turns into activity, or None."""
    factors = {(image.units, image.activity_factor) for image in images}
    units, factor = factors.pop()
    return (factor, "Bq/ml") if not factors and units == "CNTS" and factor is not None else None


def _constants(image: Pet) -> tuple:
    return (
        *(image.units, image.suv_type, image.decay, image.dose, image.half_life, image.injected, image.injected_at),
        *(image.weight, image.series, image.scanned, image.suv_factor, image.activity_factor),
        *("ATTN" in image.corrected, "DECY" in image.corrected),
    )


def _dose(images: Sequence[Pet]) -> float | None:
    """Return the dose in Bq at the time to which the images are decay corrected."""
    first = images[0]
    if first.dose is None or not {"ATTN", "DECY"} <= set(first.corrected):
        return None
    if first.decay == "ADMIN":
        return first.dose
    if first.decay != "START" or first.half_life is None:
        return None
    scan = _scan_start(images)
    elapsed = None if scan is None else _seconds_since_injection(first, scan)
    return None if elapsed is None else first.dose * 2.0 ** (-elapsed / first.half_life)


def _seconds_since_injection(image: Pet, scan: datetime) -> float | None:
    """Return the seconds from injection to `scan`, None where the header does not say or contradicts itself."""
    start = _moment(image.injected_at)
    if start is None and image.injected:
        start = _moment(f"{scan:%Y%m%d}{image.injected}")
        # A time without a date: later than the scan's, it was on the day before.
        if start is not None and start > scan:
            start -= timedelta(days=1)
    elapsed = None if start is None else (scan - start).total_seconds()
    return elapsed if elapsed is not None and 0 <= elapsed <= LONGEST_HOURS * 3600 else None


def _scan_start(images: Sequence[Pet]) -> datetime | None:
    """Return the time to which images are decay corrected.

    The series's start, unless an image was acquired before it: then the series is a reconstruction made later, and GE's
    private scan time decides, else nothing does.
    """
    series = _moment(images[0].series)
    acquired = [_moment(image.acquired) for image in images]
    if any(moment is None for moment in acquired):
        return None
    if series is not None and series <= min(moment for moment in acquired if moment is not None):
        return series
    return _moment(images[0].scanned)


def _moment(text: str) -> datetime | None:
    """Read YYYYMMDDHHMMSS with or without a fraction and time zone (VR DT, or DA and TM one after the other).

    Seconds may be missing, minutes not; a time zone is left out, as all times of one image share it.
    """
    whole, _, fraction = text.partition("+")[0].partition("-")[0].partition(".")
    whole += "00" if len(whole) == 12 else ""
    if len(whole) != 14 or not whole.isdecimal() or (fraction and not fraction.isdecimal()):
        return None
    try:
        moment = datetime.strptime(whole, "%Y%m%d%H%M%S")
    except ValueError:
        return None
    return moment + timedelta(seconds=float(f"0.{fraction or 0}"))


def with_factors(headers: Sequence[Header]) -> list[Header]:
    """Return the headers, those of PET with the factor that their whole series allows, in the same order."""
    series: dict[tuple[str, ...], list[Pet]] = {}
    for header in headers:
        if header.pet is not None and header.series_uid:
            series.setdefault(header.series, []).append(header.pet)
    factors = {name: suv_factor(images) or activity_factor(images) for name, images in series.items()}
    return [
        replace(header, factor=factors[header.series])
        if header.pet is not None and factors.get(header.series)
        else header
        for header in headers
    ]
