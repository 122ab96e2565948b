"""Scores of class maps: Dice, IoU, surface distance, accuracy and calibration, per class, image and group.

Each image leaves a confusion matrix, surface distances and calibration histograms: memory does not grow with pixels,
and the score over all pixels, the mean over images and its interval over groups come from the same numbers. A class
that occurs in neither prediction nor truth of an image has no score there (None): not 0, and not 1. A class that is
missing from one of the two has Dice 0 and no surface distance, which no number could stand for: it is counted.

The first class is the background: means over the foreground are over the classes after it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.scoring.calibration import calibration_error, curve
from geomed_mae.scoring.confusion import accuracy, balanced_accuracy, dice, iou, precision, recall
from geomed_mae.scoring.image_score import Band, ImageScore, score_bands
from geomed_mae.scoring.intervals import SCORE, Bounds, bootstrap_mean
from geomed_mae.scoring.surfaces import available
from geomed_mae.scoring.values import mean_known, rounded

NOT_INSTALLED = "not measured: MONAI is not installed (pip install 'geomed-mae[train]')"
DISTANCE: Bounds = (0.0, None)


class SegmentationScores:
    """Scores of class maps, added image by image."""

    task = "segment"
    metric = "mean foreground Dice over images"

    def __init__(self, classes: Sequence[str], *, surfaces: bool = True) -> None:
        """Start without images.

        Args:
            classes: names in the order of their numbers.
            surfaces: measure surface distances, by MONAI; where it is not installed the summary says so.
        """
        self.classes = tuple(classes)
        self.surfaces = surfaces and available()
        self._asked = surfaces
        self._images: list[ImageScore] = []
        self._table: tuple[np.ndarray, np.ndarray] | None = None

    def __len__(self) -> int:
        return len(self._images)

    @property
    def images(self) -> tuple[ImageScore, ...]:
        """What was added."""
        return tuple(self._images)

    @property
    def keys(self) -> tuple[str, ...]:
        """Key of each image, in the order of adding."""
        return tuple(image.key for image in self._images)

    @property
    def groups(self) -> tuple[str, ...]:
        """Group of each image, in the order of adding."""
        return tuple(image.group for image in self._images)

    def add(self, row: Row, truth: np.ndarray, bands: Iterable[Band]) -> None:
        """Add one image; see `image_score.score_bands`, and `whole_map` for a prediction that is in memory.

        Raises:
            ValueError: the bands together do not have the shape of `truth`.
        """
        self._images.append(score_bands(row, truth, bands, len(self.classes), surfaces=self.surfaces))
        self._table = None

    def headline(self, indices: np.ndarray | None = None) -> float | None:
        """Return the mean over images of the mean Dice of the foreground classes.

        Args:
            indices: images to take, repeats allowed; None takes each once.

        Returns:
            None where no image has, or is said to have, any foreground.
        """
        values = self._dice_table()[1]
        return _mean(values if indices is None else values[indices])

    def value(self, number: int) -> float | None:
        """Return the mean foreground Dice of image `number`, None where it has no foreground, true or predicted."""
        return _foreground_dice(self._images[number].counts)

    def class_score(self, number: int, indices: np.ndarray | None = None) -> float | None:
        """Return the mean over images of the Dice of class `number`; `indices` as for `headline`."""
        values = self._dice_table()[0][:, number]
        return _mean(values if indices is None else values[indices])

    def _dice_table(self) -> tuple[np.ndarray, np.ndarray]:
        """Return Dice (images, classes) and its mean over the foreground (images,), NaN where undefined; made once, for
        bootstraps ask thousands of times.
        """
        if self._table is None:
            values = [[np.nan if one is None else one for one in dice(image.counts)] for image in self._images]
            self._table = np.array(values).reshape(-1, len(self.classes)), self._per_image(_foreground_dice)
        return self._table

    def _per_image(self, score: Callable[[np.ndarray], float | None]) -> np.ndarray:
        """Return a score of each image's confusion matrix, NaN where it is None."""
        values = [score(image.counts) for image in self._images]
        return np.array([np.nan if value is None else value for value in values], dtype=np.float64)

    def _interval(self, values: np.ndarray, seed: int, bounds: Bounds = SCORE) -> dict[str, Any]:
        """Return mean over images, interval over groups and counts of per-image values, NaN where undefined."""
        known = [None if np.isnan(value) else float(value) for value in values]
        return bootstrap_mean(known, self.groups, seed, bounds=bounds).to_json()

    @property
    def total(self) -> np.ndarray:
        """Confusion matrix over the pixels of all images, int64 (classes, classes), row = truth."""
        result = np.zeros((len(self.classes),) * 2, dtype=np.int64)
        for image in self._images:
            result += image.counts
        return result

    @property
    def calibration(self) -> np.ndarray | None:
        """Histograms over all images, float64 (1 + classes, 3, BINS), or None without probabilities."""
        known = [image.calibration for image in self._images if image.calibration is not None]
        return np.sum(known, axis=0) if known else None

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """Return plain values: headline, scores over all pixels, means over images with intervals over groups, counts.

        Args:
            seed: of the bootstrap draws.
        """
        total, bins = self.total, self.calibration
        result: dict[str, Any] = {
            "task": self.task,
            "metric": self.metric,
            "value": rounded(self.headline()),
            "interval": self._interval(self._per_image(_foreground_dice), seed),
            "images": len(self),
            "groups": len(set(self.groups)),
            "pixels": int(total.sum()),
            "pixels_unpredicted": sum(image.unpredicted for image in self._images),
            "accuracy": rounded(accuracy(total)),
            "balanced_accuracy": rounded(balanced_accuracy(total)),
            "mean_dice": rounded(mean_known(dice(total))),
            "mean_iou": rounded(mean_known(iou(total))),
            "mean_foreground_iou": rounded(mean_known(iou(total)[1:])),
            "classes": {name: self._class(number, total, bins, seed) for number, name in enumerate(self.classes)},
            "confusion": total.tolist(),
        }
        if bins is not None:
            result["calibration"] = {"expected_error": rounded(calibration_error(bins[0])), "curve": curve(bins[0])}
        if self._asked and not self.surfaces:
            result["surface_distance"] = NOT_INSTALLED
        return result

    def _class(self, number: int, total: np.ndarray, bins: np.ndarray | None, seed: int) -> dict[str, Any]:
        """Return the scores of one class."""
        result = {
            "value": rounded(self.class_score(number)),
            "dice": rounded(dice(total)[number]),
            "iou": rounded(iou(total)[number]),
            "recall": rounded(recall(total)[number]),
            "precision": rounded(precision(total)[number]),
            "pixels_true": int(total[number].sum()),
            "pixels_predicted": int(total[:, number].sum()),
            "images": sum(1 for image in self._images if image.counts[number].sum() > 0),
            "dice_over_images": self._interval(self._per_image(lambda counts: dice(counts)[number]), seed),
            "iou_over_images": self._interval(self._per_image(lambda counts: iou(counts)[number]), seed),
        }
        if bins is not None:
            result["calibration_error"] = rounded(calibration_error(bins[1 + number]))
        if number and any(image.unit for image in self._images):
            result["surface_distance"] = self._surface(number, seed)
        return result

    def _surface(self, number: int, seed: int) -> dict[str, Any]:
        """Return the surface distances of one class, in the unit of most images, and where there are none and why."""
        unit = Counter(image.unit for image in self._images if image.unit).most_common(1)[0][0]
        same = np.array([image.unit == unit for image in self._images])
        values = np.stack([image.distances[number] for image in self._images])
        values[~same] = np.nan
        true, found = (np.array([image.counts.sum(axis=axis)[number] > 0 for image in self._images]) for axis in (1, 0))
        return {
            "unit": unit,
            "hd95": self._interval(values[:, 0], seed, DISTANCE),
            "assd": self._interval(values[:, 1], seed, DISTANCE),
            "images_missed": int((true & ~found).sum()),
            "images_invented": int((found & ~true).sum()),
            "images_without": int((~found & ~true).sum()),
            "images_not_measured": int((~same).sum()),
        }

    def per_image(self) -> list[dict[str, Any]]:
        """Return plain values of each image: key, group, Dice and IoU per class, surface distances, accuracy."""
        return [
            {"key": image.key, "group": image.group, **self._values(image.counts), **self._surfaces_of(image)}
            for image in self._images
        ]

    def per_group(self) -> list[dict[str, Any]]:
        """Return plain values of each group (patient, scene): the headline over its images, the others over pixels."""
        members: dict[str, list[int]] = {}
        for number, group in enumerate(self.groups):
            members.setdefault(group, []).append(number)
        result = []
        for group, numbers in members.items():
            values = self._values(np.sum([self._images[number].counts for number in numbers], axis=0))
            value = rounded(self.headline(np.array(numbers)))
            result.append({"group": group, "images": len(numbers), **values, "value": value})
        return result

    def _values(self, counts: np.ndarray) -> dict[str, Any]:
        return {
            "value": rounded(_foreground_dice(counts)),
            "pixels": int(counts.sum()),
            "accuracy": rounded(accuracy(counts)),
            "dice": self._named(dice(counts)),
            "iou": self._named(iou(counts)),
        }

    def _surfaces_of(self, image: ImageScore) -> dict[str, Any]:
        if not image.unit:
            return {}
        hd95, assd = (self._named(column, first=1) for column in image.distances.T)
        return {"unit": image.unit, "hd95": hd95, "assd": assd}

    def _named(self, values: Iterable[float | None], first: int = 0) -> dict[str, float | None]:
        return {name: rounded(value) for name, value in list(zip(self.classes, values, strict=True))[first:]}

    def to_json(self) -> dict[str, Any]:
        """Return all that was added as plain values."""
        return {
            "task": self.task,
            "classes": list(self.classes),
            "surfaces": self._asked,
            "images": [image.to_json() for image in self._images],
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> SegmentationScores:
        """Inverse of `to_json`."""
        scores = cls(data["classes"], surfaces=bool(data["surfaces"]))
        scores._images = [ImageScore.from_json(image) for image in data["images"]]
        return scores


def _foreground_dice(counts: np.ndarray) -> float | None:
    return mean_known(dice(counts)[1:])


def _mean(values: np.ndarray) -> float | None:
    known = values[~np.isnan(values)]
    return float(known.mean()) if known.size else None
