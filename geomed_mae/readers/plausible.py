"""Whether pixels can be what their metadata says: the look at the numbers themselves, once an image is decoded.

Units and offsets that are declared wrongly are no rarity (the flag of a large catalogue for the Sentinel-2 offset was
itself wrong), and nothing in a header shows it. What is certain is refused, what is likely becomes a flag.

The offset of Sentinel-2 (0.1 in reflectance) shows in the darkest pixels. Without it, water, shadow and vegetation have
reflectances near 0 in some band; with it, and not removed, no band has a pixel below 0.1 and dark pixels pile up just
above it in many bands at once; removed where there was none, whole bands become negative. Clouds, snow and deserts have
no dark pixels: there the numbers decide nothing, and what is declared counts, with a flag.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image
from geomed_mae.modalities import Modality
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.source import Source

OFFSET_UNKNOWN = "OFFSET_UNKNOWN"
"""A raster that is no product looks as if its numbers carried an offset that nothing declares."""
OFFSET_DOUBTFUL = "OFFSET_DOUBTFUL"
"""Pixels speak against the declared offset without deciding: no dark ones without it, some below zero after it."""
OFFSET_FROM_DATA = "OFFSET_FROM_DATA"
"""Nothing declares whether there is an offset; dark pixels show that there is none."""

APPLIED, ABSENT, UNDECLARED, PLAIN = "applied", "absent", "undeclared", "plain"
"""What is known of the offset: removed as declared; declared not to exist; a product that says nothing; no product."""

DARKEST_SPAN, DARK_SPAN, DARK_BANDS = 0.03, 0.05, 3
"""Dark surfaces (water, shadow, vegetation in visible light) are this near to zero in some band, and this near in a
third of all bands, at least three: haze and deserts are as bright in one or two bands, seldom in so many."""
DARKLESS = 0.99
"""No pixel is darker than the offset where one in 200 has at least this share of it: a little noise is no evidence."""
DECIDED = 0.8
"""One pixel in 20 of a band below this share of the offset shows that there is none."""
NEGATIVE_MEDIAN = -0.03
"""Atmospheric correction leaves single dark pixels below zero, never half a band this far."""
NEGATIVE_TAIL = -0.05
"""Nor one pixel in 200 this far in half of the bands."""
NEGATIVE_DOUBT = -0.02
"""Where one pixel in 200 of any band is this far below zero, the offset is doubtful."""
FRACTION_MAX = 2.0
"""Stored floats up to this are fractions already, no ten-thousandths of them."""
FAR_OUTSIDE = 5.0
"""So many times the upper end of the modality's range is another unit."""
REACH = 0.1
"""Integers that end below this share of the range's upper end are no numbers of the modality: 8-bit pictures of
reflectance, for example, which would end at 0.0255 where ten-thousandths are meant."""
MAX_SAMPLES = 1 << 20
"""Pixels a channel that `summary` looks at."""


class Statistics(Protocol):
    """Statistics of one channel's valid pixels in physical units; `p005` is the 0.5th percentile, and so on."""

    count: int
    minimum: float
    p005: float
    p05: float
    median: float
    p995: float
    maximum: float


@dataclass(frozen=True, slots=True)
class Summary:
    """The smallest thing that `verify` takes."""

    count: int
    minimum: float
    p005: float
    p05: float
    median: float
    p995: float
    maximum: float


def expectation(
    modality: Modality, *, offset: str = "", scale: Sequence[float] = (), shift: Sequence[float] = ()
) -> dict[str, Any]:
    """Return what `verify` needs to know, as plain JSON values, for a Source's selector.

    Args:
        modality: the modality chosen.
        offset: one of APPLIED, ABSENT, UNDECLARED and PLAIN, "" where the modality knows no offset.
        scale: factor from stored to physical value per channel.
        shift: what was added to the physical value per channel.
    """
    rule = modality.scene.offset if modality.scene is not None else None
    return {
        "unit": modality.unit,
        "range": None if modality.value_range is None else list(modality.value_range),
        "offset": offset if rule is not None else "",
        "step": abs(rule.add * modality.scale) if rule is not None else 0.0,
        "scale": list(scale),
        "shift": list(shift),
    }


def reaches(dtype: str, scale: float, shift: float, modality: Modality) -> bool:
    """Whether the largest number of an integer type, as stored * scale + shift, comes near the modality's range."""
    if modality.value_range is None or np.dtype(dtype).kind not in "iu":
        return True
    return np.iinfo(dtype).max * scale + shift >= REACH * modality.value_range[1]


def summary(image: Image) -> tuple[Summary, ...]:
    """Return the statistics of each channel; large ones on a regular subset of rows."""
    every = max(1, image.array[0].size // MAX_SAMPLES)
    valid = np.broadcast_to(image.valid, image.array.shape)
    return tuple(_summary(a[::every][m[::every]]) for a, m in zip(image.array, valid, strict=True))


def _summary(values: np.ndarray) -> Summary:
    if not values.size:
        return Summary(0, *[0.0] * 6)
    return Summary(values.size, *(float(v) for v in np.percentile(values, (0, 0.5, 5, 50, 99.5, 100))))


def verify(source: Source, statistics: Sequence[Statistics]) -> tuple[str, ...]:
    """Check an image's numbers against what its source says of them; return flags to add to the source's.

    Args:
        source: of the image.
        statistics: one a channel, of the whole image, in physical units.

    Raises:
        ReadError: UNIT_CONFLICT, OFFSET_SUSPECT or BASELINE_UNKNOWN, with the way out.
    """
    expect = source.selector.get("expect")
    seen = [(number, entry) for number, entry in enumerate(statistics) if entry.count]
    if expect is None or not seen:
        return ()
    _verify_unit(source, expect, seen)
    return _verify_offset(source, expect, [entry for _, entry in seen])


def _verify_unit(source: Source, expect: dict[str, Any], seen: Sequence[tuple[int, Statistics]]) -> None:
    name, unit = source.modality, expect["unit"]
    if unit == "dB" and min(entry.minimum for _, entry in seen) >= 0:
        raise ReadError(
            f"no value is below 0 dB, the largest is {max(entry.maximum for _, entry in seen):.4g}: these are "
            f"amplitudes or powers, not the decibels of {name}; convert them (10 * log10 of the power), or give a "
            "modality file",
            Reason.UNIT_CONFLICT.name,
        )
    if source.dtype.startswith("float") and expect["scale"]:
        stored = [(entry.maximum - expect["shift"][n]) / expect["scale"][n] for n, entry in seen]
        if max(expect["scale"]) < 0.01 and max(stored) <= FRACTION_MAX:
            raise ReadError(
                f"the largest stored number is {max(stored):.4g}: this is {unit} already, which {name} would divide by "
                f"{1 / max(expect['scale']):.0f}; give a modality file with scale 1 and offset 0",
                Reason.UNIT_CONFLICT.name,
            )
    if expect["range"] is not None and expect["range"][1] > 0:
        high = expect["range"][1]
        far = max(entry.p995 for _, entry in seen)
        if far > FAR_OUTSIDE * high:
            raise ReadError(
                f"values reach {far:.4g} {unit}; {name} has values up to {high:g}, so this is another unit or scale; "
                "give a modality file with its scale",
                Reason.UNIT_CONFLICT.name,
            )


def _verify_offset(source: Source, expect: dict[str, Any], seen: Sequence[Statistics]) -> tuple[str, ...]:
    state, step = expect["offset"], expect["step"]
    if not state or not step:
        return ()
    if state == APPLIED:
        tails = sum(entry.p005 < NEGATIVE_TAIL for entry in seen)
        lowest = min(entry.median for entry in seen)
        if lowest < NEGATIVE_MEDIAN or 2 * tails > len(seen):
            raise ReadError(
                f"a band has the median {lowest:.3f}, and {tails} of {len(seen)} bands reach below {NEGATIVE_TAIL}: "
                "the offset that its metadata or name declares has been removed before; give a modality file with "
                "offset 0 and no 'scene: offset'",
                Reason.OFFSET_SUSPECT.name,
            )
        return (OFFSET_DOUBTFUL,) if min(entry.p005 for entry in seen) < NEGATIVE_DOUBT else ()
    if state == ABSENT and _carries_offset(seen, step):
        raise ReadError(
            f"the darkest pixels of every band lie at {min(e.p005 for e in seen):.3f} or above: the numbers carry an "
            f"offset of {step:g} that its metadata or name denies; give a modality file with offset -{step:g}",
            Reason.OFFSET_SUSPECT.name,
        )
    if state == UNDECLARED:
        if min(entry.p05 for entry in seen) < DECIDED * step:
            return (OFFSET_FROM_DATA,)
        raise ReadError(
            f"no band is darker than {min(e.p05 for e in seen):.3f}, so the numbers may carry an offset of {step:g}, "
            "and no metadata or name tells the processing baseline; keep the product's folder name and its MTD file, "
            f"or give a modality file without 'scene: offset' and with offset 0 or -{step:g}",
            Reason.BASELINE_UNKNOWN.name,
        )
    bright = min(entry.p005 for entry in seen) >= DARKLESS * step
    return (OFFSET_UNKNOWN if state == PLAIN else OFFSET_DOUBTFUL,) if bright else ()


def _carries_offset(seen: Sequence[Statistics], step: float) -> bool:
    """Whether no band is darker than the offset, and the dark pixels of many bands pile up just above it."""
    darkest = min(entry.p005 for entry in seen)
    near = sum(entry.p005 <= step + DARK_SPAN for entry in seen)
    enough = min(len(seen), max(DARK_BANDS, -(-len(seen) // 3)))
    return DARKLESS * step <= darkest <= step + DARKEST_SPAN and near >= enough
