"""Rows of an index, and masks, made up."""

from __future__ import annotations

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.image import Channel

NOTHING = Channel(name="x", kind="mr", unit="a.u.")


def made_row(
    key: str,
    group: str | None = None,
    *,
    shape: tuple[int, ...] = (4, 4),
    spacing: tuple[float, ...] | None = None,
    geometry: str = "raster",
) -> Row:
    """A row of which scores need key, group, spacing and geometry."""
    return Row(
        key=key,
        modality="x",
        channels=(NOTHING,),
        shape=shape,
        dtype="uint8",
        geometry=geometry,
        spacing=spacing,
        crs=None,
        footprint=None,
        valid_fraction=1.0,
        statistics=(),
        group=group or key,
        content=key,
        flags=(),
    )


def blocks(shape: tuple[int, ...], seed: int, side: int = 4) -> np.ndarray:
    """Bool of `shape`: a third of its blocks of `side` pixels, drawn by `seed`."""
    coarse = np.random.default_rng(seed).random([-(-size // side) for size in shape]) < 1 / 3
    return np.kron(coarse, np.ones((side,) * len(shape), bool)).astype(bool)[tuple(slice(size) for size in shape)]
