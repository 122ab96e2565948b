"""The live probe: bounded, the same every time, in agreement with the verb, and without a trace in training."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score

from geomed_mae.archives.build import open_archive
from geomed_mae.errors import ConfigError
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from geomed_mae.recipe_file import build_recipe
from geomed_mae.training import probe_windows
from geomed_mae.training.probe_online import OnlineProbe
from geomed_mae.training.probing import HELD_OUT, SEED, Patches, held_out_predictions, patch_means
from tests.make_data import write_geotiff
from tests.scenes import labelled_scenes, landsat_scene, mr_volume

SPEC = ModelSpec(dim=24, depth=1, heads=2, patch_2d=(8, 8), patch_3d=(4, 4, 4), basis=4)


def parts(folder, modality, crop):
    """Index, contract, recipe and random encoder for an archive."""
    index = open_archive([folder], [modality])
    entries = contract_entries(load_modality(modality), index.rows[0].channels, [row.statistics for row in index])
    contract = Contract(channels=entries, **{f"crop_{len(crop)}d": crop})
    recipe = build_recipe(
        {
            "data": {"modality": modality, f"crop_{len(crop)}d": list(crop)},
            "model": {f"patch_{len(crop)}d": list(SPEC.patch(len(crop)))},
        }
    )
    torch.manual_seed(3)
    return index, contract, recipe, Encoder(SPEC)


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    return labelled_scenes(tmp_path_factory.mktemp("scenes"), 4)


@pytest.fixture
def made(scenes):
    index, contract, recipe, encoder = parts(scenes / "images", "landsat7", (64, 64))
    return OnlineProbe.open(index, scenes / "labels", contract, SPEC, recipe), index, contract, encoder


def test_it_sees_the_features_and_labels_that_the_verb_sees(made, scenes):
    """Where a scene is one window, tokens are those of PretrainedEncoder and the score that of probing's own maths."""
    probe, index, contract, encoder = made
    pretrained = PretrainedEncoder(encoder, contract)
    from geomed_mae.archives.labels import match_labels

    found, shares, held = [], [], []
    by_key = {entry.row.key: entry for entry in match_labels(index, scenes / "labels").labelled}
    scored = {row.key for row in probe_split(index)}
    for side in (False, True):
        for row in index.rows:
            if (row.key in scored) == side:
                found.append(pretrained.features(index.read(row.key)).array.reshape(24, -1).T)
                water = patch_means(by_key[row.key].stored == 1, (8, 8)).reshape(-1, 1)
                shares.append(np.concatenate([1 - water, water], axis=1))
                held.append(np.full(len(water), side))
    patches = Patches(*(np.concatenate(part) for part in (found, shares, held)))
    np.testing.assert_allclose(probe._features(encoder), patches.features, atol=1e-5)
    np.testing.assert_allclose(probe.truth, patches.shares, atol=1e-12)
    scores, answers = probe.score(encoder, floor=False), held_out_predictions(patches)[0].clip(0, 1)
    truth = patches.shares[patches.held_out]
    misses = ((answers - truth) ** 2).sum(axis=0) / ((truth - truth.mean(axis=0)) ** 2).sum(axis=0)
    assert scores["probe_r2"] == pytest.approx((1 - misses).mean(), abs=1e-4)
    assert scores["probe_accuracy"] == pytest.approx((answers.argmax(axis=1) == truth.argmax(axis=1)).mean(), abs=1e-6)
    assert scores["probe_auroc"] == pytest.approx(roc_auc_score(truth.argmax(axis=1) == 1, answers[:, 1]), abs=1e-3)


def probe_split(index):
    from geomed_mae.archives.splits import split_by_group

    return split_by_group(list(index.rows), HELD_OUT, SEED)[1]


def test_scores_are_the_same_every_time_and_leave_no_trace(made):
    probe, _, _, encoder = made
    encoder.train()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    torch.manual_seed(11)
    legacy = np.random.get_state()[1].copy()  # noqa: NPY002
    state = torch.get_rng_state()
    first, second = probe.score(encoder), probe.score(encoder)
    assert torch.equal(torch.get_rng_state(), state) and (np.random.get_state()[1] == legacy).all()  # noqa: NPY002
    assert encoder.training and all(parameter.grad is None for parameter in encoder.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.state_dict().items())
    without = [{key: value for key, value in one.items() if key != "probe_seconds"} for one in (first, second)]
    assert without[0] == without[1]
    assert set(without[0]) == {
        f"probe_{floor}{name}" for floor in ("", "floor_") for name in ("auroc", "r2", "accuracy")
    }


def test_the_floor_is_that_of_random_weights_whatever_the_encoder(made, scenes):
    probe, index, contract, encoder = made
    with torch.no_grad():
        encoder.norm.weight.zero_()  # features that say nothing
    scores = probe.score(encoder)
    again = OnlineProbe.open(
        index, scenes / "labels", contract, SPEC, parts(scenes / "images", "landsat7", (64, 64))[2]
    )
    assert scores["probe_floor_r2"] == again.score(Encoder(SPEC))["probe_floor_r2"]
    assert scores["probe_r2"] < 0.1 < scores["probe_floor_r2"]


def test_no_group_is_on_both_sides_and_both_are_looked_at(made):
    probe, *_ = made
    assert len(probe.windows) == 4 and probe.held.sum() == 64 and (~probe.held).sum() == 192


def test_large_archives_are_looked_at_in_part_where_the_labels_are_most_mixed(tmp_path, monkeypatch):
    monkeypatch.setattr(probe_windows, "MAX_WINDOWS", 4)
    for seed in range(3):
        folders = tmp_path / "images" / f"{seed}.tif", tmp_path / "labels" / f"{seed}.tif"
        landsat_scene(*folders, shape=(96, 128), seed=seed)
    index, contract, recipe, encoder = parts(tmp_path / "images", "landsat7", (32, 32))
    probe = OnlineProbe.open(index, tmp_path / "labels", contract, SPEC, recipe)
    assert len(probe.windows) <= 4 and all(window.pixels.shape == (6, 32, 32) for window in probe.windows)
    water = np.concatenate([probe.truth[probe.held == side, 1] for side in (False, True)])
    assert 0.3 < water.mean() < 0.7, "30 % of the scenes is water, the most mixed windows have about half"
    assert np.isfinite(list(probe.score(encoder).values())).all()


def test_a_single_volume_is_split_by_blocks(tmp_path):
    mr_volume(tmp_path / "images" / "v.nii.gz", tmp_path / "labels" / "v.nii.gz", shape=(30, 33, 32))
    index, contract, recipe, encoder = parts(tmp_path / "images", "mr", (16, 16, 16))
    probe = OnlineProbe.open(index, tmp_path / "labels", contract, SPEC, recipe)
    assert probe.held.any() and not probe.held.all()
    assert "probe_r2" in probe.score(encoder)


def table(path, rows):
    path.write_text("".join(f"{row}\n" for row in ("image,class", *rows)))
    return path


@pytest.fixture(scope="module")
def classed(tmp_path_factory):
    """Twelve small scenes; the class says how bright the first band is."""
    root = tmp_path_factory.mktemp("classed")
    rows = []
    (root / "images").mkdir()
    for number in range(12):
        values = np.random.default_rng(number).integers(20, 40, (6, 32, 32)).astype(np.uint8)
        values[0] += 100 * (number % 2)
        transform = (28.5, 0, 500000 + 1e5 * number, 0, -28.5, 4500000.25)
        write_geotiff(root / "images" / f"s{number}.tif", values, crs="EPSG:32633", transform=transform)
        rows.append(f"s{number}.tif,{'bright' if number % 2 else 'dark'}")
    return root, table(root / "classes.csv", rows)


def test_a_table_of_classes_is_probed_by_the_mean_of_the_tokens(classed):
    root, labels = classed
    index, contract, recipe, encoder = parts(root / "images", "landsat7", (32, 32))
    probe = OnlineProbe.open(index, labels, contract, SPEC, recipe)
    scores = probe.score(encoder)
    assert scores["probe_auroc"] == 1.0 and scores["probe_accuracy"] == 1.0 and scores["probe_floor_auroc"] == 1.0
    assert probe.truth.shape == (12, 2) and probe.held.sum() == 4


@pytest.mark.parametrize("content", ["image,class\nnothere.tif,a\n", "image,class\ns0.tif,a\ns1.tif,b\n"])
def test_labels_that_do_not_fit_are_an_error_that_says_so(classed, tmp_path, content):
    (tmp_path / "t.csv").write_text(content)
    index, contract, recipe, _ = parts(classed[0] / "images", "landsat7", (32, 32))
    with pytest.raises(ConfigError):
        OnlineProbe.open(index, tmp_path / "t.csv", contract, SPEC, recipe)


def test_classes_that_are_on_one_side_of_the_split_alone_are_refused(tmp_path):
    """Two sites that share no class: every score would be empty or 0, whatever the features."""
    for seed in range(2):
        folders = tmp_path / "images" / f"{seed}.tif", tmp_path / "labels" / f"{seed}.tif"
        water = landsat_scene(*folders, shape=(32, 32), seed=seed)
        grid = {"crs": "EPSG:32633", "transform": (28.5, 0, 500000 + 1e5 * seed, 0, -28.5, 4500000.25)}
        write_geotiff(folders[1], (water + 2 * seed).astype(np.uint8), **grid)
    index, contract, recipe, _ = parts(tmp_path / "images", "landsat7", (32, 32))
    with pytest.raises(ConfigError, match="no class of the labels is here and there on both sides"):
        OnlineProbe.open(index, tmp_path / "labels", contract, SPEC, recipe)


def test_features_that_are_not_finite_give_no_score(made):
    probe, *_, encoder = made
    with torch.no_grad():
        encoder.norm.weight.fill_(float("nan"))
    assert set(probe.score(encoder, floor=False)) == {"probe_seconds"}
