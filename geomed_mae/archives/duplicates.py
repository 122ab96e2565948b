"""Images that look the same although their bytes differ: copies that were re-encoded, rescaled or brightened.

A copy on both sides of a split is leakage that no content hash sees. The hash here is the sign of the 256 lowest
frequencies of a discrete cosine transform (Zauner 2010, "Implementation and benchmarking of perceptual image hash
functions") of a coarse grid of valid-pixel means, 32 x 32 cells or 16 x 16 x 16 for volumes, whose values are
equalised first: it does not change with brightness, contrast, most tone curves, bit depth, resampling and light
compression. It does change with flips, rotations, crops, and with shifts of more than about a hundredth of the image.

Measured distances, in bits of 256: of different subjects at least 38 (2,428 chest radiographs of 28 x 28 pixels,
2.9 million pairs), 43 (87 hippocampus MR volumes) and 106 (22 Sentinel-2 scenes); of JPEG copies of quality 50 at most
6 (scenes), of scenes at half size 19, moved by one pixel 18, with a square-root tone curve 20.

A hash shows a picture of 32 x 32 cells to whoever inverts it: it belongs into private files alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from geomed_mae.archives.components import Components
from geomed_mae.archives.statistics import BlockMeans
from geomed_mae.image import Image

BITS = 256
MAX_DISTANCE = 20
"""Bits in which two copies may differ; half the smallest distance met between different subjects."""

_GRID = {2: 32, 3: 16}
_FREQUENCIES = {2: 24, 3: 10}
"""Frequencies per axis of which the lowest 256 (by their sum) are taken."""

_LEVELS = 64
MIN_VALID_CELLS = 0.5
"""Share of cells with a valid pixel below which an image has no hash: the shape of its nodata would decide."""

MIN_ENERGY = 1e-3
MIN_STRONG_BITS = 128
"""Frequencies that must be stronger than MIN_ENERGY of the strongest. Ramps, steps and discs reach a quarter of this,
photographs, scenes and scans nearly all 256; the others have signs that are rounding errors, and match by chance."""

_CHUNK = 1 << 22
"""Pairs compared at a time: some 130 MB."""


class PerceptualHash:
    """Hash of what an image looks like, fed part by part in the order of `PixelDigest`.

    Args:
        channels: number of channels; the equalised channels are averaged.
        shape: spatial shape of the whole image.
    """

    def __init__(self, channels: int, shape: Sequence[int]) -> None:
        self._axes = len(shape)
        self._means = BlockMeans(channels, shape, (_GRID[self._axes],) * self._axes)

    def add(self, image: Image) -> None:
        """Take the next part."""
        self._means.add(image.array, image.valid)

    def text(self) -> str:
        """Return the hash, for example "2d:91ab...", or "" for an image that is too flat or too empty to be told apart.

        Private: it describes the content.
        """
        cells = _equalised_mean(self._means.result()[0])
        if cells is None:
            return ""
        signs = _lowest_frequencies(cells)
        if (np.abs(signs) > MIN_ENERGY * np.abs(signs).max()).sum() < MIN_STRONG_BITS:
            return ""
        return f"{self._axes}d:{np.packbits(signs > 0).tobytes().hex()}"


def _equalised_mean(means: np.ndarray) -> np.ndarray | None:
    """Return the mean over channels of equalised cells, 0 to 1, (*S); None where too few cells are valid."""
    known = np.isfinite(means)
    if known.any(axis=0).mean() < MIN_VALID_CELLS:
        return None
    total, count = np.zeros(means.shape[1:]), 0
    for values, inside in zip(means, known, strict=True):
        low, high = (values[inside].min(), values[inside].max()) if inside.any() else (0.0, 0.0)
        if not high > low:
            continue
        # Ranks of 64 levels, not of values: noise in a flat background would otherwise fill the scale.
        levels = (values - low) / (high - low) * _LEVELS
        met, times = np.unique(np.round(levels[inside]), return_counts=True)
        ranks = (np.cumsum(times) - times / 2) / times.sum()
        total += np.where(inside, np.interp(np.where(inside, levels, 0.0), met, ranks), 0.5)
        count += 1
    return total / count if count else None


def _lowest_frequencies(cells: np.ndarray) -> np.ndarray:
    """Return the 256 lowest coefficients of the cosine transform (DCT-II) without the mean, float64."""
    axes = cells.ndim
    found = cells - cells.mean()
    for axis in range(axes):
        # A short axis repeats its cells, so that an image of few slices has as many frequencies as any other.
        size = cells.shape[axis]
        found = np.take(found, np.arange(_GRID[axes]) * size // _GRID[axes], axis=axis)
        steps = np.pi * (2 * np.arange(_GRID[axes]) + 1) / (2 * _GRID[axes])
        waves = np.cos(np.arange(_FREQUENCIES[axes])[:, None] * steps)
        found = np.moveaxis(np.tensordot(waves, found, axes=(1, axis)), 0, axis)
    order = np.indices(found.shape).reshape(axes, -1)
    # By the sum of frequencies, ties by position: a fixed order, from coarse to fine.
    lowest = np.lexsort((*order[::-1], order.sum(axis=0)))
    return found.ravel()[lowest[1 : BITS + 1]]


def near_duplicates(hashes: Sequence[str]) -> list[int]:
    """Return a cluster number per image: the same for images within MAX_DISTANCE bits, directly or through others.

    Images with the hash "" are clusters of their own. No pair within the distance is missed: of MAX_DISTANCE + 1 bands
    of bits at least one is equal (pigeonhole), so that only images that share a band are compared.
    """
    clusters = Components(len(hashes))
    first: dict[str, int] = {}
    for node, text in enumerate(hashes):
        if text:
            clusters.join(node, first.setdefault(text, node))
    for kind in sorted({text.partition(":")[0] for text in first}):
        nodes = np.array([node for text, node in first.items() if text.startswith(f"{kind}:")])
        bits = np.array([list(bytes.fromhex(hashes[node].partition(":")[2])) for node in nodes], dtype=np.uint8)
        for one, other in _close_pairs(bits):
            clusters.join(int(nodes[one]), int(nodes[other]))
    return clusters.numbers()


def _close_pairs(packed: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs of rows of uint8 (n, 32) within MAX_DISTANCE bits, each at least once."""
    bits = np.unpackbits(packed, axis=1)
    words = np.ascontiguousarray(packed).view(np.uint64)
    for band in range(MAX_DISTANCE + 1):
        # Every 21st bit: low frequencies, which subjects of one kind share, are spread over the bands.
        part = np.packbits(bits[:, band :: MAX_DISTANCE + 1], axis=1)
        keys = part.astype(np.uint64) @ (np.uint64(256) ** np.arange(part.shape[1], dtype=np.uint64))
        order = np.argsort(keys, kind="stable")
        for bucket in np.split(order, np.flatnonzero(np.diff(keys[order])) + 1):
            if len(bucket) > 1:
                yield from _within(words, bucket)


def _within(words: np.ndarray, bucket: np.ndarray) -> Iterator[tuple[int, int]]:
    step = max(1, _CHUNK // len(bucket))
    for top in range(0, len(bucket), step):
        rows = bucket[top : top + step]
        distance = np.bitwise_count(words[rows][:, None] ^ words[bucket][None]).sum(axis=-1)
        one, other = np.nonzero(distance <= MAX_DISTANCE)
        yield from ((int(rows[i]), int(bucket[j])) for i, j in zip(one, other, strict=True) if rows[i] < bucket[j])


def duplicate_flags(digests: Sequence[str], hashes: Sequence[str]) -> list[tuple[str, ...]]:
    """Return the flags of each image: DUPLICATE_PIXELS where another has the same pixels, NEAR_DUPLICATE where another
    looks the same with other pixels.

    Args:
        digests: of `PixelDigest`, one an image.
        hashes: of `PerceptualHash`, in the same order.
    """
    times = Counter(digests)
    clusters = near_duplicates(hashes)
    contents: dict[int, set[str]] = {}
    for cluster, digest in zip(clusters, digests, strict=True):
        contents.setdefault(cluster, set()).add(digest)
    return [
        ("DUPLICATE_PIXELS",) * (times[digest] > 1) + ("NEAR_DUPLICATE",) * (len(contents[cluster]) > 1)
        for cluster, digest in zip(clusters, digests, strict=True)
    ]
