"""export: what the command line's words become, which of encoder and model a target gets, and what is refused."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

import geomed_mae.export as verb
from geomed_mae.archives.seen import Seen
from geomed_mae.errors import ConfigError
from geomed_mae.export import export
from geomed_mae.exporters.proof import trial
from geomed_mae.heads.task_model import save_task_model
from geomed_mae.models.encoder_folder import load_encoder, save_encoder
from geomed_mae.models.masking import Masking
from geomed_mae.plugins import load_plugin, plugin_names
from geomed_mae.training.checkpoint import save
from geomed_mae.training.objective import MaskedObjective, objective_state
from tests.exporters.given import autoencoder, contract, task_model
from tests.scenes import landsat_scene, random_encoder

RED_GREEN = ["B04", "B03"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    landsat_scene(folder / "a.tif", None, shape=(64, 64))
    return random_encoder(folder / "encoder", "landsat7", folder / "a.tif") or folder / "encoder"


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A fine-tuned run of four channels, with its private part."""
    run = tmp_path_factory.mktemp("tuned") / "run"
    save_task_model(run, task_model("linear", "segment"), Seen.unknown())
    return run


def pretrained(folder, *, step: int = 3, **changes):
    """Write a pretraining run: its encoder folder and a checkpoint of so many steps."""
    mae = autoencoder(**changes)
    objective = MaskedObjective(mae, contract(), masking=Masking(ratio=(0.4, 0.6)), seed=0)
    save_encoder(folder / "encoder", mae.encoder, contract(), seen=Seen.unknown())
    save(folder / "checkpoints", step, model=mae.state_dict(), optimizer={}, state=objective_state(objective))
    return mae


def asked_of(monkeypatch, **names):
    """Let the target be one that keeps what it is asked for."""
    kept = []

    def keep(request, out):
        kept.append(request)
        return {"folder": str(out)}

    monkeypatch.setattr(verb, "load_plugin", lambda *_, **__: SimpleNamespace(export=keep, **names))
    return kept


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "64x64"}, "--size is whole numbers with commas between, for example 224,224, not '64x64'"),
        ({"spacing": "30 m"}, "--spacing is numbers with commas between, for example 20,20, not '30 m'"),
        ({"spacing": "30,30"}, "means nothing to this encoder, whose positions count patches"),
        ({"size": "64"}, "--size 64: give rows,columns for images or slices,rows,columns"),
        ({"size": "65,64"}, r"size \[65, 64\] is not a multiple of the patch"),
        ({"channels": "B3,"}, "are no different names of channels"),
    ],
)
def test_sizes_spacings_and_channels_that_cannot_be_are_refused(encoder, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export(encoder, "timm", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_export_of_chosen_channels_and_size_says_what_it_takes(encoder, tmp_path):
    result = export(encoder, "timm", tmp_path / "out", channels="B3,B2", size="32,64")
    assert result["target"] == "timm" and "note" not in result
    assert result["channels"] == ["B3", "B2"] and result["input_size"] == [2, 32, 64]
    assert result["largest_relative_difference"] < 1e-5
    assert "a Landsat 7 scene's texture" in result["parity"]["compared"]


def test_an_export_is_compared_on_the_users_image_where_there_is_one(encoder, tmp_path):
    result = export(encoder, "timm", tmp_path / "out", image=encoder.parent / "a.tif")
    assert result["parity"]["compared"] == "tokens of the given image and of noise"
    for file in result["files"]:
        assert str(encoder.parent).encode() not in (tmp_path / "out" / file).read_bytes(), "no path of the image"
    landsat_scene(tmp_path / "many" / "1.tif", None)
    landsat_scene(tmp_path / "many" / "2.tif", None)
    with pytest.raises(ConfigError, match="holds 2 images .*, and one is wanted"):
        export(encoder, "timm", tmp_path / "other", image=tmp_path / "many")


def test_a_folder_that_holds_something_is_refused(encoder, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; choose another --out"):
        export(encoder, "timm", tmp_path)


def test_a_target_of_encoders_gets_the_fine_tuned_encoder_and_it_is_said(tuned, tmp_path):
    result = export(tuned, "timm", tmp_path / "out")
    assert result["note"] == "timm takes encoders: this is the fine-tuned one, without its head"
    assert result["channels"] == ["B01", "B02", "B03", "B04"] and result["input_size"] == [4, 32, 32]
    assert "pretrained_on.json" in result["files"]
    assert "for 11 steps, then fine-tuned on labelled images." in (tmp_path / "out" / "README.md").read_text()


def test_a_target_of_models_gets_the_model_and_takes_no_encoder(encoder, tuned, tmp_path, monkeypatch):
    kept = asked_of(monkeypatch, TAKES=("model",))
    export(tuned, "toy", tmp_path / "out")
    (request,) = kept
    assert request.task is not None and request.encoder.module is request.task.encoder
    assert len(request.layers) == 3 and request.encoder.seen is not None
    with pytest.raises(ConfigError, match="--to toy takes a fine-tuned model, and this is an encoder without head"):
        export(encoder, "toy", tmp_path / "out")
    with pytest.raises(ConfigError, match="--channels B04,B03: the head was trained with B01,B02,B03,B04"):
        export(tuned, "toy", tmp_path / "out", channels=RED_GREEN)
    with pytest.raises(ConfigError, match="--modality ct: the model was fine-tuned on 'sentinel2-l2a'"):
        export(tuned, "toy", tmp_path / "out", modality="ct")


def test_the_native_export_of_a_fine_tuned_run_leaves_the_private_part_where_it_is(tuned, tmp_path):
    result = export(tuned, "native", tmp_path / "out")
    assert result["parity"]["largest_relative_difference"] == 0
    names = {"MANIFEST.sha256", "README.md", "config.json", "contract.json", "model.safetensors", "trained_on.json"}
    assert set(result["files"]) == names
    again = export(tmp_path / "out", "native", tmp_path / "again")
    assert again["modality"] == "sentinel2-l2a" and set(again["files"]) == names


def test_what_is_written_whole_takes_no_choice(tuned, tmp_path):
    with pytest.raises(ConfigError, match="--to native writes the whole model, whatever --channels, --size would"):
        export(tuned, "native", tmp_path / "out", channels="B04", size="32,32")


def test_the_decoder_of_a_pretraining_run_goes_with_it_on_request(tmp_path):
    mae = pretrained(tmp_path / "run")
    how = {"modality": "sentinel2-l2a", "channels": "B04,B03,B02"}
    result = export(tmp_path / "run", "hf-vitmae", tmp_path / "hf", decoder=True, **how)
    assert result["decoder"] and json.loads((tmp_path / "hf" / "config.json").read_text())["mask_ratio"] == 0.5
    assert export(tmp_path / "run", "hf-vitmae", tmp_path / "alone", **how)["decoder"] is False
    export(tmp_path / "run", "native", tmp_path / "native", decoder=True)
    theirs = load_encoder(tmp_path / "native").module.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mae.encoder.state_dict().items())


def test_a_decoder_that_is_not_there_or_not_of_this_encoder_is_refused(encoder, tuned, tmp_path):
    with pytest.raises(ConfigError, match="--to timm has no place for a decoder"):
        export(encoder, "timm", tmp_path / "out", decoder=True)
    for source in (encoder, tuned):
        with pytest.raises(ConfigError, match="has no checkpoint of a pretraining run, where decoders are kept"):
            export(source, "hf-vitmae", tmp_path / "out", decoder=True)
    mae = pretrained(tmp_path / "run")
    with torch.no_grad():
        mae.encoder.cls_token += 1
    objective = MaskedObjective(mae, contract(), masking=Masking(), seed=0)
    save(tmp_path / "run" / "checkpoints", 9, model=mae.state_dict(), optimizer={}, state=objective_state(objective))
    with pytest.raises(ConfigError, match=r"\(step 9\) is not the one that its encoder folder was made of"):
        export(tmp_path / "run", "hf-vitmae", tmp_path / "out", decoder=True, modality="rgb")


def test_every_exporter_says_what_it_takes():
    for name in plugin_names("exporters", marker="export"):
        takes = load_plugin("exporters", name, marker="export").TAKES
        assert takes and set(takes) <= {"encoder", "model"}, name


def test_a_request_of_the_default_image_is_the_same_every_time(encoder, monkeypatch, tmp_path):
    kept = asked_of(monkeypatch, TAKES=("encoder",))
    for _ in range(2):
        export(encoder, "toy", tmp_path / "out")
    assert torch.equal(trial(kept[0]).raw, trial(kept[1]).raw)
