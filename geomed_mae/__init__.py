"""geomed_mae: self-supervised pretraining on raw satellite and medical archives, and the way into analysts' pipelines.

    archive -> reader -> Image -> samples -> MAE -> head -> outputs

The map of the package (nouns are folders, verbs are files; imports go from later to earlier lines only):

    errors  plugins  config  recipe_file  image
                                        the ground: exceptions, registries, recipes and their files, the frozen Image
    modalities/                         MEANING of pixels, one YAML each
    readers/                            FORMAT, one file or folder each; the only place that opens image files
    archives/                           index, ledger, keyed identities, statistics, splits, labels, data cards,
                                        leakage (what models have seen)
    samples/   models/                  crops and batches; the channel-flexible masked autoencoder
    heads/                              linear, attentive, convolutional, unetr; whole images from windows
    scoring/                            scores of predictions, their intervals and pictures
    training/                           the one loop, optimiser, checkpoints, run folders; fine-tuning, twins, probes
    writers/   exporters/   reporting/  one file per output format; one file per target; report.html
    outputs/                            whole archives through a model: blocks, going on after a kill, several processes
    scan inspect pretrain finetune evaluate probe predict embed reconstruct export report doctor demo
                                        the verbs, which cli/ offers as commands

The names below are the public Python interface; everything else may move.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from geomed_mae.errors import GeomedError

# Bound here and now: loading the submodule of the same name later would replace the function on the package.
from geomed_mae.scan import scan

if TYPE_CHECKING:
    from geomed_mae.archives.index import Index
    from geomed_mae.config import Recipe
    from geomed_mae.image import Channel, Image
    from geomed_mae.modalities import Modality, load_modality
    from geomed_mae.models.encoder_folder import load_encoder
    from geomed_mae.readers import read_images
    from geomed_mae.recipe_file import load_recipe

__version__ = "0.1.0"

__all__ = [
    "Channel",
    "GeomedError",
    "Image",
    "Index",
    "Modality",
    "Recipe",
    "__version__",
    "load_encoder",
    "load_modality",
    "load_recipe",
    "read_images",
    "scan",
]

_HOMES = {
    "Channel": "image",
    "Image": "image",
    "Index": "archives.index",
    "Modality": "modalities",
    "Recipe": "config",
    "load_encoder": "models.encoder_folder",
    "load_modality": "modalities",
    "load_recipe": "recipe_file",
    "read_images": "readers",
}


def __getattr__(name: str) -> Any:
    # torch and pydantic are loaded by the first name that needs them, so that `geomed-mae --help` stays quick.
    if name not in _HOMES:
        raise AttributeError(f"module 'geomed_mae' has no attribute '{name}'")
    return getattr(importlib.import_module(f"geomed_mae.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
