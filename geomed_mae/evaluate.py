"""evaluate: score a fine-tuned model on labelled images that it has not seen. Leaked images end in exit 6, not in a
score.

    FILE.json        scores in all, per class, group and image, with intervals over patients or scenes
    FILE_pictures/   confusion, calibration and the worst cases as PNG; they show pixels

A study (finetune --twin, train.seeds) is scored member by member, with the paired difference of its arms.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomed_mae.archives.build import Progress, keep_apart, of_modalities, open_archive
from geomed_mae.archives.index import Index
from geomed_mae.archives.leakage import check_scored, no_scores_over_leaks
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError, IntegrityError, OutputError
from geomed_mae.heads.task_model import TaskModel, load_task_model
from geomed_mae.recipe_file import load_recipe
from geomed_mae.scoring.pictures import draw_pictures, drawn_before
from geomed_mae.scoring.predicting import Target, score_targets
from geomed_mae.scoring.stored import Scores
from geomed_mae.scoring.worst import SHOWN, Worst
from geomed_mae.training.comparison import Member, compare, unit_of
from geomed_mae.training.loop import pick_device
from geomed_mae.training.run import RECIPE, SUMMARY, write_json
from geomed_mae.training.study_files import is_study, members
from geomed_mae.training.task import read_targets

METRES = 1000.0
LISTS = ("per_image", "per_group")
"""What has a line for every image or group."""
OF_TRAINING = ("leakage", "transductive", "seconds")
"""What a comparison takes from the summaries of the runs that is not about the images scored here."""


@dataclass(frozen=True, slots=True, eq=False)
class Asked:
    """What is scored: labelled images of an archive, and how they and the labels met."""

    index: Index
    targets: Sequence[Target]
    counts: dict[str, int]


def evaluate(
    run: str | Path,
    archive_paths: Sequence[str | Path],
    labels_path: str | Path,
    out_json: str | Path,
    *,
    split: str | None = None,
    transductive: bool = False,
    buffer_km: float | None = None,
    pictures: bool = True,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Predict every labelled image whole, compare with its labels, write and return the scores.

    Before anything is predicted the images are compared with what the model has seen: pixels, patients, look-alikes
    and ground, of training and of pretraining (see `archives.leakage`).

    Args:
        run: fine-tuning run, of segmentation or classification, or a study of several.
        archive_paths: raw files and folders, or an INDEX.
        labels_path: label files, or a table or folder of classes; the run's `labels` give them their meaning.
        out_json: file for the scores; pictures go beside it.
        split: score the images of this part of the INDEX's stored split alone.
        transductive: images may have been pretrained on, without their labels; the file then says how many were.
        buffer_km: rasters closer than this to ground that the model has seen are leaks; None takes the run's own.
        pictures: draw confusion, calibration and worst cases; else older ones go, which would be of other scores.
        progress: shows how many images are done.

    Raises:
        LeakageError: an image was seen; there is no file of scores then, not even an older one.
        ConfigError: no finished run, no matching labels, or images that the model is not made for.
        OutputError: a file cannot be written.
    """
    out, path = Path(out_json), Path(run)
    folder = out.with_name(f"{out.stem}_pictures")
    for place in (out, folder):
        keep_apart(place, archive_paths)
    with no_scores_over_leaks(out, *drawn_before(folder)):
        study = is_study(path)
        runs = members(path) if study else [path]
        if not runs:
            raise ConfigError(f"the study '{run}' has no run yet; finish it with finetune --resume")
        model, _, recipe = _open(runs[0])
        asked = _asked(model, recipe, archive_paths, labels_path, split)
        buffer_m = recipe.labels.buffer_m if buffer_km is None else buffer_km * METRES
        records = [_checked(one, asked, buffer_m=buffer_m, transductive=transductive) for one in runs]
    # The first run of a study is from the pretrained encoder: its record is the one that says most.
    shared = {"verb": "evaluate", "labels": asked.counts, "split": split, **records[0]}
    if study:
        result = {**_study(runs, asked, progress, folder if pictures else None), **shared}
    else:
        result = {**shared, **_scored(path, asked, progress, folder if pictures else None)[1]}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"'{out.parent}' cannot be written: {error.strerror or error}") from error
    for path in () if pictures else drawn_before(folder):
        path.unlink(missing_ok=True)
    write_json(out, result)
    return result


def without_lists(result: dict[str, Any]) -> dict[str, Any]:
    """Return scores for a terminal, without what has a line for every image or group: that is in the file."""
    short = {name: value for name, value in result.items() if name not in LISTS}
    if members := result.get("members"):
        short["members"] = {name: without_lists(one) for name, one in members.items()}
    return short


def _open(run: Path) -> tuple[TaskModel, Any, Recipe]:
    """Return a run's model, what it has seen, and its recipe."""
    model, seen = load_task_model(run)
    recipe = load_recipe(run / RECIPE)
    if recipe.head is None:
        raise ConfigError(f"'{run}' holds a recipe without `head`: it is no fine-tuning run")
    return model, seen, recipe


def _checked(run: Path, asked: Asked, *, buffer_m: float, transductive: bool) -> dict[str, Any]:
    """Make sure that a run's model can take the images and has not seen them; return the record of that."""
    model, seen, _ = _open(run)
    rows = [row for row, _ in asked.targets]
    for row in rows:
        model.check(row)
    return check_scored(asked.index, rows, seen, buffer_m=buffer_m, transductive=transductive)


def _asked(
    model: TaskModel, recipe: Recipe, paths: Sequence[str | Path], labels: str | Path, split: str | None
) -> Asked:
    """Read archive and labels; the index keeps images of other parts, which tie patients together for the guard."""
    whole = of_modalities(open_archive(paths, [model.spec.modality]), [model.spec.modality])
    part = whole
    if split is not None:
        part = of_modalities(open_archive(paths, [model.spec.modality], part=split), [model.spec.modality])
    # In the order of training: the same images give the same intervals to the digit, whatever their files are called.
    targets, counts, multi_label = read_targets(part.by_pixels(), Path(labels), recipe)
    head = model.spec.head
    if head.task == "classify" and multi_label != head.multi_label:
        kinds = {True: "several classes an image", False: "one class an image"}
        raise ConfigError(
            f"the labels in '{labels}' give {kinds[multi_label]}, and the model was trained with "
            f"{kinds[head.multi_label]}; give labels of the same form"
        )
    return Asked(whole, targets, counts)


def _scored(run: Path, asked: Asked, progress: Progress | None, folder: Path | None) -> tuple[Scores, dict[str, Any]]:
    """Score one run; return its scores and what is written of them."""
    model, _ = load_task_model(run)
    model.to(pick_device("auto"))
    worst = None if folder is None else Worst(SHOWN[model.spec.head.task])
    scores = score_targets(model, asked.index, asked.targets, worst=worst, progress=progress)
    result = scores.summary()
    if folder is not None and worst is not None:
        drawn = draw_pictures(folder, scores, asked.index, worst)
        result["pictures"] = drawn
    return scores, {**result, "per_group": scores.per_group(), "per_image": scores.per_image()}


def _study(runs: Sequence[Path], asked: Asked, progress: Progress | None, folder: Path | None) -> dict[str, Any]:
    """Score all members of a study; return their comparison, and each one's own scores."""
    found, results = [], {}
    for run in runs:
        arm, name = run.parent.name, f"{run.parent.name}/{run.name}"
        scores, results[name] = _scored(run, asked, progress, None if folder is None else folder / name)
        found.append(Member(arm, int(run.name.removeprefix("seed-")), name, _summary(run), scores))
    compared = compare(found, unit_of(asked.index, [row for row, _ in asked.targets]))
    # What is recorded of the test part of training says nothing about these images.
    compared = {name: value for name, value in compared.items() if name not in OF_TRAINING}
    return {**compared, "members": results}


def _summary(run: Path) -> dict[str, Any]:
    """Return a member's summary of its training: which labels it used goes into the comparison's words."""
    try:
        return json.loads((run / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{SUMMARY} of '{run}' is damaged ({error}); finish it with finetune --resume") from error
