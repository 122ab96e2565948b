"""The common grid of a scene's files: the finest one, on which every coarser pixel is a whole block of pixels.

Exact or not at all: Sentinel-2 bands of 10, 20 and 60 m share their upper left corner (S2-PDGS-TAS-DI-PSD, tile grids),
so a coarser band is repeated, never interpolated.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from geomed_mae.image import RasterGeometry

GRID_TOLERANCE = 0.01
"""How far, in pixels of the finest grid, corners that should agree may lie apart: rounding of stored coordinates."""
MAX_RATIO = 64
"""Largest whole factor between the resolutions of one scene; real ones are 2, 3 and 6."""


class _Placed(Protocol):
    path: Path
    shape: tuple[int, int]
    geometry: RasterGeometry


_CODE = re.compile(r'AUTHORITY\["EPSG","(\d+)"\]\]$')


@dataclass(frozen=True, slots=True)
class Grid:
    """The finest header, and per header how many of its (rows, columns) one pixel spans."""

    finest: _Placed
    ratios: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True)
class Misfit:
    """Files that do not fit the finest grid, and why."""

    why: dict[Path, str]


def common_grid(headers: Sequence[_Placed]) -> Grid | Misfit:
    """Return the common grid of rasters, or which of them do not fit it."""
    finest = min(headers, key=lambda h: (_area(h.geometry.transform), -h.shape[0] * h.shape[1]))
    ratios, why = [], {}
    for header in headers:
        found = _fit(header, finest)
        if isinstance(found, str):
            why[header.path] = found
        else:
            ratios.append(found)
    return Misfit(why) if why else Grid(finest, tuple(ratios))


def _area(transform: Sequence[float]) -> float:
    a, b, _, d, e, _ = transform
    return abs(a * e - b * d)


def _fit(header: _Placed, finest: _Placed) -> tuple[int, int] | str:
    """Return the ratio (rows, columns) of a raster's pixels to the finest ones, or why it has none."""
    if not _same_crs(header.geometry.crs, finest.geometry.crs):
        return "its coordinate system is not that of the other bands"
    ratio = (
        _step_ratio(header.geometry.transform, finest.geometry.transform, (1, 4)),
        _step_ratio(header.geometry.transform, finest.geometry.transform, (0, 3)),
    )
    rows, columns = (max(1, round(value)) for value in ratio)
    size = f"{header.shape[0]} x {header.shape[1]} pixels for {finest.shape[0]} x {finest.shape[1]}"
    if max(rows, columns) > MAX_RATIO:
        return (
            f"its pixels are {ratio[0]:.3g} x {ratio[1]:.3g} times the finest; whole factors up to {MAX_RATIO} can be"
        )
    shift = _corner_shift(header, finest, (rows, columns))
    if shift > GRID_TOLERANCE:
        return (
            f"its grid ({size}, factor {ratio[0]:.6g} x {ratio[1]:.6g}) lies up to {shift:.3g} of the finest pixels off"
        )
    for have, factor, wanted in zip(header.shape, (rows, columns), finest.shape, strict=True):
        # The last coarse pixel may reach beyond the finest grid, which cuts it; anything else is another extent.
        if not wanted <= have * factor < wanted + factor:
            return f"it covers another extent: {size} and factor {rows} x {columns}"
    return rows, columns


def _step_ratio(coarse: Sequence[float], fine: Sequence[float], axis: tuple[int, int]) -> float:
    """Return the length of one step along an axis over the length of the finest grid's."""
    lengths = [(grid[axis[0]] ** 2 + grid[axis[1]] ** 2) ** 0.5 for grid in (coarse, fine)]
    return lengths[0] / lengths[1]


def _corner_shift(header: _Placed, finest: _Placed, ratio: tuple[int, int]) -> float:
    """Return how far the raster's corners lie from where the finest grid puts them, in pixels of that grid."""
    a, b, c, d, e, f = finest.geometry.transform
    determinant = a * e - b * d
    worst = 0.0
    rows, columns = header.shape
    for row, column in ((0, 0), (0, columns), (rows, 0), (rows, columns)):
        g = header.geometry.transform
        x, y = g[0] * column + g[1] * row + g[2] - c, g[3] * column + g[4] * row + g[5] - f
        fine_column, fine_row = (e * x - b * y) / determinant, (a * y - d * x) / determinant
        worst = max(worst, abs(fine_column - column * ratio[1]), abs(fine_row - row * ratio[0]))
    return worst


def _same_crs(one: str | None, other: str | None) -> bool:
    """Whether two coordinate systems, as WKT of one library, are one: the same text or the same EPSG code."""
    if one is None or other is None:
        return one is other
    codes = [_CODE.search(wkt) for wkt in (one, other)]
    return one == other or (None not in codes and codes[0][1] == codes[1][1])
