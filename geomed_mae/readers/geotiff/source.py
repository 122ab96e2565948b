"""From headers of raster files to Sources: single files, and scenes of several (see `scenes`).

Stored numbers become physical ones by scale and offset: the file's own where it declares them, else those of its
scene's metadata, else the modality's. A file whose declaration cannot be reconciled with the scene's is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.modalities import Modality
from geomed_mae.readers import plausible
from geomed_mae.readers.geotiff.bands import Bands, Choice, NoChoice, choose
from geomed_mae.readers.geotiff.metadata import Header
from geomed_mae.readers.geotiff.structure import nodata_value
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.scenes import Member, Scene, arrange
from geomed_mae.readers.scenes.offset import Declared, declared_offset
from geomed_mae.readers.source import Refusal, Source, Survey

NODATA_INVALID = "NODATA_INVALID"
"""The file declares a nodata value that its pixel type cannot have; the modality's, or its alpha or mask, counts."""
SCALE_TOLERANCE = 1e-3
"""Relative difference up to which two scales are one: tags are written with few digits."""
FLAG_TYPES = ("uint8", "int8", "uint16", "int16")
"""Pixel types whose every bit survives in the float32 of an Image."""
OFFSET_TOLERANCE = 1e-6
"""Physical difference up to which two offsets are one."""


def group_rasters(headers: Sequence[Header], modalities: Sequence[Modality], *, reader: str) -> Survey:
    """Make one Source of each scene, and of each file that is part of none."""
    arranged = arrange(headers, modalities)
    sources: list[Source] = []
    refusals = list(arranged.refusals)
    for scene in arranged.scenes:
        outcome = _scene_source(scene, reader)
        if isinstance(outcome, Source):
            sources.append(outcome)
        else:
            refusals.extend(outcome)
    for found in arranged.rest:
        single = _source(found, modalities, reader)
        (sources if isinstance(single, Source) else refusals).append(single)
    return Survey(sources, refusals)


def _source(found: Header, modalities: Sequence[Modality], reader: str) -> Source | Refusal:
    numbers = tuple(n for n, colour in enumerate(found.colours, start=1) if colour != "alpha")
    if not numbers:
        return Refusal(found.path, Reason.BAND_MISMATCH, "it has alpha bands only")
    names = tuple(found.descriptions[n - 1] for n in numbers)
    choice = choose(Bands(names, tuple(found.colours[n - 1] for n in numbers), numbers, found.dtype), modalities)
    if isinstance(choice, NoChoice):
        return Refusal(found.path, choice.reason, choice.detail)
    numbers = choice.numbers
    nodata = _nodata(found, choice.modality.nodata)
    if isinstance(nodata, Refusal):
        return nodata
    scaling = _scaling(found, choice, numbers)
    if isinstance(scaling, Refusal):
        return scaling
    scales, shifts, own = scaling
    flags = [*found.flags, *choice.flags]
    if nodata[1]:
        flags.append(NODATA_INVALID)
    return Source(
        reader=reader,
        files=(found.path,),
        selector={
            **_selector(found, numbers, nodata[0], (scales, shifts)),
            "expect": plausible.expectation(
                choice.modality, offset="" if own else plausible.PLAIN, scale=scales, shift=shifts
            ),
        },
        modality=choice.modality.name,
        channels=choice.channels,
        shape=found.shape,
        dtype=found.dtype,
        geometry=found.geometry,
        flags=tuple(flags),
        block=found.block,
        codec=found.codec,
    )


def _selector(
    found: Header, numbers: Sequence[int], nodata: str | None, scaling: tuple[list[float], list[float]]
) -> dict[str, Any]:
    """Return what reading the bands `numbers` of one file needs."""
    return {
        "bands": list(numbers),
        "alpha": [n for n, colour in enumerate(found.colours, start=1) if colour == "alpha"],
        "nodata": nodata,
        "scale": scaling[0],
        "offset": scaling[1],
        "masked": found.masked,
        "sparse": found.sparse,
    }


def _nodata(found: Header, default: float | None) -> tuple[str | None, bool] | Refusal:
    """Return the nodata text that counts, and whether the file's own is impossible and was replaced."""
    nodata, invalid = found.nodata, False
    if nodata is not None and nodata_value(nodata, found.dtype) is None:
        if default is None and not found.masked and "alpha" not in found.colours:
            detail = (
                f"nodata {nodata!r} cannot occur in {found.dtype}; give a modality file with the right 'nodata', or "
                "take the tag off (gdal_edit.py -unsetnodata)"
            )
            return Refusal(found.path, Reason.NODATA_INVALID, detail)
        nodata, invalid = None, True
    if nodata is None and default is not None and nodata_value(str(default), found.dtype) is not None:
        nodata = str(default)
    return nodata, invalid


def _scaling(found: Header, choice: Choice, numbers: Sequence[int]) -> tuple[list[float], list[float], bool] | Refusal:
    """Return scale and offset a band, the file's where it declares any, else the modality's; and whether it does."""
    pairs = [(found.scales[n - 1], found.offsets[n - 1]) for n in numbers]
    default = (choice.modality.scale, choice.modality.offset)
    silent = [pair == (1.0, 0.0) for pair in pairs]
    if any(silent) and not all(silent) and default != (1.0, 0.0):
        # Is 1 the scale of these bands, or have they none and want the modality's?
        detail = f"some of its bands declare a scale and some none, and {choice.modality.name} has one; declare all"
        return Refusal(found.path, Reason.UNIT_CONFLICT, detail)
    pairs = [default if none else pair for pair, none in zip(pairs, silent, strict=True)]
    # What the file itself declares is believed.
    if any(silent) and not plausible.reaches(found.dtype, *default, choice.modality):
        return _too_small(found, *default, choice.modality)
    return [scale for scale, _ in pairs], [offset for _, offset in pairs], not all(silent)


def _too_small(found: Header, scale: float, shift: float, modality: Modality) -> Refusal:
    top = np.iinfo(found.dtype).max * scale + shift
    detail = (
        f"{found.dtype} numbers * {scale:g} + {shift:g} end at {top:.3g} {modality.unit}, far below what "
        f"{modality.name} measures: they are scaled for display or in another unit; give a modality file with "
        "their scale"
    )
    return Refusal(found.path, Reason.UNIT_CONFLICT, detail)


def _scene_source(scene: Scene, reader: str) -> Source | list[Refusal]:
    members = [*scene.bands, *([] if scene.mask is None else [scene.mask])]
    rule = scene.modality.scene
    try:
        declared = declared_offset(rule, scene.bands[0].header.path, scene.folder, scene.key)
    except ReadError as error:
        return [Refusal(member.header.path, Reason[error.reason], str(error)) for member in members]
    parts, states, flags = [], [], [*scene.flags]
    for number, member in enumerate(scene.bands):
        part = _part(number, member, scene, declared)
        if isinstance(part, Refusal):
            why = f"another file of its scene does not fit: {part.detail}"
            return [part if m is member else Refusal(m.header.path, part.reason, why) for m in members]
        parts.append(part[0])
        states.append(part[1])
        flags += [flag for flag in member.header.flags if flag not in flags]
    mask = None
    if scene.mask is not None:
        if scene.mask.header.dtype not in FLAG_TYPES:
            detail = f"its quality flags are {scene.mask.header.dtype}; flags are integers of 8 or 16 bits"
            return [Refusal(member.header.path, Reason.BAND_MISMATCH, detail) for member in members]
        selector = _selector(scene.mask.header, [1], None, ([1.0], [0.0]))
        mask = {**_place(len(parts), scene.mask), "selector": selector, "bits": list(rule.mask.bits)}
    state = next((s for s in (plausible.UNDECLARED, plausible.APPLIED) if s in states), plausible.ABSENT)
    scales = [part["selector"]["scale"][0] for part in parts]
    shifts = [part["selector"]["offset"][0] for part in parts]
    headers = [member.header for member in members]
    return Source(
        reader=reader,
        files=tuple(header.path for header in headers),
        selector={
            "parts": parts,
            "mask": mask,
            "expect": plausible.expectation(scene.modality, offset=state, scale=scales, shift=shifts),
        },
        modality=scene.modality.name,
        channels=tuple(member.channel for member in scene.bands),
        shape=scene.finest.shape,
        dtype=np.result_type(*(member.header.dtype for member in scene.bands)).name,
        geometry=scene.finest.geometry,
        flags=tuple(flags),
        block=scene.finest.block,
        codec=next((header.codec for header in headers if header.codec), ""),
    )


def _place(number: int, member: Member) -> dict[str, Any]:
    """Return which file a part is and how it lies on the scene's grid, as plain JSON values."""
    header = member.header
    return {"file": number, "ratio": list(member.ratio), "shape": list(header.shape), "dtype": header.dtype}


def _part(number: int, member: Member, scene: Scene, declared: Declared) -> tuple[dict[str, Any], str] | Refusal:
    """Return how one band's file is read, and what is known of its offset (see `plausible`)."""
    found, kind, modality = member.header, member.kind, scene.modality
    nodata = _nodata(found, modality.nodata if kind.nodata is None else kind.nodata)
    if isinstance(nodata, Refusal):
        return nodata
    add = declared.of(member.channel.name)
    if add is None and declared.add:
        detail = f"its scene's metadata lists offsets of other bands, and none of {member.channel.name}"
        return Refusal(found.path, Reason.BASELINE_UNKNOWN, detail)
    scale = modality.scale if kind.scale is None else kind.scale
    if declared.quantification is not None:
        scale = 1.0 / declared.quantification
    shift = (modality.offset if kind.offset is None else kind.offset) + scale * (add or 0.0)
    state = plausible.UNDECLARED if add is None else plausible.APPLIED if add else plausible.ABSENT
    band = next(n for n, colour in enumerate(found.colours, start=1) if colour != "alpha")
    own = found.scales[band - 1], found.offsets[band - 1]
    if own != (1.0, 0.0):
        same_scale = abs(own[0] / scale - 1) <= SCALE_TOLERANCE
        if not same_scale or (add is not None and abs(own[1] - shift) > OFFSET_TOLERANCE):
            detail = (
                f"it declares scale {own[0]:g} and offset {own[1]:g}, its scene's {modality.name} has {scale:g} and "
                f"{'an unknown offset' if add is None else format(shift, 'g')}; give a modality file that says which"
            )
            return Refusal(found.path, Reason.UNIT_CONFLICT, detail)
        scale, shift = own
        state = plausible.APPLIED if shift else plausible.ABSENT
    elif not plausible.reaches(found.dtype, scale, shift, modality):
        return _too_small(found, scale, shift, modality)
    return {**_place(number, member), "selector": _selector(found, [band], nodata[0], ([scale], [shift]))}, state
