"""scores.json: what is written is what is read, and damage is found."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geomed_mae.errors import ConfigError, IntegrityError, OutputError
from geomed_mae.scoring.classification import ClassificationScores
from geomed_mae.scoring.image_score import whole_map
from geomed_mae.scoring.segmentation import SegmentationScores
from geomed_mae.scoring.stored import load_scores, save_scores
from tests.scoring.rows import made_row


def made():
    classes = ClassificationScores(["a", "b"])
    classes.add_image("k", "g", np.array([0.3, 0.7]), 1)
    maps = SegmentationScores(["a", "b"])
    maps.add(made_row("k"), np.eye(4, dtype=int), whole_map(np.eye(4, dtype=np.uint8)))
    return classes, maps


def test_both_kinds_come_back_as_they_were(tmp_path):
    for scores in made():
        save_scores(tmp_path / "scores.json", scores)
        again = load_scores(tmp_path / "scores.json")
        assert type(again) is type(scores) and again.summary() == scores.summary()
    assert [path.name for path in tmp_path.iterdir()] == ["scores.json"]


def test_damage_and_other_files_are_refused(tmp_path):
    path = tmp_path / "scores.json"
    with pytest.raises(ConfigError, match="does not exist"):
        load_scores(path)
    path.write_text('{"verb": "evaluate"}')
    with pytest.raises(ConfigError, match="is no file of 'geomed-mae scores' version 1"):
        load_scores(path)
    save_scores(path, made()[1])
    path.write_text(path.read_text()[:-20])
    with pytest.raises(IntegrityError, match="is damaged"):
        load_scores(path)
    save_scores(path, made()[0])
    data = json.loads(path.read_text())
    del data["images"][0]["truth"]
    path.write_text(json.dumps(data))
    with pytest.raises(IntegrityError, match="is damaged"):
        load_scores(path)


def test_a_folder_that_is_not_there_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match=r"scores\.json"):
        save_scores(tmp_path / "no" / "scores.json", made()[0])
