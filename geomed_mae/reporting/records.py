"""What a run folder says about itself, whether the run has finished, goes on, or was stopped."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.safe_yaml import read_yaml

RECIPE, METRICS = "recipe.resolved.yaml", "metrics.jsonl"


@dataclass(frozen=True, slots=True)
class Records:
    """Records of a run.

    Attributes:
        path: the run folder.
        summary: of a finished run, else None.
        metrics: lines of metrics.jsonl.
        recipe: the resolved recipe as plain values, {} where it does not parse.
        archive, environment: what was recorded, {} without.
    """

    path: Path
    summary: dict[str, Any] | None
    metrics: list[dict[str, Any]]
    recipe: dict[str, Any]
    archive: dict[str, Any]
    environment: dict[str, Any]

    @property
    def verb(self) -> str:
        """Return what the run does: pretrain or finetune."""
        return (self.summary or {}).get("verb") or ("finetune" if self.recipe.get("head") else "pretrain")

    @property
    def planned(self) -> int | None:
        """Steps of the whole run, None where the recipe does not say."""
        steps = self._train.get("steps")
        return steps if isinstance(steps, int) else None

    @property
    def done(self) -> int:
        """Steps that are done, as far as the log knows."""
        logged = [int(line["step"]) for line in self.metrics if isinstance(line.get("step"), int)]
        return int((self.summary or {}).get("steps") or max(logged, default=0))

    @property
    def resumed(self) -> list[int]:
        """Steps at which the run was resumed."""
        return [int(line["step"]) for line in self.metrics if line.get("resumed")]

    @property
    def skipped(self) -> list[int]:
        """Steps that were skipped because loss or gradients were not finite."""
        return [int(line["step"]) for line in self.metrics if line.get("skipped")]

    @property
    def batch_size(self) -> int | None:
        """Samples per step, None where the recipe does not say."""
        size = self._train.get("batch_size")
        return size if isinstance(size, int) else None

    @property
    def _train(self) -> dict[str, Any]:
        train = self.recipe.get("train")
        return train if isinstance(train, dict) else {}

    def values(self, key: str) -> list[tuple[int, float]]:
        """Return (step, value) of each line that has a number under `key`."""
        return [
            (int(line["step"]), float(line[key]))
            for line in self.metrics
            if isinstance(line.get(key), int | float) and not isinstance(line[key], bool)
        ]

    def last(self, key: str) -> float | None:
        """Return the newest number under `key`, None without one."""
        found = self.values(key)
        return found[-1][1] if found else None


def read_run(run: Path) -> Records:
    """Read the records of a run.

    Raises:
        ConfigError: the folder is no run, or one that has not logged anything yet.
        IntegrityError: a record does not parse.
    """
    if not (run / RECIPE).is_file():
        raise ConfigError(f"'{run}' is no run: it has no {RECIPE}")
    try:
        metrics, summary = _lines(run / METRICS), _object(run / "summary.json")
        archive, environment = _object(run / "archive.json"), _object(run / "environment.json")
        found = Records(run, summary or None, metrics, _recipe(run), archive, environment)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise IntegrityError(f"the records of the run '{run}' are damaged: {error}") from error
    if not metrics and not summary:
        raise ConfigError(
            f"the run '{run}' has logged no step yet; wait for its first line (train.log_every), or continue it with "
            "--resume"
        )
    return found


def read_study(folder: Path) -> Records:
    """Read what a study says about itself; it has no metrics of its own.

    Raises:
        IntegrityError: a record does not parse.
    """
    try:
        return Records(folder, _object(folder / "summary.json") or None, [], _recipe(folder), {}, {})
    except (OSError, ValueError) as error:
        raise IntegrityError(f"the records of the study '{folder}' are damaged: {error}") from error


def without_folders(value: Any) -> Any:
    """Return a recipe with the last part of each path alone: a report is passed on, and folders name people."""
    if isinstance(value, dict):
        return {key: without_folders(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [without_folders(entry) for entry in value]
    return re.split(r"[/\\]", value.rstrip("/\\"))[-1] if isinstance(value, str) else value


def _object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{path.name} holds no object")
    return found


def _lines(path: Path) -> list[dict[str, Any]]:
    """Read metrics.jsonl. A run that goes on may be writing its last line, and one that was killed may have cut it."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1].splitlines()
    if not whole and text:
        whole = [text]
    return [json.loads(line) for line in whole]


def _recipe(run: Path) -> dict[str, Any]:
    try:
        found = read_yaml(run / RECIPE)
    except ConfigError:
        return {}
    return found if isinstance(found, dict) else {}
