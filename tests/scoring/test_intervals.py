"""Intervals: they cover what they promise, agree with scipy where it has the case, and are absent where none is due."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pytest
from scipy import stats

from geomed_mae.errors import IntegrityError
from geomed_mae.scoring import intervals
from geomed_mae.scoring.intervals import Interval, bootstrap, bootstrap_mean, paired, resample


@dataclass
class Means:
    """Scores whose headline is the mean of one number an image."""

    values: np.ndarray
    groups: tuple[str, ...]
    keys: tuple[str, ...] = ()
    metric: str = "a mean"

    def __post_init__(self) -> None:
        self.keys = self.keys or tuple(f"image {number}" for number in range(len(self.values)))

    def headline(self, indices: np.ndarray | None = None) -> float | None:
        chosen = self.values if indices is None else self.values[indices]
        return float(chosen.mean()) if chosen.size else None


def names(count: int) -> tuple[str, ...]:
    return tuple(f"patient {number}" for number in range(count))


def wider(groups: int) -> float:
    return math.sqrt(groups / (groups - 1)) * stats.t.ppf(0.975, groups - 1) / stats.norm.ppf(0.975)


# -------------------------------------------------------------------------------------------------------- against scipy


@pytest.mark.parametrize("statistic", [np.mean, np.median])
def test_without_groups_the_resampling_is_scipys_and_the_ends_are_moved_out_by_a_known_factor(statistic):
    values = np.random.default_rng(1).gamma(2.0, size=25)
    found = bootstrap(lambda images: float(statistic(values[images])), names(25), seed=3)
    theirs = stats.bootstrap(
        (values,), statistic, method="percentile", n_resamples=20_000, rng=np.random.default_rng(0)
    ).confidence_interval
    mean = statistic(values)
    expected = [mean + wider(25) * (end - mean) for end in theirs]
    spread = expected[1] - expected[0]
    assert [found.low, found.high] == pytest.approx(expected, abs=0.06 * spread)  # two sets of resamples
    assert found.mean == pytest.approx(mean) and found.groups == found.images == 25


def test_a_mean_by_the_quick_way_is_a_mean_by_any_metric():
    rng = np.random.default_rng(0)
    groups = tuple(f"patient {number}" for number in rng.integers(0, 9, 30))
    values = rng.normal(size=30)
    quick, slow = bootstrap_mean(list(values), groups, 5), bootstrap(lambda i: float(values[i].mean()), groups, 5)
    assert [quick.low, quick.mean, quick.high] == pytest.approx([slow.low, slow.mean, slow.high])
    assert (quick.groups, quick.images) == (slow.groups, slow.images) == (len(set(groups)), 30)


# ------------------------------------------------------------------------------------------------------------- coverage


def share_that_covers(groups: int, images: int, draw, truth: float, worlds: int = 400) -> float:
    """Return how often the interval of a mean holds the truth; `draw(rng)` gives (groups, images) values."""
    rng = np.random.default_rng(7)
    owner = tuple(name for name in names(groups) for _ in range(images))
    found = [bootstrap_mean(list(draw(rng).ravel()), owner, seed) for seed in range(worlds)]
    return float(np.mean([one.low <= truth <= one.high for one in found]))


@pytest.mark.parametrize("groups", [3, 5, 8, 20])
def test_intervals_of_a_mean_over_patients_cover_it_95_times_of_100(groups):
    # Images of a patient are nearly equal: resampling images would cover far less.
    share = share_that_covers(
        groups, 3, lambda rng: rng.normal(size=(groups, 1)) + 0.1 * rng.normal(size=(groups, 3)), 0
    )
    assert 0.925 <= share <= 0.975


def test_intervals_of_skewed_scores_cover_them_nine_times_of_ten():
    assert share_that_covers(8, 1, lambda rng: rng.beta(8, 1.5, size=(8, 1)), 8 / 9.5) >= 0.89


def test_the_plain_percentile_interval_would_be_too_short(monkeypatch):
    monkeypatch.setattr(intervals, "_student", lambda freedom: 1.96 * math.sqrt(freedom / (freedom + 1)))
    assert share_that_covers(5, 1, lambda rng: rng.normal(size=(5, 1)), 0) < 0.88


@pytest.mark.parametrize(("of_patients", "of_seeds"), [(1.0, 0.0), (0.3, 0.3), (0.1, 1.0)])
def test_intervals_over_patients_and_three_seeds_cover_the_mean_whichever_matters(monkeypatch, of_patients, of_seeds):
    monkeypatch.setattr(intervals, "ROUNDS", 100)
    rng, held, held_by_groups = np.random.default_rng(3), [], []
    for world in range(120):
        effect = (
            of_patients * rng.normal(size=(12, 1)) + of_seeds * rng.normal(size=(1, 3)) + 0.2 * rng.normal(size=(12, 3))
        )
        metrics = [lambda images, values=effect[:, seed]: float(values[images].mean()) for seed in range(3)]
        found = resample(metrics, names(12), world).estimate("")
        held.append(found.low_seeds <= 0 <= found.high_seeds)
        held_by_groups.append(found.low <= 0 <= found.high)
    assert np.mean(held) >= 0.9
    if of_seeds > of_patients:
        assert np.mean(held_by_groups) < 0.5, "intervals over patients alone do not know of other seeds"


def test_with_many_patients_and_one_seed_effect_the_interval_is_that_of_the_t_test_over_seeds():
    seeds, noise = np.array([0.04, 0.06, 0.11]), 1e-6 * np.random.default_rng(0).normal(size=50)
    metrics = [lambda images, value=value: value + float(noise[images].mean()) for value in seeds]
    found = resample(metrics, names(50)).estimate("")
    low, high = stats.t.interval(0.95, 2, seeds.mean(), stats.sem(seeds))
    assert [found.low_seeds, found.high_seeds] == pytest.approx([low, high], abs=1e-4)


# ---------------------------------------------------------------------------------------------------------------- pairs


def arms(rng, seeds: int = 3, patients: int = 15, gain: float = 0.05) -> list[tuple[Means, Means]]:
    hard = rng.uniform(0.4, 0.8, patients)
    return [
        (
            Means(hard + gain + 0.02 * rng.normal(size=patients), names(patients)),
            Means(hard + 0.02 * rng.normal(size=patients), names(patients)),
        )
        for _ in range(seeds)
    ]


def test_pairing_takes_out_what_is_hard_for_both():
    pairs = arms(np.random.default_rng(0))
    found = paired(pairs)
    alone = resample([pretrained.headline for pretrained, _ in pairs], pairs[0][0].groups).estimate("")
    assert found.low > 0 and found.high - found.low < 0.4 * (alone.high - alone.low)
    assert found.mean == pytest.approx(np.mean([a.values.mean() - b.values.mean() for a, b in pairs]))
    assert found.per_seed == pytest.approx([a.values.mean() - b.values.mean() for a, b in pairs])
    assert (found.metric, found.groups, found.images, found.seeds) == ("a mean", 15, 15, 3)


def test_the_difference_the_other_way_round_is_its_mirror_image():
    pairs = arms(np.random.default_rng(0))
    one, other = paired(pairs), paired([(b, a) for a, b in pairs])
    ends = ("mean", "low", "high", "low_seeds", "high_seeds")
    mirrored = [-getattr(other, name) for name in ("mean", "high", "low", "high_seeds", "low_seeds")]
    assert [getattr(one, name) for name in ends] == pytest.approx(mirrored)


def test_one_seed_has_an_interval_over_patients_and_none_over_seeds():
    found = paired(arms(np.random.default_rng(0), seeds=1))
    assert found.low > 0 and found.low_seeds is found.high_seeds is None and found.seeds == 1


def test_seeds_that_disagree_make_the_interval_over_seeds_wide_and_leave_that_over_patients():
    agree = arms(np.random.default_rng(0))
    shifted = [(Means(a.values + shift, a.groups), b) for (a, b), shift in zip(agree, (-0.06, 0, 0.06), strict=True)]
    assert paired(shifted).low_seeds < 0 < paired(agree).low_seeds
    assert paired(shifted).low > 0


def test_counting_seeds_too_never_makes_an_interval_shorter():
    rng = np.random.default_rng(0)
    for patients in (3, 4, 6):
        found = paired(arms(rng, patients=patients))
        assert found.low_seeds <= found.low and found.high <= found.high_seeds


def test_the_same_seed_gives_the_same_interval_to_the_last_digit():
    pairs = arms(np.random.default_rng(0))
    assert paired(pairs, seed=1).to_json() == paired(pairs, seed=1).to_json() != paired(pairs, seed=2).to_json()


def test_however_many_groups_are_drawn_at_once_the_interval_is_the_same(monkeypatch):
    values = list(np.random.default_rng(0).uniform(size=31))
    expected = bootstrap_mean(values, names(31), 4)
    monkeypatch.setattr(intervals, "AT_ONCE", 31 * 7)
    assert bootstrap_mean(values, names(31), 4) == expected
    assert max(some.size for some in intervals._draws(31, 4)) == 31 * 7
    members = intervals._members(["a", "b", "a", "c", "b", "a"])
    assert intervals._joined(members)(np.array([2, 0, 0, 1])).tolist() == [3, 0, 2, 5, 0, 2, 5, 1, 4]


@pytest.mark.parametrize(
    "other",
    [
        Means(np.zeros(14), names(14)),
        Means(np.zeros(15), names(15), keys=tuple(f"image {number}" for number in reversed(range(15)))),
        Means(np.zeros(15), ("patient 0", *names(15)[:-1]), keys=tuple("abcdefghijklmno")),
        Means(np.zeros(15), names(15), metric="another"),
    ],
)
def test_runs_over_other_images_are_not_compared(other):
    first = Means(np.zeros(15), names(15))
    with pytest.raises(IntegrityError, match="different test images cannot be compared"):
        paired([(first, other)])


def test_runs_over_the_same_images_under_another_salt_are_compared():
    values = np.arange(6.0)
    first = Means(values + 1, ("p", "p", "q", "r", "s", "t"))
    other = Means(values, ("P", "P", "Q", "R", "S", "T"), keys=tuple("abcdef"))
    assert paired([(first, other)]).mean == 1


# ---------------------------------------------------------------------------------------------------------- no interval


def test_one_patient_has_a_value_and_no_interval():
    found = bootstrap_mean([0.5, 0.7, 0.9], ["p", "p", "p"])
    assert found.mean == pytest.approx(0.7) and found.low is found.high is None and found.groups == 1
    pair = (Means(np.ones(3), ("p",) * 3), Means(np.zeros(3), ("p",) * 3))
    assert paired([pair]).to_json()["low"] is None and paired([pair]).mean == 1


def test_values_that_never_differ_have_no_interval_because_one_of_length_0_would_claim_to_be_certain():
    assert bootstrap_mean([1.0] * 9, names(9)) == Interval(1.0, None, None, 9, 9)
    same = Means(np.random.default_rng(0).uniform(size=9), names(9))
    found = paired([(same, same), (same, same)])
    assert (found.mean, found.low, found.high) == (0, None, None)


def test_nothing_known_has_no_value():
    assert bootstrap_mean([None, None], ["p", "q"]) == Interval(None, None, None, 0, 0)
    assert bootstrap(lambda images: None, names(5)).mean is None
    assert bootstrap(lambda images: 1.0, ()) == Interval(None, None, None, 0, 0)


def test_images_without_a_value_are_left_out():
    found = bootstrap_mean([0.2, None, 0.4, None], ["p", "p", "q", "r"])
    assert found.mean == pytest.approx(0.3) and (found.groups, found.images) == (2, 2)


def test_resamples_without_a_class_are_left_out_and_too_many_of_them_leave_no_interval():
    def recall_of(present: np.ndarray):
        return lambda images: float(right[images][present[images]].mean()) if present[images].any() else None

    right = np.tile([1.0, 0.0], 10)
    often = recall_of(np.arange(20) < 8)
    assert bootstrap(often, names(20)).low is not None
    nearly_never = recall_of(np.arange(20) < 1)  # in 64 % of the resamples, and then always the same value
    assert bootstrap(nearly_never, names(20)).low is None
    rare = bootstrap(lambda images: float(images.mean()) if images.min() > 0 and images.max() > 18 else None, names(20))
    assert rare.low is None


def test_a_seed_without_a_value_leaves_the_mean_over_seeds_undefined():
    found = resample([lambda images: 1.0, lambda images: None], names(5)).estimate("")
    assert found.mean is None and found.per_seed == (1.0, None)


def test_ends_stay_within_the_bounds_of_the_metric():
    found = bootstrap_mean([0.99, 0.6, 1.0], names(3), bounds=(0.0, 1.0))
    free = bootstrap_mean([0.99, 0.6, 1.0], names(3))
    assert found.high == 1.0 < free.high and found.low == free.low
