"""The convolutional head learns what tokens cannot say, where the borders are, and what pixels cannot: the meaning."""

from __future__ import annotations

import torch

from geomed_mae.heads import HeadInputs
from geomed_mae.heads.losses import loss_of
from tests.heads.given import changed, head, inputs, spec_of


def accuracy(name: str, given: HeadInputs, target: torch.Tensor, steps: int) -> float:
    """Share of right pixels after so many steps on this very batch."""
    model, spec = head(name, "segment"), spec_of(name, "segment")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(spec, model(given), target)[0].backward()
        optimizer.step()
    return float((model(given).argmax(1) == target).float().mean())


def test_borders_come_from_pixels_and_meaning_from_tokens():
    torch.manual_seed(0)
    given = inputs((8, 8), (3, 3), batch=2)
    bright = torch.rand(2, 24, 24) > 0.6
    meaning = torch.randint(1, 3, (2, 3, 3))
    given = changed(
        given,
        pixels=bright[:, None].float().expand_as(given.pixels).contiguous(),
        maps=(torch.nn.functional.one_hot(meaning, 24).movedim(-1, 1).float(),),
    )
    target = bright * meaning.repeat_interleave(8, 1).repeat_interleave(8, 2)
    assert accuracy("convolutional", given, target, 60) > 0.9
    # Tokens alone know no pixels: a linear layer on them cannot do better than the more frequent answer.
    assert accuracy("linear", given, target, 60) < 0.7
