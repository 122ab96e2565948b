"""Speed of the DICOM reader: headers a second over a large tree, and loading a CT series beside pydicom.

    python benchmarks/readers_dicom.py DICOM_FOLDER CT_SERIES_FOLDER --files 10000 --workers 2 --rounds 9

The tree is made by copying the folder's files under fresh UIDs into a temporary folder. Loading is compared file by
file with what a careful user writes by hand (`dcmread`, `pixel_array`, rescale, float32): medians of paired ratios from
one interleaved run in CPU time, because the machine's speed drifts. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import pydicom

from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom, header_of, survey
from geomed_mae.readers.regular import list_files
from geomed_mae.readers.source import Refusal

CHUNK_FILES = 128
"""Files that travel to a worker process at once."""


def make_tree(source: Path, folder: Path, count: int) -> int:
    """Fill `folder` with `count` copies of the images below `source`, each copy of the set under UIDs of its own.

    Returns:
        the number of files of the set.
    """
    originals = []
    for path in list_files(source):
        if not isinstance(header := dicom.header(path), Refusal):
            uids = (header.study_uid, header.series_uid, header.frame_uid, header.sop_uid)
            originals.append((path.read_bytes(), path.parent.name, [uid for uid in uids if uid]))
    for number in range(count):
        content, name, uids = originals[number % len(originals)]
        turn = number // len(originals)
        for uid in uids:
            # Of the same length, so that the file stays as it is otherwise, its vendor's habits included.
            digits = int.from_bytes(hashlib.sha512(f"{uid}/{turn}".encode()).digest(), "big")
            content = content.replace(uid.encode(), f"1.9.1{digits}"[: len(uid)].encode())
        target = folder / f"{turn:03d}-{name}" / f"{number:06d}"
        target.parent.mkdir(exist_ok=True)
        target.write_bytes(content)
    return len(originals)


def _all_cpu() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


def header_scan(source: Path, *, count: int, workers: int) -> dict[str, float]:
    """Return files a second of the header pass alone, in one process and in `workers`, and of the whole survey.

    On a machine that others use too, only the rates per CPU second mean anything: on idle cores, `workers` processes
    give about `workers` times theirs.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        different = make_tree(source, folder, count)
        files = list(list_files(folder))
        began, cpu = time.perf_counter(), time.process_time()
        accepted = sum(not isinstance(found, Refusal) for found in map(partial(header_of, root=folder), files))
        alone, alone_cpu = time.perf_counter() - began, time.process_time() - cpu
        modalities = resolve_modalities("auto")
        began, cpu = time.perf_counter(), _all_cpu()
        with ProcessPoolExecutor(workers) as pool:
            list(pool.map(header_of, files, [folder] * len(files), chunksize=CHUNK_FILES))
        parallel, parallel_cpu = time.perf_counter() - began, _all_cpu() - cpu
        with ProcessPoolExecutor(workers) as pool:
            began = time.perf_counter()
            found = survey(files, modalities, root=folder, mapper=partial(pool.map, chunksize=CHUNK_FILES))
            surveyed = time.perf_counter() - began
    return {
        "files": len(files),
        "different_files": different,
        "accepted": accepted,
        "sources": len(found.sources),
        "headers_per_second_one_process": len(files) / alone,
        "headers_per_cpu_second": len(files) / alone_cpu,
        f"headers_per_second_{workers}_processes": len(files) / parallel,
        f"headers_per_cpu_second_{workers}_processes": len(files) / parallel_cpu,
        f"survey_files_per_second_{workers}_processes": len(files) / surveyed,
    }


def by_hand(files: list[Path]) -> Iterator[np.ndarray]:
    """Yield each file's pixels in Hounsfield units, through pydicom alone."""
    for path in files:
        one = pydicom.dcmread(path)
        yield (one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept)).astype(np.float32)


def series_load(folder: Path, *, rounds: int) -> dict[str, float]:
    """Return the ratio of our CPU time to pydicom's for the largest volume in `folder`, equal arrays checked."""
    found = survey(list(list_files(folder)), resolve_modalities("auto"), root=folder)
    source = max(found.sources, key=lambda one: one.shape[0])
    files = list(source.files)
    ratios, ours, theirs = [], [], []
    for _ in range(rounds):
        began = time.process_time()
        image = dicom.read(source)
        middle = time.process_time()
        stack = np.stack(list(by_hand(files)))
        ended = time.process_time()
        ours.append(middle - began)
        theirs.append(ended - middle)
        ratios.append(ours[-1] / theirs[-1])
    if not np.array_equal(image.array[0], stack):
        raise SystemExit("the arrays differ")
    return {
        "slices": source.shape[0],
        "codec": source.codec,
        "ours_ms_per_slice": 1000 * median(ours) / len(files),
        "pydicom_ms_per_slice": 1000 * median(theirs) / len(files),
        "ratio_ours_to_pydicom": median(ratios),
    }


def main() -> None:
    """Run both and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder with DICOM files, copied for the header pass")
    parser.add_argument("series", type=Path, nargs="*", help="folders with one CT series each")
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    given = parser.parse_args()
    result = {
        "header_scan": header_scan(given.folder, count=given.files, workers=given.workers),
        "ct_series": [series_load(folder, rounds=given.rounds) for folder in given.series],
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
