"""Scores against hand-counted values and MONAI."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from monai.metrics import compute_dice, compute_iou

from geomed_mae.readers import IGNORE
from geomed_mae.training.metrics import Scores, confusion, dice, iou, over_images, r_squared

TRUTH = np.array([[0, 0, 1, 1], [0, 1, 1, IGNORE]])
FOUND = np.array([[0, 1, 1, 1], [0, 0, 1, 1]])


def test_dice_and_iou_are_those_counted_by_hand():
    counts = confusion(FOUND, TRUTH, 3)
    # class 0: TP 2, FP 1, FN 1; class 1: TP 3, FP 1, FN 1; class 2 nowhere; the ignored pixel counts for nobody
    np.testing.assert_array_equal(counts, [[2, 1, 0], [1, 3, 0], [0, 0, 0]])
    assert dice(counts) == [pytest.approx(4 / 6), pytest.approx(6 / 8), None]
    assert iou(counts) == [pytest.approx(2 / 4), pytest.approx(3 / 5), None]


def test_agrees_with_monai_on_random_maps():
    rng = np.random.default_rng(0)
    truth, found = rng.integers(0, 3, size=(2, 20, 30, 10))
    one_hot = [torch.nn.functional.one_hot(torch.from_numpy(m), 3).movedim(-1, 0)[None].float() for m in (found, truth)]
    counts = confusion(found, truth, 3)
    np.testing.assert_allclose(dice(counts), compute_dice(*one_hot)[0].numpy(), rtol=1e-6)
    np.testing.assert_allclose(iou(counts), compute_iou(*one_hot)[0].numpy(), rtol=1e-6)


def test_summary_pools_pixels_and_keeps_counts():
    scores = Scores(("land", "water"))
    scores.add(FOUND, TRUTH)
    scores.add(np.zeros((1, 4), int), np.zeros((1, 4), int))
    summary = scores.summary()
    assert (summary["images"], summary["pixels"]) == (2, 11)
    assert summary["classes"]["land"]["dice"] == pytest.approx(2 * 6 / (2 * 6 + 2), abs=1e-6)
    assert summary["classes"]["water"]["images"] == 1
    assert summary["accuracy"] == pytest.approx(9 / 11, abs=1e-6)


def test_pixels_without_a_prediction_are_counted_apart():
    scores = Scores(("land", "water"))
    scores.add(np.array([0, 255, 255]), np.array([0, 1, IGNORE]))
    assert scores.summary()["pixels_unpredicted"] == 1
    assert scores.summary()["pixels"] == 1


def test_interval_is_of_images_and_needs_two():
    assert over_images([0.5, None], seed=0) == {"mean": 0.5, "images": 1, "low": None, "high": None}
    interval = over_images([0.2, 0.4, 0.6, 0.8], seed=0)
    assert interval["mean"] == 0.5 and interval["images"] == 4
    assert 0.2 <= interval["low"] < 0.5 < interval["high"] <= 0.8
    assert interval == over_images([0.2, 0.4, 0.6, 0.8], seed=0)


def test_interval_covers_the_true_mean_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        interval = over_images(list(rng.normal(0.5, 0.1, size=20)), seed=0)
        hits += interval["low"] <= 0.5 <= interval["high"]
    assert 0.88 <= hits / 200 <= 0.99


def test_refuses_maps_of_different_shape():
    with pytest.raises(ValueError, match=r"shape \(2, 4\) cannot be scored against truth \(4, 2\)"):
        Scores(("a", "b")).add(FOUND, TRUTH.T)


def test_r_squared_is_one_for_the_truth_and_zero_for_its_mean():
    truth = np.array([0.0, 1.0, 2.0])
    assert r_squared(truth, truth) == 1.0
    assert r_squared(np.full(3, 1.0), truth) == 0.0
    assert r_squared(truth, np.ones(3)) is None
