"""Optimisers, their parameter groups, and the learning rate as a pure function of the step.

`muon`: torch.optim.Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) for the matrices of the transformer
blocks, encoder and decoder; AdamW for everything else. `adamw`: AdamW for everything. Weight decay reaches matrices
only, never biases, norms, tokens or codes. Layer decay (Clark et al. 2020, arXiv 2003.10555) is for fine-tuning.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from geomed_mae.training.distributed import Ranks
from geomed_mae.training.muon import DealtMuon, ShardedMuon
from geomed_mae.training.parallel import placed_like

if TYPE_CHECKING:
    from geomed_mae.config import TrainConfig

BLOCK = re.compile(r"(?:^|\.)\w*blocks\.(\d+)\.")
"""Names of parameters inside a transformer block; the number is the block's."""

ENCODER_BLOCK = re.compile(r"(?:^|encoder\.)blocks\.(\d+)\.")
EMBEDDING = re.compile(r"(?:^|\.)(?:patch_embed|cls_token|pos_embed)(?:\.|$)")
UNDECAYED = re.compile(r"(?:^|\.)(?:\w*_token|pos_embed|bias|codes)(?:\.|$)")
"""Tokens, tables of positions, biases (also where they are kept as tables) and the codes of channels."""

ADAM_BETAS = (0.9, 0.95)
"""He et al. (arXiv 2111.06377, table 8)."""

MUON_MOMENTUM = 0.95


def lr_scale(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the peak learning rate at `step` (0-based) of `steps`: linear warm-up, then cosine to 0.

    `warmup` is the share of `steps` over which it rises. A pure function, so that resuming needs no scheduler state.
    """
    rising = max(round(warmup * steps), 1)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(steps - rising, 1)))


def layer_of(name: str, depth: int) -> int:
    """Return a parameter's layer for layer decay: 0 embeddings, 1..depth the encoder's blocks, depth + 1 the rest."""
    if found := ENCODER_BLOCK.search(name):
        return int(found[1]) + 1
    return 0 if EMBEDDING.search(name) else depth + 1


class Optimizers:
    """One or two torch optimisers that step together, and their state as named tensors.

    The state is kept under `<optimiser>.<parameter>/<entry>`, so that it can be stored without pickle and restored
    whatever the order of parameters.
    """

    def __init__(self, members: dict[str, torch.optim.Optimizer], names: dict[int, str]) -> None:
        self.members = members
        self._names = names
        for optimizer in members.values():
            for group in optimizer.param_groups:
                group["peak_lr"] = group["lr"]

    def parameters(self) -> Iterable[nn.Parameter]:
        """Yield every parameter that is trained."""
        for optimizer in self.members.values():
            for group in optimizer.param_groups:
                yield from group["params"]

    def set_lr(self, scale: float) -> None:
        """Set every group's learning rate to `scale` times its peak."""
        for optimizer in self.members.values():
            for group in optimizer.param_groups:
                group["lr"] = group["peak_lr"] * scale

    def step(self) -> None:
        """Apply the gradients."""
        for optimizer in self.members.values():
            optimizer.step()

    def zero_grad(self) -> None:
        """Drop the gradients."""
        for optimizer in self.members.values():
            optimizer.zero_grad(set_to_none=True)

    def state_tensors(self) -> dict[str, Tensor]:
        """Return the optimisers' state, every entry a tensor."""
        tensors = {}
        for key, optimizer in self.members.items():
            for parameter, state in optimizer.state.items():
                for entry, value in state.items():
                    tensors[f"{key}.{self._names[id(parameter)]}/{entry}"] = torch.as_tensor(value)
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Inverse of `state_tensors`; torch puts each entry where its optimiser wants it (device, type)."""
        for key, optimizer in self.members.items():
            own = {name.removeprefix(f"{key}."): value for name, value in tensors.items() if name.startswith(f"{key}.")}
            state: dict[int, dict[str, Tensor]] = {}
            ordered = (parameter for group in optimizer.param_groups for parameter in group["params"])
            for number, parameter in enumerate(ordered):
                prefix = f"{self._names[id(parameter)]}/"
                entries = {
                    name.removeprefix(prefix): placed_like(own[name].clone(), parameter)
                    for name in own
                    if name.startswith(prefix)
                }
                if entries:
                    state[number] = entries
            optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def build_optimizers(module: nn.Module, train: TrainConfig, ranks: Ranks | None = None) -> Optimizers:
    """Return the optimisers of all parameters that require gradients; learning rates are the peaks.

    `ranks` are the processes that train the module; None is this one alone.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    depth = max((int(found[1]) + 1 for name, _ in named if (found := ENCODER_BLOCK.search(name))), default=0)
    groups: dict[tuple[bool, int, bool], list[nn.Parameter]] = {}
    for name, parameter in named:
        by_muon = train.optimizer == "muon" and parameter.ndim == 2 and BLOCK.search(name) is not None
        decayed = parameter.ndim >= 2 and UNDECAYED.search(name) is None
        groups.setdefault((by_muon, layer_of(name, depth), decayed), []).append(parameter)
    muon, adamw = [], []
    for (by_muon, layer, decayed), parameters in groups.items():
        factor = train.layer_decay ** (depth + 1 - layer)
        (muon if by_muon else adamw).append(
            {
                "params": parameters,
                "lr": (train.muon_lr if by_muon else train.lr) * factor,
                "weight_decay": train.weight_decay if decayed else 0.0,
            }
        )
    members: dict[str, torch.optim.Optimizer] = {}
    if adamw:
        # Fused: five times faster than the loop over tensors on a CPU, and one kernel launch on a GPU.
        members["adamw"] = torch.optim.AdamW(adamw, betas=ADAM_BETAS, fused=True)
    if muon:
        members["muon"] = _muon(muon, ranks or Ranks())
    return Optimizers(members, {id(parameter): name for name, parameter in named})


def _muon(groups: list[dict[str, Any]], ranks: Ranks) -> torch.optim.Optimizer:
    if any(isinstance(parameter, DTensor) for group in groups for parameter in group["params"]):
        return ShardedMuon(groups, MUON_MOMENTUM)
    if not ranks.alone:
        return DealtMuon(groups, MUON_MOMENTUM, ranks)
    return torch.optim.Muon(groups, momentum=MUON_MOMENTUM, nesterov=True, adjust_lr_fn="original")
