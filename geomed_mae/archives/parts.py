"""The parts of a stored split, as a task uses them: one to train on, one to score, one that early stopping looks at."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from geomed_mae.archives.index import Index, is_index
from geomed_mae.archives.split_file import load_split
from geomed_mae.errors import ConfigError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
ALSO_CALLED = {"training": TRAIN, "val": VALIDATION, "valid": VALIDATION, "dev": VALIDATION}
"""Names of parts that `scan --split-shares` is often given for these."""

_LOG = logging.getLogger(__name__)


def stored_parts(paths: Sequence[str | Path], index: Index) -> dict[str, str] | None:
    """Return key -> "train", "validation" or "test" as stored with the indexes; what is in no such part is left out.

    Args:
        paths: as given to `open_archive`.
        index: what that returned, or a part of it; the keys that are asked for.

    Returns:
        None where a path is no INDEX, or none with a split: then a split has to be drawn. Where others have one, a log
        line says that it is not used.

    Raises:
        ConfigError: the split has parts of other names, of which nobody can say what they are for.
        IntegrityError: a split is damaged.
    """
    parts: dict[str, str] = {}
    splits = {path: load_split(path) if is_index(path) else None for path in map(Path, paths)}
    if None in splits.values():
        if any(split is not None for split in splits.values()):
            _LOG.warning(
                "not all of the archives have a stored split, so that none is used and parts are drawn anew; scan all "
                "of them into one INDEX with --split to keep one"
            )
        return None
    for path, split in splits.items():
        meant = {name: ALSO_CALLED.get(name.casefold(), name.casefold()) for name in split.request.names}
        if not {TRAIN, TEST} <= set(meant.values()):
            raise ConfigError(
                f"the split of '{path}' has the parts {', '.join(meant)}, and none says that it is {TRAIN} or {TEST}; "
                "name one of them (data.split of a recipe, --split of probe), within which patients or scenes are then "
                "held out, or scan with --split-shares train=...,test=..."
            )
        found = {key: meant.get(name) for key, name in split.parts.items()}
        parts |= {key: name for key, name in found.items() if name in (TRAIN, VALIDATION, TEST)}
    wanted = {row.key for row in index.rows}
    return {key: part for key, part in parts.items() if key in wanted}
