"""PET in standardised uptake values: the factor by hand, from clock times and the half-life."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from geomed_mae.image import Image
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.source import Refusal
from tests.make_dicom import enhanced, save, uid, write_series

VOLUME = np.random.default_rng(8).integers(0, 30000, (4, 5, 6)).astype(np.int16)
SLOPE = 0.25

FDG = {"RadionuclideTotalDose": "370000000", "RadionuclideHalfLife": "6588", "RadiopharmaceuticalStartTime": "090000"}
"""370 MBq of fluorine-18, injected at nine."""

PET = {
    "Modality": "PT",
    "Units": "BQML",
    "CorrectedImage": ["DECY", "ATTN", "SCAT"],
    "DecayCorrection": "START",
    "PatientWeight": "70",
    "SeriesDate": "20200301",
    "SeriesTime": "100000",
    "AcquisitionDate": "20200301",
    "AcquisitionTime": "100000.00",
    "RescaleSlope": str(SLOPE),
    "RescaleIntercept": "0",
}


def pet(folder: Path, isotope: dict[str, str] | None = None, **tags: object) -> Image:
    """Write and read a PET series; an attribute given as None is left out."""
    item = Dataset()
    for keyword, value in (FDG | (isotope or {})).items():
        if value is not None:
            setattr(item, keyword, value)
    tags = PET | {"RadiopharmaceuticalInformationSequence": Sequence([item])} | tags
    private = {key: tags.pop(key) for key in list(tags) if key.startswith("private")}
    paths = write_series(folder, VOLUME, **tags)
    for path in paths if private else ():
        one = pydicom.dcmread(path)
        for group, creator, element, vr, value in private["private"]:
            one.private_block(group, creator, create=True).add_new(element, vr, value)
        one.save_as(path)
    found = dicom.group([dicom.header(path) for path in paths], resolve_modalities("auto"))
    assert list(found.refusals) == []
    (source,) = found.sources
    return dicom.read(source)


def check(image: Image, factor: float, unit: str) -> None:
    expected = (VOLUME.astype(np.float64) * SLOPE * factor).astype(np.float32)
    np.testing.assert_allclose(image.array[0], expected, rtol=2e-7)
    assert image.channels[0].unit == unit


def by_hand(seconds: float, *, weight: float = 70.0) -> float:
    """Weight in g over the dose that is left after `seconds`; one g of tissue fills one ml."""
    return weight * 1000 / (370e6 * math.exp(-math.log(2) * seconds / 6588))


def test_activity_decay_corrected_to_the_scan_is_divided_by_the_decayed_dose_per_gram(tmp_path):
    check(pet(tmp_path), by_hand(3600), "g/ml")


def test_activity_decay_corrected_to_injection_is_divided_by_the_whole_dose(tmp_path):
    check(pet(tmp_path, DecayCorrection="ADMIN"), by_hand(0), "g/ml")


def test_injection_before_midnight_and_scan_after_it_are_an_hour_apart(tmp_path):
    image = pet(tmp_path, {"RadiopharmaceuticalStartTime": "233000"}, SeriesTime="003000", AcquisitionTime="003000")
    check(image, by_hand(3600), "g/ml")


def test_a_full_date_of_injection_goes_before_a_time_alone(tmp_path):
    image = pet(tmp_path, {"RadiopharmaceuticalStartDateTime": "20200301093000.000000"})
    check(image, by_hand(1800), "g/ml")


def test_times_may_lack_their_seconds(tmp_path):
    check(pet(tmp_path, {"RadiopharmaceuticalStartTime": "0915"}), by_hand(2700), "g/ml")


def test_fractions_of_seconds_count(tmp_path):
    check(pet(tmp_path, SeriesTime="100000.500", AcquisitionTime="100000.5"), by_hand(3600.5), "g/ml")


def test_the_series_time_is_the_scan_time_of_every_bed_position(tmp_path):
    check(pet(tmp_path, AcquisitionTime="101500"), by_hand(3600), "g/ml")


def test_a_series_made_after_the_acquisition_stays_in_activity(tmp_path):
    check(pet(tmp_path, SeriesTime="180000"), 1.0, "Bq/ml")


def test_a_series_made_after_the_acquisition_takes_ge_s_own_scan_time(tmp_path):
    private = [(0x0009, "GEMS_PETD_01", 0x0D, "DT", "20200301103000.00")]
    check(pet(tmp_path, SeriesTime="180000", private=private), by_hand(5400), "g/ml")


def test_philips_counts_take_its_private_factor_to_suv(tmp_path):
    private = [(0x7053, "Philips PET Private Group", 0x00, "DS", "0.000587")]
    check(pet(tmp_path, Units="CNTS", private=private), 0.000587, "g/ml")


def test_philips_counts_take_its_private_factor_to_activity_and_then_the_dose(tmp_path):
    private = [(0x7053, "Philips PET Private Group", 0x09, "DS", "2.5")]
    check(pet(tmp_path / "a", Units="CNTS", private=private), 2.5 * by_hand(3600), "g/ml")
    check(pet(tmp_path / "b", Units="CNTS", private=private, PatientWeight=None), 2.5, "Bq/ml")


def test_images_in_g_per_ml_are_taken_as_they_are(tmp_path):
    check(pet(tmp_path, Units="GML", PatientWeight=None), 1.0, "g/ml")


@pytest.mark.parametrize(
    ("isotope", "tags"),
    [
        ({"RadionuclideTotalDose": None}, {}),
        ({"RadionuclideTotalDose": "0"}, {}),
        ({"RadionuclideHalfLife": None}, {}),
        ({"RadiopharmaceuticalStartTime": None}, {}),
        ({"RadiopharmaceuticalStartTime": "09"}, {}),
        ({"RadiopharmaceuticalStartDateTime": "20200302093000"}, {}),
        ({"RadiopharmaceuticalStartDateTime": "20200228093000"}, {}),
        ({}, {"PatientWeight": None}),
        ({}, {"PatientWeight": "0"}),
        ({}, {"DecayCorrection": "NONE"}),
        ({}, {"CorrectedImage": ["DECY"]}),
        ({}, {"SeriesTime": None}),
        ({}, {"RadiopharmaceuticalInformationSequence": None}),
    ],
)
def test_without_all_it_needs_a_series_stays_in_activity(tmp_path, isotope, tags):
    check(pet(tmp_path, isotope, **tags), 1.0, "Bq/ml")


def test_enhanced_pet_says_its_unit_by_the_rescale_type(tmp_path):
    frames = [{"position": (0, 0, 2 * index)} for index in range(4)]
    made = enhanced(VOLUME, frames, Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.130")
    for item in made.PerFrameFunctionalGroupsSequence:
        item.PixelValueTransformationSequence[0].RescaleType = "BQML"
    found = dicom.group([dicom.header(save(made, tmp_path / "a"))], resolve_modalities("auto"))
    assert [source.channels[0].unit for source in found.sources] == ["Bq/ml"]


def test_counts_without_a_factor_stay_counts(tmp_path):
    check(pet(tmp_path, Units="CNTS"), 1.0, "counts")


def test_files_of_one_series_that_disagree_about_the_weight_stay_in_activity(tmp_path):
    item = Dataset()
    for keyword, value in FDG.items():
        setattr(item, keyword, value)
    tags = PET | {"RadiopharmaceuticalInformationSequence": Sequence([item])}
    paths = write_series(tmp_path, VOLUME, **tags)
    one = pydicom.dcmread(paths[2])
    one.PatientWeight = "71"
    one.save_as(paths[2])
    found = dicom.group([dicom.header(path) for path in paths], resolve_modalities("auto"))
    (source,) = found.sources
    check(dicom.read(source), 1.0, "Bq/ml")


def test_units_never_mix_in_one_volume(tmp_path):
    paths = write_series(tmp_path / "a", VOLUME, **PET)
    paths += write_series(tmp_path / "b", VOLUME, **(PET | {"Units": "GML"}), StudyInstanceUID=uid("study"))
    headers = [dicom.header(path) for path in paths]
    assert not any(isinstance(header, Refusal) for header in headers)
    found = dicom.group(headers, resolve_modalities("auto"))
    assert sorted(source.channels[0].unit for source in found.sources) == ["Bq/ml", "g/ml"]


@pytest.mark.data
def test_real_series_in_g_per_ml_equal_their_rescaled_words(shared_data):
    for folder in sorted((shared_data / "med" / "sarcoma").iterdir()):
        paths = sorted((folder / "dicom" / "PET" / "image").glob("*"))
        found = dicom.group([dicom.header(path) for path in paths], resolve_modalities("auto"))
        (source,) = found.sources
        assert source.channels[0].unit == "g/ml"
        image = dicom.read(source)
        for index, path in enumerate(source.files):
            one = pydicom.dcmread(path)
            expected = one.pixel_array.astype(np.float64) * float(one.RescaleSlope) + float(one.RescaleIntercept)
            np.testing.assert_array_equal(image.array[0, index], expected.astype(np.float32))


@pytest.mark.data
def test_real_headers_give_the_factor_that_a_calculation_by_hand_gives(shared_data, tmp_path):
    """The same series restated in Bq/ml: its own dose, weight and clock times must lead back to g/ml."""
    folder = next(path for path in sorted((shared_data / "med" / "sarcoma").iterdir()))
    paths = []
    for path in sorted((folder / "dicom" / "PET" / "image").glob("*")):
        one = pydicom.dcmread(path)
        one.Units = "BQML"
        one.save_as(tmp_path / path.name)
        paths.append(tmp_path / path.name)
    isotope = one.RadiopharmaceuticalInformationSequence[0]
    assert one.DecayCorrection == "ADMIN"
    factor = float(one.PatientWeight) * 1000 / float(isotope.RadionuclideTotalDose)
    found = dicom.group([dicom.header(path) for path in paths], resolve_modalities("auto"))
    (source,) = found.sources
    assert source.channels[0].unit == "g/ml"
    image = dicom.read(source)
    for index, path in enumerate(source.files):
        one = pydicom.dcmread(path)
        expected = (one.pixel_array * float(one.RescaleSlope) + float(one.RescaleIntercept)) * factor
        np.testing.assert_allclose(image.array[0, index], expected, rtol=1e-6)
