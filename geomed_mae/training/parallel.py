"""One module trained by several processes: replicated (DDP) or in parts (FSDP2), compiled or not.

Each process computes the mean loss of its own samples; gradients are averaged. With equal shares of a batch whose loss
is a mean over samples this is the gradient of the whole batch, up to rounding. Checkpoints hold whole tensors whatever
the number of processes, so that a run may go on with another.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator, Mapping

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from geomed_mae.errors import ConfigError, GeomedError
from geomed_mae.training.distributed import Ranks

BLOCK = re.compile(r"(?:^|\.)\w*blocks\.\d+$")
"""Names of the modules that FSDP gathers one after the other."""

KINDS = (".2d", ".3d")
"""Ends of the names of parameters that images and volumes have each for themselves."""


class Parallel:
    """A module, and how its gradients, its norm and its weights come together over the processes.

    Attributes:
        ranks: the processes.
        module: what is trained; with FSDP its parameters are parts of matrices from now on. Build optimisers after.
        forward: what a step calls in place of `module`.
    """

    def __init__(
        self, module: nn.Module, ranks: Ranks, *, sharding: str = "replicated", compiled: bool = False
    ) -> None:
        """Spread `module`, which is on its device and the same in all processes; `sharding` as in the recipe."""
        self.ranks, self.module, self.forward = ranks, module, module
        self.sharded = sharding == "fsdp" and not ranks.alone
        self.compiled = compiled
        if compiled:
            module.compile(dynamic=False)
        if ranks.alone:
            return
        device = next(module.parameters()).device
        if self.sharded:
            mesh = init_device_mesh(device.type, (ranks.world,))
            for name, part in module.named_modules():
                if BLOCK.search(name):
                    fully_shard(part, mesh=mesh)
            fully_shard(module, mesh=mesh)
        else:
            # A step of images leaves the filters of volumes unused, and the other way round.
            names = [name for name, _ in module.named_parameters()]
            mixed = all(any(name.endswith(kind) for name in names) for kind in KINDS)
            devices = [device] if device.type == "cuda" else None
            self.forward = DistributedDataParallel(module, device_ids=devices, find_unused_parameters=mixed)

    @contextlib.contextmanager
    def part(self, last: bool) -> Iterator[None]:
        """Surround forward and backward of a part of a batch: gradients travel with the last one."""
        if self.sharded:
            self.module.set_requires_gradient_sync(last)
        with contextlib.ExitStack() as around:
            if self.compiled:
                around.enter_context(_compiler_failures_named())
            if isinstance(self.forward, DistributedDataParallel) and not last:
                around.enter_context(self.forward.no_sync())
            yield

    def clip(self, parameters: Iterable[nn.Parameter], limit: float) -> Tensor:
        """Scale the gradients to a norm of at most `limit`, and return the norm from before, over all processes."""
        norm = nn.utils.clip_grad_norm_(parameters, limit)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors on the CPU in the first process, and nothing in the others; all of them must call."""
        made = {}
        for name, tensor in tensors.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.ranks.first:
                made[name] = full.detach().cpu().contiguous()
        return made


def placed_like(value: Tensor, target: Tensor) -> Tensor:
    """Return a whole tensor as `target` is kept: this process's part of it, or itself on the device."""
    if not isinstance(target, DTensor) or value.shape != target.shape:
        return value
    # Every process has read the same bits, so that nothing has to be sent.
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


@contextlib.contextmanager
def _compiler_failures_named() -> Iterator[None]:
    """Say what to do when torch.compile fails.

    Raises:
        ConfigError: it did; with the first line of its own words.
    """
    from torch._dynamo.exc import TorchDynamoException

    try:
        yield
    except TorchDynamoException as error:
        if isinstance(error.__cause__, GeomedError):
            raise error.__cause__ from None
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ConfigError(f"torch.compile failed ({first.strip()[:200]}); set train.compile=false") from error
