"""Patch embedding: any channels in any order, at a scale that does not depend on their number; folds exactly."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from geomed_mae.image import Channel
from geomed_mae.modalities import load_modality
from geomed_mae.models.patch_embed import ChannelHeads, ChannelPatchEmbed
from geomed_mae.models.patches import patchify
from geomed_mae.models.spec import ModelSpec


@pytest.mark.parametrize("space", [(16, 16), (4, 8, 8)])
def test_the_order_of_channels_does_not_matter(spec, bands, space):
    embed = ChannelPatchEmbed(spec)
    patch = spec.patch(len(space))
    pixels = patchify(torch.randn(2, 3, *space), patch)
    order = [2, 0, 1]
    one = embed(pixels, bands, patch)
    other = embed(pixels[:, :, order], [bands[index] for index in order], patch)
    assert (one - other).abs().max() < 1e-5


def test_variance_at_the_start_does_not_depend_on_the_number_of_channels():
    spec = ModelSpec(dim=64, depth=1, heads=1, patch_2d=(8, 8))
    channels = load_modality("sentinel2-l2a").channels
    embed = ChannelPatchEmbed(spec)
    for count in (1, 3, 12):
        tokens = embed(torch.randn(400, 1, count, 64), channels[:count], (8, 8))
        assert 0.8 < tokens.var() < 1.25, count


def test_variance_for_identical_channels_grows_less_than_with_their_number():
    # Correlated channels add up coherently as far as their codes agree; for Sentinel-2's twelve bands with the very
    # same pixels the standard deviation rises, but far less than the sqrt(12) of codes that do not differ.
    spec = ModelSpec(dim=64, depth=1, heads=1, patch_2d=(8, 8))
    channels = load_modality("sentinel2-l2a").channels
    pixels = torch.randn(400, 1, 1, 64).expand(-1, -1, 12, -1)
    assert ChannelPatchEmbed(spec)(pixels, channels, (8, 8)).std() < 2.8


def test_a_token_depends_on_its_own_patch_alone(spec, bands):
    embed = ChannelPatchEmbed(spec)
    pixels = torch.randn(1, 3, 16, 16)
    before = embed(patchify(pixels, (8, 4)), bands, (8, 4))
    pixels[0, 1, 9, 5] += 1  # patch row 1, column 1 of a grid 2 x 4
    changed = (embed(patchify(pixels, (8, 4)), bands, (8, 4)) != before).any(-1)[0]
    assert changed.nonzero().flatten().tolist() == [5]


def test_a_hidden_channel_is_as_if_it_were_not_there(spec, bands):
    embed = ChannelPatchEmbed(spec)
    pixels = torch.randn(2, 5, 3, 32)
    shown = torch.tensor([[True, False, True]] * 2)
    without = embed(pixels[:, :, [0, 2]], [bands[0], bands[2]], (8, 4))
    assert torch.allclose(embed(pixels, bands, (8, 4), shown), without, atol=1e-5)


@pytest.mark.parametrize(("space", "convolve"), [((16, 16), F.conv2d), ((4, 8, 8), F.conv3d)])
def test_fold_is_an_ordinary_convolution(spec, bands, space, convolve):
    embed = ChannelPatchEmbed(spec)
    patch = spec.patch(len(space))
    torch.nn.init.normal_(embed.bias[f"{len(space)}d"])
    pixels = torch.randn(2, 3, *space)
    weight, bias = embed.fold(bands, patch)
    assert weight.shape == (spec.dim, 3, *patch)
    tokens = convolve(pixels, weight, bias, stride=patch).flatten(2).transpose(1, 2)
    assert torch.allclose(tokens, embed(patchify(pixels, patch), bands, patch), atol=1e-5)


def test_a_fixed_kernel_is_taken_over_exactly_and_other_channels_still_work(spec, bands):
    embed = ChannelPatchEmbed(spec)
    weight, bias = torch.randn(spec.dim, 3, 8, 4), torch.randn(spec.dim)
    embed.load_kernel(bands, weight, bias)
    folded, folded_bias = embed.fold(bands, (8, 4))
    assert torch.allclose(folded, weight, atol=1e-5)
    assert torch.equal(folded_bias, bias)
    assert torch.isfinite(embed.fold([Channel(name="VV", kind="sar", polarisation="VV")], (8, 4))[0]).all()


def test_predictions_follow_the_order_of_channels(spec, bands):
    heads = ChannelHeads(spec)
    tokens = torch.randn(2, 5, spec.decoder_dim)
    answer = heads(tokens, bands, (8, 4))
    assert answer.shape == (2, 5, 3, 8 * 4 + 2)
    assert torch.allclose(answer[:, :, [1, 0]], heads(tokens, (bands[1], bands[0]), (8, 4)), atol=1e-6)
