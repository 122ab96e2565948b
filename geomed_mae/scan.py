"""The verb scan: raw files -> index folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from geomed_mae.archives.build import DEFAULT_MAX_BAD, Memory, keep_apart, scan_archive
from geomed_mae.archives.card import draft_card
from geomed_mae.archives.headers import Progress
from geomed_mae.archives.identity import SALT_BYTES, new_salt
from geomed_mae.archives.index import Index, is_index
from geomed_mae.archives.journal import JOURNAL
from geomed_mae.archives.pictures import FOLDER, draw_card, remove_pictures
from geomed_mae.archives.split_file import earlier_split, make_split, save_split
from geomed_mae.archives.splits import SplitRequest
from geomed_mae.errors import ConfigError, IntegrityError, OutputError, SecurityError


def _no_progress(items: Sequence, what: str, total: int) -> Sequence:
    return items


def scan(
    paths: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    modality: str | Sequence[str] = "auto",
    workers: int = 1,
    dask: str | None = None,
    verify: bool = False,
    max_bad: float = DEFAULT_MAX_BAD,
    split: SplitRequest | None = None,
    pictures: bool = True,
    progress: Progress = _no_progress,
) -> Index:
    """Scan an archive of raw files into an index.

    Into a folder that holds an index already, only files that are new or have changed are read, and keys stay what they
    are; what a killed scan had found is not read again either. A card stays as it is while the archive does.

    Args:
        paths: files and folders, never written to.
        out: folder for the index; None keeps it in memory.
        modality: names or YAML files of the modalities that images may have, or "auto".
        workers: decoding processes of this machine.
        dask: address of a Dask scheduler whose workers do the work instead, for example "tcp://10.0.0.1:8786".
        verify: decode everything again and compare it with what the last scan into `out` found.
        max_bad: largest share of bad files, 0 to 1.
        split: how to split; stored with the index. None keeps the split that an index in `out` has.
        pictures: draw pictures beside the data card; they show pixels.
        progress: wraps the passes to show how far they are.

    Raises:
        ConfigError: a path does not exist, a modality is unknown, `out` holds something else, or there are too few
            groups or blocks to split.
        LeakageError: a block split is asked for and an image has no place on the globe.
        TooManyBadInputsError, ReadError: nothing is usable, or the error budget is exceeded.
        OutputError: the index cannot be written.
    """
    folder = None if out is None else Path(out)
    if folder is not None and folder.exists() and not _replaceable(folder):
        raise ConfigError(f"'{folder}' exists and is not an index; choose another --out")
    if folder is not None:
        keep_apart(folder, paths)
    elif verify:
        raise ConfigError("verify compares with an earlier scan: give the folder of its index as out")
    if folder is None and split is not None:
        raise ConfigError("a split is stored with its index: give a folder for it as out")
    if verify and not (folder / JOURNAL).is_file():
        raise ConfigError(f"'{folder}' holds no earlier scan to compare with; scan without verify first")
    earlier = None if folder is None else earlier_split(folder, replaced=split is not None)
    memory = None if folder is None else Memory(folder=folder, salt=_salt(folder), verify=verify)
    index = scan_archive(
        [Path(path) for path in paths],
        modality,
        workers=workers,
        dask=dask,
        max_bad=max_bad,
        memory=memory,
        progress=progress,
    )
    if folder is not None:
        divided = make_split(index, split, earlier)
        card = _unchanged_card(index, folder, pictures) if split is None else None
        if card is None:
            drawn = draw_card(index, folder) if pictures else remove_pictures(folder)
            card = draft_card(index, divided, drawn)
        save_split(folder, divided)
        index.save(folder, card)
    return index


def _unchanged_card(index: Index, folder: Path, pictures: bool) -> str | None:
    """Return the card that lies in the folder where it still describes the index: people have written on it."""
    try:
        before = Index.load(folder)
        card = (folder / "card.md").read_text(encoding="utf-8")
    except (ConfigError, IntegrityError, SecurityError, OSError, UnicodeDecodeError):
        return None
    drawn = any((folder / FOLDER).glob("*.png"))
    return card if (before.rows, before.ledger, drawn) == (index.rows, index.ledger, pictures) else None


def _replaceable(folder: Path) -> bool:
    """An index, finished or not, or nothing at all, may be written over."""
    return folder.is_dir() and (is_index(folder) or (folder / JOURNAL).is_file() or not any(folder.iterdir()))


def _salt(folder: Path) -> bytes:
    """Return the salt of an index folder, made now where there is none: a scan that goes on must find the same."""
    path = folder / "salt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as out:
                out.write(new_salt())
        salt = path.read_bytes()
    except OSError as error:
        raise OutputError(f"the index cannot be written to '{folder}': {error.strerror or error}") from error
    if len(salt) != SALT_BYTES:
        raise IntegrityError(f"the salt of the index '{folder}' is damaged; choose another --out")
    return salt
