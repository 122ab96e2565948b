"""Floors of `ablations.py`: features without any learning, that an encoder must beat. Scored as an encoder's are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from ablation_tasks import Sample, Task, cut, draw_rng, split, token_grid
from torch import nn

from geomed_mae.models.masking import valid_tokens
from geomed_mae.models.patches import patchify
from geomed_mae.training.probe_features import PERCENTILES

FILTERS, SIZE = 64, 5
"""Of the random convolutions: number, and edge in pixels."""
CANDIDATES = 40
"""Neighbourhoods that are whitened together, for each one that becomes a filter."""
RIDGE = 1e-2
"""Share of the mean variance that is added before whitening."""
STREAM_FILTERS = 3


def floor_statistics(task: Task) -> list[np.ndarray]:
    """Return mean and standard deviation of each patch and channel; of whole images also percentiles."""
    if not task.dense:
        flat = [sample.pixels.reshape(len(sample.pixels), -1) for sample in task.samples]
        return [np.concatenate([x.mean(1), x.std(1), np.percentile(x, PERCENTILES, axis=1).flatten()]) for x in flat]
    return [_on_grid(sample, task, lambda x: torch.cat([x.mean(-1), x.std(-1)], dim=-1)) for sample in task.samples]


def floor_pixels(task: Task) -> list[np.ndarray]:
    """Return the pixels themselves: of each patch, or of the image."""
    if not task.dense:
        return [sample.pixels.flatten() for sample in task.samples]
    return [_on_grid(sample, task, lambda x: x.flatten(-2)) for sample in task.samples]


def floor_convolutions(task: Task, seed: int) -> list[np.ndarray]:
    """Return random convolutional features (MOSAIKS, doi 10.1038/s41467-021-24638-z), mean over each patch.

    Filters are whitened neighbourhoods of the training images, each followed by a rectifier with both signs.
    """
    rng, (train, _) = draw_rng(seed, STREAM_FILTERS), split(task, seed)
    axes, size = len(task.crop), (SIZE,) * len(task.crop)
    found = []
    for number in rng.choice(train, CANDIDATES * FILTERS):
        sample = task.samples[number]
        start = [rng.integers(0, max(have - SIZE, 0) + 1) for have in sample.pixels.shape[1:]]
        found.append(cut(sample, start, size)[0].flatten())
    rows = np.stack(found) - np.mean(found, axis=0)
    values, vectors = np.linalg.eigh(rows.T @ rows / len(rows))
    white = vectors / np.sqrt(values.clip(0) + RIDGE * values.mean()) @ vectors.T
    kernel = torch.from_numpy(((rows[:FILTERS] @ white) @ white).astype(np.float32))
    kernel = (kernel / kernel.norm(dim=1, keepdim=True)).reshape(FILTERS, -1, *size)
    convolve = nn.functional.conv2d if axes == 2 else nn.functional.conv3d
    result = []
    for sample in task.samples:
        answer = convolve(torch.from_numpy(sample.pixels)[None], kernel, padding="same")
        both = torch.cat([answer.relu(), (-answer).relu()], dim=1)[0].numpy()
        seen = Sample(both, np.broadcast_to(sample.valid.any(0), both.shape).copy(), sample.group, sample.label)
        result.append(_on_grid(seen, task, lambda x: x.mean(-1)))
    return result


def _on_grid(sample: Sample, task: Task, summary: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
    """Return (f, *grid) of a function of patches (n, c, p) -> (n, f); NaN where a patch is not valid."""
    grid = token_grid(sample, task)
    pixels, valid = cut(sample, [0] * len(grid), [count * step for count, step in zip(grid, task.patch, strict=True)])
    features = summary(patchify(torch.from_numpy(pixels)[None], task.patch)[0])
    known = valid_tokens(torch.from_numpy(valid)[None], task.patch)[0]
    return torch.where(known[:, None], features, torch.nan).T.unflatten(-1, grid).numpy()
