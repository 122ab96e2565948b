"""finetune: an encoder and a few labels become a task model, with scores on images that it has not seen.

    labels -> matched to images by name and geometry -> split by patient or scene -> balanced crops -> encoder + head

A single labelled scene is split into blocks (`labels.block_px`); then the score says how well the rest of this very
scene can be filled in, and no more. Validation happens once, at the end, over whole images.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomed_mae.archives.build import keep_apart, of_modalities, open_archive
from geomed_mae.archives.identity import new_salt
from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.label_values import block_split, label_query, target_of
from geomed_mae.archives.labels import LabelledImage, match_labels
from geomed_mae.archives.splits import split_by_group
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.heads import HeadSpec
from geomed_mae.heads.task_model import FOLDER, TaskModel, TaskSpec, TrainedOn, save_task_model
from geomed_mae.heads.windows import whole_class_map
from geomed_mae.modalities import resolve_modalities
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.foreign.fixed import meet
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from geomed_mae.readers import IGNORE
from geomed_mae.samples.buckets import Bucket
from geomed_mae.samples.filling import statistics_of
from geomed_mae.samples.labelled import LabelledBatch, LabelledSteps
from geomed_mae.samples.loader import load_steps
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.learner import Learner
from geomed_mae.training.loop import fit, pick_device
from geomed_mae.training.metrics import Scores
from geomed_mae.training.run import RunFolder, describe_environment

SCRATCH = "none"
"""Name of the encoder that has random weights."""

Target = tuple[Row, np.ndarray]
"""An image and its class numbers, int16 of the image's spatial shape, IGNORE where unknown or in the other part."""


@dataclass(frozen=True, slots=True)
class Split:
    """Targets to train on and to validate on; `unit` says what was kept apart: group, block or none."""

    train: tuple[Target, ...]
    validation: tuple[Target, ...]
    unit: str


def finetune(
    recipe: Recipe,
    archive_paths: Sequence[str | Path],
    labels_path: str | Path,
    encoder: str | Path,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Train encoder and head from labels into a run folder; return its summary and where things are.

    Args:
        recipe: has a `head`; `model` is needed for encoder "none".
        archive_paths: raw files and folders, or an INDEX.
        labels_path: label files, see `archives.labels`.
        encoder: encoder folder or pretraining run, or "none" for random weights.
        out: run folder.
        resume: go on from the newest checkpoint.
        overwrite: replace the run that is there.

    Raises:
        ConfigError: recipe, labels and images do not go together; the message says how to change that.
        as the archive, the run folder and the loop raise.
    """
    _check_head(recipe)
    if not Ranks.from_environment().alone:
        raise ConfigError("finetune runs in one process; start it without torchrun")
    keep_apart(out, archive_paths)
    index = open_archive(archive_paths, recipe.data.modality, part=recipe.data.split)
    index = of_modalities(index, recipe.data.modality)
    matching = match_labels(index, Path(labels_path), label_query(recipe.labels, recipe.head.classes))
    split = split_targets(matching.labelled, recipe)
    steps = LabelledSteps(index, split.train, recipe.data, seed=recipe.train.seed, batch_size=recipe.train.batch_size)
    torch.manual_seed(recipe.train.seed)
    model = build_task_model(recipe, steps.bucket, [entry.row for entry in steps.examples], str(encoder))
    device = pick_device(recipe.train.device)
    model.to(device)
    archive = {"fingerprint": _fingerprint(index, split, model.contract), "images": len(index), **matching.counts()}
    environment = describe_environment(device, recipe.train.precision)
    with RunFolder(
        Path(out), recipe, environment=environment, archive=archive, resume=resume, overwrite=overwrite
    ) as run:

        def batches(first: int) -> Iterator[LabelledBatch]:
            return load_steps(steps, first, recipe.train.steps, workers=recipe.data.workers)

        def step(batch: LabelledBatch, number: int) -> tuple[Tensor, dict[str, Tensor]]:
            images = batch.images
            return model.head.loss(model(images.raw, images.valid, images.spacing, images.statistics), batch.target)

        learner = Learner(model, recipe.train)
        done = fit(
            learner,
            batches,
            step,
            recipe.train,
            checkpoints=run.checkpoints,
            record=run.record,
            resumed=run.resumed,
        )
        best = learner.best(lambda: copy.deepcopy(model))
        save_task_model(run.path, best, TrainedOn.of(index, [row for row, _ in split.train], new_salt()))
        summary = run.finish(
            {
                "verb": "finetune",
                "steps": done.step,
                "loss_first": done.first_loss,
                "loss_last": done.last_loss,
                "seconds": round(done.seconds, 1),
                "samples_per_second": round(done.samples_per_second, 2),
                "skipped_steps": done.skipped,
                "encoder": "random weights" if str(encoder) == SCRATCH else "pretrained",
                "frozen": recipe.head.frozen,
                "labels": matching.counts(),
                "split": {"unit": split.unit, "train": len(split.train), "validation": len(split.validation)},
                "validation": validate(best, index, split.validation) if split.validation else None,
            }
        )
    return {"run": str(out), "model": str(Path(out) / FOLDER), **summary}


def _check_head(recipe: Recipe) -> None:
    if recipe.head is None:
        raise ConfigError("this recipe pretrains; a fine-tuning recipe has a section `head`")
    if recipe.head.name == "classify":
        raise ConfigError(
            "training on classification labels is not available yet (archives.class_labels.match_classes reads them); "
            "use head.name: segment with label maps"
        )
    if len(recipe.head.classes) < 2 or len(set(recipe.head.classes)) < len(recipe.head.classes):
        raise ConfigError(f"head.classes {list(recipe.head.classes)} must be two different names or more")


def split_targets(labelled: Sequence[LabelledImage], recipe: Recipe) -> Split:
    """Turn stored labels into class numbers and split them by group, or every scene by blocks.

    Raises:
        ConfigError: a label value without a class, or too few groups to split.
    """
    labels, seed = recipe.labels, recipe.train.seed
    targets = [(entry.row, target_of(entry, labels, recipe.head.classes)) for entry in labelled]
    if labels.validation == 0:
        return Split(tuple(targets), (), "none")
    if labels.block_px is not None:
        train, validation = [], []
        for row, target in targets:
            held = block_split(target.shape, labels.block_px, labels.validation, seed)
            train.append((row, np.where(held, np.int16(IGNORE), target)))
            validation.append((row, np.where(held, target, np.int16(IGNORE))))
        return Split(tuple(train), tuple(validation), "block")
    _, held_rows = split_by_group([row for row, _ in targets], labels.validation, seed)
    held_keys = {row.key for row in held_rows}
    return Split(
        tuple(target for target in targets if target[0].key not in held_keys),
        tuple(target for target in targets if target[0].key in held_keys),
        "group",
    )


def build_task_model(recipe: Recipe, bucket: Bucket, rows: Sequence[Row], encoder: str) -> TaskModel:
    """Build the model: a given or a random encoder, its contract extended by what the training images add, and a head.

    Raises:
        ConfigError: encoder "none" without a `model` section, or an encoder that does not fit crop or channels.
    """
    names = tuple(channel.name for channel in bucket.channels)
    modality = next(m for m in resolve_modalities([bucket.modality]))
    statistics = [statistics_of(row, names) for row in rows]
    entries = contract_entries(modality, bucket.channels, statistics)
    if encoder == SCRATCH:
        if recipe.model is None:
            raise ConfigError("--encoder none needs a section `model` in the recipe: it says what to build")
        module = Encoder(ModelSpec.from_config(recipe.model))
        contract = Contract(channels=entries, crop_2d=recipe.data.crop_2d, crop_3d=recipe.data.crop_3d)
    else:
        pretrained = load_encoder(encoder)
        meet(pretrained, [bucket.channels])
        module, contract = pretrained.module, pretrained.contract.extended(entries)
        contract.entries(bucket.modality, bucket.channels)
    if recipe.head.frozen:
        module.requires_grad_(False)
    head = HeadSpec(
        name=recipe.head.name,
        embed_dim=module.spec.dim,
        classes=recipe.head.classes,
        channels=len(names),
        patch=tuple(module.spec.patch(len(bucket.crop))),
        width=recipe.head.width,
    )
    return TaskModel(module, contract, TaskSpec(head=head, modality=bucket.modality, channels=names, crop=bucket.crop))


def validate(model: TaskModel, index: Index, targets: Sequence[Target]) -> dict[str, Any]:
    """Return the scores of whole-image predictions; pixels that are IGNORE in a target are not counted."""
    model.eval()
    scores = Scores(model.classes)
    for row, target in targets:
        scores.add(whole_class_map(model, index, row), target)
    return scores.summary()


def _fingerprint(index: Index, split: Split, contract: Contract) -> str:
    """Return a hash over images, labels, split and contract: a run resumes with the same ones or not at all."""
    digest = hashlib.sha256(f"{index.fingerprint}{contract.to_json()}".encode())
    for _, target in (*split.train, *split.validation):
        digest.update(repr(target.shape).encode() + np.ascontiguousarray(target).tobytes())
    return digest.hexdigest()
