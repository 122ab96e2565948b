"""finetune: an encoder and a few labels become a task model, with scores on images that it has not seen.

    labels -> matched to images -> parts by patient or scene -> leaks looked for -> encoder + head -> scores

One run, or a study of several: other seeds, and beside each the same run from random weights (`training.study`).
A single labelled scene is split into blocks (`labels.block_px`); then the score says how well the rest of this very
scene can be filled in, and no more.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomed_mae.archives.build import Progress, keep_apart
from geomed_mae.archives.leakage import no_scores_over_leaks
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.reporting.pages import REPORT, write_report
from geomed_mae.scoring.stored import FILE as SCORES
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.downstream import SCRATCH
from geomed_mae.training.run import SUMMARY, is_run
from geomed_mae.training.study import run_study
from geomed_mae.training.study_files import is_study
from geomed_mae.training.task import prepare
from geomed_mae.training.tuning import tune


def finetune(
    recipe: Recipe,
    archive_paths: Sequence[str | Path],
    labels_path: str | Path,
    encoder: str | Path,
    out: str | Path,
    *,
    twin: bool = False,
    transductive: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Train encoder and head from labels, and score them; return the summary and where things are.

    Args:
        recipe: has a `head`; `model` is needed for encoder "none".
        archive_paths: raw files and folders, or an INDEX.
        labels_path: label maps (`archives.labels`), or a table or folders of classes (`archives.class_labels`).
        encoder: encoder folder or pretraining run, or "none" for random weights.
        out: run folder; with train.seeds above 1, or `twin`, a study of several.
        twin: also do the same from random weights, and say whether pretraining paid.
        transductive: the encoder may have seen test images without their labels; recorded with every score.
        resume: go on where the run or study was left.
        overwrite: replace the run or study that is there.
        progress: shows how far the scan of a raw archive is.

    Raises:
        LeakageError: parts share images, patients or places, or the encoder has seen test images; no score is left.
        ConfigError: recipe, labels and images do not go together; the message says how to change that.
        as the archive, the run folder and the loop raise.
    """
    if not Ranks.from_environment().alone:
        raise ConfigError("finetune runs in one process; start it without torchrun")
    if twin and str(encoder) == SCRATCH:
        raise ConfigError("--twin compares an encoder with random weights; give an encoder, not --encoder none")
    keep_apart(out, archive_paths)
    out = Path(out)
    # Now, before a leak could take the scores of a run away that nobody asked to replace.
    if not (resume or overwrite) and (is_run(out) or is_study(out)):
        kind = "study" if is_study(out) else "run"
        raise ConfigError(f"'{out}' already holds a {kind}; continue it with --resume or replace it with --overwrite")
    with no_scores_over_leaks(out / SUMMARY, out / SCORES, out / REPORT):
        task = prepare(recipe, archive_paths, labels_path, progress=progress)
        how = {"transductive": transductive, "resume": resume, "overwrite": overwrite}
        if twin or recipe.train.seeds > 1:
            found = run_study(recipe, task, str(encoder), out, twin=twin, tune=tune, **how)
        else:
            found = tune(recipe, task, str(encoder), out, **how)
    write_report(out)
    return found
