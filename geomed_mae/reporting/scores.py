"""Scores of a fine-tuning run as tables: in all and per class with intervals, labels that were used, leakage record."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from geomed_mae.reporting.page import Table, shown

ABOUT = (
    "In brackets: 95 % interval over groups (patients, scenes) by bootstrap; it says how far other test groups could "
    "change the number, not how far another seed could. Intervals of classes are not corrected for their number."
)
SEGMENT = {
    "dice_over_images": "Dice, mean over images",
    "iou_over_images": "IoU, mean over images",
    "iou": "IoU over all pixels",
    "recall": "recall",
    "precision": "precision",
}
CLASSIFY = {
    "interval": "",
    "sensitivity": "sensitivity",
    "specificity": "specificity",
    "precision": "precision",
    "f1": "F1",
    "images_true": "images with it",
    "images_false": "without",
}
"""Columns of the tables per class: key of the summary, and what it is called ("" is the headline)."""
WHOLE = {
    "value": "",
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "mean_foreground_iou": "mean foreground IoU, over pixels",
    "average_precision": "average precision",
    "auroc": "AUROC",
    "brier": "Brier score",
    "calibration_error": "expected calibration error",
}


def interval(found: Mapping[str, Any] | None, which: str = "", *, signed: bool = False) -> str:
    """Return "0.701 to 0.748", or "" without an interval; `which` "_seeds" is the one that counts seeds too."""
    if not found or found.get(f"low{which}") is None or found.get(f"high{which}") is None:
        return ""
    return " to ".join(number(found[f"{end}{which}"], signed=signed) for end in ("low", "high"))


def number(value: Any, *, signed: bool = False) -> str:
    """Return a score with three digits after the point, "-" where there is none."""
    if value is None:
        return "-"
    return format(value, "+.3f" if signed else ".3f") if isinstance(value, float) else shown(value)


def with_interval(found: Mapping[str, Any] | None, *, signed: bool = False) -> str:
    """Return "0.724 (0.701 to 0.748)"; the value alone without an interval."""
    if not found:
        return "-"
    ends, mean = interval(found, signed=signed), number(found.get("mean"), signed=signed)
    return f"{mean} ({ends})" if ends else mean


def tables(summary: Mapping[str, Any]) -> list[Table]:
    """Return the tables of a finished run: scores in all and per class, labels, leakage record."""
    found: list[Table | None] = []
    if test := summary.get("test"):
        found += [_whole(test), _per_class(test), _surfaces(test), confusion(test)]
    found += [labels(summary), leakage(summary)]
    return [table for table in found if table]


def tile(test: Mapping[str, Any]) -> tuple[str, str]:
    """Return the headline with its interval as (name, value)."""
    ends = interval(test.get("interval"))
    return f"{test['metric']}{f' ({ends})' if ends else ''}", number(test["value"])


def _whole(test: Mapping[str, Any]) -> Table:
    intervals = test.get("intervals") or {}
    rows = []
    for key, name in WHOLE.items():
        # What the headline says already is not said twice.
        if test.get(key) is None or (key != "value" and name and name.lower() in test["metric"].lower()):
            continue
        own = test.get("interval") if key == "value" else intervals.get(key)
        rows.append((name or test["metric"], number(test[key]), interval(own) or "-"))
    groups = f"{test['images']:,} images of {test['groups']:,} groups that no label was learned from. "
    return Table("Scores on the test part", ("", "value", "95 % interval"), rows, groups + ABOUT)


def _per_class(test: Mapping[str, Any]) -> Table:
    segment = test["task"] == "segment"
    columns = SEGMENT if segment else CLASSIFY
    head = ["class", *(name or test["metric"].split(",")[0] for name in columns.values())]
    rows = []
    for name, one in test["classes"].items():
        cells = [with_interval(one[key]) if isinstance(one.get(key), dict) else number(one.get(key)) for key in columns]
        rows.append((name, *cells, *((one["images"],) if segment else ())))
    if segment:
        head.append("images with it")
    note = "The first class is the background, which the mean leaves out." if segment else ""
    return Table("Scores per class", tuple(head), rows, note)


def _surfaces(test: Mapping[str, Any]) -> Table | None:
    rows = []
    for name, one in test["classes"].items():
        found = one.get("surface_distance")
        if isinstance(found, dict) and isinstance(found.get("hd95"), dict):
            unit = found["unit"]
            cells = [f"{with_interval(found[key])} {unit}" for key in ("hd95", "assd")]
            rows.append((name, *cells, *(shown(found.get(f"images_{key}")) for key in ("missed", "invented"))))
    head = ("class", "95 % Hausdorff distance", "mean surface distance", "images missed", "images invented")
    note = "A class that is only in the truth (missed) or only in the prediction (invented) has no distance there."
    return Table("Surface distances", head, rows, note) if rows else None


def confusion(test: Mapping[str, Any]) -> Table | None:
    """Return the confusion matrix with shares of each true class; None where there is none."""
    counts = test.get("confusion")
    if not counts:
        return None
    names = list(test["classes"])
    rows = []
    for name, line in zip(names, counts, strict=True):
        total = sum(line)
        shares = [f"{100 * count / total:.1f} %" if total else "-" for count in line]
        rows.append((name, *shares, f"{total:,}"))
    of = "pixels" if test["task"] == "segment" else "images"
    return Table("Confusion", ("true \\ found", *names, of), rows, "Shares of each true class (a row).")


def labels(summary: Mapping[str, Any]) -> Table | None:
    """Return which labels were learned from, looked at and scored; None where nothing is recorded."""
    split = summary.get("split")
    if not isinstance(split, dict):
        return None
    groups = split.get("groups") or {}
    rows = [
        (part, shown(split.get(part, 0)), shown(groups.get(part)), what)
        for part, what in (
            ("train", "learned from"),
            ("validation", "looked at for early stopping"),
            ("test", "scored, once, at the end"),
        )
    ]
    notes = {
        "group": "Parts are whole groups.",
        "stored": "Parts are as stored with the INDEX.",
        "block": "Parts are blocks of the same scenes: the score says how well the rest of these scenes is filled in.",
        "none": "Nothing was held out, so that there is no score.",
    }
    note = notes.get(str(split.get("unit")), "")
    if few := summary.get("few"):
        asked = (
            f"labels.shots={few['shots']}" if few.get("shots") is not None else f"labels.fraction={few['fraction']:g}"
        )
        note += (
            f" Few labels: {asked} drew {few['images']:,} of {few['of_images']:,} images ({few['groups']:,} of "
            f"{few['of_groups']:,} groups), by the run's seed."
        )
    return Table("Labels", ("part", "images", "groups", "what for"), rows, note.strip())


def leakage(summary: Mapping[str, Any]) -> Table | None:
    """Return what was checked before scores were made; None where nothing is recorded."""
    record = summary.get("leakage")
    if not isinstance(record, dict):
        return None
    rows: list[tuple[str, str]] = []
    _walk("", record, rows)
    note = (
        "Parts were compared before training; shared patients, pixels, look-alikes or ground would have ended the run."
    )
    if allowed := summary.get("transductive"):
        _walk("transductive", allowed, rows)
        note += " Pretraining on test images without their labels was allowed (--transductive)."
    return Table("Leakage record", ("", ""), rows, note)


def warnings(summary: Mapping[str, Any]) -> list[str]:
    """Return the sentences that no reader of a score may miss: what pretraining saw, and what was not compared."""
    found = [sentence] if (sentence := _transductive(summary)) else []
    missing = (summary.get("leakage") or {}).get("not_compared")
    if missing:
        found.append(
            f"Leaks could not be ruled out wholly: {'; '.join(map(str, missing))}. A test image may have been seen."
        )
    if (summary.get("split") or {}).get("unit") == "block":
        found.append(
            "Training and test are blocks of the same scenes: the scores say how well the rest of these very scenes is "
            "filled in, and nothing about other scenes."
        )
    return found


def _transductive(summary: Mapping[str, Any]) -> str | None:
    """Return the sentence that no reader of a score may miss, where pretraining saw test images."""
    allowed = summary.get("transductive")
    if not isinstance(allowed, dict) or not allowed.get("allowed"):
        return None
    seen, test = allowed.get("test_images_pretrained_on"), ((summary.get("split") or {}).get("test"))
    of = f" of {test:,}" if isinstance(test, int) else ""
    return (
        f"TRANSDUCTIVE: pretraining was allowed to see test images without their labels, and saw {shown(seen)}{of} of "
        "them. The scores are about these images, and are no estimate for new ones."
    )


def _walk(name: str, node: Any, rows: list[tuple[str, str]]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            words = str(key).replace("_", " ")
            _walk(f"{name}, {words}" if name else words, value, rows)
    elif isinstance(node, list):
        rows.append((name, ", ".join(shown(entry) for entry in node) or "-"))
    else:
        rows.append((name, ("yes" if node else "no") if isinstance(node, bool) else shown(node)))
