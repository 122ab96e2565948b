"""NIfTI: voxels and positions equal SimpleITK's, which reads NIfTI into LPS on its own."""

from __future__ import annotations

import gzip
import struct
import zlib

import numpy as np
import pytest
import SimpleITK

from geomed_mae import readers
from geomed_mae.errors import ReadError
from geomed_mae.image import Channel, Image, PlaneGeometry, VolumeGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import IGNORE, nifti, read_images, survey
from geomed_mae.readers.reasons import Reason
from tests.make_data import write_nifti

RNG = np.random.default_rng(3)
AUTO = resolve_modalities("auto")


def oblique(spacing=(0.8, 1.1, 3.0), angles=(0.3, -0.2, 0.1), flip=(1, 1, 1)):
    """Return a RAS affine: rotations about x, y, z in radians, then translation."""
    turn = np.eye(3)
    for axis, angle in enumerate(angles):
        a, b = [n for n in range(3) if n != axis]
        step = np.eye(3)
        step[a, a] = step[b, b] = np.cos(angle)
        step[a, b], step[b, a] = -np.sin(angle), np.sin(angle)
        turn = turn @ step
    affine = np.eye(4)
    affine[:3, :3] = turn * spacing * flip
    affine[:3, 3] = (-30, 12.5, 7)
    return affine


def voxels(shape=(5, 6, 7), dtype=np.int16):
    return RNG.integers(0, 100, shape).astype(dtype)


def one(path, modality="auto", window=None) -> Image:
    found = survey([path], resolve_modalities(modality))
    assert not found.refusals, found.refusals
    return readers.read(found.sources[0], window)


def refusal(path, modality="auto"):
    found = survey([path], resolve_modalities(modality))
    assert not found.sources, "it was accepted"
    return found.refusals[0]


def assert_equals_simpleitk(image: Image, path) -> None:
    oracle = SimpleITK.ReadImage(str(path))
    np.testing.assert_array_equal(image.array[0], SimpleITK.GetArrayFromImage(oracle).astype(np.float32))
    sizes = oracle.GetSize()
    for corner in np.ndindex(2, 2, 2):
        i, j, k = (int((size - 1) * bit) for size, bit in zip(sizes, corner, strict=True))
        ours = image.geometry.affine @ [k, j, i, 1]
        np.testing.assert_allclose(ours[:3], oracle.TransformIndexToPhysicalPoint((i, j, k)), atol=1e-3)


# voxels and positions


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("flip", [(1, 1, 1), (-1, 1, 1), (-1, -1, 1), (1, 1, -1)])
def test_voxels_and_positions_equal_simpleitk(tmp_path, suffix, version, flip):
    path = write_nifti(tmp_path / f"a{suffix}", voxels(), oblique(flip=flip), version=version)
    image = one(path)
    # SimpleITK reads version 1 only; the header of version 2 says the same in wider fields.
    array = image.array[0].transpose(2, 1, 0).astype(np.int16)
    assert_equals_simpleitk(
        image, path if version == 1 else write_nifti(tmp_path / "twin.nii", array, oblique(flip=flip))
    )
    assert image.spacing == pytest.approx((3.0, 1.1, 0.8), abs=1e-5) and image.array.shape == (1, 7, 6, 5)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64", ">i2"])
def test_every_voxel_type_is_read(tmp_path, dtype):
    array = voxels(dtype=np.dtype(dtype))
    image = one(write_nifti(tmp_path / "a.nii", array, oblique()))
    np.testing.assert_array_equal(image.array[0], array.transpose(2, 1, 0).astype(np.float32))
    assert image.array.dtype == np.float32


def test_any_window_equals_the_oracle(tmp_path):
    array = voxels()
    for name in ("a.nii", "a.nii.gz"):
        path = write_nifti(tmp_path / name, array, oblique())
        image = one(path, window=(slice(2, 5), slice(0, 6), slice(1, 3)))
        np.testing.assert_array_equal(image.array[0], array.transpose(2, 1, 0)[2:5, :, 1:3])
        np.testing.assert_allclose(image.geometry.affine[:, 3], one(path).geometry.affine @ [2, 0, 1, 1])
    with pytest.raises(ValueError, match="is empty or not inside"):
        one(path, window=(slice(7, 9), slice(0, 6), slice(0, 5)))


def test_units_other_than_millimetres_are_converted(tmp_path):
    path = write_nifti(tmp_path / "a.nii", voxels(), np.diag([0.002, 0.002, 0.003, 1]), xyzt_units=1)  # metres
    assert one(path).spacing == pytest.approx((3, 2, 2))


def test_an_orientation_that_nobody_stated_is_flagged(tmp_path):
    path = write_nifti(tmp_path / "a.nii", voxels(), np.diag([2, 2, 2, 1]), qform_code=0, sform_code=0)
    assert survey([path], AUTO).sources[0].flags == ("ORIENTATION_ASSUMED", "MODALITY_UNNAMED")


def test_a_plane_is_a_volume_of_one_slice(tmp_path):
    assert one(write_nifti(tmp_path / "a.nii", voxels((5, 6)))).array.shape == (1, 1, 6, 5)


def test_each_volume_of_a_series_is_an_image(tmp_path):
    array = voxels((5, 6, 7, 3))
    for name in ("a.nii", "b.nii.gz"):
        images = read_images(write_nifti(tmp_path / name, array, oblique()))
        assert len(images) == 3
        for volume, image in enumerate(images):
            np.testing.assert_array_equal(image.array[0], array[..., volume].transpose(2, 1, 0))


# physical values


def test_rescaling_is_applied_in_double_precision(tmp_path):
    array = voxels(dtype=np.int32) + 2**24
    path = write_nifti(tmp_path / "a.nii", array, slope=0.5, inter=-(2**23))
    np.testing.assert_array_equal(one(path).array[0], ((array - 2**24) * 0.5).transpose(2, 1, 0).astype(np.float32))


@pytest.mark.parametrize("slope", [0.0, float("nan")])
def test_a_slope_of_zero_or_nan_means_none(tmp_path, slope):
    array = voxels()
    path = write_nifti(tmp_path / "a.nii", array, slope=slope, inter=9.0)
    np.testing.assert_array_equal(one(path).array[0], array.transpose(2, 1, 0))


def test_an_infinite_slope_is_refused(tmp_path):
    path = write_nifti(tmp_path / "a.nii", voxels(), slope=float("inf"))
    assert refusal(path).reason is Reason.BAD_RESCALE


def test_nan_and_infinity_are_invalid(tmp_path):
    array = RNG.normal(size=(4, 4, 4)).astype(np.float32)
    array[0, 1, 2], array[3, 3, 3] = np.nan, np.inf
    image = one(write_nifti(tmp_path / "a.nii", array))
    assert image.valid.sum() == 62 and not image.valid[0, 2, 1, 0] and (image.array[~image.valid] == 0).all()


# modality


def test_the_modality_is_the_one_given_or_none(tmp_path):
    path = write_nifti(tmp_path / "a.nii", voxels())
    image = one(path, "ct")
    assert image.modality == "ct" and image.channels[0] == Channel(name="CT", kind="ct", unit="HU")
    assert survey([path], resolve_modalities("ct")).sources[0].flags == ()
    unnamed = one(path)
    assert unnamed.modality == "unnamed-volume" and unnamed.channels[0].name == "volume"
    assert survey([path], AUTO).sources[0].flags == ("MODALITY_UNNAMED",)
    several = refusal(path, ["ct", "mr"])
    assert several.reason is Reason.MODALITY_MISMATCH and "NIfTI does not say which it is; give one" in several.detail
    assert "none of them comes as NIfTI" in refusal(path, "rgb").detail


def test_a_file_that_declares_labels_is_no_image(tmp_path):
    path = write_nifti(tmp_path / "a.nii", voxels(), intent_code=1002)
    assert refusal(path).reason is Reason.LABEL


# what is wrong with files


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
def test_a_truncated_file_is_refused(tmp_path, name):
    whole = write_nifti(tmp_path / name, RNG.normal(size=(16, 16, 16)).astype(np.float32)).read_bytes()
    for share in (0.05, 0.5, 0.99):
        path = tmp_path / f"{share}-{name}"
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ReadError, match=r"ends|has \d+ bytes of") as caught:
            read_images(path)
        assert caught.value.reason == "TRUNCATED" and str(tmp_path) not in str(caught.value)


def test_a_flipped_bit_in_a_compressed_file_is_found(tmp_path):
    data = bytearray(write_nifti(tmp_path / "a.nii.gz", RNG.normal(size=(9, 9, 9)).astype(np.float32)).read_bytes())
    data[-8] ^= 1  # the checksum itself
    (tmp_path / "a.nii.gz").write_bytes(data)
    with pytest.raises(ReadError, match=r"compressed data of a\.nii\.gz does not decode") as caught:
        read_images(tmp_path / "a.nii.gz")
    assert caught.value.reason == "DECODE_FAILED"


def patched(tmp_path, at, code, value, name="p.nii"):
    data = bytearray(write_nifti(tmp_path / "w.nii", voxels(), oblique()).read_bytes())
    struct.pack_into(code, data, at, *value)
    path = tmp_path / name
    path.write_bytes(gzip.compress(bytes(data)) if name.endswith(".gz") else data)
    return path


@pytest.mark.parametrize(
    ("at", "code", "value", "reason"),
    [
        (40, "<4h", (3, 32767, 32767, 32767), Reason.TOO_LARGE),
        (40, "<4h", (3, 2000, 2000, 50), Reason.TRUNCATED),
        (40, "<4h", (3, 0, 5, 5), Reason.MALFORMED),
        (40, "<4h", (3, -5, 5, 5), Reason.MALFORMED),
        (40, "<h", (0,), Reason.MALFORMED),
        (40, "<6h", (5, 5, 6, 7, 1, 3), Reason.DTYPE_UNSUPPORTED),
        (70, "<h", (32,), Reason.DTYPE_UNSUPPORTED),  # complex64
        (70, "<h", (128,), Reason.DTYPE_UNSUPPORTED),  # RGB
        (70, "<h", (999,), Reason.MALFORMED),
        (108, "<f", (0.0,), Reason.MALFORMED),
        (108, "<f", (float("nan"),), Reason.MALFORMED),
        (280, "<12f", (0.0,) * 12, Reason.BAD_GEOMETRY),
        (280, "<f", (float("nan"),), Reason.BAD_GEOMETRY),
    ],
)
def test_a_header_that_lies_is_refused_before_any_voxel(tmp_path, at, code, value, reason):
    assert refusal(patched(tmp_path, at, code, value)).reason is reason


def test_a_compressed_file_cannot_promise_more_than_gzip_can_hold(tmp_path):
    path = patched(tmp_path, 40, "<4h", (3, 2000, 2000, 50), "p.nii.gz")
    assert refusal(path).reason is Reason.RATIO


def test_a_compressed_bomb_is_read_no_further_than_its_header_promises(tmp_path, monkeypatch):
    whole = write_nifti(tmp_path / "w.nii", voxels()).read_bytes()
    path = tmp_path / "bomb.nii.gz"
    path.write_bytes(gzip.compress(whole + bytes(64 << 20)))
    read = []
    original = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: read.append(size) or original(self, size))
    assert one(path).array.size == 210
    assert max(read) <= 1 << 20 and min(read) >= 0 and sum(read) < 2 << 20


def test_only_single_files_with_the_magic_are_taken(tmp_path):
    head = write_nifti(tmp_path / "a.nii", voxels()).read_bytes()[:512]
    assert nifti.sniff(tmp_path / "a.nii", head)
    assert nifti.sniff(tmp_path / "noname", zlib.compress(head, wbits=31))
    assert not nifti.sniff(tmp_path / "a.hdr", head[:344] + b"ni1\0" + head[348:])
    assert not nifti.sniff(tmp_path / "b.gz", gzip.compress(bytes(9999)))
    assert not nifti.sniff(tmp_path / "b.gz", b"\x1f\x8b\x08 nonsense")
    (tmp_path / "page.nii.gz").write_text("<html>")
    (tmp_path / "other.nii.gz").write_bytes(gzip.compress(bytes(9999)))
    assert refusal(tmp_path / "page.nii.gz").reason is Reason.MALFORMED
    assert refusal(tmp_path / "other.nii.gz").reason is Reason.MALFORMED


def test_any_byte_of_a_header_may_lie_without_a_crash(tmp_path):
    whole = write_nifti(tmp_path / "w.nii", voxels(), oblique(), slope=2.0).read_bytes()
    path, seen = tmp_path / "m.nii", set()
    for at in range(0, 352, 2):
        for value in (255, (whole[at] + 1) % 256):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            try:
                read_images(path)
                seen.add("ok")
            except ReadError as error:
                seen.add(error.reason)
    assert {"ok", "MALFORMED", "TRUNCATED"} <= seen


def test_a_file_that_changed_after_its_header_was_read(tmp_path):
    path = write_nifti(tmp_path / "a.nii", voxels())
    source = survey([path], AUTO).sources[0]
    write_nifti(path, voxels((3, 3, 3)))
    with pytest.raises(ReadError, match="has changed since"):
        readers.read(source)


# labels


def image_on(affine_lps, shape):
    array = np.zeros((1, *shape), np.float32)
    return Image(array, np.ones(array.shape, bool), (Channel(name="c"),), VolumeGeometry(affine_lps), "m")


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, -1)])
def test_labels_stored_in_any_orientation_land_on_the_same_voxels(tmp_path, order, flips):
    """Label and image hold the same object; the label file's axes are permuted and reversed."""
    classes = RNG.integers(0, 5, (5, 6, 7)).astype(np.uint8)
    affine = oblique()
    image = one(write_nifti(tmp_path / "image.nii", classes.astype(np.float32), affine))
    turned, turned_affine = classes.transpose(order), affine[:, [*order, 3]]
    for axis, flip in enumerate(flips):
        if flip < 0:
            turned = np.flip(turned, axis)
            turned_affine = turned_affine.copy()
            turned_affine[:, 3] += turned_affine[:, axis] * (turned.shape[axis] - 1)
            turned_affine[:, axis] *= -1
    path = write_nifti(tmp_path / "label.nii.gz", np.ascontiguousarray(turned), turned_affine)
    labels = readers.read_labels(path, image).array
    assert labels.dtype == np.int16
    np.testing.assert_array_equal(labels, image.array[0])


def test_labels_cropped_from_the_image_are_ignored_outside(tmp_path):
    affine, classes = oblique(), RNG.integers(1, 5, (5, 6, 7)).astype(np.uint8)
    image = one(write_nifti(tmp_path / "image.nii", classes, affine))
    inner = affine.copy()
    inner[:3, 3] = (affine @ [1, 2, 3, 1])[:3]
    path = write_nifti(tmp_path / "label.nii", np.ascontiguousarray(classes[1:4, 2:, 3:6]), inner)
    labels = readers.read_labels(path, image).array
    np.testing.assert_array_equal(labels[3:6, 2:, 1:4], image.array[0][3:6, 2:, 1:4])
    assert (labels == IGNORE).sum() == labels.size - 36
    window = (slice(3, 7), slice(0, 6), slice(2, 5))
    np.testing.assert_array_equal(readers.read_labels(path, image.crop(window)).array, labels[window])


def test_labels_on_another_grid_are_refused_not_resampled(tmp_path):
    affine = oblique()
    image = one(write_nifti(tmp_path / "image.nii", voxels(), affine))
    shifted, coarse, tiny, far = affine.copy(), affine @ np.diag([2, 2, 2, 1]), affine.copy(), affine.copy()
    shifted[:3, 3] += affine[:3, 0] / 2
    tiny[0, 3] += 5e-3
    far[:3, 3] += affine[:3, 0] * 50
    for other in (shifted, coarse):
        with pytest.raises(ReadError, match=r"grid of label\.nii differs .* resample the labels") as caught:
            readers.read_labels(write_nifti(tmp_path / "label.nii", voxels(), other), image)
        assert caught.value.reason == "BAD_GEOMETRY"
    readers.read_labels(write_nifti(tmp_path / "label.nii", voxels(), tiny), image)  # rounding is no other grid
    with pytest.raises(ReadError, match=r"labels of label\.nii do not overlap the image"):
        readers.read_labels(write_nifti(tmp_path / "label.nii", voxels(), far), image)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.full((5, 6, 7), 0.5, np.float32), "no class numbers"),
        (np.full((5, 6, 7), np.nan, np.float32), "no class numbers"),
        (np.full((5, 6, 7), 70000, np.int32), "no class numbers"),
        (np.full((5, 6, 7), -2, np.int16), "no class numbers"),
        (np.zeros((5, 6, 7, 2), np.int16), "holds 2 volumes; labels have one"),
    ],
)
def test_what_cannot_be_classes_is_refused(tmp_path, array, message):
    path = write_nifti(tmp_path / "a.nii", array)
    with pytest.raises(ReadError, match=message):
        readers.read_labels(path, image_on(np.eye(4), (7, 6, 5)))


def test_whole_numbers_stored_as_floats_are_classes(tmp_path):
    path = write_nifti(tmp_path / "a.nii", np.full((5, 6, 7), 3.0, np.float32))
    image = one(path)
    assert (readers.read_labels(path, image).array == 3).all()
    plane = Image(np.zeros((1, 4, 4), np.float32), np.ones((1, 4, 4), bool), (Channel(name="c"),), PlaneGeometry(), "m")
    with pytest.raises(ReadError, match="the image is not a volume"):
        readers.read_labels(path, plane)


# real files


@pytest.mark.data
def test_every_real_hippocampus_equals_simpleitk_and_carries_its_labels(shared_data):
    folder = shared_data / "med" / "hippocampus"
    found = survey(sorted((folder / "images").iterdir()), resolve_modalities("mr"))
    assert len(found.sources) == 87 and not found.refusals
    for source in found.sources:
        image = readers.read(source)
        assert_equals_simpleitk(image, source.files[0])
        path = folder / "labels" / source.files[0].name
        labels = readers.read_labels(path, image).array
        np.testing.assert_array_equal(labels, SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path))))
        assert set(np.unique(labels)) == {0, 1, 2}


@pytest.mark.data
def test_every_other_real_nifti_equals_simpleitk(shared_data):
    files = [f for f in sorted((shared_data / "med").rglob("*.nii.gz")) if "hippocampus" not in f.parts]
    assert len(files) > 20
    for path in files:
        images = read_images(path)
        if len(images) == 1:
            assert_equals_simpleitk(images[0], path)
        else:
            oracle = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(path)))
            np.testing.assert_array_equal(np.stack([image.array[0] for image in images]), oracle.astype(np.float32))
