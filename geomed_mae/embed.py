"""embed: one vector an image or tile, with its place; on request the whole token grid, with coordinates; and a search.

    embeddings.parquet                       images with a place on Earth: GeoParquet; all others: Parquet
    <key>.tif, <key>.nii.gz                  with --dense: a band, or an entry of the fourth axis, a dimension
    <key>-preview.png, <key>-preview.tif     with --preview: the grid's principal components as colours

Vectors are means over valid tokens. Images are read window by window, so that their size does not matter. Files carry
the image's opaque key, never its name.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from geomed_mae.archives.build import Progress, keep_apart, open_archive
from geomed_mae.archives.identity import new_salt
from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError, TooManyBadInputsError
from geomed_mae.image import Image
from geomed_mae.models.contract import channel_names
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.pretrained import read_out as blocks_of
from geomed_mae.models.streaming import Scene, TileMeans
from geomed_mae.outputs.embedding import Done, Job, described, draw_previews, embed_all, waiting_room
from geomed_mae.outputs.failures import ALL_BAD, refused, told
from geomed_mae.samples.memory import CACHE_SHARE, ImageCache
from geomed_mae.training.loop import pick_device
from geomed_mae.writers import cog_tokens, embedding_table
from geomed_mae.writers.embedding_table import EmbeddingTable

TABLE = "embeddings.parquet"
WHOLE_MB = 128
"""Decoded images up to this size are decoded once; larger ones are read part by part."""


def embed(
    encoder: str | Path,
    archive_paths: Sequence[str | Path],
    out_dir: str | Path,
    *,
    tile: int | None = None,
    dense: bool = False,
    preview: bool | None = None,
    dtype: str = "int8",
    read_out: str = "last",
    split: str | None = None,
    channels: str | Sequence[str] | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Write the embedding of every image of the archive; return what was written.

    Images of modalities that the encoder does not know, and images without one patch of enough valid area, are counted
    and left out. An image that no longer decodes is named under `failed`, and the others go on.

    Args:
        encoder: encoder folder or pretraining run.
        archive_paths: raw files and folders, or an INDEX.
        out_dir: folder for the outputs; files of the same name are replaced.
        tile: side of tiles in pixels, a multiple of the patch: one vector a tile of rasters and planes, cut from the
            upper left corner, each encoded as an image of its own. None gives one vector an image.
        dense: also write each image's token grid: of rasters as COG, of others as float32 NIfTI.
        preview: draw the token grids in the colours of their principal components; None does where `dense` does. It
            needs room on disk for all token grids, 4 bytes a value, until it is done.
        dtype: of the COGs, `int8` (one scale and offset a band), `float32`, or `float16` where GDAL can.
        read_out: `last` for the last block's tokens, `several` for those of three blocks side by side.
        split: part of the stored split of each INDEX that alone is used.
        channels: names of the channels to use, with commas or one by one; None takes all, which must then be complete.
        progress: shows how far the images are, or the windows of a single one.

    Raises:
        ConfigError: no encoder, no image of a modality, and with the channels, that it knows, or a tile that does not
            fit.
        TooManyBadInputsError: no image could be read.
        OutputError: the folder cannot be written.
    """
    model = load_encoder(encoder)
    channels = channel_names(channels)
    layers = blocks_of(read_out, model.spec.depth)
    cog_tokens.check_dtype(dtype)
    keep_apart(out_dir, archive_paths)
    salt = new_salt()
    # A broken file must not cost the others their vectors: it is told under `failed`.
    index, rows = _known_images(model, archive_paths, part=split, max_bad=ALL_BAD, salt=salt)
    for row in rows:
        model.contract.usable(row.modality, row.channels, channels)
        _check_tile(model, row, tile)
    model.module.to(pick_device("auto"))
    preview = dense if preview is None else preview
    job = Job(
        model=model,
        index=index,
        cache=ImageCache(index, WHOLE_MB * CACHE_SHARE),
        out=Path(out_dir),
        layers=layers,
        channels=channels,
        tile=tile,
        dense=dense,
        preview=preview,
        dtype=dtype,
    )
    with ExitStack() as stack:
        waiting = stack.enter_context(waiting_room(job.out))
        table = stack.enter_context(EmbeddingTable(waiting, job.width, tile=tile))
        done = stack.enter_context(embed_all(job, rows, table, waiting, progress))
        if not done.images:
            raise _nothing(rows, done)
        previews = draw_previews(job, done)
        table.save(job.out / TABLE, described(job), json.loads(model.contract.to_json()))
        result = _result(job, len(index.rows) - len(rows), done, table, previews)
    return {**result, **told(index, done.failed, refused(index, archive_paths, salt))}


def search(
    encoder: str | Path,
    table_dir: str | Path,
    image: str | Path,
    *,
    top: int = 10,
    at: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Return the images or tiles of a table of embeddings that are most like an image (cosine of the vectors).

    Args:
        encoder: the one that wrote the table.
        table_dir: folder that `embed` has written.
        image: file, folder of a series or product, or INDEX, that holds one image of a modality that the encoder knows.
        top: how many to return.
        at: (row, column) of the pixel around which a window of the table's tile is cut out of the image; None takes
            the image whole.

    Raises:
        ConfigError: another encoder wrote the table, there is none, or the path holds no such image or several.
    """
    if top < 1:
        raise ConfigError(f"--top {top}: at least one neighbour must be asked for")
    model, path = load_encoder(encoder), Path(table_dir) / TABLE
    about = embedding_table.about(path)
    if about["model"].get("digest") != model.digest:
        raise ConfigError(
            f"'{path}' was written by another encoder: vectors of different encoders cannot be compared. Give that "
            f"one, or write the table with this: geomed-mae embed '{encoder}' --archive PATH --out DIR"
        )
    layers = tuple(about["model"]["layers"])
    if max(layers) >= model.spec.depth or len(layers) * model.spec.dim != about["embedding"]["dim"]:
        raise ConfigError(f"'{path}' does not hold what this encoder gives; write it again with embed --archive")
    index, rows = _known_images(model, [image])
    if len(rows) != 1:
        raise ConfigError(f"'{image}' holds {len(rows)} images; search with the path of one of them")
    row, channels = rows[0], tuple(about["model"].get("channels", ()))
    model.contract.usable(row.modality, row.channels, channels)
    model.module.to(pick_device("auto"))
    cache = ImageCache(index, WHOLE_MB * CACHE_SHARE)
    scene = Scene.of_row(row, lambda window: cache.read(row, window), channels)
    box = None if at is None else _box_around(at, row, about.get("tile_px"))
    means = TileMeans(len(layers) * model.spec.dim)
    stream = model.stream(scene if box is None else _part(scene, box), layers=layers)
    (vector, _), *_ = [found for window in stream if (found := means.add(window)) is not None]
    if vector is None:
        raise ConfigError(f"'{image}' has no patch with enough valid area to search with")
    return {
        "table": os.fspath(path),
        "image": os.fspath(image),
        **({} if box is None else {"window": [[part.start, part.stop] for part in box]}),
        "nearest": embedding_table.nearest(path, vector, top),
    }


def _known_images(model: PretrainedEncoder, paths: Sequence[str | Path], **how: Any) -> tuple[Index, list[Row]]:
    """Return the index of some paths, and those of its images whose modality the encoder knows, at least one."""
    known = sorted({entry.modality for entry in model.contract.channels})
    index = open_archive(paths, known, **how)
    rows = [row for row in index.rows if row.modality in known]
    if not rows:
        raise ConfigError(f"the archive holds no image of a modality that the encoder knows ({', '.join(known)})")
    return index, rows


def _check_tile(model: PretrainedEncoder, row: Row, tile: int | None) -> None:
    if tile is None:
        return
    if len(row.shape) != 2:
        raise ConfigError(f"--tile cuts rasters and planes, and the archive holds a {row.geometry} ({row.modality})")
    patch = model.spec.patch(2)
    if tile < 1 or any(tile % step for step in patch):
        raise ConfigError(
            f"--tile {tile} is no multiple of the encoder's patch of {' x '.join(map(str, patch))} pixels; for example "
            f"{(model.contract.crop_2d or patch)[0]}"
        )


def _nothing(rows: Sequence[Row], done: Done) -> ConfigError | TooManyBadInputsError:
    """Return the error that says why there is not one vector."""
    if done.failed:
        _, first = next(iter(done.failed.values()))
        return TooManyBadInputsError(
            f"{len(done.failed)} of {len(rows)} images could not be read and no other gave a vector; the first: {first}"
        )
    return ConfigError(f"none of the {len(rows)} images has a patch with enough valid area to embed")


def _result(job: Job, others: int, done: Done, table: EmbeddingTable, previews: list[str]) -> dict[str, Any]:
    errors = [error for error in done.errors if error]
    worst = {"largest_difference": max, "relative_rms": max, "mean_cosine": min}
    return {
        "out": os.fspath(job.out),
        "images": done.images,
        "images_with_too_little_valid_area": done.too_little,
        "images_of_other_modalities": others,
        **({} if job.tile is None else {"tiles": len(table), "tiles_with_too_little_valid_area": done.empty_tiles}),
        "dim": job.width,
        "table": TABLE,
        "format": "GeoParquet 1.1" if table.placed else "Parquet",
        "grids": done.grids,
        **({"int8_error": {k: pick(e[k] for e in errors) for k, pick in worst.items()}} if errors else {}),
        **({"previews": previews} if job.preview else {}),
    }


def _box_around(at: tuple[int, int], row: Row, tile: int | None) -> tuple[slice, ...]:
    """Return the window of a tile's size around a pixel, moved into the image where it reaches beyond."""
    if tile is None or len(row.shape) != 2:
        raise ConfigError(
            "--at cuts a tile out of a raster or plane, and this table has one vector an image: leave it out"
        )
    if any(not 0 <= pixel < size for pixel, size in zip(at, row.shape, strict=True)):
        raise ConfigError(
            f"--at {at[0]},{at[1]} is no pixel of an image of {row.shape[0]} rows, {row.shape[1]} columns"
        )
    starts = [max(0, min(pixel - tile // 2, size - tile)) for pixel, size in zip(at, row.shape, strict=True)]
    return tuple(slice(start, min(start + tile, size)) for start, size in zip(starts, row.shape, strict=True))


def _part(scene: Scene, box: tuple[slice, ...]) -> Scene:
    """Return a part of a scene as a scene; it is scaled as the whole."""

    def read(window: tuple[slice, ...]) -> Image:
        moved = (slice(b.start + w.start, b.start + w.stop) for b, w in zip(box, window, strict=True))
        return scene.read(tuple(moved))

    return replace(scene, shape=tuple(part.stop - part.start for part in box), read=read)
