"""Archives for `feed`, and the Dataset that a careful user writes for each over rasterio, pydicom or nibabel.

Every plain Dataset gives one crop an item, float32 in physical units: a window of a random image, no more read than the
crop needs. Scenes are opened once a process; of a DICOM series the crop's slices are read, headers are not kept; of a
`.nii.gz` the voxels are taken from `dataobj`, without the rest of the volume in memory.

Content: scenes as in `readers.scene`; volumes are bodies with organs and noise of 15 HU that neighbouring voxels
share, which JPEG 2000 packs without loss to two fifths, as it does clinical CT.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, JPEG2000Lossless, generate_uid
from readers import AGED, LAYOUTS, SCALE, scene, write
from torch.utils import data

from geomed_mae.readers.geotiff.open import rasterio

SPACING_MM = (2.5, 0.75, 0.75)
OFFSET_HU = -1024


@dataclass(frozen=True)
class Source:
    """One archive: its folder, modality, the crop as recipes name it, and what makes its plain Dataset."""

    folder: Path
    modality: str
    crop: tuple[int, ...]
    plain: Callable[[int], data.Dataset]

    @property
    def megabytes(self) -> float:
        """Size of its files in MiB."""
        return sum(path.stat().st_size for path in self.folder.rglob("*") if path.is_file()) / 2**20


class Windows(data.Dataset):
    """Random crops of images of these shapes; item n is the same whoever asks, as items of ours are."""

    def __init__(self, shapes: Sequence[Sequence[int]], crop: Sequence[int], seed: int) -> None:
        self.shapes, self.crop, self.seed = [tuple(map(int, shape)) for shape in shapes], tuple(crop), seed
        sizes = [math.prod(shape) for shape in self.shapes]
        self.share = np.cumsum(sizes) / sum(sizes)

    def __len__(self) -> int:
        return 1 << 30

    def __getitem__(self, number: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, number))
        image = int(np.searchsorted(self.share, rng.random(), side="right"))
        window, missing = [], []
        for size, part in zip(self.shapes[image], self.crop, strict=True):
            start = int(rng.integers(max(size - part, 0) + 1))
            window.append(slice(start, min(start + part, size)))
            missing.append((0, max(part - size, 0)))
        crop = self.read(image, tuple(window))
        return np.pad(crop, [(0, 0), *missing], constant_values=np.nan) if np.any(missing) else crop

    def read(self, image: int, window: tuple[slice, ...]) -> np.ndarray:
        """Return (C, *crop) float32."""
        raise NotImplementedError


class Scenes(Windows):
    """Windows of GeoTIFF scenes through datasets that stay open."""

    def __init__(self, paths: Sequence[Path], crop: Sequence[int], seed: int) -> None:
        shapes = []
        for path in paths:
            with rasterio().open(path) as dataset:
                shapes.append(dataset.shape)
        super().__init__(shapes, crop, seed)
        self.paths, self.opened = list(paths), {}

    def read(self, image: int, window: tuple[slice, ...]) -> np.ndarray:
        """Return reflectance, NaN where there is none."""
        if image not in self.opened:
            self.opened[image] = rasterio().open(self.paths[image])
        dataset = self.opened[image]
        stored = dataset.read(window=rasterio().windows.Window.from_slices(*window))
        values = stored.astype(np.float32) * np.float32(SCALE)
        return values if dataset.nodata is None else np.where(stored == dataset.nodata, np.float32(np.nan), values)


class Series(Windows):
    """Windows of CT series, one file a slice; files are sorted once, when the Dataset is made."""

    def __init__(self, paths: Sequence[Path], crop: Sequence[int], seed: int) -> None:
        found: dict[str, list[tuple[float, Path, tuple[int, int]]]] = {}
        wanted = ["SeriesInstanceUID", "ImagePositionPatient", "Rows", "Columns"]
        for path in paths:
            header = pydicom.dcmread(path, stop_before_pixels=True, specific_tags=wanted)
            own = found.setdefault(header.SeriesInstanceUID, [])
            own.append((float(header.ImagePositionPatient[2]), path, (header.Rows, header.Columns)))
        self.slices = [[path for _, path, _ in sorted(own)] for own in found.values()]
        super().__init__([(len(own), *own[0][2]) for own in found.values()], crop, seed)

    def read(self, image: int, window: tuple[slice, ...]) -> np.ndarray:
        """Return HU."""
        planes = []
        for path in self.slices[image][window[0]]:
            one = pydicom.dcmread(path)
            part = one.pixel_array[window[1:]].astype(np.float32)
            planes.append(part * np.float32(one.RescaleSlope) + np.float32(one.RescaleIntercept))
        return np.stack(planes)[None]


class Volumes(Windows):
    """Windows of NIfTI volumes, (slice, row, column) as ours are."""

    def __init__(self, paths: Sequence[Path], crop: Sequence[int], seed: int) -> None:
        super().__init__([nibabel.load(path).shape[::-1] for path in paths], crop, seed)
        self.paths = list(paths)

    def read(self, image: int, window: tuple[slice, ...]) -> np.ndarray:
        """Return the stored values, scaled as the header says."""
        stored = nibabel.load(self.paths[image]).dataobj[window[::-1]]
        return np.ascontiguousarray(np.asarray(stored, np.float32).T)[None]


def given(folder: Path, modality: str, crop: Sequence[int]) -> Source:
    """Return an archive that is there: GeoTIFF, NIfTI or DICOM files below `folder`, told apart by their endings."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for made, endings in ((Scenes, (".tif", ".tiff")), (Volumes, (".nii", ".nii.gz"))):
        if own := [path for path in files if path.name.lower().endswith(endings)]:
            return Source(folder, modality, tuple(crop), partial(made, own, tuple(crop)))
    return Source(folder, modality, tuple(crop), partial(Series, files, tuple(crop)))


def scenes(folder: Path, layout: str, *, count: int, size: int, crop: int, seed: int) -> Source:
    """Write `count` deflated scenes of size x size pixels and four bands in one of `readers.LAYOUTS`."""
    folder.mkdir(parents=True)
    array = scene(size, seed)
    # Rolled, not drawn again: no two scenes are alike, and terrain of this size takes ten seconds.
    paths = [
        write(folder / f"{number}.tif", np.roll(array, (size // 3) * number, axis=(1, 2)), LAYOUTS[layout])
        for number in range(count)
    ]
    return Source(folder, "sentinel2-l2a", (crop, crop), partial(Scenes, paths, (crop, crop)))


def body(slices: int, size: int, seed: int) -> np.ndarray:
    """Return (slices, size, size) int16, HU + 1024: a trunk with organs in air."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    volume = np.empty((slices, size, size), np.int16)
    for number in range(slices):
        turn = number / 10 + seed
        plane = np.full((size, size), -1000, np.float32)
        plane[row**2 / 0.5 + column**2 / 0.75 < 1] = 40
        for organ, density in enumerate((-850, 60, 110, 300)):
            centre = 0.4 * np.sin(turn + 1.7 * organ), 0.5 * np.cos(0.7 * turn + organ)
            plane[(row - centre[0]) ** 2 + (column - centre[1]) ** 2 < 0.03 * (1 + 0.4 * np.sin(turn))] = density
        noise = rng.standard_normal((size, size), dtype=np.float32)
        noise = noise + np.roll(noise, 1, 0) + np.roll(noise, 1, 1)  # a scanner's kernel makes neighbours alike
        volume[number] = np.clip(plane + 15 / np.sqrt(3) * noise, -1024, 3071) - OFFSET_HU
    return volume


def series(folder: Path, *, count: int, slices: int, size: int, crop: Sequence[int], seed: int, packed: bool) -> Source:
    """Write `count` CT series of `slices` files each, JPEG 2000 without loss where `packed`."""
    files = []
    for number in range(count):
        own = folder / str(number)
        own.mkdir(parents=True)
        uids = {
            name: generate_uid(entropy_srcs=[name, str(seed), str(number)]) for name in ("Study", "Series", "Frame")
        }
        for place, plane in enumerate(body(slices, size, seed + number)):
            files.append(_slice(own / f"{place:04d}.dcm", plane, place, uids, packed=packed))
    return Source(folder, "ct", tuple(crop), partial(Series, files, tuple(crop)))


def _slice(path: Path, plane: np.ndarray, place: int, uids: dict[str, str], *, packed: bool) -> Path:
    """Write one slice of a CT series."""
    made = Dataset()
    made.file_meta = FileMetaDataset()
    made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    made.SOPClassUID = made.file_meta.MediaStorageSOPClassUID = CTImageStorage
    made.SOPInstanceUID = generate_uid(entropy_srcs=[uids["Series"], str(place)])
    made.file_meta.MediaStorageSOPInstanceUID = made.SOPInstanceUID
    made.StudyInstanceUID, made.SeriesInstanceUID = uids["Study"], uids["Series"]
    made.FrameOfReferenceUID, made.PatientID, made.Modality = uids["Frame"], uids["Study"][-12:], "CT"
    made.ImageType, made.InstanceNumber = ["ORIGINAL", "PRIMARY", "AXIAL"], place + 1
    made.ImagePositionPatient = [0, 0, SPACING_MM[0] * place]
    made.ImageOrientationPatient = [1, 0, 0, 0, 1, 0]
    made.PixelSpacing, made.SliceThickness = list(SPACING_MM[1:]), SPACING_MM[0]
    made.RescaleSlope, made.RescaleIntercept, made.KVP = 1, OFFSET_HU, 120
    made.SamplesPerPixel, made.PhotometricInterpretation = 1, "MONOCHROME2"
    made.Rows, made.Columns = plane.shape
    made.BitsAllocated, made.BitsStored, made.HighBit, made.PixelRepresentation = 16, 12, 11, 0
    made.PixelData = plane.astype(np.uint16).tobytes()
    made["PixelData"].VR = "OW"
    if packed:
        made.compress(JPEG2000Lossless, generate_instance_uid=False)
    made.save_as(path, enforce_file_format=True)
    os.utime(path, (AGED, AGED))
    return path


def volumes(folder: Path, *, count: int, slices: int, size: int, crop: Sequence[int], seed: int) -> Source:
    """Write the same bodies as `.nii.gz`."""
    folder.mkdir(parents=True)
    paths = []
    affine = np.diag([-SPACING_MM[2], -SPACING_MM[1], SPACING_MM[0], 1.0])
    for number in range(count):
        array = body(slices, size, seed + number) + np.int16(OFFSET_HU)
        paths.append(folder / f"{number}.nii.gz")
        image = nibabel.Nifti1Image(array.T, affine)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, paths[-1])
        os.utime(paths[-1], (AGED, AGED))
    return Source(folder, "ct", tuple(crop), partial(Volumes, paths, tuple(crop)))
