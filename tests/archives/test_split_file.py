"""The split that is stored with an index: from the command line to the images that a verb sees."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from geomed_mae import cli
from geomed_mae.archives.build import open_archive
from geomed_mae.archives.index import Index
from geomed_mae.archives.split_file import FILE, load_split
from geomed_mae.archives.splits import SplitRequest, parse_shares
from geomed_mae.errors import ConfigError, IntegrityError, LeakageError
from geomed_mae.recipe_file import build_recipe
from geomed_mae.scan import scan
from tests.scenes import landsat_scene

GROUPS = SplitRequest(method="group", shares=parse_shares("60,20,20"))
BLOCKS = SplitRequest(method="block", shares=parse_shares("50,50"), block_m=20_000, buffer_m=1_000)


def scenes(folder: Path, seeds: range) -> Path:
    """Scenes 100 km from one another."""
    for seed in seeds:
        landsat_scene(folder / f"scene{seed}.tif", None, shape=(32, 40), seed=seed)
    return folder


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    return scenes(tmp_path / "archive", range(8))


def by_name(folder: Path) -> dict[str, str]:
    index = Index.load(folder)
    split = load_split(folder, index.rows)
    return {index.paths(row.key)[0].name: split.parts[row.key] for row in index}


@pytest.mark.parametrize("request_", [GROUPS, BLOCKS])
def test_the_same_archive_gets_the_same_split_under_another_salt(archive, tmp_path, request_):
    for name in ("one", "two"):
        scan([archive], tmp_path / name, modality="landsat7", split=request_, pictures=False)
    assert (tmp_path / "one" / "salt").read_bytes() != (tmp_path / "two" / "salt").read_bytes()
    assert by_name(tmp_path / "one") == by_name(tmp_path / "two")
    assert set(by_name(tmp_path / "one").values()) == set(request_.names)


def test_a_stored_split_says_how_it_was_made_and_holds_keys_alone(archive, tmp_path):
    index = scan([archive], tmp_path / "index", modality="landsat7", split=BLOCKS, pictures=False)
    stored = json.loads((tmp_path / "index" / FILE).read_text())
    assert {name: stored[name] for name in ("name", "method", "seed", "parameters")} == {
        "name": "block",
        "method": "block",
        "seed": 0,
        "parameters": {
            "shares": {"train": 0.5, "test": 0.5},
            "block_m": 20_000,
            "buffer_m": 1_000,
            "exclude_unlocated": False,
        },
    }
    assert set(stored["parts"]) == {row.key for row in index}
    assert "scene" not in (tmp_path / "index" / FILE).read_text()
    assert load_split(tmp_path / "index").request == BLOCKS


@pytest.mark.parametrize("request_", [GROUPS, BLOCKS])
def test_a_second_scan_keeps_the_split_and_adds_what_is_new(archive, tmp_path, request_):
    scan([archive], tmp_path / "index", modality="landsat7", split=request_, pictures=False)
    old = by_name(tmp_path / "index")
    scenes(archive, range(8, 12))
    scan([archive], tmp_path / "index", modality="landsat7", pictures=False)
    new = by_name(tmp_path / "index")
    assert len(new) == 12
    assert {name: new[name] for name in old} == old


def test_another_request_replaces_the_split(archive, tmp_path):
    scan([archive], tmp_path / "index", modality="landsat7", split=GROUPS, pictures=False)
    scan([archive], tmp_path / "index", modality="landsat7", split=BLOCKS, pictures=False)
    assert load_split(tmp_path / "index").request == BLOCKS


def test_a_copy_of_a_training_scene_elsewhere_stays_with_it(archive, tmp_path):
    (archive / "copy.tif").write_bytes((archive / "scene3.tif").read_bytes())
    scan([archive], tmp_path / "index", modality="landsat7", split=GROUPS, pictures=False)
    parts = by_name(tmp_path / "index")
    assert parts["copy.tif"] == parts["scene3.tif"]


def test_a_verb_sees_one_part_of_the_archive(archive, tmp_path):
    scan([archive], tmp_path / "index", modality="landsat7", split=GROUPS, pictures=False)
    parts = by_name(tmp_path / "index")
    for part in GROUPS.names:
        index = open_archive([tmp_path / "index"], part=part)
        assert {index.paths(row.key)[0].name for row in index} == {n for n, own in parts.items() if own == part}
    assert build_recipe({"data": {"split": "train"}}).data.split == "train"
    assert build_recipe({}).data.split is None


def test_a_part_needs_an_index_with_a_split_that_has_it(archive, tmp_path):
    with pytest.raises(ConfigError, match=r"data.split is 'train', but '.*archive' is no index with a stored split"):
        open_archive([archive], "landsat7", part="train")
    scan([archive], tmp_path / "index", modality="landsat7", pictures=False)
    with pytest.raises(ConfigError, match=r"has no stored split; make one with geomed-mae scan --split group"):
        open_archive([tmp_path / "index"], part="train")
    scan([archive], tmp_path / "index", modality="landsat7", split=GROUPS, pictures=False)
    with pytest.raises(ConfigError, match=r"data.split is 'tset', but the split of .* has train \(\d images\), valid"):
        open_archive([tmp_path / "index"], part="tset")


def test_a_split_of_other_images_or_with_a_broken_byte_is_an_integrity_error(archive, tmp_path):
    scan([archive], tmp_path / "index", modality="landsat7", split=GROUPS, pictures=False)
    path = tmp_path / "index" / FILE
    stored = json.loads(path.read_text())
    key = next(iter(stored["parts"]))
    path.write_text(json.dumps({**stored, "parts": {k: p for k, p in stored["parts"].items() if k != key}}))
    with pytest.raises(IntegrityError, match="splits other images than the index holds: scan again with --split"):
        open_archive([tmp_path / "index"], part="train")
    path.write_text(json.dumps({**stored, "parts": {**stored["parts"], key: "holdout"}}))
    with pytest.raises(IntegrityError, match="names the unknown part 'holdout'"):
        open_archive([tmp_path / "index"], part="train")
    path.write_text(path.read_text()[:50])
    with pytest.raises(IntegrityError, match=r"splits.json in .* is damaged .*: scan again with --split"):
        scan([archive], tmp_path / "index", modality="landsat7", pictures=False)
    scan([archive], tmp_path / "index", modality="landsat7", split=GROUPS, pictures=False)
    assert load_split(tmp_path / "index") is not None


def test_a_block_split_of_scenes_without_a_place_exits_with_6(tmp_path):
    archive = scenes(tmp_path / "archive", range(3))
    landsat_scene(archive / "nowhere.tif", None, shape=(32, 40), seed=9, crs=None)
    with pytest.raises(LeakageError):
        scan([archive], tmp_path / "index", modality="landsat7", split=BLOCKS, pictures=False)
    arguments = ["scan", str(archive), "--out", str(tmp_path / "index"), "--modality", "landsat7", "--workers", "1"]
    arguments += ["--split", "block", "--split-shares", "50,50", "--no-pictures"]
    refused = CliRunner().invoke(cli.main, arguments)
    assert refused.exit_code == 6
    assert "1 of 4 images have no place on the globe" in refused.stderr
    done = CliRunner().invoke(cli.main, [*arguments, "--exclude-unlocated"])
    assert done.exit_code == 0
    assert by_name(tmp_path / "index")["nowhere.tif"] == "no-location"


def test_a_split_in_memory_has_nowhere_to_be_stored(archive):
    with pytest.raises(ConfigError, match="a split is stored with its index: give a folder for it as out"):
        scan([archive], modality="landsat7", split=GROUPS)
