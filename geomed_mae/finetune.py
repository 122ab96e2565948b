"""finetune: an encoder and a few labels become a task model, with scores on images that it has not seen.

    labels -> matched to images -> parts by patient or scene -> leaks looked for -> encoder + head -> scores

One run, or a study of several: other seeds, and beside each the same run from random weights (`training.study`).
A single labelled scene is split into blocks (`labels.block_px`); then the score says how well the rest of this very
scene can be filled in, and no more.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomed_mae.archives.build import Progress, keep_apart
from geomed_mae.archives.leakage import no_scores_over_leaks
from geomed_mae.archives.parts import TEST
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.reporting.pages import REPORT, write_report
from geomed_mae.scoring.stored import FILE as SCORES
from geomed_mae.training.comparison import LEAST_GROUPS
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.downstream import SCRATCH
from geomed_mae.training.run import SUMMARY, is_run
from geomed_mae.training.study import run_study
from geomed_mae.training.study_files import is_study
from geomed_mae.training.task import Task, prepare, refuse_unscorable
from geomed_mae.training.tuning import ready, tune

log = logging.getLogger(__name__)


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
    out, several = Path(out), twin or recipe.train.seeds > 1
    _check_out(out, encoder, several=several, kept=not (resume or overwrite))
    with no_scores_over_leaks(out / SUMMARY, out / SCORES, out / REPORT):
        task = prepare(recipe, archive_paths, labels_path, progress=progress)
        if twin:
            refuse_unscorable(task, TEST)
            _warn_of_few_groups(task)
        how = {"transductive": transductive, "resume": resume, "overwrite": overwrite}
        if several:
            found = run_study(recipe, task, str(encoder), out, twin=twin, tune=tune, check=ready, **how)
        else:
            found = tune(recipe, task, str(encoder), out, **how)
    write_report(out)
    return found


def _warn_of_few_groups(task: Task) -> None:
    if 0 < (groups := len({row.group for row, _ in task.test})) < LEAST_GROUPS:
        log.warning(
            "the test part is of %d patients or scenes: whether pretraining paid cannot be told from fewer than %d; "
            "hold out more (labels.test, or the shares of scan --split)",
            groups,
            LEAST_GROUPS,
        )


def _check_out(out: Path, encoder: str | Path, *, several: bool, kept: bool) -> None:
    """Refuse to replace what must stay; now, before a leak could take the scores of a run away.

    Args:
        out: where the run or study goes to.
        encoder: what it starts from.
        several: whether it is a study.
        kept: whether a run or study that is there is neither gone on with nor replaced.

    Raises:
        ConfigError: saying what is there.
    """
    where, origin = out.resolve(), Path(encoder).resolve()
    if str(encoder) != SCRATCH and (where == origin or where in origin.parents):
        raise ConfigError(f"the encoder '{encoder}' lies in '{out}', which would replace it; choose another --out")
    kind = "study" if is_study(out) else "run" if is_run(out) else None
    if kind is not None and kept:
        raise ConfigError(f"'{out}' already holds a {kind}; continue it with --resume or replace it with --overwrite")
    if kind == "study" and not several:
        raise ConfigError(
            f"'{out}' holds a study, and this is a single run; give --twin or --seeds as the study has them, or "
            "another --out"
        )
