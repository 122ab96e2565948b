"""scores.json: all that was scored, image by image, so that runs can be compared later without predicting again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError, IntegrityError, OutputError
from geomed_mae.scoring.classification import ClassificationScores
from geomed_mae.scoring.segmentation import SegmentationScores

FILE = "scores.json"
FORMAT, VERSION = "geomed-mae scores", 1

Scores = SegmentationScores | ClassificationScores
KINDS: dict[str, type[Scores]] = {kind.task: kind for kind in (SegmentationScores, ClassificationScores)}


def save_scores(path: Path, scores: Scores) -> None:
    """Write all scores; a reader sees the old file or the new one, never a part.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    text = json.dumps({"format": FORMAT, "version": VERSION, **scores.to_json()}, allow_nan=False)
    try:
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"'{path.name}' cannot be written: {error.strerror or error}") from error


def load_scores(path: Path) -> Scores:
    """Read what `save_scores` has written.

    Raises:
        ConfigError: there is no such file, or it is of another version.
        IntegrityError: it is damaged.
    """
    try:
        data: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConfigError(f"'{path}' does not exist; a finished finetune run leaves it") from error
    except (OSError, ValueError) as error:
        raise IntegrityError(f"'{path}' is damaged: {error}") from error
    if not isinstance(data, dict) or (data.get("format"), data.get("version")) != (FORMAT, VERSION):
        raise ConfigError(f"'{path}' is no file of '{FORMAT}' version {VERSION}")
    try:
        return KINDS[data["task"]].from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise IntegrityError(f"'{path}' is damaged: {error!r}") from error
