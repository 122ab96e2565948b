"""Masks, drawn outside the model: which patches are shown, which are asked for, which channels are hidden.

Draws are counter-based (Philox, Salmon et al. 2011, keyed by seed, step and sample): the plan of a step is a pure
function of its key, whatever ran before and on whichever device the model is. Counts depend on the grid and the ratio
alone, so that the steps of a bucket have the same shapes; samples with fewer valid patches are padded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from geomed_mae.errors import ConfigError
from geomed_mae.models.patches import patchify

if TYPE_CHECKING:
    from geomed_mae.config import ModelConfig

MIN_VALID_AREA = 0.5
"""A patch with a smaller share of valid area is neither encoded nor decoded."""

STREAM, RATIO_STREAM = 0x6D61736B, 0x72617469
"""Second half of the Philox key ("mask", "rati"): keeps these draws apart from those of crops and augmentation."""

FAST_PREDICT_RATIO = 0.5
"""Predict ratio of mode fast where the recipe says none: two thirds of what is hidden at ratio 0.75. Better than a
quarter, and than everything in mode exact, in frozen features (benchmarks/ablations.py)."""

RATIO_LEVELS = 5
"""Ratios that a range is sampled at: each gives a step of its own shape, which a compiled model compiles once."""


@dataclass(frozen=True, slots=True)
class MaskPlan:
    """Which patches of each sample are visible to the encoder and which are asked of the decoder.

    Attributes:
        visible: indices into the patch grid.
        asked: indices into the patch grid: hidden patches, or a part of them; then `crossed` visible ones.
        visible_pad: True where an entry of `visible` is padding; None when none is.
        asked_pad: the same for `asked`.
        shown_channels: channels that the encoder sees; None shows all. Hidden ones are still asked for.
        crossed: how many entries at the end of `asked` are visible patches, of which the channels are asked for that
            the encoder did not see: there the spectrum alone must answer.
    """

    visible: Int[Tensor, "b v"]
    asked: Int[Tensor, "b h"]
    visible_pad: Bool[Tensor, "b v"] | None = None
    asked_pad: Bool[Tensor, "b h"] | None = None
    shown_channels: Bool[Tensor, "b c"] | None = None
    crossed: int = 0

    def to(self, device: torch.device | str, *, non_blocking: bool = False) -> MaskPlan:
        """Return the plan on `device`."""
        names = ("visible", "asked", "visible_pad", "asked_pad", "shown_channels")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Masking:
    """How the masks of a run are drawn.

    Attributes:
        ratio: share of a sample's valid patches to hide; of a range (low, high) each step draws one of RATIO_LEVELS
            values.
        block: edge, in patches, of the blocks that are shown or hidden as a whole; 1 draws single patches.
        predict_ratio: share of a sample's valid patches that the decoder is asked for, at most the hidden ones
            ("prediction ratio" of CrossMAE, arXiv 2401.14391); None asks for every hidden patch.
        channel_drop: probability of hiding a channel from the encoder; one is always shown. Hidden channels are asked
            for in hidden patches and, in the same proportion, in visible ones.
    """

    ratio: float | tuple[float, float] = 0.75
    block: int = 1
    predict_ratio: float | None = None
    channel_drop: float = 0.0

    def __post_init__(self) -> None:
        low, high = self.bounds
        if not 0 < low <= high < 1:
            raise ConfigError(f"mask ratio {self.ratio} is not within (0, 1), or its ends are in the wrong order")
        if self.block < 1:
            raise ConfigError(f"mask block {self.block} is not a positive number of patches")
        if self.predict_ratio is not None and not 0 < self.predict_ratio <= low:
            raise ConfigError(
                f"predict ratio {self.predict_ratio} is not within (0, {low}]: only hidden patches can be asked for"
            )

    @classmethod
    def from_config(cls, config: ModelConfig) -> Masking:
        """Translate the `model` section of a recipe."""
        masking = cls(ratio=config.mask_ratio, block=config.mask_block, channel_drop=config.channel_drop)
        if config.mode == "exact":
            return masking
        return replace(masking, predict_ratio=config.predict_ratio or min(FAST_PREDICT_RATIO, masking.bounds[0]))

    @property
    def bounds(self) -> tuple[float, float]:
        """Lowest and highest ratio."""
        return self.ratio if isinstance(self.ratio, tuple) else (self.ratio, self.ratio)

    def ratio_at(self, rng_key: tuple[int, int]) -> float:
        """Return the ratio of one step, the same on every process."""
        if not isinstance(self.ratio, tuple):
            return self.ratio
        seed, step = rng_key
        draw = np.random.Generator(np.random.Philox(key=[seed, RATIO_STREAM], counter=[0, 0, 0, step]))
        return float(np.linspace(*self.ratio, RATIO_LEVELS)[draw.integers(RATIO_LEVELS)])


def plan_masks(
    token_valid: Bool[Tensor, "b n"],
    masking: Masking,
    rng_key: tuple[int, int],
    *,
    grid: Sequence[int] | None = None,
    samples: Sequence[int] | None = None,
    channels: int = 0,
) -> MaskPlan:
    """Draw the masks of one step.

    Args:
        token_valid: patches worth encoding, from `valid_tokens`.
        masking: what is drawn; of n valid patches int(n * (1 - ratio)) are shown, as published.
        rng_key: (seed, step).
        grid: patches per spatial axis; needed for blocks alone.
        samples: number of each sample within the step, over all processes; 0, 1, 2 ... by default.
        channels: number of channels, needed for channel_drop alone.

    Raises:
        ConfigError: the grid has a single patch, so that nothing can be hidden.
    """
    usable = token_valid.cpu().numpy()
    batch, tokens = usable.shape
    if tokens < 2:
        raise ConfigError(
            "the crop is a single patch, so that none can be hidden; use a larger crop or a smaller patch"
        )
    ratio, drops = masking.ratio_at(rng_key), masking.channel_drop > 0 and channels > 0
    keep, ask = _counts(tokens, ratio, masking.predict_ratio)
    visible, visible_pad = np.zeros((batch, keep), np.int64), np.ones((batch, keep), bool)
    crossed = keep * ask // (tokens - keep) if drops else 0
    asked, asked_pad = np.zeros((batch, ask), np.int64), np.ones((batch, ask), bool)
    shown = np.ones((batch, channels), bool)
    seed, step = rng_key
    for row, sample in enumerate(range(batch) if samples is None else samples):
        draw = np.random.Generator(np.random.Philox(key=[seed, STREAM], counter=[0, 0, sample, step]))
        luck = draw.random(tokens)
        places = luck if masking.block == 1 else _by_block(luck, grid, masking.block, draw)
        order = np.argsort(np.where(usable[row], places, np.inf), kind="stable")
        first, some = _counts(int(usable[row].sum()), ratio, masking.predict_ratio)
        rest = order[first : usable[row].sum()]
        rest = rest[np.argsort(luck[rest], kind="stable")][:some]  # a part of them is drawn patch by patch
        visible[row, :first], visible_pad[row, :first] = order[:first], False
        asked[row, : len(rest)], asked_pad[row, : len(rest)] = rest, False
        if drops:
            luck = draw.random(channels)
            shown[row] = (luck >= masking.channel_drop) | (luck == luck.max())
    asked = np.concatenate([asked, visible[:, :crossed]], axis=1)
    asked_pad = np.concatenate([asked_pad, visible_pad[:, :crossed]], axis=1)
    return MaskPlan(
        torch.from_numpy(visible),
        torch.from_numpy(asked),
        torch.from_numpy(visible_pad) if visible_pad.any() else None,
        torch.from_numpy(asked_pad) if asked_pad.any() else None,
        torch.from_numpy(shown) if drops else None,
        crossed,
    )


def _counts(tokens: int, ratio: float, predict_ratio: float | None) -> tuple[int, int]:
    """Return how many of `tokens` valid patches are shown and how many are asked for."""
    shown = min(tokens, max(1, int(tokens * (1 - ratio))))
    hidden = tokens - shown
    return shown, hidden if predict_ratio is None else min(hidden, max(1, int(tokens * predict_ratio)))


def _by_block(luck: np.ndarray, grid: Sequence[int] | None, block: int, draw: np.random.Generator) -> np.ndarray:
    """Return numbers whose order keeps the patches of a block together; the lattice of blocks is shifted at random."""
    if grid is None or math.prod(grid) != len(luck):
        raise ConfigError(f"blocks of patches need the grid of the {len(luck)} patches, not {grid}")
    shift = draw.integers(block, size=len(grid))
    lattice = [(np.arange(count) + offset) // block for count, offset in zip(grid, shift, strict=True)]
    sizes = [int(line[-1]) + 1 for line in lattice]
    number = np.ravel_multi_index(np.meshgrid(*lattice, indexing="ij"), sizes).ravel()
    return draw.permutation(math.prod(sizes))[number] + luck
