"""Work in a child process: a crash, a hang or a memory bomb in native code ends the child, never this process.

Image codecs are C and C++ fed with unchecked bytes. They run here:

- the child is started with `subprocess`, not `multiprocessing`: the workers of a torch DataLoader are daemonic and may
  have no multiprocessing children; a start that never looks at `__main__` works in Jupyter and in Dask workers too;
- it lives on and serves call after call, one at a time. Callers that run at once have a child each, and give it back;
- each call has a limit on memory (RLIMIT_DATA above what the child holds already: importing rasterio and pydicom takes
  218 MiB of address space but 77 MiB of data, and mapped libraries and files hurt nobody), on processor time
  (RLIMIT_CPU) and on wall time (the child's own SIGALRM, and this side's patience);
- what native libraries print is discarded: their messages hold paths;
- it ignores SIGINT and SIGTERM, which reach whole groups of processes and are their leader's affair, and ends when its
  pipe closes, that is with its parent. A forked process forgets the children that it inherits.

Messages are two lengths, JSON and raw buffers (see `wire`), over two pipes of their own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.plugins import PACKAGE
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.wire import pack, unpack

SECONDS = 10.0
"""Processor time of a call that says nothing else."""
MEMORY_BYTES = 1 << 30
"""Memory of a call that says nothing else; libraries that it loads count too."""
WALL_FACTOR = 6.0
"""Seconds of wall time for each second of processor time: slow storage and a busy machine are no fault of a file."""
WALL_EXTRA = 10.0
"""Seconds of wall time on top, for storage that must wake up."""
START_SECONDS = 120.0
"""A child that has not answered by then never will; Python on cold network storage takes its time."""
CALLS_BETWEEN_LOOKS = 64
MAX_RESIDENT_BYTES = 1 << 30
"""A child that holds more between two calls is replaced."""
MAX_TEXT_BYTES, MAX_BUFFERS = 1 << 30, 1 << 16

_HEAD = struct.Struct("<QQ")
"""Bytes of text, number of buffers; the buffers' sizes, the text and the buffers follow."""
_BOOT = "import json, sys; sys.path[:] = json.loads(sys.argv[1]); from geomed_mae.readers.child_main import serve; "
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"}
"""Children are the parallelism: threads inside one would only eat its memory."""


class ChildFailed(ReadError):
    """The child died, was stopped or made no sense, whatever the function would have said. `crashed`: it died."""

    def __init__(self, message: str, reason: str = Reason.DECODE_FAILED.name, *, crashed: bool = False) -> None:
        super().__init__(message, reason)
        self.crashed = crashed


class _Late(Exception):
    """The deadline has passed."""


class Child:
    """One child process, started by the first call and again after each death."""

    def __init__(self) -> None:
        self._process: subprocess.Popen | None = None
        self._to = self._from = -1
        self._calls = 0
        self._folder = ""
        _all.add(self)

    def call(
        self,
        function: Callable[..., Any],
        *args: Any,
        seconds: float = SECONDS,
        memory: int = MEMORY_BYTES,
        retry: bool = True,
    ) -> Any:
        """Return `function(*args)`, computed in the child.

        Args:
            function: a module-level function; the child imports it by its name.
            args: values that `wire.pack` takes, as its result must be.
            seconds: processor time; the limit on wall time is WALL_FACTOR times that.
            memory: bytes beyond what the child held before the call.
            retry: call once more when the child dies: memory pressure and other processes end children too.

        Raises:
            ReadError: as the function raises it; DECODE_FAILED when the child crashed, took too long, or met an error
                that is no ReadError; TOO_LARGE when it needed more memory.
            ConfigError: no child can be started.
        """
        try:
            return self._call(function, args, seconds, memory)
        except ChildFailed as error:
            if not (retry and error.crashed):
                raise
        return self._call(function, args, seconds, memory)

    def close(self) -> None:
        """End the child, if there is one."""
        for descriptor in (self._to, self._from):
            if descriptor >= 0:
                os.close(descriptor)
        self._to = self._from = -1
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def forget(self) -> None:
        """Let go of a child that belongs to the process this one was forked from."""
        if self._process is not None:
            self._process.returncode = 0  # so that nobody waits for it
            self._process = None
        self.close()

    @property
    def pid(self) -> int | None:
        """Process number of the child, None while there is none."""
        return None if self._process is None else self._process.pid

    def _call(self, function: Callable[..., Any], args: Sequence[Any], seconds: float, memory: int) -> Any:
        self._start()
        name = f"{function.__module__}:{function.__qualname__}"
        memory = int(min(memory, _most_memory()))
        wall = seconds * WALL_FACTOR + WALL_EXTRA
        text = pack((name, tuple(args), float(seconds), wall, memory)).encode("ascii")
        deadline = time.monotonic() + wall
        try:
            self._write(_HEAD.pack(len(text), 0) + text, deadline)
            outcome, *rest = self._answer(deadline, memory)
        except _Late:
            self.close()
            raise ChildFailed(f"decoding took longer than {seconds:g} s") from None
        except (OSError, EOFError):
            raise self._post_mortem(seconds) from None
        except (ValueError, MemoryError) as error:
            self.close()
            raise ChildFailed(f"the decoder's answer makes no sense: {error or 'it does not fit memory'}") from None
        except BaseException:
            # Interrupted in the middle of a message: the next answer would be to this question.
            self.close()
            raise
        self._calls += 1
        if self._calls % CALLS_BETWEEN_LOOKS == 0 and self._resident() > MAX_RESIDENT_BYTES:
            self.close()  # native code leaks; a fresh child takes its place
        if outcome == "done":
            return rest[0]
        raise ReadError(str(rest[0]), Reason[str(rest[1])].name)

    def _start(self) -> None:
        # Relative paths mean what they mean here and now: after a change of folder, as in a notebook, a new child.
        if self._process is not None and self._process.poll() is None and self._folder == _folder():
            return
        self.close()
        self._folder = _folder()
        root = str(Path(sys.modules[PACKAGE].__path__[0]).parent)
        paths = [entry for entry in sys.path if entry]
        their_in, self._to = os.pipe()
        self._from, their_out = os.pipe()
        boot = f"{_BOOT}serve({their_in}, {their_out})"
        command = [sys.executable or "python3", "-I", "-W", "ignore", "-c", boot, json.dumps([*paths, root])]
        try:
            self._process = subprocess.Popen(
                command,
                pass_fds=(their_in, their_out),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env={**os.environ, **_ENVIRONMENT},
                start_new_session=True,
            )
            for descriptor in (their_in, their_out):
                os.close(descriptor)
            their_in = their_out = -1
            os.set_blocking(self._to, False)
            os.set_blocking(self._from, False)
            self._read(memoryview(bytearray(1)), time.monotonic() + START_SECONDS)
        except (_Late, OSError, EOFError):
            for descriptor in (their_in, their_out):
                if descriptor >= 0:
                    os.close(descriptor)
            self.close()
            raise ConfigError(
                f"no process for decoding can be started with {command[0]}; see what geomed-mae doctor says"
            ) from None
        except BaseException:
            self.close()
            raise

    def _write(self, data: bytes, deadline: float) -> None:
        left = memoryview(data)
        while left:
            self._wait(self._to, select.POLLOUT, deadline)
            with contextlib.suppress(BlockingIOError):
                left = left[os.write(self._to, left) :]

    def _read(self, into: memoryview, deadline: float) -> None:
        while into:
            self._wait(self._from, select.POLLIN, deadline)
            with contextlib.suppress(BlockingIOError):
                count = os.readv(self._from, [into])
                if not count:
                    raise EOFError
                into = into[count:]

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        poll = select.poll()
        poll.register(descriptor, event)
        left = deadline - time.monotonic()
        if left <= 0 or not poll.poll(left * 1000):
            raise _Late

    def _answer(self, deadline: float, memory: int) -> Any:
        head = bytearray(_HEAD.size)
        self._read(memoryview(head), deadline)
        length, count = _HEAD.unpack(head)
        if length > MAX_TEXT_BYTES or count > MAX_BUFFERS:
            raise ValueError(f"{length} bytes of text and {count} buffers")
        sizes = np.empty(count, "<u8")
        self._read(memoryview(sizes).cast("B"), deadline)
        if sum(map(int, sizes)) > memory + MEMORY_BYTES:
            raise ValueError(f"buffers of {sizes.tolist()} bytes")
        text = bytearray(length)
        self._read(memoryview(text), deadline)
        buffers = [np.empty(int(size), np.uint8) for size in sizes]
        for buffer in buffers:
            self._read(memoryview(buffer), deadline)
        return unpack(text.decode("ascii"), buffers)

    def _resident(self) -> int:
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0

    def _post_mortem(self, seconds: float) -> ChildFailed:
        """Say what the child died of; its pipe has closed."""
        process = self._process
        try:
            code = 0 if process is None else process.wait(SECONDS)
        except subprocess.TimeoutExpired:
            code = 0
        self.close()
        if -code in (signal.SIGXCPU, signal.SIGALRM):
            return ChildFailed(f"decoding took longer than {seconds:g} s")
        name = signal.Signals(-code).name if code < 0 else f"exit {code}"
        return ChildFailed(f"the decoder crashed ({name})", crashed=True)


_all: weakref.WeakSet[Child] = weakref.WeakSet()
_idle: list[Child] = []
_lock = threading.Lock()


@contextlib.contextmanager
def borrowed() -> Iterator[Child]:
    """Lend a child of this process, the one that was given back last; a new one when all are busy."""
    with _lock:
        child = _idle.pop() if _idle else Child()
    owner = os.getpid()
    try:
        yield child
    finally:
        if os.getpid() == owner:
            with _lock:
                _idle.append(child)


def in_child(
    function: Callable[..., Any], *args: Any, seconds: float = SECONDS, memory: int = MEMORY_BYTES, retry: bool = True
) -> Any:
    """Return `function(*args)`, computed in a borrowed child; see `Child.call`."""
    with borrowed() as child:
        return child.call(function, *args, seconds=seconds, memory=memory, retry=retry)


def close_children(*, keep: int = 0) -> None:
    """End the idle children of this process, all but `keep` of them; the rest when they are given back and at exit."""
    with _lock:
        ended = _idle[: max(0, len(_idle) - keep)]
        del _idle[: len(ended)]
    for child in ended:
        child.close()


def _close_all() -> None:
    for child in list(_all):
        child.close()


def _forget_all() -> None:
    global _lock
    _lock = threading.Lock()  # the old one may be held by a thread that this process does not have
    _idle.clear()
    for child in list(_all):
        child.forget()


def _folder() -> str:
    """Return the current folder, "" where it is gone."""
    try:
        return str(Path.cwd())
    except OSError:
        return ""


def _most_memory() -> int:
    """Four fifths of the machine's memory: beyond that the kernel, not a limit, decides which process goes."""
    return int(0.8 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


atexit.register(_close_all)
os.register_at_fork(after_in_child=_forget_all)
