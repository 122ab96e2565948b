"""finetune from labels to scores, on scenes and volumes made here."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.seen import Seen
from geomed_mae.errors import ConfigError, IntegrityError, LeakageError
from geomed_mae.finetune import finetune
from geomed_mae.heads.task_model import load_task_model
from geomed_mae.models.encoder_folder import load_encoder, save_encoder
from geomed_mae.recipe_file import build_recipe, load_recipe
from geomed_mae.training import checkpoint
from geomed_mae.training.task import prepare
from geomed_mae.training.tuning import tune
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


def metrics(path) -> list[dict]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_sixty_steps_from_scratch_find_the_blobs_of_another_scene(folder):
    found = summary(folder / "run")
    assert found["test"]["classes"]["water"]["iou"] > 0.6
    assert found["test"]["images"] == 1 and found["test"]["pixels"] == 128 * 160
    assert found["loss_last"] < found["loss_first"]
    groups = {"train": 1, "validation": 0, "test": 1}
    assert found["split"] == {"unit": "group", **groups, "groups": groups}
    assert found["validation"] is None and found["few"] is None and "transductive" not in found


def test_volumes_go_the_same_way(tmp_path_factory):
    found = summary(mr_run(tmp_path_factory) / "run")
    assert found["steps"] == 2 and found["test"]["pixels"] == 20 * 24 * 16
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
    assert whole["test"] == halves["test"]
    assert (tmp_path / "whole/scores.json").is_file()
    first, second = (load_task_model(tmp_path / name)[0].state_dict() for name in ("whole", "halves"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_parts_of_a_batch_and_an_average_serve_fine_tuning_too(folder, tmp_path):
    found = run(folder, tmp_path / "run", recipe(train={"steps": 3, "accumulate": 2, "ema": 0.9}))
    saved = checkpoint.newest_valid(tmp_path / "run/checkpoints")
    weights = load_task_model(tmp_path / "run")[0].state_dict()
    assert saved.average and all(torch.equal(weights[name], value) for name, value in saved.average.items())
    assert not all(torch.equal(saved.model[name], value) for name, value in saved.average.items())
    assert found["test"] is not None


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


def test_resuming_with_another_encoder_of_the_same_archive_is_refused(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    known = load_encoder(encoder)
    torch.nn.init.zeros_(known.module.cls_token)
    save_encoder(tmp_path / "other", known.module, known.contract)
    given = recipe(train={"steps": 1, "batch_size": 2})
    run(folder, tmp_path / "run", given, encoder=encoder)
    with pytest.raises(IntegrityError, match="was made from another encoder"):
        run(folder, tmp_path / "run", given, encoder=tmp_path / "other", resume=True)
    run(folder, tmp_path / "run", given, encoder=encoder, resume=True)


def test_a_test_image_that_the_model_cannot_take_is_refused_before_training(folder, tmp_path):
    task = prepare(recipe(), [folder / "scenes"], folder / "labels")
    (row, target), *_ = task.test
    poorer = replace(row, channels=row.channels[:3], statistics=row.statistics[:3])
    with pytest.raises(ConfigError, match=r"lacks channels \['B4', 'B5', 'B7'\], which the model was trained with"):
        tune(recipe(), replace(task, test=((poorer, target),)), "none", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_frozen_encoder_keeps_its_weights_and_the_head_learns(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    given = recipe(train={"steps": 3}, head={"frozen": True})
    found = run(folder, tmp_path / "run", given, encoder=encoder)
    assert found["encoder"] == "pretrained" and found["frozen"]
    model, _ = load_task_model(tmp_path / "run")
    before = load_encoder(encoder).module.state_dict()
    assert all(torch.equal(before[name], value) for name, value in model.encoder.state_dict().items())


def test_the_head_alone_is_trained_in_the_first_share_of_the_steps(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    given = recipe(
        train={"steps": 4, "checkpoint_every": 1, "keep": 9, "weight_decay": 0.5}, head={"frozen_share": 0.5}
    )
    run(folder, tmp_path / "run", given, encoder=encoder)
    saved = [checkpoint.load(tmp_path / f"run/checkpoints/step-0000000{n}").model for n in (1, 2, 3)]
    before = {f"encoder.{name}": value for name, value in load_encoder(encoder).module.state_dict().items()}
    assert all(torch.equal(before[name], saved[1][name]) for name in before)
    assert not torch.equal(saved[0]["head.classify.weight"], saved[1]["head.classify.weight"])
    moved = [name for name in before if not torch.equal(before[name], saved[2][name])]
    assert any(".mlp." in name for name in moved) and any("patch_embed" in name for name in moved)
    last = checkpoint.load(tmp_path / "run/checkpoints/step-00000004").model
    for step in (2, 3, 4):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-0000000{step}")
    run(folder, tmp_path / "run", given, encoder=encoder, resume=True)
    again = checkpoint.load(tmp_path / "run/checkpoints/step-00000004").model
    assert all(torch.equal(last[name], again[name]) for name in last)


def test_the_twin_has_the_encoder_s_shape_and_contract_and_the_same_head_and_no_protection(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    still = {"steps": 1, "lr": 1e-12, "weight_decay": 0, "seed": 5}
    given = recipe(train={**still, "layer_decay": 0.5}, head={"frozen_share": 0.5})
    task = prepare(given, [folder / "scenes"], folder / "labels")
    other = given.model_copy(update={"model": given.model.model_copy(update={"depth": 5})})
    tune(given, task, str(encoder), tmp_path / "a")
    found = tune(other, task, "none", tmp_path / "b", twin_of=str(encoder))
    assert (found["twin"], found["encoder"]) == (True, "random weights")
    assert found["dropped"] == ["train.layer_decay", "head.frozen_share"]
    own, twin = (load_task_model(tmp_path / name)[0] for name in "ab")
    assert twin.encoder.spec == own.encoder.spec and twin.contract == own.contract and twin.spec == own.spec
    head = [model.head.state_dict() for model in (own, twin)]
    assert all(torch.allclose(head[0][name], head[1][name], atol=1e-8) for name in head[0])
    weights = [model.encoder.state_dict()["blocks.0.attn.qkv.weight"] for model in (own, twin)]
    assert not torch.allclose(weights[0], weights[1], atol=1e-3)
    stored = load_recipe(tmp_path / "b/recipe.resolved.yaml")
    assert (stored.train.layer_decay, stored.head.frozen_share) == (1.0, 0.0)
    first = [json.loads((tmp_path / name / "metrics.jsonl").read_text().splitlines()[0]) for name in "ab"]
    assert first[0]["samples"] == first[1]["samples"]


def test_early_stopping_keeps_the_best_weights_and_resumes_to_them(folder, tmp_path):
    landsat = tmp_path / "scenes"
    for seed in range(4):
        landsat_scene(landsat / f"{seed}.tif", tmp_path / "labels" / f"{seed}.tif", seed=seed, shape=(64, 64))
    train = {"steps": 6, "validate_every": 2, "checkpoint_every": 2, "keep": 20, "ema": 0.5}
    given = recipe(train=train, labels={"test": 0.25, "validation": 0.3}, data={"crop_2d": [32, 32]})
    whole = finetune(given, [landsat], tmp_path / "labels", "none", tmp_path / "run")
    assert whole["split"]["groups"] == {"train": 2, "validation": 1, "test": 1}
    validated = [line for line in metrics(tmp_path / "run") if "validation" in line]
    assert [line["step"] for line in validated] == [2, 4, 6]
    best = max(validated, key=lambda line: line["validation"])
    assert whole["validation"]["step"] == best["step"] and whole["validation"]["metric"].startswith("mean foreground")
    kept = checkpoint.load(tmp_path / "run/checkpoints/step-00000006").best
    weights = load_task_model(tmp_path / "run")[0].state_dict()
    assert all(torch.equal(weights[name], kept[name]) for name in weights)
    for step in (4, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-0000000{step}")
    again = finetune(given, [landsat], tmp_path / "labels", "none", tmp_path / "run", resume=True)
    assert again["validation"] == whole["validation"] and again["test"] == whole["test"]
    assert [line for line in metrics(tmp_path / "run") if "validation" in line] == validated


def test_a_test_image_that_the_encoder_was_pretrained_on_is_a_leak_unless_it_is_allowed(folder, tmp_path):
    index = open_archive([folder / "scenes"], ["landsat7"])
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    known = load_encoder(encoder)
    save_encoder(encoder, known.module, known.contract, seen=Seen.of(index, index.rows, what="pretraining"))
    with pytest.raises(LeakageError, match="pretrain"):
        run(folder, tmp_path / "run", recipe(train={"steps": 1}), encoder=encoder)
    assert not (tmp_path / "run").exists()
    # A run that is there is refused as such: its scores are not those that leak.
    with pytest.raises(ConfigError, match="already holds a run"):
        run(folder, folder / "run", recipe(train={"steps": 1}), encoder=encoder)
    assert (folder / "run/summary.json").is_file()
    found = run(folder, tmp_path / "run", recipe(train={"steps": 1}), encoder=encoder, transductive=True)
    assert found["transductive"]["allowed"] and found["transductive"]["test_images_pretrained_on"] == 1


def test_out_that_holds_the_encoder_or_a_study_is_left_alone(folder, tmp_path):
    encoder = random_encoder(tmp_path / "pretrained" / "encoder", "landsat7", folder / "scenes")
    for out in (encoder, encoder.parent):
        with pytest.raises(ConfigError, match="the encoder .* lies in .* choose another --out"):
            run(folder, out, recipe(train={"steps": 1}), encoder=encoder, overwrite=True)
    (tmp_path / "study").mkdir()
    (tmp_path / "study/study.json").write_text("{}")
    with pytest.raises(ConfigError, match="already holds a study"):
        run(folder, tmp_path / "study", recipe(train={"seeds": 2}))
    for how in ({"resume": True}, {"overwrite": True}):
        with pytest.raises(ConfigError, match="holds a study, and this is a single run; give --twin or --seeds"):
            run(folder, tmp_path / "study", recipe(), **how)


def test_a_study_that_would_leak_leaves_nothing_and_needs_no_overwrite_after_it(folder, tmp_path, caplog):
    index = open_archive([folder / "scenes"], ["landsat7"])
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    known = load_encoder(encoder)
    save_encoder(encoder, known.module, known.contract, seen=Seen.of(index, index.rows, what="pretraining"))
    given = recipe(train={"steps": 1, "batch_size": 2})
    with pytest.raises(LeakageError, match="scan once with --split group.*--transductive"):
        run(folder, tmp_path / "study", given, encoder=encoder, twin=True)
    assert not (tmp_path / "study").exists()
    assert "of 1 patients or scenes: whether pretraining paid cannot be told from fewer than 5" in caplog.text
    found = run(folder, tmp_path / "study", given, encoder=encoder, twin=True, transductive=True)
    assert found["transductive"]["test_images_pretrained_on"] == 1 and len(found["runs"]) == 2


def test_a_rescan_under_other_names_gives_the_same_run(folder, tmp_path):
    (tmp_path / "scenes").mkdir()
    (tmp_path / "labels").mkdir()
    for old, new in (("x", "b"), ("y", "a")):
        shutil.copy(folder / f"scenes/{old}.tif", tmp_path / f"scenes/{new}.tif")
        shutil.copy(folder / f"labels/{old}.tif", tmp_path / f"labels/{new}.tif")
    given = recipe(train={"steps": 2})
    here = run(folder, tmp_path / "one", given)
    there = finetune(given, [tmp_path / "scenes"], tmp_path / "labels", "none", tmp_path / "two")
    assert here["test"] == there["test"] and here["loss_last"] == there["loss_last"]


def test_the_report_has_the_data_card(folder):
    card = json.loads((folder / "run/archive.json").read_text())
    assert card["modalities"]["landsat7"]["images"] == 2
    assert (folder / "run/report.html").is_file()


def test_fine_tuning_moves_the_encoder_lower_layers_less(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    before = load_encoder(encoder).module.state_dict()
    run(folder, tmp_path / "run", recipe(train={"steps": 3, "layer_decay": 0.1}), encoder=encoder)
    after = load_task_model(tmp_path / "run")[0].encoder.state_dict()
    moved = [(after[f"blocks.{n}.mlp.fc1.weight"] - before[f"blocks.{n}.mlp.fc1.weight"]).abs().max() for n in (0, 1)]
    assert 0 < moved[0] < 0.2 * moved[1]


def test_a_single_scene_is_split_by_blocks(folder, tmp_path):
    given = recipe(train={"steps": 1}, labels={"test": 0.25, "block_px": 32})
    found = finetune(given, [folder / "scenes" / "x.tif"], folder / "labels", "none", tmp_path / "run")
    assert found["split"]["unit"] == "block"
    assert found["test"]["pixels"] == pytest.approx(128 * 160 / 4, rel=0.01)


def test_a_single_scene_without_blocks_says_what_to_set(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"set labels\.block_px to split one raster scene by blocks"):
        finetune(recipe(), [folder / "scenes" / "x.tif"], folder / "labels", "none", tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"head": {"name": "attentive"}}, "head 'attentive' cannot segment"),
        ({"head": {"name": "unetrr"}}, "'unetrr' is not one of the heads: did you mean 'unetr'"),
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
            build_recipe({**plain, "head": WATER_RECIPE["head"], "labels": {"test": 0.5}}),
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
    assert given.verb == "finetune" and given.model is not None and given.head.task == "segment"


@pytest.mark.data
def test_the_hippocampus_recipe_runs_on_real_volumes(shared_data, tmp_path):
    images = [shared_data / "med" / "hippocampus" / "images" / f"hippocampus_{n}.nii.gz" for n in ("001", "006", "011")]
    given = load_recipe("finetune_mr_hippocampus", ["train.steps=1", "train.batch_size=2", "model.depth=1"])
    found = finetune(given, images, shared_data / "med" / "hippocampus" / "labels", "none", tmp_path / "run")
    assert set(found["test"]["classes"]) == {"background", "anterior", "posterior"}
    assert found["labels"]["images_labelled"] == 3


def test_mr_recipe_of_these_tests_is_checked():
    assert build_recipe(MR_RECIPE).data.crop_3d == (16, 16, 16)
