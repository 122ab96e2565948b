"""Patch embedding and pixel prediction for any set of channels, by combination of shared basis filters.

The weights of channel c are `sum_k a_k(c) * basis_k`, where the coefficients come from the channel's physics
(`channels.ChannelCodes`): any set, order or number of channels, at one token a patch. For a fixed list of channels the
combination is a plain weight, so `fold` gives the kernel of an ordinary convolution, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from geomed_mae.image import Channel
from geomed_mae.models.channels import ChannelCodes, blend, with_spare
from geomed_mae.models.spec import ModelSpec

HEAD_STD = 0.02
"""Initial scale of prediction filters: predictions start near zero, the mean of every normalised target."""


def geometry_name(patch: Sequence[int]) -> str:
    """Return "2d" or "3d", the key under which filters for such patches are stored."""
    return f"{len(patch)}d"


def _patches(spec: ModelSpec) -> dict[str, int]:
    """Return the number of pixels of a patch per geometry that the model supports."""
    return {geometry_name(patch): math.prod(patch) for patch in (spec.patch_2d, spec.patch_3d) if patch is not None}


def mixed(coefficients: Float[Tensor, "c k"], filters: Float[Tensor, "k ..."]) -> Float[Tensor, "c ..."]:
    """Return each channel's combination of the shared filters, in fp32 whatever autocast says.

    The rounding of a coefficient to bf16 is an error of all weights in one direction: it made the gradients' error
    nearly three times that of a model with weights of its own, while the products cost next to nothing.
    """
    with torch.autocast(filters.device.type, enabled=False):
        return torch.einsum("ck,k...->c...", coefficients, filters)


class ChannelPatchEmbed(nn.Module):
    """Patches of any channels to tokens: `sum_c <pixels_c, W_c> / sqrt(channels) + bias`.

    The division keeps the variance of a token at 1 for independent channels of unit variance, for any number of them.
    (Correlated channels add up more, by the product of the pixels' correlation and the codes'.)
    """

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.spec = spec
        self.codes = ChannelCodes(spec.basis)
        self.filters = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(spec.basis, pixels, spec.dim) / math.sqrt(pixels))
                for name, pixels in _patches(spec).items()
            }
        )
        self.bias = nn.ParameterDict({name: nn.Parameter(torch.zeros(spec.dim)) for name in _patches(spec)})

    def weights(self, channels: Sequence[Channel], patch: Sequence[int]) -> Float[Tensor, "c p d"]:
        """Return the weights of each channel before the division by sqrt(channels)."""
        return mixed(self.codes(channels), self.filters[geometry_name(patch)])

    def forward(
        self,
        patches: Float[Tensor, "b n c p"],
        channels: Sequence[Channel],
        patch: Sequence[int],
        shown: Bool[Tensor, "b c"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Embed patches (normalised, 0 where invalid); channels not `shown` are as if they were not there."""
        weight = self.weights(channels, patch)
        if shown is None:
            scale: float | Tensor = len(channels) ** -0.5
        else:
            patches = torch.where(shown[:, None, :, None], patches, torch.zeros_like(patches))
            scale = shown.sum(1).clamp(min=1).rsqrt()[:, None, None]
        return patches.flatten(2) @ weight.flatten(0, 1) * scale + self.bias[geometry_name(patch)]

    def fold(
        self, channels: Sequence[Channel], patch: Sequence[int]
    ) -> tuple[Float[Tensor, "d c *patch"], Float[Tensor, " d"]]:
        """Return kernel and bias of the convolution (stride = patch) that embeds exactly these channels."""
        weight = self.weights(channels, patch) * len(channels) ** -0.5
        return weight.permute(2, 0, 1).reshape(-1, len(channels), *patch), self.bias[geometry_name(patch)]

    @torch.no_grad()
    def load_kernel(
        self,
        channels: Sequence[Channel],
        weight: Float[Tensor, "d c *patch"],
        bias: Float[Tensor, " d"],
        others: Sequence[Sequence[Channel]] = (),
    ) -> None:
        """Take over the kernel of a fixed-channel ViT (such as an RGB MAE): for `channels`, `fold` returns it again.

        Its filters become the first basis filters; the others stay as they are, for channels that it did not have.

        `others` (one sequence an image) start from these filters too: an image of C channels gives each of them
        `c / C` times the kernel that `channels.blend` mixes. With that factor, timm's own where it changes a model's
        number of channels, an image whose C channels all show the same is embedded like one whose c channels do; the
        bands of a scene are nearer to that than to independence. One or two channels may get less, as no channel's
        coefficients exceed unit length. The next basis filter becomes zeros, which take up the rest of that length.

        Args:
            channels: of the kernel.
            weight: of the convolution (stride = patch).
            bias: of the convolution.
            others: channels that follow; those with the physics of one of `channels` are that one.

        Raises:
            ConfigError: more channels than basis filters; none left for the zeros that `others` need.
        """
        name = geometry_name(weight.shape[2:])
        rows = None
        if others:
            shares = torch.cat([_at_most_unit(blend(channels, image), len(channels) / len(image)) for image in others])
            rows = with_spare(shares, self.spec.basis)
        self.codes.pin(channels, others, rows)
        if others:
            self.filters[name][len(channels)] = 0
        own = weight.flatten(2).permute(1, 2, 0)  # c p d
        self.filters[name][: len(channels)] = own * math.sqrt(len(channels))
        self.bias[name].copy_(bias)


def _at_most_unit(shares: Float[Tensor, "n k"], ratio: float) -> Float[Tensor, "n k"]:
    """Scale shares by the square root of `ratio`, and down to unit length where they exceed it."""
    scaled = shares * math.sqrt(ratio)
    return scaled / scaled.norm(dim=1, keepdim=True).clamp(min=1)


class ChannelHeads(nn.Module):
    """Tokens to each channel's pixels, mean and log standard deviation: the patch embedding's counterpart."""

    def __init__(self, spec: ModelSpec) -> None:
        super().__init__()
        self.codes = ChannelCodes(spec.basis)
        outputs = {name: pixels + 2 for name, pixels in _patches(spec).items()}
        self.filters = nn.ParameterDict(
            {
                name: nn.Parameter(torch.randn(spec.basis, size, spec.decoder_dim) * HEAD_STD)
                for name, size in outputs.items()
            }
        )
        self.bias = nn.ParameterDict(
            {name: nn.Parameter(torch.zeros(spec.basis, size)) for name, size in outputs.items()}
        )

    def forward(
        self, tokens: Float[Tensor, "b h d"], channels: Sequence[Channel], patch: Sequence[int]
    ) -> Float[Tensor, "b h c p+2"]:
        """Predict per channel: the p (normalised) pixels of the patch, then its mean and its log standard deviation."""
        name = geometry_name(patch)
        coefficients = self.codes(channels)
        weight = mixed(coefficients, self.filters[name])
        bias = mixed(coefficients, self.bias[name])
        flat = tokens @ weight.flatten(0, 1).T + bias.flatten()
        return flat.unflatten(-1, bias.shape)

    @torch.no_grad()
    def load_kernel(
        self,
        channels: Sequence[Channel],
        weight: Float[Tensor, "c p d"],
        bias: Float[Tensor, "c p"],
        *,
        axes: int,
        others: Sequence[Sequence[Channel]] = (),
    ) -> None:
        """Take over the pixel predictions of a fixed-channel decoder; `others` start from its blended predictions.

        Arguments and errors as `ChannelPatchEmbed.load_kernel`; no factor, as each channel is predicted by itself.
        """
        name, pixels = f"{axes}d", weight.shape[1]
        rows = None
        if others:
            rows = with_spare(torch.cat([blend(channels, image) for image in others]), len(self.filters[name]))
        self.codes.pin(channels, others, rows)
        if others:
            self.filters[name][len(channels), :pixels] = 0
            self.bias[name][len(channels), :pixels] = 0
        self.filters[name][: len(channels), :pixels] = weight
        self.bias[name][: len(channels), :pixels] = bias
