"""The per-pixel random forest of `few_labels.py`: what the bands of a pixel say without its neighbours.

Breiman 2001 (doi 10.1023/A:1010933404324), scikit-learn's, over the physical values of the bands. A model of images has
to beat it, or context is worth nothing. Its leaves hold MIN_LEAF pixels or more: with single-pixel leaves it scores
lower on other scenes, and the comparison would flatter the model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.config import Recipe
from geomed_mae.heads.windows import INVALID
from geomed_mae.readers import IGNORE
from geomed_mae.scoring.image_score import whole_map
from geomed_mae.scoring.segmentation import SegmentationScores
from geomed_mae.training.task import few, prepare

TREES = 200
MIN_LEAF = 50
PIXELS = 6000
"""Labelled pixels drawn evenly from each training image."""
BALANCED = (False, True)
"""Whether classes weigh the same, whatever their area: both are scored, and the better of the two is the baseline."""

Target = tuple[Row, np.ndarray]
"""An image and its class numbers, int16 (rows, columns), IGNORE where unknown."""


def forest_maps(
    index: Index,
    train: Sequence[Target],
    test: Sequence[Row],
    channels: Sequence[str],
    *,
    balanced: bool,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """Return per key of `test` the class map of a forest grown on the pixels of `train`.

    Args:
        index: archive of both, which reads them.
        train: labelled images; pixels without a class, or with an invalid band, are left out.
        test: images of other groups.
        channels: names of the bands, the same as those of the model that is compared.
        balanced: weigh classes by the inverse of how often they occur.
        seed: of the pixels drawn and the trees.

    Returns:
        uint8 maps of the images' spatial shape, INVALID where a band is not valid.

    Raises:
        ValueError: no pixel of `train` has a class.
        ConfigError: an image lacks a channel. ReadError: one no longer decodes.
    """
    from sklearn.ensemble import RandomForestClassifier

    rng = np.random.default_rng(seed)
    drawn = [_labelled_pixels(index, row, target, channels, rng) for row, target in train]
    values, classes = (np.concatenate(parts) for parts in zip(*drawn, strict=True))
    if not len(classes):
        raise ValueError("no pixel of the training images has a class")
    forest = RandomForestClassifier(
        TREES, min_samples_leaf=MIN_LEAF, class_weight="balanced" if balanced else None, random_state=seed
    ).fit(values, classes)
    return {row.key: _class_map(forest, index, row, channels) for row in test}


def _bands(index: Index, row: Row, channels: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Return the bands of every pixel (n, bands) and whether all of them are valid (n,)."""
    image = index.read(row.key).select(tuple(channels))
    valid = np.broadcast_to(image.valid, image.array.shape).all(axis=0)
    return image.array.reshape(len(channels), -1).T, valid.ravel()


def _labelled_pixels(
    index: Index, row: Row, target: np.ndarray, channels: Sequence[str], rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    values, valid = _bands(index, row, channels)
    known = np.flatnonzero(valid & (target.ravel() != IGNORE))
    kept = rng.choice(known, min(PIXELS, known.size), replace=False)
    return values[kept], target.ravel()[kept]


def _class_map(forest: object, index: Index, row: Row, channels: Sequence[str]) -> np.ndarray:
    values, valid = _bands(index, row, channels)
    numbers = np.full(len(values), INVALID, dtype=np.uint8)
    if valid.any():
        numbers[valid] = forest.predict(values[valid])
    return numbers.reshape(row.shape)


def forest_scores(recipe: Recipe, index: Path, labels: Path, *, seeds: int) -> dict[str, Any]:
    """Return mean Dice and IoU of the foreground over the test images, of the better of the two forests, over seeds.

    Args:
        recipe: of the runs that are compared: split, bands, few labels and first seed.
        index: INDEX with a stored split.
        labels: label files.
        seeds: number of seeds; each draws its own few labels, as the runs do.
    """
    task = prepare(recipe, [index], labels)
    channels = recipe.data.channels or tuple(channel.name for channel in task.train[0][0].channels)
    told: dict[str, Any] = {}
    for balanced in BALANCED:
        values = []
        for seed in range(recipe.train.seed, recipe.train.seed + seeds):
            train = few(task, recipe.labels, seed).train
            rows = [row for row, _ in task.test]
            maps = forest_maps(task.index, train, rows, channels, balanced=balanced, seed=seed)
            scores = SegmentationScores(task.classes, surfaces=False)
            for row, truth in task.test:
                scores.add(row, truth, whole_map(maps[row.key]))
            summary = scores.summary()
            values.append((summary["value"], summary["mean_foreground_iou"], _iou_over_images(summary, task.classes)))
        dice, pooled, iou = np.mean(values, axis=0)
        told["balanced" if balanced else "as they occur"] = {
            "dice_over_images": round(float(dice), 4),
            "iou_over_pixels": round(float(pooled), 4),
            "iou_over_images": round(float(iou), 4),
            "iou_over_images_by_seed": [round(float(value[2]), 4) for value in values],
        }
    return told


def _iou_over_images(summary: dict[str, Any], classes: Sequence[str]) -> float:
    means = [summary["classes"][name]["iou_over_images"]["mean"] for name in classes[1:]]
    return float(np.mean(means))
