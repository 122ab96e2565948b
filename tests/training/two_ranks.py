"""What two processes do for test_distributed.py: `python -m tests.training.two_ranks OUT`, started twice.

Each case trains a tiny autoencoder on images and volumes in turn; the tests train the same alone, and compare.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor

from geomed_mae.__main__ import leave
from geomed_mae.config import TrainConfig
from geomed_mae.errors import ConfigError, Preempted
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking
from geomed_mae.training import checkpoint
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.learner import Learner
from geomed_mae.training.loop import fit
from geomed_mae.training.objective import MaskedObjective
from tests.training.conftest import SPEC, make_batch

TRAIN = {
    "steps": 4,
    "batch_size": 4,
    "log_every": 1,
    "checkpoint_every": 2,
    "keep": 9,
    "lr": 1e-3,
    "optimizer": "adamw",
}
KINDS = (("landsat7", (16, 16)), ("ct", (4, 16, 16)))
CASES = {
    "replicated": {},
    "accumulated": {"accumulate": 2, "ema": 0.9},
    "muon": {"optimizer": "muon"},
    "fsdp": {"sharding": "fsdp", "ema": 0.9},
    "fsdp-muon": {"sharding": "fsdp", "optimizer": "muon", "accumulate": 2},
}


def train(folder: Path, ranks: Ranks, *, broken=(), stop_at=None, resume=False, **more):
    """Train; `broken` is (rank, step) whose loss is not finite, `stop_at` (rank, step) that is told to stop."""
    config = TrainConfig(**{**TRAIN, **more})
    torch.manual_seed(0)
    batches = [make_batch(*kind, count=4) for kind in KINDS]
    entries = [contract_entries(load_modality(b.modality), b.channels, b.statistics) for b in batches]
    mae = MaskedAutoencoder.from_spec(SPEC)
    objective = MaskedObjective(mae, Contract(channels=sum(entries, ())), masking=Masking(), seed=0)
    learner = Learner(mae, config, ranks)
    objective.forward = learner.parallel.forward
    lines, size = [], 4 // ranks.world

    def own_part(first):
        for step in range(first, config.steps):
            yield make_batch(*KINDS[step % 2], count=4, step=step).part(ranks.rank * size, (ranks.rank + 1) * size)

    def step(batch, number):
        if (ranks.rank, number) == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        loss, parts = objective.loss(batch, number)
        return loss * (float("nan") if (ranks.rank, number) == broken else 1.0), parts

    resumed = checkpoint.newest_valid(folder) if resume else None
    how = {"checkpoints": folder, "record": lines.append, "resumed": resumed, "show_progress": False}
    done = fit(learner, own_part, step, config, **how)
    best = learner.best(lambda: MaskedAutoencoder.from_spec(SPEC))
    held = sum((value.to_local() if isinstance(value, DTensor) else value).numel() for value in mae.parameters()) / sum(
        value.numel() for value in mae.parameters()
    )
    return done, lines, best, held


def main(out: Path) -> None:
    """Do everything that needs two processes, and write what the tests look at."""
    ranks, seen = Ranks.from_environment(), {}
    with ranks.joined(torch.device("cpu"), 60):
        for name, more in CASES.items():
            done, lines, best, held = train(out / name, ranks, **more)
            seen[name] = {"lines": lines, "samples": done.samples, "best": best is not None, "held": held}
        done, lines, *_ = train(out / "broken", ranks, broken=(1, 2))
        seen["broken"] = {"lines": lines, "skipped": done.skipped}
        try:
            train(out / "stopped", ranks, stop_at=(1, 0))
        except Preempted as error:
            seen["stopped"] = [str(error), error.exit_code]
        done, lines, *_ = train(out / "stopped", ranks, resume=True)
        seen["resumed"] = {"samples": done.samples, "steps": [line["step"] for line in lines]}
        train(out / "alone", ranks, resume=True)
        seen["gathered"] = ranks.gather({"rank": ranks.rank, "text": "ü" * (ranks.rank + 1)})
        seen["told"] = ranks.first_does(lambda: ranks.rank + 7)
        seen["refused"] = []
        for error in (ConfigError("of the first"), Preempted("told")):
            try:
                ranks.first_does(lambda error=error: raised(error))
            except (ConfigError, Preempted) as caught:
                seen["refused"].append([type(caught).__name__, str(caught)])
        try:
            ranks.check_same(ranks.rank, "not the same")
        except ConfigError as caught:
            seen["refused"].append(["ConfigError", str(caught)])
        seen["threads"] = torch.get_num_threads()
        ranks.barrier()
    (out / f"rank{ranks.rank}.json").write_text(json.dumps(seen))


def raised(error):
    """Raise it."""
    raise error


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave(0)
