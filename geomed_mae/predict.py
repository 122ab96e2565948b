"""predict: class maps of whole scenes and volumes, on the grid of the input to the last bit; or a table of classes.

Outputs are named by the image's opaque key, because file names can name patients. `predictions.jsonl` says which map
has which key, size and place; with an INDEX as input, its private table leads from a key to the files. A run that
classifies writes no maps but `predictions.csv`, a row an image (see `writers.class_table`).

A scene of any size is answered block by block, and memory does not grow with it. A `predict` that was killed goes on
where it was when it is started again (see `outputs.work`), and several processes under torchrun share the work.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from geomed_mae.archives.build import Progress, is_index, keep_apart, open_archive
from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError
from geomed_mae.heads.task_model import TaskModel, load_task_model
from geomed_mae.outputs import failures
from geomed_mae.outputs.classifying import Classifying
from geomed_mae.outputs.formats import check_formats, forms_of, known_format
from geomed_mae.outputs.rounds import Segmenting
from geomed_mae.outputs.work import TABLE, Work
from geomed_mae.readers.child import close_children
from geomed_mae.scoring.decisions import decide
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.study_files import refuse_study
from geomed_mae.writers import class_table, complete_file

TIMEOUT_S = 6 * 3600
"""How long a process waits for the others, which may be busy with a large image."""
AGAIN = "What is finished is kept: start all processes again, they go on from there"


def predict(
    run: str | Path,
    archive_paths: Sequence[str | Path],
    out_dir: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    probabilities: bool = False,
    batch: int = 8,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a class map for every image of the archive, or a table of their classes; return what was written.

    The same call again goes on after an interruption: what was computed by the same model, from the same pixels, with
    the same settings is taken over, anything else is discarded.

    Args:
        run: fine-tuning run.
        archive_paths: raw files and folders, or an INDEX; several processes need an INDEX.
        out_dir: folder for the maps and `predictions.jsonl`; maps of the same name are replaced.
        format: name of a writer, or "auto": COG for rasters and NIfTI for everything else.
        split: part of the stored split of each INDEX that alone is used.
        probabilities: also write the probability of every class; a table has them anyway.
        batch: windows computed at a time.
        overwrite: compute everything anew.
        progress: shows how many batches of windows, or images to classify, are done.

    Returns:
        `out`, counts, and per image its key, its (first) input file, the map and pixels per class; or the names of
        `tables`, and per image its classes and their probabilities. `resumed` and `discarded` where there was
        half-finished work; `failed` where images could not be read, with their reasons, `empty` where nothing in them
        is valid. Nothing in processes other than the first.

    Raises:
        ConfigError: no finished run, no image that the model is made for, or a format that cannot hold the geometry.
        OutputError: the folder cannot be written; what is finished is kept.
    """
    refuse_study(run, "predict")
    model, _ = load_task_model(run)
    classifies = model.spec.head.task == "classify"
    if classifies and (format != "auto" or probabilities):
        raise ConfigError("this run classifies images and writes a table: leave --format and --probabilities out")
    if batch < 1:
        raise ConfigError(f"--batch is {batch}; it must be 1 or more")
    known_format(format)
    keep_apart(out_dir, archive_paths)
    ranks = Ranks.from_environment()
    if not ranks.alone and not all(is_index(Path(path)) for path in archive_paths):
        raise ConfigError(
            f"{ranks.world} processes need an INDEX, which each of them opens; make one first: geomed-mae scan "
            "ARCHIVE... --out INDEX, then give it as --archive INDEX"
        )
    device = ranks.device("auto")
    with ranks.joined(device, TIMEOUT_S, again=AGAIN), Work(out_dir) as work:
        index = open_archive(archive_paths, [model.spec.modality], part=split, max_bad=failures.ALL_BAD, salt=work.salt)
        close_children()  # one that has scanned a large scene holds on to memory
        ranks.check_same(index.fingerprint, "the processes see different archives; give all of them the same INDEX")
        rows = _usable(model, index)
        forms = [""] * len(rows) if classifies else forms_of(format, rows)
        if not classifies:
            check_formats(forms, index, rows, model.classes, probabilities=probabilities)
        raw = not all(is_index(Path(path)) for path in archive_paths)
        ranks.first_does(lambda: work.begin(keep_salt=raw, overwrite=overwrite))
        model.to(device)
        how = {"model": model, "digest": model.digest, "index": index, "work": work, "ranks": ranks, "batch": batch}
        broken = failures.refused(index, archive_paths, work.salt)
        shown = progress if ranks.first else None
        if classifies:
            found = _classify(Classifying(**how), rows, overwrite, broken, shown)
        else:
            found = _segment(Segmenting(**how, chances=probabilities), rows, forms, overwrite, broken, shown)
        ranks.first_does(work.clear)
    if not ranks.first:
        return {}
    return {"out": os.fspath(out_dir), "images_of_other_modalities": len(index.rows) - len(rows), **found}


def _usable(model: TaskModel, index: Index) -> list[Row]:
    """Return the images that the model is made for, after making sure that they have its channels."""
    rows = [row for row in index.rows if row.modality == model.spec.modality]
    if not rows:
        raise ConfigError(
            f"the archive holds no image of modality '{model.spec.modality}', which the model is made for"
        )
    for row in rows:
        model.check(row)
    return rows


def _segment(
    task: Segmenting,
    rows: Sequence[Row],
    forms: Sequence[str],
    overwrite: bool,
    broken: dict[str, tuple[Path, failures.Failure]],
    progress: Progress | None,
) -> dict[str, Any]:
    """Write the maps and their table; return what is said of them."""
    jobs = [task.job(row, form) for row, form in zip(rows, forms, strict=True)]
    wanted = {job.row.key: job.done for job in jobs}

    def begin() -> dict[str, Any]:
        finished = {} if overwrite else task.work.finished(wanted)
        half = {job.row.key: job for job in jobs if job.row.key not in finished}
        discarded = task.work.keep_only(
            {key: job.fingerprint for key, job in half.items()}, {key: len(job.blocks) for key, job in half.items()}
        )
        blocks = sum(len(job.blocks) - len(task.todo(job)) for job in half.values())
        return {"finished": finished, "resumed": {"images": len(finished), "blocks": blocks}, "discarded": discarded}

    before = task.ranks.first_does(begin)
    task.lines |= before["finished"]
    left = [job for job in jobs if job.row.key not in before["finished"]]
    _run(task.run(left), task.count(left), progress)
    keys = [row.key for row in rows]
    lines = [task.lines[key] if key in task.lines else failures.line(key, task.failed[key]) for key in keys]
    lines += [failures.line(key, failure) for key, (_, failure) in broken.items()]
    task.ranks.first_does(lambda: _write_table(task.work.out, lines))
    predictions = [
        {
            "key": line["key"],
            # For the person at the terminal; no file that is written names an input.
            "input": str(task.index.paths(line["key"])[0]),
            "output": str(task.work.out / line["file"]),
            "pixels": line["pixels"],
        }
        for line in lines
        if "file" in line
    ]
    return {"images": len(predictions), "predictions": predictions, **_told(task, before, broken)}


def _classify(
    task: Classifying,
    rows: Sequence[Row],
    overwrite: bool,
    broken: dict[str, tuple[Path, failures.Failure]],
    progress: Progress | None,
) -> dict[str, Any]:
    """Write the tables of a run that classifies; return what is said of them."""
    wanted = {row.key: task.fingerprint(row) for row in rows}

    def begin() -> dict[str, Any]:
        finished = {} if overwrite else task.work.finished(wanted)
        chances = {key: line.get("chances", ()) for key, line in finished.items()}
        chances = {key: some for key, some in chances.items() if len(some) == len(task.model.classes)}
        return {"finished": chances, "resumed": {"images": len(chances), "blocks": 0}, "discarded": 0}

    before = task.ranks.first_does(begin)
    task.chances |= before["finished"]
    left = [row for row in rows if row.key not in before["finished"]]
    _run(task.run(left), len(left[task.ranks.rank :: task.ranks.world]), progress)
    kept = [row for row in rows if row.key in task.chances]
    model, chances = task.model, task.of(kept)
    decided = decide(chances, multi_label=model.spec.head.multi_label)
    said = [[name for name, yes in zip(model.classes, line, strict=True) if yes] for line in decided]
    keys, footprints = [row.key for row in kept], [row.footprint for row in kept]
    tables = task.ranks.first_does(
        lambda: class_table.write(task.work.out, keys, model.classes, chances, said, footprints)
    )
    predictions = [
        {
            "key": key,
            # For the person at the terminal; no file that is written names an input.
            "input": str(task.index.paths(key)[0]),
            "classes": names,
            "chances": {name: round(float(chance), 6) for name, chance in zip(model.classes, line, strict=True)},
        }
        for key, names, line in zip(keys, said, chances, strict=True)
    ]
    return {"images": len(kept), "tables": tables, "predictions": predictions, **_told(task, before, broken)}


def _run(steps: Iterable[None], total: int, progress: Progress | None) -> None:
    """Do the work, which `steps` does as it is taken."""
    for _ in steps if progress is None else progress(steps, "predict", total):
        pass


def _told(
    task: Segmenting | Classifying, before: dict[str, Any], broken: dict[str, tuple[Path, failures.Failure]]
) -> dict[str, Any]:
    """Return what is said of earlier work and of what failed, where there is anything to say."""
    resumed = {"resumed": before["resumed"]} if any(before["resumed"].values()) else {}
    discarded = {"discarded": before["discarded"]} if before["discarded"] else {}
    return {**resumed, **discarded, **failures.told(task.index, task.failed, broken)}


def _write_table(out: Path, lines: Sequence[dict[str, Any]]) -> None:
    with complete_file(out / TABLE) as path, path.open("w", encoding="utf-8") as table:
        table.writelines(json.dumps(line) + "\n" for line in lines)
