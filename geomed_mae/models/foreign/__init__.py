"""Vision transformers that other libraries wrote, as encoders of this one.

    huggingface   a folder that transformers' ViTMAEForPreTraining or ViTMAEModel saved
    timm          a folder that timm's save_for_hf or push_to_hf_hub wrote, and `geomed-mae export --to timm`
    stored        their JSON and safetensors files, read with limits and without code
    feed          what such a model is fed with, as a contract
    fixed         the common form: a ViT for one fixed list of channels, and what becomes of it here

What these folders say is data: names of classes are compared and never imported, `auto_map` and all other code of a
folder are ignored, nothing is downloaded, and a tensor that is missing, left over or of another shape is an error.
"""

from __future__ import annotations

from pathlib import Path

from geomed_mae.errors import ConfigError
from geomed_mae.models.foreign import huggingface, timm
from geomed_mae.models.foreign.fixed import as_encoder
from geomed_mae.models.foreign.stored import CONFIG, read_json
from geomed_mae.models.pretrained import PretrainedEncoder


def load_foreign(folder: Path) -> PretrainedEncoder:
    """Open a Hugging Face ViTMAE or a timm VisionTransformer folder.

    Raises:
        ConfigError: another model, or a setting that does not map exactly onto this package's blocks (it is named).
        IntegrityError: files that cannot be read, or tensors that are not the model's (they are named).
    """
    config = read_json(folder, CONFIG)
    if config.get("model_type") == huggingface.MODEL_TYPE:
        return as_encoder(*huggingface.read(folder, config))
    if "architecture" in config:
        return as_encoder(*timm.read(folder, config))
    raise ConfigError(
        f"'{folder}' is no encoder that can be opened: {CONFIG} has model_type {config.get('model_type')!r} and no "
        "timm architecture. Known are folders that geomed-mae wrote, Hugging Face ViTMAE (model_type 'vit_mae') and "
        "timm VisionTransformer folders"
    )
