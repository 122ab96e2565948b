"""Pictures of a data card: contact sheets and histograms, one of each a modality.

They show pixels, and pixels may show a person: burned-in text, a face, a house. They lie in the index folder, hold no
file name, no identifier and no date, and are left out by `scan --no-pictures`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.statistics import Running
from geomed_mae.archives.views import INVALID, Sketch, View, shown_as
from geomed_mae.errors import OutputError, ReadError
from geomed_mae.image import Channel

if TYPE_CHECKING:
    from PIL.Image import Image as Picture
    from PIL.ImageDraw import ImageDraw

FOLDER = "card"
PER_MODALITY = 8
HISTOGRAM_BINS = 64
MAX_HISTOGRAMS = 16

PART_VALUES = 1 << 26
"""Values that are decoded at a time."""

MAX_VALUES = 1 << 28
"""Values of one raster that are decoded for its picture; of a larger one the centre is shown."""

CELL, PLANE, GAP, LINE = 232, 180, 12, 20
"""Sides in pixels of a raster's cell and of one plane of a volume, the space between, and the height of a text line."""

_BLACK, _WHITE, _GREY = (16, 16, 16), (255, 255, 255), (150, 150, 150)


@dataclass(frozen=True, slots=True)
class CardPictures:
    """File names of a modality's pictures, relative to the card, and what they show."""

    modality: str
    images: str
    histograms: str
    shown: int
    caption: str


@dataclass(frozen=True, slots=True, eq=False)
class Tile:
    """One image of a contact sheet."""

    views: Sequence[View]
    caption: str


def draw_card(index: Index, folder: Path) -> list[CardPictures]:
    """Draw up to eight images of each modality, of different groups where there are so many, into `folder`/card.

    Images that cannot be read any more are left out. Older pictures there are removed.

    Raises:
        OutputError: the folder cannot be written.
    """
    try:
        target = folder / FOLDER
        target.mkdir(parents=True, exist_ok=True)
        made = remove_pictures(folder)
        for modality in sorted({row.modality for row in index}):
            rows = _chosen([row for row in index if row.modality == modality])
            made += _draw_modality(index, rows, target)
        return made
    except OSError as error:
        raise OutputError(f"pictures cannot be written to '{folder}': {error.strerror or error}") from error


def remove_pictures(folder: Path) -> list[CardPictures]:
    """Remove the pictures of an earlier scan: they would show images that the card no longer describes.

    Raises:
        OutputError: they cannot be removed.
    """
    try:
        for old in (folder / FOLDER).glob("*.png"):
            old.unlink()
    except OSError as error:
        raise OutputError(f"pictures cannot be removed from '{folder}': {error.strerror or error}") from error
    return []


def _chosen(rows: Sequence[Row]) -> list[Row]:
    """Return at most eight rows, spread evenly over the archive: one a group, more only when groups are few."""
    seen: set[str] = set()
    first = [row for row in rows if row.group not in seen and not seen.add(row.group)]
    keys = {row.key for row in first}
    pool = first if len(first) >= PER_MODALITY else [*first, *(row for row in rows if row.key not in keys)]
    if len(first) < PER_MODALITY:
        return pool[:PER_MODALITY]
    return [pool[number * len(pool) // PER_MODALITY] for number in range(PER_MODALITY)]


def _draw_modality(index: Index, rows: Sequence[Row], target: Path) -> list[CardPictures]:
    tiles: list[Tile] = []
    pooled: dict[str, tuple[Channel, Running]] = {}
    pixels = sum(math.prod(row.shape) for row in rows)
    for row in rows:
        shape, windows = _windows(row)
        sketch: Sketch | None = None
        try:
            for window in windows:
                image = index.read(row.key, window)
                sketch = sketch or Sketch(row.channels, shape, image.geometry)
                sketch.add(image)
                for number, channel in enumerate(row.channels):
                    running = pooled.setdefault(channel.name, (channel, Running(1, pixels)))[1]
                    running.add(image.array[[number]], image.valid[[number if image.valid.shape[0] > 1 else 0]])
        except ReadError:
            # The scan has read it; a file that went away since then costs its picture, not the card.
            continue
        tiles.append(Tile(sketch.views(), _caption(row, shape)))
    if not tiles:
        return []
    stem = Path(rows[0].modality).stem
    caption = shown_as(rows[0].channels)
    heading = f"{stem}: {caption}" if rows[0].geometry != "volume" else f"{stem}: middle planes"
    contact_sheet(tiles, heading).save(target / f"{stem}-images.png", optimize=True)
    _histograms(list(pooled.values()), target / f"{stem}-histograms.png")
    return [CardPictures(stem, f"{FOLDER}/{stem}-images.png", f"{FOLDER}/{stem}-histograms.png", len(tiles), caption)]


def _windows(row: Row) -> tuple[tuple[int, ...], Iterator[tuple[slice, ...] | None]]:
    """Return the shape of what is shown, and the windows that cover it: the centre of a very large raster, else all."""
    if len(row.shape) != 2:
        return row.shape, iter((None,))
    share = min(1.0, math.sqrt(MAX_VALUES / (math.prod(row.shape) * len(row.channels))))
    rows, columns = (max(1, int(size * share)) for size in row.shape)
    top, left = (row.shape[0] - rows) // 2, (row.shape[1] - columns) // 2
    height = max(1, PART_VALUES // (columns * len(row.channels)))

    def bands() -> Iterator[tuple[slice, ...]]:
        for start in range(top, top + rows, height):
            yield slice(start, min(start + height, top + rows)), slice(left, left + columns)

    return (rows, columns), bands()


def _caption(row: Row, shape: Sequence[int]) -> str:
    size = " x ".join(map(str, row.shape))
    unit = "m" if row.geometry == "raster" else "mm"
    steps = " x ".join(f"{float(format(value, '.3g')):g}" for value in row.spacing or ())
    spacing = f", {steps} {unit}" if steps else ""
    return f"{size}{spacing}{', centre' if tuple(shape) != row.shape else ''}"


def contact_sheet(tiles: Sequence[Tile], heading: str) -> Picture:
    """Return one picture of several images, each with its caption, under a heading that explains the colours."""
    from PIL import Image as Pillow
    from PIL import ImageDraw, ImageFont

    font = ImageFont.load_default(13)
    several = max(len(tile.views) for tile in tiles) > 1
    side = PLANE if several else CELL
    planes = max(len(tile.views) for tile in tiles)
    # Volumes stand two in a row when they are many.
    across = min((1 + (len(tiles) > 3)) if several else 4, len(tiles))
    width, height = planes * side + GAP, side + LINE + GAP
    size = (max(GAP + across * width, 560), 2 * LINE + GAP + -(-len(tiles) // across) * height)
    sheet = Pillow.new("RGB", size, _WHITE)
    draw = ImageDraw.Draw(sheet)
    draw.text((GAP, 6), heading, _BLACK, font=font)
    draw.rectangle((GAP, LINE + 10, GAP + 10, LINE + 20), INVALID)
    draw.text(
        (GAP + 16, LINE + 7), "no valid value;  black and white are the 1st and 99th percentile", _GREY, font=font
    )
    for number, tile in enumerate(tiles):
        left, top = GAP + number % across * width, 2 * LINE + GAP + number // across * height
        for place, view in enumerate(tile.views):
            picture = view.picture(side)
            x, y = left + place * side + (side - picture.width) // 2, top + (side - picture.height) // 2
            sheet.paste(picture, (x, y))
            _letters(draw, view.edges, (x, y, x + picture.width, y + picture.height), font)
        draw.text((left, top + side + 3), f"{number + 1}: {tile.caption}", _BLACK, font=font)
    return sheet


def _letters(draw: ImageDraw, edges: str, box: tuple[int, int, int, int], font: Any) -> None:
    """Write the patient's sides at the middle of a plane's edges."""
    if not edges:
        return
    x, y = (box[0] + box[2]) // 2, (box[1] + box[3]) // 2
    places = ((box[0] + 3, y, "lm"), (box[2] - 3, y, "rm"), (x, box[1] + 2, "mt"), (x, box[3] - 2, "mb"))
    for letter, (left, top, anchor) in zip(edges, places, strict=True):
        if anchor.startswith("m") and box[3] - box[1] < 3 * LINE:
            continue  # a sliver has no room for letters above one another
        draw.text((left, top), letter, _WHITE, font=font, anchor=anchor, stroke_width=1, stroke_fill=_BLACK)


def _histograms(channels: Sequence[tuple[Channel, Running]], path: Path) -> None:
    """Draw the histogram of each channel, between the 0.5th and the 99.5th percentile of the pictured images."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    channels = channels[:MAX_HISTOGRAMS]
    columns = min(4, len(channels))
    rows = -(-len(channels) // columns)
    figure = Figure(figsize=(max(2.5 * columns, 5.0), 1.7 * rows + 0.3), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    for number, (channel, running) in enumerate(channels):
        axes = figure.add_subplot(rows, columns, number + 1)
        found = running.histogram(0, HISTOGRAM_BINS)
        axes.stairs(found.counts, found.edges, fill=True, color="#33658a")
        axes.set_title(f"{channel.name} ({channel.unit})", fontsize=9, loc="left")
        axes.tick_params(labelsize=7)
        axes.set_yticks([])
        axes.spines[["left", "right", "top"]].set_visible(False)
    figure.savefig(path, metadata={"Software": None})
