"""The timm export: an ordinary VisionTransformer with the same features, in 2D and 3D."""

from __future__ import annotations

import json

import numpy as np
import pytest
import timm
import torch

import geomed_mae.exporters.timm as exporter
from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.exporters.proof import ours, trial
from geomed_mae.exporters.request import ask
from geomed_mae.image import Image, RasterGeometry
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.patches import patchify
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from tests.consumer import elsewhere

S2, CT = load_modality("sentinel2-l2a"), load_modality("ct")


@pytest.fixture(scope="module")
def encoder() -> PretrainedEncoder:
    torch.manual_seed(0)
    spec = ModelSpec(dim=48, depth=2, heads=3, patch_2d=(8, 4), patch_3d=(2, 8, 4), basis=8)
    entries = contract_entries(S2, S2.channels, []) + contract_entries(CT, CT.channels, [])
    module = Encoder(spec)
    for bias in module.patch_embed.bias.values():
        torch.nn.init.normal_(bias)
    return PretrainedEncoder(
        module, Contract(channels=entries, crop_2d=(32, 24), crop_3d=(6, 16, 24), images=2, steps=3)
    )


def test_an_image_gives_the_same_vector_in_timm(encoder, tmp_path):
    names = ["B04", "B03", "B02", "B08"]
    result = exporter.export(ask(encoder, modality="sentinel2-l2a", channels=names), tmp_path / "out")
    assert result["largest_relative_difference"] < 1e-5 and result["input_size"] == [4, 32, 24]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    array = np.random.default_rng(0).random((12, 32, 24), dtype=np.float32)
    image = Image(
        array, np.ones((1, 32, 24), bool), S2.channels, RasterGeometry(None, (1, 0, 0, 0, -1, 0), None), S2.name
    )
    mean, std = (torch.tensor(model.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.inference_mode():
        theirs = model((torch.from_numpy(image.select(tuple(names)).array.copy()) - mean)[None] / std)[0].numpy()
    assert np.allclose(theirs, encoder.embed(image, channels=names), atol=1e-5)


def test_a_volume_gives_the_same_tokens_in_timm(encoder, tmp_path):
    result = exporter.export(ask(encoder, modality="ct"), tmp_path / "out")
    assert result["input_size"] == [2, 48, 24]
    model = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    volume = torch.randn(2, 1, 6, 16, 24)
    with torch.inference_mode():
        ours = encoder.module(volume, torch.ones_like(volume, dtype=torch.bool), CT.channels).tokens
        theirs = model.forward_features(exporter.as_timm_input(volume, (2, 8, 4)))
    assert torch.allclose(ours, theirs, atol=1e-5)


def test_the_rearrangement_is_the_one_that_the_card_shows(encoder, tmp_path):
    exporter.export(ask(encoder, modality="ct"), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "volume.reshape(c, n, 2, y, x).swapaxes(1, 2).reshape(c * 2, n * y, x) # n = 6 / 2" in card
    assert "TerraTorch" not in card, "whose feature maps would be slabs below one another"
    volume = torch.randn(1, 3, 6, 16, 24)
    wanted = volume[0].numpy().reshape(3, 3, 2, 16, 24).swapaxes(1, 2).reshape(6, 48, 24)
    got = exporter.as_timm_input(volume, (2, 8, 4))
    assert np.array_equal(got[0].numpy(), wanted)
    assert torch.equal(patchify(got, (8, 4)).flatten(2), patchify(volume, (2, 8, 4)).flatten(2))


def test_the_folder_says_everything_and_names_no_placeholder(encoder, tmp_path):
    exporter.export(ask(encoder, modality="sentinel2-l2a", channels=["B04"], size=(16, 8)), tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["MANIFEST.sha256", "README.md", "config.json", "contract.json", "model.safetensors"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "num_classes" not in config["model_args"] and config["pretrained_cfg"]["mean"] == [0.15]
    contract = json.loads((tmp_path / "out" / "contract.json").read_text())
    assert [entry["channel"]["name"] for entry in contract["channels"]] == ["B04"]
    assert contract["input"] == {
        "size": [16, 8],
        "patch": [8, 4],
        "spacing": None,
        "spacing_unit": "m",
        "values": "normalised",
        "layout": "c y x",
    }
    card = (tmp_path / "out" / "README.md").read_text()
    red = S2.channels[3]
    physics = f"optical, {red.wavelength_nm:g} nm, {red.bandwidth_nm:g} nm wide"
    assert f"| 0 | B04 | {physics} | reflectance | 0.15 | 0.15 | 0 to 1.6 |" in card
    assert "{" not in card and "None" not in card


def test_a_mismatch_leaves_nothing_behind(encoder, tmp_path, monkeypatch):
    true_fold = exporter.fold

    def damaged(*args):
        model_args, tensors = true_fold(*args)
        return model_args, {**tensors, "pos_embed": torch.zeros_like(tensors["pos_embed"])}

    monkeypatch.setattr(exporter, "fold", damaged)
    with pytest.raises(
        IntegrityError, match=r"the timm export, opened in timm .* differs from the model by .* nothing was written"
    ):
        exporter.export(ask(encoder, modality="ct"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_mean_or_a_deviation_that_is_not_the_models_leaves_nothing_behind(encoder, tmp_path, monkeypatch):
    config = exporter._config
    for name in ("mean", "std"):

        def changed(*given, name=name):
            found = config(*given)
            found["pretrained_cfg"][name][-1] *= 1.01
            return found

        monkeypatch.setattr(exporter, "_config", changed)
        with pytest.raises(IntegrityError, match="differs from the model by"):
            exporter.export(ask(encoder, modality="sentinel2-l2a"), tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_unknown_channels_and_odd_sizes_are_refused(encoder):
    with pytest.raises(ConfigError, match=r"--channels \['B99'\]: modality 'sentinel2-l2a' has \['B01'"):
        ask(encoder, modality="sentinel2-l2a", channels=["B99"])
    with pytest.raises(ConfigError, match=r"size \[30, 24\] is not a multiple of the patch \[8, 4\]"):
        ask(encoder, modality="sentinel2-l2a", size=(30, 24))
    with pytest.raises(ConfigError, match="has no modality 'mr'"):
        ask(encoder, modality="mr")
    with pytest.raises(ConfigError, match="the encoder knows ct, sentinel2-l2a; choose one with --modality"):
        ask(encoder)


def test_timm_transformers_and_terratorch_open_the_folder_where_this_package_is_not_installed(encoder, tmp_path):
    request = ask(encoder, modality="sentinel2-l2a", channels=["B04", "B03", "B02", "B08"])
    exporter.export(request, tmp_path / "out")
    given = trial(request)
    torch.save({"x": given.normalised, "tokens": ours(request, given).tokens}, tmp_path / "given.pt")
    found = elsewhere(
        """
        import json, sys
        import timm, torch
        from transformers import AutoImageProcessor, AutoModel
        folder, given = sys.argv[1], torch.load(sys.argv[2], weights_only=True)
        x, tokens = given["x"], given["tokens"]
        with torch.inference_mode():
            model = timm.create_model("local-dir:" + folder, pretrained=True).eval()
            hf = AutoModel.from_pretrained(folder).eval()
            # As TerraTorch 1.2.13 reads `backbone: timm_local-dir:FOLDER`: the prefix ends at the first "_".
            prefix, name = ("timm_local-dir:" + folder).split("_", 1)
            maps = timm.create_model(name, pretrained=True, features_only=True, out_indices=[0, 1]).eval()(x)
            normed = model.norm(maps[-1].flatten(2).transpose(1, 2))
            found = {
                "tokens": float((model.forward_features(x) - tokens).abs().max()),
                "vector": float((model(x) - tokens[:, 1:].mean(dim=1)).abs().max()),
                "transformers": float((hf(x).last_hidden_state - tokens).abs().max()),
                "pooler": float((hf(x).pooler_output - tokens[:, 1:].mean(dim=1)).abs().max()),
                "features_only": [list(map_.shape) for map_ in maps],
                "intermediate": float((normed - tokens[:, 1:]).abs().max()),
                "mean": AutoImageProcessor.from_pretrained(folder).data_config["mean"],
                "prefix": prefix,
            }
        print(json.dumps(found))
        """,
        tmp_path / "out",
        tmp_path / "given.pt",
    )
    for name in ("tokens", "vector", "transformers", "pooler", "intermediate"):
        assert found[name] < 1e-5, name
    assert found["features_only"] == [[2, 48, 4, 6]] * 2
    assert found["mean"] == [0.15] * 4 and found["prefix"] == "timm"
