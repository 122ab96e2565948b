"""Probabilities as COG and NIfTI, opened by the programs that read them, in a process without this package."""

from __future__ import annotations

import subprocess
import sys

import nibabel
import numpy as np
import pytest
import rasterio

from geomed_mae.image import PlaneGeometry, RasterGeometry
from geomed_mae.writers import NODATA, cog, nifti
from tests.consumer import elsewhere
from tests.writers.test_cog import ROTATED, UTM, laid_out
from tests.writers.test_nifti import geometry as volume_geometry
from tests.writers.test_nifti import lps

CLASSES = ("background", "open water", "ice & snow", "cloud")
HALF_STEP = 0.5 / 250 + 1e-7


def chances(*space: int, classes: int = 4) -> np.ndarray:
    """Random probabilities that sum to 1; nothing is known of the first two pixels, which say so in two ways."""
    logits = np.random.default_rng(0).normal(scale=3, size=(classes, *space))
    values = np.exp(logits) / np.exp(logits).sum(axis=0)
    values[(slice(None), *(0 for _ in space))] = 0
    values[(slice(None), *(0 for _ in space[1:]), 1)] = np.nan
    return values.astype(np.float32)


def test_rasterio_elsewhere_reads_named_bands_of_probabilities(tmp_path):
    wanted = chances(700, 530)
    geometry = RasterGeometry(UTM, ROTATED, (10.0, 10.0))
    with cog.stream_chances(tmp_path / "p.tif", wanted.shape[1:], geometry, CLASSES) as raster:
        for first in range(0, 700, 90):
            raster.put(wanted[:, first : first + 90])
    np.save(tmp_path / "wanted.npy", wanted)
    found = elsewhere(
        """
        import json, sys
        import numpy as np, rasterio
        wanted = np.load(sys.argv[2])
        with rasterio.open(sys.argv[1]) as d:
            stored = d.read(masked=True)
            values = stored * np.array(d.scales)[:, None, None] + np.array(d.offsets)[:, None, None]
            small = d.read(out_shape=(4, 350, 265), masked=True)
            said = {
                "names": d.descriptions, "nodata": d.nodata, "transform": list(d.transform)[:6], "wkt": d.crs.to_wkt(),
                "colours": [c.name for c in d.colorinterp], "overviews": d.overviews(4),
            }
        known = ~np.isnan(wanted).any(axis=0) & (wanted.sum(axis=0) > 0)
        print(json.dumps({
            **said,
            "masked": bool(((~np.ma.getmaskarray(stored)) == known).all()),
            "error": float(np.abs(values - wanted)[:, known].max()),
            "mean": float(np.abs(small[1, 100, 100] - stored[1, 200:202, 200:202].mean())),
        }))
        """,
        tmp_path / "p.tif",
        tmp_path / "wanted.npy",
    )
    assert found["names"] == list(CLASSES) and found["nodata"] == NODATA
    assert (found["transform"], found["wkt"]) == (list(ROTATED), UTM)
    assert found["colours"] == ["gray", "undefined", "undefined", "undefined"], "four bands are no colours"
    assert found["masked"] and found["error"] <= HALF_STEP
    assert found["overviews"] == [2] and found["mean"] <= 0.5 + 1e-6, "overviews are means"
    laid_out(tmp_path / "p.tif")
    assert [path.name for path in tmp_path.glob("p*")] == ["p.tif"], "probabilities need no legend: bands have names"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_few_classes_are_bands_and_no_colours(tmp_path, count):
    wanted = np.full((count, 20, 30), 1 / count, np.float32)
    with cog.stream_chances(
        tmp_path / "p.tif", (20, 30), RasterGeometry(UTM, ROTATED, None), CLASSES[:count]
    ) as raster:
        raster.put(wanted)
    with rasterio.open(tmp_path / "p.tif") as found:
        assert found.colorinterp[0].name == "gray" and found.count == count
        assert (found.read() == round(250 / count)).all()


def test_certainty_comes_back_as_exactly_one(tmp_path):
    sure = np.zeros((2, 8, 9), np.float32)
    sure[1] = 1
    with cog.stream_chances(tmp_path / "p.tif", (8, 9), RasterGeometry(UTM, ROTATED, None), CLASSES[:2]) as raster:
        raster.put(sure)
    with rasterio.open(tmp_path / "p.tif") as found:
        np.testing.assert_array_equal(found.read() * found.scales[0], sure)


@pytest.mark.parametrize("shear", [0.0, 0.3])
def test_nifti_probabilities_lie_on_the_volume_class_after_class(tmp_path, shear):
    wanted, place = chances(5, 6, 8), volume_geometry(shear)
    with nifti.stream_chances(tmp_path / "p.nii.gz", (5, 6, 8), place, CLASSES) as volume:
        volume.put(wanted[:, :2])
        volume.put(wanted[:, 2:])
    image = nibabel.load(tmp_path / "p.nii.gz")
    assert image.shape == (8, 6, 5, 4) and image.get_data_dtype() == np.uint8
    values, known = image.get_fdata().transpose(3, 2, 1, 0), np.nan_to_num(wanted).sum(axis=0) > 0
    assert np.abs(values - wanted)[:, known].max() <= HALF_STEP
    assert (values[:, ~known] == 0).all() and (~known).sum() == 2
    ras = (image.affine @ np.array([7, 5, 4, 1.0]))[:3]
    np.testing.assert_allclose(ras * (-1, -1, 1), lps(place, (4, 5, 7)), atol=1e-4)
    assert [path.name for path in tmp_path.iterdir()] == ["p.nii.gz"]


def test_simpleitk_elsewhere_reads_probabilities_of_a_volume_and_of_a_plane(tmp_path):
    volume, plane = chances(5, 6, 8, classes=3), chances(6, 8, classes=3)
    with nifti.stream_chances(tmp_path / "v.nii.gz", (5, 6, 8), volume_geometry(), CLASSES[:3]) as target:
        target.put(volume)
    with nifti.stream_chances(tmp_path / "p.nii.gz", (6, 8), PlaneGeometry((0.2, 0.1)), CLASSES[:3]) as target:
        target.put(plane[:, :4])
        target.put(plane[:, 4:])
    np.savez(tmp_path / "wanted.npz", v=np.nan_to_num(volume), p=np.nan_to_num(plane)[:, None])
    found = elsewhere(
        """
        import json, sys
        import numpy as np, SimpleITK as sitk
        wanted, said = np.load(sys.argv[3]), {}
        for name, path in zip("vp", sys.argv[1:3]):
            image = sitk.ReadImage(path)
            values = sitk.GetArrayFromImage(image)
            known = (values > 0).any(axis=0)
            said[name] = {
                "shape": values.shape, "spacing": image.GetSpacing()[:2],
                "error": float(np.abs(values - wanted[name])[:, known].max()), "unknown": int((~known).sum()),
            }
        print(json.dumps(said))
        """,
        tmp_path / "v.nii.gz",
        tmp_path / "p.nii.gz",
        tmp_path / "wanted.npz",
    )
    assert (found["v"]["shape"], found["p"]["shape"]) == ([3, 5, 6, 8], [3, 1, 6, 8])
    assert found["p"]["spacing"] == pytest.approx([0.1, 0.2])
    for one in found.values():
        assert one["error"] <= HALF_STEP and one["unknown"] == 2


def test_missing_slices_are_no_file(tmp_path):
    with (
        pytest.raises(ValueError, match="lacks its last 3 slices"),
        nifti.stream_chances(tmp_path / "p.nii.gz", (5, 6, 8), volume_geometry(), CLASSES) as volume,
    ):
        volume.put(chances(2, 6, 8))
    with (
        pytest.raises(ValueError, match="does not continue"),
        nifti.stream_chances(tmp_path / "p.nii.gz", (5, 6, 8), volume_geometry(), CLASSES) as volume,
    ):
        volume.put(chances(2, 8, 6))
    assert list(tmp_path.iterdir()) == []


STREAM = """
import sys
from pathlib import Path
import numpy as np
from rasterio.crs import CRS
from geomed_mae.image import RasterGeometry
from geomed_mae.writers import cog
import resource
size, classes = 6000, 10
names, rng = tuple(map(str, range(classes))), np.random.default_rng(0)
place = RasterGeometry(CRS.from_epsg(32633).to_wkt(), (10.0, 0, 5e5, 0, -10.0, 4e6), None)
rows = np.linspace(0, 1, classes * 60 * size, dtype=np.float32).reshape(classes, 60, size)
rows /= rows.sum(axis=0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with cog.stream_chances(Path(sys.argv[1]) / "p.tif", (size, size), place, names) as target:
    for _ in range(0, size, 60):
        target.put(rows)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_image(tmp_path):
    """1.4 GB of probabilities go through, 360 MB as they are stored."""
    done = subprocess.run([sys.executable, "-c", STREAM, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 200, "MB: GDAL's cache of 64, some rows, one tile"
