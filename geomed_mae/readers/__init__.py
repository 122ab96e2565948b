"""Readers: FORMAT, one file each; the only place that opens image files. Everything after takes an Image.

A reader is a module in this folder (or an entry point of group `geomed_mae.readers`) with these names:

    SUFFIXES: tuple[str, ...]     usual endings, lower case; a hint, never proof
    EXTRA, PACKAGE: str           the extra of geomed-mae and the import that it needs
    sniff(path, head) -> bool     does this format own the file, by its first bytes?
    header(path) -> Header | Refusal             one file, no pixels; a dataclass of plain values (see `wire`)
    group(headers, modalities) -> Survey         files that belong together become Sources
    read(source, window=None) -> Image           window: one slice a spatial axis, inside the image
    verify(source, statistics) -> flags          optional: a ReadError when the values of the pixels (one statistics
                                                 entry a channel) belie the metadata, flags when they may
    read_labels(path, onto: Image, query: LabelQuery) -> Labels      optional: labels on the grid of `onto`, by geometry
                                                 (only its shape and geometry are looked at, never its pixels)
    label_references(path) -> tuple[(kind, value), ...] | None       optional: the images that a label file names, as
                                                 pairs of `Source.identity`; None for a file that holds no labels

`header`, `group` and `read` report what is wrong with data as Refusal or ReadError with a Reason, nothing else.
Heavy packages are imported inside functions, so that listing readers needs none of them.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from geomed_mae.errors import MissingExtraError, ReadError, TooManyBadInputsError
from geomed_mae.image import Image
from geomed_mae.modalities import Modality, resolve_modalities
from geomed_mae.plugins import load_plugin, plugin_names
from geomed_mae.readers.child import MEMORY_BYTES, SECONDS, in_child
from geomed_mae.readers.labels import IGNORE, LabelQuery, Labels
from geomed_mae.readers.plausible import summary
from geomed_mae.readers.reasons import NOT_BAD, Reason
from geomed_mae.readers.regular import believed, check_regular, first_bytes, list_files, quoted, shown
from geomed_mae.readers.scenes import metadata_of, ornament_of
from geomed_mae.readers.source import Refusal, Source, Survey, decoded_values, whole_window
from geomed_mae.readers.wire import trust

__all__ = [
    "IGNORE",
    "LabelQuery",
    "Labels",
    "group_headers",
    "header_of",
    "label_references",
    "limits",
    "load_readers",
    "nothing_usable",
    "read",
    "read_guarded",
    "read_images",
    "read_labels",
    "read_labels_guarded",
    "reader",
    "survey",
]

MARKER = "SUFFIXES"

VALUES_PER_SECOND = 1e6
"""Values that the slowest codec decodes and a scan examines in a second of processor time, with room: JPEG 2000 gives
some ten million."""
BYTES_PER_VALUE = 48
"""Memory for each value that is held at once: stored, as float64 while it is rescaled, as float32, valid, sorted."""
LABEL_BYTES_PER_SECOND, BYTES_PER_LABEL_BYTE = 1e6, 16
"""Of a file of outlines: what is parsed and drawn in a second of processor time; memory for each byte, with room."""


log = logging.getLogger(__name__)


@cache
def _readers() -> dict[str, ModuleType]:
    found = {name: load_plugin("readers", name, marker=MARKER) for name in plugin_names("readers", marker=MARKER)}
    for module in found.values():
        trust(module.__name__)
    return found


def load_readers() -> None:
    """Import every reader module, none of their packages: headers from another process can then be unpacked."""
    _readers()


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
            return Refusal(path, reason, f"its first bytes are {quoted(head[:8])}")
        module = reader(name)
        found = believed(lambda: _header(module, resolved), [resolved])
    except MissingExtraError as error:
        return Refusal(path, Reason.MISSING_EXTRA, str(error))
    except ReadError as error:
        return Refusal(path, Reason[error.reason], str(error))
    return name, found


def _header(module: ModuleType, path: Path) -> Any:
    found = module.header(path)
    if isinstance(found, Refusal):
        raise ReadError(found.detail, found.reason.name)
    return found


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
    return group_headers(mapper(header_of, files, [root] * len(files)), modalities)


def group_headers(outcomes: Iterable[tuple[str, Any] | Refusal], modalities: Sequence[Modality]) -> Survey:
    """Group what `header_of` said of each file into Sources, reader by reader."""
    headers: dict[str, list[Any]] = {}
    refusals: list[Refusal] = []
    for found in outcomes:
        if isinstance(found, Refusal):
            refusals.append(metadata_of(found, modalities))
        elif (ornament := ornament_of(getattr(found[1], "path", None), modalities)) is not None:
            refusals.append(ornament)
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
    module = reader(source.reader)
    return believed(lambda: module.read(source, window), source.files)


def read_guarded(source: Source, window: tuple[slice, ...] | None = None) -> Image:
    """As `read`, but what needs an image codec is decoded in a child process, which a hostile file may crash.

    Raises:
        ReadError: as `read`; also DECODE_FAILED when the codec crashes or hangs, TOO_LARGE when memory runs out.
    """
    if not source.codec:
        return read(source, window)
    spans = None if window is None else tuple((part.start, part.stop) for part in window)
    whole = whole_window(window, source.shape)
    values = len(source.channels) * math.prod(part.stop - part.start for part in whole)
    return in_child(_read_spans, source, spans, **limits(decoded_values(source, [whole]), at_once=values))


def _read_spans(source: Source, spans: tuple[tuple[int | None, int | None], ...] | None) -> Image:
    return read(source, None if spans is None else tuple(slice(*span) for span in spans))


def limits(values: int, *, at_once: int) -> dict[str, Any]:
    """Return limits for a child (`seconds`, `memory` in bytes) that decodes `values`, `at_once` of them at a time."""
    return {"seconds": SECONDS + values / VALUES_PER_SECOND, "memory": MEMORY_BYTES + BYTES_PER_VALUE * at_once}


def read_images(path: str | Path, modality: str | Sequence[str] = "auto") -> list[Image]:
    """Read every image in a file or folder, in this process except for image codecs (see `read_guarded`).

    Files that hold no image are passed over; files that are bad are counted by reason in a log line of level WARNING,
    since a list of images has no place for them (`scan` gives each file its line).

    Args:
        path: a file or a folder, searched through recursively.
        modality: a modality's name, a YAML file, several of these, or "auto".

    Raises:
        ReadError: the only file cannot be read; the message says why.
        TooManyBadInputsError: a folder holds nothing usable; the message counts the reasons.
        ConfigError: the path does not exist, or the modality is unknown.
    """
    path = Path(path)
    found = survey(list_files(path), resolve_modalities(modality), root=path if path.is_dir() else None)
    images: list[Image] = []
    refusals = list(found.refusals)
    for source in found.sources:
        try:
            images.append(_read_verified(source))
        except ReadError as error:
            refusals += [Refusal(file, Reason[error.reason], str(error)) for file in source.files]
    if not images:
        raise nothing_usable(path, refusals)
    if bad := [refusal for refusal in refusals if refusal.reason not in NOT_BAD]:
        log.warning("%d files were left out: %s", len(bad), _counted(bad))
    return images


def _read_verified(source: Source) -> Image:
    image = read_guarded(source)
    module = reader(source.reader)
    if hasattr(module, "verify"):
        module.verify(source, summary(image))
    return image


def nothing_usable(path: Path, refusals: Sequence[Refusal]) -> ReadError | TooManyBadInputsError:
    """Return the error that says why no image came out of `path`."""
    if not refusals:
        return TooManyBadInputsError(f"{path} holds no files; point to a folder with raw images")
    if len(refusals) == 1:
        only = refusals[0]
        detail = f" ({only.detail})" if only.detail else ""
        return ReadError(f"{shown(only.path)} cannot be used: {only.reason.value}{detail}", only.reason.name)
    example = next((refusal.detail for refusal in refusals if refusal.detail and refusal.reason not in NOT_BAD), "")
    example = f"; for example: {example}" if example else ""
    return TooManyBadInputsError(
        f"none of the {len(refusals)} files in {path} can be used: {_counted(refusals)}{example}"
    )


def _counted(refusals: Sequence[Refusal]) -> str:
    counts = Counter(refusal.reason for refusal in refusals)
    return ", ".join(f"{count} x {reason.name} ({reason.value})" for reason, count in sorted(counts.items()))


def read_labels(path: Path, onto: Image, query: LabelQuery | None = None) -> Labels:
    """Read a label file as labels on the grid of `onto`, placed by geometry, never by array shape.

    `query` says which image this is and which classes are wanted; formats that store numbers need neither.

    Raises:
        ReadError: not a label format, or it does not overlap the image.
    """
    resolved = check_regular(path)
    name = _label_reader(resolved)
    if name is None:
        raise ReadError(f"{shown(path)} is not a label file that a reader knows", Reason.UNKNOWN_FORMAT.name)
    return reader(name).read_labels(resolved, onto, query or LabelQuery())


def read_labels_guarded(path: Path, onto: Image, query: LabelQuery | None = None) -> Labels:
    """As `read_labels`, in a child process: outlines pass through native code as codecs do, and may keep it for hours.

    Raises:
        ReadError: as `read_labels`; also DECODE_FAILED when that code crashes or hangs, TOO_LARGE when memory runs out.
        MissingExtraError: the package that reads the format is not installed.
    """
    name = _label_reader(check_regular(path))
    if name is not None:
        reader(name)
    shape = onto.array.shape
    values, size = math.prod(shape[1:]), path.stat().st_size
    found = in_child(
        _labels_on,
        path,
        (shape, onto.channels, onto.geometry, onto.modality),
        query or LabelQuery(),
        seconds=SECONDS + values / VALUES_PER_SECOND + size / LABEL_BYTES_PER_SECOND,
        memory=MEMORY_BYTES + BYTES_PER_VALUE * values + BYTES_PER_LABEL_BYTE * size,
    )
    return replace(found, array=found.array.copy())  # what a process sends is read-only, what a reader gives is not


def _labels_on(path: Path, outline: tuple[Any, ...], query: LabelQuery) -> Labels:
    shape, channels, geometry, modality = outline
    blank, valid = np.broadcast_to(np.float32(0), shape), np.broadcast_to(np.True_, shape)
    onto = Image(array=blank, valid=valid, channels=channels, geometry=geometry, modality=modality)
    return read_labels(path, onto, query)


def label_references(path: Path) -> tuple[tuple[str, str], ...] | None:
    """Return the (kind, value) pairs of the images that a label file names, () where its format names none.

    Kinds are those of `Source.identity`; None says that the file holds no labels. Private, as identities are.

    Raises:
        ReadError: not a regular file, or a label file that does not parse.
    """
    resolved = check_regular(path)
    name = _label_reader(resolved)
    if name is None:
        return None
    module = reader(name)
    return module.label_references(resolved) if hasattr(module, "label_references") else ()


def _label_reader(path: Path) -> str | None:
    """Return the name of the reader of a checked label file's format, None where none reads labels in it."""
    head = first_bytes(path)
    known = ((name, module) for name, module in _readers().items() if hasattr(module, "read_labels"))
    return next((name for name, module in known if module.sniff(path, head)), None)
