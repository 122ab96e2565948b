"""MLflow, optional: the numbers that a run records go to an MLflow experiment as well.

Where to is MLflow's own business (MLFLOW_TRACKING_URI); without it a folder `mlruns` in the run, and no network. Lines
are sent by a thread of their own: a server that is slow, or away for a night, holds up no step and ends no run; there
is one warning, and what could not be sent is tried again with the next lines, up to MAX_LINES of them.

MLflow's client would record a user, a script and a git commit only if asked to; they are set to neutral values here,
and nothing of a recipe that may be a path is sent. A resumed run goes on in its MLflow run (`mlflow.json`).
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError, Preempted

URI = "MLFLOW_TRACKING_URI"
KEPT_RUN = "mlflow.json"
FOLDER = "mlruns"
MAX_LINES = 10_000
"""Lines that wait for a server; the oldest go first."""

BATCH = 500
"""Numbers sent at once; the server takes 1000 at most."""

PATIENCE_S = 30.0
"""How long the end of a run waits for the last lines."""

NEUTRAL = {"mlflow.user": "not recorded", "mlflow.source.name": "geomed-mae", "mlflow.source.type": "LOCAL"}
"""Tags that MLflow's own helpers fill with a login name and the path of a script."""

PATHS = ("data.modality", "data.cache_dir", "model.init")
"""Keys of a recipe that may hold a path."""

log = logging.getLogger(__name__)


class MlflowLog:
    """Sends lines to MLflow, from a thread that `close` ends.

    Args:
        experiment: its name; it is made where there is none.
        folder: the run folder.
        recipe: its numbers and choices become parameters.
        resumed: go on in the MLflow run that `mlflow.json` names.

    Raises:
        ConfigError: mlflow is not installed.
    """

    def __init__(self, experiment: str, folder: Path, recipe: Recipe, *, resumed: bool = False) -> None:
        self._mlflow = _package()
        self._errors = (self._mlflow.exceptions.MlflowException, OSError)
        self._experiment, self._folder, self._recipe, self._resumed = experiment, folder, recipe, resumed
        self._lines: deque[dict[str, Any]] = deque(maxlen=MAX_LINES)
        self._wake, self._stop = threading.Event(), threading.Event()
        self._client: Any = None
        self._run = ""
        self._unsent: list[tuple[str, str]] = []
        self._warned = False
        self._status = "FINISHED"
        self._thread = threading.Thread(target=self._send_all, name="mlflow", daemon=True)
        self._thread.start()

    def record(self, line: dict[str, Any]) -> None:
        """Take one line of metrics.jsonl; returns at once."""
        self._lines.append({**line, "time_ms": int(time.time() * 1000)})
        self._wake.set()

    def close(self, kind: type[BaseException] | None = None) -> None:
        """Send what is left, for PATIENCE_S at most, and end the MLflow run; `kind` of exception, if one ended ours."""
        self._status = "FINISHED" if kind is None else "KILLED" if kind in (KeyboardInterrupt, Preempted) else "FAILED"
        self._stop.set()
        self._wake.set()
        self._thread.join(PATIENCE_S)
        if self._thread.is_alive() or self._lines:
            self._warn("it did not answer in time")

    def _send_all(self) -> None:
        while not self._stop.is_set():
            self._wake.wait()
            self._wake.clear()
            self._try(self._flush)
        self._try(self._flush)
        self._try(self._end)

    def _try(self, action: Any) -> None:
        try:
            action()
        except self._errors as error:
            self._warn(type(error).__name__)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("MLflow takes no metrics (%s); the run goes on, metrics.jsonl has everything", why)

    def _flush(self) -> None:
        self._open()
        metric = self._mlflow.entities.Metric
        while self._lines:
            batch, taken = [], 0
            for line in list(self._lines):
                numbers = list(_numbers(line))
                if batch and len(batch) + len(numbers) > BATCH:
                    break
                batch += [metric(name, value, line["time_ms"], int(line["step"])) for name, value in numbers]
                taken += 1
            if batch:
                self._client.log_batch(self._run, metrics=batch)
            for _ in range(taken):
                self._lines.popleft()

    def _open(self) -> None:
        if self._client is not None:
            return
        client = self._mlflow.MlflowClient(tracking_uri=os.environ.get(URI) or _local(self._folder / FOLDER))
        kept = self._folder / KEPT_RUN
        # A server that goes away in the middle of this is not asked for a second run later.
        self._run = self._run or (_run_id(kept) if self._resumed else "")
        if self._run:
            client.update_run(self._run, status="RUNNING")
        else:
            found = client.get_experiment_by_name(self._experiment)
            number = client.create_experiment(self._experiment) if found is None else found.experiment_id
            self._run = client.create_run(number, tags=dict(NEUTRAL), run_name="geomed-mae").info.run_id
            kept.write_text(json.dumps({"experiment": self._experiment, "run_id": self._run}) + "\n", encoding="utf-8")
            self._unsent = list(_settings(self._recipe))
        while self._unsent:
            client.log_param(self._run, *self._unsent[0])
            del self._unsent[0]
        self._client = client

    def _end(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self._run, status=self._status)


def _local(folder: Path) -> str:
    """Return the address of a store in `folder`: a data base, or plain files with mlflow-skinny, which has no other."""
    folder.mkdir(exist_ok=True)
    if importlib.util.find_spec("sqlalchemy") is not None:
        return f"sqlite:///{folder.resolve() / 'mlflow.db'}"
    os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    return folder.resolve().as_uri()


def require_mlflow(recipe: Recipe) -> None:
    """Make sure that MLflow is there if the recipe wants it, before anything is written.

    Raises:
        ConfigError: it is not installed.
    """
    if recipe.train.mlflow is not None:
        _package()


def _run_id(kept: Path) -> str:
    """Return the MLflow run that an earlier session has begun, "" if none is known."""
    try:
        return str(json.loads(kept.read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return ""


def _package() -> Any:
    # MLflow reports its use to its makers unless told not to; nothing leaves this machine unasked.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    try:
        package = importlib.import_module("mlflow")
        importlib.import_module("mlflow.exceptions")
        importlib.import_module("mlflow.entities")
        return package
    except ImportError as error:
        raise ConfigError(
            "train.mlflow names an experiment, but MLflow is not installed: pip install mlflow (or mlflow-skinny), or "
            "set train.mlflow=null"
        ) from error


def _numbers(line: dict[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in line.items():
        if isinstance(value, int | float) and not isinstance(value, bool) and name not in ("step", "time_ms"):
            yield name, float(value)


def _settings(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _settings(value, f"{prefix}{name}.")
        elif value is not None and f"{prefix}{name}" not in PATHS and not prefix.startswith("labels."):
            yield f"{prefix}{name}", str(value)[:250]
