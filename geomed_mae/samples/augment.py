"""Symmetries: the flips and quarter turns that a modality allows, drawn without state and applied to a crop.

Geometry only, values are never changed: intensities are physical quantities here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Num
from torch import Tensor

SPATIAL = ("z", "y", "x")
"""Names of the spatial axes; a 2D crop has the last two."""


@dataclass(frozen=True, slots=True)
class Symmetry:
    """Axes to mirror (negative, counted from the last) and the number of quarter turns in the (row, column) plane."""

    mirrored: tuple[int, ...] = ()
    quarter_turns: int = 0

    def apply(self, array: np.ndarray) -> np.ndarray:
        """Return `array` (..., [z,] y, x) mirrored and turned; contiguous."""
        return np.ascontiguousarray(self.view(array))

    def view(self, array: np.ndarray) -> np.ndarray:
        """Return `array` (..., [z,] y, x) mirrored and turned, without a copy."""
        turned = np.rot90(array, self.quarter_turns, axes=(-2, -1)) if self.quarter_turns else array
        return np.flip(turned, self.mirrored) if self.mirrored else turned

    def turn(self, values: Num[Tensor, "*batch y x"]) -> Num[Tensor, "*batch y x"]:
        """Return `values` (..., [z,] y, x) mirrored and turned as `view` does it."""
        moved = torch.rot90(values, self.quarter_turns, (-2, -1)) if self.quarter_turns else values
        return torch.flip(moved, self.mirrored) if self.mirrored else moved

    def spacing(self, spacing: Sequence[float]) -> tuple[float, ...]:
        """Return the spacing ([z,] y, x) after the turn: an odd number of quarter turns exchanges rows and columns."""
        if self.quarter_turns % 2 == 0:
            return tuple(spacing)
        return (*spacing[:-2], spacing[-1], spacing[-2])


def draw_symmetry(rng: np.random.Generator, allowed: Sequence[str], crop: Sequence[int]) -> Symmetry:
    """Draw one symmetry uniformly from those that `allowed` ("y", "x", "z", "rot90") generates for this crop.

    Turns are drawn for square crops only: others would leave the batch's shape. The same count of random numbers is
    used whatever is allowed, so that later draws of the same generator do not depend on it.
    """
    coins = rng.random(len(SPATIAL))
    turn = int(rng.integers(4))
    names = SPATIAL[-len(crop) :]
    mirrored = tuple(
        names.index(name) - len(names)
        for name, coin in zip(SPATIAL, coins, strict=True)
        if name in names and name in allowed and coin < 0.5
    )
    square = crop[-2] == crop[-1]
    return Symmetry(mirrored, turn if "rot90" in allowed and square else 0)
