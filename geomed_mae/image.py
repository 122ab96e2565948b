"""Image: the one value that crosses the border between readers and everything after them.

Conventions, held everywhere in the package:

- array axes are (channel, row, column) or (channel, slice, row, column); spatial indices are pixel or voxel *centres*;
- rasters carry the affine transform of GDAL and rasterio: (column, row) of a pixel's *upper left corner* to map units;
- volumes carry a 4x4 affine from (slice, row, column) to millimetres in LPS, the patient axes of DICOM
  (x to the Left, y to the Posterior, z to the Superior; PS3.3 C.7.6.2.1.1). NIfTI's RAS is converted on reading;
- values are in the physical unit that the channel names; `valid` is False where a value means nothing.

An Image is frozen and its arrays are read-only, so that it can be shared and cached without copies.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import TypeAlias

import numpy as np

CHANNEL_KINDS = ("optical", "thermal", "sar", "elevation", "ct", "mr", "pet", "xray", "ultrasound", "unnamed")
"""What produced a channel's numbers; decides which descriptors describe it (see `models.channels`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Channel:
    """One channel: a name and the physics that makes its numbers comparable between sensors.

    Fields that do not apply to the kind stay None; a model that needs one of them refuses a channel without it.
    """

    name: str
    kind: str = "unnamed"
    unit: str = "unknown"
    wavelength_nm: float | None = None
    bandwidth_nm: float | None = None
    radar_ghz: float | None = None
    polarisation: str | None = None
    sequence: str | None = None
    echo_time_ms: float | None = None
    repetition_time_ms: float | None = None
    inversion_time_ms: float | None = None
    tube_kv: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in CHANNEL_KINDS:
            raise ValueError(f"channel '{self.name}' has kind '{self.kind}'; known kinds: {', '.join(CHANNEL_KINDS)}")


@dataclass(frozen=True, slots=True)
class RasterGeometry:
    """Where a raster lies: `crs` as WKT or None, `transform` (a, b, c, d, e, f) of x = a*col + b*row + c,
    y = d*col + e*row + f, and `gsd_m`, the ground sampling distance (row, column) in metres at the image's centre.
    `gsd_m` is None where the file has no coordinate system.
    """

    crs: str | None
    transform: tuple[float, float, float, float, float, float]
    gsd_m: tuple[float, float] | None

    def shifted(self, row: int, column: int) -> RasterGeometry:
        """Geometry of the window whose upper left pixel is (row, column)."""
        a, b, c, d, e, f = self.transform
        return replace(self, transform=(a, b, c + a * column + b * row, d, e, f + d * column + e * row))

    @property
    def spacing(self) -> tuple[float, float] | None:
        """Ground sampling distance (row, column) in metres."""
        return self.gsd_m


@dataclass(frozen=True, slots=True)
class VolumeGeometry:
    """Where a volume lies: `affine` (4, 4) from (slice, row, column) to LPS mm, sheared where the acquisition was.

    `frame_of_reference` and `slice_keys` (one a slice) are keyed hashes, never the identifiers themselves.
    """

    affine: np.ndarray
    frame_of_reference: str | None = None
    slice_keys: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        affine = np.array(self.affine, dtype=np.float64)
        if affine.shape != (4, 4) or not np.isfinite(affine).all() or abs(np.linalg.det(affine[:3, :3])) < 1e-9:
            raise ValueError(f"a volume needs a finite, invertible 4x4 affine, not {affine.tolist()}")
        affine.flags.writeable = False
        object.__setattr__(self, "affine", affine)

    def shifted(self, plane: int, row: int, column: int) -> VolumeGeometry:
        """Geometry of the block whose first voxel is (plane, row, column); slice keys are not carried over."""
        affine = self.affine.copy()
        affine[:3, 3] += affine[:3, :3] @ np.array([plane, row, column], dtype=np.float64)
        return VolumeGeometry(affine, self.frame_of_reference)

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Distance in mm between neighbouring (slices, rows, columns), slices measured along their normal.

        Along the normal, not along the (possibly sheared) slice step: that is the thickness of tissue passed.
        """
        rows, columns = self.affine[:3, 1], self.affine[:3, 2]
        normal = np.cross(rows, columns)
        normal /= np.linalg.norm(normal)
        return (
            float(abs(normal @ self.affine[:3, 0])),
            float(np.linalg.norm(rows)),
            float(np.linalg.norm(columns)),
        )


@dataclass(frozen=True, slots=True)
class PlaneGeometry:
    """A projection or photograph: no position in space; `spacing_mm` (row, column) where the file states it."""

    spacing_mm: tuple[float, float] | None = None

    def shifted(self, row: int, column: int) -> PlaneGeometry:
        """A plane has no origin: a window has the same geometry."""
        return self

    @property
    def spacing(self) -> tuple[float, float] | None:
        """Pixel spacing (row, column) in mm."""
        return self.spacing_mm


Geometry: TypeAlias = RasterGeometry | VolumeGeometry | PlaneGeometry


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """Pixels in physical units, what they mean and where they lie.

    Attributes:
        array: float32 (C, Y, X) or (C, Z, Y, X), finite wherever `valid`.
        valid: bool, broadcastable to `array`; False is nodata, padding, NaN or Inf, or outside the field of view.
        channels: one Channel an entry of the first axis.
        geometry: raster, volume or plane.
        modality: name of the modality that gave the pixels their meaning.
        key: opaque key of the image, "" outside an index; never an identifier or a path.
    """

    array: np.ndarray
    valid: np.ndarray
    channels: tuple[Channel, ...]
    geometry: Geometry
    modality: str
    key: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        array, valid = self.array, self.valid
        if array.dtype != np.float32 or array.ndim not in (3, 4):
            raise ValueError(f"an Image's array is float32 (C, [Z,] Y, X), not {array.dtype} {array.shape}")
        if len(self.channels) != array.shape[0]:
            raise ValueError(f"{len(self.channels)} channels are described, the array has {array.shape[0]}")
        if valid.dtype != np.bool_ or np.broadcast_shapes(valid.shape, array.shape) != array.shape:
            raise ValueError(f"valid is bool and broadcastable to {array.shape}, not {valid.dtype} {valid.shape}")
        if isinstance(self.geometry, VolumeGeometry) != (array.ndim == 4):
            raise ValueError(f"{type(self.geometry).__name__} does not describe an array of shape {array.shape}")
        array.flags.writeable = False
        valid.flags.writeable = False

    @property
    def spatial_shape(self) -> tuple[int, ...]:
        """([slices,] rows, columns)."""
        return self.array.shape[1:]

    @property
    def spacing(self) -> tuple[float, ...] | None:
        """Physical distance between samples per spatial axis: metres for rasters, mm for the others, or None."""
        return self.geometry.spacing

    @property
    def valid_fraction(self) -> float:
        """Share of valid values, 0 to 1."""
        return float(np.broadcast_to(self.valid, self.array.shape).mean())

    def select(self, names: tuple[str, ...]) -> Image:
        """Return the image with the channels `names`, in that order.

        Raises:
            KeyError: a channel is missing; nothing is ever filled in for it.
        """
        have = {channel.name: index for index, channel in enumerate(self.channels)}
        missing = [name for name in names if name not in have]
        if missing:
            raise KeyError(f"channels {missing} are not in this image, which has {list(have)}")
        order = [have[name] for name in names]
        valid = self.valid[order] if self.valid.ndim == self.array.ndim and self.valid.shape[0] > 1 else self.valid
        return replace(
            self, array=self.array[order], valid=valid, channels=tuple(self.channels[index] for index in order)
        )

    def crop(self, window: tuple[slice, ...]) -> Image:
        """Return the window (one slice a spatial axis, start and stop inside the image), geometry moved with it."""
        starts = [part.start or 0 for part in window]
        full_valid = np.broadcast_to(self.valid, (self.valid.shape[0], *self.spatial_shape))
        return replace(
            self,
            array=self.array[(slice(None), *window)].copy(),
            valid=full_valid[(slice(None), *window)].copy(),
            geometry=self.geometry.shifted(*starts),
        )

    def __repr__(self) -> str:
        shape = " x ".join(str(size) for size in self.array.shape)
        spacing = "unknown" if self.spacing is None else " x ".join(f"{value:g}" for value in self.spacing)
        unit = "m" if isinstance(self.geometry, RasterGeometry) else "mm"
        names = ", ".join(channel.name for channel in self.channels)
        grid = f"{shape}, spacing {spacing} {unit}"
        return f"Image({self.modality}, {grid}, channels {names}, {self.valid_fraction:.1%} valid)"


def degree_gsd_m(latitude: float, degrees_y: float, degrees_x: float) -> tuple[float, float]:
    """Ground distance (row, column) in metres of a step in degrees on the WGS84 ellipsoid.

    Series of NIMA TR8350.2 / Snyder (1987) "Map Projections", accurate to 0.01 m per degree.
    """
    phi = math.radians(latitude)
    metres_y = 111132.92 - 559.82 * math.cos(2 * phi) + 1.175 * math.cos(4 * phi)
    metres_x = 111412.84 * math.cos(phi) - 93.5 * math.cos(3 * phi) + 0.118 * math.cos(5 * phi)
    return abs(degrees_y) * metres_y, abs(degrees_x) * metres_x
