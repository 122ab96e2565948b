"""Channel codes: from a channel's physics to the coefficients of its filters.

A Channel is described by fixed features of its physics and by learned embeddings over closed vocabularies:

- optical, thermal: sine and cosine of the central wavelength *in nanometres* (base 10000). In micrometres the same
  formula makes Sentinel-2's B4 and B5 equal to four digits, a fault of several published models; log bandwidth beside;
- sar: log frequency, polarisation;
- mr: log repetition, echo and inversion time, sequence;  ct: tube voltage;
- every kind: an embedding of the kind;
- channels that physics cannot tell apart ("band 3 of 8") have an ordinal, and with it a learned code of their own.

The n-th of several channels with equal physics gets ordinal n, unless its name ends in a number (band3), which then
is the ordinal, so that a selection of unnamed bands keeps its codes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geomed_mae.errors import ConfigError
from geomed_mae.image import CHANNEL_KINDS, Channel

WAVELENGTH_WIDTH = 128
"""Sines and cosines of the wavelength; periods run from 6 nm to 54 um."""

POLARISATIONS = ("none", "VV", "VH", "HV", "HH")
SEQUENCES = (
    *("none", "t1", "t2", "pd", "flair", "stir", "t2star", "swi", "dwi", "adc", "bold", "asl", "tof", "mra"),
    *("se", "gr", "ir", "ep", "rm", "other"),
)
"""MR contrasts by their common names, and the values of Scanning Sequence (0018,0020); anything else is `other`."""

ORDINALS = 1024
"""Channels that physics cannot tell apart, at most."""

EMBEDDING_WIDTH = 16
CODE_WIDTH = 64
TYPICAL = {"bandwidth_nm": 50.0, "radar_ghz": 5.0, "repetition_time_ms": 1000.0, "echo_time_ms": 30.0}
TYPICAL |= {"inversion_time_ms": 1000.0, "tube_kv": 110.0}
"""Descriptors that enter as log(value / typical value), beside a flag that says whether the value is known."""


def wavelength_code(wavelength_nm: float | None) -> list[float]:
    """Return sines, then cosines, of the wavelength in nm; zeros for None (the transformer's formula, base 10000)."""
    if wavelength_nm is None:
        return [0.0] * WAVELENGTH_WIDTH
    half = WAVELENGTH_WIDTH // 2
    angles = [wavelength_nm / 10000 ** (index / half) for index in range(half)]
    return [math.sin(angle) for angle in angles] + [math.cos(angle) for angle in angles]


def describe(channel: Channel) -> list[float]:
    """Return the fixed features of a channel's physics.

    Raises:
        ConfigError: the kind needs a descriptor that the channel does not have; nothing is ever guessed for it.
    """
    if channel.kind in ("optical", "thermal") and channel.wavelength_nm is None:
        raise ConfigError(
            f"channel '{channel.name}' is {channel.kind} but has no wavelength; give its wavelength_nm in the modality "
            "file, or make its kind 'unnamed' to learn a code for it"
        )
    if channel.kind == "sar" and (channel.polarisation or "").upper() not in POLARISATIONS[1:]:
        raise ConfigError(
            f"channel '{channel.name}' is sar but its polarisation is {channel.polarisation!r}; give one of "
            f"{', '.join(POLARISATIONS[1:])} in the modality file"
        )
    features = wavelength_code(channel.wavelength_nm)
    for name, typical in TYPICAL.items():
        value = getattr(channel, name)
        known = value is not None and value > 0
        features += [math.log(value / typical) if known else 0.0, float(known)]
    return features


def _words(channel: Channel) -> tuple[int, int, int]:
    """Return the vocabulary indices of (kind, polarisation, sequence)."""
    polarisation = (channel.polarisation or "none").upper() if channel.kind == "sar" else "none"
    sequence = "none" if channel.sequence is None else re.sub(r"[^a-z0-9]", "", channel.sequence.casefold())
    return (
        CHANNEL_KINDS.index(channel.kind),
        POLARISATIONS.index(polarisation),
        SEQUENCES.index(sequence if sequence in SEQUENCES else "other"),
    )


def ordinals(channels: Sequence[Channel]) -> list[int]:
    """Return one number a channel that tells channels of equal physics apart (module docstring).

    Raises:
        ConfigError: two channels have the same ordinal, or there are more than ORDINALS of them.
    """
    physics = [(*describe(channel), *_words(channel)) for channel in channels]
    result: list[int] = []
    for index, (channel, own) in enumerate(zip(channels, physics, strict=True)):
        number = re.search(r"(\d+)$", channel.name)
        twins = physics.count(own) > 1 or channel.kind == "unnamed"
        named = number and twins and int(number[1]) < ORDINALS
        result.append(int(number[1]) if number and named else physics[:index].count(own))
    if len(set(zip(physics, result, strict=True))) < len(channels) or max(result, default=0) >= ORDINALS:
        raise ConfigError(
            f"channels {[channel.name for channel in channels]} cannot be told apart (or number over {ORDINALS}): give "
            "them physics (wavelength_nm, polarisation, sequence ...) or names that end in different numbers"
        )
    return result


def _encode(channels: tuple[Channel, ...]) -> tuple[Tensor, Tensor]:
    """Return (fixed features (c, f), vocabulary indices (c, 4)) on the CPU.

    About a millisecond for a dozen channels; constants of the graph where a step is compiled.
    """
    if not channels:
        raise ConfigError("an image needs at least one channel")
    words = [(*_words(channel), ordinal) for channel, ordinal in zip(channels, ordinals(channels), strict=True)]
    return torch.tensor([describe(channel) for channel in channels]), torch.tensor(words)


class ChannelCodes(nn.Module):
    """Network from channels to the coefficients (c, basis) of their filters; rows have unit length.

    Unit length makes every channel's weights equally large at the start, whatever its physics. tanh, an odd function,
    keeps codes of unrelated channels uncorrelated (a GELU's mean would align them all).
    """

    def __init__(self, basis: int) -> None:
        super().__init__()
        self.kind = nn.Embedding(len(CHANNEL_KINDS), EMBEDDING_WIDTH)
        self.polarisation = nn.Embedding(len(POLARISATIONS), EMBEDDING_WIDTH)
        self.sequence = nn.Embedding(len(SEQUENCES), EMBEDDING_WIDTH)
        self.ordinal = nn.Embedding(ORDINALS, EMBEDDING_WIDTH)
        fixed = WAVELENGTH_WIDTH + 2 * len(TYPICAL)
        self.code = nn.Linear(fixed + 4 * EMBEDDING_WIDTH, CODE_WIDTH)
        self.coefficients = nn.Linear(CODE_WIDTH, basis)
        for linear in (self.code, self.coefficients):
            nn.init.xavier_normal_(linear.weight)
            nn.init.zeros_(linear.bias)

    def codes(self, channels: Sequence[Channel]) -> Float[Tensor, "c code"]:
        """Return the hidden code of each channel.

        Raises:
            ConfigError: a channel lacks the physics its kind needs, or two cannot be told apart.
        """
        fixed, words = (part.to(self.code.weight.device) for part in _encode(tuple(channels)))
        vocabularies = (self.kind, self.polarisation, self.sequence, self.ordinal)
        learned = [vocabulary(words[:, index]) for index, vocabulary in enumerate(vocabularies)]
        return torch.tanh(self.code(torch.cat([fixed, *learned], dim=-1)))

    def forward(self, channels: Sequence[Channel]) -> Float[Tensor, "c basis"]:
        """Return the coefficients of each channel."""
        return nn.functional.normalize(self.coefficients(self.codes(channels)), dim=-1)

    @torch.no_grad()
    def pin(self, channels: Sequence[Channel]) -> None:
        """Change the last layer so that channel i of `channels` has coefficient 1 on basis filter i and 0 elsewhere.

        The smallest such change (least squares over the codes), so that other channels keep what can be kept.

        Raises:
            ConfigError: more channels than basis filters.
        """
        if len(channels) > self.coefficients.out_features:
            raise ConfigError(
                f"{len(channels)} channels do not fit in {self.coefficients.out_features} basis filters: raise basis"
            )
        codes = self.codes(channels).double()
        wanted = torch.eye(self.coefficients.out_features, dtype=torch.float64)[: len(channels)].to(codes.device)
        error = wanted - codes @ self.coefficients.weight.double().T - self.coefficients.bias.double()
        self.coefficients.weight += (torch.linalg.pinv(codes) @ error).T.float()
