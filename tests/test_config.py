"""Recipes: what is accepted, what is refused, and with which words."""

from __future__ import annotations

from pathlib import Path

import pytest

from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.recipe_file import build_recipe, dump_recipe, load_recipe

TEXT = """
data: {modality: landsat7, crop_2d: [32, 32]}
model: {patch_2d: [8, 8]}
train: {lr: 1e-4, steps: 7}
"""


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def test_numbers_in_scientific_notation_are_numbers(recipe_file):
    assert load_recipe(recipe_file).train.lr == 1e-4


def test_a_single_modality_needs_no_list(recipe_file):
    assert load_recipe(recipe_file).data.modality == ("landsat7",)


def test_set_overrides_one_key_and_leaves_the_others(recipe_file):
    recipe = load_recipe(recipe_file, ["train.steps=50", "data.crop_2d=[64, 64]"])
    assert (recipe.train.steps, recipe.train.lr, recipe.data.crop_2d) == (50, 1e-4, (64, 64))


def test_a_recipe_extends_another(recipe_file):
    child = recipe_file.with_name("child.yaml")
    child.write_text("extends: mine.yaml\ntrain: {steps: 9}\n")
    recipe = load_recipe(child)
    assert (recipe.train.steps, recipe.train.lr) == (9, 1e-4)


def test_a_circle_of_extends_is_refused(recipe_file):
    recipe_file.write_text("extends: mine.yaml\n")
    with pytest.raises(ConfigError, match="is there a loop"):
        load_recipe(recipe_file)


def test_the_resolved_recipe_reads_back_equal(recipe_file, tmp_path):
    recipe = load_recipe(recipe_file)
    (tmp_path / "resolved.yaml").write_text(dump_recipe(recipe))
    assert load_recipe(tmp_path / "resolved.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.stpes=5", r"mine.yaml: unknown key 'train.stpes'; did you mean 'steps'\?"),
        ("trian.steps=5", r"unknown key 'trian'; did you mean 'train'\?"),
        ("train.steps=many", r"train.steps: .*\(found 'many'\)"),
        ("train.steps=0", "train.steps: .*greater than or equal to 1"),
        ("data.crop_2d=[30, 30]", r"data.crop_2d \[30, 30\] is not a multiple of model.patch_2d \[8, 8\]"),
        ("model.patch_2d=[0, 8]", "model.patch_2d.0: .*greater than 0"),
        ("model.reference_spacing_mm=[0, 1, 1]", "model.reference_spacing_mm.0: .*greater than 0"),
        ("model.reference_gsd_m=.inf", "model.reference_gsd_m: .*finite"),
        ("model.mask_ratio=1.0", r"mask_ratio is a number in \(0, 1\) or a range"),
        ("model.mask_ratio=[0.9, 0.5]", r"mask_ratio is a number in \(0, 1\) or a range"),
        ("model.patch_2d=null", "set model.patch_2d, model.patch_3d or both"),
        ("data.crop_3d=[4, 32, 32]", "data.crop_3d is set but model.patch_3d is not"),
        ("steps", "--set takes section.key=value"),
        ("train.steps={", "--set train.steps: '{' is not a value"),
    ],
)
def test_a_wrong_override_is_refused_with_key_value_and_way_out(recipe_file, override, message):
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file, [override])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a\n- b\n", "is not a recipe: it holds no mapping"),
        ("train: [unclosed", "is not valid YAML"),
        ("train: &x {steps: 5}\nmodel: *x\n", "uses YAML aliases"),
        ("train: !!python/object/apply:os.system ['true']\n", "is not valid YAML|unknown|could not determine"),
        ("train: {steps: 5}\ntrain: {steps: 6}\n", "is not valid YAML: .*duplicate key"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused(recipe_file, text, message):
    recipe_file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_recipe(recipe_file)


def test_a_missing_recipe_names_the_nearest_packaged_one():
    with pytest.raises(
        ConfigError, match="there is no recipe 'pretrain_landsat7_tny'; did you mean 'pretrain_landsat7_tiny'"
    ):
        load_recipe("pretrain_landsat7_tny")


def test_every_field_says_what_it_does_and_what_it_changes():
    for name, section in Recipe.model_fields.items():
        options = [section.annotation, *getattr(section.annotation, "__args__", ())]
        for model in (option for option in options if hasattr(option, "model_fields")):
            for key, field in model.model_fields.items():
                assert field.description, f"{name}.{key} has no docstring"
                assert field.json_schema_extra["group"] in ("science", "run", "speed"), f"{name}.{key}"


def test_recipes_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        build_recipe({}).train.steps = 3
