"""Keyed hashes: the only form in which names, identifiers, paths and pixels leave an archive's private files.

HMAC-SHA256 under a 32-byte secret salt, truncated to 128 bits. A plain hash of an eight-digit patient number is found
by trying all of them; without the salt this one is not.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable, Sequence

import numpy as np

from geomed_mae.archives.components import Components
from geomed_mae.archives.duplicates import near_duplicates
from geomed_mae.archives.places import Ring, overlapping
from geomed_mae.image import Image

SALT_BYTES = 32
KEY_HEX = 32
"""Hex digits of a key: 128 bits."""


def new_salt() -> bytes:
    """Return a fresh secret salt."""
    return secrets.token_bytes(SALT_BYTES)


def keyed(salt: bytes, *parts: str) -> str:
    """Return the keyed hash of `parts`, which are kept apart by their lengths."""
    encoded = (part.encode("utf-8", "surrogateescape") for part in parts)
    message = b"".join(len(raw).to_bytes(8, "little") + raw for raw in encoded)
    return hmac.new(salt, message, hashlib.sha256).hexdigest()[:KEY_HEX]


class PixelDigest:
    """SHA-256 of an image's pixels and validity, fed part by part: equal for equal pixels, whatever the file.

    Private: someone who has a guess at an image could confirm it. What leaves is `content_key` or a hash over many.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._shape = repr(tuple(shape)).encode()
        self._channels = [(hashlib.sha256(), hashlib.sha256()) for _ in range(shape[0])]

    def add(self, image: Image) -> None:
        """Take the next part: whole rows, from the first on. Where an image is cut does not change its digest."""
        valid = np.broadcast_to(image.valid, image.array.shape)
        for (values, masks), plane, inside in zip(self._channels, image.array, valid, strict=True):
            values.update(np.ascontiguousarray(plane).data)
            masks.update(np.packbits(inside, axis=-1).data)

    def hex(self) -> str:
        """Return the digest."""
        parts = (part.digest() for pair in self._channels for part in pair)
        return hashlib.sha256(self._shape + b"".join(parts)).hexdigest()


def content_key(digest: str, salt: bytes) -> str:
    """Return the keyed form of a pixel digest."""
    return keyed(salt, "content", digest)


def connected_groups(identities: Sequence[Iterable[tuple[str, str]]]) -> list[int]:
    """Return a group number per entry: entries that share any (kind, value) pair, directly or through others, share it.

    One study under two patient numbers, or one frame of reference under two studies, is one subject
    (RSNA anonymizer issue 18). Entries without identity are groups of their own.
    """
    components = Components(len(identities))
    first: dict[tuple[str, str], int] = {}
    for node, pairs in enumerate(identities):
        for pair in pairs:
            components.join(node, first.setdefault(pair, node))
    return components.numbers()


def groups(
    identities: Sequence[Iterable[tuple[str, str]]],
    footprints: Sequence[tuple[Ring | None, float | None]],
    digests: Sequence[str],
    hashes: Sequence[str],
) -> list[int]:
    """Return a group number per image: what may never be on two sides of a split has the same.

    Images belong together that share an identity pair (patient, study, frame of reference, file), have the same pixels,
    look the same, or overlap on the ground (other dates of one place, neighbouring scenes); directly or through others.

    Args:
        identities: private (kind, value) pairs of each image, as `Source.identity`.
        footprints: corners (longitude, latitude) or None, as `Row.footprint`, and the ground area of a pixel in square
            metres or None.
        digests: of `PixelDigest`.
        hashes: of `duplicates.PerceptualHash`, "" where there is none.

    Raises:
        MissingExtraError: there are footprints to compare and shapely is not installed.
    """
    looks = near_duplicates(hashes)
    places = overlapping([ring for ring, _ in footprints], [area for _, area in footprints])
    tied = [
        [*pairs, ("pixels", digest), ("looks", str(look)), *([] if place is None else [("place", str(place))])]
        for pairs, digest, look, place in zip(identities, digests, looks, places, strict=True)
    ]
    return connected_groups(tied)
