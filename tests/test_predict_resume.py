"""predict goes on where it was: killed, interrupted, without room on the disk, among files that are broken."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
from click.testing import CliRunner

from geomed_mae import cli
from geomed_mae.archives.build import open_archive
from geomed_mae.archives.seen import Seen
from geomed_mae.errors import ConfigError, OutputError, TooManyBadInputsError
from geomed_mae.heads.task_model import save_task_model
from geomed_mae.outputs import classifying, rounds
from geomed_mae.outputs.work import FOLDER, Work
from geomed_mae.predict import predict
from geomed_mae.scan import scan
from tests.heads.given import task_model
from tests.predicting import MEMORY
from tests.scenes import landsat_scene

SCENES = 3


def random_run(path: Path, index, task: str = "segment", seed: int = 0) -> Path:
    """A finished run with random weights that answers every window in its own way."""
    import torch

    model = task_model(index, "linear", task, crop=(16, 16))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    path.mkdir(parents=True)
    save_task_model(path, model, Seen.of(index, (), what="training"))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """scenes/, index/ and the runs maps/ and classes/ on them."""
    root = tmp_path_factory.mktemp("resume")
    for seed in range(SCENES):
        landsat_scene(root / "scenes" / f"{seed}.tif", None, shape=(50 + 4 * seed, 60), seed=seed, nodata=0)
    scan([root / "scenes"], root / "index", modality="landsat7", pictures=False)
    index = open_archive([root / "index"])
    random_run(root / "maps", index)
    random_run(root / "classes", index, "classify")
    return root


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of a few windows."""
    monkeypatch.setattr(rounds, "block_size", functools.partial(rounds.block_size, memory=MEMORY))


def contents(out: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


def interrupting(after: int):
    """A progress bar behind which somebody presses Ctrl-C after so many steps."""

    def progress(items, what, total):
        for number, item in enumerate(items):
            if number == after:
                raise KeyboardInterrupt
            yield item

    return progress


@pytest.mark.parametrize("given", ["index", pytest.param("scenes", marks=pytest.mark.slow)])
def test_a_predict_that_was_killed_goes_on_and_leaves_the_same_files(folder, tmp_path, given):
    done = subprocess.run(
        [sys.executable, "-m", "tests.predicting", "killed", folder / "maps", folder / given, tmp_path / "out"],
        env={**os.environ, "OMP_NUM_THREADS": "1", "SEED": given},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    seen = json.loads(done.stdout)
    assert [seen[name][0] for name in ("killed 0", "killed 1", "no room", "put together")] == [-9, -9, 1, -9]
    assert seen["result"]["resumed"]["blocks"] >= 1 and not (tmp_path / "out" / FOLDER).exists()
    again = contents(tmp_path / "out")
    assert len(seen["result"]["predictions"]) == SCENES and "discarded" not in seen["result"]
    result = seen.pop("result")
    assert all(set(names) <= set(again) for _, names in seen.values()), "what has its final name is whole"
    if given == "index":
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(rounds, "block_size", functools.partial(rounds.block_size, memory=MEMORY))
            predict(folder / "maps", [folder / "index"], tmp_path / "fresh")
        assert contents(tmp_path / "fresh") == again
    else:
        names = {Path(entry["output"]).stem for entry in result["predictions"]}
        assert {name.partition(".")[0] for name in again} - {"predictions"} == names, "raw files keep their names"


def test_what_is_finished_is_taken_over_unless_it_was_changed_or_is_to_be_overwritten(folder, tmp_path):
    first = predict(folder / "maps", [folder / "index"], tmp_path / "out")
    assert "resumed" not in first
    paths = [Path(entry["output"]) for entry in first["predictions"]]
    stamps, before = [path.stat().st_mtime_ns for path in paths], contents(tmp_path / "out")
    second = predict(folder / "maps", [folder / "index"], tmp_path / "out")
    assert second.pop("resumed") == {"images": SCENES, "blocks": 0} and second == first
    assert [path.stat().st_mtime_ns for path in paths] == stamps and contents(tmp_path / "out") == before
    paths[0].write_bytes(b"somebody else's")
    third = predict(folder / "maps", [folder / "index"], tmp_path / "out")
    assert third["resumed"]["images"] == SCENES - 1 and contents(tmp_path / "out") == before
    fourth = predict(folder / "maps", [folder / "index"], tmp_path / "out", overwrite=True)
    assert fourth == first and contents(tmp_path / "out") == before
    assert not {path.stat().st_mtime_ns for path in paths} & set(stamps)


def test_a_map_is_written_anew_where_the_same_pixels_were_given_another_place(folder, tmp_path):
    landsat_scene(tmp_path / "scenes" / "a.tif", None, shape=(40, 44))
    scan([tmp_path / "scenes"], tmp_path / "index", modality="landsat7", pictures=False)
    predict(folder / "maps", [tmp_path / "index"], tmp_path / "out")
    with rasterio.open(tmp_path / "scenes" / "a.tif", "r+") as scene:
        scene.transform = moved = scene.transform.translation(28.5, -57) @ scene.transform
    scan([tmp_path / "scenes"], tmp_path / "index", modality="landsat7", pictures=False)
    result = predict(folder / "maps", [tmp_path / "index"], tmp_path / "out")
    with rasterio.open(result["predictions"][0]["output"]) as found:
        assert found.transform == moved
    assert "resumed" not in result


def test_half_finished_work_of_another_model_or_setting_is_discarded_and_told(folder, tmp_path, small_blocks):
    index = open_archive([folder / "index"])
    other = random_run(tmp_path / "other", index, seed=1)
    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        predict(folder / "maps", [folder / "index"], out, progress=interrupting(10))
    blocks = len(list(out.rglob("*.block")))
    assert blocks >= 1 and not [path for path in out.iterdir() if path.is_file()]
    with pytest.raises(KeyboardInterrupt):
        predict(other, [folder / "index"], out, progress=interrupting(0))
    with pytest.raises(KeyboardInterrupt):
        predict(folder / "maps", [folder / "index"], out, progress=interrupting(10))
    result = predict(folder / "maps", [folder / "index"], out, batch=3)
    assert result["discarded"] == blocks and "resumed" not in result
    with pytest.raises(KeyboardInterrupt):
        predict(other, [folder / "index"], out, progress=interrupting(10))
    told = predict(other, [folder / "index"], out)
    assert told["resumed"]["blocks"] == blocks and "discarded" not in told
    with pytest.raises(KeyboardInterrupt):
        predict(folder / "maps", [folder / "index"], out, progress=interrupting(10))
    fresh = predict(folder / "maps", [folder / "index"], out, overwrite=True)
    assert "resumed" not in fresh


def test_a_damaged_block_is_computed_again(folder, tmp_path, small_blocks):
    out, fresh = tmp_path / "out", tmp_path / "fresh"
    with pytest.raises(KeyboardInterrupt):
        predict(folder / "maps", [folder / "index"], out, progress=interrupting(20))
    one = max(out.rglob("*.block"), key=lambda path: path.stat().st_size)
    data = bytearray(one.read_bytes())
    data[-3] ^= 1
    one.write_bytes(data)
    assert predict(folder / "maps", [folder / "index"], out)["discarded"] == 1
    predict(folder / "maps", [folder / "index"], fresh)
    assert contents(out) == contents(fresh)


def test_two_predicts_do_not_share_a_folder(folder, tmp_path):
    with Work(tmp_path / "out") as work:
        work.begin(keep_salt=False, overwrite=False)
        with pytest.raises(OutputError, match="another process predicts into"):
            predict(folder / "maps", [folder / "index"], tmp_path / "out")


def test_the_lock_of_a_folder_that_has_just_been_cleared_is_worth_nothing(tmp_path, monkeypatch):
    def flock(*_):
        (tmp_path / "out" / FOLDER / "lock").unlink()
        (tmp_path / "out" / FOLDER / "lock").touch()

    monkeypatch.setattr("geomed_mae.outputs.work.fcntl.flock", flock)
    with Work(tmp_path / "out") as work, pytest.raises(OutputError, match="run the same command again"):
        work.begin(keep_salt=False, overwrite=False)


def test_a_salt_of_raw_files_is_private_and_goes_with_the_work(folder, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        predict(folder / "maps", [folder / "scenes"], tmp_path / "out", progress=interrupting(1))
    salt = tmp_path / "out" / FOLDER / "salt"
    assert salt.stat().st_mode & 0o777 == 0o600
    predict(folder / "maps", [folder / "scenes"], tmp_path / "out")
    assert not salt.parent.exists()


def test_classes_of_images_go_on_too(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(classifying, "IMAGES_A_ROUND", 1)
    whole = predict(folder / "classes", [folder / "index"], tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        predict(folder / "classes", [folder / "index"], tmp_path / "out", progress=interrupting(2))
    result = predict(folder / "classes", [folder / "index"], tmp_path / "out")
    assert result["resumed"] == {"images": 2, "blocks": 0} and result["predictions"] == whole["predictions"]
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("run", ["maps", "classes"])
def test_an_image_that_is_gone_does_not_take_the_others_with_it(folder, tmp_path, run):
    for seed in range(SCENES):
        landsat_scene(tmp_path / "scenes" / f"DOE_{seed}.tif", None, shape=(40, 44), seed=seed)
    index = scan([tmp_path / "scenes"], tmp_path / "index", modality="landsat7", pictures=False)
    gone = next(row.key for row in index.rows if index.paths(row.key)[0].name == "DOE_1.tif")
    (tmp_path / "scenes" / "DOE_1.tif").unlink()
    words = ["predict", folder / run, "--archive", tmp_path / "index", "--out", tmp_path / "out"]
    done = CliRunner().invoke(cli.main, [str(word) for word in words])
    assert done.exit_code == TooManyBadInputsError.exit_code == 3
    result = json.loads(done.stdout)
    (failed,) = result["failed"]
    assert (failed["key"], failed["reason"]) == (gone, "VANISHED") and failed["input"].endswith("DOE_1.tif")
    assert result["images"] == len(result["predictions"]) == SCENES - 1
    written = contents(tmp_path / "out")
    assert not any(b"DOE_" in data for data in written.values())
    if run == "maps":
        lines = [json.loads(line) for line in written["predictions.jsonl"].decode().splitlines()]
        assert [line["failed"] for line in lines if line["key"] == gone] == ["VANISHED"]
        assert sum(name.endswith(".tif") for name in written) == SCENES - 1


def test_a_tile_beyond_the_edge_of_the_swath_is_told_and_is_no_failure(folder, tmp_path):
    landsat_scene(tmp_path / "scenes" / "a.tif", None, shape=(40, 44))
    landsat_scene(tmp_path / "scenes" / "b.tif", None, shape=(40, 44))
    with rasterio.open(tmp_path / "scenes" / "b.tif", "r+") as scene:
        scene.nodata = 0
        scene.write(np.zeros((scene.count, *scene.shape), scene.dtypes[0]))
    words = ["predict", folder / "maps", "--archive", tmp_path / "scenes", "--out", tmp_path / "out"]
    done = CliRunner().invoke(cli.main, [str(word) for word in words])
    result = json.loads(done.stdout)
    assert done.exit_code == 0 and result["images"] == 1 and "failed" not in result
    (empty,) = result["empty"]
    assert empty["reason"] == "ALL_INVALID" and empty["input"].endswith("b.tif")


def test_a_broken_raw_file_is_told_and_the_others_are_predicted(folder, tmp_path):
    for seed in range(3):
        landsat_scene(tmp_path / "scenes" / f"DOE_{seed}.tif", None, shape=(40, 44), seed=seed)
    for seed in (0, 2):
        path = tmp_path / "scenes" / f"DOE_{seed}.tif"
        path.write_bytes(path.read_bytes()[:4000])
    result = predict(folder / "maps", [tmp_path / "scenes"], tmp_path / "out")
    assert result["images"] == 1
    assert sorted(Path(failed["input"]).name for failed in result["failed"]) == ["DOE_0.tif", "DOE_2.tif"]
    assert {failed["reason"] for failed in result["failed"]} == {"TRUNCATED"}
    lines = [json.loads(line) for line in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines()]
    assert sum("failed" in line for line in lines) == 2
    assert b"DOE_" not in b"".join(contents(tmp_path / "out").values())


def test_probabilities_are_those_behind_the_map(folder, tmp_path, small_blocks):
    result = predict(folder / "maps", [folder / "index"], tmp_path / "out", probabilities=True)
    for entry in result["predictions"]:
        path = Path(entry["output"])
        with rasterio.open(path) as found, rasterio.open(path.with_suffix(".probabilities.tif")) as chances:
            numbers, shares = found.read(1), chances.read()
            assert chances.scales == (1 / 250,) * 3 and chances.transform == found.transform
        known = numbers != 255
        assert (shares[:, ~known] == 255).all() and 0 < known.sum() < known.size
        total = shares[:, known].astype(int).sum(axis=0)
        assert np.abs(total - 250).max() <= 2
        highest = shares.max(axis=0)[known].astype(int)
        said = np.take_along_axis(shares, numbers[None].clip(0, 2).astype(int), axis=0)[0][known].astype(int)
        assert (highest - said <= 1).all(), "the class of the map has the highest probability, up to its rounding"


def test_a_classifying_run_takes_no_format_and_no_probabilities(folder, tmp_path):
    with pytest.raises(ConfigError, match="leave --format and --probabilities out"):
        predict(folder / "classes", [folder / "index"], tmp_path / "out", probabilities=True)


def test_progress_counts_batches_of_windows_within_one_image(folder, tmp_path, small_blocks):
    seen = []

    def progress(items, what, total):
        taken = 0
        for item in items:
            taken += 1
            yield item
        seen.append((what, total, taken))

    predict(folder / "maps", [folder / "scenes" / "0.tif"], tmp_path / "out", progress=progress)
    ((what, total, taken),) = seen
    assert what == "predict" and total == taken > 10
