"""The journal: what a scan has learned so far, so that none of it is learned twice.

`journal.sqlite` lies in the index folder, private (mode 0600): it holds paths and identifiers. A scan that was killed
goes on from it; a scan of an archive that has not changed reads no file at all. It is a cache and never an authority: a
journal that does not open is begun anew, and what another version of the readers wrote is forgotten.

A file counts as unchanged when size, time of modification and inode are what they were. Within RACY_NS of its
modification a file may change again without a trace, as in git's index ("racy git"): what was read then is not trusted.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import os
import sqlite3
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from geomed_mae.errors import OutputError
from geomed_mae.plugins import PACKAGE
from geomed_mae.readers.source import Source
from geomed_mae.readers.wire import pack, unpack

JOURNAL = "journal.sqlite"
RACY_NS = 2_000_000_000
"""FAT and some network storages keep times to two seconds; clocks of servers differ."""
COMMIT_SECONDS = 3.0
"""Work that a kill can cost."""

_LIBRARIES = ("numpy", "rasterio", "pydicom", "nibabel", "pillow", "pylibjpeg", "pylibjpeg-openjpeg", "pyjpegls")
_DECIDING = ("image.py", "readers", "archives/examine.py", "archives/statistics.py", "archives/duplicates.py")
"""The code whose change makes earlier findings worthless."""

_TABLES = """
CREATE TABLE IF NOT EXISTS code (version TEXT);
CREATE TABLE IF NOT EXISTS headers (file TEXT PRIMARY KEY, stamp TEXT, outcome TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS pixels (image TEXT PRIMARY KEY, outcome TEXT) WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Stamp:
    """What tells one state of a file from another, and when (ns since 1970) it was looked at."""

    size: int
    modified_ns: int
    inode: int
    looked_ns: int

    @classmethod
    def of(cls, path: Path) -> Stamp | None:
        """Return the stamp of the file that `path` leads to, None where there is none to be had."""
        try:
            looked = time.time_ns()
            found = path.stat()
        except OSError:
            return None
        return cls(found.st_size, found.st_mtime_ns, found.st_ino, looked)

    @property
    def settled(self) -> bool:
        """Whether the file was long finished when it was looked at. (Times in the future are wrong, but settled.)"""
        return abs(self.looked_ns - self.modified_ns) >= RACY_NS

    @property
    def text(self) -> str:
        """The state, without the time of looking."""
        return f"{self.size}:{self.modified_ns}:{self.inode}"


@cache
def code_version() -> str:
    """Return a hash of the code and of the libraries that decide what a scan finds."""
    found = hashlib.sha256()
    root = Path(__file__).resolve().parents[1]
    for name in _DECIDING:
        for path in sorted((root / name).rglob("*.py")) if (root / name).is_dir() else [root / name]:
            found.update(path.name.encode() + b"\0" + path.read_bytes())
    for library in (PACKAGE.replace("_", "-"), *_LIBRARIES):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.update(f"{library} {importlib.metadata.version(library)}\n".encode())
    return found.hexdigest()


class Journal:
    """Findings by file and by image. Made by `journal`; used by one thread."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection
        self._due = time.monotonic() + COMMIT_SECONDS
        self._files: set[str] = set()
        self._images: set[str] = set()

    def header(self, path: Path, root: Path | None, stamp: Stamp | None) -> Any:
        """Return what `keep_header` was given for this state of a file, or None."""
        file = _file(path, root)
        self._files.add(file)
        if stamp is None:
            return None
        row = self._connection.execute("SELECT stamp, outcome FROM headers WHERE file = ?", (file,)).fetchone()
        return _unpacked(row[1]) if row and row[0] == stamp.text else None

    def keep_header(self, path: Path, root: Path | None, stamp: Stamp | None, text: str) -> None:
        """Keep what a file's header says, as packed text, for as long as the file is what it is."""
        if stamp is not None and stamp.settled:
            self._put("INSERT OR REPLACE INTO headers VALUES (?, ?, ?)", (_file(path, root), stamp.text, text))

    def image(self, source: Source, stamps: Sequence[Stamp | None]) -> Any:
        """Return what `keep_image` was given for this Source and this state of its files, or None."""
        image = _image(source, stamps)
        self._images.add(image)
        row = self._connection.execute("SELECT outcome FROM pixels WHERE image = ?", (image,)).fetchone()
        return _unpacked(row[0]) if row else None

    def keep_image(self, source: Source, stamps: Sequence[Stamp | None], outcome: Any) -> None:
        """Keep what the pixels of an image say."""
        if all(stamp is not None and stamp.settled for stamp in stamps):
            self._put("INSERT OR REPLACE INTO pixels VALUES (?, ?)", (_image(source, stamps), pack(outcome)))

    def forget_others(self) -> None:
        """Forget files and images that were not asked for since the journal was opened: they are gone."""
        for table, column, asked in (("headers", "file", self._files), ("pixels", "image", self._images)):
            known = [row[0] for row in self._connection.execute(f"SELECT {column} FROM {table}")]
            gone = [(name,) for name in known if name not in asked]
            self._connection.executemany(f"DELETE FROM {table} WHERE {column} = ?", gone)
        self._connection.commit()

    def _put(self, statement: str, values: tuple[str, ...]) -> None:
        self._connection.execute(statement, values)
        if time.monotonic() >= self._due:
            self._connection.commit()
            self._due = time.monotonic() + COMMIT_SECONDS


@contextlib.contextmanager
def journal(folder: Path | None) -> Iterator[Journal]:
    """Open the journal of an index folder, which exists; None keeps it in memory for this one scan.

    What was kept is committed also when the scan fails.

    Raises:
        OutputError: the folder cannot be written to, or another scan is writing there.
    """
    path = None if folder is None else folder / JOURNAL
    try:
        try:
            connection = _open(path)
        except sqlite3.DatabaseError as error:
            if path is None or isinstance(error, sqlite3.OperationalError):
                raise
            path.unlink()  # not a database (any more): a cache can be made again
            connection = _open(path)
    except (OSError, sqlite3.Error) as error:
        if "locked" in str(error):
            raise OutputError(f"another scan is writing to '{folder}'; wait for it, or choose another --out") from None
        raise OutputError(f"the journal in '{folder}' cannot be written: {error}") from None
    try:
        yield Journal(connection)
    except sqlite3.Error as error:
        raise OutputError(f"the journal in '{folder}' cannot be written: {error}") from error
    finally:
        with contextlib.closing(connection), contextlib.suppress(sqlite3.Error):
            connection.commit()


def _open(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        path.chmod(0o600)
    connection = sqlite3.connect(":memory:" if path is None else path, timeout=0)
    try:
        # Nobody else writes here while this scan does; SQLite's lock files take the mode of the database.
        connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.executescript(f"BEGIN EXCLUSIVE; {_TABLES} COMMIT;")
        if connection.execute("SELECT version FROM code").fetchall() != [(code_version(),)]:
            for table in ("code", "headers", "pixels"):
                connection.execute(f"DELETE FROM {table}")
            connection.execute("INSERT INTO code VALUES (?)", (code_version(),))
            connection.commit()
    except BaseException:
        connection.close()
        raise
    return connection


def _file(path: Path, root: Path | None) -> str:
    # A root decides which links are followed. Packed: names need not be UTF-8, SQLite's text must be.
    return pack((path.absolute(), None if root is None else root.absolute()))


def _image(source: Source, stamps: Sequence[Stamp | None]) -> str:
    states = tuple("" if stamp is None else stamp.text for stamp in stamps)
    return hashlib.sha256(pack((source, states)).encode("ascii")).hexdigest()


def _unpacked(text: str) -> Any:
    try:
        return unpack(text)
    except ValueError:
        return None
