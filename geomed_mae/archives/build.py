"""From files to an index: headers in parallel, then one full decode an image.

Decoding everything once is what makes the later promises cheap: a file that is damaged is found here, not in the third
night of training; statistics and content keys come from the very pixels that training will see.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from geomed_mae.archives.identity import PixelDigest, connected_groups, content_key, keyed, new_salt
from geomed_mae.archives.index import Index, Row, is_index
from geomed_mae.archives.ledger import Entry, Ledger
from geomed_mae.archives.statistics import ChannelStatistics, Running
from geomed_mae.errors import ConfigError, ReadError, TooManyBadInputsError
from geomed_mae.image import RasterGeometry, VolumeGeometry
from geomed_mae.modalities import Modality, resolve_modalities
from geomed_mae.readers import nothing_usable, read, reader, survey
from geomed_mae.readers.reasons import Reason, status
from geomed_mae.readers.regular import list_files
from geomed_mae.readers.source import Refusal, Source

DEFAULT_MAX_BAD = 0.01
"""Share of bad files beyond which an archive is refused, as long as it has more than a handful of files."""

FEW_FILES = 100
"""Below this many files one bad file is more than a per cent; the error budget then allows one."""

PART_VALUES = 1 << 26
"""Values of a raster that are decoded at a time: 256 MiB of float32."""

Progress = Callable[[Iterable, str, int], Iterable]
"""Wraps an iterable to show its progress: (iterable, what, total) -> iterable."""


def _silent(items: Iterable, what: str, total: int) -> Iterable:
    return items


@contextlib.contextmanager
def _workers(count: int) -> Iterator[Callable[..., Iterable]]:
    """Yield something with the interface of `map`. Spawned, not forked: GDAL handles do not survive a fork."""
    if count <= 1:
        yield map
        return
    executor: Executor = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    with executor:
        yield partial(executor.map, chunksize=8)


def _parts(source: Source) -> Iterator[tuple[slice, ...] | None]:
    """Yield windows that cover an image: bands of rows of a raster too large to decode at once, else all of it."""
    rows, columns = source.shape[-2:]
    height = max(1, PART_VALUES // (columns * len(source.channels)))
    if len(source.shape) != 2 or rows <= height:
        yield None
        return
    for top in range(0, rows, height):
        yield slice(top, min(top + height, rows)), slice(0, columns)


def _examine(source: Source) -> tuple[str, float, tuple[ChannelStatistics, ...]] | Refusal:
    """Decode one image: its pixel digest, valid fraction and statistics. Runs in worker processes."""
    digest = PixelDigest((len(source.channels), *source.shape))
    running = Running(len(source.channels), math.prod(source.shape))
    try:
        for window in _parts(source):
            image = read(source, window)
            digest.add(image)
            running.add(image.array, image.valid)
    except ReadError as error:
        return Refusal(source.files[0], Reason[error.reason], str(error))
    statistics = running.result()
    valid = sum(entry.count for entry in statistics)
    if not valid:
        return Refusal(source.files[0], Reason.ALL_INVALID)
    if all(entry.minimum == entry.maximum for entry in statistics):
        return Refusal(source.files[0], Reason.NO_INFORMATION, "a constant image teaches nothing")
    return digest.hex(), valid / (len(statistics) * math.prod(source.shape)), statistics


def _footprint(source: Source) -> tuple[tuple[float, float], ...] | None:
    if not isinstance(source.geometry, RasterGeometry) or source.geometry.crs is None:
        return None
    return reader(source.reader).footprint(source.geometry, source.shape)


def _geometry_name(source: Source) -> str:
    if isinstance(source.geometry, RasterGeometry):
        return "raster"
    return "volume" if isinstance(source.geometry, VolumeGeometry) else "plane"


def scan_archive(
    paths: Sequence[Path],
    modality: str | Sequence[str] | Sequence[Modality] = "auto",
    *,
    workers: int = 1,
    max_bad: float = DEFAULT_MAX_BAD,
    progress: Progress = _silent,
) -> Index:
    """Scan raw files and folders into an index in memory. Nothing is written anywhere.

    Args:
        paths: files and folders; folders are searched through recursively.
        modality: names or files of the modalities that images may have, or "auto".
        workers: processes that read headers and decode.
        max_bad: largest share of bad files, 0 to 1. Files of no image format are not bad.
        progress: shows how far the two passes are.

    Raises:
        ConfigError: a path does not exist, or a modality is unknown.
        TooManyBadInputsError, ReadError: nothing is usable, or the error budget is exceeded.
    """
    modalities = resolve_modalities(modality)
    roots = [(path, path if path.is_dir() else None) for path in map(Path, paths)]
    sources: list[Source] = []
    refusals: list[Refusal] = []
    found: list[Path] = []
    met: set[Path] = set()
    with _workers(workers) as mapper:
        for path, root in roots:
            # Overlapping paths name a file once.
            files = [file for file in list_files(path) if file.absolute() not in met]
            met.update(file.absolute() for file in files)
            found += files
            seen = progress(files, "headers", len(files))
            outcome = survey(seen, modalities, root=root, mapper=mapper)
            sources += outcome.sources
            refusals += outcome.refusals
        sources.sort(key=lambda source: (source.files[0], str(source.selector)))
        examined = list(progress(mapper(_examine, sources), "pixels", len(sources)))
    salt = new_salt()
    rows, kept, digests = [], {}, {}
    groups = connected_groups([source.identity or (("file", str(source.files[0])),) for source in sources])
    for source, result, group in zip(sources, examined, groups, strict=True):
        if isinstance(result, Refusal):
            refusals += [Refusal(path, result.reason, result.detail) for path in source.files]
            continue
        digest, valid_fraction, statistics = result
        key = keyed(salt, "image", *map(str, source.files), str(source.selector))
        kept[key], digests[key] = source, digest
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
                footprint=_footprint(source),
                valid_fraction=valid_fraction,
                statistics=statistics,
                group=keyed(salt, "group", str(group)),
                content=content_key(digest, salt),
                flags=source.flags,
                block=source.block,
            )
        )
    ledger = _account(found, kept, refusals, salt)
    _check_budget(paths, rows, refusals, ledger, max_bad)
    return Index(tuple(rows), ledger, kept, digests, salt)


def _account(found: Sequence[Path], kept: dict[str, Source], refusals: Sequence[Refusal], salt: bytes) -> Ledger:
    """Give every file exactly one line."""
    used: dict[Path, list[str]] = {}
    for key, source in kept.items():
        for path in source.files:
            used.setdefault(path, []).append(key)
    refused = {refusal.path: refusal for refusal in refusals}
    entries = []
    for path in found:
        # Readers name a file by where its links lead to; the listing by how it was met.
        name = next((name for name in (path, path.resolve()) if name in used or name in refused), path)
        file = keyed(salt, "file", str(path))
        if name in used:
            # One file may hold several images (time points, stacks): those that were refused are told here.
            detail = f"also refused: {refused[name].reason.name}" if name in refused else ""
            entries.append(Entry(file, "used", images=tuple(used[name]), detail=detail))
        else:
            refusal = refused[name]
            detail = refusal.detail.replace(str(path), "").replace(path.name, "the file")
            entries.append(Entry(file, status(refusal.reason), refusal.reason.name, detail=detail))
    return Ledger(tuple(entries))


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
) -> Index:
    """Return the index of an archive: INDEX folders are loaded, raw files and folders are scanned, in that order.

    Raises:
        as `scan_archive` and `Index.load`.
    """
    folders = [Path(path) for path in paths if is_index(Path(path))]
    raw = [Path(path) for path in paths if not is_index(Path(path))]
    parts = [Index.load(folder) for folder in folders]
    if raw:
        parts.append(scan_archive(raw, modality, workers=workers, max_bad=max_bad, progress=progress))
    return parts[0] if len(parts) == 1 else Index.joined(parts)


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
