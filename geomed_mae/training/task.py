"""The task of a fine-tuning run: labelled images, read once, and which of them are trained on, looked at and scored.

    train        what is learned from; `few` keeps a part of it
    validation   what early stopping looks at
    test         what is scored, once, at the end

Parts are whole groups (patients, scenes), drawn by shares, or as stored with an INDEX, or the blocks of single scenes.
They depend on labels.split_seed and not on train.seed: runs that differ in their seed alone are scored on the same
images.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.build import Progress, of_modalities, open_archive
from geomed_mae.archives.class_labels import UNKNOWN, ClassQuery, match_classes
from geomed_mae.archives.index import Index
from geomed_mae.archives.label_values import block_split, label_query, target_of
from geomed_mae.archives.labels import match_labels
from geomed_mae.archives.parts import TEST, TRAIN, VALIDATION, stored_parts
from geomed_mae.config import HeadConfig, LabelConfig, Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE
from geomed_mae.training.draws import Target, by_group, first_groups, first_images, held_groups


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """Labelled images of an archive in their parts; images in the order of their pixels, whenever they were scanned.

    Attributes:
        index: the archive.
        kind: "segment" or "classify".
        classes: names in the order of their numbers.
        multi_label: whether an image may have several classes.
        train, validation, test: see the module; of unit "block" the same images, IGNORE where the other part is.
        unit: what was kept apart: "group", "stored", "block", or "none" where nothing is scored.
        counts: how images and labels met, and what was left out.
        drawn: what `few` has drawn; None where all labels are used.
    """

    index: Index
    kind: str
    classes: tuple[str, ...]
    multi_label: bool
    train: tuple[Target, ...]
    validation: tuple[Target, ...]
    test: tuple[Target, ...]
    unit: str
    counts: Mapping[str, int]
    drawn: Mapping[str, Any] | None = None

    @property
    def fingerprint(self) -> str:
        """SHA-256 over images, labels and parts: the same whenever and wherever the archive is scanned."""
        digest = hashlib.sha256(f"{self.index.fingerprint} {self.kind} {self.classes} {self.multi_label}".encode())
        for part in (self.train, self.validation, self.test):
            digest.update(f" part of {len(part)}".encode())
            for row, target in part:
                digest.update(f"{self.index.pixel_digest(row.key)} {target.shape}".encode())
                digest.update(np.ascontiguousarray(target).tobytes())
        return digest.hexdigest()

    def split(self) -> dict[str, Any]:
        """Return the unit, and numbers of images and groups by part, for summaries."""
        parts = {TRAIN: self.train, VALIDATION: self.validation, TEST: self.test}
        return {
            "unit": self.unit,
            **{name: len(part) for name, part in parts.items()},
            "groups": {name: len({row.group for row, _ in part}) for name, part in parts.items()},
        }

    def class_counts(self) -> list[int]:
        """Return how often each class occurs among the training labels: pixels, or images."""
        if self.multi_label:
            return [int(sum(target[number] == 1 for _, target in self.train)) for number in range(len(self.classes))]
        counts = np.zeros(len(self.classes), dtype=np.int64)
        for _, target in self.train:
            known = target[target != IGNORE]
            counts += np.bincount(known.ravel(), minlength=len(self.classes))
        return counts.tolist()


def prepare(
    recipe: Recipe, archive_paths: Sequence[str | Path], labels_path: str | Path, *, progress: Progress | None = None
) -> Task:
    """Read archive and labels, and part the labelled images; `few` labels are not drawn yet.

    Raises:
        ConfigError: recipe, labels and images do not go together; the message says how to change that.
        as `open_archive`, `match_labels` and `match_classes`.
    """
    head = _checked(recipe)
    data, options = recipe.data, {} if progress is None else {"progress": progress}
    index = open_archive(archive_paths, data.modality, part=data.split, **options)
    index = of_modalities(index, data.modality).by_pixels()
    stored = stored_parts(archive_paths, index) if data.split is None else None
    targets, counts, multi_label = read_targets(index, labels_path, recipe)
    parts, unit = _parts(targets, recipe, stored, multi_label)
    unused = {
        "labelled_images_in_no_part": parts.pop("", 0),
        "validation_images_not_used": parts.pop("unused", 0),
    }
    return Task(
        index=index,
        kind=head.task,
        classes=head.classes,
        multi_label=multi_label,
        unit=unit,
        counts={**counts, **{name: count for name, count in unused.items() if count}},
        **parts,
    )


def read_targets(index: Index, labels_path: str | Path, recipe: Recipe) -> tuple[list[Target], dict[str, int], bool]:
    """Read what is known of an archive's images: label maps, or the classes of images, by head.task.

    Returns:
        (targets in the order of the index, how images and labels met, whether an image may have several classes).
        Images of which nothing is known are left out and counted.

    Raises:
        ConfigError: nothing is known of any image, or labels and recipe do not go together.
        as `match_labels` and `match_classes`.
    """
    read = _label_maps if recipe.head.task == "segment" else _image_classes
    targets, counts, multi_label = read(index, Path(labels_path), recipe)
    nothing = UNKNOWN if multi_label else IGNORE
    known = [(row, target) for row, target in targets if (target != nothing).any()]
    if not known:
        raise ConfigError(
            f"none of the {len(targets)} labelled images has a label that is known; look at labels.values, "
            "labels.ignore and the label files"
        )
    left_out = {"labelled_images_without_known_class": len(targets) - len(known)} if len(known) < len(targets) else {}
    return known, {**counts, **left_out}, multi_label


def few(task: Task, labels: LabelConfig, seed: int) -> Task:
    """Return the task with as few training labels as labels.shots or labels.fraction say; else the task itself.

    The validation share, where there is one, comes out of the few. Draws are nested: see `draws`.

    Raises:
        ConfigError: there are not so many, or they are too few to be parted.
    """
    if labels.shots is None and labels.fraction is None:
        return task
    groups = by_group(task.train, multi_label=task.multi_label)
    if task.kind == "classify" and labels.shots is not None:
        _refuse_too_many_shots(task, labels.shots)
        kept = first_images(task.train, len(task.classes), labels.shots, seed, multi_label=task.multi_label)
    else:
        chosen = first_groups(groups, _group_count(labels, len(groups)), seed)
        kept = [target for target in task.train if target[0].group in chosen]
    train, validation = tuple(kept), ()
    if labels.validation > 0:
        train, validation = _without_share(kept, labels.validation, seed, task.multi_label)
    drawn = {
        **({"shots": labels.shots} if labels.shots is not None else {"fraction": labels.fraction}),
        "seed": seed,
        "images": len(kept),
        "groups": len({row.group for row, _ in kept}),
        "of_images": len(task.train),
        "of_groups": len(groups),
    }
    return replace(task, train=train, validation=validation, drawn=drawn)


def refuse_missing_classes(task: Task) -> None:
    """Refuse to train without an example of every class.

    Raises:
        ConfigError: naming the classes, and the way out.
    """
    missing = [name for name, count in zip(task.classes, task.class_counts(), strict=True) if not count]
    if not missing:
        return
    more = "draw more of them (labels.shots, labels.fraction), " if task.drawn is not None else ""
    raise ConfigError(
        f"no label of the {len(task.train)} training images is of class {', '.join(repr(name) for name in missing)}; "
        f"{more}look at labels.values, change labels.split_seed, or take the class out of head.classes"
    )


def refuse_unscorable(task: Task, part: str) -> None:
    """Refuse a part over which the headline score is undefined, whatever is predicted; an empty one passes.

    Raises:
        ConfigError: naming what the part lacks, and the way out.
    """
    targets = [target for _, target in (task.validation if part == VALIDATION else task.test)]
    if task.kind == "segment":
        fine, lacks = any((target > 0).any() for target in targets), f"any class but '{task.classes[0]}'"
    elif task.multi_label:
        fine, lacks = any((target == 1).any() for target in targets), "an image in which a class is present"
    else:
        fine, lacks = len({int(target) for target in targets}) > 1, "a second class, which AUROC needs"
    if targets and not fine:
        more = ", draw more labels (labels.shots, labels.fraction)" if task.drawn and part == VALIDATION else ""
        raise ConfigError(
            f"the {part} part of {len(targets)} images cannot be scored: it lacks {lacks}; hold out more "
            f"(labels.{part}){more}, label more, or set another labels.split_seed"
        )


# -------------------------------------------------------------------------------------------------- reading


def _checked(recipe: Recipe) -> HeadConfig:
    head, labels = recipe.head, recipe.labels
    if head is None:
        raise ConfigError("this recipe pretrains; a fine-tuning recipe has a section `head`")
    if len(head.classes) < 2 or len(set(head.classes)) < len(head.classes):
        raise ConfigError(f"head.classes {list(head.classes)} must be two different names or more")
    validating = recipe.train.validate_every is not None
    if labels.validation > 0 and not validating:
        raise ConfigError(
            f"labels.validation={labels.validation:g} holds images out for early stopping, but train.validate_every is "
            "not set; set it, or leave labels.validation out (the share that is scored is labels.test)"
        )
    return head


def _label_maps(index: Index, labels: Path, recipe: Recipe) -> tuple[list[Target], dict[str, int], bool]:
    matching = match_labels(index, labels, label_query(recipe.labels, recipe.head.classes))
    targets = [(entry.row, target_of(entry, recipe.labels, recipe.head.classes)) for entry in matching.labelled]
    return targets, matching.counts(), False


def _image_classes(index: Index, labels: Path, recipe: Recipe) -> tuple[list[Target], dict[str, int], bool]:
    config = recipe.labels
    if config.block_px is not None:
        raise ConfigError("labels.block_px splits label maps; classes of images are split by patient or scene")
    query = ClassQuery(
        classes=recipe.head.classes,
        values=config.values,
        key_column=config.key_column,
        class_columns=config.class_columns,
        ignore=config.ignore,
    )
    matching = match_classes(index, labels, query)
    return list(zip(matching.labelled, matching.targets, strict=True)), matching.counts(), matching.multi_label


# --------------------------------------------------------------------------------------------------- parting


def _parts(
    targets: Sequence[Target], recipe: Recipe, stored: Mapping[str, str] | None, multi_label: bool
) -> tuple[dict[str, Any], str]:
    """Return the targets by part, and the unit; "" and "unused" count images that are in none."""
    labels = recipe.labels
    if stored is not None:
        parts, unit = _as_stored(targets, labels, stored), "stored"
    elif labels.test == 0:
        parts, unit = {TRAIN: tuple(targets), VALIDATION: (), TEST: ()}, "none"
    elif labels.block_px is not None:
        parts, unit = _by_block(targets, labels), "block"
    else:
        _refuse_one_group(targets, recipe.head.task)
        train, test = _without_share(targets, labels.test, labels.split_seed, multi_label)
        parts, unit = {TRAIN: train, VALIDATION: (), TEST: test}, "group"
    if recipe.train.validate_every is None:
        parts["unused"], parts[VALIDATION] = len(parts[VALIDATION]), ()
    else:
        _hold_out_for_validation(parts, labels, unit, multi_label)
    return parts, unit


def _as_stored(targets: Sequence[Target], labels: LabelConfig, stored: Mapping[str, str]) -> dict[str, Any]:
    if labels.block_px is not None:
        raise ConfigError(
            "the INDEX has a stored split, so that labels.block_px has nothing to split; set labels.block_px=null, or "
            "data.split=train to split that part alone"
        )
    parts: dict[str, Any] = {
        name: tuple(target for target in targets if stored.get(target[0].key) == name)
        for name in (TRAIN, VALIDATION, TEST)
    }
    for name in (TRAIN, TEST):
        if not parts[name]:
            found = Counter(stored.get(row.key, "no part") for row, _ in targets)
            raise ConfigError(
                f"no labelled image is in the part '{name}' of the stored split ({dict(found)}); add labels of such "
                "images, scan with another --split-seed, or set data.split=train to split that part by labels.test"
            )
    parts[""] = sum(row.key not in stored for row, _ in targets)
    return parts


def _by_block(targets: Sequence[Target], labels: LabelConfig) -> dict[str, Any]:
    if labels.validation > 0:
        raise ConfigError(
            "labels.block_px parts scenes into blocks to train on and blocks to score; early stopping needs whole "
            "scenes: set labels.validation=0 and leave train.validate_every out"
        )
    if labels.test > 0.5:
        raise ConfigError(
            f"labels.test={labels.test:g} with labels.block_px: blocks are parted like the fields of a checkerboard, "
            "of which labels.test=0.5 at most can be scored"
        )
    train, test = [], []
    for row, target in targets:
        held = block_split(target.shape, labels.block_px, labels.test, labels.split_seed)
        for side, hidden in ((train, held), (test, ~held)):
            known = np.where(hidden, np.int16(IGNORE), target)
            if (known != IGNORE).any():
                side.append((row, known))
    if not train or not test:
        largest = " x ".join(map(str, max(target.shape for _, target in targets)))
        raise ConfigError(
            f"blocks of labels.block_px={labels.block_px} leave nothing to {'score' if train else 'train on'}: all "
            f"that is labelled, in images of up to {largest} pixels, is in one part; use smaller blocks or another "
            "labels.split_seed"
        )
    return {TRAIN: tuple(train), VALIDATION: (), TEST: tuple(test)}


def _hold_out_for_validation(parts: dict[str, Any], labels: LabelConfig, unit: str, multi_label: bool) -> None:
    """Settle what early stopping looks at, in place: a share of the training part, or the part that is stored."""
    drawn_later = labels.shots is not None or labels.fraction is not None
    if labels.validation > 0 or drawn_later:
        parts["unused"], parts[VALIDATION] = len(parts[VALIDATION]), ()
    if labels.validation == 0 and not parts[VALIDATION]:
        kind = " out of the few (labels.shots, labels.fraction)" if drawn_later else ""
        raise ConfigError(
            f"train.validate_every scores a validation part, and there is none; set labels.validation, for example to "
            f"0.2: the share of the training groups that is held out for it{kind}"
        )
    if labels.validation > 0 and not drawn_later:
        parts[TRAIN], parts[VALIDATION] = _without_share(
            parts[TRAIN], labels.validation, labels.split_seed, multi_label
        )


def _without_share(
    targets: Sequence[Target], share: float, seed: int, multi_label: bool
) -> tuple[tuple[Target, ...], tuple[Target, ...]]:
    """Return (the rest, about `share` of the groups)."""
    groups = by_group(targets, multi_label=multi_label)
    if len(groups) < 2:
        raise ConfigError(
            f"the {len(targets)} training images are of {len(groups)} patient or scene: nothing can be held out for "
            "validation (labels.validation); label more, or train without train.validate_every and labels.validation"
        )
    held = held_groups(groups, share, seed)
    rest = tuple(target for target in targets if target[0].group not in held)
    return rest, tuple(target for target in targets if target[0].group in held)


def _refuse_one_group(targets: Sequence[Target], kind: str) -> None:
    groups = {row.group for row, _ in targets}
    if len(groups) < 2:
        blocks = "set labels.block_px to split one raster scene by blocks, " if kind == "segment" else ""
        raise ConfigError(
            f"{len(targets)} labelled images of {len(groups)} patient or scene cannot be split; add images of others, "
            f"{blocks}or set labels.test=0 to train without a score"
        )


def _group_count(labels: LabelConfig, available: int) -> int:
    if labels.shots is not None:
        if labels.shots > available:
            raise ConfigError(
                f"labels.shots={labels.shots} is more than the {available} labelled groups (patients, scenes) of the "
                f"training part; ask for {available} at most"
            )
        return labels.shots
    count = round(labels.fraction * available)
    if count == 0 or (available == 1 and labels.fraction < 1):
        raise ConfigError(
            f"labels.fraction={labels.fraction:g} of {available} labelled groups (patients, scenes) in the training "
            f"part is less than one; use labels.shots, or a fraction of {1 / available:.2g} or more"
        )
    return count


def _refuse_too_many_shots(task: Task, shots: int) -> None:
    """Refuse more shots than a class has images; of a multi-label class as many as there are will do."""
    counts = task.class_counts()
    most = max(counts) if task.multi_label else min(counts)
    if shots > most:
        name = task.classes[counts.index(most)]
        raise ConfigError(
            f"labels.shots={shots} is more than the {most} training images of class '{name}'; ask for fewer, or label "
            "more"
        )
