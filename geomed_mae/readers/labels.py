"""What a label file is asked for and what it answers: class numbers on an image's grid.

Two kinds of label files exist. Rasters and volumes of numbers answer with their stored values, which a recipe maps to
classes. Files that name what they outline (DICOM SEG, RTSTRUCT, vectors) are asked for names and answer with class
numbers; where outlines overlap, the class with the higher number lies on top, so that a recipe's order of classes
decides and not the file's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from geomed_mae.errors import ReadError, suggest
from geomed_mae.readers.reasons import Reason

IGNORE = -1
"""Class number of pixels that no loss and no metric counts."""

BACKGROUND = "background"
"""Class of what no outline covers, where a recipe has a class of this name; without one it is IGNORE."""


@dataclass(frozen=True, slots=True)
class LabelQuery:
    """What is wanted of a label file.

    Attributes:
        identity: the image's private (kind, value) pairs (see `Source.identity`), which a label file may refer to.
        classes: class names in the order of their numbers; () when the names in the file shall be numbered as met.
        values: name in the file (case does not matter) -> class number; names that are not listed are left out.
        column: attribute of a vector file that holds the class.
    """

    identity: tuple[tuple[str, str], ...] = ()
    classes: tuple[str, ...] = ()
    values: Mapping[str, int] | None = field(default=None, hash=False)
    column: str | None = None

    def known(self, kind: str) -> frozenset[str]:
        """Return the image's identity values of a kind, for example "frame"."""
        return frozenset(value for have, value in self.identity if have == kind)

    def number_of(self, name: str, place: str) -> int | None:
        """Return the class number of a name found in a file, None for one that is to be left out.

        Raises:
            ReadError: CLASS_UNKNOWN, naming what is known; `place` is the file as messages may show it.
        """
        wanted = name.strip().casefold()
        if self.values is not None:
            return next((number for key, number in self.values.items() if str(key).strip().casefold() == wanted), None)
        for number, known in enumerate(self.classes):
            if known.strip().casefold() == wanted:
                return number
        raise ReadError(
            f"{place} has the class '{name}', which is none of {', '.join(self.classes)}; "
            f"{suggest(name, self.classes)}; name it in head.classes, or map names with labels.values",
            Reason.CLASS_UNKNOWN.name,
        )

    @property
    def background(self) -> int:
        """Class number of what no outline covers."""
        names = [name.strip().casefold() for name in self.classes]
        return names.index(BACKGROUND) if BACKGROUND in names else IGNORE


@dataclass(frozen=True, slots=True, eq=False)
class Labels:
    """An answer: `array` int16 ([Z,] Y, X) on an image's grid, IGNORE where nothing is known.

    With `names`, the values are class numbers and index it; without, they are the stored values.
    """

    array: np.ndarray
    names: tuple[str, ...] = ()
