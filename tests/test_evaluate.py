"""evaluate: scores over unseen images, and none over seen ones."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import rasterio

from geomed_mae.errors import ConfigError, IntegrityError, LeakageError
from geomed_mae.evaluate import evaluate
from geomed_mae.finetune import finetune
from geomed_mae.predict import predict
from geomed_mae.recipe_file import build_recipe
from tests.scenes import WATER_RECIPE, landsat_scene, water_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return water_run(tmp_path_factory)


@pytest.fixture(scope="module")
def unseen(tmp_path_factory):
    """Three scenes that no run has seen, with labels."""
    folder = tmp_path_factory.mktemp("unseen")
    truth = {
        seed: landsat_scene(
            folder / "scenes" / f"{seed}.tif", folder / "labels" / f"{seed}.tif", shape=(80, 70), seed=seed
        )
        for seed in (5, 6, 7)
    }
    return folder, truth


def test_scores_are_those_of_the_maps_that_predict_writes(folder, unseen, tmp_path):
    path, truth = unseen
    scores = evaluate(folder / "run", [path / "scenes"], path / "labels", tmp_path / "scores.json")
    predicted = predict(folder / "run", [path / "scenes"], tmp_path / "maps")
    both = water = 0
    for entry, (seed, expected) in zip(predicted["predictions"], sorted(truth.items()), strict=True):
        with rasterio.open(entry["output"]) as dataset, rasterio.open(path / "scenes" / f"{seed}.tif") as scene:
            assert dataset.transform == scene.transform
            found = dataset.read(1) == 1
        both += 2 * (found & expected).sum()
        water += found.sum() + expected.sum()
    assert scores["classes"]["water"]["dice"] == pytest.approx(both / water, abs=1e-6)
    assert scores["classes"]["water"]["pixels_true"] == sum(int(values.sum()) for values in truth.values())
    assert scores["images"] == 3 and scores["labels"]["images_labelled"] == 3
    over = scores["classes"]["water"]["dice_over_images"]
    assert over["images"] == over["groups"] == 3 and over["mean"] > 0.9
    assert json.loads((tmp_path / "scores.json").read_text()) == scores
    assert len(scores["per_group"]) == len(scores["per_image"]) == 3
    assert scores["classes"]["water"]["surface_distance"]["unit"] == "m"
    assert 0 <= scores["calibration"]["expected_error"] <= 1
    assert scores["leakage"]["compared_with"]["training"] == 1


def test_a_trained_scene_under_another_name_ends_in_a_leak_and_no_file(folder, tmp_path):
    """One of the two was trained on, whichever it is: both together always leak. An older file goes, too."""
    for kind in ("scenes", "labels"):
        (tmp_path / kind).mkdir()
        for number, source in enumerate(("x", "y")):
            shutil.copy(folder / kind / f"{source}.tif", tmp_path / kind / f"other_{number}.tif")
    (tmp_path / "scores_pictures").mkdir()
    for older in ("scores.json", "scores_pictures/worst.png"):
        (tmp_path / older).write_text("{}")
    with pytest.raises(LeakageError, match="1 of the 2 labelled images were trained on") as caught:
        evaluate(folder / "run", [tmp_path / "scenes"], tmp_path / "labels", tmp_path / "scores.json")
    assert caught.value.exit_code == 6
    assert not (tmp_path / "scores.json").exists() and not list((tmp_path / "scores_pictures").iterdir())


def test_a_trained_scene_in_another_encoding_is_still_known(folder, tmp_path):
    for name in ("x", "y"):
        with rasterio.open(folder / "scenes" / f"{name}.tif") as source:
            profile, values, bands = source.profile, source.read(), source.descriptions
        profile.update(compress="deflate", tiled=True, blockxsize=64, blockysize=64)
        (tmp_path / "scenes").mkdir(exist_ok=True)
        with rasterio.open(tmp_path / "scenes" / f"{name}.tif", "w", **profile) as target:
            target.write(values)
            target.descriptions = bands
    with pytest.raises(LeakageError):
        evaluate(folder / "run", [tmp_path / "scenes"], folder / "labels", tmp_path / "scores.json")


def test_a_scene_of_which_blocks_were_trained_on_is_a_leak(folder, tmp_path):
    given = {
        **WATER_RECIPE,
        "train": {**WATER_RECIPE["train"], "steps": 1},
        "labels": {"test": 0.5, "block_px": 32},
    }
    finetune(build_recipe(given), [folder / "scenes" / "x.tif"], folder / "labels", "none", tmp_path / "run")
    with pytest.raises(LeakageError, match="wholly or in part"):
        evaluate(tmp_path / "run", [folder / "scenes" / "x.tif"], folder / "labels", tmp_path / "scores.json")


def test_held_out_images_of_the_run_give_the_scores_of_its_summary_to_the_digit(folder, tmp_path):
    found = []
    for name in ("x", "y"):
        try:
            scene = folder / "scenes" / f"{name}.tif"
            found.append(evaluate(folder / "run", [scene], folder / "labels", tmp_path / f"{name}.json"))
        except LeakageError:
            continue
    (scores,) = found
    expected = json.loads((folder / "run" / "summary.json").read_text())["test"]
    assert {name: scores[name] for name in expected} == expected


def test_a_damaged_model_is_refused(folder, unseen, tmp_path):
    path, _ = unseen
    shutil.copytree(folder / "run", tmp_path / "run")
    text = (tmp_path / "run" / "model" / "contract.json").read_text()
    (tmp_path / "run" / "model" / "contract.json").write_text(text.replace("0.0", "0.5", 1) + " ")
    with pytest.raises(IntegrityError, match=r"contract\.json is not what was written"):
        evaluate(tmp_path / "run", [path / "scenes"], path / "labels", tmp_path / "scores.json")


def test_unmatched_labels_are_an_error(folder, unseen, tmp_path):
    path, _ = unseen
    landsat_scene(tmp_path / "s.tif", tmp_path / "labels" / "far.tif", seed=30, shape=(64, 64))
    with pytest.raises(ConfigError, match="none of the 1 files"):
        evaluate(folder / "run", [path / "scenes"], tmp_path / "labels", tmp_path / "scores.json")


def test_scores_say_nothing_of_files(folder, unseen, tmp_path):
    path, _ = unseen
    evaluate(folder / "run", [path / "scenes"], path / "labels", tmp_path / "scores.json")
    text = (tmp_path / "scores.json").read_text()
    assert ".tif" not in text and str(path) not in text
    assert np.isfinite(json.loads(text)["mean_iou"])
