"""What decides the defaults: one choice at a time is changed, and frozen features are scored on labels.

    python benchmarks/ablations.py run --data FOLDER --results benchmarks/ablations.jsonl --seeds 0 1 2
    python benchmarks/ablations.py table --results benchmarks/ablations.jsonl

Small models (width 128, depth 6, decoder 96 wide with 2 blocks) are pretrained on the training groups of three tasks
(`ablation_tasks`): 300 steps of 16 crops (fires), 500 of 8 (hippocampus), 250 of 32 (xray), on one core. Every run is
read out in three ways: `last` block, `middle` block, and `several` (blocks at 1/3, 2/3 and the last, side by side),
each with all training labels (`probe`) and with few (`few`: 2 fires, 4 volumes, 20 images a class; mean of 5 draws).
A seed sets split, weights, crops and masks; differences are between runs of the same seed. Floors stand beside.

A result file has one JSON line a run. Runs whose line is there are skipped, so that a stopped call goes on, and several
processes may share a file (give them different --tasks). Seeds are the outer loop: a partial result is a balanced one.

Results (benchmarks/ablations.jsonl; base: exact, ratio 0.75, patch_channel, statistics 1, Muon; last block; scores of
base and floors, differences of the others to the base, 95 % intervals over 3 seeds that count overlapping splits, *
where 0 lies outside; of about 80 cells 4 would do so by chance):

                                       MR probe     MR few       fires probe  fires few    xray few
    base                               .357         .322         .908         .887         .958
    floor: random encoder              .231         .196         .912         .905         .841
    floor: patch statistics            .016         .015         .942         .901         .757
    floor: pixels                      .027         .023         .934         .915         .957
    floor: random convolutions         .227         .200         .904         .910         .901
    target none                        +.024±.115   +.026±.125   +.024±.109   -.020±.171   -.003±.039
    target patch                       -.009±.109   -.006±.118   +.027±.107   +.031±.065   -.002±.032
    stats 0                            -.018±.141   -.020±.155   -.010±.225   -.098±.156   -.006±.019
    stats 3                            -.021±.103   -.017±.099   +.019±.084   +.017±.022   -.003±.017
    adamw                              -.134±.062*  -.132±.059*  -.016±.163   -.059±.333   -.033±.053
    floor: random encoder, fixed stem                            .931         .910
    fast 25%                           -.006±.005*  -.002±.011   +.009±.072   -.000±.085   -.009±.007*
    ratio 0.6                          +.034±.045   +.034±.067   -.005±.059   -.002±.049
    ratio 0.9                          -.087±.067*  -.087±.058*  +.004±.188   -.021±.076   -.024±.025
    fixed stem                                                   -.004±.121   -.006±.090
    channel drop 0.3                                             -.047±.206   -.160±.486
    fast 50%                           +.058±.030*  +.067±.041*  +.029±.052   +.013±.014   -.006±.040
    ratio 0.5                          +.059±.062   +.062±.070   -.010±.136   -.002±.124   +.003±.024
    ratio 0.5 to 0.9                   +.018±.069   +.019±.078   +.029±.071   +.008±.014
    target none, stats 0               +.012±.122   +.014±.117   +.011±.104   +.003±.094
    fast 50%, ratio 0.6                +.067±.018*  +.074±.015*  +.019±.060   +.022±.018*
    adamw, the same time               -.101±.117   -.098±.104
    fixed stem, 3 times its rate                                 +.014±.122   +.014±.039
    target none, stats 0, ratio 0.6    +.037±.038   +.044±.059

Verdict.

- *Mode.* fast with half of all patches asked for is better on MR, not worse elsewhere, at 0.9 of the time: the default
  since. A quarter is no better than exact.
- *Optimiser.* AdamW (1e-3, not tuned) ends at the level of random weights on MR after the same steps, and a tenth below
  Muon after the same time: Muon stays.
- *Mask ratio.* 0.9 loses. 0.5 and 0.6 tend to win on MR, at up to 1.2 of the time; on top of fast 50 % 0.6 gives
  0.008 ± 0.044 more. 0.75 stays the default, the recipe for small MR volumes takes 0.6.
- *Target, statistics head.* Nothing is told apart. Without the head, few-label scores of fires fall by 0.10 in the
  mean; it stays at weight 1. A prototype's finding that per-patch targets alone end below random weights on MR is
  refuted for Muon (0.34 against 0.23). That of AdamW on its plateau, even with the head, is reproduced, and so is the
  direction of ratio 0.6 with target none.
- *Channel sampling* costs 0.16 (few, fires, 0.3 of the channels hidden): off by default. One sensor cannot show what it
  is for, missing bands.
- *Read-out.* Three blocks side by side beat the last on MR by 0.111 ± 0.010 (random weights: by 0.098 ± 0.048), the
  middle alone does not. `probe` reports both, `embed --read-out several` takes them.
- *Stem.* A fixed-channel embedding, the upper bound on one sensor, is not told apart from the generated one, nor with
  three times its learning rate, which the generated one has by its construction: no reason to give up the fold for
  pooling by attention, which was not run. The codes of wavelengths were chosen while looking at random encoders on
  fires.
- *Negative.* On fires no encoder beats random weights, patch statistics or pixels: burned ground is a matter of two
  bands, 12 scenes are few, and three splits of them tell differences of 0.1 at best. The scene that is left out (see
  `ablation_tasks`) was left out after looking at scores. X-rays of 28 pixels are read as well from their pixels.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch
from ablation_floors import floor_convolutions, floor_pixels, floor_statistics
from ablation_stems import replace_parts
from ablation_tasks import (
    HELD_OUT,
    TASKS,
    Task,
    cut,
    encode,
    gather,
    load_task,
    score,
    split,
)
from scipy.stats import t as student

from geomed_mae.config import TrainConfig
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking, plan_masks, valid_tokens
from geomed_mae.models.spec import ModelSpec
from geomed_mae.samples.augment import draw_symmetry
from geomed_mae.samples.crops import counter_rng, draw_starts
from geomed_mae.training.optim import build_optimizers, lr_scale

SHAPE = {"dim": 128, "depth": 6, "heads": 4, "basis": 16, "decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 3}
LAYERS = {"last": (5,), "middle": (2,), "several": (1, 3, 5)}
"""Blocks, from 0, whose outputs each read-out uses."""
SHOWN, SCORES = ("last", "several"), ("probe", "few")
"""Read-outs of the table, and the two probes."""
BASE = "base"
FLOORS: dict[str, Callable[[Task, int], list[np.ndarray]]] = {
    "floor: patch statistics": lambda task, seed: floor_statistics(task),
    "floor: pixels": lambda task, seed: floor_pixels(task),
    "floor: random convolutions": floor_convolutions,
}
LOSS_STEPS = 20
"""Steps at the end whose mean loss is recorded."""
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One thing changed from the base: fields of ModelSpec, Masking and TrainConfig, or a part of the model.

    `tasks` are those it is run on, () for all; `trained` False leaves the random weights; `longer` multiplies steps.
    """

    spec: dict[str, Any] = field(default_factory=dict)
    masking: dict[str, Any] = field(default_factory=dict)
    train: dict[str, Any] = field(default_factory=dict)
    stem: str = "generated"
    heads: str = "generated"
    trained: bool = True
    tasks: tuple[str, ...] = ()
    longer: float = 1.0


def _variants() -> dict[str, Variant]:
    """Return all variants, the most important first."""
    sat, mr = ("fires",), ("hippocampus",)
    plain = {"target": "none", "stats_weight": 0.0}
    return {
        BASE: Variant(),
        "floor: random encoder": Variant(trained=False),
        "target none": Variant(spec={"target": "none"}),
        "target patch": Variant(spec={"target": "patch"}),
        "stats 0": Variant(spec={"stats_weight": 0.0}),
        "stats 3": Variant(spec={"stats_weight": 3.0}),
        "adamw": Variant(train={"optimizer": "adamw"}),
        "floor: random encoder, fixed stem": Variant(trained=False, stem="fixed", tasks=sat),
        "fast 25%": Variant(spec={"mode": "fast"}, masking={"predict_ratio": 0.25}),
        "ratio 0.6": Variant(masking={"ratio": 0.6}),
        "ratio 0.9": Variant(masking={"ratio": 0.9}),
        "fixed stem": Variant(stem="fixed", tasks=sat),
        "channel drop 0.3": Variant(masking={"channel_drop": 0.3}, tasks=sat),
        "fast 50%": Variant(spec={"mode": "fast"}, masking={"predict_ratio": 0.5}),
        "ratio 0.5": Variant(masking={"ratio": 0.5}),
        "ratio 0.5 to 0.9": Variant(masking={"ratio": (0.5, 0.9)}),
        "target none, stats 0": Variant(spec=plain),
        "target patch, stats 0 (published)": Variant(spec={"target": "patch", "stats_weight": 0.0}),
        "fast 50%, ratio 0.6": Variant(spec={"mode": "fast"}, masking={"predict_ratio": 0.5, "ratio": 0.6}),
        "adamw, the same time": Variant(train={"optimizer": "adamw"}, longer=1.85, tasks=mr),
        "adamw, lr 3e-3": Variant(train={"optimizer": "adamw", "lr": 3e-3}, tasks=mr),
        "fixed stem, 3 times its rate": Variant(stem="fixed x 3", tasks=sat),
        "pooled stem": Variant(stem="pooled", tasks=sat),
        "stats 0.5": Variant(spec={"stats_weight": 0.5}),
        "target none, stats 0, ratio 0.6": Variant(spec=plain, masking={"ratio": 0.6}, tasks=mr),
        "stats 3, ratio 0.6": Variant(spec={"stats_weight": 3.0}, masking={"ratio": 0.6}, tasks=mr),
        "fixed stem and heads": Variant(stem="fixed", heads="fixed", tasks=sat),
        "block 2": Variant(masking={"block": 2}),
        "block 4": Variant(masking={"block": 4}, tasks=("fires", "hippocampus")),
    }


VARIANTS = _variants()
NAMES = (*list(VARIANTS)[:2], *FLOORS, *list(VARIANTS)[2:])
"""Of all rows, the most important first."""


def make_model(task: Task, variant: Variant, seed: int) -> MaskedAutoencoder:
    """Return a variant's model with the random weights of a seed."""
    torch.manual_seed(seed)
    patch = {f"patch_{len(task.patch)}d": task.patch}
    mae = MaskedAutoencoder.from_spec(ModelSpec(**{**SHAPE, **patch, **variant.spec}))
    replace_parts(mae, variant.stem, variant.heads, len(task.channels), int(np.prod(task.patch)))
    return mae


def draw_batch(task: Task, numbers: Sequence[int], seed: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pixels and validity (b, c, *crop) of random crops of the samples `numbers`, larger images more often."""
    area = np.cumsum([task.samples[number].valid[0].size for number in numbers], dtype=np.float64)
    pairs = []
    for place in range(task.batch):
        rng = counter_rng(seed, step, place)
        sample = task.samples[numbers[int(np.searchsorted(area, rng.random() * area[-1], "right"))]]
        (start,) = draw_starts(rng, sample.pixels.shape[1:], task.crop, 1)
        symmetry = draw_symmetry(rng, task.flips, task.crop)
        pairs.append([symmetry.view(array) for array in cut(sample, start, task.crop)])
    pixels, valid = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*pairs, strict=True))
    return pixels, valid


def pretrain(task: Task, mae: MaskedAutoencoder, variant: Variant, *, seed: int, steps: int) -> list[float]:
    """Train on the training groups of the seed's split; return the loss of each step."""
    train = TrainConfig(steps=steps, batch_size=task.batch, seed=seed, **variant.train)
    masking, optimizers = Masking(**variant.masking), build_optimizers(mae, train)
    numbers, _ = split(task, seed)
    grid = tuple(size // step for size, step in zip(task.crop, task.patch, strict=True))
    floor = torch.from_numpy(task.floor)
    parameters = list(optimizers.parameters())
    losses = []
    mae.train()
    for step in range(steps):
        pixels, valid = draw_batch(task, numbers, seed, step)
        plan = plan_masks(
            valid_tokens(valid, task.patch), masking, (seed, step), grid=grid, channels=len(task.channels)
        )
        out = mae(pixels, valid, task.channels, None, plan, floor=floor)
        optimizers.set_lr(lr_scale(step, steps, train.warmup))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, train.clip)
        optimizers.step()
        optimizers.zero_grad()
        losses.append(float(out.loss.detach()))
    return losses


def run_variant(task: Task, name: str, seed: int, steps_scale: float) -> dict[str, Any]:
    """Return one line of results: scores per read-out, loss, seconds, and what was run."""
    wall, cpu = time.perf_counter(), time.process_time()
    line: dict[str, Any] = {"task": task.name, "variant": name, "seed": seed, "steps_scale": steps_scale}
    if name in FLOORS:
        rows = gather(task, FLOORS[name](task, seed))
        line |= {"scores": {"last": score(task, rows, seed)}, "features": rows.features.shape[1]}
        return {**line, **_spent(wall, cpu)}
    variant = VARIANTS[name]
    mae = make_model(task, variant, seed)
    steps = max(2, round(task.steps * steps_scale * variant.longer)) if variant.trained else 0
    losses = pretrain(task, mae, variant, seed=seed, steps=steps) if steps else []
    trained = time.process_time() - cpu
    wanted = sorted({layer for layers in LAYERS.values() for layer in layers})
    features = encode(mae.eval().encoder, task, wanted)
    encoded = time.process_time() - cpu - trained
    scores = {}
    for readout, layers in LAYERS.items():
        places = [wanted.index(layer) for layer in layers]
        scores[readout] = score(task, gather(task, [np.concatenate(each[places]) for each in features]), seed)
    line |= {"scores": scores, "steps": steps, "batch": task.batch, "change": asdict(replace(variant, tasks=()))}
    if losses:
        line |= {"loss_first": losses[0], "loss_last": fmean(losses[-LOSS_STEPS:])}
    line |= {"cpu_seconds_training": round(trained, 2), "cpu_seconds_encoding": round(encoded, 2)}
    return {**line, **_spent(wall, cpu), "torch": torch.__version__, "threads": torch.get_num_threads()}


def _spent(wall: float, cpu: float) -> dict[str, float]:
    return {"seconds": round(time.perf_counter() - wall, 2), "cpu_seconds": round(time.process_time() - cpu, 2)}


def read_lines(results: Path) -> list[dict[str, Any]]:
    """Return the lines of a result file, [] where there is none."""
    text = results.read_text(encoding="utf-8") if results.exists() else ""
    return [json.loads(line) for line in text.splitlines() if line]


def append_line(results: Path, line: dict[str, Any]) -> None:
    """Add one line in a single write, so that lines of several processes do not mix."""
    handle = os.open(results, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(line) + "\n").encode())
    finally:
        os.close(handle)


def run(options: argparse.Namespace) -> None:
    """Run what is missing of seeds x variants x tasks, and say what each run gave."""
    torch.set_num_threads(options.threads)
    tasks = {name: load_task(name, options.data) for name in options.tasks}
    for seed in options.seeds:
        for name in (known for known in NAMES if known in options.variants):
            for task in tasks.values():
                own = VARIANTS[name].tasks if name in VARIANTS else ()
                key = (task.name, name, seed, options.steps_scale)
                if (own and task.name not in own) or key in {_key(line) for line in read_lines(options.results)}:
                    continue
                line = run_variant(task, name, seed, options.steps_scale)
                append_line(options.results, line)
                print(
                    f"{task.name:12} seed {seed} {name:36} "
                    + " ".join(f"{kind} {line['scores']['last'][kind]:.3f}" for kind in SCORES)
                    + f"  {line['cpu_seconds']:.0f} s",
                    flush=True,
                )


def _key(line: dict[str, Any]) -> tuple[str, str, int, float]:
    return line["task"], line["variant"], line["seed"], line["steps_scale"]


def interval(values: Sequence[float], held_out: float) -> tuple[float, float]:
    """Return mean and half width of the 95 % interval; the width is NaN for a single value.

    The t-interval for repeated splits of the same groups, `held_out` of them to test: their training parts overlap, so
    that the plain one is too narrow (Nadeau & Bengio 2003, doi 10.1023/A:1024068626366).
    """
    if len(values) < 2:
        return fmean(values), float("nan")
    spread = stdev(values) * (1 / len(values) + held_out / (1 - held_out)) ** 0.5
    return fmean(values), float(student.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * spread


def table(lines: Iterable[dict[str, Any]]) -> str:
    """Return Markdown: per task and variant the scores of two read-outs, differences to the base, and the cost."""
    lines, parts = list(lines), []
    heads = [f"{readout}, {kind}" for readout in SHOWN for kind in SCORES]
    for task in [name for name in TASKS if any(line["task"] == name for line in lines)]:
        own = {(line["variant"], line["seed"]): line for line in lines if line["task"] == task}
        names = [name for name in NAMES if any(variant == name for variant, _ in own)]
        parts += [f"### {task}: {'R2' if task == 'hippocampus' else 'ROC area'}", ""]
        parts += [f"| variant | seeds | {' | '.join(heads)} | CPU |", "|---|---|" + "---|" * (len(heads) + 1)]
        parts += [_row(own, name, HELD_OUT[task]) for name in names] + [""]
    return "\n".join(parts)


SUMMARY = (("hippocampus", "probe"), ("hippocampus", "few"), ("fires", "probe"), ("fires", "few"), ("xray", "few"))
"""Columns of the short table; the full probe of xray is near 1 for every row."""


def summary(lines: Iterable[dict[str, Any]], readout: str) -> str:
    """Return a short table of one read-out: scores of base and floors, and differences of the others to the base."""
    own: dict[str, dict[tuple[str, int], Any]] = {task: {} for task in TASKS}
    for line in lines:
        own[line["task"]][line["variant"], line["seed"]] = line
    rows = [["", *(f"{task} {kind}" for task, kind in SUMMARY)]]
    for name in NAMES:
        cells = [_short(own[task], name, readout, kind, HELD_OUT[task]) for task, kind in SUMMARY]
        rows += [[name, *cells]] if any(cells) else []
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _short(own: dict[tuple[str, int], Any], name: str, readout: str, kind: str, held_out: float) -> str:
    value, base = (
        {
            seed: line["scores"][readout][kind]
            for (key, seed), line in own.items()
            if key == one and readout in line["scores"]
        }
        for one in (name, BASE)
    )
    if not value:
        return ""
    if name == BASE or name.startswith("floor"):
        return f"{fmean(value.values()):.3f}"
    mean, reach = interval([value[seed] - base[seed] for seed in value if seed in base], held_out)
    return f"{mean:+.3f} ± {reach:.3f}{'*' if abs(mean) > reach else ''}"


def _row(own: dict[tuple[str, int], Any], name: str, held_out: float) -> str:
    seeds = sorted(seed for variant, seed in own if variant == name)
    cells = [name, str(len(seeds))]
    for readout, kind in itertools.product(SHOWN, SCORES):
        value, base = (
            {seed: own[key, seed]["scores"][readout][kind] for seed in seeds if readout in _scores(own, key, seed)}
            for key in (name, BASE)
        )
        gaps = [value[seed] - base[seed] for seed in value if seed in base]
        text = f"{fmean(value.values()):.3f}" if value else ""
        cells.append(text if name == BASE or not gaps else f"{text} ({_difference(gaps, held_out)})")
    costs = [own[name, seed].get("cpu_seconds_training", 0) / _cost(own, seed) for seed in seeds if (BASE, seed) in own]
    return f"| {' | '.join(cells)} | {f'{fmean(costs):.2f}' if any(costs) and not name.startswith('floor') else ''} |"


def _scores(own: dict[tuple[str, int], Any], name: str, seed: int) -> dict[str, Any]:
    return own[name, seed]["scores"] if (name, seed) in own else {}


def _cost(own: dict[tuple[str, int], Any], seed: int) -> float:
    return own[BASE, seed].get("cpu_seconds_training", 0) or 1.0


def _difference(gaps: Sequence[float], held_out: float) -> str:
    mean, reach = interval(gaps, held_out)
    if reach != reach:
        return f"{mean:+.3f}"
    return f"{mean:+.3f} ± {reach:.3f}" + ("" if abs(mean) <= reach else " **+**" if mean > 0 else " **-**")


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    runner, printer = commands.add_parser("run"), commands.add_parser("table")
    runner.add_argument("--data", type=Path, required=True, help="folder laid out as data_cards/ describe")
    runner.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    runner.add_argument("--variants", nargs="+", choices=NAMES, default=NAMES, metavar="NAME")
    runner.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runner.add_argument("--threads", type=int, default=1)
    for each in (runner, printer):
        each.add_argument("--results", type=Path, required=True)
        each.add_argument("--steps-scale", type=float, default=1.0, help="share of the steps, for trials")
    options = parser.parse_args(arguments)
    if options.command == "run":
        run(options)
    else:
        lines = [line for line in read_lines(options.results) if line["steps_scale"] == options.steps_scale]
        print(table(lines), *(f"{readout}\n\n{summary(lines, readout)}\n" for readout in SHOWN), sep="\n")


if __name__ == "__main__":
    main()
