"""Dealing: every sample is dealt once, reads stay in their lane, and a batch has crops of many reads."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.samples.dealing import crops_per_read, deal, lanes

CASES = [(1, 32, 8), (8, 32, 16), (3, 32, 8), (5, 12, 4), (8, 7, 16), (4, 10, 4), (2, 6, 100), (8, 1, 3), (6, 48, 1)]


@pytest.mark.parametrize(("steps", "batch", "crops"), CASES)
def test_every_sample_of_every_step_is_dealt_once_by_as_few_reads_as_can_be(steps, batch, crops):
    reads = list(deal(5, 40, steps, batch_size=batch, crops=crops))
    dealt = sorted((step, sample) for read in reads for step, sample in zip(read.steps, read.samples, strict=True))
    assert dealt == [(step, sample) for step in range(steps) for sample in range(batch)]
    assert all(len(read) <= crops for read in reads) and len(reads) == -(-steps * batch // crops)
    assert len({read.number for read in reads}) == len(reads), "each has random numbers of its own"


@pytest.mark.parametrize(("steps", "batch", "crops"), CASES)
def test_processes_whose_number_divides_that_of_the_lanes_share_no_read(steps, batch, crops):
    count = lanes(steps, batch, crops)
    assert batch % count == 0
    for world in (size for size in range(1, batch + 1) if count % size == 0):
        share = batch // world
        for read in deal(5, 40, steps, batch_size=batch, crops=crops):
            assert len(set((read.samples // share).tolist())) == 1


def test_usual_batches_can_be_shared_by_many_processes_without_reading_twice():
    assert lanes(8, 32, crops_per_read(8, 32, None)) == 16
    assert lanes(8, 256, crops_per_read(8, 256, None)) == 128
    assert lanes(1, 32, crops_per_read(1, 32, None)) == 4


@pytest.mark.parametrize(
    ("steps", "batch", "asked", "found"),
    [
        *((1, 1, None, 1), (1, 16, None, 4), (1, 64, None, 16), (8, 8, None, 4), (8, 32, None, 16), (2, 32, None, 8)),
        *((8, 512, None, 16), (8, 64, 3, 3), (1, 4, 9, 9)),
    ],
)
def test_the_number_of_crops_a_read_leaves_a_batch_many_places_unless_the_recipe_says(steps, batch, asked, found):
    assert crops_per_read(steps, batch, asked) == found


def test_steps_that_share_reads_have_crops_of_more_of_them():
    def reads_in_a_batch(steps: int) -> list[int]:
        made = list(deal(0, 0, steps, batch_size=32, crops=crops_per_read(steps, 32, None)))
        return [sum(step in read.steps for read in made) for step in range(steps)]

    assert reads_in_a_batch(1) == [4] and min(reads_in_a_batch(8)) == 16


def test_within_a_lane_the_order_is_random_and_a_function_of_its_key():
    def steps_of(seed: int, first: int) -> list[list[int]]:
        return [read.steps.tolist() for read in deal(seed, first, 8, batch_size=7, crops=14)]

    assert steps_of(0, 8) == steps_of(0, 8)
    assert steps_of(0, 8) != steps_of(1, 8) and steps_of(0, 8) != steps_of(0, 16)
    # The 56 slots of the one lane are dealt to four reads: which steps the first of them gets is a matter of luck.
    first = np.array([np.bincount(steps_of(seed, 0)[0], minlength=8) for seed in range(400)])
    assert np.abs(first.mean(axis=0) - 14 / 8).max() < 0.25 and first.std() > 0.3
