"""The checks that every path passes before any decoder sees it, and the listing of folders.

`rasterio.open` and `dcmread` hang for ever on a FIFO and follow links anywhere, so nothing but a regular file inside
its root gets through. Nothing here reads more than the first bytes of a file.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from pathlib import Path

from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.readers.reasons import Reason

HEAD_BYTES = 512
"""How many first bytes decide which reader takes a file: DICOM's magic ends at 132, NIfTI-1's at 348."""


def shown(path: Path) -> str:
    """Return a file's name fit for one line of a message or log: control characters and lone surrogates escaped."""
    return path.name.encode("unicode_escape", "backslashreplace").decode("ascii")


def check_regular(path: Path, root: Path | None = None) -> Path:
    """Return `path` resolved, when it is a readable regular file (inside `root`, where one is given).

    Raises:
        ReadError: with reason NOT_REGULAR, LINK_LOOP, OUTSIDE_ROOT, PERMISSION, VANISHED or EMPTY.
    """
    try:
        resolved = path.resolve(strict=True)
        status = resolved.stat()
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


def first_bytes(path: Path) -> bytes:
    """Return the first HEAD_BYTES of a checked file.

    Raises:
        ReadError: with reason PERMISSION or VANISHED.
    """
    try:
        with path.open("rb") as file:
            return file.read(HEAD_BYTES)
    except PermissionError:
        raise ReadError(f"{shown(path)} may not be read by this user", Reason.PERMISSION.name) from None
    except OSError as error:
        raise ReadError(f"{shown(path)} cannot be read: {error.strerror}", Reason.VANISHED.name) from None


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
