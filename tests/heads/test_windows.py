"""Whole images from windows: a model that answers by pixel must come through untouched."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.index import Index
from geomed_mae.errors import ReadError
from geomed_mae.heads.windows import (
    INVALID,
    bands,
    blending_weight,
    class_map,
    image_chances,
    tile_starts,
    whole_class_map,
    window_starts,
)
from tests.make_data import write_geotiff
from tests.scenes import mr_volume


class ByThreshold:
    """Stands for a TaskModel: class 1 where the first channel exceeds `limit`; remembers the windows it was given."""

    classes = ("low", "high")
    device = torch.device("cpu")

    def __init__(self, crop: tuple[int, ...], names: tuple[str, ...], limit: float) -> None:
        self.spec, self.names, self.limit = SimpleNamespace(crop=crop), names, limit
        self.shapes: list[tuple[int, ...]] = []

    def check(self, row):
        return self.names

    def probabilities(self, raw, valid, row):
        self.shapes.append(raw.shape)
        high = torch.from_numpy(raw[:, 0] > self.limit).float()
        return torch.stack([1 - high, high], dim=1)


class ByShare(ByThreshold):
    """Stands for a TaskModel that classifies: the chance of class 1 is the share of bright pixels among valid ones."""

    def probabilities(self, raw, valid, row):
        self.shapes.append(raw.shape)
        share = torch.tensor([((r > self.limit) & ok).sum() / ok.sum() for r, ok in zip(raw, valid, strict=True)])
        return torch.stack([1 - share, share], dim=1)


def scene(tmp_path, shape: tuple[int, int], nodata: int | None = None) -> tuple[Index, np.ndarray]:
    values = np.random.default_rng(0).integers(1, 255, size=shape).astype(np.uint8)
    if nodata is not None:
        values[: shape[0] // 3, : shape[1] // 2] = nodata
    write_geotiff(tmp_path / "scene.tif", values, nodata=nodata)
    return open_archive([tmp_path / "scene.tif"], ["unnamed-raster"]), values


@pytest.mark.parametrize("shape", [(70, 90), (16, 16), (10, 100), (100, 7), (33, 17)])
@pytest.mark.parametrize("crop", [(16, 16), (16, 24)])
def test_every_pixel_of_a_raster_is_answered_once(tmp_path, shape, crop):
    index, values = scene(tmp_path, shape)
    row = index.rows[0]
    found = whole_class_map(ByThreshold(crop, (row.channels[0].name,), 128), index, row)
    np.testing.assert_array_equal(found, values > 128)


def test_every_voxel_of_a_volume_is_answered_once(tmp_path):
    bright = mr_volume(tmp_path / "v.nii.gz", None, shape=(20, 25, 13))
    index = open_archive([tmp_path], ["mr"])
    row = index.rows[0]
    image = index.read(row.key)
    found = whole_class_map(ByThreshold((8, 8, 8), (row.channels[0].name,), 600), index, row)
    np.testing.assert_array_equal(found, image.array[0] > 600)
    assert (found == bright.transpose(2, 1, 0)).mean() > 0.99


def test_invalid_pixels_are_answered_with_invalid(tmp_path):
    index, values = scene(tmp_path, (40, 40), nodata=0)
    row = index.rows[0]
    found = whole_class_map(ByThreshold((16, 16), (row.channels[0].name,), 128), index, row)
    np.testing.assert_array_equal(found == INVALID, values == 0)


def test_bands_come_in_order_and_memory_does_not_grow_with_the_height(tmp_path):
    index, _ = scene(tmp_path, (200, 30))
    row = index.rows[0]
    bands = list(class_map(ByThreshold((16, 16), (row.channels[0].name,), 128), index, row))
    assert sum(len(band) for band in bands) == 200
    assert max(len(band) for band in bands) <= 16


def test_overlapping_windows_are_averaged_with_more_weight_in_the_middle(tmp_path):
    index, _ = scene(tmp_path, (24, 16))
    row = index.rows[0]

    class ByWindow(ByThreshold):
        """Says class 1 in the first window and class 0 in the second."""

        def probabilities(self, raw, valid, row):
            self.shapes.append(raw.shape)
            first = torch.full((len(raw), *raw.shape[2:]), float(len(self.shapes) == 1))
            return torch.stack([1 - first, first], dim=1)

    found = whole_class_map(ByWindow((16, 16), (row.channels[0].name,), 0), index, row)
    assert window_starts(24, 16) == [0, 8]
    assert (found[:12] == 1).all() and (found[12:] == 0).all(), "the border lies half-way between the windows' middles"


@pytest.mark.parametrize(("size", "window"), [(1, 8), (8, 8), (9, 8), (16, 8), (100, 8), (13, 5)])
def test_windows_cover_an_axis_and_end_flush(size, window):
    starts = window_starts(size, window)
    covered = {pixel for start in starts for pixel in range(start, start + window)}
    assert covered >= set(range(size))
    assert size <= window or starts[-1] + window == size
    assert all(after - before <= max(window // 2, 1) for before, after in itertools.pairwise(starts))


def test_weight_is_symmetric_positive_and_highest_in_the_middle():
    weight = blending_weight((8, 12))
    np.testing.assert_allclose(weight, weight[::-1, ::-1], rtol=1e-6)
    assert weight.min() > 0 and weight.max() == 1 and weight[4, 6] == weight.max()


def test_weight_falls_to_the_margin_without_a_step():
    line = blending_weight((64,))
    assert (line[:8] == line[0]).all() and line[0] == line[-1] < 1e-5
    assert np.abs(np.diff(line)).max() < 0.1 and line[8] - line[7] < 0.01


@pytest.mark.parametrize("shape", [(70, 90), (10, 100)])
def test_bands_put_together_are_the_class_map_with_its_probabilities(tmp_path, shape):
    index, values = scene(tmp_path, shape, nodata=0)
    row = index.rows[0]

    class Smooth(ByThreshold):
        """The chance of class 1 grows with the pixel's value, so that every pixel has one of its own."""

        def probabilities(self, raw, valid, row):
            high = torch.from_numpy(raw[:, 0] / 255)
            return torch.stack([1 - high, high], dim=1)

    made = list(bands(Smooth((16, 24), (row.channels[0].name,), 0), index, row))
    numbers = np.concatenate([band.numbers for band in made])
    chances = np.concatenate([band.chances for band in made], axis=1)
    assert numbers.dtype == np.uint8 and chances.dtype == np.float32 and chances.shape == (2, *shape)
    assert [band.first for band in made] == [0, *np.cumsum([len(band.numbers) for band in made])[:-1]]
    np.testing.assert_array_equal(numbers, whole_class_map(Smooth((16, 24), (row.channels[0].name,), 0), index, row))
    known = numbers != INVALID
    np.testing.assert_array_equal(known, values != 0)
    np.testing.assert_allclose(chances[1][known], values[known] / 255, rtol=1e-5)
    np.testing.assert_allclose(chances.sum(axis=0)[known], 1, rtol=1e-6)
    assert not chances[:, ~known].any(), "where nothing is valid there is no probability"


def test_windows_without_a_valid_pixel_are_not_computed(tmp_path):
    values = np.random.default_rng(0).integers(1, 255, size=(64, 64)).astype(np.uint8)
    values[16:] = 0
    write_geotiff(tmp_path / "scene.tif", values, nodata=0)
    index = open_archive([tmp_path / "scene.tif"], ["unnamed-raster"])
    row = index.rows[0]
    model = ByThreshold((16, 16), (row.channels[0].name,), 128)
    found = whole_class_map(model, index, row)
    assert sum(shape[0] for shape in model.shapes) == 2 * 7, "of seven rows of windows two see the upper quarter"
    np.testing.assert_array_equal(found, np.where(values == 0, INVALID, values > 128))


@pytest.mark.parametrize("shape", [(10, 12), (16, 16)])
def test_an_image_not_larger_than_the_crop_is_classified_in_one_window(tmp_path, shape):
    index, values = scene(tmp_path, shape)
    row = index.rows[0]
    model = ByShare((16, 16), (row.channels[0].name,), 128)
    found = image_chances(model, index, row)
    assert found.dtype == np.float32 and found[1] == pytest.approx((values > 128).mean())
    assert model.shapes == [(1, 1, 16, 16)]


def test_a_larger_image_is_classified_by_the_mean_over_windows_that_cover_it(tmp_path):
    index, values = scene(tmp_path, (40, 30))
    row = index.rows[0]
    model = ByShare((16, 16), (row.channels[0].name,), 128)
    found = image_chances(model, index, row, batch=4)
    starts = [(y, x) for y in (0, 12, 24) for x in (0, 14)]
    expected = np.mean([(values[y : y + 16, x : x + 16] > 128).mean() for y, x in starts])
    assert found == pytest.approx([1 - expected, expected], rel=1e-6)
    assert [shape[0] for shape in model.shapes] == [4, 2]


def test_volumes_are_classified_too(tmp_path):
    mr_volume(tmp_path / "v.nii.gz", None, shape=(20, 25, 13))
    index = open_archive([tmp_path], ["mr"])
    row = index.rows[0]
    found = image_chances(ByShare((16, 32, 32), (row.channels[0].name,), 600), index, row)
    assert found[1] == pytest.approx((index.read(row.key).array[0] > 600).mean(), rel=1e-5)


def test_windows_without_a_valid_pixel_have_no_say_in_the_class(tmp_path):
    values = np.random.default_rng(0).integers(1, 255, size=(32, 32)).astype(np.uint8)
    values[16:] = 0
    write_geotiff(tmp_path / "scene.tif", values, nodata=0)
    index = open_archive([tmp_path / "scene.tif"], ["unnamed-raster"])
    row = index.rows[0]
    found = image_chances(ByShare((16, 16), (row.channels[0].name,), 128), index, row)
    assert found[1] == pytest.approx((values[:16] > 128).mean(), rel=1e-6)


@pytest.mark.parametrize(("size", "window"), [(1, 8), (8, 8), (9, 8), (16, 8), (17, 8), (100, 7), (13, 5)])
def test_tiles_are_the_fewest_windows_that_cover_an_axis(size, window):
    starts = tile_starts(size, window)
    assert len(starts) == -(-size // window) and starts[0] == 0
    assert size <= window or starts[-1] + window == size
    gaps = [after - before for before, after in itertools.pairwise(starts)]
    assert all(gap <= window for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)


def test_an_image_without_any_valid_pixel_is_not_classified(tmp_path, monkeypatch):
    index, _ = scene(tmp_path, (16, 16))
    row = index.rows[0]
    nothing = (np.zeros((1, 16, 16), np.float32), np.zeros((1, 16, 16), bool))
    monkeypatch.setattr("geomed_mae.heads.windows.cut", lambda *_: nothing)
    with pytest.raises(ReadError, match="no pixel of the channels that the model takes is valid") as error:
        image_chances(ByShare((16, 16), (row.channels[0].name,), 128), index, row)
    assert error.value.reason == "ALL_INVALID", "predict tells it under `failed`, and goes on"
