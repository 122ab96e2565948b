"""Pictures show what was seen, what was asked and how far off the answer was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from geomed_mae.archives.planes import Window
from geomed_mae.archives.statistics import summarise
from geomed_mae.errors import OutputError
from geomed_mae.training.live_files import BOXES
from geomed_mae.training.panels import (
    BELOW,
    CELL,
    GAP,
    HIDDEN,
    LEFT,
    SCALE,
    TOP,
    TWO_LINES,
    _cells,
    caption,
    draw,
    draw_reconstructions,
    error_summary,
    most_structure,
    pictures,
)
from geomed_mae.training.pictures import Picture


def test_a_volume_gives_a_row_a_plane_with_the_sides_of_its_patient(objective, batches_of):
    batch = batches_of("ct", (4, 16, 16), count=1)
    rows = pictures(batch, objective.reconstruct(batch, 0), [0], {"k0": ("IS", "AP", "RL")})
    assert [row.label.split(" · ")[1] for row in rows] == ["axial", "coronal", "sagittal"]
    assert [row.image.shape for row in rows] == [(16, 16, 1), (4, 16, 1), (4, 16, 1)]
    assert [row.aspect for row in rows] == [0.5, 2.5, 5.0]  # spacing 5 x 1 x 2 mm
    coronal = rows[1].image[::-1, :, 0]  # superior is on top
    assert any(np.array_equal(coronal, batch.raw[0, 0, :, place].numpy()) for place in range(16))


def test_crops_are_chosen_by_the_structure_of_the_image_in_its_own_units(objective, batches_of):
    batch = batches_of("landsat7", (16, 16), count=4)
    batch.raw[1, :, 8:] += 300  # a coast
    batch.raw[3, :, :, 8:] += 200
    batch.raw[0] = (batch.raw[0] - 70) * 1e4  # noise in large units
    own = summarise(batch.raw[0].numpy(), batch.valid[0].numpy())
    batch = replace(batch, statistics=(own, *batch.statistics[1:]))
    assert most_structure(batch, objective.reconstruct(batch, 0), (4, 4), 2) == [1, 3]


def picture(height: int = 4, aspect: float = 1.0) -> Picture:
    image = np.linspace(0, 100, 4 * height).reshape(height, 4, 1)
    valid, seen, asked = np.ones((height, 4), bool), np.zeros((height, 4), bool), np.zeros((height, 4), bool)
    valid[-1], seen[0], asked[1:3] = False, True, True
    window = Window(np.array([0.0]), np.array([100.0]), "all of it")
    return Picture("x", image, image + 7 * asked[..., None], valid, seen, asked, aspect, window, "HU", "RLAP")


def test_hidden_patches_have_a_colour_of_their_own_invalid_is_white_and_the_error_is_where_it_was_asked():
    (image, masked, answer), error, mean = _cells(picture())
    assert (masked[1:3] == HIDDEN).all() and np.array_equal(masked[0], image[0])
    assert np.ptp(HIDDEN) > 0.1, "no grey of an image"
    assert all((cell[3] == 1).all() for cell in (image, masked, answer))
    assert np.isnan(error[0]).all() and np.isnan(error[3]).all() and error[1:3] == pytest.approx(7)
    assert mean == pytest.approx(7)
    assert image[1, 2] == pytest.approx(np.full(3, 0.4), abs=0.003), "values of 40 between 0 and 100"


def test_an_answer_that_is_not_finite_is_drawn_all_the_same(tmp_path):
    row = picture()
    row.answer[1] = np.nan
    cells, _, mean = _cells(row)
    assert all(np.isfinite(cell).all() for cell in cells) and mean == pytest.approx(7)
    draw(tmp_path / "x.png", [row], title="x")


def test_cells_are_where_the_picture_says_and_in_true_proportion(tmp_path):
    from matplotlib.image import imread

    rows = [picture(4), picture(8, aspect=0.25), picture(20, aspect=2.0)]
    path = draw(tmp_path / "x.png", rows, title="x", dpi=100)
    data = path.read_bytes()
    at = data.index(b"tEXt" + BOXES.encode())
    text = data[at + 5 + len(BOXES) : at + 4 + int.from_bytes(data[at - 4 : at])].decode()
    columns = [[tuple(map(int, cell.split(","))) for cell in column.split(";")] for column in text.split(" ")]
    pixels = imread(path)
    assert [len(column) for column in columns] == [3, 3, 3]
    for row, boxes in zip(rows, zip(*columns, strict=True), strict=True):
        for (left, top, right, bottom), cell in zip(boxes, _cells(row)[0], strict=True):
            assert (bottom - top) / (right - left) == pytest.approx(row.image.shape[0] / 4 * row.aspect, rel=0.03)
            height, width = row.image.shape[:2]
            # The middle of each pixel of the image, away from the letters at the edges.
            for y, x in ((1, 1), (height - 2, 2)):
                place = int(top + (bottom - top) * (y + 0.5) / height), int(left + (right - left) * (x + 0.5) / width)
                assert pixels[place][:3] == pytest.approx(cell[y, x], abs=0.01)


@pytest.mark.parametrize("dpi", [100, 150])
def test_the_label_of_a_thin_row_stays_within_its_row(tmp_path, dpi):
    from matplotlib.image import imread

    words = (
        "example 1 · axial",
        "example 1 · coronal",
        "example 12 · VV · slice x column",
        "no break in this one",
        "x",
    )
    rows = [
        replace(picture(4, aspect), label=label, unit="mW/(m2 sr nm)")
        for label, aspect in zip(words, (1.0, 0.15, 0.17, 0.01, 1.4), strict=True)
    ]
    pixels = imread(draw(tmp_path / "x.png", rows, title="x", dpi=dpi))[..., :3].min(axis=-1)
    top = TOP
    for row in rows:
        tall = CELL * row.aspect
        ends = [round((edge + way * BELOW / 2) * dpi) for edge, way in ((top, -1), (top + tall, 1))]
        for left, right in ((0, LEFT), (LEFT + 3 * CELL + 2 * GAP + 0.2, LEFT + 3 * CELL + 2 * GAP + SCALE)):
            margin = pixels[ends[0] : ends[1], round(left * dpi) : round(right * dpi) - 3]
            assert margin.min() < 0.9, f"{row.label}: there is a label, or a scale with its unit"
            if left == 0:
                assert (margin[[0, -1]] == 1).all() and (margin[:, 0] == 1).all(), f"{row.label} leaves its row"
        top += tall + BELOW


def test_a_label_that_fits_is_one_line_and_a_thin_row_has_two(monkeypatch, tmp_path):
    from matplotlib.figure import Figure

    said = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: (path.touch(), said.append(figure)))
    rows = [replace(picture(4, aspect), label="example 1 · coronal", unit="mW/(m2 sr nm)") for aspect in (1.0, 0.2)]
    draw(tmp_path / "x.png", rows, title="x")
    labels = [axis.yaxis.label for axis in said[0].axes if "example" in axis.get_ylabel()]
    assert [(label.get_text(), label.get_fontsize()) for label in labels] == [
        ("example 1 · coronal", 7.5),
        ("example 1\ncoronal", TWO_LINES),
    ]
    units = [axis.yaxis.label for axis in said[0].axes if "mW" in axis.get_ylabel()]
    tall = [label.get_window_extent().height / said[0].dpi for label in units]
    assert len(tall) == 4 and max(tall[2:]) < 0.2 * CELL + BELOW < min(tall[:2]), "the unit of a thin row is smaller"


def test_a_cell_of_another_shape_is_cut_into_a_strip_without_what_stands_beside_it(tmp_path):
    from geomed_mae.reporting.series import _cut, _read

    rows = [replace(picture(4, aspect), label="example 1 · coronal", edges="") for aspect in (1.0, 2.6, 0.2)]
    for row in rows:
        for array in (row.image, row.answer):
            array[:] = 60.0
        row.seen[:], row.valid[:] = True, True
    pixels, boxes = _read(draw(tmp_path / "x.png", rows, title="x", dpi=100))
    for column in boxes:
        strip = _cut(pixels, column)[..., :3]
        shades = np.unique(strip[:, 2:-2].reshape(-1, 3).round(2), axis=0)
        assert shades.shape == (2, 3) and (shades[1] == 1).all(), "the grey of the image and white, no label, no scale"


def test_the_caption_says_what_is_shown(objective, batches_of):
    text = caption(batches_of("landsat7", (16, 16)), 0.75, (4, 4))
    assert text.split("  ·  ") == [
        "landsat7",
        "B3/B2/B1 of 6 channels",
        "75% of patches hidden",
        "patch 4 x 4",
        "spacing 1 x 2 m",
    ]


def test_the_caption_gives_the_spacings_of_all_crops(objective, batches_of):
    batch = batches_of("ct", (4, 16, 16), count=2)
    batch.spacing[1, 0] = 2.5
    assert caption(batch, 0.75, (2, 8, 8)).endswith("spacing 2.5 to 5 x 1 x 2 mm")


def test_errors_are_means_over_asked_pixels_per_channel_in_its_unit(objective, batches_of):
    batch = batches_of("landsat7", (16, 16))
    made = objective.reconstruct(batch, 0)
    expected = (made.answer - made.image)[:, 1][made.asked[:, 1]].abs().mean()
    entry = error_summary(batch, made)["B2"]
    assert entry["mean_absolute_error"] == pytest.approx(float(expected), abs=1e-4) and entry["unit"] == "DN"


def test_knowing_each_crops_mean_explains_nothing_and_knowing_all_explains_all(objective, batches_of):
    batch = batches_of("mr", (4, 16, 16))
    batch.raw[1] *= 1e5  # arbitrary units differ between scanners, and must not drown the others
    made = objective.reconstruct(batch, 0)
    for number in range(len(batch)):
        asked = made.asked[number]
        made.answer[number][asked] = made.image[number][asked].mean()
    assert error_summary(batch, made)["MR"]["r_squared"] == pytest.approx(0.0, abs=1e-4)
    made.answer.copy_(made.image)
    assert error_summary(batch, made)["MR"] == {"mean_absolute_error": 0.0, "unit": "a.u.", "r_squared": 1.0}


@pytest.mark.parametrize(("modality", "shape"), [("landsat7", (16, 16)), ("mr", (4, 16, 16))])
def test_a_panel_is_a_png_that_is_the_same_every_time(objective, batches_of, tmp_path, modality, shape):
    batch = batches_of(modality, shape, count=2)
    for name in ("a.png", "b.png"):
        draw_reconstructions(objective, batch, tmp_path / "panels" / name)
    data = (tmp_path / "panels/a.png").read_bytes()
    assert data[:4] == b"\x89PNG" and data == (tmp_path / "panels/b.png").read_bytes()


def test_a_picture_that_cannot_be_written_is_an_output_error(objective, batches_of, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match=r"'x.png' cannot be written"):
        draw_reconstructions(objective, batches_of("ct", (4, 16, 16), count=1), tmp_path / "file" / "x.png")


def test_a_flat_crop_does_not_decide_what_is_explained(objective, batches_of):
    batch = batches_of("mr", (4, 16, 16))
    batch.raw[1] = 500.0 + 1e-3 * batch.raw[1]  # water, air: a small error is a large multiple of its deviation
    made = objective.reconstruct(batch, 0)
    made.answer.copy_(made.image)
    made.answer[1][made.asked[1]] += 1.0
    assert error_summary(batch, made)["MR"]["r_squared"] > 0.99
