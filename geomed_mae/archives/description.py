"""What a run keeps of its archive, for its report: numbers of images, files, sizes and channels.

No key, no file name, and no place closer than a degree.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from geomed_mae.archives.card import physics
from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.places import rounded_bounds
from geomed_mae.archives.statistics import ChannelStatistics
from geomed_mae.image import Channel
from geomed_mae.readers.reasons import Reason, status

AXES = ("slices", "rows", "columns")


def describe_archive(index: Index) -> dict[str, Any]:
    """Return plain values: `images`, `groups`, `files` by status, `reasons` of those that are not used, `bounds` (west,
    south, east, north in whole degrees, or None), and `modalities` by name.

    A modality has numbers of images and groups, `unit` of its spacing, per axis the smallest and largest `size` and
    `spacing`, `valid` (smallest, mean and largest share), `dtypes`, `flags` and `channels`.
    """
    by_modality: dict[str, list[Row]] = {}
    for row in index:
        by_modality.setdefault(Path(row.modality).stem, []).append(row)
    return {
        "images": len(index),
        "groups": len({row.group for row in index}),
        "files": index.ledger.counts,
        "reasons": [
            {"reason": name, "meaning": Reason[name].value, "status": status(Reason[name]), "files": count}
            for name, count in index.ledger.reasons.items()
        ],
        "bounds": rounded_bounds(row.footprint for row in index),
        "modalities": {name: _modality(rows) for name, rows in sorted(by_modality.items())},
    }


def _modality(rows: Sequence[Row]) -> dict[str, Any]:
    spaced = [row.spacing for row in rows if row.spacing is not None]
    shares = [row.valid_fraction for row in rows]
    return {
        "images": len(rows),
        "groups": len({row.group for row in rows}),
        "axes": list(AXES[-len(rows[0].shape) :]),
        "size": _spans([row.shape for row in rows]),
        "unit": "m" if rows[0].geometry == "raster" else "mm",
        "spacing": _spans(spaced) if spaced else None,
        "without_spacing": len(rows) - len(spaced),
        "valid": [round(value, 4) for value in (min(shares), statistics.fmean(shares), max(shares))],
        "dtypes": dict(Counter(row.dtype for row in rows).most_common()),
        "flags": dict(Counter(flag for row in rows for flag in row.flags).most_common()),
        "channels": _channels(rows),
    }


def _spans(values: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return (smallest, largest) per axis; images of other numbers of axes than the first are left out."""
    same = [one for one in values if len(one) == len(values[0])]
    return [[round(float(bound(column)), 6) for bound in (min, max)] for column in zip(*same, strict=True)]


def _channels(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return per channel its physics, unit and number of images, and the spans of medians and of values."""
    seen: dict[str, list[tuple[Channel, ChannelStatistics]]] = {}
    for row in rows:
        for channel, entry in zip(row.channels, row.statistics, strict=True):
            seen.setdefault(channel.name, []).append((channel, entry))
    return [
        {
            "name": name,
            "kind": entries[0][0].kind,
            "physics": physics([channel for channel, _ in entries]),
            "unit": "/".join(sorted({channel.unit for channel, _ in entries})),
            "images": len(entries),
            "median": [bound(entry.median for _, entry in entries) for bound in (min, max)],
            "values": [min(entry.p005 for _, entry in entries), max(entry.p995 for _, entry in entries)],
        }
        for name, entries in seen.items()
    ]
