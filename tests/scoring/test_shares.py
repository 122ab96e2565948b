"""R^2 of shares from sums per image, beside scikit-learn on all rows."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import r2_score

from geomed_mae.scoring.intervals import bootstrap
from geomed_mae.scoring.shares import ShareScores

RNG = np.random.default_rng(5)


@pytest.fixture
def made():
    truth = [RNG.dirichlet(np.ones(3), size=20 + number) for number in range(6)]
    found = [part + RNG.normal(scale=0.2, size=part.shape) for part in truth]
    scores = ShareScores(["a", "b", "c"], np.array([True, True, False]))
    for number, (answer, part) in enumerate(zip(found, truth, strict=True)):
        scores.add(f"key{number}", f"group{number // 2}", answer, part)
    return scores, found, truth


def test_r2_is_that_of_scikit_learn_for_all_images_and_for_a_resample(made):
    scores, found, truth = made
    for indices in (None, np.array([0, 0, 3, 5, 5, 5])):
        chosen = range(6) if indices is None else indices
        rows = [np.concatenate([part[number] for number in chosen]) for part in (truth, found)]
        expected = r2_score(*rows, multioutput="raw_values")
        np.testing.assert_allclose(scores.r2(indices), expected, rtol=1e-9)
        assert scores.headline(indices) == pytest.approx(expected[:2].mean())
    assert scores.keys[1] == "key1" and scores.groups[5] == "group2" and len(scores) == 6


def test_the_summary_says_which_classes_are_not_in_the_mean(made):
    scores, found, truth = made
    summary = scores.summary()
    assert summary["classes_not_in_the_mean"] == ["c"] and len(summary["r2"]) == 3
    right = np.concatenate([a.argmax(1) == b.argmax(1) for a, b in zip(found, truth, strict=True)])
    assert summary["accuracy"] == pytest.approx(right.mean(), abs=1e-6)
    assert scores.patches() == len(right)


def test_a_share_that_never_varies_has_no_r2():
    scores = ShareScores(["a", "b"], np.array([True, True]))
    shares = np.column_stack([np.full(30, 0.1), np.linspace(0, 0.9, 30)])
    scores.add("k", "g", shares, shares)
    assert scores.r2() == [None, 1.0] and scores.headline() == 1.0
    with pytest.raises(ValueError, match=r"shares of shape \(30, 1\) cannot be scored against \(30, 2\)"):
        scores.add("k", "g", shares[:, :1], shares)


def test_an_interval_is_over_groups(made):
    scores, *_ = made
    interval = bootstrap(scores.headline, scores.groups, bounds=(None, 1.0))
    assert interval.groups == 3 and interval.low < scores.headline() < interval.high
