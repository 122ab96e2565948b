"""From a task model and labelled images to their scores: whole images, one after another.

Beside the labels, which are in memory already, there is one band of probabilities, and of an image that gets surface
distances or may be drawn its class map.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.heads.task_model import TaskModel
from geomed_mae.heads.windows import bands, image_chances
from geomed_mae.scoring.classification import ClassificationScores
from geomed_mae.scoring.segmentation import SegmentationScores
from geomed_mae.scoring.stored import Scores
from geomed_mae.scoring.worst import Case, Worst, kept, map_case

Target = tuple[Row, np.ndarray]
"""An image and what is so: class numbers of its pixels, or its class number, or (classes,) of 1, 0 and UNKNOWN."""


Progress = Callable[[Iterable[Target], str, int], Iterable[Target]]


def score_targets(
    model: TaskModel,
    index: Index,
    targets: Sequence[Target],
    *,
    surfaces: bool = True,
    worst: Worst | None = None,
    progress: Progress | None = None,
) -> Scores:
    """Predict every image whole and score it, in the order of `targets`.

    Args:
        model: in evaluation mode, on its device.
        index: archive of the images.
        targets: images and labels of the model's task.
        surfaces: measure surface distances of class maps.
        worst: keeps the worst cases, for pictures.
        progress: shows how many images are done.

    Raises:
        ConfigError: an image is not what the model is made for.
        ReadError: an image no longer decodes.
    """
    shown = targets if progress is None else progress(targets, "score", len(targets))
    if model.spec.head.task == "classify":
        return _classified(model, index, shown, worst)
    scores = SegmentationScores(model.classes, surfaces=surfaces)
    for number, (row, target) in enumerate(shown):
        if worst is None:
            scores.add(row, target, bands(model, index, row))
            continue
        whole = np.empty(target.shape, dtype=np.uint8)
        scores.add(row, target, kept(bands(model, index, row), whole))
        value = scores.value(number)
        worst.offer(value, partial(map_case, row, value, target, whole))
    return scores


def _classified(model: TaskModel, index: Index, targets: Iterable[Target], worst: Worst | None) -> Scores:
    scores = ClassificationScores(model.classes, multi_label=model.spec.head.multi_label)
    for number, (row, target) in enumerate(targets):
        scores.add(row, image_chances(model, index, row), target)
        if worst is not None:
            value, window = scores.value(number), tuple(slice(0, size) for size in row.shape)
            worst.offer(value, partial(Case, row, window, value, *scores.entry(number)))
    return scores
