"""Curves over the steps: loss and its parts, probe, learning rate, gradient norm, samples per second, data wait."""

from __future__ import annotations

import io
from typing import Any

from geomed_mae.reporting.page import Figure, picture
from geomed_mae.reporting.records import Records

OTHERS = {
    *("step", "skipped", "resumed", "images", "lr", "data_wait", "valid_fraction", "samples_per_second"),
    *("gradient_norm", "gpu_memory_mb", "samples", "seconds", "loss", "validation"),
}
"""Numbers of metrics.jsonl that are no parts of the loss; neither are those of the probe."""
VALIDATED = "score on the validation part"

PROBES = {"probe_auroc": "mean AUROC", "probe_r2": "mean R²", "probe_accuracy": "accuracy"}
FLOOR = "probe_floor_"
ACROSS, DPI = 3, 130
COLOURS = ("#0b6e8f", "#d1495b", "#6a994e", "#8d6a9f", "#edae49", "#5b6b7b")
MARK = {"color": "#8795a1", "linewidth": 0.9, "linestyle": ":"}


def curves(records: Records) -> Figure | None:
    """Draw what a run has logged; None where no number was logged twice."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    plots = [plot for plot in _plots(records) if any(len(points) > 1 for _, points, _ in plot[1])]
    if not plots:
        return None
    rows = -(-len(plots) // ACROSS)
    canvas = Canvas(figsize=(3.75 * min(ACROSS, len(plots)), 2.75 * rows), dpi=DPI, layout="constrained")
    FigureCanvasAgg(canvas)
    axes = canvas.subplots(rows, min(ACROSS, len(plots)), squeeze=False).flatten()
    for axis, (title, lines) in zip(axes, plots, strict=False):
        _draw(axis, title, lines, records)
    for axis in axes[len(plots) :]:
        axis.set_visible(False)
    out = io.BytesIO()
    canvas.savefig(out, format="png", metadata={"Software": None})
    return Figure("Training", picture(out.getvalue()), _caption(records))


Line = tuple[str, list[tuple[int, float]], dict[str, Any]]


def _plots(records: Records) -> list[tuple[str, list[Line]]]:
    names = {key for line in records.metrics for key in line if not key.startswith("probe_")} - OTHERS
    parts = [(name, points) for name in sorted(names) if (points := records.values(name))]
    loss: list[Line] = [("loss", records.values("loss"), {"linewidth": 1.9})]
    loss += [(name.replace("_", " "), points, {"linewidth": 1.1}) for name, points in parts]
    wait = [(step, 100 * share) for step, share in records.values("data_wait")]
    return [
        ("loss" if len(loss) == 1 else "loss and its parts", loss),
        (VALIDATED, [("validation", records.values("validation"), {"marker": "o", "markersize": 3})]),
        ("probe on held-out labels", _probes(records)),
        ("learning rate", [("lr", records.values("lr"), {})]),
        ("gradient norm, before clipping", [("norm", records.values("gradient_norm"), {})]),
        ("samples per second", [("rate", records.values("samples_per_second"), {})]),
        ("waiting for data, % of the time", [("wait", wait, {})]),
        ("GPU memory, MiB", [("memory", records.values("gpu_memory_mb"), {})]),
    ]


def _probes(records: Records) -> list[Line]:
    lines: list[Line] = []
    for number, (key, name) in enumerate(PROBES.items()):
        colour = COLOURS[number]
        if points := records.values(key):
            lines.append((name, points, {"marker": "o", "markersize": 3, "color": colour}))
        if floor := records.values(key.replace("probe_", FLOOR)):
            # The floor is what random weights reach: the value at step 0.
            whole = [(0, floor[0][1]), *floor]
            lines.append((f"{name}, random weights", whole, {"linestyle": "--", "linewidth": 1.0, "color": colour}))
    return lines


def _draw(axis: Any, title: str, lines: list[Line], records: Records) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    drawn = [line for line in lines if line[1]]
    for number, (name, points, how) in enumerate(drawn):
        style = {"color": COLOURS[number % len(COLOURS)], "linewidth": 1.4, **how}
        if len(points) < 3 and "linestyle" not in how:
            style = {"marker": "o", "markersize": 3, **style}
        axis.plot(*zip(*points, strict=True), label=name, **style)
    if title.startswith("probe"):
        axis.set_ylim(bottom=max(axis.get_ylim()[0], -0.5))  # below it a score says "worse than nothing" and no more
    if title.startswith("loss") and all(value > 0 for _, points, _ in drawn for _, value in points):
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_locator(NullLocator())
    elif title.startswith(("samples", "waiting", "GPU", "learning")):
        axis.set_ylim(bottom=0)
    if title == VALIDATED and (best := _best(records)) is not None:
        axis.plot(*best, marker="o", markersize=9, fillstyle="none", color="#d1495b", linestyle="none", label="kept")
    for step in records.resumed:
        axis.axvline(step, **MARK)
    if title.startswith("loss") and records.skipped:
        axis.plot(
            records.skipped, [0.015] * len(records.skipped), "|", color="#d1495b", markersize=7,
            transform=axis.get_xaxis_transform(), label="skipped",
        )  # fmt: skip
    axis.set_title(title, fontsize=9, loc="left")
    axis.set_xlabel("step", fontsize=8)
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if len(axis.lines) - len(records.resumed) > 1:
        axis.legend(frameon=False, fontsize=6.5)


def _best(records: Records) -> tuple[int, float] | None:
    """Return step and score of the weights that early stopping kept, None before the end or without it."""
    step = ((records.summary or {}).get("validation") or {}).get("step")
    return next(((at, value) for at, value in records.values("validation") if at == step), None)


def _caption(records: Records) -> str:
    text = "Means since the line before, not smoothed."
    if records.values("validation"):
        text += " The validation part decides which weights are kept (circle) and is not the test part."
    if records.resumed:
        text += f" Dotted: resumed at step {', '.join(f'{step:,}' for step in records.resumed)}."
    if records.skipped:
        text += f" Red ticks: {len(records.skipped)} skipped steps, whose loss or gradients were not finite."
    if records.values("probe_floor_r2") or records.values("probe_floor_auroc"):
        text += " Dashed: the same probe on random weights, the floor that features must beat."
    return text
