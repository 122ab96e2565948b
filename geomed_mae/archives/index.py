"""The index: a table of the images of an archive, and the way from a key to an Image.

On disk an index is a folder (all of it written at once, see `Index.save`):

    index.parquet       one row an image, no identifier: may be shown and copied
    ledger.jsonl        one line a file
    card.md             a drafted data card, its pictures in card/
    splits.json         which part of a split each image is in, where one was asked for (see `split_file`)
    locations.parquet   key -> files, private (mode 0600): paths and identifiers stay here
    salt                the secret of the keyed hashes, private (mode 0600); a later scan into the folder keeps it, so
                        that keys stay what they are
    journal.sqlite      what scans have learned, private (mode 0600, see `journal`); alone, the scan has not finished
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from geomed_mae.archives.identity import content_key, keyed
from geomed_mae.archives.journal import JOURNAL
from geomed_mae.archives.ledger import Ledger
from geomed_mae.archives.statistics import ChannelStatistics
from geomed_mae.errors import ConfigError, IntegrityError, OutputError
from geomed_mae.image import Channel, Image, VolumeGeometry
from geomed_mae.readers import read_guarded
from geomed_mae.readers.source import Source, StoredWindow, whole_window
from geomed_mae.readers.windows import read_many_guarded, read_many_stored

if TYPE_CHECKING:
    from geomed_mae.readers.dicom.origin import Origin

FORMAT_VERSION = 2
"""Raised when an older index can no longer be read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One image of an archive, without anything that identifies a person or a file.

    Attributes:
        key: keyed hash of its files and what is taken from them.
        shape: spatial shape ([slices,] rows, columns).
        dtype: stored type, for example "uint16".
        geometry: "raster", "volume" or "plane".
        spacing: per spatial axis, metres for rasters, mm for the others; None where unknown.
        crs: WKT of a raster's coordinate system, or None.
        footprint: corners (longitude, latitude) of a georeferenced raster, or None.
        valid_fraction: share of valid values, 0 to 1.
        statistics: one a channel, over valid pixels, physical units.
        group: keyed hash of the patient or scene: never split between training and test.
        content: keyed hash of the pixels.
        flags: notes, for example "ORDER_ASSUMED".
        block: (rows, columns) of a raster's stored blocks, or None.
    """

    key: str
    modality: str
    channels: tuple[Channel, ...]
    shape: tuple[int, ...]
    dtype: str
    geometry: str
    spacing: tuple[float, ...] | None
    crs: str | None
    footprint: tuple[tuple[float, float], ...] | None
    valid_fraction: float
    statistics: tuple[ChannelStatistics, ...]
    group: str
    content: str
    flags: tuple[str, ...]
    block: tuple[int, int] | None = None

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Row:
        """Inverse of `to_json`."""
        spacing, footprint = data["spacing"], data["footprint"]
        return cls(
            **{
                **data,
                "channels": tuple(Channel(**channel) for channel in data["channels"]),
                "statistics": tuple(ChannelStatistics(**entry) for entry in data["statistics"]),
                "shape": tuple(data["shape"]),
                "spacing": None if spacing is None else tuple(spacing),
                "footprint": None if footprint is None else tuple((lon, lat) for lon, lat in footprint),
                "flags": tuple(data["flags"]),
                "block": None if data["block"] is None else tuple(data["block"]),
            }
        )


@dataclass(frozen=True)
class Index:
    """Rows, ledger and the private way to the files. Picklable; opens no file before `read`."""

    rows: tuple[Row, ...]
    ledger: Ledger
    _sources: dict[str, Source] = field(repr=False)
    _digests: dict[str, str] = field(repr=False)
    _salt: bytes = field(repr=False)
    _looks: dict[str, str] = field(repr=False, default_factory=dict)

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: str) -> Row:
        return next(row for row in self.rows if row.key == key)

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the pixels of all images: the same for the same archive, whenever and wherever it is scanned."""
        return hashlib.sha256("".join(sorted(self._digests[row.key] for row in self.rows)).encode()).hexdigest()

    @property
    def digests(self) -> dict[str, str]:
        """Key -> digest of the pixels, without a salt. Private: it confirms a guess at an image."""
        return {row.key: self._digests[row.key] for row in self.rows}

    @property
    def looks(self) -> dict[str, str]:
        """Key -> perceptual hash (see `duplicates`), "" where there is none. Private: it describes the content."""
        return {row.key: self._looks.get(row.key, "") for row in self.rows}

    def pixel_digest(self, key: str) -> str:
        """Return the digest of an image's pixels, without a salt: the same whenever it is scanned. Private."""
        return self._digests[key]

    def scaling(self, key: str) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
        """Return (scale, offset), each one a channel, that stored numbers are multiplied with and added to.

        None where no header but each frame's own says so, as in DICOM.
        """
        source = self._sources[key]
        selectors = [part.get("selector", {}) for part in source.selector.get("parts", ())] or [source.selector]
        sides = []
        for name in ("scale", "offset"):
            given = [one.get(name) for one in selectors]
            if any(value is None for value in given):
                return None
            numbers = np.concatenate([np.atleast_1d(np.asarray(value, np.float64)) for value in given])
            if len(numbers) not in (1, len(source.channels)):
                return None
            sides.append(tuple(np.broadcast_to(numbers, len(source.channels)).tolist()))
        return sides[0], sides[1]

    def content_key(self, key: str, salt: bytes) -> str:
        """Return the keyed hash of an image's pixels under another salt, to compare with what a run has recorded."""
        return content_key(self._digests[key], salt)

    def read(self, key: str, window: tuple[slice, ...] | None = None) -> Image:
        """Read an image, or a window of it (one slice a spatial axis); image codecs run in a child process.

        A volume's geometry carries keyed hashes of its frame of reference and of its slices' instances.

        Raises:
            ReadError: the files are gone or no longer decode.
        """
        return self._named(key, read_guarded(self._sources[key], window), window)

    def _named(self, key: str, image: Image, window: tuple[slice, ...] | None) -> Image:
        source = self._sources[key]
        if not isinstance(image.geometry, VolumeGeometry):
            return replace(image, key=key)
        frames = sorted(value for kind, value in source.identity if kind == "frame")
        instances = source.selector.get("instances") or ()
        if len(instances) != source.shape[0]:
            instances = ()
        geometry = replace(
            image.geometry,
            frame_of_reference=keyed(self._salt, "frame", *frames) if frames else None,
            slice_keys=tuple(
                keyed(self._salt, "slice", str(instance))
                for instance in instances[whole_window(window, source.shape)[0]]
            ),
        )
        return replace(image, key=key, geometry=geometry)

    def read_many(self, key: str, windows: Sequence[tuple[slice, ...]]) -> Iterator[Image]:
        """Read several windows of an image; what they share is decoded once, and all before this returns.

        Raises:
            ReadError: as `read`.
        """
        images = read_many_guarded(self._sources[key], windows)
        return (self._named(key, image, window) for image, window in zip(images, windows, strict=True))

    def read_many_stored(self, key: str, windows: Sequence[tuple[slice, ...]]) -> Iterable[StoredWindow] | None:
        """Read several windows as the integers that the files hold; None where a reader cannot give these.

        Raises:
            ReadError: as `read`.
        """
        return read_many_stored(self._sources[key], windows)

    def paths(self, key: str) -> tuple[Path, ...]:
        """Return the files of an image. Private: for matching labels, never for a run, a report or a log."""
        return self._sources[key].files

    def identity(self, key: str) -> tuple[tuple[str, str], ...]:
        """Return the (kind, value) pairs that tie an image to others (see `Source.identity`). Private, as paths are."""
        return self._sources[key].identity

    def reader(self, key: str) -> str:
        """Return the name of the reader that reads an image, for example "dicom"."""
        return self._sources[key].reader

    def dicom_origin(self, key: str) -> Origin:
        """Return patient, study and slices of a DICOM image. Private: for an object derived from it, and nothing else.

        Raises:
            ReadError: the files are gone or are others than those that were indexed.
        """
        from geomed_mae.readers.dicom.origin import read_origin  # of one output format alone

        return read_origin(self._sources[key])

    def outline(self, key: str) -> Image:
        """Return an image without its pixels, which are all 0: shape, channels and geometry, and no file is opened."""
        source = self._sources[key]
        shape = (len(source.channels), *source.shape)
        return Image(
            array=np.broadcast_to(np.float32(0), shape),
            valid=np.broadcast_to(np.True_, shape),
            channels=source.channels,
            geometry=source.geometry,
            modality=source.modality,
            key=key,
        )

    def subset(self, rows: Sequence[Row]) -> Index:
        """Return the index of some rows; the ledger stays whole, because it accounts for files."""
        sources = {row.key: self._sources[row.key] for row in rows}
        digests = {row.key: self._digests[row.key] for row in rows}
        looks = {row.key: self._looks.get(row.key, "") for row in rows}
        return Index(tuple(rows), self.ledger, sources, digests, self._salt, looks)

    def by_pixels(self) -> Index:
        """Return the index with its rows in an order that no name, place or key of a file changes.

        For training: a run that goes on after files were renamed draws the same samples.
        """
        return self.subset(sorted(self.rows, key=lambda row: self._digests[row.key]))

    @classmethod
    def joined(cls, parts: Sequence[Index]) -> Index:
        """Return several indexes as one, in memory. Each part's keys stay under that part's own salt.

        Raises:
            ConfigError: there is nothing to join, or two parts hold the same images.
        """
        rows = [row for part in parts for row in part.rows]
        if not rows or len({row.key for row in rows}) < len(rows):
            raise ConfigError("no archive was given, or the same index was given twice")
        entries = tuple(entry for part in parts for entry in part.ledger.entries)
        sources = {key: source for part in parts for key, source in part._sources.items()}
        digests = {key: digest for part in parts for key, digest in part._digests.items()}
        looks = {key: look for part in parts for key, look in part._looks.items()}
        return cls(tuple(rows), Ledger(entries), sources, digests, parts[0]._salt, looks)

    def save(self, folder: Path, card: str) -> Path:
        """Write the index folder, private files with mode 0600: all of it, or none that `load` would take for whole.

        Raises:
            OutputError: the folder cannot be written.
        """
        import pyarrow as pa  # a tenth of a second that --help does not need
        import pyarrow.parquet as pq

        try:
            new = folder / _UNPUBLISHED
            new.mkdir(parents=True, exist_ok=True)
            rows = [
                {name: value if name in _PLAIN else json.dumps(value) for name, value in row.to_json().items()}
                for row in self.rows
            ]
            table = pa.Table.from_pylist(rows).replace_schema_metadata({"geomed_mae.index": str(FORMAT_VERSION)})
            pq.write_table(table, new / "index.parquet", compression="zstd")
            self.ledger.save(new / "ledger.jsonl")
            (new / "card.md").write_text(card, encoding="utf-8")
            sources = [
                {
                    "key": key,
                    "digest": self._digests[key],
                    "looks": self._looks.get(key, ""),
                    "source": json.dumps(source.to_json()),
                }
                for key, source in self._sources.items()
            ]
            with _private(new / "locations.parquet") as out:
                pq.write_table(pa.Table.from_pylist(sources), out, compression="zstd")
            with _private(new / "salt") as out:
                out.write(self._salt)
            _publish(new, folder)
        except OSError as error:
            raise OutputError(f"the index cannot be written to '{folder}': {error.strerror or error}") from error
        return folder

    @classmethod
    def load(cls, folder: Path) -> Index:
        """Read an index folder.

        Raises:
            ConfigError: the folder is no index.
            IntegrityError: a part of it is missing or damaged, or it is of a newer version.
            SecurityError: it names something as a file that is no plain path, such as a URL.
        """
        import pyarrow as pa
        import pyarrow.parquet as pq

        if not is_index(folder):
            refuse_unfinished(folder)
            raise ConfigError(f"'{folder}' is no index: it has no index.parquet; make one with geomed-mae scan")
        try:
            table = pq.read_table(folder / "index.parquet")
            version = int((table.schema.metadata or {}).get(b"geomed_mae.index", b"0"))
            if version != FORMAT_VERSION:
                raise IntegrityError(
                    f"'{folder}' is an index of version {version}, this is {FORMAT_VERSION}: scan again"
                )
            rows = [
                Row.from_json({name: value if name in _PLAIN else json.loads(value) for name, value in row.items()})
                for row in table.to_pylist()
            ]
            located = pq.read_table(folder / "locations.parquet").to_pylist()
            sources = {entry["key"]: Source.from_json(json.loads(entry["source"])) for entry in located}
            digests = {entry["key"]: entry["digest"] for entry in located}
            looks = {entry["key"]: entry.get("looks") or "" for entry in located}
            ledger = Ledger.load(folder / "ledger.jsonl")
            salt = (folder / "salt").read_bytes()
        except (OSError, pa.ArrowException, ValueError, KeyError, TypeError) as error:
            raise IntegrityError(f"the index '{folder}' is damaged ({error}): scan again") from error
        return cls(tuple(rows), ledger, sources, digests, salt, looks)


_PLAIN = ("key", "modality", "dtype", "geometry", "crs", "valid_fraction", "group", "content")
"""Columns stored as such; the others are JSON text, so that a row reads back exactly."""


_UNPUBLISHED = ".new"
"""Folder inside an index in which its next version is written."""


def _publish(new: Path, folder: Path) -> None:
    """Move finished files to their place. Without index.parquet, which goes first and comes last, there is no index."""
    names = sorted(path.name for path in new.iterdir() if path.name != "index.parquet")
    for name in (*names, "index.parquet"):
        with (new / name).open("rb") as file:
            os.fsync(file.fileno())
    (folder / "index.parquet").unlink(missing_ok=True)
    for name in (*names, "index.parquet"):
        (new / name).replace(folder / name)
    new.rmdir()


def refuse_unfinished(folder: Path) -> None:
    """Refuse a folder in which a scan was begun and not finished; anything else passes.

    Raises:
        ConfigError: saying how to finish it.
    """
    if (folder / JOURNAL).is_file() and not is_index(folder):
        raise ConfigError(
            f"the scan into '{folder}' has not finished: run the same geomed-mae scan again, it goes on where it was"
        )


def _private(path: Path) -> Any:
    """Open for writing with mode 0600 from the first byte on."""
    path.unlink(missing_ok=True)
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb")


def is_index(path: Path) -> bool:
    """Return whether `path` is an index folder."""
    return (path / "index.parquet").is_file()
