"""What a probe fits: penalties from the training side, folds of whole groups, neighbours like scikit-learn's."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from geomed_mae.training import logistic
from geomed_mae.training.knn import TEMPERATURE, nearest
from geomed_mae.training.logistic import DEFAULT_STRENGTH, linear

RNG = np.random.default_rng(6)


def classes_of(count: int, noise: float, dim: int = 6) -> tuple[np.ndarray, np.ndarray]:
    targets = np.arange(count) % 3
    centres = np.eye(3, dim)
    return (centres[targets] + noise * RNG.normal(size=(count, dim))).astype(np.float32), targets


def test_chances_are_those_of_scikit_learn_at_the_chosen_strength():
    features, targets = classes_of(150, 0.5)
    found = linear(features[:120], targets[:120], [str(n) for n in range(120)], features[120:], 3)
    scaler = StandardScaler().fit(features[:120])
    model = LogisticRegression(C=found.strengths[0], max_iter=1000)
    model.fit(scaler.transform(features[:120]), targets[:120])
    np.testing.assert_allclose(found.chances, model.predict_proba(scaler.transform(features[120:])), atol=2e-3)
    assert (found.chances.argmax(axis=1) == targets[120:]).mean() > 0.8 and found.loss < 0.6


def test_noise_gets_a_strong_penalty_and_telling_features_a_weak_one():
    targets = np.arange(60) % 2
    noise = RNG.normal(size=(60, 40)).astype(np.float32)
    groups = [str(n) for n in range(60)]
    weak = linear(noise, targets, groups, noise, 2)
    told = noise.copy()
    told[:, 0] = 3 * targets
    strong = linear(told, targets, groups, told, 2)
    assert weak.strengths[0] <= 1e-2 < strong.strengths[0] and strong.loss < 0.1 < weak.loss


def test_folds_keep_groups_whole_and_have_every_class_inside():
    targets = np.repeat(np.arange(12) % 2, 5)
    groups = np.repeat(np.arange(12).astype(str), 5)
    folds = logistic._folds(targets, groups)
    assert len(folds) == logistic.FOLDS
    for inside, outside in folds:
        assert not set(groups[inside]) & set(groups[outside]) and set(targets[inside]) == {0, 1}
    assert sorted(np.concatenate([outside for _, outside in folds])) == list(range(60))


def test_images_of_a_patient_do_not_choose_the_penalty_for_one_another():
    """Features that know the patient alone: folds that split patients would take them for good."""
    groups = np.repeat(np.arange(20), 6)
    targets = (np.arange(20) % 2)[groups]
    features = (np.eye(20)[groups] + 0.05 * RNG.normal(size=(120, 20))).astype(np.float32)
    by_patient = linear(features, targets, groups.astype(str), features, 2)
    by_image = linear(features, targets, np.arange(120).astype(str), features, 2)
    assert by_image.loss < 0.1 and by_patient.loss > 0.5
    assert by_patient.strengths[0] < by_image.strengths[0]


def test_one_group_a_class_leaves_nothing_to_choose_on():
    features, targets = classes_of(12, 0.1)
    found = linear(features, targets, targets.astype(str), features, 3)
    assert found.strengths == (DEFAULT_STRENGTH,) and found.loss is None


def test_a_class_that_was_not_there_has_no_chance():
    features, targets = classes_of(90, 0.3)
    seen = targets != 1
    found = linear(features[seen], targets[seen], np.flatnonzero(seen).astype(str), features[:9], 3)
    assert (found.chances[:, 1] == 0).all()
    np.testing.assert_allclose(found.chances.sum(axis=1), 1, atol=1e-6)


def test_several_labels_are_fitted_one_by_one_on_what_is_known():
    features = RNG.normal(size=(200, 4)).astype(np.float32)
    targets = np.column_stack([features[:, 0] > 0, features[:, 1] > 0, np.ones(200)]).astype(np.int64)
    targets[::4, 0] = -1
    found = linear(features[:150], targets[:150], np.arange(150).astype(str), features[150:], 3)
    assert ((found.chances[:, :2] > 0.5) == (features[150:, :2] > 0)).mean() > 0.9
    assert (found.chances[:, 2] == 1).all() and len(found.strengths) == 2
    alone = linear(features[:150][targets[:150, 0] >= 0], targets[:150, 0][targets[:150, 0] >= 0],
                   np.arange(150)[targets[:150, 0] >= 0].astype(str), features[150:], 2)  # fmt: skip
    assert np.corrcoef(found.chances[:, 0], alone.chances[:, 1])[0, 1] > 0.99


@pytest.mark.parametrize("neighbours", [1, 5])
def test_votes_of_neighbours_are_those_of_scikit_learn(neighbours):
    features, targets = classes_of(130, 0.6)
    found = nearest(features[:100], np.eye(3)[targets[:100]], None, features[100:], neighbours=neighbours)
    scaler = StandardScaler().fit(features[:100])
    model = KNeighborsClassifier(
        neighbours, metric="cosine", algorithm="brute", weights=lambda distance: np.exp(-distance / TEMPERATURE)
    )
    model.fit(scaler.transform(features[:100]), targets[:100])
    np.testing.assert_allclose(found, model.predict_proba(scaler.transform(features[100:])), atol=1e-3)


def test_neighbours_that_say_nothing_are_not_asked():
    features = np.array([[1, 0], [0.99, 0.02], [0, 1], [-1, -1]], dtype=np.float32)
    values = np.array([[1.0], [0.0], [0.0], [1.0]])
    known = np.array([[False], [True], [True], [False]])
    found = nearest(features, values, known, features[:1], neighbours=2)
    assert found[0, 0] == 0, "the nearest is not known, the second is 0"
    unknown = nearest(features, values, np.array([[False], [False], [True], [True]]), features[:1], neighbours=2)
    assert unknown[0, 0] == 0.5, "where no neighbour is known, the mean of what is"


def test_a_large_bank_is_thinned_in_the_same_way_every_time():
    features, targets = classes_of(300, 0.5)
    one = nearest(features, np.eye(3)[targets], None, features[:20], bank=50)
    np.testing.assert_array_equal(one, nearest(features, np.eye(3)[targets], None, features[:20], bank=50))
    assert not np.array_equal(one, nearest(features, np.eye(3)[targets], None, features[:20]))
