"""Places of crops, how they are read, and the generator behind them."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.image import Channel, Image, PlaneGeometry
from geomed_mae.samples.crops import bounding_window, counter_rng, cut, draw_starts


def plane(array: np.ndarray, valid: np.ndarray | None = None) -> Image:
    channels = tuple(Channel(name=str(number)) for number in range(len(array)))
    valid = np.ones((1, *array.shape[1:]), bool) if valid is None else valid
    return Image(array.astype(np.float32), valid, channels, PlaneGeometry(None), "rgb")


def test_a_generator_depends_on_its_key_alone():
    first = counter_rng(3, 7, 2, 1).random(5)
    counter_rng(3, 7, 2, 1).random(1000)
    assert np.array_equal(first, counter_rng(3, 7, 2, 1).random(5))


@pytest.mark.parametrize("other", [(4, 7, 2, 1), (3, 8, 2, 1), (3, 7, 3, 1), (3, 7, 2, 0)])
def test_generators_of_different_keys_differ(other):
    assert not np.array_equal(counter_rng(3, 7, 2, 1).random(5), counter_rng(*other).random(5))


def test_every_start_is_as_likely_as_any_other_for_first_and_further_crops():
    rng = np.random.default_rng(0)
    counts = np.zeros((3, 7))
    for _ in range(7000):
        for number, (start,) in enumerate(draw_starts(rng, (10,), (4,), 3)):
            counts[number, start] += 1
    # 1000 expected per cell with standard deviation 29: six of them are far beyond chance.
    assert np.abs(counts - 1000).max() < 180


def test_neighbouring_crops_fit_a_window_of_twice_the_crop():
    rng = np.random.default_rng(1)
    for _ in range(200):
        starts = draw_starts(rng, (500, 300), (32, 16), 6)
        window = bounding_window(starts, (32, 16), (500, 300))
        assert all(part.stop - part.start <= 2 * size for part, size in zip(window, (32, 16), strict=True))
        assert all(0 <= part.start < part.stop <= size for part, size in zip(window, (500, 300), strict=True))


def test_an_image_smaller_than_the_crop_starts_at_its_corner():
    assert draw_starts(np.random.default_rng(0), (5, 40), (8, 40), 2) == [(0, 0), (0, 0)]


def test_a_crop_beyond_the_image_is_padded_with_pixels_that_are_not_valid():
    raw, valid = cut(plane(np.full((2, 3, 4), 9.0)), (0, 0), (0, 0), (5, 4))
    assert raw.shape == valid.shape == (2, 5, 4)
    assert valid[:, :3].all() and not valid[:, 3:].any()
    assert (raw[:, 3:] == 0).all() and (raw[:, :3] == 9).all()


def test_invalid_values_never_reach_a_crop_whatever_they_are():
    array = np.full((1, 4, 4), 5.0, dtype=np.float32)
    array[0, 1, 1], array[0, 2, 2] = np.nan, 1e30
    valid = np.isfinite(array) & (array < 1e9)
    raw, mask = cut(plane(array, valid), (0, 0), (0, 0), (4, 4))
    assert raw[~mask].tolist() == [0.0, 0.0] and (raw[mask] == 5).all()


def test_a_crop_is_the_same_whether_cut_from_a_window_or_from_the_whole():
    image = plane(np.random.default_rng(0).random((2, 30, 40)))
    whole = cut(image, (0, 0), (7, 11), (8, 8))
    window = cut(image.crop((slice(5, 25), slice(10, 30))), (5, 10), (7, 11), (8, 8))
    assert np.array_equal(whole[0], window[0]) and np.array_equal(whole[1], window[1])
    assert np.array_equal(whole[0], image.array[:, 7:15, 11:19])
