"""The drivers under benchmarks/ run: two steps on made-up images, tables of made-up lines, archives of a few pixels."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from geomed_mae.modalities import load_modality
from geomed_mae.samples.folder import Folder

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def ablations(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import ablations

    return ablations


@pytest.fixture
def fires(ablations):
    """Four scenes of two groups whose label is bright ground: every floor and encoder can see it."""
    from ablation_tasks import Sample, Task

    rng = np.random.default_rng(0)
    samples = []
    for number in range(4):
        burned = np.zeros((30, 40), bool)
        burned[8:20, 4 + number : 24] = True
        pixels = (burned + 0.1 * rng.standard_normal((5, 30, 40))).astype(np.float32)
        samples.append(Sample(pixels, np.ones(pixels.shape, bool), f"group{number // 2}", burned.astype(np.int16)))
    return Task(
        name="fires",
        samples=tuple(samples),
        channels=load_modality("sentinel2-l2a").channels[:5],
        floor=np.full(5, 0.03, np.float32),
        flips=("y", "x", "rot90"),
        crop=(16, 16),
        classes=(1,),
        few=1,
        held_out=0.5,
        batch=2,
        steps=2,
    )


def made_up(variant, seed, score):
    scores = {readout: {"probe": score, "few": score / 2} for readout in ("last", "middle", "several")}
    return {"task": "fires", "variant": variant, "seed": seed, "steps_scale": 1.0, "scores": scores}


@pytest.mark.parametrize("name", ["base", "fast 25%", "pooled stem", "fixed stem and heads", "channel drop 0.3"])
def test_a_variant_trains_two_steps_and_is_scored_in_three_ways(ablations, fires, name):
    line = ablations.run_variant(fires, name, 0, 1.0)
    assert line["steps"] == 2 and np.isfinite(line["loss_last"])
    assert {readout: set(found) for readout, found in line["scores"].items()} == {
        readout: {"probe", "few"} for readout in ("last", "middle", "several")
    }
    assert all(0 <= score <= 1 for found in line["scores"].values() for score in found.values())
    json.dumps(line)


@pytest.mark.parametrize("name", ["floor: patch statistics", "floor: pixels", "floor: random convolutions"])
def test_floors_see_a_label_that_is_brightness(ablations, fires, name):
    assert ablations.run_variant(fires, name, 0, 1.0)["scores"]["last"]["probe"] > 0.95


def test_the_same_run_gives_the_same_scores(ablations, fires):
    first, again = (ablations.run_variant(fires, "base", 3, 1.0) for _ in range(2))
    assert first["scores"] == again["scores"] and first["loss_last"] == again["loss_last"]


def test_no_group_is_on_both_sides_of_a_split(ablations, fires):
    train, test = ablations.split(fires, 0)
    assert not {fires.samples[n].group for n in train} & {fires.samples[n].group for n in test}
    assert sorted(train + test) == [0, 1, 2, 3]


def test_a_run_that_is_in_the_file_is_not_run_again(ablations, fires, tmp_path, monkeypatch):
    monkeypatch.setattr(ablations, "load_task", lambda name, data: fires)
    results = tmp_path / "results.jsonl"
    arguments = ["run", "--data", str(tmp_path), "--results", str(results), "--tasks", "fires"]
    arguments += ["--variants", "floor: pixels", "floor: random encoder"]
    ablations.main([*arguments, "--seeds", "0"])
    ablations.main([*arguments, "--seeds", "0", "1"])
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(line["variant"], line["seed"]) for line in lines] == [
        (name, seed) for seed in (0, 1) for name in ("floor: random encoder", "floor: pixels")
    ]


def test_the_table_pairs_seeds_and_marks_differences_that_exclude_zero(ablations):
    lines = [made_up("base", seed, 0.5 + 0.1 * seed) for seed in range(3)]
    lines += [made_up("stats 0", seed, 0.4 + 0.1 * seed + 0.001 * seed) for seed in range(3)]
    lines += [made_up("adamw", seed, score) for seed, score in enumerate((0.9, 0.2, 0.8))]
    text = ablations.table(lines)
    row = next(line for line in text.splitlines() if line.startswith("| stats 0 |"))
    # Student's t with two degrees of freedom: 4.303 * 0.001 * sqrt(1/3 + 0.36/0.64).
    assert row.startswith("| stats 0 | 3 | 0.501 (-0.099 ± 0.004 **-**) | 0.251 (-0.049 ± 0.002 **-**) |")
    assert "**" not in next(line for line in text.splitlines() if line.startswith("| adamw |"))


@pytest.fixture
def feed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import feed

    return feed


SMALL = [
    "--rounds",
    "1",
    "--scenes",
    "2",
    "--size",
    "192",
    "--crop-2d",
    "32",
    "--batch-2d",
    "2",
    "--plain-samples",
    "2",
]
SMALL += ["--volumes", "2", "--slices", "6", "--matrix", "48", "--crop-3d", "4", "16", "16"]
SMALL += ["--batch-3d", "2"]


@pytest.mark.parametrize("case", ["tiled", "striped", "j2k", "raw", "nifti"])
def test_the_plain_loader_reads_what_ours_reads(feed, tmp_path, case):
    options = feed.arguments().parse_args(["--cases", case, *SMALL])
    source = next(feed.sources(options, tmp_path))[1]
    index = feed.open_archive([source.folder], [source.modality])
    dataset = source.plain(0)
    window = tuple(slice(3, 3 + size // 2) for size in source.crop)
    # Images have keys of chance order here, so that each of ours must be one of theirs.
    theirs = [dataset.read(image, window[-len(source.crop) :]) for image in range(len(dataset.shapes))]
    for row in index.rows:
        ours = index.read(row.key, window).array
        # They round in float32, as people do; ours once, from float64.
        assert any(np.allclose(ours, other, rtol=1e-6, atol=0) for other in theirs)
    assert dataset[5].shape == (len(row.channels), *source.crop) and dataset[5].dtype == np.float32


def test_feed_compares_epochs_with_a_plain_loader_and_leaves_nothing(feed, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(feed.tempfile, "tempdir", str(tmp_path))
    # The cache leaves 2 GiB of the disk free; how full the disk of this machine is must not decide what is tested.
    monkeypatch.setitem(Folder.__init__.__kwdefaults__, "reserve_bytes", 0)
    feed.main(["--cases", "j2k", "tiled", "--cache", "always", *SMALL])
    told = json.loads(capsys.readouterr().out)
    assert list(told["cases"]) == ["j2k", "tiled"]
    for found in told["cases"].values():
        assert all(low <= middle <= high for middle, low, high in found["ratios_cpu"].values())
        assert found["cache_on_disk_mb"] > 0 and found["samples_of_an_epoch"] > 0
        assert set(found["samples_per_wall_second"]) == {"ours first", "ours second", "ours without cache", "plain"}
    assert list(tmp_path.iterdir()) == []


def test_feed_counts_the_time_and_memory_of_children(feed):
    busy = "import time; x = b'x' * (80 << 20)\nwhile time.process_time() < 0.5: pass"
    cpu, _ = feed.timed(lambda: subprocess.run([sys.executable, "-c", busy], check=True))
    assert 0.4 < cpu < 5
    assert feed.peak_memory(lambda: subprocess.run([sys.executable, "-c", busy], check=True)) > 40


def test_feed_measures_how_long_training_waits(feed, tmp_path, capsys):
    options = feed.arguments().parse_args(["--cases", "tiled", *SMALL])
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "data: {modality: sentinel2-l2a, crop_2d: [16, 16]}\n"
        "model: {size: tiny, depth: 1, patch_2d: [8, 8], decoder_dim: 32, decoder_depth: 1}\n"
        "train: {batch_size: 2, device: cpu}\n"
    )
    source = next(feed.sources(options, tmp_path))[1]
    feed.main(["--waits", f"{recipe}={source.folder}", "--wait-steps", "30"])
    (found,) = json.loads(capsys.readouterr().out)["waits"].values()
    assert 0 < found["data_wait"] < 1 and found["steps"] == 30 and found["samples_per_second"] > 0
