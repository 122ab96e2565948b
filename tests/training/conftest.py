"""A tiny model and a batch for what lies between samples and models."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from geomed_mae.archives.statistics import summarise
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking
from geomed_mae.models.spec import ModelSpec
from geomed_mae.samples.batch import Batch
from geomed_mae.training.objective import MaskedObjective
from tests.training.sessions import Sessions
from tests.training.tiny_run import make_place, record_of, words

SPEC = ModelSpec(
    dim=16,
    depth=1,
    heads=2,
    patch_2d=(4, 4),
    patch_3d=(2, 4, 4),
    basis=4,
    decoder_dim=16,
    decoder_depth=1,
    decoder_heads=2,
)


def make_batch(modality: str, shape: tuple[int, ...], *, count: int = 3, step: int = 0) -> Batch:
    """Random images of a modality with a corner that is not valid; statistics are the image's own."""
    rng = np.random.default_rng(step)
    channels = load_modality(modality).channels
    raw = (rng.random((count, len(channels), *shape)) * 100 + 20).astype(np.float32)
    valid = np.ones(raw.shape, dtype=bool)
    valid[..., :4, :4] = False
    raw[~valid] = 0
    return Batch(
        raw=torch.from_numpy(raw),
        valid=torch.from_numpy(valid),
        channels=channels,
        modality=modality,
        spacing=torch.tensor([[5.0, 1.0, 2.0][-len(shape) :]] * count),
        keys=tuple(f"k{number}" for number in range(count)),
        statistics=tuple(summarise(image, mask) for image, mask in zip(raw, valid, strict=True)),
        step=step,
    )


@pytest.fixture(scope="session")
def sessions():
    """Sessions of `geomed-mae` that can be killed, see there."""
    with Sessions() as running:
        yield running


@pytest.fixture(scope="session")
def place(tmp_path_factory, sessions):
    """Recipe and index of a tiny run."""
    return make_place(tmp_path_factory.mktemp("place"), sessions)


@pytest.fixture(scope="session")
def whole(place, sessions):
    """The tiny run that nobody interrupted."""
    done = sessions.run(*words(place, place / "whole"), record=record_of(place / "whole"))
    assert done.code == 0, done.said
    return place / "whole"


@pytest.fixture
def batches_of():
    return make_batch


@pytest.fixture
def objective() -> MaskedObjective:
    torch.manual_seed(0)
    entries = []
    for name, shape in (("landsat7", (16, 16)), ("mr", (4, 16, 16)), ("ct", (4, 16, 16))):
        batch = make_batch(name, shape)
        entries += contract_entries(load_modality(name), batch.channels, batch.statistics)
    mae = MaskedAutoencoder.from_spec(SPEC)
    return MaskedObjective(mae, Contract(channels=tuple(entries)), masking=Masking(), seed=0)
