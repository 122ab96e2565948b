"""The run folder: who may write to it, what goes on from where, and everything that is recorded about a run.

    recipe.resolved.yaml   every setting, as it was used
    environment.json       versions, CPU count, device, precision, fingerprint of the archive
    metrics.jsonl          one JSON object a log line
    tensorboard/           the same for TensorBoard
    train.log              messages
    checkpoints/           see `training.checkpoint`
    encoder/ panels/       what the verbs add
    private/               what patients could be guessed from (`archives.seen`): mode 0700, never handed on
    summary.json           final numbers; only a finished run has it

Host names, users, paths and file names of the archive are written nowhere.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import json
import logging
import math
import os
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from pydantic import BaseModel

from geomed_mae.archives.seen import PRIVATE_FOLDER
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError, IntegrityError, OutputError
from geomed_mae.recipe_file import dump_recipe, load_recipe
from geomed_mae.training.checkpoint import Checkpoint, load, newest_valid, step_folder
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.events import EventFile
from geomed_mae.training.mlflow_log import MlflowLog, require_mlflow

RECIPE, ENVIRONMENT, METRICS, LOG = "recipe.resolved.yaml", "environment.json", "metrics.jsonl", "train.log"
SUMMARY, LOCK = "summary.json", ".lock"
FILES = (RECIPE, ENVIRONMENT, METRICS, LOG, SUMMARY, LOCK, "report.html", "archive.json", "scores.json", "mlflow.json")
FOLDERS = ("checkpoints", "encoder", "model", "panels", "tensorboard", "mlruns", "cache", PRIVATE_FOLDER)
"""All that a run consists of; --overwrite deletes these and nothing else."""

PARTIAL = ".{}.partial"
"""Name of a file that is being written."""

PACKAGES = ("geomed-mae", "torch", "timm", "numpy", "safetensors", "rasterio", "pydicom", "nibabel", "monai")
LOGGED = ("geomed_mae.training", "geomed_mae.samples", "geomed_mae.pretrain", "geomed_mae.finetune")
"""Loggers whose messages reach train.log. Those of readers may name files and stay out."""


_locks: set[int] = set()
"""Descriptors of the locks that this process holds."""


def _leave_locks_to_the_parent() -> None:
    """Close the copies that a forked process has: a loader worker that outlives a killed run must not hold its lock."""
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_leave_locks_to_the_parent)


def is_run(folder: Path) -> bool:
    """Return whether `folder` holds a run."""
    return (folder / RECIPE).is_file() and (folder / ENVIRONMENT).is_file()


@contextlib.contextmanager
def _writing(what: str) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(
            f"{what} cannot be written: {error.strerror or error}; make room or give permission"
        ) from error


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write `data` so that a reader sees the old file or the new one, never a part.

    Raises:
        OutputError: it cannot be written.
    """
    _write_text(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def _write_text(path: Path, text: str) -> None:
    with _writing(path.name):
        partial = path.with_name(PARTIAL.format(path.name))
        partial.write_text(text, encoding="utf-8")
        partial.replace(path)


def science_differences(old: BaseModel, new: BaseModel, prefix: str = "") -> list[str]:
    """Return "key: old -> new" of every field that changes results and is not the same."""
    found = []
    for name, info in type(new).model_fields.items():
        before, after = getattr(old, name), getattr(new, name)
        if isinstance(before, BaseModel) and isinstance(after, BaseModel):
            found += science_differences(before, after, f"{prefix}{name}.")
        elif before != after and (info.json_schema_extra or {"group": "science"})["group"] == "science":
            found.append(f"{prefix}{name}: {_shown(before)} -> {_shown(after)}")
    return found


def _shown(value: Any) -> str:
    return f"({type(value).__name__})" if isinstance(value, BaseModel) else str(value)


def describe_environment(device: torch.device, precision: str) -> dict[str, Any]:
    """Return versions and hardware, without anything that names the machine, its user or its folders."""
    versions = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "python": platform.python_version(),
        "system": platform.system(),
        "versions": versions,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": f"{device.type} ({name})",
        "precision": precision,
    }


class RunFolder:
    """An open, locked run folder. Use as a context manager.

    Attributes:
        path: the folder.
        resumed: the checkpoint to go on from; None starts at step 0.
    """

    def __init__(
        self,
        out: Path,
        recipe: Recipe,
        *,
        environment: dict[str, Any],
        archive: dict[str, Any],
        resume: bool = False,
        overwrite: bool = False,
    ) -> None:
        """Open or make the run folder `out`.

        Args:
            out: the folder; it is made where it does not exist.
            recipe: what the run does.
            environment: see `describe_environment`.
            archive: `fingerprint`, with fine-tuning the hash of the `encoder`, and anything else that is no identifier.
            resume: go on from the newest valid checkpoint; where there is no run yet, start one.
            overwrite: delete the run that is there.

        Raises:
            ConfigError: `out` holds a run and neither option is given, or holds something else.
            IntegrityError: the run was made with another recipe, archive or encoder, or no checkpoint verifies.
            OutputError: the folder cannot be written, or another process writes to it.
        """
        if resume and overwrite:
            raise ConfigError("--resume and --overwrite exclude one another")
        require_mlflow(recipe)
        self.path = Path(out)
        present = is_run(self.path)
        if present and not (resume or overwrite):
            raise ConfigError(f"'{out}' already holds a run; continue it with --resume or replace it with --overwrite")
        if not present and self.path.exists():
            self._check_unused()
        with _writing(f"the run folder '{out}'"):
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = self._locked()
        try:
            self.resumed = self._check_same(recipe, archive) if present and resume else None
            if present and overwrite:
                self._clear()
            self._begin(recipe, {**environment, "archive": archive})
        except BaseException:
            self._unlock()
            raise

    def _check_unused(self) -> None:
        if not self.path.is_dir():
            raise ConfigError(f"'{self.path}' is a file; --out takes a folder")
        # What a killed start may have left behind is not in the way.
        known = {*FILES, *FOLDERS, *map(PARTIAL.format, FILES)}
        foreign = sorted(entry.name for entry in self.path.iterdir() if entry.name not in known)
        if foreign:
            raise ConfigError(
                f"'{self.path}' is not empty and holds no run (found '{foreign[0]}'); give a new or an empty folder"
            )

    def _locked(self) -> int:
        descriptor = os.open(self.path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise OutputError(f"another process is writing the run '{self.path}'; wait for it or stop it") from None
        _locks.add(descriptor)
        return descriptor

    def _unlock(self) -> None:
        _locks.discard(self._lock)
        os.close(self._lock)

    def _clear(self) -> None:
        with _writing(f"the run folder '{self.path}'"):
            for name in FILES:
                if name != LOCK:
                    (self.path / name).unlink(missing_ok=True)
                    (self.path / PARTIAL.format(name)).unlink(missing_ok=True)
            for name in FOLDERS:
                if (self.path / name).exists():
                    shutil.rmtree(self.path / name)

    def _check_same(self, recipe: Recipe, archive: dict[str, Any]) -> Checkpoint | None:
        """Return the checkpoint to go on from, after making sure that recipe and archive are those of the run."""
        try:
            before = json.loads((self.path / ENVIRONMENT).read_text(encoding="utf-8"))["archive"]
            old = load_recipe(self.path / RECIPE)
        except (ValueError, KeyError) as error:
            raise IntegrityError(f"the run '{self.path}' is damaged ({error}); start again with --overwrite") from error
        if differences := science_differences(old, recipe):
            raise IntegrityError(
                f"the run '{self.path}' was made with another recipe ({'; '.join(differences)}); resume with the same "
                "one, or start another run"
            )
        if before["fingerprint"] != archive["fingerprint"]:
            raise IntegrityError(
                f"the run '{self.path}' was made from another archive ({before.get('images')} images, now "
                f"{archive.get('images')}, or other pixels); resume with the same one, or start another run"
            )
        if "encoder" in before and before["encoder"] != archive.get("encoder"):
            raise IntegrityError(
                f"the run '{self.path}' was made from another encoder; resume with the same one, or start another run"
            )
        return newest_valid(self.checkpoints)

    def _begin(self, recipe: Recipe, environment: dict[str, Any]) -> None:
        step = self.resumed.step if self.resumed else 0
        with _writing(f"the run folder '{self.path}'"):
            # The recipe last: a folder counts as a run when both files are there.
            write_json(self.path / ENVIRONMENT, environment)
            _write_text(self.path / RECIPE, dump_recipe(recipe))
            (self.path / SUMMARY).unlink(missing_ok=True)
            self._keep_metrics_until(step)
            self._metrics = (self.path / METRICS).open("a", encoding="utf-8")
            self._events = EventFile(self.path / "tensorboard", step)
            self._handler = logging.FileHandler(self.path / LOG, encoding="utf-8")
        self._handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        self._handler.addFilter(lambda entry: entry.name.startswith(LOGGED))
        self._logger = logging.getLogger("geomed_mae")
        self._level = self._logger.level
        self._logger.addHandler(self._handler)
        self._logger.setLevel(min(self._level or logging.INFO, logging.INFO))
        name, resumed = recipe.train.mlflow, self.resumed is not None
        self._mlflow = None if name is None else MlflowLog(name, self.path, recipe, resumed=resumed)

    def _keep_metrics_until(self, step: int) -> None:
        """Drop the lines of steps that are going to be done again."""
        path = self.path / METRICS
        if path.exists():
            kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
            _write_text(path, "".join(f"{line}\n" for line in kept))

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def record(self, line: dict[str, Any]) -> None:
        """Append one line to metrics.jsonl, TensorBoard and MLflow; NaN and infinity become null.

        Raises:
            OutputError: disk full, for example.
        """
        clean = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in line.items()
        }
        scalars = {
            name: float(value)
            for name, value in clean.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step"
        }
        with _writing(METRICS):
            self._metrics.write(json.dumps(clean) + "\n")
            self._metrics.flush()
            self._events.scalars(int(clean["step"]), scalars)
        if self._mlflow is not None:
            self._mlflow.record(clean)

    def metrics(self) -> list[dict[str, Any]]:
        """Return the lines recorded so far, those of earlier sessions included."""
        return [json.loads(line) for line in (self.path / METRICS).read_text(encoding="utf-8").splitlines()]

    def finish(self, summary: dict[str, Any]) -> dict[str, Any]:
        """Write summary.json, the mark of a finished run, and return its content."""
        write_json(self.path / SUMMARY, summary)
        return summary

    def close(self) -> None:
        """Close all files and give the folder free."""
        self._logger.removeHandler(self._handler)
        self._logger.setLevel(self._level)
        self._handler.close()
        self._events.close()
        self._metrics.close()
        self._unlock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._mlflow is not None:
            self._mlflow.close(kind)
        self.close()


class FollowedRun:
    """The run folder for the processes that do not write to it; same interface as far as training needs it."""

    def __init__(self, path: Path, step: int | None) -> None:
        """Follow the run at `path`, which goes on from the checkpoint of `step`; None begins.

        Raises:
            IntegrityError: this process reads other bytes there than the first one.
        """
        self.path, self.checkpoints = path, path / "checkpoints"
        self.resumed = None if step is None else load(step_folder(self.checkpoints, step))

    def record(self, line: dict[str, Any]) -> None:
        """Do nothing: the first process records."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def open_run(out: Path, recipe: Recipe, ranks: Ranks, **how: Any) -> RunFolder | FollowedRun:
    """Open the run folder in the first process, and follow it in the others; arguments as of RunFolder.

    Raises:
        GeomedError: what RunFolder raises, in all processes.
    """
    opened: list[RunFolder] = []

    def first() -> int | None:
        opened.append(RunFolder(out, recipe, **how))
        return opened[0].resumed.step if opened[0].resumed else None

    step = ranks.first_does(first)
    return opened[0] if opened else FollowedRun(Path(out), step)


def _step_of(line: str) -> float:
    """Return the step of a line of metrics.jsonl; infinity for one that a crash has cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
