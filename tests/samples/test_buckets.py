"""Images share a batch only when they are of a kind; steps fall to buckets by valid area."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from geomed_mae.config import DataConfig
from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel
from geomed_mae.modalities import load_modality
from geomed_mae.models.channels import describe
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.samples.buckets import draw_bucket, make_buckets, shares
from geomed_mae.samples.loader import Steps

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


def test_buckets_are_drawn_by_valid_area_and_their_images_by_all_of_theirs(memory_index):
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
    assert sum(two.draw(value).key == "image1" for value in even) == 3840  # 1600 of 2000 pixels, valid or not


@pytest.mark.parametrize("scattered", [True, False])
def test_valid_pixels_are_seen_as_often_in_a_half_empty_image_as_in_a_full_one(memory_index, scattered):
    holes = np.ones((1, 96, 96), bool)
    holes[(slice(None), slice(None), slice(None, None, 2)) if scattered else np.s_[:, :, 48:]] = False
    memory_index.add(np.ones((1, 96, 96)))
    memory_index.add(np.ones((1, 96, 96)), valid=holes)
    config = DataConfig(modality="landsat7", crop_2d=(8, 8), crops_per_read=1)
    steps = Steps(memory_index, config, seed=0, batch_size=16)
    seen = {"image0": 0, "image1": 0}
    for batch in (steps[number].physical() for number in range(160)):
        for key, valid in zip(batch.keys, batch.valid, strict=True):
            seen[key] += int(valid.sum())
    assert seen["image1"] / holes.sum() == pytest.approx(seen["image0"] / holes.size, rel=0.1)


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


def mr_rows(index, times: list[tuple[float | None, float | None]]):
    """Add volumes with these (repetition, echo) times in ms; returns their rows."""
    for _ in times:
        index.add(np.ones((1, 4, 20, 20)), modality="mr")
    return [
        replace(
            row,
            channels=(Channel(name="MR", kind="mr", unit="a.u.", repetition_time_ms=repetition, echo_time_ms=echo),),
        )
        for row, (repetition, echo) in zip(index.rows, times, strict=True)
    ]


VOLUMES = DataConfig(crop_3d=(2, 8, 8))


def test_series_of_a_protocol_share_a_bucket_though_their_times_differ_a_little(memory_index):
    rng = np.random.default_rng(0)
    contrasts = [(500.0, 10.0), (4000.0, 90.0), (8000.0, 120.0)]
    times = [
        (repetition * rng.uniform(0.95, 1.05), echo * rng.uniform(0.95, 1.05))
        for repetition, echo in contrasts
        for _ in range(30)
    ]
    found = make_buckets(mr_rows(memory_index, times), VOLUMES, MODALITIES)
    assert len(found) <= 2 * len(contrasts) < 20, "a border of a third may pass through a cluster, on either axis"
    assert sum(len(bucket.rows) for bucket in found) == 90
    for bucket in found:
        own = [row.channels[0] for row in bucket.rows]
        (channel,) = bucket.channels
        assert channel.echo_time_ms == np.median([one.echo_time_ms for one in own])
        assert max(one.echo_time_ms for one in own) / min(one.echo_time_ms for one in own) < 2 ** (1 / 3)
        assert max(one.repetition_time_ms for one in own) < 1.3 * min(one.repetition_time_ms for one in own)


def test_contrasts_and_unknown_times_are_kept_apart(memory_index):
    times = [(500.0, 10.0), (500.0, 90.0), (None, None), (1.0, 10.0), (None, 10.0)]
    found = make_buckets(mr_rows(memory_index, times), VOLUMES, MODALITIES)
    assert len(found) == 5 and {bucket.channels[0].echo_time_ms for bucket in found} == {10.0, 90.0, None}


def test_times_of_zero_are_unknown_as_they_are_to_the_model(memory_index):
    (found,) = make_buckets(mr_rows(memory_index, [(0.0, 10.0), (None, 10.0)]), VOLUMES, MODALITIES)
    assert describe(found.channels[0]) == describe(found.rows[0].channels[0]) == describe(found.rows[1].channels[0])


def test_buckets_with_median_physics_do_not_depend_on_the_order_of_rows(memory_index):
    rows = mr_rows(memory_index, [(500.0, 10.0), (505.0, 10.5), (510.0, 10.2), (4000.0, 90.0)])
    forward, backward = (make_buckets(some, VOLUMES, MODALITIES) for some in (rows, rows[::-1]))
    assert [one.channels for one in forward] == [one.channels for one in backward]
    assert forward[0].channels[0].echo_time_ms in (10.2, 90.0)


def test_crops_of_a_bucket_have_its_median_physics_and_the_contract_finds_them_by_name(memory_index):
    rows = mr_rows(memory_index, [(500.0, 10.0), (505.0, 10.5), (510.0, 10.2)])
    memory_index.rows = tuple(rows)
    steps = Steps(memory_index, VOLUMES.model_copy(update={"modality": ("mr",)}), seed=0, batch_size=6)
    batch = steps[0].physical()
    assert batch.channels[0].echo_time_ms == 10.2 and (batch.raw == 1).all() and len(set(batch.keys)) > 1
    entries = contract_entries(load_modality("mr"), rows[0].channels, [rows[0].statistics])
    assert Contract(channels=entries).entries("mr", batch.channels) == entries
