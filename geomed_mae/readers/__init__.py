"""Readers: FORMAT, one file each; the only place that opens image files. Everything after takes an Image.

A reader is a module in this folder (or an entry point of group `geomed_mae.readers`) with these names:

    SUFFIXES: tuple[str, ...]     usual endings, lower case; a hint, never proof
    EXTRA, PACKAGE: str           the extra of geomed-mae and the import that it needs
    sniff(path, head) -> bool     does this format own the file, by its first bytes?
    header(path) -> Header | Refusal             one file, no pixels; must be picklable, runs in parallel
    group(headers, modalities) -> Survey         files that belong together become Sources
    read(source, window=None) -> Image           window: one slice a spatial axis, inside the image
    read_labels(path, onto: Image, query: LabelQuery) -> Labels      optional: labels on the grid of `onto`, by geometry

`header`, `group` and `read` report what is wrong with data as Refusal or ReadError with a Reason, nothing else.
Heavy packages are imported inside functions, so that listing readers needs none of them.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from geomed_mae.errors import MissingExtraError, ReadError, TooManyBadInputsError
from geomed_mae.image import Image
from geomed_mae.modalities import Modality, resolve_modalities
from geomed_mae.plugins import load_plugin, plugin_names
from geomed_mae.readers.labels import IGNORE, LabelQuery, Labels
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import check_regular, first_bytes, list_files, shown
from geomed_mae.readers.source import Refusal, Source, Survey

__all__ = [
    "IGNORE",
    "LabelQuery",
    "Labels",
    "header_of",
    "nothing_usable",
    "read",
    "read_images",
    "read_labels",
    "reader",
    "survey",
]

MARKER = "SUFFIXES"


@cache
def _readers() -> dict[str, ModuleType]:
    return {name: load_plugin("readers", name, marker=MARKER) for name in plugin_names("readers", marker=MARKER)}


def reader(name: str) -> ModuleType:
    """Return the reader module `name`, its package checked to be installed.

    Raises:
        MissingExtraError: the package that reads this format is not installed.
    """
    # From the cache: looking through entry points takes 15 ms, and this runs once a file.
    module = _readers().get(name) or load_plugin("readers", name, marker=MARKER)
    try:
        importlib.import_module(module.PACKAGE)
    except ImportError:
        raise MissingExtraError(f"reading {name}", module.PACKAGE, module.EXTRA) from None
    return module


def header_of(path: Path, root: Path | None = None) -> tuple[str, Any] | Refusal:
    """Look at one file: return (reader name, its header) or a Refusal. Runs in worker processes."""
    try:
        resolved = check_regular(path, root)
        head = first_bytes(resolved)
        name = next((name for name, module in _readers().items() if module.sniff(resolved, head)), None)
        if name is None:
            # A suffix that promises a format makes a better reason than "unknown".
            promised = next((m for m in _readers().values() if path.name.lower().endswith(tuple(m.SUFFIXES))), None)
            reason = getattr(promised, "NOT_THIS_FORMAT", Reason.UNKNOWN_FORMAT)
            return Refusal(path, reason, f"its first bytes are {head[:8]!r}")
        found = reader(name).header(resolved)
    except MissingExtraError as error:
        return Refusal(path, Reason.MISSING_EXTRA, str(error))
    except ReadError as error:
        return Refusal(path, Reason[error.reason], str(error))
    return Refusal(path, found.reason, found.detail) if isinstance(found, Refusal) else (name, found)


def survey(
    files: Iterable[Path],
    modalities: Sequence[Modality],
    *,
    root: Path | None = None,
    mapper: Callable[..., Iterable] = map,
) -> Survey:
    """Look at the headers of `files` and group them into Sources.

    `mapper` has the interface of `map`; give an executor's to look at files in parallel.
    """
    files = list(files)
    headers: dict[str, list[Any]] = {}
    refusals: list[Refusal] = []
    for found in mapper(header_of, files, [root] * len(files)):
        if isinstance(found, Refusal):
            refusals.append(found)
        else:
            headers.setdefault(found[0], []).append(found[1])
    sources: list[Source] = []
    for name, group in sorted(headers.items()):
        outcome = reader(name).group(group, modalities)
        sources.extend(outcome.sources)
        refusals.extend(outcome.refusals)
    return Survey(sources, refusals)


def read(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """Read a Source, or a window of it, as an Image.

    Raises:
        ReadError: with a typed reason, when the pixels do not decode or are not what the header promised.
    """
    return reader(source.reader).read(source, window)


def read_images(path: str | Path, modality: str | Sequence[str] = "auto") -> list[Image]:
    """Read every image in a file or folder.

    Args:
        path: a file or a folder, searched through recursively.
        modality: a modality's name, a YAML file, several of these, or "auto".

    Raises:
        ReadError: a single file cannot be read; the message says why.
        TooManyBadInputsError: a folder holds nothing usable; the message counts the reasons.
        ConfigError: the path does not exist, or the modality is unknown.
    """
    path = Path(path)
    found = survey(list_files(path), resolve_modalities(modality), root=path if path.is_dir() else None)
    if not found.sources:
        raise nothing_usable(path, found.refusals)
    return [read(source) for source in found.sources]


def nothing_usable(path: Path, refusals: Sequence[Refusal]) -> ReadError | TooManyBadInputsError:
    """Return the error that says why no image came out of `path`."""
    if not refusals:
        return TooManyBadInputsError(f"{path} holds no files; point to a folder with raw images")
    if len(refusals) == 1:
        only = refusals[0]
        detail = f" ({only.detail})" if only.detail else ""
        return ReadError(f"{shown(only.path)} cannot be used: {only.reason.value}{detail}", only.reason.name)
    counts: dict[Reason, int] = {}
    for refusal in refusals:
        counts[refusal.reason] = counts.get(refusal.reason, 0) + 1
    reasons = ", ".join(f"{count} x {reason.name} ({reason.value})" for reason, count in sorted(counts.items()))
    return TooManyBadInputsError(f"none of the {len(refusals)} files in {path} can be used: {reasons}")


def read_labels(path: Path, onto: Image, query: LabelQuery | None = None) -> Labels:
    """Read a label file as labels on the grid of `onto`, placed by geometry, never by array shape.

    `query` says which image this is and which classes are wanted; formats that store numbers need neither.

    Raises:
        ReadError: not a label format, or it does not overlap the image.
    """
    resolved = check_regular(path)
    head = first_bytes(resolved)
    for name, module in _readers().items():
        if hasattr(module, "read_labels") and module.sniff(resolved, head):
            return reader(name).read_labels(resolved, onto, query or LabelQuery())
    raise ReadError(f"{shown(path)} is not a label file that a reader knows", Reason.UNKNOWN_FORMAT.name)
