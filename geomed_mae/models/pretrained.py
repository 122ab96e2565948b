"""PretrainedEncoder: an encoder in use. Images in physical units go in, vectors and token grids come out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from geomed_mae.archives.statistics import summarise
from geomed_mae.errors import ConfigError
from geomed_mae.image import Geometry, Image, PlaneGeometry, RasterGeometry, VolumeGeometry
from geomed_mae.models.contract import Contract, normalise, scaling
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder

if TYPE_CHECKING:
    from geomed_mae.archives.seen import Seen
    from geomed_mae.models.foreign.fixed import FixedViT

WINDOWS_PER_PASS = 16
"""Windows that go through the encoder together; bounds memory, and with it nothing else."""


@dataclass(frozen=True, slots=True, eq=False)
class FeatureGrid:
    """Tokens of an image with their own place in space.

    Attributes:
        array: float32 (dim, [z,] y, x); NaN where a patch has too little valid area.
        geometry: of the tokens: a raster's transform refers to a token's upper left corner, a volume's affine to its
            centre, as everywhere in this package.
    """

    array: np.ndarray
    geometry: Geometry

    @property
    def shape(self) -> tuple[int, ...]:
        """(dim, [z,] y, x)."""
        return self.array.shape

    def __array__(self, dtype: np.dtype | None = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.array, dtype=dtype, copy=copy)

    @property
    def valid(self) -> np.ndarray:
        """Bool ([z,] y, x): tokens that mean something."""
        return np.isfinite(self.array[0])


READ_OUTS = ("last", "several")


def read_out(name: str, depth: int) -> tuple[int, ...]:
    """Return the blocks, from 0, that a read-out of READ_OUTS puts side by side: the last, or one at each third.

    Linear probes read more out of `several` (benchmarks/ablations.py), at three times the width.

    Raises:
        ConfigError: there is no such read-out.
    """
    if name not in READ_OUTS:
        raise ConfigError(f"read-out '{name}' is none of {', '.join(READ_OUTS)}")
    return (depth - 1,) if name == "last" else tuple(sorted({-(-depth * part // 3) - 1 for part in (1, 2, 3)}))


def token_geometry(geometry: Geometry, patch: Sequence[int]) -> Geometry:
    """Return the geometry of the grid of patches of an image with `geometry`."""
    if isinstance(geometry, VolumeGeometry):
        affine = geometry.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ ((np.array(patch, dtype=np.float64) - 1) / 2)
        affine[:3, :3] *= np.array(patch, dtype=np.float64)
        return VolumeGeometry(affine, geometry.frame_of_reference)
    rows, columns = patch
    if isinstance(geometry, PlaneGeometry):
        spacing = geometry.spacing_mm
        return PlaneGeometry(None if spacing is None else (spacing[0] * rows, spacing[1] * columns))
    a, b, c, d, e, f = geometry.transform
    gsd = None if geometry.gsd_m is None else (geometry.gsd_m[0] * rows, geometry.gsd_m[1] * columns)
    return RasterGeometry(geometry.crs, (a * columns, b * rows, c, d * columns, e * rows, f), gsd)


class PretrainedEncoder:
    """An encoder with its input contract.

    Attributes:
        module: the network, in evaluation mode.
        contract: what it may be fed.
        spec: its shape.
        origin: the fixed-channel model that it was made from, where it comes from elsewhere; else None.
        seen: what it was pretrained on; None where nothing is recorded, as of models that come from elsewhere.
    """

    def __init__(
        self, module: Encoder, contract: Contract, *, origin: FixedViT | None = None, seen: Seen | None = None
    ) -> None:
        self.module = module.eval()
        self.contract = contract
        self.origin = origin
        self.seen = seen

    @property
    def spec(self) -> ModelSpec:
        """Shape of the network."""
        return self.module.spec

    def __repr__(self) -> str:
        known = ", ".join(sorted({entry.modality for entry in self.contract.channels}))
        return f"PretrainedEncoder(dim {self.spec.dim}, depth {self.spec.depth}, {known})"

    def embed(
        self, image: Image, *, channels: Sequence[str] | None = None, layers: Sequence[int] | None = None
    ) -> np.ndarray:
        """Return one vector (dim,), the mean of all valid patch tokens.

        Args:
            image: in the physical units of the contract.
            channels: names of channels to use; None takes all, and then an instrument's channels must be complete.
            layers: blocks to read out, from 0 or negative from the end, such as `read_out("several", spec.depth)`;
                the vector is then (number of layers * dim,). None is the last block.

        Raises:
            ConfigError: a modality, channel or unit outside the contract, or no patch with enough valid area.
        """
        width = self.spec.dim * len(layers or (-1,))
        total, count = np.zeros(width), 0
        for _, tokens in self._windows(image, channels, layers or (-1,)):
            flat = tokens.reshape(width, -1)
            kept = flat[:, np.isfinite(flat[0])]
            total += kept.sum(axis=1, dtype=np.float64)
            count += kept.shape[1]
        if count == 0:
            raise ConfigError(f"image '{image.key}' has no patch with enough valid area to embed")
        return (total / count).astype(np.float32)

    def features(
        self, image: Image, *, channels: Sequence[str] | None = None, layers: Sequence[int] | None = None
    ) -> FeatureGrid:
        """Return the grid of tokens of an image, ceil(size / patch) of them along each axis.

        Images larger than the pretraining crop are cut into such crops, without overlap, and positions count from each
        crop's corner: the encoder has never seen others. Arguments and errors as `embed`.
        """
        patch = self.spec.patch(len(image.spatial_shape))
        grid = tuple(-(-size // step) for size, step in zip(image.spatial_shape, patch, strict=True))
        array = np.full((self.spec.dim * len(layers or (-1,)), *grid), np.nan, dtype=np.float32)
        for corner, tokens in self._windows(image, channels, layers or (-1,)):
            place = [slice(start // step, None) for start, step in zip(corner, patch, strict=True)]
            view = array[(slice(None), *place)]
            inside = tuple(slice(0, min(have, got)) for have, got in zip(view.shape, tokens.shape, strict=True))
            view[inside] = tokens[inside]
        return FeatureGrid(array, token_geometry(image.geometry, patch))

    def checked(self, image: Image, channels: Sequence[str] | None = None) -> Image:
        """Return the image with the channels that are used, all of them known to the contract.

        Raises:
            ConfigError: as `embed`.
        """
        if channels is None:
            self.contract.require_complete(image.modality, image.channels)
        else:
            missing = sorted(set(channels) - {channel.name for channel in image.channels})
            if missing:
                raise ConfigError(f"the image has no channels {missing}; nothing is ever filled in for them")
            image = image.select(tuple(channels))
        self.contract.entries(image.modality, image.channels)
        return image

    def _crop(self, space: Sequence[int], patch: Sequence[int]) -> tuple[int, ...]:
        """Return the window: the pretraining crop, smaller where the image is, always a multiple of the patch."""
        crop = self.contract.crop_2d if len(space) == 2 else self.contract.crop_3d
        sizes = [-(-size // step) * step for size, step in zip(space, patch, strict=True)]
        return tuple(min(size, limit) for size, limit in zip(sizes, crop or sizes, strict=True))

    @torch.inference_mode()
    def _windows(
        self, image: Image, channels: Sequence[str] | None, layers: Sequence[int]
    ) -> Iterator[tuple[tuple[int, ...], np.ndarray]]:
        """Yield (corner in pixels, tokens (layers * dim, *grid)) of windows with a valid pixel; NaN where not valid."""
        image = self.checked(image, channels)
        entries = self.contract.entries(image.modality, image.channels)
        own = any(entry.method == "image" for entry in entries)
        center, scale, _ = scaling(entries, summarise(image.array, image.valid) if own else None)
        crop = self._crop(image.spatial_shape, self.spec.patch(len(image.spatial_shape)))
        device = self.module.cls_token.device
        valid = np.broadcast_to(image.valid, image.array.shape)
        corners = [
            corner
            for corner in itertools.product(*map(range, [0] * len(crop), image.spatial_shape, crop))
            if _cut(valid, corner, crop).any()
        ]
        for first in range(0, len(corners), WINDOWS_PER_PASS):
            some = corners[first : first + WINDOWS_PER_PASS]
            here = torch.stack([_window(valid, corner, crop) for corner in some]).to(device)
            pixels = normalise(
                torch.stack([_window(image.array, corner, crop) for corner in some]).to(device),
                here,
                torch.from_numpy(center)[None].to(device),
                torch.from_numpy(scale)[None].to(device),
                [entry.value_range for entry in entries],
            )
            spacing = None if image.spacing is None else torch.tensor([image.spacing] * len(some), device=device)
            out = self.module(pixels, here, image.channels, spacing, layers=layers)
            known = out.token_valid.unflatten(-1, out.grid)[:, None]
            maps = torch.where(known, torch.cat(out.maps, dim=1).float(), torch.nan)
            yield from zip(some, maps.cpu().numpy(), strict=True)


def _cut(whole: np.ndarray, corner: Sequence[int], crop: Sequence[int]) -> np.ndarray:
    """Cut what there is of a window out of (c, *space)."""
    return whole[(slice(None), *(slice(start, start + size) for start, size in zip(corner, crop, strict=True)))]


def _window(whole: np.ndarray, corner: Sequence[int], crop: Sequence[int]) -> Shaped[Tensor, "#c *crop"]:
    """Cut a window out of (c, *space), padded with 0 (False) beyond the end."""
    part = _cut(whole, corner, crop)
    gaps = [(0, size - have) for size, have in zip(crop, part.shape[1:], strict=True)]
    return torch.from_numpy(np.pad(part, [(0, 0), *gaps]))
