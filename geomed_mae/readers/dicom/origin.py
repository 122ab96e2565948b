"""Where a DICOM image comes from, for an object that is derived from it (a Segmentation): patient, study, slices.

The files are opened a second time, through the same checks as ever, and no pixel is decoded. Read are the attributes of
type 1 and 2 of the Patient and General Study modules (PS3.3 C.7.1.1, C.7.2.1), without which a derived object would not
be filed beside its images; nothing optional, and nothing about equipment, institution or staff but the referring
physician, who is of type 2. This is the only place that takes a person's name from a file: what it returns belongs in
DICOM objects alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import VolumeGeometry
from geomed_mae.readers.dicom.bind import is_bound
from geomed_mae.readers.dicom.file import open_dicom
from geomed_mae.readers.dicom.frames import Frame
from geomed_mae.readers.dicom.geometry import POSITION_TOLERANCE_MM
from geomed_mae.readers.dicom.image_header import Header, parse_header
from geomed_mae.readers.dicom.mosaic import tiled
from geomed_mae.readers.dicom.text import decoded_text
from geomed_mae.readers.dicom.values import WANTED, Values
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import check_regular
from geomed_mae.readers.source import Source

SUBJECT = {
    "StudyDate": 0x00080020,
    "StudyTime": 0x00080030,
    "AccessionNumber": 0x00080050,
    "ReferringPhysicianName": 0x00080090,
    "PatientName": 0x00100010,
    "PatientID": 0x00100020,
    "IssuerOfPatientID": 0x00100021,
    "PatientBirthDate": 0x00100030,
    "PatientSex": 0x00100040,
    "StudyInstanceUID": 0x0020000D,
    "StudyID": 0x00200010,
}
"""Patient and General Study modules, types 1 and 2, and the issuer, without whom an ID names nobody."""
COMPRESSION = {
    "LossyImageCompression": 0x00282110,
    "LossyImageCompressionRatio": 0x00282112,
    "LossyImageCompressionMethod": 0x00282114,
}
"""What an object derived from lossy pixels must say too (PS3.3 C.7.6.1.1.5)."""
EXTRA = frozenset({*SUBJECT.values(), *COMPRESSION.values()})
"""Tags that are read here and nowhere else."""
LOSSY_METHODS = frozenset(
    {
        "ISO_10918_1",
        "ISO_14495_1",
        "ISO_15444_1",
        "ISO_13818_2",
        "ISO_14496_10",
        "ISO_23008_2",
        "ISO_15444_15",
        "ISO_18181_1",
    }
)
"""Defined terms of LossyImageCompressionMethod (PS3.3 C.7.6.1.1.5.1)."""
OPTIONAL = frozenset({"IssuerOfPatientID", *COMPRESSION})
"""Left out where the source has none; the others may be empty but not absent."""
NAME_DELIMITERS = frozenset(b"^=")
"""Bytes at which a character set starts anew within a person's name (PS3.5 section 6.1.2.5.3)."""
ROUNDING = 1.001
"""A slice that the index took at the very tolerance is not refused for the last bit of its position."""


@dataclass(frozen=True, slots=True)
class Reference:
    """One slice's file.

    Attributes:
        sop_class, instance, series: UIDs.
        frame: number of its frame, from 1; None where the object has one frame, or the slice is part of one (a mosaic).
        frames: how many frames the object has.
        whole: whether the slice's pixels are the frame's pixels; False for the tiles of a mosaic.
    """

    sop_class: str
    instance: str
    series: str
    frame: int | None
    frames: int
    whole: bool


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """What a derived object takes from the images. Private: it names the patient.

    Attributes:
        attributes: keyword -> text, "" for what the source does not say.
        frame_of_reference: UID, "" where there is none.
        slices: one a slice in the order of the image's slices, one for a plane.
        further: other series that the image was made of (bound series).
        positions: float64 (slices, 3), upper left voxel of each slice in LPS mm as its own file says; None for planes.
        orientation: direction cosines of rows and columns; None for planes.
        spacing: (row, column) in mm; None for planes.
        thickness_mm: thickness of a slice; where the files do not say, the distance of its neighbour; None for planes.
    """

    attributes: Mapping[str, str]
    frame_of_reference: str
    slices: tuple[Reference, ...]
    further: tuple[Reference, ...]
    positions: np.ndarray | None
    orientation: tuple[float, ...] | None
    spacing: tuple[float, ...] | None
    thickness_mm: float | None


def read_origin(source: Source) -> Origin:
    """Read where a Source of the DICOM reader comes from; of bound series the one whose grid the image has comes first.

    Raises:
        ReadError: a file is gone, is not the one that was indexed, or names no SOP instance, which nothing could refer
            to; the text names a slice's number, never a file.
    """
    main, others = _series(source)
    volume = isinstance(source.geometry, VolumeGeometry)
    slices, attributes = _slices(main)
    header, frame = slices[0]
    further = [slice_ for part in others for slice_ in _slices(part)[0]]
    return Origin(
        attributes=attributes,
        frame_of_reference=header.frame_uid,
        slices=tuple(_reference(*slice_) for slice_ in slices),
        further=tuple(_reference(*slice_) for slice_ in further),
        positions=np.array([one.frames[number].position for one, number in slices]) if volume else None,
        orientation=tuple(header.frames[frame].orientation) if volume else None,
        spacing=tuple(header.frames[frame].spacing) if volume else None,
        thickness_mm=_thickness(header.frames[frame], source) if volume else None,
    )


def _series(source: Source) -> tuple[Source, tuple[Source, ...]]:
    """Return the series whose slices are the image's, and the others that are bound to it."""
    if not is_bound(source):
        return source, ()
    parts = [
        replace(
            source,
            files=tuple(source.files[index] for index in part["files"]),
            selector=part["selector"],
            shape=tuple(part["shape"]),
            geometry=VolumeGeometry(np.array(part["affine"])),
        )
        for part in source.selector["parts"]
    ]
    main = next(part for part in parts if part.selector["instances"] == source.selector["instances"])
    return main, tuple(part for part in parts if part is not main)


def _slices(source: Source) -> tuple[list[tuple[Header, int]], dict[str, str]]:
    """Return the header and the frame of each slice (one of a plane), and the attributes of the first slice's file."""
    frames, files = source.selector.get("frames"), source.selector.get("files")
    count = source.shape[0] if isinstance(source.geometry, VolumeGeometry) else 1
    headers: dict[Path, Header] = {}
    attributes: dict[str, str] = {}
    slices = []
    for plane in range(count):
        place = f"slice {plane + 1} of {count}" if isinstance(source.geometry, VolumeGeometry) else "the image"
        path = source.files[files[plane] if files is not None else 0 if frames is not None else plane]
        try:
            if path not in headers:
                opened = open_dicom(check_regular(path), wanted=WANTED | EXTRA)
                headers[path] = tiled(parse_header(opened))
                attributes = attributes or _attributes(opened.values)
            slices.append((headers[path], 0 if frames is None else frames[plane]))
            _check_same(source, *slices[-1], plane)
        except ReadError as error:
            raise ReadError(f"{place}: {error}", error.reason) from None
    return slices, attributes


def _check_same(source: Source, header: Header, frame: int, plane: int) -> None:
    """Refuse a file that has been replaced since it was indexed, and one that cannot be referred to."""
    instances = source.selector.get("instances") or ()
    if frame >= len(header.frames) or (plane < len(instances) and header.sop_uid != instances[plane]):
        raise ReadError("the file is not the one that was indexed", Reason.LENGTH_MISMATCH.name)
    if not (header.sop_uid and header.sop_class):
        raise ReadError("SOPInstanceUID or SOPClassUID is missing: nothing can refer to it", Reason.MISSING_TAG.name)
    if isinstance(source.geometry, VolumeGeometry):
        position = header.frames[frame].position
        expected = source.geometry.affine[:3] @ (plane, 0, 0, 1)
        moved = np.inf if position is None else np.linalg.norm(np.subtract(position, expected))
        if not moved <= ROUNDING * POSITION_TOLERANCE_MM:
            raise ReadError("the file is not the one that was indexed: its position differs", Reason.BAD_GEOMETRY.name)


def _thickness(frame: Frame, source: Source) -> float:
    stated = frame.thickness_mm
    return stated if stated is not None and 0 < stated < np.inf else source.geometry.spacing[0]


def _reference(header: Header, frame: int) -> Reference:
    count = 1 if header.mosaic else len(header.frames)
    number = frame + 1 if count > 1 or (header.grouped and not header.mosaic) else None
    return Reference(header.sop_class, header.sop_uid, header.series_uid, number, count, header.mosaic is None)


def _attributes(values: Values) -> dict[str, str]:
    charset = values.text("SpecificCharacterSet")
    found = {
        keyword: decoded_text(values.text_at(tag), charset, NAME_DELIMITERS if keyword.endswith("Name") else ())
        for keyword, tag in {**SUBJECT, **COMPRESSION}.items()
    }
    for keyword, right in _CODED.items():
        if not all(right(part.strip()) for part in found[keyword].split("\\")):
            found[keyword] = ""  # free text has no place in a coded attribute
    return {keyword: text for keyword, text in found.items() if text or keyword not in OPTIONAL}


def _is_number(text: str) -> bool:
    return bool(re.fullmatch(r"[0-9.eE+-]{1,16}", text))


_CODED: dict[str, Callable[[str], bool]] = {
    "LossyImageCompression": {"00", "01"}.__contains__,
    "LossyImageCompressionRatio": _is_number,
    "LossyImageCompressionMethod": LOSSY_METHODS.__contains__,
}
