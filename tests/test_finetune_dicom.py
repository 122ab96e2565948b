"""From a PACS dump with structure sets in it to scores: no conversion step, and no identifier in what comes out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest

from geomed_mae.evaluate import evaluate
from geomed_mae.finetune import finetune
from geomed_mae.heads.task_model import load_task_model
from geomed_mae.probe import probe
from geomed_mae.recipe_file import build_recipe
from tests.make_dicom import uid, write_series
from tests.make_labels import contour, frame_of, segment, write_rtstruct, write_seg
from tests.scenes import MR_RECIPE, random_encoder

SHAPE = (16, 24, 24)
CODES = {"tumour": {"scheme": "SCT", "value": "108369006", "meaning": "Neoplasm"}}
RECIPE = {
    **MR_RECIPE,
    "data": {"modality": "ct", "crop_3d": [8, 16, 16]},
    "head": {"classes": ["background", "tumour"], "width": 16, "codes": CODES},
    "labels": {"test": 0.5, "values": {"GTV primary": 1}},
}


def patient(folder: Path, number: int, kind: str = "RTSTRUCT") -> int:
    """Write a CT with a bright box and its outline into one folder; return how many voxels the box has."""
    rng = np.random.default_rng(number)
    low = rng.integers(3, 9, 3)
    box = tuple(slice(start, start + size) for start, size in zip(low, (4, 8, 7), strict=True))
    values = rng.integers(900, 1100, SHAPE).astype(np.int16)
    values[box] += 800
    who = {"PatientID": f"SECRET{number}", "PatientName": f"Doe^{number}", "StudyInstanceUID": uid("study", number)}
    frame = uid("frame", number)
    files = write_series(folder, values, FrameOfReferenceUID=frame, SeriesInstanceUID=uid("series", number), **who)
    instances = [str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in files]
    (_, top, left), planes = low, range(box[0].start, box[0].stop)
    if kind == "SEG":
        pixels = np.zeros(SHAPE[1:], np.uint8)
        pixels[box[1:]] = 1
        frames = [frame_of(pixels, (0, 0, 2.0 * plane), source=(instances[plane], None)) for plane in planes]
        write_seg(folder / "seg", frames, [segment(1, "GTV primary")], FrameOfReferenceUID=frame, **who)
        return 4 * 8 * 7
    corners = [(left - 0.5, top - 0.5), (left + 6.5, top - 0.5), (left + 6.5, top + 7.5), (left - 0.5, top + 7.5)]
    outlines = [contour([(*corner, 2.0 * plane) for corner in corners], instance=instances[plane]) for plane in planes]
    body = [contour([(x, y, 2.0 * plane) for x, y in ((1, 1), (22, 1), (22, 22))]) for plane in range(16)]
    write_rtstruct(folder / "rs", {"BODY": body, "GTV primary": outlines}, frame=frame, instances=instances, **who)
    return 4 * 8 * 7


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("dump")
    patient(root / "train" / "a", 0)
    patient(root / "train" / "b", 1, "SEG")
    patient(root / "unseen" / "c", 2)
    return root


def test_a_dump_with_structure_sets_and_segmentations_is_trained_on_and_scored(folder, tmp_path):
    found = finetune(build_recipe(RECIPE), [folder / "train"], folder / "train", "none", tmp_path / "run")
    assert found["labels"]["images_labelled"] == 2 and found["labels"]["images_without_labels"] == 0
    assert (found["split"]["unit"], found["split"]["train"], found["split"]["test"]) == ("group", 1, 1)
    assert found["test"]["pixels"] == np.prod(SHAPE)
    assert load_task_model(tmp_path / "run")[0].spec.head.codes == CODES
    scores = evaluate(tmp_path / "run", [folder / "unseen"], folder / "unseen", tmp_path / "scores.json")
    assert scores["labels"]["images_labelled"] == 1 and set(scores["classes"]) == {"background", "tumour"}
    for path in [*(tmp_path / "run").rglob("*"), tmp_path / "scores.json"]:
        if path.is_file():
            data = path.read_bytes()
            for secret in (
                b"SECRET",
                b"Doe^",  # with a sign that base64 lacks: three letters come up in a picture's text by chance
                uid("frame", 0).encode(),
                str(folder).encode(),
                uid("series", 1).encode(),
            ):
                assert secret not in data, path


def test_a_probe_numbers_the_names_that_it_meets(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "ct", folder / "train")
    found = probe(encoder, [folder / "train"], folder / "train", tmp_path / "probe.json")
    assert found["label_names"] == ["background", "BODY", "GTV primary"] and found["label_values"] == [0, 1, 2]
