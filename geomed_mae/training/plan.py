"""What a dry run tells: what a run would read, and the memory, disk and time that it needs.

Speed is measured, with this recipe on this device: the loader on a few windows of steps, the model on a few steps at a
learning rate of 0. Nothing is written. Memory and disk are estimated; the largest parts of both are known exactly.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomed_mae.archives.index import Index
from geomed_mae.config import Recipe
from geomed_mae.models.masking import Masking, plan_masks
from geomed_mae.models.patches import patch_grid
from geomed_mae.models.spec import ModelSpec
from geomed_mae.samples.buckets import Bucket, shares
from geomed_mae.samples.loader import Steps
from geomed_mae.samples.rate import LoaderRate, cache_bytes, loader_memory, measure_loader
from geomed_mae.training import rate
from geomed_mae.training.learner import Learner
from geomed_mae.training.objective import MaskedObjective
from geomed_mae.training.rate import Shape, StepRate, checkpoint_bytes, estimate_space, kept_checkpoints, repeated

MEASURED_BUCKETS = 3
"""Buckets whose steps are measured, those of the largest shares; the others are taken to be like these."""

EXAMPLES = 2
"""Crops that are read for it; a batch repeats them."""

WORKER_MB, DECODER_MB = 60, 150
"""Memory of a loader process of its own, beside what it shares with this one, and of one that decodes for it."""

SPREAD = 1.25
"""By how much a machine that others use too may be faster or slower than while it was measured."""

MIB = 2**20


def describe_plan(
    recipe: Recipe, index: Index, steps: Steps, objective: MaskedObjective, *, device: torch.device, out: Path
) -> dict[str, Any]:
    """Return what a run into `out` would read and need; the model of `objective` is of no use afterwards.

    Memory is in MiB; `memory.total_mb` is that of all processes on the machine's side, `memory.device_mb` that of a
    CUDA device. `hours` is from quartile to quartile of what was measured, and a quarter beyond.
    """
    portions = shares(steps.buckets, recipe.data.weights)
    train, resident = recipe.train, _resident()
    objective.mae.to(device)
    learner = Learner(objective.mae, train)
    shapes = [shape_of(objective.mae.spec, objective.masking, bucket) for bucket in steps.buckets]
    model = _measure_model(recipe, steps, objective, learner, portions)
    loader = measure_loader(steps, workers=recipe.data.workers)
    space = estimate_space(objective.mae, objective.mae.spec, train, shapes)
    rows = [row for bucket in steps.buckets for row in bucket.rows]
    cached = cache_bytes(recipe.data, rows)
    return {
        "images": len(index),
        "files": index.ledger.summary(),
        "buckets": _buckets(recipe, steps, objective, shapes, portions),
        "parameters": sum(parameter.numel() for parameter in objective.mae.parameters()),
        "steps": train.steps,
        "samples": train.steps * train.batch_size,
        "device": str(device),
        "loader_samples_per_second": round(loader.samples_per_second, 1),
        "model_samples_per_second": round(len(steps.samples) / model.seconds, 1),
        **_time(recipe, loader, model, samples=len(steps.samples), cuda=device.type == "cuda", cache=cached > 0),
        "memory": _memory(recipe, steps, space, model, device=device, resident=resident),
        "disk": _disk(recipe, out, checkpoint_bytes(space), cached),
    }


def shape_of(spec: ModelSpec, masking: Masking, bucket: Bucket) -> Shape:
    """Return what decides a step's memory: of a range of mask ratios the lowest counts, which shows the most."""
    patch = spec.patch(len(bucket.crop))
    grid = patch_grid(bucket.crop, patch)
    every = torch.ones(1, math.prod(grid), dtype=torch.bool)
    lowest = replace(masking, ratio=masking.bounds[0], channel_drop=0.0)
    plan = plan_masks(every, lowest, (0, 0), grid=grid, channels=len(bucket.channels))
    return len(bucket.channels), plan.visible.shape[1], plan.asked.shape[1], bucket.crop


def _buckets(
    recipe: Recipe, steps: Steps, objective: MaskedObjective, shapes: Sequence[Shape], portions: np.ndarray
) -> list[dict[str, Any]]:
    spec, found = objective.mae.spec, []
    for bucket, shape, share in zip(steps.buckets, shapes, portions, strict=True):
        patch = spec.patch(len(bucket.crop))
        found.append(
            {
                "modality": bucket.modality,
                "channels": [channel.name for channel in bucket.channels],
                "images": len(bucket.rows),
                "share_of_steps": round(float(share), 4),
                "crop": list(bucket.crop),
                "patch": list(patch),
                "tokens": math.prod(patch_grid(bucket.crop, patch)),
                "tokens_seen": shape[1],
                "memory_mb": round(estimate_space(objective.mae, spec, recipe.train, [shape]).total / MIB, 1),
            }
        )
    return found


def _measure_model(
    recipe: Recipe, steps: Steps, objective: MaskedObjective, learner: Learner, portions: np.ndarray
) -> StepRate:
    """Return the seconds of a step, averaged over the largest buckets by their shares."""
    largest = np.argsort(-portions, kind="stable")[:MEASURED_BUCKETS]
    weights = portions[largest] / portions[largest].sum()
    seconds = rate.SECONDS / len(largest)
    found = []
    for place in largest:
        batch = repeated(steps.examples(steps.buckets[place], EXAMPLES), len(steps.samples))
        found.append(rate.measure_step(learner, objective.loss, batch, recipe.train, seconds=seconds))
    memory = [one.device_mb for one in found if one.device_mb is not None]
    return StepRate(
        *(float(np.dot(weights, [getattr(one, name) for one in found])) for name in ("seconds", "quick", "slow")),
        steps=sum(one.steps for one in found),
        device_mb=max(memory, default=None),
    )


def _time(
    recipe: Recipe, loader: LoaderRate, model: StepRate, *, samples: int, cuda: bool, cache: bool
) -> dict[str, Any]:
    """Return which of loader and model bounds the run, and the hours that it takes.

    Without workers a step takes the time of both. With workers it takes the longer one, or on a CPU, where they share
    the cores, up to the sum. What is read from the cache on disk later takes hardly any time, and is not measured.
    """
    workers = recipe.data.workers
    load = samples / loader.samples_per_second
    wait = load / (load + model.seconds) if workers == 0 else max(0.0, 1 - model.seconds / max(load, model.seconds))
    quick, slow = samples / loader.quick, samples / loader.slow
    together = workers > 0 and cuda
    low = max(model.quick, quick) if workers else model.quick + quick
    high = max(model.slow, slow) if together else model.slow + slow
    if cache or not loader.shared_reads:
        low = model.quick
    hours = [recipe.train.steps * seconds / 3600 for seconds in (low / SPREAD, high * SPREAD)]
    return {
        "bound": "loader" if load > model.seconds else "model",
        "data_wait": round(wait, 4),
        "loader_is_a_lower_limit": not loader.shared_reads,
        "hours": [float(f"{value:.3g}") for value in hours],
    }


def _memory(
    recipe: Recipe, steps: Steps, space: rate.Space, model: StepRate, *, device: torch.device, resident: float
) -> dict[str, Any]:
    """Return what processes take: this one as it stands, training, the loader, and workers with their decoders."""
    workers = recipe.data.workers
    loader = loader_memory(steps, workers)
    training = (space.total - space.weights) / MIB if device.type == "cpu" else 0.0
    processes = workers * WORKER_MB + max(1, workers) * DECODER_MB
    parts = {"this_process": resident, "training": training, "processes": processes}
    parts |= {name: loader[name] for name in ("images", "windows", "in_flight")}
    found: dict[str, Any] = {f"{name}_mb": round(value) for name, value in parts.items()}
    found["total_mb"] = round(sum(parts.values()))
    found["measured_mb"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS)
    found["machine_mb"] = round(_machine_memory())
    if "shared_memory_free" in loader:
        found["shared_memory_free_mb"] = round(loader["shared_memory_free"])
    if device.type == "cuda":
        found["device_mb"] = round(model.device_mb or space.total / MIB)
        found["device_total_mb"] = round(torch.cuda.get_device_properties(device).total_memory / MIB)
    return found


_RSS_UNITS = MIB if sys.platform == "darwin" else 1024
"""getrusage counts bytes there, KiB elsewhere."""


def _resident() -> float:
    """Return the memory of this process now, in MiB."""
    with contextlib.suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE") / MIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / _RSS_UNITS


def _machine_memory() -> float:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / MIB


def _disk(recipe: Recipe, out: Path, checkpoint: int, cached: int) -> dict[str, Any]:
    """Return the MiB that a run writes, the cache at its largest, and what is free where it writes."""
    config, checkpoints = recipe.data, kept_checkpoints(recipe.train)
    cache = out / "cache" if config.cache_dir is None else Path(config.cache_dir).expanduser()
    return {
        "checkpoint_mb": round(checkpoint / MIB, 1),
        "checkpoints": checkpoints,
        "cache_mb_at_most": round(cached / MIB, 1),
        "free_mb": round(_free(out)),
        "cache_free_mb": round(_free(cache)),
    }


def _free(path: Path) -> float:
    """Return the MiB that are free where `path` will be."""
    there = next(folder for folder in (path, *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(there).free / MIB
