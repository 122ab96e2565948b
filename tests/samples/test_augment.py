"""Symmetries are drawn from those allowed, and applied to values and spacing alike."""

from __future__ import annotations

import numpy as np

from geomed_mae.samples.augment import Symmetry, draw_symmetry


def draws(allowed, crop, count=400):
    rng = np.random.default_rng(0)
    return [draw_symmetry(rng, allowed, crop) for _ in range(count)]


def test_nothing_is_turned_where_the_modality_allows_nothing():
    assert set(draws((), (8, 8))) == {Symmetry()}


def test_only_allowed_axes_are_mirrored():
    assert {one.mirrored for one in draws(("z",), (4, 8, 8))} == {(), (-3,)}
    assert {one.mirrored for one in draws(("y", "x"), (8, 8))} == {(), (-2,), (-1,), (-2, -1)}


def test_the_slice_axis_means_nothing_to_a_2d_crop():
    assert {one.mirrored for one in draws(("z",), (8, 8))} == {()}


def test_quarter_turns_are_kept_for_square_crops():
    assert {one.quarter_turns for one in draws(("rot90",), (8, 8))} == {0, 1, 2, 3}
    assert {one.quarter_turns for one in draws(("rot90",), (8, 16))} == {0}


def test_what_is_allowed_does_not_change_later_draws():
    first, second = np.random.default_rng(0), np.random.default_rng(0)
    draw_symmetry(first, ("y", "x", "rot90"), (8, 8))
    draw_symmetry(second, (), (8, 16))
    assert first.random() == second.random()


def test_a_mirror_moves_the_last_column_to_the_first():
    array = np.arange(6).reshape(1, 2, 3)
    assert Symmetry((-1,)).apply(array).tolist() == [[[2, 1, 0], [5, 4, 3]]]


def test_a_quarter_turn_exchanges_row_and_column_spacing():
    assert Symmetry((), 1).spacing((5.0, 1.0, 2.0)) == (5.0, 2.0, 1.0)
    assert Symmetry((), 2).spacing((1.0, 2.0)) == (1.0, 2.0)
    array = np.arange(4).reshape(1, 2, 2)
    assert Symmetry((), 1).apply(array)[0].tolist() == np.rot90(array[0]).tolist()


def test_the_result_is_contiguous():
    assert Symmetry((-1,), 1).apply(np.zeros((2, 8, 8))).flags.c_contiguous
