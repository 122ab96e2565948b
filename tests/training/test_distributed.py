"""Several processes train as one: the same samples, the same weights up to rounding, one end for all."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from geomed_mae.errors import ConfigError
from geomed_mae.training import checkpoint
from geomed_mae.training.distributed import Ranks
from tests.training.two_ranks import CASES, train

ROOT = Path(__file__).resolve().parents[2]


def start(arguments, world=2, **environment):
    """Start the processes of a run as SLURM would, without an agent that looks after them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world)
    ]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """Everything that two processes did; see `two_ranks`."""
    out = tmp_path_factory.mktemp("two")
    train(out / "alone", Ranks(), steps=2)
    started = start(["-m", "tests.training.two_ranks", str(out)])
    for process in started:
        _, errors = process.communicate(timeout=240)
        assert process.returncode == 0, errors
    return out, [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same cases, by one process: the folder of checkpoints, and the lines of the log."""
    out = tmp_path_factory.mktemp("one")
    # The bits of a step do not depend on how its samples were shared, so one process needs no accumulation.
    return {
        name: (out / name, train(out / name, Ranks(), **{**more, "accumulate": 1})[1]) for name, more in CASES.items()
    }


def close(mine, other, steps=4):
    """Equal up to rounding: AdamW and Muon make steps of about the learning rate of whatever is not exactly zero."""
    assert mine.keys() == other.keys()
    moved = {name: (mine[name].float() - other[name].float()).abs() for name in mine}
    assert max(float(difference.max()) for difference in moved.values()) < 2e-3 * steps
    return float(torch.cat([difference.flatten() for difference in moved.values()]).quantile(0.99))


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_learns(two, one, name):
    out, seen = two
    folder, lines = one[name]
    for mine, alone in zip(seen[0][name]["lines"], lines, strict=True):
        assert mine["step"] == alone["step"] and mine["samples"] == alone["samples"]
        for key in ("loss", "gradient_norm", "valid_fraction"):
            assert mine[key] == pytest.approx(alone[key], rel=1e-4), (mine["step"], key)
    two_saved, one_saved = checkpoint.newest_valid(out / name), checkpoint.newest_valid(folder)
    muon = "muon" in name
    assert close(two_saved.model, one_saved.model) < (2e-3 if muon else 1e-5)
    assert {key: value.shape for key, value in two_saved.optimizer.items()} == {
        key: value.shape for key, value in one_saved.optimizer.items()
    }
    assert two_saved.average.keys() == one_saved.average.keys()
    if two_saved.average:
        assert close(two_saved.average, one_saved.average) < 1e-5


def test_the_first_process_alone_records_and_keeps_the_model(two):
    _, seen = two
    for name in CASES:
        assert seen[0][name]["samples"] == seen[1][name]["samples"] == 16
        assert seen[0][name]["best"] and not seen[1][name]["best"]
        assert len(seen[0][name]["lines"]) == 4 and seen[1][name]["lines"] == []


def test_with_fsdp_each_process_holds_half_of_the_weights(two):
    for seen in two[1]:
        for name, more in CASES.items():
            assert seen[name]["held"] == pytest.approx(0.5 if "sharding" in more else 1.0, abs=0.05), name


@pytest.mark.parametrize("name", CASES)
def test_a_checkpoint_of_two_processes_is_continued_by_one(two, one, tmp_path, name):
    folder = two[0] / name
    middle = checkpoint.load(checkpoint.step_folder(folder, 2))
    checkpoint.save(
        tmp_path, 2, model=middle.model, optimizer=middle.optimizer, average=middle.average, state=middle.state
    )
    done, lines, *_ = train(tmp_path, Ranks(), resume=True, **CASES[name])
    assert done.step == 4 and done.samples == 16 and [line["step"] for line in lines] == [3, 4]
    end = checkpoint.newest_valid(tmp_path)
    assert close(end.model, checkpoint.newest_valid(one[name][0]).model) < (2e-3 if "muon" in name else 1e-5)


def test_a_checkpoint_of_one_process_is_continued_by_two(two, one):
    end = checkpoint.newest_valid(two[0] / "alone")
    assert end.step == 4
    assert close(end.model, checkpoint.newest_valid(one["replicated"][0]).model) < 1e-5


def test_two_processes_that_are_resumed_are_the_two_that_were_not_bit_by_bit(two):
    out, seen = two
    resumed, whole = checkpoint.newest_valid(out / "stopped"), checkpoint.newest_valid(out / "replicated")
    for part in ("model", "optimizer"):
        mine, other = getattr(resumed, part), getattr(whole, part)
        assert mine.keys() == other.keys() and all(torch.equal(mine[name], other[name]) for name in mine)
    assert seen[0]["resumed"] == {"samples": 16, "steps": [2, 3, 4]}


def test_a_signal_to_one_process_stops_both_after_the_same_step(two):
    out, seen = two
    assert (
        seen[0]["stopped"]
        == seen[1]["stopped"]
        == [
            "told to stop at step 1 of 4: saved; continue with --resume",
            75,
        ]
    )
    assert checkpoint.steps_present(out / "stopped")[0] == 1


def test_a_loss_that_is_broken_in_one_process_is_skipped_in_both_with_the_images_of_both(two):
    _, seen = two
    assert seen[0]["broken"]["skipped"] == seen[1]["broken"]["skipped"] == 1
    (line,) = [line for line in seen[0]["broken"]["lines"] if line.get("skipped")]
    assert line["step"] == 3 and line["images"] == ["k0", "k1", "k2", "k3"]


def test_values_errors_and_disagreements_are_known_to_all(two):
    for seen in two[1]:
        assert seen["gathered"] == [{"rank": 0, "text": "ü"}, {"rank": 1, "text": "üü"}]
        assert seen["told"] == 7
        assert seen["refused"] == [
            ["ConfigError", "of the first"],
            ["Preempted", "told"],
            ["ConfigError", "not the same"],
        ]
        assert seen["threads"] == 1


DIES = """
import os, signal, sys, time, torch
from pathlib import Path
from geomed_mae.cli import main
from geomed_mae.training.distributed import Ranks

def body():
    ranks = Ranks.from_environment()
    with ranks.joined(torch.device("cpu"), 10):
        for step in range(100):
            if ranks.rank == 1 and step == 3:
                os.kill(os.getpid(), getattr(signal, sys.argv[1]))
            ranks.mean(torch.ones(3))
            time.sleep(0.01)

from geomed_mae.errors import GeomedError
try:
    body()
except GeomedError as error:
    print(error, file=sys.stderr)
    sys.exit(error.exit_code)
"""


@pytest.mark.parametrize(("how", "limit"), [("SIGKILL", 9.0), pytest.param("SIGSTOP", 30.0, marks=pytest.mark.slow)])
def test_a_process_that_dies_or_hangs_ends_the_other_within_the_timeout(how, limit):
    first, second = start(["-c", DIES, how])
    try:
        begin = None
        while first.poll() is None:
            stopped = second.poll() is not None or _state(second.pid) in "TZ"
            begin = begin or (time.monotonic() if stopped else None)
            assert begin is None or time.monotonic() - begin < limit, "the other one goes on waiting"
            time.sleep(0.05)
        assert first.returncode == 4
        assert "another process of this run ended, or gave no answer for 10 s" in first.stderr.read()
    finally:
        for process in (first, second):
            process.kill()
            process.communicate()


def _state(pid: int) -> str:
    """Return the state of a process as the kernel has it: R running, S sleeping, T stopped, Z dead."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_launcher_that_says_half_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"sets RANK, WORLD_SIZE and LOCAL_RANK to numbers; found RANK=0"):
        Ranks.from_environment()
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    ranks = Ranks.from_environment()
    with (
        pytest.raises(ConfigError, match=r"WORLD_SIZE is 2 but MASTER_ADDR.* is not set"),
        ranks.joined(torch.device("cpu"), 10),
    ):
        pass
    monkeypatch.setenv("RANK", "5")
    with pytest.raises(ConfigError, match="RANK 5 is not below WORLD_SIZE 2"):
        Ranks.from_environment()


def test_without_a_launcher_a_process_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    ranks = Ranks.from_environment()
    assert ranks.alone and ranks.first and ranks.gather(3) == [3] and ranks.first_does(lambda: 4) == 4
    assert torch.equal(ranks.mean(torch.ones(2)), torch.ones(2))
    with ranks.joined(torch.device("cpu"), 10):
        ranks.barrier()


def test_more_processes_than_gpus_is_an_error_and_each_gets_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Ranks(1, 2, 1, 2).device("cuda") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match="3 processes on a machine with 2 GPUs"):
        Ranks(2, 3, 2, 3).device("cuda")


def test_threads_are_shared_where_no_launcher_has_set_them(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given = []
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(8))
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: given.append("joined"))
    monkeypatch.setattr(torch.distributed, "destroy_process_group", lambda: None)
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "4",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    with Ranks.from_environment().joined(torch.device("cpu"), 10):
        assert given == [2, "joined"]


def test_signals_are_those_that_schedulers_send():
    from geomed_mae.training.signals import SIGNALS

    assert set(SIGNALS) == {signal.SIGTERM, signal.SIGUSR1}


def test_one_of_several_processes_leaves_with_its_code_and_all_that_it_said():
    code = "import atexit; from geomed_mae.__main__ import leave; atexit.register(print, 'late'); print('is'); leave(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "is\n"), "the interpreter's own end is left out"
