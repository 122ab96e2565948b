"""Scanning: every file is accounted for, nothing private leaves, the same archive gives the same rows."""

from __future__ import annotations

import dataclasses
import json
import stat
from pathlib import Path

import numpy as np
import pytest

from geomed_mae.archives import examine
from geomed_mae.archives.build import of_modalities, open_archive, scan_archive
from geomed_mae.archives.card import draft_card
from geomed_mae.archives.index import Index
from geomed_mae.archives.ledger import Entry, Ledger
from geomed_mae.errors import ConfigError, IntegrityError, ReadError, TooManyBadInputsError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import survey
from tests.make_data import write_geotiff

CANARY = "Doe^Jane-0815"


@pytest.fixture
def archive(tmp_path: Path) -> Path:
    """Two scenes, a constant one, a text file and a broken TIFF, in folders with a telling name."""
    folder = tmp_path / CANARY
    (folder / "deep").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in ("a.tif", "deep/b.tif"):
        write_geotiff(folder / name, rng.integers(1, 255, (6, 24, 24)).astype(np.uint8))
    write_geotiff(folder / "flat.tif", np.full((6, 24, 24), 7, np.uint8))
    (folder / "notes.txt").write_text(f"patient {CANARY}")
    (folder / "text.tif").write_text("this is no TIFF")
    return folder


def test_every_file_has_one_line_and_a_reason(archive):
    index = scan_archive([archive], "landsat7", max_bad=1.0)
    assert index.ledger.counts == {"files": 5, "used": 2, "skipped": 2, "unsupported": 1}
    assert index.ledger.reasons == {"NO_INFORMATION": 1, "UNKNOWN_FORMAT": 1, "NOT_TIFF": 1}
    assert {key for entry in index.ledger.entries for key in entry.images} == {row.key for row in index}


def test_too_many_bad_files_end_the_scan_with_a_count(archive):
    with pytest.raises(
        TooManyBadInputsError, match=r"50.0% of the files are bad, more than --max-bad 1.0% allows: 5 files = 2"
    ):
        scan_archive([archive], "landsat7")


def test_one_bad_file_among_few_is_forgiven(archive):
    (archive / "text.tif").unlink()
    assert len(scan_archive([archive], "landsat7")) == 2


def test_an_empty_folder_is_an_error_that_says_so(tmp_path):
    with pytest.raises(TooManyBadInputsError, match="holds no files; point to a folder with raw images"):
        scan_archive([tmp_path])


def test_a_text_file_called_tif_is_one_clear_sentence(archive):
    with pytest.raises(ReadError, match="text.tif cannot be used: not a TIFF by its first bytes"):
        scan_archive([archive / "text.tif"])


def test_a_missing_path_is_a_usage_error(tmp_path):
    with pytest.raises(ConfigError, match="there is nothing at"):
        scan_archive([tmp_path / "nowhere"])


def test_workers_change_nothing_but_the_keys(archive):
    one, two = (scan_archive([archive], "landsat7", max_bad=1.0, workers=workers) for workers in (1, 2))
    assert one.fingerprint == two.fingerprint
    assert [row.statistics for row in one] == [row.statistics for row in two]
    assert one.ledger.reasons == two.ledger.reasons


@pytest.mark.parametrize(
    ("block", "most", "starts"),
    [
        (None, 0, [0, 7, 14, 21]),
        ((3, 24), 0, [0, 6, 12, 18]),
        ((12, 24), 6 * 24 * 12, [0, 12]),
        ((12, 24), 6 * 24 * 11, [0, 7, 14, 21]),
    ],
)
def test_a_scene_too_large_to_decode_at_once_is_examined_in_bands(archive, monkeypatch, block, most, starts):
    (source,) = survey([archive / "a.tif"], resolve_modalities("landsat7")).sources
    source = dataclasses.replace(source, block=block)
    whole = examine.examine(source)
    windows = []
    read_many = examine.read_many

    def seen(source, cuts):
        windows.append(slice(cuts[0][0].start, cuts[-1][0].stop))
        return read_many(source, cuts)

    monkeypatch.setattr(examine, "PART_VALUES", 6 * 24 * 7)
    monkeypatch.setattr(examine, "MOST_AT_ONCE", most)
    monkeypatch.setattr(examine, "PIECE_VALUES", 6 * 24 * 2)
    monkeypatch.setattr(examine, "read_many", seen)
    banded = examine.examine(source)
    assert [window.start for window in windows] == starts
    assert [window.stop for window in windows] == [*starts[1:], 24]
    assert (banded.digest, banded.valid_fraction) == (whole.digest, whole.valid_fraction)
    for one, other in zip(banded.statistics, whole.statistics, strict=True):
        assert one.to_json() == pytest.approx(other.to_json())


def test_overlapping_paths_count_a_file_once(archive):
    assert scan_archive([archive, archive / "a.tif"], "landsat7", max_bad=1.0).ledger.counts["files"] == 5


def test_an_index_reads_back_from_disk_as_it_was(archive, tmp_path):
    index = scan_archive([archive], "landsat7", max_bad=1.0)
    index.save(tmp_path / "index", draft_card(index))
    again = Index.load(tmp_path / "index")
    assert (again.rows, again.ledger, again.fingerprint) == (index.rows, index.ledger, index.fingerprint)
    key = index.rows[0].key
    assert again.read(key).array.tobytes() == index.read(key).array.tobytes()
    assert again.read(key).key == key


def test_public_files_of_an_index_hold_no_name_and_no_path(archive, tmp_path):
    index = scan_archive([archive], "landsat7", max_bad=1.0)
    index.save(tmp_path / "index", draft_card(index))
    for path in (tmp_path / "index").iterdir():
        private = path.name in ("locations.parquet", "salt")
        assert stat.S_IMODE(path.stat().st_mode) == 0o600 if private else True
        if not private:
            content = path.read_bytes()
            for canary in (CANARY, str(tmp_path), "notes.txt", "b.tif"):
                assert canary.encode() not in content, path.name
    assert CANARY not in json.dumps([row.to_json() for row in index])


def test_several_indexes_are_one_archive(archive, tmp_path):
    for name in ("a.tif", "deep/b.tif"):
        index = scan_archive([archive / name], "landsat7")
        index.save(tmp_path / Path(name).stem, draft_card(index))
    joined = open_archive([tmp_path / "a", tmp_path / "b"])
    assert len(joined) == 2 and joined.ledger.counts["used"] == 2
    assert joined.read(joined.rows[1].key).array.shape == (6, 24, 24)
    with pytest.raises(ConfigError, match="given twice"):
        open_archive([tmp_path / "a", tmp_path / "a"])


def test_a_damaged_index_is_an_integrity_error(archive, tmp_path):
    index = scan_archive([archive / "a.tif"], "landsat7")
    index.save(tmp_path / "index", draft_card(index))
    (tmp_path / "index" / "locations.parquet").write_bytes(b"PAR1 broken")
    with pytest.raises(IntegrityError, match="is damaged .*: scan again"):
        Index.load(tmp_path / "index")


def test_a_folder_that_is_no_index_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="is no index"):
        Index.load(tmp_path)


def test_inputs_are_not_written_to(archive):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in archive.rglob("*")}
    scan_archive([archive], "landsat7", max_bad=1.0)
    assert before == {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in archive.rglob("*")}


@pytest.mark.parametrize(
    "entry",
    [
        Entry("f", "used"),
        Entry("f", "skipped", "NOT_TIFF", images=("k",)),
        Entry("f", "skipped", "UNKNOWN_FORMAT"),
        Entry("f", "used", "NOT_TIFF", images=("k",)),
    ],
)
def test_a_ledger_line_that_contradicts_itself_is_refused(entry):
    with pytest.raises(IntegrityError, match="contradicts itself"):
        Ledger((entry,))


def test_a_recipe_takes_its_modalities_out_of_a_mixed_index(archive, tmp_path, caplog):
    rng = np.random.default_rng(1)
    write_geotiff(
        archive / "rgb.tif", rng.integers(1, 255, (3, 24, 24)).astype(np.uint8), colours=["red", "green", "blue"]
    )
    index = scan_archive([archive], ["landsat7", "rgb"], max_bad=1.0)
    index.save(tmp_path / "index", draft_card(index))
    index = open_archive([tmp_path / "index"])
    assert len(index) == len(of_modalities(index, "auto")) == 3
    assert [row.modality for row in of_modalities(index, "rgb")] == ["rgb"]
    assert "2 images of landsat7 in the index are not used" in caplog.text
    assert len(of_modalities(index, ["rgb", "landsat7"])) == 3
    assert len(of_modalities(index, "ct")) == 3  # none has the name: the verb says which there are
