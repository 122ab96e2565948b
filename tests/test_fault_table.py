"""Every fault of an archive that this package promises to survive, met the way a user meets it: by a scan.

Faults 1 to 26 are of GeoTIFF files, 27 to 50 of DICOM files; 51 to 59, of training, are in `OF_TRAINING`. All that lie
in a file are in one archive, each in a folder of its own, which is scanned once: `archive` says what the ledger must
say of each. What a scan of plain files cannot show (a second scan, another command, a fault of the storage) has a test
here or one elsewhere, see `ELSEWHERE`.
`MEASURED` are the faults that must be refused fast and in little memory.
"""

from __future__ import annotations

import ast
import http.server
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from geomed_mae.archives.build import scan_archive
from geomed_mae.archives.identity import keyed
from geomed_mae.archives.index import Index
from geomed_mae.errors import ReadError, SecurityError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import read, survey
from geomed_mae.readers.reasons import NOT_BAD, Reason
from geomed_mae.readers.regular import stored_path
from geomed_mae.scan import scan
from tests import make_data, make_dicom
from tests.make_data import plain_tags, write_geotiff, write_raw_tiff
from tests.make_dicom import dataset, patch, save, uid, write_series, write_slice

ROOT = Path(__file__).resolve().parents[1]
RNG = np.random.default_rng(20)
IMPLICIT, DEFLATED = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1.99"
RLE, JPEG, JPEG_LS, JPEG_2000 = (f"1.2.840.10008.1.2.{last}" for last in ("5", "4.50", "4.80", "4.90"))
CANARY = 211
CAPTURE = "1.2.840.10008.5.1.4.1.1.7"

ELSEWHERE = {
    5: ["tests/test_scan.py::test_verify_finds_pixels_that_no_longer_decode"],
    7: [
        "tests/samples/test_buckets.py::test_images_without_valid_pixels_are_never_drawn",
        "tests/samples/test_loader.py::test_crops_with_too_few_valid_pixels_are_drawn_again",
    ],
    9: [
        "tests/readers/geotiff/test_geotiff.py::test_nodata_that_cannot_occur_needs_a_modality_that_knows_better",
        "tests/readers/geotiff/test_geotiff.py::test_the_modalitys_nodata_counts_where_the_file_declares_none",
    ],
    15: ["tests/readers/geotiff/test_geotiff.py::test_an_overview_redirect_in_a_tag_is_never_followed"],
    18: ["tests/readers/geotiff/test_geotiff.py::test_the_native_grid_is_kept"],
    19: [
        "tests/archives/test_split_file.py::test_a_block_split_of_scenes_without_a_place_exits_with_6",
        "tests/archives/test_splits.py::test_the_antimeridian_and_the_poles_are_no_edges",
        "tests/readers/geotiff/test_geotiff.py::test_a_footprint_across_the_antimeridian_runs_on_past_180",
    ],
    20: [
        "tests/readers/geotiff/test_geotiff.py::test_each_band_has_its_own_scale",
        "tests/readers/test_scenes.py::test_numbers_that_cannot_have_the_modalitys_unit_are_refused",
    ],
    21: [
        "tests/readers/test_scenes.py::test_products_with_and_without_offset_come_out_the_same",
        "tests/readers/test_scenes.py::test_without_a_baseline_the_pixels_decide_or_the_scene_is_refused",
        "tests/readers/test_scenes.py::test_an_offset_that_was_removed_before_is_noticed",
    ],
    22: [
        "tests/readers/geotiff/test_geotiff.py::test_described_bands_are_reordered_by_name_not_by_position",
        "tests/readers/geotiff/test_geotiff.py::test_a_wrong_number_or_name_of_bands_is_a_mismatch_that_says_which",
    ],
    24: [
        "tests/readers/test_regular.py::test_an_empty_file_and_a_forbidden_file_have_their_own_reasons",
        "tests/readers/geotiff/test_geotiff.py::test_a_forbidden_file_has_its_reason",
    ],
    25: [
        "tests/test_scan.py::test_a_file_that_vanishes_between_scan_and_read_says_so",
        "tests/test_scan.py::test_a_read_that_fails_once_is_done_again",
        "tests/readers/test_regular.py::test_a_storage_that_fails_for_a_moment_is_asked_again",
    ],
    36: [
        "tests/readers/dicom/test_pixels.py::test_a_codec_that_is_not_installed_is_named_with_the_way_out",
        "tests/readers/test_contract.py::test_reasons_fall_into_skipped_and_unsupported",
    ],
    37: [
        "tests/test_scan.py::test_a_codec_that_crashes_costs_its_image_alone",
        "tests/test_scan.py::test_a_file_that_kills_the_reader_does_not_take_others_with_it",
    ],
    40: ["tests/readers/dicom/test_dicom.py::test_fault_40_a_missing_slice_splits_and_strays_go_to_the_ledger"],
    41: ["tests/readers/dicom/test_dicom.py::test_order_comes_from_positions_not_from_names_or_numbers"],
    42: ["tests/readers/dicom/test_series.py::test_fault_42_each_slice_of_a_pet_is_rescaled_by_its_own_file"],
    44: [
        "tests/readers/dicom/test_pixels.py::test_padding_written_as_unsigned_matches_signed_pixels",
        "tests/readers/dicom/test_pixels.py::test_a_padding_range_is_invalid_from_end_to_end",
    ],
    45: [
        "tests/readers/dicom/test_pixels.py::test_monochrome1_projections_are_turned_round_within_their_stored_bits",
        "tests/readers/dicom/test_pixels.py::test_big_endian_equals_little_endian",
        "tests/readers/dicom/test_pixels.py::test_junk_above_the_stored_bits_is_ignored",
    ],
    46: ["tests/readers/dicom/test_dicom.py::test_fault_46_gantry_tilt_stays_in_the_affine"],
    48: ["tests/readers/dicom/test_series.py::test_fault_48_a_dicomdir_that_points_out_of_the_archive_is_not_followed"],
    49: ["tests/readers/dicom/test_dicom.py::test_fault_49_captures_and_ultrasound_are_refused_unless_named"],
    50: [
        "tests/test_canary.py::test_no_identifier_reaches_a_public_output",
        "tests/readers/dicom/test_dicom.py::test_fault_50_no_identifier_reaches_a_reason_a_warning_or_a_log",
    ],
    51: [
        "tests/training/test_kills.py::test_a_run_killed_five_times_is_the_run_that_was_not",
        "tests/training/test_kills.py::test_a_run_killed_twenty_five_times_is_the_run_that_was_not",
    ],
    59: [
        "tests/samples/test_store.py::test_every_changed_byte_of_an_entry_is_found",
        "tests/samples/test_store.py::test_changed_pixels_and_other_settings_have_other_entries",
        "tests/samples/test_store.py::test_files_that_change_after_the_scan_are_not_cached_under_their_old_name",
        "tests/samples/test_store.py::test_two_writers_of_the_same_entries_leave_whole_ones",
        "tests/samples/test_store.py::test_a_writer_that_is_killed_leaves_whole_entries_or_none",
    ],
    60: [
        "tests/test_leakage.py::test_what_was_pretrained_on_is_not_scored_unless_that_is_said",
        "tests/test_leakage.py::test_what_was_trained_on_is_never_scored",
        "tests/test_leakage.py::test_ground_that_was_seen_is_not_scored",
    ],
}
"""Tests of other modules that show (the rest of) a fault."""

OF_TRAINING = [ROOT / "tests/training/test_faults.py", ROOT / "tests/training/test_kills.py"]
"""Where the faults of training and of what it stores are, 51 to 59."""


# ---------------------------------------------------------------------------------------------- the files of a fault


def pixels(*shape: int, dtype: str = "uint16") -> np.ndarray:
    return RNG.integers(1, 250, shape).astype(dtype)


def text(content: bytes | str) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


def tags(values: dict, tail: int = 256) -> Callable[[Path], object]:
    return lambda path: write_raw_tiff(path, values, tail=bytes(tail))


def tiff(array: np.ndarray, **how: object) -> Callable[[Path], object]:
    # Under a plain name first: rasterio writes to no name that is not text.
    return lambda path: write_geotiff(path.with_name("plain.tif"), array, **how).rename(path)


def cut(share: float, **how: object) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        whole = write_geotiff(path, RNG.normal(size=(2, 128, 128)).astype(np.float32), **how).read_bytes()
        path.write_bytes(whole[: int(share * len(whole))])

    return write


def blank(rows: int) -> Callable[[Path], object]:
    """A scene of which only the first rows were ever written."""

    def write(path: Path) -> None:
        rio = make_data.rasterio()
        grid = {"crs": "EPSG:32611", "transform": rio.Affine(*make_data.UTM_10M), "dtype": "uint16", "count": 1}
        layout = {"width": 64, "height": 64, "tiled": True, "blockxsize": 16, "blockysize": 16, "SPARSE_OK": True}
        with rio.open(path, "w", driver="GTiff", **grid, **layout) as file:
            if rows:
                file.write(pixels(rows, 64), 1, window=((0, rows), (0, 64)))

    return write


def holes(path: Path) -> None:
    array = RNG.normal(size=(1, 40, 40)).astype(np.float32)
    array[0, :3], array[0, 5], array[0, 6] = np.nan, np.inf, -np.inf
    write_geotiff(path, array, nodata=-9999.0)


def bomb(path: Path) -> None:
    """One strip of 800 MB in 820 KB: the parts of a deflate stream that are all alike are compressed once."""
    packer = zlib.compressobj(9)
    head = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    part = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    data = head + part * 762
    strip = {"t259": (3, 8), "t273": (4, 8), "t279": (4, len(data))}
    write_raw_tiff(path, plain_tags(32000, 25000, **strip), tail=data)


def special(kind: str) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        if kind == "fifo":
            os.mkfifo(path)
        elif kind == "socket":
            where, here = Path.cwd(), socket.socket(socket.AF_UNIX)
            os.chdir(path.parent)  # a socket's address has a hundred characters
            here.bind(path.name)
            here.close()
            os.chdir(where)
        else:
            path.symlink_to({"zero": "/dev/zero", "loop": path.name, "outside": "/etc/hostname"}[kind])

    return write


def redirected(place: dict[str, str]) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        clean = pixels(1, 40, 50, dtype="uint8") % 200 + 1
        write_geotiff(path, clean, namespaces={"OVERVIEWS": {"OVERVIEW_FILE": place["url"]}})
        path.with_name(path.name + ".ovr").write_text(vrt(place["url"]))
        path.with_name(path.name + ".aux.xml").write_text(
            f"<PAMDataset><Metadata domain='OVERVIEWS'><MDI key='OVERVIEW_FILE'>{place['canary']}</MDI></Metadata>"
            "<SRS>EPSG:3857</SRS><GeoTransform>1,2,3,4,5,6</GeoTransform></PAMDataset>"
        )

    return write


def vrt(target: str) -> str:
    return (
        '<VRTDataset rasterXSize="50" rasterYSize="40"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        f'<SourceFilename relativeToVRT="0">{target}</SourceFilename><SourceBand>1</SourceBand>'
        "</SimpleSource></VRTRasterBand></VRTDataset>"
    )


def billion_laughs(path: Path) -> None:
    write_geotiff(path, pixels(1, 40, 50))
    lines = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 10))
    path.with_name(path.name + ".aux.xml").write_text(
        f'<!DOCTYPE x [<!ENTITY l0 "ha">{lines}]><PAMDataset><PAMRasterBand band="1"><Description>&l9;</Description>'
        "<NoDataValue>7</NoDataValue><Scale>3</Scale></PAMRasterBand></PAMDataset>"
    )


def slice_(**how: object) -> Callable[[Path], object]:
    return lambda path: write_slice(path, pixels(24, 20, dtype="int16"), **how)


def plain(array: np.ndarray | None = None, *, syntax: str = "1.2.840.10008.1.2.1", **how: object) -> Callable:
    def write(path: Path) -> None:
        save(dataset(pixels(24, 20, dtype="int16") if array is None else array, **how), path, syntax=syntax)

    return write


def patched(old: bytes, new: bytes, **how: object) -> Callable[[Path], object]:
    return lambda path: patch(write_slice(path, pixels(24, 20, dtype="int16"), **how), old, new)


def shortened(by: int) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        path.write_bytes(write_slice(path, pixels(24, 20, dtype="int16")).read_bytes()[:-by])

    return write


def encapsulated(syntax: str, frame: bytes, count: int = 1, **how: object) -> Callable[[Path], object]:
    def write(path: Path) -> None:
        from pydicom.encaps import encapsulate

        made = dataset(pixels(24, 20, dtype="uint8"), **how)
        made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 0], list(make_dicom.AXIAL)
        made.PixelSpacing = [1, 1]
        made.PixelData = encapsulate([frame] * count)
        made["PixelData"].VR, made["PixelData"].is_undefined_length = "OB", True
        save(made, path, syntax=syntax)

    return write


def rle(data: bytes) -> bytes:
    return struct.pack("<16I", 1, 64, *[0] * 14) + data


def jpeg(middle: bytes) -> bytes:
    """A baseline stream of the right size whose entropy-coded data makes no sense."""
    from io import BytesIO

    from PIL import Image

    out = BytesIO()
    Image.fromarray(pixels(24, 20, dtype="uint8")).save(out, "JPEG")
    whole = out.getvalue()
    start = whole.index(b"\xff\xda") + 10
    return whole[:start] + middle + b"\xff\xd9"


def png(path: Path) -> None:
    from PIL import Image

    Image.fromarray(pixels(24, 24, 3, dtype="uint8")).save(path, "PNG")


def jpeg_2000(path: Path) -> None:
    made = dataset(pixels(64, 64, dtype="uint8"), PixelSpacing=[1, 1], SeriesInstanceUID="1.2.37.3")
    made.ImagePositionPatient, made.ImageOrientationPatient = [0, 0, 0], list(make_dicom.AXIAL)
    save(made, path)  # sets the file meta that compress needs
    made.compress(JPEG_2000, encoding_plugin="pylibjpeg", generate_instance_uid=False)
    save(made, path, syntax=JPEG_2000)
    content = bytearray(path.read_bytes())
    start = content.index(b"\xff\x93", content.index(b"\xff\x4f\xff\x51")) + 2
    content[start:-20] = b"\xff" * (len(content) - start - 20)
    path.write_bytes(content)


def rows_as_long(path: Path) -> None:
    """Rows with VR UL and a number that 16 bits would cut down to a harmless one."""
    made = write_slice(path, pixels(24, 20, dtype="int16"))
    old = b"\x28\x00\x10\x00US\x02\x00" + struct.pack("<H", 24)
    content = made.read_bytes()
    assert content.count(old) == 1
    new = b"\x28\x00\x10\x00UL\x04\x00" + struct.pack("<L", (1 << 16) * 40000 + 24)
    path.write_bytes(content.replace(old, new))


def deflate_bomb(path: Path) -> None:
    """400 MB of zeros in 400 KB behind the file meta of a deflated data set."""
    save(dataset(pixels(4, 4, dtype="int16")), path, syntax=DEFLATED)
    content = path.read_bytes()
    start = 144 + struct.unpack_from("<I", content, 140)[0]
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    zeros = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    path.write_bytes(content[:start] + zeros * 400 + packer.flush())


def nested(path: Path) -> None:
    content = write_slice(path, pixels(4, 4, dtype="int16")).read_bytes()
    start = content.index(b"\x20\x00\x0d\x00UI")
    deep = (b"\x08\x00\x40\x11SQ\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff") * 5000
    path.write_bytes(content[:start] + deep + content[start:])


def dicomdir(path: Path) -> None:
    from pydicom.dataset import Dataset
    from pydicom.sequence import Sequence

    entry, made = Dataset(), Dataset()
    entry.DirectoryRecordType = "IMAGE"
    made.SOPClassUID, made.SOPInstanceUID = "1.2.840.10008.1.3.10", uid("directory", path)
    made.DirectoryRecordSequence = Sequence([entry])
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        entry.ReferencedFileID = ["..", "..", "canary.tif"]
    save(made, path)


NON_IMAGES = {"SR": "88.11", "RTSTRUCT": "481.3", "DOC": "104.1", "SEG": "66.4", "ECG": "9.1.1", "PR": "11.1"}
NOT_TIFF, TRUNCATED, TOO_LARGE = Reason.NOT_TIFF, Reason.TRUNCATED, Reason.TOO_LARGE
USED = "used"


def archive(place: dict[str, str]) -> list[tuple[int, str, Callable[[Path], object], object]]:
    """Return (fault, file name, what writes it, Reason or USED or a flag of its image) of every file."""
    layouts = {"strip": {}, "tile": {"tiled": True, "blockxsize": 64, "blockysize": 64}}
    made = [
        (1, "empty.tif", text(b""), Reason.EMPTY),
        (1, "four.tif", text(b"II*\0"), TRUNCATED),
        (1, "three.tif", text(b"II*"), NOT_TIFF),
        (1, "picture.tif", png, NOT_TIFF),
        (1, "page.tif", text("<html><body>404</body></html>"), NOT_TIFF),
        (2, "fifo.tif", special("fifo"), Reason.NOT_REGULAR),
        (2, "socket.tif", special("socket"), Reason.NOT_REGULAR),
        (2, "zero.tif", special("zero"), Reason.NOT_REGULAR),
        (3, "loop.tif", special("loop"), Reason.LINK_LOOP),
        (3, "outside.tif", special("outside"), Reason.OUTSIDE_ROOT),
        *(
            (4, f"{name}-{method}-{share}.tif", cut(share, compress=method, **how), TRUNCATED)
            for name, how in layouts.items()
            for method in ("none", "deflate", "lzw", "zstd")
            for share in (0.2, 0.5, 0.8, 0.99)
        ),
        (6, "some.tif", blank(32), USED),
        (6, "none.tif", blank(0), Reason.ALL_INVALID),
        (7, "zero.tif", tiff(np.zeros((1, 40, 40), np.uint16)), Reason.NO_INFORMATION),
        (7, "same.tif", tiff(np.full((2, 40, 40), 9, np.uint16)), Reason.NO_INFORMATION),
        (7, "nodata.tif", tiff(np.full((1, 40, 40), 9, np.uint16), nodata=9), Reason.ALL_INVALID),
        (8, "holes.tif", holes, USED),
        (9, "beyond.tif", text_nodata("-9999"), Reason.NODATA_INVALID),
        (9, "nan.tif", text_nodata("nan"), Reason.NODATA_INVALID),
        (10, "gigantic.tif", tags(plain_tags(10**6, 10**6)), TOO_LARGE),
        (11, "bands.tif", tags(plain_tags(16, 16, bands=65529)), Reason.TOO_MANY_BANDS),
        (12, "strip.tif", tags(plain_tags(30000, 30000, t259=(3, 8))), Reason.BLOCK_TOO_LARGE),
        (13, "bomb.tif", bomb, {Reason.BLOCK_TOO_LARGE, Reason.RATIO}),
        (14, "vrt.tif", text(vrt(place["canary"])), NOT_TIFF),
        (14, "mrf.tif", text(f"<MRF_META><CachedSource><Source>{place['url']}</Source></CachedSource>"), NOT_TIFF),
        (15, "redirected.tif", redirected(place), "SIDE_CAR_IGNORED"),
        (15, "redirected.tif.ovr", None, Reason.UNKNOWN_FORMAT),
        (15, "redirected.tif.aux.xml", None, Reason.UNKNOWN_FORMAT),
        (16, "laughs.tif", billion_laughs, "SIDE_CAR_IGNORED"),
        (16, "laughs.tif.aux.xml", None, Reason.UNKNOWN_FORMAT),
        (18, "turned.tif", tiff(pixels(1, 40, 40), transform=(8.0, 6.0, 5e5, 6.0, -8.0, 4e6)), "ROTATED"),
        (18, "south.tif", tiff(pixels(1, 40, 40), transform=(10.0, 0.0, 5e5, 0.0, 10.0, 4e6)), USED),
        (18, "flat.tif", tiff(pixels(1, 40, 40), transform=(10.0, 10.0, 5e5, 10.0, 10.0, 4e6)), Reason.BAD_TRANSFORM),
        (19, "nowhere.tif", tiff(pixels(1, 40, 40), crs=None), USED),
        (19, "degrees.tif", tiff(pixels(1, 40, 40), crs="EPSG:4326", transform=(0.1, 0, 178.0, 0, -0.1, 60.0)), USED),
        *((20, f"{kind}.tif", tiff(pixels(1, 40, 40, dtype=kind)), USED) for kind in ("uint8", "int16", "float32")),
        (20, "scaled.tif", tiff(pixels(1, 40, 40), scales=[0.5], offsets=[-7.0]), USED),
        (23, "complex.tif", tiff(pixels(1, 40, 40).astype(np.complex64)), Reason.DTYPE_UNSUPPORTED),
        (23, "bit.tif", tiff(pixels(1, 40, 40, dtype="uint8") % 2, nbits=1), Reason.DTYPE_UNSUPPORTED),
        (23, "ycbcr.tif", tiff(pixels(3, 48, 48, dtype="uint8"), photometric="YCBCR", compress="jpeg"),
         Reason.DTYPE_UNSUPPORTED),
        (23, "palette.tif", tiff(pixels(1, 40, 40, dtype="uint8"), photometric="palette", colormap={1: (9, 9, 9, 255)}),
         Reason.DTYPE_UNSUPPORTED),
        (26, "new\nline.tif", tiff(pixels(1, 40, 40)), USED),
        (26, "\x1b[31mred.tif", tiff(pixels(1, 40, 41)), USED),
        (26, "\udcff\udcfe.tif", tiff(pixels(1, 40, 42)), USED),
        (26, "n" * 251 + ".tif", tiff(pixels(1, 40, 43)), USED),
        (26, "bad\n\x1b[31m\udcff.tif", text("text"), NOT_TIFF),
        (27, "empty.dcm", text(b""), Reason.EMPTY),
        (27, "noise.dcm", text(RNG.bytes(600)), Reason.NOT_DICOM),
        (27, "words.dcm", text("hello " * 100), Reason.NOT_DICOM),
        (27, "packed.dcm", text(b"PK\x03\x04" + bytes(300)), Reason.NOT_DICOM),
        (28, "bare", lambda path: bare(path), "NO_PREAMBLE"),
        (28, "rowless.dcm", lambda path: bare(path, Rows=None), Reason.NOT_DICOM),
        *(
            (29, modality, plain(Modality=modality, SOPClassUID=f"1.2.840.10008.5.1.4.1.1.{last}"), Reason.NON_IMAGE)
            for modality, last in NON_IMAGES.items()
        ),
        *(
            (30, f"{keyword}.dcm", slice_(**{keyword: None}), Reason.MISSING_TAG)
            for keyword in ("Rows", "Columns", "BitsAllocated", "BitsStored", "HighBit", "PixelRepresentation",
                            "PhotometricInterpretation")
        ),
        (31, "cut.dcm", shortened(24 * 20 * 2 + 40), Reason.NO_PIXEL_DATA),
        (32, "short.dcm", shortened(30), TRUNCATED),
        (32, "liar.dcm", patched(b"\xe0\x7f\x10\0OW\0\0" + struct.pack("<L", 960),
                                 b"\xe0\x7f\x10\0OW\0\0" + struct.pack("<L", 4_000_000_000)), Reason.LENGTH_MISMATCH),
        (33, "frames.dcm", encapsulated(RLE, bytes(8), 20, Rows=65535, Columns=65535, NumberOfFrames=20), TOO_LARGE),
        (33, "long.dcm", rows_as_long, {TOO_LARGE, Reason.MISSING_TAG, Reason.MALFORMED}),
        (34, "bomb.dcm", deflate_bomb, Reason.DEFLATE_LIMIT),
        (35, "deep.dcm", nested, Reason.MALFORMED),
        (36, "private.dcm", private_syntax, Reason.CODEC_MISSING),
        (37, "rle.dcm", encapsulated(RLE, rle(b"\x7f" + bytes(9)), SeriesInstanceUID="1.2.37.1"), Reason.DECODE_FAILED),
        (37, "jpeg.dcm", encapsulated(JPEG, jpeg(b"\x12\x34"), SeriesInstanceUID="1.2.37.2"), TRUNCATED),
        (37, "jpeg2000.dcm", jpeg_2000, Reason.DECODE_FAILED),
        (43, "slope.dcm", patched(b"1.375", b"1e400", RescaleSlope="1.375"), Reason.BAD_RESCALE),
        (43, "comma.dcm", patched(b"1.375", b"1,5  ", RescaleSlope="1.375"), Reason.BAD_RESCALE),
        (46, "spacing.dcm", slice_(spacing=(0, 0)), Reason.BAD_GEOMETRY),
        (46, "place.dcm", slice_(position=None), Reason.BAD_GEOMETRY),
        (47, "none.dcm", patched(b"1234", b"0   ", NumberOfFrames="1234"), Reason.BAD_FRAMES),
        (47, "word.dcm", patched(b"1234", b"two ", NumberOfFrames="1234"), Reason.BAD_FRAMES),
        (47, "groupless.dcm", plain(pixels(4, 8, 8, dtype="int16"), NumberOfFrames=4), Reason.BAD_FRAMES),
        (48, "DICOMDIR", dicomdir, Reason.NON_IMAGE),
        (49, "declared.dcm", slice_(BurnedInAnnotation="YES"), Reason.BURNED_IN),
        (49, "ultrasound.dcm", plain(pixels(24, 20, dtype="uint8"), Modality="US"), Reason.BURNED_IN),
        (49, "capture.dcm", plain(pixels(24, 20, dtype="uint8"), Modality="OT", SOPClassUID=CAPTURE), Reason.BURNED_IN),
    ]  # fmt: skip
    return made + series()


def series() -> list[tuple[int, str, Callable[[Path], object] | None, object]]:
    """Faults that several files of a series make together: the first entry of a fault writes all of its files."""

    def write(change: Callable[[list[Path]], object], **how: object) -> Callable[[Path], object]:
        return lambda path: change(write_series(path.parent, pixels(7, 24, 20, dtype="int16"), **how))

    def names(fault: int, writer: Callable, *expected: object) -> list:
        return [(fault, f"{len(expected) - n:04d}.dcm", None if n else writer, e) for n, e in enumerate(expected)]

    def copy(paths: list[Path]) -> None:
        shutil.copy(paths[2], paths[0].parent / "copy.dcm")

    def other(paths: list[Path]) -> None:
        clash = paths[0].parent / "other.dcm"
        shutil.copy(paths[2], clash)
        content = bytearray(clash.read_bytes())
        content[-5] ^= 1
        clash.write_bytes(content)

    def turn(paths: list[Path]) -> None:
        scout = {"ImageType": ["ORIGINAL", "PRIMARY", "LOCALIZER"], "SeriesInstanceUID": "1.2.39"}
        scout |= {"position": (0, 0, 0), "orientation": (0, 1, 0, 0, 0, -1)}
        write_slice(paths[0].parent / "scout.dcm", pixels(30, 20, dtype="int16"), **scout)

    def double(paths: list[Path]) -> None:
        here = {"position": (0, 0, 4.0), "InstanceNumber": 3, "SeriesInstanceUID": "1.2.41"}
        write_slice(paths[0].parent / "double.dcm", pixels(24, 20, dtype="int16"), **here)

    same = USED
    return [
        *names(38, write(copy, SeriesInstanceUID="1.2.38.1"), *[same] * 7),
        (38, "copy.dcm", None, {USED, Reason.DUPLICATE}),
        *names(138, write(other, SeriesInstanceUID="1.2.38.2"), *[{Reason.DUP_CONFLICT}] * 7),
        (138, "other.dcm", None, Reason.DUP_CONFLICT),
        *names(39, write(turn, SeriesInstanceUID="1.2.39"), *[same] * 7),
        (39, "scout.dcm", None, Reason.LOCALIZER),
        (40, "0007.dcm", write(lambda paths: paths[5].unlink(), SeriesInstanceUID="1.2.40"), USED),
        *((40, f"{number:04d}.dcm", None, USED) for number in (6, 5, 4, 3)),
        (40, "0001.dcm", None, {Reason.SLICE_GAP, "SINGLE_SLICE"}),
        *names(41, write(double, SeriesInstanceUID="1.2.41"), *[{USED, Reason.DUP_POSITION, Reason.SLICE_GAP}] * 7),
        (41, "double.dcm", None, Reason.DUP_POSITION),
    ]


def bare(path: Path, **how: object) -> Path:
    place = {
        "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": list(make_dicom.AXIAL),
        "PixelSpacing": [1, 1],
    }
    made = dataset(pixels(24, 20, dtype="int16"), **place, **how)
    return save(made, path, syntax=IMPLICIT, preamble=False)


def private_syntax(path: Path) -> None:
    encapsulated(RLE, rle(bytes(60)))(path)
    patch(path, b"1.2.840.10008.1.2.5\0", b"1.2.840.99999.1.2.5\0")


def text_nodata(value: str) -> Callable[[Path], object]:
    return tags(plain_tags(16, 16, t42113=(2, value)))


# ------------------------------------------------------------------------------------------------- one scan of it all


@pytest.fixture(scope="module")
def scanned(tmp_path_factory):
    """Scan the archive; return (index, fault and name -> path, expectations, hits of a listener, seconds)."""
    root, hits = tmp_path_factory.mktemp("faults"), []

    class Handler(http.server.BaseHTTPRequestHandler):
        def handle(self) -> None:
            hits.append(self.client_address)

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    canary = write_geotiff(root / "canary.tif", np.full((1, 40, 50), CANARY, np.uint8))
    place = {"canary": str(canary), "url": f"/vsicurl/http://127.0.0.1:{server.server_port}/x.tif"}
    cases = archive(place)
    for fault, name, write, _ in cases:
        folder = root / f"{fault:03d}"
        folder.mkdir(exist_ok=True)
        if write is not None:
            write(folder / name)
    begin = time.monotonic()
    index = scan_archive(sorted(folder for folder in root.iterdir() if folder.is_dir()), max_bad=1.0, workers=2)
    seconds = time.monotonic() - begin
    server.shutdown()
    server.server_close()
    paths = {(fault, name): root / f"{fault:03d}" / name for fault, name, _, _ in cases}
    return index, paths, cases, hits, seconds


FAULTS = sorted({fault for fault, _, _, _ in archive({"canary": "", "url": ""})})
"""A hundred and so many: a second series of the fault."""


@pytest.mark.parametrize("fault", FAULTS)
def test_the_ledger_says_of_each_fault_what_it_is(scanned, fault):
    index, paths, cases, _, _ = scanned
    lines = {entry.file: entry for entry in index.ledger.entries}
    wrong = {}
    for name, wanted in [(name, wanted) for number, name, _, wanted in cases if number == fault]:
        path = paths[fault, name]
        entry = lines[keyed(index._salt, "file", str(path))]
        assert path.name not in entry.detail and str(path.parent) not in entry.detail
        assert entry.detail.isprintable()
        flags = {flag for key in entry.images for flag in index[key].flags}
        allowed = {str(getattr(one, "name", one)) for one in (wanted if isinstance(wanted, set) else {wanted})}
        if not allowed & {entry.reason or USED, *flags}:
            wrong[name] = (entry, flags)
    assert wrong == {}


def test_all_of_them_together_take_no_longer_than_a_minute_and_nothing_is_fetched(scanned):
    index, paths, _, hits, seconds = scanned
    assert seconds < 60
    assert hits == []
    assert len(index.ledger.entries) == len(paths)
    for row in index:
        for entry in row.statistics:
            assert np.isfinite([entry.mean, entry.std, entry.minimum, entry.maximum]).all()
            assert (entry.minimum, entry.maximum) != (CANARY, CANARY)


def row_of(scanned, fault: int, name: str):
    index, paths, _, _, _ = scanned
    return next(row for row in index if paths[fault, name] in index.paths(row.key))


def test_what_a_fault_leaves_of_an_image_is_right(scanned):
    assert row_of(scanned, 6, "some.tif").valid_fraction == 0.5
    assert row_of(scanned, 8, "holes.tif").valid_fraction == pytest.approx(1 - 5 / 40)
    scaled = row_of(scanned, 20, "scaled.tif")
    assert scaled.statistics[0].minimum >= 0.5 - 7.0 and scaled.statistics[0].maximum <= 125.0 - 7.0
    assert row_of(scanned, 19, "nowhere.tif").footprint is None
    assert max(lon for lon, _ in row_of(scanned, 19, "degrees.tif").footprint) > 180
    laughs = row_of(scanned, 16, "laughs.tif")
    assert laughs.valid_fraction == 1 and laughs.crs is not None
    index = scanned[0]
    shapes = sorted(row.shape for row in index if index.paths(row.key)[0].parent.name == "040")
    assert shapes in ([(1, 24, 20), (5, 24, 20)], [(5, 24, 20)])


def test_what_is_no_image_does_not_count_as_bad(scanned):
    cases = scanned[2]
    reasons = {29: Reason.NON_IMAGE, 48: Reason.NON_IMAGE}
    assert all(reason in NOT_BAD for reason in reasons.values())
    wanted = [one for fault, _, _, one in cases if fault in reasons]
    assert len(wanted) == len(NON_IMAGES) + 1


# ----------------------------------------------------------------------------------------------------------- measured

MEASURED = {
    (2, "fifo.tif"): (1.0, 50),
    (2, "zero.tif"): (1.0, 50),
    (10, "gigantic.tif"): (0.1, 50),
    (11, "bands.tif"): (1.0, 50),
    (12, "strip.tif"): (1.0, 50),
    (13, "bomb.tif"): (1.0, 50),
    (16, "laughs.tif"): (1.0, 50),
    (33, "frames.dcm"): (1.0, 50),
    (34, "bomb.dcm"): (5.0, 64),
    (35, "deep.dcm"): (1.0, 50),
}
"""Fault and file -> most seconds and most MiB of memory, beyond what a process holds that has read a sound file."""

MEASURE = """
import json, os, resource, signal, sys, time
from pathlib import Path
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import survey
from geomed_mae.readers import read
auto = resolve_modalities("auto")
for sound in sys.argv[1:3]:
    (source,) = survey([Path(sound)], auto).sources
    read(source)
for path in sys.argv[3:]:
    ends = os.pipe()
    if os.fork() == 0:
        signal.alarm(10)
        before, begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
        found = survey([Path(path)], auto)
        seconds = time.perf_counter() - begin
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        said = found.refusals[0].reason.name if found.refusals else "used"
        os.write(ends[1], json.dumps([said, seconds, grown / 1024]).encode())
        os._exit(0)
    os.close(ends[1])
    print(os.read(ends[0], 1000).decode() or '["HUNG", 10, 0]')
    os.wait()
"""


def test_hostile_files_are_refused_fast_and_in_little_memory(scanned):
    _, paths, _, _, _ = scanned
    sound = [paths[20, "uint8.tif"], paths[39, "0001.dcm"]]
    files = [paths[case] for case in MEASURED]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, sound + files)], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    over = {
        case: measured
        for (case, (seconds, mib)), measured in zip(MEASURED.items(), found, strict=True)
        if measured[1] > seconds or measured[2] > mib
    }
    assert over == {}


# -------------------------------------------------------------------------------------------- what a scan cannot show


def test_fault_34_a_deflated_slice_of_some_megabytes_is_read_whole(tmp_path):
    """What the inflater gives comes in parts, and the end of the file is met before the last of them."""
    array = np.zeros((1500, 1400), np.int16)
    array[::7, ::3] = pixels(215, 467, dtype="int16")
    place = {
        "ImagePositionPatient": [0, 0, 0],
        "ImageOrientationPatient": list(make_dicom.AXIAL),
        "PixelSpacing": [1, 1],
    }
    (source,) = survey(
        [save(dataset(array, **place), tmp_path / "a", syntax=DEFLATED)], resolve_modalities("ct")
    ).sources
    np.testing.assert_array_equal(read(source).array[0, 0], array - 1024.0)


def test_what_a_file_says_of_itself_is_shown_to_its_user_and_not_to_the_ledgers_readers(tmp_path):
    write_geotiff(tmp_path / "good.tif", pixels(1, 40, 40))
    (tmp_path / "page.tif").write_text("Doe^Jane 1947")
    index = scan_archive([tmp_path], max_bad=1.0)
    (entry,) = [entry for entry in index.ledger.entries if entry.reason]
    assert entry.detail == "its first bytes are (not shown)"
    done = cli("inspect", tmp_path / "page.tif")
    assert done.returncode == 3 and b"its first bytes are `Doe^Jane`" in done.stderr


def cli(*words: object, **how: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "geomed_mae", *map(str, words)], capture_output=True, timeout=120, check=False, **how
    )


def test_fault_5_a_bit_that_flips_after_the_scan_is_found_by_verify(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    then = time.time_ns() - 3_600_000_000_000
    for number, compress in enumerate(("none", "lzw", "zstd", "deflate"), start=1):
        path = write_geotiff(folder / f"{compress}.tif", pixels(1, 64, 64) * number, compress=compress)
        os.utime(path, ns=(then, then))
    write_geotiff(folder / "sound.tif", pixels(1, 64, 64))
    how = {"max_bad": 1.0, "pictures": False}
    assert len(scan([folder], tmp_path / "index", **how)) == 5
    for path in set(folder.iterdir()) - {folder / "sound.tif"}:
        with make_data.rasterio().open(path) as file:
            start, size = (int(file.get_tag_item(f"BLOCK_{one}_0_0", "TIFF", bidx=1)) for one in ("OFFSET", "SIZE"))
        content = bytearray(path.read_bytes())
        content[start + size // 2] ^= 4
        path.write_bytes(content)
        os.utime(path, ns=(then, then))
    assert len(scan([folder], tmp_path / "index", **how)) == 5, "stamps cannot tell"
    found = scan([folder], tmp_path / "index", verify=True, **how)
    assert found.ledger.reasons == {"HASH_MISMATCH": 4}


def test_fault_14_a_path_is_never_taken_for_a_description_of_a_raster(tmp_path):
    write_geotiff(tmp_path / "canary.tif", np.full((1, 40, 50), CANARY, np.uint8))
    done = cli("inspect", vrt(str(tmp_path / "canary.tif")), "--json")
    assert done.returncode == 2 and str(CANARY).encode() not in done.stdout


HOSTILE = [
    "http://127.0.0.1/a.tif",
    "https://host/a.tif",
    "/vsicurl/http://127.0.0.1/a.tif",
    "/vsizip//tmp/a.zip/a.tif",
    "//server/share/a.tif",
    "GTIFF_DIR:1:/a.tif",
    "GTIFF_RAW:/a.tif",
    "zip:///a.zip!/a.tif",
    "../a.tif",
    "a.tif",
    "/archive/../../etc/a.tif",
    "/archive/./a.tif",
    "/a\0.tif",
    "<VRTDataset/>",
    "",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_fault_17_only_plain_absolute_paths_are_files(text):
    with pytest.raises(SecurityError, match="which is no plain absolute path") as caught:
        stored_path(text)
    assert caught.value.exit_code == 7


def test_fault_17_an_index_that_names_a_url_exits_with_7_and_a_new_scan_mends_it(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    for number in range(2):
        write_geotiff(folder / f"{number}.tif", pixels(1, 64, 64))
    scan([folder], tmp_path / "index", pictures=False)
    located = tmp_path / "index" / "locations.parquet"
    rows = pq.read_table(located).to_pylist()
    source = json.loads(rows[0]["source"])
    source["files"] = ["/vsicurl/http://127.0.0.1:1/a.tif\x1b[31m"]
    rows[0]["source"] = json.dumps(source)
    pq.write_table(pa.Table.from_pylist(rows), located)
    done = cli("inspect", tmp_path / "index")
    assert done.returncode == 7, done.stderr
    assert b"the index names '/vsicurl/http" in done.stderr and b"\x1b" not in done.stderr
    assert len(scan([folder], tmp_path / "index", pictures=False)) == 2
    assert len(Index.load(tmp_path / "index")) == 2


def test_a_pipe_that_takes_the_place_of_a_file_is_not_waited_for(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", pixels(1, 40, 40))
    (source,) = survey([path], resolve_modalities("auto")).sources
    path.unlink()
    os.mkfifo(path)
    signal.alarm(5)
    with pytest.raises(ReadError, match=r"a\.tif is not a regular file") as caught:
        read(source)
    signal.alarm(0)
    assert caught.value.reason == "NOT_REGULAR"


def test_fault_26_names_are_one_escaped_line_on_the_terminal(tmp_path):
    folder = tmp_path / "archive"
    folder.mkdir()
    write_geotiff(folder / "ok\n\x1b[31m.tif", pixels(1, 40, 40))
    for name in (b"bad\nname\x1b[2J.tif", b"\xff\xfe\x1b]0;x\x07.dcm"):
        (folder / os.fsdecode(name)).write_bytes(b"text")
    for words in (
        ("scan", folder, "--out", tmp_path / "index", "--max-bad", "100%"),
        ("inspect", folder / os.fsdecode(b"bad\nname\x1b[2J.tif")),
        ("inspect", folder / os.fsdecode(b"\xff\xfe\x1b]0;x\x07.dcm")),
    ):
        done = cli("-vv", *words) if words[0] == "scan" else cli(*words)
        assert done.returncode in (0, 3), done.stderr
        assert b"\x1b" not in done.stdout + done.stderr and b"bad\nname" not in done.stderr
    lines = (tmp_path / "index" / "ledger.jsonl").read_text().splitlines()
    assert len(lines) == 3 and all(line.isprintable() for line in lines)


# ------------------------------------------------------------------------------------------------------- completeness


def test_every_fault_has_a_test():
    names = [name for path in (Path(__file__), *OF_TRAINING) for name in names_of_tests(path)]
    named = {int(part) for name in names for part in name.split("_")[2:3] if part.isdecimal()}
    shown = {fault % 100 for fault in FAULTS} | set(ELSEWHERE) | named
    assert shown >= set(range(1, 61)), sorted(set(range(1, 61)) - shown)


@pytest.mark.parametrize("fault", sorted(ELSEWHERE))
def test_the_tests_elsewhere_exist(fault):
    for name in ELSEWHERE[fault]:
        file, _, function = name.partition("::")
        assert function in names_of_tests(ROOT / file), name


def names_of_tests(path: Path) -> set[str]:
    found = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.name for node in found if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}
