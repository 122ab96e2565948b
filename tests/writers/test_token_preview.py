"""Pictures of token grids: true proportions, the radiological convention, white where there is nothing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image as Pillow

from geomed_mae.image import PlaneGeometry, RasterGeometry, VolumeGeometry
from geomed_mae.writers import token_preview
from geomed_mae.writers.token_preview import NOTHING, Colours
from geomed_mae.writers.token_spool import TokenSpool


def drawn(path, colours, geometry):
    return np.asarray(Pillow.open(token_preview.write(path / "p.png", colours, geometry)).convert("RGB"))


def test_a_raster_is_drawn_as_it_lies_and_white_where_there_is_no_token(tmp_path):
    colours = np.full((3, 4, 6), 100, dtype=np.uint8)
    colours[:, 0, 0] = NOTHING
    colours[0, 3, 5] = 255
    picture = drawn(tmp_path, colours, RasterGeometry(None, (1.0, 0, 0, 0, -1.0, 0), (10.0, 20.0)))
    # 4 x 10 m high, 6 x 20 m wide, sixteen pixels to the token of the longer side.
    assert picture.shape == (32, 96, 3)
    assert picture[0, 0].tolist() == [255, 255, 255] and picture[-1, -1].tolist() == [255, 100, 100]
    assert picture[16, 48].tolist() == [100, 100, 100]


def test_a_plane_without_a_spacing_has_square_tokens(tmp_path):
    assert drawn(tmp_path, np.full((3, 5, 10), 9, dtype=np.uint8), PlaneGeometry()).shape == (80, 160, 3)


@pytest.mark.parametrize("turned", [False, True])
def test_a_volume_is_shown_in_three_planes_in_the_radiological_convention(tmp_path, turned):
    """Array axes (slice, row, column) run to superior, posterior, left; `turned` flips slices and columns."""
    colours = np.full((3, 4, 6, 8), 128, dtype=np.uint8)
    colours[0, :, :, -1] = 255  # red: the patient's left
    colours[1, :, 0, :] = 255  # green: anterior
    colours[2, -1, :, :] = 255  # blue: superior
    affine = np.diag([2.0, 1.0, 1.0, 1.0])[:, [2, 1, 0, 3]].astype(float)
    affine[:3, :3] = [[0, 0, 1.0], [0, 1.0, 0], [2.0, 0, 0]]
    if turned:
        affine[:3, 3] = affine[:3, :3] @ [3, 0, 7]
        affine[:3, [0, 2]] *= -1
        colours = colours[:, ::-1, :, ::-1]
    picture = drawn(tmp_path, np.ascontiguousarray(colours), VolumeGeometry(affine))
    gap = token_preview.GAP
    scale = 16
    axial = picture[: 6 * scale, : 8 * scale]
    coronal = picture[: 8 * scale, 8 * scale + gap : 16 * scale + gap]
    sagittal = picture[: 8 * scale, 16 * scale + 2 * gap :]
    assert picture.shape == (8 * scale, 22 * scale + 2 * gap, 3)
    middle = slice(2 * scale, -2 * scale)
    assert (axial[middle, -1, 0] == 255).all() and (axial[middle, 0, 0] == 128).all(), "the left is on the right"
    assert (axial[0, middle, 1] == 255).all() and (axial[-1, middle, 1] == 128).all(), "anterior is at the top"
    assert (coronal[0, middle, 2] == 255).all() and (coronal[-1, middle, 2] == 128).all(), "superior is at the top"
    assert (coronal[middle, -1, 0] == 255).all()
    assert (sagittal[0, middle, 2] == 255).all() and (sagittal[middle, 0, 1] == 255).all(), "anterior is on the left"


def test_a_spool_gives_back_what_was_put_in_whatever_the_order(tmp_path, monkeypatch):
    monkeypatch.setattr("geomed_mae.writers.token_spool.BAND_BYTES", 4 * 5 * 9 * 2)
    rng = np.random.default_rng(0)
    whole = rng.normal(size=(5, 7, 9)).astype(np.float32)
    whole[:, 3:, 6:] = np.nan
    with TokenSpool(tmp_path, 5, (7, 9)) as spool:
        for row, column in ((4, 0), (0, 4), (0, 0), (4, 4), (0, 8), (4, 8)):
            block = np.full((5, 4, 4), 7.0, dtype=np.float32)  # what reaches beyond the grid is dropped
            part = whole[:, row : row + 4, column : column + 4]
            block[:, : part.shape[1], : part.shape[2]] = part
            spool.put((row, column), block)
        np.testing.assert_array_equal(spool.array(), whole)
        assert max(band.shape[1] for _, band in spool.bands()) == 2
        known = whole[:, np.isfinite(whole[0])]
        np.testing.assert_array_equal((spool.low, spool.high), (known.min(axis=1), known.max(axis=1)))
        assert spool.count == known.shape[1]
        sample = np.concatenate(list(spool.sample(10)))
        assert 7 <= len(sample) <= 10 and {tuple(one) for one in sample} <= {tuple(one) for one in known.T}
        assert len(np.concatenate(list(spool.sample(1000)))) == spool.count
    assert not list(tmp_path.iterdir())


def test_tokens_that_are_all_alike_or_few_can_be_drawn(tmp_path):
    with TokenSpool(tmp_path, 4, (2, 2)) as spool:
        spool.put((0, 0), np.ones((4, 2, 1), dtype=np.float32))
        found = Colours([spool]).picture(spool)
    assert (found[:, :, 0] != NOTHING).all() and (found[:, :, 1] == NOTHING).all()
