"""kill -9 at any time costs at most the steps since the last checkpoint, and changes nothing of the result.

Kills at chance moments hit what takes long; kills at every call that changes the disk hit what does not.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from geomed_mae.training import checkpoint
from tests.training.sessions import ROOT, Sessions
from tests.training.tiny_run import (
    STEPS,
    log_lines,
    parts_of_ranks,
    record_of,
    record_of_rank,
    same_result,
    settings,
    start_ranks,
    tensors,
    words,
)

KILLED = -signal.SIGKILL


def killed_and_resumed(sessions: Sessions, arguments: tuple, run: Path, targets: np.ndarray) -> None:
    """Kill a run a chance moment after each of these steps, then let it end."""
    rng, record = np.random.default_rng(len(targets)), Path(record_of(run))
    for target in sorted(targets):
        session = sessions.start(*arguments, "--resume", record=str(record))
        session.until(lambda step=target: reached(record) >= step)
        time.sleep(float(rng.uniform(0, 0.06)))
        session.kill()
        assert session.wait() == KILLED, session.said
        every_checkpoint_loads(run)
    session = sessions.run(*arguments, "--resume", record=str(record))
    assert session.code == 0, session.said


def reached(record: Path) -> int:
    """Return how many steps were made so far, those of earlier sessions included."""
    return len({line.split(b",")[0] for line in record.read_bytes().splitlines()}) if record.is_file() else 0


def every_checkpoint_loads(run: Path) -> None:
    folder = run / "checkpoints"
    for step in checkpoint.steps_present(folder):
        assert checkpoint.load(checkpoint.step_folder(folder, step)).step == step


def drawn(seed: int, kills: int, steps: int) -> np.ndarray:
    return np.random.default_rng(seed).choice(np.arange(1, steps - 5), kills, replace=False)


def test_a_run_killed_five_times_is_the_run_that_was_not(place, whole, sessions):
    killed_and_resumed(sessions, words(place, place / "five"), place / "five", drawn(5, 5, STEPS))
    same_result(place / "five", whole)


def test_a_run_with_workers_that_is_killed_goes_on_at_once(place, whole, sessions):
    """Its workers outlive it by some seconds, and must not be in the way."""
    run = place / "orphans"
    killed_and_resumed(sessions, words(place, run, *settings(data__workers=2)), run, drawn(1, 2, STEPS))
    same_result(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_killed_twenty_five_times_is_the_run_that_was_not(place, sessions, workers):
    run, whole = place / f"many{workers}", place / f"long{workers}"
    longer = settings(train__steps=4 * STEPS)
    assert sessions.run(*words(place, whole, *longer), record=record_of(whole)).code == 0
    arguments = words(place, run, *longer, *settings(data__workers=workers))
    killed_and_resumed(sessions, arguments, run, drawn(25 + workers, 25, 4 * STEPS))
    same_result(run, whole)


@pytest.mark.slow
def test_two_processes_killed_ten_times_are_the_run_that_was_not(place, sessions):
    run, whole = place / "two", place / "two-whole"
    assert [rank.wait() for rank in start_ranks(sessions, words(place, whole), whole)] == [0, 0]
    rng, record = np.random.default_rng(2), Path(record_of_rank(run, 0))
    for target in sorted(drawn(10, 10, STEPS)):
        ranks = start_ranks(sessions, words(place, run, "--resume"), run)
        ranks[0].until(lambda step=target: reached(record) >= step)
        time.sleep(float(rng.uniform(0, 0.06)))
        for rank in ranks:
            rank.kill()
        assert [rank.wait() for rank in ranks] == [KILLED, KILLED], "".join(rank.said for rank in ranks)
        every_checkpoint_loads(run)
    assert [rank.wait() for rank in start_ranks(sessions, words(place, run, "--resume"), run)] == [0, 0]
    assert tensors(run) == tensors(whole) and parts_of_ranks(run) == parts_of_ranks(whole)


@pytest.mark.slow
def test_a_run_with_a_cache_killed_ten_times_is_the_run_without_either(place, whole, sessions):
    run = place / "cached"
    arguments = words(place, run, *settings(data__cache="always", data__cache_mb=0, data__workers=2))
    killed_and_resumed(sessions, arguments, run, drawn(11, 10, STEPS))
    same_result(run, whole)


@pytest.mark.slow
def test_the_command_itself_is_killed_and_goes_on(tmp_path, place, sessions):
    """The command in a process of its own: no fork and no stand-ins."""
    steps = settings(train__steps=8)
    arguments = [str(word) for word in words(place, tmp_path / "run", *steps)]
    whole = sessions.start(*words(place, tmp_path / "whole", *steps), full_size=True)
    with command(*arguments) as victim:
        end = time.monotonic() + 120
        while not (tmp_path / "run/checkpoints/step-00000004").exists() and victim.poll() is None:
            assert time.monotonic() < end
            time.sleep(0.005)
        victim.kill()
    assert victim.returncode == KILLED
    with command(*arguments, "--resume") as again:
        said = again.communicate()[0]
    assert again.returncode == 0 and whole.wait() == 0, said
    assert json.loads((tmp_path / "run/summary.json").read_text())["steps"] == 8
    assert tensors(tmp_path / "run") == tensors(tmp_path / "whole")
    assert log_lines(tmp_path / "run") == log_lines(tmp_path / "whole")


def command(*arguments: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    words_of_it = [sys.executable, "-m", "geomed_mae", *arguments]
    return subprocess.Popen(
        words_of_it, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


# ------------------------------------------------------------------------------------- at every call, one after another


def test_fault_51_a_kill_at_any_call_of_a_save_leaves_a_checkpoint_that_loads(tmp_path, sessions):
    at, codes, found = 0, [], set()
    while not codes or codes[-1] == KILLED:
        at += 1
        folder = tmp_path / str(at)
        for step in (1, 2):
            save(folder, step)
        done = sessions.task("save_one", folder, 3, trip={"folder": str(folder), "at": at})
        codes.append(done.code)
        newest = checkpoint.newest_valid(folder)
        assert newest.step in (2, 3) and newest.state["of"] == newest.step, at
        assert torch.equal(newest.model["weight"], torch.full((4, 5), float(newest.step)))
        every_checkpoint_loads(tmp_path / str(at))
        found.add(newest.step)
        save(folder, 4)
        assert checkpoint.newest_valid(folder).step == 4
        assert all(path.name.startswith("step-") for path in folder.iterdir()), "the next save clears what was left"
        shutil.rmtree(folder)
    assert codes[-1] == 0 and set(codes[:-1]) == {KILLED} and len(codes) > 20
    assert found == {2, 3}


def save(folder: Path, step: int) -> None:
    model, moments = {"weight": torch.full((4, 5), float(step))}, {"m": torch.full((7,), float(step))}
    checkpoint.save(folder, step, model=model, optimizer=moments, state={"of": step}, keep=2)


def test_fault_51_a_kill_at_any_call_of_opening_a_run_costs_nothing_of_it(tmp_path, place, sessions):
    begun = tmp_path / "begun"
    assert sessions.task("open_run", begun, place / "recipe.yaml").code == 0
    with (begun / "metrics.jsonl").open("w") as out:
        out.writelines(f'{{"step": {step}, "loss": 1.0}}\n' for step in (1, 2, 3))
    save(begun / "checkpoints", 2)
    at, codes = 0, []
    while not codes or codes[-1] == KILLED:
        at += 1
        run = tmp_path / str(at)
        shutil.copytree(begun, run)
        codes.append(sessions.task("open_run", run, place / "recipe.yaml", trip={"folder": str(run), "at": at}).code)
        again = sessions.task("open_run", run, place / "recipe.yaml")
        assert again.code == 0, f"killed at call {at}: {again.said}"
        lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert lines == [1, 2, 3], f"killed at call {at}: lines of steps that are not done again are kept"
        shutil.rmtree(run)
    assert codes[-1] == 0 and len(codes) > 5


def test_fault_51_a_kill_at_any_call_of_starting_a_run_does_not_block_its_start(tmp_path, place, sessions):
    at, codes = 0, []
    while not codes or codes[-1] == KILLED:
        at += 1
        run = tmp_path / str(at)
        codes.append(sessions.task("open_run", run, place / "recipe.yaml", trip={"folder": str(run), "at": at}).code)
        again = sessions.task("open_run", run, place / "recipe.yaml")
        assert again.code == 0, f"killed at call {at}: {again.said}"
    assert codes[-1] == 0 and len(codes) > 5
