"""Promise 2: whatever a file's bytes, it becomes an array or a typed reason, in 10 s and 2 GiB; see `fuzz`."""

from __future__ import annotations

import pytest

from tests import fuzz
from tests.fuzz import FORMATS, LABELS, Report, case, run

SAMPLE, ALL = 60, 5000


def check(report: Report, cases: int, whole: str) -> None:
    """Demand that each case has an outcome, none of them wrong, and that damage got past the first checks."""
    assert len(report.found) == cases
    assert report.wrong == {}
    assert report.counts.get(whole, 0) > cases / 15, report.counts
    assert len(report.counts) > 3, report.counts


@pytest.mark.parametrize("kind", [*FORMATS, *LABELS])
def test_a_sample_of_damaged_files_ends_in_an_array_or_a_reason(tmp_path, kind):
    check(run(kind, tmp_path, 0, SAMPLE), SAMPLE, "image" if kind in FORMATS else "label")


@pytest.mark.slow
@pytest.mark.parametrize("kind", [*FORMATS, *LABELS])
def test_five_thousand_damaged_files_end_in_an_array_or_a_reason(tmp_path, kind):
    check(run(kind, tmp_path, 0, ALL), ALL, "image" if kind in FORMATS else "label")


def test_a_case_is_made_again_from_its_number(tmp_path):
    run("nifti", tmp_path, 0, 1)
    assert case("nifti", tmp_path, 7) == case("nifti", tmp_path, 7) != case("nifti", tmp_path, 11)


def test_a_case_that_ends_its_process_is_read_again_in_a_decoding_child(tmp_path, monkeypatch):
    asked = []

    def worker(kind, folder, first, stop, *how):
        asked.append((first, stop, *how))
        if how:
            yield first, "DECODE_FAILED", 0.2
        elif first == 0:
            yield 0, "image", 0.1  # and the process dies of case 1
        else:
            yield from ((number, "!MemoryError" if number == 2 else "image", 0.1) for number in range(first, stop))

    (tmp_path / "seeds").mkdir()
    monkeypatch.setattr(fuzz, "_worker", worker)
    report = run("nifti", tmp_path, 0, 4)
    assert asked == [(0, 4), (2, 4), (1, 2, "apart"), (2, 3, "apart")]
    assert report.counts == {"image": 2, "DECODE_FAILED": 2} and report.wrong == {}
    assert report.died == {1: "!DIED", 2: "!MemoryError"}


def test_what_is_neither_an_array_nor_a_reason_or_takes_too_long_is_wrong():
    report = Report({0: ("image", 1.0), 1: ("!KeyError", 0.1), 2: ("MALFORMED", 11.0)}, {})
    assert set(report.wrong) == {1, 2}


@pytest.mark.parametrize("kind", ["geotiff", "dicom", "rtstruct"])
def test_the_decoding_child_says_what_this_process_says(tmp_path, kind):
    here = run(kind, tmp_path, 0, 12)
    there = {number: result for number, result, _ in fuzz._worker(kind, tmp_path, 0, 12, "apart")}
    assert there == {number: result for number, (result, _) in here.found.items()}
