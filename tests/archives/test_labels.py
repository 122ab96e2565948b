"""Which label file belongs to which image."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from geomed_mae.archives import labels
from geomed_mae.archives.build import open_archive
from geomed_mae.archives.label_pairs import stem_of
from geomed_mae.archives.label_values import block_split, class_numbers
from geomed_mae.archives.labels import match_labels
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.readers import IGNORE, LabelQuery
from tests.make_data import UTM_10M, write_geotiff
from tests.scenes import landsat_scene, mr_volume


def scenes(tmp_path, count: int = 2):
    truth = {
        f"s{seed}": landsat_scene(
            tmp_path / "images" / f"s{seed}.tif", tmp_path / "labels" / f"s{seed}.tif", shape=(32, 48), seed=seed
        )
        for seed in range(count)
    }
    return open_archive([tmp_path / "images"], ["landsat7"]), truth


def found(index, matching) -> dict[str, np.ndarray]:
    return {index.paths(entry.row.key)[0].stem: entry.stored for entry in matching.labelled}


def test_by_name(tmp_path):
    index, truth = scenes(tmp_path)
    matching = match_labels(index, tmp_path / "labels")
    for name, stored in found(index, matching).items():
        np.testing.assert_array_equal(stored, truth[name])
    assert matching.counts() == {
        "images_labelled": 2,
        "images_without_labels": 0,
        "label_files_without_image": 0,
        "other_files": 0,
    }


def test_labels_that_do_not_fit_into_memory_are_refused_before_they_are_read(tmp_path, monkeypatch):
    index, _ = scenes(tmp_path)
    monkeypatch.setattr(labels, "read_labels_guarded", lambda *_: pytest.fail("a label file was read"))
    monkeypatch.setattr(labels, "PIXEL_BYTES", 2**60)
    with pytest.raises(ConfigError, match=r"the labels of 2 images take [0-9]+ GiB .* this machine has [0-9]+ GiB"):
        match_labels(index, tmp_path / "labels")


def test_by_place_where_names_differ(tmp_path):
    index, truth = scenes(tmp_path)
    for number in range(2):
        (tmp_path / "labels" / f"s{number}.tif").rename(tmp_path / "labels" / f"mask_{number}.tif")
    for name, stored in found(index, match_labels(index, tmp_path / "labels")).items():
        np.testing.assert_array_equal(stored, truth[name])


def test_a_label_on_another_grid_is_placed_by_coordinates_not_by_shape(tmp_path):
    values = np.random.default_rng(0).integers(1, 200, size=(20, 20)).astype(np.uint8)
    write_geotiff(tmp_path / "image.tif", values)
    a, b, c, d, e, f = UTM_10M
    # The label's first pixel lies on the image's pixel (row 5, column 3); the shape is the same by chance.
    labels = np.random.default_rng(1).integers(0, 2, size=(20, 20)).astype(np.uint8)
    (tmp_path / "labels").mkdir()
    write_geotiff(tmp_path / "labels" / "image.tif", labels, transform=(a, b, c + 3 * a, d, e, f + 5 * e))
    index = open_archive([tmp_path / "image.tif"], ["unnamed-raster"])
    stored = match_labels(index, tmp_path / "labels").labelled[0].stored
    np.testing.assert_array_equal(stored[5:, 3:], labels[:15, :17])
    assert (stored[:5] == IGNORE).all() and (stored[:, :3] == IGNORE).all()


def test_one_large_label_raster_serves_all_images_that_it_covers(tmp_path):
    values = np.random.default_rng(0).integers(1, 200, size=(20, 20)).astype(np.uint8)
    a, b, c, d, e, f = UTM_10M
    (tmp_path / "images").mkdir()
    for number in range(2):
        transform = (a, b, c + 20 * number * a, d, e, f)
        write_geotiff(tmp_path / "images" / f"{number}.tif", values + number, transform=transform)
    labels = np.random.default_rng(1).integers(0, 2, size=(20, 40)).astype(np.uint8)
    write_geotiff(tmp_path / "all.tif", labels)
    index = open_archive([tmp_path / "images"], ["unnamed-raster"])
    matched = found(index, match_labels(index, tmp_path / "all.tif"))
    np.testing.assert_array_equal(matched["0"], labels[:, :20])
    np.testing.assert_array_equal(matched["1"], labels[:, 20:])


def test_two_label_files_on_one_image_are_refused_with_their_names(tmp_path):
    index, _ = scenes(tmp_path, count=1)
    for name in ("first", "second"):
        shutil.copy(tmp_path / "labels" / "s0.tif", tmp_path / "labels" / f"{name}.tif")
    (tmp_path / "labels" / "s0.tif").unlink()
    with pytest.raises(
        ConfigError, match=r"2 label files lie on the image s0.tif \(first.tif, second.tif\); give each"
    ):
        match_labels(index, tmp_path / "labels")


def test_volumes_that_share_a_place_need_names(tmp_path):
    for seed in range(2):
        mr_volume(tmp_path / "images" / f"{seed}.nii.gz", tmp_path / "labels" / f"mask{seed}.nii.gz", seed=seed)
    index = open_archive([tmp_path / "images"], ["mr"])
    with pytest.raises(ConfigError, match="2 label files lie on the image"):
        match_labels(index, tmp_path / "labels")
    for seed in range(2):
        (tmp_path / "labels" / f"mask{seed}.nii.gz").rename(tmp_path / "labels" / f"{seed}.nii.gz")
    assert len(match_labels(index, tmp_path / "labels").labelled) == 2


def test_the_name_alone_is_not_believed(tmp_path):
    index, _ = scenes(tmp_path, count=1)
    a, b, _, d, e, _ = UTM_10M
    write_geotiff(
        tmp_path / "labels" / "s0.tif", np.ones((32, 48), np.uint8), crs="EPSG:32633", transform=(a, b, 0, d, e, 0)
    )
    with pytest.raises(ReadError, match=r"labels of s0\.tif do not overlap the image"):
        match_labels(index, tmp_path / "labels")


def test_files_that_are_no_labels_and_images_without_any_are_counted(tmp_path):
    index, _ = scenes(tmp_path)
    (tmp_path / "labels" / "s1.tif").unlink()
    (tmp_path / "labels" / "README.txt").write_text("about the labels")
    matching = match_labels(index, tmp_path / "labels")
    assert matching.counts() == {
        "images_labelled": 1,
        "images_without_labels": 1,
        "label_files_without_image": 0,
        "other_files": 1,
    }


def test_labels_elsewhere_are_counted_as_such(tmp_path):
    index, _ = scenes(tmp_path, count=1)
    landsat_scene(tmp_path / "elsewhere.tif", tmp_path / "labels" / "other.tif", shape=(32, 48), seed=7)
    assert match_labels(index, tmp_path / "labels").counts()["label_files_without_image"] == 1


def test_a_label_map_on_another_grid_says_what_to_do(tmp_path):
    mr_volume(tmp_path / "v.nii.gz", None)
    mr_volume(tmp_path / "other.nii.gz", tmp_path / "labels" / "w.nii.gz", spacing=1.1)
    index = open_archive([tmp_path / "v.nii.gz"], ["mr"])
    with pytest.raises(ConfigError, match=r"the grid of w\.nii\.gz differs from the image's; resample the labels"):
        match_labels(index, tmp_path / "labels")


def test_a_damaged_label_file_is_an_error_not_a_missing_one(tmp_path):
    index, _ = scenes(tmp_path, count=1)
    path = tmp_path / "labels" / "mask.tif"
    (tmp_path / "labels" / "s0.tif").rename(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(ReadError, match=r"mask\.tif"):
        match_labels(index, tmp_path / "labels")


def test_no_match_at_all_says_what_labels_need(tmp_path):
    index, _ = scenes(tmp_path, count=1)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("nothing")
    with pytest.raises(ConfigError, match=r"none of the 1 files in .* is a label map that lies on one of the 1 images"):
        match_labels(index, tmp_path / "notes")


@pytest.mark.parametrize(
    ("paths", "stem"), [(["a/scan.nii.gz"], "scan"), (["a/s.tif"], "s"), (["p/CT/1.dcm", "p/CT/2.dcm"], "CT")]
)
def test_stems(tmp_path, paths, stem):
    assert stem_of([tmp_path / path for path in paths]) == stem


def test_values_are_mapped_and_the_others_ignored():
    stored = np.array([[0, 1, 255, 7, IGNORE]], dtype=np.int16)
    np.testing.assert_array_equal(class_numbers(stored, {0: 0, 255: 1}, ("a", "b")), [[0, IGNORE, 1, IGNORE, IGNORE]])


def test_a_value_without_a_class_names_the_key_to_set():
    with pytest.raises(ConfigError, match=r"label values \[255\] have no class: head.classes names 2 .*labels.values"):
        class_numbers(np.array([[0, 255]], dtype=np.int16), None, ("a", "b"))
    with pytest.raises(ConfigError, match=r"labels\.values leads to class 2, but head.classes names 0 to 1"):
        class_numbers(np.array([[0]], dtype=np.int16), {0: 2}, ("a", "b"))


def test_blocks_are_a_checkerboard_of_about_the_share_asked_for():
    half = block_split((64, 64), 16, 0.5, 0)
    assert half[0, 0] and not half[0, 16] and not half[16, 0] and half[16, 16]
    assert half.mean() == 0.5
    for fraction in (0.25, 0.2):
        assert block_split((480, 640), 16, fraction, 1).mean() == pytest.approx(fraction, abs=0.03)
    assert not np.array_equal(block_split((64, 64), 16, 0.5, 0), block_split((64, 64), 16, 0.5, 1))
    assert block_split((8, 8, 8), 4, 0.5, 0).shape == (8, 8, 8)


@pytest.mark.data
def test_real_masks_of_fires_and_volumes_belong_to_their_images(shared_data):
    index = open_archive(
        [shared_data / "med" / "hippocampus" / "images" / f"hippocampus_{n}.nii.gz" for n in ("001", "006")], ["mr"]
    )
    matching = match_labels(index, shared_data / "med" / "hippocampus" / "labels")
    assert matching.counts()["images_labelled"] == 2
    for entry in matching.labelled:
        assert set(np.unique(entry.stored)) == {0, 1, 2} and entry.stored.shape == entry.row.shape


def test_values_to_ignore_may_lie_beyond_any_class_number(tmp_path):
    values = np.random.default_rng(0).integers(1, 200, size=(8, 9)).astype(np.uint8)
    labels = np.random.default_rng(1).integers(0, 2, size=(8, 9)).astype(np.uint16)
    labels[0], labels[1] = 65535, 255
    for folder, array in (("i", values), ("l", labels)):
        (tmp_path / folder).mkdir()
        write_geotiff(tmp_path / folder / "a.tif", array)
    index = open_archive([tmp_path / "i"], ["unnamed-raster"])
    with pytest.raises(ReadError, match=r"or list it in labels\.ignore \(image a\.tif\)$"):
        match_labels(index, tmp_path / "l")
    stored = match_labels(index, tmp_path / "l", LabelQuery(ignore=(255, 65535))).labelled[0].stored
    assert (stored[:2] == IGNORE).all()
    np.testing.assert_array_equal(stored[2:], labels[2:])
