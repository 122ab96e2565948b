"""Group DICOM headers into Sources: which modality, which series, which slices make one volume.

CT, MR and PET become volumes; projections and ultrasound become planes, one an image or frame. A series falls apart
into sub-series wherever one affine cannot hold all of its slices to POSITION_TOLERANCE_MM: other grids, repeats of the
same positions (see `dicom_repeats`), gaps. What then makes no volume is refused with a reason.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from geomed_mae.image import PlaneGeometry, VolumeGeometry
from geomed_mae.modalities import Modality
from geomed_mae.readers.dicom_channels import channel_of
from geomed_mae.readers.dicom_geometry import (
    MIN_RUN,
    TILT_DEGREES,
    normal_of,
    orientation_error,
    place_numbers,
    position_error,
    same_grid,
    spacing_error,
    tilt_degrees,
    uniform_runs,
    volume_affine,
)
from geomed_mae.readers.dicom_header import Header
from geomed_mae.readers.dicom_limits import MAX_IMAGE_VALUES
from geomed_mae.readers.dicom_repeats import Slice, split_repeats
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.source import Refusal, Source, Survey

READER = "dicom"

MAX_CINE_FRAMES = 64
"""Of a longer clip of projections or ultrasound, this many frames are taken, evenly spaced: neighbours are alike."""

CAPTURED_MODALITIES = frozenset({"DMS", "DOC", "ES", "GM", "IVUS", "OP", "OT", "SC", "US", "XC"})
"""Photographs, screen captures and ultrasound: their pixels often show names (PS3.15 annex E, option 113101)."""

IMAGE_MODALITIES = frozenset(
    {"AR", "BI", "BMD", "CR", "CT", "DG", "DX", "IO", "IVOCT", "KER", "LEN", "LS", "MG", "MR", "NM", "OAM", "OCT"}
    | {"OPM", "OPT", "OPTENF", "OPV", "OSS", "PA", "POS", "PT", "PX", "RF", "RG", "RTIMAGE", "SM", "TG", "VA", "XA"}
)
"""Other values of Modality for pictures (PS3.3 C.7.3.1.1.1), as messages may name them."""

SECONDARY_CAPTURE = "1.2.840.10008.5.1.4.1.1.7"
"""Root of the secondary capture SOP classes: screen shots, digitised film."""

CT_UNITS = ("", "HU")
"""RescaleType (0028,1054) of CT that means Hounsfield units; spectral maps say MGML, Z_EFF, ED and so on."""


class Outcome:
    """Sources and refusals as they come up; a file with any frame in a Source is used, whatever its others did."""

    def __init__(self) -> None:
        self.drafts: list[tuple[Source, tuple[Slice, ...]]] = []
        self._refused: dict[int, Refusal] = {}

    def refuse(self, header: Header, reason: Reason, detail: str = "") -> None:
        """Refuse a file; the first reason stands."""
        self._refused.setdefault(id(header), Refusal(header.path, reason, detail))

    def survey(self) -> Survey:
        """Return the sources in the order of their files, and one refusal a file that none of them uses."""
        used: dict[int, set[int]] = {}
        for _, slices in self.drafts:
            for one in slices:
                used.setdefault(id(one.header), set()).add(one.number)
        sources = []
        for source, slices in self.drafts:
            if any(len(used[id(one.header)]) < len(one.header.frames) for one in slices):
                source = replace(source, flags=(*source.flags, "FRAMES_LEFT_OUT"))
            sources.append(source)
        sources.sort(key=lambda source: (source.files[0], source.selector.get("frames", [])))
        return Survey(sources, [refusal for key, refusal in self._refused.items() if key not in used])


def group_headers(headers: Sequence[Header], modalities: Sequence[Modality]) -> Survey:
    """Group headers into Sources and Refusals; see the module's docstring."""
    outcome = Outcome()
    headers = _without_duplicates(sorted(headers, key=lambda header: header.path), outcome)
    series: dict[tuple[str, ...], list[Header]] = {}
    for header in headers:
        modality = _modality_of(header, modalities, outcome)
        if modality is None:
            continue
        if modality.geometry == "plane":
            _add_planes(header, modality, outcome)
        else:
            # Without a series UID, a folder is the best guess at what belongs together; geometry still decides.
            name = header.series_uid or str(header.path.parent)
            series.setdefault((modality.name, header.study_uid, name), []).append(header)
    chosen = {modality.name: modality for modality in modalities}
    for (name, _, _), members in series.items():
        _add_volumes(members, chosen[name], outcome)
    return outcome.survey()


def _without_duplicates(headers: Sequence[Header], outcome: Outcome) -> list[Header]:
    """Keep the first of each SOP instance; refuse same bytes as DUPLICATE, and a series with a conflict altogether."""
    instances: dict[str, list[Header]] = {}
    for header in headers:
        if header.sop_uid:
            instances.setdefault(header.sop_uid, []).append(header)
    copies: set[int] = set()
    conflicts: set[tuple[str, str]] = set()
    for same in instances.values():
        if len(same) == 1:
            continue
        digests = [_digest(header) for header in same]
        if len(set(digests)) > 1:
            conflicts.update((header.study_uid, header.series_uid) for header in same)
            continue
        for header in same[1:]:
            copies.add(id(header))
            outcome.refuse(header, Reason.DUPLICATE)
    kept = []
    for header in headers:
        if (header.study_uid, header.series_uid) in conflicts:
            outcome.refuse(header, Reason.DUP_CONFLICT, "in its series, one SOP instance has two contents")
        elif id(header) not in copies:
            kept.append(header)
    return kept


def _digest(header: Header) -> bytes:
    try:
        with header.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").digest()
    except OSError:
        # A file that is gone equals no other one; reading it later says so.
        return str(header.path).encode("utf-8", "surrogateescape")


def _modality_of(header: Header, modalities: Sequence[Modality], outcome: Outcome) -> Modality | None:
    """Choose by DICOM's Modality; under "auto", refuse what may show a name unless its modality is asked for."""
    chosen = next((m for m in modalities if READER in m.formats and header.modality in m.dicom), None)
    # "auto" offers everything, the unnamed last resorts included; nobody names these beside others by hand.
    auto = any(modality.name in ("unnamed-raster", "unnamed-volume") for modality in modalities)
    captured = header.modality in CAPTURED_MODALITIES or (
        header.sop_class.startswith(SECONDARY_CAPTURE) and header.burned_in != "NO"
    )
    if auto and captured:
        outcome.refuse(header, Reason.BURNED_IN, "a capture or ultrasound; name its modality to accept it")
    elif header.burned_in == "YES" and (chosen is None or auto or header.modality not in CAPTURED_MODALITIES):
        outcome.refuse(header, Reason.BURNED_IN, "BurnedInAnnotation is YES")
    elif chosen is None or chosen.geometry not in ("plane", "volume"):
        outcome.refuse(header, Reason.MODALITY_MISMATCH, f"DICOM Modality '{_code(header.modality)}'")
    else:
        return chosen
    return None


def _code(text: str) -> str:
    """Return a code fit for a message: what is no known code could be anything, a name included."""
    return text if text in IMAGE_MODALITIES | CAPTURED_MODALITIES else "not in the standard"


def _identity(header: Header) -> tuple[tuple[str, str], ...]:
    pairs = (("patient", header.patient), ("study", header.study_uid), ("frame", header.frame_uid))
    return tuple((kind, value) for kind, value in pairs if value)


def _add_planes(header: Header, modality: Modality, outcome: Outcome) -> None:
    spacing = header.frames[0].spacing or header.imager_spacing
    if spacing is not None and (problem := spacing_error(spacing)):
        outcome.refuse(header, Reason.BAD_GEOMETRY, problem)
        return
    count = len(header.frames)
    flags = header.flags if count <= MAX_CINE_FRAMES else (*header.flags, "FRAMES_SAMPLED")
    for number in np.linspace(0, count - 1, min(count, MAX_CINE_FRAMES)).round().astype(int).tolist():
        source = Source(
            reader=READER,
            files=(header.path,),
            selector={"frames": [number]} if count > 1 else {},
            modality=modality.name,
            channels=(channel_of(header, header.frames[number], modality),),
            shape=(header.rows, header.columns),
            dtype=header.dtype,
            geometry=PlaneGeometry(None if spacing is None else (spacing[0], spacing[1])),
            identity=_identity(header),
            flags=flags,
        )
        outcome.drafts.append((source, tuple(Slice(header, frame) for frame in range(count))))


def _volume_problem(header: Header, modality: Modality) -> tuple[Reason, str] | None:
    """Return why no slice of a file can be part of a volume."""
    if "LOCALIZER" in header.image_type:
        return Reason.LOCALIZER, ""
    if "MOSAIC" in header.image_type:
        return Reason.BAD_FRAMES, "Siemens mosaics are not read yet"
    if len(header.frames) > 1 and not header.grouped:
        return Reason.BAD_FRAMES, f"{len(header.frames)} frames without functional groups"
    if header.samples != 1:
        return Reason.DTYPE_UNSUPPORTED, "colour pixels in a volume"
    kinds = {frame.rescale_type for frame in header.frames}
    if modality.unit == "HU" and not kinds <= set(CT_UNITS):
        return Reason.UNIT_CONFLICT, "RescaleType is not HU"
    return None


def _add_volumes(headers: Sequence[Header], modality: Modality, outcome: Outcome) -> None:
    grids: list[list[Slice]] = []
    for header in headers:
        if problem := _volume_problem(header, modality):
            outcome.refuse(header, *problem)
            continue
        for number, frame in enumerate(header.frames):
            error = (
                orientation_error(frame.orientation) or position_error(frame.position) or spacing_error(frame.spacing)
            )
            if error:
                outcome.refuse(header, Reason.BAD_GEOMETRY, error)
                continue
            one = Slice(header, number)
            home = next((grid for grid in grids if _one_grid(grid[0], one)), None)
            grids.append([one]) if home is None else home.append(one)
    for grid in grids:
        _add_grid(grid, modality, outcome)


def _one_grid(one: Slice, other: Slice) -> bool:
    return (
        (one.header.rows, one.header.columns, one.header.dtype, one.frame.stack)
        == (other.header.rows, other.header.columns, other.header.dtype, other.frame.stack)
        and one.header.frame_uid == other.header.frame_uid
        and same_grid((one.frame.orientation, one.frame.spacing), (other.frame.orientation, other.frame.spacing))
    )


def _add_grid(grid: Sequence[Slice], modality: Modality, outcome: Outcome) -> None:
    normal = normal_of(grid[0].frame.orientation)
    places = place_numbers(np.array([one.frame.position for one in grid]), normal)
    volumes, untold = split_repeats(grid, places)
    for one in untold:
        depth = float(normal @ one.frame.position)
        outcome.refuse(one.header, Reason.DUP_POSITION, f"not the only slice at {depth:.2f} mm along the normal")
    for volume in volumes:
        _add_runs(volume, normal, modality, outcome)


def _add_runs(volume: list[Slice], normal: np.ndarray, modality: Modality, outcome: Outcome) -> None:
    volume = sorted(volume, key=lambda one: float(normal @ one.frame.position))
    positions = np.array([one.frame.position for one in volume])
    runs = uniform_runs(positions, normal)
    for start, stop in runs:
        members = volume[start:stop]
        if len(runs) > 1 and stop - start < MIN_RUN:
            depths = ", ".join(f"{depth:.2f}" for depth in positions[start:stop] @ normal)
            for one in members:
                outcome.refuse(one.header, Reason.SLICE_GAP, f"apart from the others at {depths} mm along the normal")
            continue
        header = members[0].header
        if len(members) * header.rows * header.columns > MAX_IMAGE_VALUES:
            for one in members:
                outcome.refuse(one.header, Reason.TOO_LARGE, f"{len(members)} slices; {MAX_IMAGE_VALUES} voxels may be")
            continue
        outcome.drafts.append((_volume_source(members, modality, gap=len(runs) > 1), tuple(members)))


def _volume_source(members: Sequence[Slice], modality: Modality, *, gap: bool) -> Source:
    header, frame = members[0].header, members[0].frame
    affine = volume_affine(
        np.array([one.frame.position for one in members]),
        frame.orientation,
        frame.spacing,
        single_step_mm=frame.slice_spacing_mm or frame.thickness_mm or 1.0,
    )
    flags = {
        **dict.fromkeys(flag for one in members for flag in one.header.flags),
        **({"SPLIT_AT_GAP": None} if gap else {}),
        **({"SINGLE_SLICE": None} if len(members) == 1 else {}),
        **({"TILT": None} if tilt_degrees(affine) > TILT_DEGREES else {}),
        **({"MONOCHROME1": None} if any(one.header.photometric == "MONOCHROME1" for one in members) else {}),
        **({"NO_RESCALE": None} if modality.unit == "HU" and not all(one.frame.rescaled for one in members) else {}),
    }
    files = tuple(dict.fromkeys(one.header.path for one in members))
    selector: dict[str, list[int]] = {}
    if len(files) < len(members) or any(len(one.header.frames) > 1 for one in members):
        selector["frames"] = [one.number for one in members]
        if len(files) > 1:
            selector["files"] = [files.index(one.header.path) for one in members]
    return Source(
        reader=READER,
        files=files,
        selector=selector,
        modality=modality.name,
        channels=(channel_of(header, frame, modality),),
        shape=(len(members), header.rows, header.columns),
        dtype=header.dtype,
        geometry=VolumeGeometry(affine),
        identity=_identity(header),
        flags=tuple(flags),
    )
