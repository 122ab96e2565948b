"""Decoded images in memory."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from geomed_mae.samples.folder import Folder
from geomed_mae.samples.memory import ImageCache
from geomed_mae.samples.store import Store


def rows(memory_index):
    return {row.key: row for row in memory_index.rows}


def test_small_images_are_decoded_once_and_large_ones_by_window(memory_index):
    small, large = memory_index.add(np.ones((1, 64, 64))), memory_index.add(np.ones((1, 512, 512)))
    cache = ImageCache(memory_index, cache_mb=1)
    window = (slice(0, 8), slice(0, 8))
    for _ in range(3):
        cache.read(rows(memory_index)[small], window)
        cache.read(rows(memory_index)[large], window)
    assert memory_index.whole_reads == 1 and memory_index.window_reads == 3


def test_the_cache_never_holds_more_than_its_limit_counted_as_it_is_held(memory_index):
    rng = np.random.default_rng(0)
    keys = [memory_index.add(rng.normal(size=(1, 128, 128))) for _ in range(40)]
    cache = ImageCache(memory_index, cache_mb=1)
    for key in keys:
        cache.read(rows(memory_index)[key], (slice(0, 8), slice(0, 8)))
        held = sum(piece.values.nbytes + piece.valid.nbytes for piece in cache.held.values())
        assert 0 < held == cache.bytes_held <= 1 << 20


def test_integers_make_room_for_twice_as_many_images(memory_index):
    rng = np.random.default_rng(0)
    short = [memory_index.add(rng.integers(0, 60000, (3, 64, 64))) for _ in range(60)]
    long = [memory_index.add(rng.normal(size=(3, 64, 64))) for _ in range(60)]
    held = []
    for keys in (short, long):
        cache = ImageCache(memory_index, cache_mb=1)
        for key in keys:
            cache.read_pieces(rows(memory_index)[key], [(slice(0, 8), slice(0, 8))])
        held.append(len(cache.held))
    # 3 x 2 + 1 bytes a pixel against 3 x 4 + 1.
    assert held == [(1 << 20) // (64 * 64 * 7), (1 << 20) // (64 * 64 * 13)]


@pytest.mark.parametrize("cache_mb", [0, 64])
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("shape", [(3, 50, 60), (1, 9, 20, 30)])
def test_pieces_and_images_are_what_the_index_reads_whichever_way_they_come(
    memory_index, tmp_path, cache_mb, stored, shape
):
    rng = np.random.default_rng(0)
    key = memory_index.add(rng.integers(-1000, 3000, shape), valid=rng.random((1, *shape[1:])) > 0.2)
    row = rows(memory_index)[key]
    store = Store(memory_index, Folder(tmp_path / "cache", 1 << 30), "always") if stored else None
    cache = ImageCache(memory_index, cache_mb, store)
    windows = [tuple(slice(0, size) for size in shape[1:]), tuple(slice(2, size - 1) for size in shape[1:])]
    for _ in range(2):
        images = list(cache.read_many(row, windows))
        for piece, image, window in zip(cache.read_pieces(row, windows), images, windows, strict=True):
            wanted = memory_index.read(key, window)
            expected = np.where(wanted.valid, wanted.array, np.float32(0))
            assert np.array_equal(piece.physical()[0], expected) and np.array_equal(piece.valid, wanted.valid)
            assert np.array_equal(image.array, expected) and np.array_equal(image.valid, wanted.valid)
            assert image.channels == wanted.channels and image.key == key
            assert str(image.geometry) == str(wanted.geometry)


def test_another_process_gets_the_cache_without_its_images(memory_index):
    key = memory_index.add(np.ones((1, 64, 64)))
    cache = ImageCache(memory_index, cache_mb=8)
    cache.read(rows(memory_index)[key], (slice(0, 8), slice(0, 8)))
    other = pickle.loads(pickle.dumps(cache))
    assert cache.held and not other.held and other.bytes_held == 0
