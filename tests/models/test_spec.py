"""ModelSpec: survives JSON, follows recipes, refuses what cannot be built."""

from __future__ import annotations

import json

import pytest

from geomed_mae.config import ModelConfig
from geomed_mae.errors import ConfigError
from geomed_mae.models.spec import ModelSpec


def test_json_both_ways(spec):
    assert ModelSpec.from_json(spec.to_json()) == spec


def test_a_recipe_becomes_timms_sizes():
    spec = ModelSpec.from_config(ModelConfig(size="small", patch_2d=(16, 16), depth=6, decoder_dim=256))
    assert (spec.dim, spec.depth, spec.heads, spec.decoder_heads) == (384, 6, 6, 8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"basis": 0}, "basis 0 is not positive"),
        ({"decoder_depth": 0}, "decoder_depth 0 is not positive"),
        ({"patch_2d": (0, 16)}, r"patch_2d \(0, 16\) is not positive"),
        ({"reference_gsd_m": float("nan")}, "reference_gsd_m nan is not positive"),
        ({"reference_spacing_mm": (0.0, 1.0, 1.0)}, "reference_spacing_mm .* is not positive"),
        ({"stats_weight": float("inf")}, "stats_weight inf is not a number of 0 or more"),
        ({"mode": "quick"}, "mode 'quick' is none of exact, fast"),
        ({"patch_2d": None}, "a model needs a patch: set patch_2d, patch_3d or both"),
        ({"target": "pixels"}, "target 'pixels' is none of patch_channel, patch, none"),
        ({"dim": 50}, "the encoder's width 50 must be a multiple of its 2 heads and of 4"),
    ],
)
def test_what_cannot_be_built_is_refused(change, message):
    with pytest.raises(ConfigError, match=message):
        ModelSpec(**{"dim": 48, "depth": 1, "heads": 2, "patch_2d": (8, 8), **change})


def test_a_spec_of_a_newer_version_is_refused(spec):
    with pytest.raises(ConfigError, match=r"no field \['rope'\]; was it written by a newer geomed-mae"):
        ModelSpec.from_json(spec.to_json().replace('"dim"', '"rope": 1, "dim"'))


def test_references_are_metres_for_rasters_and_mm_for_planes(bands, ct):
    spec = ModelSpec(
        dim=48, depth=1, heads=3, patch_2d=(8, 8), reference_gsd_m=10.0, reference_spacing_mm=(4.0, 1.0, 1.5)
    )
    assert spec.reference(bands, 2) == (10.0, 10.0)
    assert spec.reference(ct, 2) == (1.0, 1.5)
    assert spec.reference(ct, 3) == (4.0, 1.0, 1.5)


@pytest.mark.parametrize("codes", [None, 1, 3])
def test_weights_of_another_version_of_channel_codes_are_refused(spec, codes):
    """Same shapes, other filters: nothing else would notice."""
    data = json.loads(spec.to_json())
    data["codes"] = codes
    if codes is None:
        del data["codes"]
    with pytest.raises(ConfigError, match=f"version {codes or 1} of the channel codes, this geomed-mae has 2"):
        ModelSpec.from_json(json.dumps(data))
