"""Targets: per patch and channel, over valid pixels, bounded by the floor; `patch` is the published one."""

from __future__ import annotations

import pytest
import torch

from geomed_mae.models.spec import TARGETS
from geomed_mae.models.targets import mean_of_samples, normalisation, patch_targets

FLOOR = torch.tensor([[0.05, 0.1]])


def test_statistics_are_those_of_valid_pixels_alone():
    patches = torch.randn(1, 1, 2, 6) * 3 + 5
    valid = torch.ones(1, 1, 2, 6, dtype=torch.bool)
    valid[..., 4:] = False
    target = patch_targets(torch.where(valid, patches, 0), valid, FLOOR, "patch_channel")
    inside = patches[0, 0, :, :4]
    sigma = (inside.var(-1, unbiased=False) + FLOOR[0] ** 2).sqrt()
    assert torch.allclose(target.mean[0, 0], inside.mean(-1), atol=1e-5)
    assert torch.allclose(target.log_sigma[0, 0].exp(), sigma, atol=1e-5)
    assert torch.allclose(target.pixels[0, 0, :, :4], (inside - inside.mean(-1, True)) / sigma[:, None], atol=1e-4)


def test_a_flat_patch_with_noise_below_the_floor_is_not_blown_up():
    noise = 0.005 * torch.randn(1, 50, 2, 64)
    target = patch_targets(4 + noise, torch.ones_like(noise, dtype=torch.bool), FLOOR, "patch_channel")
    assert target.pixels.abs().max() <= noise.abs().max() * 1.5 / 0.05
    assert target.pixels.std() < 0.12
    flat = patch_targets(
        torch.full((1, 1, 2, 9), 7.0), torch.ones(1, 1, 2, 9, dtype=torch.bool), FLOOR, "patch_channel"
    )
    assert torch.equal(flat.pixels, torch.zeros(1, 1, 2, 9))


def test_the_joint_target_is_the_published_one():
    patches = torch.randn(2, 3, 2, 8)
    target = patch_targets(patches, torch.ones_like(patches, dtype=torch.bool), FLOOR, "patch")
    flat = patches.flatten(2)
    wanted = (flat - flat.mean(-1, True)) / (flat.var(-1, keepdim=True) + 1e-6) ** 0.5
    assert torch.allclose(target.pixels.flatten(2), wanted, atol=1e-5)


def test_the_offset_between_bands_is_in_the_joint_target_but_not_in_ours():
    patches = torch.randn(1, 4, 2, 64) * 0.1 + torch.tensor([0.0, 3.0])[:, None]
    valid = torch.ones_like(patches, dtype=torch.bool)
    joint = patch_targets(patches, valid, FLOOR, "patch").pixels.mean(-1)
    ours = patch_targets(patches, valid, FLOOR, "patch_channel").pixels.mean(-1)
    assert joint.abs().min() > 0.9 and ours.abs().max() < 1e-4


@pytest.mark.parametrize("kind", TARGETS)
def test_the_normalisation_is_undone_exactly_with_missing_pixels_channels_and_a_floor(kind):
    patches, valid = torch.randn(2, 3, 4, 16) + 2, torch.rand(2, 3, 4, 16) < 0.7
    valid[0, 0, 1] = False
    patches = torch.where(valid, patches, 0.0)
    target = patch_targets(patches, valid, torch.full((1, 4), 0.3), kind)
    restored = target.pixels * target.scale + target.center
    assert torch.allclose(restored[valid], patches[valid], atol=1e-5)


@pytest.mark.parametrize("kind", TARGETS)
def test_statistics_tell_the_normalisation_of_whole_patches(kind):
    patches, floor = torch.randn(2, 3, 4, 16) * 2 + 2, torch.full((1, 4), 0.3)
    target = patch_targets(patches, torch.ones_like(patches, dtype=torch.bool), floor, kind)
    center, scale = normalisation(target.mean, target.log_sigma, floor, kind)
    assert torch.allclose(center, target.center, atol=1e-5)
    assert torch.allclose(scale, target.scale, rtol=0.01), "but for the unbiased variance of the published target"


def test_a_mean_over_nothing_is_zero_not_nan():
    assert mean_of_samples(torch.full((2, 3), float("nan")), torch.zeros(2, 3, dtype=torch.bool)) == 0


def test_a_mean_over_samples_is_the_mean_of_the_means_of_its_parts():
    values, counted = torch.randn(6, 5, 2), torch.rand(6, 5, 2) < 0.4
    counted[:, 0, 0] = True
    whole = mean_of_samples(values, counted)
    parts = [mean_of_samples(values[some], counted[some]) for some in (slice(0, 3), slice(3, 6))]
    assert torch.allclose(whole, sum(parts) / 2)
    assert torch.allclose(whole, torch.stack([values[n][counted[n]].mean() for n in range(6)]).mean())
    nothing = torch.cat([counted, torch.zeros(2, 5, 2, dtype=torch.bool)])
    assert torch.allclose(mean_of_samples(torch.cat([values, values[:2]]), nothing), whole)
