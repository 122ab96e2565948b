"""Promise 10: the work touches neither the network nor its inputs, and writes nowhere but to its output.

Python says which files it opens for writing, removes or renames and which addresses it asks for (PEP 578), in the
process, its forks and its decoding children. What C code does of that goes unheard, so that the inputs are read-only,
hashed before and after, and where the system lets a process have a network of its own, that network is empty.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests import make_data, make_dicom

ROOT = Path(__file__).resolve().parents[1]

HOOK = """
import os, sys
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.chown", "os.utime", "os.truncate",
           "os.link", "os.symlink", "os.setxattr", "shutil.rmtree", "shutil.move")
ASKS = ("socket.connect", "socket.bind", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname")
def heard(event, args):
    said = None
    if event in ASKS and not isinstance(args[-1], (str, bytes) if event[7:] in ("connect", "bind") else ()):
        said = repr(args)
    elif event == "open" and isinstance(args[0], (str, bytes)) and (args[2] or 0) & WRITES:
        said = os.fsdecode(args[0])
    elif event in CHANGES:
        said = os.fsdecode(args[0]) if isinstance(args[0], (str, bytes)) else None
    if said not in (None, HEARD) and "__pycache__" not in said and not said.startswith(ALLOWED):
        descriptor = os.open(HEARD, os.O_WRONLY | os.O_APPEND)
        os.write(descriptor, f"{event} {said}\\n".encode())
        os.close(descriptor)
sys.addaudithook(heard)
"""

CHILDREN = """
from geomed_mae.readers import child
child._BOOT = f"exec({HOOK!r}, {{'ALLOWED': {ALLOWED!r}, 'HEARD': {HEARD!r}}}); " + child._BOOT
"""

WORK = """
from geomed_mae.cli import main
for words in WORDS:
    main(words, standalone_mode=False)
"""


def archive(folder: Path) -> Path:
    rng = np.random.default_rng(2)
    for number in range(2):
        volume = rng.integers(0, 900, (6, 40, 40)).astype(np.int16)
        how = {"Modality": "MR", "PatientID": f"P{number}", "SeriesInstanceUID": f"1.2.{number}"}
        make_dicom.write_series(folder / f"mr{number}", volume, FrameOfReferenceUID=f"1.3.{number}", **how)
    make_data.write_geotiff(
        folder / "scene.tif", rng.integers(1, 255, (2, 40, 40)).astype(np.uint8), compress="deflate"
    )
    make_data.write_geotiff(folder / "lossy.tif", rng.integers(1, 255, (1, 64, 64)).astype(np.uint8), compress="jpeg")
    make_data.write_nifti(folder / "volume.nii.gz", rng.integers(0, 900, (12, 10, 8)).astype(np.int16))
    (folder / "page.tif").write_text("<html/>")
    for path in [*folder.rglob("*"), folder]:
        os.utime(path, (1_700_000_000, 1_700_000_000))  # settled: a scan does not trust what has just been written
        path.chmod(0o555 if path.is_dir() else 0o444)
    return folder


def state(folder: Path) -> dict[str, tuple]:
    """Relative name -> (mode, size, time of change, hash of the contents) of everything in a folder."""
    found = {}
    for path in [folder, *sorted(folder.rglob("*"))]:
        status = path.lstat()
        content = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        found[str(path.relative_to(folder))] = (status.st_mode, status.st_size, status.st_mtime_ns, content)
    return found


def private_network() -> list[str]:
    """Return the words that give a command an empty network of its own, [] where the system does not."""
    words = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        return []
    return words if subprocess.run([*words, "true"], capture_output=True, check=False).returncode == 0 else []


def run(tmp_path: Path, code: str, **names: object) -> list[str]:
    """Run code under the hook, with these names; return what was heard that is not allowed."""
    heard, scratch = tmp_path / "heard", tmp_path / "scratch"
    heard.touch()
    scratch.mkdir()
    names |= {
        "ALLOWED": (str(tmp_path / "out"), str(scratch), "/dev/", "/proc/self/"),
        "HEARD": str(heard),
        "HOOK": HOOK,
    }
    script = "\n".join(f"{name} = {value!r}" for name, value in names.items()) + HOOK + CHILDREN + code
    kept = {name: str(scratch) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR")}
    done = subprocess.run(
        [*private_network(), sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,
        env={**os.environ, **kept},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return heard.read_text().splitlines()


MISDEEDS = """
import pathlib, socket
from geomed_mae.errors import ReadError
pathlib.Path(ELSEWHERE).write_text("x")
try:
    socket.create_connection(("127.0.0.1", 9), timeout=1)
except OSError:
    pass
try:
    child.in_child(socket.gethostbyname, "nowhere.invalid")
except ReadError:
    pass
"""


def test_the_hook_hears_what_must_not_be_here_and_in_decoding_children(tmp_path):
    lines = run(tmp_path, MISDEEDS, ELSEWHERE=str(tmp_path / "elsewhere"))
    assert f"open {tmp_path / 'elsewhere'}" in lines
    assert any(line.startswith("socket.connect") for line in lines)
    assert any(line.startswith("socket.gethostbyname ('nowhere.invalid'") for line in lines)


@pytest.mark.skipif(os.name != "posix", reason="modes and network namespaces are those of POSIX systems")
def test_scan_and_pretraining_touch_neither_the_network_nor_their_inputs(tmp_path):
    folder, out = archive(tmp_path / "archive"), tmp_path / "out"
    before = state(folder)
    small = [
        "train.steps=2",
        "train.batch_size=2",
        "train.checkpoint_every=2",
        "model.depth=1",
        "data.crop_3d=[4, 32, 32]",
    ]
    run_words = ["pretrain", "pretrain_mr_tiny", "--archive", str(out / "mr"), "--out", str(out / "run")]
    words = [
        ["scan", str(folder), "--out", str(out / "index"), "--max-bad", "50%", "--split", "group"],
        ["scan", str(folder), "--out", str(out / "index"), "--max-bad", "50%", "--verify"],
        ["scan", str(folder), "--out", str(out / "mr"), "--max-bad", "100%", "--modality", "mr"],
        [*run_words, *(word for one in small for word in ("--set", one))],
        ["report", str(out / "run")],
        ["embed", str(out / "run"), "--archive", str(out / "mr"), "--out", str(out / "vectors")],
    ]
    assert run(tmp_path, WORK, WORDS=words) == []
    assert state(folder) == before
    assert sorted(path.name for path in out.iterdir()) == ["index", "mr", "run", "vectors"]
