"""The input contract: what numbers a model was trained on, so that nobody feeds it others by mistake.

A contract says for each channel of each modality its physics, its unit and how physical values become model units:
`(value - center) / scale`, clipped to the modality's range before, exactly 0 where invalid. Method `fixed` carries the
two numbers; method `image` takes median and robust spread of each image and channel (arbitrary units such as MR).
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel

if TYPE_CHECKING:
    from geomed_mae.archives.statistics import ChannelStatistics
    from geomed_mae.modalities import Modality

SMALLEST_FLOOR = 0.02
"""Noise floor in model units of a modality that states none: 2 % of the channel's spread."""

INSTRUMENT_KINDS = ("optical", "thermal", "sar", "elevation")
"""Kinds whose channels come together from one instrument, so that a missing one is worth an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChannelContract:
    """One channel of one modality.

    Attributes:
        modality: its name.
        channel: name, unit and physics.
        method: `fixed` or `image`.
        center, scale: of method `fixed`, in the channel's unit; 0 and 1 for `image`.
        noise_floor: standard deviation of noise in *model* units, at least SMALLEST_FLOOR.
        value_range: physical values are clipped to it; None does not clip.
    """

    modality: str
    channel: Channel
    method: str
    center: float
    scale: float
    noise_floor: float
    value_range: tuple[float, float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Contract:
    """All channels that a model knows, and what it was pretrained on.

    Attributes:
        channels: one entry a channel and modality.
        crop_2d, crop_3d: pretraining crops in pixels and voxels.
        pooling: how patch tokens become one vector: `mean`.
        fingerprint: keyed hash over the pretraining images' content keys.
        images, steps: number of pretraining images, and of steps over them.
    """

    channels: tuple[ChannelContract, ...]
    crop_2d: tuple[int, int] | None = None
    crop_3d: tuple[int, int, int] | None = None
    pooling: str = "mean"
    fingerprint: str = ""
    images: int = 0
    steps: int = 0

    def of(self, modality: str) -> tuple[ChannelContract, ...]:
        """Return the entries of `modality`.

        Raises:
            ConfigError: the model has never seen this modality.
        """
        found = tuple(entry for entry in self.channels if entry.modality == modality)
        if not found:
            known = ", ".join(sorted({entry.modality for entry in self.channels})) or "none"
            raise ConfigError(
                f"the model's contract has no modality '{modality}' (it has: {known}); read the images with one of "
                "these (--modality), or fine-tune the model on images of the new modality first"
            )
        return found

    def entries(self, modality: str, channels: Sequence[Channel]) -> tuple[ChannelContract, ...]:
        """Return the entry of each of `channels`, in their order; any subset of a modality's channels is fine.

        Raises:
            ConfigError: unknown modality or channel, or a unit other than the contract's where numbers of that unit
                scale it; channels scaled by each image's own may have any (PET of one archive is in g/ml or Bq/ml).
        """
        known = {entry.channel.name: entry for entry in self.of(modality)}
        unknown = [channel.name for channel in channels if channel.name not in known]
        if unknown:
            raise ConfigError(
                f"channels {unknown} of modality '{modality}' are not in the model's contract, which has "
                f"{list(known)}; "
                "select known channels, or fine-tune the model with the new ones"
            )
        for channel in channels:
            entry = known[channel.name]
            unit = entry.channel.unit
            if channel.unit != unit and entry.method != "image":
                raise ConfigError(
                    f"channel '{channel.name}' of modality '{modality}' is in {channel.unit}, the model expects "
                    f"{unit}; convert it, or state the scale and offset that give {unit} in the modality file"
                )
        return tuple(known[channel.name] for channel in channels)

    def require_complete(self, modality: str, channels: Sequence[Channel]) -> None:
        """Refuse images that lack channels of an instrument whose channels come together.

        Raises:
            ConfigError: with the missing channels and the way to do without them on purpose.
        """
        have = {channel.name for channel in channels}
        wanted = [entry.channel for entry in self.of(modality) if entry.channel.kind in INSTRUMENT_KINDS]
        missing = [channel.name for channel in wanted if channel.name not in have]
        if missing:
            raise ConfigError(
                f"the image lacks channels {missing} of modality '{modality}', which the model was trained with; to do "
                f"without them name the channels to use: channels={sorted(have)}, or on the command line "
                f"--channels {','.join(sorted(have))}"
            )

    def usable(self, modality: str, channels: Sequence[Channel], wanted: Sequence[str] = ()) -> None:
        """Refuse, before a pixel is read, an image of which the `wanted` channels cannot be used; none wants all.

        Raises:
            ConfigError: a wanted channel is not there, one of an instrument's is missing, or as `entries`.
        """
        if not wanted:
            self.require_complete(modality, channels)
        have = [channel.name for channel in channels]
        if missing := [name for name in wanted if name not in have]:
            raise ConfigError(
                f"an image of modality '{modality}' has no channels {missing} (it has: {', '.join(have)}); nothing is "
                "ever filled in for them: name channels that all images have"
            )
        self.entries(modality, [channel for channel in channels if not wanted or channel.name in wanted])

    def extended(self, more: Sequence[ChannelContract]) -> Contract:
        """Return the contract with `more` entries; those that it has already stay as they are."""
        known = {(entry.modality, entry.channel.name) for entry in self.channels}
        new = tuple(entry for entry in more if (entry.modality, entry.channel.name) not in known)
        return replace(self, channels=self.channels + new)

    def to_json(self) -> str:
        """Return the contract as a JSON object."""
        data = asdict(self)
        for entry in data["channels"]:
            entry["channel"] = {key: value for key, value in entry["channel"].items() if value is not None}
        return json.dumps(data, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Contract:
        """Read what `to_json` wrote.

        Raises:
            ConfigError: it is not a contract, or one of a newer version.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            entries = tuple(
                ChannelContract(**{**_tuples(entry), "channel": Channel(**entry["channel"])})
                for entry in data.pop("channels")
            )
            for entry in entries:
                _check_scale(entry)
            return cls(channels=entries, **_tuples(data))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ConfigError(f"contract.json is not a contract that this version can read: {error}") from error


def channel_names(given: str | Sequence[str] | None) -> tuple[str, ...]:
    """Return names of channels, given one by one or as text with commas; () where nothing is given.

    Raises:
        ConfigError: a name is empty or there twice.
    """
    if not given:
        return ()
    names = tuple(part.strip() for part in (given.split(",") if isinstance(given, str) else given))
    if not all(names) or len(set(names)) < len(names):
        raise ConfigError(f"{','.join(names)!r} are no different names of channels, such as B08,B12")
    return names


def _check_scale(entry: ChannelContract) -> None:
    """Make sure that an entry that was read from a file scales values to finite numbers.

    Raises:
        ValueError, TypeError: it does not.
    """
    numbers = (entry.center, entry.scale, entry.noise_floor, *(entry.value_range or ()))
    if not all(math.isfinite(number) for number in numbers) or entry.scale <= 0:
        raise ValueError(f"channel {entry.channel.name} is scaled by {entry.center}, {entry.scale}")


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}


def contract_entries(
    modality: Modality,
    channels: Sequence[Channel],
    statistics_of_images: Sequence[Sequence[ChannelStatistics]],
) -> tuple[ChannelContract, ...]:
    """Settle how `channels` of a modality are scaled.

    Args:
        modality: says the method, range and noise floor.
        channels: to make entries for.
        statistics_of_images: per image one ChannelStatistics a channel, in the order of `channels`; used by method
            `archive` alone, which becomes `fixed` with the median of the medians and the median of the spreads.

    Raises:
        ConfigError: method `archive` without any image's statistics.
    """
    rule = modality.normalise
    if rule.method == "archive" and not statistics_of_images:
        raise ConfigError(f"modality '{modality.name}' is scaled by its archive, but no image's statistics are given")
    entries = []
    for index, channel in enumerate(channels):
        center, scale = (rule.center, rule.scale) if rule.method == "fixed" else (0.0, 1.0)
        if rule.method == "archive":
            center = float(median(image[index].median for image in statistics_of_images))
            scale = float(median(image[index].spread for image in statistics_of_images))
        entries.append(
            ChannelContract(
                modality=modality.name,
                channel=channel,
                method="image" if rule.method == "image" else "fixed",
                center=center,
                scale=scale,
                noise_floor=max(modality.noise_floor / scale, SMALLEST_FLOOR),
                value_range=modality.value_range,
            )
        )
    return tuple(entries)


def scaling(
    entries: Sequence[ChannelContract], statistics: Sequence[ChannelStatistics] | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (center, scale, noise floor), each float32 (c,), for one image.

    Args:
        entries: one a channel.
        statistics: the image's own, one a channel; needed by method `image`.

    Raises:
        ConfigError: method `image` without statistics.
    """
    if statistics is None and any(entry.method == "image" for entry in entries):
        names = [entry.channel.name for entry in entries if entry.method == "image"]
        raise ConfigError(f"channels {names} are scaled by each image's own statistics, which are not given")
    own = statistics or [None] * len(entries)
    pairs = [
        (mine.median, mine.spread) if entry.method == "image" and mine is not None else (entry.center, entry.scale)
        for entry, mine in zip(entries, own, strict=True)
    ]
    center, scale = np.array(pairs, dtype=np.float32).T
    return center, scale, np.array([entry.noise_floor for entry in entries], dtype=np.float32)


def normalise(
    raw: Float[Tensor, "b c *space"],
    valid: Bool[Tensor, "#b #c *space"],
    center: Float[Tensor, "#b c"],
    scale: Float[Tensor, "#b c"],
    ranges: Sequence[tuple[float, float] | None] | None = None,
) -> Float[Tensor, "b c *space"]:
    """Turn physical values into model units, in fp32; exactly 0 where invalid, whatever stood there.

    Args:
        raw: physical values.
        valid: which of them mean something.
        center: per sample and channel, in the channel's unit.
        scale: the same.
        ranges: per channel (lowest, highest) physical value to clip to, or None.
    """
    shape = (*center.shape, *(1,) * (raw.ndim - 2))
    values = raw.float()
    if ranges is not None and any(ranges):
        open_range = (-float("inf"), float("inf"))
        limits = torch.tensor([pair or open_range for pair in ranges], device=raw.device).float()
        low, high = limits.T.reshape(2, 1, -1, *shape[2:])
        values = torch.minimum(torch.maximum(values, low), high)
    values = (values - center.float().reshape(shape)) / scale.float().reshape(shape)
    return torch.where(valid, values, torch.zeros_like(values))
