"""From files to Sources: each header, then what belongs together. No pixel is read here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from geomed_mae.errors import MissingExtraError, ReadError
from geomed_mae.modalities import Modality
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.registry import reader, readers
from geomed_mae.readers.regular import believed, check_regular, first_bytes, quoted
from geomed_mae.readers.scenes import metadata_of, ornament_of
from geomed_mae.readers.source import Refusal, Source, Survey


def header_of(path: Path, root: Path | None = None) -> tuple[str, Any] | Refusal:
    """Look at one file: return (reader name, its header) or a Refusal. Runs in worker processes."""
    try:
        resolved = check_regular(path, root)
        head = first_bytes(resolved)
        name = next((name for name, module in readers().items() if module.sniff(resolved, head)), None)
        if name is None:
            # A suffix that promises a format makes a better reason than "unknown".
            promised = next((m for m in readers().values() if path.name.lower().endswith(tuple(m.SUFFIXES))), None)
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
