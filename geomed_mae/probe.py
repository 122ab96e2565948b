"""probe: what frozen features say about labels, beside the floors that any encoder must beat.

Two questions, by the labels. Label maps: from a token alone, which share of its patch belongs to each class? A ridge
regression in closed form answers (`training.probing`), and so do the nearest neighbours. Classes of images (a CSV
table, or a folder of classes): a logistic regression on the image's vector answers (`training.logistic`), and so do
the nearest neighbours. What has to be chosen is chosen on the training side. Scores are on held-out patients or scenes,
with intervals over them.

Features are read out of the last block, and of several blocks side by side, which tell more (benchmarks/ablations.py).
Floors stand beside the encoder and are read out in the same ways (`training.probe_features`): statistics of the pixels,
random convolutional features, and the same network with random weights. An encoder that is not above them has learned
nothing for these labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.build import Progress, keep_apart, of_modalities, open_archive
from geomed_mae.archives.class_labels import UNKNOWN, ClassQuery, match_classes
from geomed_mae.archives.index import Index
from geomed_mae.archives.labels import match_labels
from geomed_mae.archives.leakage import check_parts, no_scores_over_leaks
from geomed_mae.archives.parts import stored_parts
from geomed_mae.config import HeadConfig, LabelConfig, Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.models.contract import channel_names
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.readers import IGNORE, LabelQuery
from geomed_mae.scoring.intervals import Scored
from geomed_mae.training import dense_probe, image_probe
from geomed_mae.training.comparison import unit_of
from geomed_mae.training.draws import Target
from geomed_mae.training.loop import pick_device
from geomed_mae.training.probe_features import FLOOR, Sources, same_channels
from geomed_mae.training.probe_parts import Parts, part
from geomed_mae.training.probe_verdict import Standing, compare, curve, numbers
from geomed_mae.training.probe_windows import TABLES
from geomed_mae.training.probing import label_values
from geomed_mae.training.run import write_json


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """Labels that have met their images.

    Attributes:
        targets: images with stored label values, or class numbers, or 1, 0 and UNKNOWN a class.
        dense: whether they are label maps.
        classes: stored values, or names.
        multi_label: whether an image may have several classes.
        described: counts and names, for the file of scores.
    """

    targets: tuple[Target, ...]
    dense: bool
    classes: tuple[Any, ...]
    multi_label: bool
    described: dict[str, Any]


def probe(
    encoder: str | Path,
    archive_paths: Sequence[str | Path],
    labels_path: str | Path,
    out_json: str | Path,
    *,
    recipe: Recipe | None = None,
    channels: str | Sequence[str] | None = None,
    split: str | None = None,
    shots: str | Sequence[int] | None = None,
    transductive: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Read labels out of frozen features and out of the floors; write and return their scores.

    An INDEX with a stored split is split as stored; else groups are held out as fine-tuning does, and a single image
    with a label map by blocks. Leaks are refused before anything is scored, and an older file of scores then goes.

    Args:
        encoder: encoder folder or pretraining run.
        archive_paths: raw files and folders, or an INDEX.
        labels_path: label maps, see `archives.labels`, every value in them being a class; or classes of images, see
            `archives.class_labels`: a table, or a folder of classes in which the images lie.
        out_json: file for the scores.
        recipe: its section `labels` says how labels are read and split, its head.classes how classes are called.
        channels: names of the channels to use, with commas or one by one; None takes all, which must then be complete.
        split: part of the stored split of each INDEX that alone is used; groups are then held out within it.
        shots: also score a linear probe of so few labels: groups of label maps, images of each class (8,16,32).
        transductive: the encoder may have been pretrained on test images, without their labels; it is recorded.
        progress: shows how many images are done.

    Raises:
        ConfigError: no encoder, no labels that match, fewer than two classes, or images that cannot be compared.
        LeakageError: test images belong with training images, or were pretrained on.
    """
    recipe = recipe or Recipe()
    channels, shots = channel_names(channels), numbers(shots)
    model = load_encoder(encoder)
    known = sorted({entry.modality for entry in model.contract.channels})
    keep_apart(out_json, archive_paths)
    out = Path(out_json)
    with no_scores_over_leaks(out):
        index = of_modalities(open_archive(archive_paths, known, part=split), known).by_pixels()
        labels = _read(index, Path(labels_path), recipe)
        stored = stored_parts(archive_paths, index) if split is None else None
        parts = part(labels.targets, recipe.labels, stored, multi_label=labels.multi_label, dense=labels.dense)
        train, test = ([row for row, _ in side] for side in (parts.train(), parts.test()))
        guard = {"unit": parts.unit, "buffer_m": recipe.labels.buffer_m, "transductive": transductive}
        checked = check_parts(index, test, train, seen=model.seen, **guard)
        rows = [row for row, _ in parts.targets]
        same_channels(rows, channels)
        for row in rows:
            model.contract.usable(row.modality, row.channels, channels)
        model.module.to(pick_device("auto"))
        sources = Sources(model, index, train, channels or None)
        shown = progress or (lambda items, what, total: items)
        found = (_dense if labels.dense else _images)(
            index, labels, parts, sources, (shown, shots, unit_of(index, rows))
        )
    result = {
        "verb": "probe",
        "task": "segment" if labels.dense else "classify",
        **labels.described,
        "held_out": parts.unit,
        "split": parts.described(),
        **({"channels": list(channels)} if channels else {}),
        **checked,
        **found,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    return result


# ------------------------------------------------------------------------------------------------------- labels


def _read(index: Index, path: Path, recipe: Recipe) -> Labels:
    """Match labels to images: a table is of classes; a folder of label maps, or of classes that hold the images."""
    if path.suffix.lower() in TABLES:
        return _classes(index, path, recipe)
    if not path.is_dir():
        return _maps(index, path, recipe.labels)
    try:
        return _maps(index, path, recipe.labels)
    except ConfigError as no_maps:
        try:
            return _classes(index, path, recipe)
        except ConfigError:
            raise no_maps from None


def _maps(index: Index, path: Path, config: LabelConfig) -> Labels:
    query = LabelQuery(column=config.column, ignore=config.ignore, resample=config.resample)
    matching = match_labels(index, path, query)
    values = label_values(matching.labelled)
    targets = tuple((one.row, one.stored) for one in matching.labelled if (one.stored != IGNORE).any())
    names = {"label_names": [matching.names[value] for value in values]} if matching.names else {}
    described = {"labels": matching.counts(), "label_values": values, **names}
    return Labels(targets, True, tuple(values), False, described)


def _classes(index: Index, path: Path, recipe: Recipe) -> Labels:
    config, named = recipe.labels, recipe.head.classes if recipe.head is not None else ()
    query = ClassQuery(
        classes=named,
        values=config.values,
        key_column=config.key_column,
        class_columns=config.class_columns,
        ignore=config.ignore,
    )
    matching = match_classes(index, path, query)
    missing = UNKNOWN if matching.multi_label else IGNORE
    pairs = zip(matching.labelled, matching.targets, strict=True)
    targets = tuple((row, target) for row, target in pairs if (target != missing).any())
    described = {"labels": matching.counts(), "classes": list(matching.classes), "multi_label": matching.multi_label}
    return Labels(targets, False, matching.classes, matching.multi_label, described)


def probe_recipe(overrides: Sequence[str]) -> Recipe:
    """Return what `--set` says about labels as a recipe.

    Raises:
        ConfigError: a key that a probe has no use for, or a value that is none.
    """
    from geomed_mae.recipe_file import recipe_of

    for one in overrides:
        key = one.partition("=")[0].strip()
        if not key.startswith("labels.") and key != "head.classes":
            raise ConfigError(
                f"--set {key}: a probe reads keys of labels, and head.classes; there is nothing else to set"
            )
    recipe = recipe_of(overrides)
    if any(getattr(recipe.labels, name) for name in ("validation", "fraction", "shots")):
        raise ConfigError("a probe has no validation part and takes few labels with --shots 8,16,32; leave them out")
    return (
        recipe
        if recipe.head is None or recipe.head.classes != HeadConfig().classes
        else recipe.model_copy(update={"head": None})
    )


# ------------------------------------------------------------------------------------------------------- scores

Asked = tuple[Progress, Sequence[int], str]
"""Progress, numbers of few labels, and what a group is called."""


def _dense(index: Index, labels: Labels, parts: Parts, sources: Sources, asked: Asked) -> dict[str, Any]:
    shown, shots, unit = asked
    patch = sources.model.spec.patch(len(parts.targets[0][0].shape))
    chosen = dense_probe.choose(parts, labels.classes, patch)
    table = dense_probe.collect(index, shown(chosen, "probe", len(chosen)), sources)
    results = {name: dense_probe.read_out(table, name, labels.classes) for name in table.features}
    train = parts.train()

    def few(name: str, count: int, seed: int) -> Scored:
        return dense_probe.few(table, name, labels.classes, dense_probe.few_groups(train, count, seed))

    standing = {name: Standing(one.scores, one.loss) for name, one in results.items()}
    scores = {name: one.values for name, one in results.items()}
    return {"scores": scores, **_answer(standing, unit, shots, few, unit)}


def _images(index: Index, labels: Labels, parts: Parts, sources: Sources, asked: Asked) -> dict[str, Any]:
    shown, shots, unit = asked
    targets = shown(parts.targets, "probe", len(parts.targets))
    table = image_probe.collect(index, targets, parts, labels.classes, sources)
    standing, scores = {}, {}
    for name, features in table.features.items():
        found, settings, loss = table.linear(name)
        standing[name] = Standing(found, loss)
        linear = {
            **found.summary(),
            **settings,
            "loss_in_cross_validation": round(loss, 6) if np.isfinite(loss) else None,
        }
        scores[name] = {"features": features.shape[1], "linear": linear, "knn": table.described(table.nearest(name))}
    answer = _answer(standing, unit, shots, table.few, "images of each class")
    return {"images_train": int((~table.held).sum()), **table.counts, "scores": scores, **answer}


def _answer(
    standing: Mapping[str, Standing],
    unit: str,
    shots: Sequence[int],
    few: Callable[[str, int, int], Scored],
    per: str,
) -> dict[str, Any]:
    found = compare(standing, unit)
    if shots:
        names = [found["encoder_read_out"], *(name for name in standing if name.startswith(FLOOR))]
        found["few_labels"] = curve(shots, names, few, per)
    return found
