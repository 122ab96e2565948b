"""Footprints on the globe: overlaps, distances, blocks."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from geomed_mae.archives.places import (
    EARTH_M,
    Place,
    block_of,
    candidates,
    closer_than,
    distance_m,
    overlapping,
    rounded_bounds,
)


def box(west: float, south: float, width: float, height: float) -> tuple[tuple[float, float], ...]:
    east, north = west + width, south + height
    return ((west, north), (east, north), (east, south), (west, south))


WORLD = box(-180, -90, 360, 180)
DEGREE_M = math.radians(1) * EARTH_M


@pytest.mark.parametrize("lon", [0.0, 100.0, 179.95, -180.0])
@pytest.mark.parametrize("lat", [0.0, 60.0, -84.0])
def test_overlap_is_found_wherever_it_lies(lon, lat):
    one, other = box(lon, lat, 0.2, 0.2), box(lon + 0.15, lat, 0.2, 0.2)
    turned = tuple((x - 360, y) for x, y in other)
    for second in (other, turned):
        found = overlapping([one, second, box(lon + 30, lat, 0.2, 0.2), None])
        assert found[0] == found[1] != found[2]
        assert found[3] is None


def test_tiles_that_share_an_edge_or_less_than_one_per_cent_stay_apart():
    tile = box(10, 45, 0.1, 0.1)
    assert len(set(overlapping([tile, box(10.1, 45, 0.1, 0.1)]))) == 2
    assert len(set(overlapping([tile, box(10.0995, 45, 0.1, 0.1)]))) == 2
    assert len(set(overlapping([tile, box(10.098, 45, 0.1, 0.1)]))) == 1


def test_overlap_is_a_share_of_the_smaller_footprint():
    assert len(set(overlapping([box(0, 0, 10, 10), box(9.99, 5, 0.02, 0.02)]))) == 1


def test_overlap_goes_through_others():
    chain = [box(10 + 0.08 * step, 45, 0.1, 0.1) for step in range(5)]
    assert len(set(overlapping(chain))) == 1
    assert len(set(overlapping([*chain[:2], *chain[3:]]))) == 2


def test_a_polar_scene_contains_the_pole_and_what_lies_there():
    polar = ((-135.0, -80.0), (-45.0, -80.0), (45.0, -80.0), (135.0, -80.0))
    assert len(set(overlapping([polar, box(100, -89.5, 3, 0.1)]))) == 1
    assert len(set(overlapping([polar, box(0, -75, 1, 1)]))) == 2


def test_a_map_of_the_world_overlaps_everything():
    assert len(set(overlapping([WORLD, box(10, 10, 1, 1), box(-120, -40, 1, 1)]))) == 1


def test_a_map_too_coarse_to_show_a_scene_does_not_tie_an_archive_together():
    scenes = [box(10, 10, 0.01, 0.01), box(-120, -40, 0.01, 0.01)]  # a kilometre wide
    coarse, fine = 14_000.0**2, 10.0**2
    assert len(set(overlapping([WORLD, *scenes], [coarse, fine, fine]))) == 3
    assert len(set(overlapping([WORLD, *scenes], [100.0**2, fine, fine]))) == 1  # a hundred pixels of it in each scene
    country = box(5, 5, 10, 10)
    assert len(set(overlapping([country, scenes[0]], [coarse, fine]))) == 2
    assert len(set(overlapping([country, scenes[0]], [fine, fine]))) == 1
    assert len(set(overlapping([scenes[0], scenes[0]], [fine, 60.0**2]))) == 1  # one place in two resolutions


def test_distances_are_those_of_the_sphere():
    along_equator = distance_m(Place(box(0, -0.5, 1, 1)), Place(box(2, -0.5, 1, 1)))
    # At half a degree north of the equator, where the gap is narrowest.
    assert along_equator == pytest.approx(DEGREE_M * math.cos(math.radians(0.5)), rel=1e-3)
    over_pole = distance_m(Place(box(0, 89.0, 0.01, 0.5)), Place(box(180, 89.0, 0.01, 0.5)))
    assert over_pole == pytest.approx(DEGREE_M, rel=1e-3)
    assert distance_m(Place(box(179.5, 0, 0.4, 0.1)), Place(box(-179.9, 0, 0.1, 0.1))) == pytest.approx(
        0.2 * DEGREE_M, rel=1e-3
    )
    assert distance_m(Place(WORLD), Place(box(0, 0, 1, 1))) == 0


def test_the_other_side_of_the_globe_is_far_away():
    here, antipode = Place(box(0, -0.5, 0.5, 0.5)), Place(box(180, 0, 0.5, 0.5))
    assert distance_m(here, antipode) == pytest.approx(math.pi * EARTH_M, rel=0.01)
    assert len(set(overlapping([box(0, -0.5, 0.5, 0.5), box(180, 0, 0.5, 0.5)]))) == 2


@given(st.lists(st.tuples(st.floats(-180, 180), st.floats(-89.5, 89)), min_size=2, max_size=8), st.floats(0, 300_000))
def test_no_close_pair_is_missed(corners, within):
    rings = [box(lon, lat, 0.5, 0.5) for lon, lat in corners]
    places = [Place(ring) for ring in rings]
    found = set(candidates(places, within))
    expected = [
        pair for pair in itertools.combinations(range(len(rings)), 2)
        if distance_m(places[pair[0]], places[pair[1]]) <= within
    ]  # fmt: skip
    assert set(expected) <= found
    assert set(expected) <= set(closer_than(rings, within, range(len(rings))))


def test_images_of_one_side_are_not_compared():
    rings = [box(0, 0, 1, 1), box(0.5, 0, 1, 1), box(1.5, 0, 1, 1)]
    assert closer_than(rings, 0, ["train", "train", "test"]) == [(1, 2)]


@pytest.mark.parametrize("block_m", [1e4, 1e5])
def test_blocks_have_nearly_the_same_area(block_m):
    """The area of a row of the grid, by Archimedes, over the columns that are met on the way around it."""
    rows = round(math.pi * EARTH_M / block_m)
    for row in {0, 1, 2, rows // 4, rows // 2, rows - 1}:
        low, high = (math.radians(edge / rows * 180 - 90) for edge in (row, row + 1))
        middle = math.degrees((low + high) / 2)
        columns = {block_of(lon, middle, block_m)[1] for lon in np.linspace(-180, 180, 20_001)}
        area = 2 * math.pi * EARTH_M**2 * (math.sin(high) - math.sin(low)) / len(columns)
        assert block_of(0, middle, block_m)[0] == row
        assert 0.95 < area / block_m**2 < 1.05


def test_blocks_close_at_the_antimeridian_and_end_at_the_poles():
    assert block_of(180.0, 12.0, 1e4) == block_of(-180.0, 12.0, 1e4) == block_of(540.0, 12.0, 1e4)
    assert block_of(179.9999999999, 12.0, 1e4) != block_of(-179.9, 12.0, 1e4)
    assert {block_of(lon, 90.0, 1e4) for lon in range(-180, 180, 5)} == {(2001, column) for column in range(3)}
    assert block_of(0.0, -90.0, 1e4)[0] == 0


@pytest.mark.parametrize(
    ("rings", "bounds"),
    [
        ([box(-120.3, 35.2, 0.1, 0.1), box(-118, 36, 0.2, 0.2)], (-121, 35, -117, 37)),
        ([box(170, 0, 1, 1), box(-175, 0, 1, 1)], (170, 0, 186, 1)),
        ([box(179.9, -1, 0.2, 0.5)], (179, -1, 181, 0)),
        ([box(-10, 0, 20.5, 1)], (-10, 0, 11, 1)),
        ([WORLD], (-180, -90, 180, 90)),
        ([None], None),
    ],
)
def test_bounds_take_the_short_way_around(rings, bounds):
    assert rounded_bounds(rings) == bounds
