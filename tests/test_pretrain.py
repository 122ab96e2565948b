"""The verbs pretrain and reconstruct, on tiny real GeoTIFFs."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import socket
import time

import numpy as np
import pytest
import torch

from geomed_mae.archives.build import open_archive
from geomed_mae.errors import ConfigError, IntegrityError, Preempted, TooManyBadInputsError
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.pretrain import adapted, pretrain, within_budget
from geomed_mae.recipe_file import build_recipe, dump_recipe, load_recipe, recipes_folder
from geomed_mae.reconstruct import reconstruct
from geomed_mae.samples.batch import Batch
from geomed_mae.scan import scan
from geomed_mae.training import checkpoint
from geomed_mae.training.objective import MaskedObjective, restore_objective
from tests.make_published import timm_vit, vit_mae
from tests.training.test_distributed import start

rasterio = pytest.importorskip("rasterio")

RECIPE = {
    "data": {"modality": "landsat7", "crop_2d": [16, 16], "crops_per_read": 1},
    "model": {"depth": 1, "patch_2d": [4, 4], "basis": 4, "decoder_dim": 16, "decoder_depth": 1},
    "train": {"steps": 6, "batch_size": 4, "log_every": 2, "checkpoint_every": 100},
}


def recipe(**changes):
    data = {key: dict(value) for key, value in RECIPE.items()}
    for key, value in changes.items():
        section, name = key.split("__")
        data.setdefault(section, {})[name] = value
    return build_recipe(data)


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """Three six-band scenes of smooth fields with noise, one smaller than the crop."""
    folder = tmp_path_factory.mktemp("JANE_DOE")
    rng = np.random.default_rng(0)
    for number, size in enumerate((48, 40, 12)):
        rows, columns = np.mgrid[:size, :size] / 8
        field = np.stack([np.sin(rows + band) + np.cos(columns * (1 + band / 5)) for band in range(6)])
        data = (100 + 40 * field + rng.normal(0, 2, field.shape)).astype(np.uint8)
        transform = rasterio.Affine(30, 0, 500000 + 5000 * number, 0, -30, 4000000)
        with rasterio.open(
            folder / f"scene{number}.tif",
            "w",
            driver="GTiff",
            height=size,
            width=size,
            count=6,
            dtype="uint8",
            crs="EPSG:32618",
            transform=transform,
        ) as out:
            out.write(data)
    return folder


@pytest.fixture(scope="module")
def run(archive, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    return pretrain(recipe(), [archive], out), out


def tensors(out):
    found = checkpoint.newest_valid(out / "checkpoints")
    return found.step, {**found.model, **{f"optimizer {name}": value for name, value in found.optimizer.items()}}


def test_a_run_leaves_everything_that_others_need(run):
    result, out = run
    assert result["run"] == str(out) and result["encoder"] == str(out / "encoder") and result["steps"] == 6
    for name in ("recipe.resolved.yaml", "environment.json", "metrics.jsonl", "train.log", "summary.json"):
        assert (out / name).stat().st_size > 0, name
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000006"]
    assert [path.name for path in (out / "panels").iterdir()] == ["01-landsat7.png"]
    summary = json.loads((out / "summary.json").read_text())
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert summary["loss_first"] == lines[0]["loss"] and summary["loss_last"] == lines[-1]["loss"]
    assert summary["samples"] == 24 and summary["verb"] == "pretrain" and 0.5 < summary["valid_fraction"] <= 1
    assert set(summary["reconstruction_error"]["01-landsat7"]) == {"B1", "B2", "B3", "B4", "B5", "B7"}


def test_the_encoder_embeds_images_of_the_archive(run, archive):
    encoder = load_encoder(run[1])
    index = open_archive([archive], ["landsat7"])
    assert encoder.contract.fingerprint == index.fingerprint and encoder.contract.images == 3
    assert np.isfinite(encoder.embed(index.read(index.rows[0].key))).all()


def test_the_contract_scales_by_the_median_of_all_images(run, archive):
    entries = load_encoder(run[1]).contract.of("landsat7")
    rows = open_archive([archive], ["landsat7"]).rows
    for place, entry in enumerate(entries):
        assert entry.center == np.median([row.statistics[place].median for row in rows])
        assert entry.scale == np.median([row.statistics[place].spread for row in rows])


def test_no_name_of_the_archive_or_the_machine_is_in_the_run(run, archive):
    words = [str(archive), "JANE_DOE", "scene1", str(run[1])]
    # Names of a few letters are in any megabyte of weights by chance.
    words += [socket.gethostname()] if len(socket.gethostname()) > 5 else []
    for path in run[1].rglob("*"):
        content = path.name.encode() + (path.read_bytes() if path.is_file() else b"")
        assert not [word for word in words if word.encode() in content or word.encode("utf-16-le") in content], path


def test_the_archive_is_left_as_it_was(archive, tmp_path):
    def state():
        return {
            path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest()) for path in archive.iterdir()
        }

    before = state()
    pretrain(recipe(train__steps=1), [archive], tmp_path / "run")
    assert state() == before


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_that_is_stopped_and_resumed_is_the_run_that_was_not(run, archive, tmp_path, monkeypatch, workers):
    original = MaskedObjective.loss

    def stop_in_third(self, batch, step):
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, step)

    monkeypatch.setattr(MaskedObjective, "loss", stop_in_third)
    with pytest.raises(Preempted):
        pretrain(recipe(data__workers=2 - workers), [archive], tmp_path / "run")
    monkeypatch.undo()
    assert tensors(tmp_path / "run")[0] == 3 and not (tmp_path / "run/summary.json").exists()
    pretrain(recipe(data__workers=workers), [archive], tmp_path / "run", resume=True)
    step, resumed = tensors(tmp_path / "run")
    _, whole = tensors(run[1])
    assert step == 6 and resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    same = [(tmp_path / "run/encoder/model.safetensors"), run[1] / "encoder/model.safetensors"]
    assert same[0].read_bytes() == same[1].read_bytes()


def test_resume_with_another_archive_is_an_integrity_error(run, archive, tmp_path):
    one = archive / "scene0.tif"
    with pytest.raises(IntegrityError, match="made from another archive"):
        pretrain(recipe(), [one], run[1], resume=True)


def test_keys_that_do_not_change_the_result_may_change_between_sessions(archive, tmp_path):
    pretrain(recipe(train__steps=2), [archive], tmp_path / "run")
    changes = {
        "train__steps": 4,
        "train__accumulate": 2,
        "train__checkpoint_every": 1,
        "train__keep": 5,
        "train__keep_every": 1,
        "train__log_every": 1,
        "train__timeout_s": 50,
        "train__panels_every": 3,
        "data__workers": 1,
        "data__cache": "off",
        "data__cache_mb": 1,
    }
    result = pretrain(recipe(**changes), [archive], tmp_path / "run", resume=True)
    assert result["steps"] == 4
    assert checkpoint.steps_present(tmp_path / "run/checkpoints") == [2, 3, 4]
    with pytest.raises(IntegrityError, match=r"another recipe \(train.ema: None -> 0.9\)"):
        pretrain(recipe(**changes, train__ema=0.9), [archive], tmp_path / "run", resume=True)


def test_the_encoder_of_a_run_with_an_average_has_the_averaged_weights(archive, tmp_path):
    pretrain(recipe(train__ema=0.9, train__panels_every=3), [archive], tmp_path / "run")
    saved = checkpoint.newest_valid(tmp_path / "run/checkpoints")
    weights = load_encoder(tmp_path / "run").module.state_dict()
    for name, value in weights.items():
        assert torch.equal(value, saved.average.get(f"encoder.{name}", value)), name
    name = "blocks.0.attn.qkv.weight"
    assert not torch.equal(weights[name], saved.model[f"encoder.{name}"])
    panel = reconstruct(tmp_path / "run", [archive / "scene0.tif"], tmp_path / "panel.png")["error"]["panel.png"]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert set(panel) == set(summary["reconstruction_error"]["01-landsat7"])
    restored = restore_objective(saved).mae.state_dict()
    assert torch.equal(restored[f"encoder.{name}"], weights[name])


def test_an_average_makes_no_difference_to_what_is_learned(run, archive, tmp_path):
    pretrain(recipe(train__ema=0.5, train__panels_every=2), [archive], tmp_path / "run")
    mine, plain = (checkpoint.newest_valid(out / "checkpoints") for out in (tmp_path / "run", run[1]))
    for part in ("model", "optimizer"):
        one, other = getattr(mine, part), getattr(plain, part)
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def two_processes(monkeypatch):
    launched = {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1}
    for name, value in launched.items():
        monkeypatch.setenv(name, str(value))


def test_several_processes_need_an_index_and_a_batch_that_they_can_share(archive, tmp_path, two_processes):
    with pytest.raises(ConfigError, match=r"2 processes need an INDEX.*geomed-mae scan ARCHIVE... --out INDEX"):
        pretrain(recipe(), [archive], tmp_path / "run")
    index = scan([archive], tmp_path / "index", modality="landsat7", max_bad=1.0)
    assert len(index) == 3
    with pytest.raises(ConfigError, match=r"batch_size 4 cannot be shared by 2 processes in 4 parts.*multiple of 8"):
        pretrain(recipe(train__accumulate=4), [tmp_path / "index"], tmp_path / "run")
    with pytest.raises(ConfigError, match="--dry-run looks at one process"):
        pretrain(recipe(), [tmp_path / "index"], tmp_path / "run", dry_run=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_two_processes_make_the_run_that_one_makes_and_stop_together(run, archive, tmp_path):
    scan([archive], tmp_path / "index", modality="landsat7", max_bad=1.0)
    (tmp_path / "recipe.yaml").write_text(dump_recipe(recipe()))
    command = ["-m", "geomed_mae", "pretrain", str(tmp_path / "recipe.yaml"), "--archive", str(tmp_path / "index")]

    def ends(started):
        told = [process.communicate(timeout=200) for process in started]
        return [process.returncode for process in started], told

    codes, told = ends(start([*command, "--out", str(tmp_path / "two")]))
    assert codes == [0, 0], told
    assert json.loads(told[0][0])["steps"] == 6 and told[1][0] == "", "one of them has the result"
    lines = [
        [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        for out in (tmp_path / "two", run[1])
    ]
    for mine, alone in zip(*lines, strict=True):
        assert mine["loss"] == pytest.approx(alone["loss"], rel=1e-4) and mine["samples"] == alone["samples"]
    assert (tmp_path / "two/encoder/model.safetensors").is_file()

    again = [*command, "--out", str(tmp_path / "long"), "--set", "train.steps=100000"]
    started = start(again)
    while not (tmp_path / "long/metrics.jsonl").exists() or not (tmp_path / "long/metrics.jsonl").read_text():
        assert [process.poll() for process in started] == [None, None]
        time.sleep(0.1)
    started[1].send_signal(signal.SIGTERM)
    codes, told = ends(started)
    assert codes == [75, 75], told
    (step,) = checkpoint.steps_present(tmp_path / "long/checkpoints")
    result = pretrain(recipe(train__steps=step + 2), [tmp_path / "index"], tmp_path / "long", resume=True)
    assert result["steps"] == step + 2


def test_a_dry_run_tells_the_plan_and_writes_nothing(archive, tmp_path):
    plan = pretrain(recipe(), [archive], tmp_path / "run", dry_run=True)
    assert list(tmp_path.iterdir()) == []
    (bucket,) = plan["buckets"]
    assert bucket["images"] == 3 and bucket["tokens"] == 16 and bucket["tokens_seen"] == 4
    assert plan["images"] == 3 and plan["samples"] == 24 and plan["loader_samples_per_second"] > 0
    assert bucket["memory_mb"] > 0 and plan["parameters"] > 0
    json.dumps(plan)


def test_an_encoder_can_be_the_start_of_another_run(run, archive, tmp_path, monkeypatch):
    started = {}

    def note(self, batch, step):
        started.update({name: value.clone() for name, value in self.mae.encoder.state_dict().items()})
        raise RuntimeError("enough")

    monkeypatch.setattr(MaskedObjective, "loss", note)
    with pytest.raises(RuntimeError, match="enough"):
        pretrain(recipe(model__init=str(run[1]), train__seed=9), [archive], tmp_path / "run")
    weights = load_encoder(run[1]).module.state_dict()
    assert all(torch.equal(started[name], weights[name]) for name in weights)


def test_an_encoder_of_another_shape_is_refused_with_the_keys(run, archive, tmp_path):
    with pytest.raises(ConfigError, match=r"model.init is an encoder with depth 1, here 2; set model.depth=1$"):
        pretrain(recipe(model__init=str(run[1]), model__depth=2), [archive], tmp_path / "run")


def hugging_face(folder, **changes):
    """Write a Hugging Face model with the encoder and decoder of RECIPE; return it."""
    shape = {"hidden_size": 192, "num_hidden_layers": 1, "intermediate_size": 768, "image_size": 16, "patch_size": 4}
    shape |= {"decoder_hidden_size": 16, "decoder_num_attention_heads": 1, "decoder_intermediate_size": 64}
    theirs = vit_mae(**{**shape, **changes})
    theirs.save_pretrained(folder, safe_serialization=True)
    return theirs


@pytest.mark.parametrize("learned", [False, True])
def test_a_hugging_face_model_can_be_the_start_of_a_run_on_other_bands(archive, tmp_path, monkeypatch, learned):
    theirs = hugging_face(tmp_path / "hf")
    if learned:
        torch.nn.init.normal_(theirs.vit.embeddings.position_embeddings)
        theirs.save_pretrained(tmp_path / "hf", safe_serialization=True)
    started = {}

    def note(self, batch, step):
        started.update({name: value.clone() for name, value in self.mae.state_dict().items()})
        return original(self, batch, step)

    original = MaskedObjective.loss
    monkeypatch.setattr(MaskedObjective, "loss", note)
    start = recipe(model__init=str(tmp_path / "hf"), model__mode="exact", train__steps=1)
    result = pretrain(start, [archive], tmp_path / "run")
    assert torch.equal(started["encoder.norm.weight"], theirs.vit.layernorm.weight)
    assert torch.equal(started["decoder.embed.weight"], theirs.decoder.decoder_embed.weight)
    assert np.isfinite(result["loss_last"])
    encoder = load_encoder(tmp_path / "run")
    assert encoder.spec.learned_positions == ((4, 4) if learned else None)
    assert {entry.modality for entry in encoder.contract.channels} == {"rgb", "landsat7"}
    again = recipe(model__init=str(tmp_path / "run"), train__steps=1)
    pretrain(again, [archive], tmp_path / "again")
    reconstruct(tmp_path / "run", [archive / "scene0.tif"], tmp_path / "panel.png")


def test_a_foreign_model_of_another_shape_is_refused_with_the_keys_to_set(archive, tmp_path):
    hugging_face(tmp_path / "hf", hidden_size=384, num_attention_heads=6, intermediate_size=1536, patch_size=8)
    with pytest.raises(ConfigError, match=r"set model.size=small model.depth=1 model.patch_2d=\[8,8\]$"):
        pretrain(recipe(model__init=str(tmp_path / "hf")), [archive], tmp_path / "run")
    hugging_face(tmp_path / "odd", hidden_size=96, intermediate_size=384)
    with pytest.raises(ConfigError, match=r"dim 96, here 192; recipes have the widths and heads of timm's sizes alone"):
        pretrain(recipe(model__init=str(tmp_path / "odd")), [archive], tmp_path / "run")
    hugging_face(tmp_path / "fit")
    with pytest.raises(ConfigError, match=r"other channels beside 3 known ones need 4 basis filters"):
        pretrain(recipe(model__init=str(tmp_path / "fit"), model__basis=3), [archive], tmp_path / "run")


def test_learned_positions_of_images_are_no_start_for_volumes_too(tmp_path):
    timm_vit(tmp_path)
    spec = ModelSpec(dim=48, depth=2, heads=3, patch_2d=(8, 8), patch_3d=(2, 8, 8))
    with pytest.raises(ConfigError, match=r"for 2 spatial axes; a recipe that starts from it has model.patch_2d alone"):
        adapted(spec, load_encoder(tmp_path))
    volumes = ModelSpec(dim=48, depth=2, heads=3, patch_3d=(2, 8, 8))
    assert adapted(volumes, load_encoder(tmp_path)) == volumes


def test_what_the_recipe_lacks_is_an_error_that_names_it(archive, tmp_path):
    with pytest.raises(ConfigError, match="this recipe has a head, it is for finetune"):
        pretrain(build_recipe({**RECIPE, "head": {}}), [archive], tmp_path / "run")
    with pytest.raises(ConfigError, match="no section 'model'"):
        pretrain(build_recipe({"data": {}}), [archive], tmp_path / "run")
    volume = {"data": {"modality": "landsat7", "crop_3d": [2, 8, 8]}, "model": {"patch_3d": [1, 4, 4]}}
    with pytest.raises(ConfigError, match=r"'landsat7' \(raster, .*\): set data.crop_2d and model.patch_2d"):
        pretrain(build_recipe(volume), [archive], tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_a_run_never_lies_in_its_archive_or_around_it(archive):
    for out in (archive, archive / "run", archive.parent):
        with pytest.raises(ConfigError, match="lie in one another; choose another --out"):
            pretrain(recipe(), [archive], out)


def test_images_that_vanish_are_named_once_and_many_of_them_end_the_run(caplog):
    def batch(*failed):
        empty = torch.zeros(1, 1, 2, 2)
        return Batch(empty, empty.bool(), (), "ct", None, ("k",), ((),), 0, failed)

    made = within_budget(iter([batch(), batch("a: TRUNCATED"), batch("a: TRUNCATED")]), images=5)
    assert len(list(made)) == 3 and caplog.text.count("image a: TRUNCATED could not be read any more") == 1
    with pytest.raises(TooManyBadInputsError, match="2 of 5 images can no longer be read"):
        list(within_budget(iter([batch("a: TRUNCATED"), batch("b: PERMISSION")]), images=5))


def test_reconstruct_draws_the_images_that_it_is_given(run, archive, tmp_path):
    result = reconstruct(run[1], [archive / "scene0.tif"], tmp_path / "new" / "panel.png")
    assert result["panels"] == [str(tmp_path / "new/panel.png")] and result["step"] == 6
    assert (tmp_path / "new/panel.png").read_bytes()[:4] == b"\x89PNG"
    assert all(
        entry["mean_absolute_error"] > 0 and entry["unit"] == "DN" for entry in result["error"]["panel.png"].values()
    )


def test_reconstruct_says_what_it_needs(archive, tmp_path):
    with pytest.raises(ConfigError, match=r"is no run: it has no recipe.resolved.yaml"):
        reconstruct(tmp_path, [archive], tmp_path / "panel.png")


PACKAGED = sorted(path.stem for path in recipes_folder().glob("pretrain_*.yaml"))


def test_the_promised_recipes_are_there():
    assert {"pretrain_landsat7_tiny", "pretrain_ct_tiny", "pretrain_mr_tiny"} <= set(PACKAGED)


@pytest.mark.data
@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("pretrain_landsat7_tiny", "sat/landsat7"),
        ("pretrain_ct_tiny", "med/ct_abdomen/dicom"),
        ("pretrain_mr_tiny", "med/hippocampus/images"),
    ],
)
def test_recipes_run_on_real_images(shared_data, tmp_path, name, folder):
    small = load_recipe(name, ["train.steps=2", "train.batch_size=2"])
    result = pretrain(small, [shared_data / folder], tmp_path / "run")
    assert result["steps"] == 2 and 0 < result["loss_last"] < 5
    load_encoder(tmp_path / "run")
