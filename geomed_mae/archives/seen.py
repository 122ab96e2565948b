"""What a model has seen: the record that travels with it, so that a later score over the same images can be refused.

`leakage` compares; here is what is kept, and where. A record by which images are known again also betrays them to
whoever can guess, so it has two parts.

**Public**, `pretrained_on.json` in an encoder folder and `trained_on.json` in a task model, goes where the weights go:

    salt      random, of this record alone. It lies beside the hashes: without it nobody could look anything up
    contents  keyed hashes of whole pixel arrays. Who has an image finds out whether it is among them, which is their
              purpose. To guess one means to guess every pixel of it
    groups    keyed hashes of the group keys of volumes and planes. Those are hashes under the *index's* salt, which
              stays in the index's private files: without it there are 2^128 of them to try. With the same INDEX they
              tell a patient again
    places    corners and pixel size of rasters, as `index.parquet` has them: where images lie is no secret here

**Private**, `RUN/private/seen.json` (folder 0700, file 0600), stays in the run that made it; no export copies it:

    identities  keyed hashes of patient numbers, study, series and frame of reference UIDs. A patient number has some
                eight digits: with hash and salt at hand all 10^8 are tried in minutes, and with a hospital's own list
                of patients in no time, however slow the hash is made. UIDs of dates and counters are little better. So
                no form of them may lie beside its salt in anything that is handed on
    looks       perceptual hashes (`duplicates`), open: what nearly matches cannot be found among keyed hashes, and each
                shows a picture of 32 x 32 cells

A model that is handed on without the private part is still checked for equal pixels, shared ground and, with the same
INDEX, patients; that the rest could not be compared is recorded with every score.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from geomed_mae.archives.components import Components
from geomed_mae.archives.identity import keyed, new_salt
from geomed_mae.archives.neighbours import Spot
from geomed_mae.errors import ConfigError, IntegrityError, OutputError

if TYPE_CHECKING:
    from geomed_mae.archives.index import Index, Row

FORMAT = "geomed-mae seen"
VERSION = 1
PRIVATE_FOLDER, PRIVATE_FILE = "private", "seen.json"

PRETRAINING, TRAINING = "pretraining", "training"
"""What images were seen for: without labels, or with them."""

IDENTITIES, LOOKS = "identities", "looks"
"""What the private part holds."""

KINDS = ("patient", "study", "series", "frame")
"""Identity pairs that tell a subject. Instances are left out: a series has hundreds, and the same pixels are known."""

NOBODY = frozenset(
    {"anon", "anonymous", "anonymized", "anonymised", "unknown", "none", "na", "noid", "patient", "test"}
)
"""Patient numbers that name no patient: two archives that both use one are not told to share a patient for it."""

Pairs = frozenset[tuple[str, str]]
"""Identity pairs (kind, value)."""

DECIMALS = 7
"""Of degrees in the record: a centimetre."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Private:
    """What must not leave the run: see the module."""

    salt: str
    identities: frozenset[str]
    looks: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The images of one training.

    Attributes:
        what: PRETRAINING or TRAINING.
        salt: of `contents` and `groups`, hex; also the name of the part.
        images: how many.
        contents, groups: keyed hashes.
        places: different ones of its rasters.
        withheld: what the private part holds (IDENTITIES, LOOKS), whether or not it is at hand.
        private: the private part, None where it is not at hand or there is none.
    """

    what: str
    salt: str
    images: int
    contents: frozenset[str]
    groups: frozenset[str] = frozenset()
    places: frozenset[Spot] = frozenset()
    withheld: tuple[str, ...] = ()
    private: Private | None = None

    @property
    def missing(self) -> tuple[str, ...]:
        """What was recorded of these images and is not at hand."""
        return self.withheld if self.private is None else ()


@dataclass(frozen=True, slots=True)
class Seen:
    """All that a model has seen: its own images, and those of the models that it began from.

    Attributes:
        parts: one a training.
        unrecorded: trainings of which nothing is known, such as PRETRAINING of an encoder that came from elsewhere.
    """

    parts: tuple[Part, ...] = ()
    unrecorded: tuple[str, ...] = field(default=())

    @classmethod
    def nothing(cls) -> Seen:
        """Return the record of random weights."""
        return cls()

    @classmethod
    def unknown(cls, what: str = PRETRAINING) -> Seen:
        """Return the record of a model of which nobody has written down what it has seen."""
        return cls((), (what,))

    @classmethod
    def of(cls, index: Index, rows: Sequence[Row], *, what: str, relatives: Mapping[str, Pairs] | None = None) -> Seen:
        """Return the record of images that a model learns from, under fresh salts.

        Args:
            index: holds `rows`, and what else is known: an image in between may tie two patient numbers together.
            rows: the images.
            what: PRETRAINING or TRAINING.
            relatives: `kin` of the index, where it is known already.
        """
        salt, secret = new_salt(), new_salt()
        relatives, looks = kin(index) if relatives is None else relatives, index.looks
        pairs = {pair for row in rows for pair in relatives[row.key]}
        hashes = sorted({looks[row.key] for row in rows} - {""})
        held = {IDENTITIES: any(kind in KINDS for kind, _ in pairs), LOOKS: bool(hashes)}
        private = Private(
            salt=secret.hex(),
            identities=frozenset(keyed(secret, "identity", *pair) for pair in pairs),
            looks=tuple(hashes),
        )
        part = Part(
            what=what,
            salt=salt.hex(),
            images=len(rows),
            contents=frozenset(index.content_key(row.key, salt) for row in rows),
            groups=frozenset(group_key(salt, name) for name in {row.group for row in rows if row.footprint is None}),
            places=frozenset(spot for row in rows if (spot := spot_of(row)) is not None),
            withheld=tuple(name for name, holds in held.items() if holds),
            private=private if pairs or hashes else None,
        )
        return cls((part,))

    def __add__(self, other: Seen) -> Seen:
        """Return what a model has seen that began from another."""
        known = {part.salt for part in self.parts}
        more = tuple(part for part in other.parts if part.salt not in known)
        return Seen(self.parts + more, tuple(dict.fromkeys(self.unrecorded + other.unrecorded)))

    def public(self) -> bytes:
        """Return the public part as JSON."""
        parts = [
            {
                "what": part.what,
                "salt": part.salt,
                "images": part.images,
                "contents": sorted(part.contents),
                "groups": sorted(part.groups),
                "places": sorted(part.places),
                "withheld": part.withheld,
            }
            for part in self.parts
        ]
        data = {"format": FORMAT, "version": VERSION, "unrecorded": self.unrecorded, "parts": parts}
        return json.dumps(data, separators=(",", ":")).encode()

    @classmethod
    def from_public(cls, data: bytes, name: str) -> Seen:
        """Read what `public` returned.

        Raises:
            ConfigError: it is of a newer version. IntegrityError: it is no such record; `name` is the file's.
        """
        try:
            found = json.loads(data)
            if found["format"] == FORMAT and found["version"] != VERSION:
                raise ConfigError(f"{name} is of version {found['version']}, not {VERSION}: use a newer geomed-mae")
            parts = tuple(_part(entry) for entry in found["parts"])
            return cls(parts, tuple(found["unrecorded"]))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            raise IntegrityError(f"{name} is no record of what a model has seen ({error})") from error

    def with_private(self, private: Mapping[str, Private]) -> Seen:
        """Return the record with the private parts that belong to it; `private` is by the parts' salts."""
        return replace(self, parts=tuple(replace(part, private=private.get(part.salt)) for part in self.parts))


def _part(entry: Mapping[str, Any]) -> Part:
    places = (((tuple((lon, lat) for lon, lat in ring)), float(area)) for ring, area in entry["places"])
    return Part(
        what=str(entry["what"]),
        salt=bytes.fromhex(entry["salt"]).hex(),
        images=int(entry["images"]),
        contents=frozenset(entry["contents"]),
        groups=frozenset(entry["groups"]),
        places=frozenset(places),
        withheld=tuple(entry["withheld"]),
    )


def spot_of(row: Row) -> Spot | None:
    """Return where a raster lies, None for other images."""
    if row.footprint is None:
        return None
    height, width = row.spacing or (0.0, 0.0)
    return tuple((round(lon, DECIMALS), round(lat, DECIMALS)) for lon, lat in row.footprint), height * width


def group_key(salt: bytes, group: str) -> str:
    """Return the keyed form of a group key."""
    return keyed(salt, "group", group)


def kin(index: Index) -> dict[str, Pairs]:
    """Return key -> the (kind, value) pairs of an image and of all images of the index that it is tied to.

    One study under two patient numbers makes them one patient, also for images of other studies. An image without any
    is told by its file, as other images of that file are of the same subject. Private.
    """
    keys = [row.key for row in index.rows]
    pairs = [_pairs(index, row) for row in index.rows]
    components = Components(len(keys))
    first: dict[tuple[str, str], int] = {}
    for node, own in enumerate(pairs):
        for pair in own:
            components.join(node, first.setdefault(pair, node))
    together: dict[int, set[tuple[str, str]]] = {}
    for node, own in enumerate(pairs):
        together.setdefault(components.of(node), set()).update(own)
    shared = {number: frozenset(found) for number, found in together.items()}
    return {key: shared[components.of(node)] for node, key in enumerate(keys)}


def _pairs(index: Index, row: Row) -> list[tuple[str, str]]:
    identity = index.identity(row.key)
    if not identity:
        return [] if row.footprint is not None else [("file", str(index.paths(row.key)[0].absolute()))]
    found = [pair for pair in identity if pair[0] in KINDS]
    return [pair for pair in found if pair[0] != "patient" or not _is_placeholder(pair[1])]


def _is_placeholder(value: str) -> bool:
    number = value.rpartition("|")[0].strip().casefold()  # the reader writes number|issuer
    return number in NOBODY or not number.strip("0x-_. ")


def save_private(run: Path, seen: Seen) -> None:
    """Write RUN/private/seen.json, for its owner alone; without anything private there is no such file.

    Raises:
        OutputError: it cannot be written.
    """
    held = {part.salt: part.private for part in seen.parts if part.private is not None}
    folder = run / PRIVATE_FOLDER
    parts = {
        name: {"salt": one.salt, "identities": sorted(one.identities), "looks": one.looks} for name, one in held.items()
    }
    note = (
        "private: from this file patient numbers can be guessed. It must not leave the run; checks do less without it"
    )
    data = json.dumps({"format": FORMAT, "version": VERSION, "note": note, "parts": parts}, separators=(",", ":"))
    partial = folder / f".{PRIVATE_FILE}.partial"
    try:
        if not held:
            (folder / PRIVATE_FILE).unlink(missing_ok=True)
            return
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
        partial.unlink(missing_ok=True)
        with os.fdopen(os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as out:
            out.write(data)
            out.flush()
            os.fsync(out.fileno())
        partial.replace(folder / PRIVATE_FILE)
    except OSError as error:
        raise OutputError(f"'{folder}' cannot be written: {error.strerror or error}") from error


def load_private(run: Path) -> dict[str, Private]:
    """Read RUN/private/seen.json; {} where there is none, or it belongs to somebody else.

    Raises:
        IntegrityError: it is damaged.
    """
    path = run / PRIVATE_FOLDER / PRIVATE_FILE
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError, PermissionError):
        return {}
    except (OSError, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    try:
        parts = json.loads(text)["parts"].items()
        return {
            name: Private(
                salt=bytes.fromhex(one["salt"]).hex(),
                identities=frozenset(one["identities"]),
                looks=tuple(one["looks"]),
            )
            for name, one in parts
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> IntegrityError:
    return IntegrityError(
        f"'{path}' is damaged ({type(error).__name__}): restore it, or delete it and do without comparing patients and "
        "look-alikes with what this model has seen"
    )


def load_seen(data: bytes, folder: Path, name: str) -> Seen:
    """Return the record `data`, which is the file `name` of a run's model folder, with the private part beside it.

    Raises:
        ConfigError, IntegrityError: as `Seen.from_public` and `load_private`.
    """
    return Seen.from_public(data, f"'{folder}': {name}").with_private(load_private(folder.resolve().parent))


def hashed(salt: str, pairs: Iterable[tuple[str, str]]) -> list[str]:
    """Return identity pairs in the form of `Private.identities`."""
    secret = bytes.fromhex(salt)
    return [keyed(secret, "identity", *pair) for pair in pairs]
