"""Mosaics of Siemens and United Imaging: nibabel's MosaicWrapper is the oracle, and the sheet's arithmetic by hand."""

from __future__ import annotations

import gzip
import struct
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from geomed_mae.errors import ReadError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.dicom.csa import csa_texts, protocol_positions
from geomed_mae.readers.source import Refusal, Source
from tests.make_dicom import AXIAL, csa_header, dataset, mosaic, protocol, save

RNG = np.random.default_rng(8)
VOLUME = RNG.integers(1, 2000, (7, 4, 6)).astype(np.int16)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
OBLIQUE = (0.8, 0.6, 0.0, 0.0, 0.0, -1.0)


def normal_of(orientation: tuple[float, ...]) -> np.ndarray:
    return np.cross(*np.reshape(np.array(orientation), (2, 3)))


def csa_of(count: int, normal: np.ndarray, version: int = 2) -> bytes:
    return csa_header(
        {
            "EchoLinePosition": [],
            "EchoColumnPosition": ["1"],
            "AcquisitionMatrixText": ["6p*4"],
            "NumberOfImagesInMosaic": [str(count)],
            "SliceNormalVector": [f"{value:.8f}" for value in normal],
        },
        version=version,
    )


def sources_of(path: Path) -> list[Source]:
    found = dicom.header(path)
    assert not isinstance(found, Refusal), found.detail
    survey = dicom.group([found], resolve_modalities("auto"))
    assert survey.refusals == []
    return list(survey.sources)


def refusal_of(path: Path) -> Refusal:
    found = dicom.header(path)
    assert isinstance(found, Refusal), found
    return found


def nibabel_wrapper(path: Path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from nibabel.nicom.dicomwrappers import MosaicWrapper, wrapper_from_data

        wrapper = wrapper_from_data(pydicom.dcmread(path))
        assert isinstance(wrapper, MosaicWrapper)
        return wrapper


def check_against_nibabel(path: Path) -> Source:
    (source,) = sources_of(path)
    image, wrapper = dicom.read(source), nibabel_wrapper(path)
    theirs = np.transpose(wrapper.get_data(), (2, 0, 1))
    count, row, column = source.shape[0], source.shape[1] - 1, source.shape[2] - 1
    # nibabel: (row, column, slice) to LPS, slices in the order of tiles; ours ascend along the normal.
    step = wrapper.affine[:3, 2] @ np.cross(wrapper.affine[:3, 1], wrapper.affine[:3, 0])
    order = range(count) if step > 0 else range(count)[::-1]
    np.testing.assert_array_equal(image.array[0], theirs[list(order)])
    for index, tile in enumerate(order):
        ours = image.geometry.affine @ (index, row, column, 1)
        np.testing.assert_allclose(ours, wrapper.affine @ (row, column, tile, 1), atol=0.005)
    assert source.selector["frames"] == list(order)
    return source


@pytest.mark.parametrize("orientation", [AXIAL, SAGITTAL, OBLIQUE])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("version", [1, 2])
def test_a_mosaic_is_the_volume_that_nibabel_makes_of_it(tmp_path, orientation, sign, version):
    csa = csa_of(7, sign * normal_of(orientation), version)
    path = save(mosaic(VOLUME, orientation=orientation, csa=csa, images=7), tmp_path / "a")
    check_against_nibabel(path)


@pytest.mark.parametrize("count", [1, 2, 4, 5, 9, 10])
def test_blank_tiles_are_no_slices(tmp_path, count):
    volume = RNG.integers(1, 2000, (count, 4, 6)).astype(np.int16)
    (source,) = sources_of(save(mosaic(volume, csa=csa_of(count, normal_of(AXIAL))), tmp_path / "a"))
    image = dicom.read(source)
    np.testing.assert_array_equal(image.array[0], volume)
    np.testing.assert_allclose(image.geometry.affine[:3, 3], (10, 20, 30))
    assert image.spacing == pytest.approx((3.5, 1.5, 2.0))


def test_slices_that_run_against_the_normal_are_placed_from_the_far_end(tmp_path):
    (source,) = sources_of(save(mosaic(VOLUME, csa=csa_of(7, -normal_of(AXIAL))), tmp_path / "a"))
    image = dicom.read(source)
    np.testing.assert_array_equal(image.array[0], VOLUME[::-1])
    np.testing.assert_allclose(image.geometry.affine[:3, 3], (10, 20, 30 - 6 * 3.5))
    np.testing.assert_allclose(image.geometry.affine[:3, 0], (0, 0, 3.5))


def test_a_window_cuts_tiles(tmp_path):
    (source,) = sources_of(save(mosaic(VOLUME, csa=csa_of(7, normal_of(AXIAL))), tmp_path / "a"))
    whole = dicom.read(source).crop((slice(2, 6), slice(1, 3), slice(2, 5)))
    part = dicom.read(Source.from_json(source.to_json()), (slice(2, 6), slice(1, 3), slice(2, 5)))
    np.testing.assert_array_equal(part.array, whole.array)
    np.testing.assert_array_equal(part.geometry.affine, whole.geometry.affine)


def test_each_mosaic_of_a_series_in_time_is_a_volume(tmp_path):
    csa = csa_of(7, normal_of(AXIAL))
    paths = [
        save(mosaic((VOLUME + 3 * time).astype(np.int16), csa=csa, AcquisitionNumber=time), tmp_path / f"{time}")
        for time in range(3)
    ]
    survey = dicom.group([dicom.header(path) for path in paths], resolve_modalities("auto"))
    assert survey.refusals == []
    assert [source.files for source in survey.sources] == [(path,) for path in paths]
    for time, source in enumerate(survey.sources):
        np.testing.assert_array_equal(dicom.read(source).array[0], VOLUME + 3 * time)


@pytest.mark.parametrize("sign", [1, -1])
def test_without_the_image_header_the_protocol_tells_number_and_direction(tmp_path, sign):
    # The protocol lists the slices in one order, whichever way the tiles run: only depths decide.
    depths = 30 + sign * 3.5 * np.arange(7)
    centres = np.stack([np.full(7, 15.0), np.full(7, 22.0), np.sort(depths)], axis=1)
    (source,) = sources_of(save(mosaic(VOLUME, series_csa=protocol(centres)), tmp_path / "a"))
    image = dicom.read(source)
    np.testing.assert_array_equal(image.array[0], VOLUME[::sign])
    np.testing.assert_allclose(image.geometry.affine[:3, 3], (10, 20, depths.min()))


def test_a_creator_that_a_de_identifier_took_is_not_missed(tmp_path):
    made = mosaic(VOLUME, csa=csa_of(7, normal_of(AXIAL)))
    del made[0x0029, 0x0010]
    assert sources_of(save(made, tmp_path / "a"))[0].shape == (7, 4, 6)


def test_a_mosaic_that_has_lost_its_image_type_is_known_by_its_private_count(tmp_path):
    tags = {"csa": csa_of(7, normal_of(AXIAL)), "images": 7}
    assert sources_of(save(mosaic(VOLUME, ImageType=None, **tags), tmp_path / "a"))[0].shape == (7, 4, 6)
    found = refusal_of(save(mosaic(VOLUME, ImageType=["DERIVED", "SECONDARY", "MPR"], **tags), tmp_path / "b"))
    assert (found.reason.name, found.detail) == (
        "BAD_FRAMES",
        "ImageType says no mosaic, the private NumberOfImagesInMosaic says 7 slices",
    )


def test_a_mosaic_without_image_type_and_count_is_known_by_its_csa_header(tmp_path):
    path = save(mosaic(VOLUME, csa=csa_of(7, normal_of(AXIAL)), ImageType=None), tmp_path / "a")
    (source,) = sources_of(path)
    np.testing.assert_array_equal(dicom.read(source).array[0], VOLUME)


def united(volume: np.ndarray, *, listed: int | None = None, **tags: object) -> pydicom.Dataset:
    """Return a sheet of United Imaging, whose slices lie at (5, 6, 3.5 * number) mm and say so in a private list."""
    count, rows, columns = volume.shape
    across = int(np.ceil(np.sqrt(count)))
    sheet = np.zeros((-(-count // across) * rows, across * columns), volume.dtype)
    for number, plane in enumerate(volume):
        top, left = number // across * rows, number % across * columns
        sheet[top : top + rows, left : left + columns] = plane
    tiles = []
    for number in range(count if listed is None else listed):
        tile = pydicom.Dataset()
        tile.ImagePositionPatient = [5.0, 6.0, 3.5 * number]
        tiles.append(tile)
    made = dataset(
        sheet,
        **{
            "Modality": "MR",
            "Manufacturer": "UIH",
            "ImageType": ["ORIGINAL", "PRIMARY", "M", "VFRAME"],
            "ImageOrientationPatient": list(AXIAL),
            "PixelSpacing": [1.5, 2.0],
        }
        | tags,
    )
    block = made.private_block(0x0065, "Image Private Header", create=True)
    block.add_new(0x50, "DS", str(count))
    if listed != 0:
        block.add_new(0x51, "SQ", tiles)
    return made


@pytest.mark.parametrize("count", [1, 2, 5, 6, 7, 9, 20])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2"])
def test_a_sheet_of_united_imaging_is_cut_and_placed_by_its_list(tmp_path, count, syntax):
    volume = RNG.integers(1, 2000, (count, 4, 6)).astype(np.int16)
    (source,) = sources_of(save(united(volume), tmp_path / "a", syntax=syntax))
    image = dicom.read(source)
    np.testing.assert_array_equal(image.array[0], volume)
    for number in range(count):
        np.testing.assert_allclose(image.geometry.affine @ (number, 1, 1, 1), (7, 7.5, 3.5 * number, 1), atol=1e-9)
    window = dicom.read(source, (slice(count - 1, count), slice(1, 3), slice(2, 6)))
    np.testing.assert_array_equal(window.array[0, 0], volume[-1, 1:3, 2:6])


@pytest.mark.parametrize(
    ("made", "reason", "detail"),
    [
        (
            united(VOLUME, listed=0),
            "MISSING_TAG",
            "a UIH mosaic without the private list of its slices: keep private groups 0019, 0029 and 0065 when "
            "de-identifying, or export the series without mosaics",
        ),
        (united(VOLUME, listed=6), "BAD_FRAMES", "a UIH mosaic that lists 6 slices"),
        (
            united(VOLUME, ImageOrientationPatient=None),
            "BAD_GEOMETRY",
            "a UIH mosaic: ImageOrientationPatient is missing",
        ),
        (
            united(VOLUME, Rows=13, PixelData=bytes(13 * 18 * 2)),
            "BAD_GEOMETRY",
            "a sheet of 13 x 18 pixels does not hold 3 x 3 tiles of a mosaic",
        ),
    ],
    ids=["no list", "short list", "no orientation", "odd sheet"],
)
def test_what_a_sheet_of_united_imaging_cannot_say_is_refused(tmp_path, made, reason, detail):
    refusal = refusal_of(save(made, tmp_path / "a"))
    assert (refusal.reason.name, refusal.detail) == (reason, detail)


def test_a_private_block_of_somebody_else_is_not_read_as_siemens(tmp_path):
    made = mosaic(VOLUME, csa=csa_of(7, normal_of(AXIAL)))
    made[0x0029, 0x0010].value = "ANOTHER VENDOR"
    assert refusal_of(save(made, tmp_path / "a")).reason.name == "MISSING_TAG"


CONTRADICTION = "a Siemens mosaic whose normal and protocol contradict each other"
KEEP = "keep private groups 0019, 0029 and 0065 when de-identifying, or export the series without mosaics"


@pytest.mark.parametrize(
    ("tags", "reason", "detail"),
    [
        ({}, "MISSING_TAG", f"a Siemens mosaic that does not say how many slices it holds: {KEEP}"),
        ({"images": 7}, "MISSING_TAG", f"a Siemens mosaic that does not say which way its slices run: {KEEP}"),
        ({"images": 5, "csa": csa_of(7, normal_of(AXIAL))}, "BAD_GEOMETRY", "a Siemens mosaic of 5 or of 7 slices"),
        ({"images": 0}, "BAD_GEOMETRY", "a Siemens mosaic of 0 slices"),
        (
            {"csa": csa_of(40, normal_of(AXIAL))},
            "BAD_GEOMETRY",
            "a sheet of 12 x 18 pixels does not hold 7 x 7 tiles of a mosaic",
        ),
        (
            {"csa": csa_of(7, normal_of(SAGITTAL))},
            "BAD_GEOMETRY",
            "a Siemens mosaic whose normal is not its orientation's",
        ),
        (
            {
                "csa": csa_of(7, -normal_of(AXIAL)),
                "series_csa": protocol(np.array([[0, 0, 30 + 3.5 * k] for k in range(7)])),
            },
            "BAD_GEOMETRY",
            CONTRADICTION,
        ),
        (
            {"csa": csa_of(7, normal_of(AXIAL)), "SpacingBetweenSlices": None},
            "MISSING_TAG",
            "a Siemens mosaic without SpacingBetweenSlices",
        ),
        (
            {"csa": csa_of(7, normal_of(AXIAL)), "ImagePositionPatient": None},
            "BAD_GEOMETRY",
            "a Siemens mosaic: ImagePositionPatient is missing",
        ),
        (
            {"csa": csa_of(7, normal_of(AXIAL)), "SpacingBetweenSlices": "1e300"},
            "BAD_GEOMETRY",
            "a Siemens mosaic with an impossible SpacingBetweenSlices",
        ),
        ({"csa": b"SV10"}, "MALFORMED", "the private CSA header does not parse"),
        (
            {"csa": b"SV10" + bytes(4) + struct.pack("<2I", 100000, 77)},
            "MALFORMED",
            "the private CSA header says 100000 tags",
        ),
    ],
)
def test_what_a_mosaic_cannot_say_is_refused_with_the_way_out(tmp_path, tags, reason, detail):
    found = refusal_of(save(mosaic(VOLUME, **tags), tmp_path / "a"))
    assert (found.reason.name, found.detail) == (reason, detail)


def test_version_1_may_count_the_items_of_its_very_first_tag():
    blob = csa_header({"EchoLinePosition": ["1"], "SliceNormalVector": ["0.6", "0", "0.8"]}, version=1)
    assert csa_texts(blob, ("SliceNormalVector",)) == {"SliceNormalVector": ["0.6", "0", "0.8"]}


@given(content=st.binary(max_size=400), cut=st.integers(0, 900), at=st.integers(0, 900))
@settings(max_examples=300, deadline=None)
def test_hostile_private_headers_end_in_texts_or_a_typed_reason(content, cut, at):
    whole = csa_of(7, normal_of(AXIAL))
    damaged = bytearray(whole)
    damaged[at % len(whole) : at % len(whole) + len(content) % 9] = content[: len(content) % 9]
    for blob in (content, b"SV10" + content, whole[:cut], bytes(damaged), bytes(damaged)[8:]):
        try:
            assert all(
                isinstance(text, str) for texts in csa_texts(blob, ("SliceNormalVector",)).values() for text in texts
            )
        except ReadError as error:
            assert error.reason == "MALFORMED"


def test_no_byte_of_a_mosaic_can_make_the_reader_raise_anything_else(tmp_path):
    whole = save(mosaic(VOLUME, csa=csa_of(7, normal_of(AXIAL)), images=7), tmp_path / "whole").read_bytes()
    rng = np.random.default_rng(4)
    outcomes = set()
    for number in range(400):
        damaged = bytearray(whole)
        # Mostly in the header: pixels take any value.
        for _ in range(rng.integers(1, 4)):
            damaged[rng.integers(132, len(whole) - VOLUME.nbytes)] = rng.integers(256)
        path = tmp_path / f"{number}"
        path.write_bytes(damaged)
        found = dicom.header(path)
        if isinstance(found, Refusal):
            outcomes.add(found.reason.name)
            continue
        for source in dicom.group([found], resolve_modalities("auto")).sources:
            try:
                outcomes.add(dicom.read(source).array.ndim)
            except ReadError as error:
                outcomes.add(error.reason)
    assert {4, "MALFORMED"} <= outcomes


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"sSliceArray.lSize = 9999",
        b"sSliceArray.lSize = 1\nsSliceArray.asSlice[0].sPosition.dSag = 1e999",
        b"sSliceArray.lSize = 1\nsSliceArray.asSlice[0].sPosition.dSag = --1",
    ],
)
def test_a_protocol_that_lists_no_slices_says_nothing(lines):
    assert protocol_positions(b"### ASCCONV BEGIN ###\n" + lines + b"\n### ASCCONV END ###") is None
    assert protocol_positions(b"### ASCCONV BEGIN ###\n" + lines) is None


def test_a_protocol_may_count_in_hexadecimal_and_leave_zeros_out():
    lines = b"sSliceArray.lSize = 0x2", b"sSliceArray.asSlice[1].sPosition.dTra\t= -3.5"
    text = b"\n".join([b"### ASCCONV BEGIN ###", *lines, b"### ASCCONV END"])
    np.testing.assert_array_equal(protocol_positions(text), [[0, 0, 0], [0, 0, -3.5]])


@pytest.mark.parametrize("name", ["siemens_dwi_0", "siemens_dwi_1000"])
def test_a_scanners_own_mosaic_equals_nibabel(tmp_path, name):
    import nibabel

    packed = Path(nibabel.__file__).parent / "nicom" / "tests" / "data" / f"{name}.dcm.gz"
    if not packed.is_file():
        pytest.skip("this nibabel came without its test data")
    path = tmp_path / "a.dcm"
    path.write_bytes(gzip.decompress(packed.read_bytes()))
    source = check_against_nibabel(path)
    assert source.shape == (48, 128, 128)
    assert source.channels[0].name == {"siemens_dwi_0": "MR", "siemens_dwi_1000": "DWI"}[name]


@pytest.mark.data
def test_a_real_mosaic_in_nine_encodings_equals_nibabel(shared_data):
    arrays = []
    for path in sorted((shared_data / "med" / "transfer_syntaxes").iterdir()):
        source = check_against_nibabel(path)
        assert source.shape == (35, 64, 64)
        arrays.append(dicom.read(source).array)
    assert len(arrays) == 9
    assert all(np.array_equal(array, arrays[0]) for array in arrays)


@pytest.mark.data
def test_a_real_mosaic_that_has_lost_its_image_header_is_placed_by_its_protocol(shared_data):
    import nibabel

    folder = shared_data / "med" / "dicom_traps" / "siemens_fmri"
    converted = nibabel.load(folder / "001_ground_truth.nii.gz")
    for time, path in enumerate(sorted((folder / "001").iterdir())):
        (source,) = sources_of(path)
        image = dicom.read(source)
        # NIfTI is (x, y, slice), with both axes in the plane turned round against DICOM's or not.
        theirs = np.transpose(np.asarray(converted.dataobj)[..., time], (2, 1, 0))
        flipped = [theirs[:, ::a, ::b] for a in (1, -1) for b in (1, -1)]
        assert any(np.array_equal(image.array[0], one) for one in flipped)
        # The converter takes the sheet's position for that of the lowest slice; the protocol in the file has it as the
        # highest: each centre that it lists is the centre of one of our slices, in order.
        centres = protocol_positions(pydicom.dcmread(path)[0x0029, 0x1020].value)
        normal = normal_of(tuple(pydicom.dcmread(path).ImageOrientationPatient))
        ours = [(image.geometry.affine @ (index, 40, 40, 1))[:3] @ normal for index in range(50)]
        np.testing.assert_allclose(ours, centres @ normal, atol=0.01)
