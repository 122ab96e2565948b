"""RTSTRUCT onto voxels: areas known beforehand, point-in-polygon by matplotlib as the oracle, and hostile files."""

from __future__ import annotations

import time

import numpy as np
import pytest
from matplotlib.path import Path as Outline

from geomed_mae.errors import ReadError
from geomed_mae.image import Channel, Image, PlaneGeometry, VolumeGeometry
from geomed_mae.readers import IGNORE, LabelQuery, read_labels
from geomed_mae.readers.dicom import rtstruct as dicom_rtstruct
from geomed_mae.readers.dicom.rtstruct import fill_even_odd
from geomed_mae.readers.reasons import Reason
from tests.make_dicom import patch, uid
from tests.make_labels import contour, item, square, write_rtstruct

RNG = np.random.default_rng(7)
TWO = LabelQuery(classes=("background", "tumour", "core"))


def grid(affine: np.ndarray | None = None, shape: tuple[int, ...] = (6, 20, 20)) -> Image:
    """Image without content: axial slices 2 mm apart, pixels of 1 mm, first centre at (0, 0, 0), unless given."""
    if affine is None:
        affine = np.array([[0, 0, 1.0, 0], [0, 1.0, 0, 0], [2.0, 0, 0, 0], [0, 0, 0, 1]])
    array = np.zeros((1, *shape), np.float32)
    return Image(array, np.ones_like(array, bool), (Channel(name="c"),), VolumeGeometry(affine), "ct")


def labels(path, regions, *, onto: Image | None = None, query: LabelQuery = TWO, **how):
    return read_labels(write_rtstruct(path / "RS.dcm", regions, **how), onto or grid(), query)


def oblique(tilt: float = 0.0) -> np.ndarray:
    """Affine turned about two axes, pixels of 0.7 x 1.3 mm, slices 2.5 mm apart; `tilt` shears the slice step."""
    a, b = 0.4, -0.7
    turn = np.array([[np.cos(a), -np.sin(a), 0], [np.sin(a), np.cos(a), 0], [0, 0, 1]]) @ np.array(
        [[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]]
    )
    affine = np.eye(4)
    affine[:3, 0] = turn @ [0, tilt, 2.5]
    affine[:3, 1] = turn @ [0, 1.3, 0]
    affine[:3, 2] = turn @ [0.7, 0, 0]
    affine[:3, 3] = (-31.5, 12.25, 400.0)
    return affine


def test_a_square_covers_the_centres_inside_it(tmp_path):
    found = labels(tmp_path, {"Tumour": [square(2.5, 7.5, 4.0)]})
    expected = np.zeros((6, 20, 20), np.int16)
    expected[2, 3:8, 3:8] = 1
    np.testing.assert_array_equal(found.array, expected)
    assert found.names == ("background", "tumour", "core") and found.array.dtype == np.int16


def test_borders_through_centres_are_half_open_so_that_neighbours_share_nothing(tmp_path):
    found = labels(
        tmp_path, {"tumour": [square(2, 7, 0)], "core": [contour([(7, 2, 0), (9, 2, 0), (9, 7, 0), (7, 7, 0)])]}
    )
    assert (found.array == 1).sum() == 25 and (found.array == 2).sum() == 10


def test_a_hole_is_a_second_contour_or_a_keyhole(tmp_path):
    outer, inner = [(1.5, 1.5), (9.5, 1.5), (9.5, 9.5), (1.5, 9.5)], [(4.5, 4.5), (6.5, 4.5), (6.5, 6.5), (4.5, 6.5)]
    keyhole = [*outer, outer[0], *inner, inner[0], outer[0]]
    two = labels(tmp_path, {"tumour": [contour([(*p, 2) for p in outer]), contour([(*p, 2) for p in inner])]})
    one = labels(tmp_path, {"tumour": [contour([(*p, 2.0) for p in keyhole])]})
    np.testing.assert_array_equal(one.array, two.array)
    assert (one.array == 1).sum() == 64 - 4 and one.array[1, 5, 5] == 0


def test_a_contour_stored_twice_does_not_undo_itself(tmp_path):
    found = labels(tmp_path, {"tumour": [square(1.5, 4.5, 2), square(1.5, 4.5, 2), square(9.5, 11.5, 2)]})
    assert (found.array == 1).sum() == 9 + 4


def test_the_class_with_the_higher_number_lies_on_top_whatever_the_files_order(tmp_path):
    for order in (("core", "tumour"), ("tumour", "core")):
        sizes = {"core": square(4.5, 6.5, 2), "tumour": square(1.5, 9.5, 2)}
        found = labels(tmp_path, {name: [sizes[name]] for name in order}).array
        assert (found == 2).sum() == 4 and (found == 1).sum() == 60


@pytest.mark.parametrize("tilt", [0.0, 1.1])
def test_oblique_and_tilted_series_take_contours_as_they_lie(tmp_path, tilt):
    affine, shape = oblique(tilt), (5, 24, 30)
    regions, expected = [], np.zeros(shape, np.int16)
    rows, columns = np.mgrid[: shape[1], : shape[2]]
    for plane in (1, 2, 4):
        angle = np.sort(RNG.uniform(0, 2 * np.pi, 17))
        radius = RNG.uniform(3, 10, 17)
        outline = np.stack([12.1 + radius * np.sin(angle), 14.3 + radius * np.cos(angle)], axis=1)
        inside = Outline(outline).contains_points(np.stack([rows.ravel(), columns.ravel()], axis=1))
        expected[plane] = inside.reshape(shape[1:])
        index = np.column_stack([np.full(17, plane), outline, np.ones(17)])
        regions.append(contour((affine @ index.T).T[:, :3]))
    found = labels(tmp_path, {"tumour": regions}, onto=grid(affine, shape))
    np.testing.assert_array_equal(found.array, expected)
    assert dict(found.counts)["slices_between_contours"] == 1


def test_polygons_equal_matplotlibs(tmp_path):
    centres = np.stack(np.meshgrid(np.arange(40), np.arange(50), indexing="ij"), axis=-1).reshape(-1, 2)
    for size in [*range(3, 30), 200]:
        outline = RNG.uniform(-10, 60, (size, 2))
        # A fan of triangles, each combined by XOR, is the even-odd rule for a polygon that crosses itself.
        expected = np.zeros(len(centres), bool)
        for number in range(1, size - 1):
            expected ^= Outline(outline[[0, number, number + 1]]).contains_points(centres)
        inside, used = fill_even_odd([outline], (40, 50))
        np.testing.assert_array_equal(inside, expected.reshape(40, 50))
        assert used <= 40 * size
        assert fill_even_odd([outline], (40, 50), budget=used - 1)[0] is None


def test_a_contour_goes_to_the_slice_within_half_a_spacing_and_no_further(tmp_path):
    assert (labels(tmp_path, {"tumour": [square(1.5, 4.5, 2.9)]}).array[1] == 1).sum() == 9
    assert (labels(tmp_path, {"tumour": [square(1.5, 4.5, -1.0)]}).array[0] == 1).sum() == 9
    with pytest.raises(
        ReadError, match=r"RS\.dcm has a contour 1\.30 mm from the nearest slice .* 2\.00 mm apart"
    ) as e:
        labels(tmp_path, {"tumour": [square(1.5, 4.5, -1.3)]})
    assert e.value.reason == "BAD_GEOMETRY"
    steep = contour([(1, 1, 2), (9, 1, 2), (9, 9, 4.5)])
    with pytest.raises(ReadError, match="from the nearest slice"):
        labels(tmp_path, {"tumour": [steep]})


def test_of_two_planes_on_one_slice_the_nearer_one_counts(tmp_path):
    found = labels(tmp_path, {"tumour": [square(1.5, 4.5, 2.2), square(1.5, 9.5, 2.8)]})
    assert (found.array == 1).sum() == 9 and dict(found.counts)["contours_between_slices"] == 1


def test_contours_beside_the_image_are_refused_and_cut_ones_counted(tmp_path):
    with pytest.raises(ReadError, match="has a contour beside the image"):
        labels(tmp_path, {"tumour": [square(30, 40, 2)]})
    found = labels(tmp_path, {"tumour": [square(15.5, 40, 2)]})
    assert (found.array == 1).sum() == 16 and dict(found.counts)["contours_cut_by_the_edge"] == 1


def test_contours_drawn_on_another_volume_of_the_same_set_are_left_out(tmp_path):
    mine, other = uid("mine"), uid("other")
    query = LabelQuery(identity=(("instance", mine),), classes=("background", "tumour"))
    regions = {"tumour": [square(1.5, 4.5, 2, instance=mine), square(1.5, 4.5, 60, instance=other)]}
    found = labels(tmp_path, regions, query=query, instances=[mine, other])
    assert (found.array == 1).sum() == 9 and dict(found.counts)["contours_of_other_images"] == 1


def test_gaps_are_counted_and_not_filled(tmp_path):
    found = labels(tmp_path, {"tumour": [square(1.5, 4.5, 0), square(1.5, 4.5, 8)]})
    assert (found.array[1:4] == 0).all() and dict(found.counts)["slices_between_contours"] == 3


def test_another_frame_of_reference_is_refused_unless_an_instance_is_named(tmp_path):
    known = (("frame", uid("elsewhere")), ("instance", uid("mine")))
    query = LabelQuery(identity=known, classes=("background", "tumour"))
    with pytest.raises(ReadError, match=r"RS\.dcm lies in another frame of reference than the image") as caught:
        labels(tmp_path, {"tumour": [square(1.5, 4.5, 2)]}, query=query)
    assert caught.value.reason == "BAD_GEOMETRY" and uid("elsewhere") not in str(caught.value)
    regions = {"tumour": [square(1.5, 4.5, 2, instance=uid("mine"))]}
    assert (labels(tmp_path, regions, query=query, instances=[uid("mine")]).array == 1).sum() == 9
    alone = LabelQuery(classes=("background", "tumour"))
    assert (labels(tmp_path, {"tumour": [square(1.5, 4.5, 2)]}, query=alone, frame=None).array == 1).sum() == 9


def test_points_and_lines_are_left_out_and_counted(tmp_path):
    regions = {
        "isocentre": [contour([(1, 1, 2)], ContourGeometricType="POINT")],
        "wire": [contour([(1, 1, 2), (5, 5, 2), (5, 6, 2)], ContourGeometricType="OPEN_PLANAR")],
        "tumour": [square(1.5, 4.5, 2, ContourGeometricType="CLOSEDPLANAR_XOR"), contour([(1, 1, 2), (5, 5, 2)])],
    }
    found = labels(tmp_path, regions)
    assert (found.array == 1).sum() == 9 and dict(found.counts)["contours_left_out"] == 3
    with pytest.raises(ReadError, match="no known geometric type"):
        labels(tmp_path, {"tumour": [square(1, 4, 2, ContourGeometricType="SPLINE")]})


def test_names_are_classes(tmp_path):
    regions = {"Tumor ": [square(1.5, 4.5, 2)], "Lunge rechts": [square(9.5, 11.5, 2)]}
    with pytest.raises(
        ReadError, match=r"RS\.dcm has the class 'Tumor', .* did you mean 'tumour'\?; name it"
    ) as caught:
        labels(tmp_path, regions)
    assert caught.value.reason == "CLASS_UNKNOWN"
    mapped = LabelQuery(classes=("background", "tumour"), values={"TUMOR": 1})
    assert np.bincount(labels(tmp_path, regions, query=mapped).array.ravel()).tolist() == [2400 - 9, 9]
    met = labels(tmp_path, regions, query=LabelQuery())
    assert met.names == ("background", "Tumor", "Lunge rechts") and (met.array == 2).sum() == 4
    umlaut = LabelQuery(classes=("background", "größe"))
    assert (labels(tmp_path, {"Größe": [square(1.5, 4.5, 2)]}, query=umlaut).array == 1).sum() == 9


def test_without_a_background_class_the_rest_is_unknown(tmp_path):
    found = labels(tmp_path, {"tumour": [square(1.5, 4.5, 2)]}, query=LabelQuery(classes=("tumour", "other")))
    assert (found.array == 0).sum() == 9 and (found.array == IGNORE).sum() == 2400 - 9


def test_a_region_without_contours_needs_no_class(tmp_path):
    assert (labels(tmp_path, {"tumour": [square(1.5, 4.5, 2)], "forgotten": []}).array == 1).sum() == 9


def test_what_is_no_volume_or_no_label_object_says_so(tmp_path):
    flat = Image(
        np.zeros((1, 4, 4), np.float32), np.ones((1, 4, 4), bool), (Channel(name="c"),), PlaneGeometry(), "xray"
    )
    with pytest.raises(ReadError, match="outlines regions in space; the image has no place in space"):
        labels(tmp_path, {"tumour": [square(1, 4, 2)]}, onto=flat)


BAD = {
    "not a number": ({"ContourData": ["1", "2", "nan"]}, "MALFORMED", "no numbers"),
    "empty": ({"ContourData": ["1", "", "3"]}, "MALFORMED", "no numbers"),
    "infinite": (
        {"ContourData": ["1", "1e999", "3"] * 3, "NumberOfContourPoints": 3},
        "BAD_GEOMETRY",
        "beyond 100000 mm",
    ),
    "odd": ({"ContourData": ["1", "2", "3", "4"]}, "MALFORMED", "4 coordinates"),
    "count": ({"NumberOfContourPoints": 7}, "MALFORMED", "12 coordinates that declares 7 of points"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", BAD)
def test_damaged_contours_end_in_a_reason(tmp_path, case):
    tags, reason, message = BAD[case]
    with pytest.raises(ReadError, match=message) as caught:
        labels(tmp_path, {"tumour": [square(1, 4, 2, **tags)]})
    assert caught.value.reason == reason and "RS.dcm" in str(caught.value)


@pytest.mark.parametrize("text", [b"DoeJane ", b"1.0e+-22", b"  1 2 3 ", b"1__2.__3"])
def test_text_in_place_of_a_coordinate_is_refused_and_not_shown(tmp_path, text):
    path = write_rtstruct(tmp_path / "RS.dcm", {"tumour": [contour([(1, 1, 2), (4, 98765.25, 2), (4, 4, 2)])]})
    with pytest.raises(ReadError, match="has contour points that are no numbers") as caught:
        read_labels(patch(path, b"98765.25", text), grid(), TWO)
    assert caught.value.reason == "MALFORMED" and "Doe" not in str(caught.value)


def test_cut_or_incomplete_files_end_in_a_reason(tmp_path):
    path = write_rtstruct(tmp_path / "RS.dcm", {"tumour": [square(1, 4, 2)]})
    whole = path.read_bytes()
    for size in range(140, len(whole) - 1, 37):
        path.write_bytes(whole[:size])
        with pytest.raises(ReadError):
            read_labels(path, grid(), TWO)
    with pytest.raises(ReadError, match="contours of a region it does not name"):
        labels(tmp_path, {"tumour": [square(1, 4, 2)]}, StructureSetROISequence=[item(ROINumber=9, ROIName="x")])
    with pytest.raises(ReadError, match="has no contours"):
        labels(tmp_path, {}, ROIContourSequence=None)


def test_a_contour_of_100_000_points_takes_seconds_and_limits_hold(tmp_path, monkeypatch):
    zigzag = [(float(n % 2) * 19, 0.3 * (n % 50), 2.0) for n in range(100_000)]
    path = write_rtstruct(tmp_path / "RS.dcm", {"tumour": [contour(zigzag)]})
    start = time.perf_counter()
    read_labels(path, grid(), TWO)
    assert time.perf_counter() - start < 10
    for limit, regions in (
        ("MAX_CONTOURS", [square(1, 4, 2)] * 9),
        ("MAX_POINTS", [square(1, 4, 2)] * 9),
        ("MAX_CROSSINGS", [square(1, 18, 2)] * 9),
    ):
        with monkeypatch.context() as patched, pytest.raises(ReadError) as caught:
            patched.setattr(dicom_rtstruct, limit, 8)
            labels(tmp_path, {"tumour": regions})
        assert caught.value.reason == "TOO_LARGE" and "RS.dcm" in str(caught.value)


def test_any_changed_byte_ends_in_an_array_or_a_reason(tmp_path):
    outer = [(1.5, 1.5, 2), (9.5, 1.5, 2), (9.5, 9.5, 2), (1.5, 9.5, 2)]
    path = write_rtstruct(tmp_path / "RS.dcm", {"tumour": [contour(outer), square(3, 5, 4)]}, instances=[uid("mine")])
    whole = path.read_bytes()
    for _ in range(300):
        changed = bytearray(whole)
        for place in RNG.integers(132, len(whole), 3):
            changed[place] = RNG.integers(256)
        path.write_bytes(changed)
        try:
            assert read_labels(path, grid(), TWO).array.shape == (6, 20, 20)
        except ReadError as error:
            assert error.reason in Reason.__members__
