"""Paths that are no plain files, and names that must not break a line of a log."""

from __future__ import annotations

import os
import signal
import socket

import pytest

from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.readers.regular import check_regular, first_bytes, list_files, shown


@pytest.fixture(autouse=True)
def alarm():
    """A FIFO hangs the reader that opens it: no test here may take more than five seconds."""
    signal.signal(signal.SIGALRM, lambda *_: pytest.fail("hung for 5 s"))
    signal.alarm(5)
    yield
    signal.alarm(0)


def reason_of(path, root=None):
    with pytest.raises(ReadError) as caught:
        check_regular(path, root)
    assert str(path.parent) not in str(caught.value), "a message holds a file's name, not its folder"
    return caught.value.reason


def test_a_plain_file_is_returned_resolved(tmp_path):
    file = tmp_path / "a.tif"
    file.write_bytes(b"II*\0")
    link = tmp_path / "b.tif"
    link.symlink_to(file)
    assert check_regular(link, tmp_path) == file
    assert first_bytes(file) == b"II*\0"


def test_what_is_no_regular_file_is_refused_at_once(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "fifo.tif")
    (tmp_path / "folder.tif").mkdir()
    (tmp_path / "zero.tif").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        monkeypatch.chdir(tmp_path)  # socket paths are limited to some hundred bytes
        listener.bind("socket.tif")
        for name in ("fifo.tif", "folder.tif", "zero.tif", "socket.tif"):
            assert reason_of(tmp_path / name) == "NOT_REGULAR"


def test_links_that_loop_leave_or_lead_nowhere_are_told_apart(tmp_path):
    archive = tmp_path / "archive"
    archive.mkdir()
    (tmp_path / "outside.tif").write_bytes(b"x")
    (archive / "leaving.tif").symlink_to(tmp_path / "outside.tif")
    (archive / "loop.tif").symlink_to(archive / "loop.tif")
    (archive / "gone.tif").symlink_to(archive / "nothing.tif")
    assert reason_of(archive / "leaving.tif", archive) == "OUTSIDE_ROOT"
    assert reason_of(archive / "loop.tif", archive) == "LINK_LOOP"
    assert reason_of(archive / "gone.tif", archive) == "VANISHED"


def test_an_empty_file_and_a_forbidden_file_have_their_own_reasons(tmp_path, monkeypatch):
    (tmp_path / "empty.tif").touch()
    assert reason_of(tmp_path / "empty.tif") == "EMPTY"
    (tmp_path / "secret.tif").write_bytes(b"x")
    monkeypatch.setattr(os, "access", lambda *_, **__: False)  # chmod does not stop root
    assert reason_of(tmp_path / "secret.tif") == "PERMISSION"


@pytest.mark.parametrize("name", ["a\nb.tif", "a\x1b[31mred.tif", "a\udcff.tif", "ä.tif"])
def test_a_name_is_shown_as_one_plain_line(tmp_path, name):
    assert shown(tmp_path / name).isprintable() and shown(tmp_path / name).isascii()


def test_a_folder_is_listed_in_order_without_entering_links(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.tif", "b/1.tif", "a.tif"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert [str(p.relative_to(tmp_path)) for p in list_files(tmp_path)] == ["a.tif", "link", "b/1.tif", "b/2.tif"]


def test_a_missing_path_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match="give an existing file or folder"):
        list(list_files(tmp_path / "nothing"))
