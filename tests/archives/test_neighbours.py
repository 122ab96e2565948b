"""Two sets are compared by the same rules as pairs of one archive: `places` and `duplicates` are the oracle."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.archives.duplicates import MAX_DISTANCE
from geomed_mae.archives.neighbours import look_alike, on_shared_ground
from geomed_mae.archives.places import closer_than, overlapping

RNG = np.random.default_rng(0)


def spot(longitude: float, latitude: float, spread: float) -> tuple:
    """A turned rectangle somewhere around a place, sometimes a turn of the globe further on, and a pixel size."""
    lon = longitude + RNG.choice([0, 360, -360]) + RNG.uniform(-spread, spread)
    lat = latitude + RNG.uniform(-spread, spread)
    width, height, turn = RNG.uniform(0.05, 1), RNG.uniform(0.05, 1), RNG.uniform(0, 3)
    corners = np.array([[-width, height], [width, height], [width, -height], [-width, -height]]) / 2
    corners = corners @ [[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]]
    ring = tuple((float(lon + x), float(np.clip(lat + y, -89.9, 89.9))) for x, y in corners)
    return ring, float(RNG.choice([0.0, 100.0, 1e6]))


@pytest.mark.parametrize("buffer_m", [0.0, 3_000.0, 60_000.0])
@pytest.mark.parametrize(
    ("longitude", "latitude", "spread"),
    [(0, 45, 3), (179.5, 10, 3), (-179.9, -60, 4), (30, 83, 6), (100, -88, 1.8), (0, 0, 1.5)],
)
def test_ground_is_shared_where_pairs_overlap_or_are_near(longitude, latitude, spread, buffer_m):
    ours, theirs = ([spot(longitude, latitude, spread) for _ in range(16)] for _ in range(2))
    found = on_shared_ground(ours, theirs, buffer_m)
    for one, hit in zip(ours, found, strict=True):
        pairs = [overlapping([one[0], other[0]], [one[1], other[1]]) for other in theirs]
        near = buffer_m > 0 and any(closer_than([one[0], other[0]], buffer_m, [0, 1]) for other in theirs)
        assert hit == (near or any(first == second for first, second in pairs))


def test_nothing_is_shared_with_nothing():
    assert on_shared_ground([spot(0, 0, 1)], []).tolist() == [False]
    assert on_shared_ground([], [spot(0, 0, 1)]).tolist() == []
    assert look_alike(["", "2d:" + "00" * 32], []).tolist() == [False, False]


def test_images_look_alike_up_to_the_last_bit_allowed_and_by_no_kind_but_their_own():
    bits = RNG.random((300, 256)) < RNG.beta(4, 4, 256)
    theirs, ours = bits[:200], bits[100:].copy()
    changed = np.arange(200) % (2 * MAX_DISTANCE)
    for row, count in zip(ours, changed, strict=True):
        row[RNG.choice(256, count, replace=False)] ^= True
    texts = [[f"2d:{np.packbits(row).tobytes().hex()}" for row in side] for side in (ours, theirs)]
    distances = (ours[:, None] ^ theirs[None]).sum(axis=-1).min(axis=1)
    found = look_alike(texts[0], texts[1])
    assert found.tolist() == (distances <= MAX_DISTANCE).tolist() and 40 < found.sum() < 80
    assert not look_alike([text.replace("2d:", "3d:") for text in texts[0]], texts[1]).any()
