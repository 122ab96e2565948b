"""Damaged files of every format, read in a process of their own with 2 GiB of memory and 10 s a case.

    python -m tests.fuzz FORMAT FOLDER FIRST STOP [apart]

makes the cases FIRST to STOP - 1 out of the seeds in FOLDER/seeds (see `fuzz_seeds`, `mutations`), reads each as an
archive is read, header, group, pixels and statistics, and prints one line a case: number, outcome, seconds. A case is a
pure function of its number, so that a failure can be made again. Outcomes are "image", "label", the name of a Reason,
or "!" and what went wrong. A crash or a hang ends the process: `run` sees which case was the last, reads that one again
through a decoding child, as `scan` does (`apart`), and goes on with the next.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.mutations import STRUCTURED, damage

MEMORY = 2 << 30
SECONDS = 10
FORMATS = ("geotiff", "dicom", "nifti", "picture", "jp2")
LABELS = ("seg", "rtstruct", "geojson", "gpkg", "shapefile")
DIED = "!DIED"
BLIND = {"geojson": 0.1, "picture": 0.15, "dicom": 0.2}
"""Share of blind damage where it is not 0.3: what damage by structure keeps whole must not be relied on either; JSON
and checksums have no bytes to spare."""
AGAIN = ("!MemoryError", "!TOO_SLOW")
"""Outcomes that limits of a child turn into a reason, as deaths are."""


def case(kind: str, folder: Path, number: int) -> dict[str, bytes]:
    """Return the files of one case, name -> bytes; the first is the one to read."""
    seeds = sorted((folder / "seeds").iterdir())
    seed = seeds[number % len(seeds)]
    rng = np.random.Generator(np.random.Philox(key=[20, number]))
    if seed.is_dir():
        files = {path.name: path.read_bytes() for path in sorted(seed.iterdir(), key=lambda p: (p.suffix != ".shp", p))}
        hit = str(rng.choice([name for name in files for _ in range(4 if name.endswith((".shp", ".shx")) else 1)]))
    else:
        files, hit = {seed.name: seed.read_bytes()}, seed.name
    blind = rng.random() < BLIND.get(kind, 0.3) or hit.endswith((".dbf", ".prj", ".cpg"))
    content = files[hit]
    if blind and hit.endswith(".gz") and rng.random() < 0.7:
        files[hit] = gzip.compress(damage(gzip.decompress(content), rng), 1)
    else:
        files[hit] = damage(content, rng) if blind else STRUCTURED[kind](content, rng)
    return files


# ------------------------------------------------------------------------------------------------------------ worker


def image_outcome(path: Path) -> str:
    """Read one file as an archive is read, in this process."""
    from geomed_mae.archives.examine import examine
    from geomed_mae.errors import ReadError
    from geomed_mae.readers import header_of, read
    from geomed_mae.readers.source import Refusal

    found = _grouped(header_of(path, path.parent), path)
    if isinstance(found, str):
        return found
    reasons = []
    for source in found:
        try:
            image = read(source)
        except ReadError as error:
            reasons.append(error.reason)
            continue
        if image.array.shape != (len(source.channels), *source.shape):
            return "!SHAPE"
        if not np.isfinite(image.array[np.broadcast_to(image.valid, image.array.shape)]).all():
            return "!NOT_FINITE"
        result = examine(source)
        if isinstance(result, Refusal):
            reasons.append(result.reason.name)
        elif not all(np.isfinite([entry.mean, entry.std]).all() for entry in result.statistics if entry.count):
            return "!STATISTICS"
    return reasons[0] if len(reasons) == len(found) else "image"


def apart_outcome(path: Path) -> str:
    """Read one file as `scan` does: header and pixels in a decoding child."""
    from geomed_mae.archives.examine import examine_apart
    from geomed_mae.archives.headers import headers_apart
    from geomed_mae.readers import load_readers
    from geomed_mae.readers.source import Refusal
    from geomed_mae.readers.wire import unpack

    load_readers()
    found = _grouped(unpack(headers_apart([(path, path.parent)])[0]), path)
    if isinstance(found, str):
        return found
    results = [examine_apart(source) for source in found]
    reasons = [result.reason.name for result in results if isinstance(result, Refusal)]
    return reasons[0] if len(reasons) == len(found) else "image"


def _grouped(outcome: Any, path: Path) -> Any:
    """Return the sources of a file, or the reason that there is none; the ledger's law is checked on the way."""
    from geomed_mae.archives.ledger import account
    from geomed_mae.modalities import resolve_modalities
    from geomed_mae.readers import group_headers

    found = group_headers([outcome], resolve_modalities("auto"))
    sources = {str(number): source for number, source in enumerate(found.sources)}
    (entry,) = account([(path, path.resolve())], sources, found.refusals, b"salt").entries
    if "which is a bug" in entry.detail or (not sources and not found.refusals):
        return "!LOST"
    return found.sources or entry.reason


def label_outcome(path: Path) -> str:
    """Read one label file onto the image that its seeds were drawn on, in this process."""
    from geomed_mae.errors import ReadError
    from geomed_mae.readers import IGNORE, label_references, read_labels

    onto, query = _place(path)
    try:
        label_references(path)
        labels = read_labels(path, onto, query)
    except ReadError as error:
        return error.reason
    if labels.array.shape != onto.array.shape[1:] or labels.array.dtype != np.int16:
        return "!SHAPE"
    if labels.names and not ((labels.array >= IGNORE) & (labels.array < len(labels.names))).all():
        return "!CLASSES"
    return "label"


def label_apart_outcome(path: Path) -> str:
    """Read one label file in a decoding child."""
    from geomed_mae.errors import ReadError
    from geomed_mae.readers.child import in_child
    from tests import fuzz  # this module by its name: a child imports the function that it is to call

    try:
        return str(in_child(fuzz.label_outcome, path, seconds=SECONDS - 2, memory=MEMORY))
    except ReadError as error:
        return error.reason


def _place(path: Path) -> tuple[Any, Any]:
    from geomed_mae.image import Channel, Image, RasterGeometry, VolumeGeometry
    from geomed_mae.readers import LabelQuery
    from geomed_mae.readers.geotiff.open import rasterio

    raster = path.suffix in (".geojson", ".gpkg", ".shp")
    shape = (1, 48, 48) if raster else (1, 3, 48, 48)
    affine = np.array([[0, 0, 1.0, 0], [0, 1.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    transform = (10.0, 0.0, 500000.0, 0.0, -10.0, 4000000.0)
    geometry = (
        RasterGeometry(rasterio().crs.CRS.from_epsg(32611).to_wkt(), transform, (10.0, 10.0))
        if raster
        else VolumeGeometry(affine)
    )
    onto = Image(np.zeros(shape, np.float32), np.ones(shape, bool), (Channel(name="a"),), geometry, "x")
    return onto, LabelQuery(classes=("background", "liver", "kidney", "water", "forest"))


class _TooSlow(BaseException):
    """Ten seconds are over. No Exception, so that nothing takes it for a fault of the file."""


def work(kind: str, folder: Path, first: int, stop: int, *, apart: bool = False) -> None:
    """Run cases and print their outcomes; native code that hangs is killed a second after Python would have been."""
    from geomed_mae.readers import regular

    regular.WAITS_S = (0.0, 0.0, 0.0)  # pauses for storage that recovers; this one does not
    outcome = _outcome(kind, apart)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if not apart:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        signal.signal(signal.SIGALRM, _too_slow)
    for number in range(first, stop):
        place = folder / "cases" / str(number)
        place.mkdir(parents=True)
        files = case(kind, folder, number)
        for name, content in files.items():
            (place / name).write_bytes(content)
        begin = time.perf_counter()
        signal.setitimer(signal.ITIMER_REAL, 0 if apart else SECONDS)
        try:
            result = outcome(place / next(iter(files)))
        except (Exception, _TooSlow) as error:  # this is the fault that the run looks for
            result = f"!{type(error).__name__.replace('_TooSlow', 'TOO_SLOW')}"
        signal.setitimer(signal.ITIMER_REAL, 0)
        shutil.rmtree(place)
        sys.stdout.write(f"{number} {result} {time.perf_counter() - begin:.3f}\n")
        sys.stdout.flush()


def _too_slow(number: int, frame: Any) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, 1)
    raise _TooSlow


def _outcome(kind: str, apart: bool) -> Callable[[Path], str]:
    if kind in LABELS:
        return label_apart_outcome if apart else label_outcome
    return apart_outcome if apart else image_outcome


# ------------------------------------------------------------------------------------------------------------- runs


@dataclass(frozen=True)
class Report:
    """What became of the cases of a format: number -> (outcome, seconds); `died` in process, `wrong` for good."""

    found: dict[int, tuple[str, float]]
    died: dict[int, str]

    @property
    def wrong(self) -> dict[int, str]:
        """Cases that ended neither in an array nor in a reason, or took too long."""
        return {n: f"{out} {s:.1f} s" for n, (out, s) in self.found.items() if out.startswith("!") or s > SECONDS}

    @property
    def counts(self) -> dict[str, int]:
        """Number of cases by outcome, most frequent first."""
        return dict(Counter(outcome for outcome, _ in self.found.values()).most_common())

    def __str__(self) -> str:
        slowest = max(self.found, key=lambda number: self.found[number][1])
        return json.dumps(
            {
                "cases": len(self.found),
                "counts": self.counts,
                "slowest": [slowest, *self.found[slowest]],
                "died": self.died,
                "wrong": self.wrong,
            }
        )


def run(kind: str, folder: Path, first: int, stop: int) -> Report:
    """Run the cases of a format, those that end their process once more through a decoding child."""
    if not (folder / "seeds").is_dir():
        from tests.fuzz_seeds import SEEDS

        (folder / "seeds").mkdir(parents=True)
        SEEDS[kind](folder / "seeds")
    found: dict[int, tuple[str, float]] = {}
    died: dict[int, str] = {}
    at = first
    while at < stop:
        for number, result, seconds in _worker(kind, folder, at, stop):
            found[number] = (result, seconds)
            at = number + 1
        if at < stop:
            found[at] = (DIED, float(SECONDS))
            at += 1
    for number, (result, _) in list(found.items()):
        if result == DIED or result in AGAIN:
            died[number] = result
            for _, again, seconds in _worker(kind, folder, number, number + 1, "apart"):
                found[number] = (again, seconds)
    return Report(found, died)


def _worker(kind: str, folder: Path, first: int, stop: int, *how: str) -> Iterator[tuple[int, str, float]]:
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(folder / "cases")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.fuzz", kind, str(folder), str(first), str(stop), *how],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        cwd=Path(__file__).resolve().parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "2"},
    )
    for line in done.stdout.splitlines():
        number, result, seconds = line.split()
        yield int(number), result, float(seconds)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]), apart=sys.argv[5:] == ["apart"])
