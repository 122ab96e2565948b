"""Pictures of an evaluation: what they show is what is true, said and wrong, and they are the same each time."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image as Pillow

from geomed_mae.errors import OutputError
from geomed_mae.image import Channel, Image, RasterGeometry, VolumeGeometry
from geomed_mae.readers import IGNORE
from geomed_mae.scoring.calibration import histogram
from geomed_mae.scoring.charts import draw_calibration, draw_confusion, draw_confusions
from geomed_mae.scoring.classification import ClassificationScores
from geomed_mae.scoring.figure import plain_words
from geomed_mae.scoring.pictures import draw_pictures
from geomed_mae.scoring.worst import SIDE, Case, Worst, map_case
from geomed_mae.scoring.worst_pictures import (
    INVENTED,
    MISSED,
    _legend,
    _map_view,
    _marked,
    draw_worst_classes,
    draw_worst_maps,
)
from tests.scoring.rows import made_row

S2 = (("B02", 490.0), ("B03", 560.0), ("B04", 665.0), ("B08", 842.0), ("B12", 2190.0))


@dataclass
class OneImage:
    """An index of one image that is in memory."""

    image: Image

    def read(self, key: str, window: tuple[slice, ...]) -> Image:
        cut = (slice(None), *window)
        whole = self.image
        return Image(whole.array[cut], whole.valid[cut], whole.channels, whole.geometry, whole.modality, key)


def scene(shape=(40, 60)):
    channels = tuple(Channel(name=name, kind="optical", unit="reflectance", wavelength_nm=nm) for name, nm in S2)
    array = np.random.default_rng(0).random((5, *shape), np.float32) * 0.3
    geometry = RasterGeometry(crs=None, transform=(20, 0, 0, 0, -20, 0), gsd_m=(20.0, 20.0))
    image = Image(array, np.ones((1, *shape), bool), channels, geometry, "sentinel2-l2a", "k")
    return OneImage(image), made_row("k", shape=shape, spacing=(20.0, 20.0))


def volume():
    """Slices run from the head down, rows from back to front: neither is what a radiologist expects."""
    affine = np.array([[0, 0, 1, 0], [0, -1, 0, 0], [-2, 0, 0, 0], [0, 0, 0, 1]], float)
    array = np.zeros((1, 6, 20, 30), np.float32)
    array[0, :, :10] = 100.0
    channel = Channel(name="T1", kind="mr", unit="a.u.")
    image = Image(array, np.ones((1, 6, 20, 30), bool), (channel,), VolumeGeometry(affine=affine), "mr", "v")
    return OneImage(image), made_row("v", shape=(6, 20, 30), spacing=(2.0, 1.0, 1.0), geometry="volume")


def test_worst_keeps_the_lowest_values_in_order_and_makes_no_others():
    worst, made = Worst(2), []
    for name, value in (("a", 0.5), ("b", None), ("c", 0.1), ("d", 0.9), ("e", 0.1), ("f", 0.05)):
        worst.offer(value, lambda n=name: made.append(n) or SimpleNamespace(name=n))
    assert [case.name for case in worst.cases] == ["f", "c"]
    assert made == ["a", "c", "e", "f"]


def test_of_a_large_map_the_window_with_the_most_errors_is_kept():
    truth = np.zeros((1500, 1300), np.int16)
    truth[1400:, 1200:] = 1
    truth[:200, :1000] = IGNORE
    case = map_case(made_row("k", shape=truth.shape), 0.0, truth, np.zeros(truth.shape, np.uint8))
    rows, columns = case.window
    assert rows.stop == 1500 and columns.stop == 1300 and case.truth.shape == (SIDE, SIDE)
    assert (case.truth == 1).sum() == 100 * 100
    small = map_case(made_row("k", shape=(30, 40)), 0.0, truth[:30, :40], np.zeros((30, 40), np.uint8))
    assert small.truth.shape == (30, 40)


def test_errors_have_the_colours_of_the_legend_and_what_is_not_labelled_is_darker():
    index, row = scene()
    truth, found = np.zeros((40, 60), np.int16), np.zeros((40, 60), np.uint8)
    truth[5:10, 5:10], found[20:30, 20:30], truth[35:] = 1, 1, IGNORE
    view = _map_view(Case(row, (slice(0, 40), slice(0, 60)), 0.0, truth, found), index)
    assert list(view.pictures) == ["B04/B03/B02", "B12/B08/B04"]
    base = view.pictures["B04/B03/B02"]
    shown = _marked("differs", base, view)
    for ink, place in ((MISSED, (7, 7)), (INVENTED, (25, 25))):
        assert np.abs(shown[place] - np.array(to_rgb(ink))).max() < np.abs(base[place] - np.array(to_rgb(ink))).max()
    np.testing.assert_array_equal(shown[15, 15], base[15, 15])
    assert (shown[36:] <= base[36:]).all() and shown[36:].sum() < base[36:].sum()
    np.testing.assert_array_equal(_marked("B04/B03/B02", base, view), base)


def test_the_legend_has_as_many_lines_as_its_names_need():
    few = _legend(("background", "water"), 8.0)
    assert [line for _, line, _, _ in few] == [0] * 4 and few[0][3] == "■ water"
    names = ("background", *(f"a class of vegetation, number {number}" for number in range(12)))
    many = _legend(names, 8.0)
    assert len(many) == 12 + 4 and many[-1][1] > 1 and max(left for left, *_ in many) < 7.0
    assert all(one[0] < other[0] for one, other in itertools.pairwise(many) if one[1] == other[1])
    assert len({ink for *_, ink, _ in many}) == len(many), "no two have the same colour"


def test_a_volume_is_shown_at_its_worst_slice_in_the_radiological_convention():
    index, row = volume()
    truth, found = np.zeros((6, 20, 30), np.int16), np.zeros((6, 20, 30), np.uint8)
    truth[4, 2:5, 3:9] = 1
    view = _map_view(Case(row, tuple(slice(0, size) for size in row.shape), 0.0, truth, found), index)
    assert view.place == "axial, slice 5 of 6" and view.edges == "RLAP"
    # Rows run to the front in the file: the picture has the front, dark here, on top.
    (picture,) = view.pictures.values()
    assert picture[0].mean() < picture[-1].mean()
    assert view.truth[15:18, 3:9].all() and view.truth.sum() == 18


def test_all_pictures_are_written_whole_and_the_same_each_time(tmp_path):
    index, row = scene()
    truth = np.zeros((40, 60), np.int16)
    truth[5:20, 5:30] = 1
    case = Case(row, (slice(0, 40), slice(0, 60)), 0.25, truth, np.roll(truth, 6, axis=1).astype(np.uint8))
    other = Case(row, (slice(0, 40), slice(0, 60)), 0.1, np.array([0, 1], np.int8), np.array([0.9, 0.1]))
    bins = histogram(np.linspace(0, 1, 50), np.arange(50) % 3 > 0)
    counts = np.array([[10, 2], [0, 0]])
    drawers = {
        "worst.png": lambda path: draw_worst_maps(path, [case, case], index, ("land", "burned")),
        "images.png": lambda path: draw_worst_classes(path, [other] * 5, index, ("land", "burned")),
        "confusion.png": lambda path: draw_confusion(path, counts, ("land", "burned"), "pixels"),
        "several.png": lambda path: draw_confusions(path, [counts] * 5, tuple("abcde")),
        "calibration.png": lambda path: draw_calibration(path, ("all", bins), [(1, "burned", bins)], "pixels"),
    }
    for name, draw in drawers.items():
        first, second = (draw(tmp_path / part / name) for part in ("one", "two"))
        assert first.read_bytes() == second.read_bytes(), name
        with Pillow.open(first) as picture:
            assert min(picture.size) > 200 and np.asarray(picture.convert("L")).std() > 5, name
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(drawers)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"the picture 'confusion\.png' cannot be written"):
        draw_confusion(tmp_path / "file" / "confusion.png", counts, ("a", "b"), "pixels")


def test_shares_of_a_logarithmic_axis_are_no_formulas(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr("geomed_mae.scoring.charts.save", lambda made, path: kept.append(made) or path)
    said = np.r_[np.full(2000, 0.9), 0.1]
    with plain_words():
        draw_calibration(tmp_path / "c.png", ("all", histogram(said, np.ones(2001))), [], "pixels")
        kept[0].canvas.draw()
    words = [label.get_text() for axis in kept[0].axes for label in axis.get_yticklabels(which="both")]
    assert "1 %" in words and not any("$" in word for word in words)


def test_classes_are_named_as_they_are_and_pictures_of_older_scores_go(tmp_path):
    """matplotlib takes what stands between two "$" for a formula, and stops where it is none."""
    scores = ClassificationScores([r"5$\no", r"\formula$"])
    for number in range(4):
        scores.add_image(f"k{number}", f"p{number}", np.array([0.25 * number, 1 - 0.25 * number]), number % 2)
    for name in ("worst.png", "mine.png"):
        (tmp_path / name).write_text("")
    assert draw_pictures(tmp_path, scores, scene()[0], Worst(1)) == ["confusion.png", "calibration.png"]
    names = [r"\no$5", r"$\frac{$"]
    with plain_words():
        draw_confusion(tmp_path / "other.png", np.eye(2), names, "images")
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "calibration.png", "mine.png", "other.png"}
    with pytest.raises(ValueError, match="frac"):
        draw_confusion(tmp_path / "other.png", np.eye(2), names, "images")
