"""The demo: all its parts fit together (with few steps), and it touches nothing but its own folder."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import rasterio

from geomed_mae import demo as module
from geomed_mae.demo import SCENE, demo, water_mask
from geomed_mae.errors import ConfigError
from geomed_mae.readers import read_images
from geomed_mae.recipe_file import load_recipe

FEW = ["train.steps=3", "train.batch_size=2", "train.log_every=1", "model.depth=2"]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict, list[str]]:
    """The demo with three steps a stage, run twice into the same folder."""
    out = tmp_path_factory.mktemp("demo") / "demo"
    lines: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "load_recipe", lambda name: load_recipe(name, FEW))
        result = demo(out, say=lines.append, progress=lambda items, what, total: items)
    return out, result, lines


def test_every_part_leaves_its_result(done):
    out, result, _ = done
    for name in ("pretrain/encoder/model.safetensors", "finetune/model/model.safetensors", "timm/model.safetensors"):
        assert (out / name).is_file()
    assert list((out / "pretrain" / "panels").glob("*.png"))
    assert list((out / "embeddings").glob("*.parquet"))
    assert Path(result["prediction"]).is_file()
    assert json.loads((out / "demo.json").read_text())["timm_largest_relative_difference"] <= 1e-5


def test_one_encoder_knows_the_scene_and_the_volumes(done):
    contract = json.loads((done[0] / "pretrain" / "encoder" / "contract.json").read_text())
    assert {entry["modality"] for entry in contract["channels"]} == {"landsat7", "ct", "mr"}


def test_the_prediction_lies_on_the_scenes_grid(done):
    with rasterio.open(done[1]["prediction"]) as prediction, rasterio.open(SCENE) as scene:
        assert (prediction.transform, prediction.crs, prediction.shape) == (scene.transform, scene.crs, scene.shape)


def test_the_report_shows_both_runs_and_the_scene(done):
    html = (done[0] / "report.html").read_text()
    for title in ("Pretraining", "Fine-tuning", "Water in the whole scene", "Reconstructions: "):
        assert title in html
    assert str(done[0]) not in html


def test_each_step_says_what_it_does_and_the_last_line_where_the_results_lie(done):
    lines = done[2]
    assert [line[:3] for line in lines if line[1:3] == "/7"] == [f"{number}/7" for number in range(1, 8)]
    assert str(done[0] / "report.html") in lines[-1]


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="holds something else; choose another --out"):
        demo(tmp_path, say=print, progress=lambda items, what, total: items)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_water_mask_is_the_sign_of_mndwi():
    scene = read_images(SCENE, "landsat7")[0]
    green, swir = scene.array[1].astype(np.float64), scene.array[4].astype(np.float64)
    index = (green - swir) / (green + swir)
    assert np.array_equal(water_mask(scene).array[0] > 0, index > 0)
    assert 0.1 < (index > 0).mean() < 0.6


def test_the_session_in_the_readme_runs_as_it_is_written(done):
    text = (Path(__file__).resolve().parents[1] / "README.md").read_text()
    assert text.count("\n", 0, text.index("```python")) < 30, "the session belongs into the first 30 lines"
    lines = re.search(r"```python\n(>>> .*?)```", text, re.S)[1].splitlines()
    code = [line[4:] for line in lines if line.startswith(">>> ")]
    assert len(code) == 6
    script = "\n".join(code[:-1]).replace("demo/pretrain", str(done[0] / "pretrain"))
    names: dict = {}
    exec(script.replace("geomed_mae/demo_data/L7_ETMs.tif", str(SCENE)), names)
    shown = eval(code[-1], names)
    assert isinstance(shown, tuple) and all(-1 <= number <= 1 for number in shown)
    assert re.fullmatch(r"\(-?[01]\.\d+, -?[01]\.\d+\)", lines[-1]), "the session ends in numbers"


@pytest.mark.slow
def test_the_whole_demo_learns_and_keeps_its_time(tmp_path):
    result = demo(tmp_path / "demo", say=print, progress=lambda items, what, total: items)
    assert result["seconds"] < 300, "five minutes on two CPU cores is the promise"
    assert result["loss_last"] < 0.6 * result["loss_first"]
    errors = json.loads((tmp_path / "demo" / "pretrain" / "summary.json").read_text())["reconstruction_error"]
    landsat = next(entry for name, entry in errors.items() if name.endswith("landsat7"))
    assert min(band["r_squared"] for band in landsat.values()) > 0.1, "reconstructions know more than each crop's mean"
    assert result["water"]["classes"]["water"]["iou"] > 0.85
