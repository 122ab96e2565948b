"""What a run keeps of its archive: numbers, and nothing that names a person, a file or a place."""

from __future__ import annotations

import json

import numpy as np

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.description import describe_archive
from tests.scenes import landsat_scene, mr_volume


def test_it_counts_images_files_and_what_is_in_them(tmp_path):
    landsat_scene(tmp_path / "JANE_DOE" / "a.tif", None, shape=(64, 80))
    landsat_scene(tmp_path / "JANE_DOE" / "b.tif", None, shape=(48, 96), seed=1, nodata=0)
    mr_volume(tmp_path / "JANE_DOE" / "v.nii", None, shape=(20, 24, 16), spacing=0.5)
    (tmp_path / "JANE_DOE" / "notes.txt").write_text("no image")
    index = open_archive([tmp_path / "JANE_DOE"], ["landsat7", "mr"])
    found = describe_archive(index)
    assert found["images"] == 3 and found["files"] == {"files": 4, "used": 3, "skipped": 0, "unsupported": 1}
    assert sum(one["files"] for one in found["reasons"]) == 1
    assert list(found["modalities"]) == ["landsat7", "mr"]
    scenes, volumes = found["modalities"]["landsat7"], found["modalities"]["mr"]
    assert scenes["size"] == [[48, 64], [80, 96]] and scenes["axes"] == ["rows", "columns"] and scenes["unit"] == "m"
    assert scenes["valid"][0] < 1 and scenes["valid"][2] == 1 and scenes["dtypes"] == {"uint8": 2}
    assert [one["name"] for one in scenes["channels"]] == ["B1", "B2", "B3", "B4", "B5", "B7"]
    values = np.concatenate([[row.statistics[0].p005, row.statistics[0].p995] for row in index.rows[:2]])
    assert scenes["channels"][0]["values"] == [values.min(), values.max()]
    assert volumes["spacing"] == [[0.75, 0.75], [0.5, 0.5], [0.5, 0.5]] and volumes["unit"] == "mm"
    assert all(float(bound).is_integer() for bound in found["bounds"])


def test_it_is_json_without_keys_names_or_paths(tmp_path):
    landsat_scene(tmp_path / "JANE_DOE" / "a.tif", None, shape=(64, 80))
    index = open_archive([tmp_path / "JANE_DOE"], ["landsat7"])
    text = json.dumps(describe_archive(index), allow_nan=False)
    row = index.rows[0]
    assert not [word for word in ("JANE", "a.tif", str(tmp_path), row.key, row.group, row.content) if word in text]
