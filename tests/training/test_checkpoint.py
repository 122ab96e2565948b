"""A checkpoint is whole or it is not there, and what is loaded is what was written."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from geomed_mae.errors import IntegrityError, OutputError
from geomed_mae.training import checkpoint


def write(folder, step, keep=2, fill=1.0):
    tensors = {"weight": torch.full((50, 20), fill), "half": torch.ones(3, dtype=torch.bfloat16)}
    return checkpoint.save(folder, step, model=tensors, optimizer={"m": torch.arange(4.0)}, state={"a": [1]}, keep=keep)


def test_what_is_loaded_is_what_was_saved(tmp_path):
    write(tmp_path, 7, fill=2.5)
    found = checkpoint.newest_valid(tmp_path)
    assert found.step == 7 and found.state["a"] == [1]
    assert torch.equal(found.model["weight"], torch.full((50, 20), 2.5)) and found.model["half"].dtype == torch.bfloat16
    assert torch.equal(found.optimizer["m"], torch.arange(4.0))


def test_a_folder_without_checkpoints_has_none(tmp_path):
    assert checkpoint.newest_valid(tmp_path / "absent") is None


def test_the_manifest_is_what_sha256sum_writes(tmp_path):
    folder = write(tmp_path, 7)
    lines = dict(reversed(line.split("  ")) for line in (folder / "MANIFEST.sha256").read_text().splitlines())
    assert set(lines) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert all(hashlib.sha256((folder / name).read_bytes()).hexdigest() == value for name, value in lines.items())


def test_no_file_is_a_pickle(tmp_path):
    for path in write(tmp_path, 7).iterdir():
        assert path.suffix in (".safetensors", ".json", ".sha256")


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step, keep=2)
    assert checkpoint.steps_present(tmp_path) == [3, 4]
    write(tmp_path, 5, keep=1)
    assert checkpoint.steps_present(tmp_path) == [5]


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 7, fill=1.0)
    write(tmp_path, 7, fill=3.0)
    assert float(checkpoint.newest_valid(tmp_path).model["weight"][0, 0]) == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000007"]


def test_what_is_left_of_a_damaged_checkpoint_is_replaced_when_its_step_is_done_again(tmp_path):
    write(tmp_path, 1)
    damaged = write(tmp_path, 7, fill=1.0)
    (damaged / "MANIFEST.sha256").unlink()
    assert checkpoint.newest_valid(tmp_path).step == 1
    write(tmp_path, 7, fill=3.0)
    assert float(checkpoint.newest_valid(tmp_path).model["weight"][0, 0]) == 3.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000007"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json", "MANIFEST.sha256"])
@pytest.mark.parametrize("damage", ["flip", "cut", "remove"])
def test_damage_anywhere_sends_the_reader_to_the_one_before(tmp_path, caplog, name, damage):
    write(tmp_path, 1)
    path = write(tmp_path, 2) / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    else:
        data[len(data) // 2] ^= 0x10
        path.write_bytes(bytes(data) if damage == "flip" else bytes(data[: len(data) // 2]))
    assert checkpoint.newest_valid(tmp_path).step == 1
    assert "trying the one before" in caplog.text


def test_when_none_verifies_the_error_says_so(tmp_path):
    (write(tmp_path, 2) / "state.json").unlink()
    with pytest.raises(IntegrityError, match=r"none of the 1 checkpoints verifies.*--overwrite"):
        checkpoint.newest_valid(tmp_path)


def test_a_full_disk_is_an_output_error_and_the_last_good_one_stays(tmp_path):
    resource = pytest.importorskip("resource")
    write(tmp_path, 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OutputError, match=r"checkpoint of step 2.*earlier checkpoints are intact.*--resume"):
            write(tmp_path, 2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint.newest_valid(tmp_path).step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_disk_that_returns_other_bytes_is_found_out(tmp_path, monkeypatch):
    write(tmp_path, 1)
    digests = checkpoint.digests
    monkeypatch.setattr(checkpoint, "digests", lambda folder: {**digests(folder), "model.safetensors": "0" * 64})
    with pytest.raises(OutputError, match="reads back as something else"):
        write(tmp_path, 2)


def test_multiples_of_keep_every_stay_for_good(tmp_path):
    for step in range(1, 10):
        tensors = {"w": torch.zeros(1)}
        checkpoint.save(tmp_path, step, model=tensors, optimizer={}, state={}, keep=2, keep_every=3)
    assert checkpoint.steps_present(tmp_path) == [3, 6, 8, 9]


def test_averaged_weights_are_what_others_use(tmp_path):
    model = {"w": torch.zeros(3), "buffer": torch.ones(2)}
    checkpoint.save(tmp_path, 1, model=model, optimizer={}, state={}, average={"w": torch.full((3,), 2.0)})
    found = checkpoint.newest_valid(tmp_path)
    assert torch.equal(found.model["w"], torch.zeros(3)) and torch.equal(found.weights["w"], torch.full((3,), 2.0))
    assert torch.equal(found.weights["buffer"], torch.ones(2))


def test_too_little_room_is_an_error_before_anything_is_written_and_says_how_much_is_missing(tmp_path, monkeypatch):
    write(tmp_path, 1)
    status = list(os.statvfs(tmp_path))
    status[1], status[4] = 1 << 20, 10
    monkeypatch.setattr(os, "statvfs", lambda path: os.statvfs_result(status))
    monkeypatch.setattr(checkpoint, "write_folder", lambda *_: pytest.fail("it writes"))
    with pytest.raises(OutputError, match=r"step 2 .*10 MiB are free, 54 MiB more are needed to keep 64 MiB in res"):
        write(tmp_path, 2, keep=1)
    assert checkpoint.newest_valid(tmp_path).step == 1


def test_a_file_is_made_when_the_one_before_is_on_disk(tmp_path, monkeypatch):
    there = []
    real = checkpoint.tensor_bytes

    def noted(tensors):
        there.append([path.name for path in sorted(tmp_path.glob(".step-*/*"))])
        return real(tensors)

    monkeypatch.setattr(checkpoint, "tensor_bytes", noted)
    write(tmp_path, 1)
    assert there == [[], ["model.safetensors"]]


def test_whatever_fails_while_saving_leaves_no_part_behind(tmp_path, monkeypatch):
    def fail(tensors):
        raise MemoryError

    write(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "tensor_bytes", fail)
    with pytest.raises(MemoryError):
        write(tmp_path, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


SAVE_FOR_EVER = """
import sys, torch
from pathlib import Path
from geomed_mae.training import checkpoint
for step in range(1, 10**6):
    checkpoint.save(Path(sys.argv[1]), step, model={"w": torch.full((512, 1024), float(step))}, optimizer={}, state={})
    print(step, flush=True)
"""


def test_a_process_killed_at_any_time_leaves_a_checkpoint_that_loads(tmp_path):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for attempt in range(3):
        with subprocess.Popen(
            [sys.executable, "-c", SAVE_FOR_EVER, str(tmp_path)], stdout=subprocess.PIPE, env=environment, text=True
        ) as child:
            child.stdout.readline()
            time.sleep(0.03 + 0.037 * attempt)
            child.send_signal(signal.SIGKILL)
        found = checkpoint.newest_valid(tmp_path)
        assert found is not None and float(found.model["w"][0, 0]) == found.step
        for step in checkpoint.steps_present(tmp_path):
            checkpoint.load(checkpoint.step_folder(tmp_path, step))
