"""Channel codes: physics that differ give codes that differ; physics that are missing are asked for."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel
from geomed_mae.modalities import load_modality, modality_names
from geomed_mae.models.channels import ChannelCodes, describe, ordinals, wavelength_code
from geomed_mae.models.spec import CODES


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one, other, dim=-1).item()


def test_wavelengths_of_neighbouring_bands_are_separable():
    s2 = load_modality("sentinel2-l2a").channels
    codes = {band.name: torch.tensor(wavelength_code(band.wavelength_nm)) for band in s2}
    assert cosine(codes["B04"], codes["B05"]) < 0.7  # 0.99995 with the same formula in micrometres
    assert cosine(codes["B08"], codes["B8A"]) < 0.8  # 0.99998
    assert max(cosine(codes[a], codes[b]) for a, b in itertools.combinations(codes, 2)) < 0.9


def test_nearby_wavelengths_are_more_alike_than_distant_ones():
    red, landsat_red, swir = (torch.tensor(wavelength_code(nm)) for nm in (664.6, 655.0, 2202.4))
    assert cosine(red, landsat_red) > cosine(red, swir) + 0.2


def are_neighbours(one: Channel, other: Channel) -> bool:
    """Whether two bands lie less than 3 % apart in wavelength; no two of a multispectral sensor are."""
    if one.wavelength_nm is None or other.wavelength_nm is None:
        return False
    return abs(math.log(one.wavelength_nm / other.wavelength_nm)) < 0.03


@pytest.mark.parametrize("modality", modality_names())
def test_every_packaged_modality_has_distinct_unit_length_codes(modality):
    channels = load_modality(modality).channels or (Channel(name="band1"), Channel(name="band2"))
    rows = ChannelCodes(32)(channels)
    assert torch.allclose(rows.norm(dim=-1), torch.ones(len(channels)))
    for (one, row), (other, next_row) in itertools.combinations(zip(channels, rows, strict=True), 2):
        # A hyperspectral imager's neighbours see nearly the same: alike, never the same.
        assert cosine(row, next_row) < (0.9999 if are_neighbours(one, other) else 0.95)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"kind": "sar", "polarisation": "VV"}, {"kind": "sar", "polarisation": "VH"}),
        ({"kind": "sar", "polarisation": "VV", "radar_ghz": 5}, {"kind": "sar", "polarisation": "VV", "radar_ghz": 1}),
        ({"kind": "mr", "sequence": "T1"}, {"kind": "mr", "sequence": "FLAIR"}),
        ({"kind": "mr", "echo_time_ms": 10.0}, {"kind": "mr", "echo_time_ms": 90.0}),
        ({"kind": "mr", "repetition_time_ms": 500.0}, {"kind": "mr", "repetition_time_ms": 6000.0}),
        ({"kind": "mr", "inversion_time_ms": 2500.0}, {"kind": "mr"}),
        ({"kind": "ct", "tube_kv": 80.0}, {"kind": "ct", "tube_kv": 140.0}),
        ({"kind": "ct"}, {"kind": "pet"}),
        ({"kind": "optical", "wavelength_nm": 660.0, "bandwidth_nm": 10.0},
         {"kind": "optical", "wavelength_nm": 660.0, "bandwidth_nm": 100.0}),
    ],
)  # fmt: skip
def test_each_descriptor_reaches_the_code(one, other):
    codes = ChannelCodes(16)
    first, second = codes([Channel(name="a", **one)]), codes([Channel(name="a", **other)])
    assert not torch.allclose(first, second, atol=1e-3)


def test_a_channel_that_lacks_the_physics_of_its_kind_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"channel 'red' is optical but has no wavelength; give its wavelength_nm"):
        ChannelCodes(8)([Channel(name="red", kind="optical")])
    with pytest.raises(ConfigError, match=r"'s0' is sar but its polarisation is None; give one of VV, VH, HV, HH"):
        ChannelCodes(8)([Channel(name="s0", kind="sar")])


def test_unnamed_channels_have_codes_by_their_number_which_a_selection_keeps():
    bands = [Channel(name=f"band{number}") for number in (1, 2, 3)]
    codes = ChannelCodes(8)
    assert torch.allclose(codes(bands)[2], codes([bands[2]])[0], atol=1e-6)
    assert not torch.allclose(codes(bands)[1], codes(bands)[2], atol=0.1)
    assert ordinals([Channel(name="a"), Channel(name="b")]) == [0, 1]


def test_channels_that_cannot_be_told_apart_are_refused():
    twins = [Channel(name="band1"), Channel(name="other1")]
    with pytest.raises(ConfigError, match=r"cannot be told apart .* give them physics"):
        ChannelCodes(8)(twins)


def test_pinned_channels_are_one_hot_and_others_keep_unit_length(bands):
    codes = ChannelCodes(8)
    codes.pin(bands)
    assert torch.allclose(codes(bands), torch.eye(8)[:3], atol=1e-6)
    other = codes([Channel(name="x", kind="ct")])
    assert torch.allclose(other.norm(dim=-1), torch.ones(1))
    with pytest.raises(ConfigError, match=r"9 channels do not fit in 8 basis filters: raise basis"):
        codes.pin([Channel(name=f"b{n}") for n in range(9)])


def test_the_features_of_a_channel_are_those_of_version_two():
    """What weights were trained on: a change of these numbers needs another CODES in models/spec.py."""
    assert CODES == 2
    red = describe(Channel(name="red", kind="optical", wavelength_nm=665.0, bandwidth_nm=31.0))
    assert len(red) == 140
    expected = [0.8705, -0.5168, 1.0, 1.0, -0.4780]
    assert [red[place] for place in (0, 1, 63, 129, 128)] == pytest.approx(expected, abs=1e-3)


def test_channels_that_were_first_seen_in_inference_mode_can_be_trained_on():
    channels = [Channel(name="seen first while embedding", kind="optical", wavelength_nm=555.5)]
    codes = ChannelCodes(4)
    with torch.inference_mode():
        codes(channels)
    codes(channels).sum().backward()
    assert codes.kind.weight.grad is not None
