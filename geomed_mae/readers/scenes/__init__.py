"""Scenes spread over files: which band files are one scene, by the rules of the modality files (`modalities.scene`).

Nothing here knows a format: files come as headers with a name, a grid and a number of bands. Decisions:

- with several modalities to choose from, a file joins a scene when its name, or a folder's, says of exactly one of them
  that it is a product of it; where the user names one modality, the names of the band files are enough;
- a scene that lacks bands keeps those it has, with the flag BANDS_MISSING: channels are physics, sets may differ;
- of several resolutions of one band the finest is read; two files of one band and resolution refuse the scene;
- a file that does not fit the others' grid refuses the scene, and says which file it is: nothing is warped or cut;
- what fits no rule stays an image of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from geomed_mae.image import Channel, RasterGeometry
from geomed_mae.modalities import Modality
from geomed_mae.modalities.scene import BandFiles
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import quoted
from geomed_mae.readers.scenes.grid import Misfit, common_grid
from geomed_mae.readers.source import Refusal

BANDS_MISSING = "BANDS_MISSING"
"""A scene without some of its modality's channels."""


class RasterHeader(Protocol):
    """What grouping needs of a format's header; `colours` has one name a band."""

    path: Path
    shape: tuple[int, int]
    geometry: RasterGeometry
    colours: tuple[str, ...]
    descriptions: tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Member:
    """A file of a scene. `ratio` (rows, columns): pixels of the scene's grid in one of its own.

    `channel` and `kind` are None for a mask of flags.
    """

    header: RasterHeader
    channel: Channel | None
    kind: BandFiles | None
    ratio: tuple[int, int] = (1, 1)


@dataclass(frozen=True, slots=True)
class Scene:
    """Files that are one image: its `bands` in the modality's order, on the grid of `finest`.

    `key` is the scene's name in the file names, `folder` where its files lie (or the folders of its resolutions).
    """

    modality: Modality
    folder: Path
    key: str
    bands: tuple[Member, ...]
    mask: Member | None
    finest: RasterHeader
    flags: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Every header in exactly one of the three: part of a scene, refused, or an image of its own."""

    scenes: list[Scene]
    refusals: list[Refusal]
    rest: list[RasterHeader]


@dataclass(slots=True)
class _Found:
    """What was found of one scene so far."""

    modality: Modality
    folder: Path
    key: str
    bands: dict[str, list[Member]] = field(default_factory=dict)
    masks: list[Member] = field(default_factory=list)


def arrange(headers: Iterable[RasterHeader], candidates: Sequence[Modality]) -> Arrangement:
    """Sort headers into scenes, refusals and single images.

    Args:
        headers: of files of one format.
        candidates: the modalities that images may have.
    """
    ruled = [m for m in candidates if m.scene is not None]
    result = Arrangement([], [], [])
    if not ruled:
        result.rest.extend(headers)
        return result
    open_ended = any(m.geometry == "raster" and not m.channels for m in candidates)
    found: dict[tuple[str, Path, str], _Found] = {}
    doubtful: list[tuple[RasterHeader, Modality, str]] = []
    for header in headers:
        modality = _modality(header.path, ruled, open_ended=open_ended)
        if isinstance(modality, Refusal):
            result.refusals.append(modality)
        elif modality is None:
            result.rest.append(header)
        else:
            _place(header, modality, result, found, doubtful)
    folders = {(name, folder) for name, folder, _ in found}
    for header, modality, why in doubtful:
        # A user's "overview.tif" is an image, unless it lies with the bands of a scene.
        if (modality.name, scene_folder(header.path, modality)) in folders:
            result.refusals.append(_left_out(header, why, modality))
        else:
            result.rest.append(header)
    for scene in found.values():
        _finish(scene, result)
    return result


def scene_folder(path: Path, modality: Modality) -> Path:
    """Return the folder of a band's scene: its own, or the one above the folders of single resolutions."""
    folder, split = path.parent, modality.scene.folders if modality.scene else None
    return folder.parent if split is not None and split.fullmatch(folder.name) else folder


def metadata_of(refusal: Refusal, candidates: Sequence[Modality]) -> Refusal:
    """Return the refusal of a file of no image format with a better reason, where it describes a scene."""
    if refusal.reason is not Reason.UNKNOWN_FORMAT:
        return refusal
    describes = any(m.scene is not None and m.scene.is_metadata(refusal.path) for m in candidates)
    return Refusal(refusal.path, Reason.METADATA, "it describes a scene") if describes else refusal


def ornament_of(path: Path | None, candidates: Sequence[Modality]) -> Refusal | None:
    """Return a refusal for a picture that a product carries of itself or on its web page, else None."""
    rules = [m.scene for m in candidates if m.scene is not None]
    if path is None or not any(rule.is_metadata(path) and rule.is_product(path) for rule in rules):
        return None
    return Refusal(path, Reason.METADATA, "a picture that a product carries, not its data")


def _modality(path: Path, ruled: Sequence[Modality], *, open_ended: bool) -> Modality | Refusal | None:
    """Return the modality whose rule covers a file, None for no rule, or a refusal."""
    covered = [m for m in ruled if _covers(m, path)]
    products = [m for m in covered if m.scene.is_product(path)]
    if len(products) == 1:
        return products[0]
    if len(products) > 1:
        names = ", ".join(m.name for m in products)
        return Refusal(path, Reason.MODALITY_MISMATCH, f"its name fits scenes of {names}; name one of them")
    if open_ended or not covered:
        return None
    if len(covered) > 1:
        names = ", ".join(m.name for m in covered)
        return Refusal(path, Reason.MODALITY_MISMATCH, f"it may be a band of {names}; name one of them")
    if covered[0].scene.is_product(path) is False:
        detail = f"its name says that it is no {covered[0].name}; name the modality that it is, or use auto"
        return Refusal(path, Reason.MODALITY_MISMATCH, detail)
    return covered[0]


def _covers(modality: Modality, path: Path) -> bool:
    rule, name = modality.scene, path.name
    return (
        any(kind.pattern.fullmatch(name) for kind in rule.files)
        or any(pattern.fullmatch(name) for pattern, _ in rule.leave_out)
        or (rule.mask is not None and rule.mask.pattern.fullmatch(name) is not None)
    )


def _place(
    header: RasterHeader,
    modality: Modality,
    result: Arrangement,
    found: dict[tuple[str, Path, str], _Found],
    doubtful: list[tuple[RasterHeader, Modality, str]],
) -> None:
    """Put one file that a rule covers where it belongs."""
    rule, path = modality.scene, header.path
    why = next((why for pattern, why in rule.leave_out if pattern.fullmatch(path.name)), None)
    if why is not None:
        if rule.is_product(path):
            result.refusals.append(_left_out(header, why, modality))
        else:
            doubtful.append((header, modality, why))
        return
    if len([colour for colour in header.colours if colour != "alpha"]) != 1:
        result.rest.append(header)
        return
    mask = rule.mask.pattern.fullmatch(path.name) if rule.mask is not None else None
    match, kind = mask, None
    if mask is None:
        hits = ((kind.pattern.fullmatch(path.name), kind) for kind in rule.files)
        match, kind = next((match, kind) for match, kind in hits if match)
    key = (match.groupdict().get("scene") or "").casefold()
    folder = scene_folder(path, modality)
    if mask is None:
        channel = modality.channel(match["band"])
        if channel is None:
            band = quoted(match["band"])
            detail = f"band {band} is not a channel of {modality.name}; write a modality file that has it"
            result.refusals.append(Refusal(path, Reason.LEFT_OUT, detail))
            return
        described = modality.channel(header.descriptions[0]) if header.descriptions[0] else None
        if described is not None and described.name != channel.name:
            detail = f"its name says band {channel.name}, its description says {described.name}"
            result.refusals.append(Refusal(path, Reason.BAND_MISMATCH, detail))
            return
    scene = found.setdefault(
        (modality.name, folder, key), _Found(modality, folder, match.groupdict().get("scene") or "")
    )
    if mask is None:
        scene.bands.setdefault(channel.name, []).append(Member(header, channel, kind))
    else:
        scene.masks.append(Member(header, None, None))


def _left_out(header: RasterHeader, why: str, modality: Modality) -> Refusal:
    return Refusal(header.path, Reason.LEFT_OUT, f"{why} of a {modality.name} scene")


def _finish(found: _Found, result: Arrangement) -> None:
    """Make a scene of what was found, or refuse its files."""
    members: list[Member] = []
    for name, files in found.bands.items():
        files.sort(key=_pixel_size)
        if len(files) > 1 and _pixel_size(files[0]) == _pixel_size(files[1]):
            _refuse(
                found,
                result,
                Reason.BAND_MISMATCH,
                {f.header.path: f"band {name} comes in several files" for f in files},
            )
            return
        members.append(files[0])
    if not members:
        # Flags without bands: nothing of a scene is left.
        result.refusals.extend(
            _left_out(m.header, "a quality map without its bands", found.modality) for m in found.masks
        )
        return
    if len(found.masks) > 1:
        detail = "its scene has several files of quality flags"
        _refuse(found, result, Reason.BAND_MISMATCH, {m.header.path: detail for m in found.masks})
        return
    grid = common_grid([m.header for m in (*members, *found.masks)])
    if isinstance(grid, Misfit):
        _refuse(found, result, Reason.SCENE_INCOMPLETE, grid.why)
        return
    for files in found.bands.values():
        result.refusals.extend(
            Refusal(extra.header.path, Reason.LEFT_OUT, f"band {extra.channel.name} is read at a finer resolution")
            for extra in files[1:]
        )
    on_grid = [
        Member(m.header, m.channel, m.kind, ratio)
        for m, ratio in zip((*members, *found.masks), grid.ratios, strict=True)
    ]
    order = {channel.name: number for number, channel in enumerate(found.modality.channels)}
    bands = sorted((m for m in on_grid if m.channel is not None), key=lambda m: order[m.channel.name])
    result.scenes.append(
        Scene(
            modality=found.modality,
            folder=found.folder,
            key=found.key,
            bands=tuple(bands),
            mask=next((m for m in on_grid if m.channel is None), None),
            finest=grid.finest,
            flags=(BANDS_MISSING,) if len(bands) < len(order) else (),
        )
    )


def _pixel_size(member: Member) -> float:
    a, b, _, d, e, _ = member.header.geometry.transform
    return abs(a * e - b * d)


def _refuse(found: _Found, result: Arrangement, reason: Reason, culprits: dict[Path, str]) -> None:
    """Refuse all files of a scene: the culprits with what is wrong with them, the others because of them."""
    first = next(iter(culprits.values()))
    for member in (*(m for files in found.bands.values() for m in files), *found.masks):
        path = member.header.path
        detail = culprits.get(path, f"another file of its scene does not fit: {first}")
        result.refusals.append(Refusal(path, reason, detail))
