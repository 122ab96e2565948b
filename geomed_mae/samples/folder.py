"""A bounded folder of files that several processes fill at once and none owns: the file system's side of the cache.

A file is written under a temporary name and renamed, so that a process that is killed leaves a whole entry or none.
Nothing is flushed to the disk: an entry that a power failure cuts short does not verify, and is made again.

The folder's size is known without a look at it for every file: a look gives what is there, own additions are counted,
and the next look is due when these reach a small part (LOOKS) of what was free. That part shrinks with what is free,
until there is a look before every file: processes that fill one folder at once exceed its limit by one file each.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import platform
import secrets
import stat
import time
from collections.abc import Sequence
from pathlib import Path

from geomed_mae.errors import ConfigError

TAG = "CACHEDIR.TAG"
TAG_TEXT = (
    "Signature: 8a477f597d28d172789f06886806bc55\n"
    "# Decoded images, kept by geomed-mae. They can be of patients. Everything here may be deleted at any time.\n"
)
"""The signature that backup programs know (bford.info/cachedir)."""
UNFINISHED = ".part-"
STALE_S = 24 * 3600.0
"""A file that has not been finished for so long will not be."""
LOOKS = 256
"""Processes that may fill one folder at once before their additions between two looks could exceed its limit."""
RESERVE_BYTES = 2 << 30
"""Disk space that is left to checkpoints and to others."""

log = logging.getLogger(__name__)


class Folder:
    """Files by name in one folder, of at most `limit_bytes` together. Picklable.

    Args:
        path: the folder; it is made with the first file. A link to it is followed, a link in it never.
        limit_bytes: size of all files together from which on none is added.
        reserve_bytes: space that is left free on the disk.

    Raises:
        ConfigError: there is such a folder and it holds other things than a cache, or it is no folder.
    """

    def __init__(self, path: Path, limit_bytes: int, *, reserve_bytes: int = RESERVE_BYTES) -> None:
        self.path = path.resolve()
        self.limit_bytes, self.reserve_bytes = limit_bytes, reserve_bytes
        self.closed = ""  # why nothing is added any more
        self.used = self._added = 0
        self._step = -1
        self._made = False
        _refuse_foreign(self.path)
        with contextlib.suppress(OSError):
            self._sweep()

    def open(self, name: str) -> int | None:
        """Return a descriptor of a file for reading; None where there is none, or something that is no plain file."""
        try:
            # O_NONBLOCK: a named pipe that somebody put there must not wait for a writer.
            found = os.open(self.path / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except FileNotFoundError:
            return None
        except OSError as error:
            if error.errno == errno.ELOOP:
                self.drop(name)  # a link
            return None
        if stat.S_ISREG(os.fstat(found).st_mode):
            return found
        os.close(found)
        self.drop(name)
        return None

    def drop(self, name: str) -> bool:
        """Remove a file; says whether it is gone."""
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError:
            return False
        # There is room again.
        self._step = -1
        self.closed = "" if self.closed == _FULL else self.closed
        return True

    def room(self, size: int) -> bool:
        """Whether a file of `size` bytes may be added; False for good once one may not."""
        if self.closed:
            return False
        try:
            if self._added + size > self._step:
                self._look()
            free = os.statvfs(self.path if self._made else _existing(self.path))
        except OSError as error:
            self._close(error.strerror or "unreadable")
            return False
        if self.used + self._added + size > self.limit_bytes:
            self.closed = _FULL
            log.info("the cache is full (%.1f GiB): what is not in it is decoded each time", self.limit_bytes / 2**30)
        elif free.f_bavail * free.f_frsize - size < self.reserve_bytes:
            self._close(f"less than {self.reserve_bytes / 2**30:.1f} GiB of the disk would be left")
        return not self.closed

    def write(self, name: str, parts: Sequence[bytes]) -> bool:
        """Add a file, or put it in the place of another; says whether. A failure is one warning and the end of it."""
        size = sum(map(len, parts))
        if not self.room(size):
            return False
        temporary = self.path / f"{UNFINISHED}{_host()}-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self._make()
            mode = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with os.fdopen(os.open(temporary, mode, 0o600), "wb") as file:
                file.writelines(parts)
            temporary.replace(self.path / name)
        except OSError as error:
            with contextlib.suppress(OSError):
                temporary.unlink()
            self._close(error.strerror or "it cannot be written")
            return False
        self._added += size
        return True

    def _close(self, why: str) -> None:
        self.closed = why
        # The reason without the path, which may name a patient.
        log.warning("the cache takes nothing more (%s): what is not in it is decoded each time", why)

    def _make(self) -> None:
        if self._made:
            return
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if stat.S_IMODE(self.path.stat().st_mode) != 0o700:
            self.path.chmod(0o700)
        with contextlib.suppress(FileExistsError):
            tag = os.open(self.path / TAG, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(tag, "w", encoding="ascii") as file:
                file.write(TAG_TEXT)
        self._made = True

    def _look(self) -> None:
        """Add up the sizes of all files, unfinished ones too."""
        self.used = self._added = 0
        with contextlib.suppress(FileNotFoundError), os.scandir(self.path) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    self.used += entry.stat(follow_symlinks=False).st_size
        self._step = max(0, self.limit_bytes - self.used) // LOOKS

    def _sweep(self) -> None:
        """Remove what processes have left unfinished that are dead, or have been for a day."""
        if not self.path.is_dir():
            return
        mine = f"{UNFINISHED}{_host()}-"
        for entry in os.scandir(self.path):
            if not entry.name.startswith(UNFINISHED):
                continue
            with contextlib.suppress(OSError):
                old = time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_S
                if old or (entry.name.startswith(mine) and not _lives(entry.name[len(mine) :].partition("-")[0])):
                    Path(entry.path).unlink()


_FULL = "full"


def _refuse_foreign(path: Path) -> None:
    """Refuse a folder that is not, or not only, a cache of this user."""
    try:
        owner = path.stat().st_uid
        names = {entry.name for entry in path.iterdir()}
    except NotADirectoryError:
        raise ConfigError(f"the cache '{path}' is no folder; name another as data.cache_dir") from None
    except OSError:
        return  # not there, or not readable: then nothing is written into it either
    if os.geteuid() not in (0, owner):
        # Whoever owns it could put other pixels there.
        raise ConfigError(f"the cache '{path}' belongs to another user; name a folder of your own as data.cache_dir")
    if TAG not in names and not all(name.startswith(UNFINISHED) for name in names):
        raise ConfigError(f"'{path}' holds other things than a cache; name a new or empty folder as data.cache_dir")


def _existing(path: Path) -> Path:
    return next(parent for parent in (path, *path.parents) if parent.exists())


def _host() -> str:
    """Return a short digest of this machine's name: process numbers mean something on one machine only."""
    return hashlib.sha256(platform.node().encode()).hexdigest()[:8]


def _lives(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except PermissionError:
        return True
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    return True
