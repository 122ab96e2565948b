"""What is read of somebody else's: an output folder that is shared, a model folder, a table of embeddings."""

from __future__ import annotations

import errno
import functools
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from click.testing import CliRunner

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.seen import Seen
from geomed_mae.cli import main
from geomed_mae.embed import embed, search
from geomed_mae.errors import ConfigError, IntegrityError, OutputError, SecurityError
from geomed_mae.export import is_task_model
from geomed_mae.exporters.folder import building
from geomed_mae.heads.task_model import load_task_model, save_task_model
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.manifest import MANIFEST
from geomed_mae.outputs import rounds, work
from geomed_mae.predict import predict
from geomed_mae.scan import scan
from tests.heads.given import task_model
from tests.predicting import MEMORY
from tests.scenes import landsat_scene


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """scenes/, index/, the runs maps/ and classes/ on them, and vectors/ of one of them."""
    root = tmp_path_factory.mktemp("hostile")
    for seed in range(2):
        landsat_scene(root / "scenes" / f"{seed}.tif", None, shape=(64, 48), seed=seed, nodata=0)
    scan([root / "scenes"], root / "index", modality="landsat7", pictures=False)
    index = open_archive([root / "index"])
    for name, task in (("maps", "segment"), ("classes", "classify")):
        save_task_model(root / name, task_model(index, "linear", task, crop=(16, 16)), Seen.nothing())
    embed(root / "maps", [root / "index"], root / "vectors", tile=16)
    return root


# ------------------------------------------------------------------------------------------- OUT/.predicting, the table


@pytest.fixture
def victim(tmp_path):
    """A folder that somebody would miss."""
    (tmp_path / "victim").mkdir()
    for name in ("precious", "0.block"):
        (tmp_path / "victim" / name).write_text("not yours")
    return tmp_path / "victim"


@pytest.mark.parametrize("overwrite", [False, True])
def test_predict_deletes_nothing_behind_a_link_in_its_output_folder(folder, tmp_path, victim, overwrite):
    inside, outside = tmp_path / "a" / work.FOLDER, tmp_path / "b"
    inside.mkdir(parents=True)
    outside.mkdir()
    (inside / "0123456789abcdef").symlink_to(victim)
    (inside / "journal.jsonl").symlink_to(victim / "precious")
    (outside / work.FOLDER).symlink_to(victim)
    predict(folder / "maps", [folder / "index"], tmp_path / "a", overwrite=overwrite)
    with pytest.raises(SecurityError, match="is a link, and predict deletes what is in this folder"):
        predict(folder / "maps", [folder / "index"], outside, overwrite=overwrite)
    inside.mkdir()
    (inside / "lock").symlink_to(victim / "new")
    with pytest.raises(OutputError, match=os.strerror(errno.ELOOP)):
        predict(folder / "maps", [folder / "index"], tmp_path / "a", overwrite=overwrite)
    assert {path.name: path.read_text() for path in victim.iterdir()} == dict.fromkeys(
        ("precious", "0.block"), "not yours"
    )


def test_a_salt_that_somebody_else_has_left_is_not_used(tmp_path, monkeypatch):
    planted = b"x" * work.SALT_BYTES
    (tmp_path / work.FOLDER).mkdir()
    salt = tmp_path / work.FOLDER / "salt"
    salt.write_bytes(planted)
    assert work.Work(tmp_path).salt == planted
    monkeypatch.setattr(work.os, "geteuid", lambda: os.getuid() + 1)
    assert work.Work(tmp_path).salt != planted
    monkeypatch.undo()
    salt.unlink()
    os.mkfifo(salt)
    with work.Work(tmp_path) as mine:
        mine.begin(keep_salt=True, overwrite=False)
        assert salt.read_bytes() == mine.salt and salt.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "change",
    [
        {"key": []},
        {"sha256": {}},
        {"sha256": 3},
        {"pixels": None},
        {"file": 3},
        {"file": "../../x.tif"},
        {"chances": "abc"},
        {"chances": [0.1]},
        {"chances": [float("nan")] * 3},
        "[" * 100_000,
    ],
    ids=lambda change: str(change)[:30],
)
def test_lines_of_a_table_that_are_not_ours_are_no_finished_images(folder, tmp_path, change):
    run = "classes" if "chances" in change else "maps"
    whole = folder / f"whole-{run}"
    if not whole.exists():
        predict(folder / run, [folder / "index"], whole)
    out, table = tmp_path / "out", tmp_path / "out" / work.TABLE
    shutil.copytree(whole, out)
    if run == "classes":
        index, (model, _) = open_archive([folder / "index"]), load_task_model(folder / run)
        task = functools.partial(predict.__globals__["Classifying"], model=model, digest=model.digest, index=index)
        task = task(work=None, ranks=None, batch=8)
        lines = [{"key": row.key, work.DONE: task.fingerprint(row)} for row in index.rows]
    else:
        lines = [json.loads(line) for line in table.read_text().splitlines()]
    table.write_text(
        "".join((change if isinstance(change, str) else json.dumps(line | change)) + "\n" for line in lines)
    )
    again = predict(folder / run, [folder / "index"], out)
    assert "resumed" not in again and again["images"] == 2
    if run == "maps":
        assert table.read_bytes() == (whole / work.TABLE).read_bytes()


def test_a_block_stands_for_no_other_block_of_its_image(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(rounds, "block_size", functools.partial(rounds.block_size, memory=MEMORY))

    def stopping(items, what, total):
        for number, item in enumerate(items):
            if number == 10:
                raise KeyboardInterrupt
            yield item

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        predict(folder / "maps", [folder / "index"], out, progress=stopping)
    one = next((out / work.FOLDER).rglob("*.block"))
    one.rename(one.with_name("1.block" if one.name == "0.block" else "0.block"))
    assert predict(folder / "maps", [folder / "index"], out)["discarded"] == 1


# ---------------------------------------------------------------------------------------------------- model folders


def changed(source: Path, to: Path, name: str, change) -> Path:
    """Copy a model folder with another file in it, which its manifest vouches for."""
    shutil.copytree(source, to)
    data = change(json.loads((to / name).read_text()))
    (to / name).write_text(data if isinstance(data, str) else json.dumps(data))
    sums = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in to.iterdir() if path.name != MANIFEST}
    (to / MANIFEST).write_text("".join(f"{digest}  {name}\n" for name, digest in sorted(sums.items())))
    return to


def encoder(**how):
    return "config.json", lambda data: data | {"encoder": data["encoder"] | how}


def task(**how):
    return "config.json", lambda data: data | {"task": data["task"] | how}


def head(**how):
    return "config.json", lambda data: data | {"task": data["task"] | {"head": data["task"]["head"] | how}}


def channel(**how):
    return "contract.json", lambda data: data | {"channels": [entry | how for entry in data["channels"]]}


CONFIGS = {
    "no json": ("config.json", lambda _: "{x"),
    "a list": ("config.json", lambda _: []),
    "deep": ("config.json", lambda _: "[" * 100_000),
    "no encoder": ("config.json", lambda data: {name: data[name] for name in data if name != "encoder"}),
    "depth": encoder(depth=10**9),
    "width": encoder(dim=10**8),
    "more memory than weights": encoder(dim=48_000),
    "basis": encoder(basis=10**9),
    "patch": encoder(patch_2d=[10**6, 10**6]),
    "half a patch": encoder(patch_2d=[8]),
    "heads": encoder(heads=0),
    "text for a number": encoder(dim="24"),
    "deep contract": ("contract.json", lambda _: "[" * 100_000),
    "scale": channel(scale=0.0),
    "center": channel(center="x"),
}
TASKS = {
    "no task": ("config.json", lambda data: {name: data[name] for name in data if name != "task"}),
    "crop": task(crop=[16 * 10**9, 16 * 10**9]),
    "crop of text": task(crop="xx"),
    "no head": task(head=None),
    "a module": head(name="os"),
    "a path": head(name="../../x"),
    "classes": head(classes=[1, 2, 3]),
    "control characters": head(classes=["a\n1 b", "b", "c"]),
    "codes": head(codes={"background": {"meaning": "x"}}),
    "text of codes": head(codes={"background": {"scheme": "SCT", "value": "1", "meaning": "a\nb"}}),
}


@pytest.mark.parametrize("name", [*CONFIGS, *TASKS])
def test_a_model_folder_of_somebody_else_is_refused_and_costs_no_memory(folder, tmp_path, name):
    bad = changed(folder / "maps" / "model", tmp_path / "bad", *(CONFIGS | TASKS)[name])
    for load in (load_task_model, load_encoder) if name in CONFIGS else (load_task_model,):
        with pytest.raises((ConfigError, IntegrityError)) as refused:
            load(bad)
        assert len(str(refused.value)) < 900


def test_a_manifest_that_lists_pipes_and_devices_does_not_hang(folder, tmp_path):
    bad = shutil.copytree(folder / "maps" / "model", tmp_path / "bad")
    listed = (bad / MANIFEST).read_text()
    (bad / MANIFEST).write_text(f"{'0' * 64}  more\n{listed}")
    for make in (os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir):
        make(bad / "more")
        with pytest.raises(IntegrityError, match=r"more is in MANIFEST.sha256 but cannot be read"):
            load_encoder(bad)
        (bad / "more").rmdir() if (bad / "more").is_dir() else (bad / "more").unlink()
    (bad / "config.json").unlink()
    os.mkfifo(bad / "config.json")
    assert not is_task_model(bad)


# ----------------------------------------------------------------------------------------------- tables of embeddings


def table_of(folder: Path, to: Path, change=None, columns=None) -> Path:
    """Write a table with other metadata or columns."""
    table = pq.read_table(folder / "vectors" / "embeddings.parquet")
    said = json.loads(table.schema.metadata[b"emb"])
    text = json.dumps(said) if change is None else change(said)
    for name, values in (columns(table) if columns else {}).items():
        at = table.schema.get_field_index(name)
        table = table.append_column(name, values) if at < 0 else table.set_column(at, name, values)
    to.mkdir()
    pq.write_table(table.replace_schema_metadata({b"emb": text.encode()}), to / "embeddings.parquet")
    return to


def said(**how):
    return lambda data: json.dumps(data | {"model": data["model"] | how})


@pytest.mark.parametrize(
    "change",
    [
        lambda _: '{"a":' * 100_000,
        lambda _: "[]",
        said(layers=None),
        said(layers=[]),
        said(layers=["x"]),
        said(layers=[10**6]),
        said(layers=[0] * 100),
        said(channels=5),
        said(digest=5),
        lambda data: json.dumps(data | {"tile_px": -5}),
    ],
)
def test_what_a_table_says_of_itself_is_checked_before_a_search(folder, tmp_path, change):
    with pytest.raises(ConfigError, match=r"embeddings\.parquet'"):
        search(folder / "maps", table_of(folder, tmp_path / "t", change), folder / "scenes" / "0.tif")


@pytest.mark.parametrize(
    "values",
    [[[1.0, 2.0]], [[1.0], [2.0] * 24], [None, [1.0] * 24], [["x"]], ["x"]],
    ids=["short", "ragged", "null", "text", "no list"],
)
def test_vectors_of_another_length_are_refused_by_a_search(folder, tmp_path, values):
    def columns(table):
        return {"embedding": pa.array((values * table.num_rows)[: table.num_rows])}

    with pytest.raises(ConfigError, match="write it again with embed --archive"):
        search(folder / "maps", table_of(folder, tmp_path / "t", None, columns), folder / "scenes" / "0.tif")


def test_a_search_shows_columns_that_somebody_has_added(folder, tmp_path):
    def columns(table):
        return {"when": pa.array([0] * table.num_rows, pa.timestamp("s")), "label": pa.array(["sea"] * table.num_rows)}

    table = table_of(folder, tmp_path / "t", None, columns)
    words = ["embed", folder / "maps", "--out", table, "--search", folder / "scenes" / "0.tif", "--top", "1"]
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code == 0, done.output
    (found,) = json.loads(done.stdout)["search"]["nearest"]
    assert found["label"] == "sea" and found["when"].startswith("1970-01-01")


# ------------------------------------------------------------------------------------------------------ disk, signals


def test_a_disk_that_is_full_for_torch_is_exit_4_and_leaves_nothing(tmp_path):
    out = tmp_path / "a" / "export"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        with pytest.raises(OutputError, match="the disk is full"), building(out) as folder:
            resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[1]))
            torch.save({"weight": torch.zeros(10_000)}, folder / "model.pt")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(out.parent.iterdir()) == []
    with pytest.raises(RuntimeError, match="something else"), building(out):
        raise RuntimeError("something else")


STOPPED = """
import os, signal, sys, time
from pathlib import Path
import click
from geomed_mae.cli.group import main
from geomed_mae.writers import complete_file

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored

@main.command()
@click.argument("out")
def wait(out):
    with complete_file(Path(out)) as partial:
        partial.write_text("half")
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
        time.sleep(20)

main(["wait", sys.argv[1]])
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_leaves_nothing_half_written_and_is_no_bug(tmp_path, number, code):
    out = tmp_path / "out" / "file"
    done = subprocess.run(
        [sys.executable, "-c", STOPPED, out],
        env={**os.environ, "SIGNAL": str(int(number))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert list(out.parent.iterdir()) == [] and "bug" not in done.stderr
