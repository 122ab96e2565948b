"""From a batch to a loss, and from a model's answer back to physical units."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.models.masking import Masking
from geomed_mae.samples.augment import Symmetry
from geomed_mae.samples.batch import Stored
from geomed_mae.training import checkpoint
from geomed_mae.training.objective import objective_state, restore_objective

CASES = [("landsat7", (16, 16)), ("mr", (4, 16, 16)), ("ct", (4, 16, 16))]


@pytest.mark.parametrize(("modality", "shape"), CASES)
def test_the_loss_is_a_function_of_batch_and_step(objective, batches_of, modality, shape):
    batch = batches_of(modality, shape)
    first, parts = objective.loss(batch, 4)
    torch.rand(100)
    assert torch.equal(first, objective.loss(batch, 4)[0]) and not torch.equal(first, objective.loss(batch, 5)[0])
    assert set(parts) == {"pixels", "mean", "log_sigma", "valid_fraction"}
    assert float(parts["valid_fraction"]) == pytest.approx(float(batch.valid.float().mean()))


@pytest.mark.parametrize(("modality", "shape"), CASES)
def test_what_stands_at_invalid_pixels_changes_no_bit(objective, batches_of, modality, shape):
    batch = batches_of(modality, shape)
    other = replace(batch, raw=torch.where(batch.valid, batch.raw, torch.tensor(float("nan"))))
    assert torch.equal(objective.loss(batch, 1)[0], objective.loss(other, 1)[0])


def test_images_of_arbitrary_units_are_scaled_by_their_own_statistics(objective, batches_of):
    batch = batches_of("mr", (4, 16, 16))
    ready = objective.prepare(batch, 0, Masking())
    for number, (own,) in enumerate(batch.statistics):
        assert float(ready.center[number, 0]) == pytest.approx(own.median)
        assert float(ready.scale[number, 0]) == pytest.approx(own.spread)


def test_absolute_units_are_scaled_by_the_contract(objective, batches_of):
    ready = objective.prepare(batches_of("ct", (4, 16, 16)), 0, Masking())
    assert ready.center.unique().tolist() == [0.0] and ready.scale.unique().tolist() == [400.0]


def test_channels_are_hidden_only_where_asked(objective, batches_of):
    batch = batches_of("landsat7", (16, 16))
    assert objective.prepare(batch, 0, Masking()).plan.shown_channels is None
    shown = objective.prepare(batch, 0, Masking(channel_drop=0.9)).plan.shown_channels
    assert shown.any(dim=1).all() and not shown.all()


@pytest.mark.parametrize(("modality", "shape"), CASES)
def test_a_reconstruction_is_the_image_wherever_it_was_not_asked_for(objective, batches_of, modality, shape):
    batch = batches_of(modality, shape)
    made = objective.reconstruct(batch, 3)
    assert torch.equal(made.image, batch.raw)
    assert torch.equal(made.answer[~made.asked], batch.raw[~made.asked])
    assert not torch.equal(made.answer[made.asked], batch.raw[made.asked])
    assert not (made.seen & made.asked).any() and not (made.asked & ~batch.valid).any()
    share = made.asked.any(dim=1).sum() / (made.asked.any(dim=1) | made.seen[:, 0]).sum()
    assert float(share) == pytest.approx(0.75, abs=0.06)


def test_predicting_the_mean_gives_the_mean_in_physical_units(objective, batches_of):
    # All weights of the answer at zero: every hidden pixel is the contract's centre.
    torch.nn.init.zeros_(objective.mae.decoder.heads.filters["2d"])
    torch.nn.init.zeros_(objective.mae.decoder.heads.bias["2d"])
    batch = batches_of("landsat7", (16, 16))
    made = objective.reconstruct(batch, 0)
    for index, entry in enumerate(objective.contract.of("landsat7")):
        assert made.answer[:, index][made.asked[:, index]].unique().tolist() == pytest.approx([entry.center])


def test_a_checkpoint_restores_the_whole_autoencoder(objective, batches_of, tmp_path):
    checkpoint.save(tmp_path, 3, model=objective.mae.state_dict(), optimizer={}, state=objective_state(objective))
    again = restore_objective(checkpoint.newest_valid(tmp_path))
    batch = batches_of("mr", (4, 16, 16))
    assert torch.equal(again.reconstruct(batch, 1).answer, objective.reconstruct(batch, 1).answer)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    checkpoint.save(tmp_path, 3, model={}, optimizer={}, state={})
    with pytest.raises(IntegrityError, match="step-00000003 holds no masked autoencoder"):
        restore_objective(checkpoint.newest_valid(tmp_path))


def test_a_channel_that_the_contract_does_not_know_is_an_error(objective, batches_of):
    batch = batches_of("landsat7", (16, 16))
    stranger = replace(batch.channels[0], name="B99")
    with pytest.raises(ConfigError, match="B99"):
        objective.loss(replace(batch, channels=(stranger, *batch.channels[1:])), 0)


def test_masks_belong_to_sample_numbers_and_not_to_processes(objective, batches_of):
    batch = replace(batches_of("landsat7", (16, 16), count=4), samples=(0, 1, 2, 3))
    whole = objective.prepare(batch, 7, Masking())
    half = objective.prepare(batch.part(2, 4), 7, Masking())
    assert torch.equal(half.plan.visible, whole.plan.visible[2:])
    assert torch.equal(half.plan.asked, whole.plan.asked[2:])
    assert not torch.equal(half.plan.visible, whole.plan.visible[:2])
    alone = objective.prepare(replace(batch, samples=()), 7, Masking())
    assert torch.equal(alone.plan.visible, whole.plan.visible), "without numbers they are 0, 1, 2 ..."


def test_stored_numbers_are_read_before_anything_else(objective, batches_of):
    batch = batches_of("landsat7", (16, 16))
    numbers = torch.where(batch.valid, batch.raw, torch.tensor(0.0)).to(torch.int16)
    ones = torch.ones(numbers.shape[:2], dtype=torch.float64)
    symmetries = (Symmetry(), Symmetry((-1,), 1), Symmetry((-2,)))
    stored = replace(batch, raw=numbers, stored=Stored(0.1 * ones, -1.5 * ones, symmetries))
    physical = stored.physical()
    assert not torch.equal(physical.valid, batch.valid)
    assert torch.equal(objective.loss(stored, 2)[0], objective.loss(physical, 2)[0])
    assert torch.equal(objective.reconstruct(stored, 2).image, physical.raw)
