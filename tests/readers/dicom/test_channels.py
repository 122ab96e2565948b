"""Names of MR images by the physics in their headers, enhanced and classic; a wrong name is worse than none."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from pydicom import dcmread
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.source import Refusal, Source
from tests.make_dicom import enhanced, save, write_slice

PLANE = np.arange(24, dtype=np.int16).reshape(4, 6)
CUBE = np.stack([PLANE, PLANE + 1, PLANE + 2])

EPI = {"EchoPlanarPulseSequence": "YES", "EchoPulseSequence": "GRADIENT"}
GRADIENT = {"EchoPlanarPulseSequence": "NO", "EchoPulseSequence": "GRADIENT"}
SPIN = {"EchoPlanarPulseSequence": "NO", "EchoPulseSequence": "SPIN"}


def sources(*paths: Path) -> list[Source]:
    headers = [dicom.header(path) for path in paths]
    assert not [one for one in headers if isinstance(one, Refusal)]
    found = dicom.group(headers, resolve_modalities("auto"))
    assert found.refusals == []
    return list(found.sources)


def item(**tags: object) -> Dataset:
    made = Dataset()
    for keyword, value in tags.items():
        setattr(made, keyword, value)
    return made


def enhanced_name(
    path: Path,
    pulse: dict[str, str],
    *,
    times: tuple[float | None, float | None],
    modifier: dict[str, object] | None = None,
    flip: float = 90.0,
    contrast: str = "UNKNOWN",
    b_value: float | None = None,
    kinds: tuple[str, ...] = ("ORIGINAL", "PRIMARY", "M", "NONE"),
    agent: bool = False,
) -> str:
    """Write an enhanced object with such a pulse sequence and return the name of its channel."""
    repetition, echo = times
    frames = [{"position": (0, 0, 2 * number), "echo": echo or 0.0} for number in range(len(CUBE))]
    made = enhanced(CUBE, frames, **pulse)
    shared = made.SharedFunctionalGroupsSequence[0]
    if repetition is not None:
        shared.MRTimingAndRelatedParametersSequence = Items([item(RepetitionTime=repetition, FlipAngle=flip)])
    shared.MRModifierSequence = Items([item(**(modifier or {"InversionRecovery": "NO", "Spoiling": "NONE"}))])
    shared.MRImageFrameTypeSequence = Items([item(FrameType=list(kinds), AcquisitionContrast=contrast)])
    if b_value is not None:
        shared.MRDiffusionSequence = Items([item(DiffusionBValue=b_value)])
    if agent:
        made.ContrastBolusAgentSequence = Items([item(CodeValue="C-B0322")])
    (source,) = sources(save(made, path))
    return source.channels[0].name


@pytest.mark.parametrize("contrast", ["UNKNOWN", "", "T1", "T2", "PROTON_DENSITY", "PERFUSION", "DIFFUSION"])
def test_an_echo_planar_image_has_no_name_whatever_contrast_it_declares(tmp_path, contrast):
    for number, times in enumerate([(500, 30), (1000, 30), (4800, 11), (6000, 100)]):
        assert enhanced_name(tmp_path / str(number), EPI, times=times, contrast=contrast) == "MR"


def test_only_weighted_images_of_a_diffusion_series_are_diffusion(tmp_path):
    for number, (b_value, name) in enumerate([(1000.0, "DWI"), (0.0, "MR"), (None, "MR")]):
        found = enhanced_name(
            tmp_path / str(number), EPI, times=(3516, 68), contrast="DIFFUSION", b_value=b_value
        )  # fmt: skip
        assert found == name
    found = enhanced_name(
        tmp_path / "map",
        EPI,
        times=(3516, 68),
        b_value=1000.0,
        contrast="DIFFUSION",
        kinds=("DERIVED", "PRIMARY", "DIFFUSION", "TENSOR_B0"),
    )
    assert found == "MR"


@pytest.mark.parametrize(
    ("pulse", "modifier", "times", "flip", "name"),
    [
        (GRADIENT, {"InversionRecovery": "YES", "InversionTimes": 900.0}, (1800, 2.4), 9, "T1"),
        (GRADIENT, {"Spoiling": "RF"}, (8, 3), 15, "T1"),
        (GRADIENT, {"Spoiling": "RF_AND_GRADIENT"}, (8, 3), 15, "T1"),
        (GRADIENT, {"Spoiling": "GRADIENT"}, (8, 3), 15, "MR"),
        (GRADIENT, {"Spoiling": "NONE"}, (600, 10), 90, "MR"),
        (GRADIENT, {"Spoiling": "RF"}, (8, 3), 3, "MR"),
        # The two sides of the Ernst angle, 11.4 degrees.
        (GRADIENT, {"Spoiling": "RF"}, (20, 2.3), 11, "MR"),
        (GRADIENT, {"Spoiling": "RF"}, (20, 2.3), 12, "T1"),
        (SPIN, {}, (500, 15), 90, "T1"),
        (SPIN, {}, (4000, 90), 90, "T2"),
        (SPIN, {}, (3000, 15), 90, "PD"),
        (SPIN, {"InversionRecovery": "YES", "InversionTimes": 2200.0}, (8000, 120), 90, "FLAIR"),
        ({}, {}, (4000, 90), 90, "MR"),
    ],
)
def test_enhanced_objects_are_named_by_what_they_say_instead_of_scanning_sequence(
    tmp_path, pulse, modifier, times, flip, name
):
    assert enhanced_name(tmp_path / "a", pulse, times=times, modifier=modifier, flip=flip) == name


@pytest.mark.parametrize(
    ("contrast", "pulse", "modifier", "times", "name"),
    [
        # The times leave doubt, and the declared contrast decides.
        ("T1", SPIN, {}, (1200, 10), "T1"),
        ("T1", GRADIENT, {"Spoiling": "RF"}, (30, 15), "T1"),
        ("FLUID_ATTENUATED", SPIN, {"InversionRecovery": "YES", "InversionTimes": 1400.0}, (4000, 194), "FLAIR"),
        ("T2", {}, {}, (4000, 90), "T2"),
        ("PROTON_DENSITY", {}, {}, (3000, 15), "PD"),
        # They contradict it.
        ("T1", GRADIENT, {"Spoiling": "NONE"}, (3.8, 1.5), "MR"),
        ("T2", GRADIENT, {}, (3000, 30), "MR"),
        ("T1", SPIN, {}, (4000, 90), "MR"),
        ("T2", SPIN, {}, (500, 15), "MR"),
        ("PROTON_DENSITY", SPIN, {}, (500, 15), "MR"),
        ("FLUID_ATTENUATED", SPIN, {}, (8000, 120), "MR"),
        ("T2", SPIN, {}, (None, None), "MR"),
        ("T1", GRADIENT, {"Spoiling": "RF"}, (400, 5), "MR"),
        # It is none of ours.
        ("TIME_OF_FLIGHT", GRADIENT, {"Spoiling": "RF"}, (25, 3.5), "MR"),
        ("T2_STAR", SPIN, {}, (4000, 90), "MR"),
    ],
)
def test_the_declared_contrast_decides_doubts_and_overrules_nothing(tmp_path, contrast, pulse, modifier, times, name):
    found = enhanced_name(tmp_path / "a", pulse, times=times, modifier=modifier, flip=20, contrast=contrast)
    assert found == name


def test_a_contrast_agent_in_a_sequence_counts_and_a_denied_one_does_not(tmp_path):
    assert enhanced_name(tmp_path / "a", SPIN, times=(500, 15), agent=True) == "T1C"
    t1 = {"Modality": "MR", "ScanningSequence": "SE", "RepetitionTime": 500, "EchoTime": 15}
    for number, (text, name) in enumerate([("Gadovist", "T1C"), ("NONE", "T1"), ("no", "T1"), ("", "T1")]):
        path = write_slice(tmp_path / str(number), PLANE, ContrastBolusAgent=text, **t1)
        assert sources(path)[0].channels[0].name == name


@pytest.mark.parametrize(
    ("times", "flip", "name"),
    [((650, 10), 75, "T1"), ((650, 10), 20, "MR"), ((6, 3), 75, "MR"), ((4000, 90), 90, "MR")],
)
def test_research_mode_is_t1_only_where_any_echo_would_be(tmp_path, times, flip, name):
    path = write_slice(
        tmp_path / "a",
        PLANE,
        Modality="MR",
        ScanningSequence="RM",
        RepetitionTime=times[0],
        EchoTime=times[1],
        FlipAngle=flip,
    )
    assert sources(path)[0].channels[0].name == name


def test_an_angiogram_by_inflow_is_no_t1_image(tmp_path):
    spoiled = {"ScanningSequence": "GR", "SequenceVariant": "SP", "RepetitionTime": 22, "EchoTime": 3.6}
    for flag, name in (("Y", "MR"), ("N", "T1")):
        path = write_slice(tmp_path / flag, PLANE, Modality="MR", FlipAngle=18, AngioFlag=flag, **spoiled)
        assert sources(path)[0].channels[0].name == name


def philips(path: Path, *, b_value: float, depth: int, factor: int = 1) -> Path:
    """Write a spin echo slice that has the times of a T2 image and Philips' private attributes."""
    made = write_slice(
        path,
        PLANE,
        position=(0, 0, 2 * depth),
        Modality="MR",
        Manufacturer="Philips Medical Systems",
        ScanningSequence="SE",
        RepetitionTime=6000,
        EchoTime=100,
    )
    held = dcmread(made)
    block = held.private_block(0x2001, "Philips Imaging DD 001", create=True)
    block.add_new(0x03, "FL", b_value)
    block.add_new(0x13, "SL", factor)
    held.save_as(made)
    return made


def test_the_unweighted_volume_of_a_diffusion_series_is_no_t2_image(tmp_path):
    weighted = [philips(tmp_path / f"b{depth}", b_value=1000.0, depth=depth) for depth in range(3)]
    plain = [philips(tmp_path / f"a{depth}", b_value=0.0, depth=depth) for depth in range(3)]
    assert sorted(one.channels[0].name for one in sources(*weighted, *plain)) == ["DWI", "MR"]
    assert [one.channels[0].name for one in sources(*plain)] == ["T2"]


def test_philips_says_echo_planar_by_a_private_factor(tmp_path):
    paths = [philips(tmp_path / str(depth), b_value=0.0, depth=depth, factor=67) for depth in range(3)]
    assert [one.channels[0].name for one in sources(*paths)] == ["MR"]
