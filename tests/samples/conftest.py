"""An archive in memory, whose pixels say where they are from, so that a crop's place can be read off its values."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.archives.identity import PixelDigest
from geomed_mae.archives.index import Row
from geomed_mae.archives.statistics import summarise
from geomed_mae.errors import ReadError
from geomed_mae.image import Channel, Image, PlaneGeometry, RasterGeometry, VolumeGeometry


class MemoryIndex:
    """Has the part of Index that samples need; counts reads."""

    fingerprint = "memory"

    def __init__(self) -> None:
        self.images: dict[str, Image] = {}
        self.rows: tuple[Row, ...] = ()
        self.whole_reads = 0
        self.window_reads = 0
        self.broken: set[str] = set()

    def add(
        self,
        array: np.ndarray,
        *,
        modality: str = "landsat7",
        valid: np.ndarray | None = None,
        spacing=30.0,
        block: tuple[int, int] | None = None,
    ):
        """Add an image (C, [Z,] Y, X); returns its key."""
        array = array.astype(np.float32)
        valid = np.ones((1, *array.shape[1:]), bool) if valid is None else valid
        if array.ndim == 4:
            steps = [spacing] * 3 if np.isscalar(spacing) else spacing
            geometry, name = VolumeGeometry(np.diag([*steps, 1.0])[[2, 1, 0, 3]]), "volume"
        elif spacing is None:
            geometry, name = PlaneGeometry(None), "plane"
        else:
            pair = (spacing, spacing) if np.isscalar(spacing) else tuple(spacing)
            geometry, name = RasterGeometry(None, (pair[1], 0, 0, 0, -pair[0], 0), pair), "raster"
        channels = tuple(
            Channel(name=f"B{number}", kind="optical", unit="DN", wavelength_nm=400.0 + 100 * number)
            for number in range(1, len(array) + 1)
        )
        key = f"image{len(self.rows)}"
        image = Image(array, valid, channels, geometry, modality, key)
        self.images[key] = image
        row = Row(
            key=key,
            modality=modality,
            channels=channels,
            shape=image.spatial_shape,
            dtype="float32",
            geometry=name,
            spacing=image.spacing,
            crs=None,
            footprint=None,
            valid_fraction=image.valid_fraction,
            statistics=summarise(array, valid),
            group=key,
            content=key,
            flags=(),
            block=block,
        )
        self.rows = (*self.rows, row)
        return key

    def read(self, key: str, window: tuple[slice, ...] | None = None) -> Image:
        """Read as Index.read does."""
        if key in self.broken:
            raise ReadError("the file is cut off", "TRUNCATED")
        self.whole_reads += window is None
        self.window_reads += window is not None
        return self.images[key] if window is None else self.images[key].crop(window)

    def read_many(self, key: str, windows: list[tuple[slice, ...]]) -> list[Image]:
        """Read as Index.read_many does."""
        return [self.read(key, window) for window in windows]

    def read_many_stored(self, key: str, windows: list[tuple[slice, ...]]) -> None:
        """Know nothing of stored integers, as most readers."""

    def outline(self, key: str) -> Image:
        """Give what Index.outline does: here the image itself."""
        return self.images[key]

    def paths(self, key: str) -> tuple[()]:
        """Name no files."""
        return ()

    def scaling(self, key: str) -> None:
        """Know no more about stored numbers than the header of a DICOM file."""

    def pixel_digest(self, key: str) -> str:
        """Return a digest as Index.pixel_digest does."""
        image = self.images[key]
        digest = PixelDigest(image.array.shape)
        digest.add(image)
        return digest.hex()


def coordinates(*shape: int) -> np.ndarray:
    """Return (1, *shape) whose value is row-major position."""
    return np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape)


@pytest.fixture
def memory_index() -> MemoryIndex:
    return MemoryIndex()
