"""Blocks of an image: no seams between them, nothing hangs on their order or size, and memory has a bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from geomed_mae.archives.build import open_archive
from geomed_mae.heads.blocks import INVALID, answer, batches_of, cache_of, finished
from geomed_mae.heads.tiling import (
    READ_BYTES,
    SUMS_BYTES,
    VOLUME_SUMS_BYTES,
    Block,
    block_size,
    blocks_of,
    starts_within,
)
from geomed_mae.heads.windows import bands
from geomed_mae.outputs.block_file import put_together, strip_rows, write_block
from geomed_mae.outputs.work import valid_block
from tests.heads.given import archive, task_model
from tests.scenes import landsat_scene


@pytest.fixture(scope="module", params=[2, 3])
def model_and_index(request, tmp_path_factory):
    """A segmentation model that answers each window in its own way, and an image of several windows."""
    folder = tmp_path_factory.mktemp("blocks")
    if request.param == 2:
        landsat_scene(folder / "a.tif", None, shape=(75, 100), nodata=0)
        index, crop = open_archive([folder], ["landsat7"]), (16, 24)
    else:
        index, crop = archive(folder, 3), (4, 8, 8)
    model = task_model(index, "linear", "segment", crop=crop)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.head.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model, index


def whole(model, index, **how):
    """Return (numbers, probabilities) of an image as one block."""
    row = index.rows[0]
    block = Block((0,) * len(row.shape), row.shape)
    made = finished(answer(model, cache_of(index, row), row, block, **how))
    everything = slice(0, row.shape[0])
    return made.numbers(everything), made.chances(everything)


def test_blocks_put_together_show_no_seam_whatever_their_order_and_batch(model_and_index, tmp_path):
    model, index = model_and_index
    row, crop = index.rows[0], model.spec.crop
    numbers, chances = whole(model, index)
    assert np.unique(numbers).size >= 3 and np.ptp(chances[:, numbers != INVALID]) > 0.5, "there is something to see"
    size = block_size(row.shape, crop, classes=3, channels=len(row.channels), memory=9_000)
    blocks = blocks_of(row.shape, size)
    assert len(blocks) > 6
    order = np.random.default_rng(0).permutation(len(blocks))
    files = [tmp_path / f"{number}.block" for number in range(len(blocks))]
    for number in order:
        made = finished(answer(model, cache_of(index, row), row, blocks[number], batch=3))
        write_block(files[number], made, "print", rows=3, chances=True)
        assert valid_block(files[number], "print") and not valid_block(files[number], "another")
    strips = list(put_together(files, blocks, row.shape, 3))
    found = np.concatenate([strip for strip, _ in strips])
    theirs = np.concatenate([strip for _, strip in strips], axis=1)
    known = numbers != INVALID
    assert np.isnan(theirs[:, ~known]).all() and (found[~known] == INVALID).all()
    np.testing.assert_allclose(theirs[:, known], chances[:, known], atol=1e-5)
    clear = known & (np.sort(chances, axis=0)[-1] - np.sort(chances, axis=0)[-2] > 1e-4)
    np.testing.assert_array_equal(found[clear], numbers[clear])
    assert clear.sum() > 0.95 * known.sum()


def test_a_block_gives_the_same_bits_again_and_bands_agree_with_it(model_and_index):
    model, index = model_and_index
    numbers, chances = whole(model, index)
    again = whole(model, index)
    assert numbers.tobytes() == again[0].tobytes() and chances.tobytes() == again[1].tobytes()
    narrow = list(bands(model, index, index.rows[0], memory=1))
    assert len(narrow) > 3
    np.testing.assert_allclose(np.concatenate([band.chances for band in narrow], axis=1), chances, atol=1e-5)


def test_an_image_of_one_window_is_the_models_own_answer(tmp_path):
    landsat_scene(tmp_path / "a.tif", None, shape=(16, 24))
    index = open_archive([tmp_path], ["landsat7"])
    model = task_model(index, "unetr", "segment", crop=(16, 24))
    row, image = index.rows[0], index.read(index.rows[0].key)
    expected = model.probabilities(image.array[None].copy(), np.ones((1, *image.array.shape), bool), row)[0].numpy()
    np.testing.assert_allclose(whole(model, index)[1], expected, atol=1e-6)


def test_the_middle_of_windows_is_answered_as_by_the_window_alone(tmp_path):
    """Its neighbours, half a window away, have no say in the middle quarter of a window: theirs is the margin there."""
    landsat_scene(tmp_path / "a.tif", None, shape=(64, 64))
    index = open_archive([tmp_path], ["landsat7"])
    model = task_model(index, "linear", "segment", crop=(32, 32))
    row, image = index.rows[0], index.read(index.rows[0].key)
    raw = image.array[None, :, 16:48, 16:48].copy()
    alone = model.probabilities(raw, np.ones(raw.shape, bool), row)[0].numpy()
    blended = whole(model, index)[1]
    assert np.abs(blended[:, 16:48, 16:48] - alone).max() > 1e-3, "windows differ where they overlap"
    np.testing.assert_allclose(blended[:, 28:36, 28:36], alone[:, 12:20, 12:20], atol=1e-5)


@pytest.mark.parametrize(
    ("shape", "crop", "classes", "channels"),
    [
        ((20_000, 20_000), (128, 128), 2, 4),
        ((20_000, 20_000), (256, 256), 20, 4),
        ((20_000, 20_000), (128, 128), 20, 13),
        ((50, 200_000), (224, 224), 5, 3),
        ((900, 900), (128, 128), 2, 4),
        ((600, 512, 512), (32, 160, 160), 14, 1),
        ((10, 10), (16, 16), 2, 1),
    ],
)
def test_the_size_of_blocks_has_a_bound_and_covers_the_image_once(shape, crop, classes, channels):
    size = block_size(shape, crop, classes=classes, channels=channels)
    steps = [window // 2 for window in crop]
    assert all(part % step == 0 for part, step in zip(size, steps, strict=True))
    cut = [min(part, whole + step) for part, whole, step in zip(size, shape, steps, strict=True)]
    assert 4 * classes * math.prod(cut) <= 1.1 * (SUMS_BYTES if len(shape) == 2 else VOLUME_SUMS_BYTES)
    assert channels * crop[0] * math.prod(cut[1:]) * 10 <= 1.1 * READ_BYTES
    blocks = blocks_of(shape, size)
    assert sum(math.prod(block.shape) for block in blocks) == math.prod(shape)
    # Little is computed twice, as long as there is memory for it.
    windows = sum(math.prod(map(len, starts_within(block, shape, crop))) for block in blocks)
    everything = starts_within(Block((0,) * len(shape), shape), shape, crop)
    assert windows <= 1.8 * math.prod(map(len, everything))


def test_rows_stay_whole_where_memory_allows():
    assert block_size((20_000, 20_000), (128, 128), classes=2, channels=4)[1] >= 20_000
    assert block_size((20_000, 20_000), (256, 256), classes=20, channels=4)[1] < 20_000


def test_every_block_takes_as_many_batches_as_it_is_said_to(model_and_index):
    model, index = model_and_index
    row, crop = index.rows[0], model.spec.crop
    size = block_size(row.shape, crop, classes=3, channels=len(row.channels), memory=9_000)
    counts = batches_of(row, size, crop, 3)
    for block, count in itertools.islice(zip(blocks_of(row.shape, size), counts, strict=True), 4):
        assert sum(1 for _ in answer(model, cache_of(index, row), row, block, batch=3)) == count


def test_strips_of_many_classes_are_thin():
    assert strip_rows((20_000, 20_000), 2, chances=False) > 200
    assert 1 <= strip_rows((20_000, 20_000), 20, chances=True) < 10
