"""What a dry run says of the loader is what the loader then does."""

from __future__ import annotations

import multiprocessing
import time
from dataclasses import replace

import numpy as np
import pytest

from geomed_mae.config import DataConfig
from geomed_mae.samples.loader import Steps, load_steps
from geomed_mae.samples.rate import LoaderRate, cache_bytes, loader_memory, measure_loader, window_bytes

CONFIG = DataConfig(modality=("landsat7",), crop_2d=(16, 16), crops_per_read=4, shuffle_steps=2, cache_mb=0)
READ_S = 0.1


class Clock:
    """Stands still but for reads."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def archive(memory_index):
    rng = np.random.default_rng(0)
    for size in (40, 64):
        memory_index.add(rng.random((3, size, size)))
    return memory_index


@pytest.fixture
def clock(archive, monkeypatch):
    """A clock on which each read of several crops takes READ_S, and nothing else takes time."""
    clock, read_many = Clock(), archive.read_many

    def slow(key, windows):
        clock.now += READ_S
        return read_many(key, windows)

    monkeypatch.setattr(archive, "read_many", slow)
    return clock


def test_the_rate_is_the_crops_of_a_read_over_its_time(archive, clock):
    found = measure_loader(Steps(archive, CONFIG, seed=0, batch_size=8), seconds=5.0, clock=clock)
    # A window is 16 crops in 4 reads.
    assert found.samples_per_second == pytest.approx(4 / READ_S)
    assert found.shared_reads and found.slow == pytest.approx(found.quick)


def test_a_window_that_would_take_too_long_is_not_made(archive, clock):
    steps = Steps(archive, CONFIG, seed=0, batch_size=512)  # 1024 crops, or 25 s on this clock
    found = measure_loader(steps, seconds=2.0, clock=clock)
    assert not found.shared_reads and clock.now < 2 * 2.0
    assert found.samples_per_second == pytest.approx(1 / READ_S)
    assert measure_loader(steps, seconds=2.0, workers=3, clock=clock).samples_per_second == pytest.approx(3 / READ_S)


def test_images_that_memory_keeps_do_not_count_as_slow(archive, monkeypatch):
    clock, read = Clock(), archive.read

    def slow(key, window=None):
        clock.now += 10.0
        return read(key, window)

    monkeypatch.setattr(archive, "read", slow)
    steps = Steps(archive, CONFIG.model_copy(update={"cache_mb": 64}), seed=0, batch_size=8)
    found = measure_loader(steps, seconds=40.0, clock=clock)
    assert clock.now == 10.0 * len(archive.rows) and found.shared_reads


def test_the_first_round_does_not_count():
    # Rounds are of one size, so that all samples over all time is the harmonic mean.
    assert LoaderRate.of([1.0, 4.0, 12.0, 6.0]) == LoaderRate(pytest.approx(6.0), 5.0, 9.0, 3)
    assert LoaderRate.of([2.0]) == LoaderRate(2.0, 2.0, 2.0, 1)


@pytest.mark.parametrize("workers", [0, 2])
def test_training_then_loads_at_the_measured_rate(archive, workers, monkeypatch):
    read_many = archive.read_many
    monkeypatch.setattr(archive, "read_many", lambda *asked: time.sleep(0.02) or read_many(*asked))
    steps = Steps(archive, CONFIG, seed=0, batch_size=8)
    found = measure_loader(steps, workers=workers, seconds=1.0)
    assert not multiprocessing.active_children()
    begin, count = time.perf_counter(), 24
    for _ in load_steps(steps, 0, count, workers=workers):
        pass
    rate = 8 * count / (time.perf_counter() - begin)
    # Workers take a moment to start, and machines have other work.
    assert found.samples_per_second / 4 < rate < 4 * found.samples_per_second


def test_the_bytes_of_a_window_are_those_of_its_batches(archive):
    steps = Steps(archive, CONFIG, seed=0, batch_size=8)
    made = [steps[step] for step in range(steps.window_steps)]
    assert window_bytes(steps) == sum(batch.raw.nbytes + batch.valid.nbytes for batch in made)


def test_every_worker_has_images_and_windows_of_its_own(archive):
    config = CONFIG.model_copy(update={"cache_mb": 1})
    steps = Steps(archive, config, seed=0, batch_size=1024)
    alone, several = loader_memory(steps, 0), loader_memory(steps, 3)
    assert alone["in_flight"] == 0 and "shared_memory_free" not in alone
    assert several["images"] == pytest.approx(3 * alone["images"], abs=0.2)
    assert several["windows"] == pytest.approx(3 * alone["windows"], abs=0.2)
    assert several["in_flight"] == pytest.approx(4 * window_bytes(steps) / 2**20, abs=0.1)
    assert several["shared_memory_free"] > 0
    single = Steps(archive, config.model_copy(update={"shuffle_steps": 1}), seed=0, batch_size=1024)
    assert loader_memory(single, 3)["in_flight"] == pytest.approx(7 * window_bytes(single) / 2**20, abs=0.1), "two each"


def test_the_cache_takes_all_images_or_its_limit_or_nothing(archive):
    rows = [replace(row, dtype="uint16") for row in archive.rows]
    every = (40 * 40 + 64 * 64) * (3 * 2 + 1)
    assert cache_bytes(CONFIG, rows) == every
    assert cache_bytes(CONFIG.model_copy(update={"cache_gb": 1e-6}), rows) == int(1e-6 * 2**30)
    assert cache_bytes(CONFIG.model_copy(update={"cache": "off"}), rows) == 0
