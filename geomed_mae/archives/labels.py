"""Which label file belongs to which image, and what its numbers mean.

A label file is matched by name when its stem is that of exactly one image (a series of files goes by its folder's
name), and then still placed and checked by geometry; otherwise by geometry alone: it belongs to every image that it
overlaps. An image that two label files could belong to is refused, never guessed. Array shapes decide nothing.

File names occur in error messages only; they reach no output.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.image import Image
from geomed_mae.readers import IGNORE, read_labels
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import list_files, shown

COMPRESSED = (".gz",)
"""Endings that are taken off before the stem: scan.nii.gz has the stem "scan"."""

NOT_LABELS = frozenset(
    reason.name
    for reason in (
        Reason.UNKNOWN_FORMAT,
        Reason.NOT_REGULAR,
        Reason.EMPTY,
        Reason.BAND_MISMATCH,
        Reason.DTYPE_UNSUPPORTED,
        Reason.NON_IMAGE,
    )
)
"""Reasons for which a file beside the labels is no label map at all: a README, a style file, an image."""

ELSEWHERE = Reason.BAD_GEOMETRY.name
"""Reason for which a label map does not belong to an image. Any other one means damage, and is an error."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImage:
    """A row of an index and its stored label values, int16 ([slices,] rows, columns), IGNORE where none are known."""

    row: Row
    stored: np.ndarray


@dataclass(frozen=True, slots=True)
class Matching:
    """Outcome of matching: every image and every label file is counted.

    Attributes:
        labelled: images with labels, in the index's order.
        images_without: images that no label file belongs to.
        files_without: label files that belong to no image.
        files_other: files that are no label files.
    """

    labelled: tuple[LabelledImage, ...]
    images_without: int
    files_without: int
    files_other: int

    def counts(self) -> dict[str, int]:
        """Return the counts, for summaries."""
        return {
            "images_labelled": len(self.labelled),
            "images_without_labels": self.images_without,
            "label_files_without_image": self.files_without,
            "other_files": self.files_other,
        }


def stem_of(paths: Sequence[Path]) -> str:
    """Return the name by which an image's files are matched: the file's stem, or the folder's name of a series."""
    if len(paths) > 1:
        return paths[0].parent.name
    name = paths[0]
    return (name.with_suffix("") if name.suffix.lower() in COMPRESSED else name).stem


def match_labels(index: Index, labels: Path) -> Matching:
    """Match the label files in `labels` (a file or a folder, searched through recursively) to images.

    The labels of all matched images are kept in memory, two bytes a pixel.

    Raises:
        ConfigError: no label file belongs to any image, or an image has several; the message says what to do.
        ReadError: a label file has an image's name but does not lie on it, or does not decode.
    """
    files = list(list_files(Path(labels)))
    names = {row.key: stem_of(index.paths(row.key)) for row in index.rows}
    times_image, times_file = Counter(names.values()), Counter(stem_of([path]) for path in files)
    by_stem = {stem_of([path]): path for path in files}
    found: dict[str, LabelledImage] = {}
    used: set[Path] = set()
    for row in index.rows:
        name = names[row.key]
        if times_image[name] == 1 and times_file[name] == 1:
            found[row.key] = LabelledImage(row, read_labels(by_stem[name], index.read(row.key)).array)
            used.add(by_stem[name])
    others = _Others([path for path in files if path not in used])
    for row in index.rows:
        if row.key not in found and (match := others.match(index, row)):
            found[row.key] = match
    if not found:
        why = f" ({others.last})" if others.last else ""
        raise ConfigError(
            f"none of the {len(files)} files in '{labels}' is a label map that lies on one of the {len(index.rows)} "
            f"images{why}; give label maps an image's name and its coordinates"
        )
    labelled = tuple(found[row.key] for row in index.rows if row.key in found)
    elsewhere, other = others.count(index)
    return Matching(labelled, len(index.rows) - len(found), elsewhere, other)


class _Others:
    """Files that no image's name is given to: matched by geometry alone."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files, self.given = list(files), len(files)
        self.used: set[Path] = set()
        self.tried: set[Path] = set()
        self.last = ""

    def read(self, path: Path, image: Image) -> np.ndarray | None:
        """Return stored labels on the image, None if there are none; a file that is no label map is not tried again."""
        self.tried.add(path)
        try:
            return read_labels(path, image).array
        except ReadError as error:
            if error.reason not in NOT_LABELS and error.reason != ELSEWHERE:
                raise
            self.last = str(error)
            if error.reason in NOT_LABELS:
                self.files.remove(path)
            return None

    def match(self, index: Index, row: Row) -> LabelledImage | None:
        """Return the labels of the one file that lies on the image, or None."""
        if not self.files:
            return None
        image = index.read(row.key)
        read = [(path, self.read(path, image)) for path in list(self.files)]
        matches = [(path, stored) for path, stored in read if stored is not None and (stored != IGNORE).any()]
        if len(matches) > 1:
            several = ", ".join(shown(path) for path, _ in matches[:3])
            raise ConfigError(
                f"{len(matches)} label files lie on the image {shown(index.paths(row.key)[0])} ({several}"
                f"{' ...' if len(matches) > 3 else ''}); give each label file the name of its image"
            )
        if not matches:
            return None
        self.used.add(matches[0][0])
        return LabelledImage(row, matches[0][1])

    def count(self, index: Index) -> tuple[int, int]:
        """Return how many files are label maps that lie elsewhere, and how many are no label maps."""
        for path in [path for path in self.files if path not in self.tried]:
            # Every image had labels by name: only trying it tells a label map from a README.
            self.read(path, index.read(index.rows[0].key))
        return len(self.files) - len(self.used), self.given - len(self.files)


def class_numbers(stored: np.ndarray, values: Mapping[int, int] | None, classes: Sequence[str]) -> np.ndarray:
    """Return class numbers, int16, of stored label values; IGNORE stays IGNORE.

    Args:
        stored: int16 values as read.
        values: stored value -> class number, values not listed become IGNORE; None takes values as class numbers.
        classes: class names in the order of their numbers.

    Raises:
        ConfigError: a value or a number has no class; the keys to set are named.
    """
    if values is not None:
        if wrong := sorted(number for number in values.values() if not 0 <= number < len(classes)):
            raise ConfigError(
                f"labels.values leads to class {wrong[0]}, but head.classes names 0 to {len(classes) - 1} "
                f"({', '.join(classes)})"
            )
        numbers = np.full(stored.shape, IGNORE, dtype=np.int16)
        for value, number in values.items():
            numbers[stored == value] = number
        return numbers
    present = np.unique(stored)
    if stray := [int(value) for value in present if value != IGNORE and not 0 <= value < len(classes)]:
        raise ConfigError(
            f"label values {stray[:5]} have no class: head.classes names {len(classes)} "
            f"({', '.join(classes)}); name more, or map values with labels.values, for example {{255: 1}}"
        )
    return stored


def block_split(shape: Sequence[int], block_px: int, fraction: float, seed: int) -> np.ndarray:
    """Return bool of `shape`: True in the blocks held out for validation, about `fraction` of the area.

    Blocks of `block_px` pixels a side lie like the fields of a checkerboard; every n-th diagonal is held out, n being
    1 / fraction rounded (2 is the checkerboard itself) and the first one the seed's. Neighbouring blocks are correlated
    (Ploton et al. 2020, s41467-020-18321-y): scores on them are optimistic, and say less than those on another scene.
    """
    period = max(2, round(1 / fraction))
    diagonal = sum(np.ogrid[tuple(slice(size) for size in shape)][axis] // block_px for axis in range(len(shape)))
    return np.broadcast_to(diagonal % period == seed % period, tuple(shape))
