"""Few labels: pretrained against scratch on real data sets, each by the commands that a user would type.

    python benchmarks/few_labels.py hippocampus --data ../shared/data --out runs/few --labels 4,16,all

For each data set: scan with a stored split by patient or scene, pretrain on the training part alone, fine-tune with
the twin from random weights under several seeds, and one line a setting: both scores on the held-out part, their paired
difference and its interval, the verdict. A setting that is finished is not run again (the run's own --resume).
`burned-area` adds a random forest on the pixels of the same bands and split (`pixel_forest`).
"""

from __future__ import annotations

import argparse
import csv
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A data set and the recipes for it.

    Attributes:
        archive, labels: places below the data folder, or below --out where they start with "made/".
        modality: as `scan --modality` takes it.
        shares: as `scan --split-shares` takes them.
        pretrain, finetune: names of recipes.
        shots: what "few" means: groups, or images a class.
        every: keys that are set at any number of labels; `full`: where all labels are used, on top.
    """

    archive: str
    labels: str
    modality: str
    shares: str
    pretrain: str
    finetune: str
    shots: tuple[int, ...]
    every: tuple[str, ...] = ()
    full: tuple[str, ...] = ()


TASKS = {
    "hippocampus": Task(
        archive="med/hippocampus/images",
        labels="med/hippocampus/labels",
        modality="mr",
        shares="train=75,test=25",
        pretrain="pretrain_mr_hippocampus_tiny",
        finetune="finetune_mr_hippocampus",
        shots=(4, 16),
    ),
    "burned-area": Task(
        archive="sat/wildfire_s2/images",
        labels="sat/wildfire_s2/masks",
        modality="sentinel2-l2a",
        shares="train=60,test=40",
        pretrain="pretrain_sentinel2_l2a_burned_area_tiny",
        finetune="finetune_sentinel2_l2a_burned_area",
        shots=(4,),
    ),
    "pneumonia": Task(
        archive="made/xray",
        labels="made/xray.csv",
        modality="xray",
        shares="train=75,test=25",
        pretrain="pretrain_xray_thumbnails_tiny",
        finetune="finetune_xray_pneumonia",
        shots=(32,),
        full=("train.steps=300",),
    ),
}


def write_pictures(source: Path, folder: Path, table: Path) -> None:
    """Write the images of an npz archive as PNG files and their classes as a CSV table, as a user would have them."""
    folder.mkdir(parents=True, exist_ok=True)
    with np.load(source, allow_pickle=False) as arrays:
        images, labels = arrays["images"], arrays["labels"].ravel()
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "class"])
        for number, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(folder / f"xray_{number:05d}.png")
            writer.writerow([f"xray_{number:05d}.png", ("normal", "pneumonia")[int(label)]])


def command(*words: object) -> dict[str, Any] | str:
    """Run `geomed-mae WORDS...` and return what it prints: JSON, or a path."""
    line = [str(word) for word in words]
    print(f"$ geomed-mae {shlex.join(line)}", file=sys.stderr, flush=True)
    done = subprocess.run([sys.executable, "-m", "geomed_mae", *line], stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.returncode)
    try:
        return json.loads(done.stdout)
    except ValueError:
        return done.stdout.strip()


def place(name: str, data: Path, out: Path) -> Path:
    """Return the place of a task's archive or labels."""
    return out / name if name.startswith("made/") else data / name


def settings_of(keys: Sequence[str]) -> list[str]:
    """Return --set options."""
    return [word for key in keys for word in ("--set", key)]


def run_task(name: str, task: Task, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Do everything for one data set; return a row a setting."""
    out = arguments.out / name
    archive, labels = (
        place(task.archive, arguments.data, arguments.out),
        place(task.labels, arguments.data, arguments.out),
    )
    if task.archive.startswith("made/") and not labels.is_file():
        write_pictures(arguments.data / "med/pneumoniamnist/train.npz", archive, labels)
    index = out / "index"
    split = ("--split", "group", "--split-shares", task.shares, "--split-seed", arguments.split_seed)
    command("scan", archive, "--out", index, "--modality", task.modality, "--no-pictures", *split)
    encoder = out / "pretrain"
    if not (encoder / "summary.json").is_file():
        resume = ("--resume",) if (encoder / "recipe.resolved.yaml").is_file() else ()
        command("pretrain", task.pretrain, "--archive", index, "--set", "data.split=train", "--out", encoder, *resume)
    rows = []
    for labelled in arguments.labels or (*task.shots, None):
        run = out / f"finetune-{labelled or 'all'}"
        shots = () if labelled is None else ("--shots", labelled)
        keys = settings_of((*task.every, *(task.full if labelled is None else ()), *arguments.set))
        resume = ("--resume",) if run.exists() else ()
        begun = time.monotonic()
        summary = command(
            "finetune", task.finetune, "--archive", index, "--labels", labels, "--encoder", encoder, "--out", run,
            "--twin", "--seeds", arguments.seeds, *shots, *keys, *resume,
        )  # fmt: skip
        rows.append(
            {"task": name, "labels": labelled or "all", "seconds": time.monotonic() - begun, "summary": summary}
        )
    return rows


def forest_row(name: str, task: Task, labelled: int | None, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the scores of the random forest on the split, the labels and the seeds that the runs had."""
    from pixel_forest import forest_scores  # scikit-learn and the readers are wanted by this row alone

    from geomed_mae.recipe_file import load_recipe

    overrides = [] if labelled is None else [f"labels.shots={labelled}"]
    recipe = load_recipe(task.finetune, overrides)
    labels = place(task.labels, arguments.data, arguments.out)
    scores = forest_scores(recipe, arguments.out / name / "index", labels, seeds=arguments.seeds)
    return {"task": name, "labels": labelled or "all", "forest": scores}


def shown(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    if "forest" in row:
        return f"{row['task']:12} {row['labels']!s:>4} random forest on pixels: {json.dumps(row['forest'])}"
    summary = row["summary"]
    arms = summary["arms"]
    both = "  ".join(
        f"{arm} {arms[arm]['mean']:.3f} [{arms[arm]['low']:.3f}, {arms[arm]['high']:.3f}]" for arm in sorted(arms)
    )
    return f"{row['task']:12} {row['labels']!s:>4} {both}  {row['seconds'] / 60:.1f} min  {summary['verdict']}"


def main() -> None:
    """Read the arguments, run, print the table and write results.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="+", choices=sorted(TASKS))
    parser.add_argument("--data", type=Path, required=True, help="folder laid out as data_cards/ describe")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--split-seed", type=int, default=0)
    parser.add_argument("--labels", type=_counts, help="such as 4,16,all; default: those of the task")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="for finetune")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.tasks:
        rows += run_task(name, TASKS[name], arguments)
        if name == "burned-area":
            for labelled in arguments.labels or (*TASKS[name].shots, None):
                rows.append(forest_row(name, TASKS[name], labelled, arguments))
        (arguments.out / "results.json").write_text(json.dumps(rows, indent=1, default=_plain) + "\n", encoding="utf-8")
    print("\n".join(shown(row) for row in rows))


def _counts(text: str) -> tuple[int | None, ...]:
    return tuple(None if part == "all" else int(part) for part in text.split(","))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else str(value)


if __name__ == "__main__":
    main()
