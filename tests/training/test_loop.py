"""The loop: exact after an interruption, robust against broken steps, honest in what it records."""

from __future__ import annotations

import contextlib
import os
import signal
import time
import warnings
import weakref

import pytest
import torch
from torch import nn

from geomed_mae.config import TrainConfig
from geomed_mae.errors import ConfigError, IntegrityError, NumericalError, Preempted
from geomed_mae.training import checkpoint
from geomed_mae.training.learner import Learner
from geomed_mae.training.loop import MAX_BAD_STEPS, autocast, fit
from geomed_mae.training.progress import Bar, Progress, Window

TRAIN = {"steps": 6, "batch_size": 4, "log_every": 2, "checkpoint_every": 100, "lr": 0.01, "seed": 3}


class Numbers:
    def __init__(self, step: int, x=None) -> None:
        self.step = step
        self.x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step)) if x is None else x
        self.keys = tuple(f"image{step}-{number}" for number in range(len(self.x)))

    def __len__(self) -> int:
        return len(self.x)

    def part(self, first, stop):
        return Numbers(self.step, self.x[first:stop])

    def to(self, device):
        return self


def numbers(first):
    step = first
    while True:
        yield Numbers(step)
        step += 1


class Run:
    """A small model with dropout, whose randomness must be the same after a resume."""

    def __init__(self, folder, dropout=0.5, **train) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout), nn.Linear(8, 1))
        self.train = TrainConfig(**{**TRAIN, **train})
        self.learner = Learner(self.module, self.train)
        self.optimizers = self.learner.optimizers
        self.folder, self.lines, self.seen = folder, [], []

    def step(self, batch, step):
        self.seen.append(step)
        loss = (self.module(batch.x) - 1).square().mean()
        return loss, {"part": loss.detach() * 2}

    def fit(self, step=None, **more):
        more.setdefault("resumed", checkpoint.newest_valid(self.folder))
        return fit(
            self.learner,
            numbers,
            step or self.step,
            self.train,
            checkpoints=self.folder,
            record=self.lines.append,
            show_progress=False,
            **more,
        )

    def state(self):
        average = {} if self.learner.average is None else self.learner.average.shadow
        return {
            **self.module.state_dict(),
            **self.optimizers.state_tensors(),
            **{f"average {name}": value for name, value in average.items()},
        }


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("number", "train"),
    [
        (signal.SIGTERM, {}),
        (signal.SIGUSR1, {"ema": 0.9, "accumulate": 2}),
        (signal.SIGTERM, {"optimizer": "adamw", "ema": 0.5}),
    ],
)
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(tmp_path, number, train):
    whole = Run(tmp_path / "whole", **train)
    whole.fit()
    first = Run(tmp_path / "parts", **train)

    def stop_in_third(batch, step):
        if step == 2:
            os.kill(os.getpid(), number)
        return first.step(batch, step)

    with pytest.raises(Preempted, match="told to stop at step 3 of 6: saved; continue with --resume"):
        first.fit(stop_in_third)
    second = Run(tmp_path / "parts", **train)
    done = second.fit()
    parts = train.get("accumulate", 1)
    assert first.seen[::parts] == [0, 1, 2] and second.seen[::parts] == [3, 4, 5]
    assert equal(second.state(), whole.state())
    assert done.step == 6 and done.samples == 24
    saved = [checkpoint.newest_valid(tmp_path / name) for name in ("whole", "parts")]
    for part in ("model", "optimizer", "average"):
        assert equal(getattr(saved[0], part), getattr(saved[1], part))
    assert bool(saved[0].average) == ("ema" in train)


def test_the_handlers_of_signals_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    Run(tmp_path).fit()
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    Run(tmp_path).fit()
    again = Run(tmp_path)
    assert again.fit().step == 6 and again.seen == []


def test_the_checkpoint_that_a_run_goes_on_from_does_not_stay_in_memory(tmp_path):
    Run(tmp_path, ema=0.9, steps=3).fit()
    resumed = checkpoint.newest_valid(tmp_path)
    held = [
        weakref.ref(value) for part in (resumed.model, resumed.optimizer, resumed.average) for value in part.values()
    ]
    left = []
    Run(tmp_path, ema=0.9).fit(
        resumed=resumed, observe=lambda done: left.append(sum(one() is not None for one in held))
    )
    assert len(held) > 10 and left == [0, 0, 0]
    assert resumed.step == 3


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
    images = [f"image3-{number}" for number in range(4)]
    assert {"step": 4, "skipped": True, "images": images} in run.lines
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
        assert line["samples"] == 4 * line["step"] and line["seconds"] > 0
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


def test_a_batch_in_parts_gives_the_gradient_of_the_whole(tmp_path):
    runs = {parts: Run(tmp_path / str(parts), accumulate=parts, dropout=0.0, optimizer="adamw") for parts in (1, 2, 4)}
    for run in runs.values():
        run.fit()
    assert runs[4].seen == [step for step in range(6) for _ in range(4)]
    for parts in (2, 4):
        for one, other in zip(runs[1].lines, runs[parts].lines, strict=True):
            assert one["loss"] == pytest.approx(other["loss"], rel=1e-5)
            assert one["gradient_norm"] == pytest.approx(other["gradient_norm"], rel=1e-5)
        for one, other in zip(runs[1].module.parameters(), runs[parts].module.parameters(), strict=True):
            assert torch.allclose(one, other, atol=1e-5)


def test_parts_that_do_not_divide_a_batch_are_refused():
    with pytest.raises(ValueError, match="accumulate 3 is no divisor of batch_size 4"):
        TrainConfig(**{**TRAIN, "accumulate": 3})


def test_the_average_is_the_one_computed_by_hand_and_skips_broken_steps(tmp_path):
    run = Run(tmp_path, ema=0.6, steps=12)
    mine = {name: value.detach().double() for name, value in run.module.named_parameters()}
    updates = 0

    def average(step):
        nonlocal updates
        if step == 5:
            return
        decay = min(0.6, (1 + updates) / (10 + updates))
        updates += 1
        for name, value in run.module.named_parameters():
            mine[name] = decay * mine[name] + (1 - decay) * value.detach().double()

    def broken_once(batch, step):
        loss, parts = run.step(batch, step)
        return loss * (float("nan") if step == 4 else 1.0), parts

    run.fit(broken_once, observe=average)
    assert updates == 11
    for name, shadow in run.learner.average.shadow.items():
        assert torch.allclose(shadow.double(), mine[name], atol=1e-6), name
    weights = run.learner.weights()
    assert torch.equal(weights["0.weight"], run.learner.average.shadow["0.weight"])
    saved = checkpoint.newest_valid(tmp_path)
    assert equal(saved.weights, weights) and not equal(saved.model, weights)


def test_the_model_at_its_best_is_a_copy_with_averaged_weights_or_the_model_itself(tmp_path):
    run = Run(tmp_path / "a", ema=0.9)
    run.fit()
    before = {name: value.clone() for name, value in run.module.state_dict().items()}
    best = run.learner.best(lambda: nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1)))
    assert not best.training and equal(best.state_dict(), run.learner.weights())
    assert not equal(best.state_dict(), before) and equal(run.module.state_dict(), before)
    plain = Run(tmp_path / "b")
    assert plain.learner.best(lambda: None) is plain.module


def test_observers_are_told_each_step_after_it_is_saved_and_change_nothing(tmp_path):
    plain, watched = Run(tmp_path / "plain"), Run(tmp_path / "watched", checkpoint_every=1)
    seen = []

    def look(step):
        seen.append((step, checkpoint.newest_valid(tmp_path / "watched").step))
        watched.module.eval()
        torch.manual_seed(step)
        torch.randn(7)

    plain.fit()
    watched.fit(observe=look)
    assert seen == [(step, step) for step in range(1, 7)]
    assert equal(plain.state(), watched.state())


def test_a_compiled_model_learns_the_same_up_to_rounding(tmp_path):
    plain, compiled = Run(tmp_path / "a", dropout=0.0), Run(tmp_path / "b", dropout=0.0, compile=True)
    plain.fit()
    with warnings_of_torch_ignored():
        compiled.fit()
    for one, other in zip(plain.module.parameters(), compiled.module.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-4)


def test_a_compiler_that_fails_is_an_error_that_names_the_key(tmp_path, monkeypatch):
    import torch._inductor.config as inductor

    run = Run(tmp_path, compile=True, dropout=0.25)
    monkeypatch.setattr(inductor.cpp, "cxx", ("no-such-compiler",))
    monkeypatch.setattr(inductor, "force_disable_caches", True)
    with warnings_of_torch_ignored(), pytest.raises(ConfigError, match=r"torch.compile failed .*train.compile=false"):
        run.fit()


@contextlib.contextmanager
def warnings_of_torch_ignored():
    """Compiling imports parts of torch that warn of other parts of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    Run(tmp_path).fit()
    other = Run(tmp_path, steps=9)
    other.learner = Learner(nn.Linear(3, 1), other.train)
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


def test_the_bar_shows_what_is_left_the_loss_and_the_wait_for_data(capsys):
    done, window = Progress(), Window(torch.device("cpu"))
    with Bar(0, 4, show=True) as bar:
        for _ in range(2):
            with window.waiting():
                pass
            done.count(4, finite=True)
            done.note(0.25)
            bar.advance(done, window)
    shown = capsys.readouterr().err
    assert "2/4" in shown and "loss=0.2500" in shown and "data_wait=" in shown and "step" in shown
    with Bar(0, 4, show=False) as quiet:
        quiet.advance(done, window)
    assert capsys.readouterr().err == ""


def test_waiting_for_data_is_told_as_a_share_of_the_time(monkeypatch):
    now = iter([0.0, 1.0, 4.0, 10.0, 10.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(now))
    window = Window(torch.device("cpu"))
    with window.waiting():
        pass
    window.add({"loss": torch.tensor(2.0)}, samples=5, finite=True)
    assert window.line() == {"loss": 2.0, "samples_per_second": 0.5, "data_wait": 0.3}
