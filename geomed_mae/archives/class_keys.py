"""Which images a cell of a table names: by file name or path, by index key, or by an identifier in the headers.

Identifiers and paths are looked up here and go nowhere: messages name lines and columns, never what stands there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from geomed_mae.archives.class_table import Table
from geomed_mae.archives.index import Index
from geomed_mae.archives.label_pairs import stem_of
from geomed_mae.errors import ConfigError

KINDS = ("file", "key", "instance", "series", "stem", "study", "patient")
"""What a column can hold, the most telling first: file name or path, index key, UIDs, file name without its ending."""

ONE_IMAGE = frozenset({"file", "stem"})
"""Kinds of which one value means one file; of the others, one value may mean a patient's many images."""


@dataclass(frozen=True, slots=True)
class KeyColumn:
    """The column that says which image a row is about, what it holds, and images (positions in the index) a row."""

    name: str
    kind: str
    images: tuple[tuple[int, ...], ...]

    @property
    def matched(self) -> int:
        """Number of rows that name an image."""
        return sum(bool(entry) for entry in self.images)


class ImageNames:
    """Everything by which the images of an index can be named."""

    def __init__(self, index: Index) -> None:
        self._by_kind: dict[str, dict[str, set[int]]] = {kind: {} for kind in KINDS}
        self._files: dict[str, dict[Path, set[int]]] = {}
        self._paths: list[frozenset[Path]] = []
        for position, row in enumerate(index.rows):
            paths = index.paths(row.key)
            self._paths.append(frozenset(paths))
            for path in paths:
                self._files.setdefault(path.name, {}).setdefault(path, set()).add(position)
            self._add("key", row.key, position)
            self._add("stem", stem_of(paths), position)
            for kind, value in index.identity(row.key):
                # A patient is "number|issuer of the number"; tables have the number alone.
                self._add(kind, value.rpartition("|")[0] if kind == "patient" and "|" in value else value, position)

    def _add(self, kind: str, value: str, position: int) -> None:
        if kind in self._by_kind and value:
            self._by_kind[kind].setdefault(value, set()).add(position)

    def images(self, kind: str, value: str) -> tuple[int, ...]:
        """Return the positions of the images that `value` names as a `kind`, sorted."""
        if not value:
            return ()
        found = self._by_kind[kind].get(value, set()) if kind != "file" else self._of_file(value)
        return tuple(sorted(found))

    def one_file(self, images: Sequence[int]) -> bool:
        """Return whether images all come from the same files: volumes or frames of one."""
        return len({self._paths[position] for position in images}) == 1

    def _of_file(self, value: str) -> set[int]:
        """Images of the files whose path ends like `value`, as far as that is needed to tell them apart."""
        parts = PurePosixPath(value.replace("\\", "/")).parts
        found = self._files.get(parts[-1], {}) if parts else {}
        if len(found) > 1:
            common = {path: _common(path.parts, parts) for path in found}
            best = max(common.values())
            found = {path: positions for path, positions in found.items() if common[path] == best}
        return set().union(*found.values())


def _common(path: Sequence[str], parts: Sequence[str]) -> int:
    """Number of parts that two paths share at their ends."""
    count = 0
    for one, other in zip(reversed(path), reversed(parts), strict=False):
        if one != other:
            break
        count += 1
    return count


def key_column(table: Table, names: ImageNames, wanted: str | None, not_these: Sequence[str]) -> KeyColumn:
    """Return the column that names images: `wanted`, or the one that does so most tellingly.

    Raises:
        ConfigError: no column names images, several do and disagree, or a row names several images by file name.
    """
    _check_header(table, names)
    if wanted is not None:
        column = table.column(wanted, "labels.key_column")
        found = _best(table, column, names)
        if found is None:
            raise ConfigError(
                f"the column '{column}' of {table.name} names no image of the archive: neither by file name or path, "
                "nor by index key, nor by a series, study, instance or patient identifier in a header"
            )
    else:
        found = _inferred(table, names, not_these)
    for (line, _), images in zip(table.rows, found.images, strict=True):
        if found.kind in ONE_IMAGE and len(images) > 1 and not names.one_file(images):
            raise ConfigError(
                f"line {line} of {table.name} names {len(images)} images by the file name in '{found.name}'; give "
                "paths that tell them apart, or another labels.key_column"
            )
    return found


def _best(table: Table, column: str, names: ImageNames) -> KeyColumn | None:
    """Return a column as what most of its rows match, None where none does."""
    cells = table.cells(column)
    options = [KeyColumn(column, kind, tuple(names.images(kind, cell) for cell in cells)) for kind in KINDS]
    found = max(options, key=lambda option: option.matched)  # the first of equals: the most telling
    return found if found.matched else None


def _inferred(table: Table, names: ImageNames, not_these: Sequence[str]) -> KeyColumn:
    options = [found for name in table.columns if name not in not_these and (found := _best(table, name, names))]
    if not options:
        raise ConfigError(
            f"no column of {table.name} names images of the archive by file name, path, index key or identifier; its "
            f"columns are {table.listed()}; is it a table of other images?"
        )
    most = max(option.matched for option in options)
    telling = [option for option in options if 2 * option.matched >= most]
    rank = min(KINDS.index(option.kind) for option in telling)
    best = [option for option in telling if KINDS.index(option.kind) == rank]
    if len({option.images for option in best}) > 1:
        several = ", ".join(f"'{option.name}'" for option in best)
        raise ConfigError(
            f"the columns {several} of {table.name} name different images; set labels.key_column to one of them"
        )
    return best[0]


def _check_header(table: Table, names: ImageNames) -> None:
    """Refuse a first line that is data: it could be an identifier, so that no message may list it."""
    if any(names.images(kind, name) for kind in KINDS if kind != "stem" for name in table.columns):
        raise ConfigError(f"the first line of {table.name} names an image; a table of labels begins with column names")
