"""Open GeoTIFFs kept for the next read, so that many windows of few files do not pay for opening (about 1.5 ms each).

A dataset is handed to one user at a time, so threads never share one. It is forgotten in a forked child: two processes
that read through one handle share its position in the file and get each other's pixels (of 1,024 windows read so by 8
loader workers, 31 were wrong without an error). A file that has changed in any way that its metadata shows is opened
and checked anew, by the same `open_checked` as ever.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from geomed_mae.readers.geotiff.open import in_use, open_checked
from geomed_mae.readers.geotiff.structure import Structure

if TYPE_CHECKING:
    from rasterio.io import DatasetReader

MAX_HELD = 32
"""Files kept open in a process; each costs a descriptor and the positions of its blocks."""

SETTLED_NS = 2_000_000_000
"""A file changed less than this ago is not kept: a second change could leave the same time stamp behind, which network
file systems may keep in whole seconds."""

Fingerprint = tuple[int, int, int, int, int]


@dataclass(frozen=True, eq=False)
class _Held:
    fingerprint: Fingerprint
    dataset: DatasetReader
    structure: Structure
    stack: ExitStack


_lock = threading.Lock()
_held: OrderedDict[Path, _Held] = OrderedDict()
_inherited: list[OrderedDict[Path, _Held]] = []


@contextmanager
def held(path: Path) -> Iterator[tuple[DatasetReader, Structure]]:
    """Like `geotiff.open.opened`, but the dataset may come from an earlier read and may be kept for a later one.

    Raises:
        ReadError: as `opened`. A dataset that an error came out of is closed, never kept.
    """
    fingerprint = _fingerprint(path)
    with _lock:
        entry = _held.pop(path, None)
    if entry is not None and entry.fingerprint != fingerprint:
        entry.stack.close()
        entry = None
    if entry is None:
        with ExitStack() as stack:
            dataset, structure = open_checked(path, stack)
            entry = _Held(fingerprint or (0,) * 5, dataset, structure, stack.pop_all())
    with ExitStack() as until_done:
        until_done.push(entry.stack)
        with in_use(path):
            yield entry.dataset, entry.structure
        if fingerprint is not None and _fingerprint(path) == fingerprint and _settled(fingerprint):
            until_done.pop_all()
            _keep(path, entry)


def _fingerprint(path: Path) -> Fingerprint | None:
    """Return what changes whenever a file does, or None where it cannot be looked at (opening it says why)."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _settled(fingerprint: Fingerprint) -> bool:
    return time.time_ns() - fingerprint[3] > SETTLED_NS


def _keep(path: Path, entry: _Held) -> None:
    with _lock:
        # Another thread may have kept one of the same file meanwhile.
        surplus = [old for old in [_held.pop(path, None)] if old is not None]
        _held[path] = entry
        while len(_held) > MAX_HELD:
            surplus.append(_held.popitem(last=False)[1])
    for old in surplus:
        old.stack.close()


def close_held() -> None:
    """Close all kept files of this process."""
    with _lock:
        entries = list(_held.values())
        _held.clear()
    for entry in entries:
        entry.stack.close()


def _forget() -> None:
    """Start empty in a forked child. The parent's datasets are put aside, not closed: their locks may be taken."""
    global _lock, _held
    _inherited.append(_held)
    _lock, _held = threading.Lock(), OrderedDict()


os.register_at_fork(after_in_child=_forget)
atexit.register(close_held)
