"""A study as a section of a report: the verdict, both arms, their paired difference, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from geomed_mae.errors import ConfigError
from geomed_mae.recipe_file import dump_yaml
from geomed_mae.reporting import scores, tables
from geomed_mae.reporting.arms import CALLED, forest, learning
from geomed_mae.reporting.page import Section, Table, shown
from geomed_mae.reporting.records import Records, read_run, read_study, without_folders
from geomed_mae.training.study_files import members

PAIRED = (
    "Every arm and seed is scored on the same test images, so that the difference is paired: its interval can be clear "
    "of 0 where those of the arms overlap, because {unit} that are hard are hard for both. "
)
METHOD = (
    "Intervals are 95 % percentile bootstraps over {unit} (2,000 resamples), widened for small numbers of them by "
    "Student's t. The one that counts seeds too adds the scatter of the values per seed, with few degrees of freedom "
    "where seeds are few: it is for a claim about training as such, the other for a claim about these very runs."
)
WORDS = {"paid": "good", "did not pay": "bad", "cannot be told": "open"}
"""Outcome -> how the verdict is set; "unsure" besides where seeds leave it open."""
MOST_ROWS = 60
"""Groups that the table lists."""


def study_section(folder: Path) -> Section:
    """Return the part of a report that shows a study, finished or not.

    Raises:
        ConfigError: no member has logged anything yet.
        IntegrityError: records are damaged.
    """
    study = read_study(folder)
    runs = _runs(folder)
    if not any(runs.values()):
        raise ConfigError(f"no run of the study '{folder}' has logged a step yet; wait, or continue it with --resume")
    summary = study.summary
    section = Section("Study", _lead(study, runs), notices=_notices(study, runs))
    if summary is not None:
        section.tiles = _tiles(summary)
        if summary.get("verdict"):
            settled = WORDS[summary["outcome"]]
            settled += " " + "unsure" * (settled != "open" and not summary.get("seeds_agree"))
            section.verdict = (settled.strip(), summary["verdict"])
        section.figures = [figure for figure in (forest(summary),) if figure]
        section.tables = _tables(summary)
        section.records.append(("Summary", (folder / "summary.json").read_text(encoding="utf-8")))
    if drawn := learning(runs):
        section.figures.append(drawn)
    section.tables.append(_members(runs))
    first = next(one for each in runs.values() for one in each)
    section.tables += [table for table in (tables.environment(first.environment),) if table]
    if study.recipe:
        section.records.insert(0, ("Resolved recipe", dump_yaml(without_folders(study.recipe))))
    return section


def _runs(folder: Path) -> dict[str, list[Records]]:
    found: dict[str, list[Records]] = {}
    for path in members(folder):
        try:
            found.setdefault(path.parent.name, []).append(read_run(path))
        except ConfigError:
            continue  # one that has not logged anything yet
    return found


def _lead(study: Records, runs: Mapping[str, list[Records]]) -> str:
    seeds = max(len(each) for each in runs.values())
    arms = " and ".join(CALLED[arm] for arm in runs)
    done = sum(one.summary is not None for each in runs.values() for one in each)
    state = "" if study.summary else f": not finished, {done} runs are"
    return f"finetune, {arms}, {seeds} seed{'s' * (seeds > 1)}{state}"


def _notices(study: Records, runs: Mapping[str, list[Records]]) -> list[str]:
    summary = study.summary
    if summary is None:
        return ["This study has not finished: it goes on, or waits for --resume. It has no verdict before its end."]
    found = scores.warnings({**summary, "split": summary["used"].get("split")}) + list(summary.get("advice") or [])
    if summary["used"].get("frozen") and len(runs) > 1:
        found.append(
            "The encoder was frozen in both arms: random weights are then the floor of random features, and not what "
            "training from scratch reaches."
        )
    if dropped := summary.get("dropped"):
        found.append(
            f"The runs from random weights go without {' and '.join(dropped)}: these only protect pretrained weights, "
            "and would hold random ones back. All else is the same."
        )
    return found


def _tiles(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    tiles = []
    for arm, one in summary["arms"].items():
        if one.get("mean") is not None:
            tiles.append((f"{CALLED[arm]} ({scores.interval(one) or 'no interval'})", scores.number(one["mean"])))
    gain, unit = summary.get("difference"), summary["unit"]
    if gain and gain.get("mean") is not None:
        ends = scores.interval(gain, signed=True) or "no interval"
        with_seeds = scores.interval(gain, "_seeds", signed=True)
        more = f"; counting seeds too {with_seeds}" if with_seeds else ""
        tiles.append((f"difference ({ends} over {unit}{more})", f"{gain['mean']:+.3f}"))
    split = summary["used"].get("split") or {}
    groups = split.get("groups") or {}
    if groups.get("test"):
        images = "" if unit == "images" else f", {split['test']:,} images"
        tiles.append((f"test {unit}{images}", shown(groups["test"])))
    if summary.get("seconds"):
        tiles.append(("time of all runs", tables.duration(float(summary["seconds"]))))
    return tiles


def _tables(summary: Mapping[str, Any]) -> list[Table]:
    found: list[Table | None] = [_arms(summary), _per_class(summary)]
    found += [scores.labels(dict(summary["used"])), _groups(summary)]
    found.append(scores.leakage(summary))
    return [table for table in found if table]


def _arms(summary: Mapping[str, Any]) -> Table | None:
    if not summary.get("metric"):
        return None
    lines = {CALLED[arm]: one for arm, one in summary["arms"].items()}
    if summary.get("difference"):
        lines["difference"] = summary["difference"]
    note = PAIRED + METHOD if summary.get("difference") else METHOD
    seeds = [run["seed"] for run in summary["runs"] if run["arm"] == summary["runs"][0]["arm"]]
    head = ("", "mean", f"95 % over {summary['unit']}", "counting seeds too", *(f"seed {seed}" for seed in seeds))
    rows = []
    for name, one in lines.items():
        signed = name == "difference"
        ends = [scores.interval(one, which, signed=signed) or "-" for which in ("", "_seeds")]
        numbers = [scores.number(value, signed=signed) for value in (one["mean"], *one["per_seed"])]
        rows.append((name, numbers[0], *ends, *numbers[1:]))
    return Table(f"Score: {summary['metric']}", head, rows, note.format(unit=summary["unit"]))


def _per_class(summary: Mapping[str, Any]) -> Table | None:
    classes = summary.get("classes")
    if not classes:
        return None
    arms = [arm for arm in CALLED if arm in summary["arms"]]
    head = ["class", *(CALLED[arm] for arm in arms)]
    paired = "difference" in summary
    rows = []
    for name, one in classes.items():
        cells = [scores.with_interval(one[arm]) for arm in arms]
        if paired:
            cells.append(scores.with_interval(one["difference"], signed=True))
        rows.append((name if one["counted"] else f"{name} (not in the mean)", *cells))
    if paired:
        head.append("difference")
    note = (
        f"In brackets: 95 % interval over {summary['unit']}, mean over seeds; not corrected for the number of classes: "
        "one of twenty misses the truth by chance."
    )
    return Table("Scores per class", tuple(head), rows, note)


def _groups(summary: Mapping[str, Any]) -> Table | None:
    groups = [line for line in summary.get("groups") or [] if "difference" in line]
    if not groups:
        return None
    ordered = sorted(groups, key=lambda line: line["difference"])
    unit = summary["unit"]
    behind = sum(line["difference"] < 0 for line in groups)
    rows = [
        (
            line["group"][:8],
            line["images"],
            scores.number(line["pretrained"]),
            scores.number(line["scratch"]),
            f"{line['difference']:+.3f}",
            ", ".join(f"{value:+.3f}" for value in line["per_seed"]),
        )
        for line in ordered[:MOST_ROWS]
    ]
    note = (
        f"Worst first: pretrained weights are behind on {behind} of {len(groups)} {unit}. Names are the first digits "
        "of the INDEX's group keys, which only its owner can trace."
    )
    if len(ordered) > MOST_ROWS:
        note += f" The {MOST_ROWS} worst are listed; summary.json has all."
    head = (unit.removesuffix("s"), "images", *CALLED.values(), "difference", "by seed")
    return Table(f"Test {unit}", head, rows, note)


def _members(runs: Mapping[str, list[Records]]) -> Table:
    rows = []
    for arm, each in runs.items():
        for one in each:
            summary = one.summary or {}
            test, validation = summary.get("test") or {}, summary.get("validation") or {}
            seconds = tables.seconds_of(one)
            rows.append(
                (
                    f"{arm}/{one.path.name}",
                    scores.number(test.get("value")),
                    scores.number(validation.get("best")),
                    shown(validation.get("step")),
                    f"{one.done:,}" + (", stopped early" if validation.get("stopped_early") else ""),
                    "-" if summary.get("loss_last") is None else shown(summary["loss_last"]),
                    "-" if seconds is None else tables.duration(seconds),
                )
            )
    head = ("run", "test score", "best validation", "at step", "steps", "last loss", "time")
    note = (
        "Each is an ordinary run folder, of which geomed-mae report writes a page, and which predict and export take."
    )
    return Table("Runs", head, rows, note)
