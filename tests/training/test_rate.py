"""What a dry run says of the model: oracles are what autograd keeps, what optimisers hold, what a checkpoint weighs."""

from __future__ import annotations

import itertools

import pytest
import torch

from geomed_mae.config import TrainConfig
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking, plan_masks, valid_tokens
from geomed_mae.models.spec import ModelSpec
from geomed_mae.training.learner import Learner
from geomed_mae.training.rate import (
    activation_bytes,
    checkpoint_bytes,
    estimate_space,
    kept_checkpoints,
    measure_step,
    repeated,
)
from tests.training.conftest import make_batch

TRAIN = TrainConfig(steps=10, batch_size=4, device="cpu")


@pytest.fixture
def batch():
    return make_batch("landsat7", (32, 32), count=4)


def test_measuring_leaves_the_weights_as_they_are(objective, batch):
    before = {name: value.clone() for name, value in objective.mae.state_dict().items()}
    found = measure_step(Learner(objective.mae, TRAIN), objective.loss, batch, TRAIN, seconds=0.1)
    assert found.steps >= 3 and 0 < found.quick <= found.seconds <= found.slow and found.device_mb is None
    after = objective.mae.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_first_step_does_not_count_and_time_is_bounded(objective, batch):
    ticks = itertools.chain([0.0, 100.0], itertools.count(101.0, 1.0))
    learner = Learner(objective.mae, TRAIN)
    found = measure_step(learner, objective.loss, batch, TRAIN, seconds=5.0, clock=lambda: next(ticks))
    assert (found.seconds, found.quick, found.slow, found.steps) == (1.0, 1.0, 1.0, 3)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_is_measured_in_the_parts_that_training_takes(objective, batch, accumulate):
    sizes = []

    def loss(part, step):
        sizes.append(len(part))
        return objective.loss(part, step)

    train = TRAIN.model_copy(update={"accumulate": accumulate})
    found = measure_step(Learner(objective.mae, train), loss, batch, train, seconds=0.01)
    assert set(sizes) == {4 // accumulate} and len(sizes) == accumulate * (found.steps + 1)


def test_a_repeated_batch_is_a_batch(objective):
    few = make_batch("landsat7", (32, 32), count=2)
    many = repeated(few, 5)
    assert len(many) == len(many.keys) == len(many.statistics) == 5 and many.spacing.shape == (5, 2)
    assert torch.equal(many.raw[4], few.raw[0]) and torch.equal(many.valid[3], few.valid[1])
    objective.loss(many, 0)


@pytest.mark.parametrize(("optimizer", "ema"), [("muon", None), ("adamw", 0.99)])
def test_moments_averages_and_checkpoints_have_their_size(objective, batch, tmp_path, optimizer, ema):
    train = TRAIN.model_copy(update={"optimizer": optimizer, "ema": ema})
    learner = Learner(objective.mae, train)
    measure_step(learner, objective.loss, batch, train, seconds=0.01)
    space = estimate_space(objective.mae, objective.mae.spec, train, [(6, 16, 32, (32, 32))])
    held = sum(value.numel() * value.element_size() for value in learner.optimizers.state_tensors().values())
    # The filters of volumes have seen none here, and have no moments until they do.
    assert 0.5 * space.moments < held < 1.02 * space.moments
    learner.save(tmp_path, {"progress": {"step": 1}}, train)
    (written,) = (path for path in tmp_path.iterdir() if path.is_dir())
    size = sum(path.stat().st_size for path in written.rglob("*"))
    assert 0.6 * checkpoint_bytes(space) < size < 1.2 * checkpoint_bytes(space) + 100_000


@pytest.mark.parametrize(("mode", "shape"), [("fast", (64, 64)), ("exact", (64, 64)), ("fast", (8, 32, 32))])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(mode, shape):
    spec = ModelSpec(dim=96, depth=4, heads=3, patch_2d=(4, 4), patch_3d=(2, 4, 4), decoder_dim=64, mode=mode)
    mae = MaskedAutoencoder.from_spec(spec)
    batch = make_batch("landsat7", shape, count=2)
    masking = Masking(ratio=0.75, predict_ratio=0.5 if mode == "fast" else None)
    tokens = valid_tokens(batch.valid, spec.patch(len(shape)))
    plan = plan_masks(tokens, masking, (0, 0))
    own = {value.untyped_storage().data_ptr() for value in mae.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(value):
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    floor = torch.ones(2, len(batch.channels))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
        out = mae(batch.raw, batch.valid, batch.channels, batch.spacing, plan, floor=floor)
    measured = sum(value.untyped_storage().nbytes() for value in kept.values())
    shown, asked = plan.visible.shape[1], plan.asked.shape[1]
    estimated = len(batch) * activation_bytes(spec, len(batch.channels), shown, asked, shape)
    assert torch.isfinite(out.loss) and 0.9 < estimated / measured < 1.5


def test_one_checkpoint_more_than_is_kept_lies_on_the_disk():
    assert kept_checkpoints(TRAIN.model_copy(update={"steps": 5000, "checkpoint_every": 500, "keep": 2})) == 3
    forever = {"steps": 5000, "checkpoint_every": 500, "keep": 2, "keep_every": 1000}
    assert kept_checkpoints(TRAIN.model_copy(update=forever)) == 8
    assert kept_checkpoints(TRAIN.model_copy(update={"steps": 100, "checkpoint_every": 500})) == 1
