"""The other side of `child`: the loop of a decoding process."""

from __future__ import annotations

import contextlib
import importlib
import math
import os
import resource
import signal
from pathlib import Path
from typing import Any

from geomed_mae.errors import MissingExtraError, ReadError
from geomed_mae.plugins import PACKAGE
from geomed_mae.readers.child import _HEAD
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.wire import pack, unpack

_IGNORED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def serve(requests: int, answers: int) -> None:
    """Answer calls from one pipe into the other until it closes."""
    for number in _IGNORED:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold pixels and names
    with contextlib.suppress(OSError):
        # If the machine runs out of memory, the kernel shall choose this process.
        Path("/proc/self/oom_score_adj").write_text("1000")
    os.write(answers, b"\n")
    with os.fdopen(requests, "rb") as source, os.fdopen(answers, "wb") as sink:
        while head := source.read(_HEAD.size):
            length, _ = _HEAD.unpack(head)
            buffers: list[memoryview] = []
            text = _answer(source.read(length).decode("ascii"), buffers).encode("ascii")
            sink.write(_HEAD.pack(len(text), len(buffers)))
            sink.write(b"".join(len(buffer).to_bytes(8, "little") for buffer in buffers))
            sink.write(text)
            for buffer in buffers:
                sink.write(buffer)
            sink.flush()


def _answer(request: str, buffers: list[memoryview]) -> str:
    name, args, seconds, wall, memory = unpack(request)
    try:
        _limit(seconds, wall, memory)
        module, _, function = name.partition(":")
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
        return pack(("done", found(*args)), buffers)
    except ReadError as error:
        failure = (str(error), error.reason)
    except MissingExtraError as error:
        failure = (str(error), Reason.MISSING_EXTRA.name)
    except MemoryError:
        failure = (f"decoding needs more than {memory >> 20} MiB of memory", Reason.TOO_LARGE.name)
    except Exception as error:
        # What reader code did not expect of a file. Its text may hold what the file says of a person; type and place
        # are enough to report it.
        failure = (f"the reader failed with {type(error).__name__} in {_place(error)}", Reason.DECODE_FAILED.name)
    finally:
        _unlimit()
    buffers.clear()
    return pack(("failed", *failure))


def _place(error: BaseException) -> str:
    """Return the innermost line of this package, or of the function called, that an error passed through."""
    place, trace = "", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if not place or module.startswith(PACKAGE):
            place = f"{module}:{trace.tb_lineno}"
        trace = trace.tb_next
    return place


def _limit(seconds: float, wall: float, memory: int) -> None:
    used = resource.getrusage(resource.RUSAGE_SELF)
    processor = math.ceil(used.ru_utime + used.ru_stime + seconds)
    resource.setrlimit(resource.RLIMIT_CPU, (processor, resource.RLIM_INFINITY))
    held = _held()
    if held is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory, resource.RLIM_INFINITY))
    # Its default action ends the process without asking Python: it works in the middle of a codec, parent or no parent.
    signal.setitimer(signal.ITIMER_REAL, wall)


def _unlimit() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0)
    resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _held() -> int | None:
    """Bytes of data segment, the measure of RLIMIT_DATA (statm's sixth field also counts stacks, which are small).

    None where the system does not say: there is then no limit on memory.
    """
    try:
        return int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    except OSError:
        return None
