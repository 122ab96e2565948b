"""Images of any size through an encoder, window by window: memory depends on the window, not on the image.

An image is cut into windows of the pretraining crop, without overlap, and positions count from each window's corner:
the encoder has never seen others. With tiles each tile is cut as an image of its own, so that its tokens are those of
the tile alone. What lies together is read together, in blocks of bounded size, from the first row to the last.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from geomed_mae.archives.statistics import ChannelStatistics, summarise
from geomed_mae.image import Channel, Image
from geomed_mae.models.contract import Contract, normalise, scaling
from geomed_mae.models.vit import Encoder

if TYPE_CHECKING:
    from geomed_mae.archives.index import Row

WINDOWS_PER_PASS = 16
"""Windows that go through the encoder together; bounds memory, and with it nothing else."""
TOKENS_PER_PASS = 16_384
"""Tokens that go through the encoder together; as WINDOWS_PER_PASS, for large windows of small patches."""
VALUES_PER_READ = 1 << 23
"""Values that are read together: 32 MiB as float32, of which a reader holds several copies."""

Place = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Scene:
    """An image that is read in parts.

    Attributes:
        shape: ([slices,] rows, columns).
        channels: what is fed, in order.
        spacing: per spatial axis, metres for rasters, mm for the others; None where unknown.
        read: gives a window (one slice a spatial axis, inside the image) with these channels.
        statistics: gives one entry a channel, over the whole image; asked for only where a channel is scaled by them.
    """

    shape: Place
    modality: str
    channels: tuple[Channel, ...]
    spacing: tuple[float, ...] | None
    read: Callable[[tuple[slice, ...]], Image]
    statistics: Callable[[], Sequence[ChannelStatistics]]

    @classmethod
    def of_image(cls, image: Image) -> Scene:
        """Return an image in memory as a scene."""
        return cls(
            shape=image.spatial_shape,
            modality=image.modality,
            channels=image.channels,
            spacing=image.spacing,
            read=image.crop,
            statistics=lambda: summarise(image.array, image.valid),
        )

    @classmethod
    def of_row(
        cls, row: Row, read: Callable[[tuple[slice, ...]], Image], channels: Sequence[str] | None = None
    ) -> Scene:
        """Return an image of an index as a scene.

        Args:
            row: the image.
            read: gives a window of it with all its channels.
            channels: names of those to feed, all of them there; None takes all.
        """
        names = tuple(channels or (channel.name for channel in row.channels))
        number = {channel.name: at for at, channel in enumerate(row.channels)}
        return cls(
            shape=row.shape,
            modality=row.modality,
            channels=tuple(row.channels[number[name]] for name in names),
            spacing=row.spacing,
            read=lambda window: read(window).select(names),
            statistics=lambda: [row.statistics[number[name]] for name in names],
        )


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """What one window gives.

    Attributes:
        tile: number of its tile along each axis; zeros without tiles.
        corner: its first pixel in the image.
        tokens: float32 (layers * dim, *grid), NaN where a patch has too little valid area; None where no pixel of the
            window is valid.
        valid: number of valid values in it, of all channels.
        last: whether it is the last window of its tile.
    """

    tile: Place
    corner: Place
    tokens: np.ndarray | None
    valid: int
    last: bool


@dataclass(frozen=True, slots=True)
class _Cut:
    """A window along one axis: pixels `start` to `stop`, padded to `size`; `last` of the tile's."""

    tile: int
    start: int
    stop: int
    size: int
    last: bool


def tile_box(tile: Sequence[int], side: int | None, shape: Sequence[int]) -> tuple[slice, ...]:
    """Return the pixels of a tile of `side` pixels; all of the image where it is None."""
    if side is None:
        return tuple(slice(0, size) for size in shape)
    return tuple(slice(at * side, min((at + 1) * side, size)) for at, size in zip(tile, shape, strict=True))


def _cuts(size: int, patch: int, crop: int | None, side: int | None) -> list[_Cut]:
    """Cut an axis into tiles and these into windows, each a multiple of the patch and at most the pretraining crop."""
    found = []
    for tile, begin in enumerate(range(0, size, side or size)):
        end = min(begin + (side or size), size)
        window = -(-(end - begin) // patch) * patch
        window = min(window, crop or window)
        for start in range(begin, end, window):
            found.append(_Cut(tile, start, min(start + window, end), window, start + window >= end))
    return found


def _blocks(axes: Sequence[Sequence[_Cut]], values: int) -> Iterator[list[tuple[_Cut, ...]]]:
    """Yield windows in groups that are read together; each spans at most `values` pixels or is one window."""
    counts = [len(axis) for axis in axes]
    widest = [max(cut.size for cut in axis) for axis in axes]
    for number, axis in enumerate(axes):
        pixels = math.prod(count * size for count, size in zip(counts, widest, strict=True))
        if pixels > values:
            counts[number] = max(1, len(axis) * values // pixels)
    groups = (range(0, len(axis), count) for axis, count in zip(axes, counts, strict=True))
    for firsts in itertools.product(*groups):
        yield list(
            itertools.product(*(axis[at : at + count] for axis, at, count in zip(axes, firsts, counts, strict=True)))
        )


class Stream:
    """Feeds one scene to an encoder.

    Args:
        module: the network, in evaluation mode, on its device.
        contract: knows the scene's modality and channels.
        scene: the image.
        layers: blocks to read out, from 0 or negative from the end.
        tile: side of a tile in pixels along every axis; None makes the whole image one tile.

    Raises:
        ConfigError: a modality, channel or unit outside the contract.
    """

    def __init__(
        self, module: Encoder, contract: Contract, scene: Scene, layers: Sequence[int], *, tile: int | None = None
    ) -> None:
        self.module, self.scene, self.layers = module, scene, layers
        entries = contract.entries(scene.modality, scene.channels)
        own = any(entry.method == "image" for entry in entries)
        self.center, self.scale, _ = scaling(entries, scene.statistics() if own else None)
        self.ranges = [entry.value_range for entry in entries]
        patch = module.spec.patch(len(scene.shape))
        crop = (contract.crop_2d if len(scene.shape) == 2 else contract.crop_3d) or (None,) * len(patch)
        self.axes = [_cuts(*of_axis, tile) for of_axis in zip(scene.shape, patch, crop, strict=True)]

    def __len__(self) -> int:
        """Return the number of windows."""
        return math.prod(map(len, self.axes))

    def __iter__(self) -> Iterator[Window]:
        """Yield the windows, tile rows in order; ReadError where the image no longer decodes."""
        for block in _blocks(self.axes, VALUES_PER_READ // len(self.scene.channels)):
            origin = tuple(cut.start for cut in block[0])
            image = self.scene.read(
                tuple(slice(first.start, last.stop) for first, last in zip(block[0], block[-1], strict=True))
            )
            valid = np.broadcast_to(image.valid, image.array.shape)
            done: dict[Place, np.ndarray] = {}
            counts: dict[Place, int] = {}
            by_size: dict[Place, list[tuple[_Cut, ...]]] = defaultdict(list)
            for window in block:
                corner = tuple(cut.start for cut in window)
                counts[corner] = int(np.count_nonzero(_cut(valid, window, origin)))
                if counts[corner]:
                    by_size[tuple(cut.size for cut in window)].append(window)
            for some in by_size.values():
                done |= dict(self._encoded(image.array, valid, origin, some))
            # In the order of the image, whatever was computed together.
            for window in block:
                corner = tuple(cut.start for cut in window)
                tile, last = tuple(cut.tile for cut in window), all(cut.last for cut in window)
                yield Window(tile, corner, done.pop(corner, None), counts[corner], last)

    @torch.inference_mode()
    def _encoded(
        self, array: np.ndarray, valid: np.ndarray, origin: Place, windows: Sequence[tuple[_Cut, ...]]
    ) -> Iterator[tuple[Place, np.ndarray]]:
        """Yield (corner, tokens) of windows of one size."""
        device = self.module.cls_token.device
        patch = self.module.spec.patch(len(origin))
        tokens = math.prod(cut.size // step for cut, step in zip(windows[0], patch, strict=True))
        together = max(1, min(WINDOWS_PER_PASS, TOKENS_PER_PASS // tokens))
        center, scale = (torch.from_numpy(part)[None].to(device) for part in (self.center, self.scale))
        for first in range(0, len(windows), together):
            some = windows[first : first + together]
            here = torch.stack([_padded(valid, window, origin) for window in some]).to(device)
            raw = torch.stack([_padded(array, window, origin) for window in some]).to(device)
            pixels = normalise(raw, here, center, scale, self.ranges)
            spacing = None
            if self.scene.spacing is not None:
                spacing = torch.tensor([self.scene.spacing] * len(some), device=device)
            out = self.module(pixels, here, self.scene.channels, spacing, layers=self.layers)
            known = out.token_valid.unflatten(-1, out.grid)[:, None]
            maps = torch.where(known, torch.cat(out.maps, dim=1).float(), torch.nan).cpu().numpy()
            yield from zip((tuple(cut.start for cut in window) for window in some), maps, strict=True)


class TileMeans:
    """The mean token of each tile, while windows come in.

    Args:
        width: of a token.
    """

    def __init__(self, width: int) -> None:
        self._width = width
        self._open: dict[Place, tuple[np.ndarray, int, int]] = {}

    def add(self, window: Window) -> tuple[np.ndarray | None, int] | None:
        """Count a window; return (mean token float32 or None without any, valid values) of a tile that is complete."""
        total, count, valid = self._open.pop(window.tile, (np.zeros(self._width), 0, 0))
        valid += window.valid
        if window.tokens is not None:
            flat = window.tokens.reshape(self._width, -1)
            kept = flat[:, np.isfinite(flat[0])]
            total, count = total + kept.sum(axis=1, dtype=np.float64), count + kept.shape[1]
        if not window.last:
            self._open[window.tile] = total, count, valid
            return None
        return ((total / count).astype(np.float32) if count else None), valid


def _cut(whole: np.ndarray, window: Sequence[_Cut], origin: Sequence[int]) -> np.ndarray:
    """Cut what there is of a window out of (c, *space), whose first pixel is `origin` of the image."""
    return whole[(slice(None), *(slice(cut.start - at, cut.stop - at) for cut, at in zip(window, origin, strict=True)))]


def _padded(whole: np.ndarray, window: Sequence[_Cut], origin: Sequence[int]) -> Shaped[Tensor, "#c *crop"]:
    """Cut a window, padded with 0 (False) beyond its end."""
    part = _cut(whole, window, origin)
    gaps = [(0, cut.size - have) for cut, have in zip(window, part.shape[1:], strict=True)]
    return torch.from_numpy(np.pad(part, [(0, 0), *gaps]))
