"""predict --format dicom-seg: DICOM in, DICOM out, on the slices of the source."""

from __future__ import annotations

import json
import math
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from click.testing import CliRunner

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.seen import Seen
from geomed_mae.cli import main
from geomed_mae.errors import ConfigError
from geomed_mae.heads import HeadSpec
from geomed_mae.heads.task_model import load_task_model, save_task_model
from geomed_mae.predict import predict
from geomed_mae.readers import LabelQuery, read_labels
from geomed_mae.recipe_file import build_recipe, dump_recipe
from geomed_mae.scan import scan
from geomed_mae.writers import dicom_seg
from tests.consumer import elsewhere
from tests.heads.given import task_model
from tests.make_dicom import dataset, enhanced, save, uid, write_series
from tests.scenes import mr_volume

RNG = np.random.default_rng(11)
CLASSES = ("background", "liver", "spot")
CODES = {"spot": {"scheme": "SCT", "value": "4147007", "meaning": "Mass", "category": "tissue"}}
WHO = {
    "PatientName": "CANARY^Jane",
    "PatientID": "CANARY-1",
    "PatientBirthDate": "19490523",
    "StudyDate": "20040119",
    "InstitutionName": "CANARY Hospital",
}
SHAPE = (9, 20, 24)


def values(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return RNG.integers(800, 1400, shape).astype(np.int16)


def model_of(folder: Path, archive: Path, modality: str, crop: tuple[int, ...]) -> Path:
    """A run with a model of random weights for the images of an archive."""
    index = open_archive([archive], [modality])
    model = task_model(index, "convolutional", "segment", crop=crop, classes=CLASSES, codes=CODES)
    save_task_model(folder, model, Seen.nothing())
    return folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory) -> tuple[Path, Path]:
    """A run for CT and the folder of a tilted series and a straight one."""
    root = tmp_path_factory.mktemp("ct")
    write_series(root / "in" / "a", values(), step=(0.0, 0.7, 2.0), SeriesInstanceUID=uid("a"), **WHO)
    write_series(root / "in" / "b", values(), SeriesInstanceUID=uid("b"), **WHO)
    return model_of(root / "run", root / "in", "ct", (4, 16, 16)), root / "in"


CONSUMER = """
import json, sys
import highdicom, nibabel, numpy as np
seg, chances = (highdicom.seg.segread(path) for path in sys.argv[1:3])
nifti = nibabel.load(sys.argv[3])
truth = np.asarray(nifti.dataobj).transpose()
affine = np.diag([-1.0, -1, 1, 1]) @ nifti.affine[:, [2, 1, 0, 3]]
wrong, sums, seen = 0, {}, []
for number, item in enumerate(seg.PerFrameFunctionalGroupsSequence):
    segment = item.SegmentIdentificationSequence[0].ReferencedSegmentNumber
    place = np.array(item.PlanePositionSequence[0].ImagePositionPatient, float)
    index = np.linalg.inv(affine) @ [*place, 1]
    assert np.abs(index[:3] - np.rint(index[:3])).max() < 1e-4
    wrong += int((seg.pixel_array[number] != (truth[round(index[0])] == segment)).sum())
    seen.append((segment, round(index[0])))
top = np.zeros(truth.shape)
for number, item in enumerate(chances.PerFrameFunctionalGroupsSequence):
    place = np.array(item.PlanePositionSequence[0].ImagePositionPatient, float)
    top[round((np.linalg.inv(affine) @ [*place, 1])[0])] += chances.pixel_array[number] / chances.MaximumFractionalValue
print(json.dumps({
    "wrong": wrong, "complete": len(set(seen)) == 2 * len(truth), "most": top.max(), "least": top.min(),
    "sure_of_background": int(((top > 0.67) & (truth == 0)).sum()),
    "codes": [s.SegmentedPropertyTypeCodeSequence[0].CodeMeaning for s in seg.SegmentSequence],
    "names": [s.SegmentLabel for s in seg.SegmentSequence],
    "kinds": [str(seg.SegmentationType), str(chances.SegmentationType), str(chances.SegmentationFractionalType)],
    "algorithm": [s.SegmentAlgorithmName for s in seg.SegmentSequence],
}))
"""


def test_a_segmentation_holds_the_voxels_of_the_class_map_of_the_same_model(volumes, tmp_path):
    run, archive = volumes
    found = predict(run, [archive], tmp_path / "seg", format="dicom-seg", probabilities=True)
    maps = predict(run, [archive], tmp_path / "maps", format="nifti")
    by_input = {entry["input"]: entry["output"] for entry in maps["predictions"]}
    assert len(found["predictions"]) == 2 == len(by_input)
    for entry in found["predictions"]:
        path = Path(entry["output"])
        chances = path.with_name(f"{path.stem}.probabilities.dcm")
        said = elsewhere(CONSUMER, path, chances, by_input[entry["input"]])
        assert said["wrong"] == 0 and said["complete"]
        assert said["least"] >= 0 and said["most"] <= 1.005
        assert said["sure_of_background"] == 0  # two other classes cannot share more without one being the largest
        assert said["names"] == ["liver", "spot"] and said["codes"] == ["Liver", "Mass"]
        assert said["kinds"] == ["BINARY", "FRACTIONAL", "PROBABILITY"]
        assert set(said["algorithm"]) == {"geomed-mae"}
        numbers = np.asarray(nibabel.load(by_input[entry["input"]]).dataobj)
        assert len(np.unique(numbers)) > 1, "a map of one class would prove nothing"


def test_only_the_object_itself_names_the_patient(volumes, tmp_path):
    run, archive = volumes
    found = predict(run, [archive], tmp_path / "out", format="dicom-seg")
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file() and path.suffix != ".dcm":
            assert b"CANARY" not in path.read_bytes() and b"20040119" not in path.read_bytes()
    for entry in found["predictions"]:
        path = Path(entry["output"])
        assert "CANARY" not in path.name and b"Hospital" not in path.read_bytes()
        assert str(archive).encode() not in path.read_bytes()
        made = pydicom.dcmread(path)
        assert (str(made.PatientName), made.PatientID, made.StudyDate) == ("CANARY^Jane", "CANARY-1", "20040119")


def test_our_labels_can_be_made_from_our_segmentations(volumes, tmp_path):
    run, archive = volumes
    index = open_archive([archive], ["ct"])
    for entry in predict(run, [archive], tmp_path / "out", format="dicom-seg")["predictions"]:
        path = Path(entry["output"])
        (key,) = (row.key for row in index.rows if index.paths(row.key)[0] == Path(entry["input"]))
        query = LabelQuery(identity=index.identity(key), classes=CLASSES)
        labels = read_labels(path, index.read(key), query)
        counts = {name: int((labels.array == number).sum()) for number, name in enumerate(CLASSES)}
        assert counts == {name: entry["pixels"][name] for name in CLASSES}


def test_time_points_of_one_enhanced_object_get_a_segmentation_each(tmp_path):
    frames = [{"position": (0.0, 0.0, 2.0 * (n // 2)), "temporal": n % 2 + 1} for n in range(8)]
    save(enhanced(values((8, 16, 16)), frames, **WHO), tmp_path / "in" / "a.dcm")
    run = model_of(tmp_path / "run", tmp_path / "in", "mr", (4, 16, 16))
    found = predict(run, [tmp_path / "in"], tmp_path / "out", format="dicom-seg")["predictions"]
    made = [pydicom.dcmread(entry["output"]) for entry in found]
    assert sorted(list(one.SourceImageSequence[0].ReferencedFrameNumber) for one in made) == [
        [1, 3, 5, 7],
        [2, 4, 6, 8],
    ]
    assert made[0].SeriesInstanceUID != made[1].SeriesInstanceUID


def test_a_radiograph_gets_one_frame_a_segment(tmp_path):
    made = dataset(values((40, 32)).astype(np.uint16), Modality="DX", PixelSpacing=[0.2, 0.2], **WHO)
    save(made, tmp_path / "in" / "a.dcm")
    run = model_of(tmp_path / "run", tmp_path / "in", "xray", (32, 32))
    (entry,) = predict(run, [tmp_path / "in"], tmp_path / "out", format="dicom-seg")["predictions"]
    (other,) = predict(run, [tmp_path / "in"], tmp_path / "maps", format="nifti")["predictions"]
    found = pydicom.dcmread(entry["output"])
    numbers = np.asarray(nibabel.load(other["output"]).dataobj).reshape(32, 40).T
    assert found.pixel_array.shape == (2, 40, 32)
    for segment in (1, 2):
        np.testing.assert_array_equal(found.pixel_array[segment - 1], numbers == segment)
    references = [
        item.DerivationImageSequence[0].SourceImageSequence[0] for item in found.PerFrameFunctionalGroupsSequence
    ]
    assert {item.ReferencedSOPInstanceUID for item in references} == {made.SOPInstanceUID}
    assert {item.ReferencedSOPClassUID for item in references} == {made.SOPClassUID}


def test_images_that_are_not_dicom_are_refused_before_anything_is_written(tmp_path):
    mr_volume(tmp_path / "in" / "v.nii.gz", None, shape=(20, 24, 16))
    run = model_of(tmp_path / "run", tmp_path / "in", "mr", (4, 16, 16))
    with pytest.raises(ConfigError, match=r"1 of 1 images are no DICOM, .*v.nii.gz', read as nifti; .* --format nifti"):
        predict(run, [tmp_path / "in"], tmp_path / "out", format="dicom-seg")
    assert not (tmp_path / "out").exists()


def test_probabilities_that_no_object_can_hold_are_refused_before_anything_is_written(volumes, tmp_path, monkeypatch):
    run, archive = volumes
    monkeypatch.setattr(dicom_seg, "MOST_BYTES", 2 * math.prod(SHAPE) - 1)
    with pytest.raises(ConfigError, match=r"2 segments of 9 x 20 x 24 voxels .* --probabilities out, or use"):
        predict(run, [archive], tmp_path / "out", format="dicom-seg", probabilities=True)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(dicom_seg, "MOST_BYTES", 2 * math.prod(SHAPE))
    dicom_seg.check_chances(SHAPE, CLASSES)


def test_series_of_other_modalities_in_the_patients_folder_are_counted_and_no_failure(volumes, tmp_path):
    run, _ = volumes
    write_series(tmp_path / "in" / "ct", values(), SeriesInstanceUID=uid("a"), **WHO)
    others = write_series(tmp_path / "in" / "mr", values(), SeriesInstanceUID=uid("b"), **{**WHO, "Modality": "MR"})
    found = predict(run, [tmp_path / "in"], tmp_path / "out", format="dicom-seg")
    assert found["images"] == 1 and "failed" not in found
    assert found["files_of_other_modalities"] == len(others)


def test_a_file_that_was_replaced_since_the_scan_fails_alone(volumes, tmp_path):
    run, _ = volumes
    write_series(tmp_path / "in" / "a", values(), SeriesInstanceUID=uid("a"), **WHO)
    write_series(tmp_path / "in" / "b", values(), SeriesInstanceUID=uid("b"), **WHO)
    scan([tmp_path / "in"], tmp_path / "index", modality="ct")
    path = tmp_path / "in" / "a" / "0003.dcm"
    made = pydicom.dcmread(path)
    made.SOPInstanceUID = uid("another")
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.save_as(path)
    found = predict(run, [tmp_path / "index"], tmp_path / "out", format="dicom-seg")
    (failed,) = found["failed"]
    assert failed["reason"] == "LENGTH_MISMATCH" and "not the one that was indexed" in failed["detail"]
    assert len(found["predictions"]) == 1 == len(list((tmp_path / "out").glob("*.dcm")))


def test_the_command_line_takes_the_format_and_says_what_it_holds(volumes, tmp_path):
    run, archive = volumes
    arguments = ["predict", str(run), "--archive", str(archive / "b"), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(main, [*arguments, "--format", "dicom-seg"], catch_exceptions=False)
    assert done.exit_code == 0 and len(list((tmp_path / "out").glob("*.dcm"))) == 1
    help_text = " ".join(CliRunner().invoke(main, ["predict", "--help"]).output.split())
    assert "holds their patient and study" in help_text


@pytest.mark.slow
@pytest.mark.data
def test_the_tilted_series_of_a_scanner_round_trips(shared_data, tmp_path):
    archive = shared_data / "med" / "dicom_traps" / "gantrytilting"
    run = model_of(tmp_path / "run", archive, "ct", (4, 64, 64))
    (entry,) = predict(run, [archive], tmp_path / "seg", format="dicom-seg", probabilities=True)["predictions"]
    (other,) = predict(run, [archive], tmp_path / "maps", format="nifti")["predictions"]
    path = Path(entry["output"])
    said = elsewhere(CONSUMER, path, path.with_name(f"{path.stem}.probabilities.dcm"), other["output"])
    assert said["wrong"] == 0 and said["complete"]


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (
            {"lung": {"scheme": "SCT", "value": "1", "meaning": "Lung"}},
            "'lung' is none of the classes background, liver",
        ),
        ({"liver": {"scheme": "SCT", "value": "1"}}, "codes.liver: meaning is 1 to 64 printed characters"),
        (
            {"liver": {"scheme": "SCT", "value": "1" * 17, "meaning": "Liver"}},
            "codes.liver: value is 1 to 16 printed characters",
        ),
        ({"liver": {"scheme": "SCT", "value": "1", "meaning": "a\\b"}}, "codes.liver: meaning .* without a backslash"),
        (
            {"liver": {"scheme": "SCT", "value": "1", "meaning": "Liver", "category": "organ"}},
            "category 'organ' is none of tissue, anatomical structure",
        ),
        ({"liver": {"schema": "SCT"}}, "head.codes.liver.schema.*'scheme', 'value', 'meaning' or 'category'"),
    ],
)
def test_wrong_codes_are_refused_with_their_place(codes, message):
    with pytest.raises(ConfigError, match=message):
        build_recipe({"head": {"classes": ["background", "liver"], "codes": codes}})


def test_codes_are_kept_in_the_recipe_and_in_the_model(volumes):
    recipe = build_recipe({"head": {"classes": list(CLASSES), "codes": CODES}})
    assert recipe.head.codes == CODES and "4147007" in dump_recipe(recipe)
    head = load_task_model(volumes[0])[0].spec.head
    assert head.codes == CODES
    assert HeadSpec.from_json(json.loads(json.dumps(head.to_json()))) == head
