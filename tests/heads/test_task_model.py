"""The task model and its folder: what is written comes back, what was changed is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from geomed_mae.archives.build import open_archive
from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.heads.task_model import TaskModel, load_task_model
from tests.scenes import mr_run, random_encoder, water_run


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return water_run(tmp_path_factory)


def crops(model: TaskModel, row, seed: int = 0):
    rng = np.random.default_rng(seed)
    raw = rng.uniform(1, 254, size=(2, len(model.spec.channels), *model.spec.crop)).astype(np.float32)
    return raw, np.ones(raw.shape, dtype=bool)


def test_a_folder_comes_back_as_the_same_function(folder):
    first, second = load_task_model(folder / "run")[0], load_task_model(folder / "run" / "model")[0]
    row = open_archive([folder / "scenes"], ["landsat7"]).rows[0]
    given = crops(first, row)
    assert first.spec == second.spec and first.classes == ("land", "water") and not first.training
    torch.testing.assert_close(first.probabilities(*given, row), second.probabilities(*given, row), rtol=0, atol=0)


def test_invalid_pixels_influence_nothing(folder):
    model, _ = load_task_model(folder / "run")
    row = open_archive([folder / "scenes"], ["landsat7"]).rows[0]
    raw, valid = crops(model, row)
    valid[:, :, 10:20, 5:40] = False
    other = np.where(valid, raw, np.float32(np.nan))
    assert torch.equal(model.probabilities(raw, valid, row), model.probabilities(other, valid, row))


def test_a_changed_byte_is_refused(folder, tmp_path):
    shutil.copytree(folder / "run" / "model", tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model.safetensors is not what was written"):
        load_task_model(tmp_path)


def test_a_folder_without_a_model_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match=r"holds no fine-tuned model .*give a run that `finetune` has finished"):
        load_task_model(tmp_path)


def test_an_encoder_folder_is_no_task_model(folder, tmp_path):
    encoder = random_encoder(tmp_path / "encoder", "landsat7", folder / "scenes")
    with pytest.raises(ConfigError, match="is no fine-tuned model"):
        load_task_model(encoder)


def test_no_file_names_and_no_paths_are_in_the_folder(folder):
    text = b"".join(path.read_bytes() for path in (folder / "run" / "model").iterdir())
    assert b"x.tif" not in text and str(folder).encode() not in text


def test_images_that_do_not_fit_are_refused_with_the_reason(folder, tmp_path_factory):
    model, _ = load_task_model(folder / "run")
    row = open_archive([folder / "scenes"], ["landsat7"]).rows[0]
    assert model.check(row) == ("B1", "B2", "B3", "B4", "B5", "B7")
    with pytest.raises(ConfigError, match="2D images of modality 'landsat7', not for 3D images of 'mr'"):
        model.check(open_archive([mr_run(tmp_path_factory) / "volumes"], ["mr"]).rows[0])
    with pytest.raises(ConfigError, match=r"lacks channels \['B7'\], which the model was trained with"):
        model.check(replace(row, channels=row.channels[:-1], statistics=row.statistics[:-1]))
    other_unit = tuple(replace(channel, unit="reflectance") for channel in row.channels)
    with pytest.raises(ConfigError, match="is in reflectance, the model expects DN"):
        model.check(replace(row, channels=other_unit))


def test_refuses_a_crop_that_is_no_multiple_of_the_patch(folder):
    model, _ = load_task_model(folder / "run")
    spec = replace(model.spec, crop=(60, 64))
    with pytest.raises(ConfigError, match=r"data.crop_2d \[60, 64\] is not a multiple of the encoder's patch \[8, 8\]"):
        TaskModel(model.encoder, model.contract, spec)


def test_config_is_plain_json(folder):
    config = json.loads((folder / "run" / "model" / "config.json").read_text())
    assert config["task"]["head"]["classes"] == ["land", "water"] and config["task"]["crop"] == [64, 64]
