"""Faults 51 to 59: of training and of what it stores. Faults of archives are in tests/test_fault_table.py.

What happens to a run from outside is met the way a user meets it, by `geomed-mae pretrain` with exit codes (see
`tests.training.sessions`); what the storage does is done to `checkpoint.save` call by call. Kills are in test_kills.py.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from geomed_mae.errors import ConfigError, IntegrityError, OutputError
from geomed_mae.models.contract import Contract
from geomed_mae.models.encoder_folder import load_encoder, save_encoder
from geomed_mae.models.manifest import MANIFEST, write_folder
from geomed_mae.models.vit import Encoder
from geomed_mae.training import checkpoint
from geomed_mae.training.loop import MAX_BAD_STEPS
from tests.training.conftest import SPEC
from tests.training.sessions import recorded
from tests.training.tiny_run import (
    log_lines,
    parts_of_ranks,
    record_of,
    record_of_rank,
    same_result,
    scan,
    settings,
    start_ranks,
    tensors,
    words,
    write_scene,
)
from tests.training.tripwire import FULL, Tripwire

RNG = np.random.default_rng(51)


def slow(*values: object) -> object:
    """A case of a test that differs little from one that runs by default."""
    return pytest.param(*values, marks=pytest.mark.slow)


REFUSALS = ("ENOSPC", slow("EDQUOT"), "EACCES", slow("EROFS"))


def write(folder: Path, step: int, fill: float = 1.0, keep: int = 2) -> Path:
    tensors = {"weight": torch.full((4, 5), fill), "half": torch.ones(3, dtype=torch.bfloat16)}
    moments = {"m": torch.arange(6.0) * fill}
    return checkpoint.save(folder, step, model=tensors, optimizer=moments, state={"a": [1]}, keep=keep)


# ------------------------------------------------------------------------------------- 52: the disk is full, or refuses


def calls_of_a_save(folder: Path) -> int:
    """Return how many calls a third save makes: one that also deletes the oldest."""
    for step in (1, 2):
        write(folder, step, step)
    with Tripwire(folder) as wire:
        write(folder, 3, 3.0)
    assert {"open", "write", "fsync", "rename", "unlink", "rmdir"} <= set(wire.calls)
    return wire.count


@pytest.mark.parametrize("lasting", [False, True], ids=["once", "for good"])
@pytest.mark.parametrize("fault", REFUSALS)
def test_fault_52_a_save_that_fails_at_any_call_leaves_the_last_good_checkpoint(tmp_path, fault, lasting):
    calls = calls_of_a_save(tmp_path / "count")
    failed = 0
    for at in range(1, calls + 1):
        folder = tmp_path / str(at)
        for step in (1, 2):
            write(folder, step, step)
        with Tripwire(folder, at, fault, lasting):
            try:
                write(folder, 3, 3.0)
                whole = True
            except OutputError as error:
                whole, failed = False, failed + 1
                assert error.exit_code == 4 and os.strerror(getattr(errno, fault)) in str(error)
        found = checkpoint.newest_valid(folder)
        # A failure after the new one is safe on disk may be of the deletion alone: then there are two good ones.
        assert found.step == 3 or (found.step == 2 and not whole), at
        assert torch.equal(found.model["weight"], torch.full((4, 5), float(found.step)))
        if fault in FULL or not lasting:
            assert not [path for path in folder.iterdir() if "partial" in path.name], f"call {at} of {calls}"
        write(folder, 4, 4.0)
        assert checkpoint.steps_present(folder)[-1] == 4
        assert all(path.name.startswith("step-") for path in folder.iterdir()), "the next save clears what was left"
    assert failed >= calls / 2


def test_fault_52_room_is_checked_before_anything_is_written(tmp_path, monkeypatch):
    write(tmp_path, 1)
    usage = shutil.disk_usage(tmp_path)
    status = os.statvfs(tmp_path)
    little = os.statvfs_result([*status[:3], 0, 0, *status[5:10]])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type(usage)(usage.total, usage.total - 100, 100))
    monkeypatch.setattr(os, "statvfs", lambda path: little)
    with Tripwire(tmp_path) as wire, pytest.raises(OutputError, match=r"step 2 .*(free|room)"):
        write(tmp_path, 2)
    assert "write" not in wire.calls
    assert checkpoint.newest_valid(tmp_path).step == 1 and len(list(tmp_path.iterdir())) == 1


# --------------------------------------------------------------------------------------- 53: what was stored is damaged


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def flips(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Every byte of `data` with a chance bit flipped, and with each of them where it is no letter or digit."""
    for place, byte in enumerate(data):
        plain = chr(byte).isalnum() or byte in (0, 255)
        for bit in (int(RNG.integers(8)),) if plain else range(8):
            changed = bytearray(data)
            changed[place] ^= 1 << bit
            yield place, bytes(changed)


def test_fault_53_every_flipped_byte_of_a_checkpoint_is_found_and_the_one_before_is_taken(tmp_path, caplog):
    write(tmp_path, 1)
    newest = write(tmp_path, 2, 2.0)
    tried = 0
    for path in files_of(newest):
        data = path.read_bytes()
        for place, changed in flips(data):
            path.write_bytes(changed)
            caplog.clear()
            assert checkpoint.newest_valid(tmp_path).step == 1, f"{path.name}: byte {place} of {len(data)}"
            assert "trying the one before" in caplog.text
            tried += 1
        path.write_bytes(data)
    assert tried >= 1000
    assert checkpoint.newest_valid(tmp_path).step == 2


def test_fault_53_a_checkpoint_cut_at_any_byte_or_longer_by_one_is_found(tmp_path):
    write(tmp_path, 1)
    newest = write(tmp_path, 2, 2.0)
    for path in files_of(newest):
        data = path.read_bytes()
        for length in range(len(data)):
            path.write_bytes(data[:length])
            assert checkpoint.newest_valid(tmp_path).step == 1, f"{path.name} cut to {length} of {len(data)} bytes"
        path.write_bytes(data + b"\n")
        assert checkpoint.newest_valid(tmp_path).step == 1, f"{path.name} with a byte more"
        path.write_bytes(data)
    assert checkpoint.newest_valid(tmp_path).step == 2


@pytest.mark.parametrize("what", ["removed", "a folder", "of the other step"])
def test_fault_53_a_missing_or_exchanged_file_sends_the_reader_to_the_checkpoint_before(tmp_path, caplog, what):
    names = [path.name for path in files_of(write(tmp_path / "names", 1))]
    for name in names:
        folder = tmp_path / name
        older, newest = write(folder, 1, 1.0), write(folder, 2, 2.0)
        (newest / name).unlink()
        if what == "a folder":
            (newest / name).mkdir()
        elif what == "of the other step":
            shutil.copy(older / name, newest / name)
        caplog.clear()
        assert checkpoint.newest_valid(folder).step == 1, name
        assert "step-00000002" in caplog.text and "trying the one before" in caplog.text
        shutil.rmtree(older)
        with pytest.raises(IntegrityError, match="none of the 1 checkpoints verifies"):
            checkpoint.newest_valid(folder)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder") / "encoder"
    save_encoder(folder, Encoder(SPEC), Contract(channels=()))
    return folder


def test_fault_53_every_flipped_byte_of_an_encoder_is_found(encoder):
    load_encoder(encoder)
    found = 0
    for path in files_of(encoder):
        data = path.read_bytes()
        places = RNG.permutation(len(data))[:200]
        for place in places:
            changed = bytearray(data)
            changed[place] ^= 1 << int(RNG.integers(8))
            path.write_bytes(bytes(changed))
            with pytest.raises(IntegrityError):
                load_encoder(encoder)
            found += 1
        for length in {0, 1, len(data) // 2, len(data) - 1}:
            path.write_bytes(data[:length])
            with pytest.raises(IntegrityError):
                load_encoder(encoder)
        path.write_bytes(data)
    assert found >= 800
    load_encoder(encoder)


def run_of(out: Path) -> dict:
    return json.loads((out / "summary.json").read_text())


@pytest.fixture(scope="module")
def short(place, sessions, tmp_path_factory):
    """A run of twelve steps with checkpoints of steps 4, 8 and 12."""
    out = tmp_path_factory.mktemp("short") / "run"
    done = sessions.run(*words(place, out, *SHORT), record=record_of(out))
    assert done.code == 0, done.said
    return out


SHORT = settings(train__steps=12, train__keep=3)


def copied(run: Path, to: Path) -> Path:
    shutil.copytree(run, to)
    shutil.copy(record_of(run), record_of(to))
    return to


def damage(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 4
    path.write_bytes(data)


def test_fault_53_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(place, short, sessions, tmp_path):
    run = copied(short, tmp_path / "run")
    damage(run / "checkpoints/step-00000012/optimizer.safetensors")
    (run / "checkpoints/step-00000008/state.json").unlink()
    done = sessions.run(*words(place, run, *SHORT, "--resume"), record=record_of(run))
    assert done.code == 0, done.said
    assert "step-00000012" in done.said and "step-00000008" in done.said and "trying the one before" in done.said
    same_result(run, short)


def test_fault_53_a_run_without_a_whole_checkpoint_ends_with_5_and_is_left_alone(place, short, sessions, tmp_path):
    run = copied(short, tmp_path / "run")
    for folder in (run / "checkpoints").iterdir():
        damage(folder / "model.safetensors")
    before = {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()}
    done = sessions.run(*words(place, run, *SHORT, "--resume"))
    assert done.code == 5 and "none of the 3 checkpoints verifies" in done.said
    assert {path: path.read_bytes() for path in (run / "checkpoints").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("fault", ["ENOSPC", *map(slow, ("EDQUOT", "EACCES", "EROFS"))])
def test_fault_52_a_run_whose_disk_fills_ends_with_4_and_goes_on_when_there_is_room(
    place, short, sessions, tmp_path, fault
):
    run = tmp_path / "run"
    wire = {"folder": str(run / "checkpoints"), "at": 30, "fault": fault, "lasting": True}
    done = sessions.run(*words(place, run, *SHORT), record=record_of(run), trip=wire)
    assert done.code == 4, done.said
    assert "error: the checkpoint of step" in done.said and "--resume" in done.said and "Traceback" not in done.said
    assert checkpoint.newest_valid(run / "checkpoints").step in (4, 8)
    assert not (run / "summary.json").exists() and not (run / "encoder").exists()
    done = sessions.run(*words(place, run, *SHORT, "--resume"), record=record_of(run))
    assert done.code == 0, done.said
    same_result(run, short)


def test_fault_52_a_disk_that_is_really_full_is_met_with_4(place, sessions, tmp_path):
    done = sessions.task("fill_a_small_disk", tmp_path, tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text()) if done.code == 0 else {}
    if "refused" in result:
        pytest.skip(f"a disk of our own cannot be mounted here: {result['refused']}")
    assert done.code == 0, done.said
    assert result["exit_code"] == 4 and result["left"] == ["step-00000001"] and result["newest"] == 1


# --------------------------------------------------------------------------------------- 54: what would run when opened


class Canary:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def pickled(path: Path, canary: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps({"state_dict": Canary(canary)}))
    return path


def zipped(path: Path, canary: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": Canary(canary)}, path)
    return path


def shards(folder: Path, canary: Path) -> Path:
    """A folder as torch.distributed.checkpoint writes it, with a .metadata that runs."""
    pickled(folder / ".metadata", canary)
    (folder / "__0_0.distcp").write_bytes(bytes(64))
    return folder


def hugging_face(folder: Path, canary: Path, **config: object) -> Path:
    folder.mkdir(parents=True)
    config = {"model_type": "vit_mae", "architectures": ["ViTMAEForPreTraining"], **config}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"import os; os.mkdir({str(canary)!r})")
    pickled(folder / "pytorch_model.bin", canary)
    return folder


EVIL = {
    "a pickle": lambda folder, canary: pickled(folder / "last.ckpt", canary),
    "a torch.save file": lambda folder, canary: zipped(folder / "weights.pt", canary),
    "a folder with a pickle": lambda folder, canary: pickled(folder / "run" / "last.ckpt", canary).parent,
    "a run with a pickled encoder": lambda folder, canary: pickled(folder / "run/encoder/model.pth", canary).parents[1],
    "a pickle named safetensors": lambda folder, canary: pickled(folder / "m/model.safetensors", canary).parent,
    "a DCP folder": lambda folder, canary: shards(folder / "dcp", canary),
    "a folder with remote code": lambda folder, canary: hugging_face(
        folder / "hf", canary, auto_map={"AutoModel": "evil.Model"}, _target_="os.mkdir", _instantiator="os.mkdir"
    ),
}
"""Things to start from that run code when they are opened, and what makes them."""

IN_WORDS = dict.fromkeys(("a DCP folder", "a pickle named safetensors", "a run with a pickled encoder"), "no encoder")
"""Those of them in which no pickle is looked for, because nothing says that they are models."""


@pytest.mark.parametrize("what", EVIL)
def test_fault_54_a_model_that_would_run_code_is_refused_and_does_not(place, sessions, tmp_path, what):
    canary = tmp_path / "canary"
    evil = EVIL[what](tmp_path, canary)
    if evil.is_file() and evil.suffix == ".ckpt":
        pickle.loads(evil.read_bytes())
        assert canary.is_dir(), "the trap is set"
        canary.rmdir()
    done = sessions.run(*words(place, tmp_path / "out", *settings(model__init=evil)))
    assert done.code == (2 if what in IN_WORDS else 7), done.said
    assert IN_WORDS.get(what, "is a pickle, which can run any code") in done.said
    assert not canary.exists() and not (tmp_path / "out").exists()


YAMLS = {
    "python/object": ("train: !!python/object/apply:os.mkdir ['{canary}']", "not valid YAML|could not determine"),
    "python/name": ("train: {{steps: !!python/name:os.mkdir}}", "not valid YAML|could not determine"),
    "target": ("model: {{patch_2d: [4, 4], _target_: os.mkdir, path: '{canary}'}}", "unknown key 'model._target_'"),
    "instantiator": ("_instantiator: os.mkdir", "unknown key '_instantiator'"),
    "expression": ("train: {{steps: $import os; os.mkdir('{canary}')}}", "train.steps"),
    "interpolation": ("train: {{steps: '${{oc.env:HOME}}'}}", "train.steps"),
}


@pytest.mark.parametrize("what", YAMLS)
def test_fault_54_a_recipe_names_no_code(place, sessions, tmp_path, what):
    text, words_of_error = YAMLS[what]
    (tmp_path / "recipe.yaml").write_text(text.format(canary=tmp_path / "canary"))
    done = sessions.run("pretrain", tmp_path / "recipe.yaml", "--archive", place / "index", "--out", tmp_path / "out")
    assert done.code == 2 and re.search(words_of_error, done.said), done.said
    assert not (tmp_path / "canary").exists() and not (tmp_path / "out").exists()


def test_fault_54_a_checkpoint_that_became_a_pickle_is_passed_over_even_with_a_manifest(
    place, short, sessions, tmp_path
):
    run, canary = copied(short, tmp_path / "run"), tmp_path / "canary"
    newest = run / "checkpoints/step-00000012"
    files = {path.name: path.read_bytes() for path in newest.iterdir() if path.name != MANIFEST}
    shutil.rmtree(newest)
    write_folder(newest, {**files, "model.safetensors": pickle.dumps(Canary(canary))})
    done = sessions.run(*words(place, run, *SHORT, "--resume"), record=record_of(run))
    assert done.code == 0 and "trying the one before" in done.said
    assert not canary.exists()
    same_result(run, short)


def test_fault_54_names_of_code_in_an_encoders_config_are_refused_by_name(short, tmp_path):
    folder = tmp_path / "encoder"
    files = {p.name: p.read_bytes() for p in (short / "encoder").iterdir() if p.name != MANIFEST}
    config = json.loads(files["config.json"])
    config["spec"]["_target_"] = "os.mkdir"
    write_folder(folder, {**files, "config.json": json.dumps(config).encode()})
    with pytest.raises(ConfigError, match="no field .'_target_'"):
        load_encoder(folder)


# --------------------------------------------------------------------------------------------- 55: losses that are none


def skipped(run: Path) -> dict[int, str]:
    """Return the log lines of skipped steps."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return {json.loads(line)["step"]: line for line in lines if json.loads(line).get("skipped")}


@pytest.mark.parametrize(("value", "bad"), [("nan", [3, 7, 11]), slow("inf", [0]), slow("-inf", [5])])
def test_fault_55_a_broken_step_is_skipped_and_recorded_with_its_images(place, sessions, tmp_path, value, bad):
    run = tmp_path / "run"
    done = sessions.run(*words(place, run, *SHORT), record=record_of(run), broken_loss={"steps": bad, "value": value})
    assert done.code == 0, done.said
    made, lines = recorded(Path(record_of(run))), skipped(run)
    assert list(lines) == [step + 1 for step in bad] and run_of(run)["skipped_steps"] == len(bad)
    for step in bad:
        assert all(key in lines[step + 1] for key in made[step]["keys"])
    found = checkpoint.newest_valid(run / "checkpoints")
    assert all(torch.isfinite(value).all() for value in (*found.model.values(), *found.optimizer.values()))


def test_fault_55_a_broken_step_changes_no_weight(place, sessions, tmp_path):
    run = tmp_path / "run"
    often = settings(train__steps=3, train__checkpoint_every=1, train__keep=3)
    assert sessions.run(*words(place, run, *often), broken_loss={"steps": [1]}).code == 0
    first, second, third = (checkpoint.load(checkpoint.step_folder(run / "checkpoints", step)) for step in (1, 2, 3))
    same = [
        all(torch.equal(one.model[k], two.model[k]) for k in one.model)
        for one, two in ((first, second), (second, third))
    ]
    assert same == [True, False]


def test_fault_55_every_fourth_step_broken_and_stopped_between_is_the_run_that_was_not_stopped(
    place, sessions, tmp_path
):
    bad = {"steps": [0, 4, 8, 9]}
    one, two = tmp_path / "one", tmp_path / "two"
    assert sessions.run(*words(place, one, *SHORT), record=record_of(one), broken_loss=bad).code == 0
    stop = {"step": 7, "number": signal.SIGTERM}
    assert sessions.run(*words(place, two, *SHORT), record=record_of(two), broken_loss=bad, signal_at=stop).code == 75
    assert sessions.run(*words(place, two, *SHORT, "--resume"), record=record_of(two), broken_loss=bad).code == 0
    same_result(two, one)
    assert run_of(two)["skipped_steps"] == run_of(one)["skipped_steps"] == 4


def test_fault_55_losses_that_stay_broken_end_the_run_with_8_and_a_resume_can_mend_it(place, short, sessions, tmp_path):
    run = tmp_path / "run"
    longer = settings(train__steps=30, train__checkpoint_every=4, train__keep=20)
    done = sessions.run(*words(place, run, *longer), record=record_of(run), broken_loss={"steps": [], "beyond": 6})
    assert done.code == 8 and "not finite" in done.said and "train.lr" in done.said
    assert list(skipped(run)) == list(range(7, 7 + MAX_BAD_STEPS))
    last = checkpoint.newest_valid(run / "checkpoints")
    assert last.step >= 4 and all(torch.isfinite(value).all() for value in last.model.values())
    assert not (run / "summary.json").exists()
    done = sessions.run(*words(place, run, *longer, "--resume"))
    assert done.code == 0 and run_of(run)["steps"] == 30


# ----------------------------------------------------------------------------------------------- 56: loader workers die


@pytest.mark.parametrize("how", ["SIGKILL", slow("SIGSEGV"), slow("SIGBUS"), "MemoryError", slow("hang")])
def test_fault_56_a_worker_that_dies_or_hangs_is_replaced_without_a_trace_in_the_result(
    place, short, sessions, tmp_path, how
):
    run = tmp_path / "run"
    faults = {"worker_dies": {"step": 9, "how": how, "mark": str(tmp_path / "mark")}, "loader_timeout": 3}
    session = sessions.start(*words(place, run, *SHORT, *settings(data__workers=2)), record=record_of(run), **faults)
    assert session.wait(60) == 0, session.said
    assert (tmp_path / "mark").stat().st_size == 1, "the worker did come to grief"
    assert re.search(r"loader worker.* at step \d", session.said) and "Traceback" not in session.said
    same_result(run, short)


@pytest.mark.parametrize("how", ["SIGKILL", slow("hang")])
def test_fault_56_workers_that_keep_dying_end_the_run_with_4_and_the_way_out(place, sessions, tmp_path, how):
    run = tmp_path / "run"
    often = {"step": 9, "how": how, "mark": str(tmp_path / "mark"), "times": 99}
    session = sessions.start(
        *words(place, run, *SHORT, *settings(data__workers=1)), worker_dies=often, loader_timeout=2
    )
    assert session.wait(60) == 4, session.said
    assert "data.workers=0" in session.said and "Traceback" not in session.said
    assert checkpoint.newest_valid(run / "checkpoints").step in (4, 8)


# -------------------------------------------------------------------------------------- 57: told to stop, or left alone


@pytest.mark.parametrize(
    ("number", "workers"),
    [(signal.SIGTERM, 0), (signal.SIGUSR1, 2), slow(signal.SIGTERM, 2), slow(signal.SIGUSR1, 0)],
)
def test_fault_57_a_signal_in_a_step_saves_and_exits_75(place, short, sessions, tmp_path, number, workers):
    run = tmp_path / "run"
    arguments = words(place, run, *SHORT, *settings(data__workers=workers))
    done = sessions.run(*arguments, record=record_of(run), signal_at={"step": 5, "number": number})
    assert done.code == 75 and "--resume" in done.said
    assert checkpoint.newest_valid(run / "checkpoints").step == 6
    assert not (run / "summary.json").exists()
    done = sessions.run(*arguments, "--resume", record=record_of(run))
    assert done.code == 0, done.said
    same_result(run, short)


def test_fault_57_a_signal_while_a_checkpoint_is_written_saves_too(place, short, sessions, tmp_path):
    run = tmp_path / "run"
    wire = {"folder": str(run / "checkpoints"), "at": 8, "fault": "SIGTERM"}
    done = sessions.run(*words(place, run, *SHORT), record=record_of(run), trip=wire)
    assert done.code == 75, done.said
    assert checkpoint.newest_valid(run / "checkpoints").step in (4, 5)
    assert sessions.run(*words(place, run, *SHORT, "--resume"), record=record_of(run)).code == 0
    same_result(run, short)


@pytest.fixture(scope="module")
def pair(place, sessions, tmp_path_factory):
    """The short run, made by two processes."""
    out = tmp_path_factory.mktemp("pair") / "run"
    ranks = start_ranks(sessions, words(place, out, *SHORT), out)
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.said for rank in ranks)
    return out


@pytest.mark.parametrize("told", [slow(0), 1])
def test_fault_57_a_signal_to_one_of_two_processes_stops_and_saves_both(place, pair, sessions, tmp_path, told):
    run = tmp_path / "run"
    ranks = start_ranks(
        sessions, words(place, run, *SHORT), run, {told: {"signal_at": {"step": 5, "number": signal.SIGTERM}}}
    )
    assert [rank.wait() for rank in ranks] == [75, 75], "".join(rank.said for rank in ranks)
    assert checkpoint.newest_valid(run / "checkpoints").step == 6
    ranks = start_ranks(sessions, words(place, run, *SHORT, "--resume"), run)
    assert [rank.wait() for rank in ranks] == [0, 0]
    assert tensors(run) == tensors(pair) and parts_of_ranks(run) == parts_of_ranks(pair)


def lost(place, sessions, run: Path, victim: int, number: int) -> None:
    """Take one of two processes away in the middle of a run; the other must end with 4 in time, checkpoints whole."""
    limit = settings(train__timeout_s=10)
    ranks = start_ranks(sessions, words(place, run, *SHORT, *limit), run, {0: {"slow": 0.05}, 1: {"slow": 0.05}})
    ranks[victim].until(lambda: len(recorded(Path(record_of_rank(run, victim)))) >= 7)
    ranks[victim].kill(number)
    survivor = ranks[1 - victim]
    try:
        assert survivor.wait(10 + 20) == 4, survivor.said
    finally:
        ranks[victim].kill(signal.SIGKILL)
    assert "another process" in survivor.said and "--resume" in survivor.said and "Traceback" not in survivor.said
    assert ranks[victim].wait() == -signal.SIGKILL
    assert checkpoint.newest_valid(run / "checkpoints").step in (4, 8)


@pytest.mark.parametrize("victim", [slow(0), 1])
def test_fault_57_the_death_of_a_process_ends_the_other_and_the_run_goes_on(place, pair, sessions, tmp_path, victim):
    run = tmp_path / "run"
    lost(place, sessions, run, victim, signal.SIGKILL)
    ranks = start_ranks(sessions, words(place, run, *SHORT, "--resume"), run)
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.said for rank in ranks)
    assert tensors(run) == tensors(pair) and parts_of_ranks(run) == parts_of_ranks(pair)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_fault_57_a_process_that_hangs_is_waited_for_no_longer_than_the_timeout(place, sessions, tmp_path, victim):
    lost(place, sessions, tmp_path / "run", victim, signal.SIGSTOP)


@pytest.mark.slow
def test_fault_57_broken_losses_of_one_process_are_skipped_by_both(place, sessions, tmp_path):
    run = tmp_path / "run"
    ranks = start_ranks(sessions, words(place, run, *SHORT), run, {1: {"broken_loss": {"steps": [5]}}})
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.said for rank in ranks)
    (line,) = skipped(run).values()
    assert all(key in line for key in parts_of_ranks(run)[5]["keys"])


# ---------------------------------------------------------------------------------------- 58: resumed as something else


def test_fault_58_a_run_that_goes_on_with_other_workers_is_the_same_run(place, short, sessions, tmp_path):
    run = tmp_path / "run"
    for workers, stop in ((0, 3), (1, 6), (3, 9), (0, None)):
        faults = {} if stop is None else {"signal_at": {"step": stop, "number": signal.SIGTERM}}
        arguments = words(place, run, *SHORT, *settings(data__workers=workers), "--resume")
        done = sessions.run(*arguments, record=record_of(run), **faults)
        assert done.code == (0 if stop is None else 75), done.said
    same_result(run, short)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"train__seed": 8}, "train.seed: 7 -> 8"),
        ({"train__lr": 0.5, "data__min_valid": 0.5}, "data.min_valid: 0.25 -> 0.5; train.lr: 0.001 -> 0.5"),
        ({"train__batch_size": 8}, "train.batch_size: 4 -> 8"),
        ({"model__mask_ratio": 0.5}, "model.mask_ratio: 0.75 -> 0.5"),
    ],
)
def test_fault_58_another_recipe_ends_with_5_and_the_difference(place, short, sessions, tmp_path, change, named):
    run = copied(short, tmp_path / "run")
    done = sessions.run(*words(place, run, *SHORT, *settings(**change), "--resume"))
    assert done.code == 5 and named in done.said, done.said


@pytest.mark.parametrize("change", ["a scene more", slow("a scene less"), "another pixel"])
def test_fault_58_another_archive_ends_with_5_and_the_difference(place, short, sessions, tmp_path, change):
    run, archive = copied(short, tmp_path / "run"), tmp_path / "archive"
    shutil.copytree(place / "archive", archive)
    if change == "a scene less":
        (archive / "1.tif").unlink()
    else:
        write_scene(archive / ("3.tif" if change == "a scene more" else "1.tif"), 3, 40)
    index = scan(sessions, archive, tmp_path / "index")
    done = sessions.run(*words(place, run, *SHORT, "--resume", index=index))
    assert done.code == 5 and "another archive" in done.said, done.said
    now = {"a scene more": "3 images, now 4", "a scene less": "3 images, now 2", "another pixel": "pixels"}[change]
    assert now in done.said
    assert sessions.run(*words(place, run, *SHORT, "--resume")).code == 0


def digests(run: Path, first: int = 0) -> dict[int, str]:
    """Return the hash of each batch from a step on; keys of images are of one scan, their pixels are not."""
    return {step: entry["digest"] for step, entry in recorded(Path(record_of(run))).items() if step >= first}


@pytest.mark.parametrize("order", [slow("kept"), "reversed"])
def test_fault_58_the_same_images_at_another_place_are_the_same_batches(place, short, sessions, tmp_path, order):
    run, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(short, run)
    shutil.rmtree(run / "checkpoints/step-00000012")
    moved.mkdir()
    for number in range(3):
        shutil.copy(place / f"archive/{number}.tif", moved / f"{2 - number if order == 'reversed' else number}.tif")
    index = scan(sessions, moved, tmp_path / "index")
    done = sessions.run(*words(place, run, *SHORT, "--resume", index=index), record=record_of(run))
    if order == "reversed" and done.code == 5:
        return  # other names may be another archive, as long as the run says so
    assert done.code == 0, done.said
    assert digests(run) == digests(short, first=8)
    assert tensors(run) == tensors(short)


def test_fault_58_two_processes_get_the_samples_of_one(short, pair):
    alone, shared = recorded(Path(record_of(short))), parts_of_ranks(pair)
    assert alone.keys() == shared.keys()
    for step, batch in shared.items():
        assert batch["samples"] == alone[step]["samples"] == [0, 1, 2, 3]
        assert batch["keys"] == alone[step]["keys"]


def losses(run: Path) -> np.ndarray:
    return np.array([loss for _, loss, _ in log_lines(run)])


def test_fault_58_one_and_two_processes_differ_by_rounding(short, pair):
    np.testing.assert_allclose(losses(pair), losses(short), rtol=1e-4)


def test_fault_58_a_run_may_go_on_with_another_number_of_processes(place, short, sessions, tmp_path):
    run = copied(short, tmp_path / "run")
    shutil.rmtree(run / "checkpoints/step-00000012")
    ranks = start_ranks(sessions, words(place, run, *SHORT, "--resume"), run)
    assert [rank.wait() for rank in ranks] == [0, 0], "".join(rank.said for rank in ranks)
    alone, shared = recorded(Path(record_of(short))), parts_of_ranks(run)
    assert list(shared) == [8, 9, 10, 11]
    assert all(batch["keys"] == alone[step]["keys"] for step, batch in shared.items())
    assert losses(run)[:8].tolist() == losses(short)[:8].tolist()
    np.testing.assert_allclose(losses(run), losses(short), rtol=1e-4)


# ------------------------------------------------------------------------------------------------ 59: a cache that lies


@pytest.mark.parametrize("harm", ["flipped", slow("cut"), slow("emptied"), slow("removed")])
def test_fault_59_a_cache_that_was_tampered_with_changes_nothing(place, short, sessions, tmp_path, harm):
    run, cache = tmp_path / "run", tmp_path / "cache"
    arguments = words(place, run, *SHORT, *settings(data__cache="always", data__cache_dir=cache, data__cache_mb=0))
    stop = {"step": 5, "number": signal.SIGTERM}
    done = sessions.run(*arguments, record=record_of(run), signal_at=stop)
    assert done.code == 75, done.said
    kept = [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size > 0]
    assert sum(path.stat().st_size for path in kept) > 6 * 40 * 40, "the images are in it"
    for path in kept:
        harmed(path, harm)
    done = sessions.run(*arguments, "--resume", record=record_of(run))
    assert done.code == 0, done.said
    assert harm == "removed" or "cache is damaged" in done.said, "it was read, and not believed"
    same_result(run, short)


@pytest.mark.slow
def test_fault_59_two_runs_share_a_cache_that_is_just_being_made(place, short, sessions, tmp_path):
    runs = [tmp_path / "one", tmp_path / "two"]
    cached = settings(data__cache="always", data__cache_dir=tmp_path / "cache", data__cache_mb=0, data__workers=1)
    begun = [sessions.start(*words(place, run, *SHORT, *cached), record=record_of(run)) for run in runs]
    assert [session.wait() for session in begun] == [0, 0], "".join(session.said for session in begun)
    for run in runs:
        same_result(run, short)


def test_fault_59_a_second_run_in_the_same_folder_ends_with_4(place, sessions, tmp_path):
    run = tmp_path / "run"
    first = sessions.start(*words(place, run, *SHORT), record=record_of(run), slow=60)
    try:
        first.until(lambda: bool(recorded(Path(record_of(run)))))  # its first batch: by then it holds the run
        second = sessions.run(*words(place, run, *SHORT, "--resume"))
        assert second.code == 4 and "another process is writing the run" in second.said
        assert first.code is None
    finally:
        first.kill()
    assert first.wait() == -signal.SIGKILL


def harmed(path: Path, harm: str) -> None:
    data = bytearray(path.read_bytes())
    mode = path.stat().st_mode
    path.chmod(0o600)
    if harm == "flipped":
        for place in range(0, len(data), 97):
            data[place] ^= 1 << (place % 8)
    path.write_bytes(data if harm == "flipped" else data[: len(data) // 2] if harm == "cut" else b"")
    path.chmod(mode)
    if harm == "removed":
        path.unlink()
