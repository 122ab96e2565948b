"""The encoder folder: what was written, or a refusal that names the file."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from geomed_mae.errors import ConfigError, IntegrityError, OutputError, SecurityError
from geomed_mae.models.contract import ChannelContract, Contract
from geomed_mae.models.encoder_folder import load_encoder, model_card, save_encoder
from geomed_mae.models.manifest import read_folder, write_folder


@pytest.fixture
def contract(bands, ct) -> Contract:
    entries = [
        ChannelContract(modality=name, channel=channel, method="fixed", center=0.1, scale=0.2, noise_floor=0.05)
        for name, channels in (("sentinel2-l2a", bands), ("ct", ct))
        for channel in channels
    ]
    return Contract(channels=tuple(entries), crop_2d=(16, 16), crop_3d=(4, 8, 8), images=3, steps=7, fingerprint="f00")


@pytest.fixture
def folder(tmp_path, mae, contract):
    save_encoder(tmp_path / "run" / "encoder", mae.encoder, contract)
    return tmp_path / "run" / "encoder"


def test_round_trip_bit_for_bit_from_run_and_encoder_folder(folder, mae, contract):
    for path in (folder, folder.parent, str(folder)):
        loaded = load_encoder(path)
        assert loaded.contract == contract and loaded.spec == mae.spec and not loaded.module.training
        for name, tensor in mae.encoder.state_dict().items():
            assert torch.equal(tensor, loaded.module.state_dict()[name])


def test_the_folder_holds_what_the_design_says_and_no_decoder(folder):
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["MANIFEST.sha256", "README.md", "config.json", "contract.json", "model.safetensors"]
    assert b"decoder" not in (folder / "model.safetensors").read_bytes()


def test_the_decoder_is_stored_only_when_asked_for(tmp_path, mae, contract):
    save_encoder(tmp_path / "e", mae.encoder, contract, decoder=mae.decoder)
    assert b"decoder.mask_token" in (tmp_path / "e" / "model.safetensors").read_bytes()
    assert torch.equal(load_encoder(tmp_path / "e").module.cls_token, mae.encoder.cls_token)


def test_the_model_card_has_numbers_and_no_placeholder(folder):
    card = (folder / "README.md").read_text()
    assert "| ct | CT | ct | HU | (value - 0.1) / 0.2 | none |" in card
    assert "on 3 images for 7 steps" in card
    assert not any(mark in card for mark in ("{", "}", "[More Information Needed]", "None"))


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "contract.json", "README.md"])
def test_one_flipped_bit_is_refused_and_the_file_is_named(folder, name):
    data = bytearray((folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (folder / name).write_bytes(data)
    with pytest.raises(IntegrityError, match=rf"{name} is not what was written \(its SHA-256 differs\)"):
        load_encoder(folder)


def test_a_missing_file_is_named(folder):
    (folder / "contract.json").unlink()
    with pytest.raises(IntegrityError, match=r"contract.json is in MANIFEST.sha256 but cannot be read"):
        load_encoder(folder)


def test_a_manifest_cannot_point_outside(folder):
    (folder / "MANIFEST.sha256").write_text("0" * 64 + "  ../secret\n")
    with pytest.raises(IntegrityError, match="names no plain file"):
        load_encoder(folder)


def test_weights_of_another_shape_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    config["spec"]["dim"] = 96
    files = {**read_folder(folder), "config.json": json.dumps(config).encode()}
    write_folder(folder, files)
    with pytest.raises(IntegrityError, match=r"model.safetensors does not fit config.json"):
        load_encoder(folder)


def test_a_newer_version_is_refused(folder):
    files = read_folder(folder)
    write_folder(folder, {**files, "config.json": files["config.json"].replace(b'"version": 1', b'"version": 2')})
    with pytest.raises(ConfigError, match=r"is 'geomed-mae encoder' version 2, not"):
        load_encoder(folder)


def test_pickles_are_refused_with_the_way_to_convert(tmp_path):
    (tmp_path / "model.pth").write_bytes(b"x")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "pytorch_model.bin").write_bytes(b"x")
    for path in (tmp_path / "model.pth", tmp_path / "hub"):
        with pytest.raises(SecurityError, match=r"is a pickle, .*safetensors.torch.save_file"):
            load_encoder(path)


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="there is no run or encoder folder"):
        load_encoder(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="holds no encoder"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"has model_type None and no timm architecture. Known are"):
        load_encoder(tmp_path)


def test_saving_replaces_an_encoder_folder_but_nothing_else(folder, mae, contract, tmp_path):
    torch.nn.init.ones_(mae.encoder.cls_token)
    save_encoder(folder, mae.encoder, contract)
    assert (load_encoder(folder).module.cls_token == 1).all()
    assert [path.name for path in folder.parent.iterdir()] == ["encoder"]
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("x")
    with pytest.raises(OutputError, match="holds something else"):
        save_encoder(tmp_path / "thesis", mae.encoder, contract)
    assert (tmp_path / "thesis" / "chapter1.tex").exists()


def test_the_card_of_an_encoder_of_another_package_claims_no_pretraining_of_ours(folder):
    opened = load_encoder(folder)
    text = model_card(opened.module, replace(opened.contract, images=0, steps=0))
    assert "whose training is not recorded" in text
    assert not any(word in text for word in ("pretrained with geomed-mae", "on 0 images", "masked-autoencoder"))
