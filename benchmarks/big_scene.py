"""Memory and speed of `predict` over one large scene: writes the scene, a model of random weights, and measures.

    python benchmarks/big_scene.py [--size 20000] [--classes 2] [--window 128] [--index] [--probabilities] [--keep DIR]

The scene is uint16 with four bands, textured, tiled 512 x 512 and compressed, written in rows so that it costs no
memory. The model has random weights: what is in them changes neither memory nor time. predict runs as a user runs it,
`python -m geomed_mae predict`, in a process of its own. Told are the peak memory of that process, and the peak of what
it held together with the processes that it starts to decode.

By default the scene is given as a raw file, so that predict scans it first; with --index it is scanned before, in
another process, whose peak is told apart.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import torch
from rasterio.transform import Affine

from geomed_mae.archives.seen import Seen
from geomed_mae.archives.statistics import summarise
from geomed_mae.heads import HeadSpec
from geomed_mae.heads.task_model import TaskModel, TaskSpec, save_task_model
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder

MODALITY, BANDS = "sentinel2-l2a", ("B02", "B03", "B04", "B08")
TILE = 512
SIDE = 4096
"""Pixels of the texture that is moved about."""
WIDTH, DEPTH, PATCH = 48, 2, 16

EVERY_S = 0.02
"""Seconds between two looks at how much memory the processes hold."""


def texture(seed: int = 0) -> np.ndarray:
    """Return float32 (4, SIDE, SIDE) between 0 and 1 with the spectrum of landscapes, periodic at its borders."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(np.fft.fftfreq(SIDE)[:, None], np.fft.rfftfreq(SIDE)[None])
    frequency[0, 0] = 1
    bands = []
    for _ in BANDS:
        spectrum = np.fft.rfft2(rng.standard_normal((SIDE, SIDE), dtype=np.float32)) / frequency
        field = np.fft.irfft2(spectrum).astype(np.float32)
        low, high = np.quantile(field[::7, ::7], (0.001, 0.999))
        bands.append(np.clip((field - low) / (high - low), 0, 1))
    return np.stack(bands)


def write_scene(path: Path, size: int) -> Path:
    """Write a scene of `size` x `size` pixels, TILE rows at a time; each row of tiles is another piece of texture."""
    field, rng = texture(), np.random.default_rng(1)
    profile = {"driver": "GTiff", "dtype": "uint16", "count": len(BANDS), "height": size, "width": size, "nodata": 0}
    tiling = {"tiled": True, "blockxsize": TILE, "blockysize": TILE, "compress": "deflate", "zlevel": 1, "predictor": 2}
    grid = {"crs": "EPSG:32633", "transform": Affine(10, 0, 300000, 0, -10, 5_000_000), "BIGTIFF": "YES"}
    with (
        rasterio.Env(GDAL_CACHEMAX=64, GDAL_NUM_THREADS="1"),
        rasterio.open(path, "w", **profile, **tiling, **grid) as dataset,
    ):
        dataset.descriptions = BANDS
        for top in range(0, size, TILE):
            rows, shift = min(TILE, size - top), rng.integers(0, SIDE, 2)
            at = (np.arange(top, top + rows) + shift[0]) % SIDE
            across = (np.arange(size) + shift[1]) % SIDE
            bands = [(1 + 1500 * (band + 1) * field[band][np.ix_(at, across)]) for band in range(len(BANDS))]
            values = np.stack([band.astype(np.uint16) for band in bands])
            dataset.write(values, window=rasterio.windows.Window(0, top, size, rows))
    return path


def write_model(run: Path, classes: int, window: int) -> Path:
    """Write a run with a segmentation model of random weights."""
    modality = load_modality(MODALITY)
    channels = tuple(channel for channel in modality.channels if channel.name in BANDS)
    noise = np.random.default_rng(0).normal(0.2, 0.05, (len(BANDS), 64, 64)).astype(np.float32)
    entries = contract_entries(modality, channels, [summarise(noise, np.ones(noise.shape, bool))])
    torch.manual_seed(0)
    encoder = Encoder(ModelSpec(dim=WIDTH, depth=DEPTH, heads=2, patch_2d=(PATCH, PATCH), basis=4))
    names = tuple(f"class {number}" for number in range(classes))
    head = HeadSpec(
        name="linear", task="segment", patch=(PATCH, PATCH), embed_dim=WIDTH, classes=names, channels=len(BANDS),
        width=32, maps=1,
    )  # fmt: skip
    spec = TaskSpec(
        head=head, modality=MODALITY, channels=tuple(channel.name for channel in channels), crop=(window, window)
    )
    save_task_model(run, TaskModel(encoder, Contract(channels=entries, crop_2d=(window, window)), spec), Seen())
    return run


def measured(*words: str) -> dict[str, Any]:
    """Run a command in a process of its own; return its exit code, seconds and peaks of memory in MiB.

    `process` is the peak of that process alone (VmHWM), `together` the largest sum over it and all that it started,
    seen EVERY_S apart. (ru_maxrss would not do: Linux hands a parent's down to what it starts.)
    """
    begin, peaks = time.perf_counter(), {"process": 0, "together": 0}
    with subprocess.Popen([sys.executable, "-m", "geomed_mae", *words], stdout=subprocess.DEVNULL) as running:
        while running.poll() is None:
            held = [resident(process) for process in family(running.pid)]
            peaks["process"] = max([peaks["process"], *(peak for _, peak in held[:1])])
            peaks["together"] = max(peaks["together"], sum(now for now, _ in held))
            time.sleep(EVERY_S)
    seconds = round(time.perf_counter() - begin, 1)
    return {"exit": running.returncode, "seconds": seconds, **{name: peak >> 10 for name, peak in peaks.items()}}


def family(first: int) -> list[int]:
    """Return the numbers of a process and of all that descend from it."""
    found = [first]
    for process in found:
        with contextlib.suppress(OSError):
            for task in Path(f"/proc/{process}/task").iterdir():
                found += map(int, (task / "children").read_text().split())
    return found


def resident(process: int) -> tuple[int, int]:
    """Return the memory that a process holds, and the most that it has held, in KiB; 0 where it has ended."""
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0, 0
    told = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Vm")}
    return int(told.get("VmRSS", 0)), int(told.get("VmHWM", 0))


def main() -> None:
    """Measure, and print one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=20_000)
    parser.add_argument("--classes", type=int, default=2)
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--index", action="store_true", help="scan before, in another process")
    parser.add_argument("--probabilities", action="store_true")
    parser.add_argument("--keep", type=Path, help="folder for the scene, which is not written again where it is there")
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = chosen.keep or folder
        kept.mkdir(parents=True, exist_ok=True)
        scene = kept / f"scene{chosen.size}.tif"
        if not scene.exists():
            write_scene(scene.with_suffix(".partial"), chosen.size).rename(scene)
        run = write_model(folder / "run", chosen.classes, chosen.window)
        archive, scanned = scene, None
        if chosen.index:
            archive = folder / "index"
            scanned = measured("scan", str(scene), "--modality", MODALITY, "--out", str(archive))
        more = ["--batch", str(chosen.batch), *(["--probabilities"] if chosen.probabilities else [])]
        done = measured("predict", str(run), "--archive", str(archive), "--out", str(folder / "maps"), *more)
        written = sum(path.stat().st_size for path in (folder / "maps").iterdir() if path.is_file())
    told = {
        "size": chosen.size, "bands": len(BANDS), "classes": chosen.classes, "window": chosen.window,
        "probabilities": chosen.probabilities, "threads": os.environ.get("OMP_NUM_THREADS"), "exit": done["exit"],
        "peak_process_mb": done["process"], "peak_together_mb": done["together"],
        "seconds": done["seconds"], "mpx_per_s": round(chosen.size**2 / 1e6 / done["seconds"], 3),
        "written_mb": round(written / 2**20, 1), "scan": scanned,
    }  # fmt: skip
    print(json.dumps(told))


if __name__ == "__main__":
    main()
