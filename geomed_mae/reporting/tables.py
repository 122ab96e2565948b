"""Tables of a report: the archive and its ledger, throughput, environment, and nested numbers of a summary."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from geomed_mae.reporting.page import Table, shown
from geomed_mae.reporting.records import Records


def duration(seconds: float) -> str:
    """Return a time as people say it: 45 s, 12 min 5 s, 3 h 20 min, 2 d 4 h."""
    whole = round(seconds)
    for large, small, size, unit in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= size:
            rest = whole % size // unit
            return f"{whole // size} {large}" + (f" {rest} {small}" if rest else "")
    return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"


def seconds_of(records: Records) -> float | None:
    """Return the seconds that a run has spent in its loop; of older runs that go on, None."""
    found = (records.summary or {}).get("seconds", records.last("seconds"))
    return None if found is None else float(found)


def throughput(records: Records) -> Table | None:
    """Return speed and time; None where nothing was measured."""
    rates = [value for _, value in records.values("samples_per_second")]
    waits = [value for _, value in records.values("data_wait")]
    seconds, rows = seconds_of(records), []
    if rates:
        spread = f"{shown(min(rates))} to {shown(max(rates))}"
        rows.append(("samples per second", shown(median(rates)), f"median of the log lines; {spread}"))
    if rates and records.batch_size:
        each = records.batch_size / max(median(rates), 1e-9)
        rows.append(("seconds per step", shown(each), f"{records.batch_size} samples a step"))
    if waits:
        rows.append(
            ("waiting for data", f"{100 * sum(waits) / len(waits):.1f} %", "of the time; mean of the log lines")
        )
    if memory := records.values("gpu_memory_mb"):
        rows.append(("GPU memory", f"{max(value for _, value in memory):,.0f} MiB", "largest"))
    if seconds is not None:
        rows.append(("time", duration(seconds), "in the loop, of all sessions together"))
    if probes := records.values("probe_seconds"):
        rows.append(("one probe", f"{median(value for _, value in probes):.2g} s", "median"))
    return Table("Throughput", ("", "value", "of what"), rows) if rows else None


def archive(found: dict[str, Any]) -> list[Table]:
    """Return the tables of archive.json: images by modality, channels, and the ledger."""
    if not found:
        return []
    modalities: dict[str, dict[str, Any]] = found.get("modalities", {})
    rows, channels = [], []
    for name, one in modalities.items():
        size = " x ".join(_span(pair, whole=True) for pair in one["size"])
        spacing = (
            " x ".join(_span(pair) for pair in one["spacing"]) + f" {one['unit']}" if one["spacing"] else "unknown"
        )
        low, mean, _ = (100 * value for value in one["valid"])
        stored = ", ".join(one["dtypes"])
        rows.append((name, one["images"], one["groups"], size, spacing, f"{mean:.4g} % (least {low:.4g} %)", stored))
        for entry in one["channels"]:
            values = f"{_span(entry['values'])} {entry['unit']}"
            channels.append((name, entry["name"], entry["kind"], entry["physics"], entry["images"], values))
    axes = {" x ".join(one["axes"]) for one in modalities.values()}
    note = f"Sizes and spacings: {' or '.join(sorted(axes))}, smallest to largest. Groups are patients or scenes."
    if bounds := found.get("bounds"):
        west, south, east, north = bounds
        note += f" On the globe, to whole degrees: longitude {west:g} to {east:g}, latitude {south:g} to {north:g}."
    head = ("modality", "images", "groups", "size", "spacing", "valid pixels", "stored as")
    return [
        Table("Data card of the archive", head, rows, note),
        Table("Channels", ("modality", "channel", "kind", "physics", "images", "values, 0.5 % to 99.5 %"), channels),
        _ledger(found),
    ]


def _ledger(found: dict[str, Any]) -> Table:
    counts = found.get("files", {})
    rows: list[tuple[Any, ...]] = [("used", "", "", counts.get("used", 0))]
    rows += [(one["status"], one["reason"], one["meaning"], one["files"]) for one in found.get("reasons", [])]
    files, used, skipped, unsupported = (counts.get(name, 0) for name in ("files", "used", "skipped", "unsupported"))
    parts = f"{used:,} used + {skipped:,} skipped + {unsupported:,} unsupported"
    note = f"{files:,} files found = {parts}: no file is left out unsaid."
    return Table("Ledger", ("status", "reason", "meaning", "files"), rows, note)


def _span(pair: Sequence[float], *, whole: bool = False) -> str:
    low, high = (f"{value:,.0f}" if whole or abs(value) >= 1e4 else f"{value:.4g}" for value in pair)
    return low if low == high else f"{low} to {high}"


def environment(found: dict[str, Any]) -> Table | None:
    """Return versions and hardware; None without a record of them."""
    rows = [(name.replace("_", " "), shown(value)) for name, value in found.items() if not isinstance(value, dict)]
    versions = found.get("versions")
    if isinstance(versions, dict):
        rows += [(f"version of {name}", str(value)) for name, value in versions.items()]
    fingerprint = found.get("archive", {}).get("fingerprint") if isinstance(found.get("archive"), dict) else None
    if fingerprint:
        rows.append(("fingerprint of the archive's pixels", str(fingerprint)))
    return Table("Environment", ("", ""), rows) if rows else None


def nested(title: str, value: dict[str, Any]) -> list[Table]:
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
            [(name, *(shown(entry) for entry in row.values())) for name, row in group.items()],
        )
        for columns, group in groups.items()
    ]
