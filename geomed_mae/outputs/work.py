"""Half-finished predictions, kept in OUT/.predicting so that a `predict` that was killed goes on where it was.

    lock                 held while somebody predicts into OUT
    salt                 of the keys of raw files, private (mode 0600): the same files get the same names again
    journal.jsonl        a line for each image that is finished, as predictions.jsonl will have it
    <key>/<n>.block      the answer for block n of an image: one line of JSON, then compressed strips of rows

Every block, and every line, carries a fingerprint of all that its content follows from: the model, the pixels of the
image, the settings. Anything with another fingerprint is deleted. The folder goes when everything is finished; what it
then says is in predictions.jsonl, from which a later `predict` learns the same. No file here names an input.

OUT may be shared: links in the folder are removed and never followed, because what is in it is deleted; a salt that
somebody else has left is not used, because who knows it can try names against keys.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

from geomed_mae.archives.identity import SALT_BYTES, new_salt
from geomed_mae.errors import OutputError, SecurityError
from geomed_mae.outputs import NAME_HEX

FOLDER = ".predicting"
TABLE = "predictions.jsonl"
DONE = "fingerprint"
"""Key of a line that says what the finished image follows from."""
HASHED = 1 << 20
"""Bytes of a file that are hashed at a time."""
MOST_HEAD = 16 << 20
"""Bytes of a block's first line; ours have some thousand."""

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
            SecurityError: it is a link to another folder.
        """
        if self.folder.is_symlink():
            raise SecurityError(
                f"'{self.folder}' is a link, and predict deletes what is in this folder; remove the link, or choose "
                "another --out"
            )
        with writing(self.out):
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise OutputError(f"another process predicts into '{self.out}'; wait for it or stop it") from None
            # One that waited here while another finished would hold the lock of a folder that is gone.
            if not os.path.samestat(os.fstat(self._lock), (self.folder / "lock").stat()):
                raise OutputError(f"another process has just predicted into '{self.out}'; run the same command again")
            for entry in self.folder.iterdir():
                if entry.is_symlink() or (overwrite and entry.name != "lock"):
                    _remove(entry)
            if keep_salt and self._kept_salt() != self.salt:
                (self.folder / "salt").unlink(missing_ok=True)
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
                    if not known or not valid_block(file, block_mark(fingerprints[key], int(number))):
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
                known = isinstance(key, str) and key in fingerprints
                if known and line.get(DONE) == fingerprints[key] and self._holds(line):
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
        """Return whether a line is whole, and its files are there and are what was written."""
        if "chances" in line:
            chances = line["chances"]
            return isinstance(chances, list) and all(isinstance(one, float | int) and -1 < one < 2 for one in chances)
        files, name = line.get("sha256"), line.get("file")
        if not (isinstance(files, dict) and isinstance(name, str) and isinstance(line.get("pixels"), dict)):
            return False
        return name in files and all(
            Path(name).name == name and (self.out / name).is_file() and sha256(self.out / name) == digest
            for name, digest in files.items()
        )

    def _kept_salt(self) -> bytes | None:
        """Return the salt of earlier work, if it is this user's."""
        try:
            descriptor = os.open(self.folder / "salt", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with os.fdopen(descriptor, "rb") as file:
                about = os.fstat(file.fileno())
                if not stat.S_ISREG(about.st_mode) or about.st_uid != os.geteuid() or about.st_size != SALT_BYTES:
                    return None
                return file.read(SALT_BYTES)
        except OSError:
            return None


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


def block_mark(fingerprint: str, number: int) -> str:
    """Return what block `number` of an image carries, so that it stands for no other block of it."""
    return f"{fingerprint}/{number}"


def valid_block(path: Path, mark: str) -> bool:
    """Return whether a file is a whole block of work with this mark (`block_mark`)."""
    try:
        if not path.is_file():
            return False  # a pipe would wait for ever
        with path.open("rb") as file:
            head = json.loads(file.readline(MOST_HEAD))
            total = hashlib.sha256()
            while data := file.read(HASHED):
                total.update(data)
            return head["mark"] == mark and head["sha256"] == total.hexdigest()
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the JSON objects of a file's lines, those that are whole."""
    if not path.is_file():
        return
    try:
        with path.open(encoding="utf-8") as file:
            for text in file:
                with contextlib.suppress(ValueError, RecursionError):
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
