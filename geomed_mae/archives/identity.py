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

from geomed_mae.image import Image

SALT_BYTES = 32
KEY_HEX = 32
"""Hex digits of a key: 128 bits."""


def new_salt() -> bytes:
    """Return a fresh secret salt."""
    return secrets.token_bytes(SALT_BYTES)


def keyed(salt: bytes, *parts: str) -> str:
    """Return the keyed hash of `parts`, which are kept apart by their lengths."""
    message = b"".join(len(raw).to_bytes(8, "little") + raw for raw in (part.encode("utf-8") for part in parts))
    return hmac.new(salt, message, hashlib.sha256).hexdigest()[:KEY_HEX]


class PixelDigest:
    """SHA-256 of an image's pixels and validity, fed part by part: equal for equal pixels, whatever the file.

    Private: someone who has a guess at an image could confirm it. What leaves is `content_key` or a hash over many.
    """

    def __init__(self, shape: tuple[int, ...]) -> None:
        self._hash = hashlib.sha256(repr(tuple(shape)).encode())

    def add(self, image: Image) -> None:
        """Take the next part; how an image is cut into parts must follow from its shape alone."""
        self._hash.update(np.ascontiguousarray(image.array).data)
        self._hash.update(np.packbits(np.broadcast_to(image.valid, image.array.shape)).data)

    def hex(self) -> str:
        """Return the digest."""
        return self._hash.hexdigest()


def content_key(digest: str, salt: bytes) -> str:
    """Return the keyed form of a pixel digest."""
    return keyed(salt, "content", digest)


def connected_groups(identities: Sequence[Iterable[tuple[str, str]]]) -> list[int]:
    """Return a group number per entry: entries that share any (kind, value) pair, directly or through others, share it.

    One study under two patient numbers, or one frame of reference under two studies, is one subject
    (RSNA anonymizer issue 18). Entries without identity are groups of their own.
    """
    parent = list(range(len(identities)))

    def find(node: int) -> int:
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    first: dict[tuple[str, str], int] = {}
    for node, pairs in enumerate(identities):
        for pair in pairs:
            parent[find(node)] = find(first.setdefault(pair, node))
    return [find(node) for node in range(len(identities))]
