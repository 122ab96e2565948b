"""Image and its geometries: the conventions that everything after the readers relies on."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.image import Channel, Image, PlaneGeometry, RasterGeometry, VolumeGeometry, degree_gsd_m


def raster(array: np.ndarray, **changes) -> Image:
    geometry = RasterGeometry(None, (10.0, 0.0, 500.0, 0.0, -10.0, 900.0), (10.0, 10.0))
    channels = tuple(Channel(name=f"c{number}") for number in range(array.shape[0]))
    values = {"valid": np.ones((1, *array.shape[1:]), bool), "channels": channels, "geometry": geometry}
    return Image(array=array, modality="test", **{**values, **changes})


def test_a_crop_of_a_raster_keeps_its_pixels_in_their_place():
    image = raster(np.arange(48, dtype=np.float32).reshape(2, 4, 6))
    part = image.crop((slice(1, 3), slice(2, 5)))
    assert part.array.tolist() == image.array[:, 1:3, 2:5].tolist()
    assert part.geometry.transform == (10.0, 0.0, 520.0, 0.0, -10.0, 890.0)


def test_a_crop_of_a_sheared_volume_keeps_its_voxels_in_their_place():
    affine = np.array([[0.0, 0.0, 0.7, -5], [0.9, 0.7, 0.0, 3], [2.5, 0.0, 0.0, 40], [0, 0, 0, 1]])
    geometry = VolumeGeometry(affine)
    array = np.zeros((1, 4, 5, 6), np.float32)
    image = Image(array, np.ones((1, 1, 1, 1), bool), (Channel(name="CT", kind="ct"),), geometry, "ct")
    part = image.crop((slice(1, 3), slice(2, 4), slice(3, 6)))
    expected = affine @ np.array([1, 2, 3, 1])
    np.testing.assert_allclose(part.geometry.affine @ np.array([0, 0, 0, 1]), expected)


def test_slice_spacing_of_a_tilted_stack_is_measured_along_the_normal():
    tilt = np.deg2rad(20)
    affine = np.array([[0.0, 0, 0.5, 0], [5 * np.sin(tilt), 0.5, 0, 0], [5 * np.cos(tilt), 0, 0, 0], [0, 0, 0, 1]])
    np.testing.assert_allclose(VolumeGeometry(affine).spacing, (5 * np.cos(tilt), 0.5, 0.5))


def test_arrays_of_an_image_are_read_only():
    image = raster(np.zeros((1, 2, 2), np.float32))
    with pytest.raises(ValueError, match="read-only"):
        image.array[0, 0, 0] = 1


@pytest.mark.parametrize(
    ("array", "changes", "message"),
    [
        (np.zeros((1, 2, 2)), {}, "float32"),
        (np.zeros((2, 2), np.float32), {"channels": ()}, "float32"),
        (np.zeros((2, 2, 2), np.float32), {"channels": (Channel(name="a"),)}, "1 channels are described"),
        (np.zeros((1, 2, 2), np.float32), {"valid": np.ones((1, 3, 2), bool)}, "shape mismatch|broadcast"),
        (np.zeros((1, 2, 2), np.float32), {"valid": np.ones((1, 2, 2))}, "valid is bool"),
        (np.zeros((1, 2, 2), np.float32), {"geometry": VolumeGeometry(np.eye(4))}, "VolumeGeometry does not describe"),
    ],
)
def test_an_image_that_contradicts_itself_is_refused(array, changes, message):
    with pytest.raises(ValueError, match=message):
        raster(array, **changes)


def test_select_takes_channels_by_name_and_never_fills_in_a_missing_one():
    image = raster(np.stack([np.full((2, 2), value, np.float32) for value in range(3)]))
    assert image.select(("c2", "c0")).array[:, 0, 0].tolist() == [2, 0]
    with pytest.raises(KeyError, match=r"channels \['c9'\] are not in this image"):
        image.select(("c0", "c9"))


def test_select_takes_validity_along_with_its_channel():
    valid = np.zeros((3, 2, 2), bool)
    valid[2] = True
    image = raster(np.zeros((3, 2, 2), np.float32), valid=valid)
    assert image.select(("c2",)).valid.all()
    assert not image.select(("c1",)).valid.any()


def test_a_channel_of_unknown_kind_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="kind 'optik'; known kinds: optical"):
        Channel(name="x", kind="optik")


@pytest.mark.parametrize("affine", [np.zeros((4, 4)), np.full((4, 4), np.nan), np.eye(3)])
def test_a_volume_without_an_invertible_affine_is_refused(affine):
    with pytest.raises(ValueError, match="invertible 4x4 affine"):
        VolumeGeometry(affine)


def test_a_plane_has_spacing_but_no_place():
    assert PlaneGeometry((0.1, 0.2)).shifted(5, 5).spacing == (0.1, 0.2)


@pytest.mark.parametrize(
    ("latitude", "metres_y", "metres_x"),
    # Length of a degree: NGA's table of WGS84, https://msi.nga.mil calculators, to the metre.
    [(0, 110574, 111320), (45, 111132, 78847), (60, 111412, 55800)],
)
def test_degrees_become_metres_as_on_the_wgs84_ellipsoid(latitude, metres_y, metres_x):
    y, x = degree_gsd_m(latitude, -1.0, 1.0)
    assert y == pytest.approx(metres_y, abs=2)
    assert x == pytest.approx(metres_x, abs=2)
