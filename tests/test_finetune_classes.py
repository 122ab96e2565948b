"""finetune of images that have a class, or several: from a table to scores, and the options of the command."""

from __future__ import annotations

import json

import numpy as np
import pytest
from click.testing import CliRunner

from geomed_mae import cli
from geomed_mae.errors import ConfigError
from geomed_mae.finetune import finetune
from geomed_mae.heads.task_model import load_task_model
from geomed_mae.recipe_file import build_recipe
from geomed_mae.scan import scan
from geomed_mae.scoring.stored import load_scores
from geomed_mae.training.task import prepare
from tests.make_pictures import write_png
from tests.scenes import random_encoder

RECIPE = {
    "data": {"modality": "xray", "crop_2d": [16, 16]},
    "model": {"size": "tiny", "depth": 1, "patch_2d": [8, 8]},
    "train": {"steps": 40, "batch_size": 8, "optimizer": "adamw", "lr": 2e-3, "log_every": 20, "device": "cpu"},
    "head": {"task": "classify", "classes": ["dark", "bright"]},
    "labels": {"test": 0.4},
}


def recipe(**sections: dict):
    return build_recipe({**RECIPE, **{name: {**RECIPE.get(name, {}), **keys} for name, keys in sections.items()}})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """40 X-rays, half of them with a bright corner, some with a bright stripe; tables of one and of several labels."""
    root = tmp_path_factory.mktemp("classes")
    (root / "images").mkdir()
    rng = np.random.default_rng(0)
    lines, flags = ["image,class"], ["image,corner,stripe"]
    for number in range(40):
        corner, stripe = number % 2, int(rng.random() < 0.4)
        pixels = rng.integers(80, 120, (16, 16))
        pixels[:8, :8] += 100 * corner
        pixels[12:] += 100 * stripe
        write_png(root / "images" / f"{number:02d}.png", pixels.astype(np.uint8), 0)
        lines.append(f"{number:02d}.png,{RECIPE['head']['classes'][corner]}")
        flags.append(f"{number:02d}.png,{corner},{stripe if number % 10 else ''}")
    (root / "one.csv").write_text("\n".join(lines) + "\n")
    (root / "several.csv").write_text("\n".join(flags) + "\n")
    scan([root / "images"], root / "index", modality="xray", pictures=False)
    return root


def test_forty_steps_tell_two_kinds_of_images_apart(folder, tmp_path):
    found = finetune(recipe(), [folder / "index"], folder / "one.csv", "none", tmp_path / "run")
    assert found["task"] == "classify" and found["test"]["value"] > 0.9 and "AUROC" in found["test"]["metric"]
    assert found["split"]["test"] == 16 and found["labels"]["images_labelled"] == 40
    model, _ = load_task_model(tmp_path / "run")
    assert model.spec.head.name == "attentive" and not model.spec.head.multi_label
    assert len(load_scores(tmp_path / "run/scores.json")) == 16


def test_several_labels_an_image_are_learned_at_once(folder, tmp_path):
    given = recipe(head={"classes": ["corner", "stripe"], "class_weights": "balanced", "loss": "focal"})
    found = finetune(given, [folder / "index"], folder / "several.csv", "none", tmp_path / "run")
    assert found["test"]["value"] > 0.8 and "average precision" in found["test"]["metric"]
    head = load_task_model(tmp_path / "run")[0].spec.head
    assert head.multi_label
    truth = np.stack([target for _, target in prepare(given, [folder / "index"], folder / "several.csv").train])
    absent_a_presence = (truth == 0).sum(axis=0) / (truth == 1).sum(axis=0)
    assert head.class_weights == pytest.approx(tuple(absent_a_presence))


def test_a_head_of_the_other_task_is_refused_with_those_that_fit(folder, tmp_path):
    with pytest.raises(ConfigError, match="head 'convolutional' cannot classify.* attentive, linear"):
        finetune(recipe(head={"name": "convolutional"}), [folder / "index"], folder / "one.csv", "none", tmp_path / "r")


def test_early_stopping_of_classes_goes_by_the_auroc_of_held_out_images(folder, tmp_path):
    given = recipe(train={"steps": 8, "validate_every": 4}, labels={"shots": 8, "validation": 0.25})
    found = finetune(given, [folder / "index"], folder / "one.csv", "none", tmp_path / "run")
    assert found["few"]["images"] == 16 and found["split"]["train"] + found["split"]["validation"] == 16
    assert found["split"]["validation"] == 4 and "AUROC" in found["validation"]["metric"]


def called(folder, out, *words: str):
    (folder / "recipe.yaml").write_text(json.dumps({**RECIPE, "train": {**RECIPE["train"], "steps": 2}}))
    labels = ("--labels", str(folder / "one.csv"))
    arguments = ["finetune", str(folder / "recipe.yaml"), "--archive", str(folder / "index"), *labels]
    return CliRunner().invoke(cli.main, [*arguments, "--out", str(out), *words])


def test_few_labels_seeds_and_a_twin_are_options_of_the_command(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "xray", folder / "index")
    done = called(folder, tmp_path / "study", "--encoder", str(encoder), "--shots", "3", "--seeds", "2", "--twin")
    assert done.exit_code == 0, done.output
    for arm in ("pretrained", "scratch"):
        for seed in (0, 1):
            found = json.loads((tmp_path / f"study/{arm}/seed-{seed}/summary.json").read_text())
            assert found["few"] == {**found["few"], "shots": 3, "seed": seed, "images": 6}
            assert found["twin"] == (arm == "scratch") and found["test"]["images"] == 16
    again = called(
        folder, tmp_path / "study", "--encoder", str(encoder), "--shots", "3", "--seeds", "2", "--twin", "--resume"
    )
    assert again.exit_code == 0, again.output


def test_a_share_of_the_labels_is_an_option_and_replaces_the_recipe_s_shots(folder, tmp_path):
    done = called(folder, tmp_path / "run", "--encoder", "none", "--label-fraction", "50%", "--set", "labels.shots=3")
    assert done.exit_code == 0, done.output
    assert json.loads((tmp_path / "run/summary.json").read_text())["few"]["fraction"] == 0.5
    both = called(folder, tmp_path / "both", "--encoder", "none", "--label-fraction", "0.5", "--shots", "2")
    assert both.exit_code == 2 and not (tmp_path / "both").exists()


def test_a_twin_of_random_weights_is_refused(folder, tmp_path):
    done = called(folder, tmp_path / "run", "--encoder", "none", "--twin")
    assert done.exit_code == 2 and "--twin compares an encoder with random weights" in done.output
