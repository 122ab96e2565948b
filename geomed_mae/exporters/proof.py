"""Proof: the exported file, opened in its own runtime, computes what the original computes, on a real image.

The image is the user's (`--image`), or made of the Landsat scene that travels with the package: its bands' texture in
each channel's own units. A sample of noise goes with it, which excites every channel and patch as one crop of a scene
may not. All pixels are taken as valid, as exported models take them: what is not is presented as the channel's centre.
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from geomed_mae.archives.statistics import ChannelStatistics, summarise
from geomed_mae.errors import IntegrityError, MissingExtraError
from geomed_mae.exporters.request import Request
from geomed_mae.image import Image
from geomed_mae.models.contract import normalise, scaling
from geomed_mae.models.foreign.feed import CONTRACT, described
from geomed_mae.readers import read_images

SCENE = Path(__file__).parents[1] / "demo_data" / "L7_ETMs.tif"
TOLERANCE = 1e-5
"""Largest difference that is accepted, relative to the largest value, where fp32 is compared with fp32."""

WINDOWS_LOOKED_AT = 4096
"""Windows of a given image of which the one with most valid pixels is taken."""

ARBITRARY = (300.0, 100.0)
"""Centre and scale of made images in arbitrary units."""

STEP = 3
"""Pixels that each slice of a made volume is further down the scene."""


@dataclass(frozen=True, slots=True, eq=False)
class Trial:
    """Input to compare on: first the real image, then samples of noise.

    Attributes:
        raw: physical values.
        fed: the same as exported models with physical input take it: channels of contract method `image` scaled
            already, the others as they are.
        normalised: the same in model units, as `FixedEncoder` takes it.
        statistics: per sample those of its whole image, one a channel.
        source: what it is, in words.
    """

    raw: Float[Tensor, "b c *size"]
    fed: Float[Tensor, "b c *size"]
    normalised: Float[Tensor, "b c *size"]
    statistics: tuple[tuple[ChannelStatistics, ...], ...]
    source: str


@dataclass(frozen=True, slots=True, eq=False)
class Answer:
    """What the original model makes of a trial; fp32 on the CPU.

    Attributes:
        tokens: of the encoder, class token first.
        maps: of the blocks `Request.layers`; the last is what `features` gives.
        vector: mean of the last map.
        probabilities: of a task model; None without one.
    """

    tokens: Float[Tensor, "b 1+n d"]
    maps: tuple[Float[Tensor, "b d *grid"], ...]
    vector: Float[Tensor, "b d"]
    probabilities: Float[Tensor, "b class *space"] | None

    @property
    def features(self) -> Float[Tensor, "b d *grid"]:
        """The last block's map."""
        return self.maps[-1]


def trial(request: Request, *, noise: int = 1) -> Trial:
    """Return one real image of the request's size and channels, and so many samples of noise (for another size,
    `trial(dataclasses.replace(request, size=...))`).

    Raises:
        ReadError: the package's scene cannot be read.
    """
    if request.image is not None:
        window, statistics = _most_valid(request, request.image)
        source = "the given image"
    else:
        window, source = _made(request)
        statistics = summarise(window, np.ones((1,) * window.ndim, dtype=bool))
    center, scale, _ = scaling(request.entries, statistics)
    shape = (-1, *[1] * len(request.size))
    random = np.random.default_rng(0).normal(size=(noise, *window.shape))
    samples = [window, *(random * scale.reshape(shape) + center.reshape(shape))]
    raw = torch.from_numpy(np.stack(samples).astype(np.float32))
    _step_over(raw[1:], request)
    normalised = normalise(
        raw,
        torch.ones_like(raw, dtype=torch.bool),
        torch.from_numpy(center)[None],
        torch.from_numpy(scale)[None],
        [entry.value_range for entry in request.entries],
    )
    scaled = torch.tensor([entry.method == "image" for entry in request.entries]).reshape(1, *shape)
    return Trial(raw, torch.where(scaled, normalised, raw), normalised, (statistics,) * len(raw), source)


@torch.inference_mode()
def ours(request: Request, given: Trial) -> Answer:
    """Return what the original model, not the fixed one, makes of a trial, every pixel valid."""
    encoder = _on_cpu(request.encoder.module)
    valid = torch.ones_like(given.raw, dtype=torch.bool)
    spacing = None if request.distance is None else torch.tensor([request.distance] * len(given.raw))
    found = encoder(given.normalised, valid, request.channels, spacing, layers=request.layers)
    chances = None
    if request.task is not None:
        logits = _on_cpu(request.task)(given.raw, valid, spacing, given.statistics)
        chances = logits.sigmoid() if request.task.spec.head.multi_label else logits.softmax(dim=1)
    return Answer(found.tokens, found.maps, found.maps[-1].flatten(2).mean(dim=2), chances)


def clipped(request: Request, given: Trial) -> Float[Tensor, "b c *size"]:
    """Return `Trial.fed` clipped where a fixed scale follows: `(value - mean) / std` of it are model units."""
    values = given.fed.clone()
    for number, entry in enumerate(request.entries):
        if entry.method != "image" and entry.value_range is not None:
            values[:, number] = values[:, number].clamp(*entry.value_range)
    return values


def prove_contract(name: str, folder: Path, request: Request) -> None:
    """Read contract.json of an export again: it describes the channels of the input, in their order.

    Raises:
        IntegrityError: it says something else.
    """
    depth = request.patch[0] if len(request.size) == 3 else 1
    found = described(folder, len(request.entries) * depth)
    if found is None or found[0].channels != request.entries:
        raise IntegrityError(
            f"{CONTRACT} of the {name} export does not describe the channels that go in; nothing was written: please "
            "report this with the model's config.json"
        )


def difference(ours: Tensor | np.ndarray, theirs: Tensor | np.ndarray) -> float:
    """Return the largest difference relative to the largest of `ours`; infinite where shapes differ, NaN for NaN."""
    mine, other = (np.asarray(torch.as_tensor(value).detach().float().cpu()) for value in (ours, theirs))
    if mine.shape != other.shape:
        return float("inf")
    largest = float(np.abs(mine).max(initial=0.0))
    return float(np.abs(mine - other).max(initial=0.0)) / (largest or 1.0)


def prove(
    name: str,
    ours: Tensor | np.ndarray,
    theirs: Tensor | np.ndarray,
    *,
    runtime: str,
    compared: str,
    tolerance: float = TOLERANCE,
) -> dict[str, Any]:
    """Hold an exported model's answer against the original's.

    Args:
        name: of the target, for the message.
        ours: the original's answer.
        theirs: the exported file's, opened again.
        runtime: what opened it, with its version.
        compared: what was compared, and on which image (`Trial.source`).
        tolerance: largest difference that is accepted, relative to the largest value of `ours`.

    Returns:
        `largest_relative_difference`, `tolerance`, `compared` and `runtime`, the entry `parity` of a result.

    Raises:
        IntegrityError: they differ, in shape or by more than `tolerance`.
    """
    found = difference(ours, theirs)
    if not found <= tolerance:
        shapes = tuple(ours.shape), tuple(theirs.shape)
        detail = f"gives {shapes[1]} where the model gives {shapes[0]}" if shapes[0] != shapes[1] else (
            f"differs from the model by {found:.1e} of the largest value (at most {tolerance:.0e} is accepted)"
        )  # fmt: skip
        raise IntegrityError(
            f"the {name} export, opened in {runtime}, {detail}; nothing was written: please report this with the "
            "model's config.json"
        )
    return {
        "largest_relative_difference": found,
        "tolerance": tolerance,
        "compared": compared,
        "runtime": runtime,
    }


# ----------------------------------------------------------------------------------------------------- images


def _most_valid(request: Request, image: Image) -> tuple[np.ndarray, tuple[ChannelStatistics, ...]]:
    """Return the window of an image with most valid pixels, the others at the centre, and the image's statistics."""
    statistics = summarise(image.array, image.valid)
    center, _, _ = scaling(request.entries, statistics)
    valid = np.broadcast_to(image.valid, image.array.shape)
    corner = max(
        _corners(image.spatial_shape, request.size), key=lambda start: valid[_place(start, request.size)].sum()
    )
    place = _place(corner, request.size)
    part, known = image.array[place], valid[place]
    gaps = [(0, 0), *((0, size - have) for size, have in zip(request.size, part.shape[1:], strict=True))]
    known = np.pad(known, gaps)
    centers = np.broadcast_to(center.reshape(-1, *[1] * len(request.size)), known.shape)
    return np.where(known, np.pad(part, gaps), centers).astype(np.float32), statistics


def _step_over(noise: Float[Tensor, "b c *size"], request: Request) -> None:
    """Put values beyond the clipping range at the two ends of the lines of noise: a lost limit would not show else."""
    for number, entry in enumerate(request.entries):
        if entry.value_range is not None:
            low, high = entry.value_range
            noise[:, number, ..., 0], noise[:, number, ..., -1] = low - entry.scale, high + entry.scale


def _place(start: Sequence[int], size: Sequence[int]) -> tuple[slice, ...]:
    return (slice(None), *(slice(at, at + length) for at, length in zip(start, size, strict=True)))


def _corners(space: Sequence[int], size: Sequence[int]) -> list[tuple[int, ...]]:
    """Return first pixels of windows: side by side, the last flush with the end; of many, evenly spread ones."""
    lines = [
        sorted({*range(0, max(have - want, 0) + 1, want), max(have - want, 0)})
        for have, want in zip(space, size, strict=True)
    ]
    corners = list(itertools.product(*lines))
    return corners[:: -(-len(corners) // WINDOWS_LOOKED_AT)]


def _made(request: Request) -> tuple[np.ndarray, str]:
    """Return (an image (c, *size) with the texture of the package's scene, what it is)."""
    texture, source = _texture()
    slices = request.size[0] if len(request.size) == 3 else 1
    rows, columns = request.size[-2:]
    tall = np.pad(texture, [(0, 0), (0, max(0, rows + STEP * slices - texture.shape[1])), (0, 0)], mode="wrap")
    wide = np.pad(tall, [(0, 0), (0, 0), (0, max(0, columns - texture.shape[2]))], mode="wrap")
    image = np.empty((len(request.entries), *request.size), dtype=np.float32)
    for number, entry in enumerate(request.entries):
        band = wide[number % len(wide)]
        center, scale = ARBITRARY if entry.method == "image" else (entry.center, entry.scale)
        cut = [band[STEP * at : STEP * at + rows, :columns] for at in range(slices)]
        values = np.stack(cut).reshape(request.size) * scale + center
        image[number] = values if entry.value_range is None else np.clip(values, *entry.value_range)
    return image, source


@functools.lru_cache(maxsize=1)
def _texture() -> tuple[np.ndarray, str]:
    """Return (bands of median 0 and spread 1, what they are)."""
    try:
        (scene,) = read_images(SCENE, "landsat7")
    except MissingExtraError:  # without the extra `geo`
        noise = np.random.default_rng(1).normal(size=(6, 352, 352)).cumsum(axis=1).cumsum(axis=2)
        return (noise / noise.std(axis=(1, 2), keepdims=True)).astype(np.float32), "a made texture"
    found = summarise(scene.array, scene.valid)
    bands = [(band - one.median) / one.spread for band, one in zip(scene.array, found, strict=True)]
    texture = np.where(scene.valid, np.stack(bands), 0).astype(np.float32)
    return texture, "a Landsat 7 scene's texture in the channels' units"


def _on_cpu(module: nn.Module) -> nn.Module:
    weight = next(module.parameters())
    if weight.device.type == "cpu" and weight.dtype == torch.float32:
        return module
    return copy.deepcopy(module).cpu().float()
