"""Tiny real DICOM files for tests: one slice, a series, an enhanced multi-frame object, and damage done to them."""

from __future__ import annotations

import itertools
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydicom import config
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sequence import Sequence as Items
from pydicom.uid import UID, ExplicitVRLittleEndian, generate_uid

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)

SOP_CLASSES = {
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
    "PT": "1.2.840.10008.5.1.4.1.1.128",
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "MG": "1.2.840.10008.5.1.4.1.1.1.2",
    "US": "1.2.840.10008.5.1.4.1.1.6.1",
}

_numbers = itertools.count()


def uid(*words: object) -> str:
    """Return the UID that belongs to these words, always the same."""
    return generate_uid(entropy_srcs=[str(word) for word in words])


def dataset(array: np.ndarray, **tags: object) -> Dataset:
    """Return a plain CT data set around `array` ([frames,] rows, columns); a tag given as None is left out."""
    number = next(_numbers)
    modality = str(tags.get("Modality", "CT"))
    signed = array.dtype.kind == "i"
    bits = 8 * array.dtype.itemsize
    colour = array.ndim >= 3 and array.shape[-1] == 3
    rows, columns = array.shape[-3:-1] if colour else array.shape[-2:]
    values: dict[str, object] = {
        "SOPClassUID": SOP_CLASSES.get(modality, SOP_CLASSES["CT"]),
        "SOPInstanceUID": uid("instance", number),
        "StudyInstanceUID": uid("study"),
        "SeriesInstanceUID": uid("series"),
        "FrameOfReferenceUID": uid("frame"),
        "PatientID": "P1",
        "Modality": modality,
        "InstanceNumber": number,
        "ImageType": ["ORIGINAL", "PRIMARY", "AXIAL"],
        "SamplesPerPixel": 3 if colour else 1,
        "PhotometricInterpretation": "RGB" if colour else "MONOCHROME2",
        "Rows": rows,
        "Columns": columns,
        "BitsAllocated": bits,
        "BitsStored": bits,
        "HighBit": int(tags.get("BitsStored") or bits) - 1,
        "PixelRepresentation": int(signed),
        "PixelData": array.tobytes(),
    }
    if colour:
        values["PlanarConfiguration"] = 0
    if modality == "CT":
        values |= {"RescaleSlope": "1", "RescaleIntercept": "-1024", "KVP": "120"}
    made = Dataset()
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        for keyword, value in (values | tags).items():
            if value is not None:
                setattr(made, keyword, value)
    if "PixelData" in made:
        made["PixelData"].VR = "OB" if bits == 8 else "OW"
    return made


def save(made: Dataset, path: Path, *, syntax: str = ExplicitVRLittleEndian, preamble: bool = True) -> Path:
    """Write a data set; without a preamble it is the bare elements."""
    path.parent.mkdir(parents=True, exist_ok=True)
    syntax = UID(syntax)
    with warnings.catch_warnings(), config.disable_value_validation():
        warnings.simplefilter("ignore")
        if preamble:
            made.file_meta = FileMetaDataset()
            made.file_meta.TransferSyntaxUID = syntax
            made.file_meta.MediaStorageSOPClassUID = made.get("SOPClassUID", "")
            made.file_meta.MediaStorageSOPInstanceUID = made.get("SOPInstanceUID") or uid("no instance")
            made.save_as(path, enforce_file_format=True)
        else:
            made.save_as(path, implicit_vr=syntax.is_implicit_VR, little_endian=syntax.is_little_endian)
    return path


def write_slice(
    path: Path,
    array: np.ndarray,
    *,
    position: Sequence[float] | None = (0.0, 0.0, 0.0),
    orientation: Sequence[float] | None = AXIAL,
    spacing: Sequence[float] | None = (1.0, 1.0),
    **tags: object,
) -> Path:
    """Write one slice (rows, columns) of a volume."""
    place = {
        "ImagePositionPatient": None if position is None else [f"{value:.10g}" for value in position],
        "ImageOrientationPatient": None if orientation is None else list(orientation),
        "PixelSpacing": None if spacing is None else list(spacing),
    }
    return save(dataset(array, **(place | tags)), path)


def write_series(
    folder: Path, volume: np.ndarray, *, step: Sequence[float] = (0.0, 0.0, 2.0), **tags: object
) -> list[Path]:
    """Write a volume (slices, rows, columns), one file a slice, `step` mm apart, named against their order."""
    count = len(volume)
    return [
        write_slice(
            folder / f"{count - index:04d}.dcm", plane, **{"position": tuple(index * part for part in step), **tags}
        )
        for index, plane in enumerate(volume)
    ]


def enhanced(volume: np.ndarray, frames: Sequence[dict[str, object]], **tags: object) -> Dataset:
    """Return an enhanced MR object; each frame's dict has `position` and may have `slope`, `echo` and `temporal`."""
    made = dataset(
        volume,
        **({"Modality": "MR", "SOPClassUID": "1.2.840.10008.5.1.4.1.1.4.1", "NumberOfFrames": len(frames)} | tags),
    )
    shared, per_frame = Dataset(), []
    shared.PlaneOrientationSequence = Items([_item(ImageOrientationPatient=list(AXIAL))])
    shared.PixelMeasuresSequence = Items([_item(PixelSpacing=[1.5, 0.5], SliceThickness=2.0)])
    for frame in frames:
        item = Dataset()
        item.PlanePositionSequence = Items([_item(ImagePositionPatient=list(frame["position"]))])
        item.PixelValueTransformationSequence = Items(
            [_item(RescaleSlope=frame.get("slope", 1.0), RescaleIntercept=0.0, RescaleType="US")]
        )
        item.MREchoSequence = Items([_item(EffectiveEchoTime=float(frame.get("echo", 10.0)))])
        item.FrameContentSequence = Items([_item(StackID="1", TemporalPositionIndex=frame.get("temporal", 1))])
        per_frame.append(item)
    made.SharedFunctionalGroupsSequence = Items([shared])
    made.PerFrameFunctionalGroupsSequence = Items(per_frame)
    return made


def _item(**tags: object) -> Dataset:
    item = Dataset()
    for keyword, value in tags.items():
        setattr(item, keyword, value)
    return item


def patch(path: Path, old: bytes, new: bytes) -> Path:
    """Replace bytes that occur exactly once by as many others, to write what no library writes."""
    content = path.read_bytes()
    if content.count(old) != 1 or len(old) != len(new):
        raise ValueError(f"{old!r} occurs {content.count(old)} times, or {new!r} is of another length")
    path.write_bytes(content.replace(old, new))
    return path


def csa_header(tags: dict[str, Sequence[str]], *, version: int = 2) -> bytes:
    """Return a Siemens CSA header of the tags, as its two versions are laid out; a tag without values has no items."""
    items = {name: [*values, *[""] * (6 - len(values))] if values else [] for name, values in tags.items()}
    made = b"SV10\4\3\2\1" if version == 2 else b""
    made += struct.pack("<2I", len(items), 77)
    shift = 6  # version 1 adds the number of a tag's items to every length
    for name, values in items.items():
        kind = b"IS" if values and values[0].isdecimal() else b"FD" if name.endswith("Vector") else b"SH"
        made += struct.pack("<64si4s3i", name.encode(), len(tags[name]), kind, 3, len(values), 77)
        for value in values:
            content = value.encode() + b"\0" if value else b""
            length = len(content)
            if version == 2:
                made += struct.pack("<4i", length, length, 77, length)
            else:
                made += struct.pack("<4i", length + shift, length, 77, length)
            made += content + b"\0" * (-length % 4)
    return made


def protocol(centres: np.ndarray) -> bytes:
    """Return a CSA series header of a protocol that lists the centres (n, 3) of slices in mm."""
    lines = ["### ASCCONV BEGIN ###", f"sSliceArray.lSize   = {len(centres)}"]
    for number, centre in enumerate(centres):
        for axis, value in zip(("Sag", "Cor", "Tra"), centre, strict=True):
            if value:
                lines.append(f"sSliceArray.asSlice[{number}].sPosition.d{axis}  = {value:.9g}")
    text = "\n".join([*lines, "### ASCCONV END ###"])
    return csa_header({"MrPhoenixProtocol": [text]})


def mosaic(
    volume: np.ndarray, *, orientation: Sequence[float] = AXIAL, spacing: Sequence[float] = (1.5, 2.0), **tags: object
) -> Dataset:
    """Return a mosaic of a volume (slices, rows, columns) whose first slice's corner is at (10, 20, 30) mm.

    Private tags: `images` (0019,100A), `csa` (0029,1010), `series_csa` (0029,1020), None to leave one out.
    """
    count, rows, columns = volume.shape
    across = int(np.ceil(np.sqrt(count)))
    sheet = np.zeros((across * rows, across * columns), volume.dtype)
    for number, plane in enumerate(volume):
        top, left = number // across * rows, number % across * columns
        sheet[top : top + rows, left : left + columns] = plane
    first, second = np.reshape(np.array(orientation), (2, 3))
    shift = (across - 1) / 2 * (rows * spacing[0] * second + columns * spacing[1] * first)
    private = {name: tags.pop(name, None) for name in ("images", "csa", "series_csa")}
    made = dataset(
        sheet,
        **{
            "Modality": "MR",
            "Manufacturer": "SIEMENS",
            "ImageType": ["ORIGINAL", "PRIMARY", "M", "ND", "MOSAIC"],
            "ImagePositionPatient": [f"{value:.10g}" for value in np.array([10.0, 20.0, 30.0]) - shift],
            "ImageOrientationPatient": list(orientation),
            "PixelSpacing": list(spacing),
            "SpacingBetweenSlices": 3.5,
            "SliceThickness": 3.0,
        }
        | tags,
    )
    if private["images"] is not None:
        made.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0A, "US", private["images"])
    if private["csa"] is not None or private["series_csa"] is not None:
        block = made.private_block(0x0029, "SIEMENS CSA HEADER", create=True)
        for element, name in ((0x10, "csa"), (0x20, "series_csa")):
            if private[name] is not None:
                block.add_new(element, "OB", private[name])
    return made
