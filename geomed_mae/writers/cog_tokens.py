"""Token grids as cloud-optimised GeoTIFF: dense embeddings, one band a dimension, and their colours.

The grid is that of the tokens, never warped. Embeddings are int8 by default: each band has one scale and one offset,
as GDAL, rasterio and QGIS apply them (value = stored * scale + offset), fitted to the smallest and largest value of the
band, so that no value is clipped and none is more than half a step off. Stored -128 is nodata; of float32 it is NaN.
Overviews are averages. Tiles are small and hold all bands of a token together (pixel interleave): GDAL before 3.11
writes no other COG, and whoever wants the vector of a place reads one tile.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from geomed_mae.errors import ConfigError
from geomed_mae.image import RasterGeometry
from geomed_mae.writers.cog_rows import PIECE_ROWS, Bands, rows_to_cog
from geomed_mae.writers.token_spool import TokenSpool

ENDING = ".tif"
COLOURS_ENDING = "-preview.tif"
DTYPES = ("int8", "float32", "float16")
TILE_PX = 128
"""Side of a tile of embeddings, the COG driver's smallest: with all bands together a larger one has many megabytes."""
NODATA_INT8 = -128
STEPS = 254
"""Steps between the smallest and the largest value of a band: stored -127 to 127."""
HALF = (3, 11)
"""First version of GDAL with half precision (RFC 100)."""


def check_dtype(name: str) -> None:
    """Refuse, before anything is computed, a type of numbers that cannot be written here.

    Raises:
        ConfigError: no such type, or GDAL is too old for float16.
    """
    if name not in DTYPES:
        raise ConfigError(f"--dtype {name} is none of {', '.join(DTYPES)}")
    if name != "float16":
        return
    import rasterio

    version = tuple(map(int, rasterio.__gdal_version__.split(".")[:2]))
    if version < HALF or "float16" not in rasterio.dtypes.dtype_rev:
        raise ConfigError(
            f"--dtype float16 needs GDAL 3.11 and a rasterio that knows it; here are GDAL {rasterio.__gdal_version__} "
            f"and rasterio {rasterio.__version__}: take int8, a quarter of the size of float32, or float32"
        )


class Quantised:
    """How the values of a spool become stored numbers, and how far off these are.

    Args:
        spool: with at least one token.
        dtype: of DTYPES.
    """

    def __init__(self, spool: TokenSpool, dtype: str) -> None:
        self.dtype = dtype
        low, high = spool.low.astype(np.float64), spool.high.astype(np.float64)
        whole = dtype == "int8"
        self.scale = np.where(whole & (high > low), (high - low) / STEPS, 1.0)
        self.offset = (high + low) / 2 if whole else np.zeros(spool.width)
        self._errors, self._energy, self._largest, self._cosines, self._count = 0.0, 0.0, 0.0, 0.0, 0

    def stored(self, band: np.ndarray) -> np.ndarray:
        """Return (width, rows, columns) as it is stored, and count how far off it is."""
        if self.dtype != "int8":
            return band.astype(self.dtype)
        known = np.isfinite(band[0])
        exact = band[:, known].astype(np.float64)
        steps = np.round((exact - self.offset[:, None]) / self.scale[:, None])
        stored = np.full(band.shape, NODATA_INT8, dtype=np.int8)
        stored[:, known] = steps.astype(np.int8)
        back = steps * self.scale[:, None] + self.offset[:, None]
        self._errors += float(np.square(back - exact).sum())
        self._energy += float(np.square(exact - self.offset[:, None]).sum())
        self._largest = max(self._largest, float(np.abs(back - exact).max(initial=0.0)))
        lengths = np.linalg.norm(back, axis=0) * np.linalg.norm(exact, axis=0)
        self._cosines += float(((back * exact).sum(axis=0) / np.maximum(lengths, np.finfo(np.float64).tiny)).sum())
        self._count += exact.shape[1]
        return stored

    def error(self) -> dict[str, float]:
        """Return what storing costs against float32: largest difference, relative RMS, mean cosine of the vectors."""
        if self.dtype != "int8" or not self._count:
            return {}
        return {
            "largest_difference": round(self._largest, 6),
            "relative_rms": round(float(np.sqrt(self._errors / max(self._energy, np.finfo(np.float64).tiny))), 6),
            "mean_cosine": round(self._cosines / self._count, 7),
        }


def write(
    path: Path,
    spool: TokenSpool,
    geometry: RasterGeometry,
    *,
    names: Sequence[str],
    tags: Mapping[str, str],
    dtype: str = "int8",
) -> dict[str, float]:
    """Write a grid of tokens, some rows at a time: memory does not grow with its height.

    Args:
        path: file to write.
        spool: the tokens, at least one.
        geometry: of the tokens.
        names: one a dimension, which become the bands' descriptions.
        tags: of the file.
        dtype: of DTYPES.

    Returns:
        The error of int8 against float32 (`Quantised.error`); {} for the others.

    Raises:
        OutputError: the file cannot be written.
    """
    quantised = Quantised(spool, dtype)
    whole = dtype == "int8"
    bands = Bands(
        names=tuple(names),
        dtype=dtype,
        nodata=NODATA_INT8 if whole else float("nan"),
        scales=tuple(quantised.scale.tolist()) if whole else None,
        offsets=tuple(quantised.offset.tolist()) if whole else None,
        tags=tags,
        overviews="AVERAGE",
        tile_px=TILE_PX,
        compress="ZSTD",
    )
    with rows_to_cog(path, spool.grid, geometry, bands) as rows:
        for band in _all_rows(spool):
            rows.put(quantised.stored(band))
    return quantised.error()


def _all_rows(spool: TokenSpool) -> Iterator[np.ndarray]:
    """Yield the bands of a spool from the first row to the last, NaN where it has none."""
    height, width = spool.grid
    done = 0
    for first, band in itertools.chain(spool.bands(), [(height, np.empty((spool.width, 0, width), np.float32))]):
        for missing in range(done, first, PIECE_ROWS):
            yield np.full((spool.width, min(PIECE_ROWS, first - missing), width), np.nan, dtype=np.float32)
        yield band
        done = first + band.shape[1]


def write_colours(path: Path, colours: np.ndarray, geometry: RasterGeometry) -> Path:
    """Write uint8 (3, rows, columns) as an RGB picture on the map; 0 is nodata.

    Raises:
        OutputError: the file cannot be written.
    """
    names = ("component 1", "component 2", "component 3")
    bands = Bands(names=names, nodata=0, overviews="AVERAGE", photometric="RGB")
    with rows_to_cog(path, colours.shape[1:], geometry, bands) as rows:
        rows.put(colours)
    return path
