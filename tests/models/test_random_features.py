"""Random convolutional features, beside what a page of numpy and scipy computes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.ndimage import correlate

from geomed_mae.models import random_features
from geomed_mae.models.random_features import BIAS, KERNEL, RandomFeatures

RNG = np.random.default_rng(4)


def by_hand(weights: np.ndarray, pixels: np.ndarray) -> np.ndarray:
    """Both signs of each filter's answer, rectified, at every pixel; zeros beyond the border."""
    answers = []
    for bank in weights:
        answers.append(sum(correlate(one, kernel, mode="constant") for one, kernel in zip(pixels, bank, strict=True)))
    found = np.stack(answers)
    return np.concatenate([np.maximum(found + BIAS, 0), np.maximum(-found + BIAS, 0)])


@pytest.mark.parametrize("space", [(13, 10), (6, 9, 7)])
def test_features_are_means_of_rectified_answers_over_valid_pixels(space, monkeypatch):
    monkeypatch.setattr(random_features, "MAX_VALUES", 2000)  # several strips
    bank = RandomFeatures.gaussian(2, len(space), filters=5, seed=1)
    valid = RNG.random(space) > 0.2
    pixels = (3 * RNG.normal(size=(2, *space)) * valid).astype(np.float32)
    patch = (4, 3, 2)[: len(space)]
    found = bank.grid(torch.from_numpy(pixels), torch.from_numpy(valid), patch)
    expected = by_hand(bank.weights.numpy().astype(np.float64), pixels.astype(np.float64))
    assert found.shape == (10, *(-(-size // step) for size, step in zip(space, patch, strict=True)))
    for place in np.ndindex(found.shape[1:]):
        window = tuple(slice(at * step, (at + 1) * step) for at, step in zip(place, patch, strict=True))
        inside = valid[window]
        if not inside.any():
            assert np.isnan(found[(slice(None), *place)]).all()
            continue
        mean = expected[(slice(None), *window)][:, inside].mean(axis=1)
        np.testing.assert_allclose(found[(slice(None), *place)], mean, rtol=1e-4, atol=1e-5)
    whole = bank.vector(torch.from_numpy(pixels), torch.from_numpy(valid))
    np.testing.assert_allclose(whole, expected[:, valid].mean(axis=1), rtol=1e-4, atol=1e-5)


def test_filters_of_data_answer_whitened_cut_outs():
    mixed = RNG.normal(size=(500, 9)) @ RNG.normal(size=(9, 9))
    bank = RandomFeatures.of_data(torch.from_numpy(mixed.reshape(500, 1, 3, 3)).float(), filters=7)
    assert bank.width == 14 and bank.weights.shape == (7, 1, KERNEL, KERNEL)
    centred = mixed - mixed.mean(axis=0)
    values, vectors = np.linalg.eigh(np.cov(centred.T))
    white = centred @ vectors @ np.diag((values + random_features.WHITENING) ** -0.5) @ vectors.T
    unit = white[:7] / np.linalg.norm(white[:7], axis=1, keepdims=True)
    np.testing.assert_allclose(centred @ bank.weights.numpy().reshape(7, 9).T, white @ unit.T, rtol=1e-3, atol=1e-3)


def test_few_cut_outs_are_used_again():
    bank = RandomFeatures.of_data(torch.randn(3, 1, 3, 3, generator=torch.Generator().manual_seed(0)), filters=8)
    torch.testing.assert_close(bank.weights[0], bank.weights[3])


def test_gaussian_filters_are_the_same_for_a_seed_and_have_unit_variance():
    bank = RandomFeatures.gaussian(6, 2, filters=400, seed=3)
    assert torch.equal(bank.weights, RandomFeatures.gaussian(6, 2, filters=400, seed=3).weights)
    assert bank.weights.var().item() == pytest.approx(1 / 54, rel=0.05)


def test_an_image_without_valid_pixels_has_no_features():
    bank = RandomFeatures.gaussian(1, 2, filters=2)
    assert np.isnan(bank.vector(torch.zeros(1, 8, 8), torch.zeros(8, 8, dtype=torch.bool))).all()
