"""Series of one study as the channels of one Image, where a modality file asks for it (see `modalities.binding`).

Bound are volumes of one patient, study and frame of reference whose channels have different names and whose slices lie
on one grid: each within POSITION_TOLERANCE_MM of where the first channel's affine puts it. With `onto`, volumes on
other grids are interpolated linearly onto the grid of one channel; beyond the outermost voxel centres of their own
field of view, and where a neighbour is invalid, they are invalid. Nothing else is resampled, and no series is chosen
among equals: two that would become the same channel stay images of their own, flagged BIND_AMBIGUOUS.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import numpy as np

from geomed_mae.image import Image, VolumeGeometry
from geomed_mae.modalities import Modality
from geomed_mae.readers.dicom.geometry import POSITION_TOLERANCE_MM, same_grid
from geomed_mae.readers.dicom.repeats import Slice
from geomed_mae.readers.source import Source, whole_window

Draft: TypeAlias = tuple[Source, tuple[Slice, ...]]
Read: TypeAlias = Callable[[Source, tuple[slice, ...] | None], Image]

AMBIGUOUS = "BIND_AMBIGUOUS"
"""Flag of a volume that was left alone because another one would have been the same channel."""

RESAMPLED = "RESAMPLED"
"""Flag of an image with a channel that was interpolated onto the grid of another one."""

EDGE = 1e-6
"""Voxels beyond the outermost centres that still count as inside: rounding of the affines."""


def bind_series(drafts: Sequence[Draft], modality: Modality) -> list[Draft]:
    """Return the drafts with those of `modality` bound where they can be."""
    studies: dict[tuple[str, ...], list[Draft]] = {}
    done: list[Draft] = []
    for draft in drafts:
        header = draft[1][0].header
        if draft[0].modality == modality.name and header.study_uid and header.frame_uid:
            studies.setdefault((header.patient, header.study_uid, header.frame_uid), []).append(draft)
        else:
            done.append(draft)
    for members in studies.values():
        done += _bind_study(members, modality)
    return done


def _bind_study(members: Sequence[Draft], modality: Modality) -> list[Draft]:
    named = [(_names(draft, modality), draft) for draft in members]
    done = [_flagged(draft) for names, draft in named if len(names) > 1]
    done += [draft for names, draft in named if not names]
    candidates = [(names[0], draft) for names, draft in named if len(names) == 1]
    onto = modality.bind.onto
    if onto and any(name == onto for name, _ in candidates):
        base = next(draft for name, draft in candidates if name == onto)
        near = [(name, draft) for name, draft in candidates if name == onto or _overlap(base[0], draft[0])]
        done += [draft for name, draft in candidates if name != onto and not _overlap(base[0], draft[0])]
        clusters = [near]
    else:
        clusters = _clusters(candidates)
    for cluster in clusters:
        done += _bind_cluster(cluster, modality)
    return done


def _names(draft: Draft, modality: Modality) -> list[str]:
    """Return the channels that a volume may become: by the user's patterns, else by the physics of its header."""
    binding, header = modality.bind, draft[1][0].header
    names = binding.named(header.description, header.protocol)
    if names:
        return names
    chosen = {name for name, _ in binding.patterns}
    name = draft[0].channels[0].name
    known = {channel.name for channel in modality.channels} - chosen
    return [name] if name in known else []


def _clusters(candidates: Sequence[tuple[str, Draft]]) -> list[list[tuple[str, Draft]]]:
    clusters: list[list[tuple[str, Draft]]] = []
    for name, draft in candidates:
        home = next((cluster for cluster in clusters if _one_grid(cluster[0][1], draft)), None)
        clusters.append([(name, draft)]) if home is None else home.append((name, draft))
    return clusters


def _one_grid(base: Draft, other: Draft) -> bool:
    """Say whether the slices of `other` lie where the affine of `base` puts them."""
    (source, slices), (second, more) = base, other
    one, two = slices[0].frame, more[0].frame
    if source.shape != second.shape or not same_grid((one.orientation, one.spacing), (two.orientation, two.spacing)):
        return False
    affine = source.geometry.affine
    implied = affine[:3, 3] + np.arange(len(more))[:, None] * affine[:3, 0]
    places = np.array([part.frame.position for part in more])
    return bool(np.linalg.norm(places - implied, axis=1).max() <= POSITION_TOLERANCE_MM)


def _overlap(base: Source, other: Source) -> bool:
    """Say whether any voxel centre of `base` lies inside the field of view of `other`, by a lattice of 33^3 of them."""
    lattice = [np.linspace(0, size - 1, 33) for size in base.shape]
    points = np.stack([axis.ravel() for axis in np.meshgrid(*lattice, indexing="ij")] + [np.ones(33**3)])
    places = (np.linalg.inv(other.geometry.affine) @ base.geometry.affine @ points)[:3]
    limits = np.array(other.shape)[:, None] - 1 + EDGE
    return min(other.shape) > 1 and bool(((places >= -EDGE) & (places <= limits)).all(axis=0).any())


def _bind_cluster(cluster: Sequence[tuple[str, Draft]], modality: Modality) -> list[Draft]:
    names = [name for name, _ in cluster]
    onto = modality.bind.onto
    done = [_flagged(draft) for name, draft in cluster if names.count(name) > 1]
    single = {name: draft for name, draft in cluster if names.count(name) == 1}
    if len(single) < 2 or (onto in names and onto not in single):
        return done + list(single.values())
    order = [channel.name for channel in modality.channels if channel.name in single]
    base = single.get(onto) or single[order[0]]
    return [*done, _bound([(name, single[name]) for name in order], base, modality)]


def _flagged(draft: Draft) -> Draft:
    return replace(draft[0], flags=(*draft[0].flags, AMBIGUOUS)), draft[1]


def _bound(named: Sequence[tuple[str, Draft]], base: Draft, modality: Modality) -> Draft:
    sources = [draft[0] for _, draft in named]
    files = tuple(dict.fromkeys(path for source in sources for path in source.files))
    parts: list[dict[str, Any]] = []
    channels = []
    for name, draft in named:
        source = draft[0]
        entry = next(channel for channel in modality.channels if channel.name == name)
        sequence = entry.sequence or source.channels[0].sequence
        channels.append(replace(source.channels[0], name=name, sequence=sequence))
        parts.append(
            {
                "files": [files.index(path) for path in source.files],
                "selector": source.selector,
                "shape": list(source.shape),
                "affine": source.geometry.affine.tolist(),
                "resample": draft is not base and not _one_grid(base, draft),
            }
        )
    flags = dict.fromkeys(flag for source in sources for flag in source.flags)
    if any(part["resample"] for part in parts):
        flags[RESAMPLED] = None
    bound = replace(
        base[0],
        files=files,
        selector={"parts": parts, "instances": base[0].selector["instances"]},
        channels=tuple(channels),
        identity=tuple(dict.fromkeys(pair for source in sources for pair in source.identity)),
        flags=tuple(flags),
        codec=next((source.codec for source in sources if source.codec), ""),
    )
    return bound, tuple(one for _, draft in named for one in draft[1])


def is_bound(source: Source) -> bool:
    """Say whether a Source holds several series."""
    return "parts" in source.selector


def read_bound(source: Source, window: tuple[slice, ...] | None, read: Read) -> Image:
    """Read a bound Source, or a window of it; of each series only what the window needs is decoded.

    Args:
        source: made by `bind_series`.
        window: as for `dicom.read`; a window has the very numbers of the whole.
        read: reads a Source of one series.

    Returns:
        an Image (channels, slices, rows, columns) with a validity of its own for each channel.

    Raises:
        ReadError: as `read`.
    """
    parts = whole_window(window, source.shape)
    starts = [part.start for part in parts]
    shape = (len(source.channels), *(part.stop - part.start for part in parts))
    array, valid = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=bool)
    for number, part in enumerate(source.selector["parts"]):
        one = replace(
            source,
            files=tuple(source.files[index] for index in part["files"]),
            selector=part["selector"],
            channels=(source.channels[number],),
            shape=tuple(part["shape"]),
            geometry=VolumeGeometry(np.array(part["affine"])),
        )
        if part["resample"]:
            _interpolate(one, source.geometry.affine, parts, (array[number], valid[number]), read=read)
        else:
            image = read(one, parts)
            array[number], valid[number] = image.array[0], image.valid[0]
    geometry = source.geometry
    return Image(
        array=array,
        valid=valid,
        channels=source.channels,
        geometry=geometry if not any(starts) else geometry.shifted(*starts),
        modality=source.modality,
    )


def _interpolate(
    source: Source, affine: np.ndarray, parts: Sequence[slice], out: tuple[np.ndarray, np.ndarray], *, read: Read
) -> None:
    """Fill `out` (values, valid) with `source` interpolated at the voxel centres of `parts` of the grid `affine`."""
    from scipy.ndimage import map_coordinates

    matrix = np.linalg.inv(source.geometry.affine) @ affine
    corners = np.array(np.meshgrid(*[(part.start, part.stop - 1) for part in parts], indexing="ij")).reshape(3, -1)
    ends = matrix[:3, :3] @ corners + matrix[:3, 3:]
    # One voxel more on each side than the corners need: their rounding must not decide what is read.
    low = np.maximum(np.floor(ends.min(axis=1)) - 1, 0).astype(int)
    high = np.minimum(np.ceil(ends.max(axis=1)) + 2, source.shape).astype(int)
    if (low >= high).any():
        return
    block = read(source, tuple(slice(int(start), int(stop)) for start, stop in zip(low, high, strict=True)))
    stored, holes = block.array[0].astype(np.float64), (~block.valid[0]).astype(np.float64)
    broken = bool(holes.any())
    rows, columns = (np.arange(part.start, part.stop) for part in parts[1:])
    for number, plane in enumerate(range(parts[0].start, parts[0].stop)):
        inside = np.ones((len(rows), len(columns)), dtype=bool)
        places = []
        for axis in range(3):
            # In this order for every voxel, so that a window computes the same bits as the whole.
            place = (matrix[axis, 0] * plane + matrix[axis, 3] + matrix[axis, 1] * rows)[:, None]
            place = place + (matrix[axis, 2] * columns)[None]
            last = source.shape[axis] - 1
            inside &= (place >= -EDGE) & (place <= last + EDGE)
            places.append(np.clip(place, 0, last) - low[axis])
        values = map_coordinates(stored, places, order=1, mode="nearest", prefilter=False)
        if broken:
            inside &= map_coordinates(holes, places, order=1, mode="nearest", prefilter=False) == 0
        out[0][number] = np.where(inside, values, 0)
        out[1][number] = inside
