"""The probe of label maps: from the features of a token alone, which share of its patch belongs to each class?

Patches are few enough to be held in memory: of each side MAX_PATCHES at most, of more a fixed random choice, as many of
an image as are its share.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE
from geomed_mae.scoring.intervals import bootstrap
from geomed_mae.scoring.shares import FEWEST, ShareScores
from geomed_mae.training.draws import Target, by_group, first_groups
from geomed_mae.training.knn import nearest
from geomed_mae.training.probe_features import Sources
from geomed_mae.training.probe_parts import Parts
from geomed_mae.training.probing import MIN_LABELLED, SEED, Patches, Ridge, fit_patches, patch_means

MAX_PATCHES = 50_000
"""Patches of each side. Measured with a tiny encoder (width 192, three blocks): 85,000 patches in all take 2.7 GB; it
grows with the width."""
BANK = 5_000
"""Patches of the training side that neighbours are looked for among."""
BOUNDS = (None, 1.0)
"""Of R^2."""


@dataclass(frozen=True, slots=True, eq=False)
class Chosen:
    """What is asked about the patches of one image.

    Attributes:
        row: the image.
        kept: bool (*grid), patches with enough labels on one side, as many as may be kept.
        shares: float64 (*grid, classes).
        held: bool (*grid), patches that are scored.
    """

    row: Row
    kept: np.ndarray
    shares: np.ndarray
    held: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class Table:
    """Patches of all images: features by source (n, f), shares (n, classes), held (n,), and numbers of images (n,)."""

    features: dict[str, np.ndarray]
    shares: np.ndarray
    held: np.ndarray
    images: np.ndarray
    rows: tuple[Row, ...]

    def patches(self, name: str) -> Patches:
        """Return the regression of one source."""
        return Patches(self.features[name], self.shares, self.held)

    def counted(self) -> np.ndarray:
        """Return bool (classes,): which occur in enough patches of both sides, and not in all of them alike."""
        sides = [self.shares[self.held == side] for side in (False, True)]
        enough = [((side > 0).sum(axis=0) >= FEWEST) & (np.ptp(side, axis=0) > 0) for side in sides if len(side)]
        return np.logical_and.reduce(enough)

    def scores(self, classes: Sequence[int], answers: np.ndarray) -> ShareScores:
        """Score answers (held rows, classes) image by image.

        Answers are clipped to 0 to 1, as shares are: a scene that is darker than all others would decide R^2 alone.
        """
        answers = answers.clip(0, 1)
        images, truth = self.images[self.held], self.shares[self.held]
        scores = ShareScores([str(value) for value in classes], self.counted())
        for number in np.unique(images):
            mine = images == number
            scores.add(self.rows[number].key, self.rows[number].group, answers[mine], truth[mine])
        return scores


def choose(parts: Parts, classes: Sequence[int], patch: Sequence[int]) -> list[Chosen]:
    """Choose the patches that are asked about, by labels alone.

    Args:
        parts: images with stored label values.
        classes: the values that are classes.
        patch: its size in pixels.
    """
    found = []
    for row, stored in parts.targets:
        known = patch_means(stored != IGNORE, patch)
        shares = np.stack([patch_means(stored == value, patch) for value in classes], axis=-1)
        side = patch_means(parts.held[row.key], patch)
        kept = (known >= MIN_LABELLED) & ((side == 0) | (side == 1))
        found.append(Chosen(row, kept, shares / np.where(known > 0, known, 1.0)[..., None], side == 1))
    for held in (False, True):
        total = sum(int((one.kept & (one.held == held)).sum()) for one in found)
        if total > MAX_PATCHES:
            for number, one in enumerate(found):
                _thin(one.kept, one.held == held, MAX_PATCHES / total, [SEED, int(held), number])
    return found


def _thin(kept: np.ndarray, side: np.ndarray, share: float, seed: list[int]) -> None:
    """Keep a share of the patches of one side, rounded down, at random, in place."""
    places = np.flatnonzero(kept & side)
    drop = np.random.default_rng(seed).permutation(places)[int(share * len(places)) :]
    kept.ravel()[drop] = False


def collect(index: Index, chosen: Iterable[Chosen], sources: Sources) -> Table:
    """Read images one after another and gather the same patches for all sources: those that are valid for each.

    Raises:
        ConfigError: no patch is left.
    """
    rows: dict[str, list[np.ndarray]] = {}
    shares, held, images, seen = [], [], [], []
    for one in chosen:
        seen.append(one.row)
        if not one.kept.any():
            continue
        grids = sources.dense(index.read(one.row.key))
        kept = one.kept & np.logical_and.reduce([np.isfinite(grid).all(axis=0) for grid in grids.values()])
        for name, grid in grids.items():
            rows.setdefault(name, []).append(grid[:, kept].T.astype(np.float32))
        shares.append(one.shares[kept])
        held.append(one.held[kept])
        images.append(np.full(int(kept.sum()), len(seen) - 1))
    if not shares:
        raise ConfigError("no patch has labels on at least half of its pixels; label more area")
    joined = {name: np.concatenate(rows.pop(name)) for name in list(rows)}
    return Table(
        sources.with_last(joined), np.concatenate(shares), np.concatenate(held), np.concatenate(images), tuple(seen)
    )


@dataclass(frozen=True, slots=True, eq=False)
class DenseResult:
    """One source: its scores, what it expects of itself, and plain values for the file."""

    scores: ShareScores
    loss: float
    values: dict[str, Any]


def read_out(table: Table, name: str, classes: Sequence[int]) -> DenseResult:
    """Fit a ridge and ask neighbours on one source's features, and score both."""
    patches = table.patches(name)
    fitted = fit_patches(patches)
    asked = patches.features[table.held]
    scores = table.scores(classes, fitted(asked))
    close = nearest(patches.features[~table.held], patches.shares[~table.held], None, asked, bank=BANK)
    near = table.scores(classes, close)
    values = {
        **_described(scores),
        "features": int(patches.features.shape[1]),
        "patches_train": int((~table.held).sum()),
        "patches_scored": int(table.held.sum()),
        "penalty": fitted.penalty,
        "knn": _described(near),
    }
    return DenseResult(scores, fitted.error, values)


def _described(scores: ShareScores) -> dict[str, Any]:
    return {**scores.summary(), "interval": bootstrap(scores.headline, scores.groups, bounds=BOUNDS).to_json()}


def few(table: Table, name: str, classes: Sequence[int], groups: frozenset[str]) -> ShareScores:
    """Score a ridge that has learned from the patches of these groups alone."""
    mine = np.array([row.group in groups for row in table.rows])[table.images] & ~table.held
    used = mine | table.held
    fitted: Ridge = fit_patches(Patches(table.features[name][used], table.shares[used], table.held[used]))
    return table.scores(classes, fitted(table.features[name][table.held]))


def few_groups(targets: Sequence[Target], count: int, seed: int) -> frozenset[str]:
    """Draw groups of the training side as fine-tuning does.

    Raises:
        ConfigError: there are not so many.
    """
    groups = by_group(targets)
    if count > len(groups):
        raise ConfigError(
            f"--shots {count} is more than the {len(groups)} labelled groups that there are to learn from"
        )
    return first_groups(groups, count, seed)
