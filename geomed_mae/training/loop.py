"""The one training loop, of pretraining and of fine-tuning; read it from top to bottom.

What differs between the two is given to it: `step`, the function from a batch and a step number to a loss, and
`batches`, the function from the first step to the batches from there on. Both must be pure functions of their
arguments and of the parameters; then a run that is interrupted and resumed is, bit for bit, the run that was not.

With several processes each runs this loop on its share of every batch. They agree, once a step, on the
loss and on whether to stop; so all of them skip a broken step, save and end together.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from geomed_mae.errors import NumericalError, Preempted
from geomed_mae.samples.prefetch import ahead
from geomed_mae.training import checkpoint
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.learner import Learner
from geomed_mae.training.optim import lr_scale
from geomed_mae.training.progress import Bar, Clock, Progress, Window
from geomed_mae.training.signals import stop_on_signal

if TYPE_CHECKING:
    from geomed_mae.config import TrainConfig

MAX_BAD_STEPS = 10
"""Steps in a row without a finite loss and gradient after which a run stops."""

SEED_STRIDE = 1_000_003
"""Distance between the seeds of neighbouring runs: longer than any run, so that no two share a step's seed."""

log = logging.getLogger(__name__)


class Sized(Protocol):
    """A batch: knows its samples, can be cut, and can move to a device."""

    keys: Sequence[str]
    """The image of each sample, an opaque key."""

    def __len__(self) -> int: ...

    def part(self, first: int, stop: int) -> Self:
        """Return the samples `first` to `stop` - 1."""

    def to(self, device: torch.device) -> Any:
        """Return the batch on `device`."""


Loss = tuple[Tensor, dict[str, Tensor]]
"""A scalar to minimise, a mean over samples, and its parts for the log."""


def pick_device(name: str) -> torch.device:
    """Return the device of `train.device`; "auto" is cuda when there is one."""
    return Ranks().device(name)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context of the forward pass: bf16 autocast, or nothing for fp32."""
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    else:
        bf16 = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


def fit(
    learner: Learner,
    batches: Callable[[int], Iterator[Sized]],
    step: Callable[[Any, int], Loss],
    train: TrainConfig,
    *,
    checkpoints: Path,
    record: Callable[[dict[str, Any]], None],
    state: dict[str, Any] | None = None,
    resumed: checkpoint.Checkpoint | None = None,
    observe: Callable[[int], None] | None = None,
    judge: Callable[[int], bool] | None = None,
    show_progress: bool = True,
) -> Progress:
    """Train until `train.steps` steps are done, until told to stop, or until `judge` says that it is enough.

    `batches` gives this process's share of the batches from a step on; `step` the loss of a batch and its parts, under
    autocast (it must compute the loss itself in fp32). `checkpoints` is a folder, and `state` is kept in each of them
    beside the learner, as JSON; `resumed` is the one to go on from, None starts at step 0. `record` is given one
    dictionary a log line (see `metrics.jsonl`), in the first process; the first line of a resumed session is the mean
    over the steps since it began. `observe` is called after each step with the number of steps done, in every process.
    `judge` likewise, but before the checkpoint that keeps what it knows; True finishes the run (`Progress.ended`).

    Raises:
        Preempted: SIGTERM or SIGUSR1 came; the state is saved. OutputError: a checkpoint cannot be written.
        NumericalError: MAX_BAD_STEPS broken steps in a row. IntegrityError: `resumed` does not fit the module.
    """
    ranks, optimizers = learner.ranks, learner.optimizers
    done = learner.restore(resumed)
    clock = Clock(done.seconds)
    with (
        stop_on_signal() as stop,
        Bar(done.step, train.steps, show_progress and ranks.first) as bar,
        contextlib.closing(ahead(batches(done.step), learner.device)) as source,
    ):
        window = Window(learner.device)
        while done.step < train.steps and not done.ended:
            # 1. data
            with window.waiting():
                batch = next(source)

            # 2. forward and backward; the generator is set anew, so that no random state has to be saved
            learner.module.train()
            torch.manual_seed(train.seed * SEED_STRIDE + done.step)
            optimizers.set_lr(scale := lr_scale(done.step, train.steps, train.warmup))
            told = gradients(learner, batch, step, done.step, train)
            norm = learner.parallel.clip(optimizers.parameters(), train.clip)
            means, stopping = agree(learner, told, stop.is_set())

            # 3. update, unless loss or gradients are broken; such a step is skipped and recorded
            finite = bool(torch.isfinite(norm) & torch.isfinite(means["loss"]))
            learner.update(done.step - done.skipped) if finite else optimizers.zero_grad()
            done.count(len(batch) * ranks.world, finite)
            window.add(means, len(batch) * ranks.world, finite)
            if not finite:
                _skipped(done, ranks.gather(list(batch.keys)), record if ranks.first else None)

            # 4. judge, tell
            done.ended = judge is not None and judge(done.step)
            last = done.ended or done.step == train.steps
            done.seconds = clock.total
            if last or done.step % train.log_every == 0:
                line = window.line()
                done.note(line["loss"])
                line |= {"lr": train.lr * scale, "gradient_norm": float(norm), **done.totals}
                if ranks.first:
                    record({"step": done.step, **line})
                window = Window(learner.device)
            bar.advance(done, window)

            # 5. save
            if last or stopping or done.step % train.checkpoint_every == 0:
                learner.save(checkpoints, {**(state or {}), "progress": vars(done)}, train)
            if stopping and not last:
                raise Preempted(f"told to stop at step {done.step} of {train.steps}: saved; continue with --resume")

            # 6. look at what it has become
            if observe is not None:
                observe(done.step)
    return done


def gradients(
    learner: Learner, batch: Sized, step: Callable[[Any, int], Loss], number: int, train: TrainConfig
) -> list[dict[str, Tensor]]:
    """Add up the gradients of a batch, part by part; parts are of one size, and so of one weight."""
    told, size = [], len(batch) // train.accumulate
    for first in range(0, len(batch), size):
        part = batch if train.accumulate == 1 else batch.part(first, first + size)
        with learner.parallel.part(last=first + size == len(batch)):
            with autocast(learner.device, train.precision):
                loss, parts = step(part.to(learner.device), number)
            (loss / train.accumulate).backward()
        told.append({"loss": loss, **parts})
    return told


def agree(learner: Learner, told: Sequence[Mapping[str, Tensor]], stop: bool) -> tuple[dict[str, Tensor], bool]:
    """Return the mean loss and parts over parts and processes, and whether any process was told to stop.

    What is not finite in one process is not finite in the mean, so that all of them skip the same steps.
    """
    rows = [torch.stack([value.detach().float().to(learner.device) for value in one.values()]) for one in told]
    mean = torch.stack(rows).mean(0)
    if not learner.ranks.alone:
        mean = learner.ranks.mean(torch.cat([mean, mean.new_tensor([stop])]))
        stop = bool(mean[-1] > 0)
    return dict(zip(told[0], mean, strict=False)), stop


def _skipped(done: Progress, keys: Sequence[Sequence[str]], record: Callable[[dict[str, Any]], None] | None) -> None:
    """Record a skipped step with the keys of its images; end the run after too many in a row."""
    images = sorted({key for own in keys for key in own})
    if record is not None:
        record({"step": done.step, "skipped": True, "images": images})
        log.warning(
            "step %d skipped: its loss or gradients are not finite; its images: %s", done.step, " ".join(images)
        )
    if done.bad_in_a_row >= MAX_BAD_STEPS:
        raise NumericalError(
            f"loss or gradients were not finite for {MAX_BAD_STEPS} steps in a row, up to step {done.step}; lower "
            "train.lr and train.muon_lr in another run (--resume repeats these steps), or look at their images "
            "(metrics.jsonl names them) with geomed-mae inspect"
        )
