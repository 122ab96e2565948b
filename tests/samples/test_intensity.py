"""Values change as far as their unit allows: freely where it is arbitrary, by light, or else by noise alone."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.archives.statistics import summarise
from geomed_mae.modalities import load_modality
from geomed_mae.samples.intensity import BAND_BRIGHTNESS, BRIGHTNESS, GAIN, SHIFT, allowed, change

SHAPE = (24, 24)


def crop(channels: int, low: float = 100.0, high: float = 900.0):
    raw = np.random.default_rng(1).uniform(low, high, size=(channels, *SHAPE)).astype(np.float32)
    valid = np.ones(raw.shape, dtype=bool)
    valid[:, :3] = False
    return np.where(valid, raw, np.float32(0)), valid


def changed(name: str, seed: int, channels: int | None = None):
    modality = load_modality(name)
    use = modality.channels[:channels]
    raw, valid = crop(len(use))
    rules = allowed(modality, use)
    return raw, valid, rules, change(raw, valid, rules, summarise(raw, valid), np.random.default_rng(seed))


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("mr", "arbitrary"), ("xray", "arbitrary"), ("mammography", "arbitrary"), ("ultrasound", "arbitrary"),
        ("sentinel2-l2a", "sunlit"), ("landsat7", "sunlit"), ("rgb", "sunlit"), ("enmap-l2a", "sunlit"),
        ("ct", "measured"), ("pet", "measured"), ("sentinel1", "measured"), ("unnamed-volume", "measured"),
    ],
)  # fmt: skip
def test_what_a_unit_means_decides_what_may_change(name, how):
    modality = load_modality(name)
    channels = modality.channels or load_modality("mr").channels
    if not modality.channels:
        channels = tuple(type(channel)(name=channel.name) for channel in channels)
    assert {rule.how for rule in allowed(modality, channels)} == {how}


def test_ct_beside_pet_is_left_as_it_was_measured():
    modality = load_modality("pet-ct")
    assert [rule.how for rule in allowed(modality, modality.channels)] == ["measured"] * len(modality.channels)


@pytest.mark.parametrize("name", ["mr", "sentinel2-l2a", "ct", "ultrasound", "sentinel1"])
def test_what_is_not_valid_stays_0_and_the_same_seed_gives_the_same_crop(name):
    different = 0
    for seed in range(12):
        raw, valid, _, found = changed(name, seed)
        assert found.dtype == np.float32 and found.shape == raw.shape and not found[~valid].any()
        np.testing.assert_array_equal(found, changed(name, seed)[3])
        different += not np.array_equal(found, raw)
    assert 3 < different <= 12, "crops stay as they are now and then, and most do not"


def test_measured_units_get_noise_of_the_modality_s_floor_and_no_bias():
    spreads = []
    for seed in range(60):
        raw, valid, rules, found = changed("ct", seed)
        error = (found - raw)[valid]
        assert abs(error.mean()) < 4 * rules[0].noise / np.sqrt(error.size) + 1e-3
        spreads.append(error.std())
    assert (
        max(spreads) <= 1.1 * 20
        and max(spreads) > 10
        and np.mean(np.array(spreads) == 0) == pytest.approx(0.5, abs=0.2)
    )


def test_light_scales_all_bands_alike_and_each_a_little_by_itself():
    quiet = [type(rule)(rule.how, 0.0, rule.relative) for rule in changed("sentinel2-l2a", 0)[2]]
    raw, valid = crop(len(quiet))
    common = []
    for seed in range(40):
        found = change(raw, valid, quiet, summarise(raw, valid), np.random.default_rng(seed))
        gains = [np.unique((found[n][valid[n]] / raw[n][valid[n]]).round(4)) for n in range(len(raw))]
        assert all(gain.max() - gain.min() <= 2e-4 for gain in gains), "one factor a band"
        bands = np.array([gain.mean() for gain in gains])
        assert bands.max() / bands.min() <= (1 + BAND_BRIGHTNESS) / (1 - BAND_BRIGHTNESS) + 1e-3
        common.append(bands.mean())
    assert (
        1 - BRIGHTNESS - BAND_BRIGHTNESS <= min(common) < 0.95 < 1.05 < max(common) <= 1 + BRIGHTNESS + BAND_BRIGHTNESS
    )


def test_arbitrary_units_keep_the_order_of_values_within_gain_and_shift():
    rule = allowed(load_modality("mr"), load_modality("mr").channels)[0]
    raw, valid = crop(1)
    known = summarise(raw, valid)
    order = np.argsort(raw[valid], kind="stable")
    for seed in range(40):
        found = change(raw, valid, [type(rule)(rule.how, 0.0, True)], known, np.random.default_rng(seed))
        assert (np.diff(found[valid][order]) >= -1e-2).all()
        median = (np.median(found[valid]) - known[0].median) / known[0].spread
        # Gamma bends the middle by at most exp(GAMMA); with gain and shift it stays within half a spread.
        assert abs(median) < SHIFT + GAIN + 0.35


def test_a_constant_image_does_not_divide_by_zero():
    raw, valid = np.full((1, *SHAPE), 7, np.float32), np.ones((1, *SHAPE), bool)
    rules = allowed(load_modality("mr"), load_modality("mr").channels)
    found = [change(raw, valid, rules, summarise(raw, valid), np.random.default_rng(seed)) for seed in range(8)]
    assert all(np.isfinite(one).all() for one in found)
