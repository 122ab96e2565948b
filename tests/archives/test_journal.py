"""The journal: believed only where nothing can have changed, private, and never in the way."""

from __future__ import annotations

import os
import sqlite3
import stat
import time
from pathlib import Path

import pytest

from geomed_mae.archives import journal as module
from geomed_mae.archives.journal import JOURNAL, RACY_NS, Stamp, journal
from geomed_mae.errors import OutputError
from geomed_mae.image import PlaneGeometry
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.source import Refusal, Source
from geomed_mae.readers.wire import pack

HOUR_NS = 3_600_000_000_000


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.tif"
    path.write_bytes(b"abc")
    old(path)
    return path


def old(path: Path, hours: int = 1) -> None:
    then = time.time_ns() - hours * HOUR_NS
    os.utime(path, ns=(then, then))


def source(path: Path, **more: object) -> Source:
    fields = {"reader": "picture", "files": (path,), "modality": "rgb", "channels": (), "shape": (2, 2)}
    return Source(**{**fields, "dtype": "uint8", "geometry": PlaneGeometry(), **more})


def remember(folder: Path, file: Path, outcome: object) -> None:
    with journal(folder) as kept:
        kept.keep_header(file, None, Stamp.of(file), pack(outcome))
        kept.keep_image(source(file), [Stamp.of(file)], outcome)


def recall(folder: Path, file: Path, root: Path | None = None, **more: object) -> tuple[object, object]:
    with journal(folder) as kept:
        stamp = Stamp.of(file)
        return kept.header(file, root, stamp), kept.image(source(file, **more), [stamp])


def test_what_was_kept_is_there_the_next_time(tmp_path, file):
    outcome = Refusal(file, Reason.TRUNCATED, "short")
    remember(tmp_path, file, outcome)
    assert recall(tmp_path, file) == (outcome, outcome)


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_a_file_that_has_changed_is_unknown(tmp_path, file, change):
    remember(tmp_path, file, "x")
    before = file.stat()
    if change == "size":
        file.write_bytes(b"abcd")
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "time":
        old(file, 2)
    else:
        (tmp_path / "b.tif").write_bytes(b"xyz")
        (tmp_path / "b.tif").replace(file)
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert recall(tmp_path, file) == (None, None)


def test_a_file_that_was_just_written_may_change_again_unseen(tmp_path, file):
    os.utime(file)
    remember(tmp_path, file, "x")
    assert recall(tmp_path, file) == (None, None)


def test_a_time_in_the_future_is_wrong_but_settled(tmp_path, file):
    old(file, -24)
    remember(tmp_path, file, "x")
    assert recall(tmp_path, file) == ("x", "x")
    assert not Stamp(1, 100, 1, 100 + RACY_NS - 1).settled and Stamp(1, 100, 1, 100 + RACY_NS).settled


def test_the_root_decides_which_links_are_followed_and_so_belongs_to_the_key(tmp_path, file):
    remember(tmp_path, file, "x")
    assert recall(tmp_path, file, root=tmp_path) == (None, "x")


def test_another_source_of_the_same_file_has_pixels_of_its_own(tmp_path, file):
    remember(tmp_path, file, "x")
    assert recall(tmp_path, file, selector={"scale": [0.1]}) == ("x", None)


def test_another_version_of_the_code_forgets_everything(tmp_path, file, monkeypatch):
    remember(tmp_path, file, "x")
    monkeypatch.setattr(module, "code_version", lambda: "newer")
    assert recall(tmp_path, file) == (None, None)


def test_the_version_follows_the_code():
    found = module.code_version()
    assert found == module.code_version() and len(found) == 64


def test_files_that_are_gone_are_forgotten(tmp_path, file):
    remember(tmp_path, file, "x")
    with journal(tmp_path) as kept:
        kept.forget_others()
    assert recall(tmp_path, file) == (None, None)


def test_it_is_private_from_the_first_byte(tmp_path, file):
    before = os.umask(0)
    try:
        with journal(tmp_path) as kept:
            kept.keep_header(file, None, Stamp.of(file), pack("x"))
            modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.glob(f"{JOURNAL}*")}
            assert modes == {0o600} and len(list(tmp_path.glob(f"{JOURNAL}*"))) == 2, "the rollback file too"
    finally:
        os.umask(before)


def test_names_need_not_be_text(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff\n\x1b[31m.tif")
    path.write_bytes(b"x")
    old(path)
    remember(tmp_path, path, path)
    assert recall(tmp_path, path) == (path, path)


def test_a_damaged_journal_is_begun_anew(tmp_path, file):
    (tmp_path / JOURNAL).write_bytes(b"this is no database" * 100)
    assert recall(tmp_path, file) == (None, None)
    remember(tmp_path, file, "x")
    assert recall(tmp_path, file) == ("x", "x")


def test_an_entry_that_does_not_unpack_is_unknown(tmp_path, file):
    remember(tmp_path, file, "x")
    with sqlite3.connect(tmp_path / JOURNAL) as connection:
        connection.execute("""UPDATE headers SET outcome = '{"c":["os:system","true"]}'""")
    connection.close()
    assert recall(tmp_path, file) == (None, "x")


def test_two_scans_do_not_write_into_one_folder(tmp_path):
    with journal(tmp_path), pytest.raises(OutputError, match="another scan is writing to .*choose another --out"):
        journal(tmp_path).__enter__()


def test_what_was_found_before_a_failure_is_kept(tmp_path, file):
    with pytest.raises(RuntimeError), journal(tmp_path) as kept:
        kept.keep_header(file, None, Stamp.of(file), pack("x"))
        raise RuntimeError
    assert recall(tmp_path, file)[0] == "x"


def test_it_is_committed_while_it_is_written(tmp_path, file, monkeypatch):
    """What a kill costs: no more than the last seconds."""
    monkeypatch.setattr(module, "COMMIT_SECONDS", 0.0)
    pid = os.fork()
    if pid == 0:
        with journal(tmp_path) as kept:
            kept.keep_header(file, None, Stamp.of(file), pack("x"))
            os.kill(os.getpid(), 9)
    os.waitpid(pid, 0)
    assert recall(tmp_path, file)[0] == "x"


def test_a_folder_that_cannot_be_written_is_an_output_error(tmp_path):
    with pytest.raises(OutputError, match="the journal in .* cannot be written"):
        journal(tmp_path / "missing").__enter__()


def test_in_memory_nothing_is_written(tmp_path, file):
    with journal(None) as kept:
        kept.keep_header(file, None, Stamp.of(file), pack("x"))
        assert kept.header(file, None, Stamp.of(file)) == "x"
    assert [path.name for path in tmp_path.iterdir()] == ["a.tif"]
