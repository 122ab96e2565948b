"""What a dry run says of the model: seconds of a step, measured on this device; memory and checkpoints, estimated."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import quantiles
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from geomed_mae.models.spec import ModelSpec
from geomed_mae.training.learner import Learner
from geomed_mae.training.loop import Loss, gradients

if TYPE_CHECKING:
    from geomed_mae.config import TrainConfig
    from geomed_mae.samples.batch import Batch

Shape = tuple[int, int, int, tuple[int, ...]]
"""Channels, patches that the encoder sees, patches that the decoder is asked for, crop."""

PIXEL_COPIES = 6
"""In physical and in model units, as patches and targets, and what lies between: 2.4 wait for the backward pass."""

SECONDS, FEWEST, MOST = 10.0, 3, 12
"""Time that measuring steps takes, about, and how many there are at least and at most, the first not counted."""


@dataclass(frozen=True, slots=True)
class StepRate:
    """Seconds of a step without its data: forward, backward, clipping, update; median and quartiles.

    `device_mb` is the largest memory of a CUDA device while it was measured, in MiB; None elsewhere.
    """

    seconds: float
    quick: float
    slow: float
    steps: int
    device_mb: float | None = None


def measure_step(
    learner: Learner,
    loss: Callable[[Batch, int], Loss],
    batch: Batch,
    train: TrainConfig,
    *,
    seconds: float = SECONDS,
    clock: Callable[[], float] = time.perf_counter,
) -> StepRate:
    """Do a few steps on `batch`, as the loop does, at a learning rate of 0, and return how long they took.

    Weights stay as they are, the optimisers' moments do not: do not train with `learner` afterwards. The first step is
    not counted: memory is allocated in it, kernels are chosen, a model is compiled.
    """
    cuda = learner.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(learner.device)
    learner.module.train()
    learner.optimizers.set_lr(0.0)
    spent: list[float] = []
    begin = last = clock()
    while len(spent) <= FEWEST or (last - begin < seconds and len(spent) <= MOST):
        _step(learner, loss, batch, train, len(spent))
        if cuda:
            torch.cuda.synchronize(learner.device)
        now = clock()
        spent.append(now - last)
        last = now
    counted = spent[1:]
    device_mb = torch.cuda.max_memory_allocated(learner.device) / 2**20 if cuda else None
    quick, middle, slow = quantiles(counted, n=4, method="inclusive")
    return StepRate(middle, quick, slow, len(counted), device_mb)


def _step(
    learner: Learner, loss: Callable[[Batch, int], Loss], batch: Batch, train: TrainConfig, number: int
) -> Tensor:
    """Do one step as `training.loop.fit` does."""
    gradients(learner, batch, loss, number, train)
    norm = learner.parallel.clip(learner.optimizers.parameters(), train.clip)
    learner.update(number)
    return norm


def repeated(batch: Batch, size: int) -> Batch:
    """Return a batch of `size` crops, those of `batch` over and over: as much work as a batch of as many places."""
    order = [number % len(batch) for number in range(size)]
    return replace(
        batch,
        raw=batch.raw[order],
        valid=batch.valid[order],
        spacing=None if batch.spacing is None else batch.spacing[order],
        keys=tuple(batch.keys[number] for number in order),
        statistics=tuple(batch.statistics[number] for number in order),
        samples=tuple(range(size)),
    )


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes that training takes on its device, estimated."""

    weights: int
    gradients: int
    moments: int
    average: int
    activations: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.weights + self.gradients + self.moments + self.average + self.activations


def estimate_space(module: nn.Module, spec: ModelSpec, train: TrainConfig, shapes: Sequence[Shape]) -> Space:
    """Estimate the memory of a step, in bytes; exact for what belongs to parameters, rough for activations.

    Args:
        module: the autoencoder; its optimisers are Muon, one moment, for the blocks' matrices, and AdamW, two.
        spec: its shape.
        train: batch_size, accumulate, optimizer, ema, precision.
        shapes: of each bucket; the largest counts.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    weights = sum(value.numel() * value.element_size() for value in module.state_dict().values())
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
    in_blocks = sum(
        parameter.numel() * parameter.element_size()
        for name, parameter in module.named_parameters()
        if train.optimizer == "muon" and parameter.ndim == 2 and "blocks." in name
    )
    size = -(-train.batch_size // train.accumulate)
    return Space(
        weights=weights,
        gradients=gradients,
        moments=2 * gradients - in_blocks,
        average=0 if train.ema is None else gradients,
        activations=max(size * activation_bytes(spec, *shape) for shape in shapes),
    )


def activation_bytes(spec: ModelSpec, channels: int, seen: int, asked: int, crop: tuple[int, ...]) -> int:
    """Estimate what one sample takes until its backward pass is done, in bytes of fp32 (bf16: down to half of it).

    A block keeps 16 widths a token: inputs of both norms and of four products, queries, keys, values, and the GELU's 4
    widths twice. Its attention matrix is not kept. A block of cross-attention keeps 14 a query and 3 for each token
    that is looked at. A sample itself is there about PIXEL_COPIES times.

    Args:
        spec: shape of the model.
        channels: of the sample.
        seen: patches that the encoder sees.
        asked: patches that the decoder is asked for.
        crop: size of the sample, one number an axis.
    """
    encoder = spec.depth * 16 * (seen + 1) * spec.dim
    if spec.mode == "exact":
        decoder = spec.decoder_depth * 16 * (seen + 1 + asked) * spec.decoder_dim
    else:
        decoder = spec.decoder_depth * (14 * asked + 3 * (seen + 1)) * spec.decoder_dim
    return 4 * (encoder + decoder + PIXEL_COPIES * channels * math.prod(crop))


def checkpoint_bytes(space: Space) -> int:
    """Return the bytes of one checkpoint: weights, moments and average."""
    return space.weights + space.moments + space.average


def kept_checkpoints(train: TrainConfig) -> int:
    """Return how many checkpoints lie on the disk at the same time, at most: one is written before another goes."""
    forever = train.steps // train.keep_every if train.keep_every else 0
    return min(train.keep + forever + 1, -(-train.steps // train.checkpoint_every))
