"""timm folders: the same tokens as timm's own model, or a refusal that names the setting."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from geomed_mae.errors import ConfigError, GeomedError, IntegrityError
from geomed_mae.exporters import timm as exporter
from geomed_mae.exporters.request import ask
from geomed_mae.image import Image, PlaneGeometry
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from tests.make_published import timm_vit

RGB, S2, CT = (load_modality(name) for name in ("rgb", "sentinel2-l2a", "ct"))


def configure(folder, **model_args):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["model_args"] |= model_args
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"init_values": 0.1},
        {"qkv_bias": False, "proj_bias": False},
        {"no_embed_class": True},
        {"img_size": (24, 40), "patch_size": (8, 4)},
        {"global_pool": "map"},
        {"global_pool": "avg", "fc_norm": False},
        {"dynamic_img_size": True},
        {"num_classes": 0, "drop_path_rate": 0.1},
        {"name": "vit_small_patch14_dinov2", "img_size": 28, "patch_size": 14},
    ],
    ids=str,
)
def test_tokens_are_those_of_timm(tmp_path, arguments):
    theirs = timm_vit(tmp_path, **arguments)
    encoder = load_encoder(tmp_path)
    pixels = torch.randn(2, 3, *theirs.patch_embed.img_size)
    with torch.no_grad():
        ours = encoder.module(pixels, torch.ones_like(pixels, dtype=torch.bool), RGB.channels).tokens
        torch.testing.assert_close(ours, theirs.forward_features(pixels), atol=1e-4, rtol=1e-5)
    assert encoder.spec.learned_positions == theirs.patch_embed.grid_size


def test_an_image_gives_the_vector_that_timm_gives(tmp_path):
    theirs = timm_vit(tmp_path, global_pool="avg", fc_norm=False, num_classes=0)
    config = json.loads((tmp_path / "config.json").read_text())["pretrained_cfg"]
    array = np.random.default_rng(0).integers(0, 256, (3, 32, 32)).astype(np.float32)
    image = Image(array, np.ones((1, 32, 32), bool), RGB.channels, PlaneGeometry(), "rgb")
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        wanted = theirs(((torch.from_numpy(array.copy()) / 255 - mean) / std)[None])[0]
    np.testing.assert_allclose(load_encoder(tmp_path).embed(image), wanted, atol=1e-4)


def test_a_folder_of_transformers_wrapper_is_read_too(tmp_path):
    theirs = timm_vit(tmp_path)
    tensors = {f"timm_model.{name}": tensor for name, tensor in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors")
    assert torch.equal(load_encoder(tmp_path).module.norm.weight, theirs.norm.weight)


def test_an_older_folder_with_one_dictionary_is_read(tmp_path):
    timm_vit(tmp_path, "vit_tiny_patch16_224", img_size=224, patch_size=16, embed_dim=192, depth=12)
    config = json.loads((tmp_path / "config.json").read_text())
    flat = {"architecture": "vit_tiny_patch16_224", **config["pretrained_cfg"], "mean": [0.1, 0.2, 0.3]}
    (tmp_path / "config.json").write_text(json.dumps(flat))
    encoder = load_encoder(tmp_path)
    assert encoder.spec.depth == 12 and encoder.contract.channels[2].center == pytest.approx(76.5)


def test_a_timm_model_can_be_exported_again_at_its_own_and_at_another_size(tmp_path):
    timm_vit(tmp_path / "timm")
    encoder = load_encoder(tmp_path / "timm")
    for name, size in (("same", None), ("other", (24, 48))):
        result = exporter.export(ask(encoder, modality="rgb", size=size), tmp_path / name)
        assert result["largest_relative_difference"] < 1e-5
        assert load_encoder(tmp_path / name).spec.learned_positions == ((4, 4) if size is None else (3, 6))


@pytest.fixture(scope="module")
def own() -> PretrainedEncoder:
    torch.manual_seed(0)
    module = Encoder(ModelSpec(dim=48, depth=2, heads=3, patch_2d=(8, 4), patch_3d=(2, 8, 4), basis=8))
    for bias in module.patch_embed.bias.values():
        torch.nn.init.normal_(bias)
    entries = contract_entries(S2, S2.channels, []) + contract_entries(CT, CT.channels, [])
    return PretrainedEncoder(module, Contract(channels=entries, crop_2d=(32, 24), crop_3d=(6, 16, 24), images=2))


@pytest.mark.parametrize(
    ("modality", "names", "space"),
    [("sentinel2-l2a", None, (32, 24)), ("sentinel2-l2a", ["B08", "B04"], (32, 24)), ("ct", None, (6, 16, 24))],
)
def test_our_own_export_comes_back_with_its_channels_and_features(own, tmp_path, modality, names, space):
    exporter.export(ask(own, modality=modality, channels=names), tmp_path / "out")
    encoder = load_encoder(tmp_path / "out")
    entries = [entry for entry in own.contract.of(modality) if names is None or entry.channel.name in names]
    assert sorted(map(repr, encoder.contract.channels)) == sorted(map(repr, entries))
    assert encoder.contract.images == 2 and encoder.spec.learned_positions is None
    channels = tuple(entry.channel for entry in entries)
    pixels = torch.randn(2, len(channels), *space)
    valid = torch.ones_like(pixels, dtype=torch.bool)
    with torch.no_grad():
        one, other = (model.module(pixels, valid, channels).tokens for model in (own, encoder))
    assert (one - other).abs().max() < 1e-5 * one.abs().max()


def test_our_own_export_is_checked_against_its_manifest(own, tmp_path):
    exporter.export(ask(own, modality="ct"), tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match=r"model.safetensors is not what was written"):
        load_encoder(tmp_path / "out")


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"class_token": False, "global_pool": "avg", "fc_norm": False}, r"has class_token False, .*supported: true"),
        ({"reg_tokens": 4}, r"has reg_tokens 4, which cannot be represented; supported: 0"),
        ({"global_pool": "avg"}, r"has final_norm / fc_norm 'Identity', .*supported: a LayerNorm before pooling"),
        ({"pre_norm": True}, r"has pre_norm True, .*supported: false"),
        ({"qk_norm": True}, r"has qk_norm True"),
        ({"scale_mlp_norm": True}, r"has scale_mlp_norm True"),
        ({"scale_attn_norm": True}, r"has scale_attn_norm True"),
        ({"mlp_ratio": 3}, r"has mlp_ratio 3.0, .*supported: 4"),
        ({"act_layer": "gelu_tanh"}, r"has act_layer 'GELUTanh\(\)', .*supported: GELU \(exact\)"),
        ({"norm_layer": "rmsnorm"}, r"has (norm_layer|final_norm / fc_norm) 'RmsNorm'"),
        ({"pos_embed": "none"}, r"has pos_embed False, .*supported: learn"),
        ({"in_chans": 5}, r"takes 5 channels and does not say which. Put a contract.json into it"),
    ],
    ids=str,
)
def test_what_does_not_map_exactly_is_refused_with_the_setting(tmp_path, arguments, text):
    timm_vit(tmp_path, **arguments)
    with pytest.raises(ConfigError, match=text):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("resnet18", r"is a 'resnet18'; of timm's models only VisionTransformer"),
        ("vit_small_patch16_dinov3", r"is a 'vit_small_patch16_dinov3' \(Eva\); only VisionTransformer"),
        ("vit_tiny_r_s16_p8_224", r"has embed_layer 'HybridEmbed', .*supported: PatchEmbed"),
        ("vit_base_patch16_plus_clip_240", r"has pre_norm True"),
        ("hf-hub:evil/model", r"architecture 'hf-hub:evil/model' is none of timm"),
        ("local-dir:/tmp", r"architecture 'local-dir:/tmp' is none of timm"),
        ("vit_none", r"architecture 'vit_none' is none of timm"),
        (["vit"], r"is none of timm"),
    ],
)
def test_other_architectures_are_refused(tmp_path, name, text):
    (tmp_path / "config.json").write_text(json.dumps({"architecture": name, "pretrained_cfg": {}}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=text):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"block_fn": "os.system"}, r"model_args.block_fn is 'os.system', which cannot be represented; known are"),
        ({"pretrained": True}, r"model_args.pretrained is True"),
        ({"checkpoint_path": "/etc/passwd"}, r"model_args.checkpoint_path"),
        ({"depth": 10**9}, r"model_args.depth is 1000000000"),
        ({"embed_dim": 10**400}, r"model_args.embed_dim"),
        ({"init_values": 10**400}, r"model_args.init_values"),
        ({"patch_size": 0}, r"timm cannot build 'vit_tiny_patch16_224' with these model_args"),
        ({"num_heads": 7}, r"timm cannot build 'vit_tiny_patch16_224' with these model_args"),
        ({"patch_size": 64}, r"hold no patch of \[64, 64\]"),
        ({"depth": 0}, r"has depth 0"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_arguments_of_a_folder_are_data_with_limits(tmp_path, arguments, text):
    timm_vit(tmp_path)
    configure(tmp_path, **arguments)
    with pytest.raises(ConfigError, match=text):
        load_encoder(tmp_path)


def test_tensors_are_those_of_the_model_or_named(tmp_path):
    timm_vit(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "extra": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"tensor 'extra' \(and 0 more\) belongs to no part of the model"):
        load_encoder(tmp_path)
    save_file({key: value for key, value in tensors.items() if key != "cls_token"}, tmp_path / "model.safetensors")
    with pytest.raises(IntegrityError, match=r"has no tensor 'cls_token'"):
        load_encoder(tmp_path)


def test_an_export_of_the_first_version_is_still_opened(own, tmp_path):
    exporter.export(ask(own, modality="ct"), tmp_path / "out")
    (tmp_path / "out" / "MANIFEST.sha256").unlink()
    path = tmp_path / "out" / "contract.json"
    contract = json.loads(path.read_text())
    taken = contract.pop("input")
    contract["timm"] = {
        key: taken[key] for key in ("layout", "size", "patch", "spacing")
    }  # what the section was called
    path.write_text(json.dumps(contract))
    assert load_encoder(tmp_path / "out").spec.patch_3d == (2, 8, 4)


def test_a_layout_that_is_not_the_models_is_refused(own, tmp_path):
    exporter.export(ask(own, modality="ct"), tmp_path / "out")
    (tmp_path / "out" / "MANIFEST.sha256").unlink()
    path = tmp_path / "out" / "contract.json"
    contract = json.loads(path.read_text())
    contract["input"]["size"] = [6, 16, 16]
    path.write_text(json.dumps(contract))
    with pytest.raises(
        IntegrityError, match=r"presents volumes \(6, 16, 16\) with patch \(2, 8, 4\), the model others"
    ):
        load_encoder(tmp_path / "out")
    contract["input"]["size"] = "6"
    path.write_text(json.dumps(contract))
    with pytest.raises(ConfigError, match=r"section input of contract.json lacks size or patch"):
        load_encoder(tmp_path / "out")


def test_nothing_is_allocated_for_the_model_that_timm_builds():
    from geomed_mae.models.foreign import timm as reader

    arguments = {"embed_dim": 16384, "depth": 200, "num_heads": 128}
    model = reader._model(reader.Path("x"), {"architecture": "vit_giant_patch14_224", "model_args": arguments})
    assert isinstance(model, timm.models.VisionTransformer) and all(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", ["config.json", "contract.json"])
def test_no_value_that_a_folder_may_hold_is_a_crash(own, tmp_path, name):
    exporter.export(ask(own, modality="ct"), tmp_path / "out")
    (tmp_path / "out" / "MANIFEST.sha256").unlink()
    path = tmp_path / "out" / name
    text = path.read_text()

    def places(node, here=()):
        yield here
        items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        for key, value in items:
            yield from places(value, (*here, key))

    for place in places(json.loads(text)):
        for junk in (None, True, -1, 2, 10**400, float("nan"), "../x", [1], {"a": 1}):
            whole = node = {"top": json.loads(text)}
            *way, last = ("top", *place)
            for key in way:
                node = node[key]
            node[last] = junk
            path.write_text(json.dumps(whole["top"]))
            with contextlib.suppress(GeomedError):
                load_encoder(tmp_path / "out")
