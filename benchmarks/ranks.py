"""Samples a second of several processes that train one model, over those of one process with one thread, as a ratio.

    python benchmarks/ranks.py [--ranks 2] [--rounds 9] [--steps 2] [--recipe pretrain_landsat7_tiny] [--each]

Every process has one thread. A round is the same number of steps twice: by the first process alone, while the others
sleep, and by all of them. By default all share the recipe's batch; with --each every process has a batch of that size,
so that a step has more samples. The two take turns, and the ratio is the median over pairs, so that what else the
machine does meets both. Where it is busy, wall time says little: processes wait for cores, then for one another. The
second ratio is of CPU time, that of the one process over that of the busiest of the several: what a machine with a core
for each would show, but for the time that messages travel.

Measured, 2 processes, quiet machine of 2 cores, torch 2.14, pretrain_landsat7_tiny (batch 16), wall [worst, best of 7]:

    the recipe's batch shared          1.43 [1.32, 1.57]   CPU time 1.49
    batch of 64 shared                 1.77 [1.59, 1.82]   CPU time 1.85
    a batch of 16 for each (--each)    1.95 [1.21, 2.21]   CPU time 2.08

What 8 samples leave unshared (AdamW, messages, half of Muon's work at the speed of two busy cores) is a third of such a
small step; with more samples a step, which is what more processes are for, it vanishes.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np
import torch

from geomed_mae.archives.statistics import summarise
from geomed_mae.config import Recipe
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking
from geomed_mae.models.spec import ModelSpec
from geomed_mae.recipe_file import load_recipe
from geomed_mae.samples.batch import Batch
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.learner import Learner
from geomed_mae.training.loop import agree, gradients
from geomed_mae.training.objective import MaskedObjective


def random_batch(recipe: Recipe, size: int) -> Batch:
    """Return `size` samples of noise in the shape of the recipe's first modality, in 2D if it has such crops."""
    modality = load_modality(recipe.data.modality[0])
    crop = recipe.data.crop_2d or recipe.data.crop_3d
    raw = np.random.default_rng(0).normal(100, 30, (size, len(modality.channels), *crop)).astype(np.float32)
    valid = np.ones(raw.shape, dtype=bool)
    return Batch(
        raw=torch.from_numpy(raw),
        valid=torch.from_numpy(valid),
        channels=modality.channels,
        modality=modality.name,
        spacing=None,
        keys=("noise",) * size,
        statistics=tuple(summarise(image, mask) for image, mask in zip(raw, valid, strict=True)),
        step=0,
        samples=tuple(range(size)),
    )


def training(recipe: Recipe, batch: Batch, ranks: Ranks) -> Callable[[int], None]:
    """Return a function that does so many steps, data apart, as the loop does them."""
    torch.manual_seed(0)
    mae = MaskedAutoencoder.from_spec(ModelSpec.from_config(recipe.model))
    entries = contract_entries(load_modality(batch.modality), batch.channels, batch.statistics)
    masking = Masking.from_config(recipe.model)
    objective = MaskedObjective(mae, Contract(channels=tuple(entries)), masking=masking, seed=0)
    learner = Learner(mae.train(), recipe.train, ranks)
    objective.forward = learner.parallel.forward
    share = len(batch) // ranks.world
    own = batch.part(ranks.rank * share, (ranks.rank + 1) * share)

    def steps(count: int) -> None:
        for number in range(count):
            told = gradients(learner, own, objective.loss, number, recipe.train)
            learner.parallel.clip(learner.optimizers.parameters(), recipe.train.clip)
            agree(learner, told, False)
            learner.update(number)

    return steps


def timed(ranks: Ranks, steps: Callable[[int], None] | None, count: int) -> tuple[float, float]:
    """Return seconds of wall time until all are done, and of CPU time of the busiest process; None only waits."""
    ranks.barrier()
    wall, cpu = time.perf_counter(), time.process_time()
    if steps is not None:
        steps(count)
    cpu = time.process_time() - cpu
    busiest = max(ranks.gather(cpu))
    return time.perf_counter() - wall, busiest


def measure(recipe: Recipe, rounds: int, count: int, *, each: bool) -> dict[str, float | int] | None:
    """Take turns between one process and all of them; return the ratios in the first process."""
    ranks = Ranks.from_environment()
    size, factor = recipe.train.batch_size, ranks.world if each else 1
    batch = random_batch(recipe, size * factor)
    pairs = []
    with ranks.joined(torch.device("cpu"), 600):
        alone = training(recipe, batch.part(0, size), Ranks()) if ranks.first else None
        together = training(recipe, batch, ranks)
        for number in range(rounds + 1):
            one, several = timed(ranks, alone, count), timed(ranks, together, count)
            if number:  # the first round allocates memory
                pairs.append((one, several))
    if not ranks.first:
        return None
    wall = [factor * one[0] / several[0] for one, several in pairs]
    cpu = [factor * one[1] / several[1] for one, several in pairs]
    samples = count * size
    return {
        "ranks": ranks.world,
        "ratio": round(statistics.median(wall), 3),
        "ratio_best": round(max(wall), 3),
        "ratio_worst": round(min(wall), 3),
        "cpu_ratio": round(statistics.median(cpu), 3),
        "samples_per_second_of_one": round(statistics.median(samples / one[0] for one, _ in pairs), 2),
        "samples_per_second_of_all": round(statistics.median(factor * samples / several[0] for _, several in pairs), 2),
        "rounds": rounds,
    }


def launch(arguments: list[str], world: int) -> int:
    """Start the processes, each with one thread, and return the worst exit code."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]
    return max(abs(process.wait()) for process in started)


def main() -> int:
    """Parse options; start the processes, or be one of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=2, help="steps of each half of a round")
    parser.add_argument("--recipe", default="pretrain_landsat7_tiny")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--each", action="store_true", help="a batch of the recipe's size for every process")
    options = parser.parse_args()
    if "RANK" not in os.environ:
        return launch(sys.argv[1:], options.ranks)
    recipe = load_recipe(options.recipe, ["train.device=cpu", "train.precision=fp32", *options.overrides])
    found = measure(recipe, options.rounds, options.steps, each=options.each)
    if found is not None:
        print(json.dumps({"recipe": options.recipe, "each": options.each, **found}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
