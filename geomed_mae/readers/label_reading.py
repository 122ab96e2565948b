"""Label files onto the grid of an image, whatever their format."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image
from geomed_mae.readers.child import MEMORY_BYTES, SECONDS, in_child
from geomed_mae.readers.labels import LabelQuery, Labels
from geomed_mae.readers.reading import BYTES_PER_VALUE, VALUES_PER_SECOND
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.registry import reader, readers
from geomed_mae.readers.regular import check_regular, first_bytes, shown

LABEL_BYTES_PER_SECOND, BYTES_PER_LABEL_BYTE = 1e6, 16
"""Of a file of outlines: what is parsed and drawn in a second of processor time; memory for each byte, with room."""


def read_labels(path: Path, onto: Image, query: LabelQuery | None = None) -> Labels:
    """Read a label file as labels on the grid of `onto`, placed by geometry, never by array shape.

    `query` says which image this is and which classes are wanted; formats that store numbers need neither.

    Raises:
        ReadError: not a label format, or it does not overlap the image.
    """
    resolved = check_regular(path)
    name = _label_reader(resolved)
    if name is None:
        raise ReadError(f"{shown(path)} is not a label file that a reader knows", Reason.UNKNOWN_FORMAT.name)
    return reader(name).read_labels(resolved, onto, query or LabelQuery())


def read_labels_guarded(path: Path, onto: Image, query: LabelQuery | None = None) -> Labels:
    """As `read_labels`, in a child process: outlines pass through native code as codecs do, and may keep it for hours.

    Raises:
        ReadError: as `read_labels`; also DECODE_FAILED when that code crashes or hangs, TOO_LARGE when memory runs out.
        MissingExtraError: the package that reads the format is not installed.
    """
    name = _label_reader(check_regular(path))
    if name is not None:
        reader(name)
    shape = onto.array.shape
    values, size = math.prod(shape[1:]), path.stat().st_size
    found = in_child(
        _labels_on,
        path,
        (shape, onto.channels, onto.geometry, onto.modality),
        query or LabelQuery(),
        seconds=SECONDS + values / VALUES_PER_SECOND + size / LABEL_BYTES_PER_SECOND,
        memory=MEMORY_BYTES + BYTES_PER_VALUE * values + BYTES_PER_LABEL_BYTE * size,
    )
    return replace(found, array=found.array.copy())  # what a process sends is read-only, what a reader gives is not


def _labels_on(path: Path, outline: tuple[Any, ...], query: LabelQuery) -> Labels:
    shape, channels, geometry, modality = outline
    blank, valid = np.broadcast_to(np.float32(0), shape), np.broadcast_to(np.True_, shape)
    onto = Image(array=blank, valid=valid, channels=channels, geometry=geometry, modality=modality)
    return read_labels(path, onto, query)


def label_references(path: Path) -> tuple[tuple[str, str], ...] | None:
    """Return the (kind, value) pairs of the images that a label file names, () where its format names none.

    Kinds are those of `Source.identity`; None says that the file holds no labels. Private, as identities are.

    Raises:
        ReadError: not a regular file, or a label file that does not parse.
    """
    resolved = check_regular(path)
    name = _label_reader(resolved)
    if name is None:
        return None
    module = reader(name)
    return module.label_references(resolved) if hasattr(module, "label_references") else ()


def _label_reader(path: Path) -> str | None:
    """Return the name of the reader of a checked label file's format, None where none reads labels in it."""
    head = first_bytes(path)
    known = ((name, module) for name, module in readers().items() if hasattr(module, "read_labels"))
    return next((name for name, module in known if module.sniff(path, head)), None)
