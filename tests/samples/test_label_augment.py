"""Augmentation of labelled crops: pixels, validity and labels move together, and only as the modality allows."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from geomed_mae.archives.statistics import summarise
from geomed_mae.image import Channel
from geomed_mae.readers import IGNORE
from geomed_mae.samples.intensity import Intensity
from geomed_mae.samples.label_augment import Augmentation, augment


def crop(shape: tuple[int, ...], channels: int = 7):
    """Pixels, validity and labels that can be told apart, and that agree: label = first channel's value."""
    rng = np.random.default_rng(0)
    target = rng.integers(0, 50, size=shape).astype(np.int16)
    raw = rng.normal(scale=1000, size=(channels, *shape)).astype(np.float32)
    raw[0] = target
    valid = np.ones(raw.shape, dtype=bool)
    valid[(slice(None), *(slice(0, 3) for _ in shape))] = False
    target[tuple(slice(0, 3) for _ in shape)] = IGNORE
    return np.where(valid, raw, np.float32(0)), valid, target


def agree(raw, valid, target) -> bool:
    known = valid[0] & (target != IGNORE)
    return bool((raw[0][known] == target[known]).all()) and bool((target[~valid[0]] == IGNORE).all())


@pytest.mark.parametrize("flips", [("x", "y", "rot90"), ("x", "y"), ("x",), ("rot90",)])
@pytest.mark.parametrize("channels", [1, 3, 13])
def test_2d_moves_all_together_and_changes_no_value(flips, channels):
    original = crop((16, 16), channels)
    seen = set()
    for seed in range(20):
        moved = augment(original, flips, (10.0, 10.0), np.random.default_rng(seed))
        assert agree(*moved) and [part.dtype for part in moved] == [np.float32, bool, np.int16]
        assert all(part.shape == before.shape for part, before in zip(moved, original, strict=True))
        np.testing.assert_array_equal(np.sort(moved[0].ravel()), np.sort(original[0].ravel()))
        seen.add(moved[2].tobytes())
    assert len(seen) == {3: 8, 2: 4, 1: 4 if "rot90" in flips else 2}[len(flips)]


def test_without_symmetries_a_2d_crop_stays_as_it_is():
    original = crop((16, 16))
    assert augment(original, (), (10.0, 10.0), np.random.default_rng(0)) is original


@pytest.mark.parametrize(("shape", "spacing"), [((16, 24), (10.0, 10.0)), ((16, 16), (10.0, 12.0))])
def test_rows_and_columns_change_places_only_where_crop_and_pixels_are_square(shape, spacing):
    original = crop(shape)
    seen = {augment(original, ("x", "y", "rot90"), spacing, np.random.default_rng(s))[2].tobytes() for s in range(40)}
    flips = {original[2][::dy, ::dx].tobytes() for dy in (1, -1) for dx in (1, -1)}
    assert seen == flips


def test_the_same_generator_gives_the_same_crop():
    for shape, flips in (((16, 16), ("x", "y", "rot90")), ((12, 12, 12), ("x",))):
        first, second = (augment(crop(shape), flips, None, np.random.default_rng(5)) for _ in range(2))
        assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_3d_keeps_types_and_shapes_and_puts_ignore_where_nothing_is_known():
    original = crop((12, 14, 16), channels=2)
    moved_any = False
    for seed in range(8):
        raw, valid, target = augment(original, (), (1.0, 1.0, 1.0), np.random.default_rng(seed))
        assert raw.shape == original[0].shape and (raw.dtype, valid.dtype, target.dtype) == (np.float32, bool, np.int16)
        assert (raw[~valid] == 0).all() and set(np.unique(target)) <= set(np.unique(original[2]))
        moved_any |= not np.array_equal(target, original[2])
    assert moved_any


def test_3d_labels_follow_the_pixels():
    """A bright half: after any rotation and scaling its labels still cover the bright voxels."""
    raw, valid, target = (
        np.zeros((1, 16, 16, 16), np.float32),
        np.ones((1, 16, 16, 16), bool),
        np.zeros((16,) * 3, np.int16),
    )
    raw[:, :, 8:], target[:, 8:] = 100.0, 1
    for seed in range(8):
        moved, ok, labels = augment((raw, valid, target), ("x", "y", "z"), None, np.random.default_rng(seed))
        known = ok[0] & (labels != IGNORE)
        assert ((moved[0] > 50) == (labels == 1))[known].mean() > 0.97


def test_organs_keep_their_sides_where_the_modality_has_no_symmetry():
    raw = np.zeros((1, 12, 12, 12), np.float32)
    raw[:, :, :, :5] = 100.0
    for seed in range(12):
        moved = augment((raw, raw < 1e9, np.zeros((12,) * 3, np.int16)), (), None, np.random.default_rng(seed))[0]
        assert moved[0, :, :, :4].mean() > moved[0, :, :, 8:].mean()


def test_planes_are_tilted_a_little_with_labels_and_validity():
    yy, xx = np.mgrid[:32, :32].astype(np.float32)
    raw = np.stack([100 + 3 * yy + 2 * xx, 500 - yy])
    valid = np.ones(raw.shape, dtype=bool)
    valid[:, 10:13, 10:13] = False
    raw[~valid] = 0
    target = (yy > 16).astype(np.int16)
    turns = 0
    for seed in range(30):
        moved, seen, labels = augment((raw, valid, target), (), None, np.random.default_rng(seed), tilted=True)
        assert (moved.dtype, seen.dtype, labels.dtype) == (np.float32, bool, np.int16) and not moved[~seen].any()
        if np.array_equal(moved, raw):
            continue
        turns += 1
        # A plane stays a plane under an affine map wherever no invalid pixel was mixed in: second differences are 0.
        inside = seen[0, :-2] & seen[0, 1:-1] & seen[0, 2:]
        assert np.abs(np.diff(moved[0], n=2, axis=0)[inside]).max() < 0.5
        # The label is where the second channel, 500 - row, says: below row 16.
        known = seen[1] & (labels != IGNORE) & (np.abs(moved[1] - 483.5) > 1.5)
        np.testing.assert_array_equal(labels[known] == 1, moved[1][known] < 483.5)
        assert 0.8 < seen.mean() < 1
    assert 8 < turns < 22


@pytest.mark.parametrize("geometry", ["plane", "volume"])
def test_a_label_without_a_valid_pixel_is_not_learned(geometry):
    shape = (16, 16) if geometry == "plane" else (8, 8, 8)
    raw, valid, target = crop(shape, 1)
    statistics = summarise(raw, valid)
    row = SimpleNamespace(channels=(Channel(name="MR"),), statistics=statistics, spacing=None)
    augmentation = Augmentation((), geometry, ("MR",), (Intensity("measured", 0.0, False),))
    for seed in range(8):
        _, seen, labels = augmentation((raw, valid, target), row, np.random.default_rng(seed))
        assert (labels[~seen[0]] == IGNORE).all() and (labels != IGNORE).any()


def test_rasters_are_never_tilted():
    original = crop((16, 16))
    for seed in range(10):
        moved = augment(original, ("x",), (10.0, 10.0), np.random.default_rng(seed))
        np.testing.assert_array_equal(np.sort(moved[0].ravel()), np.sort(original[0].ravel()))
