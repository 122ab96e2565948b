"""A child that crashes, hangs, eats memory or talks nonsense costs one call; the caller lives on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.readers import child as module
from geomed_mae.readers.child import Child, borrowed, close_children, in_child
from geomed_mae.readers.regular import check_regular

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def child():
    made = Child()
    yield made
    made.close()


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def gone_within(pid: int, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not alive(pid)


def failure(child: Child, *call: object, **limits: object) -> ReadError:
    with pytest.raises(ReadError) as caught:
        child.call(*call, **limits)
    return caught.value


def test_a_function_runs_elsewhere_and_its_result_comes_back(child):
    assert child.call(os.getpid) == child.pid != os.getpid()
    assert child.call(os.path.join, "a", "b") == "a/b"


def test_a_child_serves_many_calls(child):
    assert len({child.call(os.getpid) for _ in range(20)}) == 1


def test_a_large_array_comes_back_exact(child):
    array = child.call(np.arange, 3_000_000)
    np.testing.assert_array_equal(array, np.arange(3_000_000))


def test_a_relative_path_means_what_it_means_here_after_a_change_of_folder(child, tmp_path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
        monkeypatch.chdir(tmp_path / name)
        assert child.call(check_regular, Path("file")) == tmp_path / name / "file"


def test_a_read_error_keeps_its_reason_and_its_text(child, tmp_path):
    error = failure(child, check_regular, tmp_path / "nothing.tif")
    assert (error.reason, str(error)) == ("VANISHED", "nothing.tif does not exist (any more)")


def test_an_error_that_nobody_expected_is_named_without_its_text(child):
    error = failure(child, int, "Doe^Jane")
    assert error.reason == "DECODE_FAILED" and "Doe" not in str(error)
    assert str(error).startswith("the reader failed with ValueError in geomed_mae.readers.child_main:")


@pytest.mark.parametrize(("function", "name"), [(ctypes.string_at, "SIGSEGV"), (os._exit, "exit 3")])
def test_a_crash_is_an_error_and_the_next_call_works(child, function, name):
    error = failure(child, function, 3 if function is os._exit else 0)
    assert (error.reason, str(error)) == ("DECODE_FAILED", f"the decoder crashed ({name})")
    assert child.call(os.path.basename, "a/b") == "b"


def test_a_child_that_was_killed_from_outside_is_tried_once_more(child):
    child.call(os.getpid)
    threading.Timer(0.3, os.kill, (child.pid, signal.SIGKILL)).start()
    assert child.call(time.sleep, 1.0) is None


def test_without_a_retry_the_first_death_counts(child, tmp_path):
    mark = tmp_path / "mark"
    mark.write_text("")
    with pytest.raises(ReadError, match="crashed"):
        child.call(_die_if, str(mark), retry=False)
    assert not mark.exists()
    mark.write_text("")
    assert child.call(_die_if, str(mark)) == "survived"


def _die_if(mark: str) -> str:
    if Path(mark).exists():
        Path(mark).unlink()
        os.abort()
    return "survived"


def test_a_hang_that_burns_processor_time_ends(child):
    start = time.monotonic()
    error = failure(child, _burn, seconds=0.5)
    assert (error.reason, str(error)) == ("DECODE_FAILED", "decoding took longer than 0.5 s")
    assert time.monotonic() - start < 10


def _burn() -> None:
    while True:
        pass


def test_a_hang_that_waits_ends(child, monkeypatch):
    monkeypatch.setattr(module, "WALL_EXTRA", 0.2)
    start = time.monotonic()
    assert "took longer than 0.1 s" in str(failure(child, time.sleep, 60, seconds=0.1))
    assert time.monotonic() - start < 10
    assert child.call(os.path.basename, "a/b") == "b"


def test_a_hang_ends_even_when_the_parent_is_gone(tmp_path):
    """The child's own alarm: a stuck codec never reads that its pipe was closed."""
    code = f"""
import os, threading, time
from geomed_mae.readers import child
child.WALL_EXTRA = 0.5
one = child.Child()
one.call(os.getpid)
threading.Thread(target=one.call, args=(time.sleep, 600), kwargs={{"seconds": 0.1}}, daemon=True).start()
time.sleep(0.3)
open({str(tmp_path / "pid")!r}, "w").write(str(one.pid))
os._exit(0)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    assert gone_within(int((tmp_path / "pid").read_text()), 10)


def test_a_memory_bomb_is_too_large(child):
    error = failure(child, np.ones, 1 << 28, memory=256 << 20)
    assert (error.reason, str(error)) == ("TOO_LARGE", "decoding needs more than 256 MiB of memory")
    assert child.call(np.ones, 1 << 20, memory=256 << 20).size == 1 << 20


def test_limits_are_lifted_between_calls(child):
    for _ in range(3):
        assert child.call(np.ones, 20 << 20, "u1", memory=64 << 20).nbytes == 20 << 20


def test_what_native_code_prints_is_discarded(child, capfd):
    child.call(_shout)
    assert capfd.readouterr() == ("", "")


def _shout() -> None:
    os.write(1, b"/home/jane/doe.dcm")
    os.write(2, b"/home/jane/doe.dcm")


def test_an_answer_that_makes_no_sense_is_an_error(child):
    error = failure(child, _nonsense)
    assert error.reason == "DECODE_FAILED" and "makes no sense" in str(error)
    assert child.call(os.path.basename, "a/b") == "b"


def _nonsense() -> None:
    for descriptor in range(3, 64):
        with contextlib.suppress(OSError):
            os.write(descriptor, b"\xff" * 4096)


def test_signals_to_the_group_do_not_end_it(child):
    pid = child.call(os.getpid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(pid, number)
    assert child.call(os.getpid) == pid


def test_an_interrupted_call_does_not_answer_the_next(child):
    child.call(os.getpid)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            child.call(time.sleep, 30)
    finally:
        signal.signal(signal.SIGALRM, before)
    assert child.call(os.path.basename, "a/b") == "b"


def test_the_child_ends_with_its_parent(tmp_path):
    code = (
        "import os; from geomed_mae.readers.child import in_child; print(in_child(os.getpid), flush=True); os._exit(0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert gone_within(int(done.stdout), 10)


def test_a_closed_child_is_gone_and_leaves_no_descriptor(child):
    child.call(os.getpid)
    before = len(list(Path("/proc/self/fd").iterdir()))
    pid = child.pid
    child.close()
    assert not alive(pid) and len(list(Path("/proc/self/fd").iterdir())) == before - 2
    child.call(os.getpid)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_callers_at_once_have_a_child_each_and_give_it_back():
    close_children()
    with borrowed() as one, borrowed() as other:
        assert one.call(os.getpid) != other.call(os.getpid)
        pids = {one.pid, other.pid}
    assert in_child(os.getpid) in pids
    close_children(keep=1)
    with borrowed() as kept, borrowed() as new:
        assert kept.pid in pids and new.pid is None


def test_threads_share_nothing():
    answers: list[list[int]] = [[], [], []]

    def work(number: int) -> None:
        for _ in range(30):
            answers[number].append(in_child(_echo, number))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == [[number] * 30 for number in range(3)]


def _echo(value: int) -> int:
    return value


def test_a_forked_process_starts_children_of_its_own():
    mine = in_child(os.getpid)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            os.write(write, str(in_child(os.getpid)).encode())
        os._exit(0)
    os.close(write)
    theirs = int(os.read(read, 64))
    os.close(read)
    os.waitpid(pid, 0)
    assert theirs != mine and in_child(os.getpid) == mine
    assert gone_within(theirs, 10)


def test_daemonic_workers_of_a_loader_may_decode():
    """multiprocessing forbids daemons to have children of its kind; a DataLoader's workers are daemons."""
    from torch.utils.data import DataLoader, Dataset

    class Pids(Dataset):
        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> int:
            return in_child(os.getpid)

    met = {int(pid) for batch in DataLoader(Pids(), num_workers=2) for pid in batch}
    assert 1 <= len(met) <= 2
    assert all(gone_within(pid, 10) for pid in met)


def test_a_child_that_cannot_start_says_so(child, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(ConfigError, match="no process for decoding can be started with /nowhere/python"):
        child.call(os.getpid)
    assert child.pid is None


def test_a_child_that_has_grown_is_replaced(child, monkeypatch):
    monkeypatch.setattr(module, "CALLS_BETWEEN_LOOKS", 1)
    pid = child.call(os.getpid)
    assert child.call(os.getpid) == pid
    monkeypatch.setattr(module, "MAX_RESIDENT_BYTES", 1)
    assert child.call(os.getpid) == pid and child.pid is None
    assert child.call(os.getpid) != pid
