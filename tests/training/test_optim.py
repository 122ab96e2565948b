"""Who optimises what, with which rate and decay."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from geomed_mae.config import TrainConfig
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.muon import DealtMuon, dealt
from geomed_mae.training.optim import MUON_MOMENTUM, build_optimizers, layer_of, lr_scale


@pytest.fixture(scope="module")
def mae() -> MaskedAutoencoder:
    torch.manual_seed(0)
    return MaskedAutoencoder.from_spec(
        ModelSpec(dim=16, depth=2, heads=2, patch_2d=(4, 4), basis=4, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    )


def groups_of(mae, **train):
    optimizers = build_optimizers(mae, TrainConfig(**train))
    names = {id(parameter): name for name, parameter in mae.named_parameters()}
    return {
        names[id(parameter)]: (key, group["lr"], group["weight_decay"])
        for key, member in optimizers.members.items()
        for group in member.param_groups
        for parameter in group["params"]
    }


def test_every_parameter_is_trained_exactly_once(mae):
    for optimizer in ("muon", "adamw"):
        optimizers = build_optimizers(mae, TrainConfig(optimizer=optimizer))
        ids = [id(parameter) for parameter in optimizers.parameters()]
        assert sorted(ids) == sorted(id(parameter) for parameter in mae.parameters())


def test_muon_takes_the_matrices_of_all_blocks_and_nothing_else(mae):
    by_muon = {name for name, (key, *_) in groups_of(mae).items() if key == "muon"}
    wanted = {name for name, p in mae.named_parameters() if ".blocks." in name and p.ndim == 2}
    assert by_muon == wanted and any("decoder.blocks.0" in name for name in wanted)


def test_biases_norms_and_tokens_are_not_decayed(mae):
    for name, (_, _, decay) in groups_of(mae, weight_decay=0.3).items():
        plain = name.endswith(("bias", "bias.2d", "token")) or "norm" in name
        assert decay == (0.0 if plain or "codes" in name else 0.3), name


def test_frozen_parameters_are_left_out():
    module = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module[0].requires_grad_(False)
    assert len(list(build_optimizers(module, TrainConfig()).parameters())) == 2


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("encoder.patch_embed.filters.2d", 0),
        ("encoder.cls_token", 0),
        ("encoder.blocks.0.attn.qkv.weight", 1),
        ("blocks.11.norm1.weight", 12),
        ("encoder.norm.weight", 13),
        ("decoder.blocks.0.mlp.fc1.weight", 13),
        ("head.weight", 13),
    ],
)
def test_layers_are_counted_from_the_pixels(name, layer):
    assert layer_of(name, depth=12) == layer


def test_layer_decay_lowers_the_rate_towards_the_pixels(mae):
    rates = {name: lr for name, (_, lr, _) in groups_of(mae, optimizer="adamw", lr=1.0, layer_decay=0.5).items()}
    assert rates["encoder.norm.weight"] == 1.0
    assert rates["encoder.blocks.1.norm1.weight"] == 0.5
    assert rates["encoder.cls_token"] == 0.125


def test_the_rate_rises_linearly_and_falls_as_a_cosine():
    scales = [lr_scale(step, 100, 0.1) for step in range(101)]
    assert scales[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert scales[10] == 1.0 and scales[55] == pytest.approx(0.5) and scales[100] == pytest.approx(0.0)
    assert scales[10:] == sorted(scales[10:], reverse=True)
    assert all(math.isfinite(lr_scale(0, 1, warmup)) for warmup in (0.0, 0.9))


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_state_survives_a_trip_through_named_tensors(optimizer):
    def trained(steps, optimizers, module):
        for step in range(steps):
            torch.manual_seed(step)
            module(torch.randn(3, 4)).square().sum().backward()
            optimizers.step()
            optimizers.zero_grad()

    def fresh():
        torch.manual_seed(7)
        module = nn.ModuleDict({"blocks": nn.ModuleList([nn.Linear(4, 4)])})
        module.forward = lambda x: module["blocks"][0](x)
        return module, build_optimizers(module, TrainConfig(optimizer=optimizer))

    module, optimizers = fresh()
    trained(3, optimizers, module)
    tensors = {name: tensor.clone() for name, tensor in optimizers.state_tensors().items()}
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    trained(3, optimizers, module)
    again, restored = fresh()
    again.load_state_dict(weights)
    restored.load_state_tensors(tensors)
    trained(3, restored, again)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in module.state_dict().items())


def test_matrices_are_dealt_out_so_that_all_hands_have_about_the_same_work():
    shapes = [(192, 192), (768, 192), (192, 768), (576, 192)] * 6
    for hands in (2, 3):
        owners = dealt(shapes, hands)
        work = [
            sum(shape[0] * shape[1] * min(shape) for shape, owner in zip(shapes, owners, strict=True) if owner == hand)
            for hand in range(hands)
        ]
        assert max(work) < 1.1 * min(work)
    assert dealt([(2, 2)], 3) == [0]


def test_muon_of_many_makes_the_steps_of_torchs_own_and_keeps_the_same_state():
    def trained(make):
        torch.manual_seed(0)
        weights = [nn.Parameter(torch.randn(*shape)) for shape in ((6, 4), (4, 12), (5, 5))]
        muon = make([{"params": weights, "lr": 0.02, "weight_decay": 0.1}])
        for step in range(4):
            torch.manual_seed(step)
            for weight in weights[: 3 - step % 2]:
                weight.grad = torch.randn_like(weight)
            muon.step()
            muon.zero_grad()
        return weights, muon

    mine, many = trained(lambda groups: DealtMuon(groups, MUON_MOMENTUM, Ranks()))
    theirs, own = trained(
        lambda groups: torch.optim.Muon(groups, momentum=MUON_MOMENTUM, nesterov=True, adjust_lr_fn="original")
    )
    for one, other in zip(mine, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-6)
        assert many.state[one].keys() == own.state[other].keys()
        assert torch.allclose(many.state[one]["momentum_buffer"], own.state[other]["momentum_buffer"])
