r"""The `scene:` part of a modality file: how the band files of one scene are recognised, as data.

    scene:
      product      expression searched in the names of a file and of the folders above it: says that a file is of this
                   modality. Needed with `--modality auto`, where nobody else says so; not where the user names one
      scenes_only  true: with `--modality auto` its scenes alone are of this modality. For names of bands that other
                   sensors use too: a single raster with such descriptions is left to them
      contrary     expression searched there too: says that a file is of another modality (refused)
      folders      expression for folder names that split one scene, such as one folder per resolution
      files        expressions that fit the whole name of a band's file, with the groups `band` and, where a folder can
                   hold several scenes, `scene`; the first that fits counts. An entry may also be a mapping with
                   `pattern` and `scale`, `offset`, `nodata` where these differ from the modality's
      mask         {pattern, bits}: a file of flags; a pixel with one of these bits set (0 is the lowest) is invalid
      leave_out    why: expression, for previews, quality maps and the like
      metadata     expressions for names of files that describe a scene and hold no pixels
      offset       {add, since, in_name, in_xml, in_json, band_ids}: stored numbers carry an offset since a processing
                   baseline. `in_name` has the group `baseline`; `in_xml` names a file and its elements (baseline,
                   quantification, add); `in_json` a file ({scene} is the scene's name) and the key of a product name;
                   `band_ids` is the order of the bands in that XML. Pixels must agree: see `readers.plausible`

Of names that speak for or against a modality the nearest to the file counts. Expressions are Python's, without regard
to case; a list of them stands for any of them. A scene's bands may differ in resolution by whole factors; of several
resolutions of one band the finest is read. Example, for a sensor with one file a band:

    scene:
      files: ['(?P<scene>.+)_(?P<band>red|nir)\.tif']
      leave_out: {a preview: '.+_quicklook\.tif'}
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError, suggest

LEVELS = 7
"""Names looked at: the file's own and those of six folders above it (a band lies five below its SAFE product)."""


@dataclass(frozen=True, slots=True)
class BandFiles:
    """One kind of band file; scale, offset and nodata are None where the modality's hold."""

    pattern: re.Pattern[str]
    scale: float | None = None
    offset: float | None = None
    nodata: float | None = None


@dataclass(frozen=True, slots=True)
class MaskFile:
    """A file of flags: a pixel with any of `bits` set is invalid."""

    pattern: re.Pattern[str]
    bits: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class XmlFields:
    """Names of elements in a product's XML: processing baseline, divisor of the stored numbers, offset per band."""

    file: str
    baseline: str
    quantification: str
    add: str


@dataclass(frozen=True, slots=True, kw_only=True)
class OffsetRule:
    """Stored numbers carry an offset since a processing baseline: `add` is what has to be added to remove it."""

    add: float
    since: float
    in_name: re.Pattern[str] | None = None
    in_xml: XmlFields | None = None
    in_json: dict[str, str] = field(default_factory=dict, hash=False)
    band_ids: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class SceneRule:
    """The parsed `scene:` part; fields as in the module's docstring."""

    files: tuple[BandFiles, ...]
    product: re.Pattern[str] | None = None
    contrary: re.Pattern[str] | None = None
    folders: re.Pattern[str] | None = None
    mask: MaskFile | None = None
    leave_out: tuple[tuple[re.Pattern[str], str], ...] = ()
    metadata: tuple[re.Pattern[str], ...] = ()
    offset: OffsetRule | None = None
    scenes_only: bool = False

    def is_product(self, path: Path) -> bool | None:
        """Whether the names of the file and the folders above it say that it is of this modality; None: nothing."""
        for name in names_above(path):
            if self.product is not None and self.product.search(name):
                return True
            if self.contrary is not None and self.contrary.search(name):
                return False
        return None

    def is_metadata(self, path: Path) -> bool:
        """Whether a file describes scenes of this modality."""
        return any(pattern.fullmatch(path.name) for pattern in self.metadata)


def names_above(path: Path) -> tuple[str, ...]:
    """Return the names of a file and of the folders above it, nearest first, at most LEVELS."""
    return tuple(part for part in path.parts[: -LEVELS - 1 : -1] if part != path.anchor)


def parse_scene(data: Any, where: str) -> SceneRule | None:
    """Return the rule in the `scene:` field of the modality file `where`, or None for None.

    Raises:
        ConfigError: with the file, the field and what is allowed there.
    """
    if data is None:
        return None
    data = _mapping(data, fields(SceneRule), f"{where}: scene")
    files = tuple(_band_files(entry, where) for entry in data.get("files") or ())
    if not files:
        raise ConfigError(f"{where}: scene has no 'files'; give expressions for the names of band files")
    mask = data.get("mask")
    if mask is not None:
        mask = _mapping(mask, fields(MaskFile), f"{where}: scene.mask")
        mask = MaskFile(_expression(mask.get("pattern"), where), tuple(int(bit) for bit in mask.get("bits") or (0,)))
    return SceneRule(
        files=files,
        product=_optional(data.get("product"), where),
        contrary=_optional(data.get("contrary"), where),
        folders=_optional(data.get("folders"), where),
        mask=mask,
        leave_out=tuple((_expression(text, where), str(why)) for why, text in (data.get("leave_out") or {}).items()),
        metadata=tuple(_expression(text, where) for text in data.get("metadata") or ()),
        offset=_offset(data.get("offset"), where),
        scenes_only=bool(data.get("scenes_only", False)),
    )


def _mapping(data: Any, known: Sequence[Any], what: str) -> dict[str, Any]:
    names = {entry.name for entry in known}
    if not isinstance(data, dict):
        raise ConfigError(f"{what} is {data!r}; it must be a mapping with some of {', '.join(sorted(names))}")
    for key in data:
        if key not in names:
            raise ConfigError(f"{what} has no field '{key}'; {suggest(str(key), names)}")
    return data


def _expression(text: Any, where: str, group: str = "") -> re.Pattern[str]:
    try:
        text = "|".join(f"(?:{part})" for part in text) if isinstance(text, list) else str(text)
        pattern = re.compile(text, re.IGNORECASE)
    except re.error as error:
        raise ConfigError(f"{where}: scene has the expression {text!r}, which does not parse: {error}") from None
    if group and group not in pattern.groupindex:
        raise ConfigError(f"{where}: the expression {text!r} in scene lacks the group (?P<{group}>...)")
    return pattern


def _optional(text: Any, where: str) -> re.Pattern[str] | None:
    return None if text is None else _expression(text, where)


def _band_files(entry: Any, where: str) -> BandFiles:
    if not isinstance(entry, dict):
        return BandFiles(_expression(entry, where, "band"))
    entry = _mapping(entry, fields(BandFiles), f"{where}: scene.files")
    numbers = {key: float(entry[key]) for key in ("scale", "offset", "nodata") if entry.get(key) is not None}
    return BandFiles(_expression(entry.get("pattern"), where, "band"), **numbers)


def _offset(data: Any, where: str) -> OffsetRule | None:
    if data is None:
        return None
    data = _mapping(data, fields(OffsetRule), f"{where}: scene.offset")
    xml = data.get("in_xml")
    if xml is not None:
        xml = _mapping(xml, fields(XmlFields), f"{where}: scene.offset.in_xml")
        missing = [entry.name for entry in fields(XmlFields) if entry.name not in xml]
        if missing:
            raise ConfigError(f"{where}: scene.offset.in_xml lacks '{missing[0]}'")
        xml = XmlFields(**xml)
    for key in ("add", "since"):
        if not isinstance(data.get(key), int | float):
            raise ConfigError(f"{where}: scene.offset.{key} is {data.get(key)!r}; it must be a number")
    return OffsetRule(
        add=float(data["add"]),
        since=float(data["since"]),
        in_name=None if data.get("in_name") is None else _expression(data["in_name"], where, "baseline"),
        in_xml=xml,
        in_json=dict(data.get("in_json") or {}),
        band_ids=tuple(data.get("band_ids") or ()),
    )
