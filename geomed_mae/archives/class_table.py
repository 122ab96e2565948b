"""A table of labels as people keep them: CSV with commas, semicolons or tabs, as spreadsheets and scripts write it."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from geomed_mae.errors import ConfigError
from geomed_mae.readers.regular import check_regular, shown

DELIMITERS = (",", ";", "\t")
MAX_BYTES = 512 << 20
"""Some ten million rows."""
MISSING = frozenset({"", "nan", "na", "n/a", "#n/a", "null", "<na>"})
"""Cells that say nothing. "None" is not among them: it is a class of many a radiologist's."""
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True, slots=True)
class Table:
    """Column names, and rows as (line of the file at which the row ends, one text a column), blanks taken off."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[int, tuple[str, ...]], ...]

    def cells(self, column: str) -> list[str]:
        """Return the texts of a column, one a row."""
        at = self.columns.index(column)
        return [row[at] for _, row in self.rows]

    def column(self, wanted: str, key: str) -> str:
        """Return the column called `wanted`, case does not matter; `key` is the recipe's, for the message.

        Raises:
            ConfigError: there is none; the columns are listed.
        """
        found = [name for name in self.columns if name == wanted] or [
            name for name in self.columns if name.casefold() == wanted.strip().casefold()
        ]
        if len(found) != 1:
            raise ConfigError(f"{key} names the column '{wanted}', but those of {self.name} are {self.listed()}")
        return found[0]

    def listed(self) -> str:
        """Return the column names for a message."""
        return ", ".join(f"'{name}'" for name in self.columns)


def is_missing(cell: str) -> bool:
    """Return whether a cell says nothing."""
    return cell.casefold() in MISSING


def whole_number(cell: str) -> int | None:
    """Return a cell as whole number, also where a script has made "1.0" of it, or None."""
    try:
        number = float(cell)
        return int(number) if number.is_integer() else None
    except (ValueError, OverflowError):
        return None


def read_table(path: Path) -> Table:
    """Read a CSV file with a header row; the delimiter is the one that makes most columns of the header.

    Text is UTF-8 (with or without BOM), UTF-16 with BOM, or else Latin-1.

    Raises:
        ReadError: not a readable regular file.
        ConfigError: no header, no rows, doubled column names, a row with too many cells, or not a text file.
    """
    resolved = check_regular(path)
    if resolved.stat().st_size > MAX_BYTES:
        raise ConfigError(f"{shown(path)} has more than {MAX_BYTES >> 20} MiB; is it a table of labels?")
    text = _text(resolved.read_bytes(), path)
    try:
        width, delimiter = max(
            (len(next(csv.reader(io.StringIO(text), delimiter=entry, strict=True), [])), -rank, entry)
            for rank, entry in enumerate(DELIMITERS)
        )[::2]
        if width < 2:
            raise ConfigError(
                f"{shown(path)} is no table of labels: its first line has one column; separate columns by commas, "
                "semicolons or tabs"
            )
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        columns = tuple(cell.strip() for cell in next(reader))
        rows = tuple(
            (reader.line_num, _filled(row, len(columns), reader.line_num, path))
            for row in reader
            if any(cell.strip() for cell in row)
        )
    except csv.Error as error:
        raise ConfigError(f"{shown(path)} is no table of labels: {error}") from None
    # A column without a name is the row number that data frames write; it is kept under its place.
    columns = tuple(name or f"column {number}" for number, name in enumerate(columns, start=1))
    if doubled := sorted({name for name in columns if columns.count(name) > 1}):
        raise ConfigError(f"{shown(path)} has the column '{doubled[0]}' twice; rename one")
    if not rows:
        raise ConfigError(f"{shown(path)} has a header row and no other")
    return Table(shown(path), columns, rows)


def _text(content: bytes, path: Path) -> str:
    if content.startswith(_UTF16):
        return content.decode("utf-16", errors="replace")
    if b"\0" in content:
        raise ConfigError(f"{shown(path)} is no table of labels: it is not a text file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("latin-1")


def _filled(row: Sequence[str], width: int, line: int, path: Path) -> tuple[str, ...]:
    """Return a row of `width` cells: cells missing at its end are empty."""
    extra = [cell for cell in row[width:] if cell.strip()]
    if extra:
        raise ConfigError(
            f"line {line} of {shown(path)} has {len(row)} cells, its header {width}; put quotes around texts that hold "
            "the delimiter"
        )
    return tuple(cell.strip() for cell in (*row[:width], *[""] * (width - len(row))))
