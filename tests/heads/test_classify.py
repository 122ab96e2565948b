"""The classification head."""

from __future__ import annotations

import pytest
import torch

from geomed_mae.heads import HeadInputs, HeadSpec, head_module
from geomed_mae.readers import IGNORE

SPEC = HeadSpec(name="classify", embed_dim=12, classes=("a", "b", "c"), channels=1, patch=(4, 4))


def inputs(tokens: torch.Tensor, valid: torch.Tensor) -> HeadInputs:
    pixels = torch.zeros(len(tokens), 1, 4, 4)
    return HeadInputs(tokens, valid, pixels, pixels.bool())


def head() -> torch.nn.Module:
    torch.manual_seed(0)
    model = head_module("classify").build(SPEC)
    torch.nn.init.normal_(model.query)
    return model


def test_gives_one_answer_an_image_in_any_number_of_axes():
    for grid in ((3, 4), (2, 3, 4)):
        tokens = torch.randn(5, 12, *grid)
        assert head()(inputs(tokens, torch.ones(5, *grid, dtype=torch.bool))).shape == (5, 3)


def test_tokens_that_are_not_valid_have_no_part():
    tokens, valid = torch.randn(2, 12, 3, 3), torch.ones(2, 3, 3, dtype=torch.bool)
    valid[:, 0] = False
    other = tokens.clone()
    other[:, :, 0] = 1e3
    torch.testing.assert_close(head()(inputs(tokens, valid)), head()(inputs(other, valid)))


def test_an_image_without_valid_tokens_gives_no_nan():
    assert torch.isfinite(head()(inputs(torch.zeros(1, 12, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool)))).all()


def test_loss_is_cross_entropy_over_known_classes():
    logits = torch.randn(3, 3)
    loss, _ = head().loss(logits, torch.tensor([0, IGNORE, 2]))
    expected = -(logits.log_softmax(1)[0, 0] + logits.log_softmax(1)[2, 2]) / 2
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_learns_which_token_decides():
    torch.manual_seed(0)
    model = head_module("classify").build(SPEC)
    target = torch.randint(0, 3, (64,))
    tokens = torch.randn(64, 12, 3, 3) * 0.3
    tokens[torch.arange(64), target, 1, 1] += 4.0
    given = inputs(tokens, torch.ones(64, 3, 3, dtype=torch.bool))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        loss, _ = model.loss(model(given), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (model(given).argmax(1) == target).float().mean() > 0.95
