"""Surface distances against MONAI's own metrics, SimpleITK, and distances counted by hand."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai.metrics import compute_average_surface_distance, compute_hausdorff_distance

from geomed_mae.scoring import surfaces
from geomed_mae.scoring.surfaces import surface_distance
from tests.scoring.rows import blocks

SPACING = (3.0, 0.9, 0.7)


@pytest.fixture(scope="module")
def masks():
    return blocks((14, 30, 26), seed=1), blocks((14, 30, 26), seed=2)


@pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning")  # MONAI about itself
def test_agrees_with_monai_on_an_anisotropic_volume(masks):
    found, truth = masks
    both = [torch.from_numpy(mask)[None, None] for mask in masks]
    expected = compute_hausdorff_distance(*both, include_background=True, percentile=95, spacing=SPACING).item()
    mean = compute_average_surface_distance(*both, include_background=True, symmetric=True, spacing=SPACING).item()
    got = surface_distance(found, truth, None, SPACING)
    assert got.hd95 == pytest.approx(expected, rel=1e-5)
    assert got.assd == pytest.approx(mean, rel=1e-5)


def test_agrees_with_simpleitk_on_the_largest_distance(masks, monkeypatch):
    """SimpleITK measures between all pixels of the masks, whose farthest point is on a surface: 100 % are the same."""
    found, truth = masks
    monkeypatch.setattr(surfaces, "PERCENTILE", 100.0)
    images = []
    for mask in masks:
        image = sitk.GetImageFromArray(mask.astype(np.uint8))
        image.SetSpacing(SPACING[::-1])
        images.append(image)
    oracle = sitk.HausdorffDistanceImageFilter()
    oracle.Execute(*images)
    assert surface_distance(found, truth, None, SPACING).hd95 == pytest.approx(oracle.GetHausdorffDistance(), rel=1e-5)


def test_a_square_that_was_moved_is_as_far_off_as_it_was_moved():
    truth = np.zeros((40, 60), bool)
    truth[10:20, 10:20] = True
    got = surface_distance(np.roll(truth, 30, axis=1), truth, None, (30.0, 10.0))
    # Moved by 30 columns of 10 m: the near edges are 21 columns apart, the far ones 30 from the nearest edge.
    assert got.hd95 == pytest.approx(300.0)
    assert 210.0 < got.assd < 300.0
    assert surface_distance(truth, truth, None, (30.0, 10.0)) == surfaces.SurfaceDistance(0.0, 0.0)


def test_a_missing_surface_has_no_distance():
    mask = np.ones((4, 4), bool)
    for pair in ((mask, ~mask), (~mask, mask), (~mask, ~mask)):
        assert surface_distance(*pair, None, (1.0, 1.0)) is None


def test_what_touches_the_unknown_is_no_surface():
    truth = np.zeros((20, 20), bool)
    truth[5:15, 5:15] = True
    unknown = np.zeros_like(truth)
    unknown[:, 10:] = True
    found = truth.copy()
    found[4, 5:10] = True
    # What lies in the unknown half is neither true nor false; the cut through the square is no border of it.
    got = surface_distance(found & ~unknown, truth & ~unknown, unknown, (1.0, 1.0))
    assert got.hd95 == 1.0
    inside = surface_distance(truth & ~unknown, truth & ~unknown, unknown, (1.0, 1.0))
    assert (inside.hd95, inside.assd) == (0.0, 0.0)
    far = truth & ~unknown
    far[:, 8:] = False
    # Without the rule the cut at column 9 would be a surface of the truth that `far` misses by two columns.
    assert (
        surface_distance(far, truth & ~unknown, unknown, (1.0, 1.0)).assd
        < surface_distance(far, truth & ~unknown, None, (1.0, 1.0)).assd
    )
    assert surface_distance(unknown & truth, truth, unknown | truth, (1.0, 1.0)) is None
