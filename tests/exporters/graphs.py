"""What the tests of the graph exports are given: tiny models in 2D and 3D, and what they say of values in units."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from numpy.lib.npyio import NpzFile

from geomed_mae.archives.seen import Seen
from geomed_mae.archives.statistics import summarise
from geomed_mae.exporters.request import Request, ask
from geomed_mae.heads import HeadSpec
from geomed_mae.heads.task_model import TaskModel, TaskSpec
from geomed_mae.image import Image, RasterGeometry
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.pretrained import PretrainedEncoder, read_out
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from tests.consumer import elsewhere

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("background", "water", "wood")
SPEC = ModelSpec(dim=24, depth=1, heads=2, patch_2d=(8, 4), patch_3d=(2, 8, 4), basis=4)
RGB = ("B04", "B03", "B02")
SIZES = {"one": (32, 24), "larger": (48, 64)}


def encoder_of(modality: str = "sentinel2-l2a", spec: ModelSpec = SPEC) -> PretrainedEncoder:
    """An encoder with random weights for one modality, whose windows are larger than the tests' images."""
    found = load_modality(modality)
    torch.manual_seed(0)
    module = Encoder(spec)
    for bias in module.patch_embed.bias.values():
        torch.nn.init.normal_(bias)
    contract = Contract(
        channels=contract_entries(found, found.channels, []), crop_2d=(64, 64), crop_3d=(8, 32, 32), images=2, steps=3
    )
    return PretrainedEncoder(module, contract)


def task_request(
    encoder: PretrainedEncoder,
    head: str,
    task: str,
    *,
    channels: Sequence[str],
    size: tuple[int, ...],
    maps: int = 1,
    multi_label: bool = False,
    spacing: tuple[float, ...] | None = None,
    image: Image | None = None,
) -> Request:
    """A fine-tuned model with random weights, asked for at the size of its training crop."""
    spec = HeadSpec(
        name=head,
        task=task,
        embed_dim=encoder.spec.dim,
        maps=maps,
        classes=CLASSES,
        channels=len(channels),
        patch=encoder.spec.patch(len(size)),
        width=16,
        multi_label=multi_label,
    )
    modality = encoder.contract.channels[0].modality
    torch.manual_seed(1)
    shape = TaskSpec(head=spec, modality=modality, channels=tuple(channels), crop=size)
    model = TaskModel(encoder.module, encoder.contract, shape).eval()
    assert model.layers == read_out("last" if maps == 1 else "several", encoder.spec.depth)
    for parameter in model.head.parameters():  # a head that starts at zero says nothing
        torch.nn.init.normal_(parameter)
    fine = PretrainedEncoder(model.encoder, model.contract, seen=Seen.unknown())
    return ask(fine, task=model, spacing=spacing, image=image)


@torch.no_grad()
def chances(request: Request, raw: np.ndarray, valid: np.ndarray | None = None) -> np.ndarray:
    """Probabilities of a task model for values in units (b, c, *size), each sample an image of its own."""
    known = np.ones(raw.shape, dtype=bool) if valid is None else valid
    own = [summarise(one, mask) for one, mask in zip(raw, known, strict=True)]
    spacing = None if request.distance is None else torch.tensor([request.distance] * len(raw))
    logits = request.task(torch.from_numpy(raw), torch.from_numpy(known), spacing, own)
    return (logits.sigmoid() if request.task.spec.head.multi_label else logits.softmax(dim=1)).numpy()


def scene(array: np.ndarray, valid: np.ndarray, names: Sequence[str], gsd: tuple[float, float] | None) -> Image:
    """Reflectances of some Sentinel-2 bands as an Image."""
    modality = load_modality("sentinel2-l2a")
    channels = tuple(modality.channel(name) for name in names)
    return Image(array, valid, channels, RasterGeometry(None, (1, 0, 0, 0, -1, 0), gsd), modality.name)


def files_that_name(folder: Path, *words: str) -> list[str]:
    """Names of files in a folder whose bytes hold one of the words."""
    return [
        str(path.relative_to(folder))
        for path in sorted(folder.rglob("*"))
        if path.is_file() and any(word.encode() in path.read_bytes() for word in words)
    ]


@dataclass(frozen=True, eq=False)
class Elsewhere:
    """Exports of an encoder of images and of a model of volumes, and what another process makes of them."""

    encoder: PretrainedEncoder
    images: dict[str, Image]
    volumes: np.ndarray
    task: Request
    folders: tuple[Path, Path]
    results: tuple[dict, dict]
    told: list
    said: tuple[NpzFile, NpzFile]


def opened_elsewhere(folder: Path, exporter: ModuleType, task: Request, code: str) -> Elsewhere:
    """Export an encoder and `task` (of volumes) without a warning, and open both by `code`, which is given the folders.

    It finds FOLDER.given.npz, what the model is to be fed by name, and leaves FOLDER.said.npz.
    """
    first, second = folder / "images", folder / "volumes"
    encoder = encoder_of(spec=replace(SPEC, reference_gsd_m=10.0))
    rng = np.random.default_rng(0)
    arrays = {name: rng.random((3, *size), dtype=np.float32) * 2 for name, size in SIZES.items()}  # clipped at 1.6
    valid = {name: np.ones((1, *size), dtype=bool) for name, size in SIZES.items()}
    valid["one"][:, 3, 5:7] = False  # NaN in the export's input
    given = {name: np.where(valid[name], array, np.nan)[None] for name, array in arrays.items()}
    np.savez(f"{first}.given.npz", **given, three=np.stack([arrays["larger"]] * 3))
    volumes = rng.gamma(2.0, 100.0, (2, 1, 6, 24, 8)).astype(np.float32)
    low, middle, high = np.percentile(volumes, (5, 50, 95), axis=(1, 2, 3, 4)).reshape(3, 2, 1, 1, 1, 1)
    np.savez(f"{second}.given.npz", own=((volumes - middle) / ((high - low) / 3.29)).astype(np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        results = (
            exporter.export(ask(encoder, channels=RGB, size=SIZES["one"], spacing=(20.0, 20.0)), first),
            exporter.export(task, second),
        )
    return Elsewhere(
        encoder=encoder,
        images={name: scene(array, valid[name], RGB, (20.0, 20.0)) for name, array in arrays.items()},
        volumes=volumes,
        task=task,
        folders=(first, second),
        results=results,
        told=elsewhere(code, first, second),
        said=(np.load(f"{first}.said.npz"), np.load(f"{second}.said.npz")),
    )
