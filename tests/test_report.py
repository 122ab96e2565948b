"""The report of a run: self-contained, complete, and honest about damage."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path

import pytest

from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.report import report


def png(path: Path) -> None:
    """Write a one-pixel PNG."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0\0")) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "panels").mkdir()
    png(tmp_path / "panels" / "01-ct.png")
    (tmp_path / "recipe.resolved.yaml").write_text("train: {steps: 20}\n")
    (tmp_path / "environment.json").write_text('{"torch": "2.14"}')
    summary = {"verb": "pretrain", "steps": 20, "loss_last": 0.51234, "reconstruction_error": {"01-ct": {"CT": 12.5}}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [{"step": step, "loss": 2 / step, "pixels": 1 / step, "samples_per_second": 9.0} for step in (10, 20)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_a_report_is_one_file_without_script_or_network(run):
    html = report(run).read_text()
    assert not re.search(r"<script|https?://|src=\"(?!data:)", html)
    assert html.count("data:image/png;base64,") == 2  # the panel and the curves


def test_a_report_shows_numbers_tables_panels_and_the_recipe(run):
    html = report(run).read_text()
    assert "0.5123" in html and "train: {steps: 20}" in html
    assert "reconstruction error" in html and "12.5" in html
    assert "Reconstructions: 01-ct" in html


def test_text_of_a_run_cannot_become_markup(run):
    (run / "recipe.resolved.yaml").write_text("<script>alert(1)</script>")
    assert "<script>" not in report(run).read_text()


def test_a_folder_that_is_no_run_and_an_unfinished_run_are_told_apart(run):
    with pytest.raises(ConfigError, match=r"is no run: it has no recipe.resolved.yaml"):
        report(run / "panels")
    (run / "summary.json").unlink()
    with pytest.raises(ConfigError, match="has not finished; continue it with --resume"):
        report(run)


def test_damaged_records_are_an_integrity_error(run):
    (run / "metrics.jsonl").write_text("{broken")
    with pytest.raises(IntegrityError, match="records of the run .* are damaged"):
        report(run)
