"""Pictures: PNG and JPEG give their stored values, and nothing that is cut, coloured or hostile slips through."""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow
from PIL import ImageFile, ImageOps, PngImagePlugin

from geomed_mae.errors import ReadError
from geomed_mae.image import PlaneGeometry, RasterGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import header_of, picture, read, read_images, survey
from geomed_mae.readers.picture import jpeg as picture_jpeg
from geomed_mae.readers.picture import structure as picture_structure
from geomed_mae.readers.picture.png import MAGIC
from geomed_mae.readers.reasons import NOT_BAD, Reason
from tests.make_data import write_geotiff
from tests.make_pictures import chunk, exif, rows_of, write_png

RNG = np.random.default_rng(5)
AUTO = resolve_modalities("auto")
XRAY = resolve_modalities("xray")


def noise(*shape: int, top: int = 256) -> np.ndarray:
    return RNG.integers(0, top, shape).astype(np.uint16 if top > 256 else np.uint8)


def smooth(rows: int = 60, columns: int = 90, bands: int = 3) -> np.ndarray:
    y, x = np.mgrid[:rows, :columns]
    waves = [127 + 100 * np.sin(y / (7 + n)) * np.cos(x / (11 - n)) for n in range(bands)]
    return np.stack(waves, axis=-1).astype(np.uint8)


def write_jpeg(path: Path, samples: np.ndarray, **options) -> Path:
    Pillow.fromarray(samples).save(path, "JPEG", **options)
    return path


def decoded(path: Path) -> np.ndarray:
    """The oracle: what Pillow makes of the whole file."""
    with Pillow.open(path) as image:
        return np.array(image)


def only(path: Path, modality: str = "auto"):
    (image,) = read_images(path, modality)
    return image


def refused(path: Path, modality: str = "auto") -> str:
    with pytest.raises(ReadError) as caught:
        read_images(path, modality)
    assert str(path.parent) not in str(caught.value)
    return caught.value.reason


# ------------------------------------------------------------------------------------------------- values, PNG


@pytest.mark.parametrize("interlaced", [False, True])
@pytest.mark.parametrize("colour", [0, 2, 3, 4, 6])
@pytest.mark.parametrize("depth", [1, 2, 4, 8, 16])
def test_every_colour_type_depth_and_interlacing_gives_the_stored_samples(tmp_path, colour, depth, interlaced):
    if depth not in {0: (1, 2, 4, 8, 16), 3: (1, 2, 4, 8)}.get(colour, (8, 16)):
        return
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    samples = noise(19, 29, channels, top=1 << depth)
    palette = noise(1 << depth, 3) if colour == 3 else None
    before = [(b"PLTE", palette.tobytes())] if colour == 3 else []
    path = write_png(tmp_path / "a.png", samples, colour, depth, interlaced=interlaced, before=before, split=101)
    image = only(path)
    truth = samples if palette is None else palette[samples[..., 0]]
    if depth < 8 and colour == 0:
        truth = truth.astype(int) * (255 // ((1 << depth) - 1))
    if colour in (4, 6):
        np.testing.assert_array_equal(image.valid[0], truth[..., -1] > 0)
        truth = np.where(truth[..., -1:] > 0, truth[..., :-1], 0)
    else:
        assert image.valid.all()
    np.testing.assert_array_equal(np.moveaxis(image.array, 0, -1), truth)
    assert image.array.dtype == np.float32


@pytest.mark.parametrize("depth", [8, 16])
def test_pngs_as_other_libraries_write_and_read_them_agree(tmp_path, depth):
    cv2 = pytest.importorskip("cv2", exc_type=ImportError)
    samples = noise(40, 50, 3, top=1 << depth)
    assert cv2.imwrite(str(tmp_path / "a.png"), samples)
    other = cv2.imread(str(tmp_path / "a.png"), cv2.IMREAD_UNCHANGED)[..., ::-1]
    np.testing.assert_array_equal(np.moveaxis(only(tmp_path / "a.png").array, 0, -1), other)


def test_sixteen_bit_grey_keeps_all_its_bits(tmp_path):
    samples = noise(30, 40, top=65536)
    Pillow.fromarray(samples).save(tmp_path / "a.png")
    (source,) = survey([tmp_path / "a.png"], XRAY).sources
    assert (source.dtype, source.codec, source.modality) == ("uint16", "", "xray")
    np.testing.assert_array_equal(read(source).array[0], samples)


def test_a_declared_transparent_colour_is_invalid(tmp_path):
    grey, colours = noise(9, 9), noise(9, 9, 3, top=4)
    write_png(tmp_path / "g.png", grey, 0, before=[(b"tRNS", struct.pack(">H", int(grey[4, 4])))])
    write_png(tmp_path / "c.png", colours, 2, before=[(b"tRNS", struct.pack(">3H", *map(int, colours[2, 3])))])
    np.testing.assert_array_equal(only(tmp_path / "g.png").valid[0], grey != grey[4, 4])
    image = only(tmp_path / "c.png")
    np.testing.assert_array_equal(image.valid[0], (colours != colours[2, 3]).any(axis=-1))
    assert not image.array[:, ~image.valid[0]].any()


def test_transparent_entries_of_a_palette_are_invalid(tmp_path):
    numbers, palette = noise(9, 9, top=4), noise(4, 3)
    before = [(b"PLTE", palette.tobytes()), (b"tRNS", bytes([255, 0]))]
    image = only(write_png(tmp_path / "a.png", numbers, 3, before=before))
    np.testing.assert_array_equal(image.valid[0], numbers != 1)


# ------------------------------------------------------------------------------------------------ values, JPEG


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0, "quality": 100}, {"optimize": True}])
@pytest.mark.parametrize("bands", [1, 3])
def test_a_jpeg_gives_what_pillow_decodes(tmp_path, bands, options):
    samples = smooth(53, 71)
    path = write_jpeg(tmp_path / "a.jpg", samples[..., 0] if bands == 1 else samples, **options)
    image = only(path)
    truth = decoded(path)
    np.testing.assert_array_equal(image.array, truth[None] if bands == 1 else np.moveaxis(truth, -1, 0))
    assert image.modality == ("unnamed-plane" if bands == 1 else "rgb")


def test_a_jpeg_with_restart_markers_and_a_stuffed_header_is_read(tmp_path):
    path = write_jpeg(
        tmp_path / "a.jpg", smooth(), restart_marker_rows=1, comment=b"a comment", icc_profile=bytes(100_000)
    )
    np.testing.assert_array_equal(np.moveaxis(only(path).array, 0, -1), decoded(path))


@pytest.mark.parametrize("orientation", range(9))
@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_exif_orientation_is_applied(tmp_path, kind, orientation):
    samples = smooth(24, 40)
    path = tmp_path / f"a.{kind}"
    block = exif(orientation, ">" if orientation % 2 else "<")
    if kind == "png":
        write_png(path, samples, 2, after=[(b"eXIf", block)])
    else:
        write_jpeg(path, samples, exif=b"Exif\0\0" + block)
    truth = np.asarray(ImageOps.exif_transpose(Pillow.open(path)))
    (source,) = survey([path], AUTO).sources
    image = read(source)
    np.testing.assert_array_equal(np.moveaxis(image.array, 0, -1), truth)
    assert source.shape == truth.shape[:2] == image.spatial_shape
    assert ("TURNED_UPRIGHT" in source.flags) == (orientation > 1)
    window = (slice(3, 17), slice(5, 11))
    np.testing.assert_array_equal(read(source, window).array, image.array[:, 3:17, 5:11])


@pytest.mark.parametrize("block", [b"", b"II*\0", exif(6)[:14], exif(77), b"MM\0*\xff\xff\xff\xff" + bytes(40)])
def test_a_damaged_exif_block_turns_nothing(block):
    assert picture_structure.exif_orientation(block) == 1


# ------------------------------------------------------------------------------------------ modality, geometry


def test_a_radiograph_saved_in_colour_is_one_channel_when_its_colours_are_equal(tmp_path):
    grey = noise(20, 30)
    Pillow.fromarray(grey).convert("RGBA").save(tmp_path / "a.png")
    write_jpeg(tmp_path / "b.jpg", np.repeat(smooth(20, 30, 1), 3, axis=2))
    image = only(tmp_path / "a.png", "xray")
    np.testing.assert_array_equal(image.array, grey[None].astype(np.float32))
    assert [channel.name for channel in image.channels] == ["XR"]
    assert image.geometry == PlaneGeometry(None) and image.spacing is None
    assert only(tmp_path / "b.jpg", "xray").array.shape == (1, 20, 30)


def test_colours_are_not_averaged_into_one_channel(tmp_path):
    samples = np.repeat(noise(20, 30, 1), 3, axis=2)
    samples[3, 4, 0] ^= 1
    Pillow.fromarray(samples).save(tmp_path / "a.png")
    with pytest.raises(ReadError, match=r"a\.png has colours in 1 pixels, for a modality of one channel") as caught:
        read_images(tmp_path / "a.png", "xray")
    assert caught.value.reason == "BAND_MISMATCH"


def test_what_is_transparent_may_have_any_colour(tmp_path):
    samples = np.dstack([*[noise(20, 30)] * 3, np.full((20, 30), 255, np.uint8)])
    samples[3, 4] = (1, 2, 3, 0)
    Pillow.fromarray(samples).save(tmp_path / "a.png")
    image = only(tmp_path / "a.png", "xray")
    assert not image.valid[0, 3, 4] and image.valid.sum() == 599


def test_auto_takes_colours_for_rgb_and_says_that_the_rest_is_unnamed(tmp_path):
    Pillow.fromarray(noise(9, 8, 3)).save(tmp_path / "a.png")
    Pillow.fromarray(noise(9, 8)).save(tmp_path / "b.png")
    write_png(tmp_path / "c.png", noise(9, 8, 3, top=65536), 2, 16)
    found = {source.files[0].stem: source for source in survey(sorted(tmp_path.iterdir()), AUTO).sources}
    assert {name: source.modality for name, source in found.items()} == {
        "a": "rgb", "b": "unnamed-plane", "c": "unnamed-plane"
    }  # fmt: skip
    assert found["a"].geometry == RasterGeometry(None, (1.0, 0.0, 0.0, 0.0, 1.0, 0.0), None)
    assert "MODALITY_UNNAMED" in found["b"].flags and not found["a"].flags
    assert [channel.name for channel in found["c"].channels] == ["band1", "band2", "band3"]


def test_a_grey_picture_is_no_rgb_and_sixteen_bits_are_not_eight(tmp_path):
    Pillow.fromarray(noise(9, 8)).save(tmp_path / "a.png")
    write_png(tmp_path / "b.png", noise(9, 8, 3, top=65536), 2, 16)
    with pytest.raises(ReadError, match=r"1 channel of uint8 fit none of the chosen modalities: rgb \(3\)"):
        read_images(tmp_path / "a.png", "rgb")
    with pytest.raises(ReadError, match=r"3 channels of uint16 fit none of the chosen modalities: rgb \(3\)"):
        read_images(tmp_path / "b.png", "rgb")


def test_a_picture_that_could_be_two_things_is_refused(tmp_path):
    Pillow.fromarray(noise(9, 8)).save(tmp_path / "a.png")
    with pytest.raises(ReadError, match="could be any of xray, mammography; name one of them"):
        read_images(tmp_path / "a.png", ["xray", "mammography"])


def test_pictures_beside_the_images_of_another_modality_are_not_bad(tmp_path):
    Pillow.fromarray(noise(9, 8, 3)).save(tmp_path / "quick.png")
    (refusal,) = survey([tmp_path / "quick.png"], resolve_modalities("sentinel2-l2a")).refusals
    assert refusal.reason is Reason.NON_IMAGE and refusal.reason in NOT_BAD
    assert "none of the chosen modalities (sentinel2-l2a) comes as one" in refusal.detail


def test_previews_and_renderings_are_no_images_of_their_own(tmp_path):
    for name in ("LC08_thumb_small.jpg", "preview.png", "scene.png"):
        Pillow.fromarray(noise(9, 8, 3)).save(tmp_path / name)
    write_geotiff(tmp_path / "scene.tif", noise(3, 9, 8))
    found = survey(sorted(tmp_path.iterdir()), AUTO)
    assert [source.reader for source in found.sources] == ["geotiff"]
    assert {refusal.reason for refusal in found.refusals} == {Reason.NON_IMAGE}
    assert "a .tif of the same name lies beside it" in found.refusals[-1].detail


def test_a_modality_of_ones_own_scales_and_masks(tmp_path):
    (tmp_path / "mine.yaml").write_text(
        "name: mine\ntitle: t\ngeometry: plane\nformats: [picture]\nunit: mm\nscale: 0.5\noffset: -3\nnodata: 0\n"
        "normalise: {method: image}\nchannels: [{name: depth}]\n"
    )
    samples = noise(9, 8, top=5)
    Pillow.fromarray(samples).save(tmp_path / "a.png")
    image = only(tmp_path / "a.png", str(tmp_path / "mine.yaml"))
    np.testing.assert_array_equal(image.valid[0], samples != 0)
    np.testing.assert_array_equal(image.array[0], np.where(samples != 0, samples * 0.5 - 3, 0))


@pytest.mark.parametrize("side", ["a.pgw", "a.wld", "a.png.aux.xml"])
def test_a_world_file_is_not_read_but_noted(tmp_path, side):
    Pillow.fromarray(noise(9, 8, 3)).save(tmp_path / "a.png", dpi=(300, 300))
    (tmp_path / side).write_text("1\n0\n0\n-1\n0\n0\n")
    (source,) = survey([tmp_path / "a.png"], AUTO).sources
    assert source.flags == ("SIDE_CAR_IGNORED",)
    assert source.geometry.crs is None and source.geometry.spacing is None


def test_of_an_animation_the_first_picture_is_read_and_noted(tmp_path):
    frames = [Pillow.fromarray(noise(9, 8, 3)) for _ in range(3)]
    frames[0].save(tmp_path / "a.png", save_all=True, append_images=frames[1:])
    (source,) = survey([tmp_path / "a.png"], AUTO).sources
    assert source.flags == ("FIRST_PAGE_ONLY",)
    np.testing.assert_array_equal(np.moveaxis(read(source).array, 0, -1), np.asarray(frames[0]))


def test_of_a_multi_picture_jpeg_the_first_one_is_read_and_noted(tmp_path):
    frames = [Pillow.fromarray(smooth() // (n + 1)) for n in range(2)]
    frames[0].save(tmp_path / "a.mpo", "MPO", save_all=True, append_images=frames[1:])
    path = (tmp_path / "a.mpo").rename(tmp_path / "a.jpg")
    (source,) = survey([path], AUTO).sources
    assert source.flags == ("FIRST_PAGE_ONLY",)
    np.testing.assert_array_equal(np.moveaxis(read(source).array, 0, -1), decoded(path))


def test_a_jpeg_names_its_codec(tmp_path):
    (source,) = survey([write_jpeg(tmp_path / "a.jpg", smooth())], AUTO).sources
    assert source.codec == "JPEG" and source.dtype == "uint8"


# ---------------------------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("kind", ["grey.png", "deep.png", "grey.jpg", "progressive.jpg", "restarts.jpg"])
def test_a_file_cut_anywhere_is_truncated(tmp_path, kind):
    whole = tmp_path / kind
    options = {"progressive.jpg": {"progressive": True}, "restarts.jpg": {"restart_marker_rows": 1}}.get(kind, {})
    if kind == "deep.png":
        write_png(whole, noise(40, 40, 3, top=65536), 2, 16, split=500)
    else:
        Pillow.fromarray(smooth() if "jpg" in kind else smooth()[..., 0]).save(whole, **options)
    content = whole.read_bytes()
    for length in sorted({*np.linspace(20, len(content) - 1, 60).astype(int)}):
        cut = tmp_path / f"cut{whole.suffix}"
        cut.write_bytes(content[:length])
        assert refused(cut) in ("TRUNCATED", "MALFORMED"), length
        cut.write_bytes(content[:length] + bytes(len(content) - length))
        assert refused(cut) in ("TRUNCATED", "MALFORMED"), length


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}, {"optimize": True}])
def test_a_jpeg_cut_and_closed_again_does_not_come_back_half_grey(tmp_path, options):
    content = write_jpeg(tmp_path / "whole.jpg", smooth(200, 300), quality=90, **options).read_bytes()
    start = content.index(b"\xff\xda")
    for length in sorted({*np.linspace(start + 40, len(content) - 6, 40).astype(int)}):
        (tmp_path / "cut.jpg").write_bytes(content[:length].rstrip(b"\xff") + b"\xff\xd9")
        assert refused(tmp_path / "cut.jpg") in ("TRUNCATED", "MALFORMED"), length


def test_a_switch_that_lets_pillow_accept_cut_files_changes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    content = write_jpeg(tmp_path / "whole.jpg", smooth(200, 300)).read_bytes()
    for end in (b"", b"\xff\xd9"):
        (tmp_path / "cut.jpg").write_bytes(content[: len(content) // 2] + end)
        with pytest.raises(ReadError, match=r"cut\.jpg is cut"):
            picture_jpeg.pixels(tmp_path / "cut.jpg")


def test_rows_that_the_compressed_data_does_not_reach_are_not_black(tmp_path):
    samples = noise(20, 20)
    raw = rows_of(samples[..., None][:10], 8, (0,), False)
    path = write_png(tmp_path / "a.png", samples, 0, raw=raw)
    assert (decoded(path)[10:] == 0).all(), "Pillow has changed: the guard may be dropped"
    assert refused(path) == "TRUNCATED"


def test_a_flipped_bit_in_a_png_is_found_wherever_it_is(tmp_path):
    write_png(tmp_path / "a.png", noise(20, 20), 0, before=[(b"tRNS", b"\0\7")])
    content = (tmp_path / "a.png").read_bytes()
    for at in RNG.integers(8, len(content) - 12, 60):
        damaged = bytearray(content)
        damaged[at] ^= 1 << int(RNG.integers(8))
        (tmp_path / "b.png").write_bytes(damaged)
        assert refused(tmp_path / "b.png") in ("MALFORMED", "TRUNCATED", "DECODE_FAILED", "TOO_LARGE"), at


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<html>not found</html>", "MALFORMED"),
        (MAGIC, "TRUNCATED"),
        (MAGIC + chunk(b"CgBI", bytes(4)), "MALFORMED"),
        (MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 3, 0, 0, 0, 0)), "MALFORMED"),
        (MAGIC + chunk(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 8, 0, 0, 0, 0)) + chunk(b"IEND", b""), "TRUNCATED"),
        (b"\xff\xd8\xff\xd9", "TRUNCATED"),
        (b"\xff\xd8\xff\xe0\xff\xff", "TRUNCATED"),
        (b"\xff\xd8\xff\xda\x00\x08\x01\x01\x00\x00\x3f\x00\xff\xd9", "MALFORMED"),
    ],
)
def test_what_only_looks_like_a_picture_has_a_reason(tmp_path, content, reason):
    (tmp_path / "a.png").write_bytes(content)
    assert refused(tmp_path / "a.png") == reason


def test_jpegs_that_need_another_decoder_are_unsupported_not_broken(tmp_path):
    Pillow.fromarray(noise(20, 30, 4), "CMYK").save(tmp_path / "cmyk.jpg")
    assert refused(tmp_path / "cmyk.jpg") == "DTYPE_UNSUPPORTED"
    content = bytearray(write_jpeg(tmp_path / "a.jpg", smooth()).read_bytes())
    at = content.index(b"\xff\xc0")
    for marker, bits, reason in (
        (0xC3, 8, "CODEC_MISSING"),
        (0xC9, 8, "CODEC_MISSING"),
        (0xC1, 12, "DTYPE_UNSUPPORTED"),
    ):
        content[at + 1], content[at + 4] = marker, bits
        (tmp_path / "a.jpg").write_bytes(content)
        assert refused(tmp_path / "a.jpg") == reason


# ----------------------------------------------------------------------------------------------------- hostile


def test_a_declared_giant_is_refused_from_its_header(tmp_path):
    write_png(tmp_path / "a.png", noise(4, 4), 0, size=(1 << 31, 1 << 31))
    content = bytearray(write_jpeg(tmp_path / "b.jpg", smooth()).read_bytes())
    at = content.index(b"\xff\xc0")
    content[at + 5 : at + 9] = b"\xff\xff\xff\xff"
    (tmp_path / "b.jpg").write_bytes(content)
    for name in ("a.png", "b.jpg"):
        assert header_of(tmp_path / name).reason is Reason.TOO_LARGE


def test_a_page_of_nothing_that_fills_memory_is_refused(tmp_path):
    raw = bytes((16_000 + 1) * 16_000)
    path = write_png(tmp_path / "a.png", noise(1, 1), 0, raw=raw, size=(16_000, 16_000))
    assert path.stat().st_size < 300_000
    assert header_of(path).reason is Reason.RATIO


def test_more_data_than_rows_is_never_inflated(tmp_path):
    samples = noise(8, 8)
    raw = rows_of(samples[..., None], 8, (0,), False) + bytes(1 << 24)
    np.testing.assert_array_equal(only(write_png(tmp_path / "a.png", samples, 0, raw=raw)).array[0], samples)


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt", b"tEXt"])
def test_text_and_profiles_never_reach_pillow(tmp_path, monkeypatch, kind):
    bomb = b"Jane^Doe\0\0" + zlib.compress(bytes(200 << 20))
    samples = noise(8, 8)
    path = write_png(tmp_path / "a.png", samples, 0, before=[(kind, bomb)], after=[(kind, bomb)])
    seen = []
    original = PngImagePlugin.PngImageFile.__init__

    def watched(self, fp=None, filename=None):
        seen.append(fp.getvalue())
        original(self, fp, filename)

    monkeypatch.setattr(PngImagePlugin.PngImageFile, "__init__", watched)
    np.testing.assert_array_equal(only(path).array[0], samples)
    assert len(seen) == 1 and kind not in seen[0] and b"Jane" not in seen[0]


def test_comments_and_profiles_of_a_jpeg_never_reach_pillow(tmp_path, monkeypatch):
    from PIL.JpegImagePlugin import JpegImageFile

    path = write_jpeg(
        tmp_path / "a.jpg", smooth(), comment=b"Jane^Doe", icc_profile=b"Jane^Doe", exif=b"Exif\0\0Jane^Doe"
    )
    seen = []
    original = JpegImageFile.__init__
    monkeypatch.setattr(
        JpegImageFile, "__init__", lambda self, fp=None: (seen.append(fp.getvalue()), original(self, fp))[1]
    )
    picture_jpeg.pixels(path)
    assert seen and not any(b"Jane" in content for content in seen)


def test_a_jpeg_of_thousands_of_scans_is_refused(tmp_path):
    content = write_jpeg(tmp_path / "a.jpg", smooth(), progressive=True).read_bytes()
    at = content.rindex(b"\xff\xda")
    (tmp_path / "b.jpg").write_bytes(content[:-2] + content[at:-2] * 1000 + b"\xff\xd9")
    assert refused(tmp_path / "b.jpg") == "MALFORMED"


def test_large_pictures_raise_no_warning_of_pillows(tmp_path, monkeypatch):
    monkeypatch.setattr(Pillow, "MAX_IMAGE_PIXELS", 10)
    Pillow.fromarray(noise(30, 30, 3)).save(tmp_path / "a.png")
    write_jpeg(tmp_path / "b.jpg", smooth())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(read_images(tmp_path)) == 2


def test_a_picture_that_changed_since_its_header_was_read_is_refused(tmp_path):
    Pillow.fromarray(noise(9, 8, 3)).save(tmp_path / "a.png")
    (source,) = survey([tmp_path / "a.png"], AUTO).sources
    Pillow.fromarray(noise(8, 9, 3)).save(tmp_path / "a.png")
    with pytest.raises(ReadError, match=r"a\.png has changed since its header was read"):
        read(source)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ReadError) as caught:
        read(source)
    assert caught.value.reason == "VANISHED"


def test_only_the_two_formats_are_taken_whatever_the_name(tmp_path):
    buffer = io.BytesIO()
    Pillow.fromarray(noise(9, 8)).save(buffer, "BMP")
    (tmp_path / "a.png").write_bytes(buffer.getvalue())
    assert refused(tmp_path / "a.png") == "MALFORMED"
    assert not picture.sniff(tmp_path / "a.png", buffer.getvalue()[:512])
    Pillow.fromarray(noise(9, 8)).save(tmp_path / "b.jpg", "PNG")
    assert only(tmp_path / "b.jpg").spatial_shape == (9, 8)


@pytest.mark.parametrize(
    ("name", "reason"), [("a.tif", "NOT_TIFF"), ("a.TIFF", "NOT_TIFF"), ("a.jp2", "MALFORMED"), ("a.dcm", "NOT_DICOM")]
)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_a_picture_under_the_name_of_another_format_breaks_that_promise(tmp_path, name, reason, kind):
    Pillow.fromarray(smooth()).save(tmp_path / name, kind)
    assert refused(tmp_path / name) == reason
    assert survey([tmp_path / name], XRAY).refusals[0].reason.name == reason


def test_of_a_transparent_colour_the_low_bits_count(tmp_path):
    """Writers store 255 for white in pictures of one bit; libpng takes the lowest."""
    samples = noise(9, 14, 1, top=2)
    path = write_png(tmp_path / "a.png", samples, 0, 1, before=[(b"tRNS", b"\0\xff")])
    image = only(path)
    np.testing.assert_array_equal(image.valid[0], samples[..., 0] == 0)
    with Pillow.open(path) as oracle:
        np.testing.assert_array_equal(image.valid[0], np.array(oracle.convert("RGBA"))[..., 3] > 0)
