"""Class maps as NIfTI, with nibabel and SimpleITK as oracles of where each voxel lies."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from geomed_mae.image import PlaneGeometry, VolumeGeometry
from geomed_mae.writers import nifti

CLASSES = ("background", "anterior", "posterior")


def geometry(shear: float = 0.0) -> VolumeGeometry:
    """Oblique, anisotropic: slices 5 mm, rows 0.7 mm, columns 0.9 mm, origin away from 0; `shear` tilts the slices."""
    angle = np.deg2rad(20)
    column = np.array([np.cos(angle), np.sin(angle), 0.0])
    row = np.array([-np.sin(angle), np.cos(angle), 0.0])
    affine = np.eye(4)
    affine[:3, 0] = 5.0 * (np.array([0, 0, 1.0]) + shear * row)
    affine[:3, 1], affine[:3, 2], affine[:3, 3] = 0.7 * row, 0.9 * column, (-31.0, 12.5, 104.25)
    return VolumeGeometry(affine)


def class_map() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 3, size=(4, 6, 8)).astype(np.uint8)


def lps(volume: VolumeGeometry, index: tuple[int, int, int]) -> np.ndarray:
    return (volume.affine @ np.array([*index, 1.0]))[:3]


@pytest.mark.parametrize("shear", [0.0, 0.3])
def test_nibabel_finds_every_voxel_where_the_volume_has_it(tmp_path, shear):
    volume, values = geometry(shear), class_map()
    nifti.write(tmp_path / "map.nii.gz", values, volume, CLASSES)
    image = nibabel.load(tmp_path / "map.nii.gz")
    data = np.asarray(image.dataobj)
    assert data.dtype == np.uint8
    for index in np.ndindex(values.shape):
        assert data[index[::-1]] == values[index]
        ras = (image.affine @ np.array([*index[::-1], 1.0]))[:3]
        np.testing.assert_allclose(ras * (-1, -1, 1), lps(volume, index), atol=1e-4)


def test_simpleitk_finds_every_voxel_where_the_volume_has_it(tmp_path):
    volume, values = geometry(), class_map()
    nifti.write(tmp_path / "map.nii.gz", values, volume, CLASSES)
    image = sitk.ReadImage(str(tmp_path / "map.nii.gz"))
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), values)
    for index in [(0, 0, 0), (3, 5, 7), (1, 2, 3)]:
        point = image.TransformIndexToPhysicalPoint([int(part) for part in index[::-1]])
        np.testing.assert_allclose(point, lps(volume, index), atol=1e-4)


def test_a_sheared_volume_has_no_qform_that_would_contradict_its_sform(tmp_path):
    nifti.write(tmp_path / "map.nii.gz", class_map(), geometry(0.3), CLASSES)
    header = nibabel.load(tmp_path / "map.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 0)


def test_both_transforms_agree_without_shear(tmp_path):
    nifti.write(tmp_path / "map.nii.gz", class_map(), geometry(), CLASSES)
    header = nibabel.load(tmp_path / "map.nii.gz").header
    assert (int(header["sform_code"]), int(header["qform_code"])) == (1, 1)
    np.testing.assert_allclose(header.get_qform(), header.get_sform(), atol=1e-4)


def test_an_affine_of_a_nifti_file_comes_back_bit_for_bit(tmp_path):
    stored = np.diag([0.7, 0.9, 5.0, 1.0]).astype(np.float32).astype(np.float64)
    stored[:3, 3] = np.float32([-31.1, 12.7, 104.3])
    ours = nifti.LPS_TO_RAS @ stored[:, nifti.REVERSED]
    nifti.write(tmp_path / "map.nii.gz", class_map(), VolumeGeometry(ours), CLASSES)
    np.testing.assert_array_equal(nibabel.load(tmp_path / "map.nii.gz").header.get_sform(), stored)


def test_streamed_slices_are_the_same_volume(tmp_path):
    values = class_map()
    with nifti.stream(tmp_path / "map.nii.gz", values.shape, geometry(), CLASSES) as volume:
        volume.put(values[:3])
        volume.put(values[3:])
    np.testing.assert_array_equal(np.asarray(nibabel.load(tmp_path / "map.nii.gz").dataobj), values.transpose(2, 1, 0))


def test_the_stream_writes_the_bytes_that_nibabel_writes(tmp_path):
    values, place = class_map(), geometry(0.3)
    nifti.write(tmp_path / "map.nii.gz", values, place, CLASSES)
    image = nibabel.Nifti1Image(values.transpose(), nifti.LPS_TO_RAS @ place.affine[:, nifti.REVERSED])
    image.header.set_intent(nifti.LABEL_INTENT, allow_unknown=True, name="classes")
    image.header.set_xyzt_units("mm")
    image.set_sform(image.affine, code=1)
    image.set_qform(None, code=0)
    assert gzip.decompress((tmp_path / "map.nii.gz").read_bytes()) == image.to_bytes()


def test_the_same_voxels_give_the_same_file_however_they_are_put(tmp_path):
    nifti.write(tmp_path / "whole.nii.gz", class_map(), geometry(), CLASSES)
    with nifti.stream(tmp_path / "parts.nii.gz", (4, 6, 8), geometry(), CLASSES) as volume:
        for one in class_map():
            volume.put(one[None])
    assert (tmp_path / "whole.nii.gz").read_bytes() == (tmp_path / "parts.nii.gz").read_bytes()
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["parts.ctbl", "parts.nii.gz", "whole.ctbl", "whole.nii.gz"]


def test_missing_slices_are_no_map(tmp_path):
    with (
        pytest.raises(ValueError, match=r"'map.nii.gz' lacks its last 1 slices"),
        nifti.stream(tmp_path / "map.nii.gz", (4, 6, 8), geometry(), CLASSES) as volume,
    ):
        volume.put(class_map()[:3])
    assert list(tmp_path.iterdir()) == []


def test_a_plane_has_pixel_sizes_and_no_place(tmp_path):
    values = class_map()[0]
    nifti.write(tmp_path / "map.nii.gz", values, PlaneGeometry((0.2, 0.1)), CLASSES)
    image = nibabel.load(tmp_path / "map.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), values.T)
    assert image.header.get_zooms() == pytest.approx((0.1, 0.2))
    assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (0, 0)


def test_features_lie_on_the_fourth_axis(tmp_path):
    values = np.random.default_rng(0).normal(size=(5, 4, 6, 8)).astype(np.float32)
    nifti.write_features(tmp_path / "grid.nii.gz", values, geometry())
    image = nibabel.load(tmp_path / "grid.nii.gz")
    np.testing.assert_array_equal(np.asarray(image.dataobj), values.transpose(3, 2, 1, 0))
    ras = (image.affine @ np.array([7, 5, 3, 1.0]))[:3]
    np.testing.assert_allclose(ras * (-1, -1, 1), lps(geometry(), (3, 5, 7)), atol=1e-4)
