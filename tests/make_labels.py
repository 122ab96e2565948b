"""Tiny label objects for tests: RTSTRUCT by hand, SEG by hand and by highdicom."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pydicom
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import ExplicitVRLittleEndian

from tests.make_dicom import AXIAL, save, uid, write_series

RTSTRUCT = "1.2.840.10008.5.1.4.1.1.481.3"
SEG = "1.2.840.10008.5.1.4.1.1.66.4"
LABELMAP = "1.2.840.10008.5.1.4.1.1.66.7"

COMPLETE = {
    "PatientName": "Doe^Jane",
    "PatientBirthDate": "",
    "PatientSex": "",
    "AccessionNumber": "",
    "StudyID": "",
    "StudyDate": "20200101",
    "StudyTime": "000000",
    "ReferringPhysicianName": "",
    "SliceThickness": "2",
}
"""Attributes that highdicom wants of an image."""


def item(**tags: object) -> Dataset:
    """Return a data set of these attributes, those given as None left out."""
    made = Dataset()
    for keyword, value in tags.items():
        if value is not None:
            setattr(made, keyword, value)
    return made


def contour(points: Sequence[Sequence[float]], **tags: object) -> Dataset:
    """Return a closed contour through `points` (n, 3) in mm; `instance` is the slice it says it was drawn on."""
    instance = tags.pop("instance", None)
    coordinates = [f"{value:.10g}" for point in points for value in point]
    made = {"ContourGeometricType": "CLOSED_PLANAR", "NumberOfContourPoints": len(points), "ContourData": coordinates}
    if instance is not None:
        made["ContourImageSequence"] = Items([item(ReferencedSOPInstanceUID=instance)])
    return item(**(made | tags))


def square(low: float, high: float, z: float, **tags: object) -> Dataset:
    """Return the contour of an axial square from (low, low) to (high, high) mm at height z mm."""
    return contour([(low, low, z), (high, low, z), (high, high, z), (low, high, z)], **tags)


def write_rtstruct(path: Path, regions: dict[str, Sequence[Dataset]], **how: object) -> Path:
    """Write a structure set; `frame`, `series` and `instances` are what it refers to, other keywords are attributes."""
    frame, series = how.pop("frame", uid("frame")), how.pop("series", None)
    instances = how.pop("instances", ())
    referenced = item(FrameOfReferenceUID=frame)
    if series or instances:
        images = Items([item(ReferencedSOPInstanceUID=one) for one in instances])
        inner = item(SeriesInstanceUID=series or uid("series"), ContourImageSequence=images)
        referenced.RTReferencedStudySequence = Items([item(RTReferencedSeriesSequence=Items([inner]))])
    made = {
        "SOPClassUID": RTSTRUCT,
        "SOPInstanceUID": uid("rtstruct", path),
        "Modality": "RTSTRUCT",
        "SpecificCharacterSet": "ISO_IR 192",
        "ReferencedFrameOfReferenceSequence": Items([referenced]) if frame or series or instances else None,
        "StructureSetROISequence": Items(
            [
                item(ROINumber=number, ROIName=name, ReferencedFrameOfReferenceUID=frame)
                for number, name in enumerate(regions, start=1)
            ]
        ),
        "ROIContourSequence": Items(
            [
                item(ReferencedROINumber=number, ContourSequence=Items(list(contours)))
                for number, contours in enumerate(regions.values(), start=1)
            ]
        ),
    }
    return save(item(**(made | how)), path)


def segment(number: int, label: str, meaning: str = "Liver", code: str = "10200004") -> Dataset:
    """Return the description of a segment."""
    coded = item(CodeValue=code, CodingSchemeDesignator="SCT", CodeMeaning=meaning)
    return item(SegmentNumber=number, SegmentLabel=label, SegmentedPropertyTypeCodeSequence=Items([coded]))


def frame_of(
    pixels: np.ndarray,
    position: Sequence[float] | None,
    number: int | None = 1,
    source: tuple[str, int | None] | None = None,
) -> tuple[np.ndarray, Dataset]:
    """Return a frame's stored values (rows, columns) and its functional groups."""
    group = Dataset()
    if position is not None:
        group.PlanePositionSequence = Items([item(ImagePositionPatient=[f"{value:.8g}" for value in position])])
    if number is not None:
        group.SegmentIdentificationSequence = Items([item(ReferencedSegmentNumber=number)])
    if source is not None:
        referenced = item(ReferencedSOPInstanceUID=source[0], ReferencedFrameNumber=source[1])
        group.DerivationImageSequence = Items([item(SourceImageSequence=Items([referenced]))])
    return pixels, group


def write_seg(
    path: Path,
    frames: Sequence[tuple[np.ndarray, Dataset]],
    segments: Sequence[Dataset],
    *,
    orientation: Sequence[float] = AXIAL,
    spacing: Sequence[float] = (1.0, 1.0),
    syntax: str = ExplicitVRLittleEndian,
    **tags: object,
) -> Path:
    """Write a SEG by hand: bits packed for BINARY, bytes for the others."""
    kind = str(tags.get("SegmentationType", "BINARY"))
    stack = np.stack([pixels for pixels, _ in frames]).astype(np.uint8)
    packed = np.packbits(stack.ravel() != 0, bitorder="little") if kind == "BINARY" else stack.ravel()
    data = packed.tobytes()
    shared = Dataset()
    shared.PlaneOrientationSequence = Items([item(ImageOrientationPatient=[f"{value:.10g}" for value in orientation])])
    shared.PixelMeasuresSequence = Items([item(PixelSpacing=list(spacing))])
    bits = 1 if kind == "BINARY" else 8
    made = {
        "SOPClassUID": LABELMAP if kind == "LABELMAP" else SEG,
        "SOPInstanceUID": uid("seg", path),
        "FrameOfReferenceUID": uid("frame"),
        "Modality": "SEG",
        "SegmentationType": kind,
        "MaximumFractionalValue": 255 if kind == "FRACTIONAL" else None,
        "NumberOfFrames": len(frames),
        "Rows": stack.shape[1],
        "Columns": stack.shape[2],
        "SamplesPerPixel": 1,
        "PhotometricInterpretation": "MONOCHROME2",
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": bits - 1,
        "PixelRepresentation": 0,
        "SegmentSequence": Items(list(segments)),
        "SharedFunctionalGroupsSequence": Items([shared]),
        "PerFrameFunctionalGroupsSequence": Items([group for _, group in frames]),
        "PixelData": data + b"\0" * (len(data) % 2),
    }
    built = item(**{key: value for key, value in (made | tags).items() if value is not None})
    if "PixelData" in built:
        built["PixelData"].VR = "OB"
    return save(built, path, syntax=syntax)


def write_complete_series(folder: Path, volume: np.ndarray, **tags: object) -> list[pydicom.Dataset]:
    """Write a series that highdicom accepts as source images, and return its data sets."""
    return [pydicom.dcmread(path) for path in write_series(folder, volume, **{**COMPLETE, **tags})]


def write_highdicom_seg(
    path: Path, sources: Sequence[pydicom.Dataset], mask: np.ndarray, kind: str, names: Sequence[str], **how: object
) -> Path:
    """Let highdicom write a SEG of `mask`: class numbers (slices, rows, columns), or (..., segments) shares 0 to 1."""
    import highdicom
    from pydicom.sr.codedict import codes

    described = [
        highdicom.seg.SegmentDescription(
            segment_number=number,
            segment_label=name,
            segmented_property_category=codes.SCT.Organ,
            segmented_property_type=codes.SCT.Liver,
            algorithm_type=highdicom.seg.SegmentAlgorithmTypeValues.MANUAL,
        )
        for number, name in enumerate(names, start=1)
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = highdicom.seg.Segmentation(
            source_images=list(sources),
            pixel_array=mask,
            segmentation_type=kind,
            segment_descriptions=described,
            series_instance_uid=uid("seg series"),
            series_number=1,
            sop_instance_uid=uid("seg", path),
            instance_number=1,
            manufacturer="m",
            manufacturer_model_name="m",
            software_versions="1",
            device_serial_number="1",
            **how,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        made.save_as(path)
    return path
