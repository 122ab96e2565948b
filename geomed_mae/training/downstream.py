"""From an encoder, or from none, to a model of a task: what a fine-tuning run starts with.

The twin of a run starts from random weights and is the same in all else: shape, contract (and with it the scaling of
pixels) and the head's first weights, which are drawn under a seed of their own for that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from geomed_mae.archives.index import Row
from geomed_mae.archives.seen import PRETRAINING, Seen
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.heads import HeadSpec, default_head
from geomed_mae.heads.losses import balanced_weights
from geomed_mae.heads.task_model import TaskModel, TaskSpec
from geomed_mae.modalities import resolve_modalities
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.encoder_folder import encoder_home, load_encoder
from geomed_mae.models.foreign.fixed import meet
from geomed_mae.models.manifest import MANIFEST
from geomed_mae.models.pretrained import PretrainedEncoder, read_out
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from geomed_mae.samples.buckets import Bucket
from geomed_mae.samples.filling import statistics_of
from geomed_mae.training.task import Task

SCRATCH = "none"
"""Name of the encoder that has random weights."""
HEAD_SEED = 1 << 40
"""Added to a run's seed for the head's first weights."""


@dataclass(frozen=True, slots=True, eq=False)
class Origin:
    """What a run starts from.

    Attributes:
        encoder: the given one; of a twin the one whose shape and contract it shares; None for random weights.
        random: whether the weights are drawn, and not the encoder's.
        recipe: as it is used, without what protects weights that a twin does not have.
        dropped: keys of the recipe that this concerns.
    """

    encoder: PretrainedEncoder | None
    random: bool
    recipe: Recipe
    dropped: tuple[str, ...] = ()

    @property
    def seen(self) -> Seen:
        """What the encoder has seen; of a twin too, for both are scored on the same images."""
        if self.encoder is None:
            return Seen.nothing()
        return Seen.unknown(PRETRAINING) if self.encoder.seen is None else self.encoder.seen


def open_origin(recipe: Recipe, encoder: str, twin_of: str | None) -> Origin:
    """Open what a run starts from.

    Args:
        recipe: `model` is needed where there is neither an encoder nor a twin.
        encoder: folder of an encoder or of its run, or SCRATCH.
        twin_of: folder of the encoder that a run from SCRATCH is the twin of.

    Raises:
        ConfigError: no encoder, or encoder "none" without a `model` section.
        IntegrityError: the encoder is damaged.
    """
    if encoder != SCRATCH:
        return Origin(load_encoder(encoder), False, recipe)
    if twin_of is None:
        if recipe.model is None:
            raise ConfigError("--encoder none needs a section `model` in the recipe: it says what to build")
        return Origin(None, True, recipe)
    changes = {"train.layer_decay": recipe.train.layer_decay != 1, "head.frozen_share": recipe.head.frozen_share > 0}
    dropped = tuple(name for name, changed in changes.items() if changed)
    return Origin(load_encoder(twin_of), True, as_twin(recipe), dropped)


def identity_of(encoder: str) -> str:
    """Return a hash of the encoder's weights, so that another encoder at the same place is not taken for it."""
    if encoder == SCRATCH:
        return SCRATCH
    folder = encoder_home(encoder)
    files = [folder / MANIFEST] if (folder / MANIFEST).is_file() else sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def as_twin(recipe: Recipe) -> Recipe:
    """Return the recipe of a run's twin: without what only protects pretrained weights from the first gradients.

    A small learning rate below, and a head that learns alone at first, would only hold random weights back. With
    head.frozen they stay: then the twin is the floor of random features.
    """
    train = recipe.train.model_copy(update={"layer_decay": 1.0})
    return recipe.model_copy(update={"train": train, "head": recipe.head.model_copy(update={"frozen_share": 0.0})})


def build_task_model(origin: Origin, task: Task, bucket: Bucket, rows: Sequence[Row]) -> TaskModel:
    """Build the model: an encoder, its contract extended by what the training images add, and a head.

    Args:
        origin: what to start from.
        task: the few labels that are trained on decide class_weights: balanced.
        bucket: modality, channels and crop of the training images.
        rows: the training images.

    Raises:
        ConfigError: an encoder, a head or class weights that do not fit crop, channels or task.
    """
    recipe, names = origin.recipe, tuple(channel.name for channel in bucket.channels)
    modality = next(m for m in resolve_modalities([bucket.modality]))
    entries = contract_entries(modality, bucket.channels, [statistics_of(row, names) for row in rows])
    torch.manual_seed(recipe.train.seed)
    if origin.encoder is None:
        module = Encoder(ModelSpec.from_config(recipe.model))
        contract = Contract(channels=entries, crop_2d=recipe.data.crop_2d, crop_3d=recipe.data.crop_3d)
    else:
        meet(origin.encoder, [bucket.channels])
        module = Encoder(origin.encoder.spec) if origin.random else origin.encoder.module
        contract = origin.encoder.contract.extended(entries)
        contract.entries(bucket.modality, bucket.channels)
    torch.manual_seed(HEAD_SEED + recipe.train.seed)
    head = _head_spec(recipe, task, module.spec, bucket)
    model = TaskModel(module, contract, TaskSpec(head=head, modality=bucket.modality, channels=names, crop=bucket.crop))
    if recipe.head.frozen:
        model.freeze(True)
    return model


def _head_spec(recipe: Recipe, task: Task, spec: ModelSpec, bucket: Bucket) -> HeadSpec:
    head = recipe.head
    plain = HeadSpec(
        name=head.name or default_head(head.task),
        task=head.task,
        embed_dim=spec.dim,
        maps=len(read_out(head.read_out, spec.depth)),
        classes=head.classes,
        channels=len(bucket.channels),
        patch=tuple(spec.patch(len(bucket.crop))),
        width=head.width,
        multi_label=task.multi_label,
        loss=head.loss,
        focal_gamma=head.focal_gamma,
        class_weights=None if head.class_weights == "balanced" else head.class_weights,
        label_smoothing=head.label_smoothing,
        codes=None if head.codes is None else {name: {**code} for name, code in head.codes.items()},
    )
    if head.class_weights != "balanced":
        return plain
    weights = balanced_weights((target for _, target in task.train), len(task.classes), multi_label=task.multi_label)
    return replace(plain, class_weights=weights)
