"""Loader processes that die, hang or run out of memory are replaced, and no batch is lost or made twice."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch

from geomed_mae.errors import OutputError, ReadError
from geomed_mae.samples.workers import load_steps

pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")


def kill(number: int) -> None:
    os.kill(os.getpid(), number)


def out_of_memory(_: int) -> None:
    raise MemoryError


FAULTS = {
    "killed": (kill, signal.SIGKILL, "killed by signal|exited unexpectedly"),
    "segfault": (kill, signal.SIGSEGV, "killed by signal|exited unexpectedly"),
    "shared memory full": (kill, signal.SIGBUS, "killed by signal|exited unexpectedly"),
    "out of memory": (out_of_memory, 0, "ran out of memory"),
    "hang": (time.sleep, 60, "nothing came for 2 s"),
}


class Faulty(torch.utils.data.Dataset):
    """Gives step numbers; at one of them something happens, the first times or always."""

    def __init__(self, folder: Path, fault: str, *, at: int = 5, times: int = 1, window: int = 2) -> None:
        self.folder, self.fault, self.at, self.times, self.window_steps = folder, fault, at, times, window

    def __getitem__(self, step: int) -> int:
        happened = len(list(self.folder.glob("fault-*")))
        if step == self.at and happened < self.times:
            (self.folder / f"fault-{happened}").touch()
            what, argument, _ = FAULTS[self.fault]
            what(argument)
        return step


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=pytest.mark.slow) if name == "hang" else name for name in FAULTS]
)
def test_workers_that_are_lost_are_replaced_without_losing_a_step(tmp_path, fault):
    made = list(load_steps(Faulty(tmp_path, fault), 0, 12, workers=2, timeout_s=2))
    assert made == list(range(12)) and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("fault", ["killed", "out of memory", pytest.param("hang", marks=pytest.mark.slow)])
def test_workers_that_keep_being_lost_are_an_error_that_says_where_why_and_what_to_do(tmp_path, fault):
    begin, made = time.monotonic(), []
    with pytest.raises(OutputError, match=rf"3 times in a row at step 4 .*{FAULTS[fault][2]}.*/dev/shm.*data.workers"):
        made.extend(load_steps(Faulty(tmp_path, fault, times=99, at=5), 0, 12, workers=1, timeout_s=2))
    assert time.monotonic() - begin < 40


@pytest.mark.slow
def test_losses_with_batches_in_between_never_end_a_run(tmp_path):
    class Leaking(Faulty):
        def __getitem__(self, step: int) -> int:
            self.at = step if step % 4 == 0 else -1  # windows 0, 4, 8 ...: each kills its worker once
            self.times = step // 4 + 1
            return super().__getitem__(step)

    assert list(load_steps(Leaking(tmp_path, "killed"), 0, 20, workers=1)) == list(range(20))
    assert len(list(tmp_path.iterdir())) == 5 > 3


def test_a_worker_that_dies_while_the_trainer_computes_or_saves_disturbs_neither(tmp_path):
    handler = signal.getsignal(signal.SIGCHLD)
    made = []
    for step in load_steps(Faulty(tmp_path, "segfault", at=5), 0, 12, workers=2):
        made.append(step)
        end = time.monotonic() + (1.5 if step == 1 else 0)
        while time.monotonic() < end:  # torch would raise in this loop, between any two instructions
            sum(range(1000))
        if step == 1:
            assert list(tmp_path.iterdir()), "it died meanwhile"
    assert made == list(range(12)) and signal.getsignal(signal.SIGCHLD) is handler


@pytest.mark.parametrize("workers", [0, 2])
def test_a_start_within_a_window_gives_what_is_left_of_it(tmp_path, workers):
    source = Faulty(tmp_path, "killed", times=0, window=4)
    assert list(load_steps(source, 6, 15, workers=workers)) == list(range(6, 15))


class Raising(torch.utils.data.Dataset):
    """Raises at step 3."""

    window_steps = 2

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __getitem__(self, step: int) -> int:
        if step == 3:
            raise self.error
        return step


@pytest.mark.parametrize("workers", [0, 1])
def test_an_expected_error_comes_after_the_batches_before_it(workers):
    made = []
    with pytest.raises(ReadError, match="^cut off$"):
        made.extend(load_steps(Raising(ReadError("cut off", "TRUNCATED")), 0, 6, workers=workers))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("error", [RuntimeError("a bug"), KeyError("a bug")])
def test_a_bug_is_a_bug_and_not_a_lost_worker(workers, error):
    with pytest.raises(type(error), match="a bug"):
        list(load_steps(Raising(error), 0, 6, workers=workers))


def test_memory_that_runs_out_here_says_what_to_lower():
    with pytest.raises(OutputError, match=r"batch of step 3 was made; lower train.batch_size, data.shuffle_steps"):
        list(load_steps(Raising(MemoryError()), 0, 6))
