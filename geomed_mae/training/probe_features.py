"""What a probe reads out of an image: features of the encoder, and of the floors that any encoder must beat.

    encoder, encoder_several_layers     the last block, and three blocks side by side, of which it is the last
    floor_random_weights[_several_...]  the same network with random weights, read out in the same two ways
    floor_random_convolutions           random convolutional features (`models.random_features`)
    floor_patch_statistics              statistics of the patch's own pixels (label maps)
    floor_image_statistics              statistics of the image's own pixels (classes of images)

All look at the same pixels: the same channels, of valid pixels alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.statistics import summarise
from geomed_mae.errors import ConfigError
from geomed_mae.image import Image
from geomed_mae.models.contract import normalise, scaling
from geomed_mae.models.pretrained import PretrainedEncoder, read_out
from geomed_mae.models.random_features import KERNEL, RandomFeatures
from geomed_mae.models.vit import Encoder
from geomed_mae.training.probing import SEED

ENCODER, RANDOM, CONVOLUTIONS = "encoder", "floor_random_weights", "floor_random_convolutions"
PATCH_STATISTICS, IMAGE_STATISTICS = "floor_patch_statistics", "floor_image_statistics"
FLOOR = "floor_"
SEVERAL = "_several_layers"

PERCENTILES = (5.0, 50.0, 95.0)
"""Of the pixels of a patch."""
IMAGE_PERCENTILES = (1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0)
"""Of the pixels of an image."""
CUT_OUTS = 4096
"""Cut-outs of the training images that random filters are drawn from."""
CUT_OUT_IMAGES = 256
"""Images that these come from."""


@dataclass(frozen=True, slots=True, eq=False)
class Pixels:
    """An image in model units: `values` float32 (c, *space), exactly 0 where invalid, `valid` bool (*space)."""

    values: np.ndarray
    valid: np.ndarray


class Sources:
    """The encoder and its floors over one choice of channels.

    Attributes:
        model: the encoder.
        channels: names of the channels that are used; None takes all.
    """

    def __init__(
        self,
        model: PretrainedEncoder,
        index: Index,
        train: Sequence[Row],
        channels: Sequence[str] | None = None,
    ) -> None:
        """Draw random weights, and random filters from images of `train` (at most CUT_OUT_IMAGES are read)."""
        self.model, self.channels = model, channels
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            module = Encoder(model.spec)
        self._random = PretrainedEncoder(module.to(model.module.cls_token.device), model.contract)
        self._layers = read_out("several", model.spec.depth)
        self._filters = self._drawn(index, train)

    def _drawn(self, index: Index, train: Sequence[Row]) -> RandomFeatures:
        chosen = [train[number * len(train) // CUT_OUT_IMAGES] for number in range(CUT_OUT_IMAGES)]
        rows = list({row.key: row for row in chosen}.values())
        rng = np.random.default_rng(SEED)
        each = -(-CUT_OUTS // len(rows))
        found = [cut_outs(self.pixels(index.read(row.key)), each, rng) for row in rows]
        stacked = np.concatenate(found)
        if not len(stacked):
            raise ConfigError(
                f"none of {len(rows)} images has {KERNEL} valid pixels beside one another, so there is nothing to probe"
            )
        return RandomFeatures.of_data(torch.from_numpy(stacked[rng.permutation(len(stacked))]))

    def pixels(self, image: Image) -> Pixels:
        """Return the pixels that the encoder sees, as it sees them."""
        image = self.model.checked(image, self.channels)
        entries = self.model.contract.entries(image.modality, image.channels)
        center, scale, _ = scaling(entries, summarise(image.array, image.valid))
        valid = np.broadcast_to(image.valid, image.array.shape)
        raw, seen, center, scale = (torch.from_numpy(part.copy())[None] for part in (image.array, valid, center, scale))
        values = normalise(raw, seen, center, scale, [entry.value_range for entry in entries])
        return Pixels(values[0].numpy(), valid.all(axis=0))

    def dense(self, image: Image) -> dict[str, np.ndarray]:
        """Return by name float32 (features, *token grid), NaN where a patch is not valid; see `with_last`."""
        found = self._encoded(image)
        pixels = self.pixels(image)
        patch = self.model.spec.patch(pixels.valid.ndim)
        values, valid = torch.from_numpy(pixels.values), torch.from_numpy(pixels.valid)
        found[CONVOLUTIONS] = self._filters.grid(values, valid, patch)
        found[PATCH_STATISTICS] = patch_statistics(pixels, patch)
        return found

    def whole(self, image: Image) -> dict[str, np.ndarray] | None:
        """Return by name float32 (features,), see `with_last`; None where no patch has enough valid area."""
        grids = self._encoded(image)
        found = {}
        for name, grid in grids.items():
            kept = np.isfinite(grid[0])
            if not kept.any():
                return None
            found[name] = grid[:, kept].mean(axis=1, dtype=np.float64).astype(np.float32)
        pixels = self.pixels(image)
        values, valid = torch.from_numpy(pixels.values), torch.from_numpy(pixels.valid)
        found[CONVOLUTIONS] = self._filters.vector(values, valid)
        selected = image if self.channels is None else image.select(tuple(self.channels))
        found[IMAGE_STATISTICS] = np.concatenate(
            [image_statistics(selected.array, pixels.valid), image_statistics(pixels.values, pixels.valid)]
        )
        return found if all(np.isfinite(vector).all() for vector in found.values()) else None

    def _encoded(self, image: Image) -> dict[str, np.ndarray]:
        found = {}
        for name, encoder in ((ENCODER, self.model), (RANDOM, self._random)):
            several = encoder.features(image, channels=self.channels, layers=self._layers).array
            found[f"{name}{SEVERAL}"] = several
        return found

    def with_last(self, rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return features (n, f) with those of the last block beside those of several, of which they are the end: a
        view, because there may be 100,000 images.
        """
        found = {}
        for name, features in rows.items():
            if name.endswith(SEVERAL):
                found[name.removesuffix(SEVERAL)] = features[:, -self.model.spec.dim :]
            found[name] = features
        return found


def cut_outs(pixels: Pixels, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return up to `count` cut-outs (n, c, *kernel) at random places of an image where all pixels are valid."""
    space = pixels.valid.shape
    if min(space) < KERNEL:
        return np.zeros((0, len(pixels.values), *(KERNEL,) * len(space)), dtype=np.float32)
    found = []
    for _ in range(count):
        corner = [int(rng.integers(0, size - KERNEL + 1)) for size in space]
        window = tuple(slice(start, start + KERNEL) for start in corner)
        if pixels.valid[window].all():
            found.append(pixels.values[(slice(None), *window)])
    shape = (0, len(pixels.values), *(KERNEL,) * len(space))
    return np.stack(found) if found else np.zeros(shape, dtype=np.float32)


def image_statistics(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Return mean, standard deviation and percentiles of the valid pixels of each channel of (c, *space), float32."""
    if not valid.any():
        return np.full(len(values) * (2 + len(IMAGE_PERCENTILES)), np.nan, dtype=np.float32)
    seen = values[:, valid].astype(np.float64)
    parts = [seen.mean(axis=1), seen.std(axis=1), *np.percentile(seen, IMAGE_PERCENTILES, axis=1)]
    return np.concatenate(parts).astype(np.float32)


def patch_statistics(pixels: Pixels, patch: Sequence[int]) -> np.ndarray:
    """Return mean, standard deviation and percentiles of each channel and patch, float32 (features, *grid); NaN where
    any of a patch's values is not valid.
    """
    values = np.where(pixels.valid, pixels.values, np.nan)
    missing = [(-size) % step for size, step in zip(values.shape[1:], patch, strict=True)]
    # Patches that reach over the border repeat its last pixel, for they are valid in part.
    values = np.pad(values, [(0, 0), *((0, amount) for amount in missing)], mode="edge")
    grid = [size // step for size, step in zip(values.shape[1:], patch, strict=True)]
    split = values.reshape(len(values), *(size for pair in zip(grid, patch, strict=True) for size in pair))
    inner = tuple(range(2, split.ndim, 2))
    parts = [split.mean(axis=inner), split.std(axis=inner), *np.percentile(split, PERCENTILES, axis=inner)]
    return np.concatenate(parts).astype(np.float32)


def same_channels(rows: Sequence[Row], channels: Sequence[str]) -> None:
    """Refuse images that a probe cannot compare: other channels, or planes beside volumes.

    Raises:
        ConfigError: with the channels that all images have.
    """
    if len({len(row.shape) for row in rows}) > 1:
        flat = sum(len(row.shape) == 2 for row in rows)
        raise ConfigError(
            f"{flat} of the labelled images are planes and {len(rows) - flat} are volumes; probe them one after another"
        )
    names = [tuple(channel.name for channel in row.channels) for row in rows]
    if not channels and len(set(names)) > 1:
        shared = [name for name in names[0] if all(name in have for have in names)]
        way = (
            f"use those that all have with --channels {','.join(shared)}" if shared else "probe them one after another"
        )
        raise ConfigError(f"the labelled images have {len(set(names))} different sets of channels; {way}")
