"""Compressed frames are compared with their header before a decoder sees them; streams are cut and patched by hand."""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
import pydicom
import pytest
from PIL import Image as Picture
from pydicom.encaps import encapsulate, encapsulate_extended
from pydicom.uid import JPEG2000Lossless, JPEGBaseline8Bit, RLELossless

from geomed_mae.errors import ReadError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.dicom.codestream import CODECS, Stream, codec_name, stream_of
from geomed_mae.readers.source import Refusal
from tests.make_dicom import dataset, save

PIXELS = np.random.default_rng(4).integers(0, 256, (6, 10)).astype(np.uint8)


def encoded(kind: str, pixels: np.ndarray = PIXELS) -> bytes:
    buffer = io.BytesIO()
    options = {"JPEG": {"quality": 100}, "JPEG2000": {"irreversible": False, "no_jp2": True}}
    Picture.fromarray(pixels).save(buffer, kind, **options[kind])
    return buffer.getvalue()


def compressed(path: Path, frames: list[bytes], syntax: str, *, fragments: int = 1, table: bool = False,
               **tags: object) -> Path:  # fmt: skip
    made = dataset(PIXELS, **({"Modality": "DX", "NumberOfFrames": len(frames)} | tags))
    made.PixelData = encapsulate(frames, fragments_per_frame=fragments, has_bot=table)
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    return save(made, path, syntax=syntax)


def read_all(path: Path) -> list[np.ndarray]:
    header = dicom.header(path)
    assert not isinstance(header, Refusal), header
    found = dicom.group([header], resolve_modalities("auto"))
    assert list(found.refusals) == []
    return [dicom.read(source).array[0] for source in found.sources]


def reason(path: Path) -> tuple[str, str]:
    with pytest.raises(ReadError) as caught:
        read_all(path)
    return caught.value.reason, str(caught.value)


def size_patched(stream: bytes, rows: int, columns: int) -> bytes:
    """Write another size into the SIZ segment of a JPEG 2000 stream (T.800 A.5.1)."""
    at = stream.index(b"\xff\x51") + 6
    return stream[:at] + struct.pack(">LL", columns, rows) + stream[at + 8 :]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("JPEG2000.dcm", Stream(1024, 256, 1, 16)),
        ("MR_small_jpeg_ls_lossless.dcm", Stream(64, 64, 1, 16)),
        ("SC_rgb_jpeg_dcmtk.dcm", Stream(100, 100, 3, 8)),
        ("JPGExtended.dcm", Stream(1024, 256, 1, 12)),
    ],
)
def test_streams_of_every_codec_say_their_size(name, expected):
    path = Path(pydicom.__file__).parent / "data" / "test_files" / name
    one = pydicom.dcmread(path)
    frame = next(pydicom.encaps.generate_frames(one.PixelData, number_of_frames=1))
    assert stream_of(frame) == expected
    assert (one.Rows, one.Columns, one.SamplesPerPixel) == expected[:3]


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xd8", b"\xff\xd8\xff\xda\0\4", b"\xff\xd8\xff\xc0", b"\xff\x4f\xff\x51"]
)
def test_what_is_cut_or_no_stream_has_no_size(content):
    assert stream_of(content) is None


def test_jpeg_2000_in_its_file_format_is_looked_into():
    buffer = io.BytesIO()
    Picture.fromarray(PIXELS).save(buffer, "JPEG2000", irreversible=False)
    assert stream_of(buffer.getvalue()) == Stream(6, 10, 1, 8)


def test_a_small_file_that_declares_a_gigantic_stream_is_refused_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr("pydicom.pixels.get_decoder", lambda uid: pytest.fail("the decoder was reached"))
    dicom.codec_problem.cache_clear()
    monkeypatch.setattr("geomed_mae.readers.dicom.codec_problem", lambda syntax: "")
    monkeypatch.setattr("geomed_mae.readers.dicom.pixels.codec_problem", lambda syntax: "")
    path = compressed(tmp_path / "a", [size_patched(encoded("JPEG2000"), 65535, 65535)], JPEG2000Lossless)
    assert reason(path) == (
        "TOO_LARGE",
        "the image: the compressed stream declares 65535 x 65535 pixels; a frame may have 67108864",
    )


@pytest.mark.parametrize(("rows", "columns"), [(7, 10), (10, 6), (3, 5)])
def test_a_stream_of_another_size_than_its_header_is_refused(tmp_path, rows, columns):
    pixels = np.zeros((rows, columns), np.uint8)
    for kind, syntax in (("JPEG2000", JPEG2000Lossless), ("JPEG", JPEGBaseline8Bit)):
        path = compressed(tmp_path / kind, [encoded(kind, pixels)], syntax)
        assert reason(path) == (
            "LENGTH_MISMATCH",
            f"the image: the compressed stream has {rows} x {columns} pixels of 1 x 8 bits, the header 6 x 10 of 1 x 8",
        )


def test_a_stream_of_more_samples_or_bits_than_its_header_is_refused(tmp_path):
    colour = compressed(tmp_path / "a", [encoded("JPEG", np.zeros((6, 10, 3), np.uint8))], JPEGBaseline8Bit)
    assert reason(colour)[0] == "LENGTH_MISMATCH"
    deep = compressed(tmp_path / "b", [encoded("JPEG2000", PIXELS.astype(np.uint16) * 257)], JPEG2000Lossless)
    assert reason(deep)[0] == "LENGTH_MISMATCH"


def test_bytes_that_are_no_stream_are_refused(tmp_path):
    path = compressed(tmp_path / "a", [b"not a stream at all."], JPEGBaseline8Bit)
    assert reason(path)[0] == "DECODE_FAILED"


def rle(*segments: bytes) -> bytes:
    starts = np.cumsum([64, *map(len, segments)])[:-1].tolist()
    return struct.pack("<16L", len(segments), *starts, *[0] * (15 - len(segments))) + b"".join(segments)


def test_rle_needs_a_segment_for_each_byte_of_a_pixel(tmp_path):
    literal = bytes([59]) + PIXELS.tobytes()
    whole = compressed(tmp_path / "a", [rle(literal + b"\x80")], RLELossless)
    np.testing.assert_array_equal(read_all(whole)[0], PIXELS)
    two = compressed(tmp_path / "b", [rle(literal + b"\x80", literal + b"\x80")], RLELossless)
    assert reason(two) == ("LENGTH_MISMATCH", "the image: the RLE stream has 2 segments, the header asks for 1")


@pytest.mark.parametrize("fragments", [1, 2, 3])
@pytest.mark.parametrize("table", [False, True])
def test_frames_are_found_however_they_are_cut_into_fragments(tmp_path, fragments, table):
    frames = [PIXELS, PIXELS[::-1], PIXELS[:, ::-1]]
    streams = [encoded("JPEG2000", np.ascontiguousarray(frame)) for frame in frames]
    path = compressed(tmp_path / "a", streams, JPEG2000Lossless, fragments=fragments, table=table)
    for found, expected in zip(read_all(path), frames, strict=True):
        np.testing.assert_array_equal(found, expected)


def test_an_extended_offset_table_finds_the_frames(tmp_path):
    frames = [PIXELS, PIXELS[::-1]]
    streams = [encoded("JPEG2000", np.ascontiguousarray(frame)) for frame in frames]
    made = dataset(PIXELS, Modality="DX", NumberOfFrames=2)
    made.PixelData, made.ExtendedOffsetTable, made.ExtendedOffsetTableLengths = encapsulate_extended(streams)
    made["PixelData"].VR = "OB"
    made["PixelData"].is_undefined_length = True
    found = read_all(save(made, tmp_path / "a", syntax=JPEG2000Lossless))
    np.testing.assert_array_equal(found, frames)


def test_more_streams_than_frames_are_refused(tmp_path):
    path = compressed(tmp_path / "a", [encoded("JPEG2000")] * 3, JPEG2000Lossless, NumberOfFrames=None)
    assert reason(path) == ("LENGTH_MISMATCH", "the image: 3 fragments do not divide into 1 frames")


def test_compressed_pixels_that_are_not_in_fragments_are_refused(tmp_path):
    path = compressed(tmp_path / "a", [encoded("JPEG2000")], JPEG2000Lossless)
    content = path.read_bytes()
    at = content.index(b"\xe0\x7f\x10\x00OB\0\0") + 8
    path.write_bytes(content[:at] + struct.pack("<L", len(content) - at - 4) + content[at + 4 :])
    assert dicom.header(path).reason.name == "LENGTH_MISMATCH"


def test_sources_name_the_codec_that_their_pixels_need(tmp_path):
    path = compressed(tmp_path / "a", [encoded("JPEG2000")], JPEG2000Lossless)
    found = dicom.group([dicom.header(path)], resolve_modalities("auto"))
    assert found.sources[0].codec == "JPEG 2000"
    plain = dicom.group(
        [dicom.header(save(dataset(PIXELS, Modality="DX"), tmp_path / "b"))], resolve_modalities("auto")
    )
    assert plain.sources[0].codec == ""


def test_every_compressed_syntax_that_pydicom_decodes_has_a_codec_name():
    from pydicom.pixels.decoders.base import get_decoder
    from pydicom.uid import AllTransferSyntaxes

    for syntax in AllTransferSyntaxes:
        try:
            decoder = get_decoder(syntax)
        except NotImplementedError:
            continue
        assert decoder.is_native or syntax in CODECS, syntax
        assert codec_name(syntax) == ("" if decoder.is_native else CODECS[syntax])
