"""The cache on disk: equal to reading, shared, bounded, and never trusted (fault 59 of the table)."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import random
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless

from geomed_mae.archives.build import scan_archive
from geomed_mae.config import DataConfig
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.samples import folder as folder_module
from geomed_mae.samples import grid
from geomed_mae.samples.folder import RESERVE_BYTES, TAG, UNFINISHED, Folder
from geomed_mae.samples.loader import Steps
from geomed_mae.samples.piece import Piece
from geomed_mae.samples.store import SLOWER, Store, open_store
from geomed_mae.samples.tiles import DamagedError, TileFile, encode
from geomed_mae.samples.workers import load_steps
from tests.make_data import write_geotiff, write_nifti
from tests.make_dicom import AXIAL, dataset, save, write_series, write_slice
from tests.make_scenes import landsat_product, safe_l2a

BIG = 1 << 30


def everything(row) -> tuple[slice, ...]:
    return tuple(slice(0, size) for size in row.shape)


def some_windows(row, count: int = 6) -> list[tuple[slice, ...]]:
    """Return windows all over the image, the whole of it and a single pixel among them."""
    rng = np.random.default_rng(0)
    windows = [everything(row), tuple(slice(size - 1, size) for size in row.shape)]
    for _ in range(count):
        ends = [sorted(rng.choice(size + 1, 2, replace=False)) for size in row.shape]
        windows.append(tuple(slice(int(a), int(b)) for a, b in ends))
    return windows


def assert_equal(piece: Piece, image) -> None:
    array, valid = piece.physical()
    inside = np.broadcast_to(image.valid, image.array.shape)
    expected = np.where(inside, image.array, np.float32(0))
    assert np.array_equal(array.view(np.uint32), expected.view(np.uint32))
    assert np.array_equal(np.broadcast_to(valid, inside.shape), inside)


def entries(path: Path) -> list[Path]:
    return sorted(entry for entry in path.iterdir() if entry.name != TAG)


def small_cells(monkeypatch) -> None:
    monkeypatch.setattr(grid, "WHOLE_BYTES", 1 << 14)
    monkeypatch.setattr(grid, "CELL_BYTES", 1 << 13)


@pytest.fixture
def made(memory_index, tmp_path):
    """An index of one raster with holes, its row, and a store that keeps everything."""
    rng = np.random.default_rng(0)
    memory_index.add(rng.integers(0, 4000, (2, 150, 170)), valid=rng.random((1, 150, 170)) > 0.1)
    return memory_index, memory_index.rows[0], Store(memory_index, Folder(tmp_path / "cache", BIG), "always")


@pytest.fixture(scope="module")
def archive(tmp_path_factory) -> Path:
    """Rasters and volumes of every stored type, some with scales, some with holes."""
    folder = tmp_path_factory.mktemp("DOE^JANE")
    rng = np.random.default_rng(0)
    numbers = rng.integers(1, 12000, (4, 96, 80)).astype(np.uint16)
    tiled = {"tiled": True, "blockxsize": 32, "blockysize": 32, "compress": "deflate"}
    scaled = {"scales": [1e-4] * 4, "offsets": [-0.1] * 4}
    write_geotiff(folder / "reflectance.tif", numbers, nodata=0, **scaled, **tiled)
    holes = numbers.copy()
    holes[:, :10, :30] = 0
    holes[1, 50:60, 50:] = 0
    write_geotiff(folder / "holes.tif", holes, nodata=0, scales=[2.75e-5] * 4, offsets=[-0.2] * 4)
    write_geotiff(folder / "bytes.tif", rng.integers(0, 256, (3, 60, 70)).astype(np.uint8))
    write_geotiff(folder / "signed.tif", rng.integers(-500, 500, (2, 60, 70)).astype(np.int16), nodata=-400)
    floats = rng.normal(size=(2, 64, 64)).astype(np.float32)
    floats[0, :5, :5] = np.nan
    write_geotiff(folder / "floats.tif", floats)
    volume = rng.integers(0, 4000, (12, 40, 48)).astype(np.uint16)
    write_series(folder / "ct", volume, PixelPaddingValue=7)
    write_series(folder / "mr", volume, Modality="MR", SeriesInstanceUID="1.2.3.1", RescaleSlope="1.2345678")
    for number, plane in enumerate(volume):
        place = {"position": (0, 0, 2.0 * number), "RescaleSlope": f"{0.5 + 0.01 * number:.6f}"}
        tags = {"Modality": "PT", "SeriesInstanceUID": "1.2.3.2", "RescaleIntercept": "0", "Units": "BQML"}
        write_slice(folder / "pet" / f"{number}.dcm", plane, **place, **tags)
    write_nifti(folder / "v.nii.gz", rng.integers(-100, 3000, (30, 31, 20)).astype(np.int16), slope=0.5, inter=3.25)
    return folder


@pytest.fixture(scope="module")
def real_index(archive):
    return scan_archive([archive])


@pytest.mark.parametrize("cells", ["one", "many"])
def test_a_store_gives_the_bits_of_the_index_for_every_type_first_and_again(real_index, tmp_path, cells, monkeypatch):
    if cells == "many":
        small_cells(monkeypatch)
    store = Store(real_index, Folder(tmp_path / "cache", BIG), "always")
    kinds = {}
    for row in real_index.rows:
        windows = some_windows(row)
        for _ in range(2):
            pieces = store.read_many(row, windows)
            for piece, window in zip(pieces, windows, strict=True):
                assert_equal(piece, real_index.read(row.key, window))
        kinds[row.modality, row.dtype, len(row.channels)] = pieces[0].values.dtype.name
    assert kinds == {
        ("unnamed-raster", "uint16", 4): "uint16",
        ("unnamed-raster", "uint8", 3): "uint8",
        ("unnamed-raster", "int16", 2): "int16",
        ("unnamed-raster", "float32", 2): "float32",
        ("ct", "uint16", 1): "int16",
        ("mr", "uint16", 1): "uint16",
        # A slope for each slice: the smallest cells are single slices, where it is one for all.
        ("pet", "uint16", 1): "float32",
        ("unnamed-volume", "int16", 1): "int16",
    }
    files = len(entries(tmp_path / "cache"))
    assert files == len(real_index.rows) if cells == "one" else files > 3 * len(real_index.rows)


@pytest.mark.parametrize(
    ("shape", "block"), [((3, 300, 280), (64, 64)), ((3, 300, 280), (1, 280)), ((1, 40, 60, 50), None)]
)
def test_windows_across_tiles_and_cells_come_from_the_store_alone(memory_index, tmp_path, monkeypatch, shape, block):
    small_cells(monkeypatch)
    monkeypatch.setattr("geomed_mae.samples.tiles.TILE_BYTES", 1 << 11)
    rng = np.random.default_rng(0)
    key = memory_index.add(rng.integers(0, 60000, shape), valid=rng.random((1, *shape[1:])) > 0.2, block=block)
    row = memory_index.rows[0]
    folder = Folder(tmp_path / "cache", BIG)
    Store(memory_index, folder, "always").read_many(row, [everything(row)])
    expected = {window_name(window): memory_index.read(key, window) for window in some_windows(row, 30)}
    memory_index.broken.add(key)
    again = Store(memory_index, folder, "always")
    for window, piece in zip(some_windows(row, 30), again.read_many(row, some_windows(row, 30)), strict=True):
        assert_equal(piece, expected[window_name(window)])
    assert len(entries(folder.path)) > 4


def window_name(window) -> tuple[tuple[int, int], ...]:
    return tuple((part.start, part.stop) for part in window)


def test_cells_follow_the_blocks_of_a_raster_and_the_slices_of_a_volume():
    assert grid.cell_edges((1000, 1000), 8, (256, 256)) == (1000, 1000)
    assert grid.cell_edges((10980, 10980), 26, (512, 512)) == (1024, 512)
    assert grid.cell_edges((10980, 10980), 2, (1024, 1024)) == (2048, 2048)
    assert grid.cell_edges((10980, 10980), 2, (4096, 4096)) == (4096, 4096)
    rows, columns = grid.cell_edges((10980, 10980), 20, (1, 10980))
    assert columns == 10980 and rows == grid.CELL_BYTES // (20 * 10980)
    assert grid.cell_edges((1000, 512, 512), 2, None) == (32, 512, 512)
    assert grid.cell_edges((4, 9000, 9000), 2, None) == (1, 9000, 9000)


def tile_file(path: Path, piece: Piece, name: str = "entry") -> Path:
    path.write_bytes(b"".join(encode(name, piece)))
    return path


def opened(path: Path, name: str = "entry") -> TileFile:
    return TileFile(os.open(path, os.O_RDONLY), name)


@pytest.fixture
def piece() -> Piece:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 4000, (2, 150, 170)).astype(np.int16)
    return Piece(values, rng.random((1, 150, 170)) > 0.1, np.array([1e-4, 1.0]), np.array([-0.1, 0.0]))


def test_every_changed_byte_of_an_entry_is_found(piece, tmp_path):
    path = tile_file(tmp_path / "entry", piece)
    whole = path.read_bytes()
    layout = opened(path).layout
    head = len(whole) - int(layout.ends[-1])
    rng = random.Random(0)
    positions = {*range(head), *layout.ends.tolist(), len(whole) - 1}
    positions = {place for place in positions if place < len(whole)} | {rng.randrange(len(whole)) for _ in range(600)}
    assert len(positions) > 800
    window = tuple(slice(0, size) for size in piece.spatial_shape)
    for place in positions:
        damaged = bytearray(whole)
        damaged[place] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(DamagedError):
            opened(path).read([window])
    path.write_bytes(whole)
    assert np.array_equal(opened(path).read([window])[0].values, piece.values)


def test_an_entry_that_is_cut_off_longer_or_under_another_name_is_found(piece, tmp_path):
    path = tile_file(tmp_path / "entry", piece)
    whole = path.read_bytes()
    window = tuple(slice(0, size) for size in piece.spatial_shape)
    for length in [*range(0, 1200, 7), len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:length])
        with pytest.raises(DamagedError):
            opened(path).read([window])
    path.write_bytes(whole + b"\0")
    with pytest.raises(DamagedError):
        opened(path)
    path.write_bytes(whole)
    with pytest.raises(DamagedError):
        opened(path, "other")


def test_a_tile_that_is_damaged_while_the_file_is_open_is_found(piece, tmp_path):
    path = tile_file(tmp_path / "entry", piece)
    file = opened(path)
    window = tuple(slice(0, size) for size in piece.spatial_shape)
    file.read([window])
    with path.open("r+b") as out:
        out.seek(-5, os.SEEK_END)
        out.write(b"\xff\x00\xff")
    with pytest.raises(DamagedError):
        file.read([window])


@pytest.mark.parametrize("damage", ["head", "tile", "cut", "empty", "foreign"])
def test_a_damaged_entry_is_decoded_and_written_again_with_one_warning(made, caplog, damage):
    index, row, store = made
    store.read_many(row, [everything(row)])
    (path,) = entries(store.folder.path)
    whole = path.read_bytes()
    changed = bytearray(whole)
    changed[40 if damage == "head" else -7] ^= 4
    path.write_bytes({"cut": whole[:-100], "empty": b"", "foreign": b"GIF89a" * 100}.get(damage, bytes(changed)))
    reads = index.whole_reads
    (piece,) = Store(index, store.folder, "always").read_many(row, [everything(row)])
    assert_equal(piece, index.images[row.key])
    assert index.whole_reads == reads + 1
    assert path.read_bytes() == whole
    warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and row.key not in warnings[0].getMessage()
    assert str(store.folder.path) not in warnings[0].getMessage()
    reads = index.whole_reads
    assert_equal(Store(index, store.folder, "always").read_many(row, [everything(row)])[0], index.images[row.key])
    assert index.whole_reads == reads


def test_damage_that_cannot_be_removed_is_never_used_and_looked_at_once(made, monkeypatch, caplog):
    index, row, store = made
    store.read_many(row, [everything(row)])
    (path,) = entries(store.folder.path)
    path.write_bytes(path.read_bytes()[:-9] + b"123456789")
    monkeypatch.setattr(Path, "unlink", refused(errno.EROFS))
    monkeypatch.setattr(Path, "replace", refused(errno.EROFS))
    fresh = Store(index, store.folder, "always")
    for _ in range(3):
        assert_equal(fresh.read_many(row, [everything(row)])[0], index.images[row.key])
    assert caplog.text.count("is damaged") == 1


def refused(code: int):
    def fail(*args, **kwargs):
        raise OSError(code, os.strerror(code), "/data/DOE^JANE")

    return fail


@pytest.mark.parametrize("kind", ["link", "pipe", "folder"])
def test_nothing_but_a_plain_file_is_opened_in_the_folder(made, tmp_path, kind):
    index, row, store = made
    store.read_many(row, [everything(row)])
    (path,) = entries(store.folder.path)
    elsewhere = tmp_path / "elsewhere"
    path.replace(elsewhere)
    content = elsewhere.read_bytes()
    if kind == "link":
        path.symlink_to(elsewhere)
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        path.mkdir()
    reads = index.whole_reads
    assert_equal(Store(index, store.folder, "always").read_many(row, [everything(row)])[0], index.images[row.key])
    assert index.whole_reads == reads + 1 and elsewhere.read_bytes() == content


def test_the_folder_is_private_and_says_that_it_is_a_cache(real_index, archive, tmp_path):
    path = tmp_path / "cache"
    store = Store(real_index, Folder(path, BIG), "always")
    assert not path.exists()
    for row in real_index.rows:
        store.read_many(row, [everything(row)])
    assert stat.S_IMODE(path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(entry.stat().st_mode) for entry in path.iterdir()} == {0o600}
    assert (path / TAG).read_text().startswith("Signature: 8a477f597d28d172789f06886806bc55")
    secrets = [b"DOE", b"JANE", b"P1", str(archive).encode(), b"1.2.3.1"]
    secrets += [row.key.encode() for row in real_index.rows] + [row.group.encode() for row in real_index.rows]
    secrets += [real_index.pixel_digest(row.key).encode() for row in real_index.rows]
    for entry in path.iterdir():
        head = entry.name.encode() + entry.read_bytes()[:400]
        assert not [secret for secret in secrets if secret in head]


def test_changed_pixels_and_other_settings_have_other_entries(tmp_path):
    source = tmp_path / "archive"
    source.mkdir()
    first = np.random.default_rng(0).integers(1, 4000, (2, 64, 64)).astype(np.uint16)
    folder = Folder(tmp_path / "cache", BIG)
    seen = []
    for array, scale in ((first, 1.0), (first[:, ::-1], 1.0), (first[:, ::-1], 0.5), (first, 1.0)):
        write_geotiff(source / "a.tif", np.ascontiguousarray(array), scales=[scale] * 2, offsets=[0.0] * 2)
        index = scan_archive([source])
        (row,) = index.rows
        assert_equal(Store(index, folder, "always").read_many(row, [everything(row)])[0], index.read(row.key))
        seen.append(len(entries(folder.path)))
    # The last is the first again: a new scan with a new salt, and its entry is found.
    assert seen == [1, 2, 3, 3]


def test_files_that_change_after_the_scan_are_not_cached_under_their_old_name(tmp_path):
    source = tmp_path / "archive"
    source.mkdir()
    array = np.random.default_rng(0).integers(1, 4000, (2, 64, 64)).astype(np.uint16)
    write_geotiff(source / "a.tif", array)
    index = scan_archive([source])
    write_geotiff(source / "a.tif", array[:, ::-1].copy())
    for mode in ("always", "auto"):
        store = Store(index, Folder(tmp_path / mode, BIG), mode)
        store.seconds_per_byte = 0.0
        with pytest.raises(ReadError, match="other pixels") as caught:
            store.read_many(index.rows[0], [everything(index.rows[0])])
        assert caught.value.reason == "HASH_MISMATCH" and not (tmp_path / mode).exists()


def test_cells_of_files_that_changed_for_a_while_after_the_scan_are_not_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr("geomed_mae.samples.grid.WHOLE_BYTES", 1000)
    monkeypatch.setattr("geomed_mae.samples.grid.CELL_BYTES", 2000)
    path = tmp_path / "archive" / "a.tif"
    path.parent.mkdir()
    array = np.random.default_rng(0).integers(1, 4000, (2, 64, 64)).astype(np.uint16)
    window = (slice(0, 16), slice(0, 16))
    for change, (pixels, seconds) in enumerate([(array, 100), (array[:, ::-1].copy(), 200), (array, 100)]):
        write_geotiff(path, pixels)
        os.utime(path, (seconds, seconds))
        if change == 0:
            index = scan_archive([path.parent])
            continue
        store = Store(index, Folder(tmp_path / "cache", BIG), "always")
        (piece,) = store.read_many(index.rows[0], [window])
        assert np.array_equal(piece.physical()[0], pixels[:, :16, :16])


class Slow:
    """An index whose reads take their time."""

    def __init__(self, index, seconds: float) -> None:
        self.index, self.seconds = index, seconds

    def __getattr__(self, name: str):
        return getattr(self.index, name)

    def read(self, *args):
        time.sleep(self.seconds)
        return self.index.read(*args)

    def read_many(self, key, windows):
        time.sleep(self.seconds)
        return self.index.read_many(key, windows)


@pytest.mark.parametrize(("seconds", "kept"), [(0.6, 1), (0.0, 0)])
def test_auto_keeps_what_decodes_slowly_and_nothing_else(memory_index, tmp_path, seconds, kept):
    memory_index.add(np.random.default_rng(0).integers(0, 4000, (4, 600, 600)))
    row = memory_index.rows[0]
    store = Store(Slow(memory_index, seconds), Folder(tmp_path / "cache", BIG), "auto")
    # Half a second for the image, however busy this machine is.
    store.seconds_per_byte = 0.5 / SLOWER / (4 * 600 * 600 * 4)
    for _ in range(3):
        store.read_many(row, [everything(row)])
    assert memory_index.whole_reads == (1 if kept else 3)
    assert (tmp_path / "cache").exists() == bool(kept)


def test_auto_keeps_the_cells_of_a_large_image_when_its_windows_are_slow_on_average(
    memory_index, tmp_path, monkeypatch
):
    small_cells(monkeypatch)
    key = memory_index.add(np.random.default_rng(0).integers(0, 4000, (1, 256, 256)), block=(64, 64))
    row = memory_index.rows[0]
    store = Store(Slow(memory_index, 0.05), Folder(tmp_path / "cache", BIG), "auto")
    window = (slice(10, 30), slice(10, 30))
    numbers = []
    for number in range(7):
        store.index.seconds = 0.05 if number != 1 else 0.0  # a block that is held already
        assert_equal(store.read_many(row, [window])[0], memory_index.images[key].crop(window))
        numbers.append(memory_index.window_reads)
    # The first read of a process is not measured, two are, the fourth fills the cell.
    assert numbers == [1, 2, 3, 4, 4, 4, 4] and len(entries(tmp_path / "cache")) == 1


def many_images(memory_index, count: int, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    for _ in range(count):
        memory_index.add(rng.integers(0, 60000, (1, 64, 64)))


def test_a_full_store_adds_nothing_removes_nothing_and_goes_on(memory_index, tmp_path, caplog):
    many_images(memory_index, 40)
    limit = 100_000
    store = Store(memory_index, Folder(tmp_path / "cache", limit), "always")
    for _ in range(2):
        for row in memory_index.rows:
            assert_equal(store.read_many(row, [everything(row)])[0], memory_index.images[row.key])
            assert sum(entry.stat().st_size for entry in (tmp_path / "cache").iterdir()) <= limit
    kept = len(entries(tmp_path / "cache"))
    assert kept == (limit - (tmp_path / "cache" / TAG).stat().st_size) // entries(tmp_path / "cache")[0].stat().st_size
    assert memory_index.whole_reads == 40 + 40 - kept
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_what_is_dropped_makes_room_again(memory_index, tmp_path):
    many_images(memory_index, 20)
    store = Store(memory_index, Folder(tmp_path / "cache", 50_000), "always")
    for row in memory_index.rows:
        store.read_many(row, [everything(row)])
    before = entries(tmp_path / "cache")
    before[0].write_bytes(b"damaged")
    for row in memory_index.rows:
        store.read_many(row, [everything(row)])
    fresh = Store(memory_index, Folder(tmp_path / "cache", 50_000), "always")
    for row in memory_index.rows:
        assert_equal(fresh.read_many(row, [everything(row)])[0], memory_index.images[row.key])
    assert sum(entry.stat().st_size for entry in (tmp_path / "cache").iterdir()) <= 50_000
    assert len(entries(tmp_path / "cache")) == len(before)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT])
@pytest.mark.parametrize("what", ["mkdir", "replace"])
def test_a_folder_that_takes_nothing_is_one_warning_and_no_cache(made, monkeypatch, caplog, code, what):
    index, row, store = made
    monkeypatch.setattr(Path, what, refused(code))
    for _ in range(3):
        assert_equal(store.read_many(row, [everything(row)])[0], index.images[row.key])
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warnings) == 1 and os.strerror(code) in warnings[0] and "DOE" not in warnings[0]
    assert index.whole_reads == 3
    assert not store.folder.path.exists() or not entries(store.folder.path)


def test_a_disk_that_is_really_full_leaves_no_part_behind(memory_index, tmp_path):
    """The kernel refuses the write half-way (a limit on file sizes), as a full disk does."""
    many_images(memory_index, 1)
    row = memory_index.rows[0]
    code = (
        "import resource, signal, sys; from pathlib import Path; from geomed_mae.samples.folder import Folder;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000));"
        "print(Folder(Path(sys.argv[1]), 1 << 30).write('a', [b'x' * 4000] * 3))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "cache"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "False" and not entries(tmp_path / "cache") and row.key


def test_a_reserve_of_the_disk_is_left_alone(made, caplog):
    index, row, store = made
    store.folder = Folder(store.folder.path, BIG, reserve_bytes=1 << 60)
    assert_equal(store.read_many(row, [everything(row)])[0], index.images[row.key])
    assert not store.folder.path.exists() and "GiB of the disk would be left" in caplog.text
    assert RESERVE_BYTES >= 1 << 30


WRITER = """
import sys
from pathlib import Path
import numpy as np
from geomed_mae.samples.folder import Folder
from geomed_mae.samples.loader import Steps
from geomed_mae.samples.piece import Piece
from geomed_mae.samples.tiles import encode
folder, limit, first, step, count = Path(sys.argv[1]), *map(int, sys.argv[2:])
folder = Folder(folder, limit, reserve_bytes=0)
print("begun", flush=True)
for number in range(first, first + step * count, step):
    rng = np.random.default_rng(number)
    values = rng.integers(0, 60000, (1, 400, 400)).astype(np.uint16)
    piece = Piece(values, np.ones((1, 400, 400), bool), np.ones(1), np.zeros(1))
    folder.write(f"entry{number}", encode(f"entry{number}", piece))
"""


def writer(folder: Path, limit: int, first: int, step: int, count: int) -> subprocess.Popen:
    numbers = map(str, (limit, first, step, count))
    return subprocess.Popen([sys.executable, "-c", WRITER, folder, *numbers], stdout=subprocess.PIPE)


def whole_entries(folder: Path) -> int:
    """Return the number of entries, all of which verify and hold what was written."""
    found = [path for path in folder.iterdir() if path.name.startswith("entry")]
    for path in found:
        (piece,) = opened(path, path.name).read([(slice(0, 400), slice(0, 400))])
        wanted = np.random.default_rng(int(path.name[5:])).integers(0, 60000, (1, 400, 400))
        assert np.array_equal(piece.values, wanted)
    return len(found)


def test_two_writers_of_the_same_entries_leave_whole_ones(tmp_path):
    both = [writer(tmp_path / "cache", BIG, 0, 1, 12) for _ in range(2)]
    for process in both:
        assert process.wait(60) == 0
        process.stdout.close()
    assert whole_entries(tmp_path / "cache") == 12
    assert len(entries(tmp_path / "cache")) == 12


def test_processes_that_fill_one_folder_exceed_its_limit_by_one_entry_each_at_most(tmp_path):
    """Each of four begins with an empty folder in mind and never hears of the others."""
    limit, size = 1_000_000, 7_000
    four = [Folder(tmp_path / "cache", limit, reserve_bytes=0) for _ in range(4)]
    assert all(folder.room(0) for folder in four)
    for number in range(200):
        for who, folder in enumerate(four):
            folder.write(f"entry{number}-{who}", [bytes(size)])
    total = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert limit - size < total <= limit + 4 * size
    assert all(folder.closed == "full" for folder in four)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_a_writer_that_is_killed_leaves_whole_entries_or_none(tmp_path, kills):
    rng = random.Random(kills)
    folder = tmp_path / "cache"
    for turn in range(kills):
        process = writer(folder, BIG, turn * 1000, 1, 1000)
        process.stdout.readline()
        time.sleep(rng.random() * 0.3)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        process.stdout.close()
        if folder.exists():
            whole_entries(folder)
    Folder(folder, BIG)
    assert not [path for path in folder.iterdir() if path.name.startswith(UNFINISHED)]
    assert whole_entries(folder) > 0


def test_what_dead_or_old_processes_left_is_swept_and_what_a_living_one_writes_is_not(tmp_path):
    path = tmp_path / "cache"
    Folder(path, BIG).write("entry", [b"content"])
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    host = folder_module._host()
    names = {
        "dead": f"{UNFINISHED}{host}-{dead.pid}-aa",
        "living": f"{UNFINISHED}{host}-{os.getpid()}-bb",
        "other machine": f"{UNFINISHED}00000000-{dead.pid}-cc",
        "other machine, old": f"{UNFINISHED}00000000-1-dd",
    }
    for name in names.values():
        (path / name).write_bytes(b"part")
    os.utime(path / names["other machine, old"], (0, time.time() - 25 * 3600))
    Folder(path, BIG)
    left = {path.name for path in entries(path)}
    assert left == {"entry", names["living"], names["other machine"]}


def test_a_store_works_in_another_process_as_in_this_one(made):
    index, row, store = made
    store.read_many(row, [everything(row)])
    other = pickle.loads(pickle.dumps(store))
    assert other._open == {}
    other.index = index
    reads = index.whole_reads
    assert_equal(other.read_many(row, [everything(row)])[0], index.images[row.key])
    assert index.whole_reads == reads


def test_the_recipe_opens_a_store_or_none(real_index, archive, tmp_path):
    default = tmp_path / "run" / "cache"
    assert open_store(DataConfig(cache="off"), default, real_index) is None
    store = open_store(DataConfig(cache="always", cache_gb=0.5), default, real_index, [archive])
    assert (store.mode, store.folder.path, store.folder.limit_bytes) == ("always", default, 1 << 29)
    assert open_store(DataConfig(), default, real_index).mode == "auto" and not default.exists()
    named = open_store(DataConfig(cache_dir=str(tmp_path / "shared")), default, real_index)
    assert named.folder.path == tmp_path / "shared"
    for inside in (archive, archive / "cache", archive / "ct" / "deeper"):
        with pytest.raises(ConfigError, match="lies in the archive"):
            open_store(DataConfig(cache_dir=str(inside)), default, real_index, [archive])
    with pytest.raises(ConfigError, match="lies in the archive"):
        open_store(DataConfig(cache_dir=str(archive / "ct" / "x")), default, real_index)


def test_a_folder_that_holds_other_things_is_refused(real_index, tmp_path, monkeypatch):
    (tmp_path / "thesis.doc").write_text("years of work")
    with pytest.raises(ConfigError, match="holds other things than a cache"):
        open_store(DataConfig(cache_dir=str(tmp_path)), tmp_path, real_index)
    with pytest.raises(ConfigError, match="is no folder"):
        open_store(DataConfig(cache_dir=str(tmp_path / "thesis.doc")), tmp_path, real_index)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match="belongs to another user"):
        open_store(DataConfig(cache_dir=str(tmp_path / "empty")), tmp_path, real_index)


def j2k_series(folder: Path, volume: np.ndarray) -> Path:
    for number, plane in enumerate(volume):
        tags = {"ImagePositionPatient": [0, 0, 2.0 * number], "ImageOrientationPatient": list(AXIAL)}
        made = dataset(plane, PixelSpacing=[1, 1], **tags)
        made.file_meta = FileMetaDataset()
        made.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        made.compress(JPEG2000Lossless, generate_instance_uid=False)
        save(made, folder / f"{number}.dcm", syntax=JPEG2000Lossless)
    return folder


def ct_like(*shape: int) -> np.ndarray:
    """Return smooth structure with the noise of a CT: it compresses about as real slices do."""
    rng = np.random.default_rng(0)
    z, y, x = np.meshgrid(*(np.linspace(0, 6, size) for size in shape), indexing="ij")
    return (1000 + 400 * np.sin(x + z) * np.cos(y) + rng.normal(scale=20, size=shape)).astype(np.uint16)


def test_auto_keeps_jpeg_2000_and_then_decodes_it_no_more(tmp_path, monkeypatch):
    index = scan_archive([j2k_series(tmp_path / "archive", ct_like(6, 256, 256))], workers=1)
    (row,) = index.rows
    folder = Folder(tmp_path / "cache", BIG)
    first = Store(index, folder).read_many(row, [everything(row)])[0]
    assert_equal(first, index.read(row.key))
    assert len(entries(folder.path)) == 1
    monkeypatch.setattr(type(index), "read", None)
    monkeypatch.setattr(type(index), "read_many", None)
    again = Store(index, folder).read_many(row, [everything(row)])[0]
    assert again.values.dtype == np.int16 and np.array_equal(again.values, first.values)


@pytest.mark.slow
def test_crops_of_jpeg_2000_slices_come_ten_times_faster_from_the_store(tmp_path):
    index = scan_archive([j2k_series(tmp_path / "archive", ct_like(48, 512, 512))])
    (row,) = index.rows
    store = Store(index, Folder(tmp_path / "cache", BIG), "always")
    window = (slice(5, 37), slice(100, 228), slice(200, 328))
    before = time.perf_counter()
    index.read(row.key, window)
    decoding = time.perf_counter() - before
    store.read_many(row, [window])
    reads = []
    for _ in range(5):
        before = time.perf_counter()
        store.read_many(row, [window])
        reads.append(time.perf_counter() - before)
    assert decoding > 10 * float(np.median(reads))


def test_products_come_as_the_integers_of_their_bands(tmp_path):
    safe_l2a(tmp_path / "archive")
    landsat_product(tmp_path / "archive")
    index = scan_archive([tmp_path / "archive"], max_bad=1.0)
    assert {row.modality for row in index.rows} == {"sentinel2-l2a", "landsat8"}
    for row in index.rows:
        store = Store(index, Folder(tmp_path / "cache", BIG), "always")
        for _ in range(2):
            (piece,) = store.read_many(row, [everything(row)])
            assert piece.values.dtype == np.uint16
            assert_equal(piece, index.read(row.key))


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_the_same_bits_with_a_store_and_without_one(real_index, tmp_path, workers):
    config = DataConfig(crop_2d=(16, 16), crop_3d=(4, 16, 16), cache_mb=0, workers=workers)
    store = Store(real_index, Folder(tmp_path / "cache", BIG), "always")
    plain = Steps(real_index, config, seed=3, batch_size=4)
    cached = Steps(real_index, config, seed=3, batch_size=4, store=store)
    expected = [plain[step].physical() for step in range(6)]
    for _ in range(2):
        for batch, wanted in zip(load_steps(cached, 0, 6, workers=workers), expected, strict=True):
            made = batch.physical()
            assert made.keys == wanted.keys and torch.equal(made.raw, wanted.raw)
            assert torch.equal(made.valid, wanted.valid)
    assert entries(store.folder.path)
