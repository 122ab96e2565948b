"""Plain networks for one list of channels: all that a target with a graph of its own can hold.

The channel-flexible patch embedding folds into one convolution and positions into tables, exactly; the blocks are the
encoder's own. Nothing but tensors decides what is computed, so that torch.export and ONNX take these modules as they
are. Every pixel is taken as valid; only NaN and infinities are read as the channel's centre, 0 in model units.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn

from geomed_mae.errors import ConfigError
from geomed_mae.exporters.request import Request
from geomed_mae.heads import HeadInputs
from geomed_mae.models.contract import ChannelContract
from geomed_mae.models.positions import sincos
from geomed_mae.models.vit import Encoder

MOST_PATCHES = 1024
"""Patches along an axis that a model of any size takes: 16,384 pixels with patches of 16."""

CONVOLUTIONS = {2: nn.Conv2d, 3: nn.Conv3d}


class FixedEncoder(nn.Module):
    """The encoder of a request: normalised pixels of its channels in, tokens out.

    Attributes:
        patch: pixels or voxels of a patch per axis; sizes are multiples of it.
        layers: blocks whose maps `maps` gives.
    """

    def __init__(self, request: Request, *, dynamic: bool = False) -> None:
        """Fold the encoder.

        Args:
            request: whose channels, size and spacing.
            dynamic: take any size that is a multiple of the patch, up to MOST_PATCHES patches an axis.

        Raises:
            ConfigError: `dynamic` for an encoder with a learned table of positions.
        """
        super().__init__()
        module = _on_cpu(request.encoder.module)
        axes, patch = len(request.size), request.patch
        if dynamic and request.learned:
            raise ConfigError(
                f"this encoder has learned positions of a grid of {list(module.spec.learned_positions)} patches, which "
                "other sizes resample: its export is for one size"
            )
        self.patch, self.layers = patch, request.layers
        with torch.no_grad():
            weight, bias = module.patch_embed.fold(request.channels, patch)
            self.embed = CONVOLUTIONS[axes](len(request.entries), module.spec.dim, patch, stride=patch)
            self.embed.weight.copy_(weight)
            self.embed.bias.copy_(bias)
        self.cls_token = copy.deepcopy(module.cls_token)
        self.positions = AnyPositions(request) if dynamic else TablePositions(request, module)
        self.blocks = copy.deepcopy(module.blocks)
        self.norm = copy.deepcopy(module.norm)
        self.float().eval().requires_grad_(False)

    def forward(self, pixels: Float[Tensor, "b c *size"]) -> Float[Tensor, "b 1+n d"]:
        """Return normalised tokens, class token first, then the patches in row-major order."""
        return self.run(pixels)[0]

    def maps(self, pixels: Float[Tensor, "b c *size"]) -> tuple[Float[Tensor, "b d *grid"], ...]:
        """Return the maps of the blocks `layers`, each normalised."""
        return self.run(pixels)[1]

    def run(
        self, pixels: Float[Tensor, "b c *size"]
    ) -> tuple[Float[Tensor, "b 1+n d"], tuple[Float[Tensor, "b d *grid"], ...]]:
        """Return tokens and maps of one pass."""
        patches = self.embed(pixels)  # b d *grid
        grid = patches.shape[2:]
        x = patches.flatten(2).transpose(1, 2) + self.positions(grid)
        x = torch.cat([self.cls_token.expand(pixels.shape[0], -1, -1), x], dim=1)
        found = {}
        for number, block in enumerate(self.blocks):
            x = block(x)
            if number in self.layers:
                found[number] = self.norm(x)[:, 1:].transpose(1, 2).reshape(pixels.shape[0], -1, *grid)
        return self.norm(x), tuple(found[number] for number in self.layers)


class TablePositions(nn.Module):
    """Positions of one grid: the encoder's own table."""

    def __init__(self, request: Request, module: Encoder) -> None:
        super().__init__()
        spacing = None if request.spacing is None else torch.tensor([request.spacing], dtype=torch.float64)
        with torch.no_grad():
            table = module.positions(request.grid, request.channels, spacing)
        self.register_buffer("table", table.detach().clone())

    def forward(self, grid: Sequence[int]) -> Float[Tensor, "1 n d"]:
        """Return the table; another grid fails where it is added."""
        return self.table


class AnyPositions(nn.Module):
    """Sines and cosines of any grid, from one line of codes per axis; number by number those of `position_table`."""

    def __init__(self, request: Request) -> None:
        super().__init__()
        width, axes = request.encoder.spec.dim, len(request.size)
        self.part, self.axes = width // axes // 2 * 2, axes
        self.rest = width - self.part * axes
        reference = request.encoder.spec.reference(request.channels, axes)
        for axis in range(axes):
            ratio = 1.0 if request.spacing is None or reference is None else request.spacing[axis] / reference[axis]
            line = sincos(torch.arange(MOST_PATCHES, dtype=torch.float64) * ratio, self.part)
            self.register_buffer(f"line{axis}", line.float())

    def forward(self, grid: Sequence[int]) -> Float[Tensor, "1 n d"]:
        """Return the codes of all patches in row-major order."""
        codes = []
        for axis in reversed(range(self.axes)):
            line = getattr(self, f"line{axis}")[: grid[axis]]
            shape = [1] * axis + [grid[axis]] + [1] * (self.axes - axis - 1)
            codes.append(line.reshape(*shape, self.part).expand(*grid, self.part))
        if self.rest:
            codes.append(torch.zeros(self.rest).expand(*grid, self.rest))
        return torch.cat(codes, dim=-1).flatten(0, -2)[None]


class Scaling(nn.Module):
    """Values as the model is fed to model units: clip, `(value - center) / scale`; NaN and infinities to 0.

    Channels that are scaled by their image's own statistics come scaled already and pass unchanged.
    """

    def __init__(self, entries: Sequence[ChannelContract], axes: int) -> None:
        super().__init__()
        most = torch.finfo(torch.float32).max
        fixed = [entry.method != "image" for entry in entries]
        ranges = [
            entry.value_range if use and entry.value_range is not None else (-most, most)
            for entry, use in zip(entries, fixed, strict=True)
        ]
        pairs = [(entry.center, entry.scale) if use else (0.0, 1.0) for entry, use in zip(entries, fixed, strict=True)]
        shape = (1, len(entries), *[1] * axes)
        columns = {
            "low": [low for low, _ in ranges],
            "high": [high for _, high in ranges],
            "center": [center for center, _ in pairs],
            "scale": [scale for _, scale in pairs],
        }
        self.clips = any(entry.value_range is not None and use for entry, use in zip(entries, fixed, strict=True))
        self.scales = any(fixed)
        for name, values in columns.items():
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).reshape(shape))

    def forward(self, raw: Float[Tensor, "b c *size"]) -> Float[Tensor, "b c *size"]:
        """Return model units."""
        values = raw
        if self.clips:
            values = torch.minimum(torch.maximum(values, self.low), self.high)
        if self.scales:
            values = (values - self.center) / self.scale
        return torch.where(torch.isfinite(raw), values, torch.zeros_like(values))


class PhysicalEncoder(nn.Module):
    """Values as the model is fed in; the token grid and its mean out."""

    def __init__(self, request: Request, *, dynamic: bool = False) -> None:
        """Build it; arguments and errors as FixedEncoder."""
        super().__init__()
        self.scaling = Scaling(request.entries, len(request.size))
        self.encoder = FixedEncoder(request, dynamic=dynamic)

    def forward(self, raw: Float[Tensor, "b c *size"]) -> tuple[Float[Tensor, "b d *grid"], Float[Tensor, "b d"]]:
        """Return the last block's normalised patch tokens on their grid, and their mean."""
        features = self.encoder.maps(self.scaling(raw))[-1]
        return features, features.flatten(2).mean(dim=2)


class FixedTask(nn.Module):
    """Values as the model is fed in; class probabilities out."""

    def __init__(self, request: Request, *, dynamic: bool = False) -> None:
        """Build it; arguments and errors as FixedEncoder.

        Raises:
            ConfigError: there is no task model in the request.
        """
        super().__init__()
        if request.task is None:
            raise ConfigError(
                "this target takes a fine-tuned model, and an encoder has no head; give a run of finetune"
            )
        self.scaling = Scaling(request.entries, len(request.size))
        self.encoder = FixedEncoder(request, dynamic=dynamic)
        self.head = copy.deepcopy(request.task.head).cpu().float().eval().requires_grad_(False)
        self.multi_label = request.task.spec.head.multi_label

    def forward(self, raw: Float[Tensor, "b c *size"]) -> Float[Tensor, "b class *space"]:
        """Return probabilities: (b, class, *size) to segment, (b, class) to classify.

        They sum to 1 over the classes; where an image may have several, each is a probability of its own.
        """
        pixels = self.scaling(raw)
        maps = self.encoder.maps(pixels)
        token_valid = torch.ones_like(maps[-1][:, 0], dtype=torch.bool)
        logits = self.head(HeadInputs(maps, token_valid, pixels, torch.ones_like(pixels, dtype=torch.bool)))
        return logits.sigmoid() if self.multi_label else logits.softmax(dim=1)


def fixed(request: Request, *, dynamic: bool = False) -> FixedTask | PhysicalEncoder:
    """Return the network of a request: the task model's where there is one, else the encoder's."""
    return (PhysicalEncoder if request.task is None else FixedTask)(request, dynamic=dynamic)


def parameters(module: nn.Module) -> int:
    """Return the number of weights of a network, fixed tables not counted."""
    return sum(math.prod(parameter.shape) for parameter in module.parameters())


def _on_cpu(module: Encoder) -> Encoder:
    """Return the encoder, or a copy of it on the CPU in fp32, where graphs are made and compared."""
    weights = module.cls_token
    if weights.device.type == "cpu" and weights.dtype == torch.float32:
        return module
    return copy.deepcopy(module).cpu().float()
