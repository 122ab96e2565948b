"""Streams: every pixel is read once, in blocks of bounded size, whatever the image, its tiles and the window."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from geomed_mae.image import Channel, Image, PlaneGeometry, VolumeGeometry
from geomed_mae.models import streaming
from geomed_mae.models.contract import ChannelContract, Contract
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.streaming import Scene, TileMeans, tile_box
from geomed_mae.models.vit import Encoder


@pytest.fixture(scope="module")
def encoder():
    spec = ModelSpec(
        dim=16, depth=1, heads=2, patch_2d=(4, 4), patch_3d=(2, 4, 4), decoder_dim=8, decoder_depth=1, decoder_heads=1
    )
    torch.manual_seed(0)
    entries = tuple(
        ChannelContract(modality=m, channel=Channel(name="A"), method=how, center=0.0, scale=1.0, noise_floor=0.1)
        for m, how in (("plane", "fixed"), ("volume", "image"))
    )
    return PretrainedEncoder(Encoder(spec), Contract(channels=entries, crop_2d=(16, 16), crop_3d=(4, 8, 8)))


def image_of(shape, seed=0):
    rng = np.random.default_rng(seed)
    array = rng.normal(size=(1, *shape)).astype(np.float32)
    valid = rng.random((1, *shape)) > 0.02
    flat = len(shape) == 2
    geometry = PlaneGeometry() if flat else VolumeGeometry(np.eye(4))
    return Image(array, valid, (Channel(name="A"),), geometry, "plane" if flat else "volume")


def recorded(image, read_windows):
    scene = Scene.of_image(image)

    def read(window):
        read_windows.append(window)
        return scene.read(window)

    return replace(scene, read=read)


@pytest.mark.parametrize("values", [1, 700, 1 << 20])
@pytest.mark.parametrize(("shape", "tile"), [((50, 70), None), ((50, 70), 8), ((50, 70), 24), ((9, 20, 30), None)])
def test_each_pixel_is_read_once_and_in_blocks_within_the_limit(encoder, monkeypatch, shape, tile, values):
    monkeypatch.setattr(streaming, "VALUES_PER_READ", values)
    image, windows = image_of(shape), []
    counts = np.zeros(shape, dtype=int)
    stream = encoder.stream(recorded(image, windows), tile=tile)
    found = list(stream)
    for window in windows:
        counts[window] += 1
    assert (counts == 1).all()
    crop = math.prod((16, 16) if len(shape) == 2 else (4, 8, 8))
    assert max(math.prod(part.stop - part.start for part in window) for window in windows) <= max(values, crop)
    assert len(found) == len(stream) and sum(window.valid for window in found) == np.count_nonzero(image.valid)
    assert [window.corner[0] for window in found] == sorted(window.corner[0] for window in found) or values > 1


@pytest.mark.parametrize("tile", [8, 16, 24, 40])
def test_a_tile_gives_what_it_gives_as_an_image_of_its_own_however_it_is_read(encoder, monkeypatch, tile):
    monkeypatch.setattr(streaming, "VALUES_PER_READ", 900)
    image = image_of((50, 70))
    means, found = TileMeans(16), {}
    for window in encoder.stream(Scene.of_image(image), tile=tile):
        if (complete := means.add(window)) is not None:
            found[window.tile] = complete
    assert len(found) == -(-50 // tile) * -(-70 // tile)
    for number, (vector, valid) in found.items():
        part = image.crop(tile_box(number, tile, (50, 70)))
        assert valid == np.count_nonzero(part.valid)
        np.testing.assert_allclose(vector, encoder.embed(part), rtol=1e-5, atol=1e-5)


def test_how_an_image_is_read_changes_nothing(encoder, monkeypatch):
    for shape in ((50, 70), (9, 20, 30)):
        image = image_of(shape)
        whole = encoder.features(image).array
        monkeypatch.setattr(streaming, "VALUES_PER_READ", 1)
        monkeypatch.setattr(streaming, "TOKENS_PER_PASS", 1)
        np.testing.assert_allclose(encoder.features(image).array, whole, rtol=1e-5, atol=1e-5)
        monkeypatch.undo()


def test_windows_without_a_valid_pixel_are_not_computed(encoder, monkeypatch):
    image = image_of((32, 32))
    valid = image.valid.copy()
    valid[:, :16, :16] = False
    calls = []
    original = encoder.module.forward
    monkeypatch.setattr(
        encoder.module, "forward", lambda pixels, *a, **b: calls.append(len(pixels)) or original(pixels, *a, **b)
    )
    found = list(encoder.stream(Scene.of_image(replace(image, valid=valid))))
    assert sum(calls) == 3 and [window.tokens is None for window in found] == [True, False, False, False]


def test_the_digest_knows_weights_and_contract(encoder):
    same = PretrainedEncoder(encoder.module, encoder.contract)
    assert same.digest == encoder.digest and len(encoder.digest) == 64
    assert PretrainedEncoder(encoder.module, replace(encoder.contract, crop_2d=(8, 8))).digest != encoder.digest
    other = Encoder(encoder.spec)
    other.load_state_dict(encoder.module.state_dict())
    assert PretrainedEncoder(other, encoder.contract).digest == encoder.digest
    with torch.no_grad():
        other.norm.bias[0] += 1e-6
    assert PretrainedEncoder(other, encoder.contract).digest != encoder.digest
