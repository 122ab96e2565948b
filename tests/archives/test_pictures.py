"""Pictures of a data card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from geomed_mae.archives import pictures
from geomed_mae.archives.build import scan_archive
from geomed_mae.archives.pictures import contact_sheet, draw_card, remove_pictures
from geomed_mae.archives.views import INVALID
from geomed_mae.errors import OutputError
from geomed_mae.scan import scan
from tests.scenes import landsat_scene, mr_volume

CANARY = "Doe-Jane-0815"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / CANARY
    for seed in range(3):
        landsat_scene(folder / f"{CANARY}{seed}.tif", None, shape=(64, 80), seed=seed, nodata=0)
    for seed in range(2):
        mr_volume(folder / f"{CANARY}{seed}.nii.gz", None, seed=seed)
    return folder


def test_each_modality_has_a_sheet_and_histograms(archive, tmp_path):
    index = scan_archive([archive], ["landsat7", "mr"])
    made = draw_card(index, tmp_path / "index")
    assert [(entry.modality, entry.shown, entry.caption) for entry in made] == [
        ("landsat7", 3, "B3, B2, B1 as red, green, blue"),
        ("mr", 2, "MR as grey"),
    ]
    for entry in made:
        for name in (entry.images, entry.histograms):
            with Pillow.open(tmp_path / "index" / name) as picture:
                assert picture.format == "PNG" and min(picture.size) > 150
                assert not picture.text
    assert sorted(path.name for path in (tmp_path / "index" / "card").iterdir()) == [
        "landsat7-histograms.png",
        "landsat7-images.png",
        "mr-histograms.png",
        "mr-images.png",
    ]


def test_nodata_is_seen_as_such(archive, tmp_path):
    index = scan_archive([archive], ["landsat7", "mr"])
    draw_card(index, tmp_path / "index")
    sheet = np.asarray(Pillow.open(tmp_path / "index/card/landsat7-images.png").convert("RGB"))
    share = (sheet == INVALID).all(axis=-1).sum() / (3 * pictures.CELL**2 * 0.8)
    # A sixteenth of each scene, beside a small square in the legend.
    assert 1 / 16 < share < 1.15 / 16


def test_pictures_hold_no_name_and_no_path(archive, tmp_path):
    scan([archive], tmp_path / "index", modality=["landsat7", "mr"])
    for path in (tmp_path / "index" / "card").iterdir():
        assert CANARY not in path.name
        assert CANARY.encode() not in path.read_bytes() and b"tEXt" not in path.read_bytes()
    assert "card/mr-images.png" in (tmp_path / "index" / "card.md").read_text()


def test_a_scan_without_pictures_has_none_and_removes_those_of_an_earlier_one(archive, tmp_path):
    scan([archive], tmp_path / "index", modality=["landsat7", "mr"])
    scan([archive], tmp_path / "index", modality=["landsat7", "mr"], pictures=False)
    assert not list((tmp_path / "index" / "card").glob("*"))
    card = (tmp_path / "index" / "card.md").read_text()
    assert "![" not in card and "show pixels" not in card


def test_eight_of_many_are_shown_one_a_group(tmp_path):
    for seed in range(11):
        landsat_scene(tmp_path / "a" / f"{seed:02}.tif", None, shape=(32, 32), seed=seed)
    index = scan_archive([tmp_path / "a"], "landsat7")
    rows = pictures._chosen(list(index.rows))
    names = [index.paths(row.key)[0].name for row in rows]
    assert names == [f"{number:02}.tif" for number in (0, 1, 2, 4, 5, 6, 8, 9)]


def test_a_file_that_is_gone_costs_its_picture_only(archive, tmp_path):
    index = scan_archive([archive], ["landsat7", "mr"])
    (archive / f"{CANARY}1.tif").unlink()
    assert [entry.shown for entry in draw_card(index, tmp_path / "index")] == [2, 2]


def test_of_a_very_large_scene_the_centre_is_shown_part_by_part(archive, tmp_path, monkeypatch):
    index = scan_archive([archive / f"{CANARY}0.tif"], "landsat7")
    monkeypatch.setattr(pictures, "MAX_VALUES", 6 * 64 * 80 // 4)
    monkeypatch.setattr(pictures, "PART_VALUES", 6 * 40 * 10)
    shape, windows = pictures._windows(index.rows[0])
    assert shape == (32, 40)
    assert list(windows) == [
        (slice(16, 26), slice(20, 60)),
        (slice(26, 36), slice(20, 60)),
        (slice(36, 46), slice(20, 60)),
        (slice(46, 48), slice(20, 60)),
    ]
    assert pictures._caption(index.rows[0], shape) == "64 x 80, 28.5 x 28.5 m, centre"
    assert draw_card(index, tmp_path / "index")[0].shown == 1


def test_a_folder_that_cannot_be_written_is_an_output_error(archive, tmp_path):
    index = scan_archive([archive / f"{CANARY}0.tif"], "landsat7")
    (tmp_path / "file").write_text("x")
    with pytest.raises(OutputError, match="pictures cannot be written to"):
        draw_card(index, tmp_path / "file")
    assert remove_pictures(tmp_path / "nowhere") == []


def test_a_sheet_of_one_picture_is_wide_enough_for_its_legend(archive):
    index = scan_archive([archive / f"{CANARY}0.tif"], "landsat7")
    sketch = pictures.Sketch(index.rows[0].channels, (64, 80), index.read(index.rows[0].key).geometry)
    sketch.add(index.read(index.rows[0].key))
    assert contact_sheet([pictures.Tile(sketch.views(), "one")], "landsat7").width == 560
