"""Tiny models and channels for the tests of models/."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from geomed_mae.image import Channel
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.spec import ModelSpec

SPEC = ModelSpec(
    dim=48,
    depth=2,
    heads=3,
    patch_2d=(8, 4),
    patch_3d=(2, 4, 4),
    basis=8,
    decoder_dim=32,
    decoder_depth=1,
    decoder_heads=1,
)


@pytest.fixture(autouse=True)
def _one_thread_and_seed() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def spec() -> ModelSpec:
    return SPEC


@pytest.fixture
def mae(spec: ModelSpec) -> MaskedAutoencoder:
    return MaskedAutoencoder.from_spec(spec)


@pytest.fixture
def bands() -> tuple[Channel, ...]:
    """Three optical channels."""
    return tuple(
        Channel(name=name, kind="optical", unit="reflectance", wavelength_nm=nm, bandwidth_nm=width)
        for name, nm, width in (("B04", 664.6, 31.0), ("B8A", 864.7, 21.0), ("B12", 2202.4, 175.0))
    )


@pytest.fixture
def ct() -> tuple[Channel, ...]:
    return (Channel(name="CT", kind="ct", unit="HU", tube_kv=120.0),)
