"""What a person sees: true proportions, the right side on the right, nothing invented where nothing is valid."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from geomed_mae.archives.terminal import NOTHING, SHADES, terminal_picture
from geomed_mae.archives.views import INVALID, Sketch, View, axis_letters, shown_as, shown_channels
from geomed_mae.image import Channel, Image, PlaneGeometry, RasterGeometry, VolumeGeometry


def optical(**wavelengths: float) -> tuple[Channel, ...]:
    return tuple(Channel(name=name, kind="optical", wavelength_nm=nm) for name, nm in wavelengths.items())


def views(array: np.ndarray, valid: np.ndarray, channels: tuple[Channel, ...], geometry: object) -> list[View]:
    sketch = Sketch(channels, array.shape[1:], geometry)
    sketch.add(Image(array.astype(np.float32), valid.copy(), channels, geometry, "test"))
    return sketch.views()


def all_valid(array: np.ndarray) -> np.ndarray:
    return np.ones((1,) * array.ndim, bool)


@pytest.mark.parametrize(
    ("channels", "shown", "words"),
    [
        (optical(B02=490, B03=560, B04=665, B08=842), (2, 1, 0), "B04, B03, B02 as red, green, blue"),
        (optical(red=611, green=549, blue=464), (0, 1, 2), "natural colours"),
        (optical(nir=842, swir=1610), (0,), "nir as grey"),
        (optical(B03=560, B04=665), (0,), "B03 as grey"),
        ((Channel(name="VV", kind="sar"), Channel(name="VH", kind="sar")), (0,), "VV as grey"),
    ],
)
def test_natural_colours_are_found_by_wavelength(channels, shown, words):
    assert shown_channels(channels) == shown
    assert shown_as(channels) == words


def test_a_raster_has_its_proportions_on_the_ground():
    array = np.random.default_rng(0).random((1, 30, 60))
    geometry = RasterGeometry(None, (1, 0, 0, 0, -1, 0), (20.0, 5.0))
    (view,) = views(array, all_valid(array), (Channel(name="x"),), geometry)
    assert view.size == (600, 300)
    assert view.picture(100).size == (50, 100)


def test_black_and_white_are_the_first_and_last_percentile_and_invalid_pixels_have_their_colour():
    array = np.tile(np.linspace(0, 100, 101, dtype=np.float32), (1, 101, 1))
    valid = np.ones((1, 101, 101), bool)
    valid[:, 60:] = False
    array[:, 60:] = np.nan
    (view,) = views(array, valid, (Channel(name="x"),), PlaneGeometry())
    assert view.limits == ((pytest.approx(1.0), pytest.approx(99.0)),)
    picture = np.asarray(view.picture(101))
    assert (picture[65:] == INVALID).all()
    assert (picture[:55, :2] == 0).all() and (picture[:55, -2:] == 255).all()
    assert (picture[20, 50] == 127).all() or (picture[20, 50] == 128).all()
    assert (np.diff(picture[20, :, 0].astype(int)) >= 0).all()


def test_colours_go_where_their_wavelengths_belong():
    array = np.zeros((3, 40, 40), np.float32)
    array[2, :20] = 1  # B04: red above
    array[0, 20:] = 1  # B02: blue below
    array[1] = np.random.default_rng(0).random((40, 40)) / 100
    (view,) = views(array, all_valid(array), optical(B02=490, B03=560, B04=665), PlaneGeometry())
    picture = np.asarray(view.picture(40)).astype(int)
    assert (picture[5, :, 0] == 255).all() and (picture[5, :, 2] == 0).all()
    assert (picture[35, :, 2] == 255).all() and (picture[35, :, 0] == 0).all()


def test_a_few_pixels_are_drawn_as_squares():
    array = np.array([[[0.0, 100.0], [50.0, np.nan]]])
    valid = np.array([[[True, True], [True, False]]])
    (view,) = views(array, valid, (Channel(name="x"),), PlaneGeometry())
    picture = np.asarray(view.picture(40))
    assert (picture[:20, :20] == 0).all() and (picture[:20, 20:] == 255).all()
    assert (picture[20:, 20:] == INVALID).all() and len(np.unique(picture[20:, :20])) == 1


def test_parts_give_the_view_of_the_whole():
    array = np.random.default_rng(0).random((1, 300, 200)).astype(np.float32)
    channels, geometry = (Channel(name="x"),), PlaneGeometry()
    (whole,) = views(array, all_valid(array), channels, geometry)
    sketch = Sketch(channels, (300, 200), geometry)
    for top in range(0, 300, 70):
        sketch.add(Image(array[:, top : top + 70].copy(), all_valid(array), channels, geometry, "test"))
    np.testing.assert_array_equal(sketch.views()[0].values, whole.values)


POINTS = {"L": (9, 5, 5), "P": (5, 9, 5), "S": (5, 5, 9), "R": (1, 5, 5), "A": (5, 1, 5), "I": (5, 5, 1)}
"""A bright voxel near each side of a cube of 11 voxels, as (x, y, z) in LPS."""

SIDES = {"axial": ("RLAP", (0, 1)), "coronal": ("RLSI", (0, 2)), "sagittal": ("APSI", (1, 2))}


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("signs", list(itertools.product((1, -1), repeat=3)))
def test_every_side_of_the_body_is_where_its_letter_says(order, signs):
    """Volumes stored along any axes in any direction: the voxel at a side lights up at that edge of the picture."""
    affine = np.zeros((4, 4))
    affine[3, 3] = 1
    for axis, (patient, sign) in enumerate(zip(order, signs, strict=True)):
        affine[patient, axis] = sign
        affine[patient, 3] = 0 if sign > 0 else 10
    for letter, point in POINTS.items():
        index = np.round(np.linalg.inv(affine) @ (*point, 1)).astype(int)[:3]
        array = np.zeros((1, 11, 11, 11), np.float32)
        array[(0, *index)] = 1000
        for view in views(array, all_valid(array), (Channel(name="x"),), VolumeGeometry(affine)):
            assert view.edges == SIDES[view.label][0]
            if letter in view.edges:
                y, x = np.argwhere(view.values[..., 0] == 1000)[0]
                where = {(5, 1): 0, (5, 9): 1, (1, 5): 2, (9, 5): 3}[(int(y), int(x))]
                assert view.edges[where] == letter


def test_the_plane_of_acquisition_comes_first_and_planes_have_their_sizes():
    array = np.random.default_rng(0).random((1, 5, 8, 20)).astype(np.float32)
    affine = np.array([[0, 0, 2, 0], [6, 0, 0, 0], [0, -2, 0, 0], [0, 0, 0, 1]], float)  # coronal slices, 6 mm apart
    made = views(array, all_valid(array), (Channel(name="x"),), VolumeGeometry(affine))
    assert [(view.label, view.size) for view in made] == [
        ("coronal", (16, 40)),
        ("axial", (30, 40)),
        ("sagittal", (16, 30)),
    ]
    assert axis_letters(affine) == ("AP", "SI", "RL")


def test_further_channels_of_a_volume_get_one_plane_each():
    array = np.random.default_rng(0).random((6, 4, 8, 8)).astype(np.float32)
    channels = tuple(Channel(name=name) for name in "abcdef")
    made = views(array, all_valid(array), channels, VolumeGeometry(np.diag([5.0, 1, 1, 1])[[2, 1, 0, 3]]))
    assert [view.label.split()[0] for view in made] == list("aaabcd")


def test_a_terminal_picture_has_true_proportions_and_five_shades():
    values = np.tile(np.linspace(0, 1, 100, dtype=np.float32), (50, 1))[..., None]
    known = np.ones((50, 100), bool)
    known[:, :20] = False
    lines = terminal_picture(View(values, known, ((0.0, 1.0),), (50, 100)), columns=40)
    assert len(lines) == 10 and {len(line) for line in lines} == {40}
    assert lines[0][:7] == 7 * NOTHING
    assert lines[0].lstrip(NOTHING) == "".join(sorted(lines[0].lstrip(NOTHING), key=SHADES.index))
    assert set(lines[0]) == {NOTHING, *SHADES}


def test_a_tall_terminal_picture_is_made_narrower():
    view = View(np.ones((9, 3, 1), np.float32), np.zeros((9, 3), bool), ((0.0, 1.0),), (900, 30))
    lines = terminal_picture(view)
    assert len(lines) == 44 and set(lines) == {3 * NOTHING}
