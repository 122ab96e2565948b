"""The work of `embed`: images one after the other through an encoder, into the table, the grids and the pictures.

An image is read window by window. What is not finished lies in a hidden folder of the output that is removed at the
end; an image that cannot be read leaves nothing behind but its line under `failed`.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from geomed_mae.archives.build import Progress
from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import OutputError, ReadError
from geomed_mae.image import RasterGeometry
from geomed_mae.models.pretrained import PretrainedEncoder, token_geometry
from geomed_mae.models.streaming import Scene, TileMeans, tile_box
from geomed_mae.outputs import NAME_HEX
from geomed_mae.outputs.failures import Failure, failure_of
from geomed_mae.readers.geotiff.grid import footprints
from geomed_mae.samples.memory import ImageCache
from geomed_mae.writers import cog_tokens, nifti, token_preview
from geomed_mae.writers.embedding_table import EmbeddingTable
from geomed_mae.writers.token_spool import TokenSpool


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What is asked for, the same for all images."""

    model: PretrainedEncoder
    index: Index
    cache: ImageCache
    out: Path
    layers: tuple[int, ...]
    channels: tuple[str, ...]
    tile: int | None
    dense: bool
    preview: bool
    dtype: str

    @property
    def width(self) -> int:
        """Values of a vector."""
        return len(self.layers) * self.model.spec.dim

    def scene(self, row: Row) -> Scene:
        """Return an image that is read in parts."""
        return Scene.of_row(row, lambda window: self.cache.read(row, window), self.channels)


@dataclass(slots=True)
class Done:
    """What has been done so far."""

    images: int = 0
    too_little: int = 0
    empty_tiles: int = 0
    failed: dict[str, Failure] = field(default_factory=dict)
    grids: list[str] = field(default_factory=list)
    errors: list[dict[str, float]] = field(default_factory=list)
    spools: list[tuple[Row, TokenSpool]] = field(default_factory=list)

    def __enter__(self) -> Done:
        return self

    def __exit__(self, *error: object) -> None:
        for _, spool in self.spools:
            spool.close()


def waiting_room(out: Path) -> tempfile.TemporaryDirectory:
    """Return a folder in the output for what is not finished yet; it goes when all is."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        return tempfile.TemporaryDirectory(dir=out, prefix=".embedding-")
    except OSError as error:
        raise OutputError(f"'{out}' cannot be written: {error.strerror or error}") from error


def embed_all(job: Job, rows: Sequence[Row], table: EmbeddingTable, waiting: str, progress: Progress | None) -> Done:
    """Embed the images one after the other; an image that cannot be read leaves nothing behind but its failure."""
    done = Done()
    many = len(rows) > 1
    for row in rows if progress is None or not many else progress(rows, "embed", len(rows)):
        with ExitStack() as stack:
            spool = None
            if job.dense or job.preview:
                spool = TokenSpool(Path(waiting), job.width, job.model.token_shape(row.shape))
                stack.enter_context(spool)
            before = len(table)
            try:
                empty = _embed_one(job, row, table, spool, None if many else progress)
            except ReadError as error:
                table.shorten(before)
                done.failed[row.key] = failure_of(error)
                continue
            if len(table) == before:
                done.too_little += 1
                continue
            done.images, done.empty_tiles = done.images + 1, done.empty_tiles + empty
            if spool is not None and job.dense:
                _write_grid(job, row, spool, done)
            if spool is not None and job.preview:
                done.spools.append((row, spool))
                stack.pop_all()  # its tokens are needed until the colours of all images are known
    return done


def _embed_one(job: Job, row: Row, table: EmbeddingTable, spool: TokenSpool | None, progress: Progress | None) -> int:
    """Put an image's vectors into the table and its tokens into the spool; return the number of tiles without any."""
    stream = job.model.stream(job.scene(row), layers=job.layers, tile=job.tile)
    patch = job.model.spec.patch(len(row.shape))
    means, empty = TileMeans(job.width), 0
    places = _places(job, row)
    for window in stream if progress is None else progress(stream, "embed", len(stream)):
        if spool is not None and window.tokens is not None:
            spool.put([at // step for at, step in zip(window.corner, patch, strict=True)], window.tokens)
        if (complete := means.add(window)) is None:
            continue
        vector, valid = complete
        if vector is None:
            empty += 1
            continue
        box = tile_box(window.tile, job.tile, row.shape)
        values = len(stream.scene.channels) * math.prod(part.stop - part.start for part in box)
        pixels = None if job.tile is None else tuple(end for part in box for end in (part.start, part.stop))
        ring = row.footprint if pixels is None else places.get(pixels)
        table.add(row.key, row.modality, vector, valid_fraction=valid / values, ring=ring, box=pixels)
    return empty


def _places(job: Job, row: Row) -> dict[tuple[int, int, int, int], Any]:
    """Return where the tiles of a raster lie: pixels (rows, columns) -> corners (longitude, latitude) or None."""
    geometry = job.index.outline(row.key).geometry
    if job.tile is None or row.footprint is None or not isinstance(geometry, RasterGeometry):
        return {}
    down, across = (range(0, size, job.tile) for size in row.shape)
    boxes = [
        (top, min(top + job.tile, row.shape[0]), left, min(left + job.tile, row.shape[1]))
        for top in down
        for left in across
    ]
    return dict(zip(boxes, footprints(geometry, row.shape, boxes), strict=True))


def _write_grid(job: Job, row: Row, spool: TokenSpool, done: Done) -> None:
    """Write an image's token grid."""
    name = row.key[:NAME_HEX]
    geometry = token_geometry(job.index.outline(row.key).geometry, job.model.spec.patch(len(row.shape)))
    if isinstance(geometry, RasterGeometry):
        path = job.out / f"{name}{cog_tokens.ENDING}"
        tags = {
            "EMB_DIGEST": job.model.digest,
            "EMB_FINGERPRINT": job.model.contract.fingerprint,
            "EMB_DIM": str(job.width),
        }
        names = list(_band_names(job))
        done.errors.append(cog_tokens.write(path, spool, geometry, names=names, tags=tags, dtype=job.dtype))
    else:
        path = nifti.write_features(job.out / f"{name}{nifti.SUFFIX}", spool.array(), geometry)
    done.grids.append(path.name)


def _band_names(job: Job) -> Iterator[str]:
    for layer in job.layers:
        block = f"block {layer} " if len(job.layers) > 1 else ""
        yield from (f"{block}dimension {number}" for number in range(job.model.spec.dim))


def draw_previews(job: Job, done: Done) -> list[str]:
    """Draw the token grids; the colours of one modality are those of all its images together."""
    names: list[str] = []
    by_modality: dict[str, list[tuple[Row, TokenSpool]]] = {}
    for row, spool in done.spools:
        by_modality.setdefault(row.modality, []).append((row, spool))
    for entries in by_modality.values():
        colours = token_preview.Colours([spool for _, spool in entries])
        for row, spool in entries:
            geometry = token_geometry(job.index.outline(row.key).geometry, job.model.spec.patch(len(row.shape)))
            picture, name = colours.picture(spool), row.key[:NAME_HEX]
            names.append(token_preview.write(job.out / f"{name}{token_preview.ENDING}", picture, geometry).name)
            if isinstance(geometry, RasterGeometry):
                path = job.out / f"{name}{cog_tokens.COLOURS_ENDING}"
                names.append(cog_tokens.write_colours(path, picture, geometry).name)
    return names


def described(job: Job) -> dict[str, Any]:
    """Return which encoder made the numbers, and of what."""
    contract, spec = job.model.contract, job.model.spec
    return {
        "id": "geomed-mae encoder",
        "digest": job.model.digest,
        "fingerprint": contract.fingerprint,
        "dim": job.width,
        "layers": list(job.layers),
        "pooling": contract.pooling,
        "patch_2d": spec.patch_2d,
        "patch_3d": spec.patch_3d,
        **({"channels": list(job.channels)} if job.channels else {}),
    }
