"""GeoTIFF: pixels equal rasterio's, geometry equals the file's, hostile and broken files end in a typed reason.

Numbers of faults are those of the fault list that the reader was built against.
"""

from __future__ import annotations

import contextlib
import errno
import http.server
import logging
import os
import resource
import subprocess
import sys
import threading
import time
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from geomed_mae import readers
from geomed_mae.archives.build import scan_archive
from geomed_mae.errors import ReadError
from geomed_mae.image import Channel, Image, PlaneGeometry, RasterGeometry
from geomed_mae.modalities import Modality, Normalisation, resolve_modalities
from geomed_mae.readers import IGNORE, geotiff, read_images, survey
from geomed_mae.readers.geotiff import pixels as geotiff_read
from geomed_mae.readers.geotiff import structure as geotiff_structure
from geomed_mae.readers.geotiff.open import opened, rasterio
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import list_files
from tests.make_data import UTM_10M, plain_tags, write_geotiff, write_raw_tiff

RIO = rasterio()
RNG = np.random.default_rng(7)
AUTO = resolve_modalities("auto")
CANARY = 201
"""Pixel value, and text, of files that must never be read."""


def pixels(bands=2, rows=40, columns=50, dtype=np.uint16):
    return RNG.integers(1, 250, (bands, rows, columns)).astype(dtype)


def one(path, modality="auto", window=None) -> Image:
    found = survey([path], resolve_modalities(modality))
    assert not found.refusals, found.refusals
    return readers.read(found.sources[0], window)


def flags(path, modality="auto"):
    return survey([path], resolve_modalities(modality)).sources[0].flags


def refusal(path, modality="auto"):
    found = survey([path], resolve_modalities(modality))
    assert not found.sources, "it was accepted"
    return found.refusals[0]


def outcome(path):
    """Return "ok" or the name of the reason, whether it shows in the header or in the pixels."""
    try:
        read_images(path)
    except ReadError as error:
        assert str(path.parent) not in str(error), "a message names the file, not its folder"
        return error.reason
    return "ok"


# pixels


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"])
@pytest.mark.parametrize("interleave", ["band", "pixel"])
def test_pixels_equal_rasterio(tmp_path, dtype, interleave):
    array = RNG.integers(1, 100, (3, 37, 53)).astype(dtype)
    path = write_geotiff(tmp_path / "a.tif", array, interleave=interleave, tiled=True, blockxsize=16, blockysize=16)
    image = one(path)
    with RIO.open(path) as file:
        np.testing.assert_array_equal(image.array, file.read().astype(np.float32))
    assert image.valid.all() and image.valid.shape == (1, 37, 53)


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw", "zstd", "packbits"])
@pytest.mark.parametrize("layout", [{}, {"tiled": True, "blockxsize": 16, "blockysize": 32}])
def test_any_window_equals_the_oracle(tmp_path, compress, layout, monkeypatch):
    monkeypatch.setattr(geotiff_read, "CHUNK_BYTES", 4096)  # many chunks, so that their seams are tested
    path = write_geotiff(tmp_path / "a.tif", pixels(rows=70, columns=90), compress=compress, **layout)
    with RIO.open(path) as file:
        whole = file.read()
    for rows, columns in [((0, 70), (0, 90)), ((3, 41), (17, 90)), ((69, 70), (0, 1)), ((31, 33), (15, 17))]:
        image = one(path, window=(slice(*rows), slice(*columns)))
        np.testing.assert_array_equal(image.array, whole[:, slice(*rows), slice(*columns)])
        assert image.geometry.transform[2] == UTM_10M[2] + 10 * columns[0]
        assert image.geometry.transform[5] == UTM_10M[5] - 10 * rows[0]


@pytest.mark.parametrize(
    "options", [{"BIGTIFF": "YES"}, {"ENDIANNESS": "BIG"}, {"ENDIANNESS": "BIG", "BIGTIFF": "YES"}]
)
def test_both_byte_orders_and_big_tiff_are_read(tmp_path, options):
    array = pixels()
    np.testing.assert_array_equal(one(write_geotiff(tmp_path / "a.tif", array, **options)).array, array)


def test_a_window_outside_the_image_is_a_callers_error(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels())
    for window in [(slice(0, 41), slice(0, 5)), (slice(5, 5), slice(0, 5)), (slice(-3, 5), slice(0, 5))]:
        with pytest.raises(ValueError, match="is empty or not inside 0:40"):
            one(path, window=window)


def test_a_read_beyond_the_memory_limit_asks_for_windows(tmp_path, monkeypatch):
    path = write_geotiff(tmp_path / "a.tif", pixels())
    monkeypatch.setattr(geotiff_read, "MAX_READ_VALUES", 100)
    with pytest.raises(ReadError, match="read windows of it") as caught:
        one(path)
    assert caught.value.reason == "TOO_LARGE"
    assert one(path, window=(slice(0, 5), slice(0, 5))).array.shape == (2, 5, 5)


# physical values (fault 20)


def test_the_files_scale_wins_over_the_modalitys(tmp_path):
    array = pixels(1)
    own = write_geotiff(tmp_path / "a.tif", array, descriptions=["B04"], scales=[0.5], offsets=[-3.0])
    np.testing.assert_allclose(one(own, "sentinel2-l2a").array, array * 0.5 - 3)
    bare = write_geotiff(tmp_path / "b.tif", array, descriptions=["B04"])
    np.testing.assert_allclose(one(bare, "sentinel2-l2a").array, array * 1e-4, rtol=1e-6)
    assert one(bare, "sentinel2-l2a").channels[0].unit == "reflectance"


def test_each_band_has_its_own_scale(tmp_path):
    array = pixels(2)
    path = write_geotiff(tmp_path / "a.tif", array, scales=[2.0, 1.0], offsets=[0.0, 5.0])
    np.testing.assert_allclose(one(path).array, array * np.array([2, 1])[:, None, None] + [[[0]], [[5]]])


def test_bands_of_which_some_declare_a_scale_and_some_none_are_ambiguous(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels(2), descriptions=["B03", "B04"], scales=[1e-4, 1.0])
    assert refusal(path, "sentinel2-l2a").reason is Reason.UNIT_CONFLICT
    assert "some of its bands declare a scale and some none" in refusal(path, "sentinel2-l2a").detail


@pytest.mark.parametrize("scale", [0.0, float("nan"), float("inf")])
def test_an_impossible_scale_is_refused(tmp_path, scale):
    path = write_geotiff(tmp_path / "a.tif", pixels(1), scales=[scale])
    assert refusal(path).reason is Reason.UNIT_CONFLICT


def test_values_beyond_float32_are_invalid_not_infinite(tmp_path):
    array = np.full((1, 4, 4), 1e300)
    array[0, 0, 0] = 5
    image = one(write_geotiff(tmp_path / "a.tif", array))
    assert image.valid.sum() == 1 and np.isfinite(image.array).all()


# validity (faults 6, 8, 9)


def test_nodata_is_compared_in_the_stored_type_and_per_band(tmp_path):
    array = pixels(2)
    array[0, 3, 4] = array[1, 5, 6] = 999
    image = one(write_geotiff(tmp_path / "a.tif", array, nodata=999))
    np.testing.assert_array_equal(image.valid, array != 999)
    assert (image.array[~image.valid] == 0).all()


@pytest.mark.parametrize("nodata", [-9999.0, float("nan"), -3.4028234663852886e38, 0.1])
def test_float_nodata_matches_gdals_own_mask(tmp_path, nodata):
    array = RNG.normal(size=(1, 20, 30)).astype(np.float32)
    array[0, 4:9, 7] = np.float32(nodata)
    path = write_geotiff(tmp_path / "a.tif", array, nodata=nodata)
    with RIO.open(path) as file:
        np.testing.assert_array_equal(one(path).valid, file.read_masks() > 0)


def test_nan_and_infinity_are_invalid_whatever_nodata_says(tmp_path):
    array = RNG.normal(size=(2, 5, 5)).astype(np.float32)
    array[0, 0, 0], array[1, 1, 1], array[0, 2, 2] = np.nan, np.inf, -7
    image = one(write_geotiff(tmp_path / "a.tif", array, nodata=-7))
    assert image.valid.sum() == 47 and np.isfinite(image.array).all()


def test_the_modalitys_nodata_counts_where_the_file_declares_none(tmp_path):
    array = pixels(1)
    array[0, :5] = 0
    declared = write_geotiff(tmp_path / "a.tif", array, descriptions=["B04"], nodata=77)
    silent = write_geotiff(tmp_path / "b.tif", array, descriptions=["B04"])
    assert one(silent, "sentinel2-l2a").valid_fraction == (array != 0).mean()
    assert one(declared, "sentinel2-l2a").valid_fraction == (array != 77).mean()


@pytest.mark.parametrize("text", ["-9999", "nan", "1e10", "0.5", "what"])
def test_nodata_that_cannot_occur_needs_a_modality_that_knows_better(tmp_path, text):
    path = write_raw_tiff(tmp_path / "a.tif", plain_tags(8, 8, t42113=(2, text)), tail=bytes(range(64)))
    assert refusal(path).reason is Reason.NODATA_INVALID
    assert text in refusal(path).detail
    knows = Modality(
        name="m", title="", geometry="raster", formats=("geotiff",), unit="", nodata=5,
        normalise=Normalisation(method="archive"),
    )  # fmt: skip
    source = survey([path], [knows]).sources[0]
    assert "NODATA_INVALID" in source.flags and readers.read(source).valid.sum() == 63


def test_nodata_that_cannot_occur_says_how_to_get_rid_of_it_and_does_not_matter_beside_an_alpha_band(tmp_path):
    """Drone mosaics come as 8-bit colours with alpha and nodata -10000: the alpha band says what is valid."""
    tags = {"t42113": (2, "-10000"), "t262": (3, [2]), "t258": (3, [8] * 4), "t277": (3, [4]), "t338": (3, [2])}
    array = np.arange(8 * 8 * 4, dtype=np.uint8).reshape(8, 8, 4)
    array[..., 3] = 255
    array[:3, :, 3] = 0
    path = write_raw_tiff(tmp_path / "a.tif", plain_tags(8, 8, **tags, t279=(4, 256)), tail=array.tobytes())
    image = one(path)
    np.testing.assert_array_equal(image.valid[0], array[..., 3] > 0)
    np.testing.assert_array_equal(image.array[:, 3:], array.transpose(2, 0, 1)[:3, 3:])
    assert "NODATA_INVALID" in flags(path)
    plain = write_raw_tiff(tmp_path / "b.tif", plain_tags(8, 8, t42113=(2, "-10000")), tail=bytes(range(64)))
    assert "gdal_edit.py -unsetnodata" in refusal(plain).detail


def test_an_alpha_band_is_validity_not_a_channel(tmp_path):
    array = pixels(4, dtype=np.uint8)
    array[3, :10] = 0
    path = write_geotiff(tmp_path / "a.tif", array, colours=["red", "green", "blue", "alpha"])
    image = one(path)
    assert image.modality == "rgb" and [c.name for c in image.channels] == ["red", "green", "blue"]
    np.testing.assert_array_equal(image.valid[0], array[3] > 0)


def test_an_internal_mask_is_honoured(tmp_path):
    mask = RNG.random((40, 50)) > 0.3
    path = write_geotiff(tmp_path / "a.tif", pixels(), mask=mask)
    np.testing.assert_array_equal(one(path).valid[0], mask)


def test_internal_mask_and_nodata_both_count(tmp_path):
    array, mask = pixels(1), RNG.random((40, 50)) > 0.3
    path = write_geotiff(tmp_path / "a.tif", array, mask=mask, nodata=9)
    np.testing.assert_array_equal(one(path).valid, mask[None] & (array != 9))


@pytest.mark.parametrize("interleave", ["band", "pixel"])
def test_blocks_that_were_never_written_are_invalid(tmp_path, interleave):
    path = tmp_path / "sparse.tif"
    profile = {"driver": "GTiff", "count": 2, "height": 70, "width": 64, "dtype": "uint8", "interleave": interleave}
    profile |= {"tiled": True, "blockxsize": 32, "blockysize": 32, "SPARSE_OK": True, "photometric": "MINISBLACK"}
    with RIO.open(path, "w", transform=RIO.Affine(*UTM_10M), **profile) as file:
        file.write(np.full((2, 32, 32), 9, np.uint8), window=RIO.windows.Window(32, 32, 32, 32))
    image = one(path)
    expected = np.zeros((70, 64), bool)
    expected[32:64, 32:] = True
    np.testing.assert_array_equal(image.valid, expected[None])
    assert "SPARSE" in flags(path)
    part = one(path, window=(slice(30, 66), slice(20, 40)))
    np.testing.assert_array_equal(part.valid[0], expected[30:66, 20:40])


# geometry (faults 18, 19)


def test_the_native_grid_is_kept(tmp_path):
    geometry = one(write_geotiff(tmp_path / "a.tif", pixels())).geometry
    assert geometry.transform == UTM_10M and geometry.gsd_m == (10, 10)
    assert RIO.crs.CRS.from_wkt(geometry.crs).to_epsg() == 32611


@pytest.mark.parametrize(
    ("crs", "transform", "expected"),
    [
        ("EPSG:4326", (1e-4, 0, 10, 0, -1e-4, 60), (11.14, 5.58)),  # cos(60 degrees) = 0.5
        ("EPSG:3857", (10, 0, 1e6, 0, -10, 8399737.9), (5, 5)),  # 60 N: a Mercator metre is half a metre
        ("EPSG:2229", (100, 0, 6e6, 0, -100, 2e6), (30.48, 30.48)),  # US survey feet
        ("EPSG:32611", (10, 0, 5e5, 0, 10, 4e6), (10, 10)),  # south up
        ("EPSG:32611", (6, 8, 5e5, 8, -6, 4e6), (10, 10)),  # rotated
        (None, UTM_10M, None),
    ],
)
def test_ground_sampling_distance_is_in_metres_for_every_grid(tmp_path, crs, transform, expected):
    path = write_geotiff(tmp_path / "a.tif", pixels(1), crs=crs, transform=transform)
    gsd = one(path).geometry.gsd_m
    assert gsd is None if expected is None else gsd == pytest.approx(expected, rel=1e-3)
    assert ("ROTATED" in flags(path)) == (transform[1] != 0)


def test_without_any_georeferencing_the_grid_is_the_pixels_and_no_warning_escapes(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write_geotiff(tmp_path / "a.tif", pixels(), crs=None, transform=None)
    assert one(path).geometry == RasterGeometry(None, (1, 0, 0, 0, 1, 0), None)


def points(path, array, **options):
    """Write a raster that is placed by three ground control points alone, as radar products are."""
    corners = [(0, 0), (0, array.shape[1]), (array.shape[0], 0)]
    control = [RIO.control.GroundControlPoint(row=r, col=c, x=11 + c * 1e-3, y=48 - r * 1e-3, z=0) for r, c in corners]
    return write_geotiff(path, array, transform=None, crs="EPSG:4326", gcps=control, **options)


@pytest.mark.parametrize("options", [{}, {"bigtiff": "YES"}, {"endianness": "BIG"}])
def test_control_points_are_no_grid_and_leave_no_unset_numbers(tmp_path, options):
    array = pixels(1)
    path = points(tmp_path / "a.tif", array[0], **options)
    image = one(path)
    assert image.geometry == RasterGeometry(None, (1, 0, 0, 0, 1, 0), None)
    assert "GCPS_IGNORED" in flags(path)
    np.testing.assert_array_equal(image.array, array)
    labels = readers.read_labels(path, image)
    np.testing.assert_array_equal(labels.array, array[0])


def test_a_coordinate_system_without_a_grid_places_nothing(tmp_path):
    path = write_raw_tiff(
        tmp_path / "a.tif",
        plain_tags(8, 8, t34735=(3, [1, 1, 0, 3, 1024, 0, 1, 1, 1025, 0, 1, 1, 3072, 0, 1, 32633])),
        tail=bytes(range(64)),
    )
    image = one(path)
    assert image.geometry == RasterGeometry(None, (1, 0, 0, 0, 1, 0), None)
    assert "GRID_MISSING" in flags(path)


def test_a_matrix_alone_is_a_grid(tmp_path):
    matrix = (12, [3.0, -4.0, 0, 500000, -4.0, -3.0, 0, 4000000, 0, 0, 0, 0, 0, 0, 0, 1.0])
    path = write_raw_tiff(tmp_path / "a.tif", plain_tags(8, 8, t34264=matrix), tail=bytes(range(64)))
    assert one(path).geometry.transform == (3.0, -4.0, 500000.0, -4.0, -3.0, 4000000.0)


def test_a_map_of_another_planet_has_no_footprint_on_this_one(tmp_path):
    """PROJ finds no way from a datum of Europa to WGS84; rasterio then raises what is none of its own errors."""
    europa = (
        'PROJCS["Equirectangular EUROPA",GEOGCS["GCS_EUROPA",DATUM["D_EUROPA",SPHEROID["EUROPA",1560800,0]],'
        'PRIMEM["Reference_Meridian",0],UNIT["degree",0.0174532925199433]],PROJECTION["Equirectangular"],'
        'PARAMETER["standard_parallel_1",0],PARAMETER["central_meridian",180],UNIT["metre",1]]'
    )
    path = write_geotiff(tmp_path / "a.tif", pixels(1), crs=europa, transform=(200, 0, 1e5, 0, -200, 3e5))
    image = one(path)
    assert image.geometry.crs and image.geometry.gsd_m == (200, 200)
    assert geotiff.footprint(image.geometry, image.spatial_shape) is None
    assert len(scan_archive([path], "auto")) == 1


def test_threads_open_files_without_warnings(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        path = write_geotiff(tmp_path / "a.tif", pixels(), crs=None, transform=None)
    raised = []

    def work():
        try:
            for _ in range(20):
                one(path)
        except Exception as error:
            raised.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert raised == []


def test_a_transform_that_cannot_be_inverted_is_refused(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels(1), transform=(10, 10, 5e5, 5, 5, 4e6))
    assert refusal(path).reason is Reason.BAD_TRANSFORM


def test_the_footprint_is_in_longitude_and_latitude(tmp_path):
    image = one(write_geotiff(tmp_path / "a.tif", pixels()))
    corners = geotiff.footprint(image.geometry, image.spatial_shape)
    assert corners[0] == pytest.approx((-117.0, 36.1443), abs=1e-3)  # 500000 E is the central meridian of zone 11
    assert corners[1][0] > corners[0][0] and corners[3][1] < corners[0][1] and len(corners) == 4
    assert geotiff.footprint(RasterGeometry(None, UTM_10M, None), (5, 5)) is None


def test_a_footprint_across_the_antimeridian_runs_on_past_180(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels(), crs="EPSG:32660", transform=(1000, 0, 8e5, 0, -1000, 1e5))
    image = one(path)
    longitudes = [lon for lon, _ in geotiff.footprint(image.geometry, image.spatial_shape)]
    assert min(longitudes) > 179 and 180 < max(longitudes) < 181


# which modality (fault 22)


def test_described_bands_are_reordered_by_name_not_by_position(tmp_path):
    array = pixels(3)
    path = write_geotiff(tmp_path / "a.tif", array, descriptions=["b8a", "B2", " red "])
    image = one(path, "sentinel2-l2a")
    assert [c.name for c in image.channels] == ["B8A", "B02", "B04"]
    np.testing.assert_allclose(image.select(("B02",)).array[0], array[1] * 1e-4, rtol=1e-6)
    assert flags(path, "sentinel2-l2a") == ()


def test_auto_prefers_the_modality_that_knows_every_band(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels(5), descriptions=["B2", "B3", "B4", "B8", "B12"])
    assert one(path).modality == "sentinel2-l2a" and "MODALITY_AMBIGUOUS" in flags(path)
    cirrus = write_geotiff(tmp_path / "b.tif", pixels(2), descriptions=["B10", "B8A"])
    assert one(cirrus).modality == "sentinel2-l1c" and flags(cirrus) == ()


def test_auto_does_not_choose_between_modalities_of_different_scale(tmp_path):
    """B2, B3, B4 are bands of Sentinel-2 and of Landsat: a wrong guess would change every number."""
    path = write_geotiff(tmp_path / "a.tif", pixels(3), descriptions=["B2", "B3", "B4"])
    assert one(path).modality == "unnamed-raster"
    assert flags(path) == ("MODALITY_UNNAMED", "MODALITY_AMBIGUOUS")
    assert refusal(path, ["landsat8", "sentinel2-l2a"]).reason is Reason.MODALITY_MISMATCH
    assert "name one" in refusal(path, ["landsat8", "sentinel2-l2a"]).detail
    assert one(path, "landsat8").modality == "landsat8"


def test_undescribed_bands_take_the_order_of_the_modality_that_the_user_named(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels(6, dtype=np.uint8))
    assert [c.name for c in one(path, "landsat7").channels] == ["B1", "B2", "B3", "B4", "B5", "B7"]
    assert flags(path, "landsat7") == ("ORDER_ASSUMED",)
    assert flags(path, ["landsat7", "sentinel1"]) == ("ORDER_ASSUMED",)
    assert flags(path) == ("MODALITY_UNNAMED",)
    assert [c.name for c in one(path).channels] == [f"band{n}" for n in range(1, 7)]


@pytest.mark.parametrize("names", [["Band 1", "Band 2"], ["bands", "bands"], ["1", "2"]])
def test_descriptions_that_say_nothing_count_as_none(tmp_path, names):
    path = write_geotiff(tmp_path / "a.tif", pixels(2, dtype=np.float32), descriptions=names)
    assert one(path).modality == "unnamed-raster"
    assert [c.polarisation for c in one(path, "sentinel1").channels] == ["VV", "VH"]


def test_a_wrong_number_or_name_of_bands_is_a_mismatch_that_says_which(tmp_path):
    few = write_geotiff(tmp_path / "a.tif", pixels(5))
    assert refusal(few, "landsat7").reason is Reason.BAND_MISMATCH
    assert "5 undescribed bands cannot be the 6 of landsat7" in refusal(few, "landsat7").detail
    odd = write_geotiff(tmp_path / "b.tif", pixels(3), descriptions=["NDVI", "B8", "B12"])
    assert "bands `NDVI` are not bands of sentinel2-l2a" in refusal(odd, "sentinel2-l2a").detail
    assert refusal(few, ["landsat7", "sentinel1"]).reason is Reason.MODALITY_MISMATCH
    assert "landsat7 (6), sentinel1 (2)" in refusal(few, ["landsat7", "sentinel1"]).detail
    assert refusal(few, "ct").reason is Reason.MODALITY_MISMATCH


def test_bands_that_a_modality_leaves_out_are_left_out_with_a_flag_where_the_user_named_it(tmp_path):
    stored = pixels(4)
    path = write_geotiff(tmp_path / "a.tif", stored, descriptions=["scl", "B8", "TCI_R", "B12"])
    image = one(path, "sentinel2-l2a")
    assert [channel.name for channel in image.channels] == ["B08", "B12"]
    np.testing.assert_allclose(image.array, np.where(image.valid, stored[[1, 3]] * 1e-4, 0), rtol=1e-6)
    assert flags(path, "sentinel2-l2a") == ("BANDS_LEFT_OUT",)
    assert one(path).modality == "unnamed-raster" and len(one(path).channels) == 4, "auto leaves nothing out"
    nothing = write_geotiff(tmp_path / "b.tif", pixels(2), descriptions=["SCL", "TCI_R"])
    assert "bands `SCL`, `TCI_R` are not bands of sentinel2-l2a" in refusal(nothing, "sentinel2-l2a").detail
    odd = write_geotiff(tmp_path / "c.tif", pixels(3), descriptions=["SCL", "B8", "NDVI"])
    assert "bands `NDVI` are not bands" in refusal(odd, "sentinel2-l2a").detail


def test_a_band_described_twice_is_not_taken_for_two_channels(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels(2), descriptions=["B04", "red"])
    assert refusal(path, "sentinel2-l2a").reason is Reason.BAND_MISMATCH


def test_colours_name_the_bands_of_a_picture_in_any_order(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels(3, dtype=np.uint8), colours=["blue", "green", "red"])
    assert one(path).modality == "rgb" and [c.name for c in one(path).channels] == ["blue", "green", "red"]
    deep = write_geotiff(tmp_path / "b.tif", pixels(3), colours=["blue", "green", "red"])
    assert one(deep).modality == "unnamed-raster"
    assert [c.name for c in one(deep, "rgb").channels] == ["blue", "green", "red"]
    # A preview is not reflectance, though red is a name of one of Sentinel-2's bands.
    assert refusal(path, "sentinel2-l2a").reason is Reason.BAND_MISMATCH


# damaged files (faults 1, 4, 5, 24, 25, 26)


@pytest.mark.parametrize(
    "content", [b"II*\0", b"<html></html>", b"\x89PNG\r\n\x1a\n0000", b"II*\0\xff\xff\xff\xff", b"MM\0+\0\0"]
)
def test_what_is_no_tiff_or_only_its_first_bytes_has_a_reason(tmp_path, content):
    (tmp_path / "a.tif").write_bytes(content)
    assert outcome(tmp_path / "a.tif") in ("NOT_TIFF", "TRUNCATED", "MALFORMED")


@pytest.mark.parametrize("compress", ["none", "deflate", "lzw", "zstd"])
@pytest.mark.parametrize("tiled", [False, True])
def test_a_truncated_file_is_known_from_its_header_alone(tmp_path, compress, tiled):
    layout = {"tiled": True, "blockxsize": 64, "blockysize": 64} if tiled else {}
    whole = write_geotiff(tmp_path / "w.tif", pixels(2, 256, 256), compress=compress, **layout).read_bytes()
    for share in (0.2, 0.6, 0.9, 0.99):
        path = tmp_path / f"{share}.tif"
        path.write_bytes(whole[: int(len(whole) * share)])
        assert refusal(path).reason is Reason.TRUNCATED


def test_pixels_that_do_not_decode_have_a_reason_and_no_path(tmp_path, caplog, capfd):
    path = write_geotiff(tmp_path / "secret-name.tif", pixels(1, 64, 64), compress="deflate")
    data = bytearray(path.read_bytes())
    with RIO.open(path) as file:
        start = int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    data[start : start + 200] = bytes(200)
    path.write_bytes(data)
    with (
        caplog.at_level(logging.DEBUG),
        pytest.raises(ReadError, match=r"pixel data of secret-name\.tif does not decode") as caught,
    ):
        one(path)
    assert caught.value.reason == "DECODE_FAILED" and caught.value.__cause__ is None
    assert str(tmp_path) not in caplog.text + "".join(capfd.readouterr())


def test_a_file_that_changed_or_vanished_after_its_header_was_read(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels())
    source = survey([path], AUTO).sources[0]
    write_geotiff(path, pixels(2, 8, 8))
    with pytest.raises(ReadError, match="has changed since"):
        readers.read(source)
    path.unlink()
    with pytest.raises(ReadError, match="does not exist") as caught:
        readers.read(source)
    assert caught.value.reason == "VANISHED"


def test_a_forbidden_file_has_its_reason(tmp_path, monkeypatch):
    path = write_geotiff(tmp_path / "a.tif", pixels())

    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, "no", str(path))

    monkeypatch.setattr(Path, "open", forbidden)  # chmod does not stop root
    with pytest.raises(ReadError, match="may not be read by this user") as caught:
        geotiff_structure.read_structure(path)
    assert caught.value.reason == "PERMISSION"


@pytest.mark.parametrize("name", ["a\nb.tif", "a\x1b[31m.tif", "a\udcff.tif", "zip!x.tif", "x" * 251 + ".tif"])
def test_odd_names_are_no_obstacle(tmp_path, name):
    array = pixels()
    source = write_geotiff(tmp_path / "plain.tif", array)
    source.rename(tmp_path / name)
    np.testing.assert_array_equal(one(tmp_path / name).array, array)


def test_any_byte_of_a_header_may_lie_without_a_crash(tmp_path):
    """Bytes all over the directory set to 255 and to one more: an image or a typed reason, never anything else."""
    whole = write_geotiff(tmp_path / "w.tif", pixels(2, 16, 16), compress="deflate", nodata=3).read_bytes()
    path, seen = tmp_path / "m.tif", set()
    for at in range(4, min(len(whole), 500), 7):
        for value in (255, (whole[at] + 1) % 256):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            seen.add(outcome(path))
    assert "ok" in seen and len(seen) > 4


# hostile numbers (faults 10, 11, 12, 13): refused from the header, at once and without memory


def in_seconds_and_mib(path, modality="auto"):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.monotonic()
    reason = refusal(path, modality).reason
    return reason, time.monotonic() - start, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        (plain_tags(10**6, 10**6), Reason.TOO_LARGE),
        (plain_tags(16, 16, bands=65529), Reason.TOO_MANY_BANDS),
        (plain_tags(30000, 30000, t259=(3, 8)), Reason.BLOCK_TOO_LARGE),
        (plain_tags(20000, 13000, t259=(3, 8), t278=(4, 100), t273=(4, [8] * 130), t279=(4, [64] * 130)), Reason.RATIO),
        (plain_tags(0, 16), Reason.MALFORMED),
        (plain_tags(16, 16, t273=(4, [])), Reason.MALFORMED),
        (plain_tags(64, 64, t278=(4, 1)), Reason.MALFORMED),  # 64 strips, one offset
        (plain_tags(16, 16, t322=(4, 0), t323=(4, 0)), Reason.MALFORMED),
        (plain_tags(16, 16, t273=(4, 2**32 - 2)), Reason.TRUNCATED),
        (plain_tags(16, 16, t273=(16, 2**64 - 2), t279=(16, 2**64 - 2)), Reason.TRUNCATED),
        (plain_tags(16, 16, t254=(4, 1)), Reason.NON_IMAGE),
    ],
)
def test_a_header_that_lies_is_refused_before_any_pixel(tmp_path, tags, reason):
    path = write_raw_tiff(tmp_path / "a.tif", tags, tail=bytes(256))
    found, seconds, mib = in_seconds_and_mib(path)
    assert found is reason
    assert seconds < 0.5 and mib < 50


def test_a_directory_that_lists_absurd_numbers_of_tags_is_refused(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0\x08\0\0\0\xff\xff" + bytes(70000))
    assert refusal(tmp_path / "a.tif").reason in (Reason.MALFORMED, Reason.TRUNCATED)


def test_a_constant_image_that_compresses_well_is_accepted(tmp_path):
    path = write_geotiff(
        tmp_path / "a.tif",
        np.full((1, 2048, 2048), 7, np.uint16),
        compress="zstd",
        tiled=True,
        blockxsize=512,
        blockysize=512,
    )
    assert 2048 * 2048 * 2 / path.stat().st_size > 1000
    assert outcome(path) == "ok"


# pixel types (fault 23)


def test_pictures_whose_numbers_mean_something_else_are_refused(tmp_path):
    grey = pixels(1, dtype=np.uint8)
    bad = [
        write_geotiff(tmp_path / "palette.tif", grey, photometric="palette", colormap={1: (9, 9, 9, 255)}),
        write_geotiff(tmp_path / "ycbcr.tif", pixels(3, dtype=np.uint8), photometric="YCBCR", compress="jpeg"),
        write_geotiff(tmp_path / "cielab.tif", pixels(3, dtype=np.uint8), photometric="CIELAB"),
        write_geotiff(tmp_path / "complex.tif", pixels(1).astype(np.complex64)),
        write_geotiff(tmp_path / "onebit.tif", (grey > 99).astype(np.uint8), nbits=1),
        write_geotiff(tmp_path / "white.tif", grey, photometric="MINISWHITE"),
    ]
    assert {path.name: refusal(path).reason.name for path in bad} == {p.name: "DTYPE_UNSUPPORTED" for p in bad}


# nothing is followed (faults 14, 15, 16)


@contextlib.contextmanager
def listener():
    """Yield (url, hits) of a loopback server that answers nothing useful."""
    hits = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self):
            hits.append(1)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"/vsicurl/http://127.0.0.1:{server.server_port}/x.tif", hits
    server.shutdown()
    server.server_close()


def vrt(target) -> str:
    return (
        '<VRTDataset rasterXSize="50" rasterYSize="40"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">{target}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )


@pytest.fixture
def canary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("elsewhere")
    return write_geotiff(folder / "canary.tif", np.full((1, 40, 50), CANARY, np.uint8))


def test_a_vrt_named_tif_is_no_tiff(tmp_path, canary):
    path = tmp_path / "a.tif"
    path.write_text(vrt(canary))
    assert refusal(path).reason is Reason.NOT_TIFF
    with pytest.raises(ReadError, match="is not a TIFF"), opened(path):
        pass


def test_an_overview_redirect_in_a_tag_is_never_followed(tmp_path, canary):
    clean = np.full((1, 40, 50), 30, np.uint8)
    redirect = tmp_path / "redirect.vrt"
    redirect.write_text(vrt(canary))
    with listener() as (url, hits):
        for number, target in enumerate([canary, redirect, url]):
            path = write_geotiff(
                tmp_path / f"{number}.tif", clean, namespaces={"OVERVIEWS": {"OVERVIEW_FILE": str(target)}}
            )
            np.testing.assert_array_equal(one(path).array, clean)
            with opened(path) as (dataset, _):
                # Decimated reads are never made; even if one were, nothing would be followed.
                assert not (dataset.read(out_shape=(1, 10, 12)) == CANARY).any()
        assert hits == []


def test_side_cars_are_ignored_and_recorded(tmp_path, canary):
    array = pixels(1, dtype=np.uint8)
    path = write_geotiff(tmp_path / "a.tif", array, nodata=251)
    plain = one(path)
    assert flags(path) == ("MODALITY_UNNAMED",)
    bomb = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    (tmp_path / "a.tif.aux.xml").write_text(
        f'<!DOCTYPE x [<!ENTITY l0 "ha">{bomb}]><PAMDataset><SRS>EPSG:3857</SRS>'
        "<GeoTransform>1,2,3,4,5,6</GeoTransform>"
        f"<Metadata domain='OVERVIEWS'><MDI key='OVERVIEW_FILE'>{canary}</MDI></Metadata>"
        "<PAMRasterBand band='1'><NoDataValue>7</NoDataValue><Scale>3</Scale><Description>B04&l9;</Description>"
        "</PAMRasterBand></PAMDataset>"
    )
    (tmp_path / "a.tif.ovr").write_text(vrt(canary))
    (tmp_path / "a.tif.msk").write_bytes(canary.read_bytes())
    start = time.monotonic()
    image = one(path)
    assert time.monotonic() - start < 1
    np.testing.assert_array_equal(image.array, plain.array)
    np.testing.assert_array_equal(image.valid, plain.valid)
    assert image.geometry == plain.geometry and image.channels == plain.channels
    assert flags(path) == ("SIDE_CAR_IGNORED", "MODALITY_UNNAMED")
    assert refusal(tmp_path / "a.tif.msk").reason is Reason.NON_IMAGE


def test_the_risky_drivers_are_gone_before_gdal_is_loaded():
    code = (
        "from geomed_mae.readers.geotiff.open import rasterio; rio = rasterio()\n"
        "with rio.Env() as env: print(*sorted({'VRT', 'MRF', 'WMS', 'HTTP', 'GTiff'} & set(env.drivers())))"
    )
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("GDAL", "CPL"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == "GTiff"


def test_hardening_holds_where_the_user_had_set_gdal_otherwise(tmp_path, monkeypatch, canary):
    monkeypatch.setenv("GDAL_PAM_ENABLED", "YES")
    monkeypatch.setenv("GDAL_DISABLE_READDIR_ON_OPEN", "FALSE")
    path = write_geotiff(tmp_path / "a.tif", pixels(1))
    (tmp_path / "a.tif.aux.xml").write_text("<PAMDataset><GeoTransform>1,2,3,4,5,6</GeoTransform></PAMDataset>")
    with RIO.Env(GDAL_PAM_ENABLED="YES", GDAL_DISABLE_READDIR_ON_OPEN="FALSE"):
        assert one(path).geometry.transform == UTM_10M


# labels


def image_on(geometry, shape=(40, 50)):
    return Image(
        np.zeros((1, *shape), np.float32),
        np.ones((1, *shape), bool),
        (Channel(name="c"),),
        geometry,
        "m",
    )


def utm(transform=UTM_10M, epsg=32611):
    return RasterGeometry(RIO.crs.CRS.from_epsg(epsg).to_wkt(), transform, (10, 10))


def test_labels_on_the_same_grid_are_taken_as_they_are(tmp_path):
    classes = RNG.integers(0, 9, (40, 50)).astype(np.uint8)
    classes[3, 4] = 255
    path = write_geotiff(
        tmp_path / "a.tif", classes, nodata=255, photometric="palette", colormap={n: (n, n, n, 255) for n in range(9)}
    )
    labels = readers.read_labels(path, image_on(utm())).array
    assert labels.dtype == np.int16 and labels[3, 4] == IGNORE
    np.testing.assert_array_equal(labels[classes != 255], classes[classes != 255])


def test_labels_follow_coordinates_not_array_shape(tmp_path):
    classes = RNG.integers(0, 9, (40, 50)).astype(np.int32)
    path = write_geotiff(tmp_path / "a.tif", classes)
    moved = (10.0, 0.0, 500000.0 + 70, 0.0, -10.0, 4000000.0 + 30)  # 7 columns east, 3 rows north
    labels = readers.read_labels(path, image_on(utm(moved))).array
    np.testing.assert_array_equal(labels[3:, :43], classes[:37, 7:])
    assert (labels[:3] == IGNORE).all() and (labels[:, 43:] == IGNORE).all()


def test_labels_of_another_resolution_are_the_pixel_under_each_centre(tmp_path):
    classes = RNG.integers(0, 9, (20, 25)).astype(np.uint8)
    path = write_geotiff(tmp_path / "a.tif", classes, transform=(20, 0, 500000, 0, -20, 4000000))
    labels = readers.read_labels(path, image_on(utm())).array
    np.testing.assert_array_equal(labels, classes.repeat(2, 0).repeat(2, 1))
    flipped = readers.read_labels(path, image_on(utm((10.0, 0.0, 500000.0, 0.0, 10.0, 3999600.0)))).array
    np.testing.assert_array_equal(flipped, labels[::-1])


def test_labels_in_another_coordinate_system_agree_with_the_projection_of_each_centre(tmp_path):
    classes = RNG.integers(0, 9, (60, 60)).astype(np.uint8)
    path = write_geotiff(tmp_path / "a.tif", classes, crs="EPSG:4326", transform=(1e-4, 0, -117.001, 0, -1e-4, 36.145))
    labels = readers.read_labels(path, image_on(utm())).array
    rows, columns = np.mgrid[:40, :50]
    xs, ys = 500000 + 10 * (columns + 0.5), 4000000 - 10 * (rows + 0.5)
    lon, lat = (np.array(v) for v in RIO.warp.transform("EPSG:32611", "EPSG:4326", xs.ravel(), ys.ravel()))
    column, row = (lon + 117.001) / 1e-4, (36.145 - lat) / 1e-4
    inside = (row >= 0) & (row < 60) & (column >= 0) & (column < 60)
    expected = np.full(2000, IGNORE)
    expected[inside] = classes[row[inside].astype(int), column[inside].astype(int)]
    clear = (np.abs(row - np.rint(row)) > 1e-3) & (np.abs(column - np.rint(column)) > 1e-3)
    np.testing.assert_array_equal(labels.ravel()[clear], expected[clear])
    assert inside.sum() > 500 and clear.mean() > 0.95


def test_a_label_raster_may_be_one_bit_and_sparse_of_meaning(tmp_path):
    classes = (RNG.random((40, 50)) > 0.5).astype(np.uint8)
    path = write_geotiff(tmp_path / "a.tif", classes, nbits=1)
    np.testing.assert_array_equal(readers.read_labels(path, image_on(utm())).array, classes)


def test_nodata_under_the_whole_image_is_ignored_but_no_overlap_is_an_error(tmp_path):
    empty = write_geotiff(tmp_path / "empty.tif", np.full((40, 50), 7, np.uint8), nodata=7)
    assert (readers.read_labels(empty, image_on(utm())).array == IGNORE).all()
    degrees = write_geotiff(
        tmp_path / "d.tif",
        np.full((40, 50), 7, np.uint8),
        nodata=7,
        crs="EPSG:4326",
        transform=(1e-3, 0, -117.02, 0, -1e-3, 36.16),
    )
    assert (readers.read_labels(degrees, image_on(utm())).array == IGNORE).all()
    far = utm((10.0, 0.0, 600000.0, 0.0, -10.0, 4000000.0))
    for path in (empty, degrees):
        with pytest.raises(ReadError, match=rf"labels of {path.name} do not overlap the image"):
            readers.read_labels(path, image_on(far))


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 4, 4), np.uint8), "has 2 bands; labels have one"),
        (np.zeros((1, 4, 4), np.float32), "has float32 pixels; labels are integers"),
        (np.full((1, 4, 4), 40000, np.uint16), "class numbers from 40000 to 40000"),
        (np.full((1, 4, 4), -9999, np.int16), "Declare the number that means 'no label' as nodata"),
    ],
)
def test_what_cannot_be_classes_is_refused(tmp_path, array, message):
    path = write_geotiff(tmp_path / "a.tif", array)
    with pytest.raises(ReadError, match=message):
        readers.read_labels(path, image_on(utm()))


def test_labels_need_a_raster_and_a_coordinate_system_on_both_sides(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", np.zeros((40, 50), np.uint8))
    with pytest.raises(ReadError, match="the image has no coordinate system"):
        readers.read_labels(path, image_on(RasterGeometry(None, UTM_10M, None)))
    with pytest.raises(ReadError, match="the image is not a raster"):
        readers.read_labels(path, image_on(PlaneGeometry()))
    bare = write_geotiff(tmp_path / "b.tif", np.zeros((40, 50), np.uint8), crs=None)
    with pytest.raises(ReadError, match=r"b\.tif has no coordinate system"):
        readers.read_labels(bare, image_on(utm()))
    assert (readers.read_labels(bare, image_on(RasterGeometry(None, UTM_10M, None))).array == 0).all()


# real files


@pytest.mark.data
def test_every_real_raster_equals_rasterio_or_has_a_reason(shared_data):
    """The oracle reads with rasterio alone: pixels, scale, and the union of GDAL's mask with what is not finite."""
    found = survey(list_files(shared_data / "sat"), AUTO, root=shared_data / "sat")
    folders = {source.files[0].parent.name for source in found.sources}
    assert {"odd_geotiffs", "images", "S2L2A", "landsat7"} <= folders
    reasons = {refusal.path.name: refusal.reason.name for refusal in found.refusals}
    assert reasons == {
        "S2A_MSIL2A_20170617T113321_4_55_labels_metadata.json": "METADATA",
        "RGB.byte.tif.aux.xml": "UNKNOWN_FORMAT",
        "white-gemini-iv.vrt": "UNKNOWN_FORMAT",
        "RGB2.byte.tif.msk": "NON_IMAGE",
        "red.tif.ovr": "NON_IMAGE",
        "cogeo.tif": "DTYPE_UNSUPPORTED",
        "corrupt.tif": "DTYPE_UNSUPPORTED",
        "goes.tif": "DTYPE_UNSUPPORTED",
    }
    assert len(found.sources) == 72
    # The one scene of several files has an oracle of its own (test_scenes).
    for source in (source for source in found.sources if len(source.files) == 1):
        image, path = readers.read(source), source.files[0]
        bands = source.selector["bands"]
        with warnings.catch_warnings(), RIO.Env(GDAL_PAM_ENABLED="NO", GDAL_DISABLE_READDIR_ON_OPEN="EMPTY_DIR"):
            warnings.simplefilter("ignore")
            with RIO.open(path) as file:
                stored, valid = file.read(bands).astype(np.float64), file.read_masks(bands) > 0
                transform = tuple(file.transform)[:6]
        if source.modality.startswith("sentinel2"):
            valid, stored = valid & (stored != 0), stored * 1e-4
        valid &= np.isfinite(stored)
        np.testing.assert_array_equal(np.broadcast_to(image.valid, image.array.shape), valid, err_msg=path.name)
        np.testing.assert_array_equal(image.array, np.where(valid, stored, 0).astype(np.float32), err_msg=path.name)
        assert image.geometry.transform == transform, path.name


@pytest.mark.data
def test_real_fires_are_named_by_their_bands_and_not_by_their_number(shared_data):
    """Thirteen files hold B2, B3, B4, B8, B12; nine hold a display picture in place of three, left out."""
    files = sorted((shared_data / "sat" / "wildfire_s2" / "images").glob("*.tif"))
    found = survey(files, resolve_modalities("sentinel2-l2a"))
    assert len(found.sources) == 22 and not found.refusals
    names = Counter(tuple(channel.name for channel in source.channels) for source in found.sources)
    assert names == {("B02", "B03", "B04", "B08", "B12"): 13, ("B08", "B12"): 9}
    assert sum("BANDS_LEFT_OUT" in source.flags for source in found.sources) == 9
    for source in found.sources:
        rows, columns = source.geometry.gsd_m
        assert rows == pytest.approx(20, rel=0.01) and 14 < columns < 18  # columns shrink with the cosine of latitude
        labels = readers.read_labels(files[0].parents[1] / "masks" / source.files[0].name, readers.read(source)).array
        assert set(np.unique(labels)) <= {0, 1} and labels.any()
