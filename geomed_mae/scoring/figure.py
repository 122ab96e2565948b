"""Figures that are laid out in inches from the upper left corner, and saved whole or not at all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from geomed_mae.errors import OutputError

DPI = 150

COLOURS = (
    *("#e6550d", "#3182bd", "#31a354", "#756bb1", "#8c564b", "#fb9a99", "#b2df8a", "#9ecae1", "#bcbddc"),
    *("#637939", "#843c39", "#1f3b73", "#d9b38c", "#00664f", "#7f7f7f"),
)
"""Of classes, in the order of their numbers without the first; they begin anew after the last."""


def colour(number: int) -> str:
    """Return the colour of class `number`, 1 or higher."""
    return COLOURS[(number - 1) % len(COLOURS)]


@contextmanager
def plain_words() -> Iterator[None]:
    """Draw names as they are: classes are called by users, and "$" would start a formula, which may be none."""
    from matplotlib import rc_context

    with rc_context({"text.parse_math": False, "text.usetex": False}):
        yield


def figure(width: float, height: float) -> Any:
    """Return an empty figure of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(made)
    return made


def axes(made: Any, place: Sequence[float]) -> Any:
    """Add axes at (left, top, width, height), in inches."""
    left, top, wide, tall = place
    width, height = made.get_size_inches()
    return made.add_axes((left / width, 1 - (top + tall) / height, wide / width, tall / height))


def text(made: Any, left: float, top: float, words: str, **how: Any) -> None:
    """Write words with their upper left corner at (left, top), in inches."""
    width, height = made.get_size_inches()
    made.text(left / width, 1 - top / height, words, va="top", **how)


def save(made: Any, path: Path) -> Path:
    """Write a figure as PNG; the same figure is the same file.

    Raises:
        OutputError: it cannot be written.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        made.savefig(partial, format="png", metadata={"Software": None})
        partial.replace(path)
    except OSError as error:
        raise OutputError(f"the picture '{path.name}' cannot be written: {error.strerror or error}") from error
    return path
