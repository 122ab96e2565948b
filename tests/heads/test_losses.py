"""Losses: equal to torch's and MONAI's where these mean the same, and deaf to what is not known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.losses import DiceCELoss, DiceLoss, FocalLoss
from sklearn.utils.class_weight import compute_class_weight
from torch.autograd import grad
from torchvision.ops import sigmoid_focal_loss

from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.heads.losses import (
    DICE_SMOOTHING,
    balanced_weights,
    binary_loss,
    class_loss,
    dice_loss,
    loss_of,
)
from geomed_mae.readers import IGNORE
from tests.heads.given import spec_of

SMOOTH = {"smooth_nr": DICE_SMOOTHING, "smooth_dr": DICE_SMOOTHING, "batch": True}
WEIGHTS = (0.5, 2.0, 3.0)


def volumes(shape: tuple[int, ...] = (6, 7, 5), *, ignored: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and class numbers of two images; with `ignored` a third of the pixels are IGNORE."""
    logits, target = torch.randn(2, 3, *shape), torch.randint(0, 3, (2, *shape))
    if ignored:
        target[torch.rand(target.shape) < 1 / 3] = IGNORE
    return logits, target


def loss(logits: torch.Tensor, target: torch.Tensor, task: str = "segment", **more: object) -> torch.Tensor:
    return loss_of(spec_of("linear", task, **more), logits, target)[0]


@pytest.mark.parametrize("shape", [(9, 8), (6, 7, 5)])
@pytest.mark.parametrize("more", [{}, {"class_weights": WEIGHTS}, {"label_smoothing": 0.2}])
def test_dice_and_cross_entropy_are_monais_where_everything_is_known(shape, more):
    logits, target = volumes(shape)
    weight = torch.tensor(more["class_weights"]) if "class_weights" in more else None
    smoothing = {"label_smoothing": more.get("label_smoothing", 0.0)}
    # MONAI gives its weight to Dice too: the entropy is taken from it without Dice, and Dice without weights.
    entropy = DiceCELoss(to_onehot_y=True, softmax=True, weight=weight, lambda_dice=0.0, **smoothing)
    dice = DiceLoss(to_onehot_y=True, softmax=True, **SMOOTH)
    expected = entropy(logits, target[:, None]) + dice(logits, target[:, None])
    torch.testing.assert_close(loss(logits, target, **more), expected)


def test_dice_and_cross_entropy_is_monais_dice_ce_loss():
    logits, target = volumes()
    oracle = DiceCELoss(to_onehot_y=True, softmax=True, **SMOOTH)
    torch.testing.assert_close(loss(logits, target), oracle(logits, target[:, None]))


def test_dice_is_monais_where_pixels_are_ignored():
    logits, target = volumes(ignored=True)
    oracle = DiceLoss(to_onehot_y=True, softmax=True, ignore_index=IGNORE, **SMOOTH)
    torch.testing.assert_close(dice_loss(logits, target), oracle(logits, target[:, None]))


def test_dice_by_hand():
    # Two pixels of class 0 and one of class 1, each given a chance of 3/4 for the right class.
    logits = torch.log(torch.tensor([[[0.75, 0.75, 0.25], [0.25, 0.25, 0.75]]]))
    scores = [(2 * 1.5 + 1) / (2 + 1.75 + 1), (2 * 0.75 + 1) / (1 + 1.25 + 1)]
    assert dice_loss(logits, torch.tensor([[0, 0, 1]])).item() == pytest.approx(1 - sum(scores) / 2)
    # A class that no pixel has does not count, whatever chance it is given.
    absent = torch.cat([logits, torch.full((1, 1, 3), -20.0)], dim=1)
    assert dice_loss(absent, torch.tensor([[0, 0, 1]])).item() == pytest.approx(1 - sum(scores) / 2)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torchs_over_what_is_known(weights, smoothing):
    logits, target = volumes(ignored=True)
    given = None if weights is None else torch.tensor(weights)
    known = target != IGNORE
    expected = F.cross_entropy(logits.movedim(1, -1)[known], target[known], given, label_smoothing=smoothing)
    found = loss(logits, target, loss="cross_entropy", class_weights=weights, label_smoothing=smoothing)
    torch.testing.assert_close(found, expected)
    images = (logits[:, :, 0, 0, 0], target[:, 0, 0, 0].clamp(min=0))
    found = loss(*images, task="classify", class_weights=weights, label_smoothing=smoothing)
    torch.testing.assert_close(found, F.cross_entropy(*images, given, label_smoothing=smoothing))


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_focal_is_monais_over_what_is_known(gamma):
    logits, target = volumes(ignored=True)
    oracle = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=gamma, ignore_index=IGNORE)
    found = loss(logits, target, loss="focal", focal_gamma=gamma)
    torch.testing.assert_close(found, oracle(logits, target[:, None]))
    logits, target = volumes()
    everywhere = FocalLoss(to_onehot_y=True, use_softmax=True, gamma=gamma)
    # Without an ignored class its mean is over the classes too, of which all but the true one have a loss of 0.
    found = loss(logits, target, loss="focal", focal_gamma=gamma)
    torch.testing.assert_close(found, 3 * everywhere(logits, target[:, None]))


def test_focal_by_hand():
    logits = torch.log(torch.tensor([[0.9, 0.1], [0.4, 0.6]]))
    expected = (0.1**2 * -math.log(0.9) + 0.6**2 * -math.log(0.4)) / 2
    assert class_loss(logits, torch.tensor([0, 0]), gamma=2.0).item() == pytest.approx(expected, rel=1e-5)
    weighted = (3 * 0.1**2 * -math.log(0.9) + 1 * 0.4**2 * -math.log(0.6)) / (3 + 1)
    found = class_loss(logits, torch.tensor([0, 1]), gamma=2.0, weights=torch.tensor([3.0, 1.0]))
    assert found.item() == pytest.approx(weighted, rel=1e-5)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_of_a_certain_answer_has_a_finite_gradient(gamma):
    for found in (
        lambda logits: class_loss(logits, torch.tensor([0]), gamma=gamma),
        lambda logits: binary_loss(logits, torch.tensor([[1, 0]]), gamma=gamma),
    ):
        logits = torch.tensor([[200.0, -200.0]], requires_grad=True)
        assert torch.isfinite(grad(found(logits), logits)[0]).all()


def test_binary_losses_are_torchs_over_what_is_known():
    logits, target = torch.randn(7, 3), torch.randint(0, 2, (7, 3))
    target[torch.rand(7, 3) < 0.3] = UNKNOWN
    known = target != UNKNOWN
    truth = target[known].float()
    multi = {"task": "classify", "multi_label": True}
    plain = F.binary_cross_entropy_with_logits(logits[known], truth)
    torch.testing.assert_close(loss(logits, target, **multi), plain)
    smoothed = F.binary_cross_entropy_with_logits(logits[known], truth * 0.8 + 0.1)
    torch.testing.assert_close(loss(logits, target, label_smoothing=0.2, **multi), smoothed)
    weight = torch.tensor(WEIGHTS).expand(7, 3)[known]
    weighted = F.binary_cross_entropy_with_logits(logits[known], truth, pos_weight=weight)
    torch.testing.assert_close(loss(logits, target, class_weights=WEIGHTS, **multi), weighted)
    focal = sigmoid_focal_loss(logits[known], truth, alpha=-1, gamma=2.0, reduction="mean")
    torch.testing.assert_close(loss(logits, target, loss="focal", **multi), focal)


CASES = [
    ({"task": "segment", "loss": name, **more})
    for name in ("dice_ce", "cross_entropy", "focal")
    for more in ({}, {"class_weights": WEIGHTS, "label_smoothing": 0.1})
] + [
    ({"task": "classify", "loss": name, "multi_label": multi, **more})
    for name in ("cross_entropy", "focal")
    for multi in (False, True)
    for more in ({}, {"class_weights": WEIGHTS, "label_smoothing": 0.1})
]


def case(more: dict, known: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits and a target of which about this share is known (0 is none), and never the first image's first."""
    if more["task"] == "segment":
        shape, classes = (4, 9, 8), 3
    else:
        shape, classes = ((6, 3), 2) if more["multi_label"] else ((6,), 3)
    target = torch.randint(0, classes, shape)
    hidden = torch.rand(shape) >= known
    hidden.view(-1)[0] = True
    hidden[-1] = known == 0
    logits = torch.randn(shape[0], 3, *(shape[1:] if more["task"] == "segment" else ()))
    return logits.requires_grad_(), target.masked_fill(hidden, IGNORE)


@pytest.mark.parametrize("more", CASES, ids=lambda more: "-".join(map(str, more.values())))
def test_what_is_not_known_changes_nothing_bit_for_bit(more):
    logits, target = case(more, 0.6)
    unknown = target == IGNORE
    hidden = (unknown if more.get("multi_label") else unknown.unsqueeze(1)).expand_as(logits)
    first = loss(logits, target, **more)
    (slope,) = grad(first, logits)
    assert (slope[hidden] == 0).all() and (slope[~hidden] != 0).any()
    other = torch.where(hidden, 50 * torch.randn_like(logits), logits.detach()).requires_grad_()
    second = loss(other, target, **more)
    assert torch.equal(first, second)
    assert torch.equal(slope, grad(second, other)[0])


@pytest.mark.parametrize("more", CASES, ids=lambda more: "-".join(map(str, more.values())))
def test_a_batch_about_which_nothing_is_known_has_loss_and_gradient_zero(more):
    logits, target = case(more, 0.0)
    assert (target == IGNORE).all()
    found = loss(logits, target, **more)
    assert found == 0 and not grad(found, logits)[0].any()


def test_a_class_without_weight_is_not_divided_by():
    logits = torch.randn(2, 3, requires_grad=True)
    found = loss(logits, torch.tensor([0, 0]), task="classify", class_weights=(0.0, 1.0, 1.0))
    assert found == 0 and torch.isfinite(grad(found, logits)[0]).all()


def test_losses_are_computed_in_full_precision_and_name_their_parts():
    logits, target = torch.randn(1, 3, 8, 8, dtype=torch.bfloat16), torch.zeros(1, 8, 8, dtype=torch.long)
    total, parts = loss_of(spec_of("linear", "segment"), logits, target)
    assert total.dtype == torch.float32 and set(parts) == {"dice_loss", "cross_entropy"}
    torch.testing.assert_close(total, parts["dice_loss"] + parts["cross_entropy"])
    assert set(loss_of(spec_of("linear", "segment", loss="focal"), logits, target)[1]) == {"focal"}


def test_balanced_weights_are_scikit_learns():
    rng = np.random.default_rng(0)
    targets = [rng.choice([0, 1, 2, IGNORE], p=(0.7, 0.1, 0.05, 0.15), size=(20, 30)).astype(np.int16) for _ in "ab"]
    known = np.concatenate([target[target != IGNORE] for target in targets])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=known)
    assert balanced_weights(targets, 3) == pytest.approx(expected)


def test_balanced_weights_of_many_labels_make_presence_and_absence_weigh_alike():
    rows = [np.array(row) for row in ([1, 0, UNKNOWN], [0, 0, 0], [0, 1, UNKNOWN], [0, 1, 0])]
    assert balanced_weights(rows, 3, multi_label=True) == (3.0, 1.0, 1.0), "of the third class nothing is there"


def test_balanced_weights_of_classes_that_do_not_occur_are_one():
    assert balanced_weights([np.array([0, 0, 0, 2])], 4) == (2 / 3, 1.0, 2.0, 1.0)
    assert balanced_weights([np.full(4, IGNORE)], 2) == (1.0, 1.0)
    assert balanced_weights([np.int16(1), np.int16(1), np.int16(0)], 2) == pytest.approx((1.5, 0.75))
