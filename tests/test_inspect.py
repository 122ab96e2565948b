"""The verb inspect, for a person and as JSON."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image as Pillow

from geomed_mae import cli, inspect
from geomed_mae.archives import examine
from geomed_mae.archives.inspection import _tilt
from geomed_mae.archives.splits import SplitRequest, parse_shares
from geomed_mae.errors import ConfigError
from geomed_mae.scan import scan
from tests.make_data import write_geotiff
from tests.scenes import landsat_scene, mr_volume


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.main, ["inspect", *map(str, arguments)])


@pytest.fixture
def scene(tmp_path: Path) -> Path:
    landsat_scene(tmp_path / "scene.tif", None, shape=(64, 80), nodata=0)
    return tmp_path / "scene.tif"


def test_a_scene_for_a_person(scene):
    result = run(scene, "--modality", "landsat7")
    assert result.exit_code == 0
    lines = result.stdout.splitlines()
    for line in (
        "image 1 of 1: landsat7 raster",
        "  stored as uint8",
        "  shape     6 x 64 x 80 (channel, row, column)",
        "  spacing   28.5 x 28.5 m",
        "  valid     93.75%",
        "  crs       WGS 84 / UTM zone 33N",
        "  transform 28.5, 0, 500000, 0, -28.5, 4500000.25",
        "  centre    40.6426 N, 15.0135 E",
        "  flags     none",
        "  B3, B2, B1 as red, green, blue:",
    ):
        assert line in lines, line
    assert any(line.startswith("  B4         835 nm   DN ") for line in lines)
    picture = lines[lines.index("  B3, B2, B1 as red, green, blue:") + 1 :]
    assert len(picture) == 30 and {len(line) for line in picture} <= {78}
    # The upper left sixteenth has nodata.
    assert picture[0][2:].startswith(19 * "·") and "·" not in picture[10]
    assert len(set("".join(picture))) >= 5


def test_a_scene_as_json_has_everything(scene):
    (found,) = json.loads(run(scene, "--modality", "landsat7", "--json").stdout)
    assert found["geometry"]["transform"] == [28.5, 0, 500000, 0, -28.5, 4500000.25]
    assert found["geometry"]["crs"].startswith("PROJCS")
    assert len(found["geometry"]["footprint"]) == 4
    assert found["geometry"]["centre"] == pytest.approx([15.01348, 40.64263], abs=1e-4)
    assert (found["shape"], found["dtype"], found["flags"], found["files"]) == ([6, 64, 80], "uint8", [], 1)
    assert found["valid_fraction"] == 0.9375
    channel = found["channels"][3]
    assert (channel["name"], channel["wavelength_nm"], channel["unit"]) == ("B4", 835, "DN")
    assert channel["statistics"]["count"] == 4800
    assert len(channel["histogram_edges"]) == len(channel["histogram"]) + 1 == 33
    assert channel["histogram_every"] == 1
    assert 0.98 * 4800 < sum(channel["histogram"]) <= 4800
    assert channel["histogram_edges"][0] == channel["statistics"]["p005"]


def test_a_volume_says_where_its_axes_run(tmp_path):
    mr_volume(tmp_path / "brain.nii.gz", None)
    text = run(tmp_path / "brain.nii.gz", "--modality", "mr").stdout
    # RAS of the file: i to the left, j to the back, k up; slices are k, rows j, columns i.
    assert "  axes      slices run I->S, rows run A->P, columns run R->L; tilt 0 degrees" in text
    assert "axial plane, R left, A at the top:" in text
    (found,) = json.loads(run(tmp_path / "brain.nii.gz", "--modality", "mr", "--json").stdout)
    assert found["geometry"]["axes"] == {"slices": "IS", "rows": "AP", "columns": "RL"}
    assert np.array(found["geometry"]["affine_lps"]).shape == (4, 4)


def test_the_tilt_is_that_of_a_sheared_affine():
    affine = np.diag([5.0, 1, 1, 1])[[2, 1, 0, 3]]
    assert _tilt(affine) == 0
    affine[1, 0] = 5 * np.tan(np.radians(12.5))
    assert _tilt(affine) == pytest.approx(12.5, abs=1e-6)


def test_many_images_are_listed_and_one_or_all_shown_on_request(tmp_path):
    for seed in range(5):
        landsat_scene(tmp_path / "a" / f"{seed}.tif", None, shape=(32, 40), seed=seed)
    (tmp_path / "a" / "notes.txt").write_text("hello")
    brief = run(tmp_path / "a", "--modality", "landsat7").stdout
    assert brief.splitlines()[0] == "    1  landsat7  32 x 40  28.5 x 28.5 m  B1, B2, B3, B4, B5, B7"
    assert "5 images; pixels of one with --image N, of all with --all" in brief
    assert "  1 x unsupported: UNKNOWN_FORMAT, no reader knows this format" in brief
    assert "median" not in brief
    one = run(tmp_path / "a", "--modality", "landsat7", "--image", "3").stdout
    assert "image 3 of 5: landsat7 raster" in one and "image 2 of 5" not in one
    assert run(tmp_path / "a", "--modality", "landsat7", "--all").stdout.count("of 5: landsat7") == 5
    wrong = run(tmp_path / "a", "--modality", "landsat7", "--image", "6")
    assert wrong.exit_code == 2
    assert "there is no image 6: " in wrong.stderr and "holds 5, counted from 1" in wrong.stderr
    found = json.loads(run(tmp_path / "a", "--modality", "landsat7", "--json").stdout)
    assert ["statistics" in entry["channels"][0] for entry in found] == [False] * 5
    assert len(inspect.inspect(tmp_path / "a", "landsat7")[4]["channels"][0]["histogram"]) > 1


def test_pixels_of_images_that_are_only_listed_are_not_read(tmp_path, monkeypatch):
    for seed in range(5):
        landsat_scene(tmp_path / f"{seed}.tif", None, shape=(32, 40), seed=seed)
    read = []
    real = inspect.look_into.__globals__["read_guarded"]
    monkeypatch.setitem(inspect.look_into.__globals__, "read_guarded", lambda *args: read.append(args) or real(*args))
    inspect.look_into(tmp_path, "landsat7")
    assert read == []
    inspect.look_into(tmp_path, "landsat7", only=2)
    assert [source.files[0].name for source, _ in read] == ["1.tif"]


def test_a_big_raster_is_read_in_parts(scene, monkeypatch):
    (whole,) = inspect.inspect(scene, "landsat7")
    monkeypatch.setattr(examine, "PART_VALUES", 6 * 80 * 7)
    windows = []
    real = inspect.look_into.__globals__["read_guarded"]
    monkeypatch.setitem(
        inspect.look_into.__globals__,
        "read_guarded",
        lambda source, window: windows.append(window) or real(source, window),
    )
    (parted,) = inspect.inspect(scene, "landsat7")
    rows = [window[0] for window in windows]
    assert len(rows) > 2 and rows[0].start == 0 and rows[-1].stop == 64
    assert all(one.stop == other.start for one, other in itertools.pairwise(rows))
    assert parted["geometry"] == whole["geometry"]
    for one, other in zip(parted["channels"], whole["channels"], strict=True):
        assert one["histogram"] == other["histogram"]
        assert one["statistics"] == pytest.approx(other["statistics"])


def test_a_picture_is_written_on_request(scene, tmp_path):
    result = run(scene, "--modality", "landsat7", "--picture", tmp_path / "out" / "scene.png")
    assert result.exit_code == 0
    assert f"picture: {tmp_path / 'out' / 'scene.png'}" in result.stderr
    with Pillow.open(tmp_path / "out" / "scene.png") as picture:
        assert picture.format == "PNG" and picture.size[1] > 250
    wrong = run(scene, "--modality", "landsat7", "--picture", tmp_path / "scene.tiff")
    assert wrong.exit_code == 2
    assert "give a name that ends in .png or .jpg" in wrong.stderr
    with pytest.raises(ConfigError, match="no image's pixels were read; choose some with --image N or --all"):
        inspect.save_picture(inspect.Inspection([], {}, {}), tmp_path / "none.png")


def test_a_refused_file_says_why_and_what_to_do(tmp_path):
    write_geotiff(tmp_path / "five.tif", np.ones((5, 8, 8), np.uint8))
    refused = run(tmp_path / "five.tif", "--modality", "landsat7")
    assert refused.exit_code == 3
    assert "five.tif cannot be used: bands do not match the modality" in refused.stderr
    assert "; name its bands, or write a modality file for them and pass it with --modality" in refused.stderr
    landsat_scene(tmp_path / "cut.tif", None, shape=(64, 64))
    (tmp_path / "cut.tif").write_bytes((tmp_path / "cut.tif").read_bytes()[:9000])
    cut = run(tmp_path / "cut.tif", "--modality", "landsat7")
    assert cut.exit_code == 3
    assert "copy it again from where it came from" in cut.stderr


def test_one_damaged_image_among_others_does_not_hide_them(tmp_path):
    for name in ("a.tif", "b.tif"):
        write_geotiff(tmp_path / name, np.arange(6 * 64 * 64).reshape(6, 64, 64).astype(np.uint8), compress="deflate")
    data = bytearray((tmp_path / "b.tif").read_bytes())
    data[len(data) // 2 :] = bytes(len(data) - len(data) // 2)
    (tmp_path / "b.tif").write_bytes(data)
    result = run(tmp_path, "--modality", "landsat7")
    assert result.exit_code == 0
    assert "image 1 of 2: landsat7 raster" in result.stdout
    assert "image 2 of 2: DECODE_FAILED, " in result.stdout or "image 2 of 2: TRUNCATED, " in result.stdout


def test_an_index_is_summed_up(tmp_path):
    for seed in range(4):
        landsat_scene(tmp_path / "a" / f"{seed}.tif", None, shape=(32, 40), seed=seed)
    mr_volume(tmp_path / "a" / "brain.nii.gz", None)
    (tmp_path / "a" / "notes.txt").write_text("hello")
    request = SplitRequest(method="group", shares=parse_shares("50,50"))
    scan([tmp_path / "a"], tmp_path / "index", modality=["landsat7", "mr"], split=request, pictures=False)
    lines = run(tmp_path / "index").stdout.splitlines()
    for line in (
        "index of 5 images in 5 groups (patients or scenes)",
        "  files     6 = 5 used + 0 skipped + 1 unsupported",
        "            1 x unsupported: UNKNOWN_FORMAT, no reader knows this format",
        "  landsat7 (raster)",
        "    images   4 in 4 groups, 100.00% valid",
        "    size     4 x (32 x 40)",
        "    channels B1, B2, B3, B4, B5, B7",
        "  mr (volume)",
        "  flags     none",
    ):
        assert line in lines, line
    assert lines[-1].startswith("  split     by group: train ")
    found = json.loads(run(tmp_path / "index", "--json").stdout)
    assert (found["images"], found["ledger"]["unsupported"], sum(found["split"]["parts"].values())) == (5, 1, 5)
    assert run(tmp_path / "index", "--all").exit_code == 2
