"""What a user sees of a running loop: counts, means since the last line, and a bar with the time that is left."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass
class Progress:
    """What a run has come to. `first_loss` and `last_loss` are means over the first and the last logged steps.

    `ended` says that training ended before its last step, because validation no longer got better.
    """

    step: int = 0
    samples: int = 0
    skipped: int = 0
    bad_in_a_row: int = 0
    first_loss: float | None = None
    last_loss: float | None = None
    seconds: float = 0.0
    ended: bool = False

    @property
    def samples_per_second(self) -> float:
        """Samples per second of the time spent in the loop."""
        return self.samples / max(self.seconds, 1e-9)

    @property
    def totals(self) -> dict[str, float]:
        """Samples and seconds of the whole run, for the log."""
        return {"samples": self.samples, "seconds": round(self.seconds, 3)}

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


class Clock:
    """Seconds spent in the loop, those of earlier sessions included."""

    def __init__(self, earlier: float) -> None:
        self.earlier, self.begin = earlier, time.perf_counter()

    @property
    def total(self) -> float:
        """Seconds until now."""
        return self.earlier + time.perf_counter() - self.begin


class Window:
    """Means since the last line of the log; losses stay on their device until a line is due."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.losses: dict[str, list[Tensor]] = {"loss": []}
        self.samples, self.waited, self.begin = 0, 0.0, time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Count the time of the body as waiting for data."""
        asked = time.perf_counter()
        yield
        self.waited += time.perf_counter() - asked

    @property
    def data_wait(self) -> float:
        """Share of the time, 0 to 1, that went into waiting for data."""
        return self.waited / max(time.perf_counter() - self.begin, 1e-9)

    def add(self, losses: Mapping[str, Tensor], samples: int, finite: bool) -> None:
        """Take in one step; broken ones count as time, not as loss."""
        self.samples += samples
        if finite:
            for name, value in losses.items():
                self.losses.setdefault(name, []).append(value)

    def line(self) -> dict[str, float | None]:
        """Return the means, and on CUDA the largest memory in MiB."""
        elapsed = max(time.perf_counter() - self.begin, 1e-9)
        line = {
            **{name: _mean(values) for name, values in self.losses.items()},
            "samples_per_second": round(self.samples / elapsed, 3),
            "data_wait": round(self.data_wait, 4),
        }
        if self.device.type == "cuda":
            line["gpu_memory_mb"] = round(torch.cuda.max_memory_allocated(self.device) / 2**20, 1)
        return line


def _mean(values: list[Tensor]) -> float | None:
    return float(torch.stack(values).mean()) if values else None


LOGGED_EVERY_S = 60.0
"""Time between two states of the progress bar where stderr is no terminal."""


class Bar:
    """A bar on stderr: steps, time that is left, time of a step, the last loss, the share of waiting for data.

    Where tqdm is missing, or nothing is to be shown, it does nothing.
    """

    def __init__(self, first: int, steps: int, show: bool) -> None:
        self._bar: Any = None
        if not show:
            return
        with contextlib.suppress(ImportError):
            from tqdm import tqdm

            # A file, such as the log of a scheduler, keeps every state of the bar: there one a minute will do.
            often = 0.5 if sys.stderr.isatty() else LOGGED_EVERY_S
            shown = {"unit": "step", "file": sys.stderr, "dynamic_ncols": True, "mininterval": often}
            self._bar = tqdm(total=steps, initial=first, maxinterval=max(often, 10), **shown)

    def advance(self, done: Progress, window: Window) -> None:
        """Show that a step is done."""
        if self._bar is not None:
            loss = "-" if done.last_loss is None else f"{done.last_loss:.4f}"
            self._bar.set_postfix(loss=loss, data_wait=f"{window.data_wait:.0%}", refresh=False)
            self._bar.update(1)

    def __enter__(self) -> Bar:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
