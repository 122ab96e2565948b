"""The command line: help, exit codes, one clear sentence for each kind of bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click
import numpy as np
import pytest
from click.testing import CliRunner, Result

from geomed_mae import cli, errors
from geomed_mae.cli.group import Command
from geomed_mae.cli.options import Fraction
from geomed_mae.plugins import plugin_names
from tests.make_data import write_geotiff

CONTRACT = {
    "doctor", "scan", "inspect", "pretrain", "finetune", "evaluate", "probe", "predict", "embed", "reconstruct",
    "export", "report", "demo",
}  # fmt: skip


def run(*args: object) -> Result:
    return CliRunner().invoke(cli.main, [str(arg) for arg in args])


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    path = tmp_path / "scene.tif"
    write_geotiff(path, np.random.default_rng(0).integers(1, 255, (6, 48, 48)).astype(np.uint8))
    return path


def test_the_commands_are_those_of_the_contract():
    assert set(cli.main.commands) == CONTRACT


@pytest.mark.parametrize("name", sorted(CONTRACT))
def test_every_command_has_help_with_an_example_whose_options_exist(name):
    result = run(name, "--help")
    assert result.exit_code == 0
    example = re.search(r"Example:\s+(geomed-mae .*(?:\n      .*)*)", result.output)
    assert example, result.output
    command = cli.main.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    words = " ".join(example[1].split()).split()
    assert words[1] == name
    assert {word for word in words if word.startswith("--")} <= known
    assert all(p.help for p in command.params if isinstance(p, click.Option)), "an option without help"


def test_every_command_is_in_the_readme():
    text = (Path(__file__).parents[1] / "README.md").read_text()
    assert [name for name in sorted(CONTRACT) if f"geomed-mae {name}" not in text] == []


def test_archive_takes_several_values_after_one_flag():
    @click.command(cls=Command)
    @click.argument("run")
    @click.option("--archive", multiple=True)
    @click.option("--out")
    def command(run, archive, out):
        click.echo(f"{run} {archive} {out}")

    result = CliRunner().invoke(command, ["r", "--archive", "a", "b", "c", "--out", "o"])
    assert result.output.strip() == "r ('a', 'b', 'c') o"
    result = CliRunner().invoke(command, ["r", "--out", "o", "--archive", "a", "--archive", "b"])
    assert result.output.strip() == "r ('a', 'b') o"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("m"), 2),
        (errors.MissingExtraError("reading geotiff", "rasterio", "geo"), 2),
        (errors.ReadError("m", "NOT_TIFF"), 3),
        (errors.TooManyBadInputsError("m"), 3),
        (errors.OutputError("m"), 4),
        (errors.IntegrityError("m"), 5),
        (errors.LeakageError("m"), 6),
        (errors.SecurityError("m"), 7),
        (errors.NumericalError("m"), 8),
        (errors.Preempted("m"), 75),
        (PermissionError(13, "Permission denied", "somewhere"), 4),
        (RuntimeError("surprise"), 1),
    ],
)
def test_errors_become_exit_codes_and_one_sentence(monkeypatch, error, code):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr("geomed_mae.doctor.doctor", fail)
    result = run("doctor")
    assert result.exit_code == code
    assert "error: " in result.stderr
    assert ("Traceback" in result.stderr) == (code == 1)


def test_scan_prints_the_index_on_stdout_and_the_ledger_on_stderr(scene, tmp_path):
    result = run("scan", scene, "--out", tmp_path / "index", "--modality", "landsat7")
    assert result.exit_code == 0
    assert result.stdout.strip() == str(tmp_path / "index")
    assert "1 files = 1 used + 0 skipped + 0 unsupported" in result.stderr


def test_scan_refuses_to_write_over_something_else(scene, tmp_path):
    result = run("scan", scene, "--out", tmp_path)
    assert result.exit_code == 2
    assert "exists and is not an index" in result.stderr


def test_a_missing_path_a_text_file_and_an_empty_folder(tmp_path):
    (tmp_path / "fake.tif").write_text("hello")
    (tmp_path / "empty").mkdir()
    missing = run("inspect", tmp_path / "nowhere.tif")
    assert (missing.exit_code, "does not exist" in missing.stderr) == (2, True)
    fake = run("inspect", tmp_path / "fake.tif")
    assert fake.exit_code == 3
    assert "error: fake.tif cannot be used: not a TIFF by its first bytes" in fake.stderr
    empty = run("scan", tmp_path / "empty", "--out", tmp_path / "index")
    assert empty.exit_code == 3
    assert "holds no files" in empty.stderr


def test_a_cluster_that_does_not_answer_is_a_usage_error(scene, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("geomed_mae.archives.workers.CONNECT_SECONDS", 0.5)
    result = run("scan", scene, "--out", tmp_path / "index", "--dask", "tcp://127.0.0.1:9")
    assert result.exit_code == 2
    assert "error: no Dask scheduler answers at 'tcp://127.0.0.1:9'" in result.stderr


def test_scan_verifies_what_it_scanned_before(scene, tmp_path):
    index = tmp_path / "index"
    early = run("scan", scene, "--out", index, "--modality", "landsat7", "--verify")
    assert early.exit_code == 2 and "holds no earlier scan to compare with" in early.stderr
    for how in ((), ("--verify",), ("--workers", 2)):
        assert run("scan", scene, "--out", index, "--modality", "landsat7", *how).exit_code == 0


def test_inspect_shows_geometry_and_channels(scene):
    text = run("inspect", scene, "--modality", "landsat7")
    assert text.exit_code == 0
    assert "landsat7 raster" in text.stdout and "B7" in text.stdout
    found = json.loads(run("inspect", scene, "--modality", "landsat7", "--json").stdout)
    assert [channel["wavelength_nm"] for channel in found[0]["channels"]] == [485, 560, 660, 835, 1650, 2215]
    assert sum(found[0]["channels"][0]["histogram"]) > 0.98 * 48 * 48


@pytest.mark.parametrize(("text", "share"), [("1%", 0.01), ("0.25", 0.25), ("100%", 1.0)])
def test_shares_are_read_as_people_write_them(text, share):
    assert Fraction().convert(text, None, None) == share


@pytest.mark.parametrize("text", ["200%", "-1", "few"])
def test_a_share_that_is_none_is_refused(scene, tmp_path, text):
    result = run("scan", scene, "--out", tmp_path / "index", f"--max-bad={text}")
    assert result.exit_code == 2
    assert "is not a share such as 1% or 0.01" in result.stderr


def test_a_misspelt_recipe_key_names_the_nearest(scene, tmp_path):
    result = run(
        "pretrain", "pretrain_landsat7_tiny", "--archive", scene, "--out", tmp_path / "r", "--set", "train.stpes=5"
    )
    assert result.exit_code == 2
    assert "unknown key 'train.stpes'; did you mean 'steps'?" in result.stderr
    assert not (tmp_path / "r").exists()


def test_an_unknown_export_target_names_the_known_ones(tmp_path):
    result = run("export", tmp_path, "--to", "tim", "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert "did you mean 'timm'?" in result.stderr


def test_every_export_target_is_in_the_help():
    text = next(option.help for option in cli.main.commands["export"].params if "--to" in option.opts)
    names = [name.replace("_", "-") for name in plugin_names("exporters", marker="export")]
    assert [name for name in names if name not in re.split(r"[ ,.]+", text)] == []


def test_every_format_of_predict_is_in_the_help():
    text = next(option.help for option in cli.main.commands["predict"].params if "--format" in option.opts)
    names = [name.replace("_", "-") for name in plugin_names("writers", marker="SUFFIX")]
    assert [name for name in names if name not in re.split(r"[ ,.:]+", text)] == []


def test_doctor_finds_nothing_wrong_with_the_test_environment():
    result = run("doctor")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["problems"] == [p for p in json.loads(result.stdout)["problems"] if "disk" in p]
