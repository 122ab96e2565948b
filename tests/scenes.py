"""Tiny real files that several tests share: a scene with bright blobs on GeoTIFF, blobs in MR volumes on NIfTI."""

from __future__ import annotations

from pathlib import Path

import nibabel
import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import Affine

from geomed_mae.archives.build import open_archive
from geomed_mae.finetune import finetune
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.encoder_folder import save_encoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from geomed_mae.recipe_file import build_recipe

UTM = "EPSG:32633"
LANDSAT_BANDS = ("B1", "B2", "B3", "B4", "B5", "B7")


def blobs(shape: tuple[int, ...], seed: int, share: float = 0.3) -> np.ndarray:
    """Bool of `shape`: smooth blobs that cover about `share` of it."""
    rng = np.random.default_rng(seed)
    field = rng.normal(size=shape)
    for axis in range(len(shape)):
        kernel = np.exp(-0.5 * (np.arange(-5, 6) / 2.5) ** 2)
        field = np.apply_along_axis(lambda line, k=kernel: np.convolve(line, k, mode="same"), axis, field)
    return field > np.quantile(field, 1 - share)


def landsat_scene(
    path: Path,
    labels: Path | None,
    *,
    shape: tuple[int, int] = (128, 160),
    seed: int = 0,
    transform: Affine | None = None,
    crs: str | None = UTM,
    nodata: int | None = None,
) -> np.ndarray:
    """Write a 6-band uint8 scene in which blobs are dark in the infrared, as water is, and their label raster.

    With `nodata` the upper left corner has it. Returns bool (rows, columns): the blobs.
    """
    water = blobs(shape, seed)
    rng = np.random.default_rng(seed + 100)
    bands = np.stack([np.where(water, 40 - 5 * number, 60 + 10 * number) for number in range(6)])
    values = np.clip(bands + rng.normal(scale=6, size=bands.shape), 1, 254).astype(np.uint8)
    if nodata is not None:
        values[:, : shape[0] // 4, : shape[1] // 4] = nodata
    grid = {"crs": crs, "transform": transform or Affine(28.5, 0, 500000 + 1e5 * seed, 0, -28.5, 4500000.25)}
    size = {"height": shape[0], "width": shape[1], "driver": "GTiff", "dtype": "uint8"}
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(path, "w", count=6, nodata=nodata, **size, **grid) as dataset:
        dataset.write(values)
        dataset.descriptions = LANDSAT_BANDS
    if labels is not None:
        labels.parent.mkdir(parents=True, exist_ok=True)
        with rasterio.open(labels, "w", count=1, **size, **grid) as dataset:
            dataset.write(water.astype(np.uint8), 1)
    return water


def labelled_scenes(root: Path, count: int) -> Path:
    """Write so many small scenes to `images` and their labels to `labels`; returns `root`."""
    for seed in range(count):
        landsat_scene(root / "images" / f"{seed}.tif", root / "labels" / f"{seed}.tif", shape=(64, 64), seed=seed)
    return root


def mr_volume(
    path: Path, labels: Path | None, *, shape: tuple[int, int, int] = (20, 24, 16), seed: int = 0, spacing: float = 1.0
) -> np.ndarray:
    """Write a NIfTI volume (array axes column, row, slice) with bright blobs, and their label map; return the blobs."""
    bright = blobs(shape, seed)
    rng = np.random.default_rng(seed + 200)
    values = np.where(bright, 900.0, 300.0) + rng.normal(scale=60, size=shape)
    affine = np.diag([-spacing, -spacing, 1.5 * spacing, 1.0])
    affine[:3, 3] = (12.5, -7.0, 100.0)
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values.astype(np.int16), affine), path)
    if labels is not None:
        labels.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(bright.astype(np.uint8), affine), labels)
    return bright


WATER_RECIPE = {
    "data": {"modality": "landsat7", "crop_2d": [64, 64]},
    "model": {"size": "tiny", "depth": 2, "patch_2d": [8, 8]},
    "train": {"steps": 60, "batch_size": 4, "optimizer": "adamw", "lr": 2e-3, "log_every": 10, "device": "cpu"},
    "head": {"classes": ["land", "water"], "width": 32},
    "labels": {"test": 0.5},
}
"""Two scenes, one to train on and one to score; seven seconds on one CPU core."""

MR_RECIPE = {
    "data": {"modality": "mr", "crop_3d": [16, 16, 16]},
    "model": {"size": "tiny", "depth": 1, "patch_3d": [4, 4, 4]},
    "train": {"steps": 2, "batch_size": 2, "optimizer": "adamw", "log_every": 1, "device": "cpu"},
    "head": {"classes": ["background", "bright"], "width": 16},
    "labels": {"test": 0.5},
}

_MADE: dict[str, Path] = {}


def water_run(factory: pytest.TempPathFactory) -> Path:
    """Return a folder with scenes/, labels/ and run/, a fine-tuning run on them; made once a session."""
    if "water" not in _MADE:
        folder = factory.mktemp("water")
        for seed, name in enumerate(("x", "y")):
            landsat_scene(folder / "scenes" / f"{name}.tif", folder / "labels" / f"{name}.tif", seed=seed)
        finetune(build_recipe(WATER_RECIPE), [folder / "scenes"], folder / "labels", "none", folder / "run")
        _MADE["water"] = folder
    return _MADE["water"]


def mr_run(factory: pytest.TempPathFactory) -> Path:
    """The same for volumes: MR on NIfTI, two steps."""
    if "mr" not in _MADE:
        folder = factory.mktemp("mr")
        for seed in range(2):
            mr_volume(folder / "volumes" / f"{seed}.nii.gz", folder / "labels" / f"{seed}.nii.gz", seed=seed)
        finetune(build_recipe(MR_RECIPE), [folder / "volumes"], folder / "labels", "none", folder / "run")
        _MADE["mr"] = folder
    return _MADE["mr"]


def random_encoder(folder: Path, modality: str, archive: Path) -> Path:
    """Write an encoder folder with random weights whose contract fits the images in `archive`; returns `folder`."""
    index = open_archive([archive], [modality])
    rows = [row for row in index.rows if row.modality == modality]
    entries = contract_entries(load_modality(modality), rows[0].channels, [row.statistics for row in rows])
    recipe = MR_RECIPE if rows[0].geometry == "volume" else WATER_RECIPE
    data, config = recipe["data"], build_recipe({"model": recipe["model"], "data": recipe["data"]}).model
    contract = Contract(
        channels=entries,
        crop_2d=tuple(data["crop_2d"]) if "crop_2d" in data else None,
        crop_3d=tuple(data["crop_3d"]) if "crop_3d" in data else None,
        fingerprint=index.fingerprint,
        images=len(rows),
    )
    torch.manual_seed(0)
    save_encoder(folder, Encoder(ModelSpec.from_config(config)), contract)
    return folder
