"""The probe of classes: from one vector an image, which class, or classes, does the image have?"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError
from geomed_mae.scoring.classification import ClassificationScores
from geomed_mae.scoring.intervals import bootstrap
from geomed_mae.scoring.values import rounded
from geomed_mae.training.draws import Target, first_images
from geomed_mae.training.knn import nearest
from geomed_mae.training.logistic import linear
from geomed_mae.training.probe_features import Sources
from geomed_mae.training.probe_parts import Parts


@dataclass(frozen=True, slots=True, eq=False)
class ImageTable:
    """Images that have a vector of every source.

    Attributes:
        features: by source, float32 (n, f).
        rows: of the index.
        targets: int (n,) class numbers, or (n, classes) 1, 0 and UNKNOWN.
        held: bool (n,), images that are scored.
        classes: names of the classes that are trained on.
        counts: images and classes that are left out, by why.
    """

    features: dict[str, np.ndarray]
    rows: tuple[Row, ...]
    targets: np.ndarray
    held: np.ndarray
    classes: tuple[str, ...]
    counts: dict[str, Any]

    @property
    def multi_label(self) -> bool:
        """Whether an image may have several classes."""
        return self.targets.ndim == 2

    def train(self) -> list[Target]:
        """Return the images that are learned from."""
        return [(self.rows[place], self.targets[place]) for place in np.flatnonzero(~self.held)]

    def scores(self, chances: np.ndarray) -> ClassificationScores:
        """Score the chances (held images, classes)."""
        scores = ClassificationScores(self.classes, multi_label=self.multi_label)
        for place, found in zip(np.flatnonzero(self.held), chances, strict=True):
            scores.add(self.rows[place], found, self.targets[place])
        return scores

    def linear(self, name: str, chosen: np.ndarray | None = None) -> tuple[ClassificationScores, dict[str, Any], float]:
        """Fit a linear probe on the training side, or on `chosen` (n,) of it; return scores, settings, its own loss."""
        train = ~self.held if chosen is None else chosen
        groups = [self.rows[place].group for place in np.flatnonzero(train)]
        features = self.features[name]
        found = linear(features[train], self.targets[train], groups, features[self.held], len(self.classes))
        return self.scores(found.chances), {"C": list(found.strengths)}, np.inf if found.loss is None else found.loss

    def nearest(self, name: str) -> ClassificationScores:
        """Ask the neighbours on the training side."""
        features, targets = self.features[name], self.targets[~self.held]
        known = targets != UNKNOWN if self.multi_label else None
        values = targets if self.multi_label else np.eye(len(self.classes))[targets]
        return self.scores(nearest(features[~self.held], values, known, features[self.held]))

    def described(self, scores: ClassificationScores) -> dict[str, Any]:
        """Return the scores of neighbours in short; the linear probe's have everything."""
        of = scores.decisions
        found = {"accuracy": of.accuracy(None), "balanced_accuracy": of.balanced_accuracy(None)}
        return {
            "metric": scores.metric,
            "value": rounded(scores.headline()),
            "interval": bootstrap(scores.headline, scores.groups, bounds=(0.0, 1.0)).to_json(),
            **{name: rounded(value) for name, value in found.items()},
        }

    def few(self, name: str, count: int, seed: int) -> ClassificationScores:
        """Score a linear probe that has learned from `count` images of each class, drawn as fine-tuning draws them.

        Raises:
            ConfigError: there are not so many.
        """
        drawn = first_images(self.train(), len(self.classes), count, seed, multi_label=self.multi_label)
        keys = {row.key for row, _ in drawn}
        return self.linear(name, np.array([row.key in keys for row in self.rows]))[0]


def collect(
    index: Index,
    targets: Iterable[Target],
    parts: Parts,
    classes: Sequence[str],
    sources: Sources,
) -> ImageTable:
    """Read images one after another and keep one vector a source of each.

    Raises:
        ConfigError: nothing is left to learn from or to score.
    """
    found: dict[str, list[np.ndarray]] = {}
    rows, known, held, empty = [], [], [], 0
    for row, target in targets:
        vectors = sources.whole(index.read(row.key))
        if vectors is None:
            empty += 1
            continue
        for name, vector in vectors.items():
            found.setdefault(name, []).append(vector)
        rows.append(row)
        known.append(target)
        held.append(bool(parts.held[row.key].all()))
    if not rows:
        raise ConfigError(f"none of the {empty} labelled images has a patch with enough valid area")
    joined = {name: np.stack(found.pop(name)) for name in list(found)}
    table = ImageTable(sources.with_last(joined), tuple(rows), np.stack(known), np.array(held), tuple(classes), {})
    return _of_trained_classes(table, empty)


def _of_trained_classes(table: ImageTable, empty: int) -> ImageTable:
    """Leave out classes that the training side cannot teach, and test images that have no other: they would score as
    chance, whatever the features.
    """
    train = table.targets[~table.held]
    numbers = range(len(table.classes))
    if table.multi_label:
        taught = [bool((train[:, number] == 1).any() and (train[:, number] == 0).any()) for number in numbers]
    else:
        taught = [bool((train == number).any()) for number in numbers]
    if sum(taught) < (1 if table.multi_label else 2):
        raise ConfigError(
            f"the {len(train)} labelled images to learn from have {sum(taught)} class of {', '.join(table.classes)}; "
            "a probe needs two (labels.test, labels.split_seed, or more labels)"
        )
    kept = np.flatnonzero(taught)
    if table.multi_label:
        targets, inside = table.targets[:, kept], np.ones(len(table.rows), dtype=bool)
    else:
        inside = np.isin(table.targets, kept)
        targets = np.searchsorted(kept, table.targets)
    inside |= ~table.held
    names = [name for name, there in zip(table.classes, taught, strict=True) if not there]
    counts = {
        "classes_without_training_images": names,
        "test_images_of_such_classes": int((~inside).sum()),
        "images_with_too_little_valid_area": empty,
    }
    found = replace(
        table,
        features=table.features if inside.all() else {name: part[inside] for name, part in table.features.items()},
        rows=tuple(row for row, there in zip(table.rows, inside, strict=True) if there),
        targets=targets[inside].astype(np.int64),
        held=table.held[inside],
        classes=tuple(table.classes[number] for number in kept),
        counts={name: value for name, value in counts.items() if value},
    )
    if not found.held.any() or found.held.all():
        raise ConfigError(
            f"{int((~found.held).sum())} images are left to learn from and {int(found.held.sum())} to score; label more"
        )
    return found
