"""predict: class maps of whole scenes and volumes, on the grid of the input to the last bit; or a table of classes.

Outputs are named by the image's opaque key, because file names can name patients. `predictions.jsonl` says which map
has which key, size and place; with an INDEX as input, its private table leads from a key to the files. A run that
classifies writes no maps but `predictions.csv`, a row an image (see `writers.class_table`).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.build import Progress, keep_apart, open_archive
from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError, OutputError
from geomed_mae.heads.task_model import TaskModel, load_task_model
from geomed_mae.heads.windows import class_map, image_chances
from geomed_mae.image import Geometry, RasterGeometry, VolumeGeometry
from geomed_mae.scoring.decisions import decide
from geomed_mae.training.loop import pick_device
from geomed_mae.training.study_files import refuse_study
from geomed_mae.writers import AUTO, NODATA, UNAVAILABLE, class_table, writer

NAME_HEX = 16
"""Digits of the key that name a file: 64 bits, ample within one folder."""
TABLE = "predictions.jsonl"
GRIDS = {"cog": ("raster",), "nifti": ("volume", "plane")}
"""Geometries that a format can represent."""


def predict(
    run: str | Path,
    archive_paths: Sequence[str | Path],
    out_dir: str | Path,
    *,
    format: str = "auto",
    split: str | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write a class map for every image of the archive, or a table of their classes; return what was written.

    Args:
        run: fine-tuning run.
        archive_paths: raw files and folders, or an INDEX.
        out_dir: folder for the maps and `predictions.jsonl`; maps of the same name are replaced.
        format: "cog", "nifti", or "auto": COG for rasters and NIfTI for everything else.
        split: part of the stored split of each INDEX that alone is used.
        progress: shows how many images are done.

    Returns:
        `out`, counts, and per image its key, its (first) input file, the map and pixels per class; or the names of
        `tables`, and per image its classes and their probabilities.

    Raises:
        ConfigError: no finished run, no image that the model is made for, or a format that cannot hold the geometry.
        OutputError: the folder cannot be written.
    """
    if format in UNAVAILABLE:
        raise ConfigError(UNAVAILABLE[format])
    refuse_study(run, "predict")
    model, _ = load_task_model(run)
    classifies = model.spec.head.task == "classify"
    if classifies and format != "auto":
        raise ConfigError(f"this run classifies images and writes a table: leave --format {format} out")
    keep_apart(out_dir, archive_paths)
    index = open_archive(archive_paths, [model.spec.modality], part=split)
    rows = [row for row in index.rows if row.modality == model.spec.modality]
    if not rows:
        raise ConfigError(
            f"the archive holds no image of modality '{model.spec.modality}', which the model is made for"
        )
    forms = [] if classifies else [_form(format, row) for row in rows]
    for row in rows:
        model.check(row)
    model.to(pick_device("auto"))
    out = Path(out_dir)
    if classifies:
        shown = rows if progress is None else progress(rows, "predict", len(rows))
        found = _classify(model, index, shown, out)
        return {"out": os.fspath(out_dir), "images_of_other_modalities": len(index.rows) - len(rows), **found}
    work = list(zip(rows, forms, strict=True))
    shown = work if progress is None else progress(work, "predict", len(work))
    lines = [_predict_one(model, index, row, out, form) for row, form in shown]
    try:
        with (out / TABLE).open("w", encoding="utf-8") as table:
            table.writelines(json.dumps(line) + "\n" for line in lines)
    except OSError as error:
        raise OutputError(f"{TABLE} cannot be written: {error.strerror or error}") from error
    return {
        "out": os.fspath(out_dir),
        "images": len(lines),
        "images_of_other_modalities": len(index.rows) - len(rows),
        "predictions": [
            {
                "key": line["key"],
                # For the person at the terminal; no file that is written names an input.
                "input": str(index.paths(line["key"])[0]),
                "output": str(out / line["file"]),
                "pixels": line["pixels"],
            }
            for line in lines
        ],
    }


def _classify(model: TaskModel, index: Index, rows: Iterable[Row], out: Path) -> dict[str, Any]:
    """Write the tables of a run that classifies; return what is said of them."""
    kept, found = [], []
    for row in rows:
        found.append(image_chances(model, index, row))
        kept.append(row)
    chances = np.stack(found)
    decided = decide(chances, multi_label=model.spec.head.multi_label)
    said = [[name for name, yes in zip(model.classes, line, strict=True) if yes] for line in decided]
    keys, footprints = [row.key for row in kept], [row.footprint for row in kept]
    tables = class_table.write(out, keys, model.classes, chances, said, footprints)
    predictions = [
        {
            "key": key,
            # For the person at the terminal; no file that is written names an input.
            "input": str(index.paths(key)[0]),
            "classes": names,
            "chances": {name: round(float(chance), 6) for name, chance in zip(model.classes, line, strict=True)},
        }
        for key, names, line in zip(keys, said, chances, strict=True)
    ]
    return {"images": len(kept), "tables": tables, "predictions": predictions}


def _form(wanted: str, row: Row) -> str:
    form = AUTO[row.geometry] if wanted == "auto" else wanted
    if row.geometry not in GRIDS.get(form, (row.geometry,)):
        raise ConfigError(f"--format {form} cannot hold a {row.geometry}; use --format auto")
    return form


def _predict_one(model: TaskModel, index: Index, row: Row, out: Path, form: str) -> dict[str, Any]:
    """Write one map band by band; return its line of the table."""
    made = writer(form)
    path = out / f"{row.key[:NAME_HEX]}{made.SUFFIX}"
    # One pixel gives the geometry of the whole: a window at the origin shares the image's.
    geometry = index.read(row.key, tuple(slice(0, 1) for _ in row.shape)).geometry
    counts = np.zeros(NODATA + 1, dtype=np.int64)
    with made.stream(path, row.shape, geometry, model.classes) as target:
        for band in class_map(model, index, row):
            target.put(band)
            counts += np.bincount(band.ravel(), minlength=NODATA + 1)
    pixels = {name: int(counts[number]) for number, name in enumerate(model.classes)}
    return {
        "key": row.key,
        "file": path.name,
        "shape": list(row.shape),
        "geometry": _described(geometry),
        "classes": list(model.classes),
        "pixels": {**pixels, "invalid": int(counts[NODATA])},
    }


def _described(geometry: Geometry) -> dict[str, Any]:
    if isinstance(geometry, RasterGeometry):
        return {"crs": geometry.crs, "transform": list(geometry.transform)}
    if isinstance(geometry, VolumeGeometry):
        return {"affine_lps_mm": geometry.affine.tolist()}
    return {"spacing_mm": geometry.spacing}
