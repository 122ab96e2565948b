"""load_encoder on all that this package leaves behind, and an encoder that takes paths of raw images."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

import geomed_mae as gm
from geomed_mae.archives.seen import TRAINING, Seen
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError, IntegrityError, ReadError, TooManyBadInputsError
from geomed_mae.export import export
from geomed_mae.heads.task_model import load_task_model, save_task_model
from geomed_mae.models.contract import Contract
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.plugins import load_plugin, plugin_names
from geomed_mae.training.downstream import identity_of, open_origin
from tests.heads.given import archive, task_model
from tests.make_dicom import write_series
from tests.scenes import landsat_scene, random_encoder


def finetuned(folder: Path, axes: int) -> Path:
    """Write `run`, as finetune leaves it, into a folder that has an image for it; the weights are random."""
    index = archive(folder, axes)
    model = task_model(index, "linear", "segment", crop=(16, 16) if axes == 2 else (4, 8, 8))
    save_task_model(folder / "run", model, Seen.of(index, index.rows, what=TRAINING))
    return folder


@pytest.fixture(scope="module")
def water(tmp_path_factory) -> Path:
    return finetuned(tmp_path_factory.mktemp("water"), 2)


@pytest.fixture(scope="module")
def landsat(tmp_path_factory) -> Path:
    """A folder with `a.tif` and `encoder`, which has random weights."""
    folder = tmp_path_factory.mktemp("landsat")
    landsat_scene(folder / "a.tif", None, shape=(64, 96))
    random_encoder(folder / "encoder", "landsat7", folder / "a.tif")
    return folder


@pytest.fixture(scope="module")
def ct(tmp_path_factory) -> Path:
    """A folder with a tilted series of 6 slices of 20 x 24, `series`, and an `encoder` for it."""
    folder = tmp_path_factory.mktemp("ct")
    volume = np.random.default_rng(0).integers(800, 1400, (6, 20, 24)).astype(np.uint16)
    write_series(folder / "series", volume, step=(0.0, 0.5, 2.0))
    random_encoder(folder / "encoder", "ct", folder / "series")
    return folder


@pytest.mark.parametrize("part", ["run", "run/model"])
def test_the_encoder_of_a_finetuned_run_is_the_finetuned_one(water, part):
    encoder = gm.load_encoder(water / part)
    model, seen = load_task_model(water / "run")
    own = model.encoder.state_dict()
    assert all((tensor == own[name]).all() for name, tensor in encoder.module.state_dict().items())
    assert encoder.contract == model.contract
    # What it has learned labels of goes along, so that no later score over these images is given.
    assert encoder.seen.public() == seen.public()


def test_a_volume_run_opens_too(tmp_path):
    folder = finetuned(tmp_path, 3)
    encoder = gm.load_encoder(folder / "run")
    assert encoder.features(folder / "a.nii.gz").shape == (encoder.spec.dim, 8, 6, 5)


def test_a_finetuned_run_can_be_fine_tuned_again_and_is_known_by_its_weights(water, landsat):
    origin = open_origin(Recipe(), str(water / "run"), None)
    assert not origin.random and origin.seen.public() == load_task_model(water / "run")[1].public()
    assert identity_of(str(water / "run")) == identity_of(str(water / "run" / "model"))
    assert identity_of(str(water / "run")) != identity_of(str(landsat / "encoder"))


def test_a_damaged_model_is_refused_with_its_file(water, tmp_path):
    for name in ("config.json", "contract.json", "trained_on.json", "MANIFEST.sha256"):
        (tmp_path / name).write_bytes((water / "run" / "model" / name).read_bytes())
    weights = bytearray((water / "run" / "model" / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(IntegrityError, match=r"model\.safetensors is not what was written"):
        gm.load_encoder(tmp_path)


def test_a_study_an_unfinished_run_and_a_file_say_what_to_give(water, tmp_path):
    for seed in range(8):
        (tmp_path / "study" / "pretrained" / f"seed-{seed}" / "model").mkdir(parents=True)
    (tmp_path / "study" / "study.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"is a study of several runs; give one of them: .*seed-0, .*seed-5, \.\.\.$"):
        gm.load_encoder(tmp_path / "study")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "recipe.resolved.yaml").write_text("{}")
    with pytest.raises(ConfigError, match="has left no encoder yet; finish it with --resume"):
        gm.load_encoder(tmp_path / "run")
    with pytest.raises(ConfigError, match="is a file; give the folder that it lies in"):
        gm.load_encoder(water / "run" / "model" / "config.json")


def test_a_path_gives_the_vector_and_the_grid_of_its_image(landsat, ct):
    for folder, path, modality in ((landsat, landsat / "a.tif", "landsat7"), (ct, ct / "series", "ct")):
        encoder = gm.load_encoder(folder / "encoder")
        image = gm.read_images(path, modality=modality)[0]
        for given in (path, str(path)):
            assert np.array_equal(encoder.embed(given), encoder.embed(image))
        grid, same = encoder.features(path), encoder.features(image)
        assert np.array_equal(grid.array, same.array, equal_nan=True)
        assert repr(grid.geometry) == repr(same.geometry)


def test_of_several_images_none_is_chosen_and_none_is_read(landsat, tmp_path, monkeypatch):
    for seed in range(3):
        landsat_scene(tmp_path / f"{seed}.tif", None, shape=(64, 64 if seed else 80), seed=seed)
    encoder = gm.load_encoder(landsat / "encoder")
    monkeypatch.setattr("geomed_mae.readers.reading.read_guarded", lambda *_: pytest.fail("a pixel was read"))
    with pytest.raises(ConfigError, match=r"holds 3 images \(2 of landsat7 64x64, 1 of landsat7 64x80\), and one is"):
        encoder.embed(tmp_path)


def test_a_path_that_holds_nothing_says_why(landsat, tmp_path):
    encoder = gm.load_encoder(landsat / "encoder")
    (tmp_path / "note.tif").write_text("hello")
    with pytest.raises(ReadError, match=r"note\.tif cannot be used: not a TIFF by its first bytes"):
        encoder.embed(tmp_path / "note.tif")
    with pytest.raises(ConfigError, match=r"nowhere\.tif"):
        encoder.features(tmp_path / "nowhere.tif")
    (tmp_path / "empty").mkdir()
    with pytest.raises(TooManyBadInputsError, match="holds no files"):
        encoder.features(tmp_path / "empty")


def test_a_path_is_read_as_what_the_encoder_knows(landsat, ct):
    """A series is no Landsat scene, whatever could be made of its numbers."""
    with pytest.raises((ReadError, TooManyBadInputsError)):
        gm.load_encoder(landsat / "encoder").embed(ct / "series")


def test_a_modality_from_a_file_of_the_users_is_asked_for(landsat):
    encoder = gm.load_encoder(landsat / "encoder")
    text = json.loads(encoder.contract.to_json())
    text = json.dumps(text).replace('"landsat7"', '"my-sensor"')
    own = PretrainedEncoder(encoder.module, Contract.from_json(text))
    with pytest.raises(ConfigError, match=r"the modality my-sensor of the model comes from a file of yours; read it"):
        own.embed(landsat / "a.tif")


QUICK = ("native", "timm")
"""Targets that take a second; the others are run with -m slow, and their own tests write the same folders."""
EXPORTERS = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow)
    for name in plugin_names("exporters", marker="export")
]


@pytest.fixture(scope="module")
def bright(tmp_path_factory) -> Path:
    return finetuned(tmp_path_factory.mktemp("bright"), 3)


@pytest.mark.parametrize("target", EXPORTERS)
def test_every_export_opens_again_as_the_same_encoder(landsat, water, bright, tmp_path, target):
    source, path, modality, size = landsat / "encoder", landsat / "a.tif", "landsat7", (64, 64)
    if "encoder" not in load_plugin("exporters", target, marker="export").TAKES:
        source, path, size = water / "run", water / "a.tif", (16, 16)
    if target == "monai_bundle":  # refuses rasters
        source, path, modality, size = bright / "run", bright / "a.nii.gz", "mr", (4, 8, 8)
    result = export(source, target.replace("_", "-"), tmp_path / "out")
    part = gm.read_images(path, modality)[0].crop(tuple(slice(4, 4 + length) for length in size))
    ours, again = gm.load_encoder(source), gm.load_encoder(tmp_path / "out")
    assert np.allclose(again.embed(part), ours.embed(part), atol=1e-4)
    assert again.contract.of(modality) == ours.contract.of(modality)
    assert (again.seen is None) == (ours.seen is None)
    assert "parity" in result and not list((tmp_path / "out").rglob("private"))
