"""benchmarks/step.py: its FLOPs are torch's own count, and compiling a model changes its losses by less than 1 %."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def step(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import step

    return step


def options(**changes: object) -> argparse.Namespace:
    values = {"size": "tiny", "crop": [32, 32], "channels": [3], "precision": "fp32", "variants": ["exact", "fast_25"]}
    values |= {"batch": 2, "rounds": 2, "threads": 1, "device": "cpu", "compile": False, "curve": 0}
    return argparse.Namespace(**{**values, **changes})


@pytest.mark.parametrize("variant", ["exact", "default", "fast_25"])
@pytest.mark.parametrize("space", [(24, 32), (8, 12, 8)])
def test_the_formula_of_flops_is_torchs_count(step, variant, space, monkeypatch):
    monkeypatch.setattr(step, "PATCH", 4)
    model = step.Ours(variant, "tiny", torch.randn(2, 4, *space), compiled=False)
    with FlopCounterMode(display=False) as counter:
        model().backward()
    # What the last decoder block leaves out is not in the formula.
    assert counter.get_total_flops() == pytest.approx(model.flops, rel=0.06)


def test_a_shape_gives_speed_ratios_and_the_share_of_the_matrix_products(step):
    line, more = step.measure(options(channels=[3, 5]))
    assert (line["channels"], more["channels"]) == (3, 5) and more["exact"]["cost_of_channels"][0] > 0
    assert line["published"]["images_per_second"] > 0
    for variant in ("exact", "fast_25"):
        middle, low, high = line[variant]["speedup_cpu"]
        assert 0 < low <= middle <= high
        assert line[variant]["gemm_share"] > 0


def test_volumes_have_no_peer(step):
    (line,) = step.measure(options(crop=[16, 32, 32], variants=["default"], channels=[1]))
    assert "published" not in line and "speedup_cpu" not in line["default"]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["default", "fast_25"])
def test_200_compiled_steps_follow_the_eager_losses_within_one_percent(step, variant):
    found = step.curve(options(batch=4, curve=200, crop=[64, 64], variants=[variant]))
    assert found["largest_relative_difference"] < 0.01
    assert found["last_loss"] < 0.9 * found["first_loss"], "a curve that falls, so that there is something to follow"
