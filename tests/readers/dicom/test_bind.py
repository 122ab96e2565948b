"""Series of one study bound as channels: by physics, by the user's patterns, by interpolation. scipy is the oracle."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from scipy.interpolate import RegularGridInterpolator

from geomed_mae import readers
from geomed_mae.image import Image
from geomed_mae.modalities import Modality, parse_modality, resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.regular import list_files
from geomed_mae.readers.source import Refusal, Source, Survey
from tests.make_dicom import uid, write_series

RNG = np.random.default_rng(31)
VOLUME = RNG.integers(0, 2000, (6, 5, 7)).astype(np.int16)
T1 = {"ScanningSequence": "SE", "RepetitionTime": "500", "EchoTime": "10"}
T2 = {"ScanningSequence": "SE", "RepetitionTime": "4000", "EchoTime": "90"}
PD = {"ScanningSequence": "SE", "RepetitionTime": "3000", "EchoTime": "15"}


def survey(paths: Iterable[Path], modality: str | Modality = "mr-multisequence") -> Survey:
    headers = [dicom.header(path) for path in paths]
    assert not any(isinstance(found, Refusal) for found in headers)
    return dicom.group(headers, resolve_modalities(modality if isinstance(modality, str) else [modality]))


def write(folder: Path, volume: np.ndarray, physics: dict[str, str], **tags: object) -> list[Path]:
    name = folder.name
    return write_series(
        folder, volume, **({"Modality": "MR", "SeriesInstanceUID": uid(name), "InstanceNumber": None} | physics | tags)
    )


def names(source: Source) -> list[str]:
    return [channel.name for channel in source.channels]


def only(found: Survey) -> Source:
    assert list(found.refusals) == []
    (source,) = found.sources
    return source


def test_series_on_one_grid_become_channels_named_by_their_physics(tmp_path):
    paths = write(tmp_path / "b", VOLUME + 1, T2) + write(tmp_path / "a", VOLUME, T1)
    source = only(survey(paths))
    assert names(source) == ["T1", "T2"]
    assert [channel.echo_time_ms for channel in source.channels] == [10.0, 90.0]
    assert [channel.repetition_time_ms for channel in source.channels] == [500.0, 4000.0]
    assert set(source.files) == set(paths)
    image = dicom.read(Source.from_json(source.to_json()))
    np.testing.assert_array_equal(image.array, np.stack([VOLUME, VOLUME + 1]))
    assert image.valid.shape == image.array.shape
    assert source.selector["instances"] == [str(pydicom.dcmread(path).SOPInstanceUID) for path in paths[6:]]
    assert {value for kind, value in source.identity if kind == "series"} == {uid("a"), uid("b")}


def test_auto_and_the_plain_modality_never_bind(tmp_path):
    paths = write(tmp_path / "a", VOLUME, T1) + write(tmp_path / "b", VOLUME, T2)
    for modality in ("auto", "mr"):
        found = survey(paths, modality)
        assert sorted(names(source) for source in found.sources) == [["T1"], ["T2"]]
        assert {source.modality for source in found.sources} == {"mr"}


def test_a_window_reads_only_its_slices_of_each_series(tmp_path):
    paths = write(tmp_path / "a", VOLUME, T1) + write(tmp_path / "b", VOLUME + 1, T2)
    source = only(survey(paths))
    window = (slice(2, 4), slice(1, 5), slice(0, 3))
    whole = dicom.read(source).crop(window)
    for number in (0, 1, 4, 5, 6, 7, 10, 11):
        paths[number].unlink()
    part = dicom.read(source, window)
    np.testing.assert_array_equal(part.array, whole.array)
    np.testing.assert_array_equal(part.geometry.affine, whole.geometry.affine)


@pytest.mark.parametrize(
    ("change", "bound"),
    [
        ({"PixelSpacing": [1.0, 1.001]}, False),
        ({"FrameOfReferenceUID": uid("another frame")}, False),
        ({"FrameOfReferenceUID": None}, False),
        ({"StudyInstanceUID": uid("another study")}, False),
        ({"PatientID": "P2"}, False),
        ({"step": (0, 0, 2.001)}, True),
        ({"step": (0, 0, 2.003)}, False),
    ],
)
def test_only_one_study_frame_of_reference_and_grid_are_bound(tmp_path, change, bound):
    change = {"spacing" if key == "PixelSpacing" else key: value for key, value in change.items()}
    paths = write(tmp_path / "a", VOLUME, T1) + write(tmp_path / "b", VOLUME, T2, **change)
    found = survey(paths)
    assert sorted(names(source) for source in found.sources) == ([["T1", "T2"]] if bound else [["T1"], ["T2"]])
    assert not any("BIND_AMBIGUOUS" in source.flags for source in found.sources)


def test_each_slice_of_a_bound_series_keeps_the_position_promise(tmp_path):
    paths = write(tmp_path / "a", VOLUME, T1) + write(tmp_path / "b", VOLUME, T2, step=(0, 0, 2.001))
    affine = only(survey(paths)).geometry.affine
    for index, path in enumerate(paths[6:]):
        place = np.array(pydicom.dcmread(path).ImagePositionPatient, float)
        assert np.linalg.norm((affine @ (index, 0, 0, 1))[:3] - place) <= 0.01


def test_a_cropped_series_stays_an_image_of_its_own(tmp_path):
    paths = write(tmp_path / "a", VOLUME, T1) + write(tmp_path / "b", VOLUME, T2)
    cropped = write(tmp_path / "c", VOLUME[1:4].copy(), PD)
    found = survey([*paths, *cropped])
    assert sorted(names(source) for source in found.sources) == [["PD"], ["T1", "T2"]]


def test_two_series_that_would_be_one_channel_are_left_alone_and_flagged(tmp_path):
    paths = write(tmp_path / "a", VOLUME, T1) + write(tmp_path / "b", VOLUME, T1) + write(tmp_path / "c", VOLUME, T2)
    found = survey([*paths, *write(tmp_path / "d", VOLUME, PD)])
    assert sorted((names(source), source.flags) for source in found.sources) == [
        (["T1"], ("BIND_AMBIGUOUS",)),
        (["T1"], ("BIND_AMBIGUOUS",)),
        (["T2", "PD"], ()),
    ]


def test_what_has_no_name_in_the_modality_is_not_bound(tmp_path):
    unknown = {"ScanningSequence": "GR", "RepetitionTime": "400", "EchoTime": "30"}
    phase = {**T2, "ImageType": ["ORIGINAL", "PRIMARY", "P"]}
    paths = (
        write(tmp_path / "a", VOLUME, T1)
        + write(tmp_path / "b", VOLUME, unknown)
        + write(tmp_path / "c", VOLUME, phase)
    )
    assert sorted(names(source) for source in survey(paths).sources) == [["MR"], ["MR"], ["T1"]]


PATTERNS = """
name: mine
title: Sequences of mine
geometry: volume
formats: [dicom]
dicom: [MR]
unit: a.u.
normalise: {method: image}
bind: {resample: none}
channels:
  - {name: T1, kind: mr, sequence: T1, series: "*t1*pre*"}
  - {name: SWI, kind: mr, series: "swi*"}
  - {name: T2, kind: mr, sequence: T2}
"""


@pytest.fixture
def mine(tmp_path: Path) -> Modality:
    path = tmp_path / "mine.yaml"
    path.write_text(PATTERNS)
    return parse_modality(path)


def test_a_pattern_chooses_among_series_and_names_what_physics_cannot(tmp_path, mine):
    unknown = {"ScanningSequence": "GR", "RepetitionTime": "40", "EchoTime": "20"}
    paths = write(tmp_path / "a", VOLUME, T1, SeriesDescription="AX T1 PRE")
    paths += write(tmp_path / "b", VOLUME + 1, T1, SeriesDescription="AX T1 POST")
    paths += write(tmp_path / "c", VOLUME + 2, unknown, ProtocolName="SWI_images")
    paths += write(tmp_path / "d", VOLUME + 3, T2)
    found = survey(paths, mine)
    assert [names(source) for source in found.sources] == [["T1", "SWI", "T2"], ["T1"]]
    np.testing.assert_array_equal(dicom.read(found.sources[0]).array, np.stack([VOLUME, VOLUME + 2, VOLUME + 3]))
    assert not any("BIND_AMBIGUOUS" in source.flags for source in found.sources)


def test_a_series_that_two_patterns_want_is_left_alone(tmp_path, mine):
    paths = write(tmp_path / "a", VOLUME, T1, SeriesDescription="t1 pre", ProtocolName="swi")
    paths += write(tmp_path / "b", VOLUME, T2)
    found = survey(paths, mine)
    assert sorted((names(source), source.flags) for source in found.sources) == [
        (["T1"], ("BIND_AMBIGUOUS",)),
        (["T2"], ()),
    ]


def test_descriptions_reach_no_source_but_its_own_process(tmp_path, mine):
    paths = write(tmp_path / "a", VOLUME, T1, SeriesDescription="T1 PRE Zacharias^Canary")
    paths += write(tmp_path / "b", VOLUME, T2, ProtocolName="Canary")
    assert "canary" not in str(only(survey(paths, mine)).to_json()).casefold()


# Interpolation onto another grid


def write_ct(folder: Path, volume: np.ndarray, **tags: object) -> list[Path]:
    return write_series(folder, volume, **({"SeriesInstanceUID": uid(folder.name), "InstanceNumber": None} | tags))


def write_pet(folder: Path, volume: np.ndarray, **tags: object) -> list[Path]:
    return write_ct(
        folder, volume, **({"Modality": "PT", "RescaleSlope": "0.5", "RescaleIntercept": "0", "Units": "BQML"} | tags)
    )


def first_position(paths: list[Path], offset: tuple[float, float, float]) -> None:
    for path in paths:
        one = pydicom.dcmread(path)
        one.ImagePositionPatient = [f"{a + b:.10g}" for a, b in zip(one.ImagePositionPatient, offset, strict=True)]
        one.save_as(path)


def interpolated(values: np.ndarray, affine: np.ndarray, onto: Image) -> tuple[np.ndarray, np.ndarray]:
    """scipy's grid interpolator at each voxel centre of `onto`, NaN outside."""
    points = np.stack(
        [axis.ravel() for axis in np.meshgrid(*[np.arange(size) for size in onto.spatial_shape], indexing="ij")]
    )
    places = np.linalg.inv(affine) @ onto.geometry.affine @ np.vstack([points, np.ones(points.shape[1])])
    grid = tuple(np.arange(size) for size in values.shape)
    found = RegularGridInterpolator(grid, values, bounds_error=False, fill_value=np.nan)(np.round(places[:3].T, 9))
    return found.reshape(onto.spatial_shape), ~np.isnan(found.reshape(onto.spatial_shape))


def pet_and_ct(tmp_path: Path, **tags: object) -> tuple[Survey, np.ndarray]:
    ct = write_ct(tmp_path / "ct", RNG.integers(0, 2000, (8, 9, 10)).astype(np.int16), step=(0, 0.5, 1.5))
    activity = RNG.integers(0, 2000, (5, 4, 6)).astype(np.int16)
    pet = write_pet(tmp_path / "pet", activity, spacing=(2.0, 1.7), step=(0, 0, 3.1), **tags)
    first_position(pet, (0.3, 1.1, -2.0))
    return survey([*ct, *pet], "pet-ct"), activity * 0.5


def test_pet_is_interpolated_onto_its_ct(tmp_path):
    found, activity = pet_and_ct(tmp_path)
    source = only(found)
    assert (names(source), source.flags) == (["CT", "PET"], ("TILT", "RESAMPLED"))
    assert [channel.unit for channel in source.channels] == ["HU", "Bq/ml"]
    image = dicom.read(source)
    assert image.array.shape == (2, 8, 9, 10)
    affine = np.array(source.selector["parts"][1]["affine"])
    expected, inside = interpolated(activity, affine, image)
    assert 0.1 < inside.mean() < 0.9
    np.testing.assert_array_equal(image.valid[1], inside)
    np.testing.assert_allclose(image.array[1][inside], expected[inside], rtol=1e-6)
    assert image.valid[0].all()
    assert (image.array[1][~inside] == 0).all()


def test_padding_next_to_a_voxel_makes_it_invalid(tmp_path):
    found, activity = pet_and_ct(tmp_path, PixelPaddingValue=7)
    image = dicom.read(only(found))
    assert image.valid[1].any()
    for path in (tmp_path / "pet").iterdir():
        one = pydicom.dcmread(path)
        stored = one.pixel_array.copy()
        stored[2, 3] = 7
        one.PixelData = stored.tobytes()
        one.save_as(path)
    source = only(found)
    holed = dicom.read(source)
    activity = activity.copy()
    activity[:, 2, 3] = np.nan
    expected, inside = interpolated(activity, np.array(source.selector["parts"][1]["affine"]), holed)
    np.testing.assert_array_equal(holed.valid[1] & ~inside, False)
    assert holed.valid[1].sum() < image.valid[1].sum()
    np.testing.assert_allclose(holed.array[1][holed.valid[1]], expected[holed.valid[1]], rtol=1e-6)


@pytest.mark.parametrize("seed", range(12))
def test_a_window_of_an_interpolated_channel_has_the_bits_of_the_whole(tmp_path, seed):
    found, _ = pet_and_ct(tmp_path)
    source = only(found)
    whole = dicom.read(source)
    rng = np.random.default_rng(seed)
    window = []
    for size in source.shape:
        start, stop = sorted(rng.choice(size + 1, 2, replace=False).tolist())
        window.append(slice(start, stop))
    part, cut = dicom.read(source, tuple(window)), whole.crop(tuple(window))
    np.testing.assert_array_equal(part.array, cut.array)
    np.testing.assert_array_equal(part.valid, cut.valid)
    np.testing.assert_allclose(part.geometry.affine, cut.geometry.affine)


def test_a_window_of_an_interpolated_channel_reads_only_near_slices(tmp_path):
    found, _ = pet_and_ct(tmp_path)
    source = only(found)
    window = (slice(0, 1), slice(0, 9), slice(0, 10))
    expected = dicom.read(source, window)
    for path in sorted((tmp_path / "pet").iterdir())[:2]:
        path.unlink()
    for path in sorted((tmp_path / "ct").iterdir())[:7]:
        path.unlink()
    np.testing.assert_array_equal(dicom.read(source, window).array, expected.array)


def test_pet_on_the_very_grid_of_its_ct_is_not_interpolated(tmp_path):
    paths = write_ct(tmp_path / "ct", VOLUME) + write_pet(tmp_path / "pet", VOLUME)
    source = only(survey(paths, "pet-ct"))
    assert source.flags == ()
    np.testing.assert_array_equal(dicom.read(source).array[1], VOLUME * 0.5)


def test_pet_elsewhere_in_the_body_is_not_bound(tmp_path):
    pet = write_pet(tmp_path / "pet", VOLUME)
    first_position(pet, (0, 0, 500))
    found = survey([*write_ct(tmp_path / "ct", VOLUME), *pet], "pet-ct")
    assert sorted(names(source) for source in found.sources) == [["CT"], ["PET"]]


def test_two_cts_leave_the_pet_alone(tmp_path):
    paths = write_ct(tmp_path / "a", VOLUME) + write_ct(tmp_path / "b", VOLUME) + write_pet(tmp_path / "pet", VOLUME)
    found = survey(paths, "pet-ct")
    assert sorted((names(source), source.flags) for source in found.sources) == [
        (["CT"], ("BIND_AMBIGUOUS",)),
        (["CT"], ("BIND_AMBIGUOUS",)),
        (["PET"], ()),
    ]


# Real studies


@pytest.mark.data
def test_the_real_sequences_of_one_study_are_bound_and_the_cropped_one_is_not(shared_data):
    files = list(list_files(shared_data / "med" / "mr_multisequence"))
    found = readers.survey(files, resolve_modalities("mr-multisequence"))
    assert sorted(names(source) for source in found.sources) == [["MR"], ["T1C", "T2", "FLAIR"]]
    source = next(source for source in found.sources if len(source.channels) == 3)
    assert source.shape == (22, 512, 512)
    window = (slice(4, 7), slice(100, 300), slice(50, 60))
    image = readers.read(source, window)
    for number, channel in enumerate(source.selector["parts"]):
        for plane in range(4, 7):
            one = pydicom.dcmread(source.files[channel["files"][plane]])
            stored = one.pixel_array * float(one.get("RescaleSlope", 1)) + float(one.get("RescaleIntercept", 0))
            np.testing.assert_array_equal(image.array[number, plane - 4], stored[100:300, 50:60].astype(np.float32))
            place = (source.geometry.affine @ (plane, 0, 0, 1))[:3]
            assert np.linalg.norm(place - np.array(one.ImagePositionPatient, float)) <= 0.01


@pytest.mark.data
@pytest.mark.parametrize("patient", ["STS_008", "STS_019", "STS_024"])
def test_real_pet_on_its_ct_equals_simpleitk(shared_data, patient):
    folder = shared_data / "med" / "sarcoma" / patient / "dicom"
    files = [path for part in ("CT", "PET") for path in sorted((folder / part / "image").iterdir())]
    found = readers.survey(files, resolve_modalities("pet-ct"))
    assert list(found.refusals) == []
    (source,) = found.sources
    image = readers.read(source)
    alone = readers.read(*readers.survey(files[len(files) // 2 :], resolve_modalities("pet")).sources)
    volumes = []
    for array, geometry in ((image.array[0], image.geometry), (alone.array[0], alone.geometry)):
        volume = SimpleITK.GetImageFromArray(array.astype(np.float64))
        steps = geometry.affine[:3, [2, 1, 0]]
        lengths = np.linalg.norm(steps, axis=0)
        volume.SetOrigin(geometry.affine[:3, 3].tolist())
        volume.SetSpacing(lengths.tolist())
        volume.SetDirection((steps / lengths).ravel().tolist())
        volumes.append(volume)
    theirs = SimpleITK.GetArrayFromImage(
        SimpleITK.Resample(volumes[1], volumes[0], SimpleITK.Transform(), SimpleITK.sitkLinear, -1.0)
    )
    # SimpleITK goes on to the outer edge of the outermost voxels; inside both agree.
    inside = image.valid[1]
    assert inside.mean() > 0.8
    scale = np.abs(theirs[inside]).max()
    np.testing.assert_allclose(image.array[1][inside], theirs[inside], atol=1e-5 * scale)
