"""Early stopping: the best weights are kept, training ends when nothing gets better, and a resumed run agrees."""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch

from geomed_mae.config import TrainConfig
from geomed_mae.training import checkpoint
from geomed_mae.training.early import EarlyStopping
from geomed_mae.training.learner import Learner
from geomed_mae.training.loop import fit

SCORES = {2: 0.1, 4: 0.5, 6: 0.4, 8: 0.5, 10: 0.3, 12: 0.9}
"""Steps -> score of a validation: best at 4, not beaten by an equal score at 8, and at 12, which patience may spare."""


@dataclass(frozen=True)
class Numbers:
    """A batch of one number."""

    value: torch.Tensor
    keys: tuple[str, ...] = ("image",)

    def __len__(self) -> int:
        return 1

    def to(self, device):
        return self


class Line(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 3))

    def forward(self, x):
        return (self.weight @ x).square().sum() + torch.rand(()) * self.weight.sum()


def train(folder, *, steps=12, scores=SCORES, validate_every=2, resumed=None, stop_after=None, **changes):
    """Train a toy module; its scores are a table. Returns the learner, the stopping, the progress and the lines."""
    config = TrainConfig(
        steps=steps,
        batch_size=1,
        checkpoint_every=1,
        keep=50,
        log_every=1,
        device="cpu",
        validate_every=validate_every,
        **changes,
    )
    torch.manual_seed(0)
    learner, lines, asked = Learner(Line(), config), [], []

    def score(module):
        asked.append(module)
        return scores[validate_every * (early.numbers["scored"] + 1)]

    def blank():
        return Line()

    early = EarlyStopping(learner, config, score, blank=blank, record=lines.append, resumed=resumed)

    def batches(first):
        for step in range(first, steps if stop_after is None else stop_after):
            yield Numbers(torch.full((3,), float(step + 1)))

    def step(batch, number):
        return learner.module(batch.value), {}

    try:
        done = fit(
            learner,
            batches,
            step,
            config,
            checkpoints=folder,
            record=lines.append,
            resumed=resumed,
            state=early.state,
            judge=early.judge,
            show_progress=False,
        )
    except (StopIteration, RuntimeError):
        return learner, early, None, lines
    return learner, early, done, lines


def test_the_weights_of_the_best_score_are_given_back(tmp_path):
    _, early, done, lines = train(tmp_path, steps=10)
    best = checkpoint.load(tmp_path / "step-00000004").model["weight"]
    assert not torch.equal(best, checkpoint.load(tmp_path / "step-00000010").model["weight"])
    assert torch.equal(early.finish().weight, best) and not early.finish().training
    assert early.summary("Dice", ended=done.ended) == {
        "metric": "Dice", "best": 0.5, "step": 4, "scored": 5, "stopped_early": False,
    }  # fmt: skip
    assert [(line["step"], line["validation"]) for line in lines if "validation" in line] == list(SCORES.items())[:5]


@pytest.mark.parametrize(("patience", "last"), [(1, 6), (2, 8), (3, 10), (4, 12)])
def test_training_ends_after_so_many_scores_that_are_not_better(tmp_path, patience, last):
    _, early, done, lines = train(tmp_path, patience=patience)
    assert done.step == last and done.ended == (last < 12)
    assert early.numbers["step"] == (4 if last < 12 else 12)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, last + 1))


def test_the_last_step_is_scored_even_where_it_is_no_multiple(tmp_path):
    _, early, done, _ = train(tmp_path, steps=7, scores={3: 0.2, 6: 0.1, 9: 0.3}, validate_every=3)
    assert done.step == 7 and early.numbers["step"] == 7 and early.numbers["scored"] == 3


@pytest.mark.parametrize("broken_at", [4, 9])
@pytest.mark.parametrize("ema", [None, 0.5])
def test_a_run_that_goes_on_ends_with_the_same_weights_and_numbers(tmp_path, broken_at, ema):
    whole = train(tmp_path / "whole", patience=3, ema=ema)
    train(tmp_path / "halves", patience=3, ema=ema, stop_after=broken_at)
    resumed = checkpoint.newest_valid(tmp_path / "halves")
    assert resumed.step == broken_at
    again = train(tmp_path / "halves", patience=3, ema=ema, resumed=resumed)
    assert again[2].step == whole[2].step == 10 and again[1].numbers == whole[1].numbers
    assert torch.equal(again[1].finish().weight, whole[1].finish().weight)
    files = [checkpoint.newest_valid(tmp_path / name) for name in ("whole", "halves")]
    assert torch.equal(files[0].best["weight"], files[1].best["weight"])
    assert torch.equal(files[0].model["weight"], files[1].model["weight"])


def test_a_run_that_ended_early_does_not_go_on_when_it_is_resumed(tmp_path):
    first = train(tmp_path, patience=1)
    resumed = checkpoint.newest_valid(tmp_path)
    assert json.loads((resumed.path / "state.json").read_text())["progress"]["ended"] is True
    again = train(tmp_path, patience=1, resumed=resumed)
    assert again[2].step == first[2].step == 6 and not again[3]
    assert torch.equal(again[1].finish().weight, first[1].finish().weight)


def test_the_average_is_what_is_scored_and_kept(tmp_path):
    _, early, _, _ = train(tmp_path, steps=4, ema=0.9)
    saved = checkpoint.newest_valid(tmp_path)
    assert torch.equal(saved.best["weight"], saved.average["weight"])
    assert torch.equal(early.finish().weight, saved.average["weight"])
    assert not torch.equal(saved.model["weight"], saved.average["weight"])


def test_without_any_score_the_first_weights_that_were_looked_at_are_kept(tmp_path):
    _, early, done, _ = train(tmp_path, steps=6, scores=dict.fromkeys((2, 4, 6)))
    assert done.step == 6 and early.numbers["best"] is None and early.numbers["step"] == 2
    assert torch.equal(early.finish().weight, checkpoint.load(tmp_path / "step-00000002").model["weight"])
