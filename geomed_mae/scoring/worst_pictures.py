"""The worst cases side by side: the image, what is true, what was predicted, and where the two differ.

Rasters are shown in natural colours where the bands are there, and beside it as shortwave infrared, near infrared and
red, in which vegetation, water and burned ground part; volumes in the acquired plane with the most wrong voxels, in the
radiological convention. Images are named by the first digits of their opaque key.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.archives.index import Index
from geomed_mae.archives.planes import Plane, Window, plane_across, shown_groups, sides, window_of
from geomed_mae.image import Channel, Image
from geomed_mae.readers import IGNORE
from geomed_mae.scoring.figure import axes, colour, figure, save, text
from geomed_mae.scoring.worst import Case

KEY_DIGITS = 8
"""Digits of an image's key that name it in a picture."""
CELL, GAP, LEFT, TOP, ABOVE, BELOW = 2.3, 0.08, 0.12, 0.7, 0.38, 0.12
"""Inches: widest cell, space between cells, margins left and at the top, room above a row, and below the last."""
LINE_BELOW = 0.2
"""Inches from one line of the legend to the next."""
TALLEST = 1.3
"""Largest height of a cell over the widest width."""
FILL, LINE, WRONG, LEGEND = 0.3, 1.1, 0.65, 7.5
"""Opacity of a class' area, width of its outline in points, opacity of errors, and points of the legend's letters."""
MISSED, INVENTED, MIXED_UP = "#ff1fc7", "#00c8c8", "#f0c800"
"""Colours of errors: foreground that was not found, foreground that is not there, one foreground class for another. No
class has one of them."""
UNKNOWN_GREY, INVALID = 0.55, (1.0, 1.0, 1.0)
"""What is not labelled is darkened to this share; pixels that are not valid are white."""
SWIR_NIR_RED = ((1500.0, 2500.0), (750.0, 960.0), (610.0, 700.0))
"""Ranges in nm of a false-colour composite, as red, green and blue; the longest wavelength of each range is shown."""
ACROSS = 4
"""Classified images side by side."""


@dataclass(frozen=True, slots=True, eq=False)
class _View:
    """What is drawn of one case: pictures (y, x, 3) with their names, and class numbers on the same grid."""

    pictures: dict[str, np.ndarray]
    truth: np.ndarray
    found: np.ndarray
    valid: np.ndarray
    size: tuple[float, float]
    unit: str
    edges: str
    place: str


def draw_worst_maps(path: Path, cases: Sequence[Case], index: Index, classes: Sequence[str]) -> Path:
    """Draw the worst class maps, one a row.

    Args:
        path: PNG file.
        cases: the worst first.
        index: archive of the images.
        classes: names of the classes; the first is the background and is not coloured.

    Raises:
        OutputError: the file cannot be written.
        ReadError: an image no longer decodes.
    """
    views = [_map_view(case, index) for case in cases]
    columns = max(len(view.pictures) for view in views) + 3
    sizes = [_cell(view) for view in views]
    width = 2 * LEFT + columns * CELL + (columns - 1) * GAP
    legend = _legend(classes, width)
    top = TOP + LINE_BELOW * legend[-1][1]
    made = figure(width, top + sum(tall + ABOVE for tall, _ in sizes) + BELOW)
    text(made, LEFT, 0.12, "Worst cases: the images with the lowest mean foreground Dice", fontsize=10)
    for left, line, ink, words in legend:
        text(made, left, 0.45 + LINE_BELOW * line, words, fontsize=LEGEND, color=ink)
    for view, case, (tall, wide) in zip(views, cases, sizes, strict=True):
        name = f"image {case.row.key[:KEY_DIGITS]}  ·  mean foreground Dice {case.value:.3f}"
        text(made, LEFT, top + 0.08, "  ·  ".join(part for part in (name, view.place) if part), fontsize=7.5)
        first, base = columns - 3 - len(view.pictures), next(iter(view.pictures.values()))
        shown = [*view.pictures.items(), ("true", base), ("predicted", base), ("differs", base)]
        for number, (what, picture) in enumerate(shown):
            left = LEFT + (first + number) * (CELL + GAP) + (CELL - wide) / 2
            axis = axes(made, (left, top + ABOVE, wide, tall))
            _plain(axis)
            axis.imshow(_marked(what, picture, view), aspect="auto", interpolation="nearest")
            axis.set_title(what, fontsize=7, pad=2)
            if what in ("true", "predicted"):
                _outlines(axis, view.truth if what == "true" else view.found, len(classes))
            _letters(axis, view.edges)
            if number == 0:
                _scale_bar(axis, view)
        top += tall + ABOVE
    return save(made, path)


def draw_worst_classes(path: Path, cases: Sequence[Case], index: Index, classes: Sequence[str]) -> Path:
    """Draw the images whose true classes were given the least probability, with what is true and what was said.

    Raises:
        OutputError: the file cannot be written.
        ReadError: an image no longer decodes.
    """
    side, words = 1.9, 0.62
    across = min(ACROSS, len(cases))
    down = -(-len(cases) // across)
    made = figure(max(2 * LEFT + across * (side + 0.15), 4.6), 0.5 + down * (side + words))
    text(made, LEFT, 0.12, "Worst cases: least probability for what is true", fontsize=10)
    for number, case in enumerate(cases):
        view = _image_view(case, index)
        ratio = view.size[0] / view.size[1]
        tall, wide = (side, side / ratio) if ratio >= 1 else (side * ratio, side)
        left, top = LEFT + (number % across) * (side + 0.15), 0.45 + (number // across) * (side + words)
        axis = axes(made, (left, top, wide, tall))
        _plain(axis)
        axis.imshow(next(iter(view.pictures.values())), aspect="auto", interpolation="nearest")
        _letters(axis, view.edges)
        lines = [f"image {case.row.key[:KEY_DIGITS]}", *_said(case, classes)]
        text(made, left, top + tall + 0.04, "\n".join(lines), fontsize=6.5, linespacing=1.25)
    return save(made, path)


def _said(case: Case, classes: Sequence[str]) -> list[str]:
    """Return what is true and what was said of an image, the strongest statements first."""
    pairs = list(zip(classes, case.truth.tolist(), case.found.tolist(), strict=True))
    if sum(truth == 1 for _, truth, _ in pairs) == 1 and all(truth != UNKNOWN for _, truth, _ in pairs):
        name, _, chance = next(pair for pair in pairs if pair[1] == 1)
        said, _, most = max(pairs, key=lambda pair: pair[2])
        return [f"true: {name} (given {chance:.1%})", f"said: {said} ({most:.1%})"]
    gaps = sorted((pair for pair in pairs if pair[1] != UNKNOWN), key=lambda pair: -abs(pair[2] - pair[1]))
    return [f"{name}: {'yes' if truth else 'no'}, said {chance:.1%}" for name, truth, chance in gaps[:3]]


# ----------------------------------------------------------------------------------------------------- what is shown


def _map_view(case: Case, index: Index) -> _View:
    """Cut what is shown of a class map: the window that was kept, or the slice with the most wrong voxels."""
    truth, found, window, place = case.truth, case.found, case.window, ""
    at = 0
    if truth.ndim == 3:
        wrong = ((truth != found) & (truth != IGNORE)).sum(axis=(1, 2))
        at = int(wrong.argmax())
        window = (slice(at, at + 1), *window[1:])
    image = index.read(case.row.key, window)
    plane = _plane(image, case, 0)
    if plane is not None:
        truth, found = truth[at : at + 1], found[at : at + 1]
        place = f"{plane.label}, slice {at + 1} of {case.truth.shape[0]}"
        truth, found = plane.cut(truth), plane.cut(found)
    elif any(piece.stop - piece.start < size for piece, size in zip(window, case.row.shape, strict=True)):
        place = f"from row {window[0].start}, column {window[1].start}"
    return _view(image, case, plane, truth, found, place)


def _image_view(case: Case, index: Index) -> _View:
    """Cut what is shown of a classified image: all of a plane, the middle slice of a volume."""
    window = case.window
    if len(case.row.shape) == 3:
        middle = case.row.shape[0] // 2
        window = (slice(middle, middle + 1), *window[1:])
    image = index.read(case.row.key, window)
    plane = _plane(image, case, 0)
    nothing = np.zeros(image.array.shape[1:], dtype=np.uint8)
    nothing = nothing if plane is None else plane.cut(nothing)
    return _view(image, case, plane, nothing, nothing, "")


def _plane(image: Image, case: Case, at: int) -> Plane | None:
    if len(case.row.shape) != 3:
        return None
    letters = sides({case.row.key: image.geometry}).get(case.row.key)
    return plane_across(0, at, case.row.spacing or (1.0, 1.0, 1.0), letters)


def _view(image: Image, case: Case, plane: Plane | None, truth: np.ndarray, found: np.ndarray, place: str) -> _View:
    cut = (lambda array: array) if plane is None else plane.cut
    known = np.broadcast_to(image.valid, image.array.shape)
    pictures = {}
    for name, group in _groups(image.channels).items():
        values, valid = cut(np.moveaxis(image.array[list(group)], 0, -1)), cut(known[list(group)].all(axis=0))
        window = window_of([image.channels[one] for one in group], values[valid])
        shown = _stretched(values, window)
        shown[~valid] = INVALID
        pictures[name] = shown
    steps = plane.size if plane is not None else (case.row.spacing or (1.0, 1.0))[-2:]
    size = (truth.shape[0] * steps[0], truth.shape[1] * steps[1])
    unit = "" if case.row.spacing is None else "m" if case.row.geometry == "raster" else "mm"
    return _View(
        pictures, truth, found, cut(known.any(axis=0)), size, unit, "" if plane is None else plane.edges, place
    )


def _groups(channels: Sequence[Channel]) -> dict[str, tuple[int, ...]]:
    """Return up to two ways to show an image: name -> one or three channels."""
    found = {}
    for group in shown_groups(channels)[:2]:
        names = "/".join(channels[one].name for one in group)
        found[names if len(channels) > 1 else "image"] = group
    bands = [
        (channel.wavelength_nm, number)
        for number, channel in enumerate(channels)
        if channel.kind == "optical" and channel.wavelength_nm is not None
    ]
    chosen = [max((band for band in bands if low <= band[0] <= high), default=None) for low, high in SWIR_NIR_RED]
    if all(chosen):
        group = tuple(number for _, number in chosen)
        found = {**dict(list(found.items())[:1]), "/".join(channels[one].name for one in group): group}
    return found


def _stretched(values: np.ndarray, window: Window) -> np.ndarray:
    from matplotlib import colormaps

    share = np.clip(np.nan_to_num((values - window.low) / (window.high - window.low)), 0, 1)
    return colormaps[window.colours](share[..., 0])[..., :3] if share.shape[-1] == 1 else share.copy()


# -------------------------------------------------------------------------------------------------- how it is drawn


def _marked(what: str, picture: np.ndarray, view: _View) -> np.ndarray:
    """Return a cell: the picture, with the pixels that were not labelled darkened and the errors coloured."""
    from matplotlib.colors import to_rgb

    if what not in ("true", "predicted", "differs"):
        return picture
    shown = picture.copy()
    unknown = view.truth == IGNORE
    if what != "predicted":
        shown[unknown] *= UNKNOWN_GREY
    if what == "differs":
        wrong = (view.truth != view.found) & ~unknown & view.valid
        kinds = {
            MISSED: wrong & (view.truth > 0) & (view.found == 0),
            INVENTED: wrong & (view.truth == 0),
            MIXED_UP: wrong & (view.truth > 0) & (view.found > 0),
        }
        for ink, mask in kinds.items():
            shown[mask] = (1 - WRONG) * shown[mask] + WRONG * np.array(to_rgb(ink))
        return shown
    numbers = view.truth if what == "true" else view.found
    for number in np.unique(numbers[(numbers > 0) & view.valid]):
        mask = (numbers == number) & view.valid
        shown[mask] = (1 - FILL) * shown[mask] + FILL * np.array(to_rgb(colour(int(number))))
    return shown


def _outlines(axis: Any, numbers: np.ndarray, classes: int) -> None:
    from matplotlib.patheffects import withStroke

    for number in range(1, classes):
        mask = numbers == number
        if mask.any() and not mask.all() and min(mask.shape) > 1:
            drawn = axis.contour(mask.astype(np.float32), levels=[0.5], colors=[colour(number)], linewidths=LINE)
            # A dark edge keeps the line visible on ground of its own colour.
            drawn.set(path_effects=[withStroke(linewidth=2 * LINE, foreground="black")])


def _legend(classes: Sequence[str], width: float) -> list[tuple[float, int, str, str]]:
    """Return what the colours mean, in lines that fit a width in inches: (left in inches, line, colour, words)."""
    ruler = figure(width, 1.0)
    renderer = ruler.canvas.get_renderer()
    found, left, line = [], LEFT, 0
    named = [(colour(number), name) for number, name in enumerate(classes)][1:]
    named += [(MISSED, "missed"), (INVENTED, "invented")] + ([(MIXED_UP, "mixed up")] if len(classes) > 2 else [])
    named.append(("0.3", "darker: not labelled"))
    for ink, name in named:
        words = f"■ {name}"
        wide = ruler.text(0, 0, words, fontsize=LEGEND).get_window_extent(renderer).width / ruler.dpi
        if left > LEFT and left + wide > width - LEFT:
            left, line = LEFT, line + 1
        found.append((left, line, ink, words))
        left += wide + 0.18
    return found


def _plain(axis: Any) -> None:
    axis.set_xticks([])
    axis.set_yticks([])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _cell(view: _View) -> tuple[float, float]:
    """Return (height, width) in inches of a cell in true proportion."""
    ratio = view.size[0] / view.size[1]
    wide = CELL * min(1.0, TALLEST / ratio)
    return wide * ratio, wide


def _scale_bar(axis: Any, view: _View) -> None:
    """Draw a bar of 1, 2 or 5 times a power of ten, about a fifth of the picture's width."""
    if not view.unit:
        return
    width, columns = view.size[1], view.truth.shape[1]
    power = 10.0 ** np.floor(np.log10(width / 4))
    length = max(step * power for step in (1, 2, 5) if step * power <= width / 4)
    words = f"{length / 1000:g} km" if view.unit == "m" and length >= 1000 else f"{length:g} {view.unit}"
    share = length / width
    for ink, thick in (("black", 3.4), ("white", 2.0)):
        axis.plot(
            [0.04, 0.04 + share], [0.05, 0.05], color=ink, linewidth=thick, transform=axis.transAxes, clip_on=False
        )
    _written(axis, 0.04, 0.075, words, "left", "bottom")
    axis.set_xlim(-0.5, columns - 0.5)


def _letters(axis: Any, edges: str) -> None:
    """Write the patient's sides at the middle of a plane's edges."""
    places = ((0.02, 0.5, "left", "center"), (0.98, 0.5, "right", "center"))
    places += ((0.5, 0.98, "center", "top"), (0.5, 0.02, "center", "bottom"))
    for letter, (x, y, across, up) in zip(edges, places, strict=False):
        _written(axis, x, y, letter, across, up)


def _written(axis: Any, x: float, y: float, words: str, across: str, up: str) -> None:
    from matplotlib.patheffects import withStroke

    said = axis.text(x, y, words, ha=across, va=up, fontsize=6.5, color="white", transform=axis.transAxes)
    said.set_path_effects([withStroke(linewidth=1.5, foreground="black")])
