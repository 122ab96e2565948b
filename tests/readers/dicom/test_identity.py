"""Identifiers that are gone, blank, or the same in every file: geometry still decides, and nobody is mixed up."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.source import Refusal, Survey
from tests.make_dicom import SOP_CLASSES, write_series, write_slice

RNG = np.random.default_rng(3)
VOLUME = RNG.integers(0, 2000, (5, 4, 6)).astype(np.int16)
OTHER = RNG.integers(0, 2000, (5, 4, 6)).astype(np.int16)


def survey(paths: list[Path], modality: str = "auto") -> Survey:
    headers, refusals = [], []
    for path in paths:
        found = dicom.header(path)
        (refusals if isinstance(found, Refusal) else headers).append(found)
    grouped = dicom.group(headers, resolve_modalities(modality))
    return Survey([*grouped.sources], [*refusals, *grouped.refusals])


def reasons(found: Survey) -> dict[str, int]:
    return dict(Counter(refusal.reason.name for refusal in found.refusals))


def values(found: Survey) -> list[np.ndarray]:
    return [dicom.read(source).array[0] + 1024 for source in found.sources]


@pytest.mark.parametrize(
    "gone",
    [
        *({keyword: value} for keyword in ("SOPInstanceUID", "SeriesInstanceUID") for value in (None, "", "1.2.3")),
        {"StudyInstanceUID": None},
        {"FrameOfReferenceUID": None},
        {"PatientID": ""},
        {"InstanceNumber": None},
        {"InstanceNumber": 1, "SOPInstanceUID": "1.2.3"},
        {"SOPInstanceUID": "1.2.3", "SeriesInstanceUID": "1.2.3", "StudyInstanceUID": "1.2.3", "PatientID": "A"},
        {"SOPInstanceUID": "", "SeriesInstanceUID": "", "StudyInstanceUID": "", "PatientID": ""},
        {"ImageType": None},
        {"Modality": ""},
        {"Modality": None},
    ],
    ids=lambda tags: "-".join(f"{key}={value}" for key, value in tags.items()),
)
def test_a_volume_survives_identifiers_that_are_gone_blank_or_constant(tmp_path, gone):
    tags = {"SOPClassUID": SOP_CLASSES["CT"], "RescaleSlope": "1", "RescaleIntercept": "-1024", **gone}
    found = survey(write_series(tmp_path, VOLUME, **tags))
    assert reasons(found) == {}
    np.testing.assert_array_equal(values(found), [VOLUME])


def test_an_instance_uid_that_names_nothing_leaves_no_instance_for_labels_to_name(tmp_path):
    (source,) = survey(write_series(tmp_path, VOLUME, SOPInstanceUID="1.2.3")).sources
    assert not [value for kind, value in source.identity if kind == "instance"]
    assert source.selector["instances"] == [""] * 5


def test_copies_under_a_constant_instance_uid_are_still_copies(tmp_path):
    paths = write_series(tmp_path / "a", VOLUME, SOPInstanceUID="1.2.3")
    again = tmp_path / "again"
    again.write_bytes(paths[2].read_bytes())
    found = survey([*paths, again])
    assert reasons(found) == {"DUPLICATE": 1}
    np.testing.assert_array_equal(values(found), [VOLUME])


def test_two_contents_of_one_instance_take_their_own_series_down_and_no_other(tmp_path):
    good = write_series(tmp_path / "good", VOLUME, SeriesInstanceUID="1.1")
    bad = write_series(tmp_path / "bad", OTHER, SeriesInstanceUID="1.2")
    held = dicom.header(bad[0])
    changed = write_slice(tmp_path / "changed", OTHER[1], SeriesInstanceUID="1.2", SOPInstanceUID=held.sop_uid)
    found = survey([*good, *bad, changed])
    assert reasons(found) == {"DUP_CONFLICT": 6}
    np.testing.assert_array_equal(values(found), [VOLUME])


def test_a_conflict_without_series_uids_leaves_other_patients_alone(tmp_path):
    tags = {"SeriesInstanceUID": "", "SeriesNumber": "4"}
    good = write_series(tmp_path / "good", VOLUME, PatientID="A", **tags)
    bad = write_series(tmp_path / "bad", OTHER, PatientID="B", **tags)
    held = dicom.header(bad[0])
    changed = write_slice(tmp_path / "bad" / "x", OTHER[1], PatientID="B", SOPInstanceUID=held.sop_uid, **tags)
    found = survey([*good, *bad, changed])
    assert reasons(found) == {"DUP_CONFLICT": 6}
    np.testing.assert_array_equal(values(found), [VOLUME])


@pytest.mark.parametrize("offset", [0.0, 1.0, 10.0])
def test_slices_of_two_patients_never_make_one_volume_whatever_their_uids_say(tmp_path, offset):
    same = {"SeriesInstanceUID": "1.2", "StudyInstanceUID": "1.2", "FrameOfReferenceUID": "1.2"}
    paths = write_series(tmp_path / "a", VOLUME, PatientID="A", **same)
    for index, plane in enumerate(OTHER):
        place = (0.0, 0.0, 2.0 * index + offset)
        paths.append(write_slice(tmp_path / "b" / f"{5 - index:04d}.dcm", plane, position=place, PatientID="B", **same))
    found = survey(paths)
    assert reasons(found) == {}
    patients = [[value for kind, value in source.identity if kind == "patient"] for source in found.sources]
    assert patients == [["A|"], ["B|"]]
    np.testing.assert_array_equal(values(found), [VOLUME, OTHER])


def test_a_series_without_uid_is_one_by_its_number_in_whatever_folders_it_lies(tmp_path):
    numbers = itertools.count()
    paths = [
        write_slice(
            tmp_path / f"{next(numbers) % 3}" / str(index),
            plane,
            position=(0, 0, 2.0 * index),
            SeriesInstanceUID="",
            SeriesNumber="7",
        )
        for index, plane in enumerate(VOLUME)
    ]
    found = survey(paths)
    assert reasons(found) == {}
    np.testing.assert_array_equal(values(found), [VOLUME])


@pytest.mark.parametrize(
    "tags",
    [{"AcquisitionType": "CONSTANT_ANGLE"}, {"ScanOptions": "SCOUT MODE"}, {"ScanOptions": ["FILTER", "SURVIEW"]}],
)
def test_a_capture_of_a_scout_is_a_scout_though_its_image_type_says_so_no_more(tmp_path, tags):
    capture = {
        "SOPClassUID": "1.2.840.10008.5.1.4.1.1.7",
        "ImageType": ["DERIVED", "SECONDARY"],
        "BurnedInAnnotation": "NO",
    }
    paths = [write_slice(tmp_path / "a", VOLUME[0], **capture, **tags)]
    assert reasons(survey(paths, "ct")) == {"LOCALIZER": 1}
    assert reasons(survey([write_slice(tmp_path / "b", VOLUME[0], **capture)], "ct")) == {}
