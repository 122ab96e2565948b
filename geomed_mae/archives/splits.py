"""Splits: no patient, no scene and no neighbourhood on two sides.

Slice-level splits inflate accuracy by 5 to 30 points (Tampu et al. 2022, s41597-022-01618-6), and neighbouring scenes
are nearly as close as neighbouring slices (Ploton et al. 2020, s41467-020-18321-y), so there are two kinds only:

    group   whole groups (patient, scene, everything that overlaps or looks the same; see `identity.groups`)
    block   blocks of an equal-area grid decide, and images nearer than a buffer to another part are set aside

Which part a group or block belongs to follows from a hash of the seed and of what it holds: neither the order of files
nor the salt of keys matters, and images that are added later do not move others. Shares therefore hold on average, not
exactly; only a part that would stay empty is given the group that came nearest to it. A split that is stored with an
index is kept when the archive is scanned again: images keep their part, and new ones that conflict with it are set
aside. Where a conflict is among old images, because new ones connect two groups, the later part (test) keeps its
images and those of the earlier one (train) are set aside: an image leaves a part, but never joins another.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.archives.places import Place, block_of, closer_than
from geomed_mae.errors import ConfigError, LeakageError

BUFFER = "buffer"
"""Images that are in no part because they are too near to, or the same as, images of another."""

NO_LOCATION = "no-location"
"""Images of a block split that have no place on the globe and were excluded on request."""

PART_NAMES = {2: ("train", "test"), 3: ("train", "validation", "test")}


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitRequest:
    """How to split.

    Attributes:
        method: "group" or "block".
        shares: (name, share) of each part, shares summing to 1; later parts win conflicts, so the test part comes last.
        seed: another seed, another split.
        block_m: side of a block in metres.
        buffer_m: smallest distance in metres between images of different parts.
        exclude_unlocated: set images without a footprint aside instead of refusing.
    """

    method: str
    shares: tuple[tuple[str, float], ...]
    seed: int = 0
    block_m: float = 10_000.0
    buffer_m: float = 2_000.0
    exclude_unlocated: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the parts, in order."""
        return tuple(name for name, _ in self.shares)

    def part(self, token: str) -> tuple[float, str]:
        """Return where a token falls, 0 to 1, and the part whose share of that range it falls into."""
        digest = hashlib.sha256(f"geomed-mae split {self.seed} {token}".encode()).digest()
        place = int.from_bytes(digest[:8], "big") / 2**64
        edges = np.cumsum([share for _, share in self.shares])
        return place, self.names[min(int(np.searchsorted(edges, place, side="right")), len(edges) - 1)]

    def parameters(self) -> dict[str, Any]:
        """Return what decides the split, as plain values."""
        block = {"block_m": self.block_m, "buffer_m": self.buffer_m, "exclude_unlocated": self.exclude_unlocated}
        return {"shares": dict(self.shares), **(block if self.method == "block" else {})}


def parse_shares(text: str) -> tuple[tuple[str, float], ...]:
    """Read "80,10,10" (train, validation, test), "80,20" (train, test) or "fit=70,tune=30" as shares that sum to 1.

    Raises:
        ConfigError: with what is wrong in `text`.
    """
    entries = [entry.strip() for entry in text.split(",")]
    named = [tuple(entry.split("=", 1)) if "=" in entry else ("", entry) for entry in entries]
    try:
        values = [float(value.strip().removesuffix("%")) for _, value in named]
    except ValueError:
        values = []
    names = tuple(name.strip() for name, _ in named)
    if not any(names):
        names = PART_NAMES.get(len(entries), ())
    usable = len(names) == len(values) >= 2 and all(names) and len(set(names)) == len(names)
    if not usable or {BUFFER, NO_LOCATION} & set(names) or not all(0 < value < float("inf") for value in values):
        raise ConfigError(
            f"'{text}' are no shares of a split; write two or three positive numbers (80,20 or 80,10,10) or "
            "two or more different names with numbers (train=70,validation=15,test=15)"
        )
    return tuple((name, value / sum(values)) for name, value in zip(names, values, strict=True))


def requested(
    *,
    split: str | None,
    split_shares: str | None,
    split_seed: int | None,
    block_km: float | None,
    buffer_km: float | None,
    exclude_unlocated: bool,
) -> SplitRequest | None:
    """Return what the command line asks for, None for no split.

    Raises:
        ConfigError: an option that the asked kind of split, or none, has no use for; or shares that are none.
    """
    spatial = {"--block-km": block_km, "--buffer-km": buffer_km, "--exclude-unlocated": exclude_unlocated or None}
    others = {"--split-shares": split_shares, "--split-seed": split_seed}
    useless = {} if split == "block" else spatial if split == "group" else {**others, **spatial}
    for name, value in useless.items():
        if value is not None:
            raise ConfigError(f"{name} needs --split {'block' if name in spatial else 'group or --split block'}")
    if split is None:
        return None
    given = {"block_m": block_km, "buffer_m": buffer_km}
    return SplitRequest(
        method=split,
        shares=parse_shares(split_shares or "80,10,10"),
        seed=split_seed or 0,
        exclude_unlocated=exclude_unlocated,
        **{name: 1000.0 * value for name, value in given.items() if value is not None},
    )


def split_by_group(rows: Sequence[Row], fraction: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Split rows into (training, held out), whole groups only, the same for the same groups and seed.

    At least one group is held out when `fraction` is above 0, and at least one is kept for training.

    Raises:
        ConfigError: there are too few groups to split.
    """
    # By order of appearance, which is that of the files, not by key: keys differ between scans of the same archive.
    groups = list(dict.fromkeys(row.group for row in rows))
    np.random.Generator(np.random.Philox(key=[seed, len(groups)])).shuffle(groups)
    if fraction == 0:
        return list(rows), []
    if len(groups) < 2:
        raise ConfigError(
            f"{len(rows)} labelled images of {len(groups)} patient or scene cannot be split; add images of others"
        )
    held = set(groups[: min(max(round(fraction * len(groups)), 1), len(groups) - 1)])
    return [row for row in rows if row.group not in held], [row for row in rows if row.group in held]


def split_by_shares(
    rows: Sequence[Row],
    tokens: Mapping[str, str],
    request: SplitRequest,
    previous: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return key -> part, whole groups only.

    Args:
        rows: the images.
        tokens: key -> what an image is, without a salt (its pixel digest): a group is told by the least of its images'.
        request: parts, shares and seed.
        previous: key -> part of an earlier split that is to be kept.

    Raises:
        ConfigError: there are fewer groups than parts.
    """
    members: dict[str, list[str]] = {}
    for row in rows:
        members.setdefault(row.group, []).append(row.key)
    kept = _usable(previous, request)
    if not kept and len(members) < len(request.shares):
        raise ConfigError(
            f"{len(rows)} images in {len(members)} groups (patients, or scenes that overlap) cannot be split into "
            f"{len(request.shares)} parts; ask for fewer parts, add images, or split rasters by block"
        )
    names = {group: f"group {min(tokens[key] for key in keys)}" for group, keys in members.items()}
    chosen = _draw(set(names.values()), request, fill=not kept)
    initial = {}
    for group, keys in members.items():
        # A group that is known stays where it is; of two parts that it was found in, the later one.
        old = [part for part in reversed(request.names) if part in {kept.get(key) for key in keys}]
        initial.update({key: kept.get(key) or (old or [chosen[names[group]]])[0] for key in keys})
    return _settle(initial, {row.key: [row.group] for row in rows}, request.names, set(kept))


def split_by_block(
    rows: Sequence[Row],
    shares: Sequence[tuple[str, float]],
    *,
    block_m: float,
    buffer_m: float,
    seed: int,
    exclude_unlocated: bool = False,
    twins: Mapping[str, Any] | None = None,
    previous: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """Return key -> part, "buffer" or "no-location": the block that an image's centre lies in decides (`block_of`).

    An image within `buffer_m` of an image of another part, with the same pixels as one, or looking the same, is set
    aside, that of the earlier part first. Distances are between footprints, on the sphere (`places`).

    Args:
        rows: the images.
        shares: (name, share) of each part, summing to 1.
        block_m: side of a block in metres.
        buffer_m: smallest distance in metres between images of different parts.
        seed: another seed, another split.
        exclude_unlocated: set images without a footprint aside as "no-location".
        twins: key -> cluster of images that look the same.
        previous: key -> part of an earlier split that is to be kept.

    Raises:
        LeakageError: an image has no footprint, and `exclude_unlocated` is off.
        ConfigError: there are fewer blocks than parts, sizes that are not positive, or a part is left without images.
        MissingExtraError: shapely is not installed.
    """
    request = SplitRequest(method="block", shares=tuple(shares), seed=seed, block_m=block_m, buffer_m=buffer_m)
    if not (block_m >= 1 and buffer_m >= 0):
        raise ConfigError(f"a block of {block_m:g} m with a buffer of {buffer_m:g} m; use at least 1 m and 0 m")
    lost = [row.key for row in rows if row.footprint is None]
    if lost and not exclude_unlocated:
        raise LeakageError(
            f"{len(lost)} of {len(rows)} images have no place on the globe (no coordinate system, or no raster), so a "
            "block split cannot keep them apart; leave them out with --exclude-unlocated, or use --split group"
        )
    placed = [row for row in rows if row.footprint is not None]
    blocks = {ring: block_of(*Place(ring).longitude_latitude, block_m) for ring in {row.footprint for row in placed}}
    kept = _usable(previous, request)
    if not kept and len(set(blocks.values())) < len(request.shares):
        raise ConfigError(
            f"the images lie in {len(set(blocks.values()))} blocks of {block_m / 1000:g} km, which cannot be split "
            f"into {len(request.shares)} parts; use smaller blocks (--block-km) or --split group"
        )
    tokens = {ring: f"block {row} {column}" for ring, (row, column) in blocks.items()}
    chosen = _draw(set(tokens.values()), request, fill=not kept)
    initial = {row.key: kept.get(row.key) or chosen[tokens[row.footprint]] for row in placed}
    tags = {row.key: [f"content {row.content}"] if row.content else [] for row in placed}
    for key, cluster in (twins or {}).items():
        if key in tags:
            tags[key].append(f"twin {cluster}")
    units = sorted({(row.footprint, initial[row.key]) for row in placed})
    owned: dict[Any, list[str]] = {}
    for row in placed:
        owned.setdefault((row.footprint, initial[row.key]), []).append(row.key)
    for pair in closer_than([ring for ring, _ in units], buffer_m, [part for _, part in units]):
        for unit in pair:
            for key in owned[units[unit]]:
                tags[key].append(f"near {pair}")
    parts = _settle(initial, tags, request.names, set(kept))
    empty = [name for name in request.names if name not in set(parts.values())]
    if empty:
        raise ConfigError(
            f"the part '{empty[0]}' is empty: all of its images lie within {buffer_m / 1000:g} km of another part; "
            "use larger blocks or a smaller buffer (--block-km, --buffer-km), or another --split-seed"
        )
    return {row.key: parts.get(row.key, NO_LOCATION) for row in rows}


def _usable(previous: Mapping[str, str] | None, request: SplitRequest) -> dict[str, str]:
    """Return what an earlier split has put into parts; what it set aside is judged anew."""
    return {key: part for key, part in (previous or {}).items() if part in request.names}


def _draw(tokens: Iterable[str], request: SplitRequest, *, fill: bool) -> dict[str, str]:
    """Return token -> part; with `fill` no part stays empty as long as there are tokens enough."""
    placed = {token: request.part(token) for token in sorted(tokens)}
    chosen = {token: part for token, (_, part) in placed.items()}
    edges = np.cumsum([0.0, *(share for _, share in request.shares)])
    for number, name in enumerate(request.names if fill else ()):
        counts = Counter(chosen.values())
        spare = [token for token, part in chosen.items() if counts[part] > 1]
        if not counts[name] and spare:
            middle = (edges[number] + edges[number + 1]) / 2
            chosen[min(spare, key=lambda token: (abs(placed[token][0] - middle), token))] = name
    return chosen


def _settle(
    initial: Mapping[str, str], tags: Mapping[str, Sequence[str]], names: Sequence[str], old: set[str]
) -> dict[str, str]:
    """Set aside what shares a tag with an image of another part: old images go before new, later parts before earlier.

    Every image that is kept is compared with all that were kept before it, so that no tag is left in two parts.
    """
    holder: dict[str, str] = {}
    parts: dict[str, str] = {}
    for known in (True, False):
        for name in reversed(names):
            group = [key for key, part in initial.items() if part == name and (key in old) == known]
            kept = [key for key in group if all(holder.get(tag, name) == name for tag in tags[key])]
            parts.update(dict.fromkeys(group, BUFFER) | dict.fromkeys(kept, name))
            holder.update({tag: name for key in kept for tag in tags[key]})
    return parts
