"""The verb report: a run folder -> report.html, one self-contained file (pictures inside, no script, no network)."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError, IntegrityError, OutputError

CURVE_KEYS = ("loss", "samples_per_second", "gradient_norm")
"""Values of metrics.jsonl that are drawn over the steps, the first on a logarithmic axis where all are positive."""

NO_LOSS = {"step", "skipped", "lr", "data_wait", "valid_fraction", *CURVE_KEYS}
"""The other values of metrics.jsonl are parts of the loss, and drawn beside it."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture with a title and a sentence that says what to see; `source` is a data URI."""

    title: str
    source: str
    caption: str


@dataclass(frozen=True, slots=True)
class Table:
    """A table with one header row."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[Any, ...]]


@dataclass(slots=True)
class Section:
    """One part of a report, usually a run."""

    title: str
    lead: str
    tiles: list[tuple[str, str]] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    records: list[tuple[str, str]] = field(default_factory=list)


def picture(data: bytes) -> str:
    """Return a PNG as a data URI."""
    return f"data:image/png;base64,{base64.b64encode(data).decode('ascii')}"


def read_run(run: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return a run's summary and the lines of its metrics.

    Raises:
        ConfigError: the folder is no run, or the run has not finished.
        IntegrityError: a record does not parse.
    """
    if not (run / "recipe.resolved.yaml").is_file():
        raise ConfigError(f"'{run}' is no run: it has no recipe.resolved.yaml")
    if not (run / "summary.json").is_file():
        raise ConfigError(f"the run '{run}' has not finished; continue it with --resume")
    try:
        summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
        lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return summary, [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise IntegrityError(f"the records of the run '{run}' are damaged: {error}") from error


def _curves(metrics: Sequence[dict[str, Any]]) -> Figure | None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    drawn = [key for key in CURVE_KEYS if sum(1 for line in metrics if line.get(key) is not None) > 1]
    parts = sorted({key for line in metrics for key in line} - NO_LOSS)
    if not drawn:
        return None
    figure, axes = plt.subplots(1, len(drawn), figsize=(4.6 * len(drawn), 3.1), layout="constrained", squeeze=False)
    for axis, key in zip(axes[0], drawn, strict=True):
        for name in [key, *(parts if key == "loss" else [])]:
            points = [(line["step"], line[name]) for line in metrics if line.get(name) is not None]
            if points:
                axis.plot(*zip(*points, strict=True), label=name, linewidth=1.6 if name == key else 1.0)
        if key == "loss" and all(line.get("loss", 1) > 0 for line in metrics):
            axis.set_yscale("log")
        axis.set(title=key.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
        if len(axis.lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return Figure("Training", picture(out.getvalue()), "Measured at the logged steps, not smoothed.")


def _panels(run: Path) -> list[Figure]:
    return [
        Figure(
            f"Reconstructions: {path.stem.replace('_', ' ')}",
            picture(path.read_bytes()),
            "From left to right: input, what the encoder saw, reconstruction in physical units, error. "
            "Visible patches are copied.",
        )
        for path in sorted((run / "panels").glob("*.png"))
    ]


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _tables(title: str, value: dict[str, Any]) -> list[Table]:
    """Return a nested dictionary as tables: the innermost dictionaries become rows, named by the way to them."""
    rows: dict[str, dict[str, Any]] = {}

    def _walk(name: str, node: dict[str, Any]) -> None:
        plain = {key: entry for key, entry in node.items() if not isinstance(entry, dict)}
        if plain:
            rows[name] = plain
        for key, entry in node.items():
            if isinstance(entry, dict):
                _walk(f"{name} / {key}" if name else key, entry)

    _walk("", value)
    groups: dict[tuple[str, ...], dict[str, dict[str, Any]]] = {}
    for name, row in rows.items():
        groups.setdefault(tuple(row), {})[name] = row
    return [
        Table(
            title,
            ("", *(column.replace("_", " ") for column in columns)),
            [(name, *(_shown(entry) for entry in row.values())) for name, row in group.items()],
        )
        for columns, group in groups.items()
    ]


def run_section(run: Path, title: str) -> Section:
    """Return the part of a report that shows one run.

    Raises:
        as `read_run`.
    """
    summary, metrics = read_run(run)
    section = Section(title, f"{summary.get('verb', 'run')}, {_shown(summary.get('steps', '?'))} steps")
    for key, value in summary.items():
        if isinstance(value, dict):
            section.tables += _tables(key.replace("_", " "), value)
        elif isinstance(value, int | float | str) and key != "verb":
            section.tiles.append((key.replace("_", " "), _shown(value)))
    curves = _curves(metrics)
    section.figures = [*([curves] if curves else []), *_panels(run)]
    for name, file in (
        ("Summary", "summary.json"),
        ("Resolved recipe", "recipe.resolved.yaml"),
        ("Environment", "environment.json"),
        ("Model card", "encoder/README.md"),
    ):
        if (run / file).is_file():
            section.records.append((name, (run / file).read_text(encoding="utf-8")))
    return section


def write_page(out: Path, title: str, lead: str, sections: Sequence[Section]) -> Path:
    """Write a self-contained HTML page.

    Raises:
        OutputError: it cannot be written.
    """
    import jinja2

    template = (Path(__file__).parent / "templates" / "report.html.j2").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    html = environment.from_string(template).render(
        title=title, lead=lead, sections=sections, version=version("geomed-mae")
    )
    try:
        out.write_text(html, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"the report cannot be written to '{out}': {error.strerror}") from error
    return out


def report(run: str | Path) -> Path:
    """Write RUN/report.html from what the run has recorded and return its path.

    Raises:
        ConfigError: the folder is no finished run.
        IntegrityError, OutputError: records are damaged; the page cannot be written.
    """
    run = Path(run)
    section = run_section(run, "Run")
    return write_page(run / "report.html", f"geomed-mae {section.lead.split(',')[0]} report", section.lead, [section])
