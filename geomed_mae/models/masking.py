"""Masks, drawn outside the model: which patches are shown, which are asked for, which channels are hidden.

Draws are counter-based (Philox, Salmon et al. 2011, keyed by seed, step and sample): the plan of a step is a pure
function of its key, whatever ran before and on whichever device the model is. Counts depend on the grid alone, so
that every step of a bucket has the same shapes; samples with fewer valid patches are padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from geomed_mae.errors import ConfigError
from geomed_mae.models.patches import patchify

MIN_VALID_AREA = 0.5
"""A patch with a smaller share of valid area is neither encoded nor decoded."""

STREAM = 0x6D61736B
"""Second half of the Philox key ("mask"): keeps these draws apart from those of crops and augmentation."""


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """Which patches of each sample are visible to the encoder and which are asked of the decoder.

    Attributes:
        visible: indices into the patch grid.
        hidden: indices into the patch grid.
        visible_pad: True where an entry of `visible` is padding; None when none is.
        hidden_pad: the same for `hidden`.
        shown_channels: channels that the encoder sees; None shows all. Hidden ones are still asked for.
    """

    visible: Int[Tensor, "b v"]
    hidden: Int[Tensor, "b h"]
    visible_pad: Bool[Tensor, "b v"] | None = None
    hidden_pad: Bool[Tensor, "b h"] | None = None
    shown_channels: Bool[Tensor, "b c"] | None = None

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskPlan:
        """Return the plan on `device`."""
        names = ("visible", "hidden", "visible_pad", "hidden_pad", "shown_channels")
        parts = {name: getattr(self, name) for name in names}
        return replace(
            self,
            **{name: part.to(device, non_blocking=non_blocking) for name, part in parts.items() if part is not None},
        )


def valid_tokens(
    valid: Bool[Tensor, "b c *space"], patch: Sequence[int], min_valid_area: float = MIN_VALID_AREA
) -> Bool[Tensor, "b n"]:
    """Say which patches have enough area where at least one channel is valid."""
    area = patchify(valid.any(dim=1, keepdim=True), patch)
    return area.float().mean(dim=(2, 3)) >= min_valid_area


def plan_masks(
    token_valid: Bool[Tensor, "b n"],
    ratio: float,
    rng_key: tuple[int, int],
    *,
    samples: Sequence[int] | None = None,
    channels: int = 0,
    channel_drop: float = 0.0,
) -> MaskPlan:
    """Draw the masks of one step.

    Args:
        token_valid: patches worth encoding, from `valid_tokens`.
        ratio: share of a sample's valid patches to hide; int(n * (1 - ratio)) are shown, as published.
        rng_key: (seed, step).
        samples: number of each sample within the step, over all processes; 0, 1, 2 ... by default.
        channels: number of channels, needed for channel_drop alone.
        channel_drop: probability of hiding a channel from the encoder; one is always shown.

    Raises:
        ConfigError: the grid has a single patch, so that nothing can be hidden.
    """
    usable = token_valid.cpu().numpy()
    batch, tokens = usable.shape
    if tokens < 2:
        raise ConfigError(
            "the crop is a single patch, so that none can be hidden; use a larger crop or a smaller patch"
        )
    keep = max(1, int(tokens * (1 - ratio)))
    visible, visible_pad = np.zeros((batch, keep), np.int64), np.ones((batch, keep), bool)
    hidden, hidden_pad = np.zeros((batch, tokens - keep), np.int64), np.ones((batch, tokens - keep), bool)
    shown = np.ones((batch, channels), bool)
    seed, step = rng_key
    for row, sample in enumerate(range(batch) if samples is None else samples):
        draw = np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=[0, 0, sample, step]))
        order = np.argsort(np.where(usable[row], draw.random(tokens), np.inf), kind="stable")
        count = int(usable[row].sum())
        first = min(count, max(1, int(count * (1 - ratio))))
        visible[row, :first], visible_pad[row, :first] = order[:first], False
        hidden[row, : count - first], hidden_pad[row, : count - first] = order[first:count], False
        if channel_drop > 0 and channels:
            luck = draw.random(channels)
            shown[row] = (luck >= channel_drop) | (luck == luck.max())
    return MaskPlan(
        torch.from_numpy(visible),
        torch.from_numpy(hidden),
        torch.from_numpy(visible_pad) if visible_pad.any() else None,
        torch.from_numpy(hidden_pad) if hidden_pad.any() else None,
        torch.from_numpy(shown) if channel_drop > 0 and channels else None,
    )
