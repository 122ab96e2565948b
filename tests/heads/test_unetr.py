"""UNETR's decoder behind any patch: its steps, where its skips come from, and that it is the published one at 16."""

from __future__ import annotations

import math

import pytest
import torch
from monai.networks.nets import UNETR

from geomed_mae.heads.losses import loss_of
from geomed_mae.heads.unetr import map_sources, upsampling_steps
from tests.heads.given import head, inputs, spec_of


@pytest.mark.parametrize(
    "patch", [(16, 16), (8, 8), (2, 8, 8), (4, 4, 4), (1, 16, 16), (14, 14), (12, 5), (7, 7), (1, 1)]
)
def test_steps_multiply_to_the_patch(patch):
    steps = upsampling_steps(patch)
    assert tuple(math.prod(factors) for factors in zip(*steps, strict=True)) == patch


def test_an_axis_with_few_factors_is_finished_first():
    assert upsampling_steps((2, 8, 8)) == [(2, 2, 2), (1, 2, 2), (1, 2, 2)]
    assert upsampling_steps((14, 4)) == [(7, 2), (2, 2)]


@pytest.mark.parametrize("maps", [1, 2, 3])
@pytest.mark.parametrize("levels", [0, 1, 2, 3, 4])
def test_every_map_is_used_and_later_ones_lie_deeper(maps, levels):
    bottom, *skips = map_sources(maps, levels)
    assert len(skips) == levels and maps - 1 in bottom
    assert {number for source in (bottom, *skips) for number in source} == set(range(maps))
    order = [max(source) for source in (bottom, *skips)]
    assert order == sorted(order, reverse=True)


def test_at_a_patch_of_16_it_is_monais_network(monkeypatch):
    torch.manual_seed(0)
    given = inputs((16, 16, 16), (1, 2, 1), channels=3, maps=4)

    class Maps(torch.nn.Module):
        """Stands for MONAI's ViT: (last tokens, the tokens of every block), whatever the image."""

        def __init__(self, **_: object) -> None:
            super().__init__()

        def forward(self, _: torch.Tensor) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
            early, middle, late, last = (tokens.flatten(2).transpose(1, 2) for tokens in given.maps)
            return last, {3: early, 6: middle, 9: late}

    monkeypatch.setattr("monai.networks.nets.unetr.ViT", Maps)
    sizes = {"feature_size": 16, "hidden_size": 24, "mlp_dim": 24, "num_heads": 2, "conv_block": True}
    theirs = UNETR(in_channels=4, out_channels=3, img_size=(16, 32, 16), **sizes)
    ours = head("unetr", "segment", (16, 16, 16), channels=3, width=128, maps=4)
    pairs = {"stem": "encoder1", "classify": "out"}
    pairs |= {f"skips.{number}": f"encoder{4 - number}" for number in range(3)}
    pairs |= {f"steps.{number}": f"decoder{5 - number}" for number in range(4)}
    for mine, name in pairs.items():
        weights = list(theirs.get_submodule(name).state_dict().values())
        module = ours.get_submodule(mine)
        module.load_state_dict(dict(zip(module.state_dict(), weights, strict=True)))
    # MONAI's network has no notion of validity: it is given what the stem of ours is shown, a channel of ones.
    image = torch.cat([given.pixels, torch.ones_like(given.pixels[:, :1])], dim=1)
    torch.testing.assert_close(ours(given), theirs(image))


def test_learns_volumes_with_anisotropic_patches():
    torch.manual_seed(0)
    given = inputs((1, 4, 4), (4, 2, 2), channels=1, batch=1, maps=3)
    target = (given.pixels[:, 0] > 0).long() + (given.pixels[:, 0] > 1).long()
    model = head("unetr", "segment", (1, 4, 4), channels=1, maps=3, width=16)
    spec = spec_of("unetr", "segment", (1, 4, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(40):
        optimizer.zero_grad()
        loss_of(spec, model(given), target)[0].backward()
        optimizer.step()
    assert (model(given).argmax(1) == target).float().mean() > 0.9
