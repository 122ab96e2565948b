"""Maps lie on their inputs: a model that thresholds the image, and other programs that compare pixel with pixel.

Every input is noise, so that a map that is shifted, mirrored or turned by anything shows at once. What is read back is
read in a process without this package: rasters by rasterio, volumes by nibabel, SimpleITK and pydicom.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import rasterio
import torch
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.crs import CRS
from rasterio.errors import NotGeoreferencedWarning
from rasterio.rpc import RPC
from rasterio.transform import Affine

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.seen import Seen
from geomed_mae.heads.task_model import TaskModel, save_task_model
from geomed_mae.predict import predict
from tests import make_dicom
from tests.consumer import elsewhere
from tests.heads.given import task_model
from tests.scenes import LANDSAT_BANDS, UTM

EDGES = {"landsat7": (90.0, 170.0), "mr": (300.0, 600.0), "ct": (-500.0, 100.0), "xray": (80.0, 160.0)}
"""Between the three classes, in the unit of the modality."""
CROPS = {"landsat7": (16, 16), "xray": (16, 16), "mr": (4, 8, 8), "ct": (4, 8, 8)}


@pytest.fixture(autouse=True)
def _thresholds(monkeypatch):
    """Make every model answer with the class that the first channel's value belongs to."""

    def answer(self: TaskModel, raw: np.ndarray, valid: np.ndarray, row: Any) -> torch.Tensor:
        numbers = np.digitize(raw[:, 0], EDGES[row.modality])
        return torch.from_numpy(np.eye(3, dtype=np.float32)[numbers]).movedim(-1, 1).contiguous()

    monkeypatch.setattr(TaskModel, "probabilities", answer)


def maps(tmp_path: Path, modality: str, images: Path | None = None, **how: Any) -> list[tuple[Path, Path]]:
    """Predict all of `images` (tmp_path/images) with a model that takes them; return (input, map) of each."""
    images = images or tmp_path / "images"
    model = task_model(open_archive([images], [modality]), "linear", "segment", crop=CROPS[modality])
    save_task_model(tmp_path / "run", model, Seen.nothing())
    found = predict(tmp_path / "run", [images], tmp_path / "out", **how)["predictions"]
    return [(Path(one["input"]), Path(one["output"])) for one in found]


# --------------------------------------------------------------------------------------------------------- rasters

GRIDS: dict[str, tuple[str | None, Affine | None]] = {
    "north up": (UTM, Affine(28.5, 0, 288776.25000001, 0, -28.5, 9120760.75000002)),
    "rotated": (UTM, Affine.translation(500000.1, 4000000.3) @ Affine.rotation(33.3) @ Affine.scale(28.5, -28.5)),
    "south up": (UTM, Affine(30, 0, 600000, 0, 30, 4000000)),
    "mirrored": (UTM, Affine(-30, 0, 600000, 0, -30, 4000000)),
    "sheared": (UTM, Affine(30, 7, 600000, 0, -30, 4000000)),
    "degrees": ("EPSG:4326", Affine(1 / 3600, 0, -179.9, 0, -1 / 3600, 0.1 + 0.2)),
    "northing first": ("EPSG:3035", Affine(30, 0, 4321000, 0, -30, 3210000)),
    "local": ('LOCAL_CS["Werk",UNIT["metre",1],AXIS["E",EAST],AXIS["N",NORTH]]', Affine(0.02, 0, 3, 0, -0.02, 7)),
    "no EPSG code": (CRS.from_proj4("+proj=sinu +R=6371007.181 +units=m").to_wkt(), Affine(463, 0, 1e6, 0, -463, 5e6)),
    "no system": (None, Affine(2, 0, 100, 0, -2, 50)),
    "no place": (None, None),
}


RATIONAL = {
    "err_bias": 0.0,
    "err_rand": 0.0,
    "line_off": 18.0,
    "samp_off": 26.0,
    "lat_off": 36.0,
    "long_off": 15.0,
    "height_off": 0.0,
    "line_scale": 18.0,
    "samp_scale": 26.0,
    "lat_scale": 0.01,
    "long_scale": 0.01,
    "height_scale": 100.0,
    "line_num_coeff": [0.0, 0.0, -1.0, *[0.0] * 17],
    "samp_num_coeff": [0.0, 1.0, 0.0, *[0.0] * 17],
    "line_den_coeff": [1.0, *[0.0] * 19],
    "samp_den_coeff": [1.0, *[0.0] * 19],
}
"""Rational polynomials of a camera that looks straight down."""


def noise_scene(path: Path, seed: int, crs: str | None = None, transform: Affine | None = None) -> None:
    """Write a 6-band scene of noise, 37 x 53 pixels, whose upper left corner is nodata."""
    values = np.random.default_rng(seed).integers(1, 255, (6, 37, 53)).astype(np.uint8)
    values[:, :5, :9] = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    grid = {} if transform is None else {"crs": crs, "transform": transform}
    size = {"driver": "GTiff", "count": 6, "height": 37, "width": 53, "dtype": "uint8", "nodata": 0}
    with rasterio.open(path, "w", **size, **grid) as scene:
        scene.write(values)
        scene.descriptions = LANDSAT_BANDS


COMPARE_RASTERS = """
import json, sys, warnings
import numpy as np, rasterio
warnings.simplefilter("ignore")
edges, said = json.loads(sys.argv[1]), {}
for scene_path, map_path, chances_path in zip(*[iter(sys.argv[2:])] * 3):
    with rasterio.open(scene_path) as scene, rasterio.open(map_path) as map_, rasterio.open(chances_path) as chances:
        values, known = scene.read(1), scene.dataset_mask() > 0
        wanted = np.where(known, np.digitize(values, edges), 255)
        rows, columns = np.indices(map_.shape)
        # The pixel of the scene that lies where a pixel of the map is.
        there = np.array(~scene.transform * (map_.transform * (columns.ravel() + 0.5, rows.ravel() + 0.5)))
        columns_there, rows_there = (np.floor(part).astype(int).reshape(map_.shape) for part in there)
        sure = chances.read().argmax(axis=0)
        said[scene_path] = {
            "wkt": [d.crs.to_wkt() if d.crs else None for d in (scene, map_, chances)],
            "transform": [list(d.transform)[:6] for d in (scene, map_, chances)],
            "shape": [d.shape for d in (scene, map_, chances)],
            "wrong": int((map_.read(1) != wanted[rows_there, columns_there]).sum()),
            "wrong chances": int((np.where(chances.read(1) == 255, 255, sure) != wanted).sum()),
            "classes": np.unique(map_.read(1)).tolist(),
            "nodata": map_.nodata,
        }
print(json.dumps(said))
"""


def test_a_map_of_a_raster_lies_on_it_to_the_bit_on_every_grid(tmp_path):
    images = tmp_path / "images"
    for seed, (name, (crs, transform)) in enumerate(GRIDS.items()):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", NotGeoreferencedWarning)
            noise_scene(images / f"{name}.tif", seed, crs, transform)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        noise_scene(images / "points.tif", 90)
        noise_scene(images / "rational.tif", 91)
        with rasterio.open(images / "points.tif", "r+") as scene:
            corners = [(0, 0, 5e5, 4e6), (0, 53, 5.01e5, 4e6), (37, 0, 5e5, 3.99e6), (37, 53, 5.01e5, 3.99e6)]
            scene.gcps = [GroundControlPoint(row=r, col=c, x=x, y=y) for r, c, x, y in corners], CRS.from_epsg(32633)
        with rasterio.open(images / "rational.tif", "r+") as scene:
            scene.rpcs = RPC(**RATIONAL)
    pairs = maps(tmp_path, "landsat7", probabilities=True)
    assert len(pairs) == len(GRIDS) + 2
    words = [part for scene, map_ in pairs for part in (scene, map_, map_.with_suffix(".probabilities.tif"))]
    said = elsewhere(COMPARE_RASTERS, str(list(EDGES["landsat7"])), *words)
    for scene, found in said.items():
        for name in ("wkt", "transform", "shape"):
            assert found[name][0] == found[name][1] == found[name][2], (scene, name)
        assert (found["wrong"], found["wrong chances"], found["nodata"]) == (0, 0, 255), scene
        assert found["classes"] == [0, 1, 2, 255]
    wkt, transform = said[str(images / "rotated.tif")]["wkt"][0], said[str(images / "rotated.tif")]["transform"][0]
    assert CRS.from_wkt(wkt) == CRS.from_string(UTM) and transform == list(GRIDS["rotated"][1])[:6]


# --------------------------------------------------------------------------------------------------------- volumes


def turned(*, shear: float = 0.0, order: tuple[int, int, int] = (0, 1, 2), signs: tuple[int, ...] = (-1, -1, 1)) -> Any:
    """An affine (i, j, k) to RAS, float32 exact: oblique, anisotropic; axes permuted and mirrored as asked."""
    angle = np.deg2rad(17)
    rotation = np.array([[np.cos(angle), -np.sin(angle), 0], [np.sin(angle), np.cos(angle), 0], [0, 0, 1.0]])
    directions = (rotation @ np.diag(signs))[:, list(order)]
    affine = np.eye(4)
    affine[:3, :3] = directions * (0.9, 0.7, 3.0)
    affine[:3, 2] += shear * affine[:3, 1]
    affine[:3, 3] = (-31.5, 12.25, 104.125)
    return affine.astype(np.float32).astype(np.float64)


AFFINES = {
    "oblique": turned(),
    "sheared": turned(shear=1.5),
    "sagittal": turned(order=(1, 2, 0)),
    "coronal": turned(order=(0, 2, 1)),
    "mirrored": turned(signs=(1, -1, -1)),
}

COMPARE_VOLUMES = """
import json, sys
import nibabel, numpy as np, SimpleITK as sitk
edges, said = json.loads(sys.argv[1]), {}
for volume_path, map_path, chances_path in zip(*[iter(sys.argv[2:])] * 3):
    volume, map_, chances = (nibabel.load(path) for path in (volume_path, map_path, chances_path))
    wanted = np.digitize(volume.get_fdata(), edges)
    found = {
        "shape": [volume.shape, map_.shape, chances.shape[:3]],
        "off": [float(np.abs(volume.affine - one.affine).max()) for one in (map_, chances)],
        "wrong": int((np.asarray(map_.dataobj) != wanted).sum()),
        "wrong chances": int((chances.get_fdata().argmax(axis=-1) != wanted).sum()),
        "sure": [float(chances.get_fdata().min()), float(chances.get_fdata().max())],
        "classes": np.unique(np.asarray(map_.dataobj)).tolist(),
    }
    try:
        ours, theirs = sitk.ReadImage(map_path), sitk.ReadImage(volume_path)
    except RuntimeError as error:
        found["itk"] = "orthonormal" in str(error)  # ITK has no word for shear
    else:
        places = [[*i.GetOrigin(), *i.GetSpacing(), *i.GetDirection()] for i in (ours, theirs)]
        found["itk"] = float(np.abs(np.subtract(*places)).max())
        ours, theirs = sitk.GetArrayFromImage(ours), sitk.GetArrayFromImage(theirs)
        found["wrong"] += int((ours != np.digitize(theirs, edges)).sum())
    said[volume_path] = found
print(json.dumps(said))
"""


def test_a_map_of_a_nifti_volume_lies_on_it_however_its_axes_run(tmp_path):
    for seed, (name, affine) in enumerate(AFFINES.items()):
        values = np.random.default_rng(seed).integers(0, 900, (19, 22, 7)).astype(np.int16)
        image = nibabel.Nifti1Image(values, affine)
        (tmp_path / "images").mkdir(exist_ok=True)
        if name != "sheared":
            image.set_qform(affine, code=1)
        image.set_sform(affine, code=1)
        image.header.set_xyzt_units("mm")
        nibabel.save(image, tmp_path / "images" / f"{name}.nii.gz")
    pairs = maps(tmp_path, "mr", probabilities=True)
    words = []
    for volume, map_ in pairs:
        words += [volume, map_, map_.with_name(map_.name.replace(".nii.gz", ".probabilities.nii.gz"))]
    said = elsewhere(COMPARE_VOLUMES, str(list(EDGES["mr"])), *words)
    assert len(said) == len(AFFINES)
    for volume, found in said.items():
        assert found["shape"][0] == found["shape"][1] == found["shape"][2], volume
        assert max(found["off"]) == 0, "the affine, bit for bit"
        assert (found["wrong"], found["wrong chances"]) == (0, 0), volume
        assert found["classes"] == [0, 1, 2] and found["sure"] == pytest.approx([0, 1], abs=1e-7)
        assert found["itk"] is True if "sheared" in volume else found["itk"] < 1e-5, volume


STEPS = {
    "straight": ((0.0, 0.0, 2.5), make_dicom.AXIAL),
    "tilted": ((0.0, 1.1, 2.5), make_dicom.AXIAL),
    "coronal, downwards": ((0.0, -3.0, 0.0), (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)),
    "oblique and tilted": ((0.4, 0.2, 2.0), (0.8, 0.6, 0.0, -0.6, 0.8, 0.0)),
}
"""Step between slices and orientation of the rows and columns, LPS."""

COMPARE_SERIES = """
import json, sys
from pathlib import Path
import nibabel, numpy as np, pydicom
edges, said = json.loads(sys.argv[1]), {}
for folder, map_path in zip(*[iter(sys.argv[2:])] * 2):
    map_ = nibabel.load(map_path)
    numbers, to_voxel = np.asarray(map_.dataobj), np.linalg.inv(map_.affine)
    wrong, off, seen = 0, 0.0, 0
    for path in sorted(path for path in Path(folder).rglob("*") if path.is_file()):
        one = pydicom.dcmread(path)
        values = one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept)
        row_step, column_step = map(float, one.PixelSpacing)  # between rows, between columns (PS3.3 10.7.1.3)
        along_row, along_column = np.reshape(np.array(one.ImageOrientationPatient, float), (2, 3))
        rows, columns = np.indices(values.shape)
        lps = (np.array(one.ImagePositionPatient, float)[:, None]
               + np.outer(along_row * column_step, columns.ravel()) + np.outer(along_column * row_step, rows.ravel()))
        voxel = (to_voxel @ np.vstack([-lps[0], -lps[1], lps[2], np.ones(lps.shape[1])]))[:3]
        off = max(off, float(np.abs(voxel - np.rint(voxel)).max()))
        there = numbers[tuple(np.rint(voxel).astype(int))]
        wrong += int((there != np.digitize(values.ravel(), edges)).sum())
        seen += values.size
    said[folder] = {"wrong": wrong, "off": off, "seen": seen, "voxels": int(numbers.size)}
print(json.dumps(said))
"""


def compared(pairs: Sequence[tuple[Path, Path]]) -> dict[str, Any]:
    """Compare maps with the slices of their series, by pydicom and nibabel."""
    words = [part for first, map_ in pairs for part in (first.parent, map_)]
    return elsewhere(COMPARE_SERIES, str(list(EDGES["ct"])), *words)


def test_a_map_of_a_dicom_series_lies_on_every_slice_tilted_or_not(tmp_path):
    for seed, (name, (step, orientation)) in enumerate(STEPS.items()):
        values = np.random.default_rng(seed).integers(0, 1800, (6, 18, 21)).astype(np.int16)
        place = {"spacing": (0.7, 0.9), "orientation": orientation, "step": step}
        ids = {"SeriesInstanceUID": make_dicom.uid(name), "FrameOfReferenceUID": make_dicom.uid(name, "frame")}
        make_dicom.write_series(tmp_path / "images" / name, values, **place, **ids)
    said = compared(maps(tmp_path, "ct", format="nifti"))
    assert len(said) == len(STEPS)
    for folder, found in said.items():
        assert found["wrong"] == 0 and found["off"] < 1e-4, folder
        assert found["seen"] == found["voxels"] == 6 * 18 * 21


@pytest.mark.data
def test_a_map_of_the_real_tilted_series_lies_on_every_slice(tmp_path, shared_data):
    source = shared_data / "med" / "dicom_traps" / "gantrytilting" / "001"
    (pair,) = maps(tmp_path, "ct", source, format="nifti")
    (found,) = compared([pair]).values()
    assert found["wrong"] == 0 and found["off"] < 1e-3 and found["seen"] == found["voxels"]


# ---------------------------------------------------------------------------------------------------------- planes


def test_a_map_of_a_radiograph_has_its_pixels_where_the_picture_has_them(tmp_path):
    values = np.random.default_rng(0).integers(0, 255, (41, 29)).astype(np.uint8)
    (tmp_path / "images").mkdir()
    Image.fromarray(values).save(tmp_path / "images" / "x.png")
    ((picture, map_),) = maps(tmp_path, "xray")
    found = elsewhere(
        """
        import json, sys
        import numpy as np, SimpleITK as sitk
        picture, numbers = (sitk.GetArrayFromImage(sitk.ReadImage(path)) for path in sys.argv[2:])
        print(json.dumps(int((numbers != np.digitize(picture, json.loads(sys.argv[1]))).sum())))
        """,
        str(list(EDGES["xray"])),
        picture,
        map_,
    )
    assert found == 0
