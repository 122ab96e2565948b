"""MLflow is optional, is told no name and no path, and can never hold up or end a run."""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import threading
import types
from dataclasses import dataclass

import pytest

from geomed_mae.errors import ConfigError, Preempted
from geomed_mae.recipe_file import build_recipe
from geomed_mae.training.mlflow_log import KEPT_RUN, NEUTRAL, MlflowLog
from geomed_mae.training.run import RunFolder

RECIPE = {
    "data": {"modality": "/home/JANE_DOE/my.yaml", "crop_2d": [16, 16], "cache_dir": "/scratch/JANE_DOE"},
    "model": {"patch_2d": [4, 4], "init": "/home/JANE_DOE/encoder"},
    "train": {"lr": 0.002},
}


class MlflowException(Exception):
    pass


@dataclass
class Metric:
    key: str
    value: float
    timestamp: int
    step: int


class Server:
    """What a tracking server knows, and a switch that takes it down."""

    def __init__(self) -> None:
        self.metrics, self.params, self.tags, self.ended, self.made, self.uri = [], {}, {}, [], 0, None
        self.down: Exception | None = None
        self.hold = threading.Event()
        self.hold.set()


@pytest.fixture
def server(monkeypatch):
    server = Server()

    class MlflowClient:
        def __init__(self, tracking_uri):
            server.uri = tracking_uri

        def __getattribute__(self, name):
            server.hold.wait()
            if server.down is not None and not name.startswith("__"):
                raise server.down
            return object.__getattribute__(self, name)

        def get_experiment_by_name(self, name):
            return None

        def create_experiment(self, name):
            return "7"

        def create_run(self, experiment, tags, run_name):
            server.made += 1
            server.tags = tags
            return types.SimpleNamespace(info=types.SimpleNamespace(run_id=f"run{server.made}"))

        def update_run(self, run, status):
            server.ended.append((run, status))

        def log_param(self, run, name, value):
            server.params[name] = value

        def log_batch(self, run, metrics):
            server.metrics += [(run, one.key, one.value, one.step) for one in metrics]

        def set_terminated(self, run, status):
            server.ended.append((run, status))

    package = types.ModuleType("mlflow")
    package.MlflowClient = MlflowClient
    package.exceptions, package.entities = types.ModuleType("mlflow.exceptions"), types.ModuleType("mlflow.entities")
    package.exceptions.MlflowException, package.entities.Metric = MlflowException, Metric
    for name, module in (("", package), (".exceptions", package.exceptions), (".entities", package.entities)):
        monkeypatch.setitem(sys.modules, f"mlflow{name}", module)
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_ALLOW_FILE_STORE", "MLFLOW_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.setenv(name, "") if name == "MLFLOW_TRACKING_URI" else None
    return server


@contextlib.contextmanager
def opened(tmp_path, **how):
    """The log of a run, closed as a run folder closes it."""
    log = MlflowLog("brains", tmp_path, build_recipe(RECIPE), **how)
    try:
        yield log
    except BaseException as error:
        log.close(type(error))
        raise
    log.close()


def test_numbers_arrive_with_their_steps_and_flags_do_not(server, tmp_path):
    with opened(tmp_path) as log:
        for step in range(1, 4):
            log.record({"step": step, "loss": 1 / step, "lr": None, "skipped": True})
    assert server.metrics == [("run1", "loss", 1 / step, step) for step in range(1, 4)]
    assert server.ended == [("run1", "FINISHED")]


def test_no_user_script_or_path_is_sent_and_settings_are(server, tmp_path):
    with opened(tmp_path):
        pass
    assert server.tags == NEUTRAL and {"mlflow.user", "mlflow.source.name"} <= set(NEUTRAL)
    assert server.params["train.lr"] == "0.002" and server.params["train.optimizer"] == "muon"
    assert "JANE_DOE" not in str(server.params)


def test_without_an_address_numbers_stay_in_the_run_and_nothing_is_reported_home(server, tmp_path, monkeypatch):
    import os

    with opened(tmp_path):
        pass
    assert str(tmp_path) in server.uri and server.uri.startswith(("file:", "sqlite:"))
    assert os.environ["MLFLOW_DISABLE_TELEMETRY"] == "true"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    with opened(tmp_path):
        pass
    assert server.uri == "http://127.0.0.1:5000"


def test_a_resumed_run_goes_on_where_it_was(server, tmp_path):
    with pytest.raises(Preempted), opened(tmp_path):
        raise Preempted("saved")
    assert server.ended == [("run1", "KILLED")]
    with opened(tmp_path, resumed=True) as log:
        log.record({"step": 9, "loss": 0.5})
    assert server.made == 1 and server.metrics == [("run1", "loss", 0.5, 9)]
    (tmp_path / KEPT_RUN).write_text("{")
    with opened(tmp_path, resumed=True):
        pass
    assert server.made == 2 and json.loads((tmp_path / KEPT_RUN).read_text())["run_id"] == "run2"


@pytest.mark.parametrize("error", [MlflowException("500"), ConnectionError("refused")])
def test_a_server_that_is_away_costs_one_warning_and_gets_its_lines_later(server, tmp_path, caplog, error):
    caplog.set_level(logging.WARNING)
    server.down = error
    with opened(tmp_path) as log:
        for step in range(5):
            log.record({"step": step, "loss": 1.0})
        while not caplog.records:
            pass
        server.down = None
    assert [line[3] for line in server.metrics] == list(range(5))
    assert len(caplog.records) == 1 and "the run goes on" in caplog.text


def test_a_server_that_goes_away_while_a_run_is_made_has_one_run_and_all_settings(server, tmp_path, caplog):
    class Params(dict):
        def __setitem__(self, name, value):
            if len(self) == 3 and not caplog.records:
                raise ConnectionError("refused")
            super().__setitem__(name, value)

    caplog.set_level(logging.WARNING)
    server.params = Params()
    with opened(tmp_path) as log:
        log.record({"step": 1, "loss": 1.0})
        while not caplog.records:
            pass
        log.record({"step": 2, "loss": 1.0})
    assert server.made == 1 and server.params["train.lr"] == "0.002" and len(server.params) > 20
    assert [line[3] for line in server.metrics] == [1, 2]


def test_a_server_that_hangs_holds_up_nothing(server, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("geomed_mae.training.mlflow_log.PATIENCE_S", 0.05)
    server.hold.clear()
    with opened(tmp_path) as log:
        for step in range(1000):
            log.record({"step": step, "loss": 1.0})
    assert "did not answer in time" in caplog.text
    server.hold.set()


def test_many_lines_are_sent_in_batches_that_the_server_takes(server, tmp_path):
    server.hold.clear()
    with opened(tmp_path) as log:
        for step in range(700):
            log.record({"step": step, "loss": 1.0, "lr": 0.1, "gradient_norm": 1.0})
        server.hold.set()
    assert len(server.metrics) == 2100 and [line[3] for line in server.metrics[::3]] == list(range(700))


def test_a_missing_package_is_named_before_the_run_starts(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow", None)
    recipe = build_recipe({**RECIPE, "train": {"mlflow": "brains"}})
    with pytest.raises(ConfigError, match="pip install mlflow"):
        RunFolder(tmp_path / "run", recipe, environment={}, archive={"fingerprint": "f"})
    assert not (tmp_path / "run").exists()


def test_a_run_folder_sends_what_it_records_and_an_overwritten_one_begins_anew(server, tmp_path):
    recipe = build_recipe({**RECIPE, "train": {"mlflow": "brains"}})
    how = {"environment": {}, "archive": {"fingerprint": "f"}}
    with RunFolder(tmp_path / "run", recipe, **how) as run:
        run.record({"step": 1, "loss": 0.5, "lr": float("nan")})
    assert server.metrics == [("run1", "loss", 0.5, 1)] and server.ended == [("run1", "FINISHED")]
    with RunFolder(tmp_path / "run", recipe, overwrite=True, **how):
        pass
    assert server.made == 2
