"""The native export: an encoder folder or a model folder, bit for bit, without the run around it."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

import geomed_mae.exporters.native as exporter
from geomed_mae.archives.seen import Seen
from geomed_mae.errors import IntegrityError
from geomed_mae.exporters.request import ask
from geomed_mae.heads.task_model import load_task_model
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import PretrainedEncoder
from tests.exporters.given import autoencoder, contract, encoder, task_model


def test_an_encoder_goes_whole_with_every_modality(tmp_path):
    source = encoder(seen=Seen.unknown())
    result = exporter.export(ask(source, modality="ct"), tmp_path / "out")
    assert result["parity"]["largest_relative_difference"] == 0
    assert "pretrained_on.json" in result["files"]
    opened = load_encoder(tmp_path / "out")
    assert opened.contract == source.contract and opened.spec == source.spec
    theirs = opened.module.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in source.module.state_dict().items())


def test_a_decoder_lies_beside_the_encoder_where_it_is_asked_for(tmp_path):
    mae = autoencoder()
    exporter.export(ask(PretrainedEncoder(mae.encoder, contract()), mae=mae, modality="ct"), tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(stored[f"decoder.{name}"], tensor) for name, tensor in mae.decoder.state_dict().items())
    load_encoder(tmp_path / "out")


@pytest.mark.parametrize(("head", "task"), [("convolutional", "segment"), ("attentive", "classify")])
def test_a_fine_tuned_model_goes_with_its_head(tmp_path, head, task):
    model = task_model(head, task, modality="ct")
    request = ask(PretrainedEncoder(model.encoder, model.contract, seen=Seen.unknown()), task=model)
    result = exporter.export(request, tmp_path / "out")
    assert result["parity"]["compared"].startswith("probabilities") and "trained_on.json" in result["files"]
    opened, _ = load_task_model(tmp_path / "out")
    assert opened.spec == model.spec
    assert "| 2 | posterior |" in (tmp_path / "out" / "README.md").read_text()


def test_a_decoder_that_is_not_the_one_of_the_run_leaves_nothing_behind(tmp_path, monkeypatch):
    mae, other = autoencoder(), autoencoder()
    torch.nn.init.ones_(other.decoder.mask_token)
    true = exporter.save_encoder
    monkeypatch.setattr(
        exporter, "save_encoder", lambda *given, **more: true(*given, **more | {"decoder": other.decoder})
    )
    with pytest.raises(IntegrityError, match="nothing was written"):
        exporter.export(ask(PretrainedEncoder(mae.encoder, contract()), mae=mae, modality="ct"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_one_bit_of_difference_leaves_nothing_behind(tmp_path, monkeypatch):
    source = encoder()

    def spoilt(folder):
        opened = load_encoder(folder)
        with torch.no_grad():
            opened.module.norm.bias[0] += 1e-6
        return opened

    monkeypatch.setattr(exporter, "load_encoder", spoilt)
    with pytest.raises(IntegrityError, match="the native export, opened in geomed-mae, differs from the model by"):
        exporter.export(ask(source, modality="ct"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
