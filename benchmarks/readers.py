"""How fast raw files become samples, beside the packages that everybody uses, as ratios from one interleaved run.

    python benchmarks/readers.py --dicom FOLDER_WITH_DICOM --ct FOLDER_OF_A_CT_SERIES
    python benchmarks/readers.py --size 2048 --rounds 3

Rasters: batches of training crops (float32 in physical units with their validity, shuffled, turned) as `samples` makes
them, beside random windows read with rasterio through one open dataset, one `read` a crop (`naive`), and the same with
a conversion to float32 and a comparison with nodata (`naive_float`). The bar is against the first, which does less.
Content: 1/f terrain common to the bands, some of each band's own, and sensor noise; deflate packs it to two thirds.
DICOM: headers a second and loading of CT series, where folders are given; see `readers_dicom`.

CPU time of this process and its children, because other processes make wall time a lottery; the order changes from
round to round; medians of paired ratios with the least and the greatest, because the machine's speed drifts. The first
round warms up and is not counted. Result: a JSON object on stdout, a table on stderr.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
from readers_dicom import header_scan, series_load

from geomed_mae.archives.build import open_archive
from geomed_mae.config import DataConfig
from geomed_mae.readers.geotiff.open import rasterio
from geomed_mae.samples.loader import Steps

MODALITY, BANDS, SCALE = "sentinel2-l2a", ("B02", "B03", "B04", "B08"), 1e-4
LAYOUTS = {
    "tiled 512": {"tiled": True, "blockxsize": 512, "blockysize": 512, "interleave": "band"},
    "tiled 512, pixel-interleaved": {"tiled": True, "blockxsize": 512, "blockysize": 512, "interleave": "pixel"},
    "tiled 256": {"tiled": True, "blockxsize": 256, "blockysize": 256, "interleave": "band"},
    "strips of 64 rows": {"blockysize": 64, "interleave": "band"},
    "strips of 16 rows": {"blockysize": 16, "interleave": "band"},
    "strips of 1 row": {"blockysize": 1, "interleave": "band"},
}
BARS = {"tiled 512": 5.0, "strips of 64 rows": 3.0, "strips of 16 rows": 3.0, "strips of 1 row": 3.0}
"""Least crops per CPU second, as a multiple of naive windows'."""
BATCHES = 4
"""Batches of ours in a round: a read of ours touches 1, 2 or 4 tiles, and a round should have its share of each."""
AGED = 1e9
"""Modification time of the files: one that has just been written is opened anew for every read."""


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    times = os.times()
    return time.process_time() + times.children_user + times.children_system


def scene(size: int, seed: int) -> np.ndarray:
    """Return (bands, size, size) uint16: terrain of amplitude 1/f^1.3, band differences, noise of 12 numbers."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]).astype(np.float32)
    frequency[0, 0] = 1

    def field(exponent: float) -> np.ndarray:
        spectrum = np.fft.rfft2(rng.standard_normal((size, size), dtype=np.float32)) * frequency**-exponent
        spectrum[0, 0] = 0
        values = np.fft.irfft2(spectrum, s=(size, size)).astype(np.float32)
        return values / values.std()

    common = field(1.3)
    bands = np.empty((len(BANDS), size, size), np.uint16)
    for number in range(len(BANDS)):
        noise = 12 * rng.standard_normal((size, size), dtype=np.float32)
        bands[number] = np.clip(1500 + 400 * number + 350 * common + 150 * field(1.2) + noise, 1, 10_000)
    return bands


def write(path: Path, array: np.ndarray, layout: dict) -> Path:
    """Write `array` as a deflated GeoTIFF of nodata 0."""
    rio = rasterio()
    profile = {"driver": "GTiff", "count": array.shape[0], "height": array.shape[1], "width": array.shape[2]}
    profile |= {"dtype": array.dtype, "nodata": 0, "crs": "EPSG:32611", "compress": "deflate"}
    with rio.open(path, "w", transform=rio.Affine(10, 0, 5e5, 0, -10, 4e6), **profile, **layout) as file:
        file.descriptions = BANDS
        file.write(array)
    os.utime(path, (AGED, AGED))
    return path


def naive(path: Path, crop: int, count: int, seed: int, *, convert: bool) -> Callable[[], None]:
    """Return a function that reads `count` random windows through one open dataset."""
    rio = rasterio()
    dataset = rio.open(path)
    rng = np.random.default_rng(seed)

    def read() -> None:
        for _ in range(count):
            row, column = (int(rng.integers(size - crop + 1)) for size in dataset.shape)
            stored = dataset.read(window=rio.windows.Window(column, row, crop, crop))
            if convert:
                _ = stored.astype(np.float32) * np.float32(SCALE), stored != dataset.nodata

    return read


def ours(steps: Steps, batches: int) -> Callable[[], None]:
    """Return a function that makes the next `batches` batches."""
    numbers = iter(range(1 << 30))

    def make() -> None:
        for _ in range(batches):
            _ = steps[next(numbers)].physical()

    return make


def measure(runs: dict[str, tuple[Callable[[], None], int]], rounds: int, seed: int) -> dict[str, list[float]]:
    """Return crops per CPU second of each contestant (a function and the crops of one call), one number a round."""
    rates: dict[str, list[float]] = {name: [] for name in runs}
    order = list(runs)
    for number in range(rounds + 1):
        random.Random(seed + number).shuffle(order)
        for name in order:
            run, count = runs[name]
            begin = cpu_seconds()
            run()
            if number > 0:
                rates[name].append(count / (cpu_seconds() - begin))
    return rates


def spread(values: list[float], digits: int) -> dict[str, float]:
    """Return median, least and greatest."""
    return {name: round(of(values), digits) for name, of in (("median", median), ("min", min), ("max", max))}


def whole_reads(path: Path, read: Callable[[], object], rounds: int) -> dict[str, dict[str, float]]:
    """Return CPU seconds of reading all of a file: ours (float32 and validity), rasterio (stored numbers)."""
    rio = rasterio()

    def plain() -> None:
        with rio.open(path) as dataset:
            dataset.read()

    seconds: dict[str, list[float]] = {"ours": [], "rasterio": []}
    for _ in range(rounds):
        for name, run in (("ours", read), ("rasterio", plain)):
            begin = cpu_seconds()
            run()
            seconds[name].append(cpu_seconds() - begin)
    return {name: spread(values, 2) for name, values in seconds.items()}


def raster_figures(folder: Path, options: argparse.Namespace) -> dict:
    """Return the figures of each layout."""
    array, figures = scene(options.size, options.seed), {}
    for name, layout in LAYOUTS.items():
        path = write(folder / "scene.tif", array, layout)
        index = open_archive([path], [MODALITY])
        config = {"modality": (MODALITY,), "crop_2d": (options.crop, options.crop), "cache_mb": 0}
        config["shuffle_steps"] = BATCHES  # a round is a whole window: its first batch pays for all
        # A seed each: contestants that read the same places would find each other's blocks in GDAL's cache.
        made = [
            Steps(index, DataConfig(crops_per_read=asked, **config), seed=options.seed + n, batch_size=options.batch)
            for n, asked in enumerate((None, 8, 1))
        ]
        count = options.batch
        runs = {
            "naive": (naive(path, options.crop, count, options.seed, convert=False), count),
            "naive_float": (naive(path, options.crop, count, options.seed + 1, convert=True), count),
            **{f"ours_{steps.crops_per_read}": (ours(steps, BATCHES), BATCHES * count) for steps in made},
        }
        rates = measure(runs, options.rounds, options.seed)
        default = f"ours_{made[0].crops_per_read}"
        figures[name] = {
            "megabytes": path.stat().st_size >> 20,
            "crops_per_cpu_second": {contestant: spread(values, 1) for contestant, values in rates.items()},
            "times_naive": {
                contestant: spread([a / b for a, b in zip(values, rates["naive"], strict=True)], 2)
                for contestant, values in rates.items()
            },
            "times_naive_float": spread([a / b for a, b in zip(rates[default], rates["naive_float"], strict=True)], 2),
            "bar": BARS.get(name),
            "default": default,
            "whole_read_cpu_s": whole_reads(path, lambda index=index: index.read(index.rows[0].key), 3),
        }
        show(name, figures[name])
        path.unlink()
    return figures


def show(name: str, figure: dict) -> None:
    """Write one line of the table."""
    ratio = figure["times_naive"][figure["default"]]
    parts = [f"{name:30}", f"naive {figure['crops_per_cpu_second']['naive']['median']:6.1f}/s"]
    parts += [
        f"{contestant} {values['median']:.1f}/s {figure['times_naive'][contestant]['median']:.1f}x"
        for contestant, values in figure["crops_per_cpu_second"].items()
        if contestant.startswith("ours")
    ]
    bar = f"bar {figure['bar']}x" if figure["bar"] else "no bar"
    parts.append(
        f"[{ratio['min']:.1f} to {ratio['max']:.1f}, {bar}; x float {figure['times_naive_float']['median']:.1f}]"
    )
    sys.stderr.write("  ".join(parts) + "\n")


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dicom", type=Path, help="folder with DICOM files, copied for the header pass")
    parser.add_argument("--ct", type=Path, nargs="*", default=(), help="folders with one CT series each")
    parser.add_argument("--no-rasters", action="store_true")
    parser.add_argument("--files", type=int, default=10_000, help="files of the DICOM tree")
    parser.add_argument("--workers", type=int, default=2, help="processes of the header pass")
    parser.add_argument("--size", type=int, default=5120, help="rows and columns of the scene")
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument(
        "--batch", type=int, default=64, help="crops of a batch; ours reads a quarter at once, at most 16"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    figures: dict = {"gdal_cache_mb": os.environ.get("GDAL_CACHEMAX", "64")}
    figures |= {name: getattr(options, name) for name in ("size", "crop", "batch", "rounds", "seed")}
    if not options.no_rasters:
        with tempfile.TemporaryDirectory() as folder:
            figures["rasters"] = raster_figures(Path(folder), options)
    if options.dicom:
        figures["dicom_headers"] = header_scan(options.dicom, count=options.files, workers=options.workers)
    for number, folder in enumerate(options.ct):
        figures[f"ct_series_{number}"] = series_load(folder, rounds=options.rounds)
    sys.stdout.write(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
