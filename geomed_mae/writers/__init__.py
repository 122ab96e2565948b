"""Writers: one file per output format. They are given arrays and geometry and know nothing of models or archives.

A writer is a module in this folder (or an entry point of group `geomed_mae.writers`) with these names:

    SUFFIX: str                                   ending of its files
    GEOMETRIES: tuple[str, ...]                   what it can hold: "raster", "volume", "plane"
    write(path, array, geometry, classes)         one class map, all in memory
    stream(path, shape, geometry, classes)        the same, filled from the first row or slice to the last
    stream_chances(path, shape, geometry, classes)     the probability of each class, filled likewise; may be absent

Class maps are uint8 with NODATA where the image was not valid. Probabilities are stored in steps of 1 / CHANCE_STEPS.
A file appears under its name when it is complete: it is written beside it first. Nothing that identifies a person or a
file is written, but for the patient and the study in DICOM objects, which cannot be without; their writer takes where
the image comes from as a keyword.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from geomed_mae.errors import OutputError
from geomed_mae.plugins import load_plugin

MARKER = "SUFFIX"

NODATA = 255
"""Value of a class map's pixels where the image was not valid."""
MAX_CLASSES = 255
"""Class numbers are 0 to 254 in a uint8 map whose 255 is NODATA."""

CHANCE_STEPS = 250
"""A probability is stored as a whole number of 1/250: 0 to 250 in a uint8, which leaves room for NODATA."""

AUTO = {"raster": "cog", "volume": "nifti", "plane": "nifti"}
"""Format of a class map by the kind of geometry, for `--format auto`."""


def writer(name: str) -> ModuleType:
    """Return the writer module of a class map format.

    Raises:
        ConfigError: there is no such writer.
    """
    return load_plugin("writers", name, marker=MARKER)


@contextmanager
def complete_file(path: Path) -> Iterator[Path]:
    """Give a name to write to beside `path`; it becomes `path` when the block ends well, and is removed when not.

    Raises:
        OutputError: the folder or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        folder = tempfile.TemporaryDirectory(dir=path.parent, prefix=".writing-")
    except OSError as error:
        raise OutputError(f"'{path.parent}' cannot be written: {error.strerror or error}") from error
    with folder as name:
        temporary = Path(name) / path.name
        try:
            yield temporary
            with temporary.open("rb") as written:
                os.fsync(written.fileno())
            temporary.replace(path)
        except OutputError:
            raise
        except OSError as error:
            raise OutputError(f"'{path.name}' cannot be written: {error.strerror or error}") from error


def check_classes(array: np.ndarray, classes: tuple[str, ...]) -> None:
    """Refuse class maps that are not uint8 with numbers of `classes` or NODATA.

    Raises:
        ValueError: another type, too many classes, or a number without a class.
    """
    if array.dtype != np.uint8:
        raise ValueError(f"a class map is uint8, not {array.dtype}")
    if len(classes) > MAX_CLASSES:
        raise ValueError(f"a class map holds at most {MAX_CLASSES} classes, not {len(classes)}")
    if array.size and (stray := np.setdiff1d(np.unique(array), [*range(len(classes)), NODATA])).size:
        raise ValueError(f"the class map holds {stray.tolist()}, which name none of its {len(classes)} classes")


def stored_chances(chances: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return probabilities as they are stored, and where they are known.

    Args:
        chances: float32 (class, ...), 0 to 1; where nothing is known they are all 0, or one of them is NaN.

    Returns:
        uint8 (class, ...) multiples of 1 / CHANCE_STEPS, 0 where not known, and bool (...), True where known.
    """
    known = chances.sum(axis=0) > 0
    return np.rint(np.where(known, np.clip(chances, 0, 1), 0) * CHANCE_STEPS).astype(np.uint8), known
