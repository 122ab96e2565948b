"""From DICOM files to Sources to Images; oracles are pydicom file by file, SimpleITK, and geometry done by hand.

Numbers of faults are those of the fault list that the reader was built against.
"""

from __future__ import annotations

import logging
import pickle
import resource
import shutil
import struct
import time
import warnings
import zlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pydicom
import pytest
import SimpleITK
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, PlaneGeometry, VolumeGeometry
from geomed_mae.modalities import load_modality, resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.dicom import series as dicom_series
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import check_regular, first_bytes, list_files
from geomed_mae.readers.source import Refusal, Source, Survey
from tests.make_dicom import AXIAL, dataset, enhanced, patch, save, uid, write_series, write_slice

PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
RNG = np.random.default_rng(5)
PLANE = np.arange(30, dtype=np.int16).reshape(5, 6)
VOLUME = RNG.integers(0, 2000, (6, 5, 7)).astype(np.int16)


def survey(paths: Iterable[Path], modality: str = "auto") -> Survey:
    """Survey files as `readers.survey` does, this reader alone."""
    headers, refusals = [], []
    for path in paths:
        found = dicom.header(path)
        (refusals if isinstance(found, Refusal) else headers).append(found)
    grouped = dicom.group(headers, resolve_modalities(modality))
    return Survey([*grouped.sources], [*refusals, *grouped.refusals])


def reasons(found: Survey) -> dict[str, int]:
    return dict(Counter(refusal.reason.name for refusal in found.refusals))


def only_source(paths: Iterable[Path], modality: str = "auto") -> Source:
    found = survey(paths, modality)
    assert reasons(found) == {}
    (source,) = found.sources
    return source


def refusal_of(path: Path) -> Refusal:
    found = dicom.header(path)
    assert isinstance(found, Refusal), found
    return found


def check_against_pydicom(source: Source, image: Image) -> None:
    """The promise: each slice lies within 0.01 mm of the file's own position, each voxel is pydicom's, rescaled."""
    for index, path in enumerate(source.files):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one = pydicom.dcmread(path)
            stored = one.pixel_array.astype(np.float64)
        expected = stored * float(one.get("RescaleSlope", 1)) + float(one.get("RescaleIntercept", 0))
        np.testing.assert_array_equal(image.array[0, index], expected.astype(np.float32))
        affine = image.geometry.affine
        first, second = np.reshape(np.array(one.ImageOrientationPatient, dtype=float), (2, 3))
        spacing = [float(value) for value in one.PixelSpacing]
        origin = np.array(one.ImagePositionPatient, dtype=float)
        for row, column in ((0, 0), (one.Rows - 1, one.Columns - 1)):
            true = origin + first * spacing[1] * column + second * spacing[0] * row
            here = (affine @ (index, row, column, 1))[:3]
            assert np.linalg.norm(here - true) < (0.01 if (row, column) == (0, 0) else 0.03)


# ---- what is DICOM


def test_takes_a_file_by_its_magic_whatever_its_name(tmp_path):
    path = write_slice(tmp_path / "IM 1.jpg", PLANE)
    assert dicom.sniff(path, first_bytes(path))


@pytest.mark.parametrize("content", [b"x", b"hello " * 50, b"PK\x03\x04" + b"\0" * 300, RNG.bytes(600), b"\0" * 600])
def test_fault_27_does_not_take_what_is_no_dicom(tmp_path, content):
    path = tmp_path / "a.dcm"
    path.write_bytes(content)
    assert not dicom.sniff(path, first_bytes(path))
    assert dicom.NOT_THIS_FORMAT is Reason.NOT_DICOM


def test_fault_28_bare_implicit_elements_are_read_and_flagged(tmp_path):
    made = dataset(PLANE, ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=list(AXIAL), PixelSpacing=[1, 1])
    path = save(made, tmp_path / "bare", syntax="1.2.840.10008.1.2", preamble=False)
    assert dicom.sniff(path, first_bytes(path))
    source = only_source([path])
    assert "NO_PREAMBLE" in source.flags
    np.testing.assert_array_equal(dicom.read(source).array[0, 0], PLANE - 1024.0)


def test_fault_28_bare_elements_without_rows_are_no_dicom(tmp_path):
    path = save(dataset(PLANE, Rows=None), tmp_path / "bare", syntax="1.2.840.10008.1.2", preamble=False)
    assert refusal_of(path).reason is Reason.NOT_DICOM


@pytest.mark.parametrize(
    ("sop_class", "modality"),
    [
        ("1.2.840.10008.1.3.10", ""),  # DICOMDIR
        ("1.2.840.10008.5.1.4.1.1.88.11", "SR"),
        ("1.2.840.10008.5.1.4.1.1.481.3", "RTSTRUCT"),
        ("1.2.840.10008.5.1.4.1.1.481.2", "RTDOSE"),
        ("1.2.840.10008.5.1.4.1.1.104.1", "DOC"),
        ("1.2.840.10008.5.1.4.1.1.66.4", "SEG"),
        ("1.2.840.10008.5.1.4.1.1.9.1.1", "ECG"),
        ("1.2.840.10008.5.1.4.1.1.11.1", "PR"),
        ("1.2.3.4.5", "SR"),
    ],
)
def test_fault_29_objects_that_are_no_images_are_said_to_be_so(tmp_path, sop_class, modality):
    path = save(dataset(PLANE, SOPClassUID=sop_class, Modality=modality), tmp_path / "a")
    assert refusal_of(path).reason is Reason.NON_IMAGE


@pytest.mark.parametrize(
    "keyword",
    ["Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation", "PhotometricInterpretation",
     "SamplesPerPixel"],
)  # fmt: skip
def test_fault_30_a_missing_attribute_is_named(tmp_path, keyword):
    refusal = refusal_of(save(dataset(PLANE, **{keyword: None}), tmp_path / "a"))
    assert (refusal.reason, refusal.detail) == (Reason.MISSING_TAG, f"{keyword} is missing")


def test_fault_31_a_file_cut_anywhere_before_its_pixels_is_refused(tmp_path):
    content = write_slice(tmp_path / "whole", PLANE).read_bytes()
    end = content.index(b"\xe0\x7f\x10\x00")
    found = set()
    for stop in range(140, end + 12, 7):
        (tmp_path / "cut").write_bytes(content[:stop])
        found.add(refusal_of(tmp_path / "cut").reason)
    assert found <= {Reason.NO_PIXEL_DATA, Reason.MALFORMED}
    assert Reason.NO_PIXEL_DATA in found


def test_fault_32_pixel_data_that_ends_early_is_truncated(tmp_path):
    path = write_slice(tmp_path / "a", PLANE)
    path.write_bytes(path.read_bytes()[:-10])
    refusal = refusal_of(path)
    assert (refusal.reason, refusal.detail) == (Reason.TRUNCATED, "50 of 60 bytes of pixel data are there")


@pytest.mark.parametrize("declared", [2, 40, 4_000_000_000])
def test_fault_32_a_false_length_is_a_mismatch(tmp_path, declared):
    path = write_slice(tmp_path / "a", PLANE)
    patch(
        path, b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<L", 60), b"\xe0\x7f\x10\x00OW\0\0" + struct.pack("<L", declared)
    )
    assert refusal_of(path).reason is Reason.LENGTH_MISMATCH


def test_pixel_data_of_more_frames_than_declared_is_a_mismatch(tmp_path):
    path = write_slice(tmp_path / "a", PLANE, PixelData=PLANE.tobytes() * 2)
    assert refusal_of(path).reason is Reason.LENGTH_MISMATCH


def test_fault_33_an_enormous_image_is_refused_before_anything_is_allocated(tmp_path):
    made = dataset(PLANE, Rows=65535, Columns=65535, NumberOfFrames=20, PixelData=encapsulate([b"\0" * 8] * 20))
    made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
    path = save(made, tmp_path / "a", syntax="1.2.840.10008.1.2.5")
    started = time.monotonic()
    assert refusal_of(path).reason is Reason.TOO_LARGE
    assert time.monotonic() - started < 1


def test_fault_33_a_billion_frames_are_refused(tmp_path):
    assert refusal_of(save(dataset(PLANE, NumberOfFrames=999999999), tmp_path / "a")).reason is Reason.TOO_LARGE


def deflated(path: Path, body: bytes) -> Path:
    """Write a deflated data set around a body of explicit little endian elements."""
    content = save(dataset(PLANE), path, syntax="1.2.840.10008.1.2.1").read_bytes()
    meta = content[: content.index(b"\x08\x00\x08\x00CS")]
    meta = meta.replace(b"1.2.840.10008.1.2.1\0", b"1.2.840.10008.1.2.1.99")
    # The transfer syntax grew by two bytes: its length and the group's follow.
    meta = meta.replace(b"\x02\x00\x10\x00UI\x14\x00", b"\x02\x00\x10\x00UI\x16\x00")
    group = struct.unpack("<L", meta[140:144])[0] + 2
    meta = meta[:140] + struct.pack("<L", group) + meta[144:]
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    path.write_bytes(meta + packer.compress(body) + packer.flush())
    return path


def test_a_deflated_slice_is_read(tmp_path):
    plain = write_slice(tmp_path / "plain", PLANE).read_bytes()
    path = deflated(tmp_path / "packed", plain[plain.index(b"\x08\x00\x08\x00CS") :])
    np.testing.assert_array_equal(dicom.read(only_source([path])).array[0, 0], PLANE - 1024.0)


def test_fault_34_a_deflate_bomb_stops_at_the_limit(tmp_path):
    path = deflated(tmp_path / "bomb", b"\0" * 400_000_000)
    assert path.stat().st_size < 1_000_000
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal_of(path).reason is Reason.DEFLATE_LIMIT
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 96 * 1024


def test_fault_35_sequences_nested_5000_deep_are_malformed(tmp_path):
    path = write_slice(tmp_path / "a", PLANE)
    content = path.read_bytes()
    start = content.index(b"\x20\x00\x0d\x00UI")
    nested = (b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 5000
    path.write_bytes(content[:start] + nested + content[start:])
    assert refusal_of(path).reason is Reason.MALFORMED


@pytest.mark.parametrize("value", [b"abc  ", b"     ", b"1,5  ", b"2\\3  ", b"nan  ", b"1e400", b"0    ", b"1_0  "])
def test_fault_43_a_slope_that_is_no_number_is_refused(tmp_path, value):
    path = patch(write_slice(tmp_path / "a", PLANE, RescaleSlope="1.375"), b"1.375", value)
    refusal = refusal_of(path)
    assert (refusal.reason, refusal.detail) == (Reason.BAD_RESCALE, "RescaleSlope is not a usable number")


def test_an_empty_slope_is_refused(tmp_path):
    assert refusal_of(write_slice(tmp_path / "a", PLANE, RescaleSlope="")).reason is Reason.BAD_RESCALE


def test_a_modality_lut_is_refused_not_ignored(tmp_path):
    path = save(dataset(PLANE, Modality="CR", ModalityLUTSequence=Sequence([Dataset()])), tmp_path / "a")
    assert refusal_of(path).reason is Reason.BAD_RESCALE


@pytest.mark.parametrize("value", [b"0   ", b"-1  ", b"two ", b"1.5 "])
def test_fault_47_a_frame_count_that_is_no_count_is_refused(tmp_path, value):
    path = patch(save(dataset(PLANE, NumberOfFrames="1234"), tmp_path / "a"), b"1234", value)
    assert refusal_of(path).reason is Reason.BAD_FRAMES


def test_fault_47_frames_of_a_volume_need_functional_groups(tmp_path):
    path = save(dataset(VOLUME, NumberOfFrames=6), tmp_path / "a")
    found = survey([path])
    assert [refusal.detail for refusal in found.refusals] == [
        "6 frames without functional groups: nothing says where they lie"
    ]
    assert reasons(found) == {"BAD_FRAMES": 1}


@pytest.mark.parametrize("tags", [{"HighBit": 9}, {"BitsStored": 17}, {"BitsAllocated": 12}])
def test_unknown_sample_layouts_are_unsupported(tmp_path, tags):
    assert refusal_of(write_slice(tmp_path / "a", PLANE, **tags)).reason is Reason.DTYPE_UNSUPPORTED


def test_a_header_crosses_process_borders(tmp_path):
    header = dicom.header(write_slice(tmp_path / "a", PLANE))
    assert pickle.loads(pickle.dumps(header)) == header


def test_no_byte_of_a_file_can_make_the_reader_raise_anything_else(tmp_path):
    content = write_slice(tmp_path / "whole", PLANE).read_bytes()
    rng = np.random.default_rng(11)
    path = tmp_path / "damaged"
    for _ in range(400):
        damaged = np.frombuffer(content, dtype=np.uint8).copy()
        places = rng.integers(132, len(content), rng.integers(1, 6))
        damaged[places] = rng.integers(0, 256, len(places))
        path.write_bytes(damaged.tobytes())
        found = survey([path])
        assert len(found.sources) + len(found.refusals) == 1
        for source in found.sources:
            try:
                dicom.read(source)
            except ReadError as error:
                assert error.reason in Reason.__members__


# ---- volumes


def test_order_comes_from_positions_not_from_names_or_numbers(tmp_path):
    source = only_source(write_series(tmp_path, VOLUME))
    image = dicom.read(source)
    np.testing.assert_array_equal(image.array[0], VOLUME - 1024.0)
    np.testing.assert_allclose(image.geometry.affine[:3, 0], [0, 0, 2])
    check_against_pydicom(source, image)


def test_a_descending_series_ascends_along_its_normal(tmp_path):
    source = only_source(write_series(tmp_path, VOLUME, step=(0, 0, -3)))
    image = dicom.read(source)
    np.testing.assert_array_equal(image.array[0], VOLUME[::-1] - 1024.0)
    np.testing.assert_allclose(image.geometry.affine[:3, 3], [0, 0, -15])


def test_an_oblique_series_with_unequal_pixel_spacing_is_placed_exactly(tmp_path):
    turn = np.radians(30)
    orientation = (0.0, np.cos(turn), np.sin(turn), 0.0, -np.sin(turn), np.cos(turn))
    source = only_source(
        write_series(tmp_path, VOLUME, step=(2.5, 0, 0), orientation=orientation, spacing=(0.75, 1.25), Modality="MR")
    )
    image = dicom.read(source)
    check_against_pydicom(source, image)
    assert image.spacing == pytest.approx((2.5, 0.75, 1.25))


def test_a_window_decodes_only_its_slices(tmp_path):
    paths = write_series(tmp_path, VOLUME)
    source = only_source(paths)
    whole = dicom.read(source)
    for path in (paths[0], paths[1], paths[5]):
        path.unlink()
    window = (slice(2, 5), slice(1, 4), slice(3, 7))
    part = dicom.read(source, window)
    expected = whole.crop(window)
    np.testing.assert_array_equal(part.array, expected.array)
    np.testing.assert_array_equal(part.valid, expected.valid)
    np.testing.assert_allclose(part.geometry.affine, expected.geometry.affine)


def test_reading_a_slice_that_is_gone_says_which_without_naming_the_file(tmp_path):
    paths = write_series(tmp_path / "Doe^Jane", VOLUME)
    source = only_source(paths)
    paths[3].unlink()
    with pytest.raises(ReadError, match=r"^slice 4 of 6: gone between listing and reading$") as caught:
        dicom.read(source)
    assert caught.value.reason == "VANISHED"


def test_reading_a_slice_that_was_exchanged_is_an_error(tmp_path):
    paths = write_series(tmp_path, VOLUME)
    source = only_source(paths)
    shutil.copy(paths[0], paths[2])
    with pytest.raises(ReadError, match="not the one that was indexed: its position differs"):
        dicom.read(source)


def test_fault_40_a_missing_slice_splits_and_strays_go_to_the_ledger(tmp_path):
    paths = write_series(tmp_path, np.concatenate([VOLUME, VOLUME]))
    found = survey([path for index, path in enumerate(paths) if index not in (4, 10)])
    assert [source.shape[0] for source in found.sources] == [5, 4]
    assert all("SPLIT_AT_GAP" in source.flags for source in found.sources)
    assert [refusal.detail for refusal in found.refusals] == ["apart from the others at 22.00 mm along the normal"]
    assert reasons(found) == {"SLICE_GAP": 1}
    for source in found.sources:
        check_against_pydicom(source, dicom.read(source))


def test_fault_46_gantry_tilt_stays_in_the_affine(tmp_path):
    source = only_source(write_series(tmp_path, VOLUME, step=(0, 1.5, 4.5)))
    image = dicom.read(source)
    assert source.flags == ("TILT",)
    np.testing.assert_allclose(image.geometry.affine[:3, 0], [0, 1.5, 4.5])
    assert image.spacing[0] == pytest.approx(4.5)


@pytest.mark.parametrize(
    ("tags", "detail"),
    [
        ({"position": None}, "ImagePositionPatient is missing"),
        ({"orientation": None}, "ImageOrientationPatient is missing"),
        ({"spacing": None}, "PixelSpacing is missing"),
        ({"spacing": (0.0, 1.0)}, "PixelSpacing is not two positive numbers"),
        ({"position": (1.0, 2.0)}, "ImagePositionPatient is not three finite numbers"),
        ({"orientation": (1, 0, 0, 1, 0, 0)}, "ImageOrientationPatient is not two perpendicular unit vectors"),
    ],
)
def test_fault_46_missing_or_impossible_geometry_is_refused(tmp_path, tags, detail):
    found = survey([write_slice(tmp_path / "a", PLANE, **tags)])
    assert [(refusal.reason, refusal.detail) for refusal in found.refusals] == [(Reason.BAD_GEOMETRY, detail)]


def test_fault_46_a_position_that_is_not_a_number_is_refused(tmp_path):
    path = patch(write_slice(tmp_path / "a", PLANE, position=(1.25, 2.5, 3.75)), b"1.25\\2.5", b"nan \\2.5")
    assert reasons(survey([path])) == {"BAD_GEOMETRY": 1}


@pytest.mark.parametrize(
    ("tags", "spacing"),
    [
        ({"SpacingBetweenSlices": "6.5", "SliceThickness": "5"}, 6.5),
        ({"SliceThickness": "5"}, 5.0),
        ({}, 1.0),
    ],
)
def test_a_single_slice_is_a_volume_of_one(tmp_path, tags, spacing):
    source = only_source([write_slice(tmp_path / "a", PLANE, **tags)])
    assert source.shape == (1, 5, 6)
    assert source.flags == ("SINGLE_SLICE",)
    assert source.geometry.spacing[0] == spacing


def test_fault_39_a_series_of_two_orientations_sizes_and_a_scout_falls_apart(tmp_path):
    axial = write_series(tmp_path / "axial", VOLUME)
    sagittal = write_series(tmp_path / "sagittal", VOLUME, orientation=(0, 1, 0, 0, 0, -1), step=(3, 0, 0))
    wide = write_series(tmp_path / "wide", VOLUME[:, :, :4], step=(0, 0, 4))
    fine = write_series(tmp_path / "fine", VOLUME, spacing=(0.5, 0.5))
    scout = write_slice(tmp_path / "scout", PLANE, ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    found = survey([*axial, *sagittal, *wide, *fine, scout])
    assert sorted(source.shape for source in found.sources) == [(6, 5, 4), (6, 5, 7), (6, 5, 7), (6, 5, 7)]
    assert reasons(found) == {"LOCALIZER": 1}
    for source in found.sources:
        assert len({path.parent for path in source.files}) == 1
        check_against_pydicom(source, dicom.read(source))


def test_fault_38_the_same_bytes_again_are_a_duplicate(tmp_path):
    paths = write_series(tmp_path, VOLUME)
    again = tmp_path / "zz-copy.dcm"
    shutil.copy(paths[2], again)
    found = survey([*paths, again])
    assert [(refusal.path, refusal.reason) for refusal in found.refusals] == [(again, Reason.DUPLICATE)]
    assert found.sources[0].shape[0] == 6


def test_fault_38_one_instance_with_two_contents_refuses_its_series(tmp_path):
    paths = write_series(tmp_path, VOLUME, SOPInstanceUID=None)
    one = write_slice(tmp_path / "a", VOLUME[0], SOPInstanceUID=uid("x"), position=(0, 0, 90))
    other = write_slice(tmp_path / "b", VOLUME[1], SOPInstanceUID=uid("x"), position=(0, 0, 90))
    elsewhere = write_series(tmp_path / "other", VOLUME, SeriesInstanceUID=uid("other"))
    found = survey([*paths, one, other, *elsewhere])
    assert reasons(found) == {"DUP_CONFLICT": 8}
    assert len(found.sources) == 1


def test_fault_41_slices_at_one_position_that_nothing_tells_apart_are_refused(tmp_path):
    paths = [write_slice(tmp_path / f"{index}", PLANE + index, AcquisitionNumber=index) for index in range(4)]
    found = survey(paths)
    assert found.sources == []
    assert reasons(found) == {"DUP_POSITION": 4}


def test_fault_41_one_doubtful_position_does_not_take_the_series_with_it(tmp_path):
    paths = write_series(tmp_path, np.concatenate([VOLUME, VOLUME]), InstanceNumber=None)
    double = write_slice(tmp_path / "double", VOLUME[0], position=(0, 0, 8.0), InstanceNumber=None)
    found = survey([*paths, double])
    assert reasons(found) == {"DUP_POSITION": 2}
    assert [source.shape[0] for source in found.sources] == [7, 4]


@pytest.mark.parametrize(
    "tags",
    [
        lambda time: {"TemporalPositionIdentifier": time},
        lambda time: {"DiffusionBValue": 500.0 * time},
        lambda time: {"EchoTime": 10 * time},
        lambda time: {"TriggerTime": 40 * time},
        lambda time: {"ImageType": ["ORIGINAL", "PRIMARY", "MPF"[time]]},
        lambda time: {"AcquisitionNumber": time},
        lambda time: {"AcquisitionTime": f"1012{time:02d}"},
    ],
    ids=["time", "b-value", "echo", "trigger", "type", "acquisition", "acquired"],
)
def test_a_series_in_time_becomes_one_volume_a_time_point(tmp_path, tags):
    paths = []
    for moment in (2, 0, 1):
        extra = {"InstanceNumber": 7, **tags(moment)}
        paths += write_series(tmp_path / f"{moment}", VOLUME + moment, Modality="MR", **extra)
    found = survey(paths)
    assert reasons(found) == {}
    assert sorted(source.shape for source in found.sources) == [(6, 5, 7)] * 3
    for source in found.sources:
        assert len({path.parent for path in source.files}) == 1
        image = dicom.read(source)
        np.testing.assert_array_equal(image.array[0], VOLUME + int(source.files[0].parent.name))


@pytest.mark.parametrize("by_volume", [True, False])
def test_instance_numbers_are_the_last_resort_for_a_series_in_time(tmp_path, by_volume):
    paths = []
    for time_point in range(3):
        for place in range(4):
            number = time_point * 4 + place if by_volume else place * 3 + time_point
            paths.append(
                write_slice(
                    tmp_path / f"{time_point}" / f"{place}",
                    PLANE + time_point,
                    position=(0, 0, 2.0 * place),
                    InstanceNumber=number,
                )
            )
    found = survey(paths)
    assert reasons(found) == {}
    assert [{path.parent.name for path in source.files} for source in found.sources] == [{"0"}, {"1"}, {"2"}]


def test_acquisition_times_of_single_slices_do_not_shatter_a_series(tmp_path):
    paths = []
    for time_point in range(2):
        for place in range(4):
            paths.append(
                write_slice(
                    tmp_path / f"{time_point}{place}",
                    PLANE,
                    position=(0, 0, 2.0 * place),
                    InstanceNumber=time_point * 4 + place,
                    AcquisitionTime=f"10{time_point:02d}{place:02d}",
                )
            )
    assert [source.shape[0] for source in survey(paths).sources] == [4, 4]


def test_an_unfinished_last_volume_stays_a_smaller_volume(tmp_path):
    whole = write_series(tmp_path / "1", VOLUME, TemporalPositionIdentifier=1)
    part = write_series(tmp_path / "2", VOLUME[:4], TemporalPositionIdentifier=2)
    found = survey([*whole, *part])
    assert reasons(found) == {}
    assert [source.shape[0] for source in found.sources] == [6, 4]


# ---- enhanced multi-frame


def test_frames_of_an_enhanced_object_are_slices_in_space(tmp_path):
    order = [3, 0, 5, 1, 4, 2]
    frames = [{"position": (0, 0, 2.0 * place), "slope": 1.0 + place} for place in order]
    source = only_source([save(enhanced(VOLUME[order], frames), tmp_path / "a")])
    image = dicom.read(source)
    assert source.selector["frames"] == [1, 3, 5, 0, 4, 2]
    np.testing.assert_array_equal(image.array[0], VOLUME * (1.0 + np.arange(6))[:, None, None])
    assert image.spacing == (2.0, 1.5, 0.5)
    part = dicom.read(source, (slice(4, 6), slice(0, 5), slice(0, 7)))
    np.testing.assert_array_equal(part.array, image.array[:, 4:6])
    again = Source.from_json(source.to_json())
    np.testing.assert_array_equal(dicom.read(again).array, image.array)


def test_an_enhanced_series_in_time_becomes_volumes_of_one_file(tmp_path):
    frames = [
        {"position": (0, 0, 2.0 * place), "temporal": moment, "echo": 10.0 * moment}
        for place in range(3)
        for moment in (1, 2)
    ]
    found = survey([save(enhanced(VOLUME, frames), tmp_path / "a")])
    assert reasons(found) == {}
    assert [source.selector["frames"] for source in found.sources] == [[0, 2, 4], [1, 3, 5]]
    assert [source.channels[0].echo_time_ms for source in found.sources] == [10.0, 20.0]


def test_a_file_with_some_frames_left_out_says_so(tmp_path):
    frames = [{"position": (0, 0, place)} for place in (0.0, 2.0, 4.0, 6.0, 8.0, 30.0)]
    source = only_source([save(enhanced(VOLUME, frames), tmp_path / "a")])
    assert source.shape[0] == 5
    assert source.flags == ("SPLIT_AT_GAP", "FRAMES_LEFT_OUT")


def test_fault_47_groups_and_frames_must_agree_in_number(tmp_path):
    frames = [{"position": (0, 0, float(place))} for place in range(4)]
    assert refusal_of(save(enhanced(VOLUME, frames, NumberOfFrames=6), tmp_path / "a")).reason is Reason.BAD_FRAMES


def test_a_window_outside_the_volume_is_an_error(tmp_path):
    source = only_source(write_series(tmp_path, VOLUME))
    with pytest.raises(ValueError, match="window 5:9 is empty or not inside 0:6"):
        dicom.read(source, (slice(5, 9), slice(0, 2), slice(0, 2)))


# ---- modality, channels, planes


@pytest.mark.parametrize(
    ("modality", "name"),
    [("CT", "ct"), ("MR", "mr"), ("PT", "pet"), ("CR", "xray"), ("DX", "xray"), ("MG", "mammography")],
)
def test_the_modality_follows_from_the_header(tmp_path, modality, name):
    source = only_source([write_slice(tmp_path / "a", PLANE, Modality=modality)])
    assert source.modality == name
    assert isinstance(source.geometry, VolumeGeometry if name in ("ct", "mr", "pet") else PlaneGeometry)


def test_a_modality_that_was_not_asked_for_is_a_mismatch(tmp_path):
    found = survey([write_slice(tmp_path / "a", PLANE, Modality="MR")], "ct")
    assert [(refusal.reason, refusal.detail) for refusal in found.refusals] == [
        (Reason.MODALITY_MISMATCH, "DICOM Modality 'MR'")
    ]


@pytest.mark.parametrize("modality", ["US", "SC", "XC", "OT"])
def test_fault_49_captures_and_ultrasound_are_refused_unless_named(tmp_path, modality):
    path = save(dataset(PLANE.astype(np.uint8), Modality=modality), tmp_path / "a")
    assert reasons(survey([path])) == {"BURNED_IN": 1}
    named = survey([path], "ultrasound")
    assert len(named.sources) == (1 if modality == "US" else 0)


def test_fault_49_declared_burned_in_annotation_is_refused(tmp_path):
    assert reasons(survey([write_slice(tmp_path / "a", PLANE, BurnedInAnnotation="YES")])) == {"BURNED_IN": 1}
    assert len(survey([write_slice(tmp_path / "a", PLANE, BurnedInAnnotation="NO")]).sources) == 1


def test_fault_49_a_secondary_capture_of_a_ct_is_refused_unless_declared_clean(tmp_path):
    capture = {"SOPClassUID": "1.2.840.10008.5.1.4.1.1.7"}
    assert reasons(survey([write_slice(tmp_path / "a", PLANE, **capture)])) == {"BURNED_IN": 1}
    assert len(survey([write_slice(tmp_path / "a", PLANE, BurnedInAnnotation="NO", **capture)]).sources) == 1


def test_colour_in_a_volume_is_unsupported(tmp_path):
    path = save(dataset(np.zeros((4, 4, 3), dtype=np.uint8)), tmp_path / "a")
    assert reasons(survey([path])) == {"DTYPE_UNSUPPORTED": 1}


def test_ct_numbers_that_are_not_hounsfield_units_are_refused(tmp_path):
    assert reasons(survey([write_slice(tmp_path / "a", PLANE, RescaleType="MGML")])) == {"UNIT_CONFLICT": 1}


def test_ct_without_rescale_is_flagged(tmp_path):
    source = only_source([write_slice(tmp_path / "a", PLANE, RescaleSlope=None, RescaleIntercept=None)])
    assert "NO_RESCALE" in source.flags


def test_projections_take_pixel_spacing_or_the_detectors(tmp_path):
    one = write_slice(tmp_path / "1", PLANE, Modality="DX", spacing=(0.2, 0.3), position=None, orientation=None)
    other = write_slice(tmp_path / "2", PLANE, Modality="DX", spacing=None, ImagerPixelSpacing=[0.1, 0.1])
    none = write_slice(tmp_path / "3", PLANE, Modality="DX", spacing=None)
    found = survey([one, other, none])
    assert [source.geometry.spacing_mm for source in found.sources] == [(0.2, 0.3), (0.1, 0.1), None]
    image = dicom.read(found.sources[0], (slice(1, 4), slice(2, 6)))
    np.testing.assert_array_equal(image.array[0], PLANE[1:4, 2:6])


def test_each_frame_of_a_clip_is_an_image_and_long_clips_are_thinned(tmp_path, monkeypatch):
    clip = RNG.integers(0, 255, (9, 4, 5)).astype(np.uint8)
    path = save(dataset(clip, Modality="US", NumberOfFrames=9), tmp_path / "a")
    found = survey([path], "ultrasound")
    assert [source.selector["frames"] for source in found.sources] == [[number] for number in range(9)]
    np.testing.assert_array_equal(dicom.read(found.sources[7]).array[0], clip[7])
    monkeypatch.setattr(dicom_series, "MAX_CINE_FRAMES", 3)
    thinned = survey([path], "ultrasound").sources
    assert [source.selector["frames"] for source in thinned] == [[0], [4], [8]]
    assert all("FRAMES_SAMPLED" in source.flags for source in thinned)


@pytest.mark.parametrize(
    ("tags", "name"),
    [
        ({"ScanningSequence": "SE", "RepetitionTime": 500, "EchoTime": 15}, "T1"),
        ({"ScanningSequence": "SE", "RepetitionTime": 500, "EchoTime": 15, "ContrastBolusAgent": "9ml"}, "T1C"),
        ({"ScanningSequence": "SE", "RepetitionTime": 4000, "EchoTime": 90}, "T2"),
        ({"ScanningSequence": "SE", "RepetitionTime": 3000, "EchoTime": 20}, "PD"),
        ({"ScanningSequence": ["SE", "IR"], "RepetitionTime": 9000, "EchoTime": 120, "InversionTime": 2250}, "FLAIR"),
        ({"ScanningSequence": ["GR", "IR"], "RepetitionTime": 2000, "EchoTime": 3, "InversionTime": 900}, "T1"),
        ({"ScanningSequence": ["SE", "IR"], "RepetitionTime": 4000, "EchoTime": 60, "InversionTime": 150}, "MR"),
        (
            {"ScanningSequence": "GR", "SequenceVariant": "SP", "RepetitionTime": 8, "EchoTime": 3, "FlipAngle": 15},
            "T1",
        ),
        (
            {"ScanningSequence": "GR", "SequenceVariant": "SS", "RepetitionTime": 4, "EchoTime": 2, "FlipAngle": 50},
            "MR",
        ),
        ({"ScanningSequence": "EP", "RepetitionTime": 3000, "EchoTime": 30}, "MR"),
        ({"ScanningSequence": "EP", "RepetitionTime": 3000, "EchoTime": 80, "DiffusionBValue": 1000.0}, "DWI"),
        ({"ScanningSequence": "SE", "RepetitionTime": 1200, "EchoTime": 15}, "MR"),
        ({}, "MR"),
    ],
)
def test_mr_channels_are_named_by_physics_or_not_at_all(tmp_path, tags, name):
    channel = only_source([write_slice(tmp_path / "a", PLANE, Modality="MR", **tags)]).channels[0]
    assert channel.name == name
    assert channel.kind == "mr"
    assert channel.sequence == (None if name == "MR" else name)
    assert channel.echo_time_ms == tags.get("EchoTime")


def test_pet_takes_its_unit_from_the_header(tmp_path):
    for units, unit in (("BQML", "Bq/ml"), ("GML", "g/ml"), ("??", "unknown")):
        path = write_slice(tmp_path / unit.replace("/", ""), PLANE, Modality="PT", Units=units)
        assert only_source([path]).channels[0].unit == unit


def test_identity_ties_patient_study_and_frame_of_reference_together(tmp_path):
    source = only_source([write_slice(tmp_path / "a", PLANE, PatientID="7", IssuerOfPatientID="H")])
    expected = {"patient": "7|H", "study": uid("study"), "frame": uid("frame"), "series": uid("series")}
    assert {kind: value for kind, value in source.identity if kind != "instance"} == expected
    anonymous = only_source([write_slice(tmp_path / "b", PLANE, PatientID="", FrameOfReferenceUID=None)])
    assert [kind for kind, _ in anonymous.identity] == ["study", "series", "instance"]


def test_fault_50_no_identifier_reaches_a_reason_a_warning_or_a_log(tmp_path, caplog, capfd):
    canary = "CANARY77"
    tags = {
        "PatientName": f"{canary}^A",
        "PatientID": canary,
        "AccessionNumber": canary,
        "SeriesDescription": canary,
        "StudyDate": f"{canary}",
        "Modality": canary,
    }
    paths = [write_slice(tmp_path / canary / "0", PLANE, **tags)]
    for index, keyword in enumerate(["RescaleSlope", "NumberOfFrames", "ImagePositionPatient", "SOPClassUID", "Units"]):
        paths.append(write_slice(tmp_path / canary / f"{index + 1}", PLANE, **{**tags, "Modality": "PT"}))
        one = pydicom.dcmread(paths[-1])
        with warnings.catch_warnings(), pydicom.config.disable_value_validation():
            warnings.simplefilter("ignore")
            one.add_new(keyword, "LO", canary)
            one.save_as(paths[-1])
    with caplog.at_level(logging.DEBUG), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = survey(paths)
    said = caplog.text + "".join(str(one.message) for one in caught) + "".join(capfd.readouterr())
    assert len(found.refusals) >= 4
    assert all(canary not in refusal.detail for refusal in found.refusals)
    assert canary not in said


def test_a_users_modality_may_carry_any_dicom_modality(tmp_path):
    (tmp_path / "spect.yaml").write_text(
        "name: spect\ntitle: SPECT\ngeometry: volume\nformats: [dicom]\ndicom: [NM]\nunit: counts\n"
        "normalise: {method: image}\n"
    )
    header = dicom.header(write_slice(tmp_path / "a", PLANE, Modality="NM"))
    (source,) = dicom.group([header], [load_modality(str(tmp_path / "spect.yaml"))]).sources
    assert (source.modality, source.channels[0].unit) == ("spect", "counts")


# ---- real files


def test_every_file_that_travels_with_pydicom_is_accounted_for():
    found = Counter()
    headers = []
    files = list(list_files(PYDICOM_FILES))
    for path in files:
        try:
            resolved = check_regular(path)
        except ReadError as error:
            found[error.reason] += 1
            continue
        if not dicom.sniff(resolved, first_bytes(resolved)):
            found["not sniffed"] += 1
            continue
        header = dicom.header(resolved)
        if isinstance(header, Refusal):
            found[header.reason.name] += 1
        else:
            headers.append(header)
    used = 0
    for header in headers:
        # One by one: the folder holds many contents under the same instance UIDs.
        grouped = dicom.group([header], resolve_modalities(["auto"]))
        named = dicom.group([header], resolve_modalities(["ultrasound", "ct", "mr", "xray"]))
        for outcome in (grouped, named):
            files_used = {path for source in outcome.sources for path in source.files}
            assert len(files_used) + len(outcome.refusals) == 1
        for source in [*grouped.sources, *named.sources[:2]]:
            image = dicom.read(source)
            if isinstance(source.geometry, VolumeGeometry) and header.photometric == "MONOCHROME2":
                check_against_pydicom(source, image)
        used += bool(grouped.sources or named.sources)
    assert used + sum(found.values()) + (len(headers) - used) == len(files)
    assert used > 40
    assert found["NON_IMAGE"] > 20


def everything(folder: Path) -> list[Path]:
    files = [path for path in list_files(folder) if dicom.sniff(path, first_bytes(path))]
    assert files
    return files


def sitk_series(files: Iterable[Path]) -> SimpleITK.Image:
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(path) for path in files])
    return reader.Execute()


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "count"), [("sarcoma/STS_008", 3), ("sarcoma/STS_019", 3), ("mr_multisequence", 4), ("ct_abdomen", 1)]
)
def test_real_series_equal_pydicom_and_simpleitk(shared_data, folder, count):
    found = survey(everything(shared_data / "med" / folder))
    assert set(reasons(found)) <= {"NON_IMAGE"}
    assert len(found.sources) == count
    for source in found.sources:
        image = dicom.read(source)
        check_against_pydicom(source, image)
        theirs = sitk_series(source.files)
        np.testing.assert_allclose(SimpleITK.GetArrayFromImage(theirs), image.array[0], rtol=1e-5, atol=1e-5)
        for index in ((0, 0, 0), (source.shape[0] - 1, source.shape[1] - 1, source.shape[2] - 1)):
            point = theirs.TransformIndexToPhysicalPoint([int(value) for value in index[::-1]])
            np.testing.assert_allclose((image.geometry.affine @ (*index, 1))[:3], point, atol=0.02)


@pytest.mark.data
def test_real_sequences_are_named(shared_data):
    found = survey(everything(shared_data / "med" / "mr_multisequence"))
    names = {source.files[0].parent.name.split("-")[-2]: source.channels[0].name for source in found.sources
             if "-" in source.files[0].parent.name}  # fmt: skip
    assert names == {"T1post": "T1C", "FLAIRreg": "FLAIR", "T2reg": "T2"}
    assert all(source.geometry.spacing[0] == pytest.approx(6.5, abs=1e-3) for source in found.sources if "reg" in
               source.files[0].parent.name)  # fmt: skip


@pytest.mark.data
@pytest.mark.parametrize(
    ("folder", "shapes", "refused"),
    [
        ("gantrytilting", [4], {}),
        ("sliceincrement/001", [3], {"SLICE_GAP": 1}),
        ("sliceincrement/002", [3], {"SLICE_GAP": 1}),
        ("notavolume", [], {"DUP_POSITION": 4}),
        ("ge_dti/001", [4, 4], {}),
        ("philips_enhanced_anatomical", [8], {}),
        ("siemens_fmri", [50, 50], {}),
    ],
)
def test_real_traps_are_split_or_refused(shared_data, folder, shapes, refused):
    found = survey(everything(shared_data / "med" / "dicom_traps" / folder))
    assert [source.shape[0] for source in found.sources] == shapes
    assert reasons(found) == refused
    for source in found.sources:
        image = dicom.read(source)
        if len(source.files) > 1:
            check_against_pydicom(source, image)
        assert len(source.selector["instances"]) == source.shape[0]


@pytest.mark.data
def test_a_real_enhanced_object_equals_pydicom_frame_by_frame(shared_data):
    (path,) = everything(shared_data / "med" / "dicom_traps" / "philips_enhanced_anatomical")
    source = only_source([path])
    image = dicom.read(source)
    one = pydicom.dcmread(path)
    for index, frame in enumerate(source.selector["frames"]):
        groups = one.PerFrameFunctionalGroupsSequence[frame]
        place = np.array(groups.PlanePositionSequence[0].ImagePositionPatient, dtype=float)
        assert np.linalg.norm((image.geometry.affine @ (index, 0, 0, 1))[:3] - place) < 0.01
        rescale = groups.PixelValueTransformationSequence[0]
        values = one.pixel_array[frame] * float(rescale.RescaleSlope) + float(rescale.RescaleIntercept)
        np.testing.assert_array_equal(image.array[0, index], values.astype(np.float32))


@pytest.mark.data
def test_gantry_tilt_that_simpleitk_loses_is_kept(shared_data):
    source = only_source(everything(shared_data / "med" / "dicom_traps" / "gantrytilting"))
    assert source.flags == ("TILT",)
    check_against_pydicom(source, dicom.read(source))
    one, last = (pydicom.dcmread(source.files[index]) for index in (0, -1))
    step = (np.array(last.ImagePositionPatient, float) - np.array(one.ImagePositionPatient, float)) / 3
    np.testing.assert_allclose(source.geometry.affine[:3, 0], step)
