"""embed: vectors with a place, token grids with coordinates."""

from __future__ import annotations

import json
import struct

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from rasterio.transform import Affine

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.splits import SplitRequest, parse_shares
from geomed_mae.embed import embed
from geomed_mae.errors import ConfigError
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import read_out
from geomed_mae.readers import read_images
from geomed_mae.scan import scan
from tests.scenes import landsat_scene, mr_volume, random_encoder


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed")
    for seed in (0, 1):
        landsat_scene(folder / "scenes" / f"{seed}.tif", None, shape=(70, 100), seed=seed)
    random_encoder(folder / "encoder", "landsat7", folder / "scenes")
    return folder


@pytest.fixture(scope="module")
def volumes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embed3d")
    mr_volume(folder / "volumes" / "v.nii.gz", None, shape=(20, 24, 16))
    random_encoder(folder / "encoder", "mr", folder / "volumes")
    return folder


def test_vectors_are_those_of_the_python_api_and_lie_where_the_scenes_do(scenes, tmp_path):
    result = embed(scenes / "encoder", [scenes / "scenes"], tmp_path)
    table = pq.read_table(tmp_path / "embeddings.parquet")
    assert (result["images"], result["dim"], result["format"]) == (2, 192, "GeoParquet 1.1")
    encoder = load_encoder(scenes / "encoder")
    for number, box, ring in zip((0, 1), table["bbox"].to_pylist(), table["geometry"].to_pylist(), strict=True):
        image = read_images(scenes / "scenes" / f"{number}.tif", "landsat7")[0]
        np.testing.assert_allclose(table["embedding"][number].as_py(), encoder.embed(image), rtol=1e-5, atol=1e-6)
        with rasterio.open(scenes / "scenes" / f"{number}.tif") as dataset:
            bounds = rasterio.warp.transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
        np.testing.assert_allclose([box[name] for name in ("xmin", "ymin", "xmax", "ymax")], bounds, atol=1e-4)
        assert struct.unpack_from("<BI", ring) == (1, 3)
    emb = json.loads(table.schema.metadata[b"emb"])
    assert emb["model"]["fingerprint"] == encoder.contract.fingerprint and len(emb["model"]["fingerprint"]) >= 32


def test_a_dense_grid_has_the_coordinates_of_its_tokens(scenes, tmp_path):
    result = embed(scenes / "encoder", [scenes / "scenes" / "0.tif"], tmp_path, dense=True)
    with rasterio.open(tmp_path / result["grids"][0]) as grid, rasterio.open(scenes / "scenes" / "0.tif") as scene:
        assert grid.crs == scene.crs and grid.shape == (9, 13) and grid.count == 192
        assert grid.transform == scene.transform @ Affine.scale(8, 8)
        values = grid.read()
    image = read_images(scenes / "scenes" / "0.tif", "landsat7")[0]
    np.testing.assert_allclose(values, load_encoder(scenes / "encoder").features(image).array, rtol=1e-5, atol=1e-6)
    vector = pq.read_table(tmp_path / "embeddings.parquet")["embedding"][0].as_py()
    kept = np.isfinite(values[0])
    np.testing.assert_allclose(vector, values[:, kept].mean(axis=1), rtol=1e-4, atol=1e-5)


def test_volumes_have_keys_and_no_place(volumes, tmp_path):
    result = embed(volumes / "encoder", [volumes / "volumes"], tmp_path, dense=True)
    table = pq.read_table(tmp_path / "embeddings.parquet")
    assert result["format"] == "Parquet" and table.column_names == ["id", "embedding"]
    grid = nibabel.load(tmp_path / result["grids"][0])
    assert grid.shape == (5, 6, 4, 192)
    volume = nibabel.load(volumes / "volumes" / "v.nii.gz")
    # The middle of the first token is the middle of the first 4 x 4 x 4 voxels.
    expected = volume.affine @ [1.5, 1.5, 1.5, 1]
    np.testing.assert_allclose(grid.affine @ [0, 0, 0, 1], expected, atol=1e-4)
    np.testing.assert_allclose(grid.affine[:3, :3], 4 * volume.affine[:3, :3], atol=1e-5)


def test_nothing_that_is_written_names_a_file(scenes, tmp_path):
    landsat_scene(tmp_path / "in" / "DOE_JOHN.tif", None, shape=(70, 100), seed=3)
    embed(scenes / "encoder", [tmp_path / "in"], tmp_path / "out", dense=True)
    for path in (tmp_path / "out").iterdir():
        assert b"DOE_JOHN" not in path.read_bytes() and "DOE_JOHN" not in path.name


def test_an_image_without_a_whole_patch_is_counted_and_left_out(scenes, tmp_path):
    landsat_scene(tmp_path / "in" / "a.tif", None, shape=(70, 100), seed=3)
    landsat_scene(tmp_path / "in" / "b.tif", None, shape=(3, 4), seed=4)
    result = embed(scenes / "encoder", [tmp_path / "in"], tmp_path / "out", dense=True)
    assert (result["images"], result["images_with_too_little_valid_area"], len(result["grids"])) == (1, 1, 1)
    assert len(pq.read_table(tmp_path / "out" / "embeddings.parquet")) == 1


def test_an_archive_without_a_known_modality_is_refused(scenes, volumes, tmp_path):
    scan([volumes / "volumes"], tmp_path / "index", modality="mr")
    with pytest.raises(ConfigError, match=r"no image of a modality that the encoder knows \(landsat7\)"):
        embed(scenes / "encoder", [tmp_path / "index"], tmp_path / "out")


def test_several_blocks_give_wider_vectors_that_say_so(scenes, tmp_path):
    result = embed(scenes / "encoder", [scenes / "scenes"], tmp_path, read_out="several", dense=True)
    encoder = load_encoder(scenes / "encoder")
    layers = read_out("several", encoder.spec.depth)
    assert result["dim"] == len(layers) * encoder.spec.dim
    image = read_images(scenes / "scenes" / "0.tif", "landsat7")[0]
    vector = pq.read_table(tmp_path / "embeddings.parquet")["embedding"][0].as_py()
    np.testing.assert_allclose(vector, encoder.embed(image, layers=layers), rtol=1e-5, atol=1e-6)
    with rasterio.open(tmp_path / result["grids"][0]) as dataset:
        assert dataset.count == result["dim"] and dataset.tags()["EMB_DIM"] == str(result["dim"])


def test_a_part_of_a_stored_split_and_some_channels_can_be_embedded(scenes, tmp_path):
    request = SplitRequest(method="group", shares=parse_shares("50,50"))
    scan([scenes / "scenes"], tmp_path / "index", modality="landsat7", split=request)
    (key,) = (row.key for row in open_archive([tmp_path / "index"], part="test").rows)
    result = embed(scenes / "encoder", [tmp_path / "index"], tmp_path / "out", split="test", channels="B1, B4")
    table = pq.read_table(tmp_path / "out" / "embeddings.parquet")
    assert result["images"] == 1 and table["id"].to_pylist() == [key]
    assert json.loads(table.schema.metadata[b"emb"])["model"]["channels"] == ["B1", "B4"]
    image = open_archive([tmp_path / "index"]).read(key)
    expected = load_encoder(scenes / "encoder").embed(image, channels=["B1", "B4"])
    np.testing.assert_allclose(table["embedding"][0].as_py(), expected, rtol=1e-5, atol=1e-6)


def test_channels_that_an_image_lacks_are_refused_and_a_way_out_is_named(scenes, tmp_path):
    with pytest.raises(ConfigError, match=r"an image of modality 'landsat7' has no channels \['B99'\]"):
        embed(scenes / "encoder", [scenes / "scenes"], tmp_path / "out", channels=["B1", "B99"])
    with pytest.raises(ConfigError, match="'B1,,B2' are no different names of channels, such as B08,B12"):
        embed(scenes / "encoder", [scenes / "scenes"], tmp_path / "out", channels="B1,,B2")
    with rasterio.open(scenes / "scenes" / "0.tif") as whole:
        (tmp_path / "few").mkdir()
        with rasterio.open(tmp_path / "few" / "a.tif", "w", **{**whole.profile, "count": 2}) as part:
            part.write(whole.read([1, 2]))
            part.descriptions = whole.descriptions[:2]
    with pytest.raises(ConfigError, match="or on the command line --channels B1,B2"):
        embed(scenes / "encoder", [tmp_path / "few"], tmp_path / "out")
    assert embed(scenes / "encoder", [tmp_path / "few"], tmp_path / "out", channels="B1,B2")["images"] == 1
