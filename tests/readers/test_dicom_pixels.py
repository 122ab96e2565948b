"""Stored words to physical values; the oracle is arithmetic done by hand, or pydicom on the same file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.encaps import encapsulate

from geomed_mae.errors import ReadError
from geomed_mae.image import Image
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from tests.make_dicom import dataset, patch, save, write_slice

RAMP = np.arange(48, dtype=np.int16).reshape(6, 8)


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


def padded(path: Path, stored: np.ndarray, value: int, limit: int | None = None, **tags: object) -> np.ndarray:
    made = dataset(stored, ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                   PixelSpacing=[1, 1], **tags)  # fmt: skip
    made.add_new(0x00280120, "US", value)
    if limit is not None:
        made.add_new(0x00280121, "US", limit)
    return only_image(save(made, path)).valid[0, 0]


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


def rle_slice(path: Path, frame: bytes) -> Path:
    made = dataset(RAMP, ImagePositionPatient=[0, 0, 0], ImageOrientationPatient=[1, 0, 0, 0, 1, 0],
                   PixelSpacing=[1, 1])  # fmt: skip
    made.PixelData = encapsulate([frame])
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return save(made, path, syntax="1.2.840.10008.1.2.5")


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
def test_nine_encodings_of_one_slice_give_the_same_array(shared_data, tmp_path):
    arrays = []
    for path in sorted((shared_data / "med" / "transfer_syntaxes").iterdir()):
        content = path.read_bytes()
        plain = tmp_path / path.name
        # The slice is a Siemens mosaic, which is refused as such; as a plain picture it tests the decoders.
        plain.write_bytes(content.replace(b"\\MOSAIC", b"\\NORMAL"))
        image = only_image(plain)
        np.testing.assert_array_equal(image.array[0, 0], pydicom.dcmread(path).pixel_array)
        arrays.append(image.array)
    assert len(arrays) == 9
    assert all(np.array_equal(arrays[0], array) for array in arrays[1:])
