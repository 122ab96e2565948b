"""Classification labels: which class, or classes, each image of an index has. Here, not in the images.

Two sources: a CSV table with a column that names images and one or more with classes (`class_table`, `class_keys`), or
a folder of classes, folder/<class>/... , in which the images themselves lie.

One class column is single label; several columns of 0 and 1, or one of lists "a|b", are multi label. An image without
a row, a row without an image, a row without a class: all are counted. Rows that disagree are an error. File names occur
in error messages only.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from geomed_mae.archives.class_keys import ImageNames, KeyColumn, key_column
from geomed_mae.archives.class_table import Table, is_missing, read_table, whole_number
from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE, LabelQuery
from geomed_mae.readers.regular import shown

UNKNOWN = -1
"""Entry of a multi-label matrix where nothing is said about a class; also how tables write "uncertain"."""
LIST = "|"
"""Separates the classes of an image that stand in one cell."""
_YES = frozenset({"1", "1.0", "true", "yes"})
_NO = frozenset({"0", "0.0", "false", "no"})


@dataclass(frozen=True, slots=True)
class ClassQuery:
    """What is wanted of classification labels.

    Attributes:
        classes: class names in the order of their numbers; () takes the names that are met, sorted.
        values: name or number in the table -> class number; what is not listed is unlabelled.
        key_column: column that names the image; None infers it.
        class_columns: column of classes, or several columns of 0 and 1; () infers them.
        ignore: numbers in the table that mean "not known".
    """

    classes: tuple[str, ...] = ()
    values: Mapping[int | str, int] | None = field(default=None, hash=False)
    key_column: str | None = None
    class_columns: tuple[str, ...] = ()
    ignore: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class ClassMatching:
    """Outcome of matching: every image and every row is counted.

    Attributes:
        labelled: images with labels, in the index's order.
        targets: int16 (images,) class numbers; or with `multi_label` int8 (images, classes): 1, 0 or UNKNOWN.
        classes: class names in the order of their numbers.
        multi_label: whether an image may have several classes.
        images_without: images that no label belongs to.
        rows_without: rows of the table that name no image of the archive.
        rows_unlabelled: rows that name an image and no class.
    """

    labelled: tuple[Row, ...]
    targets: np.ndarray
    classes: tuple[str, ...]
    multi_label: bool
    images_without: int
    rows_without: int = 0
    rows_unlabelled: int = 0

    def counts(self) -> dict[str, int]:
        """Return the counts, for summaries."""
        return {
            "images_labelled": len(self.labelled),
            "images_without_labels": self.images_without,
            "label_rows_without_image": self.rows_without,
            "label_rows_without_class": self.rows_unlabelled,
        }

    def matrix(self) -> np.ndarray:
        """Return int8 (images, classes): 1, 0 or UNKNOWN; one 1 a row where labels are single."""
        if self.multi_label:
            return self.targets
        return (self.targets[:, None] == np.arange(len(self.classes))).astype(np.int8)


def match_classes(index: Index, labels: Path, query: ClassQuery | None = None) -> ClassMatching:
    """Match a table of labels, or a folder of classes, to the images of an index.

    Raises:
        ConfigError: nothing belongs together, columns are missing or could be several, rows disagree; the message says
            what to set.
        ReadError: CLASS_UNKNOWN, naming file and line; or the file cannot be read.
    """
    query = query or ClassQuery()
    labels = Path(labels)
    if labels.is_dir():
        return _from_folders(index, labels, query)
    table = read_table(labels)
    key = key_column(table, ImageNames(index), query.key_column, query.class_columns)
    columns, many = _class_columns(table, key, query)
    if many:
        classes, by_row = _many(table, columns, query)
    else:
        classes, by_row = _single(table, columns[0], query)
    images: dict[int, tuple[int, np.ndarray]] = {}
    unlabelled = 0
    for (line, _), positions, target in zip(table.rows, key.images, by_row, strict=True):
        unlabelled += bool(positions) and bool((target == UNKNOWN).all())
        if (target == UNKNOWN).all():
            continue
        for position in positions:
            earlier, known = images.setdefault(position, (line, target))
            if not np.array_equal(known, target):
                raise ConfigError(
                    f"lines {earlier} and {line} of {table.name} say different things about one image; keep one of them"
                )
    rows_without = len(table.rows) - key.matched
    targets = {position: target for position, (_, target) in images.items()}
    return _matching(index, targets, classes, many, place=table.name, rows=(rows_without, unlabelled))


def _matching(
    index: Index,
    targets: Mapping[int, np.ndarray],
    classes: tuple[str, ...],
    many: bool,
    *,
    place: str,
    rows: tuple[int, int],
) -> ClassMatching:
    if not targets:
        raise ConfigError(f"no image of the {len(index)} in the archive gets a class from {place}")
    positions = sorted(targets)
    stacked = np.stack([targets[position] for position in positions])
    return ClassMatching(
        labelled=tuple(index.rows[position] for position in positions),
        targets=stacked.astype(np.int8) if many else stacked[:, 0].astype(np.int16),
        classes=classes,
        multi_label=many,
        images_without=len(index) - len(positions),
        rows_without=rows[0],
        rows_unlabelled=rows[1],
    )


# ------------------------------------------------------------------------------------------------ folder of classes


def _from_folders(index: Index, folder: Path, query: ClassQuery) -> ClassMatching:
    """Take the first folder below `folder` on the way to an image's files as its class."""
    root = folder.resolve()
    names: dict[int, str] = {}
    for position, row in enumerate(index.rows):
        below = {path.relative_to(root).parts for path in index.paths(row.key) if path.is_relative_to(root)}
        found = {parts[0] for parts in below if len(parts) > 1}
        if len(found) > 1:
            raise ConfigError(f"the files of one image lie in {len(found)} class folders of '{shown(folder)}'")
        if found:
            names[position] = found.pop()
    if not names:
        raise ConfigError(
            f"none of the {len(index)} images lies in a folder below '{folder}'; give a folder of classes that holds "
            "the images (folder/<class>/file), or a CSV table with a column that names them"
        )
    classes = query.classes or _met(names.values(), query)
    place = f"the folder '{shown(folder)}'"
    asked = LabelQuery(classes=classes, values=_texts(query.values))
    numbers = {position: _number(name, asked, query, place) for position, name in names.items()}
    targets = {position: np.array([number]) for position, number in numbers.items() if number != IGNORE}
    return _matching(index, targets, classes, False, place=place, rows=(0, 0))


# ------------------------------------------------------------------------------------------------------------ tables


def _texts(values: Mapping[int | str, int] | None) -> dict[str, int] | None:
    return None if values is None else {str(key): number for key, number in values.items()}


def _known(query: ClassQuery) -> set[str]:
    """Names that are classes or lead to one, case folded."""
    return {str(name).strip().casefold() for name in (query.classes if query.values is None else query.values)}


def _met(names: Iterable[str], query: ClassQuery) -> tuple[str, ...]:
    """Return the class names that were met, sorted; numbers by value."""
    if query.values is not None:
        raise ConfigError("labels.values leads to class numbers; name the classes in head.classes")
    met = {name.casefold(): name for name in names}
    numbers = {name: whole_number(name) for name in met.values()}
    if all(number is not None for number in numbers.values()):
        return tuple(sorted({str(number) for number in numbers.values()}, key=int))
    return tuple(sorted(met.values(), key=str.casefold))


def _number(text: str, asked: LabelQuery, query: ClassQuery, place: str) -> int:
    """Return a class number, IGNORE where the text says nothing or is left out by `values`."""
    known = _known(query) or {name.casefold() for name in asked.classes}
    number = whole_number(text)
    if text.casefold() in known:
        pass
    elif is_missing(text) or number == IGNORE or number in query.ignore:
        return IGNORE
    elif number is not None:
        text = str(number)
        if text not in known and query.values is None and 0 <= number < len(asked.classes):
            return number
    found = asked.number_of(text, place)
    return IGNORE if found is None else found


def _class_columns(table: Table, key: KeyColumn, query: ClassQuery) -> tuple[list[str], bool]:
    """Return the columns that hold classes, and whether an image may have several."""
    if query.class_columns:
        columns = [table.column(name, "labels.class_columns") for name in query.class_columns]
    else:
        columns = _inferred(table, key, query)
    if len(columns) > 1:
        return columns, True
    known = _known(query)
    return columns, any(LIST in cell and cell.casefold() not in known for cell in table.cells(columns[0]))


def _inferred(table: Table, key: KeyColumn, query: ClassQuery) -> list[str]:
    """Infer the class columns from the names of the classes, or because there is no other column."""
    cells = {
        name: [cell for cell in table.cells(name) if not is_missing(cell)] for name in table.columns if name != key.name
    }
    others = [name for name, texts in cells.items() if texts]
    known = _known(query)
    flags = [name for name in others if name.casefold() in known and _are_flags(cells[name])]
    if len(flags) > 1:
        return flags
    named = [
        name
        for name in others
        if known and all(part.strip().casefold() in known for cell in cells[name] for part in cell.split(LIST))
    ]
    for options in (named, others):
        if len(options) == 1:
            return options
    if not others:
        raise ConfigError(f"{table.name} has no column beside '{key.name}' that holds anything")
    raise ConfigError(
        f"several columns of {table.name} could hold the class; set labels.class_columns to one of them, or to several "
        f"of 0 and 1: {table.listed()}"
    )


def _are_flags(cells: Sequence[str]) -> bool:
    return all(cell.casefold() in _YES | _NO or whole_number(cell) == UNKNOWN for cell in cells)


def _single(table: Table, column: str, query: ClassQuery) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return class names and one (1,) class number a row, UNKNOWN where there is none."""
    cells = table.cells(column)
    said = [cell for cell in cells if not is_missing(cell) and whole_number(cell) not in (IGNORE, *query.ignore)]
    classes = query.classes or _met(said, query)
    asked = LabelQuery(classes=classes, values=_texts(query.values))
    numbers = [
        _number(cell, asked, query, f"line {line} of {table.name}")
        for (line, _), cell in zip(table.rows, cells, strict=True)
    ]
    return classes, [np.array([number]) for number in numbers]


def _many(table: Table, columns: Sequence[str], query: ClassQuery) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Return class names and one (classes,) row of 1, 0 and UNKNOWN a row."""
    if len(columns) == 1:
        return _lists(table, columns[0], query)
    classes = query.classes or tuple(columns)
    asked = LabelQuery(classes=classes, values=_texts(query.values))
    numbers = [asked.number_of(column, f"the header of {table.name}") for column in columns]
    targets = []
    cells = [table.cells(column) for column in columns]
    for place, (line, _) in enumerate(table.rows):
        target = np.full(len(classes), UNKNOWN)
        for column, number, texts in zip(columns, numbers, cells, strict=True):
            if number is not None:
                # Two columns may lead to one class: it is there when either says so.
                target[number] = max(target[number], _flag(texts[place], query, column, f"line {line} of {table.name}"))
        targets.append(target)
    return classes, targets


def _flag(cell: str, query: ClassQuery, column: str, place: str) -> int:
    if cell.casefold() in _YES:
        return 1
    if cell.casefold() in _NO:
        return 0
    number = whole_number(cell)
    if is_missing(cell) or number == UNKNOWN or number in query.ignore:
        return UNKNOWN
    raise ConfigError(
        f"{place} has neither 0 nor 1 in the column '{column}'; columns of a multi-label table hold these, or "
        f"{UNKNOWN} or nothing for what is not known"
    )


def _lists(table: Table, column: str, query: ClassQuery) -> tuple[tuple[str, ...], list[np.ndarray]]:
    """Read cells such as "effusion|nodule": what is listed is there, everything else is not."""
    lists = [[part.strip() for part in cell.split(LIST)] for cell in table.cells(column)]
    classes = query.classes or _met([part for parts in lists for part in parts if not is_missing(part)], query)
    asked = LabelQuery(classes=classes, values=_texts(query.values))
    targets = []
    for (line, _), parts in zip(table.rows, lists, strict=True):
        place = f"line {line} of {table.name}"
        empty = len(parts) == 1 and is_missing(parts[0]) and parts[0].casefold() not in _known(query)
        target = np.full(len(classes), UNKNOWN if empty else 0)
        numbers = [] if empty else [asked.number_of(part, place) for part in parts if part]
        target[[number for number in numbers if number is not None]] = 1
        targets.append(target)
    return classes, targets
