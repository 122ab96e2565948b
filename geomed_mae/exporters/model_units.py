"""Networks that are fed in model units, for targets that say in their own terms how values become these."""

from __future__ import annotations

from dataclasses import replace

from jaxtyping import Float
from torch import Tensor, nn

from geomed_mae.exporters.fixed import FixedTask, PhysicalEncoder, fixed
from geomed_mae.exporters.request import Request


def unscaled(request: Request) -> Request:
    """Return the request with channels that are in model units already: nothing is clipped or scaled."""
    entries = tuple(
        replace(entry, method="fixed", center=0.0, scale=1.0, value_range=None) for entry in request.entries
    )
    return replace(request, entries=entries)


def in_model_units(request: Request) -> FixedTask | PhysicalEncoder:
    """Return the network of a request without the clipping and scaling; NaN is still 0.

    Raises:
        ConfigError: as `fixed.fixed`.
    """
    return fixed(unscaled(request))


class AxesReversed(nn.Module):
    """A network for arrays (b, c, x, y[, z]), the axes of NIfTI and MONAI, around one for (b, c, [z,] y, x)."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Float[Tensor, "b c *reversed"]) -> Float[Tensor, "b class *reversed"]:
        """Return the network's answer, its spatial axes reversed too."""
        axes = (0, 1, *range(pixels.ndim - 1, 1, -1))
        answer = self.network(pixels.permute(axes))
        return answer.permute(axes) if answer.ndim == pixels.ndim else answer


def reversed_axes(pixels: Float[Tensor, "b c *space"]) -> Float[Tensor, "b c *reversed"]:
    """Return an array with its spatial axes reversed; one without spatial axes as it is."""
    return pixels.permute(0, 1, *range(pixels.ndim - 1, 1, -1)).contiguous()
