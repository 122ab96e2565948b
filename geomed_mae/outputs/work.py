"""Half-finished predictions, kept in OUT/.predicting so that a `predict` that was killed goes on where it was.

    lock                 held while somebody predicts into OUT
    salt                 of the keys of raw files, private (mode 0600): the same files get the same names again
    journal.jsonl        a line for each image that is finished, as predictions.jsonl will have it
    <key>/<n>.block      the answer for block n of an image: one line of JSON, then compressed strips of rows

Every block, and every line, carries a fingerprint of all that its content follows from: the model, the pixels of the
image, the settings. Anything with another fingerprint is deleted. The folder goes when everything is finished; what it
then says is in predictions.jsonl, from which a later `predict` learns the same. No file here names an input.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from geomed_mae.archives.identity import SALT_BYTES, new_salt
from geomed_mae.errors import OutputError

FOLDER = ".predicting"
TABLE = "predictions.jsonl"
NAME_HEX = 16
"""Digits of the key that name a file: 64 bits, ample within one folder."""
DONE = "fingerprint"
"""Key of a line that says what the finished image follows from."""
HASHED = 1 << 20
"""Bytes of a file that are hashed at a time."""

log = logging.getLogger(__name__)


class Work:
    """The work folder of one output folder. One process opens it (`begin`); others may write blocks into it.

    Attributes:
        out: the output folder.
        salt: of the keys of raw files.
    """

    def __init__(self, out: str | Path) -> None:
        self.out = Path(out)
        self.folder = self.out / FOLDER
        self.salt = self._kept_salt() or new_salt()
        self._lock: int | None = None

    def begin(self, *, keep_salt: bool, overwrite: bool) -> None:
        """Make the folder, and lock it; with `overwrite` forget all that was done.

        Raises:
            OutputError: it cannot be made, or another process predicts into it.
        """
        with writing(self.out):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"another process predicts into '{self.out}'; wait for it or stop it") from None
            if overwrite:
                for entry in self.folder.iterdir():
                    if entry.name != "lock":
                        _remove(entry)
            if keep_salt:
                with contextlib.suppress(FileExistsError):
                    descriptor = os.open(self.folder / "salt", os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                    with os.fdopen(descriptor, "wb") as file:
                        file.write(self.salt)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def clear(self) -> None:
        """Delete the folder: everything is finished."""
        with writing(self.out):
            shutil.rmtree(self.folder)

    def place(self, key: str) -> Path:
        """Return the folder of an image's blocks."""
        return self.folder / key[:NAME_HEX]

    def keep_only(self, fingerprints: Mapping[str, str], blocks: Mapping[str, int]) -> int:
        """Delete half-finished work that is not of these images (key -> fingerprint); return how many files it was.

        Args:
            fingerprints: what each image's blocks must carry.
            blocks: number of blocks of each image.
        """
        wanted = {key[:NAME_HEX]: key for key in fingerprints}
        discarded = 0
        with writing(self.out):
            for place in [entry for entry in self.folder.iterdir() if entry.is_dir()]:
                key = wanted.get(place.name)
                for file in place.iterdir():
                    number = file.stem if file.suffix == ".block" else ""
                    known = key is not None and number.isdecimal() and int(number) < blocks[key]
                    if not known or not valid_block(file, fingerprints[key]):
                        discarded += file.suffix == ".block"
                        _remove(file)
                if not any(place.iterdir()):
                    place.rmdir()
        return discarded

    def finished(self, fingerprints: Mapping[str, str]) -> dict[str, dict[str, Any]]:
        """Return the lines of images (key -> fingerprint) whose files are there and are what was written."""
        found: dict[str, dict[str, Any]] = {}
        for path in (self.out / TABLE, self.folder / "journal.jsonl"):
            for line in _lines(path):
                key = line.get("key")
                if key in fingerprints and line.get(DONE) == fingerprints[key] and self._holds(line):
                    found[key] = line
        return found

    def note(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add finished images to the journal.

        Raises:
            OutputError: the disk is full.
        """
        if lines:
            with writing(self.out), (self.folder / "journal.jsonl").open("a", encoding="utf-8") as journal:
                # A line that a crash has cut off must not swallow the next one.
                journal.writelines(f"\n{json.dumps(line)}\n" for line in lines)
                journal.flush()
                os.fsync(journal.fileno())

    def _holds(self, line: dict[str, Any]) -> bool:
        files = line.get("sha256", {})
        return isinstance(files, dict) and all(
            Path(name).name == name and (self.out / name).is_file() and sha256(self.out / name) == digest
            for name, digest in files.items()
        )

    def _kept_salt(self) -> bytes | None:
        try:
            found = (self.folder / "salt").read_bytes()
        except OSError:
            return None
        return found if len(found) == SALT_BYTES else None


@contextlib.contextmanager
def writing(out: Path) -> Iterator[None]:
    """Turn what goes wrong with files into one error.

    Raises:
        OutputError: saying where, and what to do.
    """
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"'{out}' cannot be written: {error.strerror or error}; make room or give permission, then run the same "
            "command again: it goes on where it was"
        ) from error


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, which is not read whole into memory."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def valid_block(path: Path, fingerprint: str) -> bool:
    """Return whether a file is a whole block of work with this fingerprint."""
    try:
        with path.open("rb") as file:
            head = json.loads(file.readline())
            total = hashlib.sha256()
            while data := file.read(HASHED):
                total.update(data)
            return head["fingerprint"] == fingerprint and head["sha256"] == total.hexdigest()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file's lines, those that are whole."""
    try:
        with path.open(encoding="utf-8") as file:
            for text in file:
                with contextlib.suppress(ValueError):
                    line = json.loads(text)
                    if isinstance(line, dict):
                        yield line
    except (OSError, UnicodeDecodeError):
        return


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
