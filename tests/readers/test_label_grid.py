"""Label volumes onto voxels: exact grids, tolerances, and nearest on request with SimpleITK as the oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK

from geomed_mae.errors import ReadError
from geomed_mae.image import Channel, Image, VolumeGeometry
from geomed_mae.readers import IGNORE
from geomed_mae.readers.label_grid import exact_step, place_volume, tolerance_mm

RNG = np.random.default_rng(5)


def image(affine: np.ndarray, shape: tuple[int, ...]) -> Image:
    array = np.broadcast_to(np.float32(0), (1, *shape))
    return Image(array, np.ones((1, *shape), bool), (Channel(name="c"),), VolumeGeometry(affine), "ct")


def tilted(shear: float = 0.9) -> np.ndarray:
    """Axial slices 3 mm apart whose rows move by `shear` mm from one to the next; pixels of 0.8 mm."""
    return np.array([[0, 0, 0.8, -20], [shear, 0.8, 0, 30], [3.0, 0, 0, 100], [0, 0, 0, 1]], float)


def place(values, affine, onto, resample=None):
    return place_volume(values, affine, onto, path=Path("l.nii"), resample=resample)


def test_a_tilted_label_map_fits_its_tilted_image_and_a_straightened_one_does_not():
    values = RNG.integers(0, 4, (5, 9, 7)).astype(np.int16)
    placed, outside = place(values, tilted(), image(tilted(), values.shape))
    np.testing.assert_array_equal(placed, values)
    assert outside == 0
    with pytest.raises(ReadError, match=r"the grid of l\.nii differs from the image's; resample .* labels\.resample"):
        place(values, tilted(0.0), image(tilted(), values.shape))


def test_labels_off_the_image_are_counted():
    values = RNG.integers(0, 4, (5, 9, 7)).astype(np.int16)
    onto = image(tilted(), values.shape).crop((slice(1, 4), slice(0, 9), slice(2, 7)))
    placed, outside = place(values, tilted(), onto)
    np.testing.assert_array_equal(placed, values[1:4, :, 2:])
    assert outside == (values > 0).sum() - (values[1:4, :, 2:] > 0).sum()


def test_rounding_is_one_grid_and_more_is_not():
    shape, affine = (5, 9, 7), tilted()
    assert tolerance_mm(affine) == pytest.approx(0.02) and tolerance_mm(affine * 10) > 0.1
    for gap, fits in ((0.015, True), (0.025, False)):
        moved = affine.copy()
        moved[0, 3] += gap
        assert (exact_step(moved, image(affine, shape)) is not None) == fits
    # A spacing that is off by as little adds up over the slices.
    grown = affine @ np.diag([1 + 0.015 / 3 / 4, 1, 1, 1])
    assert exact_step(grown, image(affine, shape)) is not None
    assert exact_step(grown, image(affine, (12, 9, 7))) is None


def itk(values: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """The same volume for SimpleITK, whose axes are (column, row, slice) and whose points are LPS."""
    made = SimpleITK.GetImageFromArray(values)
    columns = affine[:3, [2, 1, 0]]
    spacing = np.linalg.norm(columns, axis=0)
    made.SetSpacing(spacing.tolist())
    made.SetDirection((columns / spacing).ravel().tolist())
    made.SetOrigin(affine[:3, 3].tolist())
    return made


def test_nearest_equals_simpleitk_and_says_what_it_left_off():
    angle = 0.3
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    label_affine = turn @ tilted(0.0) @ np.diag([0.7, 1.3, 1.1, 1])
    label_affine[:3, 3] += (2.13, -1.71, 0.37)
    values = RNG.integers(0, 4, (9, 12, 14)).astype(np.int16)
    onto = image(tilted(0.0), (6, 11, 13))
    placed, outside = place(values, label_affine, onto, "nearest")
    blank = itk(np.zeros(onto.spatial_shape, np.int16), tilted(0.0))
    expected = SimpleITK.Resample(
        itk(values, label_affine), blank, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor, IGNORE
    )
    np.testing.assert_array_equal(placed, SimpleITK.GetArrayFromImage(expected))
    assert (placed == IGNORE).any() and 0 < outside < (values > 0).sum()
    far = label_affine.copy()
    far[:3, 3] += 500
    with pytest.raises(ReadError, match=r"labels of l\.nii do not overlap the image"):
        place(values, far, onto, "nearest")
