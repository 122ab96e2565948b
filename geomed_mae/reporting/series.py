"""Panels of a run: the final ones whole, the live ones as strips of reconstructions side by side."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.errors import IntegrityError
from geomed_mae.reporting.page import Figure, Strip, picture
from geomed_mae.training.live_files import BOXES, live_panels

Box = tuple[int, int, int, int]
"""Left, top, right, bottom in pixels."""

GAP = 4
"""White pixels between the cells of a column."""

MAX_NAMED = 3
"""Channels that a title names one by one."""

FINAL = (
    "From left to right: input, what the encoder saw, reconstruction in physical units (visible patches are copied), "
    "absolute error of the patches that it did not see."
)


def panels(folder: Path, channels: Mapping[str, Sequence[str]] | None = None) -> list[Figure | Strip]:
    """Return the strips and final panels of a run, strips first, kind by kind.

    `channels` is panel -> names of its channels; they tell panels of one modality apart.

    Raises:
        IntegrityError: a picture does not decode.
    """
    live = live_panels(folder)
    final = {path.stem: path for path in sorted(folder.glob("*.png")) if not path.name.startswith("step-")}
    found: list[Figure | Strip] = []
    names = sorted({*live, *final})
    modalities = Counter(_modality(name) for name in names)
    for name in names:
        words = name.replace("_", " ")
        if modalities[_modality(name)] > 1:
            words += _channels((channels or {}).get(name, ()))
        if len(live.get(name, {})) > 1 or (name in live and name not in final):
            found.append(_strip(words, live[name]))
        if name in final:
            found.append(Figure(f"Reconstructions: {words}", picture(final[name].read_bytes()), FINAL))
    return found


def _modality(name: str) -> str:
    """Return "mr" of "03-mr"."""
    return name.partition("-")[2]


def _channels(names: Sequence[str]) -> str:
    """Return what is put after a panel's name: a few channels by name, many by their number."""
    if len(names) > MAX_NAMED:
        return f", {len(names)} channels"
    return f" {'/'.join(names)}" if names else ""


def _strip(name: str, series: dict[int, Path]) -> Strip:
    """Cut the reconstruction out of each live panel, and image and mask out of the newest."""
    steps = list(series)
    newest, boxes = _read(series[steps[-1]])
    if not boxes:
        shown = [(f"step {step:,}", picture(path.read_bytes())) for step, path in series.items()]
        return Strip(f"Reconstructions over the steps: {name}", shown, FINAL)
    shown = [("image", _png(_cut(newest, boxes[0]))), ("seen", _png(_cut(newest, boxes[1])))]
    for step in steps:
        pixels, own = _read(series[step])
        if own:
            shown.append((f"step {step:,}", _png(_cut(pixels, own[2]))))
    caption = "The same crops and the same hidden patches at several steps; visible patches are copied."
    return Strip(f"Reconstructions over the steps: {name}", shown, caption)


def _read(path: Path) -> tuple[np.ndarray, list[list[Box]]]:
    """Return pixels (y, x, 4), 0 to 1, and the cells of the first three columns, [] without."""
    from matplotlib.image import imread

    try:
        data = path.read_bytes()
        pixels = imread(io.BytesIO(data), format="png")
        text = _text(data)
        boxes = [[_box(cell) for cell in column.split(";")] for column in text.split()]
    except (OSError, ValueError, SyntaxError) as error:
        raise IntegrityError(f"the picture '{path.name}' is damaged: {error}") from error
    return pixels, boxes if len(boxes) == 3 else []


def _box(text: str) -> Box:
    left, top, right, bottom = (int(part) for part in text.split(","))
    return left, top, right, bottom


def _text(data: bytes) -> str:
    """Return the entry BOXES of a PNG's text chunks, "" without (PNG 1.2, section 4.2.3.1)."""
    place = 8
    while place + 8 <= len(data):
        length, kind = int.from_bytes(data[place : place + 4]), data[place + 4 : place + 8]
        word, _, text = data[place + 8 : place + 8 + length].partition(b"\0")
        if kind == b"tEXt" and word == BOXES.encode():
            return text.decode("latin-1")
        place += length + 12
    return ""


def _cut(pixels: np.ndarray, cells: Sequence[Box]) -> np.ndarray:
    """Return the cells of a column, one below the other, each in the middle of a white one as wide as the widest."""
    wide, tall = max(box[2] - box[0] for box in cells), sum(box[3] - box[1] + GAP for box in cells) - GAP
    column = np.ones((tall, wide, pixels.shape[2]), pixels.dtype)
    place = 0
    for left, top, right, bottom in cells:
        # The box and nothing beside it: there stand labels and scales where another cell is wider.
        cell = pixels[top:bottom, left:right]
        start = (wide - cell.shape[1]) // 2
        column[place : place + cell.shape[0], start : start + cell.shape[1]] = cell
        place += bottom - top + GAP
    return column


def _png(pixels: Any) -> str:
    from matplotlib.image import imsave

    out = io.BytesIO()
    imsave(out, np.ascontiguousarray(pixels[..., :3]), format="png", metadata={"Software": None})
    return picture(out.getvalue())
