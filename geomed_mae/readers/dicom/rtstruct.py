"""RTSTRUCT: contours in patient millimetres become class numbers on an image's voxels (PS3.3 C.8.8.5 and C.8.8.6).

Each contour is carried into the image's index space by the inverse of its affine, oblique and tilted series alike. Its
plane goes to the slice that lies within half the slice spacing of every one of its points; a contour further off is
refused. A voxel is inside where its centre is inside an odd number of the region's contours on that slice: holes may be
contours of their own or keyholes. Borders are half open, so that regions that share a border share no voxel.

Nothing is interpolated: slices between two contours of a region stay without it, and their number is counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, VolumeGeometry
from geomed_mae.readers.dicom.text import decoded_text
from geomed_mae.readers.dicom.values import Values
from geomed_mae.readers.labels import ClassNumbers, LabelQuery, Labels
from geomed_mae.readers.reasons import Reason

CLOSED = frozenset({"CLOSED_PLANAR", "CLOSEDPLANAR_XOR"})
"""Contour types that enclose an area (PS3.3 C.8.8.6.1). The even-odd rule reads both: the standard's second is defined
by it, and writers use the first for outer borders and holes alike."""

OPEN = frozenset({"POINT", "OPEN_PLANAR", "OPEN_NONPLANAR"})
"""Types that enclose nothing; they are left out and counted."""

MAX_POINTS = 1 << 24
"""Contour points of a file: some ten times those of a whole-body plan with a hundred organs."""

MAX_CONTOURS = 1 << 17
"""Contours of a file."""

MAX_CROSSINGS = 1 << 27
"""Crossings of contours with rows of voxels, over the file: a few seconds of work."""

CROSSINGS_AT_ONCE = 1 << 20

MAX_COORDINATE_MM = 1e5
"""A contour point further than 100 m from the origin is none of a patient's."""

SLICE_SHARE = 0.5
"""A contour belongs to a slice no further away than this share of the slice spacing."""

PLANE_TOLERANCE_MM = 0.1
"""Contours of a region closer than this along the normal are on one plane and combine; of several planes that fall
onto one slice, only the one nearest to it counts."""

ROUNDING_MM = 1e-3
"""Contours are text of three decimals or so: half a slice may be a micrometre more."""

_DIGITS = b"0123456789+-.eE \\\0"


@dataclass(frozen=True, slots=True, eq=False)
class _Contour:
    """One closed contour on its slice: `points` (n, 2) rows and columns, `offset_mm` of its plane from the slice."""

    slice_number: int
    offset_mm: float
    points: np.ndarray


def read_structures(values: Values, onto: Image, query: LabelQuery, place: str) -> Labels:
    """Return class numbers int16 (Z, Y, X) of the regions of a structure set on the grid of `onto`.

    Raises:
        ReadError: BAD_GEOMETRY, CLASS_UNKNOWN, MALFORMED or TOO_LARGE; the text starts with `place`.
    """
    if not isinstance(onto.geometry, VolumeGeometry):
        raise ReadError(f"{place} outlines regions in space; the image has no place in space", Reason.BAD_GEOMETRY.name)
    if "ROIContourSequence" not in values or "StructureSetROISequence" not in values:
        # Also what a file that was cut looks like: the sequences stand at its end.
        raise ReadError(f"{place} has no contours, or was cut short", Reason.MISSING_TAG.name)
    regions = _Regions(values, onto, query, place)
    numbers, counts = ClassNumbers(query, place), regions.counts
    slices: dict[int, list[tuple[int, list[np.ndarray]]]] = {}
    for name, contours in regions:
        number = numbers.number_of(name)
        if number is None:
            continue
        for plane, polygons in _by_slice(list(regions.placed(contours)), counts).items():
            slices.setdefault(plane, []).append((number, polygons))
    if regions.met and not slices and counts["contours_of_other_images"]:
        raise ReadError(f"no contour of {place} lies on this image", Reason.BAD_GEOMETRY.name)
    placed = np.full(onto.spatial_shape, numbers.background, np.int16)
    budget = MAX_CROSSINGS
    for plane, members in slices.items():
        for number, polygons in sorted(members, key=lambda member: member[0]):
            inside, used = fill_even_odd(polygons, onto.spatial_shape[1:], budget)
            if inside is None:
                raise ReadError(f"the contours of {place} cross more rows than the limit", Reason.TOO_LARGE.name)
            budget -= used
            placed[plane][inside] = number
    return Labels(placed, numbers.names, tuple(counts.items()))


class _Regions:
    """The named regions of a structure set and their contours, checked against limits and against the image."""

    def __init__(self, values: Values, onto: Image, query: LabelQuery, place: str) -> None:
        self._values, self._place = values, place
        self._shape = onto.spatial_shape
        self._to_index = np.linalg.inv(onto.geometry.affine)
        self._spacing_mm = onto.geometry.spacing[0]
        self._frames, self._instances = query.known("frame"), query.known("instance")
        self._points = self._contours = 0
        self.counts: Counter[str] = Counter()
        self.met = False

    def __iter__(self) -> Iterator[tuple[str, list[Values]]]:
        """Yield (name, closed contours) of each region that has any and lies in the image's frame of reference."""
        described = {item.text("ROINumber"): item for item in self._values.items("StructureSetROISequence")}
        charset = self._values.text("SpecificCharacterSet")
        for region in self._values.items("ROIContourSequence"):
            contours = [item for item in region.items("ContourSequence") if self._closed(item)]
            if not contours:
                continue
            about = described.get(region.text("ReferencedROINumber"))
            if about is None:
                raise ReadError(f"{self._place} has contours of a region it does not name", Reason.MALFORMED.name)
            frame = about.text("ReferencedFrameOfReferenceUID")
            named = any(self._own(item) for item in contours)
            if frame and self._frames and frame not in self._frames and not named:
                self.counts["regions_in_other_frames"] += 1
                continue
            self.met = True
            yield decoded_text(about.text("ROIName"), charset), contours

    def _closed(self, item: Values) -> bool:
        self._contours += 1
        if self._contours > MAX_CONTOURS:
            raise ReadError(f"{self._place} has more than {MAX_CONTOURS} contours", Reason.TOO_LARGE.name)
        kind = item.text("ContourGeometricType").upper()
        if kind not in CLOSED | OPEN:
            raise ReadError(f"{self._place} has a contour of no known geometric type", Reason.MALFORMED.name)
        self.counts["contours_left_out"] += kind in OPEN
        return kind in CLOSED

    def _own(self, item: Values) -> bool | None:
        """Say whether a contour was drawn on a slice of this image; None where one of the two does not tell."""
        drawn_on = {one.text("ReferencedSOPInstanceUID") for one in item.items("ContourImageSequence")} - {""}
        return None if not drawn_on or not self._instances else bool(drawn_on & self._instances)

    def placed(self, contours: Sequence[Values]) -> Iterator[_Contour]:
        """Yield the contours that lie on the image.

        Raises:
            ReadError: BAD_GEOMETRY for one that lies off it, unless it was drawn on another image than the others.
        """
        owned = any(self._own(item) for item in contours)
        for item in contours:
            points = self._coordinates(item)
            if len(points) < 3:
                self.counts["contours_left_out"] += 1
                continue
            index = points @ self._to_index[:3, :3].T + self._to_index[:3, 3]
            if problem := self._problem(index):
                if owned and self._own(item) is False:
                    self.counts["contours_of_other_images"] += 1
                    continue
                raise ReadError(f"{self._place} {problem}", Reason.BAD_GEOMETRY.name)
            mean = float(index[:, 0].mean())
            number = int(np.clip(np.rint(mean), 0, self._shape[0] - 1))
            edge = index[:, 1:].min(axis=0) < -0.5, index[:, 1:].max(axis=0) > np.array(self._shape[1:]) - 0.5
            self.counts["contours_cut_by_the_edge"] += bool(np.any(edge))
            yield _Contour(number, (mean - number) * self._spacing_mm, index[:, 1:])

    def _coordinates(self, item: Values) -> np.ndarray:
        """Return the points (n, 3) of a contour in mm."""
        raw = item.text("ContourData").encode("latin-1")
        if raw.translate(None, _DIGITS):
            raise ReadError(f"{self._place} has contour points that are no numbers", Reason.MALFORMED.name)
        self._points += raw.count(b"\\") // 3 + 1
        if self._points > MAX_POINTS:
            raise ReadError(f"{self._place} has more than {MAX_POINTS} contour points", Reason.TOO_LARGE.name)
        try:
            numbers = np.array(raw.split(b"\\") if raw else [], dtype="S").astype(np.float64)
        except ValueError:
            raise ReadError(f"{self._place} has contour points that are no numbers", Reason.MALFORMED.name) from None
        declared = item.number("NumberOfContourPoints")
        if numbers.size % 3 or (declared is not None and declared != numbers.size // 3):
            raise ReadError(
                f"{self._place} has a contour of {numbers.size} coordinates that declares "
                f"{'no number' if declared is None or declared != declared else f'{declared:g}'} of points",
                Reason.MALFORMED.name,
            )
        # Text such as 1e999 is a number of the right form, and infinite.
        if numbers.size and not np.abs(numbers).max() <= MAX_COORDINATE_MM:
            raise ReadError(
                f"{self._place} has a contour point beyond {MAX_COORDINATE_MM:g} mm", Reason.BAD_GEOMETRY.name
            )
        return numbers.reshape(-1, 3)

    def _problem(self, index: np.ndarray) -> str:
        """Say why a contour (n, 3) in index space does not lie on the image, "" where it does."""
        number = np.clip(np.rint(index[:, 0].mean()), 0, self._shape[0] - 1)
        apart = float(np.abs(index[:, 0] - number).max()) * self._spacing_mm
        if apart > SLICE_SHARE * self._spacing_mm + ROUNDING_MM:
            return (
                f"has a contour {apart:.2f} mm from the nearest slice of the image, whose slices are "
                f"{self._spacing_mm:.2f} mm apart"
            )
        lowest, highest = index[:, 1:].min(axis=0), index[:, 1:].max(axis=0)
        if (highest < -0.5).any() or (lowest > np.array(self._shape[1:]) - 0.5).any():
            return "has a contour beside the image"
        return ""


def _by_slice(contours: Sequence[_Contour], counts: Counter[str]) -> dict[int, list[np.ndarray]]:
    """Return the polygons of one region per slice: those of the plane nearest to it, each drawn once."""
    found: dict[int, list[_Contour]] = {}
    for contour in contours:
        found.setdefault(contour.slice_number, []).append(contour)
    polygons: dict[int, list[np.ndarray]] = {}
    for number, members in found.items():
        nearest = min(members, key=lambda contour: abs(contour.offset_mm)).offset_mm
        kept = [one for one in members if abs(one.offset_mm - nearest) <= PLANE_TOLERANCE_MM]
        counts["contours_between_slices"] += len(members) - len(kept)
        # A contour that is stored twice would undo itself by the even-odd rule.
        polygons[number] = list({one.points.tobytes(): one.points for one in kept}.values())
    if found:
        counts["slices_between_contours"] += max(found) - min(found) + 1 - len(found)
    return polygons


def fill_even_odd(
    polygons: Sequence[np.ndarray], shape: tuple[int, ...], budget: int = MAX_CROSSINGS
) -> tuple[np.ndarray | None, int]:
    """Return bool (rows, columns): centres that lie inside an odd number of polygons; and the crossings it took.

    A centre is inside a polygon when a ray along its row, towards lower columns, crosses the border an odd number of
    times; a centre on the border belongs to the area at higher rows and columns.

    Args:
        polygons: (n, 2) of row and column each, in pixels, centres at whole numbers; the last point joins the first.
        shape: (rows, columns).
        budget: more crossings than this return None in place of the mask.
    """
    rows, columns = shape
    start = np.concatenate(polygons)
    end = np.concatenate([np.roll(polygon, -1, axis=0) for polygon in polygons])
    first = np.clip(np.ceil(np.minimum(start[:, 0], end[:, 0])), 0, rows).astype(np.int64)
    count = np.clip(np.ceil(np.maximum(start[:, 0], end[:, 0])), 0, rows).astype(np.int64) - first
    total = int(count.sum())
    inside = np.zeros(shape, dtype=bool)
    if total > budget:
        return None, total
    if total == 0:
        return inside, 0
    crossed = np.flatnonzero(count)
    start, end, first, count = start[crossed], end[crossed], first[crossed], count[crossed]
    # Only the rectangle around the polygons is looked at: a small organ in a large slice is the usual case.
    top, bottom = int(first.min()), int((first + count).max())
    touched = np.concatenate([start[:, 1], end[:, 1]])
    left, right = (int(np.clip(np.ceil(edge), 0, columns)) for edge in (touched.min(), touched.max()))
    parity = np.zeros((bottom - top, right - left + 1), dtype=np.int64)
    blocks = np.searchsorted(np.cumsum(count), np.arange(0, total, CROSSINGS_AT_ONCE), side="right").tolist()
    for begin, stop in zip(blocks, [*blocks[1:], len(count)], strict=True):
        if begin == stop:
            continue
        part = slice(begin, stop)
        edge = np.repeat(np.arange(begin, stop), count[part])
        row = first[edge] + np.arange(edge.size) - np.repeat(np.cumsum(count[part]) - count[part], count[part])
        share = (row - start[edge, 0]) / (end[edge, 0] - start[edge, 0])
        at = np.ceil(start[edge, 1] + share * (end[edge, 1] - start[edge, 1]))
        column = np.clip(at, left, right).astype(np.int64) - left
        cells = np.bincount((row - top) * parity.shape[1] + column, minlength=parity.size)
        parity += cells.reshape(parity.shape)
    inside[top:bottom, left:right] = np.cumsum(parity, axis=1)[:, :-1] % 2
    return inside, total
