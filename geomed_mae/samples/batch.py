"""Batch: the crops of one optimiser step, all of one modality, one channel list and one number of axes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geomed_mae.archives.statistics import ChannelStatistics
from geomed_mae.image import Channel


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Crops in physical units with the physics to read them.

    Attributes:
        raw: (b, c, [z,] y, x) float32 in the channels' physical units; 0 where not `valid`.
        valid: (b, c, [z,] y, x); False is nodata or padding of an image smaller than the crop.
        channels: one entry a channel of `raw`.
        modality: name of the modality of every crop.
        spacing: (b, axes) distance between samples, metres for rasters and mm for the others, or None where unknown.
        keys: the image of every crop, an opaque key.
        statistics: per crop, the ChannelStatistics of its whole image (one a channel).
        step: number of the step that the batch is made for.
        failed: "key: reason" of images that were drawn but could not be read; others were drawn in their place.
    """

    raw: Float[Tensor, "b c *s"]
    valid: Bool[Tensor, "b c *s"]
    channels: tuple[Channel, ...]
    modality: str
    spacing: Float[Tensor, "b axes"] | None
    keys: tuple[str, ...]
    statistics: tuple[tuple[ChannelStatistics, ...], ...]
    step: int
    failed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return self.raw.shape[0]

    @property
    def valid_fraction(self) -> float:
        """Share of valid pixels, 0 to 1."""
        return float(self.valid.float().mean())

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch with its tensors on `device`; copies from pinned memory do not block."""
        spacing = None if self.spacing is None else self.spacing.to(device, non_blocking=True)
        return replace(
            self,
            raw=self.raw.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            spacing=spacing,
        )

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory (called by torch's DataLoader)."""
        spacing = None if self.spacing is None else self.spacing.pin_memory()
        return replace(self, raw=self.raw.pin_memory(), valid=self.valid.pin_memory(), spacing=spacing)
