"""Losses: Dice and cross entropy (nnU-Net, Isensee et al. 2021), cross entropy, focal (Lin et al., arXiv 1708.02002).

All in fp32, and all over what is known alone: pixels and images of class IGNORE, and entries UNKNOWN of multi-label
targets, change neither the loss nor a gradient. torch's cross entropy does that. Dice and focal are written out here:
MONAI's DiceCELoss has no ignored class; its DiceLoss has, but averages over classes that a batch of small crops lacks
too; its FocalLoss divides by the number of pixels whatever the class weights and knows no label smoothing. Where they
mean the same, they are the tests' oracles.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.heads import HeadSpec
from geomed_mae.readers import IGNORE

Loss = tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]
"""A loss to be minimised and the parts that it is the sum of, detached, by name."""

DICE_SMOOTHING = 1.0
"""Pixels added to numerator and denominator: bounds the gradient where a class hardly occurs in a batch."""
SMALLEST_MISS = 1e-12
"""Smallest 1 - probability that the focal loss raises to its power: keeps the gradient of exponents below 1 finite."""


def loss_of(spec: HeadSpec, logits: Float[Tensor, "b class *s"], target: Int[Tensor, " b *t"]) -> Loss:
    """Return the loss that a head is trained with, and its parts; 0 where nothing is known.

    Args:
        spec: names the loss, its class weights and label smoothing.
        logits: of a head.
        target: int64 class numbers (b, *s), IGNORE where unknown; multi-label (b, class) of 1, 0 and UNKNOWN.
    """
    logits = logits.float()
    weights = None if spec.class_weights is None else logits.new_tensor(spec.class_weights)
    gamma = spec.focal_gamma if spec.objective == "focal" else None
    name = "cross_entropy" if gamma is None else "focal"
    if spec.multi_label:
        entropy = binary_loss(logits, target, gamma=gamma, weights=weights, label_smoothing=spec.label_smoothing)
    else:
        entropy = class_loss(logits, target, gamma=gamma, weights=weights, label_smoothing=spec.label_smoothing)
    if spec.objective != "dice_ce":
        return entropy, {name: entropy.detach()}
    dice = dice_loss(logits, target)
    return dice + entropy, {"dice_loss": dice.detach(), name: entropy.detach()}


def class_loss(
    logits: Float[Tensor, "b class *s"],
    target: Int[Tensor, " b *s"],
    *,
    gamma: float | None = None,
    weights: Float[Tensor, " class"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Return cross entropy, or with `gamma` focal loss, as the mean over known targets weighted by their class.

    Each target's loss has its class's weight and the sum is divided by the sum of these weights, as torch does.
    """
    known = target != IGNORE
    smoothed = {"ignore_index": IGNORE, "label_smoothing": label_smoothing}
    losses = F.cross_entropy(logits, target, weights, reduction="none", **smoothed)
    if gamma is not None:
        chance_missed = -torch.expm1(-F.cross_entropy(logits, target, ignore_index=IGNORE, reduction="none"))
        losses = chance_missed.clamp(min=SMALLEST_MISS) ** gamma * losses
    count = known if weights is None else weights[target.masked_fill(~known, 0)] * known
    return _mean(losses, count)


def binary_loss(
    logits: Float[Tensor, "b class"],
    target: Int[Tensor, "b class"],
    *,
    gamma: float | None = None,
    weights: Float[Tensor, " class"] | None = None,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Return binary cross entropy, or with `gamma` focal loss, as the mean over known entries.

    A class's weight is that of its presence (torch's `pos_weight`): what is rare is missed rather than raised in error,
    and weights below and above 1 say what to do about it.
    """
    known = target != UNKNOWN
    truth = target.masked_fill(~known, 0).to(logits.dtype)
    smoothed = truth * (1 - label_smoothing) + label_smoothing / 2
    losses = F.binary_cross_entropy_with_logits(logits, smoothed, pos_weight=weights, reduction="none")
    if gamma is not None:
        chance_missed = -torch.expm1(-F.binary_cross_entropy_with_logits(logits, truth, reduction="none"))
        losses = chance_missed.clamp(min=SMALLEST_MISS) ** gamma * losses
    return _mean(losses.masked_fill(~known, 0), known)


def dice_loss(logits: Float[Tensor, "b class *s"], target: Int[Tensor, " b *s"]) -> Float[Tensor, ""]:
    """Return 1 minus the soft Dice coefficient (Milletari et al., arXiv 1606.04797), mean over the classes present.

    The sums run over the whole batch, so that a class that a small crop lacks does not decide the loss. A class is
    present if a labelled pixel of the batch has it.
    """
    labelled = target != IGNORE
    truth = F.one_hot(target.masked_fill(~labelled, 0), logits.shape[1]).movedim(-1, 1).to(logits.dtype)
    mask = labelled.unsqueeze(1).to(logits.dtype)
    truth, chance = truth * mask, logits.softmax(dim=1) * mask
    over = (0, *range(2, logits.ndim))
    shared, total = (truth * chance).sum(over), (truth + chance).sum(over)
    scores = (2 * shared + DICE_SMOOTHING) / (total + DICE_SMOOTHING)
    present = truth.sum(over) > 0
    return ((1 - scores) * present).sum() / present.sum().clamp(min=1)


def balanced_weights(targets: Iterable[np.ndarray], classes: int, *, multi_label: bool = False) -> tuple[float, ...]:
    """Return class weights by the inverse of how often classes occur (scikit-learn's "balanced").

    Args:
        targets: class numbers of any shape, IGNORE where unknown; multi-label rows (classes,) of 1, 0 and UNKNOWN.
        classes: number of classes.
        multi_label: then a class's weight is the number of absences a presence, so that both weigh alike.

    Returns:
        One weight a class; 1 for classes that do not occur, about which nothing can be said.
    """
    present, absent = np.zeros(classes), np.zeros(classes)
    for target in map(np.asarray, targets):
        if multi_label:
            rows = target.reshape(-1, classes)
            present += (rows == 1).sum(axis=0)
            absent += (rows == 0).sum(axis=0)
        else:
            present += np.bincount(target[target != IGNORE].ravel(), minlength=classes)
    if multi_label:
        usable = (present > 0) & (absent > 0)
        weights = np.divide(absent, present, out=np.ones(classes), where=usable)
    else:
        usable = present > 0
        weights = np.divide(present.sum() / max(usable.sum(), 1), present, out=np.ones(classes), where=usable)
    return tuple(float(weight) for weight in weights)


def _mean(losses: Float[Tensor, "*t"], count: Float[Tensor, "*t"] | Bool[Tensor, "*t"]) -> Float[Tensor, ""]:
    total = count.sum()
    # Nothing known, or nothing of a class with weight: 0 with zero gradients, not 0 / 0.
    return losses.sum() / torch.where(total > 0, total, 1)
