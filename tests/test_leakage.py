"""Promise 8: no score over leaked data. Leaks of each kind are planted, and every command that scores ends in exit 6
without a file of scores.

Fault 60 of the table: the same patient, the same pixels under other names, ground that overlaps or is nearer than the
buffer, test images in the pretraining list, and a study with two patient numbers. The archives are folders that are
scanned apart, so that no key of one means anything in the other.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from rasterio.transform import Affine

from geomed_mae import cli
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.recipe_file import build_recipe, dump_recipe
from tests.make_dicom import dataset, save, uid
from tests.scenes import landsat_scene

XRAY = {
    "data": {"modality": "xray", "crop_2d": [32, 32]},
    "model": {"size": "tiny", "depth": 1, "patch_2d": [8, 8], "decoder_dim": 16, "decoder_depth": 1},
    "train": {"steps": 1, "batch_size": 2, "device": "cpu"},
}
CLASSIFY = XRAY | {"head": {"task": "classify", "name": "linear", "classes": ["a", "b"]}, "labels": {"test": 0.5}}
SEGMENT = {
    "data": {"modality": "landsat7", "crop_2d": [32, 32]},
    "model": XRAY["model"],
    "train": XRAY["train"],
    "head": {"classes": ["land", "water"], "name": "linear"},
    "labels": {"test": 0.5},
}
COUNT = 4

_seeds = iter(range(1000, 100_000))


def call(*words: object) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it said."""
    done = CliRunner().invoke(cli.main, [str(word) for word in words])
    return done.exit_code, done.output


def written(recipe: dict, path: Path) -> Path:
    path.write_text(dump_recipe(build_recipe(recipe)))
    return path


# ----------------------------------------------------------------------------------------------------- radiographs


def picture(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    coarse = np.kron(rng.normal(size=(8, 8)), np.ones((4, 4)))
    return (2000 + 300 * coarse + rng.normal(scale=40, size=(32, 32))).clip(0, 4095).astype(np.uint16)


def radiograph(path: Path, plane: np.ndarray, patient: str, study: str) -> Path:
    words = {
        "Modality": "DX",
        "PatientID": patient,
        "StudyInstanceUID": uid("study", study),
        "PixelSpacing": [0.2, 0.2],
    }
    words |= {"SeriesInstanceUID": uid("series", path), "FrameOfReferenceUID": None, "SOPInstanceUID": uid(path)}
    return save(dataset(plane, **words), path)


class Archive:
    """Radiographs and a table of their classes; `own` are the pictures, by number, patient and study."""

    def __init__(self, folder: Path, *, word: str) -> None:
        self.folder, self.labels = folder / "images", folder / "labels.csv"
        self.word = word
        self.files: list[tuple[np.ndarray, str, str]] = []
        self.table = ["file,class"]

    def add(self, plane: np.ndarray, patient: str, study: str, *, labelled: bool = True) -> None:
        name = f"{self.word}{len(self.files)}.dcm"
        self.files.append((plane, patient, study))
        radiograph(self.folder / name, plane, patient, study)
        if labelled:
            self.table.append(f"{name},{'ab'[len(self.table) % 2]}")
        self.labels.write_text("\n".join(self.table) + "\n")


def fresh(folder: Path, word: str) -> Archive:
    """An archive of patients that are in no other."""
    made = Archive(folder, word=word)
    for number in range(COUNT):
        made.add(picture(next(_seeds)), f"{word}-patient-{number}", f"{word}-study-{number}")
    return made


KINDS = {
    "same patient": "same patient or study 4",
    "same pixels under new UIDs": "same pixels",
    "in the list": "same pixels",
    "two patient numbers in one study": "same patient or study 4",
}
"""What is planted -> what the error says of it."""


def planted(kind: str, source: Archive, folder: Path) -> Archive:
    """An archive that each image of `source` has leaked into."""
    made = Archive(folder, word="new")
    for number, (plane, patient, study) in enumerate(source.files):
        if kind == "same patient":
            made.add(picture(next(_seeds)), patient, f"new-study-{number}")
        elif kind == "same pixels under new UIDs":
            made.add(plane, f"new-patient-{number}", f"new-study-{number}")
        elif kind == "in the list":
            made.add(plane, patient, study)
        else:
            # The labelled image is of a study of its own; an unlabelled one shows that its patient is the other.
            made.add(picture(next(_seeds)), f"new-patient-{number}", study, labelled=False)
            made.add(picture(next(_seeds)), f"new-patient-{number}", f"new-study-{number}")
    return made


@pytest.fixture(scope="module")
def medical(tmp_path_factory):
    """An archive to pretrain on, one to fine-tune on, both runs, and the recipe for more."""
    root = tmp_path_factory.mktemp("medical")
    first, second = fresh(root / "first", "first"), fresh(root / "second", "second")
    written(XRAY, root / "pretrain.yaml")
    recipe = written(CLASSIFY, root / "classify.yaml")
    code, said = call("pretrain", root / "pretrain.yaml", "--archive", first.folder, "--out", root / "encoder")
    assert code == 0, said
    code, said = call(
        *("finetune", recipe, "--archive", second.folder, "--labels", second.labels, "--encoder", root / "encoder"),
        *("--out", root / "model", "--set", "labels.test=0"),
    )
    assert code == 0, said
    return root, first, second, recipe


def finetune(recipe: Path, data: Archive, encoder: object, out: Path, *more: str) -> tuple[int, str]:
    given = ("--archive", data.folder, "--labels", data.labels, "--encoder", encoder, "--out", out)
    return call("finetune", recipe, *given, *more)


def scored(verb: str, model: Path, data: Archive, out: Path, *more: str) -> tuple[int, str]:
    how = ("--no-pictures",) if verb == "evaluate" else ()
    return call(verb, model, "--archive", data.folder, "--labels", data.labels, "--out", out, *how, *more)


def test_images_that_nothing_has_seen_are_scored(medical, tmp_path):
    root, _, _, recipe = medical
    data = fresh(tmp_path, "third")
    code, said = finetune(recipe, data, root / "encoder", tmp_path / "run")
    assert code == 0, said
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["leakage"]["compared_with"] == {"training": 2, "pretraining": COUNT}
    assert found["leakage"]["not_compared"] == [] and "transductive" not in found
    for verb, model in (("evaluate", root / "model"), ("probe", root / "encoder")):
        code, said = scored(verb, model, data, tmp_path / f"{verb}.json")
        assert code == 0, said
        assert json.loads((tmp_path / f"{verb}.json").read_text())["leakage"]["not_compared"] == []


@pytest.mark.parametrize("kind", KINDS)
def test_what_was_pretrained_on_is_not_scored_unless_that_is_said(medical, tmp_path, kind):
    root, first, _, recipe = medical
    data = planted(kind, first, tmp_path)
    code, said = finetune(recipe, data, root / "encoder", tmp_path / "run")
    assert code == 6 and "2 of the 2 test images were pretrained on" in said and "--transductive" in said
    assert not (tmp_path / "run").exists()
    for verb, model in (("evaluate", root / "model"), ("probe", root / "encoder")):
        out = tmp_path / f"{verb}.json"
        out.write_text('{"old": 1}')
        code, said = scored(verb, model, data, out)
        assert code == 6 and "were pretrained on" in said, said
        assert verb == "probe" or KINDS[kind] in said
        assert not out.exists(), "an older score stands there as if it were new"
    code, said = scored("evaluate", root / "model", data, tmp_path / "allowed.json", "--transductive")
    assert code == 0, said
    found = json.loads((tmp_path / "allowed.json").read_text())["transductive"]
    assert found["allowed"] is True and found["test_images_pretrained_on"] == COUNT


def test_a_fine_tuning_that_is_allowed_to_know_test_images_says_so(medical, tmp_path):
    root, first, _, recipe = medical
    code, said = finetune(recipe, first, root / "encoder", tmp_path / "run", "--transductive")
    assert code == 0, said
    found = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert found["transductive"]["allowed"] is True and found["transductive"]["test_images_pretrained_on"] == 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", [(), ("--transductive",)], ids=["", "transductive"])
def test_what_was_trained_on_is_never_scored(medical, tmp_path, kind, how):
    root, _, second, _ = medical
    data = planted(kind, second, tmp_path)
    out = tmp_path / "scores.json"
    out.write_text('{"old": 1}')
    code, said = scored("evaluate", root / "model", data, out, *how)
    assert code == 6 and "4 of the 4 labelled images were trained on" in said and KINDS[kind] in said
    assert not out.exists()


def test_one_task_with_a_patient_in_two_indexes_has_no_score(medical, tmp_path):
    _, first, _, recipe = medical
    data = planted("same patient", first, tmp_path / "new")
    for name, folder in (("one", first.folder), ("other", data.folder)):
        assert call("scan", folder, "--out", tmp_path / name, "--modality", "xray")[0] == 0
    table = tmp_path / "labels.csv"
    table.write_text(first.labels.read_text() + data.labels.read_text().partition("\n")[2])
    code, said = call(
        *("finetune", recipe, "--archive", tmp_path / "one", tmp_path / "other", "--labels", table),
        *("--encoder", "none", "--out", tmp_path / "run", "--transductive"),
    )
    assert code == 6 and "images belong with images of another part" in said and "into one INDEX" in said
    assert not (tmp_path / "run").exists()


def test_an_encoder_begun_from_another_has_seen_what_that_one_has(medical, tmp_path):
    root, first, second, recipe = medical
    third = fresh(tmp_path, "fourth")
    code, said = call(
        *("pretrain", root / "pretrain.yaml", "--archive", third.folder, "--out", tmp_path / "more"),
        *("--set", f"model.init={root / 'encoder'}"),
    )
    assert code == 0, said
    assert len(load_encoder(tmp_path / "more").seen.parts) == 2
    for data, expected in ((first, 6), (third, 6), (second, 0)):
        code, said = finetune(recipe, data, tmp_path / "more", tmp_path / "run", "--overwrite")
        assert code == expected, said


def test_an_encoder_that_is_handed_on_knows_pixels_and_says_what_it_does_not_know(medical, tmp_path):
    root, first, _, recipe = medical
    shutil.copytree(root / "encoder" / "encoder", tmp_path / "shared")
    assert not list(tmp_path.rglob("seen.json"))
    code, said = finetune(recipe, first, tmp_path / "shared", tmp_path / "run")
    assert code == 6 and "same pixels 2" in said and "same patient" not in said
    data = planted("same patient", first, tmp_path / "new")
    code, said = finetune(recipe, data, tmp_path / "shared", tmp_path / "run")
    assert code == 0, said
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["leakage"]
    assert found["not_compared"] == ["pretraining: identities", "pretraining: looks"]


def test_an_export_carries_the_record_and_not_its_private_part(medical, tmp_path):
    root, first, _, recipe = medical
    code, said = call("export", root / "encoder", "--to", "timm", "--out", tmp_path / "timm")
    assert code == 0, said
    assert not list(tmp_path.rglob("seen.json"))
    code, said = finetune(recipe, first, tmp_path / "timm", tmp_path / "run")
    assert code == 6 and "same pixels 2" in said


def test_an_older_encoder_without_a_record_works_and_is_said_to_be_unknown(medical, tmp_path):
    root, first, _, recipe = medical
    folder = tmp_path / "old"
    shutil.copytree(root / "encoder" / "encoder", folder)
    (folder / "pretrained_on.json").unlink()
    lines = (folder / "MANIFEST.sha256").read_text().splitlines(keepends=True)
    (folder / "MANIFEST.sha256").write_text("".join(line for line in lines if "pretrained_on" not in line))
    code, said = finetune(recipe, first, folder, tmp_path / "run")
    assert code == 0, said
    found = json.loads((tmp_path / "run" / "summary.json").read_text())["leakage"]
    assert found["not_compared"] == ["pretraining: nothing is recorded"]
    code, said = scored("evaluate", tmp_path / "run", first, tmp_path / "scores.json")
    assert code == 6 and "were trained on" in said


def test_a_run_that_was_overwritten_keeps_no_private_part_of_the_old_one(medical, tmp_path):
    root, first, second, _ = medical
    for data in (first, second):
        how = ("--out", tmp_path / "run", "--overwrite")
        assert call("pretrain", root / "pretrain.yaml", "--archive", data.folder, *how)[0] == 0
    private = json.loads((tmp_path / "run" / "private" / "seen.json").read_text())
    assert list(private["parts"]) == [part.salt for part in load_encoder(tmp_path / "run").seen.parts]


# ---------------------------------------------------------------------------------------------------------- ground


def scenes(folder: Path, *, shift_m: float, seed: int) -> Path:
    """Write two scenes, 64 pixels of 28.5 m wide, that lie `shift_m` east of where others of shift 0 do."""
    for number in range(2):
        landsat_scene(
            folder / "scenes" / f"{seed}_{number}.tif",
            folder / "labels" / f"{seed}_{number}.tif",
            shape=(64, 64),
            seed=seed + number,
            transform=Affine(28.5, 0, 500_000 + 1e5 * number + shift_m, 0, -28.5, 4_500_000),
        )
    return folder


@pytest.fixture(scope="module")
def ground(tmp_path_factory):
    root = tmp_path_factory.mktemp("ground")
    scenes(root, shift_m=0, seed=1)
    written({name: SEGMENT[name] for name in ("data", "model", "train")}, root / "pretrain.yaml")
    written(SEGMENT, root / "segment.yaml")
    assert call("pretrain", root / "pretrain.yaml", "--archive", root / "scenes", "--out", root / "encoder")[0] == 0
    given = ("--archive", root / "scenes", "--labels", root / "labels", "--encoder", "none", "--out", root / "model")
    code, said = call("finetune", root / "segment.yaml", *given, "--set", "labels.test=0")
    assert code == 0, said
    return root


WIDTH_M = 64 * 28.5


@pytest.mark.parametrize(
    ("shift_m", "buffer_m", "expected"),
    [(0.5 * WIDTH_M, 0, 6), (WIDTH_M, 0, 0), (WIDTH_M + 500, 0, 0), (WIDTH_M + 500, 1000, 6)],
    ids=["overlap", "touch", "near", "nearer than the buffer"],
)
def test_ground_that_was_seen_is_not_scored(ground, tmp_path, shift_m, buffer_m, expected):
    scenes(tmp_path, shift_m=shift_m, seed=10)
    given = ("--archive", tmp_path / "scenes", "--labels", tmp_path / "labels")
    buffer = ("--set", f"labels.buffer_m={buffer_m}")
    how = ("--encoder", ground / "encoder", "--out", tmp_path / "run", *buffer)
    code, said = call("finetune", ground / "segment.yaml", *given, *how)
    assert code == expected, said
    assert (tmp_path / "run").exists() == (expected == 0)
    out = tmp_path / "scores.json"
    far = ("--buffer-km", buffer_m / 1000)
    code, said = call("evaluate", ground / "model", *given, "--out", out, "--no-pictures", *far)
    assert code == expected and out.exists() == (expected == 0), said
    if expected:
        assert "shared ground 2" in said and "were trained on" in said
