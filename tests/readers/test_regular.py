"""Paths that are no plain files, and names that must not break a line of a log."""

from __future__ import annotations

import errno
import os
import signal
import socket
from pathlib import Path

import pytest

from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.readers import regular
from geomed_mae.readers.regular import (
    believed,
    check_regular,
    first_bytes,
    list_files,
    patiently,
    quoted,
    shown,
    without_quotes,
)


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


@pytest.mark.parametrize("text", ["Doe^Jane", "a`b", "a\nb\x1b[31m", "ä\udcff", b"\xff\xd8J\n", "x" * 500, ""])
def test_what_a_file_says_is_shown_in_one_line_and_left_out_of_public_files(text):
    message = f"its name is {quoted(text)}, which is none"
    assert message.isprintable() and message.isascii() and message.count("`") == 2 and len(message) < 600
    assert without_quotes(message) == "its name is (not shown), which is none"
    assert without_quotes(message[:14]) == "its name is (not shown)"  # a message that was cut


def test_a_folder_is_listed_in_order_without_entering_links(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/2.tif", "b/1.tif", "a.tif"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "b")
    assert [str(p.relative_to(tmp_path)) for p in list_files(tmp_path)] == ["a.tif", "link", "b/1.tif", "b/2.tif"]


def test_a_missing_path_says_what_to_give(tmp_path):
    with pytest.raises(ConfigError, match="give an existing file or folder"):
        list(list_files(tmp_path / "nothing"))


class Storage:
    """A function that fails with these errors, one a call, before it works."""

    def __init__(self, *errors: Exception) -> None:
        self.errors = list(errors)
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        if self.errors:
            raise self.errors.pop(0)
        return "data"


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(regular, "WAITS_S", (0.0, 0.0, 0.0))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN])
def test_a_storage_that_fails_for_a_moment_is_asked_again(impatient, code):
    storage = Storage(OSError(code, "x"), OSError(code, "x"))
    assert patiently(storage) == "data" and storage.calls == 3


def test_a_storage_that_goes_on_failing_is_believed(impatient):
    storage = Storage(*[OSError(errno.EIO, "x")] * 9)
    with pytest.raises(OSError, match="x"):
        patiently(storage)
    assert storage.calls == 4


def test_an_error_that_will_not_pass_is_believed_at_once(impatient):
    storage = Storage(PermissionError(errno.EACCES, "x"))
    with pytest.raises(PermissionError):
        patiently(storage)
    assert storage.calls == 1


@pytest.mark.parametrize(("reason", "calls"), [("DECODE_FAILED", 2), ("VANISHED", 4), ("TRUNCATED", 1)])
def test_what_a_library_says_of_a_file_that_is_there_is_asked_again(impatient, tmp_path, reason, calls):
    (tmp_path / "a").write_text("x")
    storage = Storage(*[ReadError("x", reason)] * 9)
    with pytest.raises(ReadError):
        believed(storage, [tmp_path / "a"])
    assert storage.calls == calls
    assert believed(Storage(*[ReadError("x", reason)] * (calls - 1)), [tmp_path / "a"]) == "data"


def test_a_file_that_is_gone_is_not_waited_for(impatient, tmp_path):
    storage = Storage(*[ReadError("x", "VANISHED")] * 9)
    with pytest.raises(ReadError):
        believed(storage, [tmp_path / "a"])
    assert storage.calls == 1


@pytest.mark.parametrize(
    ("code", "reason", "text"),
    [
        (errno.ENOENT, "VANISHED", "a.tif does not exist (any more)"),
        (errno.EACCES, "PERMISSION", "a.tif may not be read by this user"),
        (errno.EIO, "DECODE_FAILED", "a.tif cannot be read: Input/output error"),
    ],
)
def test_what_the_operating_system_says_becomes_a_reason(impatient, tmp_path, code, reason, text):
    storage = Storage(*[OSError(code, os.strerror(code), str(tmp_path / "a.tif"))] * 9)
    with pytest.raises(ReadError) as caught:
        believed(storage, [tmp_path / "a.tif"])
    assert (caught.value.reason, str(caught.value)) == (reason, text)


def test_checks_and_first_bytes_survive_a_moment_of_the_storage(impatient, tmp_path, monkeypatch):
    file = tmp_path / "a.tif"
    file.write_bytes(b"II*\0")
    for owner, name in ((Path, "resolve"), (Path, "open")):
        real = getattr(owner, name)
        failures = [OSError(errno.ESTALE, "stale"), OSError(errno.EIO, "i/o")]

        def flaky(*args, _real=real, _failures=failures, **options):
            if _failures:
                raise _failures.pop()
            return _real(*args, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, flaky)
            assert (check_regular(file), first_bytes(file)) == (file, b"II*\0")
        assert not failures
