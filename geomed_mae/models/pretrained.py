"""PretrainedEncoder: an encoder in use. Images in physical units go in, vectors and token grids come out."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from geomed_mae.errors import ConfigError
from geomed_mae.image import Geometry, Image, PlaneGeometry, RasterGeometry, VolumeGeometry
from geomed_mae.models.contract import Contract
from geomed_mae.models.opening import image_of
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.streaming import Scene, Stream, TileMeans
from geomed_mae.models.vit import Encoder

if TYPE_CHECKING:
    from geomed_mae.archives.seen import Seen
    from geomed_mae.models.foreign.fixed import FixedViT


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

    @property
    def digest(self) -> str:
        """SHA-256 of weights, shape and contract: the same for the same numbers out of the same image."""
        found = hashlib.sha256(f"{self.spec.to_json()}\n{self.contract.to_json()}\n".encode())
        for name, tensor in sorted(self.module.state_dict().items()):
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            found.update(tensor.detach().cpu().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes())
        return found.hexdigest()

    def __repr__(self) -> str:
        known = ", ".join(sorted({entry.modality for entry in self.contract.channels}))
        return f"PretrainedEncoder(dim {self.spec.dim}, depth {self.spec.depth}, {known})"

    def embed(
        self,
        image: Image | str | os.PathLike[str],
        *,
        channels: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> np.ndarray:
        """Return one vector (dim,), the mean of all valid patch tokens.

        Args:
            image: in the physical units of the contract; or the path of one, a raw file or the folder of a series or
                product, which is read as one of the contract's modalities.
            channels: names of channels to use; None takes all, and then an instrument's channels must be complete.
            layers: blocks to read out, from 0 or negative from the end, such as `read_out("several", spec.depth)`;
                the vector is then (number of layers * dim,). None is the last block.

        Raises:
            ConfigError: a modality, channel or unit outside the contract, no patch with enough valid area, or a path
                that holds more than one image.
            ReadError, TooManyBadInputsError: the path holds nothing that can be read; the message says why.
        """
        image = self.checked(image_of(image, self.contract), channels)
        means = TileMeans(self.spec.dim * len(layers or (-1,)))
        whole = [done for window in self.stream(Scene.of_image(image), layers=layers) if (done := means.add(window))]
        vector, _ = whole[0]
        if vector is None:
            raise ConfigError(f"image '{image.key}' has no patch with enough valid area to embed")
        return vector

    def features(
        self,
        image: Image | str | os.PathLike[str],
        *,
        channels: Sequence[str] | None = None,
        layers: Sequence[int] | None = None,
    ) -> FeatureGrid:
        """Return the grid of tokens of an image, ceil(size / patch) of them along each axis.

        Images larger than the pretraining crop are cut into such crops, without overlap, and positions count from each
        crop's corner: the encoder has never seen others. Arguments and errors as `embed`.
        """
        image = self.checked(image_of(image, self.contract), channels)
        array = np.full(
            (self.spec.dim * len(layers or (-1,)), *self.token_shape(image.spatial_shape)), np.nan, dtype=np.float32
        )
        patch = self.spec.patch(len(image.spatial_shape))
        for window in self.stream(Scene.of_image(image), layers=layers):
            if window.tokens is not None:
                place = [slice(start // step, None) for start, step in zip(window.corner, patch, strict=True)]
                view = array[(slice(None), *place)]
                inside = tuple(
                    slice(0, min(have, got)) for have, got in zip(view.shape, window.tokens.shape, strict=True)
                )
                view[inside] = window.tokens[inside]
        return FeatureGrid(array, token_geometry(image.geometry, patch))

    def stream(self, scene: Scene, *, layers: Sequence[int] | None = None, tile: int | None = None) -> Stream:
        """Return the windows of an image that is read in parts, of any size, with their tokens; see `Stream`.

        Args:
            scene: the image, with the channels to use, all of them known to the contract (`checked`).
            layers: as `embed`.
            tile: side of the tiles in pixels; None takes the whole image as one.

        Raises:
            ConfigError: a modality, channel or unit outside the contract.
        """
        return Stream(self.module, self.contract, scene, layers or (-1,), tile=tile)

    def token_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the grid of tokens of an image of spatial `shape`."""
        return tuple(-(-size // step) for size, step in zip(shape, self.spec.patch(len(shape)), strict=True))

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
