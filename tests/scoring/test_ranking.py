"""AUROC and average precision against scikit-learn, ties, weights and unknown images included."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from geomed_mae.scoring.ranking import Ranking


@pytest.mark.parametrize("digits", [1, 6])
def test_agrees_with_scikit_learn_with_and_without_ties(digits):
    rng = np.random.default_rng(digits)
    scores, positive = np.round(rng.random(60), digits), rng.integers(0, 2, 60)
    counts = np.bincount(rng.integers(0, 60, 60), minlength=60)
    ranking = Ranking(scores, positive)
    assert ranking.auroc() == pytest.approx(roc_auc_score(positive, scores))
    assert ranking.average_precision() == pytest.approx(average_precision_score(positive, scores))
    assert ranking.auroc(counts) == pytest.approx(roc_auc_score(positive, scores, sample_weight=counts))
    assert ranking.average_precision(counts) == pytest.approx(
        average_precision_score(positive, scores, sample_weight=counts)
    )


def test_images_whose_class_is_not_known_are_left_out():
    scores, positive = np.array([0.9, 0.8, 0.7, 0.6, 0.1]), np.array([1, -1, 0, 1, 0])
    known = positive >= 0
    assert Ranking(scores, positive).auroc() == pytest.approx(roc_auc_score(positive[known], scores[known])) == 0.75
    assert Ranking(scores, positive).average_precision() == pytest.approx((1 + 2 / 3) / 2)


def test_one_kind_alone_has_no_score():
    scores = np.array([0.1, 0.2])
    assert Ranking(scores, np.array([1, 1])).auroc() is None
    assert Ranking(scores, np.array([0, 0])).auroc() is None
    assert Ranking(scores, np.array([0, 0])).average_precision() is None
    assert Ranking(scores, np.array([1, 1])).average_precision() == 1.0
    nobody = Ranking(scores, np.array([-1, -1]))
    assert (nobody.auroc(), nobody.average_precision()) == (None, None)
    both = Ranking(scores, np.array([0, 1]))
    assert both.auroc(np.array([0, 2])) is None and both.auroc(np.array([1, 1])) == 1.0
