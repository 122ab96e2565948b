"""Channel codes: from a channel's physics to the coefficients of its filters.

A Channel is described by fixed features of its physics and by learned embeddings over closed vocabularies:

- optical, thermal: sines and cosines of the logarithm of the central wavelength, and the log bandwidth. (The
  transformer's formula over micrometres, as in several published models, makes Sentinel-2's B4 and B5 equal to four
  digits);
- sar: log frequency, polarisation;
- mr: log repetition, echo and inversion time, sequence;  ct: tube voltage;
- every kind: an embedding of the kind;
- channels that physics cannot tell apart ("band 3 of 8") have an ordinal, and with it a learned code of their own.

The n-th of several channels with equal physics gets ordinal n, unless its name ends in a number (band3), which then
is the ordinal, so that a selection of unnamed bands keeps its codes.
"""

from __future__ import annotations

import bisect
import math
import re
from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geomed_mae.errors import ConfigError
from geomed_mae.image import CHANNEL_KINDS, Channel

WAVELENGTH_WIDTH = 128
WAVELENGTH_PERIODS = (0.15, 2.0)
"""Shortest and longest period of the sines and cosines, in the natural logarithm of the wavelength.

The transformer's formula (periods from 6 nm to 54 um) hashes: a wavelength between two bands was not between them in
half of the gaps of Sentinel-2, and a third of its features are all but constant from blue to short-wave infrared, so
that all bands start with nearly the same filters. With periods of 16 % to a factor of 7 in wavelength seven gaps of
eight hold, and the mean cosine of its bands' coefficients falls from 0.57 to 0.07 (8 seeds; the words of `ChannelCodes`
have a part in it).
"""
SHORTEST_NM = 100.0
"""Below it, a wavelength is taken for micrometres or for a mistake; optical sensors see from the ultraviolet on."""

POLARISATIONS = ("none", "VV", "VH", "HV", "HH")
SEQUENCES = (
    *("none", "t1", "t2", "pd", "flair", "stir", "t2star", "swi", "dwi", "adc", "bold", "asl", "tof", "mra"),
    *("se", "gr", "ir", "ep", "rm", "other"),
)
"""MR contrasts by their common names, and the values of Scanning Sequence (0018,0020); anything else is `other`."""

ORDINALS = 1024
"""Channels that physics cannot tell apart, at most."""

CHANNEL_LISTS = 1024
"""Lists of channels whose features are kept; an archive has a few."""

EMBEDDING_WIDTH = 16
CODE_WIDTH = 64
SEPARABLE = 1e-4
"""Relative difference of codes below which `ChannelCodes.pin` takes them for the same."""

TYPICAL = {"bandwidth_nm": 50.0, "radar_ghz": 5.0, "repetition_time_ms": 1000.0, "echo_time_ms": 30.0}
TYPICAL |= {"inversion_time_ms": 1000.0, "tube_kv": 110.0}
"""Descriptors that enter as log(value / typical value), beside a flag that says whether the value is known."""


def wavelength_code(wavelength_nm: float | None) -> list[float]:
    """Return sines, then cosines, of the logarithm of the wavelength in nm; zeros for None."""
    if wavelength_nm is None:
        return [0.0] * WAVELENGTH_WIDTH
    half = WAVELENGTH_WIDTH // 2
    shortest, longest = WAVELENGTH_PERIODS
    periods = [shortest * (longest / shortest) ** (index / (half - 1)) for index in range(half)]
    angles = [2 * math.pi * math.log(wavelength_nm) / period for period in periods]
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
    nm = channel.wavelength_nm
    if nm is not None and not SHORTEST_NM <= nm < math.inf:
        raise ConfigError(
            f"channel '{channel.name}' has a wavelength of {nm} nm, which is none of an image's; give wavelength_nm in "
            f"nanometres, {SHORTEST_NM:.0f} or more (665 for red)"
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

    About a millisecond for a dozen channels, 16 for two hundred.
    """
    if not channels:
        raise ConfigError("an image needs at least one channel")
    words = [(*_words(channel), ordinal) for channel, ordinal in zip(channels, ordinals(channels), strict=True)]
    return torch.tensor([describe(channel) for channel in channels]), torch.tensor(words)


@lru_cache(maxsize=CHANNEL_LISTS)
def _encode_once(channels: tuple[Channel, ...]) -> tuple[Tensor, Tensor]:
    """Return what `_encode` returns, kept. Whoever asks first may be in inference mode, and training may ask next."""
    with torch.inference_mode(False):
        return _encode(channels)


class ChannelCodes(nn.Module):
    """Network from channels to the coefficients (c, basis) of their filters; rows have unit length.

    Unit length makes every channel's weights equally large at the start, whatever its physics. tanh, an odd function,
    keeps codes of unrelated channels uncorrelated (a GELU's mean would align them all).
    """

    def __init__(self, basis: int) -> None:
        super().__init__()
        self.kind = nn.Embedding(len(CHANNEL_KINDS), EMBEDDING_WIDTH)
        # What all channels of an image have in common makes their filters alike: "none" (0) is no information, so a
        # zero vector, and the kind speaks half as loud as what differs.
        nn.init.normal_(self.kind.weight, std=0.5)
        self.polarisation = nn.Embedding(len(POLARISATIONS), EMBEDDING_WIDTH, padding_idx=0)
        self.sequence = nn.Embedding(len(SEQUENCES), EMBEDDING_WIDTH, padding_idx=0)
        self.ordinal = nn.Embedding(ORDINALS, EMBEDDING_WIDTH, padding_idx=0)
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
        # Under torch.compile the physics are constants of the graph, and a cache would only be in the way.
        encode = _encode if torch.compiler.is_compiling() else _encode_once
        fixed, words = (part.to(self.code.weight.device) for part in encode(tuple(channels)))
        vocabularies = (self.kind, self.polarisation, self.sequence, self.ordinal)
        learned = [vocabulary(words[:, index]) for index, vocabulary in enumerate(vocabularies)]
        return torch.tanh(self.code(torch.cat([fixed, *learned], dim=-1)))

    def forward(self, channels: Sequence[Channel]) -> Float[Tensor, "c basis"]:
        """Return the coefficients of each channel, in fp32 whatever autocast says (see `mixed`)."""
        with torch.autocast(self.code.weight.device.type, enabled=False):
            return nn.functional.normalize(self.coefficients(self.codes(channels)), dim=-1)

    @torch.no_grad()
    def pin(
        self,
        channels: Sequence[Channel],
        others: Sequence[Sequence[Channel]] = (),
        rows: Float[Tensor, "o basis"] | None = None,
    ) -> None:
        """Change the last layer so that channel i of `channels` has coefficient 1 on basis filter i and 0 elsewhere.

        The smallest such change (least squares over the codes), so that other channels keep what can be kept.

        Args:
            channels: of one image; told apart exactly.
            others: further channels, one sequence an image, that are given coefficients too. They use what freedom
                `channels` leave, so that these stay exact; beyond CODE_WIDTH channels altogether, or where wavelengths
                all but coincide, others are met as well as least squares can.
            rows: the coefficients of all `others`, in their order, each of unit length.

        Raises:
            ConfigError: more channels than basis filters, or than codes can tell apart.
        """
        if len(channels) > self.coefficients.out_features:
            raise ConfigError(
                f"{len(channels)} channels do not fit in {self.coefficients.out_features} basis filters: raise basis"
            )
        codes = self.codes(channels).double()
        if int(torch.linalg.matrix_rank(codes, rtol=SEPARABLE)) < len(channels):
            raise ConfigError(
                f"these {len(channels)} channels cannot all be given filters of their own: at most {CODE_WIDTH} can, "
                "and only where their physics differ; leave some out"
            )
        wanted = torch.eye(self.coefficients.out_features, dtype=torch.float64)[: len(channels)].to(codes.device)
        inverse = torch.linalg.pinv(codes)
        change = inverse @ (wanted - self._answer(codes))
        if others and rows is not None:
            more = torch.cat([self.codes(image) for image in others]).double()
            free = more - more @ inverse @ codes  # what the change for `channels` cannot see
            error = rows.double().to(codes.device) - self._answer(more) - more @ change
            # Absolute: where all others have the codes of `channels`, nothing is free and rounding must not count.
            change += torch.linalg.pinv(free, atol=SEPARABLE * float(more.norm()), rtol=0.0) @ error
        self.coefficients.weight += change.T.float()

    def _answer(self, codes: Float[Tensor, "c code"]) -> Float[Tensor, "c basis"]:
        """Return the coefficients before they are given unit length, in float64."""
        return codes @ self.coefficients.weight.double().T + self.coefficients.bias.double()


def blend(known: Sequence[Channel], new: Sequence[Channel]) -> Float[Tensor, "n k"]:
    """Return, for each new channel, the shares (0 to 1, sum 1) of the known channels that its first filter is made of.

    Channels with a wavelength: linear interpolation along it between the known channels; beyond their ends the last one
    alone. The others (radar, MR, CT ...): equal shares of the known channels of the same kind, or else of all. A grey
    picture shown to an RGB model on all three channels, the usual first step with such images, is just that.
    """
    lines = [place for place, channel in enumerate(known) if channel.wavelength_nm is not None]
    lines.sort(key=lambda place: known[place].wavelength_nm or 0.0)
    axis = [known[place].wavelength_nm or 0.0 for place in lines]
    shares = torch.zeros(len(new), len(known), dtype=torch.float64)
    for row, channel in zip(shares, new, strict=True):
        if channel.wavelength_nm is None or not lines:
            same = [place for place, other in enumerate(known) if other.kind == channel.kind]
            chosen = same or list(range(len(known)))
            row[chosen] = 1 / len(chosen)
            continue
        upper = bisect.bisect_left(axis, channel.wavelength_nm)
        if upper in (0, len(axis)):
            row[lines[min(upper, len(axis) - 1)]] = 1
            continue
        share = (channel.wavelength_nm - axis[upper - 1]) / (axis[upper] - axis[upper - 1])
        row[lines[upper - 1]], row[lines[upper]] = 1 - share, share
    return shares


def with_spare(shares: Float[Tensor, "n k"], basis: int) -> Float[Tensor, "n basis"]:
    """Return coefficients of unit length: the shares, and on basis filter k (a filter of zeros) what length is left.

    Args:
        shares: of filters 0 to k - 1, each row at most of unit length.
        basis: number of basis filters.

    Raises:
        ConfigError: no basis filter is left for the zeros.
    """
    known = shares.shape[1]
    if basis <= known:
        raise ConfigError(
            f"other channels beside {known} known ones need {known + 1} basis filters or more: raise basis"
        )
    rows = torch.nn.functional.pad(shares, (0, basis - known))
    rows[:, known] = (1 - shares.square().sum(1)).clamp(min=0).sqrt()
    return rows
