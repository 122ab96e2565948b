"""Early stopping: the validation part is scored now and then, and the best weights are kept.

What it knows travels with the checkpoints (numbers as JSON, weights as tensors), so that a run that goes on after an
interruption stops where the run that was not interrupted does, with the same weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import nn

from geomed_mae.training.checkpoint import Checkpoint
from geomed_mae.training.learner import Learner

if TYPE_CHECKING:
    from geomed_mae.config import TrainConfig

STATE = "validation"
"""Key of its numbers in the state of a checkpoint, and of the score in metrics.jsonl."""

log = logging.getLogger(__name__)


class EarlyStopping:
    """Scores a learner's weights every train.validate_every steps; `judge` and `state` are for `training.loop.fit`.

    Args:
        learner: what is trained; its `kept` holds the best weights.
        train: validate_every (set), patience, steps.
        score: model in evaluation mode -> a number of which more is better; None where nothing can be scored.
        blank: makes a module for the averaged weights (train.ema).
        record: takes a line for metrics.jsonl.
        resumed: the checkpoint that the run goes on from.
    """

    def __init__(
        self,
        learner: Learner,
        train: TrainConfig,
        score: Callable[[nn.Module], float | None],
        *,
        blank: Callable[[], nn.Module],
        record: Callable[[dict[str, Any]], None],
        resumed: Checkpoint | None = None,
    ) -> None:
        self._learner, self._train, self._score, self._blank, self._record = learner, train, score, blank, record
        known = {} if resumed is None else resumed.state.get(STATE, {})
        self.numbers: dict[str, Any] = {"best": None, "step": None, "waited": 0, "scored": 0, **known}

    @property
    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the same object all the time, so that it holds the newest numbers."""
        return {STATE: self.numbers}

    def judge(self, done: int) -> bool:
        """Score what is due after `done` steps, keep the weights if they are the best; True ends the training."""
        if done % self._train.validate_every and done != self._train.steps:
            return False
        score, numbers = self._score(self._learner.best(self._blank)), self.numbers
        self._record({"step": done, STATE: score})
        numbers["scored"] += 1
        # The first is kept even where it has no score, so that there are weights to go back to.
        better = numbers["step"] is None or (score is not None and (numbers["best"] is None or score > numbers["best"]))
        if better:
            numbers.update(best=score, step=done, waited=0)
            self._learner.kept = self._copied()
            return False
        numbers["waited"] += 1
        patience = self._train.patience
        enough = patience is not None and numbers["waited"] >= patience and done < self._train.steps
        if enough:
            log.info("training ends at step %d: no better score since step %d", done, numbers["step"])
        return enough

    def finish(self) -> nn.Module:
        """Return the module with the best weights, in evaluation mode."""
        module = self._learner.best(self._blank)
        module.load_state_dict(self._learner.kept)
        return module

    def summary(self, metric: str, *, ended: bool) -> dict[str, Any]:
        """Return what the run's summary says; `metric` names the score."""
        best = self.numbers["best"]
        return {
            "metric": metric,
            "best": None if best is None else round(best, 6),
            "step": self.numbers["step"],
            "scored": self.numbers["scored"],
            "stopped_early": ended,
        }

    def _copied(self) -> dict[str, Any]:
        # Copies: the live weights change with the next step.
        return {name: value.clone() for name, value in self._learner.weights().items()}
