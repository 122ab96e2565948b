"""Muon by several processes. torch.optim.Muon (2.14) repeats all its work in each of them, and cannot step on parts.

What costs time in Muon is to make a matrix orthogonal: on a CPU two fifths of a small model's step. So matrices are
dealt out, where each process holds all of them (`DealtMuon`); where each holds a part of every one, they are gathered
one by one (`ShardedMuon`). Both make the steps of torch.optim.Muon with Nesterov momentum, up to rounding, and keep the
same state.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from geomed_mae.training.distributed import Ranks


class _Muon(torch.optim.Optimizer):
    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0, "momentum": momentum})

    def _updates(self) -> Iterator[tuple[dict[str, Any], nn.Parameter, Tensor]]:
        """Take the gradients into the momenta, and yield what is to be made orthogonal, matrix by matrix."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                mean = state["momentum_buffer"]
                mean.lerp_(parameter.grad, 1 - group["momentum"])
                yield group, parameter, parameter.grad.lerp(mean, group["momentum"])


class DealtMuon(_Muon):
    """Each matrix is made orthogonal by one process, and sent to the others."""

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float, ranks: Ranks) -> None:
        super().__init__(groups, momentum)
        self._ranks = ranks
        matrices = [parameter for group in self.param_groups for parameter in group["params"]]
        self._owner = dict(zip(matrices, dealt([tuple(matrix.shape) for matrix in matrices], ranks.world), strict=True))

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients."""
        updates = list(self._updates())
        if not updates:
            return
        # Each number is made by one process and 0 in the others, so that their sum is exact.
        sent = torch.zeros(sum(update.numel() for *_, update in updates), device=updates[0][2].device)
        places = sent.split([update.numel() for *_, update in updates])
        for (_, parameter, update), place in zip(updates, places, strict=True):
            if self._owner[parameter] == self._ranks.rank:
                place.copy_(_orthogonal(update).flatten())
        self._ranks.add_up(sent)
        for (group, parameter, _), place in zip(updates, places, strict=True):
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(place.view_as(parameter), alpha=-group["lr"])


class ShardedMuon(_Muon):
    """Momentum and weights stay in parts. Every process makes each matrix orthogonal for itself: it needs all rows."""

    @torch.no_grad()
    def step(self) -> None:
        """Apply the gradients."""
        for group, parameter, update in self._updates():
            direction = _orthogonal(update.full_tensor())
            parameter.mul_(1 - group["lr"] * group["weight_decay"])
            parameter.add_(_part_of(direction, parameter), alpha=-group["lr"])


def dealt(shapes: list[tuple[int, ...]], hands: int) -> list[int]:
    """Deal matrices out so that hands have about the same work: the most costly first, to who has the least so far."""
    owners, load = [0] * len(shapes), [0] * hands
    work = [shape[0] * shape[1] * min(shape) for shape in shapes]
    for number in sorted(range(len(shapes)), key=lambda number: -work[number]):
        owners[number] = load.index(min(load))
        load[owners[number]] += work[number]
    return owners


def _orthogonal(update: Tensor) -> Tensor:
    """Return what torch's Muon would subtract for this update at a learning rate of 1: it steps from 0, once."""
    matrix = nn.Parameter(torch.zeros_like(update))
    matrix.grad = update
    torch.optim.Muon([matrix], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, adjust_lr_fn="original").step()
    return -matrix.detach()


def _part_of(whole: Tensor, like: DTensor) -> DTensor:
    """Return this process's part of a tensor that all processes have; nothing is sent."""
    spread = [Replicate()] * like.device_mesh.ndim
    return DTensor.from_local(whole, like.device_mesh, spread, run_check=False).redistribute(placements=like.placements)
