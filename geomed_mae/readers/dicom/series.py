"""Group DICOM headers into Sources: which modality, which series, which slices make one volume.

CT, MR and PET become volumes; projections and ultrasound become planes, one an image or frame. A series falls apart
into sub-series wherever one affine cannot hold all of its slices to POSITION_TOLERANCE_MM: other grids, repeats of the
same positions (see `dicom.repeats`), gaps. What then makes no volume is refused with a reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.image import PlaneGeometry, VolumeGeometry
from geomed_mae.modalities import Modality
from geomed_mae.readers.dicom.bind import bind_series
from geomed_mae.readers.dicom.channels import channel_of, plain_channel, with_diffusion
from geomed_mae.readers.dicom.codestream import codec_name
from geomed_mae.readers.dicom.duplicates import pixel_copies, without_copies
from geomed_mae.readers.dicom.geometry import (
    MIN_RUN,
    POSITION_TOLERANCE_MM,
    SPACING_MM,
    TILT_DEGREES,
    normal_of,
    place_numbers,
    rounded_stretches,
    same_grid,
    slice_error,
    spacing_error,
    tilt_degrees,
    uniform_runs,
    volume_affine,
)
from geomed_mae.readers.dicom.image_header import Header
from geomed_mae.readers.dicom.limits import MAX_IMAGE_VALUES
from geomed_mae.readers.dicom.mosaic import tiled
from geomed_mae.readers.dicom.repeats import Slice, split_repeats
from geomed_mae.readers.dicom.select import COLOURS, choose_modality
from geomed_mae.readers.dicom.suv import with_factors
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.source import Refusal, Source, Survey

READER = "dicom"

MAX_CINE_FRAMES = 64
"""Of a longer clip of projections or ultrasound, this many frames are taken, evenly spaced: neighbours are alike."""

LOCALIZER_PLANES, LOCALIZER_SLICES = 3, 20
"""An MR series of so many orientations, with no more than so many slices in each, is a localizer."""

SAME_PLANE, ACROSS = 0.9, 0.7
"""Cosines between normals: above the first (26 degrees) one orientation, below the second (45 degrees) two."""

CT_UNITS = ("", "HU")
"""RescaleType (0028,1054) of CT that means Hounsfield units; spectral maps say MGML, Z_EFF, ED and so on."""


class Outcome:
    """Sources and refusals as they come up; a file with any frame in a Source is used, whatever its others did."""

    def __init__(self) -> None:
        self.drafts: list[tuple[Source, tuple[Slice, ...]]] = []
        self._refused: dict[Path, Refusal] = {}

    def refuse(self, header: Header, reason: Reason, detail: str = "") -> None:
        """Refuse a file; the first reason stands."""
        self._refused.setdefault(header.path, Refusal(header.path, reason, detail))

    def survey(self) -> Survey:
        """Return the sources in the order of their files, and one refusal a file that none of them uses."""
        used: dict[Path, set[int]] = {}
        for _, slices in self.drafts:
            for one in slices:
                used.setdefault(one.header.path, set()).add(one.number)
        sources = []
        for source, slices in self.drafts:
            if any(len(used[one.header.path]) < len(one.header.frames) for one in slices):
                source = replace(source, flags=(*source.flags, "FRAMES_LEFT_OUT"))
            sources.append(source)
        sources.sort(key=lambda source: (source.files[0], source.selector.get("frames", [])))
        return Survey(sources, [refusal for path, refusal in self._refused.items() if path not in used])


def group_headers(headers: Sequence[Header], modalities: Sequence[Modality]) -> Survey:
    """Group headers into Sources and Refusals; see the module's docstring."""
    outcome = Outcome()
    headers = with_factors(without_copies(sorted(headers, key=lambda header: header.path), outcome.refuse))
    series: dict[tuple[str, ...], list[Header]] = {}
    for header in headers:
        modality = choose_modality(header, modalities)
        if isinstance(modality, tuple):
            outcome.refuse(header, *modality)
        elif modality.geometry in ("plane", "raster"):
            _add_planes(header, modality, outcome)
        else:
            series.setdefault((modality.name, *header.series), []).append(header)
    chosen = {modality.name: modality for modality in modalities}
    for (name, *_), members in series.items():
        _add_volumes(members, chosen[name], outcome)
    for modality in chosen.values():
        if modality.bind is not None:
            outcome.drafts = bind_series(outcome.drafts, modality)
    return outcome.survey()


def _identity(headers: Sequence[Header]) -> tuple[tuple[str, str], ...]:
    pairs = (
        pair
        for one in headers
        for pair in (
            ("patient", one.patient),
            ("study", one.study_uid),
            ("frame", one.frame_uid),
            ("series", one.series_uid),
        )
    )
    return tuple(dict.fromkeys(pair for pair in pairs if pair[1]))


def _instances(members: Sequence[Slice]) -> tuple[tuple[str, str], ...]:
    """Return the SOP instances in the order of slices, "UID#frame" (from 1) for frames of several: what labels name."""
    named = [(one, one.header.sop_uid) for one in members if one.header.sop_uid]
    files = [uid for _, uid in named]
    frames = [f"{uid}#{one.number + 1}" for one, uid in named if len(one.header.frames) > 1]
    return tuple(("instance", value) for value in dict.fromkeys([*files, *frames]))


def _add_planes(header: Header, modality: Modality, outcome: Outcome) -> None:
    channels = modality.channels if len(modality.channels) == COLOURS else ()
    if channels and not header.coloured:
        outcome.refuse(header, Reason.DTYPE_UNSUPPORTED, "grey pixels for a modality of three colours")
        return
    spacing = header.plane_spacing
    if spacing is not None and (problem := spacing_error(spacing)):
        outcome.refuse(header, Reason.BAD_GEOMETRY, problem)
        return
    count = len(header.frames)
    flags = header.flags if count <= MAX_CINE_FRAMES else (*header.flags, "FRAMES_SAMPLED")
    for number in np.linspace(0, count - 1, min(count, MAX_CINE_FRAMES)).round().astype(int).tolist():
        source = Source(
            reader=READER,
            files=(header.path,),
            selector={**({"frames": [number]} if count > 1 else {}), "instances": [header.sop_uid]},
            modality=modality.name,
            channels=channels or (channel_of(header, header.frames[number], modality),),
            shape=(header.rows, header.columns),
            dtype=header.dtype,
            geometry=PlaneGeometry(None if spacing is None else (spacing[0], spacing[1])),
            identity=(*_identity([header]), *_instances([Slice(header, number)])),
            flags=flags,
            codec=codec_name(header.syntax),
        )
        outcome.drafts.append((source, tuple(Slice(header, frame) for frame in range(count))))


def _volume_problem(header: Header, modality: Modality) -> tuple[Reason, str] | None:
    """Return why no slice of a file can be part of a volume."""
    if "LOCALIZER" in header.image_type or (header.scout and header.modality == "CT"):
        return Reason.LOCALIZER, ""
    if len(header.frames) > 1 and not header.grouped:
        return Reason.BAD_FRAMES, f"{len(header.frames)} frames without functional groups: nothing says where they lie"
    if header.coloured:
        return Reason.DTYPE_UNSUPPORTED, "colour pixels in a volume"
    kinds = {frame.rescale_type for frame in header.frames}
    if plain_channel(header, modality).unit == "HU" and not kinds <= set(CT_UNITS):
        return Reason.UNIT_CONFLICT, "RescaleType is not HU"
    return None


def _add_volumes(headers: Sequence[Header], modality: Modality, outcome: Outcome) -> None:
    grids: list[list[Slice]] = []
    sheets: list[list[Slice]] = []
    for header in with_diffusion(headers):
        if problem := _volume_problem(header, modality):
            outcome.refuse(header, *problem)
            continue
        if header.mosaic is not None:
            # A mosaic is a whole volume, and each of a series in time is one.
            sheet = tiled(header)
            sheets.append([Slice(sheet, number) for number in range(len(sheet.frames))])
            continue
        for number, frame in enumerate(header.frames):
            if error := slice_error(frame.orientation, frame.position, frame.spacing):
                outcome.refuse(header, Reason.BAD_GEOMETRY, error)
                continue
            one = Slice(header, number)
            home = next((grid for grid in grids if _one_grid(grid[0], one)), None)
            grids.append([one]) if home is None else home.append(one)
    if _is_localizer([normal_of(grid[0].frame.orientation) for grid in grids], grids):
        for one in (one for grid in grids for one in grid):
            outcome.refuse(one.header, Reason.LOCALIZER, "a few slices in each of several orientations")
        return
    for grid in (*grids, *sheets):
        _add_grid(grid, modality, outcome)


def _is_localizer(normals: Sequence[np.ndarray], grids: Sequence[Sequence[Slice]]) -> bool:
    """Say whether an MR series is a localizer that does not say so: three orientations, few slices in each."""
    if any(one.header.modality != "MR" for grid in grids for one in grid[:1]):
        return False
    planes: list[tuple[np.ndarray, int]] = []
    for normal, grid in zip(normals, grids, strict=True):
        same = next((index for index, (other, _) in enumerate(planes) if abs(normal @ other) > SAME_PLANE), None)
        if same is None:
            planes.append((normal, len(grid)))
        else:
            planes[same] = (planes[same][0], planes[same][1] + len(grid))
    apart = all(abs(one @ other) < ACROSS for index, (one, _) in enumerate(planes) for other, _ in planes[:index])
    return len(planes) >= LOCALIZER_PLANES and apart and max(count for _, count in planes) <= LOCALIZER_SLICES


def _one_grid(one: Slice, other: Slice) -> bool:
    return (
        (one.header.rows, one.header.columns, one.header.dtype, one.frame.stack)
        == (other.header.rows, other.header.columns, other.header.dtype, other.frame.stack)
        and one.frame.component == other.frame.component
        and one.header.units == other.header.units
        and one.header.frame_uid == other.header.frame_uid
        and same_grid((one.frame.orientation, one.frame.spacing), (other.frame.orientation, other.frame.spacing))
    )


def _add_grid(grid: Sequence[Slice], modality: Modality, outcome: Outcome) -> None:
    normal = normal_of(grid[0].frame.orientation)
    volumes, untold = _split(grid, normal)
    if untold and (copies := pixel_copies(untold, place_numbers(_positions(untold), normal))):
        for one in copies:
            outcome.refuse(one.header, Reason.DUPLICATE, "the same pixels at the same position under another instance")
        gone = {id(one) for one in copies}
        volumes, untold = _split([one for one in grid if id(one) not in gone], normal)
    for one in untold:
        depth = float(normal @ one.frame.position)
        outcome.refuse(one.header, Reason.DUP_POSITION, f"not the only slice at {depth:.2f} mm along the normal")
    for volume in volumes:
        _add_runs(volume, normal, modality, outcome)


def _split(grid: Sequence[Slice], normal: np.ndarray) -> tuple[list[list[Slice]], list[Slice]]:
    return split_repeats(grid, place_numbers(_positions(grid), normal))


def _positions(slices: Sequence[Slice]) -> np.ndarray:
    return np.array([one.frame.position for one in slices])


def _add_runs(volume: list[Slice], normal: np.ndarray, modality: Modality, outcome: Outcome) -> None:
    volume = sorted(volume, key=lambda one: float(normal @ one.frame.position))
    positions = _positions(volume)
    runs = uniform_runs(positions, normal)
    rounded: set[int] = set()
    for start, stop, error in rounded_stretches(positions, normal, runs) if len(runs) > 1 else ():
        rounded.update(range(start, stop))
        detail = (
            f"{stop - start} slices are up to {error:.3f} mm off equal steps, {POSITION_TOLERANCE_MM} mm may be: "
            "positions that look rounded; get the original ones"
        )
        for one in volume[start:stop]:
            outcome.refuse(one.header, Reason.BAD_GEOMETRY, detail)
    for start, stop in runs:
        numbers = [number for number in range(start, stop) if number not in rounded]
        members = [volume[number] for number in numbers]
        if len(runs) > 1 and len(members) < MIN_RUN:
            depths = ", ".join(f"{depth:.2f}" for depth in positions[numbers] @ normal)
            for one in members:
                outcome.refuse(one.header, Reason.SLICE_GAP, f"apart from the others at {depths} mm along the normal")
            continue
        header = members[0].header
        if len(members) * header.rows * header.columns > MAX_IMAGE_VALUES:
            for one in members:
                outcome.refuse(one.header, Reason.TOO_LARGE, f"{len(members)} slices; {MAX_IMAGE_VALUES} voxels may be")
            continue
        outcome.drafts.append((_volume_source(members, modality, gap=len(runs) > 1), tuple(members)))


def _single_step(*stated: float | None) -> float:
    """Return the first stated length that one slice can be thick, 1 mm where none is."""
    return next((mm for mm in stated if mm is not None and POSITION_TOLERANCE_MM <= mm <= SPACING_MM[1]), 1.0)


def _volume_source(members: Sequence[Slice], modality: Modality, *, gap: bool) -> Source:
    header, frame = members[0].header, members[0].frame
    channel = channel_of(header, frame, modality)
    affine = volume_affine(
        _positions(members),
        frame.orientation,
        frame.spacing,
        single_step_mm=_single_step(frame.slice_spacing_mm, frame.thickness_mm),
    )
    flags = {
        **dict.fromkeys(flag for one in members for flag in one.header.flags),
        **({"SPLIT_AT_GAP": None} if gap else {}),
        **({"SINGLE_SLICE": None} if len(members) == 1 else {}),
        **({"TILT": None} if tilt_degrees(affine) > TILT_DEGREES else {}),
        **({"MONOCHROME1": None} if any(one.header.photometric == "MONOCHROME1" for one in members) else {}),
        **({"NO_RESCALE": None} if channel.unit == "HU" and not all(one.frame.rescaled for one in members) else {}),
    }
    files = tuple(dict.fromkeys(one.header.path for one in members))
    selector: dict[str, Any] = {}
    if len(files) < len(members) or any(len(one.header.frames) > 1 for one in members):
        selector["frames"] = [one.number for one in members]
        if len(files) > 1:
            selector["files"] = [files.index(one.header.path) for one in members]
    selector["instances"] = [one.header.sop_uid for one in members]
    if header.factor is not None:
        selector["factor"] = header.factor[0]
    return Source(
        reader=READER,
        files=files,
        selector=selector,
        modality=modality.name,
        channels=(channel,),
        shape=(len(members), header.rows, header.columns),
        dtype=header.dtype,
        geometry=VolumeGeometry(affine),
        identity=(*_identity([one.header for one in members]), *_instances(members)),
        flags=tuple(flags),
        codec=codec_name(header.syntax),
    )
