"""The verb scan: parallel, restartable, incremental, verifying, on this machine or on a cluster; never in the way."""

from __future__ import annotations

import ctypes
import hashlib
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from geomed_mae import readers
from geomed_mae.archives import examine, headers
from geomed_mae.archives.build import open_archive
from geomed_mae.archives.headers import find_files, headers_apart
from geomed_mae.archives.index import Index
from geomed_mae.archives.journal import JOURNAL
from geomed_mae.archives.workers import Workers, workers_of
from geomed_mae.errors import (
    ConfigError,
    IntegrityError,
    MissingExtraError,
    OutputError,
    ReadError,
    TooManyBadInputsError,
)
from geomed_mae.readers import child, header_of, reading
from geomed_mae.readers.wire import unpack
from geomed_mae.scan import scan
from tests.make_data import write_geotiff

ROOT = Path(__file__).resolve().parents[1]


def scene(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng([seed, *path.name.encode()]).integers(1, 255, (6, 24, 24)).astype(np.uint8)
    return settle(write_geotiff(path, values))


def settle(path: Path) -> Path:
    """Date a file an hour back: what was written in the last two seconds is not trusted."""
    then = time.time_ns() - 3_600_000_000_000
    os.utime(path, ns=(then, then))
    return path


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    folder = tmp_path / "archive"
    for name in ("a.tif", "b.tif", "c.tif"):
        scene(folder / name)
    (folder / "notes.txt").write_text("notes")
    settle(folder / "notes.txt")
    return folder


class Counted:
    """Counts the files whose header, and the images whose pixels, are read."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.headers: list[str] = []
        self.images: list[str] = []
        for module in (headers, examine):
            monkeypatch.setattr(module, "in_child", self.call)

    def call(self, function, *args, **limits):
        if function is headers._headers:
            self.headers += [path.name for path, _ in args[0]]
        else:
            self.images += [args[0].files[0].name]
        return child.in_child(function, *args, **limits)

    def take(self) -> tuple[list[str], list[str]]:
        found = sorted(self.headers), sorted(self.images)
        self.headers, self.images = [], []
        return found


def landsat(archive: Path, out: Path, **how: object) -> Index:
    return scan([archive], out, modality="landsat7", pictures=False, **how)


def tree(folder: Path) -> dict[str, tuple[int, int, str]]:
    return {
        str(path.relative_to(folder)): (
            path.stat().st_mode,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "",
        )
        for path in sorted(folder.rglob("*"))
    }


def test_a_second_scan_of_an_unchanged_archive_reads_no_file(archive, tmp_path, monkeypatch):
    counted = Counted(monkeypatch)
    first = landsat(archive, tmp_path / "index")
    assert counted.take() == (["a.tif", "b.tif", "c.tif", "notes.txt"], ["a.tif", "b.tif", "c.tif"])
    second = landsat(archive, tmp_path / "index")
    assert counted.take() == ([], [])
    assert second.rows == first.rows and second.ledger == first.ledger, "keys stay what they are"


def test_only_what_is_new_or_has_changed_is_read_again(archive, tmp_path, monkeypatch):
    first = landsat(archive, tmp_path / "index")
    keys = {first.paths(row.key)[0].name: row.key for row in first}
    counted = Counted(monkeypatch)
    scene(archive / "b.tif", seed=1)
    scene(archive / "d.tif")
    (archive / "c.tif").unlink()
    second = landsat(archive, tmp_path / "index")
    assert counted.take() == (["b.tif", "d.tif"], ["b.tif", "d.tif"])
    again = {second.paths(row.key)[0].name: row.key for row in second}
    assert list(again) == ["a.tif", "b.tif", "d.tif"]
    assert (again["a.tif"], again["b.tif"]) == (keys["a.tif"], keys["b.tif"])
    assert first[keys["b.tif"]].content != second[keys["b.tif"]].content
    assert second.ledger.counts == {"files": 4, "used": 3, "skipped": 0, "unsupported": 1}


def test_a_file_written_a_moment_before_the_scan_is_read_again(archive, tmp_path, monkeypatch):
    os.utime(archive / "a.tif")
    landsat(archive, tmp_path / "index")
    counted = Counted(monkeypatch)
    landsat(archive, tmp_path / "index")
    assert counted.take() == (["a.tif"], ["a.tif"])


def test_another_modality_reads_pixels_again_but_no_header(archive, tmp_path, monkeypatch):
    landsat(archive, tmp_path / "index")
    counted = Counted(monkeypatch)
    index = scan([archive], tmp_path / "index", modality="unnamed-raster")
    assert counted.take() == ([], ["a.tif", "b.tif", "c.tif"])
    assert {row.modality for row in index} == {"unnamed-raster"}


def test_a_reason_that_may_pass_is_not_remembered(archive, tmp_path, monkeypatch):
    (archive / "a.tif").unlink()
    (archive / "a.tif").symlink_to(archive / "elsewhere.tif")
    landsat(archive, tmp_path / "index")
    counted = Counted(monkeypatch)
    index = landsat(archive, tmp_path / "index")
    assert counted.take() == (["a.tif"], []) and index.ledger.reasons["VANISHED"] == 1


KILLED = """
import sys, os, time
from pathlib import Path
from geomed_mae.archives import examine, headers, journal
from geomed_mae.scan import scan

journal.COMMIT_SECONDS = 0.0
met = 0
if __name__ == "__main__":
    apart = examine.in_child
    def slow(*args, **limits):
        global met
        met += 1
        if met == 3:
            print("two are done", flush=True)
            time.sleep(60)
        return apart(*args, **limits)
    examine.in_child = slow
    scan([sys.argv[1]], sys.argv[2], modality="landsat7")
"""


def test_a_killed_scan_goes_on_where_it_was(archive, tmp_path, monkeypatch):
    index = tmp_path / "index"
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, str(archive), str(index)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "two are done\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    for refused in (lambda: Index.load(index), lambda: open_archive([index])):
        with pytest.raises(ConfigError, match=r"the scan into .* has not finished: run the same geomed-mae scan again"):
            refused()
    salt = (index / "salt").read_bytes()
    counted = Counted(monkeypatch)
    found = landsat(archive, index)
    assert counted.take() == ([], ["c.tif"])
    assert (index / "salt").read_bytes() == salt and len(found) == 3
    assert Index.load(index).rows == found.rows


def test_a_scan_beyond_the_error_budget_keeps_what_it_found(archive, tmp_path, monkeypatch):
    for name in ("x.tif", "y.tif"):
        (archive / name).write_text("no TIFF")
        settle(archive / name)
    with pytest.raises(TooManyBadInputsError):
        landsat(archive, tmp_path / "index")
    counted = Counted(monkeypatch)
    assert len(landsat(archive, tmp_path / "index", max_bad=0.5)) == 3
    assert counted.take() == ([], [])


def test_an_index_is_replaced_whole_or_not_at_all(archive, tmp_path, monkeypatch):
    index = tmp_path / "index"
    first = landsat(archive, index)
    scene(archive / "d.tif")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("geomed_mae.archives.ledger.Ledger.save", full)
        with pytest.raises(OutputError, match="No space left on device"):
            landsat(archive, index)
    assert Index.load(index).rows == first.rows
    assert len(landsat(archive, index)) == 4
    assert not (index / ".new").exists()


def test_verify_finds_pixels_that_changed_under_unchanged_stamps(archive, tmp_path):
    index = tmp_path / "index"
    landsat(archive, index)
    before = (archive / "b.tif").stat()
    data = bytearray((archive / "b.tif").read_bytes())
    data[-100] ^= 1
    (archive / "b.tif").write_bytes(data)
    os.utime(archive / "b.tif", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert landsat(archive, index).ledger.reasons == {"UNKNOWN_FORMAT": 1}, "stamps cannot tell"
    for _ in range(2):
        found = landsat(archive, index, verify=True)
        assert found.ledger.reasons == {"UNKNOWN_FORMAT": 1, "HASH_MISMATCH": 1}
        (entry,) = [entry for entry in found.ledger.entries if entry.reason == "HASH_MISMATCH"]
        assert entry.detail == (
            "its pixels decode to other values although size and time are unchanged; restore it from a copy"
        )


def test_verify_finds_files_that_no_longer_decode(archive, tmp_path):
    index = tmp_path / "index"
    landsat(archive, index)
    before = (archive / "b.tif").stat()
    (archive / "b.tif").write_bytes(bytes(before.st_size))
    os.utime(archive / "b.tif", ns=(before.st_atime_ns, before.st_mtime_ns))
    (entry,) = [e for e in landsat(archive, index, verify=True).ledger.entries if e.reason == "HASH_MISMATCH"]
    assert entry.detail == "its header has changed although size and time have not; restore it from a copy"


def test_verify_finds_pixels_that_no_longer_decode(tmp_path):
    path = tmp_path / "archive" / "a.tif"
    path.parent.mkdir()
    values = np.random.default_rng(0).integers(1, 255, (6, 64, 64)).astype(np.uint8)
    settle(write_geotiff(path, values, compress="deflate"))
    scene(tmp_path / "archive" / "b.tif")
    landsat(path.parent, tmp_path / "index")
    before, data = path.stat(), bytearray(path.read_bytes())
    data[-2000:-1000] = bytes(1000)
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    (entry,) = [e for e in landsat(path.parent, tmp_path / "index", verify=True).ledger.entries if e.reason]
    assert entry.reason == "HASH_MISMATCH" and entry.detail.startswith("its pixels no longer decode (DECODE_FAILED)")


def test_verify_of_a_sound_archive_finds_nothing(archive, tmp_path, caplog):
    first = landsat(archive, tmp_path / "index")
    assert landsat(archive, tmp_path / "index", verify=True).rows == first.rows and not caplog.records
    scene(archive / "new.tif")
    landsat(archive, tmp_path / "index", verify=True)
    assert "1 of 4 images have not been examined before and could not be compared" in caplog.text


def test_verify_needs_something_to_compare_with(archive, tmp_path):
    with pytest.raises(ConfigError, match="holds no earlier scan to compare with"):
        landsat(archive, tmp_path / "index", verify=True)
    with pytest.raises(ConfigError, match="give the folder of its index as out"):
        scan([archive], verify=True)


def test_a_read_only_archive_is_read_and_left_as_it_was(archive, tmp_path):
    for path in (*archive.rglob("*"), archive):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = tree(archive)
    try:
        landsat(archive, tmp_path / "index", workers=2)
        assert tree(archive) == before
    finally:
        archive.chmod(0o755)


def test_private_files_of_an_index_are_private(archive, tmp_path):
    before = os.umask(0)
    try:
        landsat(archive, tmp_path / "index")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "index").iterdir()}
    private = {"locations.parquet", "salt", JOURNAL}
    assert {name for name, mode in modes.items() if mode == 0o600} >= private


def test_a_damaged_salt_is_an_integrity_error(archive, tmp_path):
    landsat(archive, tmp_path / "index")
    (tmp_path / "index" / "salt").write_bytes(b"short")
    with pytest.raises(IntegrityError, match="the salt of the index .* is damaged"):
        landsat(archive, tmp_path / "index")


def test_workers_find_what_one_finds(archive, tmp_path):
    for number in range(20):
        scene(archive / "more" / f"{number}.tif")
    one = landsat(archive, tmp_path / "index")
    with_workers = scan([archive], modality="landsat7", workers=3)
    assert with_workers.fingerprint == one.fingerprint
    assert [row.statistics for row in with_workers] == [row.statistics for row in one]


def test_progress_sees_every_file_and_every_image(archive, tmp_path):
    seen: dict[str, list[int]] = {}

    def progress(items, what, total):
        for item in items:
            seen.setdefault(what, [0, total])[0] += 1
            yield item

    for _ in range(2):
        seen.clear()
        landsat(archive, tmp_path / "index", workers=2, progress=progress)
        assert seen == {"headers": [4, 4], "pixels": [3, 3]}


def test_a_file_that_kills_the_reader_does_not_take_others_with_it(archive, tmp_path, monkeypatch):
    monkeypatch.setattr(headers, "_headers", _deadly)
    texts = headers_apart([(archive / name, archive) for name in ("a.tif", "b.tif", "c.tif")])
    first, second, third = map(unpack, texts)
    assert first[0] == third[0] == "geotiff"
    assert (second.reason.name, second.detail) == ("DECODE_FAILED", "the decoder crashed (SIGSEGV)")


def _deadly(files):
    from geomed_mae.readers.wire import pack

    if any(path.name == "b.tif" for path, _ in files):
        ctypes.string_at(0)
    return tuple(pack(header_of(path, root)) for path, root in files)


def test_a_codec_that_crashes_costs_its_image_alone(archive, monkeypatch):
    monkeypatch.setattr(examine, "examine", _deadly_pixels)
    index = scan([archive], modality="landsat7")
    assert len(index) == 2 and index.ledger.reasons == {"UNKNOWN_FORMAT": 1, "DECODE_FAILED": 1}


def _deadly_pixels(source):
    from geomed_mae.archives.examine import examine as real

    if source.files[0].name == "b.tif":
        ctypes.string_at(0)
    return real(source)


def test_a_link_to_a_listed_file_is_a_repetition_of_it(archive):
    (archive / "0_first.tif").symlink_to(archive / "a.tif")
    index = scan([archive], modality="landsat7")
    assert len(index) == 3 and index.ledger.reasons == {"UNKNOWN_FORMAT": 1, "DUPLICATE": 1}
    assert index.ledger.counts["files"] == 5


def test_a_link_from_outside_is_a_file_like_any_other(archive, tmp_path):
    (tmp_path / "link.tif").symlink_to(archive / "a.tif")
    index = scan([tmp_path / "link.tif"], modality="landsat7")
    assert len(index) == 1 and index.ledger.counts["used"] == 1
    (tmp_path / "alias").symlink_to(archive)
    assert len(find_files([tmp_path / "alias", archive, archive / "a.tif"])) == 4


def test_copies_of_pixels_are_never_apart(archive):
    (archive / "copy.tif").write_bytes((archive / "a.tif").read_bytes())
    index = scan([archive], modality="landsat7")
    rows = {index.paths(row.key)[0].name: row for row in index}
    assert rows["a.tif"].group == rows["copy.tif"].group
    assert "DUPLICATE_PIXELS" in rows["copy.tif"].flags


NAMES = (b"new\nline.tif", b"\x1b[31mred.tif", b"caf\xc3\xa9.tif", b"\xff\xfe.tif", b"n" * 251 + b".tif")


def test_any_name_that_a_file_can_have_is_read(tmp_path):
    folder = tmp_path / "archive"
    for name in NAMES:
        target = folder / os.fsdecode(name)
        scene(folder / "x.tif", seed=len(name)).rename(target)
        (folder / os.fsdecode(b"bad" + name[:200])).write_text("text")
    index = scan([folder], tmp_path / "index", modality="landsat7", max_bad=1.0)
    assert index.ledger.counts == {"files": 10, "used": 5, "skipped": 4, "unsupported": 1}
    again = Index.load(tmp_path / "index")
    assert {os.fsencode(again.paths(row.key)[0].name) for row in again} == set(NAMES)
    assert all(again.read(row.key).array.shape == (6, 24, 24) for row in again)
    for line in (tmp_path / "index" / "ledger.jsonl").read_text().splitlines():
        assert line.isprintable()


def test_a_dask_cluster_does_the_work(archive, tmp_path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=1, threads_per_worker=2, processes=True, host="127.0.0.1", dashboard_address=None
    ) as cluster:
        index = landsat(archive, tmp_path / "index", dask=cluster.scheduler_address)
        here = os.getpid()
        with workers_of(dask=cluster.scheduler_address) as crew:
            assert crew.count == 2
            (pids,) = [result for _, result in crew.results(_pids, [None])]
    assert here not in pids and pids[0] != pids[1], "a worker decodes in a child of its own"
    assert index.fingerprint == scan([archive], modality="landsat7").fingerprint


def _pids(_: object) -> tuple[int, int]:
    return os.getpid(), child.in_child(os.getpid)


def test_dask_that_is_not_there_says_so(archive, tmp_path, monkeypatch):
    pytest.importorskip("distributed")
    monkeypatch.setattr("geomed_mae.archives.workers.CONNECT_SECONDS", 0.5)
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at 'tcp://127.0.0.1:9'"):
        landsat(archive, tmp_path / "index", dask="tcp://127.0.0.1:9")


def test_dask_that_is_not_installed_names_its_extra(archive, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'geomed-mae\[cluster\]'"):
        landsat(archive, tmp_path / "index", dask="tcp://127.0.0.1:9")


def test_results_come_as_they_are_done_and_an_error_stops_the_rest():
    with workers_of(2) as crew:
        assert sorted(crew.results(abs, [-3, -2, -1])) == [(0, 3), (1, 2), (2, 1)]
        assert list(crew.results(abs, [])) == []
        with pytest.raises(TypeError):
            list(crew.results(abs, [1, "x", 2]))
    assert list(Workers(None, 1).results(abs, [-1])) == [(0, 1)]


def test_an_index_reads_codecs_in_a_child_and_everything_else_here(tmp_path, monkeypatch):

    values = np.full((3, 64, 64), 90, np.uint8)
    values[:, :32] = 30
    write_geotiff(
        tmp_path / "jpeg.tif", values, compress="JPEG", photometric="RGB", tiled=True, blockxsize=64, blockysize=64
    )
    scene(tmp_path / "plain.tif")
    index = scan([tmp_path], modality=["rgb", "landsat7"])
    rows = {index.paths(row.key)[0].name: row for row in index}
    apart = []
    monkeypatch.setattr(reading, "in_child", lambda *args, **limits: apart.append(1) or child.in_child(*args, **limits))
    window = (slice(10, 50), slice(0, 64))
    for name, times in (("plain.tif", 0), ("jpeg.tif", 2)):
        whole = index.read(rows[name].key)
        assert whole.key == rows[name].key and not whole.array.flags.writeable
        if name == "jpeg.tif":
            part = index.read(rows[name].key, window)
            np.testing.assert_array_equal(part.array, whole.crop(window).array)
            assert part.geometry == whole.crop(window).geometry
        assert len(apart) == times


def test_volumes_carry_keyed_hashes_of_frame_and_slices(tmp_path):
    from tests.make_dicom import uid, write_series

    volume = np.random.default_rng(0).integers(0, 99, (5, 8, 8)).astype(np.int16)
    write_series(tmp_path / "archive", volume)
    index = scan([tmp_path / "archive"], tmp_path / "index", modality="ct")
    (row,) = index.rows
    geometry = index.read(row.key).geometry
    assert len(set(geometry.slice_keys)) == 5 and len(geometry.frame_of_reference) == 32
    assert uid("frame") not in repr(geometry)
    part = index.read(row.key, (slice(1, 3), slice(0, 8), slice(0, 8))).geometry
    assert part.slice_keys == geometry.slice_keys[1:3] and part.frame_of_reference == geometry.frame_of_reference
    again = Index.load(tmp_path / "index").read(row.key).geometry
    assert again.slice_keys == geometry.slice_keys


def test_a_card_that_people_wrote_on_stays_while_the_archive_does(archive, tmp_path):
    index = tmp_path / "index"
    landsat(archive, index)
    card = index / "card.md"
    card.write_text(card.read_text() + "Licence: CC0\n")
    landsat(archive, index)
    assert card.read_text().endswith("Licence: CC0\n")
    scene(archive / "d.tif")
    landsat(archive, index)
    assert "Licence: CC0" not in card.read_text() and "images: 4" in card.read_text()


def test_a_file_that_vanishes_between_scan_and_read_says_so(archive):
    index = scan([archive], modality="landsat7")
    (archive / "a.tif").unlink()
    key = next(row.key for row in index if index.paths(row.key)[0].name == "a.tif")
    with pytest.raises(ReadError) as caught:
        index.read(key)
    assert caught.value.reason == "VANISHED" and str(archive) not in str(caught.value)


def test_a_read_that_fails_once_is_done_again(archive, monkeypatch):
    index = scan([archive], modality="landsat7")
    module = readers.reader("geotiff")
    for reason, times in (("DECODE_FAILED", 1), ("VANISHED", 3)):
        failures = [ReadError("a moment of the storage", reason)] * times
        real = module.read

        def flaky(source, window=None, _real=real, _failures=failures):
            if _failures:
                raise _failures.pop()
            return _real(source, window)

        with monkeypatch.context() as patch:
            patch.setattr(module, "read", flaky)
            patch.setattr("geomed_mae.readers.regular.WAITS_S", (0.0, 0.0, 0.0))
            assert index.read(index.rows[0].key).array.shape == (6, 24, 24)
        assert not failures
