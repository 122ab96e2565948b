"""predict by two processes: the files are those of one, and one of them tells."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from geomed_mae.archives.build import open_archive
from geomed_mae.errors import ConfigError
from geomed_mae.predict import predict
from geomed_mae.scan import scan
from tests.scenes import landsat_scene
from tests.test_predict_resume import contents, random_run
from tests.training.test_distributed import start


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """index/ of four scenes, one of which is gone, and a run maps/."""
    root = tmp_path_factory.mktemp("ranks")
    for seed in range(4):
        landsat_scene(root / "scenes" / f"{seed}.tif", None, shape=(40, 40 + 8 * seed), seed=seed)
    index = scan([root / "scenes"], root / "index", modality="landsat7", pictures=False)
    random_run(root / "maps", open_archive([root / "index"]))
    index.paths(index.rows[1].key)[0].unlink()
    return root


def run(folder: Path, out: Path, world: int) -> list[tuple[int, str, str]]:
    """Predict by so many processes; return each one's exit code, stdout and stderr."""
    words = ["-m", "tests.predicting", "ranks", *map(str, (folder / "maps", folder / "index", out))]
    started = start(words, world)
    said = [process.communicate(timeout=240) for process in started]
    return [(process.returncode, *texts) for process, texts in zip(started, said, strict=True)]


def test_two_processes_write_what_one_writes_and_one_of_them_tells(folder, tmp_path):
    ((code, said, errors),) = run(folder, tmp_path / "one", 1)
    assert code == 3, errors
    first, second = run(folder, tmp_path / "two", 2)
    assert (first[0], second[0]) == (3, 0), first[2] + second[2]
    assert second[1] == "", "the result is told once"
    assert first[1] == said.replace(str(tmp_path / "one"), str(tmp_path / "two"))
    told = json.loads(first[1])
    assert told["images"] == 3 and [entry["reason"] for entry in told["failed"]] == ["VANISHED"]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    ((_, again, _),) = run(folder, tmp_path / "two", 1)
    assert json.loads(again)["resumed"] == {"images": 3, "blocks": 0}, "one goes on where two were"


def test_several_processes_need_an_index(folder, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("LOCAL_RANK", "0")
    landsat_scene(tmp_path / "scenes" / "a.tif", None, shape=(40, 40))
    with pytest.raises(ConfigError, match="2 processes need an INDEX"):
        predict(folder / "maps", [tmp_path / "scenes"], tmp_path / "out")
