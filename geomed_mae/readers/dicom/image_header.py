"""What one DICOM file says about itself, from a whitelist of attributes and without reading pixels.

Attributes and their types: PS3.3 C.7.6.3 (image pixel); for what differs from frame to frame see `dicom.frames`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path

from geomed_mae.errors import ReadError
from geomed_mae.readers.dicom.file import NATIVE_SYNTAXES, PARSE_ERRORS, PIXEL_DATA, Opened, open_dicom
from geomed_mae.readers.dicom.frames import Frame, frames_of, positive
from geomed_mae.readers.dicom.limits import CLASS_MODALITIES, check_kind, check_pixels
from geomed_mae.readers.dicom.lut import modality_table
from geomed_mae.readers.dicom.mosaic import Mosaic, is_mosaic, read_mosaic
from geomed_mae.readers.dicom.spacing import plane_spacing
from geomed_mae.readers.dicom.suv import Pet, pet_of
from geomed_mae.readers.dicom.values import LARGE, Values
from geomed_mae.readers.reasons import Reason

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

REQUIRED_FLOAT = ("Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation", "BitsAllocated")
"""The same for floating point pixel data (PS3.3 C.7.6.24)."""

SCOUT_OPTIONS = ("SCOUT", "SURVIEW", "TOPOGRAM", "SCANOSCOPE")
"""How vendors call a scout in ScanOptions (0018,0022)."""

NO_AGENT = frozenset({"", "NO", "NONE", "N", "N/A", "0", "NO CONTRAST", "WITHOUT"})
"""Values of ContrastBolusAgent (free text) with which users say that there was none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """The whitelist of one file. UIDs and patient identifiers are private: for grouping and keyed hashes only.

    `plane_spacing` is that of a 2D image (row, column) in mm; `padding` holds the words, or the floating point values,
    between which pixels are padding; `factor` is (factor, unit) where rescaled values are multiplied once more, which
    only a whole series can tell (see `dicom.suv`). `description` and `protocol` are free text: for choosing among
    series, never to be shown or stored. Of a mosaic, sizes and the one frame are the sheet's (see `dicom.mosaic`).
    """

    path: Path
    syntax: str
    flags: tuple[str, ...]
    modality: str
    scout: bool
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
    planar: int | None
    floating: bool
    frames: tuple[Frame, ...]
    grouped: bool
    plane_spacing: tuple[float, ...] | None
    padding: tuple[float, float] | None
    instance: int | None
    acquisition: str
    content_time: str
    contrast_agent: bool
    angiography: bool
    tube_kv: float | None
    units: str
    pet: Pet | None
    series_number: str
    description: str
    protocol: str
    kernel: str
    cardiac_phase: float | None
    reference_time: float | None
    factor: tuple[float, str] | None = None
    mosaic: Mosaic | None = None

    @property
    def coloured(self) -> bool:
        """Whether pixels have a colour: three samples, or a palette."""
        return self.samples == 3 or self.photometric == "PALETTE COLOR"

    @property
    def series(self) -> tuple[str, ...]:
        """What tells series apart: their UID, wherever their files lie.

        Beside the patient: de-identification has been seen to give all patients one UID. Without a UID number and
        description are the best guess, and the folder where not even these and the study are known; geometry still
        decides.
        """
        known = (self.modality, self.patient, self.study_uid)
        if self.series_uid:
            return *known, self.series_uid
        folder = "" if self.study_uid and self.series_number else str(self.path.parent)
        return *known, folder, self.series_number, self.description

    @property
    def dtype(self) -> str:
        """Numpy name of the stored samples."""
        if self.floating:
            return f"float{self.bits_allocated}"
        return f"{'' if self.signed else 'u'}int{self.bits_allocated}"


def read_header(path: Path) -> Header:
    """Read one file's header.

    Raises:
        ReadError: NOT_DICOM, MALFORMED, NON_IMAGE, NO_PIXEL_DATA, MISSING_TAG, BAD_FRAMES, TOO_LARGE, LENGTH_MISMATCH,
            TRUNCATED, DTYPE_UNSUPPORTED, BAD_RESCALE, DEFLATE_LIMIT; the text names attributes, never their contents
            where these could identify a person.
    """
    return parse_header(open_dicom(path))


def parse_header(opened: Opened) -> Header:
    """Turn an opened file into a Header, checked against the limits and the length of its pixel data.

    Raises:
        ReadError: as `read_header`.
    """
    try:
        values = opened.values
        # The file meta's copy first: it is whole even where the file is cut soon after.
        sop_class = opened.meta_class or values.text("SOPClassUID")
        check_kind(sop_class, values.text("Modality").upper(), opened)
        required = REQUIRED if opened.pixel_tag == PIXEL_DATA else REQUIRED_FLOAT
        missing = [keyword for keyword in required if not _present(values, keyword)]
        if missing:
            raise ReadError(f"{missing[0]} is missing", Reason.MISSING_TAG.name)
        header = _header(values, opened, sop_class)
        check_pixels(header, opened)
        if header.modality == "MR" and not header.image_type:
            values = open_dicom(header.path, wanted=LARGE).values
        if is_mosaic(header, values):
            header = replace(header, mosaic=read_mosaic(header, open_dicom(header.path, wanted=LARGE).values))
        return header
    except PARSE_ERRORS as error:
        if isinstance(error, ReadError):
            raise
        raise ReadError(f"the DICOM structure does not parse ({type(error).__name__})", Reason.MALFORMED.name) from None


def _present(values: Values, keyword: str) -> bool:
    if keyword == "PhotometricInterpretation":
        return bool(values.text(keyword))
    return values.whole(keyword) is not None


def _header(values: Values, opened: Opened, sop_class: str) -> Header:
    patient, issuer = values.text("PatientID"), values.text("IssuerOfPatientID")
    floating = opened.pixel_tag != PIXEL_DATA
    bits = _whole(values, "BitsAllocated")
    signed = floating or _whole(values, "PixelRepresentation") == 1
    instance = values.number("InstanceNumber")
    modality = values.text("Modality").upper() or CLASS_MODALITIES.get(sop_class, "")
    frames, grouped = frames_of(values, floating=floating)
    if any(frame.lut for frame in frames):
        modality_table(values, signed=signed)
    planar = values.whole("PlanarConfiguration")
    if planar is None and _whole(values, "SamplesPerPixel") > 1 and opened.syntax in NATIVE_SYNTAXES:
        raise ReadError("PlanarConfiguration is missing", Reason.MISSING_TAG.name)
    return Header(
        path=opened.path,
        syntax=opened.syntax,
        flags=opened.flags,
        modality=modality,
        scout=_is_scout(values),
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
        bits_allocated=bits,
        bits_stored=bits if floating else _whole(values, "BitsStored"),
        high_bit=bits - 1 if floating else _whole(values, "HighBit"),
        signed=signed,
        photometric=values.text("PhotometricInterpretation").upper(),
        planar=planar,
        floating=floating,
        frames=frames,
        grouped=grouped,
        plane_spacing=plane_spacing(values, pixel_spacing=frames[0].spacing),
        padding=_padding(values, floating=floating, bits=bits),
        instance=int(instance) if instance is not None and math.isfinite(instance) else None,
        acquisition=values.text("AcquisitionNumber"),
        content_time=values.text("ContentTime"),
        contrast_agent=_has_agent(values),
        angiography=values.text("AngioFlag").upper() == "Y",
        tube_kv=positive(values.number("KVP")),
        # Enhanced PET says by RescaleType what Units says elsewhere (PS3.3 C.8.22).
        units=values.text("Units").upper() or (frames[0].rescale_type if modality == "PT" else ""),
        pet=pet_of(values) if values.text("Units") else None,
        series_number=values.text("SeriesNumber"),
        description=values.text("SeriesDescription"),
        protocol=values.text("ProtocolName"),
        kernel=values.text("ConvolutionKernel"),
        cardiac_phase=next(iter(values.floats("NominalPercentageOfCardiacPhase", 4) or ()), None),
        reference_time=values.number("FrameReferenceTime"),
    )


def _is_scout(values: Values) -> bool:
    """Say whether an image is a scout by how it was acquired (PS3.3 C.8.15.3.2: tube at rest, table moving).

    Captures of scouts say no more in ImageType that they are localizers.
    """
    return values.text("AcquisitionType").upper() == "CONSTANT_ANGLE" or any(
        word in option for option in values.texts("ScanOptions") for word in SCOUT_OPTIONS
    )


def _has_agent(values: Values) -> bool:
    """Say whether a contrast agent is named; enhanced objects do so in a sequence (PS3.3 C.7.6.4 and C.7.6.4b)."""
    said = values.text("ContrastBolusAgent").upper()
    return said not in NO_AGENT or bool(values.items("ContrastBolusAgentSequence"))


def _padding(values: Values, *, floating: bool, bits: int) -> tuple[float, float] | None:
    """Return the ends of the padding range (PS3.3 C.7.5.1.1.2): unsigned words, or floating point values."""
    prefix = ("Float" if bits == 32 else "DoubleFloat") if floating else ""
    ends: list[float] = []
    for name in ("PixelPaddingValue", "PixelPaddingRangeLimit"):
        if floating:
            raw = values.raw(prefix + name)
            found = values.floats(prefix + name, bits // 8) if raw else None
            end = found[0] if found else None
        else:
            end = values.whole(name)
        if end is not None:
            ends.append(end)
        elif not ends:
            return None
    return ends[0], ends[-1]


def _whole(values: Values, keyword: str) -> int:
    value = values.whole(keyword)
    if value is None:
        raise ReadError(f"{keyword} is missing", Reason.MISSING_TAG.name)
    return value
