"""Attention of the transformer blocks: timm's, with the kernel chosen by what is faster where it runs.

On a CPU in bf16 explicit products beat torch's fused kernel two to four times at the sequence lengths of masked
autoencoders (its backward pass alone takes a third of a step); in fp32, and on a GPU, the fused kernel wins. Both
compute the same: in bf16 the gradients of either lie equally far from fp32's.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from timm.layers.attention import Attention
from torch import Tensor, nn
from torch.nn import functional as F


def attend(
    query: Float[Tensor, "b heads q width"],
    key: Float[Tensor, "b heads k width"],
    value: Float[Tensor, "b heads k width"],
    bias: Float[Tensor, "b 1 1 k"] | None,
) -> Float[Tensor, "b heads q width"]:
    """Return softmax(query @ key / sqrt(width) + bias) @ value; a bias of -inf leaves a key out."""
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=bias)
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    return (scores if bias is None else scores + bias).softmax(-1, dtype=query.dtype) @ value


class SelfAttention(Attention):
    """timm's Attention, parameters and names included; every token sees every other."""

    def forward(
        self, x: Float[Tensor, "b n d"], attn_mask: Float[Tensor, "b 1 1 n"] | None = None, is_causal: bool = False
    ) -> Float[Tensor, "b n d"]:
        """Return the attended tokens. `is_causal` is part of timm's signature; images have no before and after."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if attn_mask is None else attn_mask.to(qkv.dtype)
        return self.proj(attend(*qkv.unbind(0), bias).transpose(1, 2).flatten(2))

    def rows_from(
        self, first: int, x: Float[Tensor, "b n d"], bias: Float[Tensor, "b 1 1 n"] | None = None
    ) -> Float[Tensor, "b n-first d"]:
        """Return the rows of `forward` from `first` on, for the price of their queries alone."""
        width = self.qkv.in_features
        (w_query, w_seen), (b_query, b_seen) = (
            part.split([width, 2 * width]) for part in (self.qkv.weight, self.qkv.bias)
        )
        query = F.linear(x[:, first:], w_query, b_query).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        seen = F.linear(x, w_seen, b_seen).unflatten(-1, (2, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        bias = None if bias is None else bias.to(query.dtype)
        return self.proj(attend(query, *seen.unbind(0), bias).transpose(1, 2).flatten(2))


class CrossAttention(nn.Module):
    """Queries see the tokens of another sequence and not one another (CrossMAE, arXiv 2401.14391)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(dim, dim)
        self.kv = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x: Float[Tensor, "b q d"],
        seen: Float[Tensor, "b k d"],
        bias: Float[Tensor, "b 1 1 k"] | None = None,
    ) -> Float[Tensor, "b q d"]:
        """Return what each of `x` gathers from `seen`."""
        query = self.q(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.kv(seen).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        bias = None if bias is None else bias.to(query.dtype)
        return self.proj(attend(query, key, value, bias).transpose(1, 2).flatten(2))
