"""The labels of the images of an archive, read and placed.

`label_pairs` says which files could belong to which images; here they are read onto the images' grids; `label_values`
turns stored values into class numbers. An image that
two label files could belong to is refused, never guessed, unless both name what they outline and name different things.
File names occur in error messages only; they reach no output.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.label_pairs import NOT_LABELS, LabelFile, Pairs, Tie, pair
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.readers import IGNORE, LabelQuery, Labels, read_labels_guarded
from geomed_mae.readers.labels import BACKGROUND, shown_name
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import shown

ELSEWHERE = Reason.BAD_GEOMETRY.name
"""Reason for which a label map does not belong to an image. Any other one means damage, and is an error."""

PIXEL_BYTES = 4
"""Memory that a labelled pixel takes at most: the stored value and the class number that it means, int16 both."""
MEMORY_SHARE = 0.8
"""Share of this machine's memory that labels may take."""


@dataclass(frozen=True, slots=True, eq=False)
class LabelledImage:
    """A row of an index and its labels, int16 ([slices,] rows, columns), IGNORE where none are known.

    Attributes:
        row: the image.
        stored: stored values, or class numbers where `named`.
        named: whether the file named its classes, so that `stored` needs no mapping.
        place: label file and image as messages may name them, and nothing else.
    """

    row: Row
    stored: np.ndarray
    named: bool = False
    place: str = ""


@dataclass(frozen=True, slots=True)
class Matching:
    """Outcome of matching: every image and every label file is counted.

    Attributes:
        labelled: images with labels, in the index's order.
        images_without: images that no label file belongs to.
        files_without: label files that belong to no image.
        files_other: files that are no label files.
        names: class names in the order of their numbers, where the files named their classes.
        found: what readers counted on the way, for example "label_voxels_outside_image".
    """

    labelled: tuple[LabelledImage, ...]
    images_without: int
    files_without: int
    files_other: int
    names: tuple[str, ...] = ()
    found: Mapping[str, int] = field(default_factory=dict)

    def counts(self) -> dict[str, int]:
        """Return the counts, for summaries; what was found on the way only where there was any."""
        return {
            "images_labelled": len(self.labelled),
            "images_without_labels": self.images_without,
            "label_files_without_image": self.files_without,
            "other_files": self.files_other,
            **{name: count for name, count in sorted(self.found.items()) if count},
        }


@dataclass(frozen=True, slots=True, eq=False)
class _Read:
    """The labels of one file on one image."""

    file: LabelFile
    row: Row
    labels: Labels


def match_labels(index: Index, labels: Path, query: LabelQuery | None = None) -> Matching:
    """Match the label files in `labels` (a file or a folder, searched through recursively) to images, and read them.

    The labels of all matched images are kept in memory, PIXEL_BYTES a pixel while they are read; more than there is of
    it is refused before the first is. No image's pixels are read.

    Args:
        index: images; `labels` may lie inside their folders.
        labels: file or folder.
        query: what is wanted of files that name their classes; None numbers all names that occur.

    Raises:
        ConfigError: no label file belongs to any image, an image has several, or they do not fit into memory; the
            message says what to do.
        ReadError: a label file names an image but does not lie on it, has a class that is not known, or does not
            decode; the message names the label file and the image.
    """
    query = query or LabelQuery()
    pairs = pair(index, Path(labels))
    _refuse_more_than_memory(pairs)
    reading = _Reading(index, query, pairs)
    found: dict[str, list[_Read]] = {}
    for file, (tie, rows) in pairs.ties.items():
        for one in reading.read(file, tie, rows):
            found.setdefault(one.row.key, []).append(one)
    _refuse_ambiguous(index, found, reading.by_place)
    if not found:
        why = f" ({reading.last})" if reading.last else ""
        files = pairs.other + pairs.elsewhere + len(pairs.ties)
        raise ConfigError(
            f"none of the {files} files in '{labels}' is a label map that lies on one of the {len(pairs.rows)} "
            f"images{why}; give label maps an image's name and its coordinates"
        )
    names = query.classes or _all_names(found)
    labelled = tuple(_merged(index, found[row.key], names, query) for row in pairs.rows if row.key in found)
    _refuse_nothing_named(labelled, query)
    return Matching(
        labelled,
        images_without=len(pairs.rows) - len(labelled),
        files_without=pairs.elsewhere + reading.elsewhere,
        files_other=pairs.other + reading.other,
        names=names if any(entry.named for entry in labelled) else (),
        found=reading.counts,
    )


def _refuse_more_than_memory(pairs: Pairs) -> None:
    # What is tried by place is left out: most of it will turn out to lie elsewhere.
    rows = {row.key: row for tie, rows in pairs.ties.values() if tie is not Tie.PLACE for row in rows}
    needed = PIXEL_BYTES * sum(math.prod(row.shape) for row in rows.values())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > MEMORY_SHARE * memory:
        raise ConfigError(
            f"the labels of {len(rows)} images take {needed / 2**30:.0f} GiB while they are read, and this machine has "
            f"{memory / 2**30:.0f} GiB of memory; give labels of fewer images, or cut large scenes and their labels "
            "into tiles"
        )


class _Reading:
    """Reads label files onto images; counts those that turn out to be no labels, or to lie elsewhere."""

    def __init__(self, index: Index, query: LabelQuery, pairs: Pairs) -> None:
        self._index, self._query, self._pairs = index, query, pairs
        self.other = self.elsewhere = 0
        self.last = ""
        self.by_place: dict[LabelFile, list[Row]] = {}
        self.counts: Counter[str] = Counter()

    def read(self, file: LabelFile, tie: Tie, rows: Sequence[Row]) -> list[_Read]:
        """Return the labels of a file on each of the rows that it lies on.

        Raises:
            ReadError: damage, an unknown class, or a file that names images and lies on none of them.
        """
        found: list[_Read] = []
        failed: ReadError | None = None
        # Where every image has its labels, only trying tells a label map from an image that lies there, too.
        for row in rows or self._pairs.rows[:1]:
            try:
                labels = self._labels(file, row)
            except ReadError as error:
                if tie is Tie.PLACE and error.reason in NOT_LABELS:
                    self.other += 1
                    self.last = str(error)
                    return []
                if error.reason != ELSEWHERE:
                    raise
                failed = failed or error
                continue
            if rows and (tie is not Tie.PLACE or (labels.array != IGNORE).any()):
                found.append(_Read(file, row, labels))
        if failed is not None and not found and tie is not Tie.PLACE:
            raise failed
        self.last = str(failed or self.last)
        self.elsewhere += not found
        if tie is Tie.PLACE:
            self.by_place[file] = [one.row for one in found]
        for one in found:
            self.counts.update(dict(one.labels.counts))
        return found

    def _labels(self, file: LabelFile, row: Row) -> Labels:
        query = replace(self._query, identity=self._index.identity(row.key))
        try:
            return read_labels_guarded(file.path, self._index.outline(row.key), query)
        except ReadError as error:
            raise ReadError(f"{error} (image {_image_name(self._index, row)})", error.reason) from None


def _image_name(index: Index, row: Row) -> str:
    return shown(index.paths(row.key)[0])


def _refuse_ambiguous(
    index: Index, found: Mapping[str, Sequence[_Read]], by_place: Mapping[LabelFile, Sequence[Row]]
) -> None:
    """Refuse several files on one image, unless they name different classes, and a volume that fits several patients'.

    Millimetres from some scanner's origin are no address: two heads lie at the same place. Map coordinates are one.
    """
    for several in found.values():
        if len(several) > 1 and not _different_names(several):
            names = ", ".join(shown(one.file.path) for one in several[:3])
            raise ConfigError(
                f"{len(several)} label files lie on the image {_image_name(index, several[0].row)} ({names}"
                f"{' ...' if len(several) > 3 else ''}); give each label file the name of its image"
            )
    for file, rows in by_place.items():
        volumes = [row for row in rows if row.geometry == "volume"]
        if len({row.group for row in volumes}) > 1:
            names = ", ".join(_image_name(index, row) for row in volumes[:3])
            raise ConfigError(
                f"the labels of {shown(file.path)} lie on {len(volumes)} images ({names}"
                f"{' ...' if len(volumes) > 3 else ''}), and nothing else says whose they are; give the label file the "
                "name of its image"
            )


def _different_names(several: Sequence[_Read]) -> bool:
    """Say whether all files name their classes, and no class is in two of them."""
    if not all(one.labels.names for one in several):
        return False
    present = Counter(
        one.labels.names[number].casefold()
        for one in several
        for number in np.unique(one.labels.array)
        if number != IGNORE and one.labels.names[number].casefold() != BACKGROUND
    )
    return all(times == 1 for times in present.values())


def _all_names(found: Mapping[str, Sequence[_Read]]) -> tuple[str, ...]:
    """Return the names of all files, the background first: files number them as they meet them."""
    names: dict[str, str] = {}
    for one in (one for several in found.values() for one in several):
        for name in one.labels.names:
            names.setdefault(name.casefold(), name)
    rest = sorted(folded for folded in names if folded != BACKGROUND)
    return (BACKGROUND, *(names[folded] for folded in rest)) if names else ()


def _merged(index: Index, several: Sequence[_Read], names: Sequence[str], query: LabelQuery) -> LabelledImage:
    """Return one image's labels; of several files that name their classes, the higher number lies on top."""
    first = several[0]
    files = ", ".join(shown(one.file.path) for one in several)
    place = f"{files} (image {_image_name(index, first.row)})"
    if not first.labels.names:
        return LabelledImage(first.row, first.labels.array, False, place)
    numbers = {name.casefold(): number for number, name in enumerate(names)}
    background = query.background if query.classes else 0
    merged = np.full(first.labels.array.shape, background, np.int16)
    ignored = np.ones(merged.shape, dtype=bool)
    for one in several:
        table = np.array([numbers[name.casefold()] for name in one.labels.names], np.int16)
        mapped = np.where(one.labels.array == IGNORE, np.int16(background), table[one.labels.array])
        over = (mapped != background) & ((merged == background) | (mapped > merged))
        merged[over] = mapped[over]
        ignored &= one.labels.array == IGNORE
    merged[ignored] = IGNORE
    return LabelledImage(first.row, merged, True, place)


def _refuse_nothing_named(labelled: Sequence[LabelledImage], query: LabelQuery) -> None:
    """Refuse labels in files that name their classes when labels.values lists none of the names that occur."""
    named = [entry for entry in labelled if entry.named]
    if not named or query.values is None:
        return
    background = query.background
    if not any(((entry.stored != IGNORE) & (entry.stored != background)).any() for entry in named):
        raise ConfigError(
            f"no class in {named[0].place} and the {len(named) - 1} label files beside it is in labels.values "
            f"({', '.join(shown_name(key) for key in list(query.values)[:5])}), which maps the names in such files; "
            "list them there, or leave labels.values out to find head.classes by their names"
        )
