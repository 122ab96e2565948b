"""Classes of images as a table: predictions.csv, and predictions.parquet (GeoParquet 1.1) where images have a place.

Columns: `id` (the image's opaque key), `class` (its name; where an image may have several, those whose probability is
a half or more, separated by "|", as label tables have them), and one probability a class, `p_<class>`.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.class_labels import LIST
from geomed_mae.writers import complete_file
from geomed_mae.writers.geoparquet import Ring, write_columns

CSV, PARQUET = "predictions.csv", "predictions.parquet"
DIGITS = 6
"""Decimals of a probability."""


def write(
    folder: Path,
    keys: Sequence[str],
    classes: Sequence[str],
    chances: np.ndarray,
    said: Sequence[Sequence[str]],
    footprints: Sequence[Ring | None],
) -> list[str]:
    """Write one row an image; return the names of the files.

    Args:
        folder: where the tables go; older ones are replaced, or deleted where there is no new one.
        keys: opaque keys, one a row.
        classes: names of the classes.
        chances: probabilities (rows, classes).
        said: names of the classes that each image is said to have.
        footprints: corners (longitude, latitude) of each image, None for one without a place.

    Raises:
        OutputError: a file cannot be written.
    """
    rounded = np.round(chances.astype(np.float64), DIGITS)
    columns: dict[str, Any] = {"id": list(keys), "class": [LIST.join(names) for names in said]}
    columns |= {f"p_{name}": rounded[:, number].tolist() for number, name in enumerate(classes)}
    with complete_file(folder / CSV) as path, path.open("w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
    if all(footprint is None for footprint in footprints):
        (folder / PARQUET).unlink(missing_ok=True)  # of other images
        return [CSV]
    return [CSV, write_columns(folder / PARQUET, columns, footprints, {}).name]
