"""Classification head: a class an image, from tokens pooled by attention.

One learned query attends over the valid tokens (attentive probing, arXiv 2202.03026; stronger than the mean for masked
autoencoders, whose tokens are not trained to be averaged), then a linear layer. The loss is cross entropy in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from geomed_mae.heads import HeadInputs, HeadSpec
from geomed_mae.readers import IGNORE


def build(spec: HeadSpec) -> ClassifyHead:
    """Return a classification head; it works for any number of spatial axes."""
    return ClassifyHead(spec)


class ClassifyHead(nn.Module):
    """Attentive pooling with one query, then a linear layer."""

    def __init__(self, spec: HeadSpec) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(spec.embed_dim)
        self.query = nn.Parameter(torch.zeros(spec.embed_dim))
        self.value = nn.Linear(spec.embed_dim, spec.embed_dim)
        self.classify = nn.Linear(spec.embed_dim, len(spec.classes))

    def forward(self, inputs: HeadInputs) -> Float[Tensor, "batch class"]:
        """Return logits; tokens that are not valid have no part in them. Training starts at the mean: a zero query."""
        tokens = self.norm(inputs.tokens.flatten(2).transpose(1, 2))
        valid = inputs.token_valid.flatten(1)
        # An image without any valid token would be softmax over nothing; it gets the mean of zeros instead of NaN.
        usable = valid | ~valid.any(dim=1, keepdim=True)
        scores = (tokens @ self.query) / tokens.shape[-1] ** 0.5
        weight = scores.masked_fill(~usable, float("-inf")).softmax(dim=1)
        return self.classify(torch.einsum("bn,bnd->bd", weight, self.value(tokens)))

    def loss(
        self, logits: Float[Tensor, "batch class"], target: Int[Tensor, " batch"]
    ) -> tuple[Float[Tensor, ""], dict[str, Float[Tensor, ""]]]:
        """Return (cross entropy over images whose class is known, its parts)."""
        known = (target != IGNORE).sum().clamp(min=1)
        entropy = F.cross_entropy(logits.float(), target, ignore_index=IGNORE, reduction="sum") / known
        return entropy, {"cross_entropy": entropy.detach()}
