"""Folders that are written whole or not at all, and read only when every byte is the one that was written.

A folder is made under a temporary name beside its place, fsynced, and renamed. `MANIFEST.sha256` lists each file in the
form that `sha256sum -c` checks.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from geomed_mae.errors import IntegrityError, OutputError

MANIFEST = "MANIFEST.sha256"


def write_folder(out: Path, files: Mapping[str, bytes]) -> None:
    """Write `files` (plain names) and their manifest as the folder `out`; an older folder with a manifest is replaced.

    Raises:
        OutputError: `out` holds something that no manifest vouches for, the disk is full, or permission is missing.
    """
    out = Path(out)
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise OutputError(f"'{out}' holds something else; choose another folder or empty it")
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    lines = "".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items()))
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    replaced = out.with_name(f".{out.name}.replaced-{os.getpid()}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, data in {**files, MANIFEST: lines.encode("ascii")}.items():
            with (partial / name).open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
        if out.exists():
            out.rename(replaced)
        partial.rename(out)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        if replaced.exists() and not out.exists():
            replaced.rename(out)
        raise OutputError(f"the folder '{out}' cannot be written: {error.strerror or error}") from error


def read_folder(folder: Path) -> dict[str, bytes]:
    """Return the bytes of every file that the manifest lists, each checked against its hash before anything parses it.

    Raises:
        IntegrityError: no manifest, a line that is none, or a file that is missing or has other bytes (it is named).
    """
    try:
        lines = (folder / MANIFEST).read_text(encoding="ascii").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise IntegrityError(f"'{folder}' has no readable {MANIFEST}, so nothing vouches for its files") from error
    files = {}
    for line in lines:
        match = re.fullmatch(r"([0-9a-f]{64})  ([A-Za-z0-9][A-Za-z0-9._-]*)", line)
        if match is None:
            raise IntegrityError(f"'{folder}': {MANIFEST} has a line that names no plain file: {line[:80]!r}")
        digest, name = match.groups()
        try:
            data = (folder / name).read_bytes()
        except OSError as error:
            raise IntegrityError(f"'{folder}': {name} is in {MANIFEST} but cannot be read: {error.strerror}") from error
        if hashlib.sha256(data).hexdigest() != digest:
            raise IntegrityError(f"'{folder}': {name} is not what was written (its SHA-256 differs); get it again")
        files[name] = data
    return files
