"""JPEG 2000: pixels equal rasterio's, sizes are checked before native code, damage never becomes zeros."""

from __future__ import annotations

import http.server
import struct
import threading
from pathlib import Path

import numpy as np
import pytest

from geomed_mae import readers
from geomed_mae.errors import ReadError
from geomed_mae.image import RasterGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import read_images, survey
from geomed_mae.readers.geotiff.open import opened, rasterio
from geomed_mae.readers.jp2_structure import MAGIC, read_codestream
from geomed_mae.readers.reasons import Reason
from tests.make_data import UTM_10M, write_geotiff
from tests.make_scenes import write_jp2

RIO = rasterio()
RNG = np.random.default_rng(11)
AUTO = resolve_modalities("auto")


def pixels(bands=1, rows=100, columns=90, dtype=np.uint16):
    return RNG.integers(1, 4000 if np.dtype(dtype).itemsize > 1 else 250, (bands, rows, columns)).astype(dtype)


def source_of(path):
    found = survey([path], AUTO)
    assert not found.refusals, found.refusals
    return found.sources[0]


def refusal(path):
    found = survey([path], AUTO)
    assert not found.sources, "it was accepted"
    return found.refusals[0]


def outcome(path):
    """Return "ok" or the reason of a ReadError, in the header or in the pixels; nothing else may come."""
    found = survey([path], AUTO)
    if not found.sources:
        return found.refusals[0].reason.name
    try:
        readers.read(found.sources[0])
    except ReadError as error:
        return error.reason
    return "ok"


def size_marker(data: bytes) -> int:
    """Return where SIZ's own numbers start (after marker and length)."""
    return data.index(b"\xff\x4f\xff\x51") + 6


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int16])
@pytest.mark.parametrize("bands", [1, 4])
def test_pixels_and_grid_equal_rasterio(tmp_path, dtype, bands):
    array = pixels(bands, dtype=dtype)
    path = write_jp2(tmp_path / "a.jp2", array, **({"photometric": "minisblack"} if bands == 1 else {}))
    source = source_of(path)
    image = read_images(path)[0]
    with RIO.open(path) as file:
        colours = [colour.name for colour in file.colorinterp]
        kept = [n for n, colour in enumerate(colours) if colour != "alpha"]
        np.testing.assert_array_equal(image.array, file.read().astype(np.float32)[kept] * image.valid)
    np.testing.assert_array_equal(image.array, array[kept] * image.valid)
    assert image.geometry.transform == UTM_10M and RIO.crs.CRS.from_wkt(image.geometry.crs).to_epsg() == 32632
    assert source.reader == "jp2" and source.codec == "JPEG 2000" and source.block == (64, 64)


def test_any_window_equals_the_array(tmp_path):
    array = pixels(rows=200, columns=150)
    source = source_of(write_jp2(tmp_path / "a.jp2", array))
    for rows, columns in [((0, 200), (0, 150)), ((3, 77), (60, 140)), ((64, 65), (63, 65)), ((199, 200), (0, 150))]:
        image = readers.read(source, (slice(*rows), slice(*columns)))
        np.testing.assert_array_equal(image.array, array[:, slice(*rows), slice(*columns)])
        assert image.geometry.transform[2] == UTM_10M[2] + 10 * columns[0]


def test_an_untiled_file_is_read_in_blocks_of_its_own(tmp_path):
    array = pixels(rows=1200, columns=1100)
    source = source_of(write_jp2(tmp_path / "a.jp2", array, BLOCKXSIZE=2048, BLOCKYSIZE=2048))
    assert source.block is not None and max(source.block) <= 1200
    image = readers.read(source, (slice(900, 1200), slice(1000, 1100)))
    np.testing.assert_array_equal(image.array, array[:, 900:1200, 1000:1100])


def test_the_other_boxes_of_georeferencing_are_read_too(tmp_path):
    array = pixels()
    for number, options in enumerate([{"GeoJP2": "NO"}, {"GMLJP2": "NO"}]):
        image = read_images(write_jp2(tmp_path / f"{number}.jp2", array, **options))[0]
        assert image.geometry.transform == UTM_10M and image.geometry.crs is not None


def test_side_cars_and_world_files_are_not_looked_at(tmp_path):
    path = write_jp2(tmp_path / "a.jp2", pixels())
    before = read_images(path)[0]
    (tmp_path / "a.j2w").write_text("1\n0\n0\n-1\n5\n6\n")
    (tmp_path / "a.jp2.aux.xml").write_text("<PAMDataset><GeoTransform>1,2,3,4,5,6</GeoTransform></PAMDataset>")
    assert read_images(path)[0].geometry == before.geometry
    assert "SIDE_CAR_IGNORED" in source_of(path).flags


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99, 0.9999])
def test_a_file_that_was_cut_is_known_from_its_header(tmp_path, share):
    whole = write_jp2(tmp_path / "w.jp2", pixels()).read_bytes()
    path = tmp_path / "a.jp2"
    path.write_bytes(whole[: int(len(whole) * share)])
    assert refusal(path).reason is Reason.TRUNCATED


def test_a_tile_that_is_missing_is_noticed(tmp_path):
    data = write_jp2(tmp_path / "w.jp2", pixels()).read_bytes()
    at = data.index(b"\xff\x90\0\x0a\0\3")
    length = struct.unpack_from(">I", data, at + 6)[0]
    start = data.index(b"jp2c") - 4
    cut = data[:at] + data[at + length :]
    cut = cut[:start] + struct.pack(">I", len(cut) - start) + cut[start + 4 :]
    path = tmp_path / "a.jp2"
    path.write_bytes(cut)
    assert refusal(path).reason is Reason.TRUNCATED and "3 of its 4 tiles" in refusal(path).detail


def test_pixels_that_do_not_decode_are_an_error_never_zeros(tmp_path):
    """With several threads, GDAL 3.10 returns zeros for a tile whose decoder failed, and no error."""
    data = bytearray(write_jp2(tmp_path / "a.jp2", pixels()).read_bytes())
    at = data.index(b"\xff\x90\0\x0a\0\2") + 14
    data[at : at + 400] = b"\xff" * 400
    (tmp_path / "a.jp2").write_bytes(data)
    with pytest.raises(ReadError, match=r"pixel data of a\.jp2 does not decode") as caught:
        read_images(tmp_path / "a.jp2")
    assert caught.value.reason == "DECODE_FAILED"


@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        (2, 2**31, Reason.TOO_LARGE),  # columns
        (6, 0, Reason.MALFORMED),  # rows
        (10, 2**31, Reason.MALFORMED),  # an image offset beyond its size
        (18, 0, Reason.MALFORMED),  # tile width
        (26, 2**30, Reason.MALFORMED),  # tiles that start beyond the image
    ],
)
def test_sizes_that_lie_are_refused_before_native_code_sees_them(tmp_path, field, value, reason):
    data = bytearray(write_jp2(tmp_path / "a.jp2", pixels()).read_bytes())
    struct.pack_into(">I", data, size_marker(data) + field, value)
    if reason is Reason.TOO_LARGE:
        struct.pack_into(">II", data, size_marker(data) + 2, value, value)
    (tmp_path / "a.jp2").write_bytes(data)
    assert refusal(tmp_path / "a.jp2").reason is reason


def test_a_tile_that_needs_too_much_memory_and_a_bomb_are_refused(tmp_path):
    data = bytearray(write_jp2(tmp_path / "a.jp2", pixels()).read_bytes())
    at = size_marker(data)
    struct.pack_into(">II", data, at + 2, 30000, 30000)
    struct.pack_into(">II", data, at + 18, 30000, 30000)
    (tmp_path / "a.jp2").write_bytes(data)
    assert refusal(tmp_path / "a.jp2").reason is Reason.BLOCK_TOO_LARGE
    struct.pack_into(">II", data, at + 2, 100000, 100000)
    struct.pack_into(">II", data, at + 18, 1024, 1024)
    (tmp_path / "a.jp2").write_bytes(data)
    assert refusal(tmp_path / "a.jp2").reason is Reason.RATIO


def test_many_bands_and_few_bits_are_refused(tmp_path):
    path = write_jp2(tmp_path / "a.jp2", pixels(dtype=np.uint8))
    data = bytearray(path.read_bytes())
    at = size_marker(data)
    data[at + 36] = 0  # one bit a sample
    path.write_bytes(data)
    assert refusal(path).reason is Reason.DTYPE_UNSUPPORTED
    struct.pack_into(">H", data, at + 34, 16000)
    struct.pack_into(">H", data, at - 2, 38 + 48000)
    path.write_bytes(data)
    assert refusal(path).reason is Reason.TOO_MANY_BANDS


def test_any_byte_of_a_header_may_lie_without_a_crash(tmp_path):
    whole = write_jp2(tmp_path / "w.jp2", pixels(rows=40, columns=40)).read_bytes()
    end = whole.index(b"\xff\x90\0\x0a") + 40
    spots = [*range(12, 110, 3), *range(whole.index(b"jp2c") - 4, end, 2)]
    path, seen = tmp_path / "m.jp2", set()
    for at in spots:
        for value in (255, (whole[at] + 1) % 256):
            path.write_bytes(whole[:at] + bytes([value]) + whole[at + 1 :])
            seen.add(outcome(path))
    assert "ok" in seen and len(seen) > 3


def test_boxes_that_lie_about_their_length_are_refused(tmp_path):
    path = tmp_path / "a.jp2"
    for tail, reason in [
        (struct.pack(">I4s", 4, b"ftyp") + bytes(50), "MALFORMED"),
        (struct.pack(">I4s", 900, b"ftyp") + bytes(50), "TRUNCATED"),
        (struct.pack(">I4sQ", 1, b"ftyp", 2**63) + bytes(50), "TRUNCATED"),
        (struct.pack(">I4s", 8, b"free") * 300, "MALFORMED"),
        (struct.pack(">I4s", 0, b"jp2c") + bytes(50), "MALFORMED"),
        (b"", "TRUNCATED"),
    ]:
        path.write_bytes(MAGIC + tail)
        assert refusal(path).reason.name == reason


def test_a_palette_is_refused(tmp_path):
    data = write_jp2(tmp_path / "a.jp2", pixels(dtype=np.uint8)).read_bytes()
    at = data.index(b"jp2h") - 4
    length = struct.unpack_from(">I", data, at)[0]
    palette = struct.pack(">I4s", 8, b"pclr")
    path = tmp_path / "b.jp2"
    path.write_bytes(
        data[:at] + struct.pack(">I", length + 8) + data[at + 4 : at + length] + palette + data[at + length :]
    )
    assert refusal(path).reason is Reason.DTYPE_UNSUPPORTED and "palette" in refusal(path).detail


# nothing is followed


def with_gml(data: bytes, name: str) -> bytes:
    """Return the file with `name` in place of its GML's name of the coordinate system."""
    at = data.index(b"asoc") - 4
    length = struct.unpack_from(">I", data, at)[0]
    start = data.index(b"xml ", at) - 4
    old = data[start + 8 : start + struct.unpack_from(">I", data, start)[0]]
    new = old.replace(b"urn:ogc:def:crs:EPSG::32632", name.encode())
    assert new != old

    def box(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I4s", 8 + len(content), kind) + content

    inner = box(b"asoc", box(b"lbl ", b"gml.root-instance") + box(b"xml ", new))
    return data[:at] + box(b"asoc", box(b"lbl ", b"gml.data") + inner) + data[at + length :]


def test_no_path_or_url_in_its_metadata_is_followed(tmp_path):
    hits = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self):
            hits.append(1)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    array = pixels()
    plain = write_jp2(tmp_path / "plain.jp2", array, GeoJP2="NO").read_bytes()
    secret = tmp_path / "secret.wkt"
    secret.write_text(RIO.crs.CRS.from_epsg(3857).to_wkt())
    path = tmp_path / "a.jp2"
    for name in (f"http://127.0.0.1:{server.server_port}/x", str(secret), f"urn:ogc:def:crs:{secret}"):
        path.write_bytes(with_gml(plain, name))
        assert read_images(path)[0].geometry.crs is None
    canary = write_geotiff(tmp_path / "canary.tif", np.full((1, 100, 90), 60000, np.uint16))
    domains = {"OVERVIEWS": {"OVERVIEW_FILE": str(canary)}}
    redirect = write_jp2(tmp_path / "r.jp2", array, namespaces=domains, WRITE_METADATA="YES")
    assert str(canary).encode() in redirect.read_bytes()
    with opened(redirect) as (dataset, _):
        assert not (dataset.read(out_shape=(1, 10, 9)) == 60000).any()
    server.shutdown()
    server.server_close()
    assert hits == []


@pytest.mark.parametrize("bands", [1, 3])
@pytest.mark.filterwarnings("ignore:Dataset has no geotransform")
def test_a_jp2_that_lies_nowhere_has_the_grid_of_its_pixels(tmp_path, bands):
    array = np.random.default_rng(2).integers(1, 250, (bands, 70, 90)).astype(np.uint8)
    rio = rasterio()
    profile = {"count": bands, "height": 70, "width": 90, "dtype": "uint8", "QUALITY": "100", "REVERSIBLE": "YES"}
    with rio.open(tmp_path / "a.jp2", "w", driver="JP2OpenJPEG", YCBCR420="NO", **profile) as file:
        file.write(array)
    image = read_images(tmp_path / "a.jp2")[0]
    assert image.geometry == RasterGeometry(None, (1, 0, 0, 0, 1, 0), None)
    np.testing.assert_array_equal(image.array, array)


@pytest.mark.parametrize(("space", "name"), [(18, "sYCC"), (14, "CIELab"), (12, "CMYK")])
def test_colours_that_are_no_red_green_and_blue_are_refused(tmp_path, space, name):
    """As in TIFF: the numbers of luminance and chrominance would pass for three bands."""
    path = write_jp2(tmp_path / "a.jp2", pixels(3, dtype=np.uint8))
    data = path.read_bytes()
    at = data.index(b"colr") + 4
    assert data[at : at + 6] == bytes([1, 0, 0, 0, 0, 0])
    path.write_bytes(data[: at + 3] + struct.pack(">I", space) + data[at + 7 :])
    assert refusal(path).reason is Reason.DTYPE_UNSUPPORTED and name in refusal(path).detail


def test_what_is_no_jp2_by_its_first_bytes_is_not_read_as_one(tmp_path):
    path = tmp_path / "a.jp2"
    path.write_bytes(b"\xff\x4f\xff\x51" + bytes(100))
    assert refusal(path).reason is Reason.MALFORMED
    with pytest.raises(ReadError, match="is no JP2 file by its first bytes"):
        read_codestream(path)
    with pytest.raises(ReadError, match="does not exist"):
        read_codestream(Path(tmp_path / "none.jp2"))


@pytest.mark.parametrize(
    ("compress", "codec"),
    [("none", ""), ("deflate", ""), ("lzw", ""), ("zstd", ""), ("jpeg", "JPEG"), ("lerc", "LERC"), ("webp", "WEBP")],
)
def test_a_geotiff_names_the_image_codec_that_its_blocks_need(tmp_path, compress, codec):
    array = pixels(3, dtype=np.uint8)
    path = write_geotiff(
        tmp_path / "a.tif", array, compress=compress, tiled=True, blockxsize=32, blockysize=16, interleave="pixel",
        photometric="RGB",
    )  # fmt: skip
    source = source_of(path)
    assert source.codec == codec and source.block == (16, 32)
    with RIO.open(path) as file:
        np.testing.assert_array_equal(read_images(path)[0].array, file.read())
