"""Confusion and calibration as charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.scoring.calibration import BINS, calibration_error
from geomed_mae.scoring.figure import axes, colour, figure, save, text

MOST_LABELLED = 12
"""Classes up to which each cell of a matrix says its number."""
FEW_SHARE, FEW_CASES = 1e-3, 10
"""Share, or number, of cases below which a bin's point is drawn hollow: it says little."""
CURVES = 8
"""Classes, the most frequent ones, that get a curve of their own."""
UPRIGHT = 6
"""Letters up to which a name is not turned by a quarter."""
ACROSS = 4
"""Small matrices side by side."""


def draw_confusion(path: Path, counts: np.ndarray, classes: Sequence[str], what: str) -> Path:
    """Draw a confusion matrix: shares of each true class, with counts.

    Args:
        path: PNG file.
        counts: (classes, classes), row = truth.
        classes: names.
        what: what is counted, "pixels" or "images".

    Raises:
        OutputError: the file cannot be written.
    """
    size = len(classes)
    cell = 0.85 if size <= 6 else 0.6 if size <= MOST_LABELLED else 0.3
    margin = 0.35 + 0.085 * max(len(name) for name in classes)
    side = cell * size
    wide = max(margin + side + 1.0, 4.2)
    turned = max(len(name) for name in classes) > UPRIGHT
    made = figure(wide, 0.75 + side + (margin + 0.05 if turned else 0.6))
    axis = axes(made, (margin + 0.15, 0.75, side, side))
    total = counts.sum(axis=1, keepdims=True)
    shares = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
    drawn = axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    axis.set_facecolor("0.92")
    if size <= MOST_LABELLED:
        for row, column in np.ndindex(counts.shape):
            share = shares[row, column]
            words = "none" if np.isnan(share) else f"{share:.1%}\n{_short(int(counts[row, column]))}"
            ink = "white" if share > 0.6 else "black"
            axis.text(column, row, words, ha="center", va="center", fontsize=7.5 if cell > 0.7 else 6, color=ink)
    _names(axis, classes)
    axis.set_xlabel("predicted", fontsize=8.5)
    axis.set_ylabel("true", fontsize=8.5)
    text(made, 0.12, 0.12, f"Confusion of {_short(int(counts.sum()))} {what}", fontsize=10)
    text(made, 0.12, 0.38, "share of each true class (rows add up to 100 %)", fontsize=7.5, color="0.35")
    bar = made.colorbar(drawn, cax=axes(made, (margin + 0.15 + side + 0.12, 0.75, 0.1, side)))
    bar.ax.tick_params(labelsize=6.5, length=2)
    bar.outline.set_visible(False)
    return save(made, path)


def draw_confusions(path: Path, tables: Sequence[np.ndarray], classes: Sequence[str]) -> Path:
    """Draw a small matrix (2, 2), row = truth, of each class of several that an image may have.

    Raises:
        OutputError: the file cannot be written.
    """
    across = min(ACROSS, len(classes))
    down = -(-len(classes) // across)
    side, gap = 1.25, 0.75
    made = figure(0.65 + across * (side + gap), 0.75 + down * (side + gap))
    text(made, 0.12, 0.12, "Confusion of each class, at a probability of a half", fontsize=10)
    for number, (name, counts) in enumerate(zip(classes, tables, strict=True)):
        left, top = 0.65 + (number % across) * (side + gap), 0.8 + (number // across) * (side + gap)
        axis = axes(made, (left, top, side, side))
        total = counts.sum(axis=1, keepdims=True)
        shares = np.where(total > 0, counts / np.maximum(total, 1), np.nan)
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set_facecolor("0.92")
        for row, column in np.ndindex(2, 2):
            share = shares[row, column]
            words = "none" if np.isnan(share) else f"{share:.1%}\n{_short(int(counts[row, column]))}"
            axis.text(
                column, row, words, ha="center", va="center", fontsize=7, color="white" if share > 0.6 else "black"
            )
        axis.set_title(name, fontsize=8, pad=3)
        _names(axis, ("no", "yes"), upright=True)
        if number % across == 0:
            axis.set_ylabel("true", fontsize=7.5)
        axis.set_xlabel("predicted", fontsize=7, labelpad=1)
    return save(made, path)


def draw_calibration(
    path: Path, main: tuple[str, np.ndarray], others: Sequence[tuple[int, str, np.ndarray]], what: str
) -> Path:
    """Draw reliability curves, and below them how often which confidence was said.

    Args:
        path: PNG file.
        main: name and histogram (3, BINS) of what is decided.
        others: number, name and histogram of classes against the rest; the most frequent ones are drawn.
        what: what is counted, "pixels" or "images".

    Raises:
        OutputError: the file cannot be written.
    """
    made = figure(4.9, 5.9)
    axis, below = axes(made, (0.7, 0.75, 3.9, 3.6)), axes(made, (0.7, 4.5, 3.9, 0.85))
    axis.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axis.text(0.16, 0.1, "perfect", fontsize=6.5, color="0.45", rotation=43)
    shown = sorted(others, key=lambda entry: -entry[2][2].sum())[:CURVES]
    _curve(axis, main[1], "black", f"{main[0]}: error {_percent(calibration_error(main[1]))}", 1.6)
    for number, name, counts in sorted(shown, key=lambda entry: entry[0]):
        if counts[0].sum():
            _curve(axis, counts, colour(number), f"{name}: error {_percent(calibration_error(counts))}", 1.0)
    axis.set(xlim=(0, 1), ylim=(0, 1))
    axis.set_ylabel("share that is so", fontsize=8.5)
    axis.legend(fontsize=6.5, loc="upper left", frameon=False)
    edges = np.arange(BINS) / BINS
    below.bar(edges, main[1][0] / max(main[1][0].sum(), 1), width=1 / BINS, align="edge", color="0.75", edgecolor="w")
    below.set(xlim=(0, 1), yscale="log")
    # matplotlib writes powers of ten as formulas, which names must not become (`figure.plain_words`).
    below.yaxis.set_major_formatter(lambda share, _: f"{100 * share:g} %")
    below.yaxis.set_minor_formatter(lambda *_: "")
    below.set_xlabel("probability that the model gives", fontsize=8.5)
    below.set_ylabel(what, fontsize=7.5)
    for one in (axis, below):
        one.tick_params(labelsize=7, length=2.5)
        one.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelbottom=False)
    text(made, 0.12, 0.12, f"Calibration over {_short(int(main[1][0].sum()))} {what}", fontsize=10)
    said = "below the line the model is too sure; hollow points rest on few cases"
    text(made, 0.12, 0.38, said, fontsize=7, color="0.35")
    return save(made, path)


def _curve(axis: Any, counts: np.ndarray, ink: str, name: str, width: float) -> None:
    present = counts[0] > 0
    cases, said, came = counts[:, present]
    few = cases < max(FEW_CASES, FEW_SHARE * counts[0].sum())
    axis.plot(said / cases, came / cases, color=ink, linewidth=width, zorder=2, label=name, clip_on=False)
    for points, face in ((few, "white"), (~few, ink)):
        place = (said[points] / cases[points], came[points] / cases[points])
        axis.scatter(*place, s=13, facecolor=face, edgecolor=ink, linewidth=0.8, zorder=3, clip_on=False)


def _names(axis: Any, names: Sequence[str], *, upright: bool = False) -> None:
    turned = not upright and max(len(name) for name in names) > UPRIGHT
    axis.set_xticks(range(len(names)), names, fontsize=7.5, rotation=90 if turned else 0)
    axis.set_yticks(range(len(names)), names, fontsize=7.5)
    axis.tick_params(length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _percent(share: float | None) -> str:
    return "unknown" if share is None else f"{share:.1%}"


def _short(count: int) -> str:
    """Return a count as people write it: 1,234 or 5.6 M."""
    return f"{count / 1e6:.3g} M" if count >= 1e6 else f"{count:,}"
