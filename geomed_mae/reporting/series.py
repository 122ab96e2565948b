"""Panels of a run: the final ones whole, the live ones as strips of reconstructions side by side."""

from __future__ import annotations

import io
from collections.abc import Sequence
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

FINAL = (
    "From left to right: input, what the encoder saw, reconstruction in physical units (visible patches are copied), "
    "absolute error of the patches that it did not see."
)


def panels(folder: Path) -> list[Figure | Strip]:
    """Return the strips and final panels of a run, strips first, kind by kind.

    Raises:
        IntegrityError: a picture does not decode.
    """
    live = live_panels(folder)
    final = {path.stem: path for path in sorted(folder.glob("*.png")) if not path.name.startswith("step-")}
    found: list[Figure | Strip] = []
    for name in sorted({*live, *final}):
        words = name.replace("_", " ")
        if len(live.get(name, {})) > 1 or (name in live and name not in final):
            found.append(_strip(words, live[name]))
        if name in final:
            found.append(Figure(f"Reconstructions: {words}", picture(final[name].read_bytes()), FINAL))
    return found


def _strip(name: str, series: dict[int, Path]) -> Strip:
    """Cut the reconstruction out of each live panel, and image and mask out of the newest."""
    steps = list(series)
    newest, boxes = _read(series[steps[-1]])
    if not boxes:
        shown = [(f"step {step:,}", picture(path.read_bytes())) for step, path in series.items()]
        return Strip(f"Features emerge: {name}", shown, FINAL)
    shown = [("image", _png(_cut(newest, boxes[0]))), ("seen", _png(_cut(newest, boxes[1])))]
    for step in steps:
        pixels, own = _read(series[step])
        if own:
            shown.append((f"step {step:,}", _png(_cut(pixels, own[2]))))
    caption = "The same crops and the same hidden patches at several steps; visible patches are copied."
    return Strip(f"Features emerge: {name}", shown, caption)


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
    """Return the cells of a column, one below the other."""
    left, right = min(box[0] for box in cells), max(box[2] for box in cells)
    parts: list[np.ndarray] = []
    for _, top, _, bottom in cells:
        parts += [pixels[top:bottom, left:right], np.ones((GAP, right - left, pixels.shape[2]), pixels.dtype)]
    return np.concatenate(parts[:-1])


def _png(pixels: Any) -> str:
    from matplotlib.image import imsave

    out = io.BytesIO()
    imsave(out, np.ascontiguousarray(pixels[..., :3]), format="png", metadata={"Software": None})
    return picture(out.getvalue())
