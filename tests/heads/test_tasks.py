"""Task models of every head and task: what the encoder gives arrives, what is not known stays out, frozen is frozen."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from geomed_mae.archives.class_labels import UNKNOWN
from geomed_mae.archives.index import Index
from geomed_mae.archives.seen import Seen
from geomed_mae.errors import ConfigError
from geomed_mae.heads import HeadInputs
from geomed_mae.heads.task_model import TaskModel, load_task_model, save_task_model
from geomed_mae.models.pretrained import PretrainedEncoder, read_out
from geomed_mae.readers import IGNORE
from tests.heads.given import CLASSES, HEADS, archive, task_model

CROPS = {2: (40, 48), 3: (16, 24, 20)}
"""The whole of the images that `archive` makes."""


@pytest.fixture(scope="module")
def indices(tmp_path_factory) -> dict[int, Index]:
    return {axes: archive(tmp_path_factory.mktemp("images"), axes) for axes in (2, 3)}


def whole(index: Index) -> tuple[np.ndarray, np.ndarray]:
    """Values and validity (1, c, *space) of the index's first image."""
    image = index.read(index.rows[0].key)
    valid = np.broadcast_to(image.valid, image.array.shape)
    return np.where(valid, image.array, 0)[None].astype(np.float32), valid[None].copy()


def run(model: TaskModel, index: Index, raw: np.ndarray, valid: np.ndarray) -> Tensor:
    row = index.rows[0]
    spacing = torch.tensor([row.spacing] * len(raw), dtype=torch.float32)
    return model(torch.from_numpy(raw), torch.from_numpy(valid), spacing, [row.statistics] * len(raw))


def random_target(model: TaskModel, batch: int = 1) -> Tensor:
    """Class numbers, half of them unknown."""
    head = model.spec.head
    shape = (batch, *model.spec.crop) if head.task == "segment" else (batch, len(CLASSES))
    target = torch.randint(0, 2, shape)
    target[torch.rand(shape) < 0.5] = IGNORE
    return target if head.task == "segment" or head.multi_label else torch.randint(0, 3, (batch,))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(("name", "task"), HEADS)
def test_answers_in_two_and_three_axes_with_one_map_and_with_three(indices, name, task, axes):
    index = indices[axes]
    for maps in (1, 3):
        model = task_model(index, name, task, crop=CROPS[axes], maps=maps)
        logits = run(model, index, *whole(index))
        assert logits.shape == (1, 3, *(CROPS[axes] if task == "segment" else ()))
        chances = model.probabilities(*whole(index), index.rows[0])
        torch.testing.assert_close(chances, logits.softmax(dim=1))


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize("maps", [1, 3])
def test_a_head_is_given_what_the_encoder_gives_to_anybody_else(indices, axes, maps):
    index = indices[axes]
    model = task_model(index, "linear", "segment", crop=CROPS[axes], maps=maps)
    given: list[HeadInputs] = []
    model.head.register_forward_pre_hook(lambda _, arguments: given.append(arguments[0]))
    run(model, index, *whole(index))
    image = index.read(index.rows[0].key)
    layers = read_out("last" if maps == 1 else "several", model.encoder.spec.depth)
    grid = PretrainedEncoder(model.encoder, model.contract).features(image, layers=layers)
    found = torch.where(given[0].token_valid[:, None], torch.cat(given[0].maps, dim=1), torch.nan)[0].detach()
    np.testing.assert_allclose(found.numpy(), grid.array, rtol=1e-5, atol=1e-5)
    assert not any(tokens.masked_select(~given[0].token_valid[:, None]).any() for tokens in given[0].maps)
    assert len(given[0].maps) == maps and (axes == 3 or 0 < grid.valid.mean() < 1), "some of the scene is nodata"


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(("name", "task"), HEADS)
def test_an_invalid_pixel_changes_neither_answer_nor_any_gradient_bit_for_bit(indices, name, task, axes):
    index = indices[axes]
    model = task_model(index, name, task, crop=CROPS[axes])
    raw, valid = whole(index)
    valid[:, :, 3:9, 5:] = False
    valid[:, 0, -4:, :3] = False
    target = random_target(model)
    found = []
    for other in (raw, np.where(valid, raw, np.float32(np.nan)), np.where(valid, raw, np.float32(1e9))):
        model.zero_grad()
        logits = run(model, index, other, valid)
        model.loss(logits, target)[0].backward()
        found.append(
            [logits, *(parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)]
        )
    assert all(torch.isfinite(tensor).all() for tensor in found[0])
    for same in found[1:]:
        assert all(torch.equal(first, second) for first, second in zip(found[0], same, strict=True))


@pytest.mark.parametrize(("name", "task"), HEADS)
@pytest.mark.parametrize("loss", ["auto", "focal"])
def test_an_ignored_pixel_or_image_changes_no_gradient_bit_for_bit(indices, name, task, loss):
    index = indices[2]
    model = task_model(index, name, task, crop=(16, 16), loss=loss)
    raw, valid = (np.concatenate([part[..., :16, 16:32], part[..., 16:32, 16:32]]) for part in whole(index))
    target = torch.randint(0, 3, (2, 16, 16) if task == "segment" else (2,))
    target[1] = IGNORE
    found = []
    for other in (raw, np.concatenate([raw[:1], raw[1:] + 40])):
        model.zero_grad()
        model.loss(run(model, index, other, valid), target)[0].backward()
        found.append([parameter.grad for parameter in model.parameters() if parameter.grad is not None])
    # The second image is unknown altogether: another one in its place leaves every gradient as it is.
    assert all(torch.equal(first, second) for first, second in zip(*found, strict=True))
    assert any(slope.any() for slope in found[0])


def test_several_classes_an_image_are_probabilities_of_their_own(indices):
    index = indices[2]
    model = task_model(index, "attentive", "classify", crop=CROPS[2], multi_label=True)
    logits = run(model, index, *whole(index))
    torch.testing.assert_close(model.probabilities(*whole(index), index.rows[0]), logits.sigmoid())
    loss, parts = model.loss(logits, torch.tensor([[1, UNKNOWN, 0]]))
    expected = -(logits[0, 0].sigmoid().log() + (1 - logits[0, 2].sigmoid()).log()) / 2
    torch.testing.assert_close(loss, expected)
    assert set(parts) == {"cross_entropy"}


@pytest.mark.parametrize(("name", "task"), HEADS)
def test_a_frozen_encoder_has_no_gradient_and_does_not_change(indices, name, task):
    index = indices[2]
    model = task_model(index, name, task, crop=CROPS[2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)

    def step() -> dict[str, Tensor]:
        optimizer.zero_grad()
        model.loss(run(model, index, *whole(index)), random_target(model))[0].backward()
        optimizer.step()
        return copy.deepcopy(model.state_dict())

    def moved(before: dict[str, Tensor], after: dict[str, Tensor], part: str) -> bool:
        return any(not torch.equal(before[name], after[name]) for name in before if name.startswith(part))

    model.freeze(True)
    first = copy.deepcopy(model.state_dict())
    second = step()
    assert model.frozen and all(parameter.grad is None for parameter in model.encoder.parameters())
    assert not moved(first, second, "encoder.") and moved(first, second, "head.")
    model.freeze(False)
    third = step()
    assert not model.frozen and moved(second, third, "encoder.")
    # Frozen again, the moments that the optimiser has by now must not go on moving it.
    model.freeze(True)
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert not moved(third, step(), "encoder.")


@pytest.mark.parametrize("axes", [2, 3])
@pytest.mark.parametrize(("name", "task"), HEADS)
def test_a_saved_model_comes_back_as_the_same_function(indices, tmp_path, name, task, axes):
    index = indices[axes]
    more = {"multi_label": True, "class_weights": (1.0, 2.0, 3.0), "label_smoothing": 0.1} if task == "classify" else {}
    model = task_model(index, name, task, crop=CROPS[axes], **more)
    save_task_model(tmp_path, model, Seen.of(index, index.rows, what="training"))
    loaded = load_task_model(tmp_path)[0]
    assert loaded.spec == model.spec and not loaded.training
    given = (*whole(index), index.rows[0])
    assert torch.equal(loaded.probabilities(*given), model.probabilities(*given))


def test_a_number_of_maps_that_the_encoder_does_not_have_is_refused(indices):
    with pytest.raises(ConfigError, match="reads 2 maps of an encoder that gives 3 or 1; set head.read_out to last"):
        task_model(indices[2], "linear", "segment", crop=CROPS[2], maps=2)


def test_a_head_of_another_task_is_refused(indices):
    with pytest.raises(ConfigError, match="'unetr' cannot classify"):
        task_model(indices[2], "unetr", "classify", crop=CROPS[2])
