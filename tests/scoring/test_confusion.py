"""Confusion matrices against hand-counted values, MONAI, scikit-learn and SimpleITK."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_dice, compute_iou
from sklearn.metrics import balanced_accuracy_score, precision_score, recall_score

from geomed_mae.readers import IGNORE
from geomed_mae.scoring.confusion import (
    accuracy,
    balanced_accuracy,
    confusion,
    dice,
    iou,
    precision,
    recall,
    two_by_two,
)

TRUTH = np.array([[0, 0, 1, 1], [0, 1, 1, IGNORE]])
FOUND = np.array([[0, 1, 1, 1], [0, 0, 1, 1]])


@pytest.fixture(scope="module")
def maps():
    truth, found = np.random.default_rng(0).integers(0, 3, size=(2, 20, 30, 10))
    return truth, found


def test_dice_and_iou_are_those_counted_by_hand():
    counts = confusion(FOUND, TRUTH, 3)
    # class 0: TP 2, FP 1, FN 1; class 1: TP 3, FP 1, FN 1; class 2 nowhere; the ignored pixel counts for nobody
    np.testing.assert_array_equal(counts, [[2, 1, 0], [1, 3, 0], [0, 0, 0]])
    assert dice(counts) == [pytest.approx(4 / 6), pytest.approx(6 / 8), None]
    assert iou(counts) == [pytest.approx(2 / 4), pytest.approx(3 / 5), None]
    assert accuracy(counts) == pytest.approx(5 / 7)
    assert balanced_accuracy(counts) == pytest.approx((2 / 3 + 3 / 4) / 2)
    assert accuracy(np.zeros((2, 2), int)) is None and balanced_accuracy(np.zeros((2, 2), int)) is None


def test_agrees_with_monai_on_random_maps(maps):
    truth, found = maps
    one_hot = [torch.nn.functional.one_hot(torch.from_numpy(m), 3).movedim(-1, 0)[None].float() for m in (found, truth)]
    counts = confusion(found, truth, 3)
    np.testing.assert_allclose(dice(counts), compute_dice(*one_hot)[0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(iou(counts), compute_iou(*one_hot)[0].numpy(), rtol=1e-6)


def test_agrees_with_simpleitk_on_random_maps(maps):
    truth, found = maps
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(one.astype(np.uint8)) for one in (truth, found)))
    counts = confusion(found, truth, 3)
    for number in (1, 2):
        assert dice(counts)[number] == pytest.approx(overlap.GetDiceCoefficient(number))
        assert iou(counts)[number] == pytest.approx(overlap.GetJaccardCoefficient(number))


def test_rates_agree_with_scikit_learn(maps):
    truth, found = (one.ravel() for one in maps)
    counts = confusion(found, truth, 3)
    np.testing.assert_allclose(recall(counts), recall_score(truth, found, average=None))
    np.testing.assert_allclose(precision(counts), precision_score(truth, found, average=None))
    assert balanced_accuracy(counts) == pytest.approx(balanced_accuracy_score(truth, found))


def test_pixels_without_a_prediction_are_not_counted():
    np.testing.assert_array_equal(
        confusion(np.array([0, 255, 255], np.uint8), np.array([0, 1, IGNORE]), 2), [[1, 0], [0, 0]]
    )


def test_rates_of_a_yes_or_no_question_are_those_counted_by_hand():
    rates = two_by_two(np.array([[5, 1], [2, 4]]))
    assert rates == {"sensitivity": 0.666667, "specificity": 0.833333, "precision": 0.8, "f1": 0.727273}
    assert two_by_two(np.array([[5, 0], [0, 0]])) == {
        "sensitivity": None,
        "specificity": 1.0,
        "precision": None,
        "f1": None,
    }
