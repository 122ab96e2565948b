"""probe: linear scores of features beside their floors."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import rasterio
from sklearn.linear_model import Ridge

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.seen import Seen
from geomed_mae.archives.splits import SplitRequest, parse_shares
from geomed_mae.errors import ConfigError, LeakageError
from geomed_mae.models.encoder_folder import load_encoder, save_encoder
from geomed_mae.probe import probe, probe_recipe
from geomed_mae.scan import scan
from geomed_mae.scoring import intervals
from geomed_mae.training import dense_probe
from geomed_mae.training.dense_probe import Table, choose
from geomed_mae.training.probe_parts import Parts
from geomed_mae.training.probing import Patches, fit_patches, patch_means, ridge
from tests.make_data import write_geotiff
from tests.scenes import labelled_scenes, landsat_scene, mr_volume, random_encoder


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Fewer resamples behind intervals: they are not what is tested here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "ROUNDS", 60)
        yield


READ_OUTS = {"encoder", "encoder_several_layers"}
FLOORS = {
    "floor_random_weights",
    "floor_random_weights_several_layers",
    "floor_random_convolutions",
    "floor_patch_statistics",
}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Eight scenes, an index of them in two parts, and an encoder with random weights."""
    root = labelled_scenes(tmp_path_factory.mktemp("probe"), 8)
    request = SplitRequest(method="group", shares=parse_shares("50,50"))
    index = scan([root / "images"], root / "index", modality="landsat7", split=request)
    # Shares hold on average only; here every other scene is scored.
    stored = json.loads((root / "index" / "splits.json").read_text())
    order = sorted(index.digests, key=index.digests.get)
    stored["parts"] = {key: ("train", "test")[number % 2] for number, key in enumerate(order)}
    (root / "index" / "splits.json").write_text(json.dumps(stored))
    random_encoder(root / "encoder", "landsat7", root / "images")
    return root


def test_scores_stand_beside_their_floors_and_are_written(scenes, tmp_path):
    result = probe(scenes / "encoder", [scenes / "index"], scenes / "labels", tmp_path / "probe.json", shots="2")
    assert set(result["scores"]) == READ_OUTS | FLOORS
    scores = result["scores"]
    assert scores["encoder_several_layers"]["features"] == 2 * scores["encoder"]["features"]
    assert result["task"] == "segment" and result["label_values"] == [0, 1]
    statistics = scores["floor_patch_statistics"]
    assert statistics["mean_r2"] > 0.9, "the mean of a patch tells the share of blobs that are so dark"
    assert statistics["knn"]["mean_r2"] > 0.8 and statistics["interval"]["low"] < statistics["mean_r2"]
    best = max(FLOORS, key=lambda name: scores[name]["mean_r2"])
    assert result["best_floor"] == best and result["encoder_read_out"] in READ_OUTS
    mine = scores[result["encoder_read_out"]]["mean_r2"]
    gain = result["difference"]
    assert gain["mean"] == pytest.approx(mine - scores[best]["mean_r2"], abs=2e-6) and gain["low"] <= gain["mean"]
    assert result["encoder_beats_floors"] == (mine > scores[best]["mean_r2"])
    assert "best floor" in result["verdict"] and result["leakage"]["not_compared"] == [
        "pretraining: nothing is recorded"
    ]
    (few,) = result["few_labels"]
    assert (few["shots"], few["per"], set(few["scores"])) == (2, "scenes", {result["encoder_read_out"], *FLOORS})
    assert json.loads((tmp_path / "probe.json").read_text()) == result
    again = probe(scenes / "encoder", [scenes / "index"], scenes / "labels", tmp_path / "again.json", shots=[2])
    assert again == result


def test_a_stored_split_is_kept_and_a_part_of_it_can_be_probed_alone(scenes, tmp_path):
    parts = json.loads((scenes / "index" / "splits.json").read_text())["parts"]
    labels, out = scenes / "labels", tmp_path / "probe.json"
    stored = probe(scenes / "encoder", [scenes / "index"], labels, out)
    test = sum(part == "test" for part in parts.values())
    assert stored["held_out"] == "stored" and (stored["split"]["train"], stored["split"]["test"]) == (8 - test, test)
    assert stored["scores"]["encoder"]["interval"]["images"] == test
    alone = probe(scenes / "encoder", [scenes / "index"], labels, out, split="train")
    assert alone["held_out"] == "group" and alone["split"]["train"] + alone["split"]["test"] == 8 - test
    with pytest.raises(ConfigError, match="'nowhere', but the split of"):
        probe(scenes / "encoder", [scenes / "index"], labels, out, split="nowhere")


def test_an_encoder_that_has_seen_the_test_images_is_refused_and_leaves_no_scores(scenes, tmp_path):
    index = open_archive([scenes / "index"])
    encoder = tmp_path / "encoder"
    shutil.copytree(scenes / "encoder", encoder)
    model = load_encoder(encoder)
    save_encoder(encoder, model.module, model.contract, seen=Seen.of(index, index.rows, what="pretraining"))
    out = tmp_path / "probe.json"
    out.write_text("{}")
    with pytest.raises(LeakageError, match="test images were pretrained on"):
        probe(encoder, [scenes / "index"], scenes / "labels", out)
    assert not out.exists(), "an older score must not stand for a refused one"
    result = probe(encoder, [scenes / "index"], scenes / "labels", out, transductive=True)
    assert result["transductive"]["test_images_pretrained_on"] == result["split"]["test"]


def test_channels_are_chosen_by_name(scenes, tmp_path):
    arguments = (scenes / "encoder", [scenes / "index"], scenes / "labels", tmp_path / "probe.json")
    found = probe(*arguments, channels="B1,B4")
    assert found["channels"] == ["B1", "B4"] and found["scores"]["floor_patch_statistics"]["features"] == 2 * 5
    with pytest.raises(ConfigError, match=r"has no channels \['B99'\] \(it has: B1, B2, B3, B4, B5, B7\)"):
        probe(*arguments, channels=["B1", "B99"])


def test_images_of_fewer_channels_name_the_way_out(scenes, tmp_path):
    for source in (scenes / "images").glob("*.tif"):
        few = int(source.stem) % 2
        with rasterio.open(source) as whole:
            profile = {**whole.profile, "count": 2 if few else 6}
            (tmp_path / "images").mkdir(exist_ok=True)
            with rasterio.open(tmp_path / "images" / source.name, "w", **profile) as part:
                part.write(whole.read()[: profile["count"]])
                part.descriptions = whole.descriptions[: profile["count"]]
    arguments = (scenes / "encoder", [tmp_path / "images"], scenes / "labels", tmp_path / "probe.json")
    with pytest.raises(
        ConfigError, match="2 different sets of channels; use those that all have with --channels B1,B2"
    ):
        probe(*arguments)
    result = probe(*arguments, channels="B1,B2")
    assert result["split"]["train"] + result["split"]["test"] == 8


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
    features = 5 + 3 * rng.normal(size=(400, 5))
    targets = features @ rng.normal(size=(5, 2)) + 3.0
    fitted = ridge(features, targets)
    assert fitted.penalty == pytest.approx(1e-3) and fitted.error < 1e-6
    np.testing.assert_allclose(fitted(features), targets, atol=1e-3)


def test_ridge_is_that_of_scikit_learn_in_pieces_too(monkeypatch):
    monkeypatch.setattr("geomed_mae.training.probing.CHUNK", 37)
    rng = np.random.default_rng(3)
    features = (rng.normal(size=(250, 12)) * rng.uniform(0.1, 9, 12) + 4).astype(np.float32)
    targets = features[:, :3] @ rng.normal(size=(3, 2)) + 4 * rng.normal(size=(250, 2))
    fitted = ridge(features, targets)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    model = Ridge(alpha=fitted.penalty).fit(scaled, targets)
    np.testing.assert_allclose(fitted(features), model.predict(scaled), atol=1e-4)


def test_noise_gets_a_strong_penalty_and_a_score_near_zero():
    rng = np.random.default_rng(0)
    features, shares = rng.normal(size=(300, 100)), rng.uniform(size=(300, 1))
    shares = np.concatenate([shares, 1 - shares], axis=1)
    fitted = fit_patches(Patches(features, shares, np.arange(300) >= 200))
    truth = shares[200:]
    misses = ((truth - fitted(features[200:])) ** 2).sum() / ((truth - truth.mean(axis=0)) ** 2).sum()
    assert fitted.penalty > 10 and 0.9 < misses < 1.2


def test_too_little_to_score_on_is_said():
    patches = Patches(np.zeros((3, 2)), np.zeros((3, 2)), np.array([False, False, False]))
    with pytest.raises(ConfigError, match="3 patches are left to train on and 0 to score on; label more area"):
        fit_patches(patches)


@pytest.mark.parametrize("shape", [(60, 8), (30, 40)])
def test_ridge_is_that_of_the_singular_values_with_dependent_features_too(shape):
    """Golub, Heath & Wahba (1979) by a singular value decomposition of all rows, as a check of the shorter way."""
    rng = np.random.default_rng(1)
    features = rng.normal(size=shape)
    features[:, -1] = features[:, 0] + features[:, 1]
    targets = features[:, :3] @ rng.normal(size=(3, 2)) + rng.normal(size=(shape[0], 2))
    fitted = ridge(features, targets)
    scaled = (features - features.mean(axis=0)) / features.std(axis=0)
    left, singular, right = np.linalg.svd(scaled, full_matrices=False)
    shrunk = (singular / (singular**2 + fitted.penalty))[:, None] * (left.T @ (targets - targets.mean(axis=0)))
    np.testing.assert_allclose(fitted(features) - fitted.center, scaled @ (right.T @ shrunk), atol=1e-6)
    kept = singular > 1e-6 * singular[0]
    freedom = (singular[kept] ** 2 / (singular[kept] ** 2 + fitted.penalty)).sum()
    residual = ((targets - fitted(features)) ** 2).sum()
    assert fitted.error == pytest.approx(residual / (1 - freedom / shape[0]) ** 2 / shape[0], rel=1e-6)


def test_a_class_without_training_patches_does_not_spoil_the_mean(landsat_rows):
    rng = np.random.default_rng(2)
    shares = rng.dirichlet(np.ones(2), size=200)
    shares = np.concatenate([shares, np.zeros((200, 1))], axis=1)
    held = np.arange(200) >= 100
    shares[100:120] = (0, 0, 1)  # a class that only the scored side has
    images = np.where(held, 1, 0)
    features = shares[:, :1] + 0.01 * rng.normal(size=(200, 1))
    table = Table({"encoder": features.astype(np.float32)}, shares, held, images, tuple(landsat_rows[:2]))
    values = dense_probe.read_out(table, "encoder", (0, 1, 7)).values
    assert values["classes_not_in_the_mean"] == ["7"] and values["r2"][2] < 0
    assert values["mean_r2"] == pytest.approx(np.mean(values["r2"][:2]), abs=1e-6)


def test_too_many_patches_are_thinned_on_each_side_in_the_same_way(landsat_rows, monkeypatch):
    rows = landsat_rows[:3]
    targets = tuple((row, np.ones(row.shape, np.int16)) for row in rows)
    parts = Parts(targets, {row.key: np.full(row.shape, number == 2) for number, row in enumerate(rows)}, "group")
    whole = [int(one.kept.sum()) for one in choose(parts, (0, 1), (8, 8))]
    assert whole == [64, 64, 64]
    monkeypatch.setattr(dense_probe, "MAX_PATCHES", 50)
    chosen = choose(parts, (0, 1), (8, 8))
    assert [int(one.kept.sum()) for one in chosen] == [25, 25, 50]
    for one, again in zip(chosen, choose(parts, (0, 1), (8, 8)), strict=True):
        np.testing.assert_array_equal(one.kept, again.kept)
    assert not np.array_equal(chosen[0].kept, chosen[1].kept)


@pytest.fixture(scope="module")
def landsat_rows(scenes):
    return open_archive([scenes / "index"]).rows


def test_only_keys_of_labels_can_be_set():
    recipe = probe_recipe(["labels.test=0.5", "head.classes=[a, b]"])
    assert recipe.labels.test == 0.5 and recipe.head.classes == ("a", "b")
    with pytest.raises(ConfigError, match="--set train.steps: a probe reads keys of labels"):
        probe_recipe(["train.steps=5"])
    with pytest.raises(ConfigError, match="takes few labels with --shots"):
        probe_recipe(["labels.shots=5"])
