"""Whether a scene's stored numbers carry an offset, as its metadata and names declare it; never from a date.

Sentinel-2 products of processing baseline 04.00 and later store (reflectance * 10000) + 1000, and say so in their XML
(BOA_ADD_OFFSET or RADIO_ADD_OFFSET = -1000). The date of sensing decides nothing: Collection-1 reprocessing has brought
images of 2015 to baseline 05.00. Order of evidence: the product's XML; the baseline in the name of the file or of a
folder above it; the product that a JSON beside the bands names (BigEarthNet). XML and names that disagree are refused.
Baselines from 90.00 on are what processors run by users write (99.99): they say nothing about the offset.

Source: ESA, Sentinel-2 Products Specification Document (S2-PDGS-TAS-DI-PSD) and processing baseline 04.00 notes.
"""

from __future__ import annotations

import json
import math
import os
import stat
import xml.parsers.expat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geomed_mae.errors import ReadError
from geomed_mae.modalities.scene import LEVELS, OffsetRule, SceneRule, XmlFields, names_above
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import as_read_error, quoted, shown

MAX_METADATA_BYTES = 8 << 20
"""A product's XML has some 60 KB."""
LOCAL_BASELINE = 90.0
"""Baselines from here on come from processors run by users."""


@dataclass(frozen=True, slots=True)
class Declared:
    """What a scene says: stored number `n` is (n + add) / quantification.

    `add` per channel name; `every` for channels it does not list; None where nothing says whether there is an offset.
    `quantification` is None where no metadata gives it.
    """

    add: Mapping[str, float] = field(default_factory=dict)
    every: float | None = None
    quantification: float | None = None

    def of(self, channel: str) -> float | None:
        """Return what has to be added to a channel's stored numbers, None where nothing says so."""
        return self.add.get(channel, self.every)


def declared_offset(rule: SceneRule, band: Path, folder: Path, key: str) -> Declared:
    """Return what the scene of a band file declares.

    Args:
        rule: of the scene's modality.
        band: any of its band files; names are looked at from here up.
        folder: the scene's folder.
        key: the scene's name in its file names.

    Raises:
        ReadError: MALFORMED when metadata does not parse, OFFSET_SUSPECT when metadata and names disagree.
    """
    offset = rule.offset
    if offset is None:
        return Declared(every=0.0)
    named = _from_names(offset, names_above(band))
    if offset.in_xml is not None:
        path = _upwards(folder, offset.in_xml.file)
        if path is not None:
            found = _from_xml(offset, offset.in_xml, path)
            if None not in (named, found.every) and named != found.every:
                raise ReadError(
                    f"{shown(path)} says that {found.every:g} is to be added to the stored numbers, the baseline in "
                    f"the product's name says {named:g}; keep one product's files together",
                    Reason.OFFSET_SUSPECT.name,
                )
            return found
    if named is None and offset.in_json:
        path = _plain_file(folder / offset.in_json.get("file", "").format(scene=key))
        if path is not None:
            named = _from_names(offset, (_json_text(path, offset.in_json.get("key", "")),))
    return Declared(every=named)


def _of_baseline(offset: OffsetRule, baseline: float) -> float | None:
    if baseline >= LOCAL_BASELINE:
        return None
    return offset.add if baseline >= offset.since else 0.0


def _from_names(offset: OffsetRule, names: tuple[str, ...]) -> float | None:
    """Return the offset by the baseline in the nearest name that has one."""
    if offset.in_name is None:
        return None
    for name in names:
        match = offset.in_name.search(name)
        if match:
            digits = match["baseline"].replace(".", "")
            return _of_baseline(offset, int(digits) / 100)
    return None


def _upwards(folder: Path, name: str) -> Path | None:
    """Return the file `name` in the folder or one above it, not beyond a SAFE product."""
    for _ in range(LEVELS - 2):
        path = _plain_file(folder / name)
        if path is not None:
            return path
        if folder.name.upper().endswith(".SAFE"):
            return None
        folder = folder.parent
    return None


def _plain_file(path: Path) -> Path | None:
    """Return a path that is a regular file itself, no link: metadata is never followed out of an archive."""
    try:
        return path if stat.S_ISREG(os.lstat(path).st_mode) else None
    except (OSError, ValueError):
        return None


def _content(path: Path) -> str:
    """Return the text of a metadata file.

    Raises:
        ReadError: MALFORMED: too large, or not UTF-8; VANISHED when it cannot be read.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MAX_METADATA_BYTES + 1)
    except OSError as error:
        raise as_read_error(error, path) from None
    if len(data) > MAX_METADATA_BYTES:
        raise ReadError(f"{shown(path)} has more than {MAX_METADATA_BYTES} bytes", Reason.MALFORMED.name)
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ReadError(f"{shown(path)} is not UTF-8 text", Reason.MALFORMED.name) from None


def _json_text(path: Path, key: str) -> str:
    """Return the text that a JSON object has under `key`, "" where it has none.

    Raises:
        ReadError: MALFORMED or VANISHED.
    """
    try:
        data: Any = json.loads(_content(path))
    except (ValueError, RecursionError):
        raise ReadError(f"{shown(path)} is not JSON", Reason.MALFORMED.name) from None
    value = data.get(key) if isinstance(data, dict) else None
    return value if isinstance(value, str) else ""


def _from_xml(offset: OffsetRule, wanted: XmlFields, path: Path) -> Declared:
    found = _elements(path, (wanted.baseline, wanted.quantification, wanted.add))
    quantification = _number(found[wanted.quantification], path, wanted.quantification)
    if quantification is not None and not 1 <= quantification <= 1e6:
        raise ReadError(f"{shown(path)} divides by {quantification:g}", Reason.MALFORMED.name)
    baseline = _number(found[wanted.baseline], path, wanted.baseline)
    adds = {}
    for attributes, text in found[wanted.add]:
        number = _number([({}, text)], path, wanted.add)
        band = attributes.get("band_id", "")
        if not band.isdigit() or int(band) >= len(offset.band_ids) or not abs(number) <= 1e6:
            raise ReadError(f"{shown(path)} has {wanted.add} {number:g} of band {quoted(band)}", Reason.MALFORMED.name)
        adds[offset.band_ids[int(band)]] = number
    every = None if baseline is None else _of_baseline(offset, baseline)
    if adds:
        # Products write one and the same offset for all bands; a band that they do not list has it too.
        values = set(adds.values())
        every = values.pop() if len(values) == 1 else None
    return Declared(adds, every, quantification)


def _number(entries: list[tuple[dict[str, str], str]], path: Path, name: str) -> float | None:
    """Return the number in the first of the elements, None without any."""
    if not entries:
        return None
    try:
        value = float(entries[0][1])
        if math.isfinite(value):
            return value
    except ValueError:
        pass
    raise ReadError(f"{shown(path)}: {name} is {quoted(entries[0][1])}, no number", Reason.MALFORMED.name)


def _elements(path: Path, names: tuple[str, ...]) -> dict[str, list[tuple[dict[str, str], str]]]:
    """Return (attributes, text) of each element with one of `names`, prefixes of name spaces left out.

    Raises:
        ReadError: MALFORMED when it is no XML, or declares a document type: entities expand without bound.
    """
    found: dict[str, list[tuple[dict[str, str], str]]] = {name: [] for name in names}
    current: list[str] = []
    parser = xml.parsers.expat.ParserCreate()

    def refuse(*_: Any) -> None:
        raise ReadError(f"{shown(path)} declares a document type; metadata has none", Reason.MALFORMED.name)

    def start(tag: str, attributes: dict[str, str]) -> None:
        name = tag.rpartition(":")[2]
        current[:] = [name] if name in found else []
        if current:
            found[name].append((attributes, ""))

    def text(data: str) -> None:
        if current:
            attributes, before = found[current[0]][-1]
            found[current[0]][-1] = (attributes, (before + data).strip())

    def end(_: str) -> None:
        current.clear()

    parser.StartDoctypeDeclHandler = parser.EntityDeclHandler = refuse
    parser.StartElementHandler, parser.CharacterDataHandler, parser.EndElementHandler = start, text, end
    try:
        parser.Parse(_content(path), True)
    except xml.parsers.expat.ExpatError as error:
        raise ReadError(f"{shown(path)} is no XML: {error}", Reason.MALFORMED.name) from None
    return found
