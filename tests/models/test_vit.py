"""The encoder: 2D and 3D with one network, validity everywhere, padding nowhere."""

from __future__ import annotations

import pytest
import torch

from geomed_mae.errors import ConfigError
from geomed_mae.models.masking import Masking, MaskPlan, plan_masks, valid_tokens
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder


def everything(pixels: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(pixels, dtype=torch.bool)


def test_one_encoder_serves_images_and_volumes(spec, bands, ct):
    encoder = Encoder(spec)
    image, volume = torch.randn(2, 3, 16, 16), torch.randn(1, 1, 4, 8, 8)
    assert encoder(image, everything(image), bands).tokens.shape == (2, 1 + 2 * 4, spec.dim)
    out = encoder(volume, everything(volume), ct, torch.tensor([[5.0, 1.0, 1.0]]))
    assert out.tokens.shape == (1, 1 + 2 * 2 * 2, spec.dim) and out.grid == (2, 2, 2)


def test_permuting_named_channels_changes_no_feature(spec, bands):
    encoder = Encoder(spec).eval()
    pixels = torch.randn(2, 3, 16, 16)
    valid = torch.rand(2, 3, 16, 16) < 0.9
    order = [1, 2, 0]
    one = encoder(pixels, valid, bands).tokens
    other = encoder(pixels[:, order], valid[:, order], [bands[index] for index in order]).tokens
    assert (one - other).abs().max() < 1e-5


@pytest.mark.parametrize("junk", [1e30, float("nan"), float("-inf")])
@pytest.mark.parametrize("with_plan", [False, True])
def test_what_stands_at_invalid_places_changes_no_feature_bit(spec, bands, junk, with_plan):
    encoder = Encoder(spec)
    pixels = torch.randn(2, 3, 16, 16)
    valid = torch.rand(2, 3, 16, 16) < 0.7
    valid[1, :, :, :8] = False  # whole patches
    plan = plan_masks(valid_tokens(valid, (8, 4)), Masking(ratio=0.5), (0, 0)) if with_plan else None
    clean = encoder(pixels, valid, bands, plan=plan)
    dirty = encoder(torch.where(valid, pixels, junk), valid, bands, plan=plan)
    assert torch.equal(clean.tokens, dirty.tokens) and torch.isfinite(clean.tokens).all()
    if with_plan:
        assert clean.token_valid is None, "the plan knows"
    else:
        assert torch.equal(clean.token_valid, dirty.token_valid) and not clean.token_valid.all()


def test_invalid_patches_influence_no_other_token(spec, bands):
    encoder = Encoder(spec)
    pixels, wide = torch.randn(1, 3, 16, 16), torch.zeros(1, 3, 24, 16)
    wide[:, :, :16] = pixels
    valid = torch.zeros_like(wide, dtype=torch.bool)
    valid[:, :, :16] = True
    alone = encoder(pixels, everything(pixels), bands).tokens
    assert torch.allclose(encoder(wide, valid, bands).tokens[:, :9], alone, atol=1e-5)


def test_padding_entries_of_a_plan_influence_nothing(spec, bands):
    encoder = Encoder(spec)
    pixels = torch.randn(1, 3, 16, 16)
    plain = MaskPlan(torch.tensor([[1, 6]]), torch.tensor([[0]]))
    pad = torch.tensor([[False, False, True, True]])
    padded = [MaskPlan(torch.tensor([[1, 6, *extra]]), torch.tensor([[0]]), pad) for extra in ((0, 0), (3, 7))]
    tokens = [encoder(pixels, everything(pixels), bands, plan=plan).tokens for plan in (plain, *padded)]
    assert torch.equal(tokens[1][:, :3], tokens[2][:, :3])
    assert torch.allclose(tokens[0], tokens[1][:, :3], atol=1e-5)


def test_without_padding_no_attention_mask_is_built(spec, bands, monkeypatch):
    encoder = Encoder(spec)
    seen = []
    for block in encoder.blocks:
        monkeypatch.setattr(block, "forward", lambda x, attn_mask=None: seen.append(attn_mask) or x)
    pixels = torch.randn(1, 3, 16, 16)
    encoder(pixels, everything(pixels), bands)
    encoder(
        pixels,
        everything(pixels),
        bands,
        plan=plan_masks(torch.ones(1, 8, dtype=torch.bool), Masking(ratio=0.5), (0, 0)),
    )
    assert seen == [None] * 4


def test_maps_of_blocks_are_grids_and_the_last_is_the_output(spec, ct):
    encoder = Encoder(spec)
    volume = torch.randn(2, 1, 4, 8, 12)
    out = encoder(volume, everything(volume), ct, layers=[0, -1])
    assert [tuple(item.shape) for item in out.maps] == [(2, spec.dim, 2, 2, 3)] * 2
    assert torch.equal(out.maps[1].flatten(2).transpose(1, 2), out.tokens[:, 1:])


def test_spacing_matters_only_against_a_reference(bands):
    pixels = torch.randn(1, 3, 16, 16)
    spacings = torch.tensor([[10.0, 10.0]]), torch.tensor([[30.0, 30.0]])
    for reference, same in ((None, True), (10.0, False)):
        encoder = Encoder(ModelSpec(dim=48, depth=1, heads=3, patch_2d=(8, 8), reference_gsd_m=reference))
        one, other = (encoder(pixels, everything(pixels), bands, spacing).tokens for spacing in spacings)
        assert torch.equal(one, other) == same


def test_volumes_are_refused_by_a_model_made_for_images(ct):
    encoder = Encoder(ModelSpec(dim=48, depth=1, heads=3, patch_2d=(8, 8)))
    volume = torch.zeros(1, 1, 4, 8, 8)
    with pytest.raises(ConfigError, match=r"no patch for images with 3 spatial axes: it was made for 2D images"):
        encoder(volume, everything(volume), ct)


def test_autocast_works_with_padding(spec, bands):
    pixels = torch.randn(1, 3, 16, 16)
    valid = everything(pixels)
    valid[..., :4] = False
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.isfinite(Encoder(spec)(pixels, valid, bands).tokens).all()
