"""Images that could not be read among many that could: what is said of them, to the user and in tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from geomed_mae.archives.build import is_index
from geomed_mae.archives.headers import find_files
from geomed_mae.archives.identity import keyed
from geomed_mae.archives.index import Index
from geomed_mae.archives.ledger import Entry
from geomed_mae.errors import ReadError
from geomed_mae.readers.reasons import NOT_BAD, OTHER_DICOM, Reason

ALL_BAD = 1.0
"""Share of broken files of a raw archive that predict and embed put up with: each is told, the others are done."""

EMPTY = frozenset({Reason.ALL_INVALID.name, Reason.NO_INFORMATION.name})
"""Reasons of images without anything in them to answer, such as tiles beyond the edge of a swath: told, no failure."""

Failure = tuple[str, str]
"""Reason, and what a person at the terminal is told; the second may name a file."""


def failure_of(error: ReadError) -> Failure:
    """Return what is kept of an error."""
    return error.reason, str(error)


def refused(index: Index, archive_paths: Sequence[str | Path], salt: bytes) -> dict[str, tuple[Path, Failure]]:
    """Return the files of raw archives that a scan has found broken or empty, by the keyed hashes of their paths.

    Args:
        index: of `open_archive` over the archives.
        archive_paths: as given to it. What an INDEX refused was told when it was made.
        salt: as given to it.
    """
    raw = [Path(path) for path in archive_paths if not is_index(Path(path))]
    names = {keyed(salt, "file", str(file.path)): file.path for file in (find_files(raw) if raw else ())}
    return {
        entry.file: (names[entry.file], (entry.reason, entry.detail))
        for entry in index.ledger.entries
        if entry.file in names and entry.reason and Reason[entry.reason] not in NOT_BAD and not _other(entry)
    }


def _other(entry: Entry) -> bool:
    return entry.reason == Reason.MODALITY_MISMATCH.name and entry.detail.startswith(OTHER_DICOM)


def told(index: Index, failed: Mapping[str, Failure], broken: Mapping[str, tuple[Path, Failure]]) -> dict[str, Any]:
    """Return the part of a verb's result that says what is not there, each only where there is such a thing.

    These are `failed`, images and files that could not be read; `empty`, those without anything in them to answer
    (EMPTY); and `files_of_other_modalities`, the number of DICOM files of other modalities than the chosen ones.

    Args:
        index: of the images.
        failed: key of an image -> what happened.
        broken: of `refused`.
    """
    paths = {key: index.paths(key)[0] for key in failed} | {key: path for key, (path, _) in broken.items()}
    both = {**failed, **{key: failure for key, (_, failure) in broken.items()}}
    entries = [
        # For the person at the terminal; no file that is written names an input.
        {"key": key, "input": str(paths[key]), "reason": reason, "detail": detail}
        for key, (reason, detail) in both.items()
    ]
    found: dict[str, Any] = {
        "failed": [entry for entry in entries if entry["reason"] not in EMPTY],
        "empty": [entry for entry in entries if entry["reason"] in EMPTY],
        "files_of_other_modalities": sum(map(_other, index.ledger.entries)),
    }
    return {name: value for name, value in found.items() if value}


def line(key: str, failure: Failure) -> dict[str, Any]:
    """Return the line of a table about an image that failed, without names."""
    return {"key": key, "failed": failure[0], "because": Reason[failure[0]].value}
