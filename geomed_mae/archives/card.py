"""Data cards: front matter that machines read, prose that people read.

`draft_card` writes what a scan can know. What it cannot know (licence, origin, consent) is asked for, not invented.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.pictures import CardPictures
from geomed_mae.archives.places import rounded_bounds
from geomed_mae.archives.split_file import Split
from geomed_mae.archives.statistics import ChannelStatistics
from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel
from geomed_mae.readers.reasons import Reason, status

REQUIRED = ("name", "title", "licence", "source", "modality", "channels", "spacing", "split_unit", "deidentified")
"""Front-matter fields that every card of a packaged recipe has."""

SHOWN = 4
"""Different values that a line of the card lists before it counts the others."""

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


def draft_card(index: Index, split: Split | None = None, pictures: Sequence[CardPictures] = ()) -> str:
    """Return a data card in Markdown with everything that the scan knows, and questions for the rest.

    Args:
        index: the images.
        split: its stored split, if there is one.
        pictures: what `draw_card` has drawn beside the card.
    """
    by_modality: dict[str, list[Row]] = {}
    for row in index:
        by_modality.setdefault(Path(row.modality).stem, []).append(row)
    drawn = {entry.modality: entry for entry in pictures}
    front = [
        "---",
        "name: draft",
        f"images: {len(index)}",
        f"groups: {len({row.group for row in index})}",
        f"files: {index.ledger.counts['files']}",
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
        *_files(index),
        *_overview(index.rows),
    ]
    if pictures:
        body += [
            "The pictures show pixels, and pixels may show a person (burned-in text, a face, a house): look at them "
            "before this folder is passed on, or scan with --no-pictures.",
            "",
        ]
    for name, rows in sorted(by_modality.items()):
        body += _modality(name, rows, drawn.get(name))
    return "\n".join([*front, *body, *(_split(index, split) if split else [])])


def _files(index: Index) -> list[str]:
    lines = ["## Files", "", f"{index.ledger.summary()}.", ""]
    if reasons := index.ledger.reasons:
        lines += _table(
            ("reason", "meaning", "status", "files"),
            [(name, Reason[name].value, status(Reason[name]), count) for name, count in reasons.items()],
        )
    return lines


def _overview(rows: Sequence[Row]) -> list[str]:
    groups = Counter(row.group for row in rows)
    flags = Counter(flag for row in rows for flag in row.flags)
    lines = [
        "## Images",
        "",
        f"- {len(rows)} images in {len(groups)} groups (patients or scenes, with everything that overlaps or looks the "
        f"same); the largest group has {max(groups.values(), default=0)}",
        f"- same pixels as another image: {flags['DUPLICATE_PIXELS']}",
        f"- look like another image, with other pixels: {flags['NEAR_DUPLICATE']}",
    ]
    if bounds := rounded_bounds(row.footprint for row in rows):
        west, south, east, north = bounds
        placed = sum(row.footprint is not None for row in rows)
        lines.append(
            f"- on the globe, to whole degrees: longitude {west:g} to {east:g}, latitude {south:g} to {north:g} "
            f"({placed} images; {len(rows) - placed} have no place)"
        )
    return [*lines, ""]


def _modality(name: str, rows: Sequence[Row], pictures: CardPictures | None) -> list[str]:
    unit = "m" if rows[0].geometry == "raster" else "mm"
    sizes = Counter(" x ".join(map(str, row.shape)) for row in rows)
    spacings = Counter(
        " x ".join(f"{value:.4g}" for value in row.spacing) if row.spacing else "unknown" for row in rows
    )
    axes = " x ".join(("slices", "rows", "columns")[-len(rows[0].shape) :])
    lines = [
        f"### {name}",
        "",
        f"- images: {len(rows)} in {len({row.group for row in rows})} groups",
        f"- size ({axes}): {_most(sizes)}",
        f"- spacing in {unit} ({axes}): {_most(spacings)}",
    ]
    if known := [row.spacing for row in rows if row.spacing]:
        spans = [_span([values[axis] for values in known]) for axis in range(len(known[0]))]
        lines[-1] += f"; from {' / '.join(spans)}" if len(spacings) > SHOWN else ""
    lines += [
        f"- stored as: {_most(Counter(row.dtype for row in rows))}",
        f"- valid pixels: {_span([100 * row.valid_fraction for row in rows])} %, "
        f"mean {100 * statistics.fmean(row.valid_fraction for row in rows):.4g} %",
    ]
    if flags := Counter(flag for row in rows for flag in row.flags):
        lines.append(f"- flags: {', '.join(f'{count} x {flag}' for flag, count in flags.most_common())}")
    lines += ["", *_channels(rows)]
    if pictures:
        lines += [
            f"![{pictures.shown} of {len(rows)} images, {pictures.caption}]({pictures.images})",
            "",
            f"![histograms of the {pictures.shown} images above]({pictures.histograms})",
            "",
        ]
    return lines


def _channels(rows: Sequence[Row]) -> list[str]:
    """Table of channels: the median over images of each statistic, with the range of medians."""
    seen: dict[str, list[tuple[Channel, ChannelStatistics]]] = {}
    for row in rows:
        for channel, entry in zip(row.channels, row.statistics, strict=True):
            seen.setdefault(channel.name, []).append((channel, entry))
    table = []
    for name, entries in seen.items():
        values = {key: [getattr(entry, key) for _, entry in entries] for key in _COLUMNS}
        middles = [f"{statistics.median(values[key]):.4g}" for key in _COLUMNS]
        units = sorted({channel.unit for channel, _ in entries})
        table.append(
            (
                name,
                entries[0][0].kind,
                physics([channel for channel, _ in entries]),
                ", ".join(units),
                len(entries),
                *middles,
                _span(values["median"]),
            )
        )
    lines = ["Medians over images of each image's statistics, and the span of the images' medians:", ""]
    head = ("channel", "kind", "physics", "unit", "images", "0.5 %", "5 %", "median", "95 %", "99.5 %", "mean", "std")
    return lines + _table((*head, "medians"), table)


_COLUMNS = ("p005", "p05", "median", "p95", "p995", "mean", "std")


def physics(channels: Sequence[Channel]) -> str:
    """Say what is known of how a channel was acquired, as spans over several images' channels; "unknown" if nothing."""
    parts = []
    for name, label, unit in _PHYSICS:
        known = [value for channel in channels if (value := getattr(channel, name)) is not None]
        if known:
            texts = sorted({str(value) for value in known})
            span = _span(known) if isinstance(known[0], float | int) else "/".join(texts[:SHOWN])
            parts.append(f"{label}{span}{unit}")
    return ", ".join(parts) or "unknown"


_PHYSICS = (
    ("wavelength_nm", "", " nm"),
    ("radar_ghz", "", " GHz"),
    ("polarisation", "", ""),
    ("sequence", "", ""),
    ("repetition_time_ms", "TR ", " ms"),
    ("echo_time_ms", "TE ", " ms"),
    ("inversion_time_ms", "TI ", " ms"),
    ("tube_kv", "", " kV"),
)


def _split(index: Index, split: Split) -> list[str]:
    request = split.request
    how = f"by {request.method}, seed {request.seed}"
    if request.method == "block":
        how += f", blocks of {request.block_m / 1000:g} km, buffer {request.buffer_m / 1000:g} km"
    groups: dict[str, set[str]] = {}
    for row in index:
        groups.setdefault(split.parts[row.key], set()).add(row.group)
    asked = dict(request.shares)
    rows = [
        (name, f"{asked[name]:.3g}" if name in asked else "", count, f"{count / len(index):.3g}", len(groups[name]))
        for name, count in split.counts.items()
    ]
    table = _table(("part", "share asked", "images", "share", "groups"), rows)
    return ["## Split", "", f"{how[0].upper()}{how[1:]}.", "", *table]


def _table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Return a Markdown table; bars in cells are escaped."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [*(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)), ""]


def _most(counts: Counter) -> str:
    """Return the most frequent values with their numbers, and how many others there are."""
    shown = [f"{count} x {value}" if len(counts) > 1 else str(value) for value, count in counts.most_common(SHOWN)]
    rest = len(counts) - len(shown)
    return ", ".join(shown) + (f" and {rest} others" if rest else "")


def _span(values: Sequence[float]) -> str:
    low, high = (f"{value:.4g}" for value in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"
