"""The input contract: scaling by method, refusals that say the way out, exact zeros where invalid."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from geomed_mae.archives.statistics import summarise
from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import SMALLEST_FLOOR, Contract, contract_entries, normalise, scaling

S2, CT, MR, PET, LANDSAT = (load_modality(name) for name in ("sentinel2-l2a", "ct", "mr", "pet", "landsat7"))


def statistics(center: float, channels: int = 1) -> tuple:
    array = np.random.default_rng(0).normal(center, 10, (channels, 64, 64)).astype(np.float32)
    return summarise(array, np.ones((1, 64, 64), bool))


@pytest.fixture
def contract() -> Contract:
    entries = contract_entries(S2, S2.channels, []) + contract_entries(CT, CT.channels, [])
    return Contract(channels=entries, crop_2d=(64, 64), images=5, steps=10, fingerprint="abc")


def test_json_both_ways(contract):
    assert Contract.from_json(contract.to_json()) == contract
    with pytest.raises(ConfigError, match=r"contract.json is not a contract that this version can read"):
        Contract.from_json('{"channels": [{"modality": "ct"}]}')


def test_absolute_units_keep_one_scale_and_their_noise_floor_in_model_units():
    (entry,) = contract_entries(CT, CT.channels, [])
    assert (entry.method, entry.center, entry.scale, entry.value_range) == ("fixed", 0, 400, (-1024, 3071))
    assert entry.noise_floor == 20 / 400


def test_archives_settle_on_the_median_image():
    rows = [statistics(center, 6) for center in (50, 60, 200)]
    entries = contract_entries(LANDSAT, LANDSAT.channels, rows)
    assert [entry.method for entry in entries] == ["fixed"] * 6
    assert all(abs(entry.center - 60) < 1 and abs(entry.scale - 10) < 0.5 for entry in entries)
    with pytest.raises(ConfigError, match="'landsat7' is scaled by its archive, but no image's statistics are given"):
        contract_entries(LANDSAT, LANDSAT.channels, [])


def test_a_modality_without_noise_floor_gets_the_smallest():
    unnamed = load_modality("unnamed-raster")
    (entry,) = contract_entries(unnamed, [Channel(name="band1")], [statistics(0)])
    assert entry.noise_floor == SMALLEST_FLOOR


def test_arbitrary_units_are_scaled_by_the_image_itself():
    entries = contract_entries(MR, MR.channels, [])
    center, scale, floor = scaling(entries, statistics(1000))
    assert abs(center[0] - 1000) < 1 and abs(scale[0] - 10) < 0.5 and floor[0] == np.float32(0.1)
    with pytest.raises(ConfigError, match=r"channels \['MR'\] are scaled by each image's own statistics"):
        scaling(entries)


def test_entries_follow_the_order_asked_for_and_take_subsets(contract):
    wanted = [S2.channels[3], S2.channels[1]]
    assert [entry.channel.name for entry in contract.entries("sentinel2-l2a", wanted)] == ["B04", "B02"]


@pytest.mark.parametrize(
    ("modality", "channel", "message"),
    [
        ("mr", Channel(name="MR", kind="mr"), r"has no modality 'mr' \(it has: ct, sentinel2-l2a\).*--modality"),
        (
            "ct",
            Channel(name="CT2", kind="ct", unit="HU"),
            r"channels \['CT2'\] of modality 'ct' are not in .* \['CT'\]",
        ),
        ("ct", Channel(name="CT", kind="ct", unit="a.u."), r"'CT' of modality 'ct' is in a.u., the model expects HU"),
    ],
)
def test_what_the_model_does_not_know_is_refused(contract, modality, channel, message):
    with pytest.raises(ConfigError, match=message):
        contract.entries(modality, [channel])


def test_units_may_differ_where_each_image_is_scaled_by_its_own_numbers():
    # Series whose headers lack dose or weight stay in Bq/ml, beside others in g/ml: one archive has both.
    channel = PET.channels[0]
    known = Contract(channels=contract_entries(PET, [replace(channel, unit="g/ml")], []))
    assert [entry.method for entry in known.entries("pet", [replace(channel, unit="Bq/ml")])] == ["image"]


def test_a_missing_band_is_refused_with_the_explicit_way_to_do_without(contract):
    with pytest.raises(ConfigError, match=r"lacks channels \['B12'\].*channels=\['B01', 'B02'"):
        contract.require_complete("sentinel2-l2a", S2.channels[:-1])
    contract.require_complete("sentinel2-l2a", S2.channels)


def test_extending_keeps_what_is_there(contract):
    more = contract_entries(LANDSAT, LANDSAT.channels, [statistics(5, 6)])
    assert contract.extended(more).channels == contract.channels + more
    assert contract.extended(contract.channels[:2]) == contract


def test_normalise_clips_scales_and_zeroes():
    raw = torch.tensor([[[[-5000.0, 0.0, 400.0, 9000.0, float("nan")]], [[1.0, 2.0, 3.0, 4.0, 1e30]]]])
    valid = torch.ones_like(raw, dtype=torch.bool)
    valid[..., 4] = False
    center, scale = torch.tensor([[0.0, 1.0]]), torch.tensor([[400.0, 2.0]])
    out = normalise(raw, valid, center, scale, [(-1024.0, 3071.0), None])
    assert torch.equal(out[0, 0, 0], torch.tensor([-1024 / 400, 0.0, 1.0, 3071 / 400, 0.0]))
    assert torch.equal(out[0, 1, 0], torch.tensor([0.0, 0.5, 1.0, 1.5, 0.0]))


def test_normalise_takes_statistics_per_sample_and_integers():
    raw = torch.tensor([10, 10], dtype=torch.int16).reshape(2, 1, 1, 1)
    valid = torch.ones(2, 1, 1, 1, dtype=torch.bool)
    out = normalise(raw, valid, torch.tensor([[0.0], [10.0]]), torch.tensor([[5.0], [1.0]]))
    assert out.dtype == torch.float32 and out.flatten().tolist() == [2.0, 0.0]
