"""Sessions of training that can be killed: one process imports everything once and forks a child for each of them.

`Sessions` is the side of the tests, `python -m tests.training.sessions` the side of the processes. A session is what a
user types (`arguments` of the command line) and what goes wrong meanwhile (`faults`, see `FAULTS`). Importing takes
seconds and a tiny run does not, so that with a fork a test affords many kills.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
REAL_SIZE, SMALL_SIZE = (192, 12, 3), (32, 1, 2)
"""Width, depth and heads of a recipe's size `tiny`, as it is and as it is here."""

WAIT_S = 120
"""Nothing here takes that long; a session that does hangs."""


# --------------------------------------------------------------------------------------------------- side of the tests


class Session:
    """A session that has begun."""

    def __init__(self, pid: int, folder: Path) -> None:
        self.pid, self.folder = pid, folder

    @property
    def code(self) -> int | None:
        """Exit code, minus the signal where one ended it; None while it runs."""
        path = self.folder / f"{self.pid}.code"
        return int(path.read_text()) if path.is_file() else None

    def wait(self, limit: float = WAIT_S) -> int:
        """Return the exit code; a session that takes longer is killed, and fails the test with its last words."""
        end = time.monotonic() + limit
        while (code := self.code) is None:
            if time.monotonic() > end:
                self.kill()
                raise AssertionError(f"the session did not end within {limit:.0f} s; it said: {self.said[-2000:]}")
            time.sleep(0.003)
        return code

    def until(self, happened: Callable[[], bool], limit: float = WAIT_S) -> None:
        """Wait for something that the session does, or for its end."""
        end = time.monotonic() + limit
        while not happened() and self.code is None:
            assert time.monotonic() < end, f"it did not happen within {limit:.0f} s: {self.said[-2000:]}"
            time.sleep(0.001)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Send a signal to the session alone, not to its workers."""
        if self.code is None:
            os.kill(self.pid, number)

    @property
    def said(self) -> str:
        """What it wrote to stdout and stderr."""
        return (self.folder / f"{self.pid}.said").read_text(errors="replace")


class Sessions:
    """The process that forks sessions. Use as a context manager."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="sessions-"))
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "CUDA_VISIBLE_DEVICES": ""}
        self.parent = subprocess.Popen(
            [sys.executable, "-m", "tests.training.sessions", str(self.folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=environment,
        )

    def start(self, *arguments: object, environment: dict[str, str] | None = None, **faults: Any) -> Session:
        """Begin `geomed-mae ARGUMENTS...` with these faults."""
        words = [str(word) for word in arguments]
        order = {"arguments": words, "task": None, "environment": environment or {}, "faults": faults}
        return self._ordered(order)

    def task(self, name: str, *arguments: object, **faults: Any) -> Session:
        """Begin a function of `TASKS` instead of the command line, and wait for its end."""
        order = {"arguments": [str(word) for word in arguments], "task": name, "environment": {}, "faults": faults}
        session = self._ordered(order)
        session.wait()
        return session

    def _ordered(self, order: dict[str, Any]) -> Session:
        self.parent.stdin.write(json.dumps(order) + "\n")
        self.parent.stdin.flush()
        return Session(int(self.parent.stdout.readline()), self.folder)

    def run(self, *arguments: object, **faults: Any) -> Session:
        """Begin a session and wait for its end."""
        session = self.start(*arguments, **faults)
        session.wait()
        return session

    def __enter__(self) -> Sessions:
        assert self.parent.stdout.readline() == "ready\n"
        return self

    def __exit__(self, *_: object) -> None:
        self.parent.stdin.close()
        self.parent.wait(WAIT_S)
        self.parent.stdout.close()
        shutil.rmtree(self.folder)


def recorded(path: Path) -> dict[int, dict[str, Any]]:
    """Return what `record` wrote, by step. A step that was made twice must have been the same both times."""
    found: dict[int, dict[str, Any]] = {}
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            entry = json.loads(line)
        except ValueError:
            continue  # cut off by a kill; the step is made again
        assert found.setdefault(entry["step"], entry) == entry, f"step {entry['step']} was another one after a resume"
    return found


# ----------------------------------------------------------------------------------------------- side of the processes


def _swap(place: str, name: str, make: Callable[[Any], Any]) -> None:
    module = importlib.import_module(place) if isinstance(place, str) else place
    setattr(module, name, make(getattr(module, name)))


def _digest(batch: Any) -> str:
    """Return a hash of a batch as the model gets it."""
    shown = batch.physical() if hasattr(batch, "physical") else batch
    sums = hashlib.sha256()
    for tensor in (shown.raw, shown.valid, shown.spacing):
        sums.update(b"none" if tensor is None else tensor.contiguous().numpy().tobytes())
    return sums.hexdigest()[:16]


def record(path: str) -> None:
    """Append one line a batch that the loop gets: step, modality, image keys, sample numbers, hash of all values."""

    def noting(batches: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
        def noted(*arguments: Any, **options: Any) -> Iterator[Any]:
            for batch in batches(*arguments, **options):
                entry = {"step": batch.step, "modality": batch.modality, "keys": list(batch.keys)}
                entry |= {"samples": list(getattr(batch, "samples", ())), "digest": _digest(batch)}
                os.write(descriptor, json.dumps(entry).encode() + b"\n")
                yield batch

        return noted

    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    _swap("geomed_mae.pretrain", "load_steps", noting)


def broken_loss(steps: list[int], value: str = "nan", beyond: int | None = None) -> None:
    """Make the loss `value` at these steps, and at all from `beyond` on."""

    def breaking(loss: Callable) -> Callable:
        def broken(self: Any, batch: Any, step: int) -> Any:
            out, parts = loss(self, batch, step)
            bad = step in steps or (beyond is not None and step >= beyond)
            return out * (float(value) if bad else 1.0), parts

        return broken

    _swap(importlib.import_module("geomed_mae.training.objective").MaskedObjective, "loss", breaking)


def signal_at(step: int, number: int) -> None:
    """Send this process a signal in the middle of a step."""

    def stopping(loss: Callable) -> Callable:
        def stopped(self: Any, batch: Any, at: int) -> Any:
            if at == step:
                os.kill(os.getpid(), number)
            return loss(self, batch, at)

        return stopped

    _swap(importlib.import_module("geomed_mae.training.objective").MaskedObjective, "loss", stopping)


def slow(seconds: float) -> None:
    """Make every step take longer, so that a kill from outside hits the step that it is meant for."""

    def slowing(loss: Callable) -> Callable:
        def slowed(*arguments: Any) -> Any:
            time.sleep(seconds)
            return loss(*arguments)

        return slowed

    _swap(importlib.import_module("geomed_mae.training.objective").MaskedObjective, "loss", slowing)


def worker_dies(step: int, how: str, mark: str, times: int = 1) -> None:
    """Let the worker that makes the batch of `step` come to grief, the first `times` times; `mark` counts them."""
    from torch.utils.data import get_worker_info

    def grief(make: Callable) -> Callable:
        def made(self: Any, at: int) -> Any:
            path = Path(mark)
            count = path.stat().st_size if path.exists() else 0
            if at == step and get_worker_info() is not None and count < times:
                path.write_bytes(b"." * (count + 1))
                if how == "MemoryError":
                    raise MemoryError
                if how == "hang":
                    time.sleep(3600)
                os.kill(os.getpid(), getattr(signal, how))
            return make(self, at)

        return made

    _swap(importlib.import_module("geomed_mae.samples.loader").Steps, "__getitem__", grief)


def loader_timeout(seconds: int) -> None:
    """Take workers for hanging after so many seconds."""
    _swap("geomed_mae.pretrain", "load_steps", lambda real: functools.partial(real, timeout_s=seconds))


def full_size(_: bool) -> None:
    """Give the models of recipes their real widths back."""
    importlib.import_module("geomed_mae.models.spec").SIZES["tiny"] = REAL_SIZE


def trip(**how: Any) -> None:
    """See `tests.training.tripwire`."""
    from tests.training.tripwire import Tripwire

    Tripwire(**how).set()


FAULTS = {
    function.__name__: function
    for function in (record, broken_loss, signal_at, slow, worker_dies, loader_timeout, full_size, trip)
}


def save_one(folder: str, step: str) -> None:
    """Save a checkpoint whose values are its step."""
    import torch

    from geomed_mae.training import checkpoint

    model, moments = {"weight": torch.full((4, 5), float(step))}, {"m": torch.full((7,), float(step))}
    checkpoint.save(Path(folder), int(step), model=model, optimizer=moments, state={"of": int(step)}, keep=2)


def open_run(folder: str, recipe: str) -> None:
    """Open a run to go on with it, record a line, and close it."""
    import torch

    from geomed_mae.recipe_file import load_recipe
    from geomed_mae.training.run import RunFolder, describe_environment

    environment = describe_environment(torch.device("cpu"), "auto")
    archive = {"fingerprint": "f", "images": 2}
    with RunFolder(Path(folder), load_recipe(recipe), environment=environment, archive=archive, resume=True) as run:
        step = 0 if run.resumed is None else run.resumed.step
        run.record({"step": step + 1, "loss": 0.5})


def fill_a_small_disk(folder: str, result: str) -> None:
    """Save checkpoints on a disk of a megabyte until it is full, and tell how that ended.

    The disk is seen by this process alone and goes with it.
    """
    import ctypes

    import torch

    from geomed_mae.errors import OutputError
    from geomed_mae.training import checkpoint

    new_mounts, private, place = 0x20000, 0x44000, str(Path(folder) / "disk").encode()
    Path(os.fsdecode(place)).mkdir()
    system = ctypes.CDLL(None, use_errno=True)
    refused = system.unshare(new_mounts) or system.mount(b"none", b"/", None, private, None)
    if refused or system.mount(b"none", place, b"tmpfs", 0, b"size=1m"):
        told: dict[str, Any] = {"refused": os.strerror(ctypes.get_errno())}
    else:
        disk = Path(os.fsdecode(place)) / "checkpoints"
        weights = {"w": torch.zeros(600, 256)}  # 600 KiB: one fits, two do not
        plenty = os.statvfs_result([4096, 4096, *[1 << 40] * 7, 255])
        os.statvfs = lambda _: plenty  # a check for room that others outrun
        checkpoint.save(disk, 1, model=weights, optimizer={}, state={})
        try:
            checkpoint.save(disk, 2, model=weights, optimizer={}, state={})
            told = {"exit_code": 0}
        except OutputError as error:
            told = {"exit_code": error.exit_code, "newest": checkpoint.newest_valid(disk).step}
        told["left"] = sorted(path.name for path in disk.iterdir())
    Path(result).write_text(json.dumps(told))


TASKS = {function.__name__: function for function in (save_one, open_run, fill_a_small_disk)}


def _session(order: dict[str, Any], folder: Path) -> None:
    """Be a session, from its first word to its exit code."""
    from geomed_mae.cli import main

    said = os.open(folder / f"{os.getpid()}.said", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(said, 1)
    os.dup2(said, 2)
    os.environ.update(order["environment"])
    for name, options in order["faults"].items():
        FAULTS[name](**options) if isinstance(options, dict) else FAULTS[name](options)
    if order["task"] is None:
        main(order["arguments"])
    else:
        TASKS[order["task"]](*order["arguments"])


def _watch(pid: int, folder: Path, running: set[int]) -> None:
    """Wait for the end of a session and leave its code for whoever asks."""
    _, status = os.waitpid(pid, 0)
    running.discard(pid)
    partial = folder / f".{pid}.code"
    partial.write_text(str(os.waitstatus_to_exitcode(status)))
    partial.rename(folder / f"{pid}.code")


def _no_picture(path: Path, *_: Any, **__: Any) -> Path:
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4)).save(path, "PNG")
    return path


def _load_what_is_loaded_late(folder: Path) -> None:
    """Do once what imports parts of a session at its first call."""
    from PIL import Image

    from geomed_mae.recipe_file import build_recipe, dump_recipe

    (folder / "recipe.yaml").write_text(dump_recipe(build_recipe({})))
    open_run(str(folder / "warm"), str(folder / "recipe.yaml"))
    Image.preinit()


def serve(folder: Path) -> None:
    """Fork a session for each line of stdin."""
    for name in ("cli", "pretrain", "training.checkpoint", "samples.loader", "readers.geotiff"):
        importlib.import_module(f"geomed_mae.{name}")
    # A step of milliseconds, and no pictures: they would be four fifths of the time.
    importlib.import_module("geomed_mae.models.spec").SIZES["tiny"] = SMALL_SIZE
    importlib.import_module("geomed_mae.training.panels").draw = _no_picture
    _load_what_is_loaded_late(folder)
    print("ready", flush=True)  # noqa: T201
    running: set[int] = set()
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.close(0)
            code = 1
            try:
                _session(json.loads(line), folder)
                code = 0
            except SystemExit as error:
                code = error.code if isinstance(error.code, int) else 0 if error.code is None else 1
            except BaseException:
                import traceback

                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        print(pid, flush=True)  # noqa: T201
        running.add(pid)
        threading.Thread(target=_watch, args=(pid, folder, running)).start()
    for pid in list(running):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    serve(Path(sys.argv[1]))
