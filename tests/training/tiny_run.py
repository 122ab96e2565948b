"""A pretraining run that takes a second or two, and what makes two runs the same."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import numpy as np
import torch

from geomed_mae.training import checkpoint
from tests.make_data import write_geotiff
from tests.training.sessions import Session, Sessions, recorded

STEPS = 60
RECIPE = f"""
data: {{modality: landsat7, crop_2d: [16, 16]}}
model: {{depth: 1, patch_2d: [4, 4], basis: 4, decoder_dim: 16, decoder_depth: 1}}
train: {{steps: {STEPS}, batch_size: 4, log_every: 1, checkpoint_every: 4, seed: 7}}
"""


def write_scene(path: Path, number: int, size: int, **how: object) -> Path:
    """Write a scene of six bands with a corner of nodata."""
    array = np.random.default_rng(number).integers(1, 255, (6, size, size)).astype(np.uint8)
    array[:, : size // 4, : size // 4] = 0
    grid = (30, 0, 500000 + 5000 * number, 0, -30, 4000000)
    return write_geotiff(path, array, nodata=0, transform=grid, crs="EPSG:32618", **how)


def make_place(folder: Path, sessions: Sessions) -> Path:
    """Make a folder with `recipe.yaml` and `index`, of three scenes in `archive`, one smaller than the crop."""
    (folder / "archive").mkdir()
    for number, size in enumerate((48, 40, 12)):
        write_scene(folder / f"archive/{number}.tif", number, size)
    (folder / "recipe.yaml").write_text(RECIPE)
    scan(sessions, folder / "archive", folder / "index")
    return folder


def scan(sessions: Sessions, archive: Path, index: Path) -> Path:
    """Scan an archive anew."""
    done = sessions.run("scan", archive, "--out", index, "--modality", "landsat7", "--workers", 1, "--no-pictures")
    assert done.code == 0, done.said
    return index


def words(place: Path, out: Path, *more: object, index: Path | None = None) -> tuple[object, ...]:
    """Return the command line of a pretraining run."""
    archive = place / "index" if index is None else index
    return "pretrain", place / "recipe.yaml", "--archive", archive, "--out", out, *more


def settings(**changes: object) -> list[str]:
    """Return `--set` options; `train__steps=3` sets train.steps."""
    return [word for key, value in changes.items() for word in ("--set", f"{key.replace('__', '.')}={value}")]


def start_ranks(
    sessions: Sessions, arguments: tuple, run: Path, faults: dict[int, dict] | None = None, world: int = 2
) -> list[Session]:
    """Begin a run of several processes, as torchrun does; `faults` by rank. Each records its part of the batches."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = []
    for rank in range(world):
        environment = {name: str(value) for name, value in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()}
        own = (faults or {}).get(rank, {})
        started.append(sessions.start(*arguments, environment=environment, record=record_of_rank(run, rank), **own))
    return started


def record_of_rank(run: Path, rank: int) -> str:
    """Return where a rank's part of the batches is recorded."""
    return f"{run}.rank{rank}.record"


def parts_of_ranks(run: Path, world: int = 2) -> dict[int, dict]:
    """Return the batches of all ranks put together: keys and sample numbers by step."""
    parts = [recorded(Path(record_of_rank(run, rank))) for rank in range(world)]
    assert all(part.keys() == parts[0].keys() for part in parts)
    whole: dict[int, dict] = {step: {"keys": [], "samples": []} for step in parts[0]}
    for part in parts:
        for step, entry in part.items():
            for name, values in whole[step].items():
                values += entry[name]
    return whole


def record_of(run: Path) -> str:
    """Return where the batches of a run are recorded."""
    return str(run.with_suffix(".record"))


def tensors(run: Path) -> dict[str, bytes]:
    """Return the bits of all parameters and optimiser tensors of the newest checkpoint."""
    found = checkpoint.newest_valid(run / "checkpoints")
    named = {**found.model, **{f"optimizer {name}": value for name, value in found.optimizer.items()}}
    return {"step": str(found.step).encode()} | {name: _bits(value) for name, value in named.items()}


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def log_lines(run: Path) -> list[tuple[int, float | None, float | None]]:
    """Return step, loss and gradient norm of the log's lines."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines if "loss" in line]


def same_result(run: Path, other: Path) -> None:
    """Two runs have the same parameters, optimiser tensors, encoder, log lines and batches, bit for bit."""
    one, two = tensors(run), tensors(other)
    assert one.keys() == two.keys()
    assert not [name for name in one if one[name] != two[name]]
    weights = [(path / "encoder/model.safetensors").read_bytes() for path in (run, other)]
    assert weights[0] == weights[1]
    assert log_lines(run) == log_lines(other)
    made = [recorded(Path(record_of(path))) for path in (run, other)]
    assert made[0] == made[1] and sorted(made[0]) == list(range(int(one["step"])))
