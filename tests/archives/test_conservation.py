"""The law of conservation: whatever lies in an archive, each file found is used, skipped or unsupported, once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from geomed_mae.archives.build import scan_archive
from geomed_mae.archives.identity import keyed
from geomed_mae.errors import TooManyBadInputsError
from geomed_mae.readers.reasons import Reason, status
from tests.make_data import write_geotiff, write_nifti
from tests.make_dicom import write_series, write_slice

KINDS = (
    "scene", "copy", "constant", "cut", "text", "html.tif", "empty", "volume", "cut volume", "two volumes", "series",
    "gap", "slice", "cut slice", "report", "link", "loop", "outside", "fifo",
)  # fmt: skip


@pytest.fixture(scope="module")
def stock(tmp_path_factory) -> Path:
    """One of each kind of content, made once; examples are copies."""
    folder = tmp_path_factory.mktemp("stock")
    rng = np.random.default_rng(0)
    write_geotiff(folder / "scene", rng.integers(1, 255, (3, 16, 20)).astype(np.uint8))
    write_geotiff(folder / "constant", np.full((3, 16, 20), 7, np.uint8))
    write_nifti(folder / "volume.nii.gz", rng.normal(size=(5, 6, 7)).astype(np.float32))
    write_nifti(folder / "two.nii", np.stack([rng.normal(size=(5, 6, 7)), np.zeros((5, 6, 7))], -1).astype(np.float32))
    write_series(folder / "series", rng.integers(0, 99, (5, 8, 8)).astype(np.int16))
    write_slice(folder / "slice", rng.integers(0, 99, (8, 8)).astype(np.int16), SeriesInstanceUID="1.2.3")
    write_slice(
        folder / "report", np.zeros((8, 8), np.int16), Modality="SR", SOPClassUID="1.2.840.10008.5.1.4.1.1.88.11"
    )
    return folder


def put(kind: str, stock: Path, folder: Path, number: int) -> int:
    """Put one thing of a kind into an archive; return how many files that is."""
    name = folder / f"{number}"
    if kind in ("scene", "copy", "constant", "slice", "report"):
        shutil.copy(stock / kind.replace("copy", "scene"), name)
        if kind == "scene":
            data = bytearray(name.read_bytes())
            data[-3] = number
            name.write_bytes(data)
    elif kind == "cut":
        name.write_bytes((stock / "scene").read_bytes()[:-200])
    elif kind == "cut slice":
        name.write_bytes((stock / "slice").read_bytes()[:-20])
    elif kind == "volume":
        shutil.copy(stock / "volume.nii.gz", name.with_suffix(".nii.gz"))
    elif kind == "cut volume":
        name.with_suffix(".nii.gz").write_bytes((stock / "volume.nii.gz").read_bytes()[:-100])
    elif kind == "two volumes":
        shutil.copy(stock / "two.nii", name.with_suffix(".nii"))
    elif kind in ("series", "gap"):
        files = sorted((stock / "series").iterdir())
        kept = files if kind == "series" else files[:2] + files[3:]
        name.mkdir()
        for file in kept:
            shutil.copy(file, name / file.name)
        return len(kept)
    elif kind in ("text", "html.tif"):
        (folder / f"{number}.{kind}").write_text("<html>not found</html>")
    elif kind == "empty":
        name.write_bytes(b"")
    elif kind == "fifo":
        os.mkfifo(name)
    else:
        name.symlink_to({"link": "0", "loop": name.name, "outside": stock / "scene"}[kind])
    return 1


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=10))
def test_every_file_found_has_exactly_one_line(stock, kinds):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        count = sum(put(kind, stock, folder, number) for number, kind in enumerate(["scene", *kinds]))
        index = scan_archive([folder], max_bad=1.0)
        ledger = index.ledger
        found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
        assert len(found) == count == len(ledger.entries)
        assert Counter(entry.file for entry in ledger.entries) == Counter(
            keyed(index._salt, "file", str(path)) for path in found
        )
        counts = ledger.counts
        assert counts["files"] == counts["used"] + counts["skipped"] + counts["unsupported"]
        for entry in ledger.entries:
            assert entry.status == ("used" if entry.images else status(Reason[entry.reason]))
        assert {key for entry in ledger.entries for key in entry.images} == {row.key for row in index}
        assert len({row.key for row in index}) == len(index)


@pytest.mark.parametrize(("bad", "good", "passes"), [(1, 1, True), (2, 98, False), (1, 99, True), (2, 198, True)])
def test_the_error_budget_is_a_share_and_one_file_is_forgiven(stock, tmp_path, bad, good, passes):
    for number in range(good):
        put("scene", stock, tmp_path, number)
    for number in range(bad):
        (tmp_path / f"bad{number}.tif").write_text("text")
    (tmp_path / "notes.txt").write_text("no image, and so not bad")
    if passes:
        assert scan_archive([tmp_path]).ledger.bad == bad
    else:
        with pytest.raises(TooManyBadInputsError, match=r"2\.0% of the files are bad") as caught:
            scan_archive([tmp_path])
        assert caught.value.exit_code == 3
