"""The field `bind` of a modality file: what it may say, and what is refused with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from geomed_mae.errors import ConfigError
from geomed_mae.modalities import load_modality, parse_modality
from geomed_mae.modalities.binding import Binding

GOOD = """
name: mine
title: Sequences of mine
geometry: volume
formats: [dicom]
dicom: [MR]
unit: a.u.
normalise: {method: image}
bind: {resample: none}
channels:
  - {name: T1, kind: mr, sequence: T1, series: "*T1*pre*"}
  - {name: T2, kind: mr, sequence: T2}
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


def test_a_modality_says_how_series_are_bound(tmp_path):
    assert parse_modality(write(tmp_path, GOOD)).bind == Binding(patterns=(("T1", "*T1*pre*"),))
    assert load_modality("pet-ct").bind == Binding(onto="CT", resample="linear")
    assert load_modality("mr-multisequence").bind == Binding()
    assert load_modality("mr").bind is None


def test_patterns_are_compared_without_case_with_any_of_the_texts():
    binding = Binding(patterns=(("T1", "*T1*pre*"), ("T2", "t2")))
    assert binding.named("Ax t1 PRE gd", "") == ["T1"]
    assert binding.named("", "T2") == ["T2"]
    assert binding.named("T1 pre", "t2") == ["T1", "T2"]
    assert binding.named("T1 post", "") == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("bind: {resample: none}", "bind: true"), r"mine.yaml: bind is True; write a mapping, for example"),
        (("resample: none", "resample: cubic"), r"bind.resample is 'cubic'; known: none, linear"),
        (("resample: none", "resmaple: none"), r"bind has no field 'resmaple'; did you mean 'resample'\?"),
        (
            ("resample: none", "onto: CT, resample: linear"),
            r"bind.onto is 'CT', no channel of this modality \(T1, T2\)",
        ),
        (("resample: none", "resample: linear"), r"bind.onto and bind.resample: linear go together"),
        (("resample: none", "onto: T1"), r"bind.onto and bind.resample: linear go together"),
        (("bind: {resample: none}\n", ""), r"channel 'T1' has `series`, which needs a field `bind`"),
        (('"*T1*pre*"', "7"), r"series of channel 'T1' is 7; write a pattern"),
        (("  - {name: T2, kind: mr, sequence: T2}\n", ""), r"bind needs at least two channels"),
    ],
)
def test_a_wrong_binding_is_refused_with_its_place(tmp_path, change, message):
    with pytest.raises(ConfigError, match=message):
        parse_modality(write(tmp_path, GOOD.replace(*change)))
