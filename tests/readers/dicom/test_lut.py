"""Modality LUTs, palettes and colour; oracles are pydicom's own functions and tables written by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.pixels import apply_color_lut, apply_modality_lut, pixel_array
from pydicom.sequence import Sequence

from geomed_mae.errors import ReadError
from geomed_mae.image import Image, PlaneGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.source import Refusal, Survey
from tests.make_dicom import AXIAL, dataset, save

PYDICOM_FILES = Path(pydicom.__file__).parent / "data" / "test_files"
WORDS = np.array([[0, 1, 2, 3], [4, 5, 6, 65535]], dtype=np.uint16)


def survey(path: Path, modality: str = "auto") -> Survey:
    header = dicom.header(path)
    if isinstance(header, Refusal):
        return Survey([], [header])
    return dicom.group([header], resolve_modalities(modality))


def image_of(path: Path, modality: str = "auto") -> Image:
    found = survey(path, modality)
    assert list(found.refusals) == []
    return dicom.read(found.sources[0])


def modality_lut(
    words: np.ndarray, entries: bytes, *, first: int, count: int, bits: int = 16, kind: str = "HU", **tags: object
) -> Dataset:
    """Return a slice whose modality transform is a table."""
    item = Dataset()
    item.add_new("LUTDescriptor", "SS" if words.dtype.kind == "i" else "US", [count, first, bits])
    item.ModalityLUTType = kind
    item.add_new("LUTData", "OW", entries)
    place = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": list(AXIAL), "PixelSpacing": [1, 1]}
    none = {"RescaleSlope": None, "RescaleIntercept": None}
    return dataset(words, ModalityLUTSequence=Sequence([item]), **(place | none | tags))


def table(*values: int) -> bytes:
    return np.array(values, dtype="<u2").tobytes()


# ---- modality LUT


def test_a_modality_lut_gives_values_and_clamps_on_both_sides(tmp_path):
    path = save(modality_lut(WORDS, table(100, 200, 300), first=2, count=3), tmp_path / "a")
    image = image_of(path)
    assert image.array[0, 0].tolist() == [[100, 100, 100, 200], [300, 300, 300, 300]]
    assert image.channels[0].unit == "HU"
    one = pydicom.dcmread(path)
    np.testing.assert_array_equal(image.array[0, 0], apply_modality_lut(one.pixel_array, one))


def test_the_first_value_of_a_modality_lut_has_the_sign_of_the_pixels(tmp_path):
    words = np.array([[-5, -2, -1], [0, 1, 9]], dtype=np.int16)
    path = save(modality_lut(words, table(7, 8, 9), first=-2, count=3), tmp_path / "a")
    assert image_of(path).array[0, 0].tolist() == [[7, 7, 8], [9, 9, 9]]


def test_eight_bit_entries_come_packed_or_in_words(tmp_path):
    packed = save(modality_lut(WORDS, bytes([1, 2, 3, 0]), first=0, count=3, bits=8), tmp_path / "a")
    wide = save(modality_lut(WORDS, table(1, 2, 3), first=0, count=3, bits=8), tmp_path / "b")
    assert image_of(packed).array[0, 0].tolist() == [[1, 2, 3, 3], [3, 3, 3, 3]]
    np.testing.assert_array_equal(image_of(packed).array, image_of(wide).array)


def test_zero_entries_mean_65536(tmp_path):
    entries = np.arange(65536, dtype="<u2")[::-1].tobytes()
    path = save(modality_lut(WORDS, entries, first=0, count=0), tmp_path / "a")
    np.testing.assert_array_equal(image_of(path).array[0, 0], 65535.0 - WORDS)


def test_a_modality_lut_holds_for_every_frame_of_a_clip(tmp_path):
    words = np.stack([WORDS, WORDS[::-1]])
    made = modality_lut(words, table(5, 6, 7, 8), first=1, count=4, kind="US", Modality="DX", NumberOfFrames=2)
    found = survey(save(made, tmp_path / "a"))
    entries = np.array([5, 6, 7, 8])
    for source, frame in zip(found.sources, words, strict=True):
        expected = entries[np.clip(frame.astype(int) - 1, 0, 3)]
        np.testing.assert_array_equal(dicom.read(source).array[0], expected)


def test_monochrome1_is_turned_round_after_its_modality_lut(tmp_path):
    made = modality_lut(WORDS, table(10, 20, 65535), first=0, count=3, kind="US", Modality="DX",
                        PhotometricInterpretation="MONOCHROME1")  # fmt: skip
    assert image_of(save(made, tmp_path / "a")).array[0, 0].tolist() == [65525, 65515, 0, 0]


def test_a_table_that_does_not_say_hounsfield_is_no_ct_volume(tmp_path):
    path = save(modality_lut(WORDS, table(1, 2), first=0, count=2, kind="US"), tmp_path / "a")
    (refusal,) = survey(path).refusals
    assert refusal.reason.name == "UNIT_CONFLICT"


@pytest.mark.parametrize(
    ("entries", "count", "bits"), [(table(1, 2), 3, 16), (table(1, 2, 3), 2, 16), (b"\1\2", 2, 16), (table(1), 1, 0)]
)
def test_a_modality_lut_that_does_not_fit_its_descriptor_is_refused(tmp_path, entries, count, bits):
    path = save(modality_lut(WORDS, entries, first=0, count=count, bits=bits), tmp_path / "a")
    (refusal,) = survey(path).refusals
    assert refusal.reason.name == "BAD_RESCALE"


def test_a_modality_lut_and_a_rescale_contradict_each_other(tmp_path):
    made = modality_lut(WORDS, table(1, 2), first=0, count=2, RescaleSlope="2", RescaleIntercept="0")
    (refusal,) = survey(save(made, tmp_path / "a")).refusals
    assert (refusal.reason.name, refusal.detail) == (
        "BAD_RESCALE",
        "a modality LUT and a rescale contradict each other",
    )


# ---- palettes


def palette(indices: np.ndarray, tables: list[bytes], *, first: int = 0, count: int, bits: int = 16,
            segmented: bool = False, **tags: object) -> Dataset:  # fmt: skip
    """Return a secondary capture whose pixels are indices into palettes."""
    made = dataset(indices, Modality="OT", SOPClassUID="1.2.840.10008.5.1.4.1.1.7",
                   PhotometricInterpretation="PALETTE COLOR", **tags)  # fmt: skip
    for colour, data in zip(("Red", "Green", "Blue"), tables, strict=True):
        made.add_new(f"{colour}PaletteColorLookupTableDescriptor", "US", [count, first, bits])
        made.add_new(f"{'Segmented' * segmented}{colour}PaletteColorLookupTableData", "OW", data)
    return made


RED, GREEN, BLUE = (np.array(values) for values in ([0, 65535, 257, 514], [257, 0, 65535, 0], [0, 0, 2570, 65535]))
TABLES = [table(*values) for values in (RED, GREEN, BLUE)]
INDICES = np.array([[0, 1, 2], [3, 4, 255]], dtype=np.uint8)


def test_a_palette_gives_red_green_and_blue_in_0_to_255(tmp_path):
    path = save(palette(INDICES, TABLES, count=4), tmp_path / "a")
    image = image_of(path, "rgb")
    clamped = np.clip(INDICES, 0, 3)
    expected = np.stack([colour[clamped] / 65535 * 255 for colour in (RED, GREEN, BLUE)])
    np.testing.assert_allclose(image.array, expected, rtol=1e-6)
    assert [channel.name for channel in image.channels] == ["red", "green", "blue"]
    assert isinstance(image.geometry, PlaneGeometry)
    one = pydicom.dcmread(path)
    np.testing.assert_allclose(image.array, np.moveaxis(apply_color_lut(one.pixel_array, one), -1, 0) / 257, rtol=1e-6)


def test_palette_indices_below_the_first_take_the_first_entry(tmp_path):
    path = save(palette(INDICES, TABLES, count=4, first=2), tmp_path / "a")
    image = image_of(path, "rgb")
    np.testing.assert_allclose(image.array[0], RED[np.clip(INDICES.astype(int) - 2, 0, 3)] / 257, rtol=1e-6)


def test_eight_bit_palettes_are_packed_bytes(tmp_path):
    path = save(palette(INDICES, [bytes([1, 2, 3, 4])] * 3, count=4, bits=8), tmp_path / "a")
    assert image_of(path, "rgb").array[1].tolist() == [[1, 2, 3], [4, 4, 4]]


@pytest.mark.parametrize("data", [TABLES[0][:6], TABLES[0] + b"\0\0", b""])
def test_a_palette_of_another_length_than_its_descriptor_is_refused(tmp_path, data):
    path = save(palette(INDICES, [data, *TABLES[1:]], count=4), tmp_path / "a")
    with pytest.raises(ReadError) as caught:
        dicom.read(survey(path, "rgb").sources[0])
    assert caught.value.reason == "DECODE_FAILED"


def test_segmented_palettes_expand_discrete_linear_and_indirect_segments(tmp_path):
    # Two discrete entries, a line of four to 500, and once more the first two segments, the line from 20 this time.
    segments = table(0, 2, 10, 20, 1, 4, 500, 2, 2, 0, 0)
    expanded = [10, 20, 140, 260, 380, 500, 10, 20, 140, 260, 380, 500]
    indices = np.arange(12, dtype=np.uint8).reshape(3, 4)
    path = save(palette(indices, [segments] * 3, count=12, segmented=True), tmp_path / "a")
    image = image_of(path, "rgb")
    np.testing.assert_allclose(image.array[0].ravel(), np.array(expanded) / 257, rtol=1e-6)
    one = pydicom.dcmread(path)
    np.testing.assert_allclose(image.array[0], apply_color_lut(one.pixel_array, one)[..., 0] / 257, rtol=1e-6)


@pytest.mark.parametrize(
    "segments",
    [
        table(1, 4, 500),  # a line from nowhere
        table(0, 9, 1, 2),  # cut
        table(0, 1, 7, 1, 65535, 9, 1, 65535, 3, 1, 65535, 9),  # far longer than declared
        table(0, 1, 7, 2, 65535, 6, 0),  # points at itself
        table(0, 1, 7, 2, 1, 60000, 0),  # points outside
        table(0, 1, 7, 9, 3, 3),  # unknown kind
        table(0, 0, 0, 0),  # empty
    ],
)
def test_malformed_segments_are_refused_and_bounded(tmp_path, segments):
    path = save(palette(INDICES, [segments] * 3, count=4, segmented=True), tmp_path / "a")
    with pytest.raises(ReadError) as caught:
        dicom.read(survey(path, "rgb").sources[0])
    assert caught.value.reason == "DECODE_FAILED"


def test_a_palette_is_luminance_where_the_modality_has_one_channel(tmp_path):
    made = palette(INDICES, TABLES, count=4)
    made.Modality = "US"
    image = image_of(save(made, tmp_path / "a"), "ultrasound")
    clamped = np.clip(INDICES, 0, 3)
    expected = (0.299 * RED + 0.587 * GREEN + 0.114 * BLUE)[clamped] / 257
    np.testing.assert_allclose(image.array[0], expected, rtol=1e-6)


# ---- colour


def ybr_to_rgb(ybr: np.ndarray) -> np.ndarray:
    """PS3.3 C.7.6.3.1.2, YBR_FULL, solved for R, G and B by hand."""
    y, cb, cr = np.moveaxis(ybr.astype(float), -1, 0)
    return np.stack([y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)])


def test_uncompressed_ybr_422_is_converted_once(tmp_path):
    source = PYDICOM_FILES / "SC_ybr_full_422_uncompressed.dcm"
    one = pydicom.dcmread(source)
    raw = np.frombuffer(one.PixelData, np.uint8)[: one.Rows * one.Columns * 2].reshape(one.Rows, one.Columns // 2, 4)
    ybr = np.stack([raw[..., [0, 2, 3]], raw[..., [1, 2, 3]]], axis=2).reshape(one.Rows, one.Columns, 3)
    image = image_of(source, "rgb")
    np.testing.assert_allclose(image.array, np.clip(ybr_to_rgb(ybr), 0, 255), atol=1.01)


@pytest.mark.parametrize("interpretation", ["RGB", "YBR_FULL"])
@pytest.mark.parametrize("planar", [0, 1])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
def test_colour_is_the_same_however_it_is_stored(tmp_path, interpretation, planar, syntax):
    colours = np.random.default_rng(2).integers(0, 256, (4, 6, 3)).astype(np.uint8)
    stored = np.moveaxis(colours, -1, 0) if planar else colours
    made = dataset(colours, Modality="XC", PhotometricInterpretation=interpretation, PlanarConfiguration=planar)
    made.PixelData = np.ascontiguousarray(stored).tobytes()
    image = image_of(save(made, tmp_path / "a", syntax=syntax), "rgb")
    if interpretation == "RGB":
        np.testing.assert_array_equal(image.array, np.moveaxis(colours, -1, 0))
    else:
        np.testing.assert_allclose(image.array, np.clip(ybr_to_rgb(colours), 0, 255), atol=1.01)


@pytest.mark.parametrize(
    ("name", "top"),
    [
        ("SC_rgb_jpeg_dcmtk.dcm", 255),
        ("SC_rgb_jpeg_gdcm.dcm", 255),
        ("SC_rgb_rle_16bit.dcm", 65535),
        ("SC_rgb_small_odd_jpeg.dcm", 255),
    ],
)
def test_real_colour_files_equal_pydicom_as_red_green_and_blue(name, top):
    image = image_of(PYDICOM_FILES / name, "rgb")
    expected = pixel_array(PYDICOM_FILES / name, index=0) * (255 / top)
    np.testing.assert_allclose(image.array, np.moveaxis(expected, -1, 0), rtol=1e-6)


def test_sixteen_bit_colour_is_scaled_to_0_to_255(tmp_path):
    colours = np.array([[[0, 65535, 257]]], dtype=np.uint16)
    image = image_of(save(dataset(colours, Modality="XC"), tmp_path / "a"), "rgb")
    np.testing.assert_allclose(image.array[:, 0, 0], [0, 255, 1], rtol=1e-6)


def test_grey_pixels_are_not_red_green_and_blue(tmp_path):
    (refusal,) = survey(save(dataset(WORDS, Modality="XC"), tmp_path / "a"), "rgb").refusals
    assert (refusal.reason.name, refusal.detail) == (
        "DTYPE_UNSUPPORTED",
        "grey pixels for a modality of three colours",
    )


def test_subsampled_colour_needs_an_even_number_of_columns(tmp_path):
    made = dataset(np.zeros((2, 3, 3), np.uint8), Modality="XC", PhotometricInterpretation="YBR_FULL_422")
    made.PixelData = bytes(12)
    assert dicom.header(save(made, tmp_path / "a")).detail == "YBR_FULL_422 with an odd number of columns"


def test_subsampled_colour_that_is_stored_whole_is_refused(tmp_path):
    made = dataset(np.zeros((2, 4, 3), np.uint8), Modality="XC", PhotometricInterpretation="YBR_FULL_422")
    assert dicom.header(save(made, tmp_path / "a")).reason.name == "LENGTH_MISMATCH"


@pytest.mark.parametrize("interpretation", ["CMYK", "HSV", "YBR_PARTIAL_420", "MONOCHROME2"])
def test_other_colours_are_refused(tmp_path, interpretation):
    made = dataset(np.zeros((2, 4, 3), np.uint8), Modality="XC", PhotometricInterpretation=interpretation)
    assert dicom.header(save(made, tmp_path / "a")).reason.name == "DTYPE_UNSUPPORTED"
