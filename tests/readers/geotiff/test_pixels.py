"""Windows of GeoTIFFs, one or many at once: equal to a whole read by rasterio and the documented conversion."""

from __future__ import annotations

import os
import shutil
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geomed_mae import readers
from geomed_mae.errors import ReadError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import survey
from geomed_mae.readers.geotiff import held as geotiff_held
from geomed_mae.readers.geotiff import pixels as geotiff_read
from geomed_mae.readers.geotiff.open import rasterio
from geomed_mae.readers.windows import read_many, read_many_guarded, read_many_stored
from tests.make_data import UTM_10M, write_geotiff

RIO = rasterio()
AUTO = resolve_modalities("auto")
LOSSLESS = ("none", "deflate", "lzw", "zstd", "packbits", "lerc")


@pytest.fixture(autouse=True)
def nothing_held():
    geotiff_held.close_held()
    yield
    geotiff_held.close_held()


def source_of(path):
    found = survey([path], AUTO)
    assert not found.refusals, found.refusals
    return found.sources[0]


def settled(path: Path) -> Path:
    """Make a file look old enough to be kept open."""
    os.utime(path, (1e9, 1e9))
    return path


def oracle(path: Path, spec: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return values and validity (bands, rows, columns) of the whole raster, by rasterio and one line of arithmetic."""
    bands = spec["bands"]
    with RIO.open(path) as file:
        stored = file.read(range(1, bands + 1))
        valid = np.ones(stored.shape, bool)
        if spec["alpha"]:
            valid &= file.read(bands + 1) > 0
        if spec["masked"]:
            valid &= spec["mask"]
    if spec["nodata"] is not None:
        valid &= stored != np.array(spec["nodata"]).astype(stored.dtype)
    if spec["sparse"] is not None:
        written = np.zeros(stored.shape[1:], bool)
        written[spec["sparse"]] = True
        valid &= written
    scale, offset = np.float64(spec["scale"]), np.float64(spec["offset"])
    with np.errstate(all="ignore"):
        if (scale, offset) == (1, 0):
            values = stored.astype(np.float32)
        elif offset == 0:  # x + 0.0 would turn -0.0 into 0.0
            values = (stored.astype(np.float64) * scale).astype(np.float32)
        else:
            values = (stored.astype(np.float64) * scale + offset).astype(np.float32)
    valid &= np.isfinite(values)
    return np.where(valid, values, np.float32(0)), valid


@st.composite
def rasters(draw):
    dtype = draw(st.sampled_from(["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]))
    rows, columns = draw(st.integers(1, 70)), draw(st.integers(1, 70))
    tiled = draw(st.booleans())
    block = (
        (16 * draw(st.integers(1, 3)), 16 * draw(st.integers(1, 3))) if tiled else (draw(st.integers(1, rows)), None)
    )
    compress = draw(st.sampled_from([*LOSSLESS, "jpeg"] if dtype == "uint8" else LOSSLESS))
    if dtype == "int8" and compress == "lerc":
        compress = "deflate"
    if compress == "jpeg" and not tiled:
        block = (rows if rows < 16 else 8, None)  # strips of JPEG have multiples of 8 rows
    extra = draw(st.sampled_from(["", "alpha", "mask", "sparse"])) if compress not in ("jpeg", "lerc") else ""
    spec = {
        "dtype": dtype,
        "shape": (rows, columns),
        "bands": draw(st.sampled_from([1, 3])) if compress == "jpeg" else draw(st.integers(1, 4)),
        "tiled": tiled,
        "block": block,
        "compress": compress,
        "interleave": draw(st.sampled_from(["band", "pixel"])),
        "bigtiff": draw(st.booleans()),
        "big_endian": draw(st.booleans()),
        "alpha": extra == "alpha",
        "masked": extra == "mask",
        "sparse": None,
        "make_sparse": extra == "sparse",
        "nodata": draw(st.sampled_from([None, 3, 0, *([float("nan")] if dtype.startswith("float") else [])])),
        "scale": draw(st.sampled_from([1.0, 1e-4, 0.1, -2.5])),
        "offset": draw(st.sampled_from([0.0, -0.1, 7.0])),
        "seed": draw(st.integers(0, 2**16)),
    }
    if extra == "alpha":
        spec["bands"] = 3
    windows = []
    for _ in range(draw(st.integers(1, 5))):
        top, left = draw(st.integers(0, rows - 1)), draw(st.integers(0, columns - 1))
        windows.append(
            (slice(top, draw(st.integers(top + 1, rows))), slice(left, draw(st.integers(left + 1, columns))))
        )
    return spec, windows


def write(path: Path, spec: dict) -> Path:
    rng = np.random.default_rng(spec["seed"])
    rows, columns = spec["shape"]
    kind = np.dtype(spec["dtype"])
    low = 0 if kind.kind == "u" else -100
    array = rng.integers(low, 120, (spec["bands"] + spec["alpha"], rows, columns)).astype(kind)
    if kind.kind == "f":
        array += rng.random(array.shape).astype(kind)
        array[rng.random(array.shape) < 0.02] = np.nan
        array[rng.random(array.shape) < 0.02] = np.inf
        if spec["compress"] == "lerc":
            array = np.nan_to_num(array, posinf=5)
    if spec["alpha"]:
        array[-1] = rng.integers(0, 2, (rows, columns))
    block_rows, block_columns = spec["block"]
    creation = {
        "tiled": spec["tiled"],
        "blockysize": block_rows,
        **({"blockxsize": block_columns} if spec["tiled"] else {}),
        "compress": spec["compress"],
        "interleave": spec["interleave"] if spec["compress"] != "jpeg" else "band",
        "BIGTIFF": "YES" if spec["bigtiff"] else "NO",
        "ENDIANNESS": "BIG" if spec["big_endian"] else "LITTLE",
    }
    spec["mask"] = rng.random((rows, columns)) < 0.7
    scaling = {"scales": [spec["scale"]] * len(array), "offsets": [spec["offset"]] * len(array)}
    if not spec["make_sparse"]:
        return write_geotiff(
            path,
            array,
            nodata=spec["nodata"],
            colours=["red", "green", "blue", "alpha"] if spec["alpha"] else None,
            mask=spec["mask"] if spec["masked"] else None,
            **scaling,
            **creation,
        )
    # Two whole blocks of rows and columns at most are written, the rest never.
    array[array == 0] = 1  # GDAL does not write blocks of zeros
    region = (slice(0, min(rows, block_rows)), slice(0, min(columns, 2 * block_columns) if block_columns else columns))
    spec["sparse"] = region
    profile = {"driver": "GTiff", "count": len(array), "height": rows, "width": columns, "dtype": kind, "crs": None}
    profile |= {"transform": RIO.Affine(*UTM_10M), "nodata": spec["nodata"], "SPARSE_OK": True, **creation}
    profile |= {"photometric": "MINISBLACK"}
    with RIO.open(path, "w", **profile) as file:
        file.write(array[(slice(None), *region)], window=RIO.windows.Window.from_slices(*region))
        file.scales, file.offsets = tuple(scaling["scales"]), tuple(scaling["offsets"])
    return path


def check_stored(source, windows, values: np.ndarray, valid: np.ndarray) -> None:
    """Check that windows as stored, where there are such, are the same pixels by the documented arithmetic."""
    stored = read_many_stored(source, windows)
    short = source.dtype in ("uint8", "int8", "uint16", "int16")
    assert (stored is not None) == (short and not source.codec and min(source.selector["scale"]) >= 0)
    for part, window in zip(stored or (), windows if stored is not None else (), strict=True):
        assert part.values.dtype == source.dtype and part.scale.dtype == part.offset.dtype == np.float64
        inside = (slice(None), *window)
        mask = np.broadcast_to(part.valid, part.values.shape)
        np.testing.assert_array_equal(mask, valid[inside])
        assert not part.values[~mask].any()
        with np.errstate(over="ignore"):
            exact = part.values * part.scale.reshape(-1, 1, 1)
            exact = (exact + part.offset.reshape(-1, 1, 1)).astype(np.float32)
        assert np.where(mask, exact, np.float32(0)).tobytes() == np.ascontiguousarray(values[inside]).tobytes()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=rasters(), chunk=st.sampled_from([256, 4096, 1 << 24]))
def test_windows_of_any_raster_equal_the_whole_read_by_rasterio(case, chunk):
    spec, windows = case
    folder = Path(tempfile.mkdtemp())
    before = geotiff_read.CHUNK_BYTES
    try:
        geotiff_read.CHUNK_BYTES = chunk  # many chunks, so that their seams are tested
        path = settled(write(folder / "a.tif", spec))
        values, valid = oracle(path, spec)
        source = source_of(path)
        images = [*read_many(source, windows), *(readers.read(source, window) for window in windows)]
        for image, window in zip(images, [*windows, *windows], strict=True):
            inside = (slice(None), *window)
            np.testing.assert_array_equal(image.array, values[inside])
            np.testing.assert_array_equal(np.broadcast_to(image.valid, image.array.shape), valid[inside])
            assert image.array.tobytes() == np.ascontiguousarray(values[inside]).tobytes()
            assert image.geometry == source.geometry.shifted(window[0].start, window[1].start)
            assert len(image.valid) == 1 or not all(np.array_equal(band, image.valid[0]) for band in image.valid)
        check_stored(source, windows, values, valid)
    finally:
        geotiff_read.CHUNK_BYTES = before
        geotiff_held.close_held()
        shutil.rmtree(folder)


@pytest.mark.parametrize("dtype", ["uint8", "int8", "uint16", "int16"])
@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (2.75e-05, -0.2), (1e-4, 0.0), (-3.7, 11.0), (1e38, 0.0)])
def test_every_stored_number_becomes_the_float32_nearest_to_the_exact_product(dtype, scale, offset):
    kind = np.iinfo(dtype)
    stored = np.arange(kind.min, kind.max + 1, dtype=np.int64).astype(dtype)
    out = np.empty(stored.shape, np.float32)
    with np.errstate(over="ignore"):
        geotiff_read.physical(stored, scale, offset, out=out)
        exact = (stored.astype(np.float64) * np.float64(scale) + np.float64(offset)).astype(np.float32)
    assert out.tobytes() == exact.tobytes()


class Counting:
    """Counts calls of `_Chunk.read` and the pixels that each decodes."""

    def __init__(self, monkeypatch) -> None:
        self.pixels = []
        plain = geotiff_read._Chunk.read

        def read(dataset, structure, selector, rows, columns):
            self.pixels.append((rows.stop - rows.start) * (columns.stop - columns.start))
            return plain(dataset, structure, selector, rows, columns)

        monkeypatch.setattr(geotiff_read._Chunk, "read", read)


def test_neighbouring_windows_are_decoded_once_and_distant_ones_by_themselves(tmp_path, monkeypatch):
    array = np.arange(200 * 200, dtype=np.uint16).reshape(1, 200, 200)
    path = write_geotiff(tmp_path / "a.tif", array, tiled=True, blockxsize=16, blockysize=16, compress="deflate")
    source, count = source_of(path), Counting(monkeypatch)
    near = [(slice(3, 19), slice(3, 19)), (slice(14, 30), slice(10, 30))]
    far = [(slice(0, 16), slice(0, 16)), (slice(180, 200), slice(180, 200))]
    for windows, reads in ((near, 1), (far, 2)):
        count.pixels.clear()
        for image, window in zip(read_many(source, windows), windows, strict=True):
            np.testing.assert_array_equal(image.array[0], array[0][window])
        assert len(count.pixels) == reads
    assert sum(count.pixels) == 16 * 16 + 20 * 20


def test_windows_that_share_strips_are_decoded_once_wherever_they_lie_in_the_row(tmp_path, monkeypatch):
    array = np.arange(64 * 500, dtype=np.uint16).reshape(1, 64, 500)
    source = source_of(write_geotiff(tmp_path / "a.tif", array, blockysize=8, compress="deflate"))
    count = Counting(monkeypatch)
    windows = [(slice(9, 20), slice(0, 10)), (slice(8, 19), slice(490, 500))]
    images = list(read_many(source, windows))
    assert len(count.pixels) == 1
    np.testing.assert_array_equal(images[1].array[0], array[0][windows[1]])


def test_errors_of_many_windows_come_with_the_call_not_with_the_iterator(tmp_path):
    path = write_geotiff(tmp_path / "a.tif", np.random.default_rng(0).integers(0, 255, (1, 64, 64)).astype(np.uint8))
    source = source_of(path)
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(ReadError):
        read_many(source, [(slice(0, 4), slice(0, 4)), (slice(60, 64), slice(0, 4))])


def test_the_memory_limit_holds_for_all_windows_together(tmp_path, monkeypatch):
    source = source_of(write_geotiff(tmp_path / "a.tif", np.ones((1, 40, 40), np.uint8)))
    monkeypatch.setattr(geotiff_read, "MAX_READ_VALUES", 150)
    window = (slice(0, 10), slice(0, 10))
    assert len(list(read_many(source, [window]))) == 1
    with pytest.raises(ReadError, match="do not fit one read; read windows of it"):
        read_many(source, [window, window])


def test_many_windows_of_a_codec_come_from_a_child_process(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (1, 64, 64)).astype(np.uint8)
    source = source_of(
        write_geotiff(tmp_path / "a.tif", array, compress="jpeg", tiled=True, blockxsize=16, blockysize=16)
    )
    assert source.codec, "JPEG is an image codec"
    windows = [(slice(0, 20), slice(0, 20)), (slice(10, 30), slice(44, 64))]
    here, there = list(read_many(source, windows)), list(read_many_guarded(source, windows))
    assert all(one.array.tobytes() == other.array.tobytes() for one, other in zip(here, there, strict=True))


def test_formats_without_many_windows_are_cut_from_one_read(tmp_path):
    from tests.make_data import write_nifti

    array = np.arange(20 * 21 * 22, dtype=np.int16).reshape(20, 21, 22)
    source = source_of(write_nifti(tmp_path / "a.nii", array))
    near = [(slice(1, 5), slice(2, 6), slice(3, 7)), (slice(3, 7), slice(2, 6), slice(5, 9))]
    far = [(slice(0, 2), slice(0, 2), slice(0, 2)), (slice(20, 22), slice(19, 21), slice(18, 20))]
    for windows in (near, far):
        for image, window in zip(read_many(source, windows), windows, strict=True):
            alone = readers.read(source, window)
            np.testing.assert_array_equal(image.array, alone.array)
            np.testing.assert_allclose(image.geometry.affine, alone.geometry.affine)


# files kept open


def test_a_file_is_opened_once_for_many_reads(tmp_path, monkeypatch):
    path = settled(write_geotiff(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8)))
    source, opened = source_of(path), []
    plain = geotiff_held.open_checked
    monkeypatch.setattr(geotiff_held, "open_checked", lambda *args: opened.append(1) or plain(*args))
    for _ in range(5):
        readers.read(source)
    assert len(opened) == 1


def test_a_file_that_has_just_been_written_is_not_kept(tmp_path):
    readers.read(source_of(write_geotiff(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8))))
    assert not geotiff_held._held


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_changed_file_is_noticed(tmp_path, how):
    path = settled(write_geotiff(tmp_path / "a.tif", np.full((1, 8, 8), 5, np.uint8)))
    source = source_of(path)
    assert readers.read(source).array.max() == 5
    assert path in geotiff_held._held
    other = write_geotiff(tmp_path / "b.tif", np.full((1, 8, 8), 7, np.uint8))
    if how == "replaced":
        settled(other).replace(path)
    else:
        path.write_bytes(other.read_bytes())
        settled(path)
    assert readers.read(source).array.max() == 7


def test_a_file_that_is_gone_is_an_error_though_it_was_kept_open(tmp_path):
    path = settled(write_geotiff(tmp_path / "a.tif", np.ones((1, 8, 8), np.uint8)))
    source = source_of(path)
    readers.read(source)
    path.unlink()
    with pytest.raises(ReadError) as caught:
        readers.read(source)
    assert caught.value.reason == "VANISHED"


def test_a_file_whose_pixels_do_not_decode_is_not_kept(tmp_path):
    array = np.random.default_rng(0).integers(0, 255, (1, 64, 64)).astype(np.uint8)
    path = write_geotiff(tmp_path / "a.tif", array, compress="deflate")
    source, data = source_of(path), bytearray(path.read_bytes())
    with RIO.open(path) as file:
        assert file.read() is not None
    data[1000:1400] = bytes(400)
    path.write_bytes(data)
    settled(path)
    with pytest.raises(ReadError) as caught:
        readers.read(source)
    assert caught.value.reason == "DECODE_FAILED" and path not in geotiff_held._held


def test_no_more_files_are_kept_than_the_limit_and_the_oldest_goes_first(tmp_path, monkeypatch):
    monkeypatch.setattr(geotiff_held, "MAX_HELD", 2)
    paths = [settled(write_geotiff(tmp_path / f"{n}.tif", np.full((1, 8, 8), n, np.uint8))) for n in range(4)]
    for path in paths:
        readers.read(source_of(path))
    assert list(geotiff_held._held) == paths[2:]


def test_threads_never_share_a_dataset_and_read_the_right_pixels(tmp_path):
    array = np.random.default_rng(0).integers(0, 60000, (2, 300, 300)).astype(np.uint16)
    path = settled(
        write_geotiff(tmp_path / "a.tif", array, tiled=True, blockxsize=32, blockysize=32, compress="deflate")
    )
    source, wrong = source_of(path), []

    def reads(seed):
        rng = np.random.default_rng(seed)
        for _ in range(40):
            top, left = rng.integers(0, 240, 2)
            window = (slice(top, top + 50), slice(left, left + 50))
            if not np.array_equal(readers.read(source, window).array, array[(slice(None), *window)]):
                wrong.append(window)

    threads = [threading.Thread(target=reads, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(geotiff_held._held) == 1


def test_a_forked_child_opens_files_anew(tmp_path):
    array = np.random.default_rng(0).integers(0, 60000, (2, 600, 600)).astype(np.uint16)
    path = settled(
        write_geotiff(tmp_path / "a.tif", array, tiled=True, blockxsize=16, blockysize=16, compress="deflate")
    )
    source = source_of(path)
    readers.read(source, (slice(0, 8), slice(0, 8)))
    parents = geotiff_held._held[path].dataset

    def wrong(seed):
        rng = np.random.default_rng(seed)
        found = 0
        for _ in range(100):
            top, left = rng.integers(0, 560, 2)
            window = (slice(top, top + 40), slice(left, left + 40))
            found += not np.array_equal(readers.read(source, window).array, array[(slice(None), *window)])
        return found

    children = []
    for seed in range(3):
        child = os.fork()
        if child == 0:
            empty = not geotiff_held._held
            bad = wrong(seed)
            own = geotiff_held._held[path].dataset is not parents
            os._exit(0 if empty and own and bad == 0 else 1)
        children.append(child)
    assert wrong(9) == 0
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0, 0]


def test_a_kept_file_follows_no_side_car_that_appears_later(tmp_path):
    path = settled(write_geotiff(tmp_path / "a.tif", np.full((1, 8, 8), 5, np.uint8)))
    source = source_of(path)
    readers.read(source)
    (tmp_path / "a.tif.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><NoDataValue>5</NoDataValue></PAMRasterBand></PAMDataset>'
    )
    assert readers.read(source).valid.all()
