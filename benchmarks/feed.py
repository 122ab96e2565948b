"""Samples a second of the loader alone, first and second epoch, beside a plain Dataset, as ratios from one run.

    python benchmarks/feed.py                                   # five generated archives
    python benchmarks/feed.py --cases j2k --crop-3d 4 96 96 --batch-3d 16
    python benchmarks/feed.py --archive SCENES --modality landsat7
    python benchmarks/feed.py --waits pretrain_ct_tiny=FOLDER   # share of a real run that waits for data

Ours is `Steps` and `load_steps`, as `pretrain` uses them, with batches brought to float32 in physical units
(`Batch.to`), because the plain Dataset's are. An epoch is as many crops as have the archive's pixels. The first begins
with an empty disk cache and fills it; the second has other crops, and a loader that knows nothing but that cache.
`--cache-mb 0` is the default: archives here are small, and those that matter do not fit into memory.

Contestants take turns; the first round warms up and is not counted. Figures are medians with quartiles of paired
ratios, in CPU time of all processes (others use this machine too) and in wall time. The page cache is warm for all.
Peak memory is that of one more pass: proportional set size of all processes, less what they had before it. Archives and
caches lie in a temporary folder, which goes away. Result: a JSON object on stdout, a line a case on stderr.

Measured on two cores of an Intel Xeon, no workers, two scenes of 4096 x 4096 x 4 bands (uint16, deflate, crops of
224 x 224 in batches of 64) and two CT series of 32 to 48 slices of 512 x 512 (crops of 16 x 128 x 128 in batches of 8);
samples per CPU second, medians of 2 to 4 rounds, ratios with quartiles. Others kept the machine at a load of 4 to 14,
the first line of J2K is from before passes were of whole windows of steps, and tiled and striped scenes were still
kept by the cache (`store.SLOWER` was 3), which gained nothing and is why they are not now:

              plain   first   second   first / plain     second / plain    second / first   peak MB: plain, ours
    tiled      101     560     459      5.5 [3.4, 7.9]    4.6 [4.5, 6.8]    0.9 [0.6, 2.0]   101, 291
    striped    49      209     363      4.1 [3.9, 4.5]    7.8 [5.4, 8.7]    1.9 [1.3, 2.0]   90, 333
    J2K        1.7     12.5    379      7.5 [7.2, 7.8]    226 [188, 265]    30 [24, 37]      42, 191
    ... 4 x 96 x 96, one round:
               6.0     100     2538     17                420               25               10, 171
    raw        65      141     575      2.2 [2.1, 2.2]    8.9 [8.5, 9.3]    4.1 [3.8, 4.4]   26, 137
    NIfTI gz   11.4     56.7    431      5.0 [4.6, 5.3]    37 [22, 53]       7.4 [4.9, 10]    18, 141

Before there were windows of several steps and a cache, at a load of 3: tiled 931 beside 119 (7.9 [7.3, 8.5]), striped
490 beside 58 (9.3 [8.3, 10.2]), raw 86 beside 48, NIfTI 20 beside 9.7. Share of waiting for data in the first 40 steps
of the tiny recipes, no workers: Landsat 7 0.5 %, CT 3.5 % (12.5 % in the first 10 steps, 0.5 % later), MR 1.7 %.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import feed_sources
import numpy as np
from feed_sources import Source
from torch.utils.data import DataLoader

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.index import Index
from geomed_mae.config import DataConfig
from geomed_mae.pretrain import pretrain
from geomed_mae.readers.child import close_children
from geomed_mae.recipe_file import load_recipe
from geomed_mae.samples.loader import Steps, load_steps
from geomed_mae.samples.store import open_store

CASES = ("tiled", "striped", "j2k", "raw", "nifti")
BARS = {"j2k": 10.0}
"""Least rate of the second epoch as a multiple of the first's."""
WAIT_BAR = 0.05
"""Largest share of a run of the tiny recipes on a CPU that waits for data."""
POLL_S = 0.02
TICKS = os.sysconf("SC_CLK_TCK")


def tree() -> list[int]:
    """Return this process and its living descendants."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    own = [os.getpid()]
    for process in own:
        own += [child for child, parent in parents.items() if parent == process]
    return own


def cpu_seconds() -> float:
    """Return the processor time of this process and its descendants, living or ended."""
    total = 0.0
    for process in tree()[1:]:
        with contextlib.suppress(OSError):
            fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / TICKS
    times = os.times()
    return total + time.process_time() + times.children_user + times.children_system


def memory_mb() -> float:
    """Return the proportional set size of this process and its descendants, in MiB."""
    total = 0
    for process in tree():
        with contextlib.suppress(OSError):
            rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
            total += int(rollup.partition("\nPss:")[2].split()[0])
    return total / 1024


def peak_memory(run: Callable[[], None]) -> float:
    """Return by how many MiB memory rises at most while `run` does its work."""
    close_children()
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # what is free but not returned would hide what `run` takes
    before, seen, done = memory_mb(), [0.0], threading.Event()

    def watch() -> None:
        while not done.wait(POLL_S):
            seen[0] = max(seen[0], memory_mb())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return max(seen[0] - before, 0.0)


@dataclass
class Loaders:
    """Ours and the plain one over one archive; every pass is of crops that no pass before it had."""

    index: Index
    source: Source
    options: argparse.Namespace
    first: int = 0

    def __post_init__(self) -> None:
        self.dataset = self.source.plain(self.options.seed)

    @property
    def batch(self) -> int:
        """Samples a batch."""
        return self.options.batch_3d if len(self.source.crop) == 3 else self.options.batch_2d

    @property
    def together(self) -> int:
        """Batches that are made together; a pass is of whole ones, or it would pay for batches that it does not get."""
        return self.config(None).shuffle_steps

    @property
    def batches(self) -> int:
        """Batches of an epoch."""
        pixels = sum(int(np.prod(row.shape, dtype=np.int64)) for row in self.index.rows)
        windows = round(pixels / int(np.prod(self.source.crop)) / self.batch / self.together)
        return max(1, windows) * self.together

    def config(self, cache: Path | None) -> DataConfig:
        """Return the recipe's section; without `cache` nothing is kept on disk."""
        return DataConfig(
            modality=(self.source.modality,),
            cache_mb=self.options.cache_mb,
            cache="off" if cache is None else self.options.cache,
            cache_dir=None if cache is None else str(cache),
            cache_gb=self.options.cache_gb,
            **{f"crop_{len(self.source.crop)}d": self.source.crop},
        )

    def ours(self, cache: Path | None, batches: int) -> None:
        """Make batches as `pretrain` does, with a loader that has seen nothing but what is in `cache`."""
        config = self.config(cache)
        store = open_store(config, cache, self.index) if cache else None
        steps = Steps(self.index, config, seed=self.options.seed, batch_size=self.batch, store=store)
        for made in load_steps(steps, self.first, self.first + batches, workers=self.options.workers):
            made.to("cpu")
        self.first += batches

    def plain(self, batches: int) -> None:
        """Make batches of the plain Dataset; `self.first` stays a multiple of `self.together`."""
        numbers = range(self.first * self.batch, (self.first + batches) * self.batch)
        for _ in DataLoader(self.dataset, self.batch, sampler=numbers, num_workers=self.options.workers):
            pass
        self.first += -(-batches // self.together) * self.together


def timed(run: Callable[[], None]) -> tuple[float, float]:
    """Return CPU and wall seconds."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    run()
    return cpu_seconds() - cpu, time.perf_counter() - wall


def spread(values: list[float], digits: int = 2) -> list[float]:
    """Return median and quartiles."""
    low, _, high = quantiles(values, n=4) if len(values) > 1 else values * 3
    return [round(value, digits) for value in (median(values), low, high)]


def figures(source: Source, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Return the figures of one archive; caches come and go in `folder`."""
    index = open_archive([source.folder], [source.modality])
    loaders = Loaders(index, source, options)
    epoch = loaders.batches
    few = max(1, min(epoch, options.plain_samples // loaders.batch))
    batches = {"ours first": epoch, "ours second": epoch, "ours without cache": loaders.together, "plain": few}
    rounds: list[dict[str, tuple[float, float]]] = []
    for number in range(options.rounds + 1):
        cache = folder / f"cache{number}"
        runs = {
            "ours first": lambda cache=cache: loaders.ours(cache, epoch),
            "ours second": lambda cache=cache: loaders.ours(cache, epoch),
            "ours without cache": lambda: loaders.ours(None, loaders.together),
            "plain": lambda: loaders.plain(few),
        }
        # The second epoch comes after the first, whenever that is.
        order = random.Random(options.seed + number).sample([*runs], len(runs))
        here, there = sorted((order.index("ours first"), order.index("ours second")))
        order[here], order[there] = "ours first", "ours second"
        spent = {name: timed(runs[name]) for name in order}
        samples = {name: count * loaders.batch for name, count in batches.items()}
        rounds.append({name: (samples[name] / cpu, samples[name] / wall) for name, (cpu, wall) in spent.items()})
        kept = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) / 2**20
        if number < options.rounds:
            shutil.rmtree(cache, ignore_errors=True)
    peaks = {
        "ours first": peak_memory(lambda: loaders.ours(folder / "another", epoch)),
        "ours second": peak_memory(lambda: loaders.ours(cache, epoch)),
        "plain": peak_memory(lambda: loaders.plain(few)),
    }
    for used in (cache, folder / "another"):
        shutil.rmtree(used, ignore_errors=True)
    return {
        "archive_mb": round(source.megabytes, 1),
        "cache_on_disk_mb": round(kept, 1),
        "crop": list(source.crop),
        "batch": loaders.batch,
        "samples_of_an_epoch": epoch * loaders.batch,
        **compared(rounds[1:]),
        "peak_memory_mb": {name: round(value, 1) for name, value in peaks.items()},
    }


def compared(rounds: list[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Return rates of each contestant and ratios of pairs, in CPU time and wall time: median and quartiles."""
    pairs = {
        "first_over_plain": ("ours first", "plain"),
        "second_over_plain": ("ours second", "plain"),
        "second_over_first": ("ours second", "ours first"),
        "second_over_no_cache": ("ours second", "ours without cache"),
    }
    found: dict[str, Any] = {}
    for kind, clock in enumerate(("cpu", "wall")):
        found[f"samples_per_{clock}_second"] = {
            name: spread([entry[name][kind] for entry in rounds], 1) for name in rounds[0]
        }
        found[f"ratios_{clock}"] = {
            name: spread([entry[above][kind] / entry[below][kind] for entry in rounds])
            for name, (above, below) in pairs.items()
        }
    return found


def waits(recipe: str, archive: Path, options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train for a while, and return the share of the time that the loop waited for data, line by line of its log."""
    overrides = [f"train.steps={options.wait_steps}", f"data.workers={options.workers}", "train.log_every=10"]
    run = folder / f"run-{Path(recipe).stem}"
    pretrain(load_recipe(recipe, overrides), [archive], run)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    shares = [line["data_wait"] for line in lines if "data_wait" in line]
    rates = [line["samples_per_second"] for line in lines if "samples_per_second" in line]
    shutil.rmtree(run)
    return {
        "steps": options.wait_steps,
        "data_wait_first_line": shares[0],
        "data_wait_later": spread(shares[1:] or shares, 4),
        "data_wait": round(sum(shares) / len(shares), 4),
        "bar": WAIT_BAR,
        "samples_per_second": round(median(rates), 1),
    }


def sources(options: argparse.Namespace, folder: Path) -> Iterator[tuple[str, Source]]:
    """Yield the archives that were asked for; each generated one is gone when the next is made."""
    if options.archive:
        axes = "3d" if options.three_axes else "2d"
        crop = options.crop_3d if axes == "3d" else [options.crop_2d] * 2
        yield "archive", feed_sources.given(options.archive, options.modality, crop)
        return
    place, seed = folder / "archive", options.seed
    scenes = {"count": options.scenes, "size": options.size, "crop": options.crop_2d, "seed": seed}
    volumes = {"count": options.volumes, "slices": options.slices, "size": options.matrix, "crop": options.crop_3d}
    volumes["seed"] = seed
    makers: dict[str, Callable[[], Source]] = {
        "tiled": lambda: feed_sources.scenes(place, "tiled 512", **scenes),
        "striped": lambda: feed_sources.scenes(place, "strips of 16 rows", **scenes),
        "j2k": lambda: feed_sources.series(place, packed=True, **volumes),
        "raw": lambda: feed_sources.series(place, packed=False, **volumes),
        "nifti": lambda: feed_sources.volumes(place, **volumes),
    }
    for name in options.cases:
        yield name, makers[name]()
        shutil.rmtree(place)


def show(name: str, found: dict[str, Any]) -> None:
    """Write one line of the table."""
    ratios, rates = found["ratios_cpu"], found["samples_per_cpu_second"]
    parts = [f"{name:8}", *(f"{contestant} {values[0]:.1f}/s" for contestant, values in rates.items())]
    parts += [f"{pair} {values[0]:.1f}x [{values[1]:.1f}, {values[2]:.1f}]" for pair, values in ratios.items()]
    peaks = ", ".join(f"{contestant} {value:.0f}" for contestant, value in found["peak_memory_mb"].items())
    sys.stderr.write("  ".join([*parts, f"peak MB: {peaks}"]) + "\n")


def arguments() -> argparse.ArgumentParser:
    """Return the parser."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES))
    parser.add_argument("--archive", type=Path, help="measure these files instead: GeoTIFF, NIfTI or DICOM series")
    parser.add_argument("--modality", default="auto", help="of --archive")
    parser.add_argument("--three-axes", action="store_true", help="--archive holds volumes")
    parser.add_argument("--waits", nargs="*", default=[], metavar="RECIPE=FOLDER", help="train and see if it waits")
    parser.add_argument("--wait-steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--cache-mb", type=int, default=0, help="decoded images kept in memory")
    parser.add_argument("--cache", choices=("auto", "always"), default="auto", help="what is kept on disk")
    parser.add_argument("--cache-gb", type=float, default=4.0)
    parser.add_argument("--plain-samples", type=int, default=64, help="samples of a pass of what keeps nothing")
    parser.add_argument("--scenes", type=int, default=2)
    parser.add_argument("--size", type=int, default=4096, help="rows and columns of a scene")
    parser.add_argument("--crop-2d", type=int, default=224)
    parser.add_argument("--batch-2d", type=int, default=64)
    parser.add_argument("--volumes", type=int, default=2)
    parser.add_argument("--slices", type=int, default=48)
    parser.add_argument("--matrix", type=int, default=512, help="rows and columns of a slice")
    parser.add_argument("--crop-3d", type=int, nargs=3, default=[16, 128, 128])
    parser.add_argument("--batch-3d", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    return parser


def main(given: list[str] | None = None) -> None:
    """Measure and write the figures."""
    options = arguments().parse_args(given)
    result: dict[str, Any] = {"options": {name: str(value) for name, value in vars(options).items()}}
    result |= {"load_average": os.getloadavg(), "cores": os.cpu_count(), "bars": {**BARS, "data_wait": WAIT_BAR}}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not options.waits or options.archive:
            result["cases"] = {}
            for case, source in sources(options, folder):
                result["cases"][case] = found = figures(source, options, folder)
                show(case, found)
        for asked in options.waits:
            recipe, _, archive = asked.partition("=")
            result.setdefault("waits", {})[recipe] = waits(recipe, Path(archive), options, folder)
    result["load_average_after"] = os.getloadavg()
    sys.stdout.write(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the temporary folder would stay
    main()
