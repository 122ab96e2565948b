"""Folders of studies: how they are told from runs, and their members. Without torch: a report reads them too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError, IntegrityError

STUDY, RECIPE = "study.json", "recipe.resolved.yaml"
SHOWN = 6
"""Members that an error names."""


def is_study(folder: str | Path) -> bool:
    """Return whether `folder` holds a study."""
    return (Path(folder) / STUDY).is_file()


def members(folder: str | Path) -> list[Path]:
    """Return the run folders of a study, finished or not, in the order in which they run.

    Raises:
        IntegrityError: the record of the study is damaged.
    """
    folder = Path(folder)
    record = read_record(folder)
    planned = [folder / arm / f"seed-{seed}" for seed in record["seeds"] for arm in record["arms"]]
    return [path for path in planned if (path / RECIPE).is_file()]


def refuse_study(folder: str | Path, verb: str) -> None:
    """Refuse to use a study where one run is meant.

    Raises:
        ConfigError: `folder` is a study; the message names its members.
    """
    if not is_study(folder):
        return
    found = [str(path) for path in members(folder)]
    shown = ", ".join(found[:SHOWN]) + (", ..." if len(found) > SHOWN else "")
    raise ConfigError(
        f"'{folder}' is a study of {len(found)} runs, and {verb} takes one of them: {shown or 'none has begun yet'}"
    )


def read_record(folder: Path) -> dict[str, Any]:
    """Return what was planned: arms, seeds, fingerprint of the data, encoder, transductive.

    Raises:
        IntegrityError: the record is damaged.
    """
    try:
        found = json.loads((folder / STUDY).read_text(encoding="utf-8"))
        return {**found, "arms": list(found["arms"]), "seeds": [int(seed) for seed in found["seeds"]]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"{STUDY} of the study '{folder}' is damaged ({error}); start again with --overwrite"
        ) from error
