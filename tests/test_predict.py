"""predict: maps that lie on their images to the last bit."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import rasterio
import SimpleITK as sitk
from rasterio.transform import Affine

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.splits import SplitRequest, parse_shares
from geomed_mae.errors import ConfigError
from geomed_mae.predict import predict
from geomed_mae.scan import scan
from geomed_mae.writers import NODATA
from tests.scenes import landsat_scene, mr_run, mr_volume, water_run

GRIDS = {
    "north up": Affine(28.5, 0, 288776.25000001, 0, -28.5, 9120760.75000002),
    "rotated": Affine.translation(500000.1, 4000000.3) @ Affine.rotation(33.3) @ Affine.scale(28.5, -28.5),
    "south up": Affine(30, 0, 600000, 0, 30, 4000000),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return water_run(tmp_path_factory) / "run"


@pytest.mark.parametrize("grid", GRIDS)
def test_a_map_lies_on_its_scene_to_the_last_bit(run, tmp_path, grid):
    truth = landsat_scene(tmp_path / "s.tif", None, shape=(90, 110), seed=3, transform=GRIDS[grid], nodata=0)
    (entry,) = predict(run, [tmp_path / "s.tif"], tmp_path / "out")["predictions"]
    with rasterio.open(tmp_path / "s.tif") as scene, rasterio.open(entry["output"]) as found:
        assert found.transform == scene.transform == GRIDS[grid]
        assert found.crs == scene.crs and found.shape == scene.shape and found.nodata == NODATA
        numbers, invalid = found.read(1), ~scene.dataset_mask().astype(bool)
        assert found.tags(1)["CLASS_1"] == "water"
    np.testing.assert_array_equal(numbers == NODATA, invalid)
    assert (numbers[~invalid] == truth[~invalid]).mean() > 0.97
    assert entry["pixels"] == {
        "land": int((numbers == 0).sum()),
        "water": int((numbers == 1).sum()),
        "invalid": int(invalid.sum()),
    }


def test_a_scene_without_a_coordinate_system_gives_a_map_without_one(run, tmp_path):
    landsat_scene(tmp_path / "s.tif", None, shape=(70, 80), crs=None, transform=Affine(2, 0, 100, 0, -2, 50))
    (entry,) = predict(run, [tmp_path / "s.tif"], tmp_path / "out")["predictions"]
    with rasterio.open(entry["output"]) as found:
        assert found.crs is None and found.transform == Affine(2, 0, 100, 0, -2, 50)


@pytest.mark.parametrize("shape", [(20, 200), (64, 64), (65, 63)])
def test_scenes_smaller_than_the_window_and_odd_sizes(run, tmp_path, shape):
    landsat_scene(tmp_path / "s.tif", None, shape=shape, seed=4)
    (entry,) = predict(run, [tmp_path / "s.tif"], tmp_path / "out")["predictions"]
    with rasterio.open(entry["output"]) as found:
        assert found.shape == shape


def test_a_volume_comes_back_voxel_for_voxel_in_the_same_place(tmp_path, tmp_path_factory):
    mr_volume(tmp_path / "v.nii.gz", None, shape=(21, 26, 17), seed=9)
    (entry,) = predict(mr_run(tmp_path_factory) / "run", [tmp_path / "v.nii.gz"], tmp_path / "out")["predictions"]
    before, after = nibabel.load(tmp_path / "v.nii.gz"), nibabel.load(entry["output"])
    assert after.shape == before.shape and after.get_data_dtype() == np.uint8
    np.testing.assert_array_equal(after.affine, before.affine)
    first, second = (sitk.ReadImage(str(path)) for path in (tmp_path / "v.nii.gz", entry["output"]))
    for name in ("GetOrigin", "GetSpacing", "GetDirection"):
        np.testing.assert_allclose(getattr(first, name)(), getattr(second, name)(), atol=1e-6)


def test_names_are_keys_and_the_table_leads_from_an_index_to_the_files(run, tmp_path):
    landsat_scene(tmp_path / "scenes" / "DOE_JOHN.tif", None, shape=(70, 80))
    index = scan([tmp_path / "scenes"], tmp_path / "index", modality="landsat7")
    result = predict(run, [tmp_path / "index"], tmp_path / "out")
    key = index.rows[0].key
    written = {path.name for path in (tmp_path / "out").iterdir()}
    assert {f"{key[:16]}.tif", "predictions.jsonl"} <= written
    assert all(name.startswith(key[:16]) for name in written - {"predictions.jsonl"}), "no work is left behind"
    (line,) = (json.loads(text) for text in (tmp_path / "out" / "predictions.jsonl").read_text().splitlines())
    assert line["key"] == key == result["predictions"][0]["key"] and line["classes"] == ["land", "water"]
    assert index.paths(key)[0].name == "DOE_JOHN.tif"
    for path in (tmp_path / "out").iterdir():
        assert b"DOE_JOHN" not in path.read_bytes()


def test_images_of_other_modalities_in_an_index_are_counted(run, tmp_path):
    landsat_scene(tmp_path / "in" / "s.tif", None, shape=(70, 80))
    mr_volume(tmp_path / "in" / "v.nii.gz", None)
    scan([tmp_path / "in"], tmp_path / "index", modality=["landsat7", "mr"])
    result = predict(run, [tmp_path / "index"], tmp_path / "out")
    assert (result["images"], result["images_of_other_modalities"]) == (1, 1)


def test_a_part_of_a_stored_split_can_be_predicted_alone(run, tmp_path):
    for seed in range(2):
        landsat_scene(tmp_path / "scenes" / f"{seed}.tif", None, shape=(70, 80), seed=seed)
    request = SplitRequest(method="group", shares=parse_shares("50,50"))
    scan([tmp_path / "scenes"], tmp_path / "index", modality="landsat7", split=request)
    (row,) = open_archive([tmp_path / "index"], part="test").rows
    result = predict(run, [tmp_path / "index"], tmp_path / "out", split="test")
    assert [entry["key"] for entry in result["predictions"]] == [row.key]


def test_formats_that_cannot_be_are_refused_before_anything_is_written(run, tmp_path):
    landsat_scene(tmp_path / "s.tif", None, shape=(70, 80))
    for form, message in (
        ("dicom-seg", "--format dicom-seg cannot hold a raster; use --format auto"),
        ("nifti", "--format nifti cannot hold a raster; use --format auto"),
        ("png", "'png' is not one of the writers"),
    ):
        with pytest.raises(ConfigError, match=message):
            predict(run, [tmp_path / "s.tif"], tmp_path / "out", format=form)
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    landsat_scene(tmp_path / "s.tif", None, shape=(70, 80))
    with pytest.raises(ConfigError, match="holds no fine-tuned model"):
        predict(tmp_path, [tmp_path / "s.tif"], tmp_path / "out")


@pytest.mark.data
def test_a_real_scene(run, shared_data, tmp_path):
    scene = shared_data / "sat" / "landsat7" / "L7_ETMs.tif"
    (entry,) = predict(run, [scene], tmp_path / "out")["predictions"]
    with rasterio.open(scene) as before, rasterio.open(entry["output"]) as after:
        assert (after.transform, after.crs, after.shape) == (before.transform, before.crs, before.shape)
    assert Path(entry["output"]).suffix == ".tif"
