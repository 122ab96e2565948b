"""DICOM SEG: the same voxels for highdicom, pydicom and SimpleITK in a process of their own, and for our own reader."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pydicom
import pytest
from highdicom.color import CIELabColor
from pydicom.uid import ImplicitVRLittleEndian

from geomed_mae import readers
from geomed_mae.errors import ConfigError, MissingExtraError, OutputError, ReadError
from geomed_mae.image import Image, VolumeGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import LabelQuery, read_labels
from geomed_mae.readers.dicom.origin import read_origin
from geomed_mae.readers.source import Source
from geomed_mae.writers import NODATA, dicom_object, dicom_seg
from geomed_mae.writers.dicom_codes import private_value, segment_meaning, segment_numbers
from geomed_mae.writers.legend import colours
from tests.consumer import elsewhere
from tests.make_dicom import AXIAL, csa_header, dataset, enhanced, mosaic, save, uid, write_series, write_slice

RNG = np.random.default_rng(7)
CLASSES = ("background", "liver", "left kidney", "Zyste")
"""A concept of SNOMED CT, one with a side, and a name that no list has."""
ABSENT = 2
"""Number of a class that occurs nowhere."""
OBLIQUE = (0.8, 0.6, 0.0, -0.48, 0.64, 0.6)
WHO = {
    "PatientName": "Müller^Jörg",
    "PatientBirthDate": "19490523",
    "PatientSex": "M",
    "StudyDate": "20040119",
    "AccessionNumber": "ACC7",
    "SpecificCharacterSet": "ISO_IR 100",
}
MODEL = "ab" * 32
SHAPE = (5, 9, 8)
"""Of whole bytes at one bit a voxel: GDCM, which SimpleITK reads with, gets the bits of a broken last byte wrong."""


def values(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return RNG.integers(0, 1000, shape).astype(np.int16)


def series(folder: Path, **how: object) -> str:
    write_series(folder, values(), **{**WHO, "SliceThickness": "2", **how})
    return "ct"


def cine(folder: Path) -> str:
    """An enhanced object of two time points, whose frames alternate."""
    frames = [{"position": (3.0, 4.0, 2.0 * (n // 2)), "temporal": n % 2 + 1} for n in range(10)]
    save(enhanced(values((10, 9, 7)), frames, **WHO), folder / "a.dcm")
    return "mr"


def sheet(folder: Path) -> str:
    csa = csa_header({"NumberOfImagesInMosaic": ["5"], "SliceNormalVector": ["0", "0", "1"]})
    save(mosaic(values(), csa=csa, **WHO), folder / "a.dcm")
    return "mr"


def bound(folder: Path) -> str:
    write_series(folder / "ct", values(), step=(0, 0.5, 1.5), SeriesInstanceUID=uid("ct"), InstanceNumber=None, **WHO)
    pet = {"Modality": "PT", "RescaleSlope": "0.5", "RescaleIntercept": "0", "Units": "BQML", "InstanceNumber": None}
    write_series(folder / "pet", values((4, 5, 4)), step=(0, 0, 3.1), spacing=(2.0, 1.7), SeriesInstanceUID=uid("pet"),
                 **{**WHO, **pet})  # fmt: skip
    return "pet-ct"


def projection(folder: Path) -> str:
    made = dataset(values((9, 7)).astype(np.uint16), Modality="DX", ImagerPixelSpacing=[0.2, 0.3], **WHO)
    save(made, folder / "a.dcm")
    return "xray"


def clip(folder: Path) -> str:
    save(
        dataset(RNG.integers(0, 255, (3, 9, 7)).astype(np.uint8), Modality="US", NumberOfFrames=3, **WHO), folder / "a"
    )
    return "ultrasound"


CASES = {
    "axial": series,
    "oblique": lambda folder: series(folder, orientation=OBLIQUE, step=(0.72, -0.96, 1.6), spacing=(0.7, 1.3)),
    "tilted": lambda folder: series(folder, step=(0.0, 0.8, 2.0)),
    "no frame of reference, odd values": lambda folder: series(
        folder, FrameOfReferenceUID=None, SliceThickness=None, PatientSex="?", PatientBirthDate="about 1949"
    ),
    "one slice": lambda folder: [write_slice(folder / "a.dcm", values((9, 7)), position=(1, 2, 3), **WHO), "ct"][1],
    "enhanced": cine,
    "mosaic": sheet,
    "bound": bound,
    "projection": projection,
    "clip": clip,
}
LOCATED = [name for name in CASES if name not in ("projection", "clip")]


def opened(folder: Path, modality: str) -> list[tuple[Source, Image]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sources = readers.survey(files, resolve_modalities(modality)).sources
    return [(source, readers.read(source)) for source in sources]


def class_map(shape: tuple[int, ...]) -> np.ndarray:
    """Class numbers with an empty end, without ABSENT, and with pixels that are not valid."""
    found = RNG.choice([0, 1, 3], shape).astype(np.uint8)
    if len(shape) == 3 and shape[0] > 1:
        found[-1] = 0
    found[..., 0] = NODATA
    return found


def chances_of(numbers: np.ndarray) -> np.ndarray:
    found = RNG.random((len(CLASSES), *numbers.shape)).astype(np.float32)
    found /= found.sum(axis=0)
    found[:, numbers == NODATA] = np.nan
    return found


def write_all(folder: Path, name: str, source: Source, image: Image) -> None:
    """Write map, probabilities and what a consumer compares them with."""
    numbers, origin = class_map(image.spatial_shape), read_origin(source)
    chances = chances_of(numbers)
    about = (image.spatial_shape, image.geometry, CLASSES)
    with dicom_seg.stream(folder / "seg.dcm", *about, origin=origin, model=MODEL) as target:
        for row in range(len(numbers)):
            target.put(numbers[row : row + 1])
    with dicom_seg.stream_chances(folder / "chances.dcm", *about, origin=origin) as target:
        for row in range(len(numbers)):
            target.put(chances[:, row : row + 1])
    volume = isinstance(image.geometry, VolumeGeometry)
    np.save(folder / "map.npy", numbers if volume else numbers[None])
    np.save(folder / "chances.npy", chances if volume else chances[:, None])
    affine = image.geometry.affine.tolist() if volume else None
    (folder / "about.json").write_text(json.dumps({"affine": affine, "name": name}))


def write_alone(folder: Path, source: Source, image: Image) -> None:
    """Write a map of one segment: ITK takes the frames of several for slices of one volume."""
    numbers = RNG.integers(0, 2, image.spatial_shape).astype(np.uint8)
    origin, classes = read_origin(source), ("background", "liver")
    dicom_seg.write(folder / "alone.dcm", numbers, image.geometry, classes, origin=origin)
    np.save(folder / "alone.npy", numbers)


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> dict[str, Path]:
    """A folder a case: source files, seg.dcm, chances.dcm, the truth as arrays."""
    root = tmp_path_factory.mktemp("cases")
    for name, make in CASES.items():
        folder = root / name
        modality = make(folder / "source")
        source, image = opened(folder / "source", modality)[-1]  # the second time point, the last frame
        write_all(folder, name, source, image)
        if name in ("axial", "oblique"):
            write_alone(folder, source, image)
    return {name: root / name for name in CASES}


CONSUMER = """
import json, sys, warnings
from pathlib import Path
import highdicom, numpy as np, pydicom, SimpleITK
found = {}
for folder in map(Path, sys.argv[1:]):
    about = json.loads((folder / "about.json").read_text())
    truth, chances = np.load(folder / "map.npy"), np.load(folder / "chances.npy")
    sources = {}
    for path in (folder / "source").rglob("*"):
        if path.is_file():
            header = pydicom.dcmread(path, force=True, stop_before_pixels=True)
            sources[header.SOPInstanceUID] = header
    said = {"wrong": 0, "apart_mm": 0.0, "strangers": 0, "frames_wrong": 0}
    for file in ("seg.dcm", "chances.dcm"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a birth date that is none
            seg = highdicom.seg.segread(folder / file)
            plain = pydicom.dcmread(folder / file)
            stored = plain.pixel_array.reshape(-1, *truth.shape[1:])
        shared = seg.SharedFunctionalGroupsSequence[0]
        affine = None if about["affine"] is None else np.linalg.inv(about["affine"])
        covered = set()
        for number, item in enumerate(seg.PerFrameFunctionalGroupsSequence):
            where = item if "SegmentIdentificationSequence" in item else shared
            segment = where.SegmentIdentificationSequence[0].ReferencedSegmentNumber
            source = item.DerivationImageSequence[0].SourceImageSequence[0]
            header = sources.get(source.ReferencedSOPInstanceUID)
            if header is None or header.SOPClassUID != source.ReferencedSOPClassUID:
                said["strangers"] += 1
                continue
            plane = 0
            if affine is not None:
                position = np.array(item.PlanePositionSequence[0].ImagePositionPatient, float)
                index = affine @ [*position, 1]
                plane = int(np.rint(index[0]))
                step = np.linalg.norm(np.array(about["affine"])[:3, :3] @ (index[:3] - [plane, 0, 0]))
                said["apart_mm"] = max(said["apart_mm"], step)
                theirs = header
                if "PerFrameFunctionalGroupsSequence" in header:
                    theirs = header.PerFrameFunctionalGroupsSequence[source.ReferencedFrameNumber - 1]
                    theirs = theirs.PlanePositionSequence[0]
                if about["name"] != "mosaic":
                    apart = np.linalg.norm(np.array(theirs.ImagePositionPatient, float) - position)
                    said["apart_mm"] = max(said["apart_mm"], apart)
            covered.add((segment, plane))
            if file == "seg.dcm":
                expected = truth[plane] == segment
            else:
                expected = np.rint(np.nan_to_num(chances[segment, plane]) * 250)
            said["frames_wrong"] += int((stored[number] != expected).sum())
        said[file] = {
            "complete": covered == {(s, p) for s in (1, 2, 3) for p in range(len(truth))},
            "labels": [segment.SegmentLabel for segment in seg.SegmentSequence],
            "types": [
                [str(getattr(segment.SegmentedPropertyTypeCodeSequence[0], part)) for part in
                 ("CodingSchemeDesignator", "CodeValue", "CodeMeaning")] for segment in seg.SegmentSequence
            ],
            "algorithm": [segment.SegmentAlgorithmType for segment in seg.SegmentSequence],
            "kind": str(seg.SegmentationType),
            "instances": sorted(item.ReferencedSOPInstanceUID for series in seg.ReferencedSeriesSequence
                                for item in series.ReferencedInstanceSequence),
            "unknown": sum(item.ReferencedSOPInstanceUID not in sources for item in seg.SourceImageSequence),
            "patient": str(plain.PatientName),
            "series": [series.SeriesInstanceUID for series in seg.ReferencedSeriesSequence],
            "frames": [
                np.atleast_1d(item.get("ReferencedFrameNumber", [])).tolist() for item in seg.SourceImageSequence
            ],
        }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seg = highdicom.seg.segread(folder / "seg.dcm")
        geometry = seg.get_volume_geometry() if affine is not None else None
        said["volume"] = None
        if geometry is not None:
            volume = seg.get_volume(combine_segments=True, rescale_fractional=False)
            grid = np.stack([*np.meshgrid(*map(np.arange, truth.shape), indexing="ij"), np.ones(truth.shape)])
            place = np.tensordot(np.linalg.inv(volume.affine) @ np.array(about["affine"]), grid, axes=1)
            index = np.rint(place[:3]).astype(int)
            expected = np.where(truth == 255, 0, truth)
            said["volume"] = int((volume.array[tuple(index)] != expected).sum())
            said["volume_shape"] = sorted(volume.array.shape) == sorted(truth.shape)
    if (folder / "alone.dcm").is_file():
        itk, alone = SimpleITK.ReadImage(str(folder / "alone.dcm")), np.load(folder / "alone.npy")
        wrong = 0
        for index in np.ndindex(alone.shape):
            place = (np.array(about["affine"]) @ [*index, 1])[:3]
            wrong += bool(itk[itk.TransformPhysicalPointToIndex(place.tolist())]) != bool(alone[index])
        said["itk_wrong"] = wrong
    found[about["name"]] = said
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def read_elsewhere(written) -> dict[str, dict]:
    return elsewhere(CONSUMER, *written.values())


@pytest.mark.parametrize("name", CASES)
def test_other_programs_read_the_same_voxels_at_the_source_slices(read_elsewhere, name):
    said = read_elsewhere[name]
    assert said["strangers"] == said["frames_wrong"] == 0
    assert said["apart_mm"] < 0.01
    for file, kind in (("seg.dcm", "BINARY"), ("chances.dcm", "FRACTIONAL")):
        about = said[file]
        assert about["complete"] and about["unknown"] == 0 and about["kind"] == kind
        assert about["labels"] == list(CLASSES[1:]) and set(about["algorithm"]) == {"AUTOMATIC"}
        assert about["types"] == [
            ["SCT", "10200004", "Liver"],
            ["SCT", "64033007", "Kidney"],
            ["99GEOMEDMAE", "ZYSTE", "Zyste"],
        ]
        assert about["patient"] == "Müller^Jörg"


@pytest.mark.parametrize("name", ["axial", "oblique", "one slice", "enhanced", "mosaic"])
def test_other_programs_stack_the_frames_to_the_whole_volume(read_elsewhere, name):
    """Empty frames are kept: left out, the volume would be shorter than the image without a word."""
    assert read_elsewhere[name]["volume"] == 0 and read_elsewhere[name]["volume_shape"]


@pytest.mark.parametrize("name", ["axial", "oblique"])
def test_simpleitk_finds_every_voxel_at_its_place(read_elsewhere, name):
    assert read_elsewhere[name]["itk_wrong"] == 0


def test_a_part_of_an_enhanced_object_names_its_frames(read_elsewhere, written):
    assert read_elsewhere["enhanced"]["seg.dcm"]["frames"] == [[2, 4, 6, 8, 10]]
    assert read_elsewhere["clip"]["seg.dcm"]["frames"] == [[3]]
    assert read_elsewhere["axial"]["seg.dcm"]["frames"] == [[]] * 5
    assert len(read_elsewhere["axial"]["seg.dcm"]["instances"]) == 5


def test_bound_series_are_segmented_on_the_grid_of_the_first_and_refer_to_both(read_elsewhere):
    about = read_elsewhere["bound"]["seg.dcm"]
    assert about["series"] == [uid("ct"), uid("pet")] and len(about["instances"]) == 9


@pytest.mark.parametrize("name", CASES)
def test_our_own_reader_puts_every_voxel_back(written, name):
    folder = written[name]
    modality = {"bound": "pet-ct", "projection": "xray", "clip": "ultrasound", "mosaic": "mr", "enhanced": "mr"}
    source, image = opened(folder / "source", modality.get(name, "ct"))[-1]
    query = LabelQuery(identity=source.identity, classes=CLASSES)
    numbers = np.load(folder / "map.npy")
    labels = read_labels(folder / "seg.dcm", image, query)
    np.testing.assert_array_equal(
        labels.array.reshape(numbers.shape), np.where(numbers == NODATA, 0, numbers), err_msg=name
    )


@pytest.mark.parametrize("name", ["gantrytilting", "philips_enhanced_anatomical"])
@pytest.mark.data
def test_real_series_come_back_voxel_for_voxel(shared_data, tmp_path, name):
    """The tilted CT, whose voxels no volume of right angles can hold, and frames of an enhanced MR."""
    folder = tmp_path / name
    (folder / "source").mkdir(parents=True)
    for path in sorted((shared_data / "med" / "dicom_traps" / name).rglob("*.dcm")):
        (folder / "source" / path.name).write_bytes(path.read_bytes())
    source, image = opened(folder / "source", "ct" if name == "gantrytilting" else "mr")[-1]
    assert name != "gantrytilting" or "TILT" in source.flags
    write_all(folder, name, source, image)
    said = elsewhere(CONSUMER, folder)[name]
    assert said["strangers"] == said["frames_wrong"] == 0 and said["apart_mm"] < 0.01
    assert said["seg.dcm"]["complete"] and said["seg.dcm"]["unknown"] == 0
    labels = read_labels(folder / "seg.dcm", image, LabelQuery(identity=source.identity, classes=CLASSES))
    numbers = np.load(folder / "map.npy")
    np.testing.assert_array_equal(labels.array, np.where(numbers == NODATA, 0, numbers))


def axial(tmp_path: Path, **how: object) -> tuple[Source, Image]:
    series(tmp_path / "source", **how)
    return opened(tmp_path / "source", "ct")[0]


def test_nothing_but_patient_and_study_comes_from_the_source(tmp_path):
    secrets = {
        "InstitutionName": "SECRET Hospital",
        "OperatorsName": "SECRET^Operator",
        "StationName": "SECRET1",
        "DeviceSerialNumber": "SECRET2",
        "SeriesDescription": "SECRET series",
        "StudyDescription": "SECRET study",
        "ProtocolName": "SECRET protocol",
        "PatientAddress": "SECRET street",
        "OtherPatientIDs": "SECRET3",
        "AcquisitionDate": "20031224",
        "SeriesDate": "20031225",
        "Manufacturer": "SECRET maker",
    }
    source, image = axial(tmp_path / "SECRET folder", **secrets)
    path = dicom_seg.write(
        tmp_path / "a.dcm", class_map(SHAPE), image.geometry, CLASSES, origin=read_origin(source), model=MODEL
    )
    content = path.read_bytes()
    for secret in (b"SECRET", b"20031224", b"20031225", str(tmp_path).encode()):
        assert secret not in content
    found = pydicom.dcmread(path)
    assert (found.PatientID, found.StudyDate, found.AccessionNumber) == ("P1", "20040119", "ACC7")
    assert found.StudyInstanceUID == uid("study") and found.FrameOfReferenceUID == uid("frame")
    assert found.SeriesInstanceUID != uid("series")
    (algorithm,) = found.SegmentSequence[0].SegmentationAlgorithmIdentificationSequence
    assert (algorithm.AlgorithmName, algorithm.AlgorithmParameters) == ("geomed-mae", f"model={MODEL[:32]}")


def test_uids_are_new_in_every_file(tmp_path):
    source, image = axial(tmp_path)
    numbers, origin = class_map(SHAPE), read_origin(source)
    for name in "ab":
        dicom_seg.write(tmp_path / name, numbers, image.geometry, CLASSES, origin=origin)
    first, second = (pydicom.dcmread(tmp_path / name) for name in "ab")
    assert first.SOPInstanceUID != second.SOPInstanceUID and first.SeriesInstanceUID != second.SeriesInstanceUID
    assert first.PixelData == second.PixelData


def test_of_very_many_frames_the_empty_ones_are_left_out_and_no_voxel_is_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(dicom_object, "KEPT_FRAMES", 14)  # 5 slices of 3 segments are 15
    source, image = axial(tmp_path)
    numbers = class_map(SHAPE)
    path = dicom_seg.write(tmp_path / "a.dcm", numbers, image.geometry, CLASSES, origin=read_origin(source))
    assert pydicom.dcmread(path).NumberOfFrames == 8  # 4 slices that are not empty, of 2 classes that occur
    assert len(pydicom.dcmread(path).SegmentSequence) == 3
    labels = read_labels(path, image, LabelQuery(identity=source.identity, classes=CLASSES))
    np.testing.assert_array_equal(labels.array, np.where(numbers == NODATA, 0, numbers))


def test_a_map_without_any_finding_is_a_whole_object_too(tmp_path):
    source, image = axial(tmp_path)
    path = dicom_seg.write(
        tmp_path / "a.dcm", np.zeros(SHAPE, np.uint8), image.geometry, CLASSES, origin=read_origin(source)
    )
    found = pydicom.dcmread(path)
    assert found.NumberOfFrames == 15 and not found.pixel_array.any() and len(found.SegmentSequence) == 3


def test_codes_of_the_recipe_stand_before_names(tmp_path):
    source, image = axial(tmp_path)
    codes = {
        "liver": {"scheme": "99X", "value": "L1", "meaning": "My liver", "category": "physical object"},
        "Zyste": {"scheme": "SCT", "value": "441457006", "meaning": "Cyst"},
    }
    path = dicom_seg.write(
        tmp_path / "a.dcm", class_map(SHAPE), image.geometry, CLASSES, origin=read_origin(source), codes=codes
    )
    first, second, third = pydicom.dcmread(path).SegmentSequence
    assert first.SegmentedPropertyTypeCodeSequence[0].CodeMeaning == "My liver"
    assert first.SegmentedPropertyCategoryCodeSequence[0].CodeMeaning == "Physical object"
    side = second.SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert (side.CodingSchemeDesignator, side.CodeMeaning) == ("SCT", "Left")
    assert third.SegmentedPropertyTypeCodeSequence[0].CodeValue == "441457006"
    assert third.SegmentedPropertyCategoryCodeSequence[0].CodeValue == "85756007"


@pytest.mark.parametrize(
    ("name", "category", "code"),
    [
        ("Spleen", "Anatomical Structure", ("SCT", "Spleen")),
        ("adrenal_gland_right", "Anatomical Structure", ("SCT", "Adrenal gland")),
        ("tumour", "Morphologically Abnormal Structure", ("SCT", "Neoplasm")),
        ("edema", "Morphologically Abnormal Structure", ("SCT", "Edema")),
        ("bone", "Tissue", ("SCT", "Bone")),
        ("left ventricle", "Anatomical Structure", ("SCT", "Left ventricle")),
        ("normal", "Tissue", ("99GEOMEDMAE", "normal")),
        ("vertebra 3\\4", "Tissue", ("99GEOMEDMAE", "vertebra 3 4")),
        ("肝臓", "Tissue", ("99GEOMEDMAE", "肝臓")),
    ],
)
def test_names_that_the_standard_lists_get_its_code(name, category, code):
    found = segment_meaning(name, None)
    assert (found.category.meaning, (found.type.scheme, found.type.meaning)) == (category, code)
    assert len(found.type.value) <= 16


def test_private_codes_of_long_names_differ_and_stay_what_they_are():
    assert private_value("a very long name, the first") == private_value("a very long name, the first")
    assert private_value("a very long name, the first") != private_value("a very long name, the second")


def test_every_class_is_a_segment_but_the_background_wherever_it_stands(tmp_path):
    assert segment_numbers(("Background", "a", "b")) == (1, 2) and segment_numbers(("lung", "heart")) == (0, 1)
    assert segment_numbers(("a", "background", "b")) == (0, 2)
    source, image = axial(tmp_path)
    numbers = RNG.integers(0, 2, SHAPE).astype(np.uint8)
    path = dicom_seg.write(tmp_path / "a", numbers, image.geometry, ("lung", "heart"), origin=read_origin(source))
    labels = read_labels(path, image, LabelQuery(identity=source.identity, classes=("lung", "heart")))
    np.testing.assert_array_equal(labels.array, numbers)
    with pytest.raises(ConfigError, match="leave no segment"):
        dicom_seg.write(tmp_path / "b", numbers, image.geometry, ("background",), origin=read_origin(source))


def test_names_beyond_a_label_are_told_apart_by_their_description(tmp_path):
    source, image = axial(tmp_path)
    classes = ("background", "n" * 100, "n" * 100 + "b", "liver")
    numbers = RNG.integers(0, 4, SHAPE).astype(np.uint8)
    path = dicom_seg.write(tmp_path / "a", numbers, image.geometry, classes, origin=read_origin(source))
    first, second, third = pydicom.dcmread(path).SegmentSequence
    assert first.SegmentLabel == second.SegmentLabel == "n" * 64
    assert (first.SegmentDescription, second.SegmentDescription) == classes[1:3] and "SegmentDescription" not in third
    labels = read_labels(path, image, LabelQuery(identity=source.identity, classes=classes))
    np.testing.assert_array_equal(labels.array, numbers)


def test_segments_have_the_colours_of_the_other_formats(tmp_path):
    source, image = axial(tmp_path)
    path = dicom_seg.write(tmp_path / "a", class_map(SHAPE), image.geometry, CLASSES, origin=read_origin(source))
    for number, segment in enumerate(pydicom.dcmread(path).SegmentSequence, 1):
        lightness, a, b = (value / 65535 for value in segment.RecommendedDisplayCIELabValue)
        shown = CIELabColor(lightness * 100, a * 255 - 128, b * 255 - 128).to_rgb()
        np.testing.assert_allclose(shown, colours(len(CLASSES))[number][:3], atol=3)


def test_class_names_in_any_script_are_kept(tmp_path):
    source, image = axial(tmp_path)
    path = dicom_seg.write(
        tmp_path / "a", np.ones(SHAPE, np.uint8), image.geometry, ("background", "肝臓"), origin=read_origin(source)
    )
    found = pydicom.dcmread(path)
    assert found.SegmentSequence[0].SegmentLabel == "肝臓" and str(found.PatientName) == "Müller^Jörg"


def test_what_the_source_says_of_lossy_compression_is_said_again(tmp_path):
    lossy = {"LossyImageCompression": "01", "LossyImageCompressionRatio": "12.5"}
    source, image = axial(tmp_path, **lossy, LossyImageCompressionMethod="ISO_10918_1")
    path = dicom_seg.write(tmp_path / "a", class_map(SHAPE), image.geometry, CLASSES, origin=read_origin(source))
    found = pydicom.dcmread(path)
    assert (found.LossyImageCompression, found.LossyImageCompressionRatio) == ("01", 12.5)
    assert found.LossyImageCompressionMethod == "ISO_10918_1"
    text = {"LossyImageCompression": "YES", "LossyImageCompressionMethod": "JPEG of Doe"}
    source, _ = axial(tmp_path / "text", **text)
    assert not [keyword for keyword in read_origin(source).attributes if keyword.startswith("Lossy")]


def test_names_in_several_character_sets_are_decoded(tmp_path):
    path = write_slice(tmp_path / "a.dcm", values((9, 7)), orientation=AXIAL, PatientName="Yamada^Tarou=山田^太郎",
                       SpecificCharacterSet=["", "ISO 2022 IR 87"])  # fmt: skip
    assert "山田".encode() not in path.read_bytes()
    ((source, _),) = opened(tmp_path, "ct")
    assert read_origin(source).attributes["PatientName"] == "Yamada^Tarou=山田^太郎"


def test_implicit_little_endian_sources_are_read_likewise(tmp_path):
    for number in range(3):
        made = dataset(values((9, 7)), ImagePositionPatient=[0, 0, 2 * number], ImageOrientationPatient=list(AXIAL),
                       PixelSpacing=[1, 1], **WHO)  # fmt: skip
        save(made, tmp_path / f"{number}.dcm", syntax=ImplicitVRLittleEndian)
    ((source, _),) = opened(tmp_path, "ct")
    origin = read_origin(source)
    assert origin.attributes["PatientName"] == "Müller^Jörg" and len(origin.slices) == 3
    np.testing.assert_array_equal(origin.positions[:, 2], [0, 2, 4])


def test_files_that_were_replaced_or_are_gone_are_named_by_their_slice(tmp_path):
    source, _ = axial(tmp_path)
    write_slice(source.files[2], values((9, 7)), position=(0, 0, 4.0), **WHO)
    with pytest.raises(ReadError, match="slice 3 of 5: the file is not the one that was indexed"):
        read_origin(source)
    source.files[2].unlink()
    with pytest.raises(ReadError, match="slice 3 of 5") as caught:
        read_origin(source)
    assert str(tmp_path) not in str(caught.value)


def test_an_image_without_an_instance_uid_is_refused(tmp_path):
    source, _ = axial(tmp_path, SOPInstanceUID=None)
    with pytest.raises(ReadError, match="SOPInstanceUID or SOPClassUID is missing") as caught:
        read_origin(source)
    assert caught.value.reason == "MISSING_TAG"


def test_nothing_is_left_of_a_file_that_cannot_be_written(tmp_path, monkeypatch):
    source, image = axial(tmp_path)

    def full(made: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dicom_seg, "save_object", full)
    with pytest.raises(OutputError, match="'a.dcm' cannot be written: No space left on device"):
        dicom_seg.write(
            tmp_path / "out" / "a.dcm", class_map(SHAPE), image.geometry, CLASSES, origin=read_origin(source)
        )
    assert list((tmp_path / "out").iterdir()) == []


def test_without_highdicom_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "highdicom", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'geomed-mae\[med\]'"):
        dicom_seg.require()
