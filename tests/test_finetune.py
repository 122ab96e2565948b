"""finetune from labels to scores, on scenes and volumes made here."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.labels import match_labels
from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.finetune import finetune, split_targets
from geomed_mae.heads.task_model import load_task_model
from geomed_mae.readers import IGNORE
from geomed_mae.recipe_file import build_recipe, load_recipe
from geomed_mae.training import checkpoint
from tests.scenes import MR_RECIPE, WATER_RECIPE, landsat_scene, mr_run, random_encoder, water_run


def recipe(base: dict = WATER_RECIPE, **sections: dict):
    return build_recipe({**base, **{name: {**base.get(name, {}), **keys} for name, keys in sections.items()}})


def run(folder, out, given, *, encoder="none", **how):
    return finetune(given, [folder / "scenes"], folder / "labels", encoder, out, **how)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return water_run(tmp_path_factory)


def summary(path) -> dict:
    return json.loads((path / "summary.json").read_text())


def test_sixty_steps_from_scratch_find_the_blobs_of_another_scene(folder):
    found = summary(folder / "run")
    assert found["validation"]["classes"]["water"]["iou"] > 0.6
    assert found["validation"]["images"] == 1 and found["validation"]["pixels"] == 128 * 160
    assert found["loss_last"] < found["loss_first"]
    assert found["split"] == {"unit": "group", "train": 1, "validation": 1}


def test_volumes_go_the_same_way(tmp_path_factory):
    found = summary(mr_run(tmp_path_factory) / "run")
    assert found["steps"] == 2 and found["validation"]["pixels"] == 20 * 24 * 16
    model, _ = load_task_model(mr_run(tmp_path_factory) / "run")
    assert model.spec.crop == (16, 16, 16) and model.classes == ("background", "bright")


def test_the_run_folder_names_no_file_and_no_place(folder):
    for path in (folder / "run").rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert b"x.tif" not in data and b"y.tif" not in data and str(folder).encode() not in data, path


def test_an_interrupted_run_resumes_to_the_same_weights(folder, tmp_path):
    whole = run(folder, tmp_path / "whole", recipe(train={"steps": 6, "checkpoint_every": 3}))
    run(folder, tmp_path / "halves", recipe(train={"steps": 6, "checkpoint_every": 3}))
    for name in ("step-00000006",):
        for path in (tmp_path / "halves" / "checkpoints" / name).iterdir():
            path.unlink()
        (tmp_path / "halves" / "checkpoints" / name).rmdir()
    halves = run(folder, tmp_path / "halves", recipe(train={"steps": 6, "checkpoint_every": 3}), resume=True)
    assert whole["validation"] == halves["validation"]
    first, second = (load_task_model(tmp_path / name)[0].state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parts_of_a_batch_and_an_average_serve_fine_tuning_too(folder, tmp_path):
    found = run(folder, tmp_path / "run", recipe(train={"steps": 3, "accumulate": 2, "ema": 0.9}))
    saved = checkpoint.newest_valid(tmp_path / "run/checkpoints")
    weights = load_task_model(tmp_path / "run")[0].state_dict()
    assert saved.average and all(torch.equal(weights[name], value) for name, value in saved.average.items())
    assert not all(torch.equal(saved.model[name], value) for name, value in saved.average.items())
    assert found["validation"] is not None


def test_several_processes_are_refused(folder, tmp_path, monkeypatch):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="finetune runs in one process; start it without torchrun"):
        run(folder, tmp_path / "run", recipe())


def test_resuming_with_other_labels_is_refused(folder, tmp_path):
    (tmp_path / "labels").mkdir()
    for name in ("x", "y"):
        (tmp_path / "labels" / f"{name}.tif").write_bytes((folder / "labels" / f"{name}.tif").read_bytes())
    given = recipe(train={"steps": 1})
    finetune(given, [folder / "scenes"], tmp_path / "labels", "none", tmp_path / "run")
    landsat_scene(tmp_path / "unused.tif", tmp_path / "labels" / "x.tif", seed=0, shape=(64, 160))
    with pytest.raises(IntegrityError, match="was made from another archive"):
        finetune(given, [folder / "scenes"], tmp_path / "labels", "none", tmp_path / "run", resume=True)


def test_a_frozen_encoder_keeps_its_weights_and_the_head_learns(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    given = recipe(train={"steps": 3}, head={"frozen": True})
    found = run(folder, tmp_path / "run", given, encoder=encoder)
    assert found["encoder"] == "pretrained" and found["frozen"]
    model, _ = load_task_model(tmp_path / "run")
    from geomed_mae.models.encoder_folder import load_encoder

    before = load_encoder(encoder).module.state_dict()
    assert all(torch.equal(before[name], value) for name, value in model.encoder.state_dict().items())


def test_fine_tuning_moves_the_encoder_lower_layers_less(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    from geomed_mae.models.encoder_folder import load_encoder

    before = load_encoder(encoder).module.state_dict()
    run(folder, tmp_path / "run", recipe(train={"steps": 3, "layer_decay": 0.1}), encoder=encoder)
    after = load_task_model(tmp_path / "run")[0].encoder.state_dict()
    moved = [(after[f"blocks.{n}.mlp.fc1.weight"] - before[f"blocks.{n}.mlp.fc1.weight"]).abs().max() for n in (0, 1)]
    assert 0 < moved[0] < 0.2 * moved[1]


def test_a_single_scene_is_split_by_blocks(folder, tmp_path):
    given = recipe(train={"steps": 1}, labels={"validation": 0.25, "block_px": 32})
    found = finetune(given, [folder / "scenes" / "x.tif"], folder / "labels", "none", tmp_path / "run")
    assert found["split"]["unit"] == "block"
    assert found["validation"]["pixels"] == pytest.approx(128 * 160 / 4, rel=0.01)


def test_held_out_blocks_are_unknown_in_training_and_nothing_else_is(folder):
    index = open_archive([folder / "scenes" / "x.tif"], ["landsat7"])
    labelled = match_labels(index, folder / "labels").labelled
    split = split_targets(labelled, recipe(labels={"validation": 0.5, "block_px": 16}))
    train, validation = split.train[0][1], split.validation[0][1]
    assert ((train == IGNORE) ^ (validation == IGNORE)).all()
    np.testing.assert_array_equal(np.where(train == IGNORE, validation, train), labelled[0].stored)


def test_a_single_scene_without_blocks_says_what_to_set(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"set labels\.block_px to split one raster scene by blocks"):
        finetune(recipe(), [folder / "scenes" / "x.tif"], folder / "labels", "none", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_split_is_the_same_whenever_the_archive_is_scanned(folder):
    splits = []
    for _ in range(4):
        index = open_archive([folder / "scenes"], ["landsat7"])
        split = split_targets(match_labels(index, folder / "labels").labelled, recipe())
        splits.append([index.paths(row.key)[0].name for row, _ in split.validation])
    assert all(names == splits[0] for names in splits)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"head": {"name": "classify"}}, "training on classification labels is not available yet"),
        ({"head": {"name": "segmet"}}, "'segmet' is not one of the heads: did you mean 'segment'"),
        ({"head": {"classes": ["water"]}}, r"head\.classes .* must be two different names or more"),
        ({"labels": {"values": {0: 0, 1: 5}}}, "labels.values leads to class 5"),
        ({"data": {"channels": ["B1", "B9"]}}, r"data.channels asks for \['B9'\]"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_written(folder, tmp_path, sections, message):
    with pytest.raises(ConfigError, match=message):
        run(folder, tmp_path / "run", recipe(**sections))
    assert not (tmp_path / "run").exists()


def test_a_pretraining_recipe_and_a_missing_model_are_refused(folder, tmp_path):
    plain = {name: WATER_RECIPE[name] for name in ("data", "train")}
    with pytest.raises(ConfigError, match="a fine-tuning recipe has a section `head`"):
        run(folder, tmp_path / "run", build_recipe({**plain, "model": WATER_RECIPE["model"]}))
    with pytest.raises(ConfigError, match="--encoder none needs a section `model`"):
        run(
            folder,
            tmp_path / "run",
            build_recipe({**plain, "head": WATER_RECIPE["head"], "labels": {"validation": 0.5}}),
        )


def test_an_encoder_of_another_patch_is_refused_with_both_sizes(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    given = build_recipe(
        {
            **{k: WATER_RECIPE[k] for k in ("train", "head", "labels")},
            "data": {"modality": "landsat7", "crop_2d": [60, 60]},
        }
    )
    with pytest.raises(ConfigError, match=r"data.crop_2d \[60, 60\] is not a multiple of the encoder's patch \[8, 8\]"):
        run(folder, tmp_path / "run", given, encoder=encoder)


@pytest.mark.parametrize("name", ["finetune_landsat7_water", "finetune_mr_hippocampus"])
def test_packaged_recipes_are_fine_tuning_recipes(name):
    given = load_recipe(name)
    assert given.verb == "finetune" and given.model is not None and given.head.name == "segment"


@pytest.mark.data
def test_the_hippocampus_recipe_runs_on_real_volumes(shared_data, tmp_path):
    images = [shared_data / "med" / "hippocampus" / "images" / f"hippocampus_{n}.nii.gz" for n in ("001", "006", "011")]
    given = load_recipe("finetune_mr_hippocampus", ["train.steps=1", "train.batch_size=2", "model.depth=1"])
    found = finetune(given, images, shared_data / "med" / "hippocampus" / "labels", "none", tmp_path / "run")
    assert set(found["validation"]["classes"]) == {"background", "anterior", "posterior"}
    assert found["labels"]["images_labelled"] == 3


def test_mr_recipe_of_these_tests_is_checked():
    assert build_recipe(MR_RECIPE).data.crop_3d == (16, 16, 16)
