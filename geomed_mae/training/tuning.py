"""One fine-tuning run: a task, an encoder and a recipe become a run folder with a task model and its scores.

Read `tune` from top to bottom. Leaks are looked for before the folder exists; the test part is scored once, at the end,
with the weights that validation chose where there is validation, else with the last ones.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from geomed_mae.archives.description import describe_archive
from geomed_mae.archives.index import Row
from geomed_mae.archives.leakage import check_parts
from geomed_mae.archives.parts import VALIDATION
from geomed_mae.archives.seen import TRAINING, Seen
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.heads.task_model import FOLDER, TaskModel, save_task_model
from geomed_mae.samples.classified import ClassifiedSteps
from geomed_mae.samples.labelled import LabelledBatch, LabelledSteps
from geomed_mae.samples.loader import load_steps
from geomed_mae.scoring.predicting import score_targets
from geomed_mae.scoring.stored import FILE as SCORES
from geomed_mae.scoring.stored import save_scores
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.downstream import Origin, build_task_model, identity_of, open_origin
from geomed_mae.training.draws import Target
from geomed_mae.training.early import EarlyStopping
from geomed_mae.training.learner import Learner
from geomed_mae.training.loop import Progress, fit, pick_device
from geomed_mae.training.observers import ARCHIVE
from geomed_mae.training.run import RunFolder, describe_environment, write_json
from geomed_mae.training.task import Task, few, refuse_missing_classes, refuse_unscorable

STEPS = {"segment": LabelledSteps, "classify": ClassifiedSteps}


def tune(
    recipe: Recipe,
    task: Task,
    encoder: str,
    out: Path,
    *,
    twin_of: str | None = None,
    transductive: bool = False,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train encoder and head into a run folder; return its summary and where things are.

    Args:
        recipe: a fine-tuning recipe; train.seed draws the few labels, the first weights and the crops.
        task: all of it, as `prepare` gives it.
        encoder: folder of an encoder or of its run, or "none" for random weights.
        out: run folder.
        twin_of: encoder that a run from "none" is the twin of; see `downstream`.
        transductive: the encoder may have seen test images, without their labels.
        resume: go on from the newest checkpoint.
        overwrite: replace the run that is there.

    Raises:
        LeakageError: parts share images, patients or places, or the encoder has seen test images; nothing is written.
        ConfigError: recipe, labels and images do not go together; the message says how to change that.
        as the run folder and the loop raise.
    """
    if not Ranks.from_environment().alone:
        raise ConfigError("finetune runs in one process; start it without torchrun")
    origin, task, leakage = ready(recipe, task, encoder, twin_of=twin_of, transductive=transductive)
    recipe, train = origin.recipe, origin.recipe.train
    steps = STEPS[task.kind](task.index, task.train, recipe.data, seed=train.seed, batch_size=train.batch_size)
    model = build_task_model(origin, task, steps.bucket, _rows(task.train))
    for row in _rows((*task.validation, *task.test)):
        model.check(row)  # now, and not after the last step
    device = pick_device(train.device)
    model.to(device)
    fingerprint = hashlib.sha256(f"{task.fingerprint}{model.contract.to_json()}".encode()).hexdigest()
    archive = {
        "fingerprint": fingerprint,
        "encoder": identity_of(encoder),
        "images": len(task.index),
        **task.counts,
    }
    environment = describe_environment(device, train.precision)
    with RunFolder(
        Path(out), recipe, environment=environment, archive=archive, resume=resume, overwrite=overwrite
    ) as run:
        write_json(run.path / ARCHIVE, describe_archive(task.index))
        done, best, validation = _train(recipe, task, model, steps, run)
        seen = Seen.of(task.index, _rows((*task.train, *task.validation)), what=TRAINING)
        save_task_model(run.path, best, seen if origin.random else seen + origin.seen)
        test = _score(run, best, task)
        summary = run.finish(
            {**_summary(done, task, origin), "validation": validation, "test": test, **leakage},
        )
    return {"run": str(out), "model": str(Path(out) / FOLDER), **summary}


def ready(
    recipe: Recipe, task: Task, encoder: str, *, twin_of: str | None = None, transductive: bool = False
) -> tuple[Origin, Task, dict[str, Any]]:
    """Open the encoder, draw the few labels and look for leaks: what can be refused before a run begins.

    Returns:
        what the run starts from, the task with the labels that it uses, and the record of `check_parts`.

    Raises:
        as `tune`.
    """
    origin = open_origin(recipe, encoder, twin_of)
    task = few(task, recipe.labels, recipe.train.seed)
    refuse_missing_classes(task)
    refuse_unscorable(task, VALIDATION)
    leakage = check_parts(
        task.index,
        _rows(task.test),
        _rows(task.train),
        _rows(task.validation),
        seen=origin.seen,
        unit=task.unit,
        buffer_m=recipe.labels.buffer_m,
        transductive=transductive,
    )
    return origin, task, leakage


def _train(
    recipe: Recipe, task: Task, model: TaskModel, steps: LabelledSteps | ClassifiedSteps, run: RunFolder
) -> tuple[Progress, TaskModel, dict[str, Any] | None]:
    """Return what the loop came to, the model worth keeping in evaluation mode, and what validation said."""
    train, learner = recipe.train, Learner(model, recipe.train)
    unfrozen_from = round(recipe.head.frozen_share * train.steps)

    def batches(first: int) -> Iterator[LabelledBatch]:
        return load_steps(steps, first, train.steps, workers=recipe.data.workers)

    def step(batch: LabelledBatch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
        if unfrozen_from and not recipe.head.frozen:
            # By the step's number, not when it is reached: a run that goes on later does the same.
            model.freeze(number < unfrozen_from)
        images = batch.images
        logits = learner.parallel.forward(images.raw, images.valid, images.spacing, images.statistics)
        return model.loss(logits, batch.target)

    def blank() -> TaskModel:
        return copy.deepcopy(model)

    metric = ""

    def score(candidate: TaskModel) -> float | None:
        nonlocal metric
        scores = score_targets(candidate, task.index, task.validation, surfaces=False)
        metric = scores.metric
        return scores.headline()

    early = None
    if task.validation:
        early = EarlyStopping(learner, train, score, blank=blank, record=run.record, resumed=run.resumed)
    done = fit(
        learner,
        batches,
        step,
        train,
        checkpoints=run.checkpoints,
        record=run.record,
        resumed=run.resumed,
        state=None if early is None else early.state,
        judge=None if early is None else early.judge,
    )
    if early is None:
        return done, learner.best(blank), None
    return done, early.finish(), early.summary(metric, ended=done.ended)


def _score(run: RunFolder, model: TaskModel, task: Task) -> dict[str, Any] | None:
    """Score the test part, keep the scores of every image in the run, and return their summary; None without one."""
    if not task.test:
        return None
    scores = score_targets(model, task.index, task.test)
    save_scores(run.path / SCORES, scores)
    return scores.summary()


def _rows(targets: tuple[Target, ...]) -> list[Row]:
    return [row for row, _ in targets]


def _summary(done: Progress, task: Task, origin: Origin) -> dict[str, Any]:
    twin = origin.random and origin.encoder is not None
    return {
        "verb": "finetune",
        "task": task.kind,
        "steps": done.step,
        "loss_first": done.first_loss,
        "loss_last": done.last_loss,
        "seconds": round(done.seconds, 1),
        "samples_per_second": round(done.samples_per_second, 2),
        "skipped_steps": done.skipped,
        "seed": origin.recipe.train.seed,
        "encoder": "random weights" if origin.random else "pretrained",
        "twin": twin,
        **({"dropped": list(origin.dropped)} if origin.dropped else {}),
        "frozen": origin.recipe.head.frozen,
        "labels": dict(task.counts),
        "split": task.split(),
        "few": None if task.drawn is None else dict(task.drawn),
    }
