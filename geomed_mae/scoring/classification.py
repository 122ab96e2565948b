"""Scores of images' classes: AUROC, average precision, accuracies, Brier score and calibration, per class and group.

Every image's probabilities are kept, for ranking scores need them all. Decisions are the likeliest class, or with
several labels an image each class whose probability is a half or more; ranking scores do not depend on that. What is
not known of an image (multi-label, UNKNOWN) counts nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.archives.index import Row
from geomed_mae.scoring.calibration import calibration_error, curve
from geomed_mae.scoring.confusion import two_by_two
from geomed_mae.scoring.decisions import Decisions
from geomed_mae.scoring.intervals import bootstrap
from geomed_mae.scoring.ranking import Ranking
from geomed_mae.scoring.values import DIGITS, mean_known, rounded

MOST = {"brier": 2.0}
"""Largest value of the scores that are no shares."""


class ClassificationScores:
    """Scores of images' classes, added image by image."""

    task = "classify"

    def __init__(self, classes: Sequence[str], *, multi_label: bool = False) -> None:
        """Start without images.

        Args:
            classes: names in the order of their numbers.
            multi_label: whether an image may have several of them, or none.
        """
        self.classes = tuple(classes)
        self.multi_label = multi_label
        self._keys: list[str] = []
        self._groups: list[str] = []
        self._chances: list[np.ndarray] = []
        self._truth: list[np.ndarray] = []
        self._ranked: list[Ranking] | None = None

    @property
    def metric(self) -> str:
        """Name of the headline."""
        return f"{'average precision' if self.multi_label else 'AUROC'}, mean over classes"

    def __len__(self) -> int:
        return len(self._keys)

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of each image, in the order of adding."""
        return tuple(self._keys)

    @property
    def groups(self) -> tuple[str, ...]:
        """Group of each image, in the order of adding."""
        return tuple(self._groups)

    @property
    def chances(self) -> np.ndarray:
        """Probabilities, float64 (images, classes)."""
        return np.array(self._chances, dtype=np.float64).reshape(-1, len(self.classes))

    @property
    def truth(self) -> np.ndarray:
        """What is so, int8 (images, classes): 1, 0 or UNKNOWN; single labels have one 1 a row."""
        return np.array(self._truth, dtype=np.int8).reshape(-1, len(self.classes))

    def add(self, row: Row, chances: np.ndarray, target: int | np.ndarray) -> None:
        """Add one image of an index; see `add_image`."""
        self.add_image(row.key, row.group, chances, target)

    def add_image(self, key: str, group: str, chances: np.ndarray, target: int | np.ndarray) -> None:
        """Add one image.

        Args:
            key: opaque key of the image.
            group: keyed hash of its patient or scene.
            chances: probabilities (classes,); they add up to 1 unless labels are multi-label.
            target: class number; with multi-label (classes,) 1, 0 or UNKNOWN.

        Raises:
            ValueError: the shapes do not fit the classes, a number is no class, or a probability is no number.
        """
        size = len(self.classes)
        chances, target = np.asarray(chances, dtype=np.float64), np.asarray(target)
        if chances.shape != (size,) or not np.isfinite(chances).all():
            raise ValueError(f"an image of {size} classes has that many finite probabilities, not {chances.tolist()}")
        if self.multi_label and target.shape == (size,):
            truth = target
        elif not self.multi_label and target.ndim == 0 and 0 <= target < size:
            truth = np.arange(size) == target
        else:
            raise ValueError(f"{target.tolist()} is no target of {size} classes (multi-label: {self.multi_label})")
        self._keys.append(key)
        self._groups.append(group)
        # Models answer in float32, which a file holds to the last bit: scores that were stored and read again are the
        # same. Fewer digits would make ties of what a sure model tells apart, and AUROC counts a tie as half.
        self._chances.append(chances.astype(np.float32).astype(np.float64))
        self._truth.append(truth.astype(np.int8))
        self._ranked = None

    def headline(self, indices: np.ndarray | None = None) -> float | None:
        """Return the mean over classes of AUROC, or with multi-label of average precision.

        Args:
            indices: images to take, repeats allowed; None takes each once.

        Returns:
            None where no class has a score: AUROC needs images with and without it.
        """
        counts = self._counts(indices)
        first = 0 if self.multi_label else self._first
        return mean_known([self._score(number, counts) for number in range(first, len(self.classes))])

    @property
    def _first(self) -> int:
        """First class whose AUROC and average precision count: of two that exclude one another the second is the one
        that is looked for, as scikit-learn has it (the AUROC of the first is the same).
        """
        return int(len(self.classes) == 2 and not self.multi_label)

    def class_score(self, number: int, indices: np.ndarray | None = None) -> float | None:
        """Return the same score of class `number` alone."""
        return self._score(number, self._counts(indices))

    def entry(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Return (what is so, probabilities) of image `number`, each (classes,)."""
        return self._truth[number], self._chances[number]

    def value(self, number: int) -> float | None:
        """Return the mean probability that image `number` was given for what is so: 1 for its class, or 1 - p for a
        class that it does not have, over known classes. None where nothing is known.
        """
        chances, truth = self._chances[number], self._truth[number]
        if not self.multi_label:
            return float(chances[truth == 1][0])
        right = np.where(truth == 1, chances, 1 - chances)[truth != UNKNOWN]
        return float(right.mean()) if right.size else None

    def _score(self, number: int, counts: np.ndarray | None) -> float | None:
        ranking = self._rankings[number]
        return ranking.average_precision(counts) if self.multi_label else ranking.auroc(counts)

    def _counts(self, indices: np.ndarray | None) -> np.ndarray | None:
        return None if indices is None else np.bincount(indices, minlength=len(self))

    @property
    def _rankings(self) -> list[Ranking]:
        if self._ranked is None:
            self._ranked = [Ranking(*pair) for pair in zip(self.chances.T, self.truth.T, strict=True)]
        return self._ranked

    @property
    def decisions(self) -> Decisions:
        """What the probabilities say once a decision is asked of them."""
        return Decisions(self.chances, self.truth, multi_label=self.multi_label)

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """Return plain values: headline and other scores with intervals over groups, per class and in all.

        Args:
            seed: of the bootstrap draws.
        """
        of = self.decisions
        bins = of.bins(None)
        named: dict[str, Callable[[np.ndarray | None], float | None]] = {
            "auroc": lambda counts: mean_known([ranking.auroc(counts) for ranking in self._rankings[self._first :]]),
            "average_precision": lambda counts: mean_known(
                [ranking.average_precision(counts) for ranking in self._rankings[self._first :]]
            ),
            "accuracy": of.accuracy,
            "balanced_accuracy": of.balanced_accuracy,
            "brier": of.brier,
        }
        intervals = {name: self._interval(score, seed, MOST.get(name, 1.0)) for name, score in named.items()}
        result: dict[str, Any] = {
            "task": self.task,
            "metric": self.metric,
            "multi_label": self.multi_label,
            "value": rounded(self.headline()),
            "interval": intervals[self._kind],
            "images": len(self),
            "groups": len(set(self._groups)),
        }
        for name, score in named.items():
            result[name] = rounded(score(None))
        # Without an interval: binning noise grows in resamples, which makes the error larger in each of them.
        result["calibration_error"] = rounded(calibration_error(bins))
        result["intervals"] = intervals
        result["classes"] = {name: self._class(number, of, seed) for number, name in enumerate(self.classes)}
        result["calibration"] = {"expected_error": result["calibration_error"], "curve": curve(bins)}
        if not self.multi_label:
            result["confusion"] = of.confusion(None).tolist()
        return result

    @property
    def _kind(self) -> str:
        return "average_precision" if self.multi_label else "auroc"

    def _interval(
        self, score: Callable[[np.ndarray | None], float | None], seed: int, most: float = 1.0
    ) -> dict[str, Any]:
        return bootstrap(lambda indices: score(self._counts(indices)), self._groups, seed, bounds=(0.0, most)).to_json()

    def _class(self, number: int, of: Decisions, seed: int) -> dict[str, Any]:
        ranking, truth = self._rankings[number], self.truth[:, number]
        return {
            "value": rounded(self.class_score(number)),
            "interval": self._interval(lambda counts: self._score(number, counts), seed),
            "auroc": rounded(ranking.auroc()),
            "average_precision": rounded(ranking.average_precision()),
            **two_by_two(of.two_by_two(number, None)),
            "images_true": int((truth == 1).sum()),
            "images_false": int((truth == 0).sum()),
            "images_unknown": int((truth == UNKNOWN).sum()),
        }

    def per_image(self) -> list[dict[str, Any]]:
        """Return plain values of each image: key, group, probabilities, and what is so (None where not known)."""
        said = {UNKNOWN: None}
        return [
            {
                "key": key,
                "group": group,
                "chances": dict(zip(self.classes, np.round(chances, DIGITS).tolist(), strict=True)),
                "truth": {name: said.get(int(one), int(one)) for name, one in zip(self.classes, truth, strict=True)},
            }
            for key, group, chances, truth in zip(self._keys, self._groups, self._chances, self._truth, strict=True)
        ]

    def per_group(self) -> list[dict[str, Any]]:
        """Return plain values of each group: its images, how many decisions of its known ones are right, and Brier."""
        of = self.decisions
        places = {group: number for number, group in enumerate(dict.fromkeys(self._groups))}
        member = np.array([places[group] for group in self._groups], dtype=np.int64)
        return [
            {
                "group": group,
                "images": int((member == place).sum()),
                "accuracy": rounded(of.accuracy(member == place)),
                "brier": rounded(of.brier(member == place)),
            }
            for group, place in places.items()
        ]

    def to_json(self) -> dict[str, Any]:
        """Return all that was added as plain values."""
        rows = zip(self._keys, self._groups, self._chances, self._truth, strict=True)
        return {
            "task": self.task,
            "classes": list(self.classes),
            "multi_label": self.multi_label,
            "images": [
                {"key": key, "group": group, "chances": chances.tolist(), "truth": truth.tolist()}
                for key, group, chances, truth in rows
            ],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> ClassificationScores:
        """Inverse of `to_json`."""
        scores = cls(data["classes"], multi_label=bool(data["multi_label"]))
        for image in data["images"]:
            truth = np.array(image["truth"], dtype=np.int8)
            scores.add_image(
                str(image["key"]),
                str(image["group"]),
                np.array(image["chances"], dtype=np.float64),
                truth if scores.multi_label else int(truth.argmax()),
            )
        return scores
