"""One run as a section of a report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from geomed_mae.recipe_file import dump_yaml
from geomed_mae.reporting import scores, tables
from geomed_mae.reporting.curves import curves
from geomed_mae.reporting.markdown import to_html
from geomed_mae.reporting.page import Section, shown
from geomed_mae.reporting.records import Records, read_run, without_folders
from geomed_mae.reporting.series import panels

TILES = {
    "loss_last": "last loss",
    "loss_first": "first loss",
    "images": "images",
    "samples": "samples seen",
    "valid_fraction": "valid pixels, mean",
    "samples_per_second": "samples per second",
}
"""Numbers of a summary that stand on top, in this order, and what they are called."""

TOLD = {*TILES, "verb", "steps", "seconds", "skipped_steps", "task", "twin", "frozen"}
"""Numbers of a summary that are told in words or tiles of their own."""
NAMED = {"labels": "Images and label files"}
SCORED = ("test", "split", "few", "leakage", "transductive", "validation")
"""Parts of a fine-tuning summary that have tables, sentences and tiles of their own (`scores`)."""


def run_section(run: Path, title: str) -> Section:
    """Return the part of a report that shows one run, finished or not.

    Raises:
        as `read_run`; IntegrityError: a picture is damaged.
    """
    records = read_run(run)
    section = Section(title, _lead(records), notices=_notices(records), tiles=_tiles(records))
    drawn = curves(records)
    section.figures = [*([drawn] if drawn else []), *panels(run / "panels", _channels(records))]
    known: tuple[str, ...] = ()
    if records.verb == "finetune":
        known = SCORED
        section.tables = scores.tables(records.summary or {})
    section.tables += [
        table
        for key, value in (records.summary or {}).items()
        if isinstance(value, dict) and key not in known
        for table in tables.nested(NAMED.get(key, key.replace("_", " ").capitalize()), value)
    ]
    section.tables += [table for table in (tables.throughput(records),) if table]
    section.tables += tables.archive(records.archive)
    section.tables += [table for table in (tables.environment(records.environment),) if table]
    card = run / "encoder" / "README.md"
    if card.is_file():
        section.cards.append(("Model card of the encoder", to_html(card.read_text(encoding="utf-8"))))
    if records.recipe:
        section.records.append(("Resolved recipe", dump_yaml(without_folders(records.recipe))))
    if records.summary is not None:
        section.records.append(("Summary", (run / "summary.json").read_text(encoding="utf-8")))
    return section


def _channels(records: Records) -> dict[str, list[str]]:
    """Return panel -> names of its channels as far as their errors were recorded, {} before the end of a run."""
    errors = (records.summary or {}).get("reconstruction_error")
    by_panel = errors.items() if isinstance(errors, dict) else ()
    return {name: list(entry) for name, entry in by_panel if isinstance(entry, dict)}


def _lead(records: Records) -> str:
    steps, seen = shown(records.done), ", ".join(records.archive.get("modalities", {}))
    of_what = f"{records.verb}, {seen}" if seen else records.verb
    if records.summary is None:
        return f"{of_what}, step {steps} of {shown(records.planned)}: not finished"
    return f"{of_what}, {steps} steps"


def _notices(records: Records) -> list[str]:
    summary = records.summary or {}
    found = scores.warnings(summary) if records.verb == "finetune" else []
    if summary.get("twin"):
        dropped = summary.get("dropped")
        without = f", without {' and '.join(dropped)}, which protect pretrained weights" if dropped else ""
        found.append(f"This is the scratch twin of a pretrained run: the same from random weights{without}.")
    if summary.get("frozen"):
        found.append("The encoder was frozen: the head alone was trained.")
    if records.summary is None:
        found.append(
            f"This run has not finished: step {shown(records.done)} of {shown(records.planned)}. It goes on, or waits "
            "for --resume. Numbers and pictures are those of now."
        )
    if records.resumed:
        found.append(f"Resumed at step {', '.join(f'{step:,}' for step in records.resumed)}.")
    if records.skipped:
        some = ", ".join(f"{step:,}" for step in records.skipped[:8])
        more = f" and {len(records.skipped) - 8} more" if len(records.skipped) > 8 else ""
        found.append(f"Steps skipped because loss or gradients were not finite: {some}{more}.")
    return found


def _tiles(records: Records) -> list[tuple[str, str]]:
    summary = records.summary or {
        "loss_last": records.last("loss"),
        "loss_first": next((value for _, value in records.values("loss")), None),
        "samples": None if records.last("samples") is None else int(records.last("samples") or 0),
        "samples_per_second": records.last("samples_per_second"),
        "images": records.archive.get("images"),
    }
    tiles = [(name, _tile(key, summary[key])) for key, name in TILES.items() if summary.get(key) is not None]
    if (seconds := tables.seconds_of(records)) is not None:
        tiles.append(("time", tables.duration(seconds)))
    if probe := _probe(records):
        tiles.append(probe)
    if isinstance(test := summary.get("test"), dict):
        tiles.insert(0, scores.tile(test))
    if isinstance(validation := summary.get("validation"), dict):
        step = f"validation, best at step {shown(validation.get('step'))}"
        tiles.insert(
            1, (step + (", stopped early" * bool(validation.get("stopped_early"))), shown(validation.get("best")))
        )
    tiles.append(("skipped steps", shown(len(records.skipped) or summary.get("skipped_steps", 0))))
    return tiles + [
        (key.replace("_", " "), shown(value))
        for key, value in summary.items()
        if isinstance(value, int | float | str) and key not in TOLD
    ]


def _tile(key: str, value: Any) -> str:
    return f"{100 * value:.4g} %" if key == "valid_fraction" else shown(value)


def _probe(records: Records) -> tuple[str, str] | None:
    for key, name in (("r2", "R²"), ("auroc", "AUROC")):
        value, floor = records.last(f"probe_{key}"), records.last(f"probe_floor_{key}")
        if value is not None and floor is not None:
            return f"probe {name} (random weights {floor:.2f})", f"{value:.2f}"
    return None
