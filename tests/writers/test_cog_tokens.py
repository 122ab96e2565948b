"""Token grids as COG: any grid to the bit, small tiles, a step of the band's own, nodata where there is no token."""

from __future__ import annotations

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS

from geomed_mae.errors import ConfigError
from geomed_mae.image import RasterGeometry
from geomed_mae.writers import cog_tokens
from geomed_mae.writers.token_spool import TokenSpool

UTM = CRS.from_epsg(32725).to_wkt()
ROTATED = tuple(Affine.translation(500000.1, 4000000.3) @ Affine.rotation(33.3) @ Affine.scale(7.7, -7.7))[:6]
SOUTH_UP = (160.0, 0.0, 600000.0, 0.0, 160.0, 4000000.0)
DEGREES = (0.1 / 3, 0.0, 12.3, 0.0, -0.1 / 3, 45.6)


def spooled(folder, values):
    spool = TokenSpool(folder, values.shape[0], values.shape[1:])
    for row in range(0, values.shape[1], 14):
        spool.put((row, 0), values[:, row : row + 14])
    return spool


@pytest.mark.parametrize(
    ("crs", "transform"),
    [(UTM, ROTATED), (UTM, SOUTH_UP), (CRS.from_epsg(4326).to_wkt(), DEGREES), (None, (8.0, 0, 0, 0, 8.0, 0))],
)
@pytest.mark.parametrize("dtype", ["int8", "float32"])
def test_the_grid_of_the_tokens_comes_back_to_the_bit(tmp_path, crs, transform, dtype):
    values = np.random.default_rng(0).normal(size=(5, 9, 7)).astype(np.float32)
    values[:, 2, 3] = np.nan
    names = [f"dimension {number}" for number in range(5)]
    with spooled(tmp_path, values) as spool:
        geometry = RasterGeometry(crs, transform, None)
        cog_tokens.write(tmp_path / "g.tif", spool, geometry, names=names, tags={"EMB_DIM": "5"}, dtype=dtype)
    with rasterio.open(tmp_path / "g.tif") as grid:
        assert tuple(grid.transform)[:6] == tuple(transform)
        assert grid.crs == (None if crs is None else CRS.from_wkt(crs))
        assert grid.dtypes[0] == dtype and list(grid.descriptions) == names and grid.tags()["EMB_DIM"] == "5"
        stored = grid.read(masked=True)
        mask = np.zeros((5, 9, 7), dtype=bool)
        mask[:, 2, 3] = True
        np.testing.assert_array_equal(np.ma.getmaskarray(stored), mask)
        meant = stored.astype(np.float64) * np.reshape(grid.scales, (5, 1, 1)) + np.reshape(grid.offsets, (5, 1, 1))
        step = (np.nanmax(values, axis=(1, 2)) - np.nanmin(values, axis=(1, 2))) / 254 if dtype == "int8" else 0
        assert (np.abs(meant - values).max(axis=(1, 2)) <= np.asarray(step) * 0.5001 + 1e-12).all()
        if dtype == "int8":
            assert np.abs(stored).max() == 127, "the whole range of numbers is used"


def test_a_large_grid_has_tiles_and_overviews_that_are_averages_of_what_is_valid(tmp_path):
    rows, columns = np.mgrid[:300, :280].astype(np.float32)
    values = np.stack([rows, columns, np.full_like(rows, 5.0)])
    values[:, 100:130] = np.nan
    with spooled(tmp_path, values) as spool:
        geometry = RasterGeometry(UTM, SOUTH_UP, None)
        error = cog_tokens.write(tmp_path / "g.tif", spool, geometry, names=list("abc"), tags={})
    assert error["largest_difference"] == pytest.approx(299 / 254 / 2, rel=0.02) and error["mean_cosine"] > 0.999
    with rasterio.open(tmp_path / "g.tif") as grid:
        assert grid.block_shapes[0] == (128, 128) and grid.overviews(1) == [2, 4]
        assert grid.tags(ns="IMAGE_STRUCTURE") == {"COMPRESSION": "ZSTD", "INTERLEAVE": "PIXEL", "LAYOUT": "COG"} | {
            name: value for name, value in grid.tags(ns="IMAGE_STRUCTURE").items() if name == "PREDICTOR"
        }
        small = grid.read(out_shape=(3, 150, 140)).astype(float)
        scale, offset = grid.scales, grid.offsets
        assert (small[:, 50:65] == -128).all() and (small[:, :49] != -128).all()
        expected = rows.reshape(150, 2, 140, 2).mean(axis=(1, 3))
        np.testing.assert_allclose(small[0, :49] * scale[0] + offset[0], expected[:49], atol=1.3)
        # A band that is constant has no step of its own.
        assert (scale[2], offset[2]) == (1.0, 5.0) and set(np.unique(grid.read(3))) == {-128, 0}


def test_colours_are_an_rgb_picture_on_the_map(tmp_path):
    colours = np.random.default_rng(0).integers(1, 256, (3, 5, 6)).astype(np.uint8)
    cog_tokens.write_colours(tmp_path / "c.tif", colours, RasterGeometry(UTM, ROTATED, None))
    with rasterio.open(tmp_path / "c.tif") as picture:
        assert [one.name for one in picture.colorinterp] == ["red", "green", "blue"] and picture.nodata == 0
        np.testing.assert_array_equal(picture.read(), colours)
        assert tuple(picture.transform)[:6] == ROTATED


def test_an_unknown_type_of_numbers_is_refused():
    with pytest.raises(ConfigError, match="--dtype int16 is none of int8, float32, float16"):
        cog_tokens.check_dtype("int16")
