"""Which images of one set meet images of another: on the ground, or by their looks.

The rules are those of `places` and `duplicates`, which look for pairs within one archive; here two sets are compared,
of some 100,000 images each, in seconds, and one partner is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from geomed_mae.archives.duplicates import BITS, MAX_DISTANCE
from geomed_mae.archives.places import (
    EARTH_M,
    ELLIPSOID_MARGIN,
    MIN_OVERLAP,
    MIN_SHARED_PIXELS,
    Place,
    Ring,
    distance_m,
    overlapping,
    shapely,
)

Spot = tuple[Ring, float]
"""Corners (longitude, latitude) of a raster, and the ground area of its pixel in square metres, 0 where unknown."""

_CORNERS = 4
_EDGE_POINTS = 8
_WIDEST, _HIGHEST = 90.0, 85.0
"""Degrees of extent and of latitude up to which a footprint of four corners is compared in bulk."""
_PAIRS = 1 << 14
_QUERIES = 1 << 12
_COMPARED = 1 << 20
"""Pairs of footprints, boxes that are looked up and pairs of hashes that are in memory together."""


def on_shared_ground(spots: Sequence[Spot], others: Iterable[Spot], buffer_m: float = 0.0) -> np.ndarray:
    """Return bool (spots,): whether a footprint overlaps one of `others`, or lies within `buffer_m` metres of it.

    Overlap as in `places.overlapping`: more than 1 % of the smaller footprint and at least MIN_SHARED_PIXELS of the
    coarser image. Distance as in `places.closer_than`; neighbours that touch are no overlap and have distance 0, which
    counts where `buffer_m` is above 0.

    Args:
        spots: corners (longitude, latitude) in degrees and the ground area of a pixel in square metres, 0 if unknown.
        others: the same.
        buffer_m: 0 asks for overlaps alone.

    Raises:
        MissingExtraError: shapely is not installed, and there are different footprints to compare.
    """
    known = set(others)
    found = np.array([spot in known for spot in spots], dtype=bool)
    left = sorted({spot for spot, hit in zip(spots, found, strict=True) if not hit})
    if not left or not known:
        return found
    hits = _meeting(left, sorted(known), buffer_m)
    return found | np.array([spot in hits for spot in spots], dtype=bool)


def _meeting(left: Sequence[Spot], right: Sequence[Spot], buffer_m: float) -> set[Spot]:
    """Return the spots of `left` that meet one of `right`."""
    library = shapely()
    ours, theirs = _Side(left), _Side(right)
    boxes, owners = theirs.boxes(buffer_m * ELLIPSOID_MARGIN / EARTH_M)
    tree = library.STRtree(library.box(*boxes.T))
    asked, askers = ours.boxes(0.0)
    met = np.zeros(len(left), dtype=bool)
    for first in range(0, len(asked), _QUERIES):
        number, place = tree.query(library.box(*asked[first : first + _QUERIES].T))
        pairs = np.unique(np.stack([askers[first + number], owners[place]], axis=1), axis=0)
        bulk = ours.plain[pairs[:, 0]] & theirs.plain[pairs[:, 1]]
        plain, odd = pairs[bulk], pairs[~bulk]
        if buffer_m == 0:
            plain = plain[_may_overlap(ours, theirs, plain)]
        for start in range(0, len(plain), _PAIRS):
            some = plain[start : start + _PAIRS]
            some = some[~met[some[:, 0]]]  # one partner is enough
            if len(some):
                met[some[_meet(ours, theirs, some, buffer_m), 0]] = True
        for one, other in odd:
            met[one] = met[one] or _meet_odd(left[one], right[other], buffer_m)
    return {left[one] for one in np.flatnonzero(met)}


class _Side:
    """Footprints of one set as arrays.

    Attributes:
        spots: as given.
        plain: bool (n,): four corners, no large part of the globe, nowhere near a pole; the others go one by one.
        corners: float64 (n, 4, 2) longitude and latitude in degrees, 0 where not plain.
        pixels: float64 (n,) ground area of a pixel in square metres.
    """

    def __init__(self, spots: Sequence[Spot]) -> None:
        self.spots = spots
        self.pixels = np.array([area for _, area in spots])
        four = np.array([len(ring) == _CORNERS for ring, _ in spots])
        self.corners = np.zeros((len(spots), _CORNERS, 2))
        if four.any():
            self.corners[four] = [ring for (ring, _), is_four in zip(spots, four, strict=True) if is_four]
        self.low, self.high = self.corners.min(axis=1), self.corners.max(axis=1)
        highest = np.abs(self.corners[..., 1]).max(axis=1)
        self.plain = four & ((self.high - self.low).max(axis=1) < _WIDEST) & (highest < _HIGHEST)
        self.corners[~self.plain] = 0.0

    def boxes(self, margin: float) -> tuple[np.ndarray, np.ndarray]:
        """Return float64 (m, 4) boxes (west, south, east, north) in degrees, and whose they are, with what lies within
        `margin` radians of the footprints; two boxes where one crosses the antimeridian.
        """
        at = np.flatnonzero(self.plain)
        # Edges are straight in longitude and latitude, so that the corners bound the ring.
        low, high = self.low[at], self.high[at]
        south, north = low[:, 1] - np.degrees(margin), high[:, 1] + np.degrees(margin)
        steepest = np.cos(np.radians(np.minimum(np.maximum(np.abs(south), np.abs(north)), 89.9)))
        wide = np.degrees(np.arcsin(np.minimum(np.sin(min(margin, 1.5)) / steepest, 1.0)))
        west, east = low[:, 0] - wide, high[:, 0] + wide
        turn = 360.0 * np.floor((west + 180.0) / 360.0)
        west, east = west - turn, east - turn
        polar = (south < -89) | (north > 89) | (east - west >= 360)
        west, east = np.where(polar, -180.0, west), np.where(polar, 180.0, east)
        boxes, over = np.stack([west, south, east, north], axis=1), east > 180
        turned = np.stack([np.full(over.sum(), -180.0), south[over], east[over] - 360, north[over]], axis=1)
        odd = [(box, number) for number in np.flatnonzero(~self.plain) for box in self._odd_boxes(number, margin)]
        found = [boxes, turned, np.array([box for box, _ in odd], dtype=np.float64).reshape(-1, 4)]
        return np.concatenate(found), np.concatenate([at, at[over], np.array([who for _, who in odd], dtype=np.intp)])

    def _odd_boxes(self, number: int, margin: float) -> list[tuple[float, float, float, float]]:
        return Place(self.spots[number][0]).boxes(margin)


def _may_overlap(ours: _Side, theirs: _Side, pairs: np.ndarray) -> np.ndarray:
    """Return bool (pairs,): False where the boxes around two plain footprints already share too little.

    Neighbours in a mosaic, which touch and do not overlap, are by far the most pairs.
    """
    one, other = pairs.T
    turn = 360.0 * np.round((ours.low[one, 0] - theirs.low[other, 0]) / 360.0)
    shift = np.stack([turn, np.zeros(len(turn))], axis=1)
    shared = np.minimum(ours.high[one], theirs.high[other] + shift) - np.maximum(
        ours.low[one], theirs.low[other] + shift
    )
    largest = np.clip(shared, 0.0, None).prod(axis=1) * _widest_degree(ours, theirs, one, other)
    smaller = np.minimum(_least_area(ours)[one], _least_area(theirs)[other])
    return largest > 0.9 * MIN_OVERLAP * smaller


def _widest_degree(ours: _Side, theirs: _Side, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return the largest cosine of latitude that two boxes have."""
    south = np.minimum(ours.low[one, 1], theirs.low[other, 1])
    north = np.maximum(ours.high[one, 1], theirs.high[other, 1])
    nearest = np.where((south < 0) & (north > 0), 0.0, np.minimum(np.abs(south), np.abs(north)))
    return np.cos(np.radians(nearest))


def _least_area(side: _Side) -> np.ndarray:
    """Return a lower bound on the area of each plain footprint, in square degrees of the equator."""
    x, y = np.moveaxis(side.corners, -1, 0)
    area = np.abs((x * np.roll(y, -1, axis=1) - y * np.roll(x, -1, axis=1)).sum(axis=1)) / 2
    return area * np.cos(np.radians(np.abs(side.corners[..., 1]).max(axis=1)))


def _meet_odd(one: Spot, other: Spot, buffer_m: float) -> bool:
    first, second = overlapping([one[0], other[0]], [one[1], other[1]])
    near = buffer_m > 0 and distance_m(Place(one[0]), Place(other[0])) <= buffer_m * ELLIPSOID_MARGIN
    return near or first == second


def _meet(ours: _Side, theirs: _Side, pairs: np.ndarray, buffer_m: float) -> np.ndarray:
    """Return bool (pairs,) of plain footprints: the rules of `on_shared_ground` on each pair's own equal-area map."""
    library = shapely()
    one, other = pairs.T
    outlines = [_outlines(ours.corners[one]), _outlines(theirs.corners[other])]
    middle = outlines[0].mean(axis=1) + outlines[1].mean(axis=1)
    middle /= np.linalg.norm(middle, axis=1, keepdims=True)
    first, second = (_polygons(outline, middle) for outline in outlines)
    shared = library.area(library.intersection(first, second))
    smaller = np.minimum(library.area(first), library.area(second))
    pixel = np.maximum(ours.pixels[one], theirs.pixels[other])
    met = (shared > MIN_OVERLAP * smaller) & (shared >= MIN_SHARED_PIXELS * pixel)
    if buffer_m > 0:
        met |= library.distance(first, second) <= buffer_m * ELLIPSOID_MARGIN
    return met


def _outlines(corners: np.ndarray) -> np.ndarray:
    """Return float64 (n, 32, 3) on the unit sphere: the edges between `corners` (n, 4, 2), straight in longitude and
    latitude, cut into eighths.
    """
    share = (np.arange(_EDGE_POINTS) / _EDGE_POINTS)[:, None]
    steps = np.roll(corners, -1, axis=1) - corners
    degrees = (corners[:, :, None] + steps[:, :, None] * share).reshape(len(corners), -1, 2)
    lon, lat = np.moveaxis(np.radians(degrees), -1, 0)
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)


def _polygons(outlines: np.ndarray, middle: np.ndarray) -> np.ndarray:
    """Return the outlines as polygons in metres, Lambert azimuthal equal-area around `middle` (pairs, 3)."""
    library = shapely()
    # Any axis not along the centre will do: areas and distances do not depend on a map's rotation.
    east = np.cross(np.eye(3)[np.abs(middle).argmin(axis=1)], middle)
    east /= np.linalg.norm(east, axis=1, keepdims=True)
    north = np.cross(middle, east)
    cosine, x, y = (np.einsum("pnd,pd->pn", outlines, axis) for axis in (middle, east, north))
    factor = EARTH_M * np.sqrt(2 / (1 + np.clip(cosine, -1 + 1e-9, 1)))
    polygons = library.polygons(np.stack([x * factor, y * factor], axis=-1))
    folded = ~library.is_valid(polygons)
    polygons[folded] = library.convex_hull(polygons[folded])
    return polygons


def look_alike(hashes: Sequence[str], others: Iterable[str]) -> np.ndarray:
    """Return bool (hashes,): whether an image is within `duplicates.MAX_DISTANCE` bits of one of `others`.

    Images with the hash "" are like none. No pair is missed: of MAX_DISTANCE + 1 bands of bits at least one is equal.
    """
    known = {text for text in others if text}
    found = np.array([text in known for text in hashes], dtype=bool)
    for kind in sorted({text.partition(":")[0] for text in known}):
        rows = np.array(
            [at for at, text in enumerate(hashes) if text.startswith(f"{kind}:") and not found[at]], dtype=np.intp
        )
        theirs = sorted(text for text in known if text.startswith(f"{kind}:"))
        if len(rows):
            found[rows] = _any_within(_bits([hashes[row] for row in rows]), _bits(theirs))
    return found


def _bits(hashes: Sequence[str]) -> np.ndarray:
    """Return the bits of hashes packed, uint8 (hashes, 32)."""
    whole = b"".join(bytes.fromhex(text.partition(":")[2]) for text in hashes)
    return np.frombuffer(whole, dtype=np.uint8).reshape(-1, BITS // 8)


def _any_within(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Return bool (ours,): whether any row of `theirs`, uint8 (n, 32), differs in at most MAX_DISTANCE bits."""
    found = np.zeros(len(ours), dtype=bool)
    for band in range(MAX_DISTANCE + 1):
        left = np.flatnonzero(~found)
        sides = []
        for side in (ours[left], theirs):
            keys = _keys(side, band)
            order = np.argsort(keys, kind="stable")
            sides.append((keys[order], order, np.ascontiguousarray(side[order]).view(np.uint64)))
        (mine, order, words), (known, _, others) = sides
        buckets, starts = np.unique(mine, return_index=True)
        low, high = (np.searchsorted(known, buckets, side=edge) for edge in ("left", "right"))
        ends = np.append(starts[1:], len(mine))
        for bucket in np.flatnonzero(high > low):
            inside = slice(starts[bucket], ends[bucket])
            hit = _near_one_of(words[inside], others[low[bucket] : high[bucket]])
            found[left[order[inside][hit]]] = True
    return found


def _keys(packed: np.ndarray, band: int) -> np.ndarray:
    # Every 21st bit, as in duplicates: low frequencies, which subjects of one kind share, are spread over the bands.
    part = np.packbits(np.unpackbits(packed, axis=1)[:, band :: MAX_DISTANCE + 1], axis=1)
    return part.astype(np.uint64) @ (np.uint64(256) ** np.arange(part.shape[1], dtype=np.uint64))


def _near_one_of(words: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return bool (a,): whether a row of uint64 (a, 4) is within MAX_DISTANCE bits of one of (b, 4)."""
    hit = np.zeros(len(words), dtype=bool)
    step = max(1, _COMPARED // len(others))
    for first in range(0, len(words), step):
        some = words[first : first + step]
        # The last word has the highest frequencies, in which subjects differ most: it decides nearly all pairs.
        one, other = np.nonzero(np.bitwise_count(some[:, None, -1] ^ others[None, :, -1]) <= MAX_DISTANCE)
        distance = np.bitwise_count(some[one] ^ others[other]).sum(axis=1)
        hit[first + one[distance <= MAX_DISTANCE]] = True
    return hit
