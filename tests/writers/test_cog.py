"""Class maps as COG, with rasterio as oracle of grid, values and structure."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning

from geomed_mae.errors import OutputError
from geomed_mae.image import RasterGeometry
from geomed_mae.writers import NODATA, cog

CLASSES = ("background", "water")
UTM = CRS.from_epsg(32725).to_wkt()
NORTH_UP = (28.5, 0.0, 288776.25000001, 0.0, -28.5, 9120760.75000002)
ROTATED = tuple(Affine.translation(500000.1, 4000000.3) @ Affine.rotation(33.3) @ Affine.scale(7.7, -7.7))[:6]
SOUTH_UP = (10.0, 0.0, 600000.0, 0.0, 10.0, 4000000.0)


def class_map(rows: int, columns: int) -> np.ndarray:
    values = np.random.default_rng(0).integers(0, 2, size=(rows, columns)).astype(np.uint8)
    values[:3, :5] = NODATA
    return values


@pytest.mark.parametrize("transform", [NORTH_UP, ROTATED, SOUTH_UP])
@pytest.mark.parametrize("shape", [(37, 91), (700, 1100)])
def test_lies_on_the_image_to_the_last_bit(tmp_path, transform, shape):
    geometry = RasterGeometry(UTM, transform, (10.0, 10.0))
    cog.write(tmp_path / "map.tif", class_map(*shape), geometry, CLASSES)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert tuple(dataset.transform)[:6] == transform
        assert dataset.crs == CRS.from_wkt(UTM)
        np.testing.assert_array_equal(dataset.read(1), class_map(*shape))


def test_is_a_cog_with_nodata_colours_and_class_names(tmp_path):
    cog.write(tmp_path / "map.tif", class_map(700, 1100), RasterGeometry(UTM, NORTH_UP, (28.5, 28.5)), CLASSES)
    with rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG"
        assert dataset.profile["tiled"] and dataset.profile["compress"] == "deflate"
        assert dataset.overviews(1) == [2, 4]
        assert dataset.nodata == NODATA
        assert dataset.colormap(1)[1] == cog.colours(2)[1]
        assert {"CLASS_0": "background", "CLASS_1": "water"}.items() <= dataset.tags(1).items()
    assert [path.name for path in tmp_path.iterdir()] == ["map.tif"], "no side-car and no temporary file is left"


def test_an_image_without_a_coordinate_system_stays_without_one(tmp_path):
    geometry = RasterGeometry(None, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        cog.write(tmp_path / "map.tif", class_map(20, 30), geometry, CLASSES)
    assert not heard
    with pytest.warns(NotGeoreferencedWarning), rasterio.open(tmp_path / "map.tif") as dataset:
        assert dataset.crs is None
        assert dataset.transform == Affine.identity()


def test_streamed_rows_are_the_same_file_as_a_whole_map(tmp_path):
    values, geometry = class_map(700, 600), RasterGeometry(UTM, NORTH_UP, (28.5, 28.5))
    cog.write(tmp_path / "whole.tif", values, geometry, CLASSES)
    with cog.stream(tmp_path / "streamed.tif", values.shape, geometry, CLASSES) as raster:
        for start in range(0, 700, 48):
            raster.put(values[start : start + 48])
    with rasterio.open(tmp_path / "whole.tif") as whole, rasterio.open(tmp_path / "streamed.tif") as streamed:
        np.testing.assert_array_equal(whole.read(1), streamed.read(1))
        assert whole.profile == streamed.profile


def test_a_failure_while_writing_leaves_nothing_behind(tmp_path):
    geometry = RasterGeometry(UTM, NORTH_UP, (28.5, 28.5))
    with pytest.raises(ZeroDivisionError), cog.stream(tmp_path / "map.tif", (700, 600), geometry, CLASSES) as raster:
        raster.put(class_map(48, 600))
        raise ZeroDivisionError
    assert list(tmp_path.iterdir()) == []


def test_refuses_a_number_that_is_no_class(tmp_path):
    with pytest.raises(ValueError, match=r"holds \[7\], which name none of its 2 classes"):
        values = np.full((4, 4), 7, dtype=np.uint8)
        cog.write(tmp_path / "map.tif", values, RasterGeometry(UTM, NORTH_UP, None), CLASSES)


def test_says_which_folder_cannot_be_written(tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(OutputError, match="taken' cannot be written"):
        cog.write(tmp_path / "taken" / "map.tif", class_map(4, 4), RasterGeometry(UTM, NORTH_UP, None), CLASSES)


def test_dense_embeddings_keep_grid_values_and_nan(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 9, 7)).astype(np.float32)
    values[:, 2, 3] = np.nan
    cog.write_bands(tmp_path / "grid.tif", values, RasterGeometry(UTM, ROTATED, None), {"EMB_MODEL": "abc"})
    with rasterio.open(tmp_path / "grid.tif") as dataset:
        np.testing.assert_array_equal(dataset.read(), values)
        assert tuple(dataset.transform)[:6] == ROTATED
        assert np.isnan(dataset.nodata)
        assert dataset.tags()["EMB_MODEL"] == "abc"


def test_neighbouring_classes_have_different_colours():
    table = cog.colours(40)
    assert len({table[number] for number in range(40)}) == 40
    assert table[NODATA][3] == 0
