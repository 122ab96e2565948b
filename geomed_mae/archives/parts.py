"""The parts of a stored split, as a task uses them: one to train on, one to score, one that early stopping looks at."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from geomed_mae.archives.index import Index, is_index
from geomed_mae.archives.split_file import load_split
from geomed_mae.errors import ConfigError

TRAIN, VALIDATION, TEST = "train", "validation", "test"
ALSO_CALLED = {"training": TRAIN, "val": VALIDATION, "valid": VALIDATION, "dev": VALIDATION}
"""Names of parts that `scan --split-shares` is often given for these."""


def stored_parts(paths: Sequence[str | Path], index: Index) -> dict[str, str] | None:
    """Return key -> "train", "validation" or "test" as stored with the indexes; what was set aside is left out.

    Args:
        paths: as given to `open_archive`.
        index: what that returned, or a part of it; the keys that are asked for.

    Returns:
        None where a path is no INDEX, or none with a split: then a split has to be drawn.

    Raises:
        ConfigError: the split has parts of other names, of which nobody can say what they are for.
        IntegrityError: a split is damaged.
    """
    parts: dict[str, str] = {}
    for path in map(Path, paths):
        split = load_split(path) if is_index(path) else None
        if split is None:
            return None
        meant = {name: ALSO_CALLED.get(name.casefold(), name.casefold()) for name in split.request.names}
        if not {TRAIN, TEST} <= set(meant.values()):
            raise ConfigError(
                f"the split of '{path}' has the parts {', '.join(meant)}, and none says that it is {TRAIN} or {TEST}; "
                "name one of them with --split, within which patients or scenes are then held out, or scan with "
                "--split-shares train=...,test=..."
            )
        parts |= {key: meant[name] for key, name in split.parts.items() if name in meant}
    wanted = {row.key for row in index.rows}
    return {key: part for key, part in parts.items() if key in wanted}
