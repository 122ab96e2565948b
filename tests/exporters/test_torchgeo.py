"""The TorchGeo export: a checkpoint that its trainers load, followed step by step as they do it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import geomed_mae.exporters.torchgeo as exporter
from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.exporters.proof import ours, trial
from geomed_mae.exporters.request import Request, ask
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from tests.consumer import elsewhere

BANDS = ("B04", "B03", "B02", "B08")
CONSUMER = """
    # What ClassificationTask does with `weights` (torchgeo/trainers, MIT): extract_backbone, then load_state_dict.
    import json, sys, timm, torch, warnings
    from collections import OrderedDict

    said = []
    for folder in sys.argv[1:]:
        warnings.simplefilter("error")
        result = json.load(open(folder + ".json"))
        checkpoint = torch.load(folder + "/model.ckpt", map_location="cpu", weights_only=True)
        name = checkpoint["hyper_parameters"]["model"]
        kept = {key: value for key, value in checkpoint["state_dict"].items() if "model." in key}
        state = OrderedDict({key.replace("model.", ""): value for key, value in kept.items()})
        model = timm.create_model(result["model"], num_classes=10, in_chans=4, pretrained=False)
        keys, children = [], list(model.named_children())
        while children:
            first, module = children[0]
            keys.append(first)
            children = list(module.named_children())
        key = ".".join(keys)
        assert module.in_channels == state[key + ".weight"].shape[1] == 4, key
        missing, unexpected = model.load_state_dict(state, strict=False)
        with torch.no_grad():
            tokens = model.eval().forward_features(torch.load(folder + ".pt", weights_only=True))
        torch.save(tokens, folder + ".tokens.pt")
        said.append({"name": name, "missing": sorted(missing), "unexpected": unexpected, "pool": model.global_pool})
    print(json.dumps(said))
"""


def request(size: tuple[int, int], **spec: int) -> Request:
    """An encoder of four bands of Sentinel-2."""
    torch.manual_seed(0)
    s2 = load_modality("sentinel2-l2a")
    entries = contract_entries(s2, s2.channels, [])
    shape = {"dim": 48, "depth": 2, "heads": 3, "patch_2d": (8, 8), "basis": 8, "reference_gsd_m": 10.0, **spec}
    encoder = PretrainedEncoder(Encoder(ModelSpec(**shape)), Contract(channels=entries, crop_2d=(32, 32), images=2))
    return ask(encoder, channels=BANDS, size=size)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports of a ViT that timm has a name for and of one that it has none for, and what TorchGeo makes of them."""
    work = tmp_path_factory.mktemp("torchgeo")
    tiny = {"dim": 192, "depth": 12, "heads": 3, "patch_2d": (16, 16)}
    requests = {"named": request((224, 224), **tiny), "own": request((32, 48))}
    results = {}
    for name, asked in requests.items():
        results[name] = exporter.export(asked, work / name)
        (work / f"{name}.json").write_text(json.dumps(results[name]))
        torch.save(trial(asked).normalised, work / f"{name}.pt")
    said = elsewhere(CONSUMER, *(work / name for name in requests))
    return work, requests, results, dict(zip(requests, said, strict=True))


def test_a_trainer_loads_all_weights_but_its_own_head(exported):
    _, _, results, said = exported
    for name, one in said.items():
        assert one["missing"] == ["head.bias", "head.weight"] and one["unexpected"] == [], name
    assert results["named"]["model"] == said["named"]["name"] == "vit_tiny_patch16_224"
    assert results["named"]["by_name"] and not results["own"]["by_name"]
    assert results["own"]["model"].startswith("local-dir:") and said["own"]["pool"] == "avg"


def test_its_tokens_are_ours(exported):
    work, requests, results, _ = exported
    for name, asked in requests.items():
        theirs = torch.load(work / f"{name}.tokens.pt", weights_only=True)
        mine = ours(asked, trial(asked)).tokens
        assert (theirs - mine).abs().max() < 1e-5 * mine.abs().max()
        assert results[name]["parity"]["largest_relative_difference"] < 1e-5


def test_the_folder_is_also_a_timm_folder_that_we_open(exported):
    work, requests, _, _ = exported
    opened = load_encoder(work / "own")
    assert [entry.channel.name for entry in opened.contract.channels] == list(BANDS)
    assert opened.spec.dim == requests["own"].encoder.spec.dim


def test_the_card_shows_lines_that_fit_the_folder(exported):
    work, _, _, _ = exported
    named, own = ((work / name / "README.md").read_text() for name in ("named", "own"))
    assert 'model="vit_tiny_patch16_224", weights="/path/to/this/folder/model.ckpt"' in named
    assert 'model="local-dir:/path/to/this/folder"' in own and "in_channels=4" in own
    assert "K.Normalize(mean=[0.15, 0.15, 0.15, 0.15], std=[0.15, 0.15, 0.15, 0.15])" in own
    assert 'bands "B04", "B03", "B02", "B08" in this order' in own


def test_no_path_of_ours_is_inside(exported):
    work, _, _, _ = exported
    for path in (path for path in (work / "own").rglob("*") if path.is_file()):
        assert str(work).encode() not in path.read_bytes(), path


def test_volumes_and_other_layer_norms_are_refused(tmp_path):
    torch.manual_seed(0)
    ct = load_modality("ct")
    module = Encoder(ModelSpec(dim=24, depth=1, heads=2, patch_3d=(2, 4, 4), basis=4))
    contract = Contract(channels=contract_entries(ct, ct.channels, []), crop_3d=(4, 8, 8))
    with pytest.raises(ConfigError, match="TorchGeo takes images, not volumes; take --to monai-bundle"):
        exporter.export(ask(PretrainedEncoder(module, contract)), tmp_path / "out")
    with pytest.raises(ConfigError, match=r"LayerNorms have epsilon 1e-05, and the models that TorchGeo builds have"):
        exporter.export(request((32, 32), norm_eps=1e-5), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_mismatch_leaves_nothing_behind(tmp_path, monkeypatch):
    true_load = exporter.load_file

    def damaged(path: Path) -> dict[str, torch.Tensor]:
        tensors = true_load(path)
        return {**tensors, "norm.bias": tensors["norm.bias"] + 1}

    monkeypatch.setattr(exporter, "load_file", damaged)
    with pytest.raises(IntegrityError, match="the torchgeo export, opened in timm"):
        exporter.export(request((32, 32)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
