"""Labelled crops: where they lie, what they hold, and that they depend on the step alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.labels import match_labels
from geomed_mae.config import DataConfig
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE
from geomed_mae.samples import labelled
from geomed_mae.samples.labelled import LabelledSteps, draw_labelled_start
from geomed_mae.samples.loader import load_steps
from tests.make_data import write_geotiff
from tests.scenes import landsat_scene, mr_volume


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    folder = tmp_path_factory.mktemp("labelled")
    landsat_scene(folder / "images" / "a.tif", folder / "labels" / "a.tif", shape=(60, 80))
    index = open_archive([folder / "images"], ["landsat7"])
    return index, match_labels(index, folder / "labels").labelled


def steps(archive, *, target=None, augmented: bool = False, crop=(32, 32), **data) -> LabelledSteps:
    index, labelled = archive
    targets = [(entry.row, entry.stored if target is None else target) for entry in labelled]
    config = DataConfig(modality="landsat7", crop_2d=crop, **data)
    return LabelledSteps(index, targets, config, seed=3, batch_size=4, augmented=augmented)


def test_pixels_and_labels_of_a_crop_belong_together(archive):
    index, labelled = archive
    image, stored = index.read(labelled[0].row.key), labelled[0].stored
    batch = steps(archive)[0]
    windows = np.lib.stride_tricks.sliding_window_view(image.array[0], (32, 32))
    for raw, target in zip(batch.images.raw.numpy(), batch.target.numpy(), strict=True):
        (start,) = np.argwhere((windows == raw[0]).all(axis=(2, 3)))
        np.testing.assert_array_equal(target, stored[start[0] : start[0] + 32, start[1] : start[1] + 32])
    assert batch.target.dtype == torch.int64 and len(batch) == 4 and batch.images.spacing.tolist()[0] == [28.5, 28.5]


def test_a_batch_is_a_function_of_its_step_with_any_number_of_workers(archive):
    made = steps(archive, augmented=True)
    here = [made[step] for step in range(3)]
    there = list(load_steps(steps(archive, augmented=True), 0, 3, workers=2))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images.raw, b.images.raw) and torch.equal(a.target, b.target)
    assert not torch.equal(here[0].images.raw, here[1].images.raw)
    assert torch.equal(made[2].target, here[2].target)


def test_the_pixels_that_are_remembered_of_a_large_class_lie_in_all_columns():
    width, height = 1000, 2000
    kept = labelled._thinned(np.arange(height * width))
    assert kept.size == labelled.MAX_POSITIONS == np.unique(kept).size and kept[-1] < height * width
    for coordinates, size in ((kept % width, width), (kept // width, height)):
        share = np.bincount(coordinates * 50 // size, minlength=50) / kept.size
        assert share.min() > 0.018 and share.max() < 0.022, "a fiftieth of the pixels in each fiftieth of the raster"
    few = np.arange(7)
    assert labelled._thinned(few) is few


def test_a_rare_class_is_in_many_crops(archive):
    target = np.zeros((60, 80), dtype=np.int16)
    target[:2, :2] = 1
    made = steps(archive, target=target)
    share = np.mean([[(crop == 1).any() for crop in made[step].target.numpy()] for step in range(50)])
    assert 0.18 < share < 0.45, (
        "half of the crops by class, and of these one in two for either; its area is a thousandth"
    )


def test_every_crop_holds_a_label_where_little_is_labelled(archive):
    target = np.full((60, 80), IGNORE, dtype=np.int16)
    target[50:55, 70:75] = 1
    made = steps(archive, target=target)
    assert all((crop != IGNORE).any() for step in range(20) for crop in made[step].target.numpy())


def test_a_crop_larger_than_the_image_is_padded_with_ignore_and_invalid(archive):
    batch = steps(archive, crop=(64, 96))[0]
    assert (batch.target[:, 60:] == IGNORE).all() and (batch.target[:, :, 80:] == IGNORE).all()
    assert not batch.images.valid[:, :, 60:].any() and (batch.images.raw[:, :, :, 80:] == 0).all()


def test_labels_on_invalid_pixels_are_ignored(tmp_path):
    values = np.random.default_rng(0).integers(1, 99, size=(32, 32)).astype(np.uint8)
    values[:8] = 0
    write_geotiff(tmp_path / "i.tif", values, nodata=0)
    index = open_archive([tmp_path / "i.tif"], ["unnamed-raster"])
    config = DataConfig(modality="unnamed-raster", crop_2d=(32, 32))
    target = np.ones((32, 32), np.int16)
    batch = LabelledSteps(index, [(index.rows[0], target)], config, seed=0, batch_size=1, augmented=False)[0]
    assert (batch.target[0, :8] == IGNORE).all() and (batch.target[0, 8:] == 1).all()


def test_chosen_channels_come_in_the_order_of_the_recipe(archive):
    _, labelled = archive
    batch = steps(archive, channels=("B4", "B1"))[0]
    assert [channel.name for channel in batch.images.channels] == ["B4", "B1"]
    assert [entry.median for entry in batch.images.statistics[0]] == [
        labelled[0].row.statistics[number].median for number in (3, 0)
    ]


def test_start_always_holds_the_position_and_stays_inside():
    rng = np.random.default_rng(0)
    for _ in range(300):
        position = int(rng.integers(60 * 80))
        start = draw_labelled_start(rng, (60, 80), (16, 24), position)
        at = np.unravel_index(position, (60, 80))
        assert all(
            s >= 0 and s <= a < s + c and s + c <= n for s, a, c, n in zip(start, at, (16, 24), (60, 80), strict=True)
        )


def test_without_any_class_it_says_where_to_look(archive):
    with pytest.raises(ConfigError, match=r"no pixel of the training images has a class; look at labels.values"):
        steps(archive, target=np.full((60, 80), IGNORE, dtype=np.int16))


def test_volumes_whose_headers_differ_in_physics_alone_share_a_head(tmp_path):
    for seed in range(2):
        mr_volume(tmp_path / f"{seed}.nii.gz", None, seed=seed)
    index = open_archive([tmp_path], ["mr"])
    rows = [
        replace(row, channels=(replace(row.channels[0], echo_time_ms=80.0 + number),))
        for number, row in enumerate(index.rows)
    ]
    config = DataConfig(modality="mr", crop_3d=(8, 8, 8))
    targets = [(row, np.ones(row.shape, np.int16)) for row in rows]
    batch = LabelledSteps(index, targets, config, seed=0, batch_size=8, augmented=False)[0]
    assert batch.images.channels[0].echo_time_ms == 80.0 and len(set(batch.images.keys)) == 2


def test_images_of_two_kinds_are_refused(tmp_path):
    landsat_scene(tmp_path / "a.tif", None, shape=(32, 32))
    mr_volume(tmp_path / "b.nii.gz", None)
    index = open_archive([tmp_path], ["landsat7", "mr"])
    config = DataConfig(modality=("landsat7", "mr"), crop_2d=(32, 32), crop_3d=(8, 8, 8))
    targets = [(row, np.zeros(row.shape, np.int16)) for row in index.rows]
    with pytest.raises(ConfigError, match=r"labelled images are of 2 kinds, but a head is made for one.*data.modality"):
        LabelledSteps(index, targets, config, seed=0, batch_size=1)
