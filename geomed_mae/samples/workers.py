"""Workers: batches made ahead in processes that may die, hang or run out of memory, and are replaced when they do.

A batch depends on its step alone, so a lost worker costs time and nothing else: all are started again from the first
step that has not arrived.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset

from geomed_mae.errors import GeomedError, OutputError

WORKER_TIMEOUT_S = 1800.0
"""Workers that give nothing for so long hang (a dead network drive, for example) and are replaced."""

WORKER_RESTARTS = 2
"""Times in a row, without a batch in between, that lost workers are replaced before the run stops."""

POLL_S = 1.0
"""How often the wait for a batch looks whether all workers live."""

log = logging.getLogger(__name__)


class _WorkersLost(Exception):
    """Workers died, hang, or ran out of memory; says which."""


class _OutOfMemory:
    """Sent by a worker in place of batches."""


class _Guarded(Dataset):
    """Gives the items of several steps, and an expected error as the last of them.

    Raised in a worker, torch would print its traceback, with paths, and lose its type.
    """

    def __init__(self, inner: Dataset) -> None:
        self.inner = inner

    def __getitem__(self, steps: range) -> list[Any]:
        items: list[Any] = []
        try:
            for step in steps:
                items.append(self.inner[step])
        except GeomedError as error:
            items.append(error)
        except MemoryError:
            return [_OutOfMemory()]
        return items


def _unchanged(items: list[Any]) -> list[Any]:
    return items


def load_steps(
    steps: Dataset, first: int, stop: int, *, workers: int = 0, timeout_s: float = WORKER_TIMEOUT_S
) -> Iterator[Any]:
    """Yield `steps[first]` to `steps[stop - 1]`, in this order, made here (`workers` 0) or ahead in processes.

    A worker makes all steps of a window (see `Steps.window_steps`; 1 where `steps` has none), one window ahead each;
    of a window that `first` lies in, the steps from there on.

    Args:
        steps: map-style data set.
        first: number of the first step.
        stop: number after that of the last.
        workers: processes.
        timeout_s: time without anything from the workers after which they are replaced.

    Raises:
        ReadError and others: as raised by the item, whichever process made it.
        OutputError: memory is short, or workers keep being lost; the message says what to do.
    """
    if workers == 0:
        for step in range(first, stop):
            yield _made_here(steps, step)
        return
    in_a_row, lost_at = 0, -1
    while first < stop:
        why = ""
        try:
            for item in _from_workers(steps, first, stop, workers=workers, timeout_s=timeout_s):
                first += 1
                yield item
        except _WorkersLost as lost:
            why = str(lost)
        # Out of the handler: an exception holds the frames it came through, and with them the workers.
        if why:
            in_a_row, lost_at = (in_a_row + 1 if lost_at == first else 1), first
            if in_a_row > WORKER_RESTARTS:
                raise OutputError(
                    f"loader workers were lost {in_a_row} times in a row at step {first} ({why}): memory or shared "
                    "memory (/dev/shm) is short, or a file cannot be reached; lower data.workers, data.shuffle_steps "
                    "or data.cache_mb, or set data.workers=0"
                )
            log.warning("loader workers were lost at step %d (%s); they are started again", first, why)


def _made_here(steps: Dataset, step: int) -> Any:
    try:
        return steps[step]
    except MemoryError:
        raise OutputError(
            f"memory ran out while the batch of step {step} was made; lower train.batch_size, data.shuffle_steps or "
            "data.cache_mb"
        ) from None


def _from_workers(steps: Dataset, first: int, stop: int, *, workers: int, timeout_s: float) -> Iterator[Any]:
    """Yield items that worker processes make.

    Raises:
        _WorkersLost: one of them died, hangs or has no memory.
    """
    together = getattr(steps, "window_steps", 1)
    windows = range(first // together, -(-stop // together))
    loader = DataLoader(
        _Guarded(steps),
        batch_size=None,
        sampler=[range(max(first, n * together), min(stop, (n + 1) * together)) for n in windows],
        num_workers=workers,
        collate_fn=_unchanged,
        timeout=POLL_S,
        prefetch_factor=2 if together == 1 else 1,
    )
    with _dying_children_unannounced():
        source = iter(loader)
        try:
            _ignore_dying_children()
            while (items := _wait(source, timeout_s)) is not None:
                for item in items:
                    if isinstance(item, GeomedError):
                        raise item
                    if isinstance(item, _OutOfMemory):
                        raise _WorkersLost("one ran out of memory")
                    yield item
        finally:
            del source  # which ends the workers, now and not when an exception is forgotten


def _wait(source: Iterator[list[Any]], timeout_s: float) -> list[Any] | None:
    """Return the next window's items, None at the end; looks after the workers meanwhile."""
    begin = time.monotonic()
    while True:
        try:
            return next(source, None)
        except (EOFError, ConnectionError) as error:
            # One died while it was sending. Errors of an item are items themselves, or RuntimeErrors as below.
            raise _WorkersLost(f"one died ({type(error).__name__})") from None
        except RuntimeError as error:
            # torch has no types for these. Errors of an item come as "Caught ... in DataLoader worker process".
            text = str(error)
            if not text.startswith(("DataLoader timed out", "DataLoader worker")):
                raise
        if text.startswith("DataLoader worker"):
            raise _WorkersLost(text.splitlines()[0].rstrip("."))
        if time.monotonic() - begin >= timeout_s:
            raise _WorkersLost(f"nothing came for {timeout_s:g} s")


@contextlib.contextmanager
def _dying_children_unannounced() -> Iterator[None]:
    """Take back, at the end, what `_ignore_dying_children` did."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, before)


def _ignore_dying_children() -> None:
    """Undo torch's handler of SIGCHLD, which raises wherever the main thread is: in the middle of a checkpoint too.

    Without it the death of a worker shows at the next wait for a batch, after POLL_S.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
