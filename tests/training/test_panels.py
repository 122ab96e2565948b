"""Pictures show what was seen, what was asked and how far off the answer was."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from geomed_mae.archives.statistics import summarise
from geomed_mae.errors import OutputError
from geomed_mae.image import Channel
from geomed_mae.modalities import load_modality
from geomed_mae.training.panels import (
    HIDDEN_GREY,
    Picture,
    _cells,
    caption,
    draw_reconstructions,
    error_summary,
    most_structure,
    pictures,
    shown_channels,
)


def names(modality):
    channels = load_modality(modality).channels
    return [channels[index].name for index in shown_channels(channels)]


def test_optical_images_are_shown_in_natural_colours():
    assert names("landsat7") == ["B3", "B2", "B1"]
    assert names("sentinel2-l2a") == ["B04", "B03", "B02"] or names("sentinel2-l2a") == ["B4", "B3", "B2"]


def test_other_images_are_shown_by_their_first_channel():
    assert len(names("ct")) == len(names("sentinel1")) == 1
    infrared = [Channel(name=str(nm), kind="optical", wavelength_nm=nm) for nm in (850.0, 1600.0, 2200.0)]
    assert shown_channels(infrared) == (0,)


def test_a_volume_gives_its_three_middle_planes_with_their_proportions(objective, batches_of):
    batch = batches_of("ct", (4, 16, 16), count=1)
    rows = pictures(batch, objective.reconstruct(batch, 0), [0])
    assert [row.label.split(" · ")[1] for row in rows] == ["row x column", "slice x column", "slice x row"]
    assert [row.image.shape for row in rows] == [(16, 16, 1), (4, 16, 1), (4, 16, 1)]
    assert [row.aspect for row in rows] == [0.5, 2.5, 5.0]  # spacing 5 x 1 x 2 mm
    assert np.array_equal(rows[0].image[..., 0], batch.raw[0, 0, 2].numpy())
    assert np.array_equal(rows[1].image[..., 0], batch.raw[0, 0, :, 8].numpy())


def test_planes_that_are_slivers_are_left_out(objective, batches_of):
    batch = batches_of("ct", (2, 16, 48), count=1)  # 10 x 16 x 96 mm
    rows = pictures(batch, objective.reconstruct(batch, 0), [0])
    assert [row.label for row in rows] == ["example 1 · row x column", "example 1 · slice x row"]


def test_crops_are_chosen_by_the_structure_of_the_image_in_its_own_units(batches_of):
    batch = batches_of("landsat7", (16, 16), count=4)
    batch.raw[1, :, 8:] += 300  # a coast
    batch.raw[3, :, :, 8:] += 200
    batch.raw[0] = (batch.raw[0] - 70) * 1e4  # noise in large units
    own = summarise(batch.raw[0].numpy(), batch.valid[0].numpy())
    batch = replace(batch, statistics=(own, *batch.statistics[1:]))
    assert most_structure(batch, (4, 4), 2) == [1, 3]


def picture() -> Picture:
    image = np.linspace(0, 100, 16).reshape(4, 4, 1)
    valid, seen, asked = np.ones((4, 4), bool), np.zeros((4, 4), bool), np.zeros((4, 4), bool)
    valid[3], seen[0], asked[1:3] = False, True, True
    return Picture("x", image, image + 7 * asked[..., None], valid, seen, asked, 1.0)


def test_hidden_is_grey_invalid_is_white_and_the_error_is_where_it_was_asked():
    (image, masked, answer), error, mean = _cells(picture())
    assert (masked[1:3] == HIDDEN_GREY).all() and np.array_equal(masked[0], image[0])
    assert all((cell[3] == 1).all() for cell in (image, masked, answer))
    assert np.isnan(error[0]).all() and np.isnan(error[3]).all() and error[1:3] == pytest.approx(7)
    assert mean == pytest.approx(7)


def test_the_caption_says_what_is_shown(objective, batches_of):
    text = caption(batches_of("landsat7", (16, 16)), 0.75, (4, 4))
    assert text.split("  ·  ") == [
        "landsat7",
        "B3/B2/B1 of 6 channels",
        "75% of patches hidden",
        "patch 4 x 4",
        "spacing 1 x 2 m",
    ]


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
