"""Folding: for any channels, size and kind of positions, a plain timm ViT with the same features."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import geomed_mae.exporters.timm as exporter
from geomed_mae.errors import ConfigError
from geomed_mae.exporters.proof import TOLERANCE
from geomed_mae.exporters.request import ask
from geomed_mae.image import Channel
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking, plan_masks
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder

SPEC = ModelSpec(
    dim=48, depth=2, heads=3, patch_2d=(8, 4), patch_3d=(2, 4, 8), basis=8,
    decoder_dim=32, decoder_depth=1, decoder_heads=1,
)  # fmt: skip
S2, CT, XRAY = (load_modality(name) for name in ("sentinel2-l2a", "ct", "xray"))

OPTICAL = st.integers(400, 2500).map(
    lambda nm: Channel(name=f"w{nm}nm", kind="optical", wavelength_nm=float(nm), bandwidth_nm=10.0)
)
RADAR = st.tuples(st.sampled_from(["VV", "VH", "HV", "HH"]), st.sampled_from([1.27, 5.405, 9.65])).map(
    lambda pair: Channel(name=f"{pair[0]} at {pair[1]} GHz", kind="sar", polarisation=pair[0], radar_ghz=pair[1])
)
MAGNETIC = st.tuples(st.sampled_from(["T1", "T2", "FLAIR", "DWI"]), st.integers(10, 120)).map(
    lambda pair: Channel(name=f"{pair[0]} TE {pair[1]} ms", kind="mr", sequence=pair[0], echo_time_ms=float(pair[1]))
)
OTHERS = st.sampled_from(["elevation", "ct", "pet", "xray", "ultrasound"]).map(
    lambda kind: Channel(name=kind, kind=kind)
)
UNNAMED = st.integers(1, 999).map(lambda number: Channel(name=f"band{number}"))


def distinct(one: st.SearchStrategy[Channel], most: int) -> st.SearchStrategy[list[Channel]]:
    return st.lists(one, min_size=1, max_size=most, unique_by=lambda channel: channel.name)


CHANNELS = distinct(OPTICAL, 64) | distinct(OPTICAL | RADAR | MAGNETIC | OTHERS | UNNAMED, 16)
SPACES = st.tuples(st.integers(1, 4), st.integers(1, 6)) | st.tuples(*(st.integers(1, 3) for _ in range(3)))


def relative_difference(
    encoder: Encoder, channels: Sequence[Channel], size: Sequence[int], spacing: Sequence[float] | None = None
) -> float:
    """Return the largest difference of features between an encoder and its fold, relative to the largest feature."""
    model_args, tensors = exporter.fold(encoder, channels, size, spacing)
    twin = timm.create_model("vit_tiny_patch16_224", num_classes=0, **model_args).eval()
    twin.load_state_dict(tensors)
    pixels = torch.randn(2, len(channels), *size)
    given = None if spacing is None else torch.tensor([spacing] * 2)
    with torch.inference_mode():
        ours = encoder(pixels, torch.ones_like(pixels, dtype=torch.bool), channels, given).tokens
        theirs = twin.forward_features(exporter.as_timm_input(pixels, encoder.spec.patch(len(size))))
    return float((ours - theirs).abs().max() / ours.abs().max())


def sizes(spec: ModelSpec, grid: Sequence[int]) -> list[int]:
    return [count * step for count, step in zip(grid, spec.patch(len(grid)), strict=True)]


@given(channels=CHANNELS, grid=SPACES, learned=st.booleans(), seed=st.integers(0, 99))
@settings(max_examples=80, deadline=None)
def test_any_channels_and_any_size_fold_into_a_plain_vit(channels, grid, learned, seed):
    torch.manual_seed(seed)
    spec = replace(SPEC, learned_positions=(3, 5)) if learned and len(grid) == 2 else SPEC
    encoder = Encoder(spec)
    for bias in encoder.patch_embed.bias.values():
        torch.nn.init.normal_(bias)
    assert relative_difference(encoder, channels, sizes(spec, grid)) < TOLERANCE


@pytest.mark.parametrize("learned", [None, (2, 4)])
@pytest.mark.parametrize("mode", ["exact", "fast"])
def test_a_trained_encoder_folds_as_well_as_a_new_one(mode, learned):
    torch.manual_seed(0)
    mae = MaskedAutoencoder.from_spec(replace(SPEC, mode=mode, learned_positions=learned))
    channels = [*S2.channels, Channel(name="VV", kind="sar", polarisation="VV"), Channel(name="band3")]
    before = {name: value.clone() for name, value in mae.encoder.state_dict().items()}
    optimizer = torch.optim.AdamW(mae.parameters(), lr=1e-2)
    for step in range(5):
        pixels = torch.randn(2, len(channels), 16, 16)
        plan = plan_masks(torch.ones(2, 8, dtype=torch.bool), Masking(ratio=0.5), (0, step))
        valid, floor = torch.ones_like(pixels, dtype=torch.bool), torch.full((len(channels),), 0.05)
        optimizer.zero_grad()
        mae(pixels, valid, channels, None, plan, floor=floor).loss.backward()
        optimizer.step()
    moved = [name for name, value in mae.encoder.state_dict().items() if not torch.equal(value, before[name])]
    assert {"cls_token", "patch_embed.filters.2d", "patch_embed.codes.code.weight", "norm.weight"} <= set(moved)
    assert learned is None or "pos_embed" in moved
    assert relative_difference(mae.encoder.eval(), channels, (32, 24)) < TOLERANCE


@pytest.mark.parametrize(
    ("channels", "size", "spacing", "other"),
    [
        (S2.channels[:3], (32, 24), (20.0, 15.0), (10.0, 10.0)),
        (CT.channels, (4, 8, 16), (5.0, 0.7, 0.7), (2.0, 1.0, 1.0)),
        (XRAY.channels, (24, 8), (0.2, 0.2), (1.0, 1.0)),
    ],
)
def test_a_fold_is_for_images_of_one_spacing_the_reference_unless_another_is_stated(channels, size, spacing, other):
    torch.manual_seed(0)
    encoder = Encoder(replace(SPEC, reference_gsd_m=10.0, reference_spacing_mm=(2.0, 1.0, 1.0)))
    assert relative_difference(encoder, channels, size, spacing) < TOLERANCE
    tables = [exporter.fold(encoder, channels, size, *given)[1]["pos_embed"] for given in ((), (other,), (spacing,))]
    assert torch.equal(tables[0], tables[1]) and not torch.allclose(tables[0], tables[2], atol=0.1)


def encoder_of(spec: ModelSpec) -> PretrainedEncoder:
    entries = [entry for modality in (S2, CT) for entry in contract_entries(modality, modality.channels, [])]
    torch.manual_seed(0)
    return PretrainedEncoder(Encoder(spec), Contract(channels=tuple(entries), crop_2d=(16, 16), crop_3d=(4, 8, 8)))


@pytest.mark.parametrize(
    ("modality", "spacing", "said", "wanted"),
    [
        ("sentinel2-l2a", None, "pixels 10 x 10 m apart", [10.0, 10.0]),
        ("sentinel2-l2a", (20.0, 20.0), "pixels 20 x 20 m apart", [20.0, 20.0]),
        ("ct", (5.0, 0.7, 0.7), "pixels 5 x 0.7 x 0.7 mm apart", [5.0, 0.7, 0.7]),
    ],
)
def test_an_export_says_which_spacing_it_is_for(tmp_path, modality, spacing, said, wanted):
    encoder = encoder_of(replace(SPEC, reference_gsd_m=10.0, reference_spacing_mm=(2.0, 1.0, 1.0)))
    result = exporter.export(ask(encoder, modality=modality, spacing=spacing), tmp_path / "out")
    assert result["largest_relative_difference"] < TOLERANCE
    assert json.loads((tmp_path / "out" / "contract.json").read_text())["input"]["spacing"] == wanted
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_a_spacing_that_does_not_fit_or_means_nothing_is_refused():
    physical = encoder_of(replace(SPEC, reference_gsd_m=10.0))
    for spacing in ((10.0,), (10.0, -1.0), (10.0, float("nan"))):
        with pytest.raises(ConfigError, match=r"spacing .* does not fit the size \[16, 16\]; give one positive number"):
            ask(physical, modality="sentinel2-l2a", spacing=spacing)
    for spec in (SPEC, replace(SPEC, reference_gsd_m=10.0, learned_positions=(2, 4))):
        with pytest.raises(ConfigError, match=r"whose positions count patches; export without it"):
            ask(encoder_of(spec), modality="sentinel2-l2a", spacing=(20.0, 20.0))
