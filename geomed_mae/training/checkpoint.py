"""Checkpoints: safetensors + JSON + a SHA-256 manifest, written so that a crash at any byte leaves the last one intact.

    checkpoints/step-00000500/
      model.safetensors       parameters and buffers by name
      optimizer.safetensors   optimiser tensors by name
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
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as tensor_bytes
from torch import Tensor

from geomed_mae.errors import IntegrityError, OutputError
from geomed_mae.models.manifest import read_folder, write_folder

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
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
    keep: int = 2,
) -> Path:
    """Write the checkpoint of `step` into `folder`, then delete all but the newest `keep`.

    Raises:
        OutputError: disk full, no permission, or the disk does not return what was written. Older checkpoints stay.
    """
    files = {
        MODEL: tensor_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in model.items()}),
        OPTIMIZER: tensor_bytes({name: tensor.detach().cpu().contiguous() for name, tensor in optimizer.items()}),
        STATE: json.dumps({**state, "step": step}, indent=1).encode(),
    }
    target = step_folder(folder, step)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob(LEFTOVERS):
            shutil.rmtree(leftover)
        write_folder(target, files)
        _fsync_folder(target)
        _fsync_folder(folder)
        if read_folder(target) != files:
            raise IntegrityError("it reads back incomplete")
        # Only now, with the new one safe on disk, may an old one go.
        for old in [present for present in steps_present(folder) if present < step][: -keep + 1 or None]:
            # Renamed first: killed half-way through its deletion, it must not look like a checkpoint any more.
            doomed = folder / f".{step_folder(folder, old).name}.deleted"
            step_folder(folder, old).rename(doomed)
            shutil.rmtree(doomed)
    except (OSError, IntegrityError) as error:
        needed = sum(map(len, files.values())) / 2**20
        detail = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise OutputError(
            f"the checkpoint of step {step} ({needed:.0f} MiB) cannot be written ({detail}); earlier checkpoints are "
            "intact: make room or give permission, then continue with --resume"
        ) from error
    return target


def load(path: Path) -> Checkpoint:
    """Read a checkpoint folder; each file is read once, and parsed only when its hash is the manifest's.

    Raises:
        IntegrityError: a file is missing or was changed, or the folder is no checkpoint.
    """
    files = read_folder(path)
    try:
        state = json.loads(files[STATE])
        return Checkpoint(int(state["step"]), path, load_tensors(files[MODEL]), load_tensors(files[OPTIMIZER]), state)
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
