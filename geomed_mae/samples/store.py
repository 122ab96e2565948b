"""The cache on disk: what is slow to decode is decoded once, for every worker, rank and run that uses the folder.

An image of up to WHOLE_BYTES is one entry. A larger one is cut into cells of a regular grid, each an entry of its own
that is decoded whole when it is first touched. An entry is one file (see `tiles`), named by a SHA-256 over the digest
of the image's pixels and whatever else decides what is decoded: pixels that change, a modality that is read otherwise
and another version of the readers have other entries, and no name, date or path is in any of them. Cells have others
too when the time of their files is another. What does not verify is dropped, decoded again and written again: never
trusted, never fatal. A store changes speed, never pixels.

The folder holds pixels of patients: mode 0700, files 0600, and a CACHEDIR.TAG that keeps backups off.

Bounded: once the folder has reached its limit nothing is added and nothing is removed. Samples are drawn uniformly, so
whatever part of an archive is kept, the next sample is in it with the same probability, the size of that part: to
replace one image by another gains nothing and costs a write.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from geomed_mae.archives.identity import PixelDigest
from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.image import Image
from geomed_mae.readers.reasons import Reason
from geomed_mae.samples.folder import Folder
from geomed_mae.samples.grid import Grid, Place, Window, cell_edges, shared
from geomed_mae.samples.memory import decoded, first, piece_of, stored_bytes
from geomed_mae.samples.piece import Piece, joined
from geomed_mae.samples.tiles import DamagedError, TileFile, encode

if TYPE_CHECKING:
    from geomed_mae.config import DataConfig

DECODING = 1
"""Raised when a reader gives other values for the same file, or `tiles` writes another format."""
SLOWER = 8.0
"""Mode auto: an image is stored when it decodes so many times slower than it would be read from the store. Tiles in
deflate, of which a read serves many crops, are 1 to 3 times slower, plain DICOM 20, gzipped NIfTI 70, JPEG 2000 500."""
TOUCHED = 2.0
"""Bytes of tiles that are read and hashed for each byte of a window, about."""
COPY_BYTES_PER_S = 4e9
"""Reading from the page cache and copying."""
MEASURED = 2
"""Reads of windows of an image that are measured before it may be stored."""
MAX_OPEN = 32
"""Files that are kept open."""

log = logging.getLogger(__name__)


class _Spent(NamedTuple):
    """What reading windows of an image has taken: number of reads, seconds, bytes as they would be stored."""

    reads: int
    seconds: float
    bytes: int


class Store:
    """Reads windows through a folder of decoded images. Picklable; opens no file before `read_many`.

    Args:
        index: archive of the images.
        folder: where entries are.
        mode: "always", or "auto": images that decode slowly, as measured.
    """

    def __init__(self, index: Index, folder: Folder, mode: Literal["auto", "always"] = "auto") -> None:
        self.index, self.folder, self.mode = index, folder, mode
        self.seconds_per_byte = verified_read()
        self._spent: dict[str, _Spent] = {}
        self._begun = False
        self._names: dict[str, str] = {}
        self._damaged: set[str] = set()  # and still there
        self._open: OrderedDict[str, TileFile] = OrderedDict()

    def __getstate__(self) -> dict:
        """Another process opens files of its own."""
        return {**self.__dict__, "_open": OrderedDict(), "_begun": False}

    def read_many(self, row: Row, windows: Sequence[Window]) -> list[Piece]:
        """Return windows of an image (one slice a spatial axis, with start and stop, inside it), to be read only.

        Raises:
            ReadError: the image no longer decodes, or what is decoded to be stored is not what was scanned.
        """
        grid = _cells(row)
        places = dict.fromkeys(place for window in windows for place in grid.places(window))
        filled: dict[Place, Piece] = {}
        # A turn that finds damage drops that entry; the next decodes it.
        for _ in range(len(places) + 1):
            missing = [place for place in places if place not in filled and self._file(row, grid, place) is None]
            if missing and not self._wanted(row):
                break
            filled |= {place: self._fill(row, grid, place) for place in missing}
            found = self._gathered(row, grid, windows, filled)
            if found is not None:
                return found
        return self._decoded(row, grid, windows)

    def _wanted(self, row: Row) -> bool:
        """Whether what is missing of an image is to be decoded cell by cell and kept."""
        spent = self._spent.get(row.key)
        slow = spent is not None and spent.reads >= MEASURED and self._is_slow(spent.seconds, spent.bytes)
        return (slow or self.mode == "always") and self.folder.room(0)

    def _is_slow(self, seconds: float, size: int) -> bool:
        return seconds > SLOWER * self.seconds_per_byte * size

    def _gathered(
        self, row: Row, grid: Grid, windows: Sequence[Window], filled: dict[Place, Piece]
    ) -> list[Piece] | None:
        """Return windows from cells that are decoded or stored; None where one turned out to be damaged."""
        parts: list[list[tuple[Window, Piece]]] = [[] for _ in windows]
        asked: dict[Place, list[tuple[int, Window, Window]]] = {}
        for number, window in enumerate(windows):
            for place in grid.places(window):
                asked.setdefault(place, []).append((number, *shared(window, grid.window(place))))
        for place, wanted in asked.items():
            inside = [out for _, _, out in wanted]
            if place in filled:
                found = [filled[place].crop(out) for out in inside]
            else:
                file = self._file(row, grid, place)
                try:
                    found = None if file is None else file.read(inside)
                except (DamagedError, OSError):
                    self._discard(self._name(row, grid, place))
                    found = None
            if found is None:
                return None
            for (number, at, _), piece in zip(wanted, found, strict=True):
                parts[number].append((at, piece))
        shapes = [tuple(part.stop - part.start for part in window) for window in windows]
        return [joined(some, shape) for some, shape in zip(parts, shapes, strict=True)]

    def _decoded(self, row: Row, grid: Grid, windows: Sequence[Window]) -> list[Piece]:
        """Read windows from the files, and measure how long that takes; a whole image that was slow is stored."""
        origin = (0,) * len(row.shape)
        whole = math.prod(grid.counts) == 1 and list(windows) == [grid.window(origin)]
        before = time.perf_counter()
        image = self.index.read(row.key) if whole else None
        pieces = [] if whole else list(decoded(self.index, row, windows))
        seconds = time.perf_counter() - before
        if image is not None:
            pieces = [piece_of(self.index, row, image)]
        size = sum(piece.values.size for piece in pieces) * stored_bytes(row)
        if image is not None and self.mode == "auto" and self._is_slow(seconds, size) and self.folder.room(0):
            self._check(row, image)
            self._keep(row, grid, origin, pieces[0])
        elif self._begun:
            # On average: blocks that GDAL still holds make a slow file fast now and then.
            spent = self._spent.get(row.key, _Spent(0, 0.0, 0))
            self._spent[row.key] = _Spent(spent.reads + 1, spent.seconds + seconds, spent.bytes + size)
        # The first read in a process also loads and starts decoders.
        self._begun = True
        return pieces

    def _fill(self, row: Row, grid: Grid, place: Place) -> Piece:
        """Decode a cell and write its entry."""
        if math.prod(grid.counts) == 1:
            image = self.index.read(row.key)
            self._check(row, image)
            piece = piece_of(self.index, row, image)
        else:
            window = grid.window(place)
            stored = self.index.read_many_stored(row.key, [window])
            piece = piece_of(self.index, row, self.index.read(row.key, window)) if stored is None else first(stored)
        self._keep(row, grid, place, piece)
        return piece

    def _keep(self, row: Row, grid: Grid, place: Place, piece: Piece) -> None:
        name = self._name(row, grid, place)
        if self.folder.write(name, encode(name, piece)):
            self._damaged.discard(name)

    def _check(self, row: Row, image: Image) -> None:
        """Refuse a whole image that is not the one that was scanned: it would be kept under a false name.

        Raises:
            ReadError: HASH_MISMATCH.
        """
        digest = PixelDigest(image.array.shape)
        digest.add(image)
        if digest.hex() != self.index.pixel_digest(row.key):
            raise ReadError(
                "an image decodes to other pixels than when it was scanned: scan again, or restore its files",
                Reason.HASH_MISMATCH.name,
            )

    def _file(self, row: Row, grid: Grid, place: Place) -> TileFile | None:
        """Return the entry of a cell, its head verified; None where there is none."""
        name = self._name(row, grid, place)
        if name in self._open:
            self._open.move_to_end(name)
            return self._open[name]
        descriptor = None if name in self._damaged else self.folder.open(name)
        if descriptor is None:
            return None
        try:
            file = TileFile(descriptor, name)
        except (DamagedError, OSError):
            self._discard(name)
            return None
        self._open[name] = file
        if len(self._open) > MAX_OPEN:
            self._open.popitem(last=False)
        return file

    def _discard(self, name: str) -> None:
        log.warning("an entry of the cache is damaged; it is removed and its image decoded again")
        self._open.pop(name, None)
        if not self.folder.drop(name):
            self._damaged.add(name)

    def _name(self, row: Row, grid: Grid, place: Place) -> str:
        """Return the name of a cell's entry."""
        if row.key not in self._names:
            channels = [(channel.name, channel.unit) for channel in row.channels]
            decides = [DECODING, self.index.pixel_digest(row.key), row.modality, channels, grid.shape, grid.edges]
            if math.prod(grid.counts) > 1:
                # A cell cannot be compared with what was scanned, as a whole image is: its files must not have changed.
                decides.append([_stamp(path) for path in self.index.paths(row.key)])
            self._names[row.key] = hashlib.sha256(json.dumps(decides).encode()).hexdigest()
        return f"{self._names[row.key]}-{grid.number(place)}"


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return size and time of the last change of a file; None where there is none."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _cells(row: Row) -> Grid:
    return Grid(tuple(row.shape), cell_edges(row.shape, len(row.channels) * stored_bytes(row), row.block))


def verified_read() -> float:
    """Return about how many seconds a byte of a window costs from the store; this machine's hashing is measured."""
    block = bytes(1 << 20)
    best = math.inf
    for _ in range(4):
        before = time.perf_counter()
        hashlib.sha256(block).digest()
        best = min(best, time.perf_counter() - before)
    return TOUCHED * (best / len(block) + 1 / COPY_BYTES_PER_S)


def open_store(config: DataConfig, default: Path, index: Index, archives: Sequence[str | Path] = ()) -> Store | None:
    """Return the store that a recipe asks for, None where its `data.cache` is off. Nothing is written yet.

    Args:
        config: `cache`, `cache_dir` and `cache_gb`.
        default: folder where the recipe names none.
        index: archive of the images.
        archives: folders and files that the index was made of; the folders of its own files are looked at anyway.

    Raises:
        ConfigError: the folder named by the recipe lies in an archive, or holds other things than a cache.
    """
    if config.cache == "off":
        return None
    folder = default if config.cache_dir is None else Path(config.cache_dir).expanduser()
    if config.cache_dir is not None:
        _keep_out(folder, index, archives)
    return Store(index, Folder(folder, int(config.cache_gb * 2**30)), config.cache)


def _keep_out(folder: Path, index: Index, archives: Sequence[str | Path]) -> None:
    """Refuse a folder in an archive, which is never written to."""
    where = folder.resolve()
    inside = {Path(archive).resolve() for archive in archives}
    inside |= {path.parent for row in index.rows for path in index.paths(row.key)}
    if inside & {where, *where.parents}:
        raise ConfigError(f"data.cache_dir '{folder}' lies in the archive, which is never written to; choose another")
