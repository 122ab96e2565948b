"""Export to Hugging Face ViTMAE: the encoder, and on request the whole masked autoencoder, for transformers.

With `--decoder` the folder opens as `ViTMAEForPreTraining` (AutoModelForPreTraining), encoder and decoder of the run's
newest checkpoint; without it as `ViTMAEModel` (AutoModel), which then hides nothing. Tensors have the names of folders
on the hub, which transformers 4 and 5 read (all spellings: models.foreign.huggingface).

What ViTMAE is decides what can be mapped: 2D images, square, of square patches; a decoder of self-attention (`mode:
exact`), whose pixel predictions are taken and whose predictions of each patch's mean and spread are left.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save as tensor_bytes
from torch import Tensor, nn

from geomed_mae.errors import ConfigError, MissingExtraError
from geomed_mae.exporters.card import CONTRACT, NORMALISED, README, contract_json, model_card
from geomed_mae.exporters.folder import building, carry_record, outcome
from geomed_mae.exporters.proof import TOLERANCE, Trial, clipped, ours, prove, prove_contract, trial
from geomed_mae.exporters.request import Request
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import MaskPlan
from geomed_mae.models.patch_embed import mixed

TAKES = ("encoder",)
DECODER = True
"""Takes --decoder."""

EIGHT_BIT = (0.0, 255.0)
"""Range of values that image processors divide by 255 first."""

FEATURES = 1e-4
"""Tolerance of features: attention is computed in another order there."""

PARTS = {
    "norm1": "layernorm_before",
    "attn.proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
}
"""Parts of a block under timm's names, and under the hub's."""

log = logging.getLogger(__name__)


def export(request: Request, out: Path) -> dict[str, Any]:
    """Write `out` as the folder of a ViTMAE, open it with transformers, and compare.

    Returns:
        folder, files, architecture, channels, input_size, `decoder` (whether it is there, and if not why), parity of
        the features, and `decoder_parity` of the predicted pixels, and of the loss where it has one meaning in both.

    Raises:
        ConfigError: volumes, patches or images that are not square, a decoder that ViTMAE does not have.
        MissingExtraError: transformers is not installed.
        IntegrityError: transformers computes something else; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    _check(request)
    given, whole = trial(request), request.mae is not None
    config = _config(request)
    tensors = dict(_encoder(request, "vit." if whole else ""))
    if request.mae is not None:
        tensors |= dict(_decoder(request, request.mae))
    with building(out) as folder:
        (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        plain = {name: tensor.detach().float().cpu().contiguous().clone() for name, tensor in tensors.items()}
        (folder / "model.safetensors").write_bytes(tensor_bytes(plain, metadata={"format": "pt"}))
        contract = contract_json(request, values=NORMALISED, layout="c y x")
        (folder / CONTRACT).write_text(json.dumps(contract, indent=2), encoding="utf-8")
        if (processor := _processor(request)) is not None:
            (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2), encoding="utf-8")
        (folder / README).write_text(_card(request), encoding="utf-8")
        carry_record(request, folder)
        prove_contract("hf-vitmae", folder, request)
        if processor is not None:
            _prove_processor(request, folder, given)
        proven = _prove(request, folder, given)
    return outcome(request, out, architecture=config["architectures"][0], **proven)


def _check(request: Request) -> None:
    """Refuse what ViTMAE cannot be.

    Raises:
        ConfigError, MissingExtraError: see `export`.
    """
    if len(request.size) != 2:
        raise ConfigError(
            "ViTMAE takes 2D images, not volumes; --to timm, onnx, torch or monai-bundle take them, and an encoder "
            "that knows images too exports with --size ROWS,COLUMNS"
        )
    for what, (rows, columns), way_out in (
        ("images", request.size, "choose a square --size"),
        ("patches", request.patch, "--to timm takes them"),
    ):
        if rows != columns:
            raise ConfigError(f"ViTMAE takes square {what}, not {rows} x {columns}; {way_out}")
    if request.mae is not None and request.mae.spec.mode != "exact":
        raise ConfigError(
            "--decoder: this run was trained with model.mode=fast, whose decoder of cross-attention ViTMAE does not "
            "have; leave --decoder out for the encoder alone, or pretrain with model.mode=exact"
        )
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("--to hf-vitmae", "transformers", "export") from error


def _config(request: Request) -> dict[str, Any]:
    """Return config.json. An encoder alone hides nothing, whatever its training hid."""
    spec, mae = request.encoder.spec, request.mae
    decoder = {
        "decoder_hidden_size": spec.decoder_dim,
        "decoder_num_hidden_layers": spec.decoder_depth,
        "decoder_num_attention_heads": spec.decoder_heads,
        "decoder_intermediate_size": 4 * spec.decoder_dim,
    }
    return {
        "model_type": "vit_mae",
        "architectures": ["ViTMAEModel" if mae is None else "ViTMAEForPreTraining"],
        "hidden_size": spec.dim,
        "num_hidden_layers": spec.depth,
        "num_attention_heads": spec.heads,
        "intermediate_size": 4 * spec.dim,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": spec.norm_eps,
        "image_size": request.size[0],
        "patch_size": request.patch[0],
        "num_channels": len(request.entries),
        "qkv_bias": True,
        "mask_ratio": 0.0 if mae is None else request.mask_ratio,
        "norm_pix_loss": mae is not None and mae.spec.target == "patch",
        **({} if mae is None else decoder),
    }


def _encoder(request: Request, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the encoder's tensors under the hub's names."""
    module = request.encoder.module
    spacing = None if request.spacing is None else torch.tensor([request.spacing], dtype=torch.float64)
    with torch.no_grad():
        weight, bias = module.patch_embed.fold(request.channels, request.patch)
        table = module.positions(request.grid, request.channels, spacing).cpu()
    yield f"{stem}embeddings.cls_token", module.cls_token
    # The class token has no position of its own.
    yield f"{stem}embeddings.position_embeddings", nn.functional.pad(table, (0, 0, 1, 0))
    yield f"{stem}embeddings.patch_embeddings.projection.weight", weight
    yield f"{stem}embeddings.patch_embeddings.projection.bias", bias
    yield from _blocks(module.blocks, f"{stem}encoder.layer.")
    yield f"{stem}layernorm.weight", module.norm.weight
    yield f"{stem}layernorm.bias", module.norm.bias


def _decoder(request: Request, mae: MaskedAutoencoder) -> Iterator[tuple[str, Tensor]]:
    """Yield the decoder's tensors under the hub's names; of its heads, the pixels of the request's channels."""
    decoder = mae.decoder
    spacing = None if request.spacing is None else torch.tensor([request.spacing], dtype=torch.float64)
    with torch.no_grad():
        first, table = decoder.positions(request.grid, request.channels, spacing, torch.device("cpu"))
        coefficients = decoder.heads.codes(request.channels)
        weight = mixed(coefficients, decoder.heads.filters["2d"])[:, :-2]  # c p d, without mean and log sigma
        bias = mixed(coefficients, decoder.heads.bias["2d"])[:, :-2]
    yield "decoder.mask_token", decoder.mask_token
    yield "decoder.decoder_pos_embed", torch.cat([first, table], dim=1)
    yield "decoder.decoder_embed.weight", decoder.embed.weight
    yield "decoder.decoder_embed.bias", decoder.embed.bias
    yield from _blocks(decoder.blocks, "decoder.decoder_layers.")
    yield "decoder.decoder_norm.weight", decoder.norm.weight
    yield "decoder.decoder_norm.bias", decoder.norm.bias
    # Published order of a patch's predictions: row, column, channel.
    yield "decoder.decoder_pred.weight", weight.transpose(0, 1).flatten(0, 1)
    yield "decoder.decoder_pred.bias", bias.T.flatten()


def _blocks(blocks: nn.ModuleList, stem: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of timm's blocks under the hub's names; query, key and value apart."""
    for number, block in enumerate(blocks):
        tensors = block.state_dict()
        for kind in ("weight", "bias"):
            for name, part in zip(("query", "key", "value"), tensors[f"attn.qkv.{kind}"].chunk(3), strict=True):
                yield f"{stem}{number}.attention.attention.{name}.{kind}", part
            for name, theirs in PARTS.items():
                yield f"{stem}{number}.{theirs}.{kind}", tensors[f"{name}.{kind}"]


def _processor(request: Request) -> dict[str, Any] | None:
    """Return preprocessor_config.json, which transformers has a meaning for with three fixed channels alone."""
    if len(request.entries) != 3 or request.per_image:
        return None
    bits = all(entry.value_range == EIGHT_BIT for entry in request.entries)
    unit = 255.0 if bits else 1.0
    rows, columns = request.size
    return {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": rows, "width": columns},
        "resample": 3,  # bicubic
        "do_rescale": bits,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [entry.center / unit for entry in request.entries],
        "image_std": [entry.scale / unit for entry in request.entries],
    }


def _prove_processor(request: Request, folder: Path, given: Trial) -> None:
    """Hold what transformers' image processor makes of images against model units."""
    import transformers

    processor = transformers.ViTImageProcessor.from_pretrained(folder, local_files_only=True)
    images = list(clipped(request, given).numpy())
    prove(
        "hf-vitmae",
        given.normalised,
        processor(images, input_data_format="channels_first", return_tensors="pt")["pixel_values"],
        runtime=f"transformers {transformers.__version__}",
        compared="what the image processor makes of images",
    )


@torch.inference_mode()
def _prove(request: Request, folder: Path, given: Trial) -> dict[str, Any]:
    """Open the folder with transformers and hold its features, and its reconstruction, against ours."""
    import transformers

    runtime = f"transformers {transformers.__version__}"
    whole = request.mae is not None
    kind = transformers.ViTMAEForPreTraining if whole else transformers.ViTMAEModel
    shows_progress = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()  # a bar of its own in the middle of ours
    try:
        model, info = kind.from_pretrained(folder, output_loading_info=True, local_files_only=True)
    finally:
        if shows_progress:
            transformers.utils.logging.enable_progress_bar()
    model.eval()
    if unknown := sorted([*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]], key=str):
        raise ConfigError(f"{runtime} knows the tensors of a ViTMAE by other names: {unknown[:3]}; use another release")
    count = request.grid[0] * request.grid[1]
    order = torch.arange(float(count)).expand(len(given.normalised), -1)  # noise that hides nothing out of order
    vit = model.vit if whole else model
    vit.config.mask_ratio = 0.0
    parity = prove(
        "hf-vitmae",
        ours(request, given).tokens,
        vit(given.normalised, noise=order).last_hidden_state,
        runtime=runtime,
        compared=f"tokens of {given.source} and of noise",
        tolerance=FEATURES,
    )
    if request.mae is None:
        return {"decoder": False, "parity": parity}
    vit.config.mask_ratio = request.mask_ratio
    return {"decoder": True, "parity": parity, "decoder_parity": _prove_decoder(request, request.mae, model, given)}


def _prove_decoder(request: Request, mae: MaskedAutoencoder, model: nn.Module, given: Trial) -> dict[str, Any]:
    """Hold the predicted pixels of the same hidden patches, and the loss, against ours."""
    import transformers

    pixels, count = given.normalised, request.grid[0] * request.grid[1]
    noise = torch.rand(len(pixels), count, generator=torch.Generator().manual_seed(0))
    keep = int(count * (1 - request.mask_ratio))  # as transformers counts
    order = noise.argsort(dim=1)
    plan = MaskPlan(order[:, :keep], order[:, keep:])
    valid = torch.ones_like(pixels, dtype=torch.bool)
    spacing = None if request.distance is None else torch.tensor([request.distance] * len(pixels))
    floor = torch.tensor([entry.noise_floor for entry in request.entries])
    mine = mae(pixels, valid, request.channels, spacing, plan, floor=floor)
    theirs = model(pixels, noise=noise)
    hidden = theirs.logits.gather(1, plan.asked[..., None].expand(-1, -1, theirs.logits.shape[-1]))
    runtime = f"transformers {transformers.__version__}"
    found = prove(
        "hf-vitmae",
        mine.prediction.pixels.transpose(2, 3).flatten(2),  # b h (p c)
        hidden,
        runtime=runtime,
        compared=f"predicted pixels of {given.source} and of noise, {request.mask_ratio:g} hidden",
        tolerance=FEATURES,
    )
    if mae.spec.target == "patch_channel":
        return found  # transformers' loss normalises targets over all channels of a patch together
    loss = prove(
        "hf-vitmae",
        mine.parts["pixels"][None],
        theirs.loss[None],
        runtime=runtime,
        compared="loss over hidden patches",
        tolerance=TOLERANCE,
    )
    return {**found, "loss_relative_difference": loss["largest_relative_difference"]}


def _card(request: Request) -> str:
    """Return README.md: how to open the model and how to feed it."""
    rows, columns = request.size
    shape = f"{len(request.entries)}, {rows}, {columns}"
    count = request.grid[0] * request.grid[1]
    if request.mae is None:
        opening = f"""\
A vision transformer as transformers' ViTMAEModel, without decoder; it hides nothing.

    import torch
    from transformers import AutoModel
    model = AutoModel.from_pretrained("/path/to/this/folder").eval()
    order = torch.arange({count}.0)[None].expand(len(x), -1)           # x: (batch, {shape})
    tokens = model(x, noise=order).last_hidden_state   # class token first, then patches in row-major order

Without `noise` transformers shuffles the patches: their mean stays the same, their places do not."""
    else:
        trained = {
            "patch": "The loss is that of its pretraining: targets normalised over all channels of a patch.",
            "none": "The loss is that of its pretraining: targets are not normalised.",
            "patch_channel": "Pixels are predicted normalised per patch *and channel*, which transformers has no word "
            "for: the predictions are those of pretraining, `loss` is not. Fine-tune with a loss of your own.",
        }[request.mae.spec.target]
        opening = f"""\
A whole masked autoencoder, encoder and decoder, as transformers' ViTMAEForPreTraining.

    from transformers import AutoModelForPreTraining
    model = AutoModelForPreTraining.from_pretrained("/path/to/this/folder").eval()
    out = model(x)                         # x: (batch, {shape}); out.logits: predicted pixels of every patch

For features of whole images open the encoder, which then hides nothing:

    import torch
    from transformers import AutoModel
    model = AutoModel.from_pretrained("/path/to/this/folder", mask_ratio=0.0).eval()
    order = torch.arange({count}.0)[None].expand(len(x), -1)   # without it transformers shuffles the patches
    tokens = model(x, noise=order).last_hidden_state

{trained} The decoder's predictions of each patch's mean and spread, where it was trained with them, are not in here."""
    notes = []
    if _processor(request) is not None:
        notes.append("`ViTImageProcessor.from_pretrained` scales images as the table says; it does not clip them.")
    return model_card(
        request,
        title=f"ViTMAE, {'x'.join(map(str, (len(request.entries), *request.size)))}, exported by geomed-mae",
        opening=opening,
        library="transformers",
        tags=["transformers", "vit_mae"],
        values=NORMALISED,
        notes=notes,
    )
