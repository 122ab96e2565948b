"""Scores of images' classes against scikit-learn, single and multi-label, with and without unknown entries."""

from __future__ import annotations

import json

import numpy as np
import pytest
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    brier_score_loss,
    confusion_matrix,
    f1_score,
    roc_auc_score,
)

from geomed_mae.scoring import intervals
from geomed_mae.scoring.classification import ClassificationScores


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer resamples: intervals have tests of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "ROUNDS", 60)
        yield


def single(classes: int, seed: int = 0, images: int = 40):
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, classes, images)
    chances = np.round(rng.dirichlet(np.ones(classes), size=images) * 0.6 + 0.4 * np.eye(classes)[truth], 6)
    chances[:10] = np.round(rng.dirichlet(np.ones(classes), size=10), 6)
    scores = ClassificationScores([f"c{number}" for number in range(classes)])
    for number in range(images):
        scores.add_image(f"k{number}", f"p{number // 2}", chances[number], int(truth[number]))
    return scores, chances, truth


def multi(seed: int = 0, images: int = 50):
    rng = np.random.default_rng(seed)
    truth = rng.integers(-1, 2, (images, 3))
    chances = np.round(np.clip(rng.random((images, 3)) * 0.7 + 0.3 * (truth == 1), 0, 1), 6)
    scores = ClassificationScores(["effusion", "nodule", "mass"], multi_label=True)
    for number in range(images):
        scores.add_image(f"k{number}", f"p{number}", chances[number], truth[number])
    return scores, chances, truth


def test_two_classes_agree_with_scikit_learn():
    scores, chances, truth = single(2)
    summary = scores.summary()
    said = chances.argmax(1)
    assert summary["metric"] == "AUROC, mean over classes"
    assert scores.headline() == pytest.approx(roc_auc_score(truth, chances[:, 1]), abs=1e-9)
    assert summary["value"] == summary["auroc"] == summary["interval"]["mean"]
    assert summary["accuracy"] == pytest.approx((said == truth).mean(), abs=1e-6)
    assert summary["balanced_accuracy"] == pytest.approx(balanced_accuracy_score(truth, said), abs=1e-6)
    assert summary["brier"] == pytest.approx(brier_score_loss(truth, chances[:, 1]), abs=1e-5)
    assert summary["confusion"] == confusion_matrix(truth, said).tolist()
    one = summary["classes"]["c1"]
    assert one["average_precision"] == pytest.approx(average_precision_score(truth, chances[:, 1]), abs=1e-6)
    assert summary["average_precision"] == one["average_precision"], "of two classes, that of the one looked for"
    assert one["f1"] == pytest.approx(f1_score(truth, said), abs=1e-6)
    assert (one["images_true"], one["images_false"], one["images_unknown"]) == (truth.sum(), 40 - truth.sum(), 0)


def test_several_classes_agree_with_scikit_learn():
    scores, chances, truth = single(4, seed=1)
    chances = chances / chances.sum(1, keepdims=True)
    summary = scores.summary()
    assert summary["auroc"] == pytest.approx(roc_auc_score(truth, chances, multi_class="ovr"), abs=1e-5)
    assert summary["average_precision"] == pytest.approx(
        average_precision_score(np.eye(4)[truth], chances, average="macro"), abs=1e-5
    )
    assert summary["brier"] == pytest.approx(((chances - np.eye(4)[truth]) ** 2).sum(1).mean(), abs=1e-5)
    assert summary["confusion"] == confusion_matrix(truth, chances.argmax(1)).tolist()


def test_a_model_that_is_nearly_sure_of_everything_is_still_ranked_and_comes_back_from_its_file():
    chances = np.array([1e-9, 3e-8, 2e-7, 4e-7], np.float32)
    scores = ClassificationScores(["a", "b"])
    for number, (chance, truth) in enumerate(zip(chances, (0, 1, 0, 1), strict=True)):
        scores.add_image(f"k{number}", f"p{number}", np.array([1 - chance, chance]), truth)
    assert scores.headline() == pytest.approx(roc_auc_score([0, 1, 0, 1], chances)) == 0.75
    again = ClassificationScores.from_json(json.loads(json.dumps(scores.to_json())))
    assert (again.chances == scores.chances).all() and again.headline() == 0.75


def test_unknown_entries_of_several_labels_count_nowhere():
    scores, chances, truth = multi()
    summary, expected = scores.summary(), []
    for number, name in enumerate(scores.classes):
        known = truth[:, number] >= 0
        pair = truth[known, number], chances[known, number]
        expected.append(average_precision_score(*pair))
        assert summary["classes"][name]["value"] == pytest.approx(expected[-1], abs=1e-6)
        assert summary["classes"][name]["auroc"] == pytest.approx(roc_auc_score(*pair), abs=1e-6)
        assert summary["classes"][name]["images_unknown"] == (~known).sum()
        said = pair[1] >= 0.5
        assert summary["classes"][name]["f1"] == pytest.approx(f1_score(pair[0], said), abs=1e-6)
    assert summary["metric"] == "average precision, mean over classes"
    assert scores.headline() == pytest.approx(np.mean(expected), abs=1e-9)
    known = truth >= 0
    assert summary["accuracy"] == pytest.approx(((chances >= 0.5) == (truth == 1))[known].mean(), abs=1e-6)
    assert summary["brier"] == pytest.approx(((chances - truth) ** 2)[known].mean(), abs=1e-6)
    assert summary["balanced_accuracy"] == pytest.approx(
        np.mean(
            [
                balanced_accuracy_score(truth[known[:, c], c], chances[known[:, c], c] >= 0.5)
                for c in range(truth.shape[1])
            ]
        ),
        abs=1e-6,
    )
    assert "confusion" not in summary
    assert sum(point["cases"] for point in summary["calibration"]["curve"]) == known.sum()


def test_a_resample_counts_images_as_often_as_they_were_drawn():
    scores, chances, truth = single(2)
    drawn = np.random.default_rng(5).integers(0, 40, 40)
    assert scores.headline(drawn) == pytest.approx(roc_auc_score(truth[drawn], chances[drawn, 1]))
    assert scores.class_score(1, drawn) == pytest.approx(scores.headline(drawn))
    only = np.flatnonzero(truth == 1)
    assert scores.headline(only) is None


def test_intervals_hold_the_value_and_count_groups():
    summary = single(2)[0].summary()
    for name in ("auroc", "average_precision", "accuracy", "balanced_accuracy", "brier"):
        interval = summary["intervals"][name]
        assert interval["low"] <= summary[name] <= interval["high"], name
        assert (interval["groups"], interval["images"]) == (20, 40)
    assert summary == single(2)[0].summary()


def test_each_group_has_a_line():
    scores, chances, truth = single(2)
    lines = scores.per_group()
    assert len(lines) == 20 and all(line["images"] == 2 for line in lines)
    assert lines[3]["accuracy"] == pytest.approx((chances[6:8].argmax(1) == truth[6:8]).mean())
    assert np.mean([line["brier"] for line in lines]) == pytest.approx(scores.summary()["brier"], abs=1e-6)
    assert scores.per_image()[0]["truth"] == {"c0": int(truth[0] == 0), "c1": int(truth[0] == 1)}
    assert None in {value for line in multi()[0].per_image() for value in line["truth"].values()}


@pytest.mark.parametrize("make", [lambda: single(3)[0], lambda: multi()[0]])
def test_scores_survive_json_to_the_digit(make):
    scores = make()
    again = ClassificationScores.from_json(json.loads(json.dumps(scores.to_json(), allow_nan=False)))
    assert (again.keys, again.groups, again.headline()) == (scores.keys, scores.groups, scores.headline())
    assert again.per_image() == scores.per_image()
    assert again.to_json() == scores.to_json()


def test_targets_and_probabilities_that_do_not_fit_are_refused():
    scores = ClassificationScores(["a", "b"])
    with pytest.raises(ValueError, match="has that many finite probabilities"):
        scores.add_image("k", "g", np.array([0.5, np.nan]), 0)
    with pytest.raises(ValueError, match="has that many finite probabilities"):
        scores.add_image("k", "g", np.array([1.0]), 0)
    for wrong in (2, -1, np.array([0, 1])):
        with pytest.raises(ValueError, match="is no target of 2 classes"):
            scores.add_image("k", "g", np.array([0.5, 0.5]), wrong)
    assert scores.summary()["value"] is None
