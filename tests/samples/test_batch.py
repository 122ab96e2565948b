"""From stored numbers to physical values: the readers' bits, on the CPU and on a device, turned alike."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from geomed_mae.image import Channel
from geomed_mae.samples.augment import Symmetry
from geomed_mae.samples.batch import Batch, read_on_device
from geomed_mae.samples.buckets import Bucket
from geomed_mae.samples.filling import Drawn, Filling, Memory
from geomed_mae.samples.piece import Piece

SYMMETRIES = [
    Symmetry(axes, turns) for axes, turns in itertools.product(((), (-1,), (-2,), (-2, -1), (-3,), (-3, -1)), range(4))
]
RANGES = {"uint8": (0, 256), "int8": (-128, 128), "uint16": (0, 65_536), "int16": (-32_768, 32_768)}


class Row:
    """What a batch takes from a row."""

    def __init__(self, number: int, channels: tuple[Channel, ...]) -> None:
        self.key, self.channels, self.spacing = f"k{number}", channels, (2.0, 1.0, 3.0)
        self.statistics = tuple(range(len(channels)))


def piece(rng, dtype: str, shape: tuple[int, ...], *, valid_channels: int = 1, plain: bool = False) -> Piece:
    """Return a random piece with invalid values, which are 0 as they should."""
    valid = rng.random((valid_channels, *shape[1:])) > 0.2
    if dtype == "float32":
        values, scale, offset = rng.normal(size=shape).astype(np.float32), np.ones(shape[0]), np.zeros(shape[0])
    else:
        values = rng.integers(*RANGES[dtype], shape).astype(dtype)
        scale = np.ones(shape[0]) if plain else rng.choice([1e-4, 0.1, 1.2345, -0.3], shape[0])
        offset = np.zeros(shape[0]) if plain else rng.choice([0.0, -0.1, -1024.0], shape[0])
    return Piece(np.where(valid, values, values.dtype.type(0)), valid, scale, offset)


def fill(pieces: list[Piece], symmetries: list[Symmetry], order: list[int] | None = None) -> Batch:
    shape = pieces[0].values.shape
    channels = tuple(Channel(name=str(number)) for number in range(shape[0]))
    bucket = Bucket("rgb", channels, "volume", shape[1:], (), ())
    filling = Filling(bucket, len(pieces), Memory())
    for place in order or range(len(pieces)):
        part = pieces[place]
        filling.put(place, Drawn(Row(place, channels), part, symmetries[place], part.valid.mean()))
    return filling.batch(range(len(pieces)), 0)


def expected(one: Piece, symmetry: Symmetry) -> tuple[np.ndarray, np.ndarray]:
    """Return what the reader says: float64 product, float64 sum, one rounding."""
    exact = one.values.astype(np.float64) * one.scale.reshape(-1, 1, 1, 1)
    exact = (exact + one.offset.reshape(-1, 1, 1, 1)).astype(np.float32)
    valid = np.broadcast_to(one.valid, exact.shape)
    return symmetry.apply(np.where(valid, exact, np.float32(0))), symmetry.apply(valid)


def bits(values: torch.Tensor | np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint32)


def check(batch: Batch, pieces: list[Piece], symmetries: list[Symmetry]) -> None:
    assert batch.raw.dtype == torch.float32 and batch.valid.shape == batch.raw.shape and batch.stored is None
    for number, (one, symmetry) in enumerate(zip(pieces, symmetries, strict=True)):
        raw, valid = expected(one, symmetry)
        np.testing.assert_array_equal(bits(batch.raw[number].numpy()), bits(raw + np.float32(0)))
        np.testing.assert_array_equal(batch.valid[number].numpy(), valid)
        assert batch.spacing is None or batch.spacing[number].tolist() == list(symmetry.spacing((2.0, 1.0, 3.0)))


@pytest.mark.parametrize("dtype", RANGES)
@pytest.mark.parametrize(("valid_channels", "plain"), [(1, False), (3, False), (1, True)])
def test_integers_become_what_the_reader_gives_bit_by_bit(dtype, valid_channels, plain):
    rng = np.random.default_rng(0)
    pieces = [piece(rng, dtype, (3, 4, 6, 6), valid_channels=valid_channels, plain=plain) for _ in SYMMETRIES]
    batch = fill(pieces, SYMMETRIES)
    assert batch.raw.dtype == getattr(torch, dtype) and batch.stored.plain == plain
    assert batch.valid.shape[1] == valid_channels
    check(batch.physical(), pieces, SYMMETRIES)
    check(batch.to("cpu"), pieces, SYMMETRIES)
    raw, valid = read_on_device(batch)  # what CUDA computes with, on the CPU
    check(replace(batch, raw=raw, valid=valid, stored=None).physical(), pieces, SYMMETRIES)


def test_float32_arithmetic_would_not_do():
    values = np.arange(10_000, dtype=np.uint16)
    short = values.astype(np.float32) * np.float32(1e-4)
    assert (short != (values * 1e-4).astype(np.float32)).mean() > 0.2


def test_floats_are_turned_as_they_are_filled_in_and_pass_as_they_are():
    rng = np.random.default_rng(0)
    pieces = [piece(rng, "float32", (2, 4, 6, 6)) for _ in SYMMETRIES]
    pieces[0].values[0, 0, 0, 0] = -0.0
    batch = fill(pieces, SYMMETRIES)
    assert batch.stored is None and batch.physical().raw is batch.raw
    physical = batch.physical()
    assert physical.physical() is physical
    for number, (one, symmetry) in enumerate(zip(pieces, SYMMETRIES, strict=True)):
        np.testing.assert_array_equal(bits(physical.raw[number].numpy()), bits(symmetry.apply(one.values)))


@pytest.mark.parametrize(
    ("kinds", "common"),
    [
        (("uint8", "uint16", "uint8"), torch.uint16),
        (("int8", "uint8", "int8"), torch.int16),
        (("uint16", "int16", "uint8"), torch.float32),
        (("int16", "float32", "uint8"), torch.float32),
        (("float32", "int16", "uint16"), torch.float32),
    ],
)
def test_crops_of_several_types_share_the_narrowest_that_holds_all(kinds, common):
    rng = np.random.default_rng(0)
    pieces = [piece(rng, kind, (2, 4, 6, 6), valid_channels=1 + number % 2) for number, kind in enumerate(kinds)]
    symmetries = [SYMMETRIES[number] for number in (1, 6, 11)]
    for order in itertools.permutations(range(3)):
        batch = fill(pieces, symmetries, list(order))
        assert batch.raw.dtype == common and batch.valid.shape[1] == 2
        check(batch.physical(), pieces, symmetries)


def test_a_part_of_a_batch_is_a_batch_of_the_same_step():
    rng = np.random.default_rng(0)
    pieces = [piece(rng, "int16", (2, 4, 6, 6)) for _ in range(6)]
    batch = replace(fill(pieces, SYMMETRIES[5:11]), samples=tuple(range(12, 18)))
    part = batch.part(2, 5)
    check(part.physical(), pieces[2:5], SYMMETRIES[7:10])
    assert part.samples == (14, 15, 16) and part.keys == ("k2", "k3", "k4") and len(part) == 3
    assert torch.equal(batch.physical().part(2, 5).raw, part.physical().raw)


def test_a_place_that_was_not_filled_is_a_mistake():
    channels = (Channel(name="a"),)
    filling = Filling(Bucket("rgb", channels, "plane", (4, 4), (), ()), 2, Memory())
    with pytest.raises(ValueError, match="step 7 has 0 of 2 crops"):
        filling.batch(range(2), 7)


def test_tensors_are_turned_as_arrays_are():
    values = np.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    for symmetry in SYMMETRIES:
        np.testing.assert_array_equal(symmetry.turn(torch.from_numpy(values)).numpy(), symmetry.apply(values))
