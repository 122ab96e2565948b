"""The report of a run: self-contained, complete, honest about damage, and there before a run has ended."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.report import report
from geomed_mae.training.live_files import BOXES, live_name

ARCHIVE = {
    "images": 3,
    "groups": 2,
    "files": {"files": 5, "used": 3, "skipped": 1, "unsupported": 1},
    "reasons": [
        {"reason": "TRUNCATED", "meaning": "the file ends early", "status": "skipped", "files": 1},
        {"reason": "NON_IMAGE", "meaning": "no image", "status": "unsupported", "files": 1},
    ],
    "bounds": None,
    "modalities": {
        "ct": {
            "images": 3,
            "groups": 2,
            "axes": ["slices", "rows", "columns"],
            "size": [[20, 40], [512, 512], [512, 512]],
            "unit": "mm",
            "spacing": [[1.5, 3.0], [0.7, 0.98], [0.7, 0.98]],
            "without_spacing": 0,
            "valid": [0.75, 0.9, 1.0],
            "dtypes": {"int16": 3},
            "flags": {},
            "channels": [
                {"name": "CT", "kind": "ct", "physics": "120 kV", "unit": "HU", "images": 3, "median": [-900, 40],
                 "values": [-1024, 1200]}
            ],
        }
    },
}  # fmt: skip


def png(path: Path, shade: float = 0.0, boxes: str | None = None) -> None:
    """Write a small grey picture, 30 x 10 pixels, with the text entry of a panel."""
    from matplotlib.image import imsave

    about = {} if boxes is None else {BOXES: boxes}
    imsave(path, np.full((10, 30, 3), shade), metadata=about)


def make_run(tmp_path: Path) -> Path:
    (tmp_path / "panels").mkdir()
    png(tmp_path / "panels" / "01-ct.png")
    (tmp_path / "recipe.resolved.yaml").write_text("train: {steps: 40, batch_size: 18}\n")
    (tmp_path / "environment.json").write_text('{"torch": "2.14", "versions": {"timm": "1.0.28"}}')
    (tmp_path / "archive.json").write_text(json.dumps(ARCHIVE))
    summary = {
        "verb": "pretrain",
        "steps": 40,
        "loss_last": 0.51234,
        "seconds": 7384.0,
        "reconstruction_error": {"01-ct": {"CT": 12.5}},
    }
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"step": step, "loss": 2 / step, "pixels": 1 / step, "samples_per_second": 9.0, "data_wait": 0.02, "lr": 1e-3}
        for step in (10, 20, 30, 40)
    ]
    probes = [{"step": step, "probe_r2": step / 100, "probe_floor_r2": 0.22} for step in (20, 40)]
    lines += [*probes, {"step": 25, "skipped": True, "images": ["k"]}, {"step": 20, "resumed": True}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "encoder").mkdir()
    card = "---\ntags: [a]\n---\n# Encoder\n\n| unit | range |\n|---|---|\n| HU | `-1024` |\n\n    code <here>\n"
    (tmp_path / "encoder" / "README.md").write_text(card)
    return tmp_path


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return make_run(tmp_path)


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    """The report of an untouched run, made once: it takes a second."""
    return report(make_run(tmp_path_factory.mktemp("run"))).read_text(encoding="utf-8")


@pytest.fixture
def text(html: str) -> str:
    return " ".join(Parsed(html).text.split())


class Parsed(HTMLParser):
    """Text, addresses and the balance of tags of a page."""

    VOID = ("meta", "img", "br", "link", "input", "hr")

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open, self.links, self.tags, self.text = [], [], set(), ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "action", "data")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += f" {data}"


def page(run: Path) -> Parsed:
    return Parsed(report(run).read_text(encoding="utf-8"))


def test_a_report_is_one_well_formed_file_without_script_or_network(html):
    found = Parsed(html)
    assert not found.open and not found.tags & {"script", "link", "iframe", "object", "embed", "form"}
    assert found.links and all(link.startswith("data:image/png;base64,") for link in found.links)
    assert not re.search(r"https?://|url\(|@import|\son\w+=", html)
    assert html.count("data:image/png;base64,") == 2  # the panel and the curves


def test_a_report_shows_numbers_tables_panels_and_the_recipe(text):
    for wanted in ("0.5123", "train: {steps: 40, batch_size: 18}", "Reconstruction error", "12.5", "2 h 3 min"):
        assert wanted in text, wanted
    assert "Reconstructions: 01-ct" in text


def test_throughput_is_told_with_the_share_of_waiting(text):
    assert "samples per second 9" in text and "seconds per step 2 18 samples a step" in text
    assert "waiting for data 2.0 %" in text


def test_the_archive_and_every_file_are_accounted_for(text):
    assert "5 files found = 3 used + 1 skipped + 1 unsupported" in text
    assert "skipped TRUNCATED the file ends early 1" in text and "unsupported NON_IMAGE no image 1" in text
    assert "20 to 40 x 512 x 512" in text and "1.5 to 3 x 0.7 to 0.98 x 0.7 to 0.98 mm" in text
    assert "120 kV" in text and "-1024 to 1200 HU" in text


def test_resumed_runs_skipped_steps_and_the_probe_with_its_floor_are_told(text):
    assert "Resumed at step 20." in text
    assert "Steps skipped because loss or gradients were not finite: 25." in text
    assert "0.40 probe R² (random weights 0.22)" in text


def test_the_model_card_is_read_and_not_quoted(html):
    found = Parsed(html)
    assert "Model card of the encoder" in found.text and "tags: [a]" not in found.text and "| HU" not in found.text
    assert "code <here>" in found.text and "code" in found.tags


@pytest.mark.parametrize("file", ["recipe.resolved.yaml", "encoder/README.md"])
def test_text_of_a_run_cannot_become_markup(run, file):
    (run / file).write_text("# a\n\n| <script>alert(1)</script> | b |\n|---|---|\n| <img src=x onerror=y> | `<b>` |")
    html = report(run).read_text()
    assert "<script" not in html and "<img src=x" not in html and "<b>`" not in html


# ----------------------------------------------------------------------------------------------- before a run has ended


def test_an_unfinished_run_says_where_it_is(run):
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as out:
        out.write('{"step": 50, "lo')  # a line that is being written
    text = " ".join(page(run).text.split())
    assert "step 40 of 40: not finished" in text and "Throughput" in text and "Summary" not in text
    assert "0.05 last loss" in text


def test_a_run_that_has_logged_nothing_is_told_from_a_folder_that_is_no_run(run):
    with pytest.raises(ConfigError, match=r"is no run: it has no recipe.resolved.yaml"):
        report(run / "panels")
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(ConfigError, match="has logged no step yet"):
        report(run)


@pytest.mark.parametrize("file", ["metrics.jsonl", "summary.json", "archive.json", "environment.json"])
def test_damaged_records_are_an_integrity_error(run, file):
    (run / file).write_text("{broken")
    with pytest.raises(IntegrityError, match="records of the run .* are damaged"):
        report(run)


def test_a_run_of_an_older_version_without_archive_or_probe_has_a_report_too(run):
    (run / "archive.json").unlink()
    (run / "metrics.jsonl").write_text('{"step": 10, "loss": 1.0}\n{"step": 20, "loss": -0.5}\n')
    assert "Ledger" not in page(run).text


# --------------------------------------------------------------------------------------------------------- live panels


def test_no_folder_of_the_recipe_is_in_a_report(run):
    recipe = "data: {modality: [/home/ada/my sensor.yaml, ct], cache_dir: ~/ada/cache/}\nmodel: {init: /home/ada/vit}\n"
    (run / "recipe.resolved.yaml").write_text(recipe + "train: {steps: 40, batch_size: 18}\n")
    words = " ".join(page(run).text.split())
    assert "ada" not in words and "[my sensor.yaml, ct]" in words and "cache_dir: cache" in words


def test_live_panels_become_a_strip_of_reconstructions(run):
    boxes = "0,0,10,4;0,5,10,9 10,0,20,4;10,5,20,9 20,0,30,4;20,5,30,9"
    for number, step in enumerate((10, 20, 40)):
        png(run / "panels" / f"{live_name(step)}-01-ct.png", 0.2 * number, boxes)
    found = page(run)
    words = " ".join(found.text.split())
    assert "Reconstructions over the steps: 01-ct image seen step 10 step 20 step 40" in words
    assert len(found.links) == 2 + 5


def test_the_cells_of_a_strip_are_cut_where_the_panel_says(tmp_path):
    from matplotlib.image import imread, imsave

    from geomed_mae.reporting.series import GAP, _cut, _read

    pixels = np.random.default_rng(0).integers(0, 255, (10, 30, 3)).astype(np.uint8)
    path = tmp_path / f"{live_name(10)}-01-ct.png"
    imsave(path, pixels, metadata={BOXES: "0,0,10,4;1,5,9,9 10,0,20,4 20,0,30,4"})
    read, boxes = _read(path)
    assert (read == imread(path)).all()
    column = _cut(read, boxes[0])
    assert column.shape[:2] == (8 + GAP, 10)
    assert (column[:4] == read[:4, :10]).all() and (column[4:8] == 1).all()
    assert (column[-4:, 1:9] == read[5:9, 1:9]).all()
    assert (column[-4:, [0, 9]] == 1).all(), "beside a narrower cell stand labels, which are not part of it"


def test_titles_name_the_channels_of_panels_that_share_a_modality(run):
    panels = {"02-mr": ["FLAIR"], "03-mr": ["T1", "T2"], "04-mr": ["a", "b", "c", "d"], "05-mr": []}
    for name in panels:
        png(run / "panels" / f"{name}.png")
    png(run / "panels" / f"{live_name(10)}-02-mr.png", 0.5, "0,0,10,4 10,0,20,4 20,0,30,4")
    png(run / "panels" / f"{live_name(20)}-02-mr.png", 0.5, "0,0,10,4 10,0,20,4 20,0,30,4")
    summary = json.loads((run / "summary.json").read_text())
    summary["reconstruction_error"] |= {name: dict.fromkeys(names, 1.0) for name, names in panels.items()}
    (run / "summary.json").write_text(json.dumps(summary))
    titles = re.findall(r">Reconstructions[^<]*: ([^<]*)<", report(run).read_text())
    expected = ["01-ct", "02-mr FLAIR", "02-mr FLAIR", "03-mr T1/T2", "04-mr, 4 channels", "05-mr"]
    assert titles == expected


def test_a_damaged_picture_is_named(run):
    for step in (10, 20):
        (run / "panels" / f"{live_name(step)}-01-ct.png").write_bytes(b"\x89PNG no picture")
    with pytest.raises(IntegrityError, match=r"'step-00000020-01-ct.png' is damaged"):
        report(run)
