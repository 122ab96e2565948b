"""The drafted data card."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geomed_mae.archives.card import draft_card, physics
from geomed_mae.archives.index import Index
from geomed_mae.archives.split_file import load_split
from geomed_mae.archives.splits import SplitRequest, parse_shares
from geomed_mae.image import Channel
from geomed_mae.scan import scan
from tests.make_data import write_geotiff
from tests.scenes import landsat_scene


@pytest.fixture
def index(tmp_path: Path) -> Index:
    """Six scenes, one of them twice, one smaller and near the antimeridian, a text file and a flat scene."""
    archive = tmp_path / "archive"
    for seed in range(5):
        landsat_scene(archive / f"{seed}.tif", None, shape=(32, 40), seed=seed)
    (archive / "again.tif").write_bytes((archive / "0.tif").read_bytes())
    landsat_scene(archive / "small.tif", None, shape=(24, 32), seed=7, nodata=0)
    write_geotiff(archive / "flat.tif", np.full((6, 24, 24), 7, np.uint8))
    (archive / "notes.txt").write_text("hello")
    request = SplitRequest(method="group", shares=parse_shares("60,20,20"))
    return scan([archive], tmp_path / "index", modality="landsat7", split=request, max_bad=1.0)


def test_the_card_accounts_for_files_copies_sizes_and_parts(index, tmp_path):
    text = (tmp_path / "index" / "card.md").read_text()
    lines = text.splitlines()
    assert lines[:7] == ["---", "name: draft", "images: 7", "groups: 6", "files: 9", "modality: [landsat7]", "---"]
    for line in (
        "9 files = 7 used + 1 skipped + 1 unsupported (1 x NO_INFORMATION, 1 x UNKNOWN_FORMAT).",
        "| NO_INFORMATION | every valid pixel has the same value | skipped | 1 |",
        "| UNKNOWN_FORMAT | no reader knows this format | unsupported | 1 |",
        "- 7 images in 6 groups (patients or scenes, with everything that overlaps or looks the same); "
        "the largest group has 2",
        "- same pixels as another image: 2",
        "- look like another image, with other pixels: 0",
        "- size (rows x columns): 6 x 32 x 40, 1 x 24 x 32",
        "- spacing in m (rows x columns): 28.5 x 28.5",
        "- stored as: uint8",
        "- valid pixels: 93.75 to 100 %, mean 99.11 %",
        "- flags: 2 x DUPLICATE_PIXELS",
        "![7 of 7 images, B3, B2, B1 as red, green, blue](card/landsat7-images.png)",
        "By group, seed 0.",
    ):
        assert line in lines, line
    # Scenes lie 100 km from one another from 15 degrees east on.
    assert (
        "- on the globe, to whole degrees: longitude 15 to 24, latitude 40 to 41 (7 images; 0 have no place)" in lines
    )
    split = load_split(tmp_path / "index", index.rows)
    for name, share in (("train", "0.6"), ("validation", "0.2"), ("test", "0.2")):
        count = split.counts[name]
        assert any(line.startswith(f"| {name} | {share} | {count} | {count / 7:.3g} |") for line in lines)


def test_the_channel_table_has_medians_over_images(index):
    text = draft_card(index)
    row = next(line for line in text.splitlines() if line.startswith("| B4 |"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    entries = [own.statistics[3] for own in index]
    assert cells[:5] == ["B4", "optical", "835 nm", "DN", "7"]
    assert cells[7] == f"{np.median([entry.median for entry in entries]):.4g}"
    assert cells[11] == f"{np.median([entry.std for entry in entries]):.4g}"
    assert "## Split" not in text and "![" not in text


def test_physics_are_spans_over_images():
    echoes = [Channel(name="x", kind="mr", sequence="SE", echo_time_ms=te, repetition_time_ms=500) for te in (9, 12.5)]
    assert physics(echoes) == "SE, TR 500 ms, TE 9 to 12.5 ms"
    assert physics([Channel(name="x")]) == "unknown"
    assert physics([Channel(name="VV", kind="sar", radar_ghz=5.405, polarisation="VV")]) == "5.405 GHz, VV"
