"""Hugging Face ViTMAE folders: the features of transformers itself, in every spelling, or a refusal with a reason."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import ViTImageProcessor, ViTMAEModel

from geomed_mae.errors import ConfigError, IntegrityError, SecurityError
from geomed_mae.export import export
from geomed_mae.image import Image, PlaneGeometry
from geomed_mae.modalities import load_modality
from geomed_mae.models.encoder_folder import load_encoder
from tests.make_published import vit_mae

RGB = load_modality("rgb")


def picture(size=(32, 32)) -> Image:
    array = np.random.default_rng(0).integers(0, 256, (3, *size)).astype(np.float32)
    return Image(array, np.ones((1, *size), bool), RGB.channels, PlaneGeometry(), "rgb")


def saved(folder, **changes):
    theirs = vit_mae(**changes)
    theirs.save_pretrained(folder, safe_serialization=True)
    return theirs


def tokens_of(theirs, pixels):
    """Return transformers' tokens of whole images, in grid order."""
    theirs.config.mask_ratio = 0.0
    noise = torch.arange(theirs.vit.embeddings.position_embeddings.shape[1] - 1.0).expand(len(pixels), -1)
    with torch.no_grad():
        return theirs.vit(pixels, noise=noise).last_hidden_state


def assert_same_tokens(encoder, theirs):
    size = theirs.config.image_size
    pixels = torch.randn(2, 3, *((size, size) if isinstance(size, int) else size))
    assert encoder.spec.norm_eps == theirs.config.layer_norm_eps
    with torch.no_grad():
        ours = encoder.module(pixels, torch.ones_like(pixels, dtype=torch.bool), RGB.channels).tokens
    torch.testing.assert_close(ours, tokens_of(theirs, pixels), atol=1e-4, rtol=0)


def rewrite(folder, change):
    """Let `change` edit the stored tensors."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(dict(tensors)) or tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    "changes", [{}, {"layer_norm_eps": 1e-12}, {"layer_norm_eps": 1e-5}, {"image_size": 40}, {"qkv_bias": False}]
)
def test_features_are_those_of_transformers(tmp_path, changes):
    theirs = saved(tmp_path, **changes)
    encoder = load_encoder(tmp_path)
    assert encoder.spec.learned_positions is None and not encoder.module.training
    assert_same_tokens(encoder, theirs)


def test_a_model_without_its_decoder_has_the_same_features(tmp_path):
    theirs = vit_mae()
    alone = ViTMAEModel(theirs.config)
    alone.load_state_dict(theirs.vit.state_dict())
    alone.save_pretrained(tmp_path, safe_serialization=True)
    encoder = load_encoder(tmp_path)
    assert encoder.origin.decoder is None
    assert_same_tokens(encoder, theirs)


def test_shards_hold_the_tensors_that_one_file_holds(tmp_path):
    theirs = vit_mae()
    theirs.save_pretrained(tmp_path / "one", safe_serialization=True)
    theirs.save_pretrained(tmp_path / "many", max_shard_size="50KB")
    assert not (tmp_path / "many" / "model.safetensors").exists()
    one, many = (load_encoder(tmp_path / name).module.state_dict() for name in ("one", "many"))
    assert all(torch.equal(one[name], many[name]) for name in one)


def older(name):
    """Return the name that folders on the hub have (transformers 4)."""
    return name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")


def newer(name):
    """Return the name of the modules of transformers 5."""
    for old, new in (
        ("vit.encoder.layer.", "vit.layers."),
        ("decoder.decoder_encoder.layer.", "decoder.decoder_layers."),
        ("attention.attention.query", "attention.q_proj"),
        ("attention.attention.key", "attention.k_proj"),
        ("attention.attention.value", "attention.v_proj"),
        ("attention.output.dense", "attention.o_proj"),
        ("intermediate.dense", "mlp.fc1"),
        ("output.dense", "mlp.fc2"),
    ):
        name = name.replace(old, new)
    return name


@pytest.mark.parametrize("spelling", [older, newer])
def test_every_spelling_of_tensors_is_read(tmp_path, spelling):
    theirs = saved(tmp_path)
    plain = load_encoder(tmp_path)
    rewrite(tmp_path, lambda tensors: {spelling(name): tensor for name, tensor in tensors.items()})
    assert any("decoder.decoder_layers.0" in name for name in load_file(tmp_path / "model.safetensors"))
    if spelling is newer:
        assert set(load_file(tmp_path / "model.safetensors")) == set(theirs.state_dict())
    encoder = load_encoder(tmp_path)
    for name, tensor in plain.module.state_dict().items():
        assert torch.equal(tensor, encoder.module.state_dict()[name])
    for name, tensor in plain.origin.decoder.tensors.items():
        assert torch.equal(tensor, encoder.origin.decoder.tensors[name])


def test_learned_positions_are_kept_and_the_class_token_gets_its_own(tmp_path):
    theirs = vit_mae()
    torch.nn.init.normal_(theirs.vit.embeddings.position_embeddings)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    encoder = load_encoder(tmp_path)
    assert encoder.spec.learned_positions == (4, 4)
    assert_same_tokens(encoder, theirs)
    assert np.isfinite(encoder.features(picture((24, 40))).array).all()


def test_half_precision_is_read_as_its_values(tmp_path):
    theirs = vit_mae().to(torch.bfloat16)
    theirs.save_pretrained(tmp_path, safe_serialization=True)
    encoder = load_encoder(tmp_path)
    assert encoder.spec.learned_positions is None and encoder.module.cls_token.dtype == torch.float32
    assert torch.equal(encoder.module.norm.weight, theirs.vit.layernorm.weight.float())


def test_loading_is_repeatable_and_leaves_the_random_state_alone(tmp_path):
    saved(tmp_path)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, other = load_encoder(tmp_path), load_encoder(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    states = one.module.state_dict(), other.module.state_dict()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_an_image_is_scaled_as_the_preprocessor_does(tmp_path):
    theirs = saved(tmp_path)
    processor = ViTImageProcessor(
        image_mean=[0.2, 0.5, 0.7], image_std=[0.3, 0.2, 0.1], do_resize=False, input_data_format="channels_first"
    )
    processor.save_pretrained(tmp_path)
    image = picture()
    pixels = processor(torch.from_numpy(image.array.astype(np.uint8)), return_tensors="pt")["pixel_values"]
    wanted = tokens_of(theirs, pixels)[0, 1:]
    encoder = load_encoder(tmp_path)
    np.testing.assert_allclose(encoder.features(image).array.reshape(48, -1).T, wanted, atol=1e-4)
    np.testing.assert_allclose(encoder.embed(image), wanted.mean(0), atol=1e-4)


def test_without_a_preprocessor_the_numbers_are_those_of_imagenet_and_the_log_says_so(tmp_path, caplog):
    saved(tmp_path)
    with caplog.at_level("INFO", logger="geomed_mae"):
        contract = load_encoder(tmp_path).contract
    assert "does not say how its images were scaled; ImageNet's" in caplog.text
    assert contract.channels[0].center == pytest.approx(123.675) and contract.channels[2].scale == pytest.approx(57.375)
    assert [entry.channel.name for entry in contract.channels] == ["red", "green", "blue"]
    assert contract.crop_2d == (32, 32) and {entry.modality for entry in contract.channels} == {"rgb"}


@pytest.mark.parametrize(
    ("found", "center", "scale"),
    [
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "rescale_factor": 1 / 127.5}, 63.75, 63.75),
        ({"image_mean": [120.0] * 3, "image_std": [60.0] * 3, "do_rescale": False}, 120, 60),
        ({"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "do_normalize": False}, 0, 255),
    ],
)
def test_what_a_preprocessor_switches_off_is_off(tmp_path, found, center, scale):
    saved(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(found))
    entry = load_encoder(tmp_path).contract.channels[1]
    assert (entry.center, entry.scale) == (pytest.approx(center), pytest.approx(scale))


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
def test_the_export_to_timm_of_a_hugging_face_model_works(tmp_path, caplog, eps):
    saved(tmp_path / "hf", layer_norm_eps=eps)
    result = export(tmp_path / "hf", "timm", tmp_path / "timm")
    assert result["largest_relative_difference"] < 1e-5 and result["input_size"] == [3, 32, 32]
    one, other = load_encoder(tmp_path / "hf"), load_encoder(tmp_path / "timm")
    np.testing.assert_allclose(one.embed(picture()), other.embed(picture()), atol=1e-4)
    assert ("LayerNorms have epsilon 1e-12 and timm's 1e-06" in caplog.text) == (eps == 1e-12)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"hidden_act": "quick_gelu"}, r"has hidden_act 'quick_gelu', which cannot be represented; supported: gelu"),
        ({"layer_norm_eps": 0.1}, r"has layer_norm_eps 0.1, .*; supported: 0 to 1e-3"),
        ({"intermediate_size": 96}, r"has intermediate_size 96, .*; supported: 4 x hidden_size = 192"),
        ({"num_attention_heads": 5}, r"has num_attention_heads 5, .*a divisor of hidden_size 48"),
        ({"head_dim": 8}, r"has head_dim 8"),
        ({"hidden_size": 10**9}, r"hidden_size is 1000000000, not a whole number from 1 to 16384"),
        ({"num_hidden_layers": "2"}, r"num_hidden_layers is '2', not a whole number"),
        ({"patch_size": 64}, r"images of \[32, 32\] pixels hold no patch of \[64, 64\]"),
        ({"num_channels": 4}, r"takes 4 channels and does not say which. Put a contract.json into it"),
        ({"model_type": "vit"}, r"has model_type 'vit' and no timm architecture. Known are"),
    ],
)
def test_what_does_not_map_exactly_is_refused_with_the_setting(tmp_path, changes, text):
    saved(tmp_path)
    configure(tmp_path, **changes)
    with pytest.raises(ConfigError, match=text):
        load_encoder(tmp_path)


def without(name):
    return lambda tensors: {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (without("vit.layernorm.weight"), r"has no tensor 'vit.layernorm.weight', which its config.json asks for"),
        (
            without("vit.encoder.layer.1.attention.attention.key.bias"),
            r"has no tensor 'vit.encoder.layer.1.attention.attention.key.bias'",
        ),
        (without("decoder.mask_token"), r"has no tensor 'decoder.mask_token'"),
        (
            lambda tensors: tensors | {"vit.pooler.weight": torch.zeros(2)},
            r"tensor 'vit.pooler.weight' \(and 0 more\) belongs to no part of the model",
        ),
        (
            lambda tensors: tensors | {"vit.layernorm.bias": torch.zeros(47)},
            r"tensor 'vit.layernorm.bias' has shape \[47\], config.json asks for \[48\]",
        ),
        (
            lambda tensors: tensors | {"vit.layernorm.bias": torch.full((48,), float("nan"))},
            r"tensor 'vit.layernorm.bias' holds values that are no finite numbers",
        ),
        (
            lambda tensors: tensors | {"vit.layernorm.bias": torch.zeros(48, dtype=torch.int8)},
            r"tensor 'vit.layernorm.bias' is stored as I8",
        ),
    ],
)
def test_a_tensor_that_is_missing_left_over_or_damaged_is_named(tmp_path, change, text):
    saved(tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(IntegrityError, match=text):
        load_encoder(tmp_path)


def test_a_model_that_config_makes_larger_than_its_file_is_refused_before_it_is_built(tmp_path, monkeypatch):
    saved(tmp_path)
    configure(tmp_path, hidden_size=16384, intermediate_size=65536, num_hidden_layers=256, num_attention_heads=16)
    monkeypatch.setattr("geomed_mae.models.foreign.fixed.Encoder", None)
    with pytest.raises(IntegrityError, match=r"has shape \[48, 3, 8, 8\], config.json asks for \[16384, 3, 8, 8\]"):
        load_encoder(tmp_path)


def test_a_damaged_file_is_named(tmp_path):
    saved(tmp_path)
    data = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(IntegrityError, match=r"model.safetensors is no whole safetensors file"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("[" * 100000)
    with pytest.raises(IntegrityError, match=r"config.json is not JSON"):
        load_encoder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(IntegrityError, match=r"config.json holds no JSON object"):
        load_encoder(tmp_path)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "pytorch_model.bin", 3])
def test_an_index_cannot_point_outside_or_to_a_pickle(tmp_path, file):
    vit_mae().save_pretrained(tmp_path, max_shard_size="50KB")
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    index["weight_map"]["vit.layernorm.weight"] = file
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(IntegrityError, match=r"which is no plain safetensors file"):
        load_encoder(tmp_path)


def test_code_that_a_folder_names_is_never_looked_at(tmp_path):
    theirs = saved(tmp_path)
    configure(tmp_path, auto_map={"AutoModel": "evil.Model"}, trust_remote_code=True)
    (tmp_path / "evil.py").write_text("raise SystemExit('executed')")
    assert_same_tokens(load_encoder(tmp_path), theirs)


def test_a_pickled_folder_is_refused_with_the_way_to_convert_it(tmp_path):
    saved(tmp_path)
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(SecurityError, match=r"save_pretrained\(DIR, safe_serialization=True\).*save_for_hf"):
        load_encoder(tmp_path)


def test_other_channels_are_described_by_a_contract_in_the_folder(tmp_path):
    saved(tmp_path, num_channels=2)
    entry = {"modality": "sentinel1", "method": "fixed", "center": -10.0, "scale": 5.0, "noise_floor": 0.1}
    channels = [
        {**entry, "channel": {"name": name, "kind": "sar", "unit": "dB", "polarisation": name}} for name in ("VV", "VH")
    ]
    (tmp_path / "contract.json").write_text(json.dumps({"channels": channels, "crop_2d": [32, 32]}))
    encoder = load_encoder(tmp_path)
    assert [entry.channel.name for entry in encoder.contract.of("sentinel1")] == ["VV", "VH"]
    (tmp_path / "contract.json").write_text(json.dumps({"channels": channels[:1]}))
    with pytest.raises(ConfigError, match=r"describes 1 channels of 1 modalities, the model takes 2 of one"):
        load_encoder(tmp_path)
    for key, value in (("scale", 0), ("center", "x"), ("modality", {}), ("value_range", [0])):
        (tmp_path / "contract.json").write_text(json.dumps({"channels": [channels[0] | {key: value}, channels[1]]}))
        with pytest.raises(ConfigError, match=rf"contract.json has {key} .*, which is no such thing"):
            load_encoder(tmp_path)
    (tmp_path / "contract.json").write_text(json.dumps({"channels": ["VV", "VH"]}))
    with pytest.raises(ConfigError, match=r"contract.json lists no channels"):
        load_encoder(tmp_path)
