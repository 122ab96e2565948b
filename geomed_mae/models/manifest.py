"""Folders that are written whole or not at all, and read only when every byte is the one that was written.

A folder is made under a temporary name beside its place, fsynced, and renamed. `MANIFEST.sha256` lists each file, those
of folders in it by their relative path, in the form that `sha256sum -c` checks.
"""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from geomed_mae.errors import IntegrityError, OutputError

MANIFEST = "MANIFEST.sha256"
MOST_BYTES = 64 << 20
"""Of a manifest that is read: half a million files."""
NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Of a file or folder that a manifest may list: no path leads out of the folder."""


def write_folder(out: Path, files: Mapping[str, bytes | Callable[[], bytes]]) -> dict[str, str]:
    """Write `files` (plain names) and their manifest as the folder `out`; an older folder with a manifest is replaced.

    A content may be given as a function that makes it: large ones are then in memory one at a time. Returns the
    SHA-256 of each file as it was in memory (compare `digests`).

    Raises:
        OutputError: `out` holds something that no manifest vouches for, the disk is full, or permission is missing.
    """
    out = Path(out)
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"'{out}' holds something else; choose another folder or empty it")
    sums: dict[str, str] = {}
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, content in files.items():
            data = content() if callable(content) else content
            sums[name] = hashlib.sha256(data).hexdigest()
            _write(partial / name, data)
            del data
        lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
        _write(partial / MANIFEST, lines.encode("ascii"))
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise OutputError(f"the folder '{out}' cannot be written: {error.strerror or error}") from error
    finally:
        # Also when something else than the disk fails in the middle: memory, or a signal's handler.
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        shutil.rmtree(partial, ignore_errors=True)
    return sums


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


def write_manifest(folder: Path) -> None:
    """Write the manifest of all files in `folder` and in its folders, each fsynced.

    Raises:
        OSError: a file cannot be read or written.
        IntegrityError: a name that a manifest cannot list.
    """
    lines = []
    for path in sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST):
        name = path.relative_to(folder).as_posix()
        if not re.fullmatch(rf"{NAME}(?:/{NAME})*", name):
            raise IntegrityError(f"a folder with a {MANIFEST} cannot hold a file named {name!r}")
        with path.open("rb+") as stream:
            lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {name}\n")
            os.fsync(stream.fileno())
    _write(folder / MANIFEST, "".join(lines).encode("ascii"))


def _manifest(folder: Path) -> dict[str, str]:
    """Return the SHA-256 that each file should have."""
    try:
        # Not splitlines: it would take a flipped bit in a line break for another kind of line break.
        with _listed(folder, MANIFEST) as stream:
            lines = stream.read(MOST_BYTES).decode("ascii").split("\n")
    except (IntegrityError, UnicodeDecodeError) as error:
        raise IntegrityError(f"'{folder}' has no readable {MANIFEST}, so nothing vouches for its files") from error
    if lines.pop() != "":
        raise IntegrityError(f"'{folder}': {MANIFEST} does not end with a line break, so a part of it is missing")
    sums = {}
    for line in lines:
        match = re.fullmatch(rf"([0-9a-f]{{64}})  ({NAME}(?:/{NAME})*)", line)
        if match is None:
            raise IntegrityError(f"'{folder}': {MANIFEST} has a line that names no plain file: {line[:80]!r}")
        sums[match[2]] = match[1]
    return sums


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file that the manifest lists, read now, without keeping the files in memory.

    Raises:
        IntegrityError: as `read_folder`; that a file has another hash is for the caller to see.
    """
    found = {}
    for name in _manifest(folder):
        with _listed(folder, name) as stream:
            found[name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


@contextmanager
def _listed(folder: Path, name: str) -> Iterator[BinaryIO]:
    """Open a file that a manifest lists: a pipe would wait for ever, a device would never end.

    Raises:
        IntegrityError: it is no regular file, or cannot be read.
    """
    try:
        with os.fdopen(os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
            if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
                raise OSError(errno.EINVAL, "it is no regular file")
            yield stream
    except OSError as error:
        raise IntegrityError(f"'{folder}': {name} is in {MANIFEST} but cannot be read: {error.strerror}") from error


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file that the manifest lists, each checked against its hash before anything parses it.

    Raises:
        IntegrityError: no manifest, a line that is none, or a file that is missing or has other bytes (it is named).
    """
    files = {}
    for name, digest in _manifest(folder).items():
        with _listed(folder, name) as stream:
            try:
                data = stream.read()
            except MemoryError:
                raise IntegrityError(f"'{folder}': {name} is larger than the memory of this machine") from None
        if hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(f"'{folder}': {name} is not what was written (its SHA-256 differs); get it again")
        files[name] = data
    return files
