"""The one training loop, of pretraining and of fine-tuning; read it from top to bottom.

What differs between the two is given to it: `step`, the function from a batch and a step number to a loss, and
`batches`, the function from the first step to the batches from there on. Both must be pure functions of their
arguments and of the parameters; then a run that is interrupted and resumed is, bit for bit, the run that was not.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from geomed_mae.errors import IntegrityError, NumericalError, Preempted
from geomed_mae.training import checkpoint
from geomed_mae.training.optim import Optimizers, lr_scale

if TYPE_CHECKING:
    from geomed_mae.config import TrainConfig

MAX_BAD_STEPS = 10
"""Steps in a row without a finite loss and gradient after which a run stops."""

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send before they end a job (SLURM: --signal=USR1@60)."""

SEED_STRIDE = 1_000_003
"""Distance between the seeds of neighbouring runs: longer than any run, so that no two share a step's seed."""

log = logging.getLogger(__name__)


class Sized(Protocol):
    """A batch: knows its number of samples and can move to a device."""

    def __len__(self) -> int: ...

    def to(self, device: torch.device) -> Any:
        """Return the batch on `device`."""


Loss = tuple[Tensor, dict[str, Tensor]]
"""A scalar to minimise, and its parts for the log."""


@dataclass
class Progress:
    """What a run has come to. `first_loss` and `last_loss` are means over the first and the last logged steps."""

    step: int = 0
    samples: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    seconds: float = 0.0

    @property
    def samples_per_second(self) -> float:
        """Samples per second of the time spent in the loop."""
        return self.samples / max(self.seconds, 1e-9)

    def count(self, samples: int, finite: bool) -> None:
        """Count one step."""
        self.step += 1
        self.samples += samples
        self.skipped += not finite
        self.bad_in_a_row = 0 if finite else self.bad_in_a_row + 1

    def note(self, loss: float | None) -> None:
        """Remember the loss of a log line; None where every step of it was skipped."""
        if loss is not None:
            self.first_loss = loss if self.first_loss is None else self.first_loss
            self.last_loss = loss


class _Clock:
    """Seconds spent in the loop, those of earlier sessions included."""

    def __init__(self, earlier: float) -> None:
        self.earlier, self.begin = earlier, time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds until now."""
        return self.earlier + time.perf_counter() - self.begin


class _Window:
    """Means since the last line of the log; losses stay on their device until a line is due."""

    def __init__(self) -> None:
        self.losses: list[Tensor] = []
        self.parts: dict[str, list[Tensor]] = {}
        self.samples, self.waited, self.begin = 0, 0.0, time.perf_counter()

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the body as waiting for data."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    def add(self, loss: Tensor, parts: dict[str, Tensor], samples: int, finite: bool) -> None:
        """Take in one step; broken ones count as time, not as loss."""
        self.samples += samples
        if finite:
            self.losses.append(loss.detach())
            for name, value in parts.items():
                self.parts.setdefault(name, []).append(torch.as_tensor(value).detach())

    def line(self) -> dict[str, float | None]:
        """Return the means."""
        elapsed = max(time.perf_counter() - self.begin, 1e-9)
        return {
            "loss": _mean(self.losses),
            **{name: _mean(values) for name, values in self.parts.items()},
            "samples_per_second": round(self.samples / elapsed, 3),
            "data_wait": round(self.waited / elapsed, 4),
        }


def _mean(values: list[Tensor]) -> float | None:
    return float(torch.stack([value.float() for value in values]).mean()) if values else None


def pick_device(name: str) -> torch.device:
    """Return the device of `train.device`; "auto" is cuda when there is one."""
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager:
    """Return the context of the forward pass: bf16 autocast, or nothing for fp32."""
    if precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported()
    else:
        bf16 = precision == "bf16"
    return torch.autocast(device.type, torch.bfloat16) if bf16 else contextlib.nullcontext()


@contextlib.contextmanager
def _stop_on_signal() -> Iterator[threading.Event]:
    """Yield an event that a signal to stop sets; the handlers from before are put back."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _progress_bar(first: int, steps: int, show: bool) -> Any:
    """Return a tqdm bar on stderr, or something with its interface where tqdm is missing or not wanted."""
    try:
        from tqdm import tqdm
    except ImportError:
        show = False
    if show:
        return tqdm(total=steps, initial=first, unit="step", file=sys.stderr, dynamic_ncols=True, mininterval=0.5)
    return contextlib.nullcontext()


def _restore(module: nn.Module, optimizers: Optimizers, resumed: checkpoint.Checkpoint | None) -> Progress:
    if resumed is None:
        return Progress()
    try:
        module.load_state_dict(resumed.model)
        optimizers.load_state_tensors(resumed.optimizer)
        return Progress(**resumed.state["progress"])
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        detail = str(error).splitlines()[0]
        raise IntegrityError(f"checkpoint {resumed.path.name} belongs to another model or version: {detail}") from error


def fit(
    module: nn.Module,
    optimizers: Optimizers,
    batches: Callable[[int], Iterator[Sized]],
    step: Callable[[Any, int], Loss],
    train: TrainConfig,
    *,
    checkpoints: Path,
    record: Callable[[dict[str, Any]], None],
    state: dict[str, Any] | None = None,
    resumed: checkpoint.Checkpoint | None = None,
    show_progress: bool = True,
) -> Progress:
    """Train until `train.steps` steps are done, or until told to stop.

    Args:
        module: everything that is trained, on its device; `optimizers` are of its parameters.
        optimizers: see `optim.build_optimizers`.
        batches: gives the batches from a step on.
        step: gives (loss, parts) of a batch; called under autocast, must compute the loss itself in fp32.
        train: steps, clip, log_every, checkpoint_every, keep, precision, seed, lr, warmup.
        checkpoints: folder of checkpoints; `state` is kept in each of them, as JSON.
        record: is given one dictionary a log line (see `metrics.jsonl`).
        state: see `checkpoints`.
        resumed: where to go on from; None starts at step 0.
        show_progress: a bar on stderr.

    Raises:
        Preempted: SIGTERM or SIGUSR1 came; the state is saved. OutputError: a checkpoint cannot be written.
        NumericalError: MAX_BAD_STEPS broken steps in a row. IntegrityError: `resumed` does not fit the module.
    """
    device, parameters = next(module.parameters()).device, list(optimizers.parameters())
    done = _restore(module, optimizers, resumed)
    clock = _Clock(done.seconds)
    module.train()
    with (
        _stop_on_signal() as stop,
        _progress_bar(done.step, train.steps, show_progress) as bar,
        contextlib.closing(batches(done.step)) as source,
    ):
        window = _Window()
        while done.step < train.steps:
            # 1. data
            with window.waiting():
                batch = next(source)

            # 2. forward and backward; the generator is set anew, so that no random state has to be saved
            torch.manual_seed(train.seed * SEED_STRIDE + done.step)
            optimizers.set_lr(scale := lr_scale(done.step, train.steps, train.warmup))
            with autocast(device, train.precision):
                loss, parts = step(batch.to(device), done.step)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(parameters, train.clip)

            # 3. update, unless loss or gradients are broken; such a step is skipped and recorded
            if finite := bool(torch.isfinite(norm) & torch.isfinite(loss.detach())):
                optimizers.step()
            optimizers.zero_grad()
            done.count(len(batch), finite)
            window.add(loss, parts, len(batch), finite)
            _watch(done, finite, record)

            # 4. tell
            last = done.step == train.steps
            if last or done.step % train.log_every == 0:
                line = window.line()
                done.note(line["loss"])
                record({"step": done.step, **line, "lr": train.lr * scale, "gradient_norm": float(norm)})
                window = _Window()
            _advance(bar, done)

            # 5. save
            if last or stop.is_set() or done.step % train.checkpoint_every == 0:
                done.seconds = clock.total
                _save(checkpoints, module, optimizers, {**(state or {}), "progress": vars(done)}, train.keep)
            if stop.is_set() and not last:
                raise Preempted(f"told to stop at step {done.step} of {train.steps}: saved; continue with --resume")
    return done


def _advance(bar: Any, done: Progress) -> None:
    if bar is not None:
        bar.set_postfix(loss="-" if done.last_loss is None else f"{done.last_loss:.4f}", refresh=False)
        bar.update(1)


def _watch(done: Progress, finite: bool, record: Callable[[dict[str, Any]], None]) -> None:
    """Record a skipped step; end the run after too many in a row."""
    if finite:
        return
    record({"step": done.step, "skipped": True})
    log.warning("step %d skipped: its loss or gradients are not finite", done.step)
    if done.bad_in_a_row >= MAX_BAD_STEPS:
        raise NumericalError(
            f"loss or gradients were not finite for {MAX_BAD_STEPS} steps in a row, up to step {done.step}; lower "
            "train.lr and train.muon_lr, or look for extreme values with geomed-mae inspect"
        )


def _save(folder: Path, module: nn.Module, optimizers: Optimizers, state: dict[str, Any], keep: int) -> None:
    step = state["progress"]["step"]
    model, optimizer = module.state_dict(), optimizers.state_tensors()
    checkpoint.save(folder, step, model=model, optimizer=optimizer, state=state, keep=keep)
