"""Every real DICOM set beside the checkout against oracles that share no code with the reader.

The first oracle is pydicom file by file: stored values by `pixel_array`, rescaled by each file's own attributes, placed
by ImagePositionPatient and ImageOrientationPatient. The second is SimpleITK on series that it can read; the third are
the NIfTI files that a converter made of some sets.
"""

from __future__ import annotations

import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK

from geomed_mae import readers
from geomed_mae.image import VolumeGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers.regular import list_files
from geomed_mae.readers.source import Source, Survey

MOSAICS = ("dicom_traps/siemens_fmri", "transfer_syntaxes")

EXPECTED = {
    "ct_abdomen": ([20], {}),
    "dicom_traps/gantrytilting": ([4], {}),
    "dicom_traps/ge_dti/001": ([4, 4], {}),
    "dicom_traps/ge_dti/002": ([4, 4, 4, 4], {}),
    "dicom_traps/notavolume": ([], {"DUP_POSITION": 4}),
    "dicom_traps/philips_enhanced_anatomical": ([8], {}),
    "dicom_traps/siemens_fmri": ([50, 50], {}),
    "dicom_traps/sliceincrement/001": ([3], {"SLICE_GAP": 1}),
    "dicom_traps/sliceincrement/002": ([3], {"SLICE_GAP": 1}),
    "mr_multisequence": ([22, 22, 22, 32], {}),
    "sarcoma/STS_008": ([28, 51, 51], {"NON_IMAGE": 3}),
    "sarcoma/STS_019": ([47, 47, 47], {"NON_IMAGE": 3}),
    "sarcoma/STS_024": ([43, 55, 55], {"NON_IMAGE": 3}),
    "transfer_syntaxes": ([35] * 9, {}),
}
"""Slices of each volume, and what is refused."""


def survey(folder: Path) -> tuple[list[Path], Survey]:
    files = [path for path in list_files(folder) if not path.name.endswith((".nii.gz", ".bval", ".bvec", ".md"))]
    return files, readers.survey(files, resolve_modalities("auto"))


def slices_of(source: Source) -> list[tuple[Path, int]]:
    """(file, frame) of each slice, as the source says it will read them."""
    frames = source.selector.get("frames", [0] * source.shape[0])
    if "files" in source.selector:
        return [(source.files[index], frame) for index, frame in zip(source.selector["files"], frames, strict=True)]
    if len(source.files) == 1:
        return [(source.files[0], frame) for frame in frames]
    return [(path, frame) for path, frame in zip(source.files, frames, strict=True)]


def truth(path: Path, frame: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """One slice by pydicom alone: (values, position, the two steps (row, column) in mm)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = pydicom.dcmread(path)
        stored = one.pixel_array
        place, plane, measures, rescale = one, one, one, one
        if "PerFrameFunctionalGroupsSequence" in one:
            stored, groups = stored[frame], one.PerFrameFunctionalGroupsSequence[frame]
            shared = one.SharedFunctionalGroupsSequence[0]
            place, plane, measures, rescale = (
                (groups if name in groups else shared)[name][0]
                for name in (
                    "PlanePositionSequence",
                    "PlaneOrientationSequence",
                    "PixelMeasuresSequence",
                    "PixelValueTransformationSequence",
                )
            )
        values = stored.astype(np.float64) * float(rescale.get("RescaleSlope", 1))
        values += float(rescale.get("RescaleIntercept", 0))
        first, second = np.reshape(np.array(plane.ImageOrientationPatient, float), (2, 3))
        spacing = np.array(measures.PixelSpacing, float)
    return values, np.array(place.ImagePositionPatient, float), np.stack([second * spacing[0], first * spacing[1]])


@pytest.mark.data
@pytest.mark.parametrize("name", EXPECTED)
def test_every_real_set_equals_pydicom_file_by_file(shared_data, name):
    files, found = survey(shared_data / "med" / name)
    used = {path for source in found.sources for path in source.files}
    refused = [refusal.path for refusal in found.refusals]
    assert sorted([*used, *refused]) == sorted(files)
    counts = dict(Counter(refusal.reason.name for refusal in found.refusals))
    assert (sorted(source.shape[0] for source in found.sources), counts) == EXPECTED[name]
    for source in found.sources:
        image = readers.read(source)
        assert isinstance(image.geometry, VolumeGeometry)
        if name in MOSAICS:
            continue  # cut from sheets: see test_dicom_mosaic
        for index, (path, frame) in enumerate(slices_of(source)):
            values, position, steps = truth(path, frame)
            factor = source.selector.get("factor", 1.0)
            np.testing.assert_array_equal(image.array[0, index], (values * factor).astype(np.float32))
            assert image.valid[0, index].any()
            affine = image.geometry.affine
            assert np.linalg.norm((affine @ (index, 0, 0, 1))[:3] - position) <= 0.01
            rows, columns = values.shape
            corner = position + (rows - 1) * steps[0] + (columns - 1) * steps[1]
            assert np.linalg.norm((affine @ (index, rows - 1, columns - 1, 1))[:3] - corner) <= 0.02


@pytest.mark.data
@pytest.mark.parametrize(
    "name", ["ct_abdomen", "mr_multisequence", "sarcoma/STS_008", "sarcoma/STS_019", "sarcoma/STS_024"]
)
def test_real_regular_series_equal_simpleitk(shared_data, name):
    _, found = survey(shared_data / "med" / name)
    for source in found.sources:
        image = readers.read(source)
        reader = SimpleITK.ImageSeriesReader()
        reader.SetFileNames([str(path) for path in source.files])
        theirs = reader.Execute()
        values = SimpleITK.GetArrayFromImage(theirs) * source.selector.get("factor", 1.0)
        np.testing.assert_allclose(values, image.array[0], rtol=1e-5, atol=1e-5)
        last = [size - 1 for size in source.shape]
        for index in ([0, 0, 0], last, [last[0], 0, last[2]], [0, last[1], 0]):
            point = theirs.TransformIndexToPhysicalPoint(index[::-1])
            np.testing.assert_allclose((image.geometry.affine @ (*index, 1))[:3], point, atol=0.02)


@pytest.mark.data
@pytest.mark.parametrize("name", ["ge_dti/001", "ge_dti/002", "philips_enhanced_anatomical/001"])
def test_real_series_lie_where_a_converter_puts_them(shared_data, name):
    import nibabel

    folder = shared_data / "med" / "dicom_traps" / name.split("/")[0]
    converted = nibabel.load(folder / f"{name.split('/')[1]}_ground_truth.nii.gz")
    values = np.asarray(converted.dataobj).reshape(*converted.shape[:3], -1)
    _, found = survey(folder / name.split("/")[1])
    assert len(found.sources) == values.shape[3]
    to_lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ converted.affine
    matched = set()
    for source in found.sources:
        image = readers.read(source)
        index = np.stack([axis.ravel() for axis in np.meshgrid(*map(np.arange, source.shape), indexing="ij")])
        places = np.linalg.inv(to_lps) @ image.geometry.affine @ np.vstack([index, np.ones(index.shape[1])])
        theirs = np.round(places[:3]).astype(int)
        # Each of our voxels is one of theirs, at the same place ...
        assert np.abs(places[:3] - theirs).max() < 0.02
        # ... and one of their volumes has all of its values.
        same = [
            volume
            for volume in range(values.shape[3])
            if np.allclose(values[*theirs, volume], image.array[0].ravel(), rtol=1e-4, atol=0.51)
        ]
        assert same
        matched.update(same)
    assert matched == set(range(values.shape[3]))
