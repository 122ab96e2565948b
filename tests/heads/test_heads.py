"""What holds for every head: found by name, built for a task, any patch and size, one map or three."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch

import geomed_mae.heads
from geomed_mae.errors import ConfigError
from geomed_mae.heads import HeadSpec, default_head, head_module
from tests.heads.given import CLASSES, HEADS, changed, head, inputs, spec_of

PATCHES = (
    ((8, 8), (3, 5)),
    ((16, 4), (2, 3)),
    ((5, 14), (3, 2)),
    ((2, 2), (7, 5)),
    ((16, 16), (1, 1)),
    ((2, 8, 8), (4, 2, 3)),
    ((4, 4, 4), (2, 1, 3)),
    ((1, 8, 6), (5, 1, 2)),
)
"""Patch, grid: images of even and odd sizes."""


@pytest.mark.parametrize(("name", "task"), HEADS)
def test_answers_for_any_patch_and_any_size_of_image(name, task):
    for patch, grid in PATCHES:
        for maps in (1, 3):
            given = inputs(patch, grid, maps=maps)
            expected = (2, len(CLASSES), *(given.pixels.shape[2:] if task == "segment" else ()))
            logits = head(name, task, patch, maps=maps)(given)
            assert logits.shape == expected and torch.isfinite(logits).all(), (patch, grid, maps)


@pytest.mark.parametrize(("name", "task"), HEADS)
@pytest.mark.parametrize("patch", [(2, 2), (4, 4), (16, 16), (2, 8, 8)])
def test_every_map_has_a_part_in_the_answer_and_every_weight_learns(name, task, patch):
    given = inputs(patch, (2,) * len(patch), maps=3)
    model = head(name, task, patch, maps=3)
    base = model(given)
    for number in range(3):
        maps = tuple(tokens.roll(1, dims=1) if place == number else tokens for place, tokens in enumerate(given.maps))
        assert not torch.allclose(model(changed(given, maps=maps)), base), number
    (base * torch.randn_like(base)).sum().backward()
    still = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still


@pytest.mark.parametrize(("name", "task"), HEADS)
def test_one_sample_does_not_depend_on_its_neighbours_in_the_batch(name, task):
    given = inputs((8, 8), (3, 3), maps=3)
    alone = changed(
        given, maps=tuple(tokens[:1] for tokens in given.maps), token_valid=given.token_valid[:1],
        pixels=given.pixels[:1], valid=given.valid[:1],
    )  # fmt: skip
    model = head(name, task, maps=3)
    torch.testing.assert_close(model(given)[:1], model(alone))


@pytest.mark.parametrize("name", ["convolutional", "unetr"])
def test_a_decoder_sees_pixels_and_which_of_them_are_valid(name):
    given, model = inputs((8, 8), (3, 3)), head(name, "segment")
    base = model(given)
    assert not torch.allclose(model(changed(given, pixels=given.pixels + torch.randn_like(given.pixels))), base)
    hidden = given.valid.clone()
    hidden[..., :5] = False
    assert not torch.allclose(model(changed(given, valid=hidden)), base)


@pytest.mark.parametrize("name", ["convolutional", "unetr"])
@pytest.mark.parametrize("width", [8, 20, 64])
def test_a_decoder_can_have_any_width(name, width):
    assert head(name, "segment", width=width)(inputs((8, 8), (2, 2))).shape == (2, 3, 16, 16)


def test_any_number_of_channels():
    for name, task in HEADS:
        assert len(head(name, task, channels=13)(inputs((8, 8), (2, 2), channels=13))) == 2


def test_a_task_has_a_head_of_its_own():
    assert default_head("segment") == "convolutional" and default_head("classify") == "attentive"
    assert all(task in head_module(default_head(task), task).TASKS for task in ("segment", "classify"))
    with pytest.raises(ConfigError, match=r"head.task 'regress' is none of segment, classify"):
        default_head("regress")


def test_an_unknown_head_names_the_nearest():
    with pytest.raises(ConfigError, match="'convolutionl' is not one of the heads: did you mean 'convolutional'"):
        head_module("convolutionl", "segment")


@pytest.mark.parametrize(
    ("name", "task", "message"),
    [
        (
            "attentive",
            "segment",
            "'attentive' cannot segment, it is made for classify; .* segment are convolutional, linear, unetr",
        ),
        ("unetr", "classify", "'unetr' cannot classify, it is made for segment; .* classify are attentive, linear"),
    ],
)
def test_a_head_of_another_task_names_those_of_this_one(name, task, message):
    with pytest.raises(ConfigError, match=message):
        head_module(name, task)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"task": "regress"}, "head.task 'regress' is none of segment, classify"),
        ({"loss": "dice_ce", "task": "classify"}, "'dice_ce' does not fit head.task classify, which has auto, cross_"),
        ({"multi_label": True}, "several classes a pixel cannot be trained on"),
        ({"classes": tuple(map(str, range(256)))}, "has 256 names, and a class map holds 255"),
        ({"class_weights": (1.0, 2.0)}, r"has 2 numbers for 3 classes \(background, anterior, posterior\)"),
        ({"class_weights": (1.0, -2.0, 0.0)}, "must be 0 or more"),
        ({"class_weights": (0.0, 0.0, 0.0)}, "not all of them 0"),
    ],
)
def test_a_spec_that_makes_no_sense_is_refused(more, message):
    with pytest.raises(ConfigError, match=message):
        spec_of("linear", more.pop("task", "segment"), **more)


def test_auto_is_the_loss_of_the_task():
    assert spec_of("linear", "segment").objective == "dice_ce"
    assert spec_of("linear", "classify").objective == "cross_entropy"
    assert spec_of("linear", "classify", loss="focal").objective == "focal"


def test_a_spec_comes_back_from_json():
    spec = spec_of("linear", "classify", (2, 4, 4), class_weights=(1.0, 2.0, 3.0), multi_label=True, maps=3)
    assert HeadSpec.from_json(spec.to_json()) == spec
    with pytest.raises(ConfigError, match=r"of a head cannot be read: .*'colour'"):
        HeadSpec.from_json({**spec.to_json(), "colour": 1})


def test_monai_is_imported_when_a_head_needs_it_and_not_before():
    for path in Path(geomed_mae.heads.__path__[0]).glob("*.py"):
        top = [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ImportFrom)]
        assert not [node.module for node in top if node.module.startswith(("monai", "sklearn", "scipy"))], path.name
