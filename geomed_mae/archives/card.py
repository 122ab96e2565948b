"""Data cards: front matter that machines read, prose that people read.

`draft_card` writes what a scan can know. What it cannot know (licence, origin, consent) is asked for, not invented.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError

REQUIRED = ("name", "title", "licence", "source", "modality", "channels", "spacing", "split_unit", "deidentified")
"""Front-matter fields that every card of a packaged recipe has."""

_FENCE = "---\n"


def read_card(path: Path) -> dict[str, Any]:
    """Return a data card's front matter.

    Raises:
        ConfigError: no front matter, or a required field is missing.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    text = path.read_text(encoding="utf-8")
    parts = text.split(_FENCE, 2)
    if len(parts) != 3 or parts[0]:
        raise ConfigError(f"{path.name} is no data card: it does not begin with front matter between two lines of ---")
    try:
        front = YAML(typ="safe", pure=True).load(parts[1])
    except YAMLError as error:
        raise ConfigError(f"{path.name}: the front matter is not valid YAML: {error}") from error
    missing = [name for name in REQUIRED if not isinstance(front, dict) or front.get(name) is None]
    if missing:
        raise ConfigError(f"{path.name}: the front matter has no '{missing[0]}'")
    return front


def _span(values: list[float]) -> str:
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _modality_section(name: str, rows: list[Row]) -> list[str]:
    unit = "m" if rows[0].geometry == "raster" else "mm"
    spacings = [row.spacing for row in rows if row.spacing]
    shapes = [" x ".join(map(str, row.shape)) for row in rows]
    lines = [
        f"### {name}",
        "",
        f"- images: {len(rows)} in {len({row.group for row in rows})} groups (patients or scenes)",
        f"- size: {', '.join(f'{count} of {shape}' for shape, count in Counter(shapes).most_common(4))}",
        f"- stored as: {', '.join(sorted({row.dtype for row in rows}))}",
        f"- valid pixels: {sum(row.valid_fraction for row in rows) / len(rows):.1%}",
    ]
    if spacings:
        axes = [_span([round(spacing[axis], 4) for spacing in spacings]) for axis in range(len(spacings[0]))]
        lines.append(f"- spacing ({', '.join(('slice', 'row', 'column')[-len(axes) :])}): {' / '.join(axes)} {unit}")
    if flags := Counter(flag for row in rows for flag in row.flags):
        lines.append(f"- flags: {', '.join(f'{count} x {flag}' for flag, count in flags.most_common())}")
    lines += ["", "| channel | kind | unit | 0.5 % | median | 99.5 % |", "|---|---|---|---|---|---|"]
    seen: dict[str, tuple[Any, list[Any]]] = {}
    for row in rows:
        for channel, statistics in zip(row.channels, row.statistics, strict=True):
            seen.setdefault(channel.name, (channel, []))[1].append(statistics)
    for channel, entries in seen.values():
        spans = (_span([round(getattr(entry, name), 4) for entry in entries]) for name in ("p005", "median", "p995"))
        lines.append(f"| {channel.name} | {channel.kind} | {channel.unit} | {' | '.join(spans)} |")
    return [*lines, ""]


def draft_card(index: Index) -> str:
    """Return a data card in Markdown with everything that the scan knows, and questions for the rest."""
    by_modality: dict[str, list[Row]] = {}
    for row in index:
        by_modality.setdefault(Path(row.modality).stem, []).append(row)
    counts = index.ledger.counts
    front = [
        "---",
        "name: draft",
        f"images: {len(index)}",
        f"groups: {len({row.group for row in index})}",
        f"files: {counts['files']}",
        f"modality: [{', '.join(sorted(by_modality))}]",
        "---",
    ]
    body = [
        "# Data card (draft)",
        "",
        "Drafted by a scan. Not known to it, and to be stated by the archive's owner before anyone else uses the data: "
        "licence and origin; how subjects or scenes were chosen; consent and de-identification; known faults; what the "
        "data should not be used for.",
        "",
        "## Files",
        "",
        f"{index.ledger.summary()}.",
        "",
        "## Images",
        "",
    ]
    for name, rows in sorted(by_modality.items()):
        body += _modality_section(name, rows)
    return "\n".join([*front, *body])
