"""The page: sections of figures, tables and records, rendered into one HTML file without script or network."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from geomed_mae.errors import OutputError

TEMPLATE = Path(__file__).parents[1] / "templates" / "report.html.j2"


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture with a title and a sentence that says what to see; `source` is a data URI."""

    title: str
    source: str
    caption: str


@dataclass(frozen=True, slots=True)
class Strip:
    """Pictures side by side, (name, data URI) each, under one title; of one height and in true proportion."""

    title: str
    pictures: list[tuple[str, str]]
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table with one header row; `note` is a sentence under it."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    note: str = ""


@dataclass(slots=True)
class Section:
    """One part of a report, usually a run.

    `verdict` is (how it is set, see the template's styles; sentence), `notices` are sentences that a reader must not
    miss, `cards` are (title, HTML) of our own making, `records` are files as they are.
    """

    title: str
    lead: str
    verdict: tuple[str, str] | None = None
    notices: list[str] = field(default_factory=list)
    tiles: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure | Strip] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    cards: list[tuple[str, str]] = field(default_factory=list)
    records: list[tuple[str, str]] = field(default_factory=list)


def picture(data: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"


def shown(value: Any) -> str:
    """Return a number or a text as a reader wants to see it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def write_page(out: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write a self-contained HTML page; a reader sees the old file or the new one.

    Raises:
        OutputError: it cannot be written.
    """
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    html = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        title=title, lead=lead, sections=sections, version=version("geomed-mae")
    )
    partial = out.with_name(f".{out.name}.partial")
    try:
        partial.write_text(html, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        raise OutputError(f"the report cannot be written to '{out}': {error.strerror}") from error
    return out
