"""Stored words to physical values; the oracle is arithmetic done by hand, or pydicom on the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate
from pydicom.sequence import Sequence as Items

from geomed_mae.errors import ReadError
from geomed_mae.image import Image
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.dicom.file import open_dicom
from geomed_mae.readers.dicom.image_header import parse_header
from geomed_mae.readers.dicom.pixels import decode
from tests.make_dicom import dataset, enhanced, patch, save, write_slice

RAMP = np.arange(48, dtype=np.int16).reshape(6, 8)
PLACE = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": [1, 0, 0, 0, 1, 0], "PixelSpacing": [1, 1]}


def only_image(path: Path, modality: str = "auto") -> Image:
    found = dicom.group([dicom.header(path)], resolve_modalities(modality))
    assert [refusal.reason for refusal in found.refusals] == []
    (source,) = found.sources
    return dicom.read(source)


def test_ct_becomes_hounsfield_units(tmp_path):
    path = write_slice(tmp_path / "a", RAMP, RescaleSlope="2", RescaleIntercept="-1000")
    image = only_image(path)
    np.testing.assert_array_equal(image.array[0, 0], RAMP * 2.0 - 1000)
    assert image.array.dtype == np.float32
    assert image.channels[0].unit == "HU"
    assert image.channels[0].tube_kv == 120


def test_a_slope_of_1e_8_is_applied_in_double_precision(tmp_path):
    stored = np.full((4, 4), 32767, dtype=np.int16)
    path = write_slice(
        tmp_path / "a", stored, Modality="PT", Units="BQML", RescaleSlope="1.23456789E-8", RescaleIntercept="1"
    )
    assert (only_image(path).array == np.float32(32767 * 1.23456789e-8 + 1)).all()


def test_monochrome1_projections_are_turned_round_within_their_stored_bits(tmp_path):
    bright = RAMP.astype(np.uint16)
    twin = write_slice(tmp_path / "2", bright, Modality="DX", BitsStored=12, RescaleSlope=None)
    dark = write_slice(
        tmp_path / "1", 4095 - bright, Modality="DX", BitsStored=12, PhotometricInterpretation="MONOCHROME1"
    )
    np.testing.assert_array_equal(only_image(dark).array, only_image(twin).array)


def test_signed_monochrome1_swaps_minimum_and_maximum(tmp_path):
    stored = np.array([[-128, 127], [0, -1]], dtype=np.int8)
    path = write_slice(tmp_path / "a", stored, Modality="CR", PhotometricInterpretation="MONOCHROME1")
    np.testing.assert_array_equal(only_image(path).array[0], [[127, -128], [-1, 0]])


def test_monochrome1_volumes_keep_their_values_because_it_concerns_display(tmp_path):
    image = only_image(write_slice(tmp_path / "a", RAMP, PhotometricInterpretation="MONOCHROME1"))
    np.testing.assert_array_equal(image.array[0, 0], RAMP - 1024.0)


def test_big_endian_equals_little_endian(tmp_path):
    little = save(dataset(RAMP, ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                          PixelSpacing=[1, 1]), tmp_path / "little")  # fmt: skip
    made = dataset(RAMP.astype(">i2"), ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                   PixelSpacing=[1, 1])  # fmt: skip
    big = save(made, tmp_path / "big", syntax="1.2.840.10008.1.2.2")
    one, other = only_image(little), only_image(big)
    np.testing.assert_array_equal(one.array, other.array)
    assert other.array.dtype.byteorder in "=<"


def test_junk_above_the_stored_bits_is_ignored(tmp_path):
    junk = (RAMP.astype(np.uint16) & 0xFFF) | 0xA000
    image = only_image(write_slice(tmp_path / "a", junk, BitsStored=12))
    np.testing.assert_array_equal(image.array[0, 0], RAMP - 1024.0)


def test_signed_values_are_extended_from_their_stored_bits(tmp_path):
    stored = np.array([[0x0FFF, 0x0800], [0x07FF, 0x0001]], dtype=np.uint16).view(np.int16)
    image = only_image(write_slice(tmp_path / "a", stored, BitsStored=12, RescaleIntercept="0"))
    np.testing.assert_array_equal(image.array[0, 0], [[-1, -2048], [2047, 1]])


def padded_image(path: Path, stored: np.ndarray, value: int, limit: int | None = None, **tags: object) -> Image:
    made = dataset(stored, **PLACE, **tags)
    made.add_new(0x00280120, "US", value)
    if limit is not None:
        made.add_new(0x00280121, "US", limit)
    return only_image(save(made, path))


def padded(path: Path, stored: np.ndarray, value: int, limit: int | None = None, **tags: object) -> np.ndarray:
    return padded_image(path, stored, value, limit, **tags).valid[0, 0]


def test_padding_written_as_unsigned_matches_signed_pixels(tmp_path):
    stored = np.array([[-2000, 5], [0, 63]], dtype=np.int16)
    assert padded(tmp_path / "a", stored, 63536).tolist() == [[False, True], [True, True]]


def test_a_padding_range_is_invalid_from_end_to_end(tmp_path):
    stored = np.array([[-2000, -1999], [-1500, -1000]], dtype=np.int16)
    assert padded(tmp_path / "a", stored, 63536, 65536 - 1500).tolist() == [[False, False], [False, True]]


def test_padding_outside_the_stored_bits_means_the_whole_word(tmp_path):
    stored = np.array([[63536, 63536 & 0xFFF], [1, 2]], dtype=np.uint16)
    assert padded(tmp_path / "a", stored, 63536, BitsStored=12).tolist() == [[False, True], [True, True]]


def test_values_beyond_float32_are_invalid_and_finite(tmp_path):
    image = only_image(write_slice(tmp_path / "a", RAMP, Modality="PT", RescaleSlope="1e38", RescaleIntercept="0"))
    assert np.isfinite(image.array).all()
    np.testing.assert_array_equal(image.valid[0, 0], RAMP <= 3)


def test_colour_ultrasound_becomes_luma(tmp_path):
    colour = np.zeros((2, 3, 3), dtype=np.uint8)
    colour[0], colour[1, 0] = (255, 0, 0), (10, 20, 30)
    image = only_image(save(dataset(colour, Modality="US"), tmp_path / "a"), "ultrasound")
    np.testing.assert_allclose(image.array[0, 0], 0.299 * 255, rtol=1e-6)
    np.testing.assert_allclose(image.array[0, 1, 0], 0.299 * 10 + 0.587 * 20 + 0.114 * 30, rtol=1e-6)


def test_ybr_is_converted_once(tmp_path):
    source = Path(pydicom.__file__).parent / "data" / "test_files" / "examples_ybr_color.dcm"
    found = dicom.group([dicom.header(source)], resolve_modalities("ultrasound"))
    rgb = pydicom.pixels.pixel_array(source, index=3).astype(np.float64)
    np.testing.assert_allclose(dicom.read(found.sources[3]).array[0], rgb @ [0.299, 0.587, 0.114], rtol=1e-6, atol=1e-4)


@pytest.mark.parametrize(
    ("syntax", "plugin", "options", "error", "kinds"),
    [
        ("1.2.840.10008.1.2.5", "pydicom", {}, 0, ("uint8", "uint16", "int16")),
        ("1.2.840.10008.1.2.4.80", "pyjpegls", {}, 0, ("uint8", "uint16", "int16")),
        # Near-lossless wraps signed words round: pydicom does not encode them so.
        ("1.2.840.10008.1.2.4.81", "pyjpegls", {"jls_error": 2}, 2, ("uint8", "uint16")),
        ("1.2.840.10008.1.2.4.90", "pylibjpeg", {}, 0, ("uint8", "uint16", "int16")),
        ("1.2.840.10008.1.2.4.91", "pylibjpeg", {"j2k_cr": [2]}, 3200, ("uint8", "uint16", "int16")),
    ],
)
def test_what_pydicom_compresses_comes_back(tmp_path, syntax, plugin, options, error, kinds):
    for kind in kinds:
        bits = {"uint8": 8, "uint16": 12, "int16": 16}[kind]
        lowest = -(1 << bits - 1) if kind[0] == "i" else 0
        stored = np.random.default_rng(6).integers(lowest, lowest + (1 << bits), (32, 40)).astype(kind)
        made = dataset(stored, **PLACE, BitsStored=bits)
        made.file_meta = pydicom.dataset.FileMetaDataset()
        made.file_meta.TransferSyntaxUID = "1.2.840.10008.1.2.1"
        made.compress(syntax, encoding_plugin=plugin, generate_instance_uid=False, **options)
        path = save(made, tmp_path / kind, syntax=syntax)
        found = only_image(path).array[0, 0]
        np.testing.assert_array_equal(found, pydicom.dcmread(path).pixel_array - 1024.0)
        assert np.abs(found + 1024 - stored).max() <= error


def rle_slice(path: Path, frame: bytes) -> Path:
    made = dataset(RAMP, ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                   PixelSpacing=[1, 1])  # fmt: skip
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return save(made, path, syntax="1.2.840.10008.1.2.5")


# ---- odd words


def test_values_at_the_top_of_the_word_are_shifted_down(tmp_path):
    words = (RAMP.astype(np.uint16) << 4) | 0xB
    image = only_image(write_slice(tmp_path / "a", words, BitsStored=12, HighBit=15))
    np.testing.assert_array_equal(image.array[0, 0], RAMP - 1024.0)


def test_values_in_the_middle_of_the_word_are_cut_out_and_sign_extended(tmp_path):
    stored = np.array([[-1, -512, 511], [0, 1, 100]])
    words = (((stored & 0x3FF) << 3) | 0xE005).astype(np.uint16).view(np.int16)
    image = only_image(write_slice(tmp_path / "a", words, BitsStored=10, HighBit=12, RescaleIntercept="0"))
    np.testing.assert_array_equal(image.array[0, 0], stored)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"])
@pytest.mark.parametrize("syntax", ["1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2"])
def test_words_of_every_width_are_read_in_either_byte_order(tmp_path, dtype, syntax):
    limits = np.iinfo(dtype)
    stored = np.array([[limits.min, limits.max, 1], [2, 3, 100]], dtype=dtype)
    ordered = stored.astype(stored.dtype.newbyteorder(">")) if syntax.endswith(".2.2") else stored
    made = dataset(ordered, **PLACE, RescaleSlope="0.5", RescaleIntercept="3")
    made["PixelData"].VR = "OV" if stored.itemsize == 8 else "OB" if stored.itemsize == 1 else "OW"
    image = only_image(save(made, tmp_path / "a", syntax=syntax))
    np.testing.assert_array_equal(image.array[0, 0], (stored.astype(np.float64) * 0.5 + 3).astype(np.float32))


def test_big_endian_bytes_in_words_are_swapped_in_pairs(tmp_path):
    stored = np.arange(6, dtype=np.uint8).reshape(2, 3)
    made = dataset(stored, **PLACE)
    made.PixelData = stored.reshape(3, 2)[:, ::-1].tobytes()
    made["PixelData"].VR = "OW"
    image = only_image(save(made, tmp_path / "a", syntax="1.2.840.10008.1.2.2"))
    np.testing.assert_array_equal(image.array[0, 0], stored - 1024.0)


@pytest.mark.parametrize(
    "tags",
    [
        {"BitsAllocated": 1, "BitsStored": 1, "HighBit": 0},
        {"BitsAllocated": 12, "BitsStored": 12, "HighBit": 11},
        {"BitsAllocated": 24, "BitsStored": 24, "HighBit": 23},
        {"BitsStored": 17, "HighBit": 16},
        {"BitsStored": 0, "HighBit": 0},
        {"BitsStored": 12, "HighBit": 10},
        {"BitsStored": 12, "HighBit": 16},
        {"SamplesPerPixel": 2, "PlanarConfiguration": 0},
        {"SamplesPerPixel": 4, "PlanarConfiguration": 0},
        {"PhotometricInterpretation": "RGB"},
    ],
)
def test_packed_and_impossible_samples_are_refused(tmp_path, tags):
    path = save(dataset(RAMP, **(PLACE | tags)), tmp_path / "a")
    assert dicom.header(path).reason.name == "DTYPE_UNSUPPORTED"


def test_trailing_bytes_after_the_pixels_are_left_alone(tmp_path):
    made = dataset(RAMP, **PLACE)
    made.PixelData += b"\0" * 20
    made.add_new(0xFFFCFFFC, "OB", b"\0" * 126)
    np.testing.assert_array_equal(only_image(save(made, tmp_path / "a")).array[0, 0], RAMP - 1024.0)


def test_more_pixels_than_the_frames_declared_are_refused(tmp_path):
    path = save(dataset(np.stack([RAMP] * 2), **PLACE), tmp_path / "a")
    assert dicom.header(path).reason.name == "LENGTH_MISMATCH"


def test_each_frame_of_a_clip_is_read_from_its_own_place(tmp_path):
    clip = np.random.default_rng(1).integers(0, 4096, (5, 6, 8)).astype(np.uint16)
    found = dicom.group(
        [dicom.header(save(dataset(clip, Modality="DX", NumberOfFrames=5), tmp_path / "a"))], resolve_modalities("auto")
    )
    for source, frame in zip(found.sources, clip, strict=True):
        np.testing.assert_array_equal(dicom.read(source).array[0], frame)


def test_each_frame_of_an_enhanced_object_has_its_own_rescale(tmp_path):
    volume = np.random.default_rng(1).integers(0, 4096, (3, 6, 8)).astype(np.int16)
    frames = [{"position": (0, 0, 2 * index), "slope": 0.5 + index} for index in range(3)]
    image = only_image(save(enhanced(volume, frames), tmp_path / "a"))
    expected = volume * (0.5 + np.arange(3))[:, None, None]
    np.testing.assert_array_equal(image.array[0], expected.astype(np.float32))


def test_a_file_that_shrinks_between_header_and_pixels_is_truncated(tmp_path):
    path = write_slice(tmp_path / "a", RAMP)
    opened = open_dicom(path)
    header = parse_header(opened)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ReadError, match="^the file ends inside its pixel data$"):
        decode(opened, header, [0], invert=False)


# ---- padding


def test_padding_outside_a_table_of_values_is_found_before_the_rescale(tmp_path):
    stored = np.array([[-2000, 5], [0, 63]], dtype=np.int16)
    image = padded_image(tmp_path / "a", stored, 63536, RescaleSlope="2", RescaleIntercept="2976")
    assert image.valid[0, 0].tolist() == [[False, True], [True, True]]
    assert image.array[0, 0].tolist()[0][1] == 2986


def test_a_padding_of_sixteen_bits_keeps_its_sign_in_wider_words(tmp_path):
    stored = np.array([[-2000, 63536], [0, 63]], dtype=np.int32)
    assert padded(tmp_path / "a", stored, 63536).tolist() == [[False, True], [True, True]]


def test_padding_of_shifted_words_is_a_stored_value(tmp_path):
    words = np.array([[0, 16], [32, 48]], dtype=np.uint16)
    assert padded(tmp_path / "a", words, 2, BitsStored=12, HighBit=15).tolist() == [[True, True], [False, True]]


# ---- floating point


def parametric(path: Path, values: np.ndarray, **tags: object) -> Path:
    """Write a parametric map (PS3.3 A.75) of 32 or 64 bits, its unit HU."""
    bits = 8 * values.dtype.itemsize
    frames = [{"position": (0, 0, 2 * index)} for index in range(len(values))]
    made = enhanced(values, frames, Modality="CT", SOPClassUID="1.2.840.10008.5.1.4.1.1.30", BitsAllocated=bits)
    made.RescaleSlope = made.RescaleIntercept = None
    for keyword in ("PixelData", "BitsStored", "HighBit", "PixelRepresentation", "RescaleSlope", "RescaleIntercept"):
        delattr(made, keyword)
    mapping, unit = Dataset(), Dataset()
    unit.CodeValue, unit.CodingSchemeDesignator = tags.pop("unit", "[hnsf'U]"), "UCUM"
    mapping.RealWorldValueSlope, mapping.RealWorldValueIntercept = 2.0, -1000.0
    mapping.MeasurementUnitsCodeSequence = Items([unit])
    made.SharedFunctionalGroupsSequence[0].RealWorldValueMappingSequence = Items([mapping])
    made.add_new(*(0x7FE00008, "OF") if bits == 32 else (0x7FE00009, "OD"), values.tobytes())
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return save(made, path)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_floating_point_pixels_are_read_with_their_real_world_values(tmp_path, dtype):
    values = np.random.default_rng(3).normal(500, 300, (3, 4, 5)).astype(dtype)
    values[0, 0, 0], values[1, 1, 1] = np.nan, np.inf
    image = only_image(parametric(tmp_path / "a", values))
    assert image.array.dtype == np.float32
    finite = np.isfinite(values)
    np.testing.assert_array_equal(image.valid[0], finite)
    expected = (values.astype(np.float64) * 2 - 1000).astype(np.float32)
    np.testing.assert_array_equal(image.array[0][finite], expected[finite])
    assert np.isfinite(image.array).all()


def test_floating_point_padding_is_invalid(tmp_path):
    values = np.array([[[1, -9999.5], [2, 3]]] * 3, dtype=np.float32)
    image = only_image(parametric(tmp_path / "a", values, FloatPixelPaddingValue=-9999.5))
    assert image.valid[0, 0].tolist() == [[True, False], [True, True]]


def test_a_map_of_another_unit_is_no_ct(tmp_path):
    values = np.ones((3, 4, 5), dtype=np.float32)
    found = dicom.group([dicom.header(parametric(tmp_path / "a", values, unit="mm2/s"))], resolve_modalities("auto"))
    assert [refusal.reason.name for refusal in found.refusals] == ["UNIT_CONFLICT"]


# ---- compressed


@pytest.mark.parametrize("frame", [b"\0" * 64, b"\xff" * 80, bytes(range(70))], ids=["zeros", "ones", "counting"])
def test_damaged_compressed_pixels_are_a_typed_error(tmp_path, frame):
    found = dicom.group([dicom.header(rle_slice(tmp_path / "a", frame))], resolve_modalities("auto"))
    with pytest.raises(ReadError, match=r"^slice 1 of 1: the pixel data does not decode") as caught:
        dicom.read(found.sources[0])
    assert caught.value.reason == "DECODE_FAILED"


def test_a_private_transfer_syntax_is_a_missing_codec(tmp_path):
    path = rle_slice(tmp_path / "a", b"\0" * 64)
    patch(path, b"1.2.840.10008.1.2.5\0", b"1.2.840.99999.1.2.5\0")
    assert dicom.header(path).reason.name == "CODEC_MISSING"


def test_a_codec_that_is_not_installed_is_named_with_the_way_out(tmp_path, monkeypatch):
    from pydicom.pixels.decoders.base import Decoder

    monkeypatch.setattr(Decoder, "is_available", property(lambda self: False))
    dicom.codec_problem.cache_clear()
    refusal = dicom.header(rle_slice(tmp_path / "a", b"\0" * 64))
    dicom.codec_problem.cache_clear()
    assert refusal.reason.name == "CODEC_MISSING"
    assert refusal.detail == "transfer syntax 1.2.840.10008.1.2.5 needs a codec: pip install 'geomed-mae[med]'"


@pytest.mark.data
def test_nine_encodings_of_one_sheet_give_the_same_array(shared_data):
    arrays = []
    for path in sorted((shared_data / "med" / "transfer_syntaxes").iterdir()):
        opened = open_dicom(path)
        # The sheet of a Siemens mosaic as it is decoded, before it is cut into its slices.
        ((sheet, valid),) = decode(opened, parse_header(opened), [0], invert=False)
        np.testing.assert_array_equal(sheet, pydicom.dcmread(path).pixel_array)
        assert valid.all()
        arrays.append(sheet)
    assert len(arrays) == 9
    assert all(np.array_equal(arrays[0], array) for array in arrays[1:])
