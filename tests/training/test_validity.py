"""Invalid pixels, patches and samples through the whole objective: scaling, masks, model, loss, gradients, metrics."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking, valid_tokens
from geomed_mae.samples.batch import Batch
from geomed_mae.training.objective import MaskedObjective

CASES = [("landsat7", (16, 16)), ("mr", (4, 16, 16)), ("ct", (4, 16, 16))]
MASKINGS = {
    "exact": Masking(ratio=(0.5, 0.8), channel_drop=0.4),
    "fast": Masking(ratio=0.7, predict_ratio=0.3, channel_drop=0.4),
}


@pytest.fixture(params=sorted(MASKINGS))
def either(request, objective) -> MaskedObjective:
    """The objective in both modes, with everything that a recipe can switch on."""
    torch.manual_seed(0)
    spec = replace(objective.mae.spec, mode=request.param, reference_gsd_m=2.0, reference_spacing_mm=(4.0, 1.0, 1.0))
    mae = MaskedAutoencoder.from_spec(spec)
    return MaskedObjective(mae, objective.contract, masking=MASKINGS[request.param], seed=3)


def result(objective: MaskedObjective, batch: Batch, step: int = 2) -> dict[str, torch.Tensor]:
    """Return the loss, its parts and every gradient of one step."""
    objective.mae.zero_grad(set_to_none=True)
    loss, parts = objective.loss(batch, step)
    loss.backward()
    gradients = {name: value.grad for name, value in objective.mae.named_parameters() if value.grad is not None}
    return {"loss": loss.detach(), **{f"part {name}": part for name, part in parts.items()}, **gradients}


def pitted(batch: Batch) -> Batch:
    """Return the batch with single invalid values everywhere, half a sample and one whole sample invalid."""
    draw = torch.Generator().manual_seed(0)
    valid = batch.valid & (torch.rand(batch.valid.shape, generator=draw) < 0.85)
    valid[1, ..., :8] = False
    valid[2] = False
    return replace(batch, valid=valid, raw=torch.where(valid, batch.raw, 0.0))


@pytest.mark.parametrize("junk", [1e30, float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(("modality", "shape"), CASES)
def test_what_stands_at_invalid_places_of_a_batch_changes_no_bit_of_a_step(either, batches_of, modality, shape, junk):
    batch = pitted(batches_of(modality, shape))
    dirty = replace(batch, raw=torch.where(batch.valid, batch.raw, junk))
    wanted, got = result(either, batch), result(either, dirty)
    assert wanted.keys() == got.keys() and len(wanted) > 30
    for name, value in wanted.items():
        assert torch.isfinite(value).all() and torch.equal(value, got[name]), name


@pytest.mark.parametrize(("modality", "shape"), CASES)
def test_a_sample_without_a_valid_patch_is_as_if_it_were_not_there(either, batches_of, modality, shape):
    batch = pitted(batches_of(modality, shape))
    assert not batch.valid[2].any()
    fewer = replace(
        batch,
        raw=batch.raw[:2],
        valid=batch.valid[:2],
        spacing=batch.spacing[:2],
        keys=batch.keys[:2],
        statistics=batch.statistics[:2],
    )
    with_it, without = result(either, batch), result(either, fewer)
    for name in with_it.keys() - {"part valid_fraction"}:
        assert torch.allclose(with_it[name], without[name], rtol=1e-4, atol=1e-6), name


@pytest.mark.parametrize(("modality", "shape"), CASES)
def test_no_patch_without_enough_valid_area_is_planned_and_padding_may_point_anywhere(
    either, batches_of, monkeypatch, modality, shape
):
    batch = pitted(batches_of(modality, shape))
    ready = either.prepare(batch, 2, either.masking)
    plan, usable = ready.plan, valid_tokens(batch.valid, either.mae.spec.patch(len(shape)))
    assert usable[:2].any(1).all() and not usable[0].all() and not usable[2].any()
    for index, pad in ((plan.visible, plan.visible_pad), (plan.asked, plan.asked_pad)):
        assert usable.gather(1, index)[~pad].all() and pad[1:].any(1).all()
    wanted = result(either, batch)
    best = usable.float().argmax(1, keepdim=True)  # a patch that would count if padding did
    elsewhere = replace(
        plan,
        visible=torch.where(plan.visible_pad, best, plan.visible),
        asked=torch.where(plan.asked_pad, best, plan.asked),
    )
    monkeypatch.setattr(either, "prepare", lambda *_: replace(ready, plan=elsewhere))
    for name, value in result(either, batch).items():
        assert torch.allclose(value, wanted[name], rtol=1e-4, atol=1e-6), name


def test_a_batch_without_any_valid_patch_gives_a_finite_loss_and_no_gradient(either, batches_of):
    batch = batches_of("ct", (4, 16, 16))
    empty = replace(batch, valid=torch.zeros_like(batch.valid), raw=torch.full_like(batch.raw, float("nan")))
    got = result(either, empty)
    assert got.pop("loss") == 0
    assert all(not value.any() for value in got.values())


def test_the_number_of_a_visible_patch_does_change_the_step(either, batches_of):
    # What the tests above would also show for a loss that depends on nothing.
    batch = pitted(batches_of("landsat7", (16, 16)))
    raw = batch.raw.clone()
    raw[0, :, 4:] += 30
    other = replace(batch, raw=torch.where(batch.valid, raw, 0.0))
    assert not torch.equal(result(either, batch)["loss"], result(either, other)["loss"])
