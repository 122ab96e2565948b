"""What a label file is asked for and what it answers: class numbers on an image's grid.

Two kinds of label files exist. Rasters and volumes of numbers answer with their stored values, which a recipe maps to
classes. Files that name what they outline (DICOM SEG, RTSTRUCT, vectors) are asked for names and answer with class
numbers; where outlines overlap, the class with the higher number lies on top, so that a recipe's order of classes
decides and not the file's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from geomed_mae.errors import ReadError, suggest
from geomed_mae.readers.reasons import Reason

IGNORE = -1
"""Class number of pixels that no loss and no metric counts."""

BACKGROUND = "background"
"""Class of what no outline covers, where a recipe has a class of this name; without one it is IGNORE."""

MAX_NAME = 64
"""Characters of a class name (DICOM's LO has as many) that a message repeats."""


@dataclass(frozen=True, slots=True)
class LabelQuery:
    """What is wanted of a label file.

    Attributes:
        identity: the image's private (kind, value) pairs (see `Source.identity`), which a label file may refer to.
        classes: class names in the order of their numbers; () when the names in the file shall be numbered as met
            (see `ClassNumbers`).
        values: name in the file (case does not matter) -> class number; names that are not listed are left out.
        column: attribute of a vector file that holds the class.
        ignore: stored values of rasters and volumes that mean "not known": they become IGNORE.
        resample: "nearest" allows a volume of labels on another grid to be resampled onto the image; None refuses it.
    """

    identity: tuple[tuple[str, str], ...] = ()
    classes: tuple[str, ...] = ()
    values: Mapping[str, int] | None = field(default=None, hash=False)
    column: str | None = None
    ignore: tuple[int, ...] = ()
    resample: str | None = None

    def known(self, kind: str) -> frozenset[str]:
        """Return the image's identity values of a kind, for example "frame"."""
        return frozenset(value for have, value in self.identity if have == kind)

    def number_of(self, name: str, place: str, *, also: Sequence[str] = ()) -> int | None:
        """Return the class number of a name found in a file, None for one that is to be left out.

        Args:
            name: as the file spells it.
            place: the file as messages may show it.
            also: other names of the same thing, tried after `name`: a code's meaning, a code's value.

        Raises:
            ReadError: CLASS_UNKNOWN, naming what is known.
        """
        wanted = [entry.strip().casefold() for entry in (name, *also) if entry.strip()]
        table = enumerate(self.classes) if self.values is None else ((n, str(key)) for key, n in self.values.items())
        numbers = {known.strip().casefold(): number for number, known in table}
        found = next((numbers[entry] for entry in wanted if entry in numbers), None)
        if found is not None or self.values is not None:
            return found
        raise ReadError(
            f"{place} has the class '{shown_name(name)}', which is none of {', '.join(self.classes)}; "
            f"{suggest(name, self.classes)}; name it in head.classes, or map names with labels.values",
            Reason.CLASS_UNKNOWN.name,
        )

    @property
    def background(self) -> int:
        """Class number of what no outline covers."""
        names = [name.strip().casefold() for name in self.classes]
        return names.index(BACKGROUND) if BACKGROUND in names else IGNORE


class ClassNumbers:
    """Numbers for the class names of one file: the query's, or with none given the file's own in the order met.

    As met, 0 is the background: a file that outlines one kind of thing tells two classes apart.
    """

    def __init__(self, query: LabelQuery, place: str) -> None:
        self._query, self._place = query, place
        self._as_met = not query.classes and query.values is None
        self._met: list[str] = [BACKGROUND] if self._as_met else []

    def number_of(self, name: str, also: Sequence[str] = ()) -> int | None:
        """Return the class number of a name, None for one that is to be left out; see `LabelQuery.number_of`.

        Raises:
            ReadError: CLASS_UNKNOWN.
        """
        if not self._as_met:
            return self._query.number_of(name, self._place, also=also)
        wanted = name.strip() or next((entry.strip() for entry in also if entry.strip()), "unnamed")
        folded = [entry.casefold() for entry in self._met]
        if wanted.casefold() not in folded:
            self._met.append(wanted)
            return len(self._met) - 1
        return folded.index(wanted.casefold())

    @property
    def background(self) -> int:
        """Class number of what no outline covers."""
        return 0 if self._as_met else self._query.background

    @property
    def names(self) -> tuple[str, ...]:
        """Class names in the order of their numbers."""
        return tuple(self._met) if self._as_met else self._query.classes


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """An answer: `array` int16 ([Z,] Y, X) on an image's grid, IGNORE where nothing is known.

    With `names`, the values are class numbers and index it; without, they are the stored values. `counts` says what was
    found on the way and is no fault, for example how many label voxels lie off the image:
    ("label_voxels_outside_image", 12).
    """

    array: np.ndarray
    names: tuple[str, ...] = ()
    counts: tuple[tuple[str, int], ...] = ()


def shown_name(name: str) -> str:
    """Return a name found in a file fit for one line of a message: bounded, control characters escaped."""
    text = "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in name)
    return text if len(text) <= MAX_NAME else f"{text[:MAX_NAME]}..."
