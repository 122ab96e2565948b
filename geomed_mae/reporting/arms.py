"""Pictures of a study: scores of both arms and the differences of patients, and the learning curves of all runs."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from geomed_mae.reporting.page import Figure, picture
from geomed_mae.reporting.records import Records
from geomed_mae.scoring.figure import plain_words

COLOURS = {"pretrained": "#0b6e8f", "scratch": "#c2702a"}
CALLED = {"pretrained": "pretrained weights", "scratch": "random weights"}
INK, SOFT, BAND = "#1c2733", "#8795a1", "#0b6e8f"
DPI = 130
WIDTH = 9.6
LABELLED = 40
"""Groups above which the rows of a forest plot have no names and share the height of so many."""
ROW, LEAST = 0.21, 3.2
"""Height of a row, and least height of a picture, in inches."""


def forest(summary: Mapping[str, Any]) -> Figure | None:
    """Draw the scores of each seed beside the difference of each group and class; None without two arms."""
    gain, groups = summary.get("difference"), summary.get("groups") or []
    if not gain or gain.get("mean") is None:
        return None
    classes = _classes(summary)
    canvas = _canvas(max(LEAST, ROW * (min(len(groups), LABELLED) + len(classes) + 5) + 1.0))
    with plain_words():
        left, right = canvas.subplots(1, 2, width_ratios=(1, 2.1))
        _seeds(left, summary)
        _rows(right, summary, groups, classes)
        drawn = _png(canvas)
    unit = summary["unit"]
    caption = "Left: the score of each seed; lines join runs of the same seed. Right: pretrained minus random weights. "
    if groups:
        caption += f"Dots are single {unit}"
        caption += (
            ", mean over seeds; their lines reach from the worst to the best seed. " if gain["seeds"] > 1 else ". "
        )
    if gain["low"] is not None:
        caption += (
            f"Thick bars are 95 % intervals over {unit}{', of classes and' * bool(classes)} of the mean (diamond)."
        )
    if gain["low_seeds"] is not None:
        caption += " The thin bar below counts other seeds too."
    title = f"Does pretraining help, {unit[:-1]} by {unit[:-1]}?" if groups else "Does pretraining help?"
    return Figure(title, drawn, caption)


def _classes(summary: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Return the classes that count; none of two exclusive ones, where each says what the whole says."""
    found = [(name, one["difference"]) for name, one in (summary.get("classes") or {}).items() if one.get("counted")]
    values = {one["mean"] for _, one in found}
    return (
        [] if len(found) < 2 or (summary.get("task") == "classify" and len(found) == 2 and len(values) == 1) else found
    )


def _seeds(axis: Any, summary: Mapping[str, Any]) -> None:
    arms = list(COLOURS)
    values = [summary["arms"][arm]["per_seed"] for arm in arms]
    for pair in zip(*values, strict=True):
        axis.plot((0, 1), pair, color=SOFT, linewidth=0.9, zorder=1)
    for place, (arm, each) in enumerate(zip(arms, values, strict=True)):
        axis.plot([place] * len(each), each, "o", color=COLOURS[arm], markersize=5, zorder=3)
        found = summary["arms"][arm]
        if found["low"] is not None:
            side = place + (-0.16 if place == 0 else 0.16)
            axis.plot((side, side), (found["low"], found["high"]), color=COLOURS[arm], linewidth=2.2, zorder=2)
            axis.plot(side, found["mean"], "D", color=COLOURS[arm], markersize=5, zorder=3)
    axis.set_xlim(-0.5, 1.5)
    axis.set_xticks((0, 1), [CALLED[arm].replace(" ", "\n") for arm in arms], fontsize=8)
    _style(axis, f"{summary['metric']}", grid="y")


def _rows(
    axis: Any,
    summary: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    classes: Sequence[tuple[str, Mapping[str, Any]]],
) -> None:
    gain, unit = summary["difference"], summary["unit"].removesuffix("s")
    names: list[tuple[float, str]] = []
    at = 0.0
    step = min(1.0, LABELLED / max(len(groups), 1))
    for line in sorted(groups, key=lambda line: -line["difference"]):
        axis.plot((min(line["per_seed"]), max(line["per_seed"])), (at, at), color=SOFT, linewidth=0.9)
        axis.plot(line["difference"], at, "o", color=INK, markersize=3.6 if step == 1 else 2)
        if step == 1:
            names.append((at, f"{unit} {line['group'][:6]}"))
        at += step
    at += 0.6 if groups else 0
    for name, one in classes:
        _bar(axis, one, at, INK, "s")
        names.append((at, name))
        at += 1
    at += 0.6 if classes else 0
    _bar(axis, gain, at, BAND, "D")
    names.append((at, f"mean over {summary['unit']}"))
    if gain["low_seeds"] is not None:
        at += 1
        axis.plot(
            (gain["low_seeds"], gain["high_seeds"]), (at, at), color=BAND, linewidth=1.1, marker="|", markersize=6
        )
        axis.plot(gain["mean"], at, "D", color=BAND, markersize=4)
        names.append((at, "counting other seeds too"))
    if gain["low"] is not None:
        axis.axvspan(gain["low"], gain["high"], color=BAND, alpha=0.10, linewidth=0)
    axis.axvline(0, color=INK, linewidth=1.0)
    axis.set_ylim(at + 1, -1)
    axis.set_yticks([place for place, _ in names], [name for _, name in names], fontsize=7)
    axis.tick_params(axis="y", length=0)
    _style(axis, "difference: left of 0 random weights are ahead, right of it pretrained ones", grid="x")


def _bar(axis: Any, one: Mapping[str, Any], at: float, colour: str, marker: str) -> None:
    if one["mean"] is None:
        return
    if one["low"] is not None:
        axis.plot((one["low"], one["high"]), (at, at), color=colour, linewidth=2.4, solid_capstyle="butt")
    axis.plot(one["mean"], at, marker, color=colour, markersize=6 if marker == "D" else 4)


def learning(runs: Mapping[str, Sequence[Records]]) -> Figure | None:
    """Draw validation scores and training losses of all runs over their steps; None where nothing was logged twice.

    Args:
        runs: records of the members by arm.
    """
    plots = [
        (key, title)
        for key, title in (("validation", "score on the validation part"), ("loss", "training loss"))
        if any(len(one.values(key)) > 1 for each in runs.values() for one in each)
    ]
    if not plots:
        return None
    canvas = _canvas(3.0)
    axes = canvas.subplots(1, len(plots), squeeze=False)[0]
    for axis, (key, title) in zip(axes, plots, strict=True):
        for arm, each in runs.items():
            for number, one in enumerate(each):
                points = one.values(key)
                if points:
                    label = CALLED[arm] if number == 0 else None
                    style = {"marker": "o", "markersize": 2.5} if key == "validation" else {}
                    axis.plot(
                        *zip(*points, strict=True), color=COLOURS[arm], linewidth=1.0, alpha=0.85, label=label, **style
                    )
        axis.set_xlabel("step", fontsize=8)
        _style(axis, title, grid="both")
        axis.legend(frameon=False, fontsize=7)
    seeds = max(len(each) for each in runs.values())
    caption = f"One line a seed ({seeds}), not smoothed. Losses of the training part are no measure of a model."
    if plots[0][0] == "validation":
        caption += " Validation scores decide which weights are kept; the test part takes no part in them."
    return Figure("Learning curves of both arms" if len(runs) > 1 else "Learning curves", _png(canvas), caption)


def _canvas(height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(WIDTH, height), dpi=DPI, layout="constrained")
    FigureCanvasAgg(canvas)
    return canvas


def _style(axis: Any, title: str, grid: str) -> None:
    axis.set_title(title, fontsize=9, loc="left")
    axis.tick_params(axis="x", labelsize=8)
    if grid != "x":
        axis.tick_params(axis="y", labelsize=8)
    axis.grid(alpha=0.25, axis=grid)
    axis.spines[["top", "right"]].set_visible(False)


def _png(canvas: Any) -> str:
    out = io.BytesIO()
    canvas.savefig(out, format="png", metadata={"Software": None})
    return picture(out.getvalue())
