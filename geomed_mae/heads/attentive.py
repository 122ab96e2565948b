"""Attentive head: a class (or several) an image, from tokens pooled by attention. The default of head.task classify.

One learned query attends over the valid tokens (attentive probing, arXiv 2202.03026; stronger than the mean for masked
autoencoders, whose tokens are not trained to be averaged), then a linear layer. There is no value projection: another
linear layer in between answers nothing more, and with 64 labelled X-rays (five draws, frozen features) its weights cost
0.967 instead of 0.973 AUROC with one map, 0.962 instead of 0.966 with three.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geomed_mae.heads import HeadInputs, HeadSpec

TASKS = ("classify",)


def build(spec: HeadSpec) -> AttentiveHead:
    """Return an attentive head; it works for any number of spatial axes."""
    return AttentiveHead(spec)


class AttentiveHead(nn.Module):
    """Pooling by attention with one query, then a linear layer. Several maps are pooled as one of their joint width."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(spec.embed_dim) for _ in range(spec.maps))
        self.query = nn.Parameter(torch.zeros(spec.maps * spec.embed_dim))
        self.classify = nn.Linear(spec.maps * spec.embed_dim, len(spec.classes))

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "batch class"]:
        """Return logits; tokens that are not valid have no part in them. Training starts at the mean: a zero query."""
        layers = zip(self.norms, inputs.maps, strict=True)
        tokens = torch.cat([norm(tokens.flatten(2).transpose(1, 2)) for norm, tokens in layers], dim=2)
        valid = inputs.token_valid.flatten(1)
        # An image without any valid token would be softmax over nothing; it gets the mean of zeros instead of NaN.
        usable = valid | ~valid.any(dim=1, keepdim=True)
        scores = (tokens @ self.query) / tokens.shape[-1] ** 0.5
        weight = scores.masked_fill(~usable, float("-inf")).softmax(dim=1)
        return self.classify(torch.einsum("bn,bnd->bd", weight, tokens))
