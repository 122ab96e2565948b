"""The checks that every path passes before any decoder sees it, and the listing of folders.

`rasterio.open` and `dcmread` hang for ever on a FIFO and follow links anywhere, so nothing but a regular file inside
its root gets through. Nothing here reads more than the first bytes of a file.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from geomed_mae.errors import ConfigError, ReadError, SecurityError
from geomed_mae.readers.reasons import Reason

HEAD_BYTES = 512
"""How many first bytes decide which reader takes a file: DICOM's magic ends at 132, NIfTI-1's at 348."""

TRANSIENT = frozenset({errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.EINTR, errno.EBUSY, errno.ENOLCK})
"""Errors of a storage that may be well in a moment."""

WAITS_S = (0.05, 0.2, 0.75)
"""Pauses before the second, third and fourth try."""

_TRIES = {Reason.DECODE_FAILED.name: 2, Reason.VANISHED.name: len(WAITS_S) + 1}
"""How often a reading with this outcome is done."""

QUOTED_CHARACTERS = 48
"""Of a text in a file, as many are shown."""

_QUOTED = re.compile("`[^`]*`?")

_Result = TypeVar("_Result")


def patiently(function: Callable[[], _Result]) -> _Result:
    """Return `function()`, tried again after each of WAITS_S while it raises a TRANSIENT OSError."""
    for wait in WAITS_S:
        try:
            return function()
        except OSError as error:
            if error.errno not in TRANSIENT:
                raise
        time.sleep(wait)
    return function()


def believed(function: Callable[[], _Result], files: Sequence[Path]) -> _Result:
    """Return `function()`, which reads `files`; a failure that storage may have caused is not believed at once.

    Libraries hide what the operating system said: a read that failed looks like damage, a file that could not be opened
    as if it were gone. Damage is believed when it is met twice, absence when the file is absent.

    Raises:
        ReadError: as `function` raises it, or what its OSError means; NOT_REGULAR when something else, on which a read
            may wait for ever, has taken the place of a file.
    """
    for path in files:
        with contextlib.suppress(OSError):
            if not stat.S_ISREG(path.stat().st_mode):
                raise ReadError(f"{shown(path)} is not a regular file", Reason.NOT_REGULAR.name)
    times = 0
    while True:
        try:
            return patiently(function)
        except OSError as error:
            raise as_read_error(error, files[0]) from None
        except ReadError as error:
            tries = _TRIES.get(error.reason, 1)
            times += 1
            if times >= tries or not all(map(os.path.exists, files)):
                raise
        time.sleep(WAITS_S[times - 1])


def as_read_error(error: OSError, path: Path) -> ReadError:
    """Return what an operating system's error on a listed file means: VANISHED, PERMISSION or DECODE_FAILED."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return ReadError(f"{shown(path)} does not exist (any more)", Reason.VANISHED.name)
    if error.errno in (errno.EACCES, errno.EPERM):
        return ReadError(f"{shown(path)} may not be read by this user", Reason.PERMISSION.name)
    return ReadError(f"{shown(path)} cannot be read: {error.strerror or 'unknown error'}", Reason.DECODE_FAILED.name)


def shown(path: Path) -> str:
    """Return a file's name fit for one line of a message or log: control characters and lone surrogates escaped."""
    return path.name.encode("unicode_escape", "backslashreplace").decode("ascii")


def check_regular(path: Path, root: Path | None = None) -> Path:
    """Return `path` resolved, when it is a readable regular file (inside `root`, where one is given).

    Raises:
        ReadError: with reason NOT_REGULAR, LINK_LOOP, OUTSIDE_ROOT, PERMISSION, VANISHED or EMPTY.
    """
    try:
        resolved, status = patiently(lambda: _resolved(path))
    except (OSError, RuntimeError) as error:
        code = getattr(error, "errno", None)
        if code == errno.ELOOP or isinstance(error, RuntimeError):
            raise ReadError(f"{shown(path)} is part of a loop of links", Reason.LINK_LOOP.name) from None
        if code == errno.EACCES:
            raise ReadError(f"{shown(path)} may not be read by this user", Reason.PERMISSION.name) from None
        raise ReadError(f"{shown(path)} does not exist (any more)", Reason.VANISHED.name) from None
    if not stat.S_ISREG(status.st_mode):
        raise ReadError(f"{shown(path)} is not a regular file", Reason.NOT_REGULAR.name)
    if root is not None and not resolved.is_relative_to(root.resolve()):
        raise ReadError(f"{shown(path)} is a link that leaves the archive", Reason.OUTSIDE_ROOT.name)
    if status.st_size == 0:
        raise ReadError(f"{shown(path)} has zero bytes", Reason.EMPTY.name)
    if not os.access(resolved, os.R_OK):
        raise ReadError(f"{shown(path)} may not be read by this user", Reason.PERMISSION.name)
    return resolved


def stored_path(text: str) -> Path:
    """Return the path that a stored table names: absolute and plain, as `check_regular` gave it, and nothing else.

    Whoever can write the table can name any file of this machine, but no URL, no address that GDAL would follow
    (`/vsicurl/`, `GTIFF_DIR:1:`), and nothing relative to where a command happens to run.

    Raises:
        SecurityError: the text is anything else; it is shown, bounded, in one line.
    """
    path = Path(text)
    plain = path.is_absolute() and ".." not in path.parts and "\0" not in text and os.path.normpath(text) == text
    if not plain or text.startswith(("/vsi", "//")):
        place = text[:99].encode("unicode_escape", "backslashreplace").decode("ascii")
        raise SecurityError(
            f"the index names '{place}' as a file, which is no plain absolute path: somebody has changed its "
            "locations.parquet; do not use it, and scan the archive again"
        )
    return path


def _resolved(path: Path) -> tuple[Path, os.stat_result]:
    resolved = path.resolve(strict=True)
    return resolved, resolved.stat()


def first_bytes(path: Path) -> bytes:
    """Return the first HEAD_BYTES of a checked file.

    Raises:
        ReadError: with reason PERMISSION, VANISHED or DECODE_FAILED.
    """

    def head() -> bytes:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)

    try:
        return patiently(head)
    except OSError as error:
        raise as_read_error(error, path) from None


def quoted(text: str | bytes) -> str:
    """Return text found in a file fit for one line of a message: escaped, bounded, and between backticks.

    It may be anything, a name too. A terminal shows it to whoever has the file; public files leave out what stands
    between backticks (see `without_quotes`).
    """
    words = text.decode("latin-1") if isinstance(text, bytes) else text
    plain = words[:QUOTED_CHARACTERS].encode("unicode_escape", "backslashreplace").decode("ascii").replace("`", "'")
    return f"`{plain}{'...' if len(words) > QUOTED_CHARACTERS else ''}`"


def without_quotes(message: str) -> str:
    """Return a message without what it quotes from a file."""
    return _QUOTED.sub("(not shown)", message)


def list_files(root: Path) -> Iterator[Path]:
    """Yield every entry below `root` that is not a folder, in sorted order; a file yields itself.

    Folders that are links are yielded as entries (and refused later), not entered.

    Raises:
        ConfigError: `root` does not exist.
    """
    if not os.path.lexists(root):
        raise ConfigError(f"there is nothing at '{root}'; give an existing file or folder")
    if not root.is_dir():
        yield root
        return
    for folder, names, files in os.walk(root, followlinks=False):
        names.sort()
        links = [name for name in names if (Path(folder) / name).is_symlink()]
        for name in sorted([*files, *links]):
            yield Path(folder) / name
