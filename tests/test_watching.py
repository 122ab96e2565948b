"""Watching a run: pictures, probes and labels leave no trace in what is learned, and no name in what is written."""

from __future__ import annotations

import json
import logging
import sys

import pytest
import torch

import geomed_mae.pretrain as pretraining
from geomed_mae.errors import OutputError, Preempted
from geomed_mae.pretrain import pretrain
from geomed_mae.recipe_file import build_recipe
from geomed_mae.report import report
from geomed_mae.samples.loader import Steps
from geomed_mae.training import checkpoint, observers
from geomed_mae.training.live_files import live_panels
from tests.scenes import labelled_scenes

RECIPE = {
    "data": {"modality": "landsat7", "crop_2d": [32, 32], "crops_per_read": 1},
    "model": {"depth": 1, "patch_2d": [8, 8], "basis": 4, "decoder_dim": 16, "decoder_depth": 1},
    "train": {"steps": 6, "batch_size": 4, "log_every": 2, "checkpoint_every": 3, "device": "cpu"},
}
WATCHED = {"panels_every": 2, "probe_every": 2}


def recipe(**train):
    return build_recipe({**RECIPE, "train": {**RECIPE["train"], **train}})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return labelled_scenes(tmp_path_factory.mktemp("JANE_DOE"), 3)


@pytest.fixture(scope="module")
def watched(place, tmp_path_factory):
    """A run with everything that can be watched, the one without, and the lines of the first."""
    runs = tmp_path_factory.mktemp("runs")
    pretrain(recipe(**WATCHED), [place / "images"], runs / "watched", labels=place / "labels")
    pretrain(recipe(), [place / "images"], runs / "alone")
    return runs / "watched", runs / "alone"


def lines(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def bits(run):
    found = checkpoint.newest_valid(run / "checkpoints")
    return found.step, {**found.model, **{f"optimizer {name}": value for name, value in found.optimizer.items()}}


def same(one, other):
    return one[0] == other[0] and one[1].keys() == other[1].keys() and all(
        torch.equal(value, other[1][name]) for name, value in one[1].items()
    )  # fmt: skip


def test_labels_pictures_and_probes_leave_every_bit_as_it_would_have_been(watched):
    assert same(*(bits(run) for run in watched))
    losses = [[line["loss"] for line in lines(run) if "loss" in line] for run in watched]
    assert losses[0] == losses[1] and len(losses[0]) == 3


def test_scores_stand_in_the_log_beside_their_floor_and_in_the_summary(watched):
    scores = [line for line in lines(watched[0]) if "probe_r2" in line]
    assert [line["step"] for line in scores] == [2, 4, 6]
    assert len({line["probe_floor_r2"] for line in scores}) == 1 and "loss" not in scores[0]
    summary = json.loads((watched[0] / "summary.json").read_text())
    assert summary["probe"]["r2"] == scores[-1]["probe_r2"] and "reconstruction_error" in summary
    assert not [line for line in lines(watched[1]) if any(name.startswith("probe") for name in line)]


def test_tensorboard_has_the_probe(watched):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(watched[0] / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("probe_r2")] == [2, 4, 6]


def test_live_panels_and_final_ones_lie_side_by_side(watched):
    series = live_panels(watched[0] / "panels")
    assert {name: list(steps) for name, steps in series.items()} == {"01-landsat7": [2, 4, 6]}
    assert (watched[0] / "panels/01-landsat7.png").stat().st_size > 10_000
    assert [path.name for path in (watched[1] / "panels").iterdir()] == ["01-landsat7.png"]


def test_the_report_has_curves_strip_archive_and_card(watched):
    html = report(watched[0]).read_text()
    wanted = [
        "Reconstructions over the steps: 01-landsat7",
        "step 2",
        "Reconstructions: 01-landsat7",
        "probe R²",
        "waiting for data",
    ]
    wanted += ["3 files found = 3 used + 0 skipped", "Encoder pretrained with geomed-mae"]
    assert not [words for words in wanted if words not in html]


def test_no_name_of_images_or_labels_is_in_the_run(watched, place):
    report(watched[0])
    for path in watched[0].rglob("*"):
        content = path.name.encode() + (path.read_bytes() if path.is_file() else b"")
        assert not [word for word in (str(place), "JANE_DOE", "0.tif") if word.encode() in content], path


def test_a_resumed_run_says_where_and_ends_with_the_same_bits(watched, place, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[pretrain.__module__], "due", _stop_after_three)
    with pytest.raises(Preempted):
        pretrain(recipe(**WATCHED), [place / "images"], tmp_path / "run", labels=place / "labels")
    monkeypatch.undo()
    pretrain(recipe(**WATCHED), [place / "images"], tmp_path / "run", labels=place / "labels", resume=True)
    assert same(bits(tmp_path / "run"), bits(watched[0]))
    assert [line["step"] for line in lines(tmp_path / "run") if line.get("resumed")] == [3]
    assert "Resumed at step 3" in report(tmp_path / "run").read_text()


def _stop_after_three(train, done, *, labelled):
    if done == 3:
        raise Preempted("told to stop")
    return observers.due(train, done, labelled=labelled)


def test_labels_that_do_not_fit_cost_a_warning_without_names_in_the_run(place, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    (tmp_path / "JANE_ROE.csv").write_text("image,class\nJANE_ROE.tif,a\n")
    pretrain(recipe(steps=2), [place / "images"], tmp_path / "run", labels=tmp_path / "JANE_ROE.csv")
    assert "JANE_ROE" in caplog.text and "there will be no probe" in caplog.text
    said = (tmp_path / "run/train.log").read_text()
    assert "there will be no probe" in said and "JANE_ROE" not in said
    assert not [line for line in lines(tmp_path / "run") if "probe_r2" in line]


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (OutputError("the picture cannot be written: no space left on device"), "no space left on device"),
        (torch.OutOfMemoryError("CUDA out of memory"), "training leaves the device too little memory for it"),
    ],
)
def test_a_live_picture_that_cannot_be_made_ends_no_run(place, tmp_path, caplog, monkeypatch, error, why):
    caplog.set_level(logging.WARNING)
    draw = observers.draw_reconstructions

    def full(objective, batch, path, **how):
        if path.name.startswith("step-"):
            raise error
        return draw(objective, batch, path, **how)

    monkeypatch.setattr(observers, "draw_reconstructions", full)
    pretrain(recipe(panels_every=1), [place / "images"], tmp_path / "run")
    assert caplog.text.count(f"{why}; the run goes on") == 1
    assert (tmp_path / "run/panels/01-landsat7.png").exists()


def test_while_a_run_goes_on_its_own_thread_alone_reads_images(place, tmp_path, monkeypatch):
    looked, within, fit = [], [False], pretraining.fit

    def noted(*arguments, **how):
        within[0] = True
        done = fit(*arguments, **how)
        within[0] = False
        return done

    examples = Steps.examples
    monkeypatch.setattr(pretraining, "fit", noted)
    monkeypatch.setattr(Steps, "examples", lambda *its: looked.append(within[0]) or examples(*its))
    pretrain(recipe(panels_every=2), [place / "images"], tmp_path / "run")
    assert looked and not any(looked), "on a GPU, batches are made meanwhile, in another thread"
    assert sorted(live_panels(tmp_path / "run/panels")["01-landsat7"]) == [2, 4, 6]
