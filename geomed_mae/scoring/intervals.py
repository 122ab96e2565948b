"""Intervals of scores: how far a score may be off because only these patients (or scenes) and these seeds were tried.

Images of one patient are alike, so that the unit of resampling is the group and never the image or the pixel. An
interval is a percentile bootstrap over groups (2000 rounds, seeded) with two corrections that small test sets need;
figures are simulated coverages of 95 % intervals:

*Few groups.* The plain percentile interval is too short: it covers 51, 75, 83, 88 and 92 % of the time with 2, 3, 5, 8
and 20 groups. Its ends are therefore moved away from the mean by sqrt(G / (G - 1)) * t / z, with the 97.5 % points t of
Student's distribution with G - 1 degrees of freedom and z of the normal one (for the bias see Hesterberg 2015, "What
Teachers Should Know About the Bootstrap", section 4): 93, 96, 95, 94, 95 %; with skewed scores 88 to 92 % below 20.

*Few seeds.* An interval over groups alone is about these very runs; where seeds matter it covers the mean over other
seeds in as little as 11 %. Resampling 3 seeds helps little (74 %), because 3 numbers have only 10 resamples. The seeds
enter by the standard error of the values per seed instead, added to the error over groups, with Satterthwaite's degrees
of freedom. That covers 92 to 99 % with 3 seeds; what is particular to a patient and a seed is counted twice, on the
safe side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from geomed_mae.errors import IntegrityError
from geomed_mae.scoring.values import rounded

ROUNDS = 2000
"""Resamples behind an interval (Efron & Tibshirani 1993 advise 1000 or more for percentile intervals)."""
PERCENTILES = (2.5, 97.5)
"""Of a 95 % interval."""
LEAST_SHARE = 0.5
"""Share of the resamples that must have a value; with fewer the interval would be one of the lucky ones."""
AT_ONCE = 1 << 22
"""Drawn groups that are in memory together, 32 MiB: 100,000 patients drawn ROUNDS times are 1.6 GB."""
SAME = 1e-12
"""Resampled values that differ by no more than rounding are the same."""
SCORE, DIFFERENCE = (0.0, 1.0), (-1.0, 1.0)
"""Bounds of a score that is a share, and of the difference of two."""

Metric = Callable[[np.ndarray], float | None]
"""Numbers of images, int64 (n,), repeats allowed -> value over them, None where it is undefined."""
Bounds = tuple[float | None, float | None]
Ends = tuple[float | None, float | None]


class Scored(Protocol):
    """Scores of one run over its test images, as far as this module needs them."""

    @property
    def keys(self) -> tuple[str, ...]:
        """Image keys."""

    @property
    def groups(self) -> tuple[str, ...]:
        """Group (patient, scene) of each image."""

    @property
    def metric(self) -> str:
        """Name of the headline."""

    def headline(self, indices: np.ndarray | None = None) -> float | None:
        """Return the score over these images, None where it is undefined."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value over all images with its 95 % interval over groups; None where there is none."""

    mean: float | None
    low: float | None
    high: float | None
    groups: int
    images: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values, rounded to six digits after the point."""
        return {
            "mean": rounded(self.mean),
            "low": rounded(self.low),
            "high": rounded(self.high),
            "groups": self.groups,
            "images": self.images,
        }


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds with two 95 % intervals.

    Attributes:
        metric: what was measured.
        mean: mean over seeds of the value over all images, None where a seed has none.
        low, high: interval over groups, for these very seeds: how far other patients could change the mean.
        low_seeds, high_seeds: interval over groups and seeds: how far other patients together with other initial
            weights, orders and draws of few labels could. None with one seed, which says nothing about others.
        per_seed: value of each seed over all images.
        groups, images, seeds: how many there were.
    """

    metric: str
    mean: float | None
    low: float | None
    high: float | None
    low_seeds: float | None
    high_seeds: float | None
    per_seed: tuple[float | None, ...]
    groups: int
    images: int
    seeds: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values, rounded to six digits after the point."""
        return {
            "metric": self.metric,
            "mean": rounded(self.mean),
            "low": rounded(self.low),
            "high": rounded(self.high),
            "low_seeds": rounded(self.low_seeds),
            "high_seeds": rounded(self.high_seeds),
            "per_seed": [rounded(value) for value in self.per_seed],
            "groups": self.groups,
            "images": self.images,
            "seeds": self.seeds,
        }


def bootstrap(metric: Metric, groups: Sequence[str], seed: int = 0, *, bounds: Bounds = (None, None)) -> Interval:
    """Return the value of `metric` over all images with its interval.

    Args:
        metric: see `Metric`; it is called ROUNDS times.
        groups: group of each image.
        seed: of the resamples; the same seed gives the same interval to the last digit.
        bounds: least and greatest value that the metric can have; ends of the interval are cut there.
    """
    found = resample([metric], groups, seed).estimate("", bounds)
    return Interval(found.mean, found.low, found.high, found.groups, found.images)


def bootstrap_mean(
    values: Sequence[float | None], groups: Sequence[str], seed: int = 0, *, bounds: Bounds = (None, None)
) -> Interval:
    """Return the mean over images of the known values with its interval; quick, for tables of many such means.

    Args:
        values: one an image; images of which it is None are left out, and so are groups that have no others.
        groups: group of each image.
        seed: of the resamples.
        bounds: as of `bootstrap`.
    """
    known = [(float(value), group) for value, group in zip(values, groups, strict=True) if value is not None]
    if not known:
        return Interval(None, None, None, 0, 0)
    numbers = np.array([value for value, _ in known])
    members = _members([group for _, group in known])
    sums = np.array([numbers[images].sum() for images in members])
    counts = np.array([len(images) for images in members])
    drawn = (sums[some].sum(axis=1) / counts[some].sum(axis=1) for some in _draws(len(members), seed))
    resampled = np.concatenate(list(drawn))
    low, high = _ends(float(numbers.mean()), resampled, len(members))
    return Interval(float(numbers.mean()), _within(low, bounds), _within(high, bounds), len(members), len(known))


def paired(arms: Sequence[tuple[Scored, Scored]], seed: int = 0, *, bounds: Bounds = DIFFERENCE) -> Estimate:
    """Return first minus second, over the same test images and seeds: the resampled groups are the same for both.

    Args:
        arms: one pair a seed, for example (pretrained, scratch), or (encoder, floor).
        seed: of the resamples.
        bounds: least and greatest difference that there can be.

    Raises:
        IntegrityError: the runs were not scored on the same images in the same order.
    """
    check_same([scores for pair in arms for scores in pair])
    first, other = (resample([one.headline for one in runs], runs[0].groups, seed) for runs in zip(*arms, strict=True))
    return first.minus(other).estimate(arms[0][0].metric, bounds)


# --------------------------------------------------------------------------------------------------------- resampling


@dataclass(frozen=True, slots=True, eq=False)
class Resampled:
    """Values of metrics, one a seed, over all images and over resampled groups; NaN where one is undefined.

    Attributes:
        whole: float64 (seeds,), over all images.
        rounds: float64 (ROUNDS, seeds), over the groups of each resample, which are common to the seeds. No rows where
            there are fewer than two groups.
        groups, images: how many there are.
    """

    whole: np.ndarray
    rounds: np.ndarray
    groups: int
    images: int

    def minus(self, other: Resampled) -> Resampled:
        """Return the differences from the same resamples of the same images."""
        return Resampled(self.whole - other.whole, self.rounds - other.rounds, self.groups, self.images)

    def estimate(self, metric: str, bounds: Bounds = (None, None)) -> Estimate:
        """Return the mean over seeds with its intervals; without any where a seed has no value.

        Args:
            metric: what is measured.
            bounds: as of `bootstrap`.
        """
        per_seed = tuple(None if np.isnan(value) else float(value) for value in self.whole)
        counts = (per_seed, self.groups, self.images, len(self.whole))
        if not len(self.whole) or np.isnan(self.whole).any():
            return Estimate(metric, None, None, None, None, None, *counts)
        mean, means = float(self.whole.mean()), self.rounds.mean(axis=1)
        ends = _ends(mean, means[~np.isnan(means)], self.groups)
        both = (*ends, *_with_seeds(mean, ends, self.whole, self.groups))
        return Estimate(metric, mean, *(_within(end, bounds) for end in both), *counts)


def resample(metrics: Sequence[Metric], groups: Sequence[str], seed: int = 0) -> Resampled:
    """Return the values of `metrics`, one a seed, over all images and over ROUNDS draws of as many groups.

    Args:
        metrics: see `Metric`.
        groups: group of each image.
        seed: of the draws; the same seed and groups give the same draws.
    """
    members = _members(groups)

    def _values(images: np.ndarray) -> list[float]:
        return [math.nan if (value := metric(images)) is None else float(value) for metric in metrics]

    whole = _values(np.arange(len(groups))) if groups else [math.nan] * len(metrics)
    rounds: list[list[float]] = []
    if len(members) > 1 and not all(map(math.isnan, whole)):
        images = _joined(members)
        rounds = [_values(images(each)) for some in _draws(len(members), seed) for each in some]
    return Resampled(np.array(whole), np.array(rounds).reshape(-1, len(metrics)), len(members), len(groups))


def _members(groups: Sequence[str]) -> list[np.ndarray]:
    """Return the numbers of the images of each group, groups in the order of their first image."""
    found: dict[str, list[int]] = {}
    for number, group in enumerate(groups):
        found.setdefault(group, []).append(number)
    return [np.array(numbers) for numbers in found.values()]


def _joined(members: Sequence[np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
    """Return numbers of groups -> their images one after another, without a list of 100,000 arrays in each round."""
    every, sizes = np.concatenate(members), np.array([len(images) for images in members])
    starts = np.cumsum(sizes) - sizes

    def _images(drawn: np.ndarray) -> np.ndarray:
        lengths = sizes[drawn]
        ends = np.cumsum(lengths)
        return every[np.arange(ends[-1]) + np.repeat(starts[drawn] - (ends - lengths), lengths)]

    return _images


def _draws(groups: int, seed: int) -> Iterator[np.ndarray]:
    """Yield numbers of groups (rounds, groups), ROUNDS rounds in all; the same ones however many come at once."""
    rng, rounds = np.random.default_rng(seed), max(AT_ONCE // groups, 1)
    for first in range(0, ROUNDS, rounds):
        yield rng.integers(0, groups, size=(min(rounds, ROUNDS - first), groups))


def _ends(mean: float, resampled: np.ndarray, groups: int) -> Ends:
    """Return the interval of resampled values, its ends moved out for few groups.

    Values that never differ (all images perfect, two equal arms) have no spread to learn from, and so no interval: one
    of length 0 would claim to be certain.
    """
    from scipy.special import ndtri

    if groups < 2 or resampled.size < LEAST_SHARE * ROUNDS or np.ptp(resampled) <= SAME:
        return None, None
    wider = math.sqrt(groups / (groups - 1)) * _student(groups - 1) / float(ndtri(PERCENTILES[1] / 100))
    low, high = (mean + wider * (float(end) - mean) for end in np.percentile(resampled, PERCENTILES))
    # A metric that is biased in resamples (they hold fewer different images) may lie beside the value over all.
    return min(low, mean), max(high, mean)


def _with_seeds(mean: float, ends: Ends, per_seed: np.ndarray, groups: int) -> Ends:
    """Return the interval over groups, its ends moved out by the error that comes of having tried few seeds."""
    low, high = ends
    seeds = len(per_seed)
    if low is None or high is None or seeds < 2:
        return None, None
    of_seeds = float(np.var(per_seed, ddof=1)) / seeds

    def _far(of_groups: float) -> float:
        both = of_groups + of_seeds
        if both == 0:
            return 0.0
        freedom = both**2 / (of_groups**2 / (groups - 1) + of_seeds**2 / (seeds - 1))
        return _student(freedom) * math.sqrt(both)

    of_groups = [((end - mean) / _student(groups - 1)) ** 2 for end in (low, high)]
    # More degrees of freedom must not make the interval shorter than that over groups, which counts less.
    return min(low, mean - _far(of_groups[0])), max(high, mean + _far(of_groups[1]))


def _student(freedom: float) -> float:
    """Return the 97.5 % point of Student's distribution."""
    from scipy.special import stdtrit

    return float(stdtrit(freedom, PERCENTILES[1] / 100))


def _within(end: float | None, bounds: Bounds) -> float | None:
    low, high = bounds
    if end is None:
        return None
    end = end if low is None else max(end, low)
    return end if high is None else min(end, high)


def check_same(runs: Sequence[Scored]) -> None:
    """Refuse to compare runs over other images, or by another metric.

    Keys of a raw archive that is scanned anew are all different, but the order of its images is the same.

    Raises:
        IntegrityError: the runs were not scored on the same images in the same order.
    """
    first = runs[0]
    for other in runs[1:]:
        same_keys = first.keys == other.keys or not set(first.keys) & set(other.keys)
        if not same_keys or _partition(first.groups) != _partition(other.groups) or first.metric != other.metric:
            raise IntegrityError(
                f"runs that were scored on different test images cannot be compared ({len(first.keys)} and "
                f"{len(other.keys)} images, {len(set(first.groups))} and {len(set(other.groups))} groups); give them "
                "the same archive, labels and split"
            )


def _partition(groups: Sequence[str]) -> list[int]:
    """Return groups as numbers in the order of their first image: equal for equal groupings under any names."""
    numbers: dict[str, int] = {}
    return [numbers.setdefault(group, len(numbers)) for group in groups]
