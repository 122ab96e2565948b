"""evaluate: score a fine-tuned model on labelled images that it has not seen. Leaked images end in exit 6, not in a
score.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomed_mae.archives.build import Progress, keep_apart, open_archive
from geomed_mae.archives.label_values import label_query, target_of
from geomed_mae.archives.labels import match_labels
from geomed_mae.heads.task_model import load_task_model
from geomed_mae.heads.windows import whole_class_map
from geomed_mae.recipe_file import load_recipe
from geomed_mae.training.loop import pick_device
from geomed_mae.training.metrics import Scores
from geomed_mae.training.run import RECIPE, write_json


def evaluate(
    run: str | Path,
    archive_paths: Sequence[str | Path],
    labels_path: str | Path,
    out_json: str | Path,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Predict every labelled image whole, compare with its labels, write and return the scores.

    An image counts as seen when its pixels equal those of a training image (keyed hash under the run's salt), whatever
    its file is called, and also when only blocks of it were trained on. Crops, resampled copies and other images of the
    same patient are not recognised yet: keep patients apart in the archives.

    Args:
        run: fine-tuning run.
        archive_paths: raw files and folders, or an INDEX.
        labels_path: label files; the run's `labels.values` gives them their meaning.
        out_json: file for the scores: per class Dice and IoU over all pixels with counts, the mean Dice over images
            with a 95 % bootstrap interval, and how many images and label files were matched.
        progress: shows how many images are done.

    Raises:
        LeakageError: an image was trained on; nothing is written.
        ConfigError: no finished run, no matching labels, or images that the model is not made for.
    """
    model, trained_on = load_task_model(run)
    recipe = load_recipe(Path(run) / RECIPE)
    keep_apart(out_json, archive_paths)
    index = open_archive(archive_paths, [model.spec.modality])
    matching = match_labels(index, Path(labels_path), label_query(recipe.labels, model.classes))
    rows = [entry.row for entry in matching.labelled]
    trained_on.refuse_leak(index, rows)
    for row in rows:
        model.check(row)
    model.to(pick_device("auto"))
    scores = Scores(model.classes)
    work = matching.labelled
    for entry in work if progress is None else progress(work, "evaluate", len(work)):
        truth = target_of(entry, recipe.labels, model.classes)
        scores.add(whole_class_map(model, index, entry.row), truth)
    result = {"verb": "evaluate", "labels": matching.counts(), **scores.summary()}
    out = Path(out_json)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    return result
