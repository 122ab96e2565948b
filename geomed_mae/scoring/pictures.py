"""The pictures of an evaluation: confusion.png, calibration.png and worst.png. They show pixels, and no identifier."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.archives.index import Index
from geomed_mae.scoring.calibration import histogram
from geomed_mae.scoring.charts import draw_calibration, draw_confusion, draw_confusions
from geomed_mae.scoring.classification import ClassificationScores
from geomed_mae.scoring.figure import plain_words
from geomed_mae.scoring.segmentation import SegmentationScores
from geomed_mae.scoring.stored import Scores
from geomed_mae.scoring.worst import Worst
from geomed_mae.scoring.worst_pictures import draw_worst_classes, draw_worst_maps

CONFUSION, CALIBRATION, WORST = FILES = "confusion.png", "calibration.png", "worst.png"


def drawn_before(folder: Path) -> list[Path]:
    """Return the pictures of earlier evaluations in a folder and in those of a study's members; no other files."""
    return sorted(path for name in FILES for path in folder.rglob(name)) if folder.is_dir() else []


def draw_pictures(folder: Path, scores: Scores, index: Index, worst: Worst) -> list[str]:
    """Draw all pictures that there is something for, delete older ones of the others; return their names.

    Args:
        folder: where they go.
        scores: of all images.
        index: archive of the images.
        worst: the worst cases among them.

    Raises:
        OutputError: a file cannot be written.
        ReadError: an image no longer decodes.
    """
    draw = _of_classes if isinstance(scores, ClassificationScores) else _of_maps
    with plain_words():
        drawn = draw(folder, scores, index, worst)
    for name in set(FILES) - set(drawn):
        (folder / name).unlink(missing_ok=True)
    return drawn


def _of_maps(folder: Path, scores: SegmentationScores, index: Index, worst: Worst) -> list[str]:
    keys = set(scores.keys)
    what = "voxels" if any(len(row.shape) == 3 for row in index.rows if row.key in keys) else "pixels"
    drawn = [draw_confusion(folder / CONFUSION, scores.total, scores.classes, what)]
    if (bins := scores.calibration) is not None and bins[0, 0].sum():
        others = [(number, scores.classes[number], bins[1 + number]) for number in range(1, len(scores.classes))]
        drawn.append(draw_calibration(folder / CALIBRATION, ("likeliest class", bins[0]), others, what))
    if worst.cases:
        drawn.append(draw_worst_maps(folder / WORST, worst.cases, index, scores.classes))
    return [path.name for path in drawn]


def _each_class(scores: ClassificationScores) -> list[tuple[int, str, np.ndarray]]:
    """Return number, name and calibration histogram of each class against the rest; of two the second says it all."""
    found = []
    for number, name in enumerate(scores.classes):
        truth = scores.truth[:, number]
        known = truth != UNKNOWN
        bins = histogram(scores.chances[known, number], truth[known] == 1)
        found.append((number + 1, name, bins))
    return found[1:] if len(found) == 2 and not scores.multi_label else found


def _of_classes(folder: Path, scores: ClassificationScores, index: Index, worst: Worst) -> list[str]:
    of = scores.decisions
    if scores.multi_label:
        tables = [of.two_by_two(number, None) for number in range(len(scores.classes))]
        drawn = [draw_confusions(folder / CONFUSION, tables, scores.classes)]
    else:
        drawn = [draw_confusion(folder / CONFUSION, of.confusion(None), scores.classes, "images")]
    name, what = ("every class", "statements") if scores.multi_label else ("decided class", "images")
    if (bins := of.bins(None))[0].sum():
        drawn.append(draw_calibration(folder / CALIBRATION, (name, bins), _each_class(scores), what))
    if worst.cases:
        drawn.append(draw_worst_classes(folder / WORST, worst.cases, index, scores.classes))
    return [path.name for path in drawn]
