"""The split that is stored with an index, `splits.json`: made, kept over later scans, checked, and applied.

Public, like `index.parquet`: it holds keyed hashes and names of parts.
"""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from geomed_mae.archives.duplicates import near_duplicates
from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.splits import BUFFER, NO_LOCATION, SplitRequest, split_by_block, split_by_shares
from geomed_mae.errors import ConfigError, IntegrityError, OutputError

FILE = "splits.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A split of an index: every image's key -> the name of its part, "buffer" or "no-location"."""

    request: SplitRequest
    parts: Mapping[str, str]

    @property
    def counts(self) -> dict[str, int]:
        """Number of images by part, parts in order, then what was set aside."""
        counts = Counter(self.parts.values())
        return {name: counts[name] for name in (*self.request.names, BUFFER, NO_LOCATION) if counts[name]}

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values, without identifiers."""
        request = self.request
        return {
            "version": FORMAT_VERSION,
            "name": request.method,
            "method": request.method,
            "parameters": request.parameters(),
            "seed": request.seed,
            "parts": dict(self.parts),
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Split:
        """Inverse of `to_json`."""
        parameters = dict(data["parameters"])
        shares = tuple((str(name), float(share)) for name, share in parameters.pop("shares").items())
        request = SplitRequest(method=data["method"], shares=shares, seed=data["seed"], **parameters)
        return cls(request=request, parts={str(key): str(part) for key, part in data["parts"].items()})


def make_split(index: Index, request: SplitRequest | None, previous: Split | None = None) -> Split | None:
    """Split an index, or carry its earlier split over to the images that it has now.

    Args:
        index: the images.
        request: None keeps `previous`, if there is one.
        previous: the split that the index had before; kept where `request` asks for the same.

    Raises:
        as `split_by_shares` and `split_by_block`.
    """
    if request is None:
        if previous is None:
            return None
        request = previous.request
    kept = previous.parts if previous is not None and previous.request == request else None
    keys = [row.key for row in index.rows]
    if request.method == "group":
        return Split(request=request, parts=split_by_shares(index.rows, index.digests, request, kept))
    looks = near_duplicates([index.looks[key] for key in keys])
    parts = split_by_block(
        index.rows,
        request.shares,
        block_m=request.block_m,
        buffer_m=request.buffer_m,
        seed=request.seed,
        exclude_unlocated=request.exclude_unlocated,
        twins=dict(zip(keys, looks, strict=True)),
        previous=kept,
    )
    return Split(request=request, parts=parts)


def save_split(folder: Path, split: Split | None) -> None:
    """Write `splits.json` into an index folder; None removes an older one.

    Raises:
        OutputError: it cannot be written.
    """
    try:
        if split is None:
            (folder / FILE).unlink(missing_ok=True)
        else:
            (folder / FILE).write_text(json.dumps(split.to_json(), indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"the split cannot be written to '{folder}': {error.strerror or error}") from error


def load_split(folder: Path, rows: Sequence[Row] | None = None) -> Split | None:
    """Read the split of an index folder, None where it has none; `rows` are checked to be those that it splits.

    Raises:
        IntegrityError: it is damaged, or of other images.
    """
    if not (folder / FILE).is_file():
        return None
    try:
        data = json.loads((folder / FILE).read_text(encoding="utf-8"))
        split = Split.from_json(data)
        if data["version"] != FORMAT_VERSION:
            raise IntegrityError(f"{FILE} in '{folder}' is of version {data['version']}: scan again")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(f"{FILE} in '{folder}' is damaged ({error}): scan again with --split") from error
    if rows is not None and {row.key for row in rows} != set(split.parts):
        raise IntegrityError(f"{FILE} in '{folder}' splits other images than the index holds: scan again with --split")
    allowed = {*split.request.names, BUFFER, NO_LOCATION}
    if unknown := set(split.parts.values()) - allowed:
        raise IntegrityError(f"{FILE} in '{folder}' names the unknown part '{sorted(unknown)[0]}': scan again")
    return split


def earlier_split(folder: Path, *, replaced: bool) -> Split | None:
    """Return the split that a folder's last scan has stored, None where there is none.

    A damaged one is an error, unless it is going to be `replaced`: then its images are drawn anew.

    Raises:
        IntegrityError: it is damaged, and nothing replaces it.
    """
    try:
        return load_split(folder)
    except IntegrityError:
        if not replaced:
            raise
        logging.getLogger(__name__).warning("the stored split of '%s' is damaged: images are drawn anew", folder)
        return None


def restrict(index: Index, folder: Path, part: str) -> Index:
    """Return the images of one part of an index's stored split.

    Raises:
        ConfigError: the index has no split, or the split no such part with images.
        IntegrityError: as `load_split`.
    """
    split = load_split(folder, index.rows)
    if split is None:
        raise ConfigError(
            f"data.split is '{part}', but '{folder}' has no stored split; make one with geomed-mae scan --split group"
        )
    rows = [row for row in index.rows if split.parts[row.key] == part]
    if not rows:
        known = ", ".join(f"{name} ({count} images)" for name, count in split.counts.items())
        raise ConfigError(f"data.split is '{part}', but the split of '{folder}' has {known}")
    return index.subset(rows)
