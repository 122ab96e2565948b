"""The decoders: exact and fast answer for the same patches, from the visible tokens alone."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking, MaskPlan, plan_masks


@pytest.fixture
def fast(spec):
    return MaskedAutoencoder.from_spec(replace(spec, mode="fast"))


def batch(space: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    pixels = torch.randn(2, 3, *space)
    return pixels, torch.ones_like(pixels, dtype=torch.bool)


@pytest.mark.parametrize("space", [(32, 16), (4, 8, 8)])
def test_fast_answers_for_each_patch_independently_of_what_else_is_asked(fast, bands, space):
    pixels, valid = batch(space)
    plan = plan_masks(torch.ones(2, 16 if len(space) == 2 else 8, dtype=torch.bool), Masking(), (0, 0))
    one = MaskPlan(plan.visible, plan.asked[:, :1])
    floor = torch.full((3,), 0.05)
    whole = fast(pixels, valid, bands, None, plan, floor=floor).prediction.pixels[:, :1]
    alone = fast(pixels, valid, bands, None, one, floor=floor).prediction.pixels
    assert torch.allclose(whole, alone, atol=1e-6)


def test_exact_lets_hidden_patches_see_one_another_as_published(mae, bands):
    pixels, valid = batch((32, 16))
    plan = plan_masks(torch.ones(2, 16, dtype=torch.bool), Masking(), (0, 0))
    one = MaskPlan(plan.visible, plan.asked[:, :1])
    floor = torch.full((3,), 0.05)
    whole = mae(pixels, valid, bands, None, plan, floor=floor).prediction.pixels[:, :1]
    assert not torch.allclose(whole, mae(pixels, valid, bands, None, one, floor=floor).prediction.pixels, atol=1e-6)


def test_padding_of_visible_entries_changes_no_answer_of_fast(fast, bands):
    pixels, valid = batch((32, 16))
    plan = plan_masks(torch.ones(2, 16, dtype=torch.bool), Masking(), (0, 0))
    padded = MaskPlan(
        torch.cat([plan.visible, torch.zeros(2, 2, dtype=torch.long)], dim=1),
        plan.asked,
        visible_pad=torch.tensor([[False] * 4 + [True] * 2] * 2),
    )
    floor = torch.full((3,), 0.05)
    plain, other = (fast(pixels, valid, bands, None, which, floor=floor).loss for which in (plan, padded))
    assert torch.allclose(plain, other, atol=1e-6)


def test_fast_learns_a_batch_by_heart(fast, bands):
    pixels, valid = batch((32, 16))
    pixels = torch.nn.functional.avg_pool2d(pixels, 9, 1, 4) * 9
    optimizer = torch.optim.AdamW(fast.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        plan = plan_masks(torch.ones(2, 16, dtype=torch.bool), Masking(predict_ratio=0.5), (0, 0))
        loss = fast(pixels, valid, bands, None, plan, floor=torch.full((3,), 0.05)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.5 * losses[0]
    assert all(parameter.grad is not None for parameter in fast.decoder.blocks.parameters())
