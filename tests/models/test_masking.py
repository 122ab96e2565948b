"""Masks: pure functions of their key, static in shape, never of invalid area."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomed_mae.errors import ConfigError
from geomed_mae.models.masking import plan_masks, valid_tokens


def test_a_plan_depends_on_seed_step_and_sample_and_on_nothing_else():
    ok = torch.ones(3, 64, dtype=torch.bool)
    np.random.default_rng().random(10)
    plan = plan_masks(ok, 0.75, (1, 5))
    assert torch.equal(plan.visible, plan_masks(ok, 0.75, (1, 5)).visible)
    assert torch.equal(plan.visible[2:], plan_masks(ok[:1], 0.75, (1, 5), samples=[2]).visible)
    rows = [tuple(row) for key in ((1, 5), (1, 6), (2, 5)) for row in plan_masks(ok, 0.75, key).visible.tolist()]
    assert len(set(rows)) == 9


@given(st.integers(2, 60), st.floats(0.1, 0.9), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_every_valid_patch_is_shown_or_asked_for_exactly_once_and_no_other(tokens, ratio, step):
    ok = torch.from_numpy(np.random.default_rng(step).random((3, tokens)) < 0.7)
    ok[0] = True
    plan = plan_masks(ok, ratio, (0, step))
    for row in range(3):
        shown, asked = plan.visible[row], plan.hidden[row]
        if plan.visible_pad is not None:
            shown = shown[~plan.visible_pad[row]]
        if plan.hidden_pad is not None:
            asked = asked[~plan.hidden_pad[row]]
        assert sorted([*shown.tolist(), *asked.tolist()]) == ok[row].nonzero().flatten().tolist()
    assert plan.visible.shape[1] == max(1, int(tokens * (1 - ratio)))
    assert plan.visible.shape[1] + plan.hidden.shape[1] == tokens


def test_without_invalid_area_nothing_is_padded():
    plan = plan_masks(torch.ones(2, 16, dtype=torch.bool), 0.75, (0, 0))
    assert plan.visible_pad is None and plan.hidden_pad is None and plan.shown_channels is None
    assert plan.visible.shape == (2, 4)


def test_channels_are_hidden_at_the_asked_rate_but_never_all():
    plan = plan_masks(torch.ones(500, 4, dtype=torch.bool), 0.5, (0, 0), channels=4, channel_drop=0.5)
    assert plan.shown_channels.any(1).all()
    assert 0.45 < plan.shown_channels.float().mean() < 0.6
    certain = plan_masks(torch.ones(50, 4, dtype=torch.bool), 0.5, (0, 0), channels=4, channel_drop=0.999)
    assert (certain.shown_channels.sum(1) >= 1).all()


def test_the_masked_share_is_uniform_over_the_grid():
    plan = plan_masks(torch.ones(4000, 16, dtype=torch.bool), 0.75, (3, 0))
    counts = torch.bincount(plan.visible.flatten(), minlength=16).float() / 4000
    assert (counts - 0.25).abs().max() < 0.03


def test_valid_tokens_need_half_of_their_area_in_any_channel():
    valid = torch.zeros(1, 2, 4, 8, dtype=torch.bool)
    valid[0, 0, :2, :4] = True  # half of the first patch, first channel only
    valid[0, 1, :1, 4:] = True  # a quarter of the second
    assert valid_tokens(valid, (4, 4)).tolist() == [[True, False]]


def test_a_crop_of_one_patch_is_refused():
    with pytest.raises(ConfigError, match="single patch"):
        plan_masks(torch.ones(1, 1, dtype=torch.bool), 0.75, (0, 0))


def test_a_plan_moves_as_a_whole():
    plan = plan_masks(torch.ones(2, 8, dtype=torch.bool), 0.5, (0, 0), channels=2, channel_drop=0.5)
    assert plan.to("meta").hidden.device.type == "meta" and plan.to("meta").shown_channels.device.type == "meta"
