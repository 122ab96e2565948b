"""What is trained on, looked at and scored: parts by group, as stored, by block; few labels of the training part."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from geomed_mae.archives.splits import SplitRequest, parse_shares
from geomed_mae.errors import ConfigError
from geomed_mae.readers import IGNORE
from geomed_mae.recipe_file import build_recipe
from geomed_mae.scan import scan
from geomed_mae.training.downstream import as_twin
from geomed_mae.training.task import few, prepare, refuse_missing_classes, refuse_unscorable
from tests.make_pictures import write_png
from tests.scenes import WATER_RECIPE, labelled_scenes

SCENES = 10
CLASSES = ("clear", "opaque", "fluid")


def recipe(**sections: dict):
    sections.setdefault("train", {})
    return build_recipe(
        {**WATER_RECIPE, **{name: {**WATER_RECIPE.get(name, {}), **keys} for name, keys in sections.items()}}
    )


def xrays(*, multi: bool = False, **labels):
    return build_recipe(
        {
            "data": {"modality": "xray", "crop_2d": [16, 16]},
            "model": {"depth": 1, "patch_2d": [4, 4]},
            "train": {"device": "cpu"},
            "head": {"task": "classify", "classes": CLASSES[1:] if multi else CLASSES},
            "labels": labels,
        }
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Ten scenes with label maps in scenes/ and an index of them with a stored split; 30 X-rays with a table."""
    root = tmp_path_factory.mktemp("task")
    labelled_scenes(root / "scenes", SCENES)
    request = SplitRequest(method="group", shares=parse_shares("60,20,20"))
    scan([root / "scenes" / "images"], root / "index", modality="landsat7", split=request, pictures=False)
    scan([root / "scenes" / "images"], root / "plain", modality="landsat7", pictures=False)
    lines, flags = ["image,class"], ["image,opaque,fluid"]
    for number in range(30):
        pixels = np.random.default_rng(number).integers(0, 255, (16, 16)).astype(np.uint8)
        (root / "xray").mkdir(exist_ok=True)
        write_png(root / "xray" / f"{number:02d}.png", pixels, 0)
        lines.append(f"{number:02d}.png,{CLASSES[0 if number < 15 else 1 if number < 24 else 2]}")
        flags.append(f"{number:02d}.png,{int(number % 3 == 0)},{int(number in (3, 4, 5, 6, 21, 28))}")
    (root / "single.csv").write_text("\n".join(lines) + "\n")
    (root / "multi.csv").write_text("\n".join(flags) + "\n")
    scan([root / "xray"], root / "xindex", modality="xray", pictures=False)
    return root


def scenes(folder, given, archive="plain"):
    return prepare(given, [folder / archive], folder / "scenes" / "labels")


def names(task, part: str) -> set[str]:
    return {task.index.paths(row.key)[0].name for row, _ in getattr(task, part)}


def digests(task, part: str) -> list[str]:
    return [task.index.pixel_digest(row.key) for row, _ in getattr(task, part)]


def test_parts_are_whole_groups_by_shares_and_the_same_under_another_salt_and_seed(folder):
    given = recipe(labels={"test": 0.3})
    one = scenes(folder, given)
    raw = prepare(recipe(labels={"test": 0.3}, train={"seed": 7}), [folder / "scenes/images"], folder / "scenes/labels")
    assert one.index.rows[0].key != raw.index.rows[0].key and one.fingerprint == raw.fingerprint
    assert (len(one.train), len(one.validation), len(one.test), one.unit) == (7, 0, 3, "group")
    for part in ("train", "test"):
        assert digests(one, part) == digests(raw, part), "in the order of the pixels, whatever files are called"
    assert not {row.group for row, _ in one.train} & {row.group for row, _ in one.test}
    other = scenes(folder, recipe(labels={"test": 0.3, "split_seed": 1}))
    assert names(other, "test") != names(one, "test") and other.fingerprint != one.fingerprint


def test_a_stored_split_is_used_as_it_is(folder):
    task = scenes(folder, recipe(), "index")
    assert task.unit == "stored" and len(task.train) + len(task.test) + task.counts["validation_images_not_used"] == 10
    validated = scenes(folder, recipe(train={"validate_every": 5}), "index")
    assert len(validated.validation) == task.counts["validation_images_not_used"] > 0
    assert names(validated, "test") == names(task, "test") and names(validated, "train") == names(task, "train")
    assert "validation_images_not_used" not in validated.counts


def test_one_part_of_a_stored_split_is_split_by_shares(folder):
    stored = scenes(folder, recipe(), "index")
    task = scenes(folder, recipe(data={"split": "train"}, labels={"test": 0.5}), "index")
    assert task.unit == "group" and names(task, "train") | names(task, "test") == names(stored, "train")


def test_early_stopping_takes_its_share_from_the_training_part(folder):
    whole = scenes(folder, recipe(labels={"test": 0.3}))
    task = scenes(folder, recipe(labels={"test": 0.3, "validation": 0.3}, train={"validate_every": 5}))
    assert names(task, "test") == names(whole, "test")
    assert names(task, "train") | names(task, "validation") == names(whole, "train") and len(task.validation) == 2


def test_held_out_blocks_are_unknown_in_training_and_nothing_else_is(folder):
    task = prepare(
        recipe(labels={"test": 0.5, "block_px": 16}), [folder / "scenes/images/0.tif"], folder / "scenes/labels"
    )
    train, test = task.train[0][1], task.test[0][1]
    assert task.unit == "block" and ((train == IGNORE) ^ (test == IGNORE)).all()
    whole = prepare(recipe(labels={"test": 0}), [folder / "scenes/images/0.tif"], folder / "scenes/labels")
    assert whole.unit == "none" and not whole.test
    np.testing.assert_array_equal(np.where(train == IGNORE, test, train), whole.train[0][1])


@pytest.mark.parametrize(("seed", "missing"), [(0, "train on"), (1, "score")])
def test_blocks_larger_than_the_scene_are_refused(folder, seed, missing):
    given = recipe(labels={"test": 0.5, "block_px": 64, "split_seed": seed})
    with pytest.raises(ConfigError, match=f"block_px=64 leave nothing to {missing}.* 64 x 64 pixels.*smaller blocks"):
        prepare(given, [folder / "scenes/images/0.tif"], folder / "scenes/labels")


def test_an_only_image_cannot_be_parted_and_blocks_are_advised_for_label_maps_alone(folder, tmp_path):
    (tmp_path / "one.csv").write_text("image,class\n00.png,opaque\n")
    with pytest.raises(
        ConfigError, match=r"1 patient or scene cannot be split; add images of others, or set labels.te"
    ):
        prepare(xrays(), [folder / "xindex"], tmp_path / "one.csv")
    with pytest.raises(ConfigError, match=r"add images of others, set labels\.block_px"):
        prepare(recipe(), [folder / "scenes/images/0.tif"], folder / "scenes/labels")


def test_few_scenes_are_nested_and_leave_the_test_part_alone(folder):
    task = scenes(folder, recipe(labels={"test": 0.3}))
    drawn = {count: few(task, recipe(labels={"shots": count}).labels, 3) for count in (1, 4, 7)}
    assert names(drawn[1], "train") < names(drawn[4], "train") < names(drawn[7], "train") == names(task, "train")
    assert all(digests(one, "test") == digests(task, "test") for one in drawn.values())
    assert drawn[4].drawn == {"shots": 4, "seed": 3, "images": 4, "groups": 4, "of_images": 7, "of_groups": 7}
    half = few(task, recipe(labels={"fraction": 0.5}).labels, 3)
    assert names(half, "train") == names(few(task, recipe(labels={"shots": 4}).labels, 3), "train")
    assert few(task, recipe().labels, 3) is task and drawn[4].fingerprint != task.fingerprint


def test_the_validation_share_comes_out_of_the_few(folder):
    given = recipe(labels={"test": 0.3, "shots": 4, "validation": 0.25}, train={"validate_every": 5})
    task = scenes(folder, given, "index")
    assert not task.validation, "the stored part would be more labels than the few"
    drawn = few(task, given.labels, 0)
    assert (len(drawn.train), len(drawn.validation), drawn.drawn["images"]) == (3, 1, 4)
    assert not names(drawn, "train") & names(drawn, "validation")


def test_shots_of_images_are_of_each_class(folder):
    task = prepare(xrays(), [folder / "xindex"], folder / "single.csv")
    assert task.kind == "classify" and not task.multi_label and sum(task.class_counts()) == len(task.train)
    drawn = few(task, xrays(shots=3).labels, 1)
    assert drawn.class_counts() == [3, 3, 3] and len(drawn.train) == 9
    tested = np.bincount([int(target) for _, target in task.test], minlength=3)
    assert (tested > 0).all(), "every class is on both sides of the split"


def test_several_labels_an_image_are_read_and_drawn(folder):
    task = prepare(xrays(multi=True), [folder / "xindex"], folder / "multi.csv")
    assert task.multi_label and task.train[0][1].shape == (2,)
    drawn = few(task, xrays(multi=True, shots=3).labels, 1)
    assert min(drawn.class_counts()) >= 3 and any(target.max() == 0 for _, target in drawn.train)


@pytest.mark.parametrize(
    ("sections", "archive", "message"),
    [
        (
            {"labels": {"validation": 0.2}},
            "plain",
            "train.validate_every is not set; set it, or leave labels.validation",
        ),
        (
            {"train": {"validate_every": 2}},
            "plain",
            "scores a validation part, and there is none; set labels.validation",
        ),
        (
            {"train": {"validate_every": 2}, "labels": {"shots": 2}},
            "index",
            r"out of the few \(labels.shots, labels.fr",
        ),
        ({"labels": {"block_px": 16}}, "index", "set labels.block_px=null, or data.split=train"),
        (
            {"labels": {"block_px": 16, "validation": 0.2}, "train": {"validate_every": 2}},
            "plain",
            "early stopping needs whole scenes: set labels.validation=0",
        ),
        ({"labels": {"block_px": 16, "test": 0.75}}, "plain", "labels.test=0.5 at most can be scored"),
        ({"labels": {"ignore": [0, 1]}}, "plain", "none of the 10 labelled images has a label that is known"),
    ],
)
def test_parts_that_cannot_be_made_say_what_to_set(folder, sections, archive, message):
    with pytest.raises(ConfigError, match=message):
        scenes(folder, recipe(**sections), archive)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"shots": 9}, "labels.shots=9 is more than the 8 labelled groups .* ask for 8 at most"),
        ({"fraction": 0.01}, "labels.fraction=0.01 of 8 labelled groups .* is less than one; use labels.shots"),
    ],
)
def test_more_or_fewer_labels_than_there_are_is_an_error(folder, labels, message):
    task = scenes(folder, recipe(labels={"test": 0.2}))
    with pytest.raises(ConfigError, match=message):
        few(task, recipe(labels=labels).labels, 0)


def test_one_scene_cannot_be_reduced_nor_shared_with_validation(folder):
    task = prepare(
        recipe(labels={"test": 0.5, "block_px": 16}), [folder / "scenes/images/0.tif"], folder / "scenes/labels"
    )
    with pytest.raises(ConfigError, match="labels.fraction=0.7 of 1 labelled groups"):
        few(task, recipe(labels={"fraction": 0.7}).labels, 0)
    several = scenes(folder, recipe(labels={"test": 0.3}))
    with pytest.raises(ConfigError, match="are of 1 patient or scene: nothing can be held out for validation"):
        few(several, recipe(labels={"shots": 1, "validation": 0.5}).labels, 0)


def test_more_shots_than_a_class_has_images_name_the_class(folder):
    task = prepare(xrays(), [folder / "xindex"], folder / "single.csv")
    with pytest.raises(ConfigError, match="labels.shots=20 is more than the [0-9] training images of class 'fluid'"):
        few(task, xrays(shots=20).labels, 0)


def test_a_class_without_any_label_is_named(folder):
    given = recipe(head={"classes": ["land", "water", "ice"]})
    with pytest.raises(
        ConfigError, match="no label of the [0-9]+ training images is of class 'ice'.* out of head.classes"
    ):
        refuse_missing_classes(scenes(folder, given))


def test_a_part_that_cannot_be_scored_whatever_is_predicted_is_refused(folder):
    task = prepare(xrays(), [folder / "xindex"], folder / "single.csv")
    refuse_unscorable(task, "test")
    refuse_unscorable(task, "validation")
    with pytest.raises(
        ConfigError, match=r"validation part of 1 images .* lacks a second class.*\(labels.validation\)"
    ):
        refuse_unscorable(replace(task, validation=task.train[:1]), "validation")
    several = prepare(xrays(multi=True), [folder / "xindex"], folder / "multi.csv")
    nothing = tuple((row, np.zeros_like(target)) for row, target in several.test)
    with pytest.raises(ConfigError, match="lacks an image in which a class is present"):
        refuse_unscorable(replace(several, test=nothing), "test")
    maps = scenes(folder, recipe())
    refuse_unscorable(maps, "test")
    dry = tuple((row, np.where(target > 0, IGNORE, target)) for row, target in maps.test)
    with pytest.raises(ConfigError, match="test part of 5 images cannot be scored: it lacks any class but 'land'"):
        refuse_unscorable(replace(maps, test=dry), "test")


def test_blocks_of_images_with_a_class_are_refused(folder):
    with pytest.raises(ConfigError, match="labels.block_px splits label maps"):
        prepare(xrays(block_px=16), [folder / "xindex"], folder / "single.csv")


def test_a_twin_keeps_everything_but_what_protects_pretrained_weights():
    given = recipe(train={"layer_decay": 0.5}, head={"frozen_share": 0.2})
    twin = as_twin(given)
    assert (twin.train.layer_decay, twin.head.frozen_share) == (1.0, 0.0)
    assert as_twin(recipe()) == recipe() and twin.train.lr == given.train.lr
