"""The plan of a dry run: what it says of speed, memory, disk and time follows from what was measured."""

from __future__ import annotations

import copy
import json
from functools import partial
from statistics import median

import pytest

from geomed_mae.pretrain import pretrain
from geomed_mae.recipe_file import build_recipe
from geomed_mae.samples.rate import LoaderRate
from geomed_mae.training import checkpoint, plan, rate
from geomed_mae.training.plan_text import plan_as_text
from geomed_mae.training.rate import StepRate
from tests.training.tiny_run import write_scene

RECIPE = {
    "data": {"modality": "landsat7", "crop_2d": [16, 16], "crops_per_read": 1},
    "model": {"depth": 1, "patch_2d": [4, 4], "basis": 4, "decoder_dim": 16, "decoder_depth": 1},
    "train": {"steps": 3600, "batch_size": 4, "checkpoint_every": 1800, "device": "cpu"},
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    for number, size in enumerate((48, 40)):
        write_scene(folder / f"{number}.tif", number, size)
    return folder


@pytest.fixture(scope="module")
def ran(archive, tmp_path_factory):
    """Folder of a run of 40 steps."""
    recipe = copy.deepcopy(RECIPE)
    recipe["train"] |= {"steps": 40, "log_every": 10}
    out = tmp_path_factory.mktemp("runs") / "a"
    pretrain(build_recipe(recipe), [archive], out)
    return out


@pytest.fixture
def measured(monkeypatch):
    """Speeds as told: seconds of a step of 4 samples, of the loader and of the model."""

    def tell(load: float, model: float, **how: object) -> None:
        loader = LoaderRate(4 / load, 4 / (2 * load), 4 / (load / 2), 3, **how)
        monkeypatch.setattr(plan, "measure_loader", lambda steps, workers: loader)
        monkeypatch.setattr(rate, "measure_step", lambda *_, **__: StepRate(model, model / 2, 2 * model, 3))

    return tell


def dry(archive, out, **data: object):
    recipe = copy.deepcopy(RECIPE)
    recipe["data"] |= data
    return pretrain(build_recipe(recipe), [archive], out, dry_run=True)


def test_without_workers_a_step_takes_the_time_of_its_data_too(archive, tmp_path, measured):
    measured(load=1.0, model=3.0)
    found = dry(archive, tmp_path / "run", cache="off")
    assert found["bound"] == "model" and found["data_wait"] == 0.25
    assert found["loader_samples_per_second"] == 4 and found["model_samples_per_second"] == pytest.approx(
        4 / 3, abs=0.1
    )
    # 3600 steps are as many hours as a step has seconds; from half to twice as measured, and a quarter beyond.
    assert found["hours"] == pytest.approx([2 / 1.25, 8 * 1.25])


def test_workers_hide_the_shorter_of_both(archive, tmp_path, measured):
    measured(load=4.0, model=1.0)
    found = dry(archive, tmp_path / "run", cache="off", workers=2)
    assert found["bound"] == "loader" and found["data_wait"] == 0.75
    assert found["hours"] == pytest.approx([2 / 1.25, 10 * 1.25])  # on a CPU they share the cores
    assert found["memory"]["in_flight_mb"] >= 0 and "shared_memory_free_mb" in found["memory"]


def test_a_cache_on_disk_may_spare_the_loader_its_time(archive, tmp_path, measured):
    measured(load=4.0, model=1.0)
    assert dry(archive, tmp_path / "run")["hours"] == pytest.approx([0.5 / 1.25, 10 * 1.25])
    measured(load=4.0, model=1.0, shared_reads=False)
    found = dry(archive, tmp_path / "run", cache="off")
    assert found["hours"][0] == pytest.approx(0.5 / 1.25) and "loader at least 1 samples/s" in plan_as_text(found)


def test_the_plan_tells_the_size_of_what_a_run_writes(archive, tmp_path, measured, ran):
    measured(load=1.0, model=1.0)
    found = dry(archive, tmp_path / "run")["disk"]
    assert found["checkpoints"] == 2 and found["free_mb"] > 0
    written = checkpoint.newest_valid(ran / "checkpoints").path
    size = sum(path.stat().st_size for path in written.rglob("*")) / 2**20
    assert found["checkpoint_mb"] == pytest.approx(size, rel=0.1, abs=0.1)
    cache = sum(path.stat().st_size for path in (ran / "cache").rglob("*") if path.is_file()) / 2**20
    assert cache <= found["cache_mb_at_most"] + 0.1


def test_the_text_names_what_does_not_fit_and_the_way_out(archive, tmp_path, measured):
    measured(load=1.0, model=3.0)
    found = dry(archive, tmp_path / "run")
    text = plan_as_text(found)
    assert "the model bounds the run" in text and "72 min to 10.0 h" in text and "warning" not in text
    found["memory"]["machine_mb"] = 1
    found["disk"]["free_mb"] = 0
    found["memory"] |= {"device_mb": 10, "device_total_mb": 5, "in_flight_mb": 8, "shared_memory_free_mb": 2}
    text = plan_as_text(found)
    for key in ("data.cache_mb", "train.accumulate", "data.shuffle_steps", "train.keep"):
        assert key in text


def test_a_measured_plan_is_near_what_a_run_does(archive, tmp_path, monkeypatch, ran):
    monkeypatch.setattr(rate, "SECONDS", 1.0)
    monkeypatch.setattr(plan, "measure_loader", partial(plan.measure_loader, seconds=1.0))
    found = dry(archive, tmp_path / "run")
    lines = (json.loads(line) for line in (ran / "metrics.jsonl").read_text().splitlines())
    rate_of_run = median(line["samples_per_second"] for line in lines if "samples_per_second" in line)
    told = 1 / (1 / found["loader_samples_per_second"] + 1 / found["model_samples_per_second"])
    assert told / 5 < rate_of_run < 5 * told  # other processes may come and go between both
