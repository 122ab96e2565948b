"""Who may write to a run folder, and what is recorded there."""

from __future__ import annotations

import getpass
import json
import logging
import os
import platform
import socket

import pytest
import torch

from geomed_mae.errors import ConfigError, IntegrityError, OutputError
from geomed_mae.recipe_file import build_recipe, load_recipe
from geomed_mae.training import checkpoint
from geomed_mae.training.run import RunFolder, describe_environment, science_differences

RECIPE = {"data": {"crop_2d": [8, 8]}, "model": {"patch_2d": [4, 4]}, "train": {"steps": 4}}
ARCHIVE = {"fingerprint": "f", "images": 2}


def open_run(path, *, archive=ARCHIVE, **options):
    data = {key: dict(value) for key, value in RECIPE.items()}
    for key, value in options.pop("changes", {}).items():
        section, name = key.split(".")
        data[section][name] = value
    environment = describe_environment(torch.device("cpu"), "auto")
    return RunFolder(path, build_recipe(data), environment=environment, archive=archive, **options)


def save(run, step):
    checkpoint.save(run.checkpoints, step, model={"w": torch.zeros(1)}, optimizer={}, state={})


def test_a_new_run_says_what_it_does_and_where(tmp_path):
    with open_run(tmp_path / "run") as run:
        run.record({"step": 1, "loss": 0.5})
        run.finish({"steps": 4})
    assert load_recipe(tmp_path / "run/recipe.resolved.yaml") == build_recipe(RECIPE)
    environment = json.loads((tmp_path / "run/environment.json").read_text())
    assert environment["versions"]["torch"] and environment["cpus"] > 0 and environment["archive"] == ARCHIVE
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text()) == {"step": 1, "loss": 0.5}
    assert json.loads((tmp_path / "run/summary.json").read_text()) == {"steps": 4}


def test_nothing_in_a_run_names_the_machine_its_user_or_its_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "reading-room-7")
    monkeypatch.setattr(platform, "node", lambda: "reading-room-7")
    with open_run(tmp_path / "run") as run:
        logging.getLogger("geomed_mae.training").info("hello")
        logging.getLogger("geomed_mae.readers.geotiff").warning("cannot read /secret/JANE_DOE.tif")
        run.record({"step": 1, "loss": 0.5})
    assert "hello" in (tmp_path / "run/train.log").read_text()
    forbidden = [str(tmp_path), "JANE_DOE", "reading-room-7"]
    forbidden += [getpass.getuser()] if len(getpass.getuser()) > 4 else []
    for path in (tmp_path / "run").rglob("*"):
        text = path.name + (path.read_bytes().decode("latin1") if path.is_file() else "")
        assert not [word for word in forbidden if word in text], path.name


def test_an_existing_run_is_refused_with_the_two_ways_out(tmp_path):
    open_run(tmp_path).close()
    with pytest.raises(ConfigError, match="already holds a run; continue it with --resume or replace it with --over"):
        open_run(tmp_path)


def test_resume_and_overwrite_exclude_one_another(tmp_path):
    with pytest.raises(ConfigError, match="exclude one another"):
        open_run(tmp_path, resume=True, overwrite=True)


def test_a_folder_with_something_else_is_never_written_to_or_deleted(tmp_path):
    (tmp_path / "thesis.doc").write_text("years of work")
    for options in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match=r"not empty and holds no run \(found 'thesis.doc'\)"):
            open_run(tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.doc"]


def test_a_file_is_no_run_folder(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="is a file; --out takes a folder"):
        open_run(tmp_path / "file")


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path):
    with open_run(tmp_path) as run:
        save(run, 2)
        run.record({"step": 1, "loss": 1.0})
    (tmp_path / "notes.txt").write_text("mine")
    with open_run(tmp_path, overwrite=True) as run:
        assert run.resumed is None
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert not (tmp_path / "checkpoints").exists() and (tmp_path / "metrics.jsonl").read_text() == ""


def test_resume_goes_on_from_the_newest_checkpoint_and_drops_later_lines(tmp_path):
    with open_run(tmp_path) as run:
        for step in (1, 2, 3):
            run.record({"step": step, "loss": 1.0})
        save(run, 2)
    with (tmp_path / "metrics.jsonl").open("a") as out:
        out.write('{"step": 4, "lo')
    with open_run(tmp_path, resume=True) as run:
        assert run.resumed.step == 2
        run.record({"step": 3, "loss": float("nan")})
        assert [line["step"] for line in run.metrics()] == [1, 2, 3] and run.metrics()[-1]["loss"] is None


def test_resume_of_nothing_starts_a_run(tmp_path):
    with open_run(tmp_path / "new", resume=True) as run:
        assert run.resumed is None


def test_steps_and_workers_may_change_between_sessions(tmp_path):
    open_run(tmp_path).close()
    open_run(tmp_path, resume=True, changes={"train.steps": 9, "data.workers": 3, "train.checkpoint_every": 1}).close()
    assert load_recipe(tmp_path / "recipe.resolved.yaml").train.steps == 9


def test_another_recipe_is_refused_with_what_differs(tmp_path):
    open_run(tmp_path).close()
    with pytest.raises(IntegrityError, match=r"another recipe \(train.lr: 0.001 -> 0.5; train.seed: 0 -> 1\)"):
        open_run(tmp_path, resume=True, changes={"train.lr": 0.5, "train.seed": 1})


def test_another_archive_is_refused(tmp_path):
    open_run(tmp_path).close()
    with pytest.raises(IntegrityError, match=r"another archive \(2 images, now 3, or other pixels\)"):
        open_run(tmp_path, resume=True, archive={"fingerprint": "g", "images": 3})


def test_a_missing_section_is_a_difference():
    plain, head = build_recipe(RECIPE), build_recipe({**RECIPE, "head": {}})
    assert science_differences(plain, head) == ["head: None -> (HeadConfig)"]


def test_two_processes_cannot_write_one_run(tmp_path):
    with open_run(tmp_path), pytest.raises(OutputError, match="another process is writing the run"):
        open_run(tmp_path, resume=True)
    open_run(tmp_path, resume=True).close()


def test_a_worker_that_outlives_a_run_does_not_hold_its_lock(tmp_path):
    run = open_run(tmp_path)
    (read, write), (began, begun) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.write(begun, b".")
        os.read(read, 1)
        os._exit(0)
    os.read(began, 1)  # what the child does first, all packages' hooks of fork, is done
    try:
        run.close()  # as the kernel closes for a process that is killed
        open_run(tmp_path, resume=True).close()
    finally:
        os.write(write, b".")
        os.waitpid(child, 0)


def test_what_a_killed_start_was_writing_is_not_in_the_way(tmp_path):
    (tmp_path / ".environment.json.partial").write_text("{")
    open_run(tmp_path).close()


def test_tensorboard_reads_the_scalars_of_both_sessions(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    with open_run(tmp_path) as run:
        run.record({"step": 1, "loss": 0.5, "skipped": True})
        save(run, 1)
    with open_run(tmp_path, resume=True) as run:
        run.record({"step": 2, "loss": 0.25})
    found = []
    for path in sorted((tmp_path / "tensorboard").iterdir()):
        for raw in RawEventFileLoader(str(path)).Load():
            event = Event.FromString(raw)
            found += [(event.step, value.tag, value.simple_value) for value in event.summary.value]
    assert found == [(1, "loss", 0.5), (2, "loss", 0.25)]
