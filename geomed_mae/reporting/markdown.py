"""The little of Markdown that our own cards use, as HTML: headings, paragraphs, lists, tables, code. All is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html import escape

CODE, BOLD = re.compile(r"`([^`]+)`"), re.compile(r"\*\*([^*]+)\*\*")
FRONT = re.compile(r"\A---\n.*?\n---\n", re.DOTALL)
DOWN = 2
"""Headings of a card stand this much lower on the page."""


def to_html(text: str) -> str:
    """Return HTML of a Markdown text; front matter is left out, links stay words."""
    blocks = re.split(r"\n\s*\n", FRONT.sub("", text).strip("\n"))
    return "\n".join(piece for block in blocks for piece in _block(block.splitlines()))


def _block(lines: list[str]) -> Iterator[str]:
    if not lines:
        return
    heading = re.match(r"(#{1,4})\s+(.*)", lines[0])
    if heading:
        level = min(len(heading[1]) + DOWN, 6)
        yield f"<h{level}>{_inline(heading[2])}</h{level}>"
        yield from _block(lines[1:])
    elif all(line.startswith("    ") for line in lines):
        yield f"<pre>{escape(chr(10).join(line[4:] for line in lines))}</pre>"
    elif len(lines) > 1 and lines[0].startswith("|") and re.fullmatch(r"[|\s:-]+", lines[1]):
        head, *rows = [_cells(line) for line in (lines[0], *lines[2:]) if line.startswith("|")]
        yield "<table><thead><tr>" + "".join(f"<th>{cell}</th>" for cell in head) + "</tr></thead><tbody>"
        yield from ("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
        yield "</tbody></table>"
    elif all(re.match(r"\s*- |\s{2,}", line) for line in lines):
        items = re.split(r"\n\s*- ", "\n" + "\n".join(lines))[1:]
        yield "<ul>" + "".join(f"<li>{_inline(' '.join(item.split()))}</li>" for item in items) + "</ul>"
    else:
        yield f"<p>{_inline(' '.join(line.strip() for line in lines))}</p>"


def _cells(line: str) -> list[str]:
    return [_inline(cell.strip()) for cell in line.strip().strip("|").split("|")]


def _inline(text: str) -> str:
    return BOLD.sub(r"<b>\1</b>", CODE.sub(r"<code>\1</code>", escape(text)))
