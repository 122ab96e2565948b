"""probe: linear scores of features beside their floors."""

from __future__ import annotations

import json

import numpy as np
import pytest

from geomed_mae.errors import ConfigError
from geomed_mae.probe import probe
from geomed_mae.training.probing import Patches, linear_probe, patch_means, ridge
from tests.make_data import write_geotiff
from tests.scenes import landsat_scene, mr_volume, random_encoder


def test_scores_stand_beside_two_floors_and_are_written(tmp_path):
    for seed in range(3):
        landsat_scene(
            tmp_path / "scenes" / f"{seed}.tif", tmp_path / "labels" / f"{seed}.tif", shape=(96, 96), seed=seed
        )
    random_encoder(tmp_path / "encoder", "landsat7", tmp_path / "scenes")
    result = probe(tmp_path / "encoder", [tmp_path / "scenes"], tmp_path / "labels", tmp_path / "probe.json")
    read_outs = {"encoder", "encoder_several_layers"}
    floors = {"floor_random_weights", "floor_random_weights_several_layers", "floor_patch_statistics"}
    assert set(result["scores"]) == read_outs | floors
    assert result["scores"]["encoder_several_layers"]["features"] == 2 * result["scores"]["encoder"]["features"]
    assert result["held_out"] == "group" and result["label_values"] == [0, 1]
    statistics = result["scores"]["floor_patch_statistics"]
    assert statistics["mean_r2"] > 0.9, "the mean of a patch tells the share of blobs that are so dark"
    assert statistics["patches_train"] == 2 * 144 and statistics["patches_scored"] == 144
    best, floor = (max(result["scores"][name]["mean_r2"] for name in names) for names in (read_outs, floors))
    assert result["encoder_beats_floors"] == (best > floor)
    assert json.loads((tmp_path / "probe.json").read_text()) == result
    again = probe(tmp_path / "encoder", [tmp_path / "scenes"], tmp_path / "labels", tmp_path / "again.json")
    assert again == result


def test_a_single_volume_is_split_by_blocks(tmp_path):
    mr_volume(tmp_path / "v.nii.gz", tmp_path / "labels" / "v.nii.gz", shape=(32, 32, 32))
    random_encoder(tmp_path / "encoder", "mr", tmp_path / "v.nii.gz")
    result = probe(tmp_path / "encoder", [tmp_path / "v.nii.gz"], tmp_path / "labels", tmp_path / "probe.json")
    assert result["held_out"] == "block"
    counts = result["scores"]["encoder"]
    assert counts["patches_train"] + counts["patches_scored"] == 8**3


def test_labels_of_one_class_are_refused(tmp_path):
    landsat_scene(tmp_path / "scenes" / "a.tif", None, shape=(64, 64))
    random_encoder(tmp_path / "encoder", "landsat7", tmp_path / "scenes")
    (tmp_path / "labels").mkdir()
    grid = {"crs": "EPSG:32633", "transform": (28.5, 0, 500000, 0, -28.5, 4500000.25)}
    write_geotiff(tmp_path / "labels" / "a.tif", np.ones((64, 64), np.uint8), **grid)
    with pytest.raises(ConfigError, match="the labels hold 1 different values; a probe needs 2 to 32 classes"):
        probe(tmp_path / "encoder", [tmp_path / "scenes"], tmp_path / "labels", tmp_path / "probe.json")


def test_patch_means_are_means_and_border_patches_hold_what_is_there():
    values = np.arange(35.0).reshape(5, 7)
    found = patch_means(values, (2, 4))
    assert found.shape == (3, 2)
    assert found[0, 0] == values[:2, :4].mean() and found[2, 1] == values[4:, 4:].mean()


def test_ridge_is_least_squares_where_the_data_decide():
    rng = np.random.default_rng(0)
    features = rng.normal(size=(400, 5))
    features -= features.mean(axis=0)
    targets = features @ rng.normal(size=(5, 2)) + 3.0
    weights, center, penalty = ridge(features, targets)
    expected = np.linalg.lstsq(features, targets - targets.mean(axis=0), rcond=None)[0]
    np.testing.assert_allclose(weights, expected, atol=1e-3)
    np.testing.assert_allclose(center, targets.mean(axis=0))
    assert penalty == pytest.approx(1e-3)


def test_noise_gets_a_strong_penalty_and_a_score_near_zero():
    rng = np.random.default_rng(0)
    features, shares = rng.normal(size=(300, 100)), rng.uniform(size=(300, 1))
    shares = np.concatenate([shares, 1 - shares], axis=1)
    score = linear_probe(Patches(features, shares, np.arange(300) >= 200))
    assert score["penalty"] > 10 and -0.2 < score["mean_r2"] < 0.1


def test_too_little_to_score_on_is_said():
    patches = Patches(np.zeros((3, 2)), np.zeros((3, 2)), np.array([False, False, False]))
    with pytest.raises(ConfigError, match="3 patches are left to train on and 0 to score on; label more area"):
        linear_probe(patches)


@pytest.mark.parametrize("shape", [(60, 8), (30, 40)])
def test_ridge_is_that_of_the_singular_values_with_dependent_features_too(shape):
    """Golub, Heath & Wahba (1979) by a singular value decomposition of all rows, as a check of the shorter way."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=shape)
    features[:, -1] = features[:, 0] + features[:, 1]
    features -= features.mean(axis=0)
    targets = features[:, :3] @ rng.normal(size=(3, 2)) + rng.normal(size=(shape[0], 2))
    weights, _, penalty = ridge(features, targets)
    left, singular, right = np.linalg.svd(features, full_matrices=False)
    wanted = right.T @ ((singular / (singular**2 + penalty))[:, None] * (left.T @ (targets - targets.mean(axis=0))))
    np.testing.assert_allclose(features @ weights, features @ wanted, atol=1e-6)
