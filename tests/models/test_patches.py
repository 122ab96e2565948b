"""Patches: an exact, row-major rearrangement in any number of axes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from geomed_mae.errors import ConfigError
from geomed_mae.models.patches import clean, patch_grid, patchify, select, unpatchify

AXES = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 4)), min_size=2, max_size=3)


@given(axes=AXES, channels=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_unpatchify_is_the_inverse_of_patchify(axes, channels):
    grid, patch = [count for count, _ in axes], [size for _, size in axes]
    image = torch.randn(2, channels, *(count * size for count, size in axes))
    assert torch.equal(unpatchify(patchify(image, patch), grid, patch), image)


def test_patches_are_row_major_and_anisotropic():
    image = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    patches = patchify(image, (2, 3))
    assert torch.equal(patches[0, 1, 1], image[0, 1, 0:2, 3:6].flatten())
    assert torch.equal(patches[0, 2, 0], image[0, 0, 2:4, 0:3].flatten())


def test_patches_of_volumes_go_slab_row_column():
    volume = torch.arange(4 * 4 * 4).reshape(1, 1, 4, 4, 4)
    assert torch.equal(patchify(volume, (2, 4, 2))[0, 3, 0], volume[0, 0, 2:4, :, 2:4].flatten())


def test_a_size_that_is_no_multiple_of_the_patch_names_both():
    with pytest.raises(ConfigError, match=r"an input of 33 x 32 is no multiple of the patch 16 x 16; crop or pad"):
        patch_grid((33, 32), (16, 16))


def test_select_serves_all_samples_from_one_table():
    table, index = torch.randn(1, 5, 3), torch.tensor([[4, 0], [1, 1]])
    assert torch.equal(select(table, index), select(table.expand(2, -1, -1), index))


def test_clean_removes_nan_and_infinity():
    pixels = torch.tensor([[[float("nan"), float("inf"), 2.0]]])
    assert torch.equal(clean(pixels, torch.tensor([[[False, False, True]]])), torch.tensor([[[0.0, 0.0, 2.0]]]))
