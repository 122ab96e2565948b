"""Batch: the crops of one optimiser step, all of one modality, one channel list and one number of axes.

Crops travel as the integers that the files hold, where these are known (half or a quarter of the bytes from a worker to
this process and from here to the device), and become physical values, turned and mirrored, where they arrive:
`Batch.to` and `Batch.physical` give what everything after them works on. The arithmetic is that of the readers, bit by
bit (see `piece`), on the CPU and on a device.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Num
from torch import Tensor

from geomed_mae.archives.statistics import ChannelStatistics
from geomed_mae.image import Channel
from geomed_mae.samples.augment import Symmetry

AT_ONCE = 1 << 26
"""Values converted at a time on a device: float64 on the way takes 512 MiB."""


@dataclass(frozen=True, slots=True, eq=False)
class Stored:
    """How to read the integers of a batch.

    Attributes:
        scale, offset: physical = float32(float64(number) * scale + offset), per crop and channel; on the CPU.
        symmetries: what each crop is still to be moved by.
    """

    scale: Float64[Tensor, "b c"]
    offset: Float64[Tensor, "b c"]
    symmetries: tuple[Symmetry, ...]

    @property
    def plain(self) -> bool:
        """Whether the numbers are the physical values."""
        return bool((self.scale == 1).all()) and not bool(self.offset.any())

    def part(self, first: int, stop: int) -> Stored:
        """Return what belongs to the crops `first` to `stop` - 1."""
        return Stored(self.scale[first:stop], self.offset[first:stop], self.symmetries[first:stop])


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Crops with the physics to read them. Tensors are to be read only: a batch may share them with another.

    Attributes:
        raw: (b, c, [z,] y, x); float32 in the channels' physical units, 0 where not `valid`, unless `stored` says how
            to make these of it.
        valid: (b, c, [z,] y, x); False is nodata or padding of an image smaller than the crop. Before `to` or
            `physical` one channel may stand for all.
        channels: one entry a channel of `raw`.
        modality: name of the modality of every crop.
        spacing: (b, axes) distance between samples, metres for rasters and mm for the others, or None where unknown.
        keys: the image of every crop, an opaque key.
        statistics: per crop, the ChannelStatistics of its whole image (one a channel).
        step: number of the step that the batch is made for.
        failed: "key: reason" of images that were drawn but could not be read; others were drawn in their place.
        samples: number of each crop within the step, over all processes; () where there is one process.
        stored: set while `raw` is integers as stored and not yet turned.
    """

    raw: Num[Tensor, "b c *s"]
    valid: Bool[Tensor, "b _ *s"]
    channels: tuple[Channel, ...]
    modality: str
    spacing: Float[Tensor, "b axes"] | None
    keys: tuple[str, ...]
    statistics: tuple[tuple[ChannelStatistics, ...], ...]
    step: int
    failed: tuple[str, ...] = ()
    samples: tuple[int, ...] = ()
    stored: Stored | None = None

    def __len__(self) -> int:
        return self.raw.shape[0]

    @property
    def valid_fraction(self) -> float:
        """Share of valid pixels, 0 to 1."""
        return float(self.valid.float().mean())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All tensors that computation uses."""
        return (self.raw, self.valid) if self.spacing is None else (self.raw, self.valid, self.spacing)

    def to(self, device: torch.device | str) -> Batch:
        """Return the batch in physical units with its tensors on `device`; copies from pinned memory do not block."""
        spacing = None if self.spacing is None else self.spacing.to(device, non_blocking=True)
        moved = replace(
            self,
            raw=self.raw.to(device, non_blocking=True),
            valid=self.valid.to(device, non_blocking=True),
            spacing=spacing,
        )
        return moved.physical()

    def physical(self) -> Batch:
        """Return the batch in physical units, turned, where it is; itself where it is so already."""
        raw, valid = self.raw, self.valid
        if self.stored is not None:
            raw, valid = read_on_cpu(self) if raw.device.type == "cpu" else read_on_device(self)
        if raw is self.raw and valid.shape == raw.shape:
            return self
        return replace(self, raw=raw, valid=valid.expand(raw.shape), stored=None)

    def pin_memory(self) -> Batch:
        """Return the batch in page-locked memory."""
        spacing = None if self.spacing is None else self.spacing.pin_memory()
        return replace(self, raw=self.raw.pin_memory(), valid=self.valid.contiguous().pin_memory(), spacing=spacing)

    def part(self, first: int, stop: int) -> Batch:
        """Return the crops `first` to `stop` - 1 as a batch of the same step, without a copy."""
        return replace(
            self,
            raw=self.raw[first:stop],
            valid=self.valid[first:stop],
            spacing=None if self.spacing is None else self.spacing[first:stop],
            keys=self.keys[first:stop],
            statistics=self.statistics[first:stop],
            samples=(self.samples or tuple(range(len(self))))[first:stop],
            stored=None if self.stored is None else self.stored.part(first, stop),
        )


def read_on_cpu(batch: Batch) -> tuple[Float[Tensor, "b c *s"], Bool[Tensor, "b _ *s"]]:
    """Return (physical values, validity) of a stored batch, channel by channel and each in one pass where that goes.

    In whole batches, as on a device, this takes several times as long: nothing would stay in a core's own cache.
    """
    stored, numbers, masks = batch.stored, batch.raw.numpy(), batch.valid.numpy()
    raw, valid = np.empty(numbers.shape, np.float32), np.empty(masks.shape, np.bool_)
    parts = zip(stored.scale.numpy(), stored.offset.numpy(), stored.symmetries, strict=True)
    for number, (scale, offset, symmetry) in enumerate(parts):
        valid[number] = symmetry.view(masks[number])
        for channel, values in enumerate(symmetry.view(numbers[number])):
            _read(values, scale[channel], offset[channel], raw[number, channel])
        if offset.any():
            np.copyto(raw[number], np.float32(0), where=~valid[number])
    return torch.from_numpy(raw), torch.from_numpy(valid)


def _read(numbers: np.ndarray, scale: float, offset: float, out: np.ndarray) -> None:
    """Write float32(float64(numbers) * scale + offset) into `out`."""
    if (scale, offset) == (1, 0):
        out[...] = numbers
        return
    with np.errstate(over="ignore"):  # what exceeds float32 is infinite, as for the readers
        if offset == 0 and scale > 0:  # a sum with 0 changes nothing but the sign of -0.0, which there is none of
            np.multiply(numbers, scale, out=out, dtype=np.float64, casting="same_kind")
        else:
            exact = np.multiply(numbers, scale, dtype=np.float64)
            exact += offset
            out[...] = exact


def read_on_device(batch: Batch) -> tuple[Float[Tensor, "b c *s"], Bool[Tensor, "b _ *s"]]:
    """Return (physical values, validity) of a stored batch with few operations over many crops; any device.

    Product and sum are operations of their own: fused, they would round once less than the readers do.
    """
    stored, device = batch.stored, batch.raw.device
    raw = torch.empty(batch.raw.shape, dtype=torch.float32, device=device)
    trailing = (1,) * (batch.raw.ndim - 2)
    scale, offset = (
        value.to(device, non_blocking=True).reshape(*value.shape, *trailing) for value in (stored.scale, stored.offset)
    )
    step = max(1, AT_ONCE // max(1, batch.raw[0].numel()))
    for first in range(0, len(batch), step):
        some = slice(first, first + step)
        numbers = batch.raw[some]
        raw[some] = numbers if stored.plain else numbers.to(torch.float64) * scale[some] + offset[some]
    raw.masked_fill_(~batch.valid, 0)
    return turned(raw, stored.symmetries), turned(batch.valid, stored.symmetries)


def turned(values: Num[Tensor, "b c *s"], symmetries: Sequence[Symmetry]) -> Num[Tensor, "b c *s"]:
    """Return each crop moved by its symmetry: crops of the same one together, so that a batch takes few operations."""
    groups: dict[Symmetry, list[int]] = {}
    for number, symmetry in enumerate(symmetries):
        groups.setdefault(symmetry, []).append(number)
    if set(groups) <= {Symmetry()}:
        return values
    out = torch.empty_like(values)
    order = torch.tensor([number for members in groups.values() for number in members]).to(values.device)
    first = 0
    for symmetry, members in groups.items():
        places = order[first : first + len(members)]
        out[places] = symmetry.turn(values[places])
        first += len(members)
    return out
