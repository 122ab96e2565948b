"""Attention: the same numbers from either kernel, and from torch's own modules."""

from __future__ import annotations

import pytest
import torch
from timm.layers.attention import Attention

from geomed_mae.models.attention import CrossAttention, SelfAttention, attend


def inputs(dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(2, 3, 10, 16).to(dtype).requires_grad_() for _ in range(3)]


@pytest.mark.parametrize("padded", [False, True])
def test_explicit_products_are_as_near_to_fp32_as_the_fused_kernel(padded):
    qkv = inputs(torch.bfloat16)
    bias = torch.zeros(2, 1, 1, 10)
    if padded:
        bias[0, ..., 7:] = float("-inf")
    exact = torch.nn.functional.scaled_dot_product_attention(*(part.float() for part in qkv), attn_mask=bias)
    fused = torch.nn.functional.scaled_dot_product_attention(*qkv, attn_mask=bias.bfloat16())
    ours = attend(*qkv, bias.bfloat16())
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).abs().max() <= 2 * (fused - exact).abs().max()


def test_bf16_on_a_cpu_does_not_use_the_fused_kernel_and_fp32_does(monkeypatch):
    used = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *args, **kwargs: used.append(args[0].dtype) or fused(*args, **kwargs),
    )
    for dtype in (torch.bfloat16, torch.float32):
        attend(*inputs(dtype), None)
    assert used == [torch.float32]


def test_self_attention_is_timms():
    ours, theirs = SelfAttention(48, num_heads=3, qkv_bias=True), Attention(48, num_heads=3, qkv_bias=True)
    theirs.load_state_dict(ours.state_dict())
    x, bias = torch.randn(2, 7, 48), torch.zeros(2, 1, 1, 7)
    bias[1, ..., 5:] = float("-inf")
    assert torch.allclose(ours(x), theirs(x), atol=1e-6)
    assert torch.allclose(ours(x, bias), theirs(x, attn_mask=bias), atol=1e-6)


def test_cross_attention_is_torchs():
    ours, theirs = CrossAttention(48, 3), torch.nn.MultiheadAttention(48, 3, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.weight.copy_(ours.proj.weight)
        theirs.out_proj.bias.copy_(ours.proj.bias)
    x, seen = torch.randn(2, 5, 48), torch.randn(2, 9, 48)
    assert torch.allclose(ours(x, seen), theirs(x, seen, seen)[0], atol=1e-6)


def test_rows_from_are_the_last_rows():
    attention, x, bias = SelfAttention(48, num_heads=3, qkv_bias=True), torch.randn(2, 7, 48), torch.zeros(2, 1, 1, 7)
    bias[1, ..., 5:] = float("-inf")
    assert torch.allclose(attention.rows_from(3, x, bias), attention(x, bias)[:, 3:], atol=1e-6)
    assert torch.allclose(attention.rows_from(3, x), attention(x)[:, 3:], atol=1e-6)
