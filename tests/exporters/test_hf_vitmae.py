"""The Hugging Face export: transformers' ViTMAE with the same features, and with its decoder the same answers."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import geomed_mae.exporters.hf_vitmae as exporter
from geomed_mae.archives.seen import Seen
from geomed_mae.errors import ConfigError, IntegrityError, MissingExtraError
from geomed_mae.exporters.proof import ours, trial
from geomed_mae.exporters.request import Request, ask
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.masking import MaskPlan
from geomed_mae.models.pretrained import PretrainedEncoder
from tests.consumer import elsewhere
from tests.exporters.given import autoencoder, contract, encoder

BANDS = ["B04", "B03", "B02", "B08"]


def whole(*, target: str = "patch", mask_ratio: float = 0.75, spacing=None, **changes) -> Request:
    """A request for an autoencoder with its decoder."""
    mae = autoencoder(target=target, **changes)
    source = PretrainedEncoder(mae.encoder, contract())
    return ask(source, mae=mae, mask_ratio=mask_ratio, modality="sentinel2-l2a", channels=BANDS, spacing=spacing)


@pytest.mark.parametrize(
    ("target", "more"),
    [("patch", {}), ("none", {"norm_eps": 1e-12, "mask_ratio": 0.5}), ("patch_channel", {"reference_gsd_m": 10.0})],
)
def test_a_whole_autoencoder_predicts_the_same_pixels_in_transformers(tmp_path, target, more):
    request = whole(target=target, **more)
    result = exporter.export(request, tmp_path / "out")
    assert result["decoder"] and result["architecture"] == "ViTMAEForPreTraining"
    assert result["parity"]["largest_relative_difference"] < 1e-4
    assert result["decoder_parity"]["largest_relative_difference"] < 1e-4
    # Targets that are normalised per channel are none of transformers': no loss is compared, and the card says so.
    assert ("loss_relative_difference" in result["decoder_parity"]) == (target != "patch_channel")
    assert result["decoder_parity"].get("loss_relative_difference", 0) < 1e-5
    card = (tmp_path / "out" / "README.md").read_text()
    assert ("`loss` is not" in card) == (target == "patch_channel")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert load_encoder(tmp_path / "out").origin.decoder is not None
    assert config["norm_pix_loss"] == (target == "patch") and config["layer_norm_eps"] == more.get("norm_eps", 1e-6)


def test_a_missing_transformers_is_named_with_its_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(
        MissingExtraError, match=r"--to hf-vitmae needs the package 'transformers'.*geomed-mae\[export\]"
    ):
        exporter.export(ask(encoder(), modality="rgb"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_transformers_opens_both_kinds_where_this_package_is_not_installed(tmp_path):
    request = whole(spacing=(20.0, 20.0), reference_gsd_m=10.0)
    exporter.export(request, tmp_path / "mae")
    red_green_blue = ask(encoder(), modality="rgb")
    exporter.export(red_green_blue, tmp_path / "rgb")
    given, other = trial(request), trial(red_green_blue)
    noise = torch.rand(2, 16)
    order = noise.argsort(dim=1)
    with torch.inference_mode():
        loss = request.mae(
            given.normalised,
            torch.ones_like(given.raw, dtype=torch.bool),
            request.channels,
            torch.tensor([request.spacing] * 2),
            MaskPlan(order[:, :4], order[:, 4:]),
            floor=torch.full((4,), 0.05),
        )
    stored = {"x": given.normalised, "noise": noise, "tokens": ours(request, given).tokens}
    stored |= {
        "rgb": other.raw[:1],
        "rgb_scaled": other.normalised[:1],
        "rgb_tokens": ours(red_green_blue, other).tokens,
    }
    torch.save(stored, tmp_path / "given.pt")
    found = elsewhere(
        """
        import json, sys
        import numpy as np, torch
        from transformers import AutoModel, AutoModelForPreTraining, ViTImageProcessor
        given = torch.load(sys.argv[3], weights_only=True)
        order = torch.arange(16.0).expand(2, -1)
        with torch.inference_mode():
            mae = AutoModelForPreTraining.from_pretrained(sys.argv[1]).eval()
            alone = AutoModel.from_pretrained(sys.argv[1], mask_ratio=0.0).eval()
            rgb = AutoModel.from_pretrained(sys.argv[2]).eval()
            processor = ViTImageProcessor.from_pretrained(sys.argv[2])
            scaled = processor(given["rgb"][0].numpy().astype(np.uint8), return_tensors="pt")["pixel_values"]
            whole = given["rgb"].floor().sub(given["rgb"]) / 64 + given["rgb_scaled"]
            found = {
                "kinds": [type(model).__name__ for model in (mae, alone, rgb)],
                "loss": float(mae(given["x"], noise=given["noise"]).loss),
                "tokens": float((alone(given["x"], noise=order).last_hidden_state - given["tokens"]).abs().max()),
                "rgb": float((rgb(given["rgb_scaled"], noise=order[:1]).last_hidden_state
                              - given["rgb_tokens"][:1]).abs().max()),
                "scaled": float((scaled - whole).abs().max()),
            }
        print(json.dumps(found))
        """,
        tmp_path / "mae",
        tmp_path / "rgb",
        tmp_path / "given.pt",
    )
    assert found["kinds"] == ["ViTMAEForPreTraining", "ViTMAEModel", "ViTMAEModel"]
    assert found["loss"] == pytest.approx(loss.parts["pixels"].item(), rel=1e-5)
    assert found["tokens"] < 1e-4 and found["rgb"] < 1e-4 and found["scaled"] < 1e-5


def test_this_package_opens_what_it_wrote(tmp_path):
    seen = Seen.unknown()
    request = ask(encoder(seen=seen), modality="sentinel2-l2a", channels=BANDS)
    result = exporter.export(request, tmp_path / "out")
    assert "pretrained_on.json" in result["files"] and result["decoder"] is False
    again = load_encoder(tmp_path / "out")
    assert [entry.channel for entry in again.contract.channels] == list(request.channels)
    given = trial(request)
    other = ask(again, modality="sentinel2-l2a")
    assert torch.allclose(ours(request, given).tokens, ours(other, given).tokens, atol=1e-5)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: ask(encoder(), modality="ct"), "takes 2D images, not volumes; --to timm, onnx, torch or monai-bundle"),
        (lambda: ask(encoder(patch_2d=(8, 4)), modality="rgb"), "takes square patches, not 8 x 4; --to timm"),
        (lambda: ask(encoder(), modality="rgb", size=(32, 16)), "takes square images, not 32 x 16; choose a square"),
        (lambda: whole(mode="fast"), "trained with model.mode=fast, whose decoder of cross-attention"),
    ],
)
def test_what_a_vitmae_cannot_be_is_refused_with_a_way_out(tmp_path, made, said):
    with pytest.raises(ConfigError, match=said):
        exporter.export(made(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_image_processor_that_scales_otherwise_leaves_nothing_behind(tmp_path, monkeypatch):
    true = exporter._processor
    monkeypatch.setattr(exporter, "_processor", lambda request: {**true(request), "do_rescale": False})
    with pytest.raises(IntegrityError, match="differs from the model"):
        exporter.export(ask(encoder(), modality="rgb"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damaged", ["vit.layernorm.bias", "decoder.mask_token", "decoder.decoder_pred.weight"])
def test_a_mismatch_in_encoder_or_decoder_leaves_nothing_behind(tmp_path, monkeypatch, damaged):
    kind = "_encoder" if damaged.startswith("vit.") else "_decoder"
    true = getattr(exporter, kind)

    def spoilt(*args):
        for name, tensor in true(*args):
            yield name, tensor.roll(1, -1) if name == damaged else tensor

    monkeypatch.setattr(exporter, kind, spoilt)
    with pytest.raises(IntegrityError, match="the hf-vitmae export, opened in transformers .* differs from the model"):
        exporter.export(whole(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
