"""The parts of a stored split, as a task uses them."""

from __future__ import annotations

import json
import logging
import shutil

import pytest

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.parts import stored_parts
from geomed_mae.archives.split_file import FILE
from geomed_mae.archives.splits import SplitRequest, parse_shares
from geomed_mae.errors import ConfigError
from geomed_mae.scan import scan
from tests.scenes import labelled_scenes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An index of three scenes in three parts, one of which has a name of its own."""
    root = tmp_path_factory.mktemp("parts")
    scenes = labelled_scenes(root, 3) / "images"
    request = SplitRequest(method="group", shares=parse_shares("train=50,val=25,test=25"))
    scan([scenes], root / "index", modality="landsat7", split=request)
    return root / "index"


def test_parts_are_those_of_the_scan_under_one_name_each(folder):
    index = open_archive([folder])
    parts = stored_parts([folder], index)
    assert sorted(parts.values()) == ["test", "train", "validation"] and set(parts) == {row.key for row in index.rows}
    (held,) = open_archive([folder], part="test").rows
    assert parts[held.key] == "test"


def test_only_images_that_are_asked_for_have_a_part(folder):
    index = open_archive([folder])
    assert set(stored_parts([folder], index.subset(index.rows[:2]))) == {row.key for row in index.rows[:2]}


def test_images_of_a_further_part_are_in_none(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "named")
    (tmp_path / "named" / FILE).write_text((folder / FILE).read_text().replace('"val"', '"later"'))
    parts = stored_parts([tmp_path / "named"], open_archive([tmp_path / "named"]))
    assert sorted(parts.values()) == ["test", "train"]


def test_a_stored_split_that_is_not_used_is_mentioned(folder, caplog):
    index = open_archive([folder])
    with caplog.at_level(logging.WARNING):
        stored_parts([folder.parent / "images"], index)
        assert not caplog.messages
        stored_parts([folder, folder.parent / "images"], index)
    assert "none is used and parts are drawn anew" in caplog.text


def test_without_a_split_everywhere_there_are_no_parts(folder, tmp_path):
    index = open_archive([folder])
    shutil.copytree(folder, tmp_path / "plain", ignore=shutil.ignore_patterns(FILE))
    for others in (tmp_path / "plain", folder.parent / "images"):
        assert stored_parts([folder, others], index) is None


def test_parts_of_names_that_say_nothing_are_refused(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "named")
    text = (tmp_path / "named" / FILE).read_text()
    changed = text.replace('"train"', '"fit"').replace('"val"', '"tune"').replace('"test"', '"hold"')
    (tmp_path / "named" / FILE).write_text(json.dumps(json.loads(changed)))
    with pytest.raises(ConfigError, match="has the parts fit, tune, hold, and none says that it is train or test"):
        stored_parts([tmp_path / "named"], open_archive([folder]))
