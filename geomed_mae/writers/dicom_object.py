"""The DICOM Segmentation object itself: made by highdicom, with the references of what its slices really are.

Frames lie where the source slices lie, by the positions that their own files state: gantry tilt needs no care, nothing
is resampled, and no affine is rounded. A frame of reference that the source lacks gets a new name. Planes have no place
and no thickness, and state no spacing of their own: the one frame of a segment refers to the image that it was made of.

highdicom is shown one plain header a slice, whatever the source (single files, some frames of an enhanced object, tiles
of a mosaic), because it accepts no subset of frames; the references are filled in afterwards.

Frames without a pixel of their segment are kept, so that a reader which stacks frames gets the whole volume back, until
there are more than KEPT_FRAMES: then they are left out, as the standard allows and most software does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.errors import MissingExtraError
from geomed_mae.readers.dicom.file import quiet
from geomed_mae.readers.dicom.origin import Origin, Reference
from geomed_mae.writers import CHANCE_STEPS
from geomed_mae.writers.dicom_codes import PRIVATE_SCHEME, Code, SegmentMeaning

NAME = "geomed-mae"
"""Manufacturer, model and algorithm: the object is made by this software."""
KEPT_FRAMES = 2048
"""Frames up to which empty ones are kept too."""
SERIES_NUMBER = 9000
"""Within the study, beyond what scanners number."""
DIGEST_HEX = 32
"""Digits of the model's digest that are stored."""
LONGEST_LABEL, LONGEST_DESCRIPTION = 64, 1024
"""Characters of a label (VR LO) and of a description (VR ST), which has the whole of a longer name."""
UTF8 = "ISO_IR 192"
"""Class names are in any script, and the patient's name is decoded when it is read."""
SLICE_CLASS, PLANE_CLASS = "1.2.840.10008.5.1.4.1.1.2", "1.2.840.10008.5.1.4.1.1.7"
"""Storage classes of the headers that highdicom is shown: CT Image, Secondary Capture."""
STAND_IN = "2.25."
"""Beginning of the UIDs of those headers; none of them stays in the object."""


@dataclass(frozen=True, slots=True)
class About:
    """What an object says beside its pixels.

    Attributes:
        origin: the source.
        segments: meaning of each segment.
        colours: red, green and blue of each segment, 0 to 255.
        model: the model's digest, or "".
    """

    origin: Origin
    segments: tuple[SegmentMeaning, ...]
    colours: tuple[tuple[int, ...], ...]
    model: str


def load_highdicom() -> Any:
    """Return the library.

    Raises:
        MissingExtraError: it is not installed.
    """
    try:
        import highdicom
        import highdicom.coding_schemes
        import highdicom.color
        import highdicom.seg
        import highdicom.sr
    except ImportError:
        raise MissingExtraError("writing DICOM SEG", "highdicom", "med") from None
    return highdicom


def build_object(array: np.ndarray, about: About, *, fractional: bool) -> Any:
    """Return the object as a data set.

    Args:
        array: uint8 (slices, rows, columns) segment numbers from 1, or with `fractional` uint8 (segment, slices, rows,
            columns) of 0 to CHANCE_STEPS.
        about: what it says of itself.
        fractional: store probabilities.

    Raises:
        MissingExtraError: highdicom is not installed.
    """
    hd = load_highdicom()
    pixels = np.zeros(array.shape[1:], np.uint8) if fractional else array
    kept = fractional or len(pixels) * len(about.segments) <= KEPT_FRAMES
    release = version(NAME)
    # pydicom and highdicom warn with values in hand, which may be a patient's.
    with quiet():
        made = hd.seg.Segmentation(
            source_images=_headers(about.origin, pixels.shape[-2:]),
            pixel_array=pixels,
            segmentation_type="FRACTIONAL" if fractional else "BINARY",
            segment_descriptions=_descriptions(hd, about, release),
            series_instance_uid=hd.UID(),
            series_number=SERIES_NUMBER,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer=NAME,
            manufacturer_model_name=NAME,
            software_versions=release,
            device_serial_number=about.model[:DIGEST_HEX] or release,
            fractional_type="PROBABILITY",
            max_fractional_value=CHANCE_STEPS,
            transfer_syntax_uid="1.2.840.10008.1.2.1",
            omit_empty_frames=not kept,
            content_label="SEGMENTATION",
            content_description="Segmentation by a trained model",
            content_creator_name=NAME,
            series_description="Probabilities of segments" if fractional else "Segmentation",
            specific_character_set=UTF8,
            coding_schemes=_schemes(hd, about.segments),
        )
        planes = _refer(made, about.origin)
        if fractional:
            _fill(made, array, planes)
        _set_attributes(made, about.origin.attributes)
    return made


def save_object(made: Any, path: Path) -> None:
    """Write the data set as a DICOM file.

    Raises:
        OSError: it cannot be written.
    """
    with quiet():
        made.save_as(path, enforce_file_format=True)


def _headers(origin: Origin, size: tuple[int, int]) -> list[Any]:
    """Return one plain header a slice: where it lies, and a UID that stands for it."""
    from pydicom.dataset import Dataset
    from pydicom.uid import generate_uid
    from pydicom.valuerep import DS

    def numbers(values: Sequence[float]) -> list[Any]:
        return [DS(float(value), auto_format=True) for value in values]

    study = origin.attributes["StudyInstanceUID"] or generate_uid(prefix=None)
    frame = origin.frame_of_reference or (None if origin.positions is None else generate_uid(prefix=None))
    headers = []
    for number in range(len(origin.slices)):
        header = Dataset()
        for keyword in ("PatientID", "PatientName", "PatientBirthDate", "PatientSex", "AccessionNumber", "StudyID"):
            setattr(header, keyword, "")
        header.StudyDate = header.StudyTime = None
        header.StudyInstanceUID, header.SeriesInstanceUID = study, f"{STAND_IN}0"
        header.SOPInstanceUID = f"{STAND_IN}{number + 1}"
        header.SOPClassUID = PLANE_CLASS if origin.positions is None else SLICE_CLASS
        header.Modality = "OT"
        header.Rows, header.Columns = size
        if frame is not None:
            header.FrameOfReferenceUID = frame
            header.PositionReferenceIndicator = ""
        if origin.positions is not None:
            header.PixelSpacing = numbers(origin.spacing)
            header.ImagePositionPatient = numbers(origin.positions[number])
            header.ImageOrientationPatient = numbers(origin.orientation)
            header.SliceThickness = numbers([origin.thickness_mm])[0]
        headers.append(header)
    return headers


def _descriptions(hd: Any, about: About, release: str) -> list[Any]:
    from pydicom.sr.codedict import codes

    said = {"model": about.model[:DIGEST_HEX]} if about.model else None
    algorithm = hd.AlgorithmIdentificationSequence(NAME, codes.cid7162.ArtificialIntelligence, release, parameters=said)
    descriptions = []
    for number, (segment, colour) in enumerate(zip(about.segments, about.colours, strict=True), 1):
        name = segment.name.replace("\\", " ")
        made = hd.seg.SegmentDescription(
            segment_number=number,
            segment_label=name[:LONGEST_LABEL],
            segmented_property_category=_concept(hd, segment.category),
            segmented_property_type=_concept(hd, segment.type),
            algorithm_type="AUTOMATIC",
            algorithm_identification=algorithm,
            display_color=hd.color.CIELabColor.from_rgb(*colour),
        )
        if len(name) > LONGEST_LABEL:
            made.SegmentDescription = name[:LONGEST_DESCRIPTION]
        if segment.side is not None:
            thing = made.SegmentedPropertyTypeCodeSequence[0]
            thing.SegmentedPropertyTypeModifierCodeSequence = [_concept(hd, segment.side)]
        descriptions.append(made)
    return descriptions


def _concept(hd: Any, code: Code) -> Any:
    return hd.sr.CodedConcept(code.value, code.scheme, code.meaning)


def _schemes(hd: Any, segments: Sequence[SegmentMeaning]) -> list[Any] | None:
    """Say whose the private scheme is, where a segment uses it (PS3.3 C.12.1, Coding Scheme Identification)."""
    if not any(segment.type.scheme == PRIVATE_SCHEME for segment in segments):
        return None
    return [
        hd.coding_schemes.CodingSchemeIdentificationItem(
            PRIVATE_SCHEME, name="Class names", responsible_organization=NAME
        )
    ]


def _refer(made: Any, origin: Origin) -> list[int]:
    """Put what the slices really are in the place of the headers; return the slice of each frame."""
    items = [item.DerivationImageSequence[0].SourceImageSequence[0] for item in made.PerFrameFunctionalGroupsSequence]
    # All of them are read first: frames of several segments share the item of their slice.
    planes = [int(str(source.ReferencedSOPInstanceUID).removeprefix(STAND_IN)) - 1 for source in items]
    for source, plane in zip(items, planes, strict=True):
        real = origin.slices[plane]
        source.ReferencedSOPClassUID, source.ReferencedSOPInstanceUID = real.sop_class, real.instance
        source.SpatialLocationsPreserved = "YES" if real.whole else "NO"
        if real.frame is not None:
            source.ReferencedFrameNumber = real.frame
    everything = _instances((*origin.slices, *origin.further))
    made.SourceImageSequence = [_item(one, frames) for one, frames in everything]
    series = dict.fromkeys(one.series for one, _ in everything)
    made.ReferencedSeriesSequence = [
        _series(name, [one for one, _ in everything if one.series == name]) for name in series if name
    ]
    if not any(series):
        del made.ReferencedSeriesSequence
    return planes


def _instances(references: Sequence[Reference]) -> list[tuple[Reference, list[int]]]:
    """Return each file once, with the frames of it that are meant; none where all are."""
    frames: dict[str, list[int]] = {}
    first: dict[str, Reference] = {}
    for one in references:
        first.setdefault(one.instance, one)
        frames.setdefault(one.instance, []).extend([] if one.frame is None else [one.frame])
    return [(one, frames[uid] if len(set(frames[uid])) < one.frames else []) for uid, one in first.items()]


def _item(reference: Reference, frames: Sequence[int] = ()) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.ReferencedSOPClassUID, item.ReferencedSOPInstanceUID = reference.sop_class, reference.instance
    if frames:
        item.ReferencedFrameNumber = sorted(set(frames))
    return item


def _series(uid: str, members: Sequence[Reference]) -> Any:
    from pydicom.dataset import Dataset

    item = Dataset()
    item.SeriesInstanceUID = uid
    item.ReferencedInstanceSequence = [_item(one) for one in members]
    return item


def _fill(made: Any, array: np.ndarray, planes: Sequence[int]) -> None:
    """Put probabilities in the place of the zeros of which the object was made.

    highdicom takes them as float32 and looks for their distinct values first, which takes eight times the memory.
    Its frames are all slices of the first segment, then those of the next.
    """
    made.PixelData = b""  # the zeros go before as much comes
    count = len(planes) // len(array)
    pixels = bytearray(array.size + array.size % 2)
    frames = np.frombuffer(pixels, np.uint8, array.size).reshape(len(planes), *array.shape[-2:])
    for number, plane in enumerate(planes):
        frames[number] = array[number // count, plane]
    made.PixelData = bytes(pixels)
    if len(array) > 1:
        made.SegmentsOverlap = "UNDEFINED"


def _set_attributes(made: Any, attributes: Mapping[str, str]) -> None:
    """Copy what the source says of patient, study and compression as it stands there, valid or not."""
    for element in _elements(attributes):
        made.add(element)


def _elements(attributes: Mapping[str, str]) -> Iterator[Any]:
    from pydicom.config import IGNORE
    from pydicom.datadict import dictionary_VR, tag_for_keyword
    from pydicom.dataelem import DataElement

    for keyword, text in attributes.items():
        if keyword == "StudyInstanceUID" and not text:
            continue
        tag = tag_for_keyword(keyword)
        yield DataElement(tag, dictionary_VR(tag), text, validation_mode=IGNORE)
