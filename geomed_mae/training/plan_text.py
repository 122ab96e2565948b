"""The plan of a dry run in words."""

from __future__ import annotations

import math
from typing import Any


def plan_as_text(plan: dict[str, Any]) -> str:
    """Return the plan for people."""
    memory, disk = plan["memory"], plan["disk"]
    lines = [f"reads    {plan['images']} images ({plan['files']})"]
    for one in plan["buckets"]:
        crop, patch = (" x ".join(map(str, one[name])) for name in ("crop", "patch"))
        names = ", ".join(one["channels"][:6]) + (", ..." if len(one["channels"]) > 6 else "")
        lines.append(
            f"         {one['modality']} [{names}]: {one['images']} images, {one['share_of_steps']:.1%} of the steps, "
            f"crops {crop}, {one['tokens']} patches of {patch}, {one['tokens_seen']} seen"
        )
    more = "at least " if plan["loader_is_a_lower_limit"] else ""
    lines.append(
        f"speed    loader {more}{plan['loader_samples_per_second']:g} samples/s, model "
        f"{plan['model_samples_per_second']:g} on {plan['device']} ({plan['parameters'] / 1e6:.1f} M parameters): the "
        f"{plan['bound']} bounds the run; about {plan['data_wait']:.0%} of the time would be waiting for data"
    )
    low, high = (_duration(hours) for hours in plan["hours"])
    lines.append(f"time     {plan['steps']} steps, {plan['samples']} samples: {low} to {high}")
    lines.append(
        f"memory   {memory['total_mb']} MiB of {memory['machine_mb']}: training {memory['training_mb']}, decoded "
        f"images {memory['images_mb']}, crops {memory['windows_mb'] + memory['in_flight_mb']}, processes "
        f"{memory['this_process_mb'] + memory['processes_mb']}"
    )
    if "device_mb" in memory:
        lines.append(f"         on the device {memory['device_mb']} MiB of {memory['device_total_mb']}")
    checkpoints = disk["checkpoints"] * disk["checkpoint_mb"]
    lines.append(
        f"disk     checkpoints {disk['checkpoints']} x {disk['checkpoint_mb']:g} MiB, cache at most "
        f"{disk['cache_mb_at_most']:g} MiB; {disk['free_mb']} MiB are free"
    )
    lines += [f"warning  {text}" for text in _shortages(memory, disk, checkpoints)]
    return "\n".join(lines)


def _shortages(memory: dict[str, Any], disk: dict[str, Any], checkpoints: float) -> list[str]:
    """Return what does not fit, and what to do."""
    found = []
    if memory["total_mb"] > memory["machine_mb"]:
        found.append(
            "memory is short: lower data.cache_mb, data.workers, or train.batch_size (or raise train.accumulate)"
        )
    if memory.get("device_mb", 0) > memory.get("device_total_mb", math.inf):
        found.append("the device's memory is short: raise train.accumulate, or lower train.batch_size")
    if memory["in_flight_mb"] > memory.get("shared_memory_free_mb", math.inf):
        found.append("shared memory (/dev/shm) is short: lower data.workers or data.shuffle_steps, or enlarge it")
    if checkpoints > disk["free_mb"]:
        found.append("the disk is too small for the checkpoints: lower train.keep, or choose another --out")
    elif disk["cache_mb_at_most"] > disk["cache_free_mb"]:
        found.append(
            "the disk is too small for the whole cache: it will hold what fits; see data.cache_dir, data.cache_gb"
        )
    return found


def _duration(hours: float) -> str:
    if hours < 1 / 30:
        return f"{hours * 3600:.0f} s"
    if hours < 2:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 48 else f"{hours / 24:.1f} days"
