"""Perceptual hashes: copies are found, different subjects are not taken for copies."""

from __future__ import annotations

import io
import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image as Pillow

from geomed_mae.archives.build import scan_archive
from geomed_mae.archives.duplicates import MAX_DISTANCE, PerceptualHash, duplicate_flags, near_duplicates
from geomed_mae.archives.identity import groups
from geomed_mae.image import Channel, Image, PlaneGeometry, VolumeGeometry
from tests.scenes import blobs


def image(array: np.ndarray, valid: np.ndarray | None = None) -> Image:
    """An image of (C, [Z,] Y, X)."""
    channels = tuple(Channel(name=str(number)) for number in range(len(array)))
    geometry = PlaneGeometry() if array.ndim == 3 else VolumeGeometry(np.eye(4))
    valid = np.ones((1,) * array.ndim, bool) if valid is None else valid
    return Image(np.array(array, np.float32), valid.copy(), channels, geometry, "test")


def look(array: np.ndarray, valid: np.ndarray | None = None) -> str:
    array = array if array.ndim >= 3 and len(array) <= 6 else array[None]
    made = PerceptualHash(len(array), array.shape[1:])
    made.add(image(array, valid))
    return made.text()


def distance(one: str, other: str) -> int:
    assert one[:3] == other[:3]
    return (int(one[3:], 16) ^ int(other[3:], 16)).bit_count()


def scene(seed: int, shape: tuple[int, ...] = (200, 240)) -> np.ndarray:
    """A picture with structure of several sizes, 0 to 1."""
    rng = np.random.default_rng(seed)
    coarse = sum(blobs(shape, seed + step).astype(float) / (step + 1) for step in range(3))
    return np.clip(coarse / 2 + rng.normal(scale=0.02, size=shape), 0, 1)


def jpeg(array: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Pillow.fromarray((255 * array).astype(np.uint8)).save(file, "JPEG", quality=quality)
    return np.asarray(Pillow.open(file)).astype(float)


def resized(array: np.ndarray, factor: float) -> np.ndarray:
    size = tuple(round(factor * side) for side in array.shape[::-1])
    return np.asarray(Pillow.fromarray(array.astype(np.float32)).resize(size, Pillow.Resampling.BICUBIC))


COPIES = {
    "itself": lambda a: a,
    "other unit": lambda a: 1e4 * a - 300,
    "eight bits": lambda a: np.round(255 * a),
    "JPEG": lambda a: jpeg(a, 50),
    "half size": lambda a: resized(a, 0.5),
    "larger": lambda a: resized(a, 1.7),
    "tone curve": lambda a: a**0.7,
    "noise": lambda a: a + np.random.default_rng(0).normal(scale=0.01, size=a.shape),
    "one pixel to the right": lambda a: np.roll(a, 1, axis=1),
}


@pytest.mark.parametrize("name", COPIES)
@pytest.mark.parametrize("seed", range(3))
def test_a_copy_is_within_the_distance(name, seed):
    original = scene(seed)
    assert distance(look(original), look(COPIES[name](original))) <= MAX_DISTANCE


def test_different_scenes_are_far_apart():
    looks = [look(scene(seed)) for seed in range(12)]
    assert min(distance(*pair) for pair in itertools.combinations(looks, 2)) > 3 * MAX_DISTANCE
    assert len(set(near_duplicates(looks))) == 12


def test_volumes_have_hashes_of_their_own():
    volume = scene(0, (20, 40, 44))
    rescaled = 900 * volume + np.random.default_rng(1).normal(scale=9, size=volume.shape)
    assert look(volume).startswith("3d:")
    assert distance(look(volume), look(rescaled)) <= MAX_DISTANCE
    assert distance(look(volume), look(scene(1, (20, 40, 44)))) > 3 * MAX_DISTANCE
    assert len(set(near_duplicates([look(volume), look(scene(0))]))) == 2


def test_grey_and_three_equal_channels_look_the_same():
    assert look(scene(0)) == look(np.stack([scene(0)] * 3))


x = np.linspace(0, 1, 96)


@pytest.mark.parametrize(
    "flat",
    [
        np.zeros((96, 96)),
        np.tile(np.round(255 * x), (96, 1)),
        np.tile(x > 0.5, (96, 1)).astype(float),
        np.round(127 * (x + x[:, None])),
        ((x - 0.5) ** 2 + (x[:, None] - 0.5) ** 2 < 0.1).astype(float),
    ],
    ids=["constant", "ramp", "step", "diagonal", "disc"],
)
def test_what_has_too_little_structure_has_no_hash(flat):
    assert look(flat) == ""


def test_images_without_a_hash_match_nothing():
    assert near_duplicates(["", "", look(scene(0)), look(scene(0))]) == [0, 1, 2, 2]


def test_invalid_pixels_do_not_change_a_hash_and_too_many_leave_none():
    array = scene(0)[None]
    valid = np.ones(array.shape, bool)
    valid[:, :60, :60] = False
    assert look(np.where(valid, array, np.nan), valid) == look(np.where(valid, array, 1e9), valid)
    valid[:, :, 100:] = False
    assert look(array, valid) == ""


def test_two_scenes_under_one_mask_are_not_copies():
    valid = np.tri(200, 240, 60, dtype=bool)[None]
    looks = [look(scene(seed)[None], valid) for seed in range(6)]
    assert min(distance(*pair) for pair in itertools.combinations(looks, 2)) > 2 * MAX_DISTANCE


def test_how_an_image_is_cut_into_parts_changes_nothing():
    array = np.stack([scene(0), scene(1)])
    banded = PerceptualHash(2, array.shape[1:])
    for top in range(0, 200, 33):
        banded.add(image(array[:, top : top + 33]))
    assert banded.text() == look(array)


@given(st.integers(0, 2**32 - 1), st.integers(2, 12))
def test_no_pair_within_the_distance_is_missed(seed, count):
    """Against all pairs, with hashes that are a few bits from one another, around the limit."""
    rng = np.random.default_rng(seed)
    base = rng.integers(0, 2, 256)
    hashes = []
    for _ in range(count):
        bits = base.copy()
        bits[rng.choice(256, rng.integers(0, 2 * MAX_DISTANCE), replace=False)] ^= 1
        hashes.append(f"2d:{np.packbits(bits).tobytes().hex()}")
    parent = list(range(count))
    for _ in range(count):
        for one, other in itertools.combinations(range(count), 2):
            if distance(hashes[one], hashes[other]) <= MAX_DISTANCE:
                parent[one] = parent[other] = min(parent[one], parent[other])
    found = near_duplicates(hashes)
    for one, other in itertools.combinations(range(count), 2):
        assert (found[one] == found[other]) == (parent[one] == parent[other])


def test_flags_tell_equal_pixels_from_equal_looks():
    looks = [look(scene(0)), look(scene(0)), look(jpeg(scene(0), 80)), look(scene(1)), look(scene(2)), look(scene(2))]
    assert duplicate_flags(list("aabcdd"), looks) == [
        ("DUPLICATE_PIXELS", "NEAR_DUPLICATE"),
        ("DUPLICATE_PIXELS", "NEAR_DUPLICATE"),
        ("NEAR_DUPLICATE",),
        (),
        ("DUPLICATE_PIXELS",),
        ("DUPLICATE_PIXELS",),
    ]


def test_what_looks_the_same_has_the_same_pixels_or_overlaps_is_one_group():
    ring, near = ((0.0, 1.0), (1.0, 1.0), (1.0, 0.0), (0.0, 0.0)), ((0.5, 1.0), (1.5, 1.0), (1.5, 0.0), (0.5, 0.0))
    looks = [look(scene(0)), look(jpeg(scene(0), 80)), "", "", "", "", ""]
    identities = [[("file", str(number))] for number in range(7)]
    identities[6] = [("file", "5")]
    found = groups(
        identities, [(ring, None) for ring in (None, None, ring, near, None, None, None)], list("abcdaef"), looks
    )
    assert found[0] == found[1] == found[4]
    assert found[2] == found[3]
    assert found[5] == found[6]
    assert len(set(found)) == 3


@pytest.mark.data
def test_no_two_chest_radiographs_are_taken_for_one_but_the_equal_ones(shared_data: Path):
    """2,428 radiographs of 28 x 28 pixels: five pairs have equal pixels, all others are at least 38 bits apart."""
    pictures = np.load(shared_data / "med/pneumoniamnist/train.npz")["images"]
    looks = [look(picture) for picture in pictures]
    assert "" not in looks
    clusters: dict[int, list[int]] = {}
    for number, cluster in enumerate(near_duplicates(looks)):
        clusters.setdefault(cluster, []).append(number)
    pairs = [members for members in clusters.values() if len(members) > 1]
    assert len(pairs) == 5
    assert all((pictures[members] == pictures[members[0]]).all() for members in pairs)


@pytest.mark.data
def test_no_two_brains_are_taken_for_one(shared_data: Path):
    index = scan_archive([next((shared_data / "med/hippocampus").rglob("images"))], "mr")
    assert len(index) == 87
    looks = list(index.looks.values())
    assert min(distance(*pair) for pair in itertools.combinations(looks, 2)) > 2 * MAX_DISTANCE


@pytest.mark.data
def test_two_processing_levels_of_one_acquisition_look_the_same_and_different_scenes_do_not(shared_data: Path):
    index = scan_archive([shared_data / "sat/terramind/S2L1C", shared_data / "sat/terramind/S2L2A"])
    assert len(index) == 4
    assert all("NEAR_DUPLICATE" in row.flags for row in index)
    assert len({row.group for row in index}) == 2
    fires = scan_archive([shared_data / "sat/wildfire_s2/images"], "unnamed-raster")
    assert len({row.group for row in fires}) == len(fires) == 22
