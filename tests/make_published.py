"""Folders of transformers and timm models with random weights, written by those libraries themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from transformers import ViTMAEConfig, ViTMAEForPreTraining
from transformers.models.vit_mae.modeling_vit_mae import build_2d_sinusoidal_position_embedding

SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192}
SMALL |= {"image_size": 32, "patch_size": 8, "decoder_hidden_size": 64, "decoder_num_hidden_layers": 1}
SMALL |= {"decoder_num_attention_heads": 2, "decoder_intermediate_size": 256, "layer_norm_eps": 1e-6}
SMALL |= {"norm_pix_loss": True, "mask_ratio": 0.75}


def vit_mae(**changes: Any) -> ViTMAEForPreTraining:
    """Return transformers' ViTMAE with random weights and MAE's tables of positions."""
    theirs = ViTMAEForPreTraining(ViTMAEConfig(**{**SMALL, **changes}))
    for parameter in theirs.parameters():
        if parameter.requires_grad and parameter.ndim < 3:  # biases start at 0 and would hide a mix-up
            torch.nn.init.normal_(parameter, std=0.1)
    # Random configs leave these tables at zero; trained checkpoints hold MAE's: columns first, class token at zero.
    for table in (theirs.vit.embeddings.position_embeddings, theirs.decoder.decoder_pos_embed):
        width, side = table.shape[-1], int((table.shape[1] - 1) ** 0.5)
        rows_first = build_2d_sinusoidal_position_embedding(side, side, width)
        columns_first = torch.cat([rows_first[:, width // 2 :], rows_first[:, : width // 2]], dim=1)
        table.data[0, 1:] = columns_first
        table.data[0, 0] = 0
    torch.nn.init.normal_(theirs.decoder.mask_token, std=0.1)
    return theirs.eval()


def timm_vit(folder: Path, name: str = "vit_tiny_patch16_224", **arguments: Any) -> torch.nn.Module:
    """Write a folder as timm does, of a model that is small unless told otherwise; return the model."""
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3, "num_classes": 5}
    model = timm.create_model(name, pretrained=False, **{**shape, **arguments}).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    save_for_hf(model, str(folder), safe_serialization=True)
    return model
