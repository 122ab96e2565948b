"""Pieces: integers that say exactly what a reader's float32 say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomed_mae.image import Channel, Image, PlaneGeometry, VolumeGeometry
from geomed_mae.samples.piece import Piece, joined


def image(array: np.ndarray, valid: np.ndarray | None = None) -> Image:
    channels = tuple(Channel(name=str(number)) for number in range(len(array)))
    geometry = VolumeGeometry(np.eye(4)) if array.ndim == 4 else PlaneGeometry(None)
    valid = np.ones((1, *array.shape[1:]), bool) if valid is None else valid
    return Image(array.astype(np.float32), valid, channels, geometry, "rgb")


def read_as(numbers: np.ndarray, scale: float, offset: float) -> np.ndarray:
    """Return what readers make of stored numbers (readers/geotiff/pixels.py says what a value is)."""
    with np.errstate(over="ignore"):
        return (numbers.astype(np.float64) * scale + offset).astype(np.float32)


def same_bits(piece: Piece, wanted: Image) -> bool:
    array, valid = piece.physical()
    inside = np.broadcast_to(wanted.valid, wanted.array.shape)
    expected = np.where(inside, wanted.array, np.float32(0))
    same = np.array_equal(array.view(np.uint32), expected.view(np.uint32))
    return same and np.array_equal(np.broadcast_to(valid, inside.shape), inside)


EVERY = np.arange(65536).reshape(1, 256, 256)


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        (np.arange(256), "uint8"),
        (np.arange(-128, 128), "int8"),
        (np.arange(65536), "uint16"),
        (np.arange(-32768, 32768), "int16"),
        (np.arange(-1, 65536), "float32"),
        (np.sqrt(np.arange(256)), "float32"),
    ],
)
def test_whole_numbers_take_the_smallest_type_that_holds_them(numbers, dtype):
    made = image(numbers.reshape(1, 1, -1))
    piece = Piece.from_image(made)
    assert piece.values.dtype == dtype and same_bits(piece, made)


@pytest.mark.parametrize(
    ("scale", "offset"), [(1e-4, 0.0), (1e-4, -0.1), (2.75e-5, -0.2), (2e-5, -0.1), (0.5, 3.25), (255 / 4095, 0.0)]
)
def test_every_16_bit_number_comes_back_under_the_scales_that_files_state(scale, offset):
    made = image(read_as(EVERY, scale, offset))
    piece = Piece.from_image(made, [(scale, offset)])
    assert piece.values.dtype == np.uint16 and np.array_equal(piece.values, EVERY)
    assert same_bits(piece, made)


def test_float32_arithmetic_would_not_give_the_readers_bits():
    """The reason for float64 in `physical`."""
    simple = EVERY.astype(np.float32) * np.float32(1e-4) + np.float32(-0.1)
    assert (simple != read_as(EVERY, 1e-4, -0.1)).mean() > 0.2


@pytest.mark.parametrize("slope", [1.2345678, 0.87654321987, 3.3456789e-8, 12345.678, 0.1])
def test_a_slope_that_no_index_knows_is_read_off_the_values(slope):
    numbers = np.random.default_rng(0).integers(-4096, 4096, (1, 8, 64, 64))
    made = image(read_as(numbers, slope, 0.0))
    piece = Piece.from_image(made)
    assert piece.values.dtype == np.int16 and same_bits(piece, made)
    assert Piece.from_image(made, guess=False).values.dtype == np.float32


def test_slices_with_slopes_of_their_own_stay_float32():
    numbers = np.random.default_rng(0).integers(0, 4096, (1, 8, 64, 64))
    made = image(read_as(numbers, 1.0, 0.0) * np.linspace(0.7, 1.3, 8, dtype=np.float32)[:, None, None])
    piece = Piece.from_image(made)
    assert piece.values.dtype == np.float32 and same_bits(piece, made)
    assert piece.scale.tolist() == [1.0] and piece.offset.tolist() == [0.0]


@pytest.mark.parametrize("odd", [np.pi, np.float32(1e-45), -0.0, 70000.0, np.nan, np.inf])
def test_one_odd_value_anywhere_refuses_the_integers(odd):
    for place in (0, 4095, 65535):
        array = np.ones((1, 256, 256), np.float32)
        array.reshape(-1)[place] = odd
        made = image(array)
        piece = Piece.from_image(made, [(1e-4, 0.0)])
        assert piece.values.dtype == np.float32 and same_bits(piece, made)


@pytest.mark.parametrize("masks", [1, 3])
def test_what_is_not_valid_is_0_whatever_it_was_and_does_not_decide_the_type(masks):
    rng = np.random.default_rng(0)
    array = read_as(rng.integers(0, 200, (3, 40, 50)), 1e-4, -0.1)
    valid = rng.random((masks, 40, 50)) > 0.3
    outside = np.broadcast_to(~valid, array.shape)
    array[outside] = rng.choice(np.array([np.nan, np.inf, 1e30, -9999.0], np.float32), outside.sum())
    made = image(array, valid)
    piece = Piece.from_image(made, [(1e-4, -0.1)])
    assert piece.values.dtype == np.uint16 and not piece.values[outside].any() and same_bits(piece, made)
    assert len(piece.valid) == masks


def test_channels_have_scales_of_their_own():
    numbers = np.random.default_rng(0).integers(0, 5000, (2, 64, 64))
    made = image(np.concatenate([read_as(numbers[:1], 1e-4, 0.0), read_as(numbers[1:], 0.01, 100.0)]))
    piece = Piece.from_image(made, [((1e-4, 0.01), (0.0, 100.0))])
    assert np.array_equal(piece.values, numbers) and same_bits(piece, made)
    turned = piece.select([1, 0])
    assert np.array_equal(turned.physical()[0], made.array[::-1])


def test_a_crop_shares_memory_and_a_copy_does_not():
    made = image(np.random.default_rng(0).integers(0, 99, (2, 30, 40)))
    piece = Piece.from_image(made)
    window = (slice(3, 9), slice(10, 40))
    crop = piece.crop(window)
    assert crop.spatial_shape == (6, 30) and np.shares_memory(crop.values, piece.values)
    assert np.array_equal(crop.physical()[0], made.array[:, 3:9, 10:40])
    assert not np.shares_memory(crop.copy().values, piece.values)


@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        ((1.0, 0.0, 200), (1.0, 0.0, 60000), "uint16"),
        ((1.0, 0.0, -100), (1.0, 0.0, 60000), "float32"),
        ((1e-4, 0.0, 9999), (1e-4, -0.1, 9999), "float32"),
        ((1e-4, -0.1, 200), (1e-4, -0.1, 9999), "uint16"),
    ],
)
def test_pieces_stored_differently_are_joined_without_changing_a_bit(first, second, dtype):
    rng = np.random.default_rng(0)
    parts, whole = [], np.zeros((1, 20, 30), np.float32)
    for (scale, offset, most), place in ((first, slice(0, 10)), (second, slice(10, 30))):
        numbers = rng.integers(min(most, 0), max(most, 0) + 1, (1, 20, place.stop - place.start))
        numbers[0, 0, 0] = most
        whole[:, :, place] = read_as(numbers, scale, offset)
        piece = Piece.from_image(image(whole[:, :, place]), [(scale, offset)], guess=False)
        assert piece.values.dtype != np.float32
        parts.append(((slice(0, 20), place), piece))
    made = joined(parts, (20, 30))
    assert made.values.dtype == dtype and np.array_equal(made.physical()[0], whole)


@settings(max_examples=60)
@given(
    scale=st.floats(1e-8, 1e4) | st.floats(-1e3, -1e-3),
    offset=st.floats(-1e4, 1e4),
    low=st.integers(-40000, 40000),
    spread=st.integers(0, 70000),
    seed=st.integers(0, 1000),
)
def test_whatever_the_arithmetic_was_no_bit_is_lost(scale, offset, low, spread, seed):
    rng = np.random.default_rng(seed)
    numbers = rng.integers(low, low + spread + 1, (2, 17, 23))
    made = image(read_as(numbers, scale, offset), rng.random((1, 17, 23)) > 0.2)
    for scalings in ((), [(scale, offset)]):
        assert same_bits(Piece.from_image(made, scalings), made)
