"""From files to an index: headers first, then one full decode an image, in decoding processes and never here.

headers.py    which files there are, what their headers say
examine.py    what the pixels say
journal.py    what an earlier scan has learned already
workers.py    who does it: threads with a child each, or a Dask cluster
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomed_mae.archives.duplicates import duplicate_flags
from geomed_mae.archives.examine import Examination, examine_apart
from geomed_mae.archives.headers import PASSING, Found, Progress, find_files, look
from geomed_mae.archives.identity import content_key, groups, keyed, new_salt
from geomed_mae.archives.index import Index, Row, is_index, refuse_unfinished
from geomed_mae.archives.journal import Journal, Stamp, journal
from geomed_mae.archives.ledger import Ledger, account
from geomed_mae.archives.split_file import restrict
from geomed_mae.archives.workers import Workers, workers_of
from geomed_mae.errors import ConfigError, TooManyBadInputsError
from geomed_mae.image import RasterGeometry, VolumeGeometry
from geomed_mae.modalities import Modality, resolve_modalities
from geomed_mae.readers import group_headers, nothing_usable, reader
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.source import Refusal, Source

DEFAULT_MAX_BAD = 0.01
"""Share of bad files beyond which an archive is refused, as long as it has more than a handful of files."""

FEW_FILES = 100
"""Below this many files one bad file is more than a per cent; the error budget then allows one."""

_LOG = logging.getLogger(__name__)


def _silent(items: Iterable, what: str, total: int) -> Iterable:
    return items


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What a scan takes over from earlier ones.

    Attributes:
        folder: the index folder, which exists; its journal is read and written. None keeps nothing.
        salt: secret of the keyed hashes; the same salt gives the same keys.
        verify: decode everything again and compare it with the journal.
    """

    folder: Path | None = None
    salt: bytes | None = None
    verify: bool = False


def scan_archive(
    paths: Sequence[Path],
    modality: str | Sequence[str] | Sequence[Modality] = "auto",
    *,
    workers: int = 1,
    dask: str | None = None,
    max_bad: float = DEFAULT_MAX_BAD,
    memory: Memory | None = None,
    progress: Progress = _silent,
) -> Index:
    """Scan raw files and folders into an index in memory. Nothing is written anywhere but to the journal.

    Args:
        paths: files and folders; folders are searched through recursively.
        modality: names or files of the modalities that images may have, or "auto".
        workers: decoding processes of this machine.
        dask: address of a Dask scheduler whose workers, which must see the same paths, do the work instead.
        max_bad: largest share of bad files, 0 to 1. Files of no image format are not bad.
        memory: what earlier scans have learned, and where to keep what this one learns.
        progress: shows how far the two passes are.

    Raises:
        ConfigError: a path does not exist, a modality is unknown, or no scheduler answers.
        TooManyBadInputsError, ReadError: nothing is usable, or the error budget is exceeded.
        OutputError: the journal cannot be written.
    """
    modalities = resolve_modalities(modality)
    memory = memory or Memory()
    found = find_files([Path(path) for path in paths])
    with journal(memory.folder) as kept, workers_of(workers, dask) as crew:
        seen = list(look(found, crew, kept, progress, verify=memory.verify))
        sources, refusals = _grouped(seen, modalities)
        stamps = {file.real: file.stamp for file in found if file.stamp is not None}
        examined = list(_examined(sources, stamps, crew, kept, memory.verify, progress))
        kept.forget_others()
    accepted = [(source, result) for source, result in examined if isinstance(result, Examination)]
    for source, result in examined:
        if isinstance(result, Refusal):
            refusals += [Refusal(path, result.reason, result.detail) for path in source.files]
    salt = memory.salt or new_salt()
    rows = _rows(accepted, salt)
    sources_by_key = {row.key: source for row, (source, _) in zip(rows, accepted, strict=True)}
    ledger = account([(file.path, file.real) for file in found], sources_by_key, refusals, salt)
    _check_budget(paths, rows, refusals, ledger, max_bad)
    digests = {row.key: result.digest for row, (_, result) in zip(rows, accepted, strict=True)}
    looks = {row.key: result.look for row, (_, result) in zip(rows, accepted, strict=True)}
    return Index(tuple(rows), ledger, sources_by_key, digests, salt, looks)


def _grouped(
    seen: Sequence[tuple[Found, object]], modalities: Sequence[Modality]
) -> tuple[list[Source], list[Refusal]]:
    """Group headers root by root: images do not reach from one archive into another."""
    sources: list[Source] = []
    refusals: list[Refusal] = []
    by_root: dict[Path | None, list[Any]] = {}
    for file, outcome in seen:
        by_root.setdefault(file.root, []).append(outcome)
    for outcomes in by_root.values():
        survey = group_headers(outcomes, modalities)
        sources += survey.sources
        refusals += survey.refusals
    sources.sort(key=lambda source: (source.files[0], str(source.selector)))
    return sources, refusals


def _examined(
    sources: Sequence[Source],
    stamps: dict[Path, Stamp],
    crew: Workers,
    kept: Journal,
    verify: bool,
    progress: Progress,
) -> Iterator[tuple[Source, Examination | Refusal]]:
    """Yield every source with what its pixels say, in the order of `sources`."""
    states = [[stamps.get(path) for path in source.files] for source in sources]
    known = [kept.image(source, state) for source, state in zip(sources, states, strict=True)]
    results = list(known) if not verify else [None] * len(sources)
    todo = [number for number, result in enumerate(results) if result is None]

    def done() -> Iterator[int]:
        """Yield the numbers of sources as their results come in."""
        yield from (number for number, result in enumerate(results) if result is not None)
        for position, result in crew.results(examine_apart, [sources[number] for number in todo]):
            number = todo[position]
            if known[number] is not None:
                result = _compared(known[number], result)
            elif not (isinstance(result, Refusal) and result.reason in PASSING):
                kept.keep_image(sources[number], states[number], result)
            results[number] = result
            yield number

    for _ in progress(done(), "pixels", len(sources)):
        pass
    if verify and (news := sum(result is None for result in known)):
        _LOG.warning("%d of %d images have not been examined before and could not be compared", news, len(known))
    yield from zip(sources, results, strict=True)


def _compared(before: Examination | Refusal, now: Examination | Refusal) -> Examination | Refusal:
    """Return `now` where it is what the journal has, else the refusal: the same files, by their stamps, changed."""
    if isinstance(before, Refusal) or (isinstance(now, Examination) and now.digest == before.digest):
        return now
    if isinstance(now, Refusal) and now.reason in PASSING:
        return now
    why = "decode to other values" if isinstance(now, Examination) else f"no longer decode ({now.reason.name})"
    return Refusal(
        Path(), Reason.HASH_MISMATCH, f"its pixels {why} although size and time are unchanged; restore it from a copy"
    )


def _rows(accepted: Sequence[tuple[Source, Examination]], salt: bytes) -> list[Row]:
    keys = [keyed(salt, "image", *map(str, source.files), str(source.selector)) for source, _ in accepted]
    footprints = [_footprint(source) for source, _ in accepted]
    digests = [result.digest for _, result in accepted]
    looks = [result.look for _, result in accepted]
    identities = [source.identity or (("file", str(source.files[0])),) for source, _ in accepted]
    areas = [math.prod(source.geometry.spacing or (0.0,)) for source, _ in accepted]
    together = groups(identities, list(zip(footprints, areas, strict=True)), digests, looks)
    # A group is called after the first of its keys, so that its name outlives images added elsewhere.
    names: dict[int, str] = {}
    for number, key in zip(together, keys, strict=True):
        names[number] = min(names.get(number, key), key)
    rows = []
    everything = zip(accepted, keys, footprints, together, duplicate_flags(digests, looks), strict=True)
    for (source, result), key, footprint, number, copies in everything:
        rows.append(
            Row(
                key=key,
                modality=source.modality,
                channels=source.channels,
                shape=source.shape,
                dtype=source.dtype,
                geometry=_geometry_name(source),
                spacing=source.geometry.spacing,
                crs=getattr(source.geometry, "crs", None),
                footprint=footprint,
                valid_fraction=result.valid_fraction,
                statistics=result.statistics,
                group=keyed(salt, "group", names[number]),
                content=content_key(result.digest, salt),
                flags=tuple(dict.fromkeys((*source.flags, *result.flags, *copies))),
                block=source.block,
            )
        )
    return rows


def _footprint(source: Source) -> tuple[tuple[float, float], ...] | None:
    if not isinstance(source.geometry, RasterGeometry) or source.geometry.crs is None:
        return None
    return reader(source.reader).footprint(source.geometry, source.shape)


def _geometry_name(source: Source) -> str:
    if isinstance(source.geometry, RasterGeometry):
        return "raster"
    return "volume" if isinstance(source.geometry, VolumeGeometry) else "plane"


def _check_budget(
    paths: Sequence[Path], rows: Sequence[Row], refusals: Sequence[Refusal], ledger: Ledger, max_bad: float
) -> None:
    if not rows:
        raise nothing_usable(Path(paths[0]) if len(paths) == 1 else Path("these archives"), refusals)
    if ledger.bad_fraction > max_bad and not (ledger.bad <= 1 and len(ledger.entries) < FEW_FILES):
        raise TooManyBadInputsError(
            f"{ledger.bad_fraction:.1%} of the files are bad, more than --max-bad {max_bad:.1%} allows: "
            f"{ledger.summary()}; look into them, or raise --max-bad"
        )


def open_archive(
    paths: Sequence[str | Path],
    modality: str | Sequence[str] | Sequence[Modality] = "auto",
    *,
    workers: int = 1,
    max_bad: float = DEFAULT_MAX_BAD,
    progress: Progress = _silent,
    part: str | None = None,
    salt: bytes | None = None,
) -> Index:
    """Return the index of an archive: INDEX folders are loaded, raw files and folders are scanned, in that order.

    With `part` only the images of that part of each index's stored split are in it. With `salt` raw files get the keys
    that they had under the same salt before; else they get new ones.

    Raises:
        ConfigError: a part is asked for, and a path is not an index that has it.
        as `scan_archive` and `Index.load`.
    """
    for path in paths:
        refuse_unfinished(Path(path))
    folders = [Path(path) for path in paths if is_index(Path(path))]
    raw = [Path(path) for path in paths if not is_index(Path(path))]
    if part is not None and raw:
        raise ConfigError(
            f"data.split is '{part}', but '{raw[0]}' is no index with a stored split; make one with "
            "geomed-mae scan --split group, or leave data.split out"
        )
    parts = [Index.load(folder) for folder in folders]
    if part is not None:
        parts = [restrict(index, folder, part) for index, folder in zip(parts, folders, strict=True)]
    if raw:
        parts.append(
            scan_archive(raw, modality, workers=workers, max_bad=max_bad, memory=Memory(salt=salt), progress=progress)
        )
    return parts[0] if len(parts) == 1 else Index.joined(parts)


def of_modalities(index: Index, modality: str | Sequence[str] | Sequence[Modality]) -> Index:
    """Return the images of the named modalities; all of them under "auto", and where none has such a name.

    An index may hold more than a recipe is for; a log line says how many images are not used.
    """
    if modality == "auto" or list(modality) == ["auto"]:
        return index
    wanted = {entry.name for entry in resolve_modalities(modality)}
    rows = [row for row in index.rows if row.modality in wanted]
    if not rows or len(rows) == len(index.rows):
        return index
    others = sorted({row.modality for row in index.rows} - wanted)
    _LOG.warning("%d images of %s in the index are not used", len(index.rows) - len(rows), ", ".join(others))
    return index.subset(rows)


def keep_apart(out: str | Path, archives: Sequence[str | Path]) -> None:
    """Refuse an output folder in an archive, which is never written to, or around one, which must not be deleted.

    Raises:
        ConfigError: naming both.
    """
    where = Path(out).resolve()
    for archive in archives:
        other = Path(archive).resolve()
        if where == other or other in where.parents or where in other.parents:
            raise ConfigError(
                f"the output '{out}' and the archive '{archive}' lie in one another; choose another --out"
            )
