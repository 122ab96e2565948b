"""embeddings.parquet: vectors of images or of their tiles, what they are of and where that lies; and a search in it.

Columns:

    id               the image's opaque key; of a tile "<key>:<row>,<column>" of its first pixel
    embedding        list of float32
    valid_fraction   share of valid values in the image or tile, 0 to 1
    modality         of the image
    image, row_start, row_stop, column_start, column_stop      of tiles: the image's key and the tile's pixels in it
    geometry, bbox, longitude, latitude      where any image has a place: its outline, box and centre (`geoparquet`)

Rows with a place stand in the order of a Hilbert curve over the table's extent, so that neighbours share a row group;
those without follow as they came. File metadata: `geo`, and `emb` in the form of the CNG's embedding products (version,
model, embedding) with the encoder's contract. Vectors wait on disk until all are there: memory holds some hundred bytes
a row.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.errors import ConfigError, OutputError
from geomed_mae.writers import complete_file
from geomed_mae.writers.geoparquet import Placed, Ring, geo_metadata, place_columns

EMB_VERSION = "0.0.1"
GROUP_BYTES = 32 << 20
"""Vectors of one row group: what a reader of a small area, or a search, has in memory."""
MAX_GROUP = 16_384
"""Rows of one row group."""
HILBERT_BITS = 16
"""The curve runs through 65536 x 65536 cells of the table's extent."""
PLAIN = (str, int, float, bool)
"""Types of the values of a row that a search shows as they are."""
DIGITS = 6
"""Decimals of a similarity: vectors are float32."""
BOX = ("row_start", "row_stop", "column_start", "column_stop")


@dataclass(frozen=True, slots=True)
class _Row:
    image: str
    modality: str
    valid_fraction: float
    placed: Placed | None
    box: tuple[int, int, int, int] | None


class EmbeddingTable:
    """A table that is being made. Use it in a `with` block, which removes what waited on disk.

    Args:
        folder: where vectors wait; it exists.
        dim: length of a vector.
        tile: side of the tiles in pixels, or None for whole images.
    """

    def __init__(self, folder: Path, dim: int, *, tile: int | None = None) -> None:
        self.dim, self.tile = dim, tile
        self._rows: list[_Row] = []
        self._vectors = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by __exit__)

    def __enter__(self) -> EmbeddingTable:
        return self

    def __exit__(self, *error: object) -> None:
        self._vectors.close()

    def __len__(self) -> int:
        """Return the number of rows so far."""
        return len(self._rows)

    def add(
        self,
        key: str,
        modality: str,
        vector: np.ndarray,
        *,
        valid_fraction: float,
        ring: Ring | None = None,
        box: tuple[int, int, int, int] | None = None,
    ) -> None:
        """Take a row.

        Args:
            key: of the image.
            modality: of the image.
            vector: float32 (dim,).
            valid_fraction: share of valid values, 0 to 1.
            ring: corners (longitude, latitude) in degrees in ring order, None without a place.
            box: (first row, end of rows, first column, end of columns) of a tile.

        Raises:
            OutputError: the disk is full.
        """
        try:
            self._vectors.write(np.ascontiguousarray(vector, dtype=np.float32).tobytes())
        except OSError as error:
            raise OutputError(f"no room for the vectors of {len(self._rows)} rows: {error.strerror}") from error
        self._rows.append(_Row(key, modality, valid_fraction, None if ring is None else Placed.of(ring), box))

    def shorten(self, rows: int) -> None:
        """Forget all rows but the first `rows`: those of an image that turned out to be bad."""
        del self._rows[rows:]
        self._vectors.seek(rows * self.dim * 4)
        self._vectors.truncate()

    @property
    def placed(self) -> bool:
        """Whether any row has a place."""
        return any(row.placed is not None for row in self._rows)

    def save(self, path: Path, model: dict[str, Any], contract: dict[str, Any] | None = None) -> Path:
        """Write the table.

        Args:
            path: file to write.
            model: plain values that say which encoder made the numbers; stored under `emb.model`.
            contract: what the encoder may be fed: channels, units, scaling; stored under `emb.contract`.

        Raises:
            OutputError: the file cannot be written.
        """
        import pyarrow.parquet as pq

        size = {"dim": self.dim, "quantization": "none", "original_dtype": "float32"}
        about = {"version": EMB_VERSION, "model": model, "embedding": size}
        if contract is not None:
            about["contract"] = contract
        if self.tile is not None:
            about["tile_px"] = self.tile
        metadata = {"emb": json.dumps(about)}
        known = [row.placed for row in self._rows if row.placed is not None]
        if known:
            metadata["geo"] = geo_metadata(known)
        order = self._order()
        step = rows_of_group(self.dim)
        with complete_file(path) as final:
            schema = self._columns(order[:0], placed=bool(known)).schema.with_metadata(metadata)
            with pq.ParquetWriter(final, schema, compression="zstd") as writer:
                for first in range(0, max(len(order), 1), step):
                    table = self._columns(order[first : first + step], placed=bool(known))
                    writer.write_table(table.replace_schema_metadata(metadata))
        return path

    def _order(self) -> list[int]:
        """Return the numbers of the rows in the order of the table."""
        centres = {number: row.placed.centre for number, row in enumerate(self._rows) if row.placed is not None}
        places = hilbert(np.array(list(centres.values())).reshape(-1, 2))
        near = [number for _, number in sorted(zip(places.tolist(), centres, strict=True))]
        return near + [number for number in range(len(self._rows)) if number not in centres]

    def _columns(self, numbers: Sequence[int], *, placed: bool) -> Any:
        """Return some rows as a pyarrow table."""
        import pyarrow as pa

        rows = [self._rows[number] for number in numbers]
        tiled = self.tile is not None
        ids = [f"{row.image}:{row.box[0]},{row.box[2]}" if row.box else row.image for row in rows]
        ends = pa.array(np.arange(len(rows) + 1) * self.dim, type=pa.int32())
        columns = {
            "id": pa.array(ids, type=pa.string()),
            "embedding": pa.ListArray.from_arrays(ends, pa.array(self._read(numbers).ravel())),
            "valid_fraction": pa.array([row.valid_fraction for row in rows], type=pa.float32()),
            "modality": pa.array([row.modality for row in rows], type=pa.string()),
        }
        if tiled:
            columns["image"] = pa.array([row.image for row in rows], type=pa.string())
            for at, name in enumerate(BOX):
                columns[name] = pa.array([None if row.box is None else row.box[at] for row in rows], type=pa.int32())
        if placed:
            columns |= place_columns([row.placed for row in rows])
            for at, name in enumerate(("longitude", "latitude")):
                values = [None if row.placed is None else row.placed.centre[at] for row in rows]
                columns[name] = pa.array(values, type=pa.float64())
        return pa.table(columns)

    def _read(self, numbers: Sequence[int]) -> np.ndarray:
        """Return vectors from the disk: float32 (rows, dim)."""
        found = np.empty((len(numbers), self.dim), dtype=np.float32)
        for at, number in enumerate(numbers):
            self._vectors.seek(number * self.dim * 4)
            found[at] = np.frombuffer(self._vectors.read(self.dim * 4), dtype=np.float32)
        return found


def hilbert(points: np.ndarray) -> np.ndarray:
    """Return the place of each point (rows, 2) on a Hilbert curve over their extent, int64 (rows,).

    The conversion of Wikipedia's xy2d (Warren 2013, Hacker's Delight, chapter 16), for all points at once.
    """
    if not len(points):
        return np.empty(0, dtype=np.int64)
    low, span = points.min(axis=0), np.ptp(points, axis=0)
    cells = (1 << HILBERT_BITS) - 1
    x, y = ((points - low) / np.where(span > 0, span, 1.0) * cells).astype(np.int64).T
    found = np.zeros(len(points), dtype=np.int64)
    for bit in reversed(range(HILBERT_BITS)):
        side = 1 << bit
        right, up = (x & side) > 0, (y & side) > 0
        found += side * side * ((3 * right) ^ up)
        # Turn the quadrant so that the curve enters and leaves it where the next larger one does.
        mirrored = ~up & right
        x, y = np.where(mirrored, cells - x, x), np.where(mirrored, cells - y, y)
        x, y = np.where(up, x, y), np.where(up, y, x)
    return found


def about(path: Path) -> dict[str, Any]:
    """Return what a table says of itself: `model`, `embedding`, and `tile_px` where it has a row a tile.

    Raises:
        ConfigError: there is no such table.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        found = json.loads((pq.read_schema(path).metadata or {})[b"emb"])
        if _is_about(found):
            return found
    except FileNotFoundError:
        raise ConfigError(
            f"there is no table '{path}' to search in; write one first: geomed-mae embed ENCODER --archive PATH --out "
            f"'{path.parent}'"
        ) from None
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError, RecursionError):
        pass
    raise ConfigError(f"'{path}' is no table of embeddings of this package (no `emb` metadata, or not ours)")


def _is_about(found: Any) -> bool:
    """Return whether metadata are in our form: a table may come from anywhere."""
    model, dim, tile = found["model"], found["embedding"]["dim"], found.get("tile_px", 1)
    layers, channels = model["layers"], model.get("channels", [])
    return (
        all(type(number) is int and number > 0 for number in (dim, tile))
        and isinstance(layers, list)
        and len(layers) > 0
        and all(type(layer) is int and layer >= 0 for layer in layers)
        and isinstance(channels, list)
        and all(isinstance(name, str) for name in channels)
    )


def nearest(path: Path, vector: np.ndarray, top: int) -> list[dict[str, Any]]:
    """Return the rows whose vectors are most like `vector` (cosine), the most similar first.

    All rows are compared, some thousand at a time, however large the table's row groups are.

    Args:
        path: table of `EmbeddingTable`.
        vector: float32 (dim,).
        top: how many.

    Returns:
        Per row `similarity` (-1 to 1) and all its columns but the vector and the outline.

    Raises:
        ConfigError: the table is damaged, or its vectors are not as long as this one.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = vector.astype(np.float64) / max(float(np.linalg.norm(vector)), np.finfo(np.float32).tiny)
    best: list[tuple[float, int, dict[str, Any]]] = []
    try:
        with pq.ParquetFile(path) as file:
            shown = [name for name in file.schema_arrow.names if name not in ("embedding", "geometry", "bbox")]
            first = 0
            for part in file.iter_batches(rows_of_group(len(vector)), columns=["embedding", *shown]):
                likeness = _likeness(part.column("embedding"), wanted)
                # A tie is settled by the order of the table, so that an answer is the same every time.
                some = np.argsort(-likeness, kind="stable")[:top].tolist()
                plain = part.select(shown).take(some).to_pylist()
                best += [(float(likeness[at]), first + at, row) for at, row in zip(some, plain, strict=True)]
                best = sorted(best, key=lambda entry: (-entry[0], entry[1]))[:top]
                first += len(likeness)
    except (OSError, pa.ArrowException, KeyError, TypeError) as error:
        raise ConfigError(f"'{path}' cannot be read; write it again with embed --archive: {error}") from error
    return [{"similarity": round(similarity, DIGITS), **_plain(row)} for similarity, _, row in best]


def rows_of_group(dim: int) -> int:
    """Return how many rows of vectors of length `dim` are written, or compared, at a time."""
    return max(1, min(MAX_GROUP, GROUP_BYTES // (4 * dim)))


def _likeness(column: Any, wanted: np.ndarray) -> np.ndarray:
    """Return the cosine of each vector of an arrow array of lists with one of length 1, float64 (rows,).

    Raises:
        TypeError: not every row has a vector of that many numbers.
    """
    import pyarrow.compute as pc

    lengths = pc.list_value_length(column).to_numpy(zero_copy_only=False)
    if not (lengths == len(wanted)).all():
        raise TypeError(f"column embedding has rows without a vector of {len(wanted)} numbers")
    vectors = column.flatten().to_numpy(zero_copy_only=False).astype(np.float64).reshape(len(column), len(wanted))
    return vectors @ wanted / np.maximum(np.linalg.norm(vectors, axis=1), np.finfo(np.float32).tiny)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return what a row says, as JSON can: columns that somebody has added may hold anything."""
    return {name: value if isinstance(value, PLAIN) else str(value) for name, value in row.items() if value is not None}
