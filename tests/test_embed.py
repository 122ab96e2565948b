"""embed: vectors with a place, token grids with coordinates, pictures of them; failures; streams of any size."""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path

import nibabel
import numpy as np
import pyarrow.parquet as pq
import pytest
import rasterio
from PIL import Image as Pillow
from rasterio.transform import Affine

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.index import Index
from geomed_mae.archives.splits import SplitRequest, parse_shares
from geomed_mae.cli import main
from geomed_mae.embed import embed, search
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.models import streaming
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import read_out
from geomed_mae.readers import read_images
from geomed_mae.samples.memory import ImageCache
from geomed_mae.scan import scan
from geomed_mae.writers.embedding_table import BOX
from tests.consumer import elsewhere
from tests.scenes import landsat_scene, mr_volume, random_encoder

ROOT = Path(__file__).resolve().parents[1]


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
    result = embed(scenes / "encoder", [scenes / "scenes" / "0.tif"], tmp_path, dense=True, dtype="float32")
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
    assert result["format"] == "Parquet"
    assert table.column_names == ["id", "embedding", "valid_fraction", "modality"]
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


def test_tiles_are_encoded_as_images_of_their_own_and_lie_where_they_were_cut(scenes, tmp_path):
    result = embed(scenes / "encoder", [scenes / "scenes" / "0.tif"], tmp_path, tile=32)
    rows = pq.read_table(tmp_path / "embeddings.parquet").to_pylist()
    # Of the last tile, 6 x 4 pixels, there is too little for a patch.
    assert (result["tiles"], len(rows), result["tiles_with_too_little_valid_area"]) == (11, 11, 1)
    encoder, (image,) = load_encoder(scenes / "encoder"), read_images(scenes / "scenes" / "0.tif", "landsat7")
    with rasterio.open(scenes / "scenes" / "0.tif") as dataset:
        transform, crs = dataset.transform, dataset.crs
    for row in rows:
        top, bottom, left, right = (row[name] for name in BOX)
        assert (top % 32, left % 32) == (0, 0) and row["id"] == f"{row['image']}:{top},{left}"
        part = image.crop((slice(top, bottom), slice(left, right)))
        np.testing.assert_allclose(row["embedding"], encoder.embed(part), rtol=1e-5, atol=1e-5)
        corners = ((left, top), (right, top), (right, bottom), (left, bottom))
        xs, ys = zip(*(transform @ corner for corner in corners), strict=True)
        lons, lats = rasterio.warp.transform(crs, "EPSG:4326", xs, ys)
        ring = struct.unpack_from("<10d", row["geometry"], 13)
        assert {(round(x, 9), round(y, 9)) for x, y in zip(ring[::2], ring[1::2], strict=True)} == {
            (round(x, 9), round(y, 9)) for x, y in zip(lons, lats, strict=True)
        }
        assert row["valid_fraction"] == 1.0


def test_tiles_say_how_much_of_them_is_valid_and_empty_ones_are_counted(scenes, tmp_path):
    landsat_scene(tmp_path / "in" / "a.tif", None, shape=(80, 160), seed=3, nodata=0)
    result = embed(scenes / "encoder", [tmp_path / "in"], tmp_path / "out", tile=16)
    rows = pq.read_table(tmp_path / "out" / "embeddings.parquet").to_pylist()
    # A quarter of the rows and of the columns is nodata: 20 and 40 pixels.
    assert result["tiles_with_too_little_valid_area"] == 1 * 2 and len(rows) == 5 * 10 - 2
    valid = {(row["row_start"], row["column_start"]): row["valid_fraction"] for row in rows}
    assert valid[0, 32] == 0.5 and valid[16, 0] == 0.75 and valid[48, 48] == 1.0
    whole = embed(scenes / "encoder", [tmp_path / "in"], tmp_path / "whole")
    assert whole["images"] == 1
    (row,) = pq.read_table(tmp_path / "whole" / "embeddings.parquet").to_pylist()
    assert row["valid_fraction"] == pytest.approx(15 / 16)


@pytest.mark.parametrize(("tile", "message"), [(12, "--tile 12 is no multiple of the encoder's patch of 8 x 8 pixels")])
def test_a_tile_that_does_not_fit_the_patch_is_refused(scenes, tmp_path, tile, message):
    with pytest.raises(ConfigError, match=message):
        embed(scenes / "encoder", [scenes / "scenes"], tmp_path / "out", tile=tile)
    assert not (tmp_path / "out").exists()


def test_volumes_have_no_tiles(volumes, tmp_path):
    with pytest.raises(ConfigError, match="--tile cuts rasters and planes, and the archive holds a volume"):
        embed(volumes / "encoder", [volumes / "volumes"], tmp_path / "out", tile=8)


def test_an_image_that_is_read_in_parts_gives_the_numbers_of_the_whole(scenes, volumes, tmp_path, monkeypatch):
    """Never more than one window at a time, and never the whole image in the cache."""
    asked = []
    original = Index.read_many_stored

    def read(self, key, windows):
        asked.extend(windows)
        return original(self, key, windows)

    monkeypatch.setattr(Index, "read_many_stored", read)
    for folder, archive, modality, crop in ((scenes, "scenes", "landsat7", 64), (volumes, "volumes", "mr", 16)):
        kept = {}
        for name, values, megabytes in (("whole", 1 << 23, 128), ("parts", 1, 0)):
            monkeypatch.setattr(streaming, "VALUES_PER_READ", values)
            monkeypatch.setattr(sys.modules["geomed_mae.embed"], "WHOLE_MB", megabytes)
            asked.clear()
            embed(folder / "encoder", [folder / archive], tmp_path / modality / name)
            table = pq.read_table(tmp_path / modality / name / "embeddings.parquet")
            kept[name] = sorted(table["embedding"].to_pylist())
        assert len(asked) > 2 and all(part.stop - part.start <= crop for window in asked for part in window)
        encoder = load_encoder(folder / "encoder")
        alone = sorted(encoder.embed(image).tolist() for image in read_images(folder / archive, modality))
        for one in (*kept.values(),):
            np.testing.assert_allclose(one, alone, rtol=1e-5, atol=1e-5)


def test_int8_grids_come_back_within_half_a_step_and_say_what_they_cost(scenes, tmp_path):
    landsat_scene(tmp_path / "in" / "a.tif", None, shape=(130, 100), seed=3, nodata=0)
    result = embed(scenes / "encoder", [tmp_path / "in"], tmp_path / "out", dense=True)
    found = elsewhere(READ_GRID, tmp_path / "out" / result["grids"][0])
    image = read_images(tmp_path / "in" / "a.tif", "landsat7")[0]
    exact = load_encoder(scenes / "encoder").features(image)
    stored, scale, offset = (np.array(found[name]) for name in ("stored", "scales", "offsets"))
    assert found["dtype"] == "int8" and found["nodata"] == -128 and found["layout"] == "COG"
    np.testing.assert_array_equal(stored[0] == -128, ~exact.valid)
    assert not exact.valid.all() and exact.valid.any()
    back = stored * scale[:, None, None] + offset[:, None, None]
    error = np.abs(back - exact.array)[:, exact.valid]
    assert (error <= scale[:, None] / 2 * 1.0001 + 1e-6).all()
    assert result["int8_error"]["largest_difference"] == pytest.approx(error.max(), abs=1e-5)
    assert result["int8_error"]["relative_rms"] < 0.02 and result["int8_error"]["mean_cosine"] > 0.999
    assert found["names"][:2] == ["dimension 0", "dimension 1"] and len(found["names"]) == 192
    assert found["transform"] == list(exact.geometry.transform) and found["crs"]


READ_GRID = """
import json, sys, rasterio
with rasterio.open(sys.argv[1]) as grid:
    print(json.dumps({
        "stored": grid.read().tolist(), "dtype": grid.dtypes[0], "nodata": grid.nodata, "scales": grid.scales,
        "offsets": grid.offsets, "names": grid.descriptions, "transform": list(grid.transform)[:6],
        "crs": grid.crs.to_wkt(), "layout": grid.tags(ns="IMAGE_STRUCTURE").get("LAYOUT"),
    }))
"""


def test_half_precision_is_refused_where_gdal_has_none(scenes, tmp_path):
    with pytest.raises(ConfigError, match=r"--dtype float16 needs GDAL 3.11 .* take int8"):
        embed(scenes / "encoder", [scenes / "scenes"], tmp_path / "out", dense=True, dtype="float16")


def test_previews_colour_alike_what_the_encoder_finds_alike_on_the_grid_of_the_tokens(scenes, tmp_path):
    result = embed(scenes / "encoder", [scenes / "scenes"], tmp_path / "a", preview=True)
    assert result["grids"] == [] and len(result["previews"]) == 4
    again = embed(scenes / "encoder", [scenes / "scenes"], tmp_path / "b", preview=True)
    encoder, pixels, tokens = load_encoder(scenes / "encoder"), [], []
    by_size = {}
    for folder, said in (("a", result), ("b", again)):
        for name in said["previews"]:
            by_size.setdefault(name.rsplit("-", 1)[1], {}).setdefault(folder, []).append(tmp_path / folder / name)
    # Keys are others each time; the pictures are not.
    for kind in ("preview.png", "preview.tif"):
        one, other = (sorted(path.read_bytes() for path in by_size[kind][folder]) for folder in "ab")
        assert one == other
    for path in by_size["preview.tif"]["a"]:
        with rasterio.open(path) as picture:
            values, left = picture.read(), picture.transform.c
            assert picture.colorinterp[0].name == "red" and picture.nodata == 0
        number = round((left - 500000) / 1e5)
        grid = encoder.features(read_images(scenes / "scenes" / f"{number}.tif", "landsat7")[0])
        assert picture.transform == Affine(*grid.geometry.transform) and values.shape[1:] == grid.shape[1:]
        np.testing.assert_array_equal((values == 0).all(axis=0), ~grid.valid)
        pixels.append(values[:, grid.valid].T)
        tokens.append(grid.array[:, grid.valid].T)
    # The oracle: components by singular values of all tokens together.
    centred = np.concatenate(tokens) - np.concatenate(tokens).mean(axis=0)
    _, _, directions = np.linalg.svd(centred.astype(np.float64), full_matrices=False)
    shown = np.concatenate(pixels).astype(float)
    for component in range(3):
        inside = (shown[:, component] > 1) & (shown[:, component] < 255)
        expected = (centred @ directions[component])[inside]
        assert abs(np.corrcoef(shown[inside, component], expected)[0, 1]) > 0.999
        assert 0.94 < inside.mean() < 0.98  # 2 to 98 per cent


def test_an_image_that_fails_half_way_is_named_and_the_others_are_there(scenes, tmp_path, monkeypatch):
    scan([scenes / "scenes"], tmp_path / "index", modality="landsat7")
    index = open_archive([tmp_path / "index"])
    bad = next(row.key for row in index.rows if index.paths(row.key)[0].name == "0.tif")
    original = ImageCache.read

    def read(self, row, window):
        if row.key == bad and window[0].start > 0:
            raise ReadError("0.tif is cut off", "TRUNCATED")
        return original(self, row, window)

    monkeypatch.setattr(ImageCache, "read", read)
    monkeypatch.setattr(streaming, "VALUES_PER_READ", 1)
    result = embed(scenes / "encoder", [tmp_path / "index"], tmp_path / "out", tile=32, dense=True)
    rows = pq.read_table(tmp_path / "out" / "embeddings.parquet").to_pylist()
    assert len(rows) == 11 and bad not in {row["image"] for row in rows}
    (failed,) = result["failed"]
    assert (failed["key"], failed["reason"], failed["detail"]) == (bad, "TRUNCATED", "0.tif is cut off")
    assert result["images"] == 1 and not list((tmp_path / "out").glob(f"{bad[:16]}*"))
    for path in (tmp_path / "out").iterdir():
        assert b"0.tif" not in path.read_bytes()
    assert not list((tmp_path / "out").glob(".*")), "nothing half-written is left"


def test_a_broken_file_of_a_raw_archive_costs_the_others_nothing_and_the_exit_code_says_so(scenes, tmp_path, capfd):
    for number in range(2):
        landsat_scene(tmp_path / "in" / f"{number}.tif", None, shape=(40, 40), seed=number)
    whole = (tmp_path / "in" / "1.tif").read_bytes()
    (tmp_path / "in" / "1.tif").write_bytes(whole[: len(whole) // 2])
    words = ["embed", str(scenes / "encoder"), "--archive", str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 3
    said, error = capfd.readouterr()
    result = json.loads(said)
    assert result["images"] == 1 and [entry["input"] for entry in result["failed"]] == [str(tmp_path / "in" / "1.tif")]
    assert "1 inputs could not be read" in error
    assert len(pq.read_table(tmp_path / "out" / "embeddings.parquet")) == 1


@pytest.fixture(scope="module")
def tiled(scenes, tmp_path_factory):
    """A folder with a table of tiles of both scenes."""
    out = tmp_path_factory.mktemp("tiled")
    embed(scenes / "encoder", [scenes / "scenes"], out, tile=32)
    return out


def test_a_search_finds_the_tile_that_it_is_given_and_says_where_it_lies(scenes, tiled):
    found = search(scenes / "encoder", tiled, scenes / "scenes" / "1.tif", top=3, at=(50, 45))
    assert found["window"] == [[34, 66], [29, 61]]
    assert len(found["nearest"]) == 3
    exact = search(scenes / "encoder", tiled, scenes / "scenes" / "1.tif", top=24, at=(48, 48))
    best = exact["nearest"][0]
    assert (best["row_start"], best["column_start"], best["similarity"]) == (32, 32, pytest.approx(1.0, abs=1e-6))
    with rasterio.open(scenes / "scenes" / "1.tif") as dataset:
        (longitude,), (latitude,) = rasterio.warp.transform(
            dataset.crs, "EPSG:4326", *zip(dataset.transform @ (48, 48))
        )
    assert (best["longitude"], best["latitude"]) == pytest.approx((longitude, latitude), abs=1e-6)
    similarities = [row["similarity"] for row in exact["nearest"]]
    assert similarities == sorted(similarities, reverse=True) and len(similarities) == 22
    # A window that would reach beyond the image is moved into it.
    assert search(scenes / "encoder", tiled, scenes / "scenes" / "1.tif", at=(0, 99))["window"] == [[0, 32], [68, 100]]


def test_a_search_that_cannot_be_answered_says_why(scenes, volumes, tiled, tmp_path):
    with pytest.raises(ConfigError, match="was written by another encoder"):
        search(volumes / "encoder", tiled, volumes / "volumes" / "v.nii.gz")
    with pytest.raises(ConfigError, match="holds 2 images; search with the path of one of them"):
        search(scenes / "encoder", tiled, scenes / "scenes")
    with pytest.raises(ConfigError, match=r"--at 70,0 is no pixel of an image of 70 rows, 100 columns"):
        search(scenes / "encoder", tiled, scenes / "scenes" / "0.tif", at=(70, 0))
    with pytest.raises(ConfigError, match="there is no table"):
        search(scenes / "encoder", tmp_path, scenes / "scenes" / "0.tif")
    embed(scenes / "encoder", [scenes / "scenes"], tmp_path)
    with pytest.raises(ConfigError, match="this table has one vector an image: leave it out"):
        search(scenes / "encoder", tmp_path, scenes / "scenes" / "0.tif", at=(3, 3))


def test_the_command_line_writes_and_searches_in_one_go_or_searches_alone(scenes, tmp_path, capfd):
    words = ["embed", str(scenes / "encoder"), "--out", str(tmp_path), "--search", str(scenes / "scenes" / "0.tif")]
    main([*words, "--archive", str(scenes / "scenes")], standalone_mode=False)
    both = json.loads(capfd.readouterr().out)
    assert both["images"] == 2 and both["search"]["nearest"][0]["similarity"] == pytest.approx(1, abs=1e-5)
    main([*words, "--top", "1"], standalone_mode=False)
    assert json.loads(capfd.readouterr().out)["search"]["nearest"] == both["search"]["nearest"][:1]
    with pytest.raises(SystemExit, match="2"):
        main(["embed", str(scenes / "encoder"), "--out", str(tmp_path)])
    assert "give --archive to write embeddings, --search" in capfd.readouterr().err


READ_TABLE = """
import json, sys, geopandas, numpy
from sklearn.neighbors import NearestNeighbors
frame = geopandas.read_parquet(sys.argv[1])
first = frame.geometry.iloc[0]
part = geopandas.read_parquet(sys.argv[1], bbox=first.centroid.buffer(1e-6).bounds)
vectors = numpy.stack(frame["embedding"])
distances, _ = NearestNeighbors(n_neighbors=1).fit(vectors).kneighbors(vectors)
print(json.dumps({
    "crs": frame.crs.to_string(), "rows": len(frame), "width": vectors.shape[1], "valid": bool(frame.is_valid.all()),
    "found": part["id"].tolist(), "first": frame["id"].iloc[0], "area": float(frame.to_crs(32633).area.max()),
    "near": float(distances.max()),
}))
"""


def test_geopandas_and_scikit_learn_open_the_table_and_filter_it_by_place(tiled):
    found = elsewhere(READ_TABLE, tiled / "embeddings.parquet")
    assert found["crs"] == "OGC:CRS84" and (found["rows"], found["width"]) == (22, 192)
    assert found["valid"] and found["found"] == [found["first"]] and found["near"] < 1e-3
    assert found["area"] == pytest.approx(32 * 28.5 * 32 * 28.5, rel=1e-3)


def test_images_with_and_without_a_place_are_in_one_table(scenes, tmp_path):
    landsat_scene(tmp_path / "in" / "nowhere.tif", None, shape=(40, 40), seed=5, crs=None)
    embed(scenes / "encoder", [scenes / "scenes", tmp_path / "in"], tmp_path / "out")
    rows = elsewhere(
        "import geopandas, json, sys\n"
        "frame = geopandas.read_parquet(sys.argv[1])\n"
        "print(json.dumps([[g is None, len(e)] for g, e in zip(frame.geometry, frame.embedding)]))",
        tmp_path / "out" / "embeddings.parquet",
    )
    assert rows == [[False, 192], [False, 192], [True, 192]]


def test_planes_have_tiles_too_scaled_as_the_whole(tmp_path):
    values = (np.add.outer(np.arange(48), np.arange(80)) * 2).astype(np.uint8)
    (tmp_path / "in").mkdir()
    Pillow.fromarray(values).save(tmp_path / "in" / "a.png")
    random_encoder(tmp_path / "encoder", "xray", tmp_path / "in")
    result = embed(tmp_path / "encoder", [tmp_path / "in"], tmp_path / "out", tile=16, dense=True)
    rows = pq.read_table(tmp_path / "out" / "embeddings.parquet").to_pylist()
    assert (result["format"], result["tiles"], len(rows)) == ("Parquet", 15, 15)
    grid = nibabel.load(tmp_path / "out" / result["grids"][0]).get_fdata()  # (column, row, 1, dimension)
    for row in rows:
        part = grid[row["column_start"] // 8 : row["column_stop"] // 8, row["row_start"] // 8 : row["row_stop"] // 8]
        np.testing.assert_allclose(row["embedding"], part.mean(axis=(0, 1, 2)), rtol=1e-4, atol=1e-5)
    (preview,) = result["previews"]
    with Pillow.open(tmp_path / "out" / preview) as picture:
        assert picture.size == (160, 96)


PEAK = """
import json, resource, subprocess, sys
subprocess.run([sys.executable, "-m", "geomed_mae", "embed", *sys.argv[1:]], check=True, cwd=ROOT, capture_output=True)
print(json.dumps(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024))
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_scene(scenes, tmp_path):
    """Thirty times the pixels: decoded the larger scene has 1.2 GB."""
    peaks = {}
    for size in (1000, 6000):
        landsat_scene(tmp_path / "small.tif", None, shape=(500, 500), seed=1)
        with rasterio.open(tmp_path / "small.tif") as small:
            tile, profile, names = small.read(), small.profile, small.descriptions
        profile |= {"width": size, "height": size, "tiled": True, "blockxsize": 256, "blockysize": 256}
        (tmp_path / str(size)).mkdir()
        with rasterio.open(tmp_path / str(size) / "a.tif", "w", **profile) as large:
            large.descriptions = names
            for row in range(0, size, 500):
                large.write(np.tile(tile, (1, 1, size // 500)), window=rasterio.windows.Window(0, row, size, 500))
        words = [scenes / "encoder", "--archive", tmp_path / str(size), "--out", tmp_path / f"out{size}", "--dense"]
        peaks[size] = elsewhere(PEAK.replace("ROOT", repr(str(ROOT))), *words, "--tile", "256", timeout_s=600)
    assert peaks[6000] < peaks[1000] + 500, peaks
