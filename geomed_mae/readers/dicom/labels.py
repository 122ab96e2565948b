"""Labels in DICOM: which kind of object a file is, which images it refers to, and whether it belongs to this one.

    seg        Segmentation and Label Map Segmentation Storage (PS3.3 C.8.20)
    rtstruct   RT Structure Set Storage (PS3.3 C.8.8.5, C.8.8.6)

A label object belongs to an image when it refers to one of the image's SOP instances, or lies in the image's frame of
reference. Where one side says neither, only the coordinates are left to decide. Files come through the same checked
opening as images (`dicom.file`): nothing here hands a path to another parser.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from geomed_mae.errors import ReadError
from geomed_mae.image import Image
from geomed_mae.readers.dicom.file import PARSE_ERRORS, Opened, open_dicom, quiet
from geomed_mae.readers.dicom.rtstruct import read_structures
from geomed_mae.readers.dicom.seg import read_segments
from geomed_mae.readers.dicom.values import Values
from geomed_mae.readers.labels import LabelQuery, Labels
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

SEG_CLASSES = frozenset({"1.2.840.10008.5.1.4.1.1.66.4", "1.2.840.10008.5.1.4.1.1.66.7"})
"""Segmentation Storage, Label Map Segmentation Storage (PS3.4 B.5)."""

STRUCTURES_CLASS = "1.2.840.10008.5.1.4.1.1.481.3"
"""RT Structure Set Storage."""

FILES_KEPT = 1
"""Parsed label objects kept: one file is read for several images in a row (the time points of a series)."""


@dataclass(frozen=True, slots=True)
class _Found:
    """A parsed label object, what it refers to, and whether it is a SEG."""

    opened: Opened
    references: tuple[tuple[str, str], ...]
    segments: bool


def read_labels(path: Path, onto: Image, query: LabelQuery) -> Labels:
    """Read class numbers int16 ([Z,] Y, X) from a SEG or RTSTRUCT, placed on the grid of `onto` by coordinates.

    Raises:
        ReadError: NON_IMAGE (neither SEG nor RTSTRUCT), BAD_GEOMETRY (of another frame of reference, on another grid,
            off the image), CLASS_UNKNOWN, or damage: MALFORMED, MISSING_TAG, BAD_FRAMES, TOO_LARGE, TRUNCATED,
            LENGTH_MISMATCH, DECODE_FAILED, CODEC_MISSING, DTYPE_UNSUPPORTED, or a reason of `open_dicom`.
    """
    place = shown(path)
    found = _checked(path)
    if found is None:
        raise ReadError(f"{place} is neither a SEG nor an RTSTRUCT", Reason.NON_IMAGE.name)
    _check_belongs(found.references, query, place)
    try:
        with quiet():
            if found.segments:
                return read_segments(found.opened, onto, query, place)
            return read_structures(found.opened.values, onto, query, place)
    except PARSE_ERRORS as error:
        if isinstance(error, ReadError):
            raise
        raise _unparsed(place, error) from None


def label_references(path: Path) -> tuple[tuple[str, str], ...] | None:
    """Return the (kind, UID) pairs that a label object refers to, kinds as in `Source.identity` ("instance", "series",
    "frame"); None for a DICOM file that holds no labels. Private, as identities are.

    Raises:
        ReadError: a label object that does not parse.
    """
    found = _checked(path)
    return None if found is None else found.references


def _checked(path: Path) -> _Found | None:
    try:
        status = path.stat()
    except OSError:
        raise ReadError(f"{shown(path)} does not exist (any more)", Reason.VANISHED.name) from None
    return _parsed(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=FILES_KEPT)
def _parsed(path: Path, changed_ns: int, size: int) -> _Found | None:
    """Parse a file once; time of change and size are there to tell a newer one."""
    place = shown(path)
    try:
        opened = open_dicom(path)
        # The file meta's copy first, as for images: it is whole even where the file is cut soon after.
        sop_class = opened.meta_class or opened.values.text("SOPClassUID")
        segments = sop_class in SEG_CLASSES
        if not segments and sop_class != STRUCTURES_CLASS:
            return None
        references = _seg_references(opened.values) if segments else _structure_references(opened.values)
    except PARSE_ERRORS as error:
        if isinstance(error, ReadError):
            raise ReadError(f"{place}: {error}", error.reason) from None
        raise _unparsed(place, error) from None
    return _Found(opened, tuple(sorted(set(references))), segments)


def _unparsed(place: str, error: BaseException) -> ReadError:
    # Texts of parsers quote raw values, which may be a patient's: only the type's name is passed on.
    return ReadError(f"{place} does not parse ({type(error).__name__})", Reason.MALFORMED.name)


def _pairs(kind: str, items: Iterable[Values], keyword: str) -> list[tuple[str, str]]:
    return [(kind, text) for item in items if (text := item.text(keyword))]


def _seg_references(values: Values) -> list[tuple[str, str]]:
    """Return what a SEG refers to: its frame of reference, series and instances (PS3.3 C.12.4 and C.7.6.16.2.6)."""
    found = _pairs("frame", [values], "FrameOfReferenceUID")
    studies = values.items("StudiesContainingOtherReferencedInstancesSequence")
    for series in [s for level in (values, *studies) for s in level.items("ReferencedSeriesSequence")]:
        found += _pairs("series", [series], "SeriesInstanceUID")
        found += _pairs("instance", series.items("ReferencedInstanceSequence"), "ReferencedSOPInstanceUID")
    groups = [*values.items("SharedFunctionalGroupsSequence"), *values.items("PerFrameFunctionalGroupsSequence")]
    for level in (values, *(item for group in groups for item in group.items("DerivationImageSequence"))):
        found += _pairs("instance", level.items("SourceImageSequence"), "ReferencedSOPInstanceUID")
    return found


def _structure_references(values: Values) -> list[tuple[str, str]]:
    """Return what an RTSTRUCT refers to (PS3.3 C.8.8.5); the contours' own references add nothing to these."""
    found = _pairs("frame", [values], "FrameOfReferenceUID")
    found += _pairs("frame", values.items("StructureSetROISequence"), "ReferencedFrameOfReferenceUID")
    for frame in values.items("ReferencedFrameOfReferenceSequence"):
        found += _pairs("frame", [frame], "FrameOfReferenceUID")
        for study in frame.items("RTReferencedStudySequence"):
            for series in study.items("RTReferencedSeriesSequence"):
                found += _pairs("series", [series], "SeriesInstanceUID")
                found += _pairs("instance", series.items("ContourImageSequence"), "ReferencedSOPInstanceUID")
    return found


def _check_belongs(references: tuple[tuple[str, str], ...], query: LabelQuery, place: str) -> None:
    """Refuse labels of another frame of reference, unless they refer to one of the image's own instances."""
    frames, instances = ({value for kind, value in references if kind == wanted} for wanted in ("frame", "instance"))
    if instances & query.known("instance"):
        return
    known = query.known("frame")
    if frames and known and not frames & known:
        raise ReadError(f"{place} lies in another frame of reference than the image", Reason.BAD_GEOMETRY.name)
