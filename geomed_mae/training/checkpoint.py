"""Checkpoints: safetensors + JSON + a SHA-256 manifest, written so that a crash at any byte leaves the last one intact.

    checkpoints/step-00000500/
      model.safetensors       parameters and buffers by name
      optimizer.safetensors   optimiser tensors by name
      average.safetensors     averaged parameters by name, with train.ema alone
      best.safetensors        weights of the best validation so far, where there is one
      state.json              step and everything else that is not a tensor
      MANIFEST.sha256         in the form that `sha256sum -c` checks

A folder is made under a temporary name, every file is fsynced, the folder is renamed and read back. Plain `torch.save`
to the final path left 20 of 25 files unreadable when the process was killed during it, and loads flipped bits silently;
hence both the rename and the manifest. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from geomed_mae.errors import IntegrityError, OutputError
from geomed_mae.models.manifest import MANIFEST, digests, read_folder, write_folder

MODEL, OPTIMIZER, AVERAGE = "model.safetensors", "optimizer.safetensors", "average.safetensors"
BEST = "best.safetensors"
STATE = "state.json"
RESERVE = 64 << 20
"""Bytes that stay free on the disk beyond a checkpoint, for logs, pictures and the neighbours."""

PER_TENSOR = 1024
"""More than a tensor takes in the header of a file."""

LEFTOVERS = ".step-*"
"""Temporary folders of a process that was killed while it saved; the next save removes them."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A verified checkpoint in memory: tensors on the CPU by name, and the JSON state."""

    step: int
    path: Path
    model: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    state: dict[str, Any]
    average: dict[str, Tensor] = field(default_factory=dict)
    best: dict[str, Tensor] = field(default_factory=dict)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights worth using: averaged where there is an average."""
        return {**self.model, **self.average}

    def forget(self) -> None:
        """Let go of the tensors, which would fill memory for as long as the run goes on; step, path and state stay."""
        for tensors in (self.model, self.optimizer, self.average, self.best):
            tensors.clear()


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return folder / f"step-{step:08d}"


def steps_present(folder: Path) -> list[int]:
    """Return the steps of which a checkpoint folder exists, whole or damaged, in rising order."""
    found = (re.fullmatch(r"step-(\d{8,})", path.name) for path in folder.glob("step-*"))
    return sorted(int(match[1]) for match in found if match)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save(
    folder: Path,
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    average: Mapping[str, Tensor] | None = None,
    best: Mapping[str, Tensor] | None = None,
    keep: int = 2,
    keep_every: int | None = None,
) -> Path:
    """Write the checkpoint of `step` into `folder`, then delete all but the newest `keep`.

    Those of steps that are multiples of `keep_every` stay as well.

    Raises:
        OutputError: disk full, no permission, or the disk does not return what was written. Older checkpoints stay.
    """
    extra = {name: part for name, part in ((AVERAGE, average), (BEST, best)) if part}
    tensors = {MODEL: model, OPTIMIZER: optimizer, **extra}
    files: dict[str, bytes | Callable[[], bytes]] = {name: partial(_bytes, part) for name, part in tensors.items()}
    files[STATE] = json.dumps({**state, "step": step}, indent=1).encode()
    needed = len(files[STATE]) + sum(
        tensor.nbytes + PER_TENSOR for part in tensors.values() for tensor in part.values()
    )
    target = step_folder(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(LEFTOVERS):
            shutil.rmtree(leftover)
        _check_room(folder, needed)
        if not (target / MANIFEST).is_file():
            # A damaged one of this step that was passed over: nothing vouches for it, and it must not end the run.
            shutil.rmtree(target, ignore_errors=True)
        written = write_folder(target, files)
        _fsync_folder(target)
        _fsync_folder(folder)
        if digests(target) != written:
            raise IntegrityError("it reads back as something else")
        # Only now, with the new one safe on disk, may an old one go.
        _delete_old(folder, step, keep, keep_every)
    except (OSError, IntegrityError) as error:
        detail = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(
            f"the checkpoint of step {step} ({needed / 2**20:.0f} MiB) cannot be written ({detail}); earlier "
            "checkpoints are intact: make room or give permission, then continue with --resume"
        ) from error
    return target


def _bytes(tensors: Mapping[str, Tensor]) -> bytes:
    return tensor_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def _check_room(folder: Path, needed: int) -> None:
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if free < needed + RESERVE:
        missing = (needed + RESERVE - free) / 2**20
        raise OSError(
            f"{free / 2**20:.0f} MiB are free, {missing:.0f} MiB more are needed to keep {RESERVE >> 20} MiB in reserve"
        )


def _delete_old(folder: Path, step: int, keep: int, keep_every: int | None) -> None:
    """Delete what is older than the newest `keep`, but for multiples of `keep_every`."""
    older = [present for present in steps_present(folder) if present < step]
    for old in older[: -keep + 1 or None]:
        if keep_every is not None and old % keep_every == 0:
            continue
        # Renamed first: killed half-way through its deletion, it must not look like a checkpoint any more.
        doomed = folder / f".{step_folder(folder, old).name}.deleted"
        step_folder(folder, old).rename(doomed)
        shutil.rmtree(doomed)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder; each file is read once, and parsed only when its hash is the manifest's.

    Raises:
        IntegrityError: a file is missing or was changed, or the folder is no checkpoint.
    """
    files = read_folder(path)
    try:
        state = json.loads(files[STATE])
        return Checkpoint(
            int(state["step"]),
            path,
            load_tensors(files[MODEL]),
            load_tensors(files[OPTIMIZER]),
            state,
            *(load_tensors(files[name]) if name in files else {} for name in (AVERAGE, BEST)),
        )
    except (ValueError, KeyError, SafetensorError) as error:
        raise IntegrityError(f"checkpoint {path.name} is none: {type(error).__name__}: {error}") from error


def newest_valid(folder: Path) -> Checkpoint | None:
    """Return the newest checkpoint that verifies, or None where there is none at all.

    Damaged ones are passed over with a warning, and left for whoever wants to look at them.

    Raises:
        IntegrityError: there are checkpoints, and none verifies.
    """
    steps = steps_present(folder)
    for step in reversed(steps):
        try:
            return load(step_folder(folder, step))
        except IntegrityError as error:
            log.warning("%s; trying the one before", error)
    if steps:
        raise IntegrityError(
            f"none of the {len(steps)} checkpoints verifies; restore one from a backup, or start again with --overwrite"
        )
    return None
