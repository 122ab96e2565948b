"""The exponential moving average of the weights (Polyak and Juditsky 1992; as in timm's ModelEmaV3)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from geomed_mae.training.parallel import placed_like


class Average:
    """A shadow, in fp32, of every parameter that is trained: shadow <- d shadow + (1 - d) parameter after each step.

    d is the decay, but at most (1 + n) / (10 + n) at update n, so that short runs do not keep their random start.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self._live = {name: value for name, value in module.named_parameters() if value.requires_grad}
        self.shadow = {name: value.detach().float().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self, number: int) -> None:
        """Take in the parameters as update `number` (0 is the first) has left them."""
        decay = min(self.decay, (1 + number) / (10 + number))
        for name, shadow in self.shadow.items():
            shadow.lerp_(self._live[name].detach().float(), 1 - decay)

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from the shadow of a checkpoint.

        Raises:
            KeyError: a parameter is missing there.
        """
        for name, shadow in self.shadow.items():
            shadow.copy_(placed_like(tensors[name], shadow))
