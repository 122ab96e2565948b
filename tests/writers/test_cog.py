"""Class maps as COG, with rasterio as oracle of grid, values and structure."""

from __future__ import annotations

import resource
import warnings
from pathlib import Path

import numpy as np
import pytest
import rasterio
from affine import Affine
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning

from geomed_mae.errors import OutputError
from geomed_mae.image import RasterGeometry
from geomed_mae.writers import NODATA, cog, cog_rows
from geomed_mae.writers.legend import colours

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
        assert dataset.colormap(1)[1] == colours(2)[1]
        assert {"CLASS_0": "background", "CLASS_1": "water"}.items() <= dataset.tags(1).items()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["map.qml", "map.tif", "map.tif.aux.xml"], "the legends, and no temporary file"


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
    assert (tmp_path / "whole.tif").read_bytes() == (tmp_path / "streamed.tif").read_bytes(), "nor a date in it"


def test_rows_that_are_missing_or_too_many_are_no_map(tmp_path):
    geometry = RasterGeometry(UTM, NORTH_UP, None)
    with (
        pytest.raises(ValueError, match=r"'map.tif' has 90 rows, of which 60 were not put"),
        cog.stream(tmp_path / "map.tif", (90, 40), geometry, CLASSES) as raster,
    ):
        raster.put(class_map(30, 40))
    with (
        pytest.raises(ValueError, match=r"does not continue \(1, 90, 40\) at row 60"),
        cog.stream(tmp_path / "map.tif", (90, 40), geometry, CLASSES) as raster,
    ):
        raster.put(class_map(60, 40))
        raster.put(class_map(31, 40))
    with (
        pytest.raises(ValueError, match=r"does not continue \(1, 90, 40\) at row 0"),
        cog.stream(tmp_path / "map.tif", (90, 40), geometry, CLASSES) as raster,
    ):
        raster.put(class_map(90, 41))
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def room():
    """Limits the size of every file that this process writes, as a full disk does; lifted at the end."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("share", [0.3, 0.9, 1.0])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, room, share):
    rng, geometry = np.random.default_rng(1), RasterGeometry(UTM, NORTH_UP, None)
    values = rng.integers(0, 2, (900, 1100)).astype(np.uint8)
    cog.write(tmp_path / "map.tif", values, geometry, CLASSES)
    size = (tmp_path / "map.tif").stat().st_size
    for path in tmp_path.iterdir():
        path.unlink()
    room(int(share * size) - 1)
    with pytest.raises(OutputError, match=r"'map.tif' cannot be written|rows \d+ and following cannot be written"):
        cog.write(tmp_path / "map.tif", values, geometry, CLASSES)
    assert list(tmp_path.iterdir()) == []


def test_what_is_read_back_is_compared_with_what_was_put(tmp_path, monkeypatch):
    def lossy(pieces, final, bands):
        with rasterio.open(pieces, "r+") as dataset:
            dataset.write(
                np.zeros((1, 1), np.uint8) + 1 - dataset.read(1)[699, 1099], 1, window=((699, 700), (1099, 1100))
            )
        copied(pieces, final, bands)

    copied = cog_rows._copy
    monkeypatch.setattr(cog_rows, "_copy", lossy)
    with pytest.raises(OutputError, match="what was written differs at row 512, column 1024"):
        cog.write(tmp_path / "map.tif", class_map(700, 1100), RasterGeometry(UTM, NORTH_UP, None), CLASSES)
    assert list(tmp_path.iterdir()) == []


def laid_out(path: Path) -> None:
    """Demand the layout of a COG, by the rules of GDAL's own validator (validate_cloud_optimized_geotiff.py)."""
    with rasterio.open(path) as dataset:
        assert dataset.tags(ns="IMAGE_STRUCTURE")["LAYOUT"] == "COG" and dataset.profile["tiled"]
        levels = [None, *range(len(dataset.overviews(1)))]
        assert max(dataset.shape) <= 512 or len(levels) > 1
        factors = [1, *dataset.overviews(1)]
        assert factors == sorted(factors)

        def number(item: str, level: int | None) -> int:
            return int(dataset.get_tag_item(item, "TIFF", bidx=1, ovr=level))

        heads = [number("IFD_OFFSET", level) for level in levels]
        blocks = [number("BLOCK_OFFSET_0_0", level) for level in levels]
        with path.open("rb") as file:
            start = file.read(2000)
        assert b"LAYOUT=IFDS_BEFORE_DATA" in start and b"BLOCK_ORDER=ROW_MAJOR" in start
        assert heads == sorted(heads) and heads[0] < 1000, "the image's directory first, then its overviews'"
        assert blocks == sorted(blocks, reverse=True) and blocks[-1] > heads[-1], "the smallest overview's pixels first"


def test_directories_come_before_pixels_and_small_overviews_before_large(tmp_path):
    cog.write(tmp_path / "map.tif", class_map(1500, 1100), RasterGeometry(UTM, NORTH_UP, None), CLASSES)
    laid_out(tmp_path / "map.tif")


PLACES = {
    "degrees": (CRS.from_epsg(4326).to_wkt(), (0.1 + 0.2, 0.0, -179.123456789012, 0.0, -1 / 3, 71.9)),
    "Europe, northing first": (CRS.from_epsg(3035).to_wkt(), NORTH_UP),
    "a plant's own grid": (
        'LOCAL_CS["Werk",UNIT["metre",1],AXIS["E",EAST],AXIS["N",NORTH]]',
        (0.02, 0, 3, 0, -0.02, 7),
    ),
    "no EPSG code": (CRS.from_proj4("+proj=sinu +R=6371007.181 +units=m").to_wkt(), NORTH_UP),
    "with heights": (CRS.from_user_input("EPSG:32633+5773").to_wkt(), NORTH_UP),
    "a datum shift": (CRS.from_proj4("+proj=utm +zone=33 +ellps=bessel +towgs84=598.1,73.7,418.2").to_wkt(), NORTH_UP),
    "feet": (CRS.from_epsg(2227).to_wkt(), ROTATED),
    "no system but a grid": (None, (2.0, 0.0, 100.0, 0.0, -2.0, 50.0)),
    "mirrored": (UTM, (-10.0, 0.0, 500000.0, 0.0, -10.0, 4000000.0)),
}


@pytest.mark.parametrize("place", PLACES)
def test_what_a_geotiff_said_of_its_place_comes_back_word_for_word(tmp_path, place):
    crs, transform = PLACES[place]
    size = {"driver": "GTiff", "height": 20, "width": 30, "count": 1, "dtype": "uint8"}
    with rasterio.open(tmp_path / "image.tif", "w", crs=crs, transform=Affine(*transform), **size) as image:
        image.write(np.ones((1, 20, 30), np.uint8))
    with rasterio.open(tmp_path / "image.tif") as image:
        said = RasterGeometry(image.crs.to_wkt() if image.crs else None, tuple(image.transform)[:6], None)
    assert said.transform == transform
    cog.write(tmp_path / "map.tif", class_map(20, 30), said, CLASSES)
    with rasterio.open(tmp_path / "map.tif") as found:
        assert (found.crs.to_wkt() if found.crs else None, tuple(found.transform)[:6]) == (said.crs, said.transform)
    with rasterio.Env(GDAL_PAM_ENABLED="NO"), rasterio.open(tmp_path / "map.tif") as found:
        assert (found.crs.to_wkt() if found.crs else None) == said.crs, "the file alone, too"


def test_a_system_that_geotiff_cannot_hold_is_in_the_side_car(tmp_path):
    pole = CRS.from_proj4("+proj=ob_tran +o_proj=longlat +o_lon_p=0 +o_lat_p=39.25 +lon_0=18")
    geometry = RasterGeometry(pole.to_wkt(), (0.1, 0.0, 5.0, 0.0, -0.1, 7.0), None)
    with cog.stream_chances(tmp_path / "p.tif", (20, 30), geometry, CLASSES) as raster:
        raster.put(np.full((2, 20, 30), 0.5, np.float32))
    cog.write(tmp_path / "map.tif", class_map(20, 30), geometry, CLASSES)
    # Our readers tell GDAL of this process not to look for side-cars, if a test before this one has used them.
    plain = rasterio.Env(GDAL_PAM_ENABLED="YES", GDAL_DISABLE_READDIR_ON_OPEN="FALSE")
    for name in ("map.tif", "p.tif"):
        with plain, rasterio.open(tmp_path / name) as found:
            assert found.crs == pole and found.transform == Affine(*geometry.transform)


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


def test_neighbouring_classes_have_different_colours():
    table = colours(40)
    assert len({table[number] for number in range(40)}) == 40
    assert table[NODATA][3] == 0
