"""Which modality a raster's bands belong to, and which channel each band is: by what the file says, never by guess.

Order of evidence: band descriptions; colour interpretation (red, green, blue); and only where the user named the
modality, the number of bands. What nothing identifies becomes the unnamed modality when that is among the candidates
(as with "auto"), and is refused otherwise.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from geomed_mae.image import Channel
from geomed_mae.modalities import Modality
from geomed_mae.readers.plausible import reaches
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import quoted

ORDER_ASSUMED = "ORDER_ASSUMED"
"""Bands were named by their number: the file does not describe them, the user named the modality."""
BANDS_LEFT_OUT = "BANDS_LEFT_OUT"
"""The file also has bands that are no channels of the modality, such as quality maps or a rendered picture."""
MODALITY_AMBIGUOUS = "MODALITY_AMBIGUOUS"
"""The band names fit several modalities."""
MODALITY_UNNAMED = "MODALITY_UNNAMED"
"""Nothing says what the numbers mean."""

_GENERIC = re.compile(r"(bands?|layer|channel|gray|grey)?[ _-]?\d*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Bands:
    """What a file says of its bands without alpha: `names` (None: undescribed), `colours`, `numbers` (from 1)."""

    names: tuple[str | None, ...]
    colours: tuple[str, ...]
    numbers: tuple[int, ...]
    dtype: str

    @property
    def nameless(self) -> bool:
        """Whether the descriptions identify nothing: absent, all the same, or mere numbers."""
        names = [name for name in self.names if name]
        return len(set(names)) < min(2, len(self.names)) or all(_GENERIC.fullmatch(name.strip()) for name in names)


@dataclass(frozen=True, slots=True)
class Choice:
    """A modality, the bands that are its channels (numbers from 1), one channel each, and flags for the index."""

    modality: Modality
    channels: tuple[Channel, ...]
    numbers: tuple[int, ...]
    flags: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class NoChoice:
    """Why no candidate fits."""

    reason: Reason
    detail: str


def choose(bands: Bands, candidates: Sequence[Modality]) -> Choice | NoChoice:
    """Choose the modality of a raster among `candidates` and name its bands.

    Bands that a modality leaves out are left out only where the user named it: among unnamed candidates they would be
    channels like any other.
    """
    rasters = [m for m in candidates if m.geometry == "raster" and not {"geotiff", "jp2"}.isdisjoint(m.formats)]
    named = [m for m in rasters if m.channels]
    unnamed = next((m for m in rasters if not m.channels), None)
    if not rasters:
        names = ", ".join(m.name for m in candidates)
        return NoChoice(Reason.MODALITY_MISMATCH, f"none of the chosen modalities ({names}) comes as GeoTIFF")
    fits = _fits(bands, named, open_ended=unnamed is not None)
    found = _pick(fits) if fits else None
    if found is not None:
        return found
    if unnamed is None and (rest := _without_left_out(bands, named)) is not None:
        chosen = choose(rest, candidates)
        return replace(chosen, flags=(*chosen.flags, BANDS_LEFT_OUT)) if isinstance(chosen, Choice) else chosen
    if unnamed is not None:
        flags = (MODALITY_UNNAMED, MODALITY_AMBIGUOUS) if fits else (MODALITY_UNNAMED,)
        channels = tuple(Channel(name=f"band{n}", unit=unnamed.unit) for n in bands.numbers)
        return Choice(unnamed, channels, bands.numbers, flags)
    if fits:
        several = ", ".join(choice.modality.name for choice in fits)
        return NoChoice(Reason.MODALITY_MISMATCH, f"its bands fit {several}; name one of them")
    return _by_count(bands, named)


def _fits(bands: Bands, named: Sequence[Modality], *, open_ended: bool) -> list[Choice]:
    """Return the modalities that know every band by its description, or else by its colour."""
    plausible = [m for m in named if not open_ended or (_holds(m, bands.dtype) and not _scenes_only(m))]
    # "band1", "band2" are names of Landsat's bands only where the user says that it is Landsat.
    if all(bands.names) and not (open_ended and bands.nameless):
        fits = [Choice(m, channels, bands.numbers) for m in plausible if (channels := _channels(m, bands.names))]
        if fits:
            return fits
    if not bands.nameless or (open_ended and bands.dtype != "uint8"):
        return []
    # Colours say too little to be part of a larger set: GDAL also gives them to previews of anything.
    by_colour = [(m, _channels(m, bands.colours)) for m in plausible if len(m.channels) == len(bands.colours)]
    return [Choice(m, channels, bands.numbers) for m, channels in by_colour if channels]


def _without_left_out(bands: Bands, named: Sequence[Modality]) -> Bands | None:
    """Return the bands that no modality leaves out; None where that are all of them, or none."""
    kept = [at for at, name in enumerate(bands.names) if not (name and any(m.leaves_out(name) for m in named))]
    if len(kept) in (0, len(bands.names)):
        return None
    names, colours, numbers = (tuple(part[at] for at in kept) for part in (bands.names, bands.colours, bands.numbers))
    return Bands(names, colours, numbers, bands.dtype)


def _holds(modality: Modality, dtype: str) -> bool:
    """Whether `dtype` is one in which the modality's numbers come: 8-bit numbers in 8 bits, reflectances in more."""
    eight_bit = modality.unit == "DN" and modality.value_range is not None and modality.value_range[1] <= 255
    return (dtype == "uint8" or not eight_bit) and reaches(dtype, modality.scale, modality.offset, modality)


def _scenes_only(modality: Modality) -> bool:
    return modality.scene is not None and modality.scene.scenes_only


def _channels(modality: Modality, names: Sequence[str | None]) -> tuple[Channel, ...]:
    """Return the channels called `names`, or () unless all are known and different."""
    found = [modality.channel(name) if name else None for name in names]
    channels = tuple(channel for channel in found if channel is not None)
    return channels if len(channels) == len({c.name for c in channels}) == len(names) else ()


def _pick(fits: Sequence[Choice]) -> Choice | None:
    """Choose among modalities that all know the bands, or None where the choice would change what the numbers mean."""
    if len(fits) == 1:
        return fits[0]
    closest = min(fits, key=lambda choice: len(choice.modality.channels))
    exact = [choice for choice in fits if len(choice.modality.channels) == len(choice.channels)]
    meanings = {(c.modality.scale, c.modality.offset, tuple(_physics(channel) for channel in c.channels)) for c in fits}
    if len(meanings) == 1 or len(exact) == 1:
        return Choice(closest.modality, closest.channels, closest.numbers, (MODALITY_AMBIGUOUS,))
    return None


def _physics(channel: Channel) -> Channel:
    """Return a channel without its name: what modalities call it differs."""
    return replace(channel, name="")


def _by_count(bands: Bands, named: Sequence[Modality]) -> Choice | NoChoice:
    """Take undescribed bands in the modality's order when their number says which; the user named the modality."""
    count = len(bands.numbers)
    same = [m for m in named if len(m.channels) == count]
    if len(same) == 1 and (bands.nameless or count == 1):
        return Choice(same[0], same[0].channels, bands.numbers, (ORDER_ASSUMED,))
    described = "undescribed" if bands.nameless else f"called {_listed(bands.names)}"
    if len(named) > 1:
        wanted = ", ".join(f"{m.name} ({len(m.channels)})" for m in named)
        return NoChoice(Reason.MODALITY_MISMATCH, f"{count} bands, {described}, fit none of {wanted}")
    modality = named[0]
    if not bands.nameless:
        unknown = [name for name in bands.names if not (name and modality.channel(name))]
        names = ", ".join(channel.name for channel in modality.channels)
        return NoChoice(
            Reason.BAND_MISMATCH,
            f"bands {_listed(unknown) or described} are not bands of {modality.name}: {names}; correct the "
            "file's band descriptions, give a modality file that has its bands, or use auto to take them as unnamed",
        )
    return NoChoice(
        Reason.BAND_MISMATCH,
        f"{count} undescribed bands cannot be the {len(modality.channels)} of {modality.name}; set band descriptions",
    )


def _listed(names: Iterable[str | None]) -> str:
    return ", ".join("None" if name is None else quoted(name) for name in names)
