"""Pixel spacing of 2D images: the rules of PS3.3 10.7 and C.8.5.5, case by case."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from geomed_mae.image import PlaneGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from tests.make_dicom import dataset, save

PIXELS = np.arange(12, dtype=np.uint16).reshape(3, 4)


def spacing_of(path: Path, modality: str = "auto", **tags: object) -> tuple[float, float] | None:
    """Write a radiograph (or an ultrasound image) with these attributes; return the spacing that it is read with."""
    kind = "US" if modality == "ultrasound" else "DX"
    pixels = PIXELS.astype(np.uint8) if kind == "US" else PIXELS
    path = save(dataset(pixels, **({"Modality": kind} | tags)), path / "a")
    found = dicom.group([dicom.header(path)], resolve_modalities(modality))
    assert list(found.refusals) == []
    geometry = found.sources[0].geometry
    assert isinstance(geometry, PlaneGeometry)
    return geometry.spacing_mm


def region(kind: int = 1, x: float = 0.01, y: float = 0.02, units: tuple[int, int] = (3, 3)) -> Dataset:
    item = Dataset()
    item.RegionSpatialFormat = kind
    item.PhysicalUnitsXDirection, item.PhysicalUnitsYDirection = units
    item.PhysicalDeltaX, item.PhysicalDeltaY = x, y
    return item


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ({}, None),
        ({"PixelSpacing": [0.2, 0.3]}, (0.2, 0.3)),
        ({"ImagerPixelSpacing": [0.2, 0.3]}, (0.2, 0.3)),
        ({"ImagerPixelSpacing": [0.2, 0.3], "EstimatedRadiographicMagnificationFactor": "1.25"}, (0.16, 0.24)),
        ({"ImagerPixelSpacing": [0.2, 0.2], "PixelSpacing": [0.15, 0.15],
          "EstimatedRadiographicMagnificationFactor": "1.25"}, (0.15, 0.15)),
        ({"ImagerPixelSpacing": [0.2, 0.2], "PixelSpacing": [0.2, 0.2],
          "EstimatedRadiographicMagnificationFactor": "1.6"}, (0.125, 0.125)),
        ({"ImagerPixelSpacing": [0.2, 0.3], "EstimatedRadiographicMagnificationFactor": "0"}, (0.2, 0.3)),
        ({"ImagerPixelSpacing": [0.2, 0.3], "EstimatedRadiographicMagnificationFactor": "0.5"}, (0.2, 0.3)),
        ({"NominalScannedPixelSpacing": [0.1, 0.1]}, (0.1, 0.1)),
    ],
)  # fmt: skip
def test_radiographs(tmp_path, tags, expected):
    found = spacing_of(tmp_path, **tags)
    assert found == expected if expected is None else found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("regions", "expected"),
    [
        ([region()], (0.2, 0.1)),
        ([region(x=-0.01)], (0.2, 0.1)),
        ([region(), region(x=0.010000001)], (0.2, 0.1)),
        ([region(), region(kind=2, x=0.5, units=(4, 3))], (0.2, 0.1)),
        ([region(), region(x=0.02)], None),
        ([region(units=(4, 3))], None),
        ([region(kind=2)], None),
        ([region(x=0.0)], None),
        ([region(x=float("nan"))], None),
        ([], None),
    ],
    ids=["one", "negative", "agreeing", "beside a trace", "contradicting", "seconds", "trace", "zero", "nan", "none"],
)
def test_ultrasound_regions(tmp_path, regions, expected):
    found = spacing_of(tmp_path, "ultrasound", SequenceOfUltrasoundRegions=Sequence(regions))
    assert found == expected if expected is None else found == pytest.approx(expected)


def test_enhanced_angiography_has_its_detector_in_a_functional_group(tmp_path):
    properties, geometry, shared = Dataset(), Dataset(), Dataset()
    properties.ImagerPixelSpacing = [0.4, 0.4]
    geometry.EstimatedRadiographicMagnificationFactor = 1.6
    shared.FramePixelDataPropertiesSequence = Sequence([properties])
    shared.XRayGeometrySequence = Sequence([geometry])
    sequence = Sequence([shared])
    assert spacing_of(tmp_path, SharedFunctionalGroupsSequence=sequence) == pytest.approx((0.25, 0.25))


@pytest.mark.parametrize("spacing", [[0, 0.1], [-1, 1], [0.1]])
def test_an_impossible_spacing_is_refused(tmp_path, spacing):
    path = save(dataset(PIXELS, Modality="DX", ImagerPixelSpacing=spacing), tmp_path / "a")
    found = dicom.group([dicom.header(path)], resolve_modalities("auto"))
    assert [refusal.reason.name for refusal in found.refusals] == ["BAD_GEOMETRY"]
