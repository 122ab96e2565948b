"""The first pass of a scan: which files there are, and what their headers say.

Headers are read in decoding processes too, some dozens a call: GDAL and the DICOM parser meet unchecked bytes there. A
file that ends its process does not take the others of its call with it: they are then read one by one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomed_mae.archives.journal import Journal, Stamp
from geomed_mae.archives.workers import Workers
from geomed_mae.errors import ReadError
from geomed_mae.readers import header_of, load_readers
from geomed_mae.readers.child import in_child
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import list_files
from geomed_mae.readers.source import Refusal
from geomed_mae.readers.wire import pack, unpack

Progress = Callable[[Iterable, str, int], Iterable]
"""Wraps an iterable to show its progress: (iterable, what, total) -> iterable."""

FILES_PER_CALL = 64
"""One call costs half a millisecond, a header one millisecond; what a call has found is lost with a kill."""

PASSING = frozenset({Reason.VANISHED, Reason.PERMISSION, Reason.MISSING_EXTRA, Reason.CODEC_MISSING})
"""Reasons that go away without a change of the file: they are not kept."""

Outcome = tuple[str, Any] | Refusal
"""What `header_of` says of a file: the name of its reader and its header, or a refusal."""


@dataclass(frozen=True, slots=True)
class Found:
    """A file as it was listed (`path`) and as readers name it (`real`: links resolved).

    `again` says that it is a link to a file that is listed too.
    """

    path: Path
    real: Path
    root: Path | None
    stamp: Stamp | None
    again: bool = False


def find_files(paths: Sequence[Path]) -> list[Found]:
    """List files and folders, each file once, however many of the paths lead to it.

    Raises:
        ConfigError: a path does not exist.
    """
    listed: list[tuple[Path, Path, Path | None]] = []
    for start in paths:
        root = start if start.is_dir() else None
        real_start = Path(os.path.realpath(start))
        for path in list_files(start):
            inside = root is not None and not path.is_symlink()
            listed.append(
                (path, real_start / path.relative_to(start) if inside else Path(os.path.realpath(path)), root)
            )
    own = {real for path, real, _ in listed if not path.is_symlink()}
    met: set[Path] = set()
    found = []
    for path, real, root in listed:
        link = path.is_symlink()
        name = path.absolute() if link else real
        if name in met:
            continue
        again = link and (real in own or real in met)
        met |= {name} if again else {name, real}
        found.append(Found(path, real, root, None if again else Stamp.of(path), again))
    return found


def look(
    found: Sequence[Found], workers: Workers, journal: Journal, progress: Progress, *, verify: bool = False
) -> Iterator[tuple[Found, Outcome]]:
    """Yield every file with what its header says, in the order of `found`.

    What the journal knows is not read, except to `verify` it: other contents under an unchanged stamp are refused.
    """
    load_readers()
    known = [_known(file, journal) for file in found]
    outcomes = [outcome if file.again or not verify else None for file, outcome in zip(found, known, strict=True)]
    todo = [number for number, outcome in enumerate(outcomes) if outcome is None]
    size = max(1, min(FILES_PER_CALL, len(todo) // (4 * workers.count)))
    calls = [todo[start : start + size] for start in range(0, len(todo), size)]
    work = [tuple((found[number].path, found[number].root) for number in call) for call in calls]

    def done() -> Iterator[int]:
        yield from (number for number, outcome in enumerate(outcomes) if outcome is not None)
        for position, texts in workers.results(headers_apart, work):
            for number, text in zip(calls[position], texts, strict=True):
                outcomes[number] = _taken(found[number], text, journal, known[number])
                yield number

    for _ in progress(done(), "headers", len(found)):
        pass
    for file, outcome in zip(found, outcomes, strict=True):
        if outcome is not None:
            yield file, outcome


def _known(file: Found, journal: Journal) -> Outcome | None:
    if file.again:
        return Refusal(file.path, Reason.DUPLICATE, "a link to another file of the archive")
    return journal.header(file.path, file.root, file.stamp)


def _taken(file: Found, text: str, journal: Journal, known: Outcome | None) -> Outcome:
    try:
        outcome: Outcome = unpack(text)
    except ValueError as error:
        return Refusal(file.path, Reason.DECODE_FAILED, f"its header makes no sense to this process: {error}")
    passing = isinstance(outcome, Refusal) and outcome.reason in PASSING
    if known is not None and not passing and pack(known) != text:
        why = "its header has changed although size and time have not; restore it from a copy"
        return Refusal(file.path, Reason.HASH_MISMATCH, why)
    if known is None and not passing:
        journal.keep_header(file.path, file.root, file.stamp, text)
    return outcome


def headers_apart(files: Sequence[tuple[Path, Path | None]]) -> tuple[str, ...]:
    """Return what `header_of` says of each (file, root), packed; read in a child process."""
    try:
        return in_child(_headers, tuple(files), retry=False)
    except ReadError as error:
        if len(files) == 1:
            return (pack(Refusal(files[0][0], Reason[error.reason], str(error))),)
        return tuple(text for file in files for text in headers_apart([file]))


def _headers(files: Sequence[tuple[Path, Path | None]]) -> tuple[str, ...]:
    return tuple(pack(header_of(path, root)) for path, root in files)
