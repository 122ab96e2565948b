"""embed: one vector an image, with its place; on request the whole token grid, with coordinates.

    embeddings.parquet          images with a place on Earth: GeoParquet; all others: Parquet
    <key>.tif, <key>.nii.gz     with --dense: a band, or an entry of the fourth axis, a dimension

Vectors are means over valid tokens. Files carry the image's opaque key, never its name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.build import Progress, keep_apart, open_archive
from geomed_mae.archives.index import Row
from geomed_mae.errors import ConfigError
from geomed_mae.image import RasterGeometry
from geomed_mae.models.contract import channel_names
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import FeatureGrid, PretrainedEncoder
from geomed_mae.models.pretrained import read_out as blocks_of
from geomed_mae.training.loop import pick_device
from geomed_mae.writers import cog, geoparquet, nifti

NAME_HEX = 16
"""Digits of the key that name a file: 64 bits, ample within one folder."""
TABLE = "embeddings.parquet"


def embed(
    encoder: str | Path,
    archive_paths: Sequence[str | Path],
    out_dir: str | Path,
    *,
    dense: bool = False,
    read_out: str = "last",
    split: str | None = None,
    channels: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the embedding of every image of the archive; return what was written.

    Every image is read whole. Images of modalities that the encoder does not know, and images without one patch of
    enough valid area, are counted and left out.

    Args:
        encoder: encoder folder or pretraining run.
        archive_paths: raw files and folders, or an INDEX.
        out_dir: folder for the outputs; files of the same name are replaced.
        dense: also write each image's token grid.
        read_out: `last` for the last block's tokens, `several` for those of three blocks side by side.
        split: part of the stored split of each INDEX that alone is used.
        channels: names of the channels to use, with commas or one by one; None takes all, which must then be complete.
        progress: shows how many images are done.

    Raises:
        ConfigError: no encoder, or no image of a modality, and with the channels, that it knows.
        OutputError: the folder cannot be written.
    """
    model = load_encoder(encoder)
    channels = channel_names(channels)
    layers = blocks_of(read_out, model.spec.depth)
    known = sorted({entry.modality for entry in model.contract.channels})
    keep_apart(out_dir, archive_paths)
    index = open_archive(archive_paths, known, part=split)
    rows = [row for row in index.rows if row.modality in known]
    if not rows:
        raise ConfigError(f"the archive holds no image of a modality that the encoder knows ({', '.join(known)})")
    for row in rows:
        model.contract.usable(row.modality, row.channels, channels)
    model.module.to(pick_device("auto"))
    out = Path(out_dir)
    vectors, files = {}, []
    for row in rows if progress is None else progress(rows, "embed", len(rows)):
        grid = model.features(index.read(row.key), channels=channels or None, layers=layers)
        if not grid.valid.any():
            continue
        vectors[row.key] = grid.array[:, grid.valid].mean(axis=1, dtype=np.float64).astype(np.float32)
        files += [_write_grid(model, row, grid, out)] if dense else []
    embedded = [row for row in rows if row.key in vectors]
    if not embedded:
        raise ConfigError(f"none of the {len(rows)} images has a patch with enough valid area to embed")
    source = {
        "id": "geomed-mae encoder",
        "fingerprint": model.contract.fingerprint,
        "dim": len(layers) * model.spec.dim,
        "layers": list(layers),
        "pooling": model.contract.pooling,
        **({"channels": list(channels)} if channels else {}),
    }
    placed = any(row.footprint is not None for row in embedded)
    footprints = [row.footprint for row in embedded] if placed else None
    geoparquet.write(out / TABLE, list(vectors), np.stack(list(vectors.values())), footprints, source)
    return {
        "out": os.fspath(out_dir),
        "images": len(embedded),
        "images_with_too_little_valid_area": len(rows) - len(embedded),
        "images_of_other_modalities": len(index.rows) - len(rows),
        "dim": source["dim"],
        "table": TABLE,
        "format": "GeoParquet 1.1" if placed else "Parquet",
        "grids": files,
    }


def _write_grid(model: PretrainedEncoder, row: Row, grid: FeatureGrid, out: Path) -> str:
    """Write an image's token grid and return its file's name."""
    name = row.key[:NAME_HEX]
    if isinstance(grid.geometry, RasterGeometry):
        tags = {"EMB_FINGERPRINT": model.contract.fingerprint, "EMB_DIM": str(len(grid.array))}
        return cog.write_bands(out / f"{name}{cog.SUFFIX}", grid.array, grid.geometry, tags).name
    return nifti.write_features(out / f"{name}{nifti.SUFFIX}", grid.array, grid.geometry).name
