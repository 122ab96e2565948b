"""probe on classes of images: tables and folders, one label and several, beside floors, with honest splits."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image as Pillow
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from geomed_mae.archives.build import open_archive
from geomed_mae.errors import ConfigError
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.probe import probe, probe_recipe
from geomed_mae.scoring import intervals
from geomed_mae.training import logistic
from geomed_mae.training.image_probe import ImageTable, _of_trained_classes
from geomed_mae.training.probe_features import IMAGE_PERCENTILES, Sources, image_statistics
from tests.scenes import random_encoder

FLOORS = {
    "floor_random_weights",
    "floor_random_weights_several_layers",
    "floor_random_convolutions",
    "floor_image_statistics",
}
COUNT = 36


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer resamples and fewer candidates of the penalty: neither is what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "ROUNDS", 60)
        patch.setattr(logistic, "STRENGTHS", (1e-4, 1e-2, 1.0))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures of stripes that lie or stand, in folders named after that, tables of them, and a random encoder."""
    root = tmp_path_factory.mktemp("classes")
    rng = np.random.default_rng(1)
    lines, flags = ["image,kind"], ["image,lying,light,never"]
    for number in range(COUNT):
        lying, light = number % 2, number // 2 % 2
        wave = 60 * np.sin(np.arange(32) * 1.2 + rng.uniform(0, 6))
        picture = (
            (wave[:, None] if lying else wave[None]) + (150 if light else 90) + rng.normal(scale=12, size=(32, 32))
        )
        name = f"{number:02d}.png"
        folder = root / "images" / ("lying" if lying else "standing")
        folder.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(np.clip(picture, 0, 255).astype(np.uint8)).save(folder / name)
        lines.append(f"{name},{folder.name}")
        flags.append(f"{name},{lying},{light if number % 5 else ''},0")
    (root / "kinds.csv").write_text("\n".join(lines))
    (root / "flags.csv").write_text("\n".join(flags))
    random_encoder(root / "encoder", "xray", root / "images")
    return root


@pytest.fixture(scope="module")
def by_table(made):
    return probe(made / "encoder", [made / "images"], made / "kinds.csv", made / "probe.json", shots="3")


def test_a_table_of_classes_is_probed_beside_four_floors(made, by_table):
    result = by_table
    assert result["task"] == "classify" and result["classes"] == ["lying", "standing"] and not result["multi_label"]
    assert set(result["scores"]) == {"encoder", "encoder_several_layers"} | FLOORS
    assert result["split"] == {"unit": "group", "train": 27, "test": 9, "groups": {"train": 27, "test": 9}}
    convolutions, statistics = (
        result["scores"][f"floor_{name}"] for name in ("random_convolutions", "image_statistics")
    )
    assert convolutions["linear"]["auroc"] > 0.95 and convolutions["knn"]["value"] > 0.9, "filters see directions"
    assert statistics["linear"]["auroc"] < 0.9, "statistics of all pixels do not"
    assert json.loads((made / "probe.json").read_text()) == result
    scores, best = result["scores"], result["best_floor"]
    assert scores[best]["linear"]["value"] == max(scores[name]["linear"]["value"] for name in FLOORS)
    mine = scores[result["encoder_read_out"]]["linear"]
    assert result["difference"]["mean"] == pytest.approx(mine["value"] - scores[best]["linear"]["value"], abs=2e-6)
    losses = [scores[name]["linear"]["loss_in_cross_validation"] for name in ("encoder", "encoder_several_layers")]
    assert mine["loss_in_cross_validation"] == min(losses), "chosen by the training side, not by the test score"
    assert {"accuracy", "balanced_accuracy", "auroc", "average_precision", "classes", "interval"} <= set(mine)


def test_few_labels_are_drawn_five_times(by_table):
    (few,) = by_table["few_labels"]
    assert (few["shots"], few["per"], few["draws"]) == (3, "images of each class", 5)
    assert set(few["scores"]) == FLOORS | {by_table["encoder_read_out"]} and few["difference"]["seeds"] == 5


def test_a_folder_of_classes_gives_the_same_scores_as_a_table(made, by_table):
    found = probe(made / "encoder", [made / "images"], made / "images", made / "folders.json")
    assert found["classes"] == by_table["classes"]
    for name, scores in found["scores"].items():
        assert scores["linear"]["value"] == by_table["scores"][name]["linear"]["value"]


def test_several_labels_and_labels_that_are_not_known(made):
    recipe = probe_recipe(["labels.test=0.4", "labels.class_columns=[lying, light, never]"])
    found = probe(made / "encoder", [made / "images"], made / "flags.csv", made / "flags.json", recipe=recipe)
    assert found["multi_label"] and found["classes_without_training_images"] == ["never"]
    linear = found["scores"]["floor_image_statistics"]["linear"]
    assert set(linear["classes"]) == {"lying", "light"} and linear["classes"]["light"]["images_unknown"] > 0
    assert linear["classes"]["light"]["auroc"] > 0.9, "the mean tells what is light"
    assert linear["metric"].startswith("average precision") and len(linear["C"]) == 2


def test_scores_are_those_of_scikit_learn_on_the_features_by_hand(made, by_table):
    """The whole way once more with numpy and scikit-learn: features, standardisation, regression, scores."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    from geomed_mae.training.draws import by_group, held_groups

    index = open_archive([made / "images"], ["xray"]).by_pixels()
    model = load_encoder(made / "encoder")
    targets = np.array([index.paths(row.key)[0].parent.name == "standing" for row in index.rows], dtype=np.int16)
    held = held_groups(by_group(list(zip(index.rows, targets, strict=True))), 0.25, 0)
    test = np.array([row.group in held for row in index.rows])
    vectors = np.stack([model.embed(index.read(row.key)) for row in index.rows])
    scaler = StandardScaler().fit(vectors[~test])
    scored = by_table["scores"]["encoder"]["linear"]
    fitted = LogisticRegression(C=scored["C"][0], max_iter=1000).fit(scaler.transform(vectors[~test]), targets[~test])
    chances = fitted.predict_proba(scaler.transform(vectors[test]))
    assert scored["auroc"] == pytest.approx(roc_auc_score(targets[test], chances[:, 1]), abs=1e-6)
    expected = balanced_accuracy_score(targets[test], chances.argmax(axis=1))
    assert scored["balanced_accuracy"] == pytest.approx(expected, abs=1e-6)


def test_filters_and_features_come_from_training_images_alone(made):
    index = open_archive([made / "images"], ["xray"]).by_pixels()
    model = load_encoder(made / "encoder")
    some = Sources(model, index, index.rows[:20])
    same = Sources(model, index.subset(index.rows[:20]), index.rows[:20])
    image = index.read(index.rows[30].key)
    for name, vector in some.whole(image).items():
        np.testing.assert_array_equal(vector, same.whole(image)[name])


def test_statistics_of_images_are_those_of_numpy():
    values = np.random.default_rng(0).normal(size=(2, 5, 6)).astype(np.float32)
    valid = np.ones((5, 6), dtype=bool)
    valid[0] = False
    found = image_statistics(values, valid).reshape(-1, 2)
    seen = values[:, 1:].reshape(2, -1)
    np.testing.assert_allclose(found[0], seen.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found[1], seen.std(axis=1), rtol=1e-5)
    np.testing.assert_allclose(found[2:], np.percentile(seen, IMAGE_PERCENTILES, axis=1), rtol=1e-5)
    assert np.isnan(image_statistics(values, np.zeros((5, 6), dtype=bool))).all()


def test_classes_that_only_the_scored_side_has_are_counted_and_left_out():
    rows = tuple(range(8))
    targets = np.array([0, 2, 0, 2, 0, 2, 1, 1])
    table = ImageTable({"encoder": np.eye(8)}, rows, targets, np.arange(8) >= 4, ("a", "b", "c"), {})
    found = _of_trained_classes(table, 3)
    assert (
        found.classes == ("a", "c")
        and found.targets.tolist() == [0, 1, 0, 1, 0, 1]
        and found.rows == (0, 1, 2, 3, 4, 5)
    )
    assert found.counts == {
        "classes_without_training_images": ["b"],
        "test_images_of_such_classes": 2,
        "images_with_too_little_valid_area": 3,
    }
    assert found.features["encoder"].shape == (6, 8)
    alone = ImageTable({"encoder": np.eye(8)}, rows, targets, np.arange(8) >= 1, ("a", "b", "c"), {})
    with pytest.raises(ConfigError, match="the 1 labelled images to learn from have 1 class of a, b, c"):
        _of_trained_classes(alone, 0)


def test_labels_that_are_neither_maps_nor_classes_are_refused(made, tmp_path):
    (tmp_path / "labels").mkdir()
    Pillow.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "labels" / "other.png")
    with pytest.raises(ConfigError, match="is a label map that lies on one of the 36 images"):
        probe(made / "encoder", [made / "images"], tmp_path / "labels", tmp_path / "probe.json")
