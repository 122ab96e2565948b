"""Masks: pure functions of their key, static in shape, never of invalid area."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomed_mae.config import ModelConfig
from geomed_mae.errors import ConfigError
from geomed_mae.models.masking import Masking, plan_masks, valid_tokens


def test_a_plan_depends_on_seed_step_and_sample_and_on_nothing_else():
    ok = torch.ones(3, 64, dtype=torch.bool)
    np.random.default_rng().random(10)
    plan = plan_masks(ok, Masking(ratio=0.75), (1, 5))
    assert torch.equal(plan.visible, plan_masks(ok, Masking(ratio=0.75), (1, 5)).visible)
    assert torch.equal(plan.visible[2:], plan_masks(ok[:1], Masking(ratio=0.75), (1, 5), samples=[2]).visible)
    rows = [
        tuple(row)
        for key in ((1, 5), (1, 6), (2, 5))
        for row in plan_masks(ok, Masking(ratio=0.75), key).visible.tolist()
    ]
    assert len(set(rows)) == 9


@given(st.integers(2, 60), st.floats(0.1, 0.9), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_every_valid_patch_is_shown_or_asked_for_exactly_once_and_no_other(tokens, ratio, step):
    ok = torch.from_numpy(np.random.default_rng(step).random((3, tokens)) < 0.7)
    ok[0] = True
    plan = plan_masks(ok, Masking(ratio=ratio), (0, step))
    for row in range(3):
        shown, asked = plan.visible[row], plan.asked[row]
        if plan.visible_pad is not None:
            shown = shown[~plan.visible_pad[row]]
        if plan.asked_pad is not None:
            asked = asked[~plan.asked_pad[row]]
        assert sorted([*shown.tolist(), *asked.tolist()]) == ok[row].nonzero().flatten().tolist()
    assert plan.visible.shape[1] == max(1, int(tokens * (1 - ratio)))
    assert plan.visible.shape[1] + plan.asked.shape[1] == tokens


def test_without_invalid_area_nothing_is_padded():
    plan = plan_masks(torch.ones(2, 16, dtype=torch.bool), Masking(ratio=0.75), (0, 0))
    assert plan.visible_pad is None and plan.asked_pad is None and plan.shown_channels is None
    assert plan.visible.shape == (2, 4)


def test_channels_are_hidden_at_the_asked_rate_but_never_all():
    plan = plan_masks(torch.ones(500, 4, dtype=torch.bool), Masking(ratio=0.5, channel_drop=0.5), (0, 0), channels=4)
    assert plan.shown_channels.any(1).all()
    assert 0.45 < plan.shown_channels.float().mean() < 0.6
    certain = plan_masks(
        torch.ones(50, 4, dtype=torch.bool), Masking(ratio=0.5, channel_drop=0.999), (0, 0), channels=4
    )
    assert (certain.shown_channels.sum(1) >= 1).all()


def test_the_masked_share_is_uniform_over_the_grid():
    plan = plan_masks(torch.ones(4000, 16, dtype=torch.bool), Masking(ratio=0.75), (3, 0))
    counts = torch.bincount(plan.visible.flatten(), minlength=16).float() / 4000
    assert (counts - 0.25).abs().max() < 0.03


def test_valid_tokens_need_half_of_their_area_in_any_channel():
    valid = torch.zeros(1, 2, 4, 8, dtype=torch.bool)
    valid[0, 0, :2, :4] = True  # half of the first patch, first channel only
    valid[0, 1, :1, 4:] = True  # a quarter of the second
    assert valid_tokens(valid, (4, 4)).tolist() == [[True, False]]


def test_a_crop_of_one_patch_is_refused():
    with pytest.raises(ConfigError, match="single patch"):
        plan_masks(torch.ones(1, 1, dtype=torch.bool), Masking(ratio=0.75), (0, 0))


def test_a_plan_moves_as_a_whole():
    plan = plan_masks(torch.ones(2, 8, dtype=torch.bool), Masking(ratio=0.5, channel_drop=0.5), (0, 0), channels=2)
    assert plan.to("meta").asked.device.type == "meta" and plan.to("meta").shown_channels.device.type == "meta"


def test_a_range_of_ratios_is_drawn_per_step_from_few_values_and_reaches_both_ends():
    ok = torch.ones(2, 100, dtype=torch.bool)
    masking = Masking(ratio=(0.5, 0.9))
    counts = {plan_masks(ok, masking, (0, step)).visible.shape[1] for step in range(60)}
    assert counts == {50, 40, 30, 19, 9}  # int(n * (1 - ratio)) of 0.5, 0.6 ... 0.9, rounded down as published
    assert masking.ratio_at((0, 7)) == masking.ratio_at((0, 7))
    assert (
        plan_masks(ok, masking, (0, 7), samples=[5, 6]).visible.shape == plan_masks(ok, masking, (0, 7)).visible.shape
    )


@given(st.floats(0.1, 0.75), st.integers(1, 3), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_a_part_of_the_hidden_patches_is_asked_for_and_never_a_visible_or_invalid_one(share, block, step):
    ok = torch.from_numpy(np.random.default_rng(step).random((3, 64)) < 0.8)
    masking = Masking(ratio=0.75, predict_ratio=share, block=block)
    plan = plan_masks(ok, masking, (0, step), grid=(8, 8))
    assert plan.asked.shape[1] == max(1, int(64 * share))
    for row in range(3):
        asked = plan.asked[row] if plan.asked_pad is None else plan.asked[row][~plan.asked_pad[row]]
        seen = plan.visible[row] if plan.visible_pad is None else plan.visible[row][~plan.visible_pad[row]]
        assert len(asked) == max(1, int(int(ok[row].sum()) * share)) and len(set(asked.tolist())) == len(asked)
        assert not set(asked.tolist()) & set(seen.tolist()) and ok[row][asked].all()


def test_the_asked_part_is_spread_evenly_over_the_grid_with_blocks_too():
    masking = Masking(ratio=0.75, predict_ratio=0.25, block=2)
    plan = plan_masks(torch.ones(3000, 16, dtype=torch.bool), masking, (3, 0), grid=(4, 4))
    counts = torch.bincount(plan.asked.flatten(), minlength=16).float() / 3000
    assert (counts - 0.25).abs().max() < 0.04


@pytest.mark.parametrize("grid", [(12, 12), (6, 4, 6)])
def test_blocks_are_shown_or_hidden_as_a_whole(grid):
    """The visible patches of a plan fill blocks of an anywhere-shifted lattice, but for one that the count cuts."""
    tokens, block = int(np.prod(grid)), 2
    plan = plan_masks(torch.ones(20, tokens, dtype=torch.bool), Masking(ratio=0.75, block=block), (0, 0), grid=grid)
    assert plan.visible.shape[1] == tokens // 4
    for row in plan.visible.numpy():
        shown = np.zeros(tokens, bool)
        shown[row] = True
        places = np.argwhere(shown.reshape(grid))
        partial = []
        for shift in np.ndindex(*(block,) * len(grid)):
            cells = {}
            for place in (np.indices(grid).reshape(len(grid), -1).T + shift) // block:
                cells[tuple(place)] = cells.get(tuple(place), 0) + 1
            taken = {}
            for place in (places + shift) // block:
                taken[tuple(place)] = taken.get(tuple(place), 0) + 1
            partial.append(sum(count < cells[cell] for cell, count in taken.items()))
        assert min(partial) <= 1


def test_single_patches_and_blocks_hide_every_place_equally_often():
    plan = plan_masks(torch.ones(4000, 16, dtype=torch.bool), Masking(ratio=0.5, block=2), (3, 0), grid=(4, 4))
    counts = torch.bincount(plan.visible.flatten(), minlength=16).float() / 4000
    assert (counts - 0.5).abs().max() < 0.05


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"ratio": 1.0}, "mask ratio 1.0 is not within"),
        ({"ratio": (0.9, 0.5)}, "ends are in the wrong order"),
        ({"block": 0}, "mask block 0 is not a positive number"),
        ({"ratio": 0.5, "predict_ratio": 0.6}, "only hidden patches can be asked for"),
    ],
)
def test_masks_that_cannot_be_drawn_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        Masking(**values)


def test_blocks_need_the_grid():
    with pytest.raises(ConfigError, match="blocks of patches need the grid of the 16 patches, not None"):
        plan_masks(torch.ones(1, 16, dtype=torch.bool), Masking(block=2), (0, 0))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, Masking(predict_ratio=0.5)),
        ({"mode": "exact"}, Masking()),
        ({"mode": "exact", "mask_ratio": [0.5, 0.9], "mask_block": 2}, Masking(ratio=(0.5, 0.9), block=2)),
        ({"mask_ratio": [0.4, 0.9]}, Masking(ratio=(0.4, 0.9), predict_ratio=0.4)),
        ({"mode": "fast", "mask_ratio": 0.2}, Masking(ratio=0.2, predict_ratio=0.2)),
        ({"predict_ratio": 0.25, "channel_drop": 0.3}, Masking(predict_ratio=0.25, channel_drop=0.3)),
    ],
)
def test_a_recipe_says_how_masks_are_drawn(values, expected):
    assert Masking.from_config(ModelConfig(patch_2d=(4, 4), **values)) == expected


def test_with_hidden_channels_visible_patches_are_asked_for_too_in_the_same_proportion():
    ok = torch.ones(3, 16, dtype=torch.bool)
    plan = plan_masks(ok, Masking(channel_drop=0.5), (0, 0), channels=4)
    assert plan.crossed == 4 and torch.equal(plan.asked[:, 12:], plan.visible)
    part = plan_masks(ok, Masking(channel_drop=0.5, predict_ratio=0.375), (0, 0), channels=4)
    assert part.asked.shape == (3, 6 + 2) and part.crossed == 2
    assert plan_masks(ok, Masking(), (0, 0), channels=4).crossed == 0
