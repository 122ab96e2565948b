"""The loop: exact after an interruption, robust against broken steps, honest in what it records."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from torch import nn

from geomed_mae.config import TrainConfig
from geomed_mae.errors import IntegrityError, NumericalError, Preempted
from geomed_mae.training import checkpoint
from geomed_mae.training.loop import MAX_BAD_STEPS, autocast, fit
from geomed_mae.training.optim import build_optimizers

TRAIN = {"steps": 6, "batch_size": 4, "log_every": 2, "checkpoint_every": 100, "lr": 0.01, "seed": 3}


class Numbers:
    def __init__(self, step: int) -> None:
        self.step = step
        self.x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))

    def __len__(self) -> int:
        return 4

    def to(self, device):
        return self


def numbers(first):
    step = first
    while True:
        yield Numbers(step)
        step += 1


class Run:
    """A small model with dropout, whose randomness must be the same after a resume."""

    def __init__(self, folder, **train) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
        self.train = TrainConfig(**{**TRAIN, **train})
        self.optimizers = build_optimizers(self.module, self.train)
        self.folder, self.lines, self.seen = folder, [], []

    def step(self, batch, step):
        self.seen.append(step)
        loss = (self.module(batch.x) - 1).square().mean()
        return loss, {"part": loss.detach() * 2}

    def fit(self, step=None, **more):
        more.setdefault("resumed", checkpoint.newest_valid(self.folder))
        return fit(
            self.module,
            self.optimizers,
            numbers,
            step or self.step,
            self.train,
            checkpoints=self.folder,
            record=self.lines.append,
            show_progress=False,
            **more,
        )

    def state(self):
        return {**self.module.state_dict(), **self.optimizers.state_tensors()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(tmp_path, number):
    whole = Run(tmp_path / "whole")
    whole.fit()
    first = Run(tmp_path / "parts")

    def stop_in_third(batch, step):
        if step == 2:
            os.kill(os.getpid(), number)
        return first.step(batch, step)

    with pytest.raises(Preempted, match="told to stop at step 3 of 6: saved; continue with --resume"):
        first.fit(stop_in_third)
    second = Run(tmp_path / "parts")
    done = second.fit()
    assert first.seen == [0, 1, 2] and second.seen == [3, 4, 5]
    assert equal(second.state(), whole.state())
    assert done.step == 6 and done.samples == 24
    saved = [checkpoint.newest_valid(tmp_path / name) for name in ("whole", "parts")]
    assert equal(saved[0].model, saved[1].model) and equal(saved[0].optimizer, saved[1].optimizer)


def test_the_handlers_of_signals_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    Run(tmp_path).fit()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    Run(tmp_path).fit()
    again = Run(tmp_path)
    assert again.fit().step == 6 and again.seen == []


def test_checkpoints_come_every_so_many_steps_and_at_the_end(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(checkpoint, "save", lambda folder, step, **_: saved.append(step))
    Run(tmp_path, steps=7, checkpoint_every=3).fit()
    assert saved == [3, 6, 7]


def test_a_broken_step_is_skipped_and_recorded(tmp_path):
    run = Run(tmp_path)
    before = {}

    def broken_once(batch, step):
        if step == 3:
            before.update({name: tensor.clone() for name, tensor in run.module.state_dict().items()})
        if step == 4:
            assert equal(run.module.state_dict(), before)
        loss, parts = run.step(batch, step)
        return loss * (float("nan") if step == 3 else 1.0), parts

    done = run.fit(broken_once)
    assert done.skipped == 1 and done.bad_in_a_row == 0 and done.step == 6
    assert {"step": 4, "skipped": True} in run.lines
    assert all(torch.isfinite(tensor).all() for tensor in run.module.state_dict().values())


def test_an_infinite_gradient_is_a_broken_step_too(tmp_path):
    run = Run(tmp_path)

    def steep(batch, step):
        loss, parts = run.step(batch, step)
        if step == 1:
            loss = loss + (run.module[0].bias - run.module[0].bias.detach()).abs().sqrt().sum()  # d sqrt(0) = inf
        return loss, parts

    assert run.fit(steep).skipped == 1


def test_ten_broken_steps_in_a_row_end_the_run(tmp_path):
    run = Run(tmp_path, steps=100)
    with pytest.raises(NumericalError, match=rf"{MAX_BAD_STEPS} steps in a row, up to step 14; lower train.lr"):
        run.fit(lambda batch, step: (run.step(batch, step)[0] * (float("inf") if step >= 4 else 1), {}))


def test_log_lines_are_means_since_the_last_line(tmp_path):
    run = Run(tmp_path)
    losses = []

    def noted(batch, step):
        loss, parts = run.step(batch, step)
        losses.append(float(loss.detach()))
        return loss, parts

    done = run.fit(noted)
    assert [line["step"] for line in run.lines] == [2, 4, 6]
    for number, line in enumerate(run.lines):
        mean = sum(losses[2 * number : 2 * number + 2]) / 2
        assert line["loss"] == pytest.approx(mean) and line["part"] == pytest.approx(2 * mean)
        assert line["samples_per_second"] > 0 and 0 <= line["data_wait"] <= 1 and line["gradient_norm"] > 0
    assert done.first_loss == run.lines[0]["loss"] and done.last_loss == run.lines[-1]["loss"]


def test_gradients_are_clipped(tmp_path):
    run = Run(tmp_path, clip=1e-3, steps=1)
    norms = []
    original = run.optimizers.step
    run.optimizers.step = lambda: (norms.append(_norm(run.module)), original())
    run.fit()
    assert norms == [pytest.approx(1e-3, rel=1e-2)] and run.lines[0]["gradient_norm"] > 1e-3


def _norm(module):
    return float(torch.linalg.vector_norm(torch.cat([p.grad.flatten() for p in module.parameters()])))


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Run(tmp_path).fit()
    other = Run(tmp_path, steps=9)
    other.module = nn.Linear(3, 1)
    with pytest.raises(IntegrityError, match="step-00000006 belongs to another model or version"):
        other.fit()


def test_bf16_is_used_only_where_asked_or_where_the_hardware_has_it():
    cpu = torch.device("cpu")
    with autocast(cpu, "bf16"):
        assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.bfloat16
    for precision in ("auto", "fp32"):
        with autocast(cpu, precision):
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == torch.float32


def test_loop_optim_and_checkpoint_import_without_the_heavy_parts():
    import subprocess
    import sys

    code = (
        "import sys; blocked = ('pydantic', 'ruamel', 'rasterio', 'pydicom', 'tensorboard', 'tqdm', 'matplotlib')\n"
        "import geomed_mae.training.loop, geomed_mae.training.optim, geomed_mae.training.checkpoint\n"
        "print([name for name in blocked if name in sys.modules and name != 'tqdm'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
