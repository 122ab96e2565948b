"""The verb scan: raw files -> index folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geomed_mae.archives.build import DEFAULT_MAX_BAD, Progress, keep_apart, scan_archive
from geomed_mae.archives.card import draft_card
from geomed_mae.archives.index import Index
from geomed_mae.errors import ConfigError


def _no_progress(items: Sequence, what: str, total: int) -> Sequence:
    return items


def scan(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    modality: str | Sequence[str] = "auto",
    workers: int = 1,
    max_bad: float = DEFAULT_MAX_BAD,
    progress: Progress = _no_progress,
) -> Index:
    """Scan an archive of raw files into an index.

    Args:
        paths: files and folders, never written to.
        out: folder for the index; None keeps it in memory.
        modality: names or YAML files of the modalities that images may have, or "auto".
        workers: processes.
        max_bad: largest share of bad files, 0 to 1.
        progress: wraps the passes to show how far they are.

    Raises:
        ConfigError: a path does not exist, a modality is unknown, or `out` holds something else.
        TooManyBadInputsError, ReadError: nothing is usable, or the error budget is exceeded.
        OutputError: the index cannot be written.
    """
    folder = None if out is None else Path(out)
    if folder is not None and folder.exists() and not _replaceable(folder):
        raise ConfigError(f"'{folder}' exists and is not an index; choose another --out")
    if folder is not None:
        keep_apart(folder, paths)
    index = scan_archive([Path(path) for path in paths], modality, workers=workers, max_bad=max_bad, progress=progress)
    if folder is not None:
        index.save(folder, draft_card(index))
    return index


def _replaceable(folder: Path) -> bool:
    """An index, or nothing at all, may be written over."""
    return folder.is_dir() and ((folder / "index.parquet").is_file() or not any(folder.iterdir()))
