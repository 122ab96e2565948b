"""An encoder in use: scaling, windows, token grids with their own place, refusals."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel, Image, PlaneGeometry, RasterGeometry, VolumeGeometry
from geomed_mae.models.contract import ChannelContract, Contract
from geomed_mae.models.pretrained import FeatureGrid, PretrainedEncoder, read_out, token_geometry

RASTER = RasterGeometry(None, (10.0, 0.0, 500.0, 0.0, -20.0, 900.0), (20.0, 10.0))


@pytest.fixture
def encoder(mae, bands, ct) -> PretrainedEncoder:
    mr = Channel(name="T1", kind="mr", unit="a.u.", sequence="T1")
    entries = [
        ChannelContract(
            modality=modality,
            channel=channel,
            method=method,
            center=center,
            scale=scale,
            noise_floor=0.05,
            value_range=span,
        )
        for modality, channels, method, center, scale, span in (
            ("sentinel2-l2a", bands, "fixed", 0.15, 0.15, (0.0, 1.6)),
            ("ct", ct, "fixed", 0.0, 400.0, (-1024.0, 3071.0)),
            ("mr", (mr,), "image", 0.0, 1.0, None),
        )
        for channel in channels
    ]
    return PretrainedEncoder(mae.encoder, Contract(channels=tuple(entries), crop_2d=(16, 16), crop_3d=(4, 8, 8)))


def scene(bands, rows: int, columns: int) -> Image:
    array = np.random.default_rng(0).random((len(bands), rows, columns), dtype=np.float32)
    return Image(array, np.ones((1, rows, columns), bool), bands, RASTER, "sentinel2-l2a", "k")


def test_one_crop_is_what_the_network_says(encoder, bands):
    image = scene(bands, 16, 16)
    pixels = torch.from_numpy((image.array - 0.15) / 0.15)[None].float()
    tokens = encoder.module(pixels, torch.ones_like(pixels, dtype=torch.bool), bands).tokens[0, 1:].detach()
    grid = encoder.features(image)
    assert grid.array.shape == (48, 2, 4) and grid.array.dtype == np.float32
    assert np.allclose(grid.array.reshape(48, -1).T, tokens, atol=1e-5)
    assert np.allclose(encoder.embed(image), tokens.mean(0), atol=1e-5)


def test_large_images_go_in_crops_and_the_rest_is_padding_that_does_not_count(encoder, bands):
    image = scene(bands, 35, 26)
    grid = encoder.features(image)
    assert grid.array.shape == (48, 5, 7)
    corner = encoder.features(image.crop((slice(16, 32), slice(0, 16))))
    assert np.allclose(grid.array[:, 2:4, :4], corner.array, atol=1e-5)
    assert grid.valid[:4].all() and not grid.valid[4].any()  # three rows of eight are too few, half a column is enough
    valid = grid.array.reshape(48, -1)[:, grid.valid.ravel()]
    assert np.allclose(encoder.embed(image), valid.mean(1), atol=1e-5)


def test_invalid_pixels_change_no_feature_bit(encoder, bands):
    image = scene(bands, 32, 16)
    valid = np.random.default_rng(1).random(image.array.shape) < 0.7
    valid[:, :8] = False
    some = encoder.features(replace(image, valid=valid)).array
    other = encoder.features(replace(image, valid=valid, array=np.where(valid, image.array, np.float32(np.nan)))).array
    assert np.array_equal(some, other, equal_nan=True) and np.isnan(some[:, 0]).all() and np.isfinite(some[:, 1:]).all()


def test_arbitrary_units_do_not_matter_where_the_image_scales_itself(encoder):
    array = np.random.default_rng(0).random((1, 4, 8, 8), dtype=np.float32)
    channel = Channel(name="T1", kind="mr", unit="a.u.", sequence="T1")
    image = Image(array, np.ones_like(array, bool), (channel,), VolumeGeometry(np.eye(4)), "mr")
    louder = replace(image, array=array * 300 + 40)
    assert np.allclose(encoder.embed(image), encoder.embed(louder), atol=1e-3)


def test_token_geometry_keeps_corners_of_rasters_and_centres_of_volumes():
    raster = token_geometry(RASTER, (8, 4))
    assert raster.transform == (40.0, 0.0, 500.0, 0.0, -160.0, 900.0) and raster.gsd_m == (160.0, 40.0)
    affine = np.eye(4)
    affine[:3, :3] = [[0.0, 0.3, 1.0], [0.0, 1.0, 0.0], [5.0, 0.0, 0.0]]
    affine[:3, 3] = [-10.0, 20.0, 30.0]
    tokens = token_geometry(VolumeGeometry(affine), (2, 4, 4)).affine
    first_patch = [affine @ [z, y, x, 1] for z in range(2) for y in range(4) for x in range(4)]
    assert np.allclose(tokens @ [0, 0, 0, 1], np.mean(first_patch, axis=0))
    assert np.allclose(tokens @ [1, 2, 3, 1], np.mean(first_patch, axis=0) + affine @ [2, 8, 12, 0])
    assert token_geometry(PlaneGeometry((0.1, 0.2)), (8, 8)).spacing_mm == (0.8, 1.6)
    assert token_geometry(PlaneGeometry(), (8, 8)).spacing_mm is None


def test_missing_bands_are_an_error_or_an_explicit_choice(encoder, bands):
    image = scene(bands, 16, 16).select(("B04", "B12"))
    with pytest.raises(ConfigError, match=r"lacks channels \['B8A'\]"):
        encoder.embed(image)
    assert encoder.embed(image, channels=("B04", "B12")).shape == (48,)
    with pytest.raises(ConfigError, match=r"the image has no channels \['B8A'\]; nothing is ever filled in"):
        encoder.embed(image, channels=("B04", "B8A"))


def test_wrong_units_and_unknown_modalities_are_refused(encoder, bands):
    numbers = tuple(replace(band, unit="DN") for band in bands)
    with pytest.raises(ConfigError, match=r"'B04' of modality 'sentinel2-l2a' is in DN, the model expects reflectance"):
        encoder.embed(scene(numbers, 16, 16))
    with pytest.raises(ConfigError, match=r"no modality 'naip'"):
        encoder.features(replace(scene(bands, 16, 16), modality="naip"))


def test_an_image_without_valid_patches_cannot_be_embedded(encoder, bands):
    image = scene(bands, 16, 16)
    with pytest.raises(ConfigError, match="image 'k' has no patch with enough valid area"):
        encoder.embed(replace(image, valid=np.zeros_like(image.valid)))


def test_repr_says_what_it_is(encoder):
    assert repr(encoder) == "PretrainedEncoder(dim 48, depth 2, ct, mr, sentinel2-l2a)"


def test_a_feature_grid_is_taken_for_an_array_where_one_is_wanted():
    grid = FeatureGrid(np.arange(12, dtype=np.float32).reshape(3, 2, 2), RASTER)
    assert grid.shape == (3, 2, 2)
    assert np.array_equal(np.asarray(grid), grid.array)
    assert np.asarray(grid, dtype=np.float64).dtype == np.float64


def test_several_blocks_stand_side_by_side_and_end_with_the_last(encoder, bands):
    image = scene(bands, 24, 20)
    several = read_out("several", encoder.spec.depth)
    grid = encoder.features(image, layers=several)
    assert several == (0, 1) and read_out("last", 12) == (11,) and read_out("several", 12) == (3, 7, 11)
    assert grid.shape[0] == len(several) * encoder.spec.dim
    np.testing.assert_array_equal(grid.array[-encoder.spec.dim :], encoder.features(image).array)
    assert not np.allclose(grid.array[: encoder.spec.dim], grid.array[-encoder.spec.dim :])
    np.testing.assert_allclose(encoder.embed(image, layers=several)[-encoder.spec.dim :], encoder.embed(image))
    with pytest.raises(ConfigError, match="read-out 'first' is none of last, several"):
        read_out("first", 12)
