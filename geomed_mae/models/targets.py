"""What the decoder is asked for, and how far off it was.

Targets are normalised per patch *and channel* over valid pixels: normalising all channels of a patch jointly, as
published for RGB, leaves mostly each band's mean in a multispectral target. The standard deviation has a floor, the
modality's noise in model units, so that a flat patch (water, air, padding of a CT) is not blown up into noise:

    target = (x - mean) / sqrt(sigma^2 + floor^2)

Absolute values, which this removes, are asked for separately: each patch's mean and log sqrt(sigma^2 + floor^2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geomed_mae.models.patches import clean

PUBLISHED_EPS = 1e-6
"""Added to the variance of the `patch` target, as in MAE's released code."""


@dataclass(frozen=True, slots=True)
class Target:
    """Targets of the asked patches, in fp32.

    Attributes:
        pixels: normalised pixels; finite everywhere, meaningless where not `valid`.
        valid: pixels that count.
        mean, log_sigma: statistics of the valid pixels per patch and channel, sigma with the floor.
        counted: patches and channels with at least one valid pixel.
        center, scale: what they were normalised with: patches = pixels * scale + center.
    """

    pixels: Float[Tensor, "b h c p"]
    valid: Bool[Tensor, "b h c p"]
    mean: Float[Tensor, "b h c"]
    log_sigma: Float[Tensor, "b h c"]
    counted: Bool[Tensor, "b h c"]
    center: Float[Tensor, "b h #c 1"]
    scale: Float[Tensor, "b h #c 1"]


def patch_targets(
    patches: Float[Tensor, "b h c p"],
    valid: Bool[Tensor, "b h c p"],
    floor: Float[Tensor, "#b c"],
    kind: str,
) -> Target:
    """Make targets from patches in model units (0 where invalid).

    Args:
        patches: pixels of the asked patches.
        valid: which of them count.
        floor: standard deviation of noise per channel, in model units.
        kind: `patch_channel`, `patch` (joint over channels, unbiased variance: as published) or `none`.
    """
    count = valid.sum(-1)
    mean = patches.sum(-1) / count.clamp(min=1)
    centred = clean(patches - mean[..., None], valid)
    variance = torch.linalg.vector_norm(centred, dim=-1).square() / count.clamp(min=1)
    log_sigma = 0.5 * (variance + floor[:, None].square()).clamp(min=PUBLISHED_EPS).log()
    if kind == "patch":
        center, scale = _joint(patches, valid)
    else:
        center, scale = normalisation(mean, log_sigma, floor, kind)
    pixels = centred / scale if kind == "patch_channel" else (patches - center) / scale
    return Target(pixels, valid, mean, log_sigma, count > 0, center, scale)


def _joint(
    patches: Float[Tensor, "b h c p"], valid: Bool[Tensor, "b h c p"]
) -> tuple[Float[Tensor, "b h 1 1"], Float[Tensor, "b h 1 1"]]:
    """Return mean and standard deviation of each patch over all its channels, as published."""
    count = valid.sum((-2, -1), keepdim=True)
    mean = patches.sum((-2, -1), keepdim=True) / count.clamp(min=1)
    centred = clean(patches - mean, valid)
    variance = centred.square().sum((-2, -1), keepdim=True) / (count - 1).clamp(min=1)
    return mean, (variance + PUBLISHED_EPS).sqrt()


def normalisation(
    mean: Float[Tensor, "b h c"], log_sigma: Float[Tensor, "b h c"], floor: Float[Tensor, "#b c"], kind: str
) -> tuple[Float[Tensor, "b h #c 1"], Float[Tensor, "b h #c 1"]]:
    """Return (center, scale) that statistics say targets were normalised with: pixels = target * scale + center.

    For `patch` the joint statistics follow from those of the channels (law of total variance), which weigh equally.
    """
    if kind == "patch_channel":
        return mean[..., None], log_sigma.exp()[..., None]
    if kind == "none":
        return torch.zeros_like(mean[..., None]), torch.ones_like(mean[..., None])
    joint = mean.mean(-1, keepdim=True)
    within = ((2 * log_sigma).exp() - floor[:, None].square()).clamp(min=0).mean(-1, keepdim=True)
    variance = within + (mean - joint).square().mean(-1, keepdim=True) + PUBLISHED_EPS
    return joint[..., None], variance.sqrt()[..., None]


def mean_of_samples(values: Float[Tensor, "b ..."], counted: Bool[Tensor, "b ..."]) -> Float[Tensor, ""]:
    """Return the mean over samples of the mean of each one's counted values; a sample without any does not count.

    As a mean over samples it does not depend on how a batch is cut into parts and shared by processes, as long as each
    sample has something to count; over fully valid samples it is the mean over all values, as published.
    """
    counts = counted.flatten(1).sum(1)
    means = clean(values, counted).flatten(1).sum(1) / counts.clamp(min=1)
    return means.sum() / (counts > 0).sum().clamp(min=1)
