"""A study: members in order, resumed without doing anything twice, and never mixed with another study's."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from geomed_mae.errors import ConfigError, IntegrityError, LeakageError, OutputError
from geomed_mae.export import export
from geomed_mae.recipe_file import load_recipe
from geomed_mae.scoring import intervals
from geomed_mae.training.study import run_study
from geomed_mae.training.study_files import is_study, members, refuse_study
from tests.make_study import FakeTask, FakeTune, recipe


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(intervals, "ROUNDS", 100)


@pytest.fixture
def encoder(tmp_path) -> str:
    folder = tmp_path / "encoder"
    folder.mkdir()
    (folder / "MANIFEST.sha256").write_text("abc  model.safetensors\n")
    return str(folder)


def study(out: Path, encoder: str, tune: FakeTune | None = None, *, task: FakeTask | None = None, given=None, **how):
    tune = tune or FakeTune(summarised=False)
    options = {"twin": True, "transductive": False, "resume": False, "overwrite": False, **how}
    return run_study(given or recipe(seeds=2), task or FakeTask(6), encoder, out, tune=tune, **options), tune


def test_members_run_seed_by_seed_with_both_arms_of_a_seed_together(tmp_path, encoder):
    found, tune = study(tmp_path / "out", encoder)
    places = [str(call["out"].relative_to(tmp_path / "out")) for call in tune.calls]
    assert places == ["pretrained/seed-0", "scratch/seed-0", "pretrained/seed-1", "scratch/seed-1"]
    assert [call["encoder"] for call in tune.calls] == [encoder, "none"] * 2
    assert [call["twin_of"] for call in tune.calls] == [None, encoder] * 2
    assert [call["recipe"].train.seed for call in tune.calls] == [0, 0, 1, 1]
    assert all(call["recipe"].train.seeds == 1 for call in tune.calls)
    assert found == {"run": str(tmp_path / "out"), **json.loads((tmp_path / "out/summary.json").read_text())}
    assert is_study(tmp_path / "out") and load_recipe(tmp_path / "out/recipe.resolved.yaml") == recipe(seeds=2)
    assert [str(path.relative_to(tmp_path / "out")) for path in members(tmp_path / "out")] == places


def test_the_first_seed_is_that_of_the_recipe(tmp_path, encoder):
    _, tune = study(tmp_path / "out", encoder, given=recipe(seed=7, seeds=2), twin=False)
    assert [call["out"].name for call in tune.calls] == ["seed-7", "seed-8"]


def test_seeds_from_random_weights_are_the_arm_scratch_and_have_no_verdict(tmp_path):
    found, tune = study(tmp_path / "out", "none", twin=False)
    assert [call["out"].parent.name for call in tune.calls] == ["scratch", "scratch"]
    assert tune.calls[0]["twin_of"] is None and "verdict" not in found


def test_resume_goes_on_with_what_is_not_finished_and_ends_as_an_untouched_study_does(tmp_path, encoder):
    untouched, _ = study(tmp_path / "a", encoder)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "b", encoder, FakeTune(summarised=False, stop_at=3))
    assert not (tmp_path / "b/summary.json").exists()
    found, tune = study(tmp_path / "b", encoder, resume=True)
    assert [str(call["out"].relative_to(tmp_path / "b")) for call in tune.calls] == ["scratch/seed-1"]
    assert tune.calls[0]["resume"]
    assert {**found, "run": ""} == {**untouched, "run": ""}


def test_resume_adds_seeds_and_arms(tmp_path, encoder):
    study(tmp_path / "out", encoder, given=recipe(seeds=1), twin=False)
    found, tune = study(tmp_path / "out", encoder, given=recipe(seeds=3), resume=True)
    assert len(tune.calls) == 5 and found["difference"]["seeds"] == 3


def test_resume_trains_finished_members_on_when_more_steps_are_asked_for(tmp_path, encoder):
    study(tmp_path / "out", encoder)
    tune = FakeTune(summarised=False, stop_at=0)
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "out", encoder, tune, given=recipe(seeds=2, steps=500), resume=True)


def test_resume_with_fewer_members_is_refused(tmp_path, encoder):
    study(tmp_path / "out", encoder)
    with pytest.raises(IntegrityError, match=r"has seed 1, which would be left out now; resume it with --seeds"):
        study(tmp_path / "out", encoder, given=recipe(seeds=1), resume=True)
    with pytest.raises(IntegrityError, match=r"has arm 'scratch'"):
        study(tmp_path / "out", encoder, twin=False, resume=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"given": recipe(seeds=2, lr=0.5)}, r"another recipe \(train.lr: 0.001 -> 0.5\)"),
        ({"given": recipe(seeds=2, patience=3)}, r"another recipe \(train.patience: None -> 3\)"),
        ({"task": FakeTask(6, fingerprint="other")}, "other images, labels or parts"),
        ({"transductive": True}, "started without --transductive"),
    ],
)
def test_resume_with_another_recipe_archive_or_rule_is_refused(tmp_path, encoder, change, message):
    study(tmp_path / "out", encoder)
    with pytest.raises(IntegrityError, match=message):
        study(tmp_path / "out", encoder, resume=True, **change)


def test_another_encoder_at_the_same_place_is_noticed(tmp_path, encoder):
    study(tmp_path / "out", encoder)
    (Path(encoder) / "MANIFEST.sha256").write_text("def  model.safetensors\n")
    with pytest.raises(IntegrityError, match="made from another encoder"):
        study(tmp_path / "out", encoder, resume=True)


def test_the_encoder_of_a_run_and_the_weights_of_a_foreign_folder_are_what_counts(tmp_path, encoder):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copytree(encoder, run / "encoder")
    study(tmp_path / "out", encoder)
    study(tmp_path / "out", str(run), resume=True)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "model.safetensors").write_bytes(b"1")
    study(tmp_path / "other", str(foreign))
    (foreign / "model.safetensors").write_bytes(b"2")
    with pytest.raises(IntegrityError, match="another encoder"):
        study(tmp_path / "other", str(foreign), resume=True)


def test_a_study_is_not_touched_without_resume_or_overwrite_and_replaced_whole_with_it(tmp_path, encoder):
    study(tmp_path / "out", encoder, given=recipe(seeds=2))
    with pytest.raises(ConfigError, match="already holds a study"):
        study(tmp_path / "out", encoder)
    with pytest.raises(ConfigError, match="exclude one another"):
        study(tmp_path / "out", encoder, resume=True, overwrite=True)
    found, tune = study(tmp_path / "out", encoder, given=recipe(seeds=1, lr=0.5), overwrite=True)
    assert len(tune.calls) == 2 and not (tmp_path / "out/pretrained/seed-1").exists()
    assert found["difference"]["seeds"] == 1


def test_folders_that_hold_something_else_are_left_alone(tmp_path, encoder):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes.txt").write_text("")
    with pytest.raises(ConfigError, match="holds no study .found 'notes.txt'"):
        study(tmp_path / "mine", encoder)
    with pytest.raises(ConfigError, match="is a file"):
        study(tmp_path / "mine/notes.txt", encoder)
    study(tmp_path / "out", encoder)
    with pytest.raises(ConfigError, match="holds a single run"):
        study(tmp_path / "out/pretrained/seed-0", encoder, overwrite=True)


def test_what_any_seed_would_be_refused_for_is_said_before_anything_is_written_or_deleted(tmp_path, encoder):
    asked = []

    def check(given, task, start, *, transductive) -> None:
        asked.append((given.train.seed, start))
        if given.train.seed == 1 and not transductive:
            raise LeakageError("seen")

    with pytest.raises(LeakageError):
        study(tmp_path / "out", encoder, check=check)
    assert asked == [(0, encoder), (1, encoder)] and not (tmp_path / "out").exists()
    study(tmp_path / "out", encoder, check=check, transductive=True)
    before = sorted(tmp_path.glob("out/*/*/summary.json"))
    with pytest.raises(LeakageError):
        study(tmp_path / "out", encoder, check=check, overwrite=True)
    assert sorted(tmp_path.glob("out/*/*/summary.json")) == before and len(before) == 4
    with pytest.raises(IntegrityError, match="started with --transductive"):
        study(tmp_path / "out", encoder, check=check, resume=True)


def test_a_study_of_which_no_member_could_begin_is_not_in_the_way(tmp_path, encoder):
    def refused(*_: object, **__: object) -> dict:
        raise ConfigError("no such head")

    with pytest.raises(ConfigError, match="no such head"):
        study(tmp_path / "out", encoder, refused)
    assert not is_study(tmp_path / "out")
    study(tmp_path / "out", encoder, given=recipe(seeds=1))


def test_a_twin_needs_an_encoder_and_images_to_score(tmp_path, encoder):
    with pytest.raises(ConfigError, match="--twin compares an encoder with random weights"):
        study(tmp_path / "out", "none")
    with pytest.raises(ConfigError, match="labels.test is 0"):
        study(tmp_path / "out", encoder, task=FakeTask(0))
    assert not (tmp_path / "out").exists()


def test_a_member_of_another_recipe_and_a_damaged_record_are_noticed(tmp_path, encoder):
    study(tmp_path / "out", encoder)
    member = tmp_path / "out/scratch/seed-1"
    text = (member / "recipe.resolved.yaml").read_text()
    (member / "recipe.resolved.yaml").write_text(text.replace("lr: 0.001", "lr: 0.5"))
    with pytest.raises(IntegrityError, match=r"member .*seed-1' was made with another recipe \(train.lr"):
        study(tmp_path / "out", encoder, resume=True)
    (member / "recipe.resolved.yaml").write_text(text)
    (member / "summary.json").write_text("{broken")
    with pytest.raises(IntegrityError, match=r"summary.json of .*seed-1' is damaged"):
        study(tmp_path / "out", encoder, resume=True)
    (tmp_path / "out/study.json").write_text("{}")
    with pytest.raises(IntegrityError, match="study.json of the study .* is damaged"):
        study(tmp_path / "out", encoder, resume=True)


HOLD = "import fcntl, sys; f = open(sys.argv[1], 'a'); fcntl.lockf(f, fcntl.LOCK_EX); print(1, flush=True); input()"


def test_two_processes_do_not_write_one_study(tmp_path, encoder):
    (tmp_path / "out").mkdir()
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out/.lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(OutputError, match="another process is writing the study"):
            study(tmp_path / "out", encoder)
        other.communicate(b"\n")
    study(tmp_path / "out", encoder, given=recipe(seeds=1))


def test_verbs_that_take_one_run_name_the_members_of_a_study(tmp_path, encoder):
    study(tmp_path / "out", encoder, given=recipe(seeds=1))
    with pytest.raises(
        ConfigError, match=r"is a study of 2 runs, and predict takes one of them: .*pretrained/seed-0, "
    ):
        refuse_study(tmp_path / "out", "predict")
    refuse_study(tmp_path / "out/scratch/seed-0", "predict")


def test_a_study_is_not_exported_as_if_it_were_a_run(tmp_path, encoder):
    study(tmp_path / "out", encoder, given=recipe(seeds=1))
    with pytest.raises(ConfigError, match=r"is a study of 2 runs, and export takes one of them"):
        export(tmp_path / "out", "timm", tmp_path / "exported")
