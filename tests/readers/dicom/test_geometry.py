from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog

from geomed_mae.readers.dicom.geometry import (
    POSITION_TOLERANCE_MM,
    fitted_line,
    normal_of,
    orientation_error,
    place_numbers,
    position_error,
    rounded_stretches,
    same_grid,
    spacing_error,
    tilt_degrees,
    uniform_runs,
    volume_affine,
)

AXIAL = (1.0, 0.0, 0.0, 0.0, 1.0, 0.0)
UP = np.array([0.0, 0.0, 1.0])


def along_z(*depths: float) -> np.ndarray:
    return np.array([[0.0, 0.0, depth] for depth in depths])


def test_a_regular_stack_is_one_run():
    assert uniform_runs(along_z(0, 2, 4, 6), UP) == [(0, 4)]


def test_a_gap_splits_a_stack():
    assert uniform_runs(along_z(0, 2, 4, 10, 12, 14, 16), UP) == [(0, 3), (3, 7)]


def test_a_stray_slice_before_a_stack_does_not_take_its_first_slice():
    assert uniform_runs(along_z(0, 3, 8, 13, 18), UP) == [(0, 1), (1, 5)]


def test_a_change_of_spacing_splits_where_the_longest_run_ends():
    assert uniform_runs(along_z(0, 1, 2, 3, 8, 13), UP) == [(0, 4), (4, 6)]


def test_a_tilted_stack_is_one_run():
    positions = np.arange(5)[:, None] * np.array([0.0, -1.2, 4.8])
    assert uniform_runs(positions, UP) == [(0, 5)]


def test_rounding_below_the_tolerance_is_not_a_gap():
    exact = np.arange(30) * 0.7
    assert uniform_runs(along_z(*np.round(exact, 2)), UP) == [(0, 30)]


def test_deviations_above_the_tolerance_are_split():
    depths = np.arange(9) * 2.0
    depths[4] += 2.5 * POSITION_TOLERANCE_MM
    assert len(uniform_runs(along_z(*depths), UP)) > 1


@pytest.mark.parametrize("count", [2, 3, 7, 40])
def test_the_fitted_line_is_the_best_that_linear_programming_finds(count: int):
    rng = np.random.default_rng(count)
    positions = along_z(*(np.arange(count) * 0.7 + rng.uniform(-0.03, 0.03, count)))
    _, _, error = fitted_line(positions, limit_mm=1.0)
    index, one = np.arange(count), np.ones(count)
    rows = np.vstack([np.c_[index, one, -one], np.c_[-index, -one, -one]])
    depths = positions[:, 2]
    best = linprog([0, 0, 1], A_ub=rows, b_ub=np.r_[depths, -depths], bounds=[(None, None)] * 3)
    assert error == pytest.approx(best.fun, abs=1e-9)


def test_positions_off_by_a_little_more_than_the_tolerance_do_not_take_long():
    rng = np.random.default_rng(1)
    positions = along_z(*(np.arange(1000) + rng.uniform(-0.012, 0.012, 1000)))
    begin = time.process_time()
    runs = uniform_runs(positions, UP)
    assert rounded_stretches(positions, UP, runs) == [(0, 1000, pytest.approx(0.012, abs=1e-3))]
    assert time.process_time() - begin < 10


def test_thousands_of_irregular_slices_do_not_exhaust_anything():
    rng = np.random.default_rng(0)
    positions = along_z(*np.sort(rng.uniform(0, 1e4, 1500)))
    runs = uniform_runs(positions, UP)
    assert [start for start, _ in runs] == [0, *(stop for _, stop in runs[:-1])]
    assert runs[-1][1] == 1500


@given(st.lists(st.integers(1, 4), min_size=1, max_size=40))
@settings(max_examples=60, deadline=None)
def test_runs_cover_every_slice_once_and_hold_the_position_promise(steps: list[int]):
    positions = along_z(*np.cumsum(steps))
    runs = uniform_runs(positions, UP)
    assert [index for run in runs for index in range(*run)] == list(range(len(steps)))
    for start, stop in runs:
        affine = volume_affine(positions[start:stop], AXIAL, (1, 1), single_step_mm=1)
        implied = np.array([(affine @ (index, 0, 0, 1))[:3] for index in range(stop - start)])
        assert np.abs(implied - positions[start:stop]).max() <= POSITION_TOLERANCE_MM


def test_the_affine_has_slice_step_second_direction_and_first_direction_as_columns():
    oblique = (0.6, 0.8, 0.0, 0.0, 0.0, -1.0)
    positions = np.array([[10.0, 20.0, 30.0], [11.0, 19.0, 30.0], [12.0, 18.0, 30.0]])
    affine = volume_affine(positions, oblique, (2.0, 0.5), single_step_mm=9)
    np.testing.assert_allclose(affine[:3, 0], [1, -1, 0])
    np.testing.assert_allclose(affine[:3, 1], [0, 0, -2.0])
    np.testing.assert_allclose(affine[:3, 2], [0.3, 0.4, 0])
    np.testing.assert_allclose(affine[:3, 3], [10, 20, 30])


def test_a_single_slice_steps_along_its_normal():
    affine = volume_affine(np.zeros((1, 3)), AXIAL, (1, 1), single_step_mm=5)
    np.testing.assert_allclose(affine[:3, 0], [0, 0, 5])


def test_tilt_is_the_angle_between_step_and_normal():
    positions = np.arange(4)[:, None] * np.array([0.0, np.tan(np.radians(18.5)), 1.0])
    assert tilt_degrees(volume_affine(positions, AXIAL, (1, 1), single_step_mm=1)) == pytest.approx(18.5)


def test_slices_nearer_than_the_tolerance_share_a_position():
    positions = along_z(2, 0, 2.004, 4, 0)
    assert place_numbers(positions, UP).tolist() == [1, 0, 1, 2, 0]


def test_slices_beside_each_other_in_one_plane_are_two_positions():
    assert len(set(place_numbers(np.array([[0, 0, 0], [50, 0, 0]], dtype=float), UP).tolist())) == 2


@pytest.mark.parametrize(
    ("orientation", "text"),
    [
        (None, "ImageOrientationPatient is missing"),
        ((1, 0, 0), "ImageOrientationPatient is not six finite numbers"),
        ((1, 0, 0, 0, float("nan"), 0), "ImageOrientationPatient is not six finite numbers"),
        ((1, 0, 0, 1, 0, 0), "ImageOrientationPatient is not two perpendicular unit vectors"),
        ((0, 0, 0, 0, 0, 0), "ImageOrientationPatient is not two perpendicular unit vectors"),
        (AXIAL, ""),
    ],
)
def test_says_what_is_wrong_with_an_orientation(orientation, text):
    assert orientation_error(orientation) == text


def test_says_what_is_wrong_with_a_position_or_a_spacing():
    assert position_error(None) == "ImagePositionPatient is missing"
    assert position_error((1, 2)) == "ImagePositionPatient is not three finite numbers"
    assert position_error((1, 2, float("nan"))) == "ImagePositionPatient is not three finite numbers"
    assert position_error((1, 2, 3)) == ""
    assert spacing_error(None) == "PixelSpacing is missing"
    assert spacing_error((0.0, 1.0)) == "PixelSpacing is not two positive numbers"
    assert spacing_error((1.0, float("inf"))) == "PixelSpacing is not two positive numbers"
    assert spacing_error((1.0, 2.0)) == ""


def test_grids_differ_by_orientation_or_spacing_beyond_rounding():
    assert same_grid((AXIAL, (1, 1)), ((1, 1e-6, 0, 0, 1, 0), (1.00001, 1)))
    assert not same_grid((AXIAL, (1, 1)), ((0.999, 0.04, 0, -0.04, 0.999, 0), (1, 1)))
    assert not same_grid((AXIAL, (1, 1)), (AXIAL, (1.01, 1)))


def test_the_normal_is_first_direction_cross_second():
    np.testing.assert_allclose(normal_of((0, 1, 0, 0, 0, -1)), [-1, 0, 0])
