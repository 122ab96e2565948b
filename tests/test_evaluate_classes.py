"""evaluate and predict of runs that classify, of parts of an INDEX, and of studies; models have random weights."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner
from sklearn.metrics import average_precision_score, roc_auc_score

from geomed_mae import cli
from geomed_mae.archives.build import open_archive
from geomed_mae.archives.seen import Seen
from geomed_mae.archives.splits import requested
from geomed_mae.errors import ConfigError, LeakageError
from geomed_mae.evaluate import evaluate
from geomed_mae.heads.task_model import save_task_model
from geomed_mae.predict import predict
from geomed_mae.recipe_file import build_recipe, dump_recipe
from geomed_mae.scan import scan
from geomed_mae.scoring import intervals
from tests.heads.given import task_model
from tests.make_pictures import write_png
from tests.scenes import landsat_scene

CLASSES = ("corner", "stripe")
IMAGES = 16


def recipe(modality: str = "xray"):
    return build_recipe(
        {
            "data": {"modality": modality, "crop_2d": [16, 16]},
            "model": {"size": "tiny", "depth": 1, "patch_2d": [8, 8]},
            "head": {"task": "classify", "name": "linear", "classes": list(CLASSES)},
            "labels": {"test": 0.5},
        }
    )


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer resamples: intervals have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "ROUNDS", 60)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """X-rays, an INDEX of them with a split, and tables with one class and with several classes an image."""
    root = tmp_path_factory.mktemp("xrays")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    one, several = ["image,class"], ["image,corner,stripe"]
    for number in range(IMAGES):
        pixels = rng.integers(60, 200, (16, 16))
        write_png(root / "images" / f"{number:02d}.png", pixels.astype(np.uint8), 0)
        one.append(f"{number:02d}.png,{CLASSES[number % 2]}")
        several.append(f"{number:02d}.png,{number % 2},{'' if number % 5 == 0 else int(number % 3 == 0)}")
    (root / "one.csv").write_text("\n".join(one) + "\n")
    (root / "several.csv").write_text("\n".join(several) + "\n")
    split = requested(
        split="group",
        split_shares="train=50,test=50",
        split_seed=None,
        block_km=None,
        buffer_km=None,
        exclude_unlocated=False,
    )
    scan([root / "images"], root / "index", modality="xray", pictures=False, split=split)
    return root


def made_run(path: Path, index, *, seed: int = 0, multi_label: bool = False, seen: Seen | None = None) -> Path:
    """A finished run with random weights, which has seen nothing unless `seen` says so."""
    model = task_model(index, "linear", "classify", crop=(16, 16), classes=CLASSES, multi_label=multi_label)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    path.mkdir(parents=True)
    save_task_model(path, model, seen or Seen.of(index, (), what="training"))
    (path / "recipe.resolved.yaml").write_text(dump_recipe(recipe(index.rows[0].modality)))
    summary = {"task": "classify", "split": {"train": 4, "groups": {"train": 4}}, "seconds": 1.0, "steps": 1}
    (path / "summary.json").write_text(json.dumps(summary))
    return path


@pytest.fixture(scope="module")
def index(folder):
    return open_archive([folder / "index"], ["xray"])


def test_scores_of_a_table_are_those_of_what_predict_writes(folder, index, tmp_path):
    run = made_run(tmp_path / "run", index)
    scores = evaluate(run, [folder / "index"], folder / "one.csv", tmp_path / "scores.json")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "predictions.parquet").write_text("of other images")
    found = predict(run, [folder / "index"], tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["predictions.csv"] == found["tables"]
    table = {
        line["id"]: line for line in csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines())
    }
    truth = {row.key: int(index.paths(row.key)[0].stem) % 2 for row in index.rows}
    chances = {key: float(line["p_stripe"]) for key, line in table.items()}
    assert all(line["class"] == CLASSES[chances[key] > 0.5] for key, line in table.items())
    keys = list(truth)
    expected = roc_auc_score([truth[key] for key in keys], [chances[key] for key in keys])
    assert scores["value"] == pytest.approx(expected, abs=1e-6)
    assert {line["key"]: line["chances"]["stripe"] for line in scores["per_image"]} == chances
    assert scores["labels"]["images_labelled"] == scores["images"] == IMAGES
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert sorted(path.name for path in (tmp_path / "scores_pictures").iterdir()) == sorted(scores["pictures"])
    assert (
        found["predictions"][0]["input"].endswith(".png") and str(folder) not in (tmp_path / "scores.json").read_text()
    )


def test_several_labels_an_image_keep_what_is_not_known_out(folder, index, tmp_path):
    run = made_run(tmp_path / "run", index, multi_label=True)
    scores = evaluate(run, [folder / "index"], folder / "several.csv", tmp_path / "scores.json")
    lines = scores["per_image"]
    expected = []
    for name in CLASSES:
        known = [line for line in lines if line["truth"][name] is not None]
        truth, chances = zip(*((line["truth"][name], line["chances"][name]) for line in known), strict=True)
        expected.append(average_precision_score(truth, chances))
    assert scores["value"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert scores["classes"]["stripe"]["images_unknown"] == len(range(0, IMAGES, 5))
    assert {"confusion.png", "worst.png"} <= set(scores["pictures"])
    predict(run, [folder / "index"], tmp_path / "out")
    for line in csv.DictReader((tmp_path / "out" / "predictions.csv").read_text().splitlines()):
        assert line["class"] == "|".join(name for name in CLASSES if float(line[f"p_{name}"]) >= 0.5)


def test_labels_of_another_form_than_the_models_are_refused(folder, index, tmp_path):
    run = made_run(tmp_path / "run", index)
    with pytest.raises(ConfigError, match="give several classes an image, and the model was trained with one class"):
        evaluate(run, [folder / "index"], folder / "several.csv", tmp_path / "scores.json")
    assert not (tmp_path / "scores.json").exists()


def test_a_part_of_the_stored_split_is_scored_alone(folder, index, tmp_path):
    run = made_run(tmp_path / "run", index)
    parts = json.loads((folder / "index" / "splits.json").read_text())["parts"]
    scores = evaluate(run, [folder / "index"], folder / "one.csv", tmp_path / "s.json", split="test", pictures=False)
    assert {line["key"] for line in scores["per_image"]} == {key for key, part in parts.items() if part == "test"}
    assert scores["split"] == "test" and "pictures" not in scores and not (tmp_path / "s_pictures").exists()
    (tmp_path / "s_pictures").mkdir()
    for name in ("worst.png", "mine.png"):
        (tmp_path / "s_pictures" / name).write_text("")
    evaluate(run, [folder / "index"], folder / "one.csv", tmp_path / "s.json", split="test", pictures=False)
    assert [path.name for path in (tmp_path / "s_pictures").iterdir()] == ["mine.png"], "only pictures of scores go"
    with pytest.raises(ConfigError, match="'later', but the split of"):
        evaluate(run, [folder / "index"], folder / "one.csv", tmp_path / "s.json", split="later")


def test_test_images_of_pretraining_are_refused_unless_it_is_allowed_and_recorded(folder, index, tmp_path):
    seen = Seen.of(index, (), what="training") + Seen.of(index, index.rows[:3], what="pretraining")
    words = [made_run(tmp_path / "run", index, seen=seen), "--archive", folder / "index", "--labels"]
    words += [folder / "one.csv", "--out", tmp_path / "s.json", "--no-pictures"]
    done = CliRunner().invoke(cli.main, ["evaluate", *map(str, words)])
    assert done.exit_code == 6 and "--transductive" in done.stderr and not (tmp_path / "s.json").exists()
    done = CliRunner().invoke(cli.main, ["evaluate", *map(str, words), "--transductive"])
    assert done.exit_code == 0, done.stderr
    written, told = json.loads((tmp_path / "s.json").read_text()), json.loads(done.stdout)
    assert written["transductive"]["allowed"] is True and written["transductive"]["test_images_pretrained_on"] == 3
    assert set(written) - set(told) == {"per_image", "per_group"}, "a line an image is for the file alone"


def test_images_in_the_place_of_the_pictures_are_never_touched(folder, index, tmp_path):
    """The archive of FILE.json may well be called FILE_pictures: a leak deletes pictures of scores, and no image."""
    shutil.copytree(folder / "images", tmp_path / "s_pictures")
    run = made_run(tmp_path / "run", index, seen=Seen.of(index, index.rows, what="training"))
    for archive, error in ((folder / "index", LeakageError), (tmp_path / "s_pictures", ConfigError)):
        with pytest.raises(error):
            evaluate(run, [archive], folder / "one.csv", tmp_path / "s.json")
        assert len(list((tmp_path / "s_pictures").iterdir())) == IMAGES


def made_study(path: Path, index, *, seeds: tuple[int, ...] = (0,), seen: Seen | None = None) -> Path:
    """Two arms; the last member has seen what `seen` says."""
    record = {
        "arms": ["pretrained", "scratch"],
        "seeds": seeds,
        "fingerprint": "",
        "encoder": "",
        "transductive": False,
    }
    path.mkdir()
    (path / "study.json").write_text(json.dumps(record))
    members = [(arm, seed) for seed in seeds for arm in record["arms"]]
    for number, (arm, seed) in enumerate(members, start=1):
        last = number == len(members)
        made_run(path / arm / f"seed-{seed}", index, seed=number, seen=seen if last else None)
    return path


def test_a_study_is_scored_member_by_member_with_the_paired_difference(folder, index, tmp_path):
    study = made_study(tmp_path / "study", index)
    trained = study / "pretrained" / "seed-0" / "summary.json"
    old = {"transductive": {"allowed": True, "test_images_pretrained_on": 9}}
    trained.write_text(json.dumps({**json.loads(trained.read_text()), **old}))
    result = evaluate(study, [folder / "index"], folder / "one.csv", tmp_path / "s.json")
    assert "transductive" not in result and result["leakage"], "these images were not pretrained on, others were"
    names = ["pretrained/seed-0", "scratch/seed-0"]
    assert list(result["members"]) == names and result["verb"] == "evaluate"
    values = {name: result["members"][name]["value"] for name in names}
    expected = values["pretrained/seed-0"] - values["scratch/seed-0"]
    assert result["difference"]["mean"] == pytest.approx(expected, abs=1e-5)
    assert result["verdict"] and (tmp_path / "s_pictures" / "scratch" / "seed-0" / "worst.png").is_file()
    alone = evaluate(
        study / "scratch" / "seed-0", [folder / "index"], folder / "one.csv", tmp_path / "one.json", pictures=False
    )
    assert alone["value"] == values["scratch/seed-0"]


def test_a_leak_into_one_member_of_a_study_stops_all_of_them(folder, index, tmp_path):
    study = made_study(tmp_path / "study", index, seeds=(0, 1), seen=Seen.of(index, index.rows[:1], what="training"))
    with pytest.raises(LeakageError, match="1 of the 16"):
        evaluate(study, [folder / "index"], folder / "one.csv", tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists() and not (tmp_path / "s_pictures").exists()
    with pytest.raises(ConfigError, match="is a study of 4 runs, and predict takes one of them"):
        predict(study, [folder / "index"], tmp_path / "out")


def test_a_run_of_an_older_version_is_named(folder, index, tmp_path):
    run = made_run(tmp_path / "run", index)
    path = run / "model" / "config.json"
    config = path.read_bytes()
    path.write_bytes(config.replace(b'"version": 2', b'"version": 1'))
    manifest = run / "model" / "MANIFEST.sha256"

    old, new = (hashlib.sha256(data).hexdigest() for data in (config, path.read_bytes()))
    manifest.write_text(manifest.read_text().replace(old, new))
    with pytest.raises(ConfigError, match="version 1, not 'geomed-mae task model' version 2"):
        evaluate(run, [folder / "index"], folder / "one.csv", tmp_path / "s.json")


def test_a_format_of_maps_is_refused_for_a_run_that_classifies(folder, index, tmp_path):
    with pytest.raises(ConfigError, match="writes a table: leave --format and --probabilities out"):
        predict(made_run(tmp_path / "run", index), [folder / "index"], tmp_path / "out", format="cog")


def test_classes_of_scenes_are_a_geoparquet_table_too(tmp_path):
    for seed in range(2):
        landsat_scene(tmp_path / "scenes" / f"{seed}.tif", None, shape=(32, 32), seed=seed)
    scenes = open_archive([tmp_path / "scenes"], ["landsat7"])
    found = predict(made_run(tmp_path / "run", scenes), [tmp_path / "scenes"], tmp_path / "out")
    assert found["tables"] == ["predictions.csv", "predictions.parquet"]
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table.column_names == ["id", "class", "p_corner", "p_stripe", "geometry", "bbox"]
    assert json.loads(table.schema.metadata[b"geo"])["primary_column"] == "geometry"
    assert table["class"].to_pylist() == [entry["classes"][0] for entry in found["predictions"]]
