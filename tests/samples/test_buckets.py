"""Images share a batch only when they are of a kind; steps fall to buckets by valid area."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.config import DataConfig
from geomed_mae.errors import ConfigError
from geomed_mae.modalities import load_modality
from geomed_mae.samples.buckets import draw_bucket, make_buckets, shares

MODALITIES = {name: load_modality(name) for name in ("landsat7", "ct")}


def test_channel_sets_and_numbers_of_axes_are_kept_apart(memory_index):
    memory_index.add(np.ones((2, 20, 20)))
    memory_index.add(np.ones((3, 20, 20)))
    memory_index.add(np.ones((2, 30, 30)))
    memory_index.add(np.ones((1, 4, 20, 20)), modality="ct")
    found = make_buckets(memory_index.rows, DataConfig(crop_2d=(8, 8), crop_3d=(2, 8, 8)), MODALITIES)
    kinds = sorted((bucket.modality, len(bucket.channels), len(bucket.rows), bucket.crop) for bucket in found)
    assert kinds == [("ct", 1, 1, (2, 8, 8)), ("landsat7", 2, 2, (8, 8)), ("landsat7", 3, 1, (8, 8))]
    assert {bucket.flips for bucket in found} == {(), ("y", "x", "rot90")}


def test_known_and_unknown_spacing_do_not_mix(memory_index):
    memory_index.add(np.ones((1, 20, 20)), spacing=None)
    memory_index.add(np.ones((1, 20, 20)), spacing=10.0)
    assert len(make_buckets(memory_index.rows, DataConfig(crop_2d=(8, 8)), MODALITIES)) == 2


def test_a_missing_crop_is_an_error_that_names_the_keys_and_the_images(memory_index):
    memory_index.add(np.ones((1, 4, 20, 30)), modality="ct")
    with pytest.raises(ConfigError, match=r"'ct' \(volume, 4 x 20 x 30\): set data.crop_3d and model.patch_3d"):
        make_buckets(memory_index.rows, DataConfig(crop_2d=(8, 8)), MODALITIES)


def test_an_image_without_a_wanted_channel_is_an_error(memory_index):
    memory_index.add(np.ones((2, 20, 20)))
    config = DataConfig(crop_2d=(8, 8), channels=("B1", "B9"))
    with pytest.raises(ConfigError, match=r"asks for \['B9'\].*it has \['B1', 'B2'\]"):
        make_buckets(memory_index.rows, config, MODALITIES)


def test_images_without_valid_pixels_are_never_drawn(memory_index):
    memory_index.add(np.ones((1, 20, 20)), valid=np.zeros((1, 20, 20), bool))
    with pytest.raises(ConfigError, match="none of the 1 images"):
        make_buckets(memory_index.rows, DataConfig(crop_2d=(8, 8)), MODALITIES)


def test_buckets_and_images_are_drawn_by_valid_area(memory_index):
    half = np.zeros((1, 40, 40), bool)
    half[:, :20] = True
    memory_index.add(np.ones((2, 20, 20)))  # 400 valid
    memory_index.add(np.ones((2, 40, 40)), valid=half)  # 800
    memory_index.add(np.ones((3, 60, 60)))  # 3600
    two, three = sorted(
        make_buckets(memory_index.rows, DataConfig(crop_2d=(8, 8)), MODALITIES), key=lambda one: len(one.channels)
    )
    even = (np.arange(4800) + 0.5) / 4800
    assert sum(draw_bucket((two, three), value) is three for value in even) == 3600
    assert sum(two.draw(value).key == "image1" for value in even) == 3200


def test_buckets_do_not_depend_on_the_order_of_rows(memory_index):
    memory_index.add(np.ones((2, 20, 20)))
    memory_index.add(np.ones((3, 20, 20)))
    config = DataConfig(crop_2d=(8, 8))
    forward = [len(one.channels) for one in make_buckets(memory_index.rows, config, MODALITIES)]
    assert forward == [len(one.channels) for one in make_buckets(memory_index.rows[::-1], config, MODALITIES)]


def test_weights_share_out_the_steps_among_modalities(memory_index):
    memory_index.add(np.ones((2, 20, 20)))  # 400 valid
    memory_index.add(np.ones((3, 40, 30)))  # 1200
    memory_index.add(np.ones((1, 4, 60, 60)), modality="ct")  # 14400
    config = DataConfig(crop_2d=(8, 8), crop_3d=(2, 8, 8))
    found = make_buckets(memory_index.rows, config, MODALITIES)

    def share_of(weights: dict[str, float] | None) -> list[float]:
        made = dict(
            zip([(bucket.modality, len(bucket.channels)) for bucket in found], shares(found, weights), strict=True)
        )
        return [made[kind] for kind in (("landsat7", 2), ("landsat7", 3), ("ct", 1))]

    assert share_of(None) == pytest.approx([0.025, 0.075, 0.9])
    assert share_of({"landsat7": 1, "ct": 3}) == pytest.approx([0.0625, 0.1875, 0.75])
    drawn = [draw_bucket(found, u, {"landsat7": 1, "ct": 3}).modality for u in np.linspace(0, 1, 1000, endpoint=False)]
    assert drawn.count("ct") == pytest.approx(750, abs=2)


@pytest.mark.parametrize("weights", [{"landsat7": 1.0}, {"landsat7": 1.0, "ct": 1.0, "mr": 1.0}])
def test_weights_that_do_not_fit_the_archive_are_an_error(memory_index, weights):
    memory_index.add(np.ones((2, 20, 20)))
    memory_index.add(np.ones((1, 4, 60, 60)), modality="ct")
    found = make_buckets(memory_index.rows, DataConfig(crop_2d=(8, 8), crop_3d=(2, 8, 8)), MODALITIES)
    with pytest.raises(ConfigError, match=r"the archive holds \['ct', 'landsat7'\]; give each of these a weight"):
        shares(found, weights)
