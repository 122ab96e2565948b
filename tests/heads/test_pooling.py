"""Heads that answer for a whole image: what they make of tokens that are valid, and of those that are not."""

from __future__ import annotations

import pytest
import torch

from geomed_mae.heads.losses import loss_of
from tests.heads.given import changed, head, inputs, spec_of

NAMES = ("linear", "attentive")


def pooling(name: str, **more: object) -> torch.nn.Module:
    """A head whose query, if it has one, is not zero any more."""
    model = head(name, "classify", **more)
    if name == "attentive":
        torch.nn.init.normal_(model.query)
    return model


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("maps", [1, 3])
def test_tokens_that_are_not_valid_have_no_part(name, maps):
    given = inputs((8, 8), (3, 3), maps=maps)
    valid = given.token_valid.clone()
    valid[:, 0] = False
    zeroed = [tokens * valid[:, None] for tokens in given.maps]
    without = changed(given, token_valid=valid, maps=tuple(zeroed))
    fewer = changed(given, token_valid=valid[:, 1:], maps=tuple(tokens[:, :, 1:] for tokens in given.maps))
    model = pooling(name, maps=maps)
    torch.testing.assert_close(model(without), model(fewer))
    assert not torch.allclose(model(without), model(changed(without, token_valid=given.token_valid)))


@pytest.mark.parametrize("name", NAMES)
def test_an_image_without_valid_tokens_gives_no_nan(name):
    given = inputs((8, 8), (2, 2))
    nothing = changed(given, token_valid=torch.zeros_like(given.token_valid), maps=(torch.zeros_like(given.maps[0]),))
    assert torch.isfinite(pooling(name)(nothing)).all()


def test_linear_is_a_linear_layer_on_the_mean():
    given, model = inputs((8, 8), (3, 5), maps=3), head("linear", "classify", maps=3)
    mean = torch.cat([tokens.mean(dim=(2, 3)) for tokens in given.maps], dim=1)
    torch.testing.assert_close(model(given), mean @ model.classify.weight.T + model.classify.bias)


def test_linear_gives_every_token_a_class_and_interpolates():
    given, model = inputs((8, 8), (3, 5)), head("linear", "segment")
    logits = model(given)
    token = torch.einsum("cd,bdyx->bcyx", model.classify.weight, given.maps[0]) + model.classify.bias[:, None, None]
    torch.testing.assert_close(logits[..., 0, 0], token[..., 0, 0])
    # Half-way between two tokens' middles lies the mean of their answers.
    torch.testing.assert_close(logits[..., 0, 7:9].mean(dim=2), token[..., 0, :2].mean(dim=2))


def test_attention_starts_at_the_mean():
    given, model = inputs((8, 8), (3, 3)), head("attentive", "classify")
    tokens = model.norms[0](given.maps[0].flatten(2).transpose(1, 2))
    torch.testing.assert_close(model(given), model.classify(tokens.mean(dim=1)))


def test_attention_learns_which_token_decides():
    torch.manual_seed(0)
    model, spec = head("attentive", "classify"), spec_of("attentive", "classify")
    target = torch.randint(0, 3, (64,))
    tokens = torch.randn(64, 24, 3, 3) * 0.3
    tokens[torch.arange(64), target, 1, 1] += 4.0
    given = changed(inputs((8, 8), (3, 3), batch=64), maps=(tokens,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        loss_of(spec, model(given), target)[0].backward()
        optimizer.step()
    assert (model(given).argmax(1) == target).float().mean() > 0.95
