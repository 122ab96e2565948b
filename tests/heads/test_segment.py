"""The segmentation head in two and three axes, and its loss."""

from __future__ import annotations

import pytest
import torch
from monai.losses import DiceLoss

from geomed_mae.errors import ConfigError
from geomed_mae.heads import HeadInputs, HeadSpec, head_module
from geomed_mae.heads.segment import DICE_SMOOTHING, dice_loss
from geomed_mae.readers import IGNORE

CLASSES = ("background", "anterior", "posterior")


def inputs(patch: tuple[int, ...], grid: tuple[int, ...], channels: int = 5, batch: int = 2) -> HeadInputs:
    space = tuple(size * step for size, step in zip(grid, patch, strict=True))
    return HeadInputs(
        tokens=torch.randn(batch, 24, *grid),
        token_valid=torch.ones(batch, *grid, dtype=torch.bool),
        pixels=torch.randn(batch, channels, *space),
        valid=torch.ones(batch, channels, *space, dtype=torch.bool),
    )


def head(patch: tuple[int, ...], channels: int = 5) -> torch.nn.Module:
    torch.manual_seed(0)
    spec = HeadSpec(name="segment", embed_dim=24, classes=CLASSES, channels=channels, patch=patch, width=32)
    return head_module("segment").build(spec)


@pytest.mark.parametrize(
    ("patch", "grid"), [((8, 8), (3, 5)), ((16, 4), (2, 3)), ((2, 8, 8), (4, 2, 3)), ((4, 4, 4), (2, 2, 2))]
)
def test_answers_at_the_resolution_of_the_image(patch, grid):
    given = inputs(patch, grid)
    assert head(patch)(given).shape == (2, len(CLASSES), *given.pixels.shape[2:])


def test_any_number_of_channels(channels=13):
    given = inputs((8, 8), (2, 2), channels=channels)
    assert head((8, 8), channels=channels)(given).shape == (2, 3, 16, 16)


def test_sees_both_tokens_and_pixels():
    given = inputs((8, 8), (3, 3))
    model = head((8, 8))
    base = model(given)
    for name in ("tokens", "pixels"):
        changed = HeadInputs(**{**{k: getattr(given, k) for k in HeadInputs.__slots__}, name: getattr(given, name) + 1})
        assert not torch.allclose(model(changed), base)


def test_one_sample_does_not_depend_on_its_neighbours_in_the_batch():
    given = inputs((8, 8), (3, 3))
    alone = HeadInputs(*(getattr(given, name)[:1] for name in HeadInputs.__slots__))
    torch.testing.assert_close(head((8, 8))(given)[:1], head((8, 8))(alone))


def test_ignored_pixels_change_neither_loss_nor_gradient():
    model = head((8, 8))
    target = torch.randint(0, 3, (2, 24, 24))
    target[:, :10] = IGNORE
    logits = torch.randn(2, 3, 24, 24, requires_grad=True)
    loss, parts = model.loss(logits, target)
    loss.backward()
    assert logits.grad[:, :, :10].abs().max() == 0 and logits.grad[:, :, 10:].abs().max() > 0
    other = logits.detach().clone()
    other[:, :, :10] = 1e4
    torch.testing.assert_close(model.loss(other, target)[0], loss.detach())
    assert set(parts) == {"dice_loss", "cross_entropy"}


def test_a_batch_without_labels_has_loss_zero_and_no_nan():
    logits = torch.randn(1, 3, 8, 8, requires_grad=True)
    loss, _ = head((8, 8)).loss(logits, torch.full((1, 8, 8), IGNORE))
    loss.backward()
    assert loss == 0 and torch.isfinite(logits.grad).all()


def test_dice_is_monais_where_nothing_is_ignored():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 3, 6, 7, 5), torch.randint(0, 3, (2, 6, 7, 5))
    oracle = DiceLoss(to_onehot_y=True, softmax=True, batch=True, smooth_nr=DICE_SMOOTHING, smooth_dr=DICE_SMOOTHING)
    torch.testing.assert_close(dice_loss(logits, target), oracle(logits, target[:, None]))


def test_loss_is_computed_in_full_precision():
    logits = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16)
    assert head((8, 8)).loss(logits, torch.zeros(1, 8, 8, dtype=torch.long))[0].dtype == torch.float32


def test_an_unknown_head_names_the_nearest():
    with pytest.raises(ConfigError, match="'segmnt' is not one of the heads: did you mean 'segment'"):
        head_module("segmnt")
