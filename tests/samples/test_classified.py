"""Crops of images with classes: which images are drawn, what they hold, and that they depend on the step alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.config import DataConfig
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE
from geomed_mae.samples.classified import ClassifiedSteps
from geomed_mae.samples.loader import load_steps
from tests.make_pictures import write_png
from tests.scenes import landsat_scene


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Twelve X-rays of 20 x 24 pixels; the one of number n has the values 8 n to 8 n + 7."""
    folder = tmp_path_factory.mktemp("classified")
    for number in range(12):
        pixels = np.random.default_rng(number).integers(8 * number, 8 * number + 8, (20, 24)).astype(np.uint8)
        write_png(folder / f"{number:02d}.png", pixels, 0)
    return open_archive([folder], ["xray"])


def numbers(archive) -> list[int]:
    return [int(archive.paths(row.key)[0].stem) for row in archive.rows]


def steps(archive, targets, *, crop=(16, 16), batch_size=8, augmented=False) -> ClassifiedSteps:
    config = DataConfig(modality="xray", crop_2d=crop)
    labelled = [(row, np.asarray(target)) for row, target in zip(archive.rows, targets, strict=True)]
    return ClassifiedSteps(archive, labelled, config, seed=3, batch_size=batch_size, augmented=augmented)


def test_pixels_and_class_of_a_crop_belong_to_one_image(archive):
    made = steps(archive, [np.int16(number) for number in numbers(archive)])
    for step in range(4):
        batch = made[step]
        assert batch.target.dtype == torch.int64 and batch.target.shape == (8,) and len(batch) == 8
        assert torch.equal(batch.images.raw[:, 0, 0, 0].long() // 8, batch.target)
        assert batch.images.valid.all() and batch.images.raw.shape == (8, 1, 16, 16)


def test_an_image_smaller_than_the_crop_is_in_it_whole(archive):
    batch = steps(archive, [np.int16(0)] * 12, crop=(32, 32))[0]
    assert batch.images.valid[:, :, :20, :24].all() and not batch.images.valid[:, :, 20:].any()
    assert not batch.images.raw[:, :, :, 24:].any()


def test_a_rare_class_is_drawn_as_often_as_the_rule_says(archive):
    made = steps(archive, [np.int16(number == 5) for number in numbers(archive)])
    share = np.mean([made[step].target.float().mean() for step in range(100)])
    expected = 0.5 * 0.5 + 0.5 / 12
    assert share == pytest.approx(expected, abs=4 * np.sqrt(expected * (1 - expected) / 800))


def test_rare_ones_of_several_labels_are_drawn_and_so_are_images_without_any(archive):
    rows = {number: [number < 8, number == 5, 0 if number < 11 else UNKNOWN] for number in range(12)}
    made = steps(archive, [np.array(rows[number], np.int8) for number in numbers(archive)])
    batches = torch.cat([made[step].target for step in range(100)])
    assert batches.shape == (800, 3) and batches.dtype == torch.int64
    assert (batches[:, 1] == 1).float().mean() > 0.15, "one of twelve, but a third of the balanced half"
    assert (batches.amax(dim=1) < 1).float().mean() > 0.25 and (batches == UNKNOWN).any()


def test_a_batch_is_a_function_of_its_step_with_any_number_of_workers(archive):
    targets = [np.int16(number % 2) for number in numbers(archive)]
    here = [steps(archive, targets, augmented=True)[step] for step in range(3)]
    there = list(load_steps(steps(archive, targets, augmented=True), 0, 3, workers=1))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a.images.raw, b.images.raw) and torch.equal(a.target, b.target)
    assert not torch.equal(here[0].images.raw, here[1].images.raw)


def test_augmentation_turns_planes_a_little_and_never_mirrors_them(archive):
    plain, moved = (steps(archive, [np.int16(0)] * 12, augmented=augmented)[0] for augmented in (False, True))
    assert plain.images.keys == moved.images.keys and not torch.equal(plain.images.raw, moved.images.raw)
    assert not moved.images.valid.all(), "what a rotation brings in from outside is not valid"
    assert not moved.images.raw[~moved.images.valid].any()


def test_images_of_which_nothing_is_known_are_left_out(archive):
    targets = [np.int16(0 if number < 3 else IGNORE) for number in numbers(archive)]
    assert len(steps(archive, targets).rows) == 3
    with pytest.raises(ConfigError, match="no training image has a class"):
        steps(archive, [np.int16(IGNORE)] * 12)


def test_images_of_several_kinds_are_refused(tmp_path, archive):
    landsat_scene(tmp_path / "a.tif", None, shape=(40, 40))
    write_png(tmp_path / "b.png", np.arange(480, dtype=np.uint8).reshape(20, 24), 0)
    index = open_archive([tmp_path], ["landsat7", "xray"])
    config = DataConfig(modality=("landsat7", "xray"), crop_2d=(16, 16))
    with pytest.raises(ConfigError, match="the labelled images are of 2 kinds, but a head is made for one"):
        ClassifiedSteps(index, [(row, np.int16(0)) for row in index.rows], config, seed=0, batch_size=2)
