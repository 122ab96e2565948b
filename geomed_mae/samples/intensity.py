"""Augmentation of values, as far as the modality's numbers allow; physical units in, physical units out.

What a number means decides. Where it means nothing by itself (MR, X-ray, ultrasound, unnamed volumes) scanners and
protocols differ by gain, offset and contrast, and so may crops: the changes of nnU-Net (Isensee et al. 2021,
s41592-020-01008-z, supplement), smaller and more often, because few labels are learned in short runs. Reflectances and
digital numbers of sunlight differ by illumination, view and haze: a common gain and a small one of each band, and no
contrast, so that ratios of bands keep their meaning. Hounsfield units, SUV, decibels, temperatures, heights are
measurements: noise and no more. The ranges are choices, not fits; benchmarks decide whether they serve.

Noise is white, of the standard deviation below which the modality itself says that there is nothing to be seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from geomed_mae.archives.statistics import ChannelStatistics
from geomed_mae.image import Channel
from geomed_mae.modalities import Modality

ARBITRARY_KINDS = ("mr", "xray", "ultrasound")
SUNLIT_KINDS = ("optical",)
CHANCE = 0.5
"""Share of the crops that each of the changes meets."""

GAIN = 0.15
"""Arbitrary units: largest relative change of the distance from the image's median; nnU-Net goes to 0.25."""
SHIFT = 0.15
"""Arbitrary units: largest shift, in the image's robust spread."""
GAMMA = 0.25
"""Arbitrary units: largest change of the logarithm of gamma; nnU-Net draws gamma from 0.7 to 1.5."""
BRIGHTNESS, BAND_BRIGHTNESS = 0.1, 0.03
"""Sunlight: largest relative change of all bands together, and of each by itself."""
QUIET = 0.02
"""Noise of a modality that states no floor, in the image's robust spread."""


@dataclass(frozen=True, slots=True)
class Intensity:
    """What may happen to the values of a channel.

    Attributes:
        how: "arbitrary", "sunlit" or "measured".
        noise: standard deviation of the noise; physical unit, or `relative` to the image's robust spread.
    """

    how: str
    noise: float
    relative: bool


def allowed(modality: Modality, channels: Sequence[Channel]) -> tuple[Intensity, ...]:
    """Return what a modality allows, one entry a channel."""
    found = []
    for channel in channels:
        # A unit that means something is left alone, whatever the channel is called: CT beside PET, quantitative MR.
        arbitrary = channel.kind in ARBITRARY_KINDS and modality.normalise.method == "image"
        arbitrary |= channel.kind == "ultrasound"
        how = "arbitrary" if arbitrary else "sunlit" if channel.kind in SUNLIT_KINDS else "measured"
        relative = modality.normalise.method == "image" or modality.noise_floor == 0
        found.append(Intensity(how, modality.noise_floor or QUIET, relative))
    return tuple(found)


def change(
    raw: np.ndarray,
    valid: np.ndarray,
    rules: Sequence[Intensity],
    statistics: Sequence[ChannelStatistics],
    rng: np.random.Generator,
) -> np.ndarray:
    """Return a crop with changed values, float32 (c, *s), 0 where not valid as before.

    Args:
        raw: float32 (c, *s), physical units.
        valid: bool (c, *s), which values mean something.
        rules: see `allowed`, one a channel.
        statistics: those of the whole image, one a channel.
        rng: of the sample; how many numbers are drawn from it depends on `rules` alone.
    """
    tossed, common = rng.random(4) < CHANCE, float(rng.uniform(-1, 1))
    out = np.empty_like(raw)
    for number, (rule, known) in enumerate(zip(rules, statistics, strict=True)):
        own, seed = rng.uniform(-1, 1, size=3), int(rng.integers(2**63))
        values = raw[number]
        if rule.how == "arbitrary":
            values = _rescaled(values, known, own * tossed[:3])
        elif rule.how == "sunlit" and tossed[0]:
            values = values * np.float32((1 + BRIGHTNESS * common) * (1 + BAND_BRIGHTNESS * own[0]))
        if tossed[3]:
            # A generator of its own, so that crops of any size leave `rng` where it was.
            noise = np.random.Generator(np.random.Philox(seed)).standard_normal(values.shape, dtype=np.float32)
            values = values + np.float32(rule.noise * (known.spread if rule.relative else 1.0) * abs(own[2])) * noise
        out[number] = np.where(valid[number], values, np.float32(0))
    return out


def _rescaled(values: np.ndarray, known: ChannelStatistics, change: np.ndarray) -> np.ndarray:
    """Change gain, offset and gamma by `change` (3,), each -1 to 1; gamma bends what lies between p0.5 and p99.5."""
    span = known.p995 - known.p005
    if span > 0 and change[2]:
        share = (values - np.float32(known.p005)) / np.float32(span)
        bent = np.clip(share, 0, 1) ** np.float32(np.exp(GAMMA * change[2]))
        values = np.float32(known.p005) + np.float32(span) * np.where((share > 0) & (share < 1), bent, share)
    gain, shift = np.float32(1 + GAIN * change[0]), np.float32(SHIFT * change[1] * known.spread)
    return np.float32(known.median) + gain * (values - np.float32(known.median)) + shift
