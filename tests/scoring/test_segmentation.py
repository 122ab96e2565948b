"""Scores of class maps: what is pooled, what is a mean over images, and what has no score."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geomed_mae.readers import IGNORE
from geomed_mae.scoring.image_score import whole_map
from geomed_mae.scoring.segmentation import SegmentationScores
from geomed_mae.scoring.surfaces import surface_distance
from tests.scoring.rows import blocks, made_row

TRUTH = np.array([[0, 0, 1, 1], [0, 1, 1, IGNORE]])
FOUND = np.array([[0, 1, 1, 1], [0, 0, 1, 1]], np.uint8)


def scored(*pairs, classes=("land", "water"), surfaces=False, groups=None, **row):
    scores = SegmentationScores(classes, surfaces=surfaces)
    for number, (found, truth) in enumerate(pairs):
        group = None if groups is None else groups[number]
        scores.add(made_row(f"k{number}", group, **row), truth, whole_map(np.asarray(found, np.uint8)))
    return scores


def test_pixels_are_pooled_and_counted():
    summary = scored((FOUND, TRUTH), (np.zeros((1, 4)), np.zeros((1, 4), int))).summary()
    assert (summary["images"], summary["pixels"], summary["pixels_unpredicted"]) == (2, 11, 0)
    assert summary["classes"]["land"]["dice"] == pytest.approx(2 * 6 / (2 * 6 + 2), abs=1e-6)
    assert summary["classes"]["water"]["images"] == 1
    assert summary["accuracy"] == pytest.approx(9 / 11, abs=1e-6)
    assert summary["confusion"] == [[6, 1], [1, 3]]


def test_pixels_without_a_prediction_are_counted_apart():
    summary = scored((np.array([0, 255, 255]), np.array([0, 1, IGNORE]))).summary()
    assert (summary["pixels_unpredicted"], summary["pixels"]) == (1, 1)


def test_the_headline_is_the_mean_over_images_of_the_mean_over_the_foreground():
    classes = ("background", "anterior", "posterior")
    scores = scored(
        ([0, 1, 1, 2], np.array([0, 1, 1, 2])),  # both right: 1
        ([0, 1, 0, 0], np.array([0, 1, 1, 2])),  # 2/3 and 0: 1/3
        ([0, 0, 0, 0], np.array([0, 0, 0, 0])),  # no foreground and none said: no score
        ([0, 1, 0, 0], np.array([0, 0, 0, 0])),  # invented: 0
        classes=classes,
    )
    assert scores.headline() == pytest.approx((1 + 1 / 3 + 0) / 3)
    assert scores.headline(np.array([0, 0, 1, 2])) == pytest.approx((1 + 1 + 1 / 3) / 3)
    assert scores.headline(np.array([2])) is None
    assert scores.class_score(1) == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert scores.class_score(2, np.array([1])) == 0.0
    summary = scores.summary()
    assert summary["value"] == summary["interval"]["mean"] == pytest.approx(4 / 9, abs=1e-6)
    assert (summary["images"], summary["interval"]["images"]) == (4, 3)
    assert summary["classes"]["anterior"]["value"] == summary["classes"]["anterior"]["dice_over_images"]["mean"]


def test_intervals_are_over_groups_and_need_two():
    pairs = [(FOUND, TRUTH), (TRUTH.clip(0), TRUTH), (FOUND, TRUTH), (FOUND, np.maximum(TRUTH, FOUND))]
    alone = scored(*pairs, groups=["p", "p", "p", "p"]).summary()["interval"]
    assert (alone["low"], alone["high"], alone["groups"], alone["images"]) == (None, None, 1, 4)
    apart = scored(*pairs).summary()["interval"]
    assert 0 <= apart["low"] < apart["mean"] < apart["high"] <= 1
    assert apart == scored(*pairs).summary()["interval"]


def test_bands_give_the_same_scores_as_the_whole():
    rng = np.random.default_rng(0)
    truth = blocks((30, 20), 3).astype(np.int16)
    truth[:4] = IGNORE
    chances = rng.dirichlet((1, 1), size=truth.shape).transpose(2, 0, 1).astype(np.float32)
    found = chances.argmax(0).astype(np.uint8)
    found[10, 5] = 255
    bands = []
    for first, end in ((0, 7), (7, 8), (8, 30)):
        (band,) = whole_map(found[first:end], chances[:, first:end])
        bands.append(type(band)(first, band.numbers, band.chances))
    row = made_row("k", shape=truth.shape, spacing=(10.0, 10.0))
    whole, parts = SegmentationScores(("a", "b")), SegmentationScores(("a", "b"))
    whole.add(row, truth, whole_map(found, chances))
    parts.add(row, truth, iter(bands))
    assert parts.summary() == whole.summary()
    assert whole.summary()["calibration"]["expected_error"] > 0
    assert sum(point["cases"] for point in whole.summary()["calibration"]["curve"]) == 26 * 20 - 1
    with pytest.raises(ValueError, match="a prediction of 8 rows cannot be scored against truth of shape"):
        parts.add(row, truth, bands[:2])
    with pytest.raises(ValueError, match="are no part of"):
        parts.add(row, truth.T, bands)


def test_surface_distances_are_in_metres_or_millimetres_and_missing_ones_are_counted():
    first, second, nothing = blocks((24, 24), 1), blocks((24, 24), 2), np.zeros((24, 24), bool)
    pairs = [(first, second), (nothing, second), (first, nothing), (nothing, nothing)]
    pairs = [(found.astype(np.uint8), truth.astype(np.int16)) for found, truth in pairs]
    scores = scored(*pairs, surfaces=True, spacing=(30.0, 30.0))
    water = scores.summary()["classes"]["water"]["surface_distance"]
    expected = surface_distance(first, second, None, (30.0, 30.0))
    assert (water["unit"], water["hd95"]["mean"]) == ("m", pytest.approx(expected.hd95))
    assert water["assd"]["mean"] == pytest.approx(expected.assd, abs=1e-6)
    assert (water["images_missed"], water["images_invented"], water["images_without"]) == (1, 1, 1)
    assert water["hd95"]["images"] == 1
    assert "surface_distance" not in scores.summary()["classes"]["land"]
    assert scores.per_image()[0]["hd95"] == {"water": pytest.approx(expected.hd95)}
    assert scores.per_image()[1]["hd95"] == {"water": None}
    volume = scored(pairs[0], surfaces=True, spacing=(1.0, 1.0), geometry="volume").summary()
    assert volume["classes"]["water"]["surface_distance"]["unit"] == "mm"
    unknown = scored(pairs[0], surfaces=True).summary()
    assert unknown["classes"]["water"]["surface_distance"]["unit"] == "px"


def test_without_monai_the_summary_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("geomed_mae.scoring.segmentation.available", lambda: False)
    summary = scored((FOUND, TRUTH), surfaces=True).summary()
    assert summary["surface_distance"].startswith("not measured: MONAI is not installed")
    assert "surface_distance" not in scored((FOUND, TRUTH), surfaces=False).summary()


def test_each_group_and_each_image_has_a_line():
    scores = scored((FOUND, TRUTH), (TRUTH.clip(0), TRUTH), (FOUND, TRUTH), groups=["p", "q", "p"])
    groups = {line["group"]: line for line in scores.per_group()}
    assert (groups["p"]["images"], groups["q"]["images"]) == (2, 1)
    assert groups["p"]["dice"]["water"] == pytest.approx(6 / 8) and groups["q"]["value"] == 1.0
    assert groups["p"]["value"] == pytest.approx(scores.headline(np.array([0, 2])), abs=1e-6)
    assert [line["key"] for line in scores.per_image()] == list(scores.keys) == ["k0", "k1", "k2"]


def test_scores_survive_json_to_the_digit():
    rng = np.random.default_rng(2)
    scores = SegmentationScores(("a", "b"))
    for number in range(3):
        chances = rng.dirichlet((1, 1), size=(12, 10)).transpose(2, 0, 1).astype(np.float32)
        truth = rng.integers(0, 2, (12, 10))
        scores.add(made_row(f"{number}", spacing=(2.0, 2.0)), truth, whole_map(chances.argmax(0), chances))
    again = SegmentationScores.from_json(json.loads(json.dumps(scores.to_json(), allow_nan=False)))
    assert again.summary() == scores.summary()
    assert (again.per_group(), again.per_image()) == (scores.per_group(), scores.per_image())
    assert again.headline() == scores.headline()
