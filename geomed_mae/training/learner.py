"""What training changes and a checkpoint holds: a module, its optimisers, and the average of its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from geomed_mae.errors import IntegrityError
from geomed_mae.training import checkpoint
from geomed_mae.training.average import Average
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.optim import build_optimizers
from geomed_mae.training.parallel import Parallel, placed_like
from geomed_mae.training.progress import Progress

if TYPE_CHECKING:
    from geomed_mae.config import TrainConfig


class Learner:
    """A module ready to be trained by all processes of a run.

    Attributes:
        module: as given; with train.sharding=fsdp its parameters are parts of matrices now.
        parallel: how it is spread; a step calls `parallel.forward` in place of `module`.
        optimizers: of its parameters.
        average: of its weights; None without train.ema.
        kept: weights that travel with the checkpoints, of the best validation so far; empty where there is none.
    """

    def __init__(self, module: nn.Module, train: TrainConfig, ranks: Ranks | None = None) -> None:
        """Take `module`, which is on its device and has the same weights in all processes."""
        self.module = module
        self.parallel = Parallel(module, ranks or Ranks(), sharding=train.sharding, compiled=train.compile)
        self.optimizers = build_optimizers(module, train, self.ranks)
        self.average = None if train.ema is None else Average(module, train.ema)
        self.kept: dict[str, Tensor] = {}

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        return self.parallel.ranks

    @property
    def device(self) -> torch.device:
        """Where the module is."""
        return next(self.module.parameters()).device

    def restore(self, resumed: checkpoint.Checkpoint | None) -> Progress:
        """Go on from a checkpoint, which any number of processes may have written; None begins.

        The checkpoint forgets its tensors: each of the processes would hold them all.

        Raises:
            IntegrityError: it is of another model, or lacks something.
        """
        if resumed is None:
            return Progress()
        try:
            own = self.module.state_dict()
            placed = {name: placed_like(value, own.get(name)) for name, value in resumed.model.items()}
            self.module.load_state_dict(placed)
            self.optimizers.load_state_tensors(resumed.optimizer)
            if self.average is not None:
                self.average.load(resumed.average)
            self.kept = dict(resumed.best)
            resumed.forget()
            return Progress(**resumed.state["progress"])
        except (RuntimeError, ValueError, KeyError, TypeError) as error:
            detail = str(error).splitlines()[0]
            raise IntegrityError(
                f"checkpoint {resumed.path.name} belongs to another model or version: {detail}"
            ) from error

    def update(self, number: int) -> None:
        """Apply the gradients and drop them; `number` counts the updates from 0."""
        self.optimizers.step()
        self.optimizers.zero_grad()
        if self.average is not None:
            self.average.update(number)

    def save(self, folder: Path, state: dict[str, Any], train: TrainConfig) -> None:
        """Write a checkpoint with whole tensors; all processes must call, the first one writes.

        Raises:
            OutputError: it cannot be written, in the first process.
        """
        whole = self.parallel.whole
        model, optimizer = whole(self.module.state_dict()), whole(self.optimizers.state_tensors())
        average = {} if self.average is None else whole(self.average.shadow)
        if self.ranks.first:
            checkpoint.save(
                folder,
                state["progress"]["step"],
                model=model,
                optimizer=optimizer,
                average=average,
                best=self.kept,
                state=state,
                keep=train.keep,
                keep_every=train.keep_every,
            )

    def weights(self) -> dict[str, Tensor]:
        """Return the state that is worth keeping, averaged where there is an average: whole, in the first process."""
        average = {} if self.average is None else self.average.shadow
        return self.parallel.whole({**self.module.state_dict(), **average})

    def best(self, blank: Callable[[], nn.Module]) -> nn.Module | None:
        """Return a whole module with the weights worth keeping, in evaluation mode; None but in the first process.

        All processes must call. It is the module itself where that is whole and not averaged, else one that `blank`
        makes.
        """
        if self.average is None and not self.parallel.sharded:
            return self.module.eval() if self.ranks.first else None
        weights = self.weights()
        if not self.ranks.first:
            return None
        module = blank().to(self.device)
        module.load_state_dict(weights)
        return module.eval()
