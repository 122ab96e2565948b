"""A wire across every call that changes a folder: the process dies at the n-th of them, or the call fails.

Calls are counted in Python, where this package makes them: opening for writing, writing, fsync, rename, mkdir, unlink,
rmdir, truncate. A write that is hit leaves the first half of its bytes, as a full disk or a kill does.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import signal
from collections.abc import Callable
from typing import Any

BY_PATH = ("rename", "replace", "mkdir", "unlink", "remove", "rmdir", "link", "symlink", "truncate")
BY_DESCRIPTOR = ("fsync", "fdatasync", "write", "ftruncate")
REMOVALS = ("unlink", "remove", "rmdir", "rename", "replace")
"""What still works on a full disk, and does not on one that is read-only."""

FULL = ("ENOSPC", "EDQUOT")


class Tripwire:
    """Counts calls below `folder`; at call number `at` (from 1) kills the process or raises an OSError.

    Args:
        folder: calls on other places are neither counted nor hit.
        at: 0 counts only.
        fault: "kill", the name of another signal, after which the call is made, or the name of an errno.
        lasting: calls after the first fail too: all of them, or on a full disk those that need room.
    """

    def __init__(self, folder: str | os.PathLike, at: int = 0, fault: str = "kill", lasting: bool = False) -> None:
        self.folder, self.at, self.fault, self.lasting = os.path.realpath(folder), at, fault, lasting
        self.cuts = not fault.startswith("SIG")
        self.count, self.calls = 0, []
        self.before: list[tuple[Any, str, Any]] = []

    def _below(self, place: Any, dir_fd: int | None = None) -> bool:
        if isinstance(place, int):
            path = os.readlink(f"/proc/self/fd/{place}")  # noqa: PTH115 (Path would go through the wire)
        else:
            path = os.fsdecode(place)
            if dir_fd is not None:
                parent = os.readlink(f"/proc/self/fd/{dir_fd}")  # noqa: PTH115
                path = f"{parent}/{path}"
        return os.path.abspath(path).startswith(self.folder)  # noqa: PTH100

    def _hit(self, name: str) -> bool:
        """Count a call and return whether it is to fail."""
        self.count += 1
        self.calls.append(name)
        if self.at and self.count == self.at:
            return True
        spared = self.fault in FULL and name in REMOVALS
        return bool(self.at and self.lasting and self.count > self.at and not spared)

    def _fall(self, place: Any) -> None:
        if self.fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if not self.cuts:
            os.kill(os.getpid(), getattr(signal, self.fault))
            return
        number = getattr(errno, self.fault)
        raise OSError(number, os.strerror(number), str(place))

    def _path_call(self, name: str, real: Callable) -> Callable:
        def call(path: Any, *arguments: Any, **options: Any) -> Any:
            at = next((options[key] for key in ("dir_fd", "src_dir_fd") if options.get(key) is not None), None)
            if self._below(path, at) and self._hit(name):
                self._fall(path)
            return real(path, *arguments, **options)

        return call

    def _descriptor_call(self, name: str, real: Callable) -> Callable:
        def call(descriptor: Any, *arguments: Any) -> Any:
            place = descriptor if isinstance(descriptor, int) else descriptor.fileno()
            if self._below(place) and self._hit(name):
                if name == "write" and self.cuts:
                    real(place, bytes(arguments[0])[: len(arguments[0]) // 2])
                self._fall(place)
            return real(descriptor, *arguments)

        return call

    def _os_open(self, real: Callable) -> Callable:
        def call(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and self._below(path, options.get("dir_fd")) and self._hit("open"):
                self._fall(path)
            return real(path, flags, *arguments, **options)

        return call

    def _io_open(self, real: Callable) -> Callable:
        def call(file: Any, mode: str = "r", *arguments: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+") or not self._below(file):
                return real(file, mode, *arguments, **options)
            if self._hit("open"):
                self._fall(file)
            return _Stream(self, real(file, mode, *arguments, **options))

        return call

    def set(self) -> Tripwire:
        """Put the wire up."""
        for name in BY_PATH:
            self._replace(os, name, self._path_call(name, getattr(os, name)))
        for name in BY_DESCRIPTOR:
            self._replace(os, name, self._descriptor_call(name, getattr(os, name)))
        self._replace(os, "open", self._os_open(os.open))
        opened = self._io_open(io.open)
        self._replace(io, "open", opened)
        self._replace(builtins, "open", opened)
        return self

    def _replace(self, module: Any, name: str, call: Any) -> None:
        self.before.append((module, name, getattr(module, name)))
        setattr(module, name, call)

    def __enter__(self) -> Tripwire:
        return self.set()

    def __exit__(self, *_: object) -> None:
        for module, name, call in reversed(self.before):
            setattr(module, name, call)


class _Stream:
    """A file whose writes are counted."""

    def __init__(self, wire: Tripwire, real: Any) -> None:
        self.wire, self.real = wire, real

    def write(self, data: Any) -> int:
        if self.wire._hit("write"):
            if self.wire.cuts:
                self.real.write(data[: len(data) // 2])
                self.real.flush()
            self.wire._fall(self.real.name)
        return self.real.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.real.close()
