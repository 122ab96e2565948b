"""What real archives mix in one series, taken apart into volumes; each slice is checked against its own position."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence as Items

from geomed_mae.modalities import Modality, parse_modality, resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.dicom.geometry import POSITION_TOLERANCE_MM, fitted_line
from geomed_mae.readers.source import Refusal, Source, Survey
from tests.make_dicom import AXIAL, SOP_CLASSES, dataset, enhanced, save, uid, write_series, write_slice

RNG = np.random.default_rng(21)
VOLUME = RNG.integers(0, 2000, (5, 4, 6)).astype(np.int16)
SAGITTAL = (0.0, 1.0, 0.0, 0.0, 0.0, -1.0)
CORONAL = (1.0, 0.0, 0.0, 0.0, 0.0, -1.0)


def survey(paths: Iterable[Path], modality: str | Modality = "auto") -> Survey:
    headers, refusals = [], []
    for path in paths:
        found = dicom.header(path)
        (refusals if isinstance(found, Refusal) else headers).append(found)
    grouped = dicom.group(headers, resolve_modalities(modality if isinstance(modality, str) else [modality]))
    return Survey([*grouped.sources], [*refusals, *grouped.refusals])


def checked(paths: Iterable[Path], modality: str | Modality = "auto") -> Survey:
    """Survey, with the conservation law and the position promise checked against the files themselves."""
    paths = list(paths)
    found = survey(paths, modality)
    used = {path for source in found.sources for path in source.files}
    assert used | {refusal.path for refusal in found.refusals} == set(paths)
    assert not used & {refusal.path for refusal in found.refusals}
    for source in found.sources:
        if len(source.files) == 1 or "frames" in source.selector:
            continue
        for index, path in enumerate(source.files):
            place = np.array(pydicom.dcmread(path, specific_tags=["ImagePositionPatient"]).ImagePositionPatient, float)
            ours = (source.geometry.affine @ (index, 0, 0, 1))[:3]
            assert np.linalg.norm(ours - place) <= POSITION_TOLERANCE_MM + 1e-9
    return found


def reasons(found: Survey) -> dict[str, int]:
    return dict(Counter(refusal.reason.name for refusal in found.refusals))


def shapes(found: Survey) -> list[tuple[int, ...]]:
    return sorted(source.shape for source in found.sources)


def along(normal: Iterable[float], depths: Iterable[float]) -> list[tuple[float, ...]]:
    return [tuple(np.round(np.array(list(normal)) * depth, 6)) for depth in depths]


def write_stack(folder: Path, positions: Iterable[Iterable[float]], **tags: object) -> list[Path]:
    """One file a position, with pixels of their own."""
    folder.mkdir(parents=True, exist_ok=True)
    first = len(list(folder.iterdir()))
    return [
        write_slice(folder / f"{first + number:04d}", VOLUME[number % 5] + number, **({"position": place} | tags))
        for number, place in enumerate(positions)
    ]


# Orientations


def test_a_localizer_that_does_not_say_so_is_known_by_its_three_planes(tmp_path):
    paths = []
    for orientation, normal in ((AXIAL, (0, 0, 1)), (SAGITTAL, (-1, 0, 0)), (CORONAL, (0, 1, 0))):
        paths += write_stack(tmp_path, along(normal, (-20, 0, 20)), orientation=orientation, Modality="MR")
    found = checked(paths)
    assert found.sources == []
    assert reasons(found) == {"LOCALIZER": 9}
    assert found.refusals[0].detail == "a few slices in each of several orientations"


def test_the_same_planes_of_a_ct_are_reformatted_volumes(tmp_path):
    paths = []
    for orientation, normal in ((AXIAL, (0, 0, 1)), (SAGITTAL, (-1, 0, 0)), (CORONAL, (0, 1, 0))):
        paths += write_stack(tmp_path, along(normal, (-20, 0, 20)), orientation=orientation)
    assert shapes(checked(paths)) == [(3, 4, 6)] * 3


def test_two_orientations_in_one_series_are_two_volumes(tmp_path):
    paths = write_stack(tmp_path, along((0, 0, 1), (0, 4)), Modality="MR")
    paths += write_stack(tmp_path, along((-1, 0, 0), (0, 4)), orientation=SAGITTAL, Modality="MR")
    found = checked(paths)
    assert shapes(found) == [(2, 4, 6), (2, 4, 6)]
    assert reasons(found) == {}


def test_planes_turned_around_one_axis_are_no_localizer(tmp_path):
    paths = []
    for degrees in range(0, 180, 30):
        angle = np.radians(degrees)
        orientation = (np.cos(angle), np.sin(angle), 0.0, 0.0, 0.0, -1.0)
        paths += write_stack(tmp_path, [(0, 0, 0)], orientation=[f"{part:.8f}" for part in orientation], Modality="MR")
    found = checked(paths)
    assert shapes(found) == [(1, 4, 6)] * 6
    assert all("SINGLE_SLICE" in source.flags for source in found.sources)


def test_a_scout_and_a_dose_report_in_a_ct_series_stay_out_of_its_volume(tmp_path):
    paths = write_series(tmp_path / "ct", VOLUME)
    scout = write_slice(tmp_path / "scout", VOLUME[0], ImageType=["ORIGINAL", "PRIMARY", "LOCALIZER"])
    report = save(
        dataset(np.zeros((9, 8, 3), np.uint8), SOPClassUID="1.2.840.10008.5.1.4.1.1.7", Modality="CT"),
        tmp_path / "report",
    )
    found = checked([*paths, scout, report])
    assert shapes(found) == [(5, 4, 6)]
    assert reasons(found) == {"LOCALIZER": 1, "BURNED_IN": 1}
    named = checked([*paths, scout, report], "ct")
    assert reasons(named) == {"LOCALIZER": 1, "DTYPE_UNSUPPORTED": 1}


def test_fault_48_a_dicomdir_that_points_out_of_the_archive_is_not_followed(tmp_path):
    inside = write_series(tmp_path / "archive", VOLUME)
    outside = write_slice(tmp_path / "canary", VOLUME[0], position=(0, 0, 10.0))
    entry = Dataset()
    entry.DirectoryRecordType = "IMAGE"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such a name is not valid, which is the point
        entry.ReferencedFileID = ["..", "..", "canary"]
    directory = Dataset()
    directory.SOPClassUID, directory.SOPInstanceUID = "1.2.840.10008.1.3.10", uid("directory")
    directory.DirectoryRecordSequence = Items([entry])
    path = save(directory, tmp_path / "archive" / "DICOMDIR")
    found = checked([*inside, path])
    assert shapes(found) == [(5, 4, 6)]
    assert [(one.path, one.reason.name) for one in found.refusals] == [(path, "NON_IMAGE")]
    assert outside.exists()


def test_fault_42_each_slice_of_a_pet_is_rescaled_by_its_own_file(tmp_path):
    slopes = [1e-8, 3.7e-3, 0.5, 12.25, 1.0]
    paths = [
        write_slice(
            tmp_path / f"{number}",
            VOLUME[number],
            position=(0, 0, number),
            Modality="PT",
            Units="BQML",
            RescaleSlope=str(slope),
            RescaleIntercept="0",
        )
        for number, slope in enumerate(slopes)
    ]
    image = dicom.read(only(checked(paths)))
    expected = (VOLUME.astype(np.float64) * np.array(slopes)[:, None, None]).astype(np.float32)
    np.testing.assert_array_equal(image.array[0], expected)


# Which series


def test_a_series_spread_over_folders_is_one_volume(tmp_path):
    paths = write_series(tmp_path, VOLUME)
    moved = [path.rename(path.parent / f"{number % 2}_{path.name}") for number, path in enumerate(paths)]
    for path in moved:
        (tmp_path / path.name[0]).mkdir(exist_ok=True)
    paths = [path.rename(tmp_path / path.name[0] / path.name[2:]) for path in moved]
    assert len({path.parent for path in paths}) == 2
    found = checked(paths)
    assert shapes(found) == [(5, 4, 6)]
    np.testing.assert_array_equal(dicom.read(found.sources[0]).array[0], VOLUME - 1024.0)


def test_two_series_in_one_folder_are_two_volumes(tmp_path):
    one = write_stack(tmp_path, along((0, 0, 1), range(5)), SeriesInstanceUID=uid("one"))
    two = write_stack(tmp_path, along((0, 0, 1), np.arange(5) + 0.5), SeriesInstanceUID=uid("two"))
    found = checked([*one, *two])
    assert sorted(source.files for source in found.sources) == [tuple(one), tuple(two)]


@pytest.mark.parametrize("tag", ["SeriesNumber", "SeriesDescription"])
def test_without_a_series_uid_number_and_description_tell_series_apart(tmp_path, tag):
    tags = {"SeriesInstanceUID": None}
    one = write_stack(tmp_path, along((0, 0, 1), range(5)), **tags, **{tag: "1"})
    two = write_stack(tmp_path, along((0, 0, 1), np.arange(5) + 0.4), **tags, **{tag: "2"})
    found = checked([*one, *two])
    assert shapes(found) == [(5, 4, 6), (5, 4, 6)]
    assert reasons(found) == {}


def test_a_series_without_sop_class_and_frame_of_reference_is_read(tmp_path):
    paths = write_series(tmp_path, VOLUME, FrameOfReferenceUID=None)
    for path in paths:
        content = path.read_bytes()
        # In the file meta, too.
        assert content.count(SOP_CLASSES["CT"].encode() + b"\0") == 2
        path.write_bytes(content.replace(SOP_CLASSES["CT"].encode(), bytes(len(SOP_CLASSES["CT"]))))
    assert shapes(checked(paths)) == [(5, 4, 6)]


def test_two_patients_of_a_mixed_series_are_two_volumes_that_their_study_ties_together(tmp_path):
    paths = write_stack(tmp_path, along((0, 0, 1), (0, 1)), PatientID="A")
    paths += write_stack(tmp_path, along((0, 0, 1), (2, 3)), PatientID="B")
    one, two = checked(paths).sources
    patients = [[value for kind, value in source.identity if kind == "patient"] for source in (one, two)]
    assert patients == [["A|"], ["B|"]]
    assert {("study", uid("study")), ("series", uid("series"))} <= {*one.identity} & {*two.identity}


def test_sources_know_the_instances_of_their_slices(tmp_path):
    paths = write_series(tmp_path, VOLUME)
    (source,) = checked(paths).sources
    assert source.selector["instances"] == [str(pydicom.dcmread(path).SOPInstanceUID) for path in paths]
    plane = survey([write_slice(tmp_path / "dx", VOLUME[0], Modality="DX")]).sources[0]
    instance = str(pydicom.dcmread(tmp_path / "dx").SOPInstanceUID)
    assert plane.selector == {"instances": [instance]}
    assert ("instance", instance) in plane.identity


# Spacing


def test_a_tilted_head_ct_of_changing_spacing_is_cut_into_uniform_runs(tmp_path):
    # GE's fossa and vertex: dz from 1.08 to 7.00 mm, tilt 18.5 degrees.
    steps = [2.5] * 7 + [1.08] + [5.0] * 9 + [7.0] + [5.0] * 4
    depths = np.concatenate([[0], np.cumsum(steps)])
    tilted = np.array([0, np.tan(np.radians(18.5)), 1.0])
    found = checked(write_stack(tmp_path, [tuple(np.round(tilted * depth, 4)) for depth in depths]))
    assert shapes(found) == [(5, 4, 6), (8, 4, 6), (10, 4, 6)]
    assert all({"TILT", "SPLIT_AT_GAP"} <= set(source.flags) for source in found.sources)


@pytest.mark.parametrize("decimals", [2, 3])
def test_positions_rounded_to_hundredths_stay_one_volume(tmp_path, decimals):
    # Oblique, so that each coordinate rounds in its own way; the last slice too, from which a step must not be taken.
    step = np.array([0.1234, -0.4321, 0.6543])
    turned = [0.0, 0.83446, 0.55109, -0.98270, 0.10203, -0.15450]
    first = np.array(turned[:3]) / np.linalg.norm(turned[:3])
    second = np.cross(step / np.linalg.norm(step), first)
    second -= first * (first @ second)
    orientation = [f"{value:.8f}" for value in (*first, *(second / np.linalg.norm(second)))]
    positions = [np.round(np.array([3.3, 4.4, 5.5]) + step * number, decimals) for number in range(60)]
    found = checked(write_stack(tmp_path, [tuple(place) for place in positions], orientation=orientation))
    assert shapes(found) == [(60, 4, 6)]


def test_positions_rounded_to_tenths_are_refused_with_how_far_off_they_are(tmp_path):
    found = checked(write_stack(tmp_path, [(0, 0, round(number * 0.625, 1)) for number in range(40)]))
    assert found.sources == []
    assert reasons(found) == {"BAD_GEOMETRY": 40}
    assert found.refusals[0].detail == (
        "40 slices are up to 0.050 mm off equal steps, 0.01 mm may be: positions that look rounded; "
        "get the original ones"
    )


def test_rounded_positions_on_one_side_of_a_gap_do_not_take_the_exact_ones_with_them(tmp_path):
    rounded = [(0, 0, round(number * 0.625, 1)) for number in range(20)]
    exact = [(0, 0, 40 + number * 0.625) for number in range(20)]
    found = checked(write_stack(tmp_path, [*rounded, *exact]))
    assert shapes(found) == [(20, 4, 6)]
    assert reasons(found) == {"BAD_GEOMETRY": 20}


def test_one_slice_that_was_moved_splits_and_is_told(tmp_path):
    depths = np.arange(20) * 2.0
    depths[8] += 0.05
    found = checked(write_stack(tmp_path, along((0, 0, 1), depths)))
    assert shapes(found) == [(8, 4, 6), (11, 4, 6)]
    assert [refusal.detail for refusal in found.refusals] == ["apart from the others at 16.05 mm along the normal"]


def test_the_fitted_line_is_the_best_one_in_each_coordinate():
    rng = np.random.default_rng(2)
    exact = np.arange(200)[:, None] * np.array([0.3, 0.4, 1.7])
    noisy = exact + rng.uniform(-0.005, 0.005, exact.shape)
    noisy[0] += (0.005, 0.005, 0.005) - (noisy - exact)[0]
    noisy[-1] += (-0.005, -0.005, -0.005) - (noisy - exact)[-1]
    origin, step, error = fitted_line(noisy)
    assert error <= 0.005 * np.sqrt(3)
    assert error == pytest.approx(np.linalg.norm(noisy - (origin + np.arange(200)[:, None] * step), axis=1).max())


@pytest.mark.parametrize(
    ("tags", "detail"),
    [
        ({"spacing": (1e-6, 1e-6)}, "PixelSpacing is not within 0.001 and 10000 mm"),
        ({"spacing": (1.0, 1e300)}, "PixelSpacing is not within 0.001 and 10000 mm"),
        ({"position": (0, 1e300, 0)}, "ImagePositionPatient is more than 1e+06 mm away"),
    ],
)
def test_lengths_that_no_body_has_are_refused(tmp_path, tags, detail):
    found = checked([write_slice(tmp_path / "a", VOLUME[0], **tags)])
    assert [(one.reason.name, one.detail) for one in found.refusals] == [("BAD_GEOMETRY", detail)]


@pytest.mark.parametrize("thickness", ["1e-9", "1e300", "-3"])
def test_one_slice_of_an_impossible_thickness_is_taken_for_one_of_a_millimetre(tmp_path, thickness):
    path = write_slice(tmp_path / "a", VOLUME[0], SliceThickness=thickness)
    assert only(checked([path])).geometry.spacing[0] == 1.0


# Repeats


def test_magnitude_and_phase_are_volumes_of_their_own_and_the_phase_has_no_weighting(tmp_path):
    physics = {"Modality": "MR", "ScanningSequence": "SE", "RepetitionTime": "4000", "EchoTime": "90"}
    magnitude = write_stack(
        tmp_path / "m", along((0, 0, 1), range(5)), ImageType=["ORIGINAL", "PRIMARY", "M", "ND"], **physics
    )
    phase = write_stack(
        tmp_path / "p", along((0, 0, 1), range(5)), ImageType=["ORIGINAL", "PRIMARY", "P", "ND"], **physics
    )
    found = checked([*magnitude, *phase])
    assert {source.files: source.channels[0].name for source in found.sources} == {
        tuple(magnitude): "T2",
        tuple(phase): "MR",
    }
    # Not even where they share no position.
    beside = write_stack(
        tmp_path / "q", along((0, 0, 1), range(5, 10)), ImageType=["ORIGINAL", "PRIMARY", "P", "ND"], **physics
    )
    assert shapes(checked([*magnitude, *beside])) == [(5, 4, 6), (5, 4, 6)]


def test_ge_says_in_private_whether_an_image_is_a_phase(tmp_path):
    paths = []
    for kind in (0, 1):
        for depth in range(3):
            made = dataset(
                VOLUME[depth],
                Modality="MR",
                Manufacturer="GE MEDICAL SYSTEMS",
                ImagePositionPatient=[0, 0, depth],
                ImageOrientationPatient=list(AXIAL),
                PixelSpacing=[1, 1],
            )
            made.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(0x2F, "SS", kind)
            paths.append(save(made, tmp_path / f"{kind}{depth}"))
    assert shapes(checked(paths)) == [(3, 4, 6), (3, 4, 6)]


@pytest.mark.parametrize("kind", ["ADC", "T1 MAP", "FA"])
def test_computed_maps_have_no_weighting(tmp_path, kind):
    paths = write_stack(
        tmp_path,
        along((0, 0, 1), range(3)),
        Modality="MR",
        ScanningSequence="SE",
        RepetitionTime="4000",
        EchoTime="90",
        ImageType=["DERIVED", "PRIMARY", "DIFFUSION", kind],
    )
    assert checked(paths).sources[0].channels[0].name == "MR"


def weighted(made: Dataset, vendor: str, b_value: int, direction: tuple[float, ...]) -> None:
    if vendor == "SIEMENS":
        block = made.private_block(0x0019, "SIEMENS MR HEADER", create=True)
        block.add_new(0x0C, "IS", str(b_value))
        if b_value:
            block.add_new(0x0E, "FD", list(direction))
    elif vendor == "GE MEDICAL SYSTEMS":
        made.private_block(0x0043, "GEMS_PARM_01", create=True).add_new(0x39, "IS", [1_000_000_000 + b_value, 8, 0, 0])
        block = made.private_block(0x0019, "GEMS_ACQU_01", create=True)
        for element, part in zip((0xBB, 0xBC, 0xBD), direction, strict=True):
            block.add_new(element, "DS", f"{part if b_value else 0:.4f}")
    elif vendor == "Philips Medical Systems":
        made.private_block(0x2001, "Philips Imaging DD 001", create=True).add_new(0x03, "FL", float(b_value))
        block = made.private_block(0x2005, "Philips MR Imaging DD 001", create=True)
        for element, part in zip((0xB0, 0xB1, 0xB2), direction, strict=True):
            block.add_new(element, "FL", part if b_value else 0.0)
    else:
        made.private_block(0x0065, "Image Private Header", create=True).add_new(0x09, "FD", float(b_value))


VENDORS = ("SIEMENS", "GE MEDICAL SYSTEMS", "Philips Medical Systems", "UIH")


def write_diffusion(folder: Path, vendor: str, weights: list[tuple[int, tuple[float, ...]]], **tags: object) -> None:
    for number, (b_value, direction) in enumerate(weights):
        for depth in range(3):
            made = dataset(
                VOLUME[depth] + number,
                **{
                    "Modality": "MR",
                    "Manufacturer": vendor,
                    "ScanningSequence": "EP",
                    "InstanceNumber": None,
                    "ImagePositionPatient": [0, 0, depth],
                    "ImageOrientationPatient": list(AXIAL),
                    "PixelSpacing": [1, 1],
                }
                | tags,
            )
            weighted(made, vendor, b_value, direction)
            save(made, folder / f"{number}{depth}")


@pytest.mark.parametrize("vendor", VENDORS)
def test_b_values_in_private_attributes_tell_volumes_apart_and_name_them(tmp_path, vendor):
    write_diffusion(tmp_path, vendor, [(0, (0.0, 0.0, 0.0)), (1000, (0.0, 0.6, 0.8))])
    found = checked(sorted(tmp_path.iterdir()))
    assert [source.channels[0].name for source in found.sources] == ["MR", "DWI"]
    assert reasons(found) == {}
    for number, source in enumerate(found.sources):
        np.testing.assert_array_equal(dicom.read(source).array[0], VOLUME[:3] + number)


@pytest.mark.parametrize("vendor", VENDORS[:3])
def test_gradient_directions_in_private_attributes_tell_volumes_apart(tmp_path, vendor):
    write_diffusion(tmp_path, vendor, [(700, (1.0, 0.0, 0.0)), (700, (0.0, 1.0, 0.0)), (700, (0.0, 0.0, 1.0))])
    found = checked(sorted(tmp_path.iterdir()))
    assert shapes(found) == [(3, 4, 6)] * 3


def test_ge_means_a_b_value_in_echo_planar_images_only(tmp_path):
    write_diffusion(tmp_path, "GE MEDICAL SYSTEMS", [(1000, (0.0, 0.6, 0.8))], ScanningSequence="GR")
    assert checked(sorted(tmp_path.iterdir())).sources[0].channels[0].name == "MR"


def test_a_private_block_of_another_creator_is_not_believed(tmp_path):
    made = dataset(
        VOLUME[0],
        Modality="MR",
        Manufacturer="SIEMENS",
        ImagePositionPatient=[0, 0, 0],
        ImageOrientationPatient=list(AXIAL),
        PixelSpacing=[1, 1],
    )
    made.private_block(0x0019, "SOMEBODY ELSE", create=True).add_new(0x0C, "IS", "1000")
    assert checked([save(made, tmp_path / "a")]).sources[0].channels[0].name == "MR"
    # Where a router has put its own block first, the second one counts.
    made.private_block(0x0019, "SIEMENS MR HEADER", create=True).add_new(0x0C, "IS", "1000")
    assert checked([save(made, tmp_path / "b")]).sources[0].channels[0].name == "DWI"


def test_reconstructions_with_two_kernels_in_one_series_are_two_volumes(tmp_path):
    paths = []
    for kernel in ("B30f", "B70s"):
        paths += write_stack(tmp_path / kernel, along((0, 0, 1), range(5)), ConvolutionKernel=kernel)
    found = checked(paths)
    assert sorted(source.files for source in found.sources) == sorted([tuple(paths[:5]), tuple(paths[5:])])


def test_thick_and_thin_slices_of_one_series_are_two_volumes(tmp_path):
    thin = write_stack(tmp_path / "thin", along((0, 0, 1), range(10)), SliceThickness="1")
    thick = write_stack(tmp_path / "thick", along((0, 0, 1), (0, 3, 6, 9)), SliceThickness="3")
    found = checked([*thin, *thick])
    assert sorted(source.files for source in found.sources) == sorted([tuple(thin), tuple(thick)])


@pytest.mark.parametrize("tag", [{"NominalPercentageOfCardiacPhase": 35.0}, {"FrameReferenceTime": "9000"}])
def test_cardiac_phases_and_pet_frames_are_volumes_of_their_own(tmp_path, tag):
    keyword, value = next(iter(tag.items()))
    one = write_stack(tmp_path / "1", along((0, 0, 1), range(5)), InstanceNumber=None, **tag)
    two = write_stack(
        tmp_path / "2", along((0, 0, 1), range(5)), InstanceNumber=None, **{keyword: type(value)(float(value) * 2)}
    )
    assert shapes(checked([*one, *two])) == [(5, 4, 6), (5, 4, 6)]


def test_the_same_pixels_under_new_instances_are_recognised(tmp_path):
    paths = write_series(tmp_path / "a", VOLUME, InstanceNumber=None)
    again = write_series(tmp_path / "b", VOLUME, InstanceNumber=None)
    found = checked([*paths, *again])
    assert [source.files for source in found.sources] == [tuple(paths)]
    assert reasons(found) == {"DUPLICATE": 5}
    assert found.refusals[0].detail == "the same pixels at the same position under another instance"


def test_one_slice_with_other_pixels_at_a_taken_position_is_refused_with_its_place(tmp_path):
    paths = write_series(tmp_path / "a", VOLUME, InstanceNumber=None)
    other = write_slice(tmp_path / "b", VOLUME[2] + 1, position=(0, 0, 4.0), InstanceNumber=None)
    found = checked([*paths, other])
    assert {(r.reason.name, r.detail) for r in found.refusals} >= {
        ("DUP_POSITION", "not the only slice at 4.00 mm along the normal")
    }


# Multi-frame


def placed(count: int, repeats: int) -> list[dict[str, object]]:
    return [{"position": (0, 0, 2.0 * place)} for _ in range(repeats) for place in range(count)]


def test_dimension_indices_tell_frames_apart_where_nothing_else_does(tmp_path):
    volume = RNG.integers(0, 2000, (6, 4, 6)).astype(np.int16)
    made = enhanced(volume, placed(3, 2))
    pointers = []
    for pointer in (0x00209056, 0x00209057, 0x00189087):
        item = Dataset()
        item.DimensionIndexPointer = pointer
        pointers.append(item)
    made.DimensionIndexSequence = Items(pointers)
    for number, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        content = groups.FrameContentSequence[0]
        # The repeats are interleaved, which the order of frames would get wrong.
        content.DimensionIndexValues = [1, number // 2 + 1, number % 2 + 1]
        groups.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 2.0 * (number // 2)]
    found = checked([save(made, tmp_path / "a")])
    assert sorted(source.selector["frames"] for source in found.sources) == [[0, 2, 4], [1, 3, 5]]


def test_stacks_of_an_enhanced_object_are_volumes_of_their_own(tmp_path):
    volume = RNG.integers(0, 2000, (6, 4, 6)).astype(np.int16)
    made = enhanced(volume, placed(3, 2), FrameOfReferenceUID=None)
    for number, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        groups.FrameContentSequence[0].StackID = str(number // 3 + 1)
        groups.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 2.0 * number]
    found = checked([save(made, tmp_path / "a")])
    assert [source.selector["frames"] for source in found.sources] == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.parametrize(
    ("group", "inner", "keyword"),
    [
        ("CardiacSynchronizationSequence", None, "NominalCardiacTriggerDelayTime"),
        ("TemporalPositionSequence", None, "TemporalPositionTimeOffset"),
    ],
)
def test_trigger_delays_and_time_offsets_of_frames_tell_volumes_apart(tmp_path, group, inner, keyword):
    volume = RNG.integers(0, 2000, (6, 4, 6)).astype(np.int16)
    made = enhanced(volume, placed(3, 2))
    for number, groups in enumerate(made.PerFrameFunctionalGroupsSequence):
        del groups.FrameContentSequence[0].TemporalPositionIndex
        groups.PlanePositionSequence[0].ImagePositionPatient = [0, 0, 2.0 * (number // 2)]
        item = Dataset()
        setattr(item, keyword, 100.0 * (number % 2))
        setattr(groups, group, Items([item]))
    found = checked([save(made, tmp_path / "a")])
    assert [source.selector["frames"] for source in found.sources] == [[0, 2, 4], [1, 3, 5]]


NUCLEAR = """
name: spect
title: Single photon emission tomography
geometry: volume
formats: [dicom]
dicom: [NM]
unit: counts
normalise: {method: image}
"""


def nuclear(volume: np.ndarray, **tags: object) -> Dataset:
    made = dataset(
        volume,
        **{
            "Modality": "NM",
            "SOPClassUID": "1.2.840.10008.5.1.4.1.1.20",
            "NumberOfFrames": len(volume),
            "ImageType": ["ORIGINAL", "PRIMARY", "RECON TOMO", "EMISSION"],
            "PixelSpacing": [2.0, 2.0],
            "SpacingBetweenSlices": "-3",
            "SliceVector": list(range(1, len(volume) + 1)),
            "DetectorVector": [1] * len(volume),
        }
        | tags,
    )
    detector = Dataset()
    detector.ImagePositionPatient = [1, 2, 30]
    detector.ImageOrientationPatient = list(AXIAL)
    made.DetectorInformationSequence = Items([detector])
    return made


@pytest.fixture
def spect(tmp_path: Path) -> Modality:
    path = tmp_path / "spect.yaml"
    path.write_text(NUCLEAR)
    return parse_modality(path)


def only(found: Survey) -> Source:
    assert reasons(found) == {}
    (source,) = found.sources
    return source


def test_a_tomogram_of_nuclear_medicine_is_placed_by_its_detector_and_signed_spacing(tmp_path, spect):
    source = only(checked([save(nuclear(VOLUME), tmp_path / "a")], spect))
    np.testing.assert_allclose(source.geometry.affine[:3, 3], (1, 2, 30 - 12))
    np.testing.assert_allclose(source.geometry.affine[:3, 0], (0, 0, 3))
    np.testing.assert_array_equal(dicom.read(source).array[0], VOLUME[::-1])


def test_a_gated_tomogram_is_one_volume_a_time_slot(tmp_path, spect):
    volume = RNG.integers(0, 2000, (6, 4, 6)).astype(np.int16)
    tags = {"SliceVector": [1, 2, 3] * 2, "TimeSlotVector": [1] * 3 + [2] * 3, "SpacingBetweenSlices": "3"}
    path = save(
        nuclear(volume, ImageType=["ORIGINAL", "PRIMARY", "RECON GATED TOMO", "EMISSION"], **tags), tmp_path / "a"
    )
    found = checked([path], spect)
    assert [source.selector["frames"] for source in found.sources] == [[0, 1, 2], [3, 4, 5]]


def test_projections_of_nuclear_medicine_are_no_volume(tmp_path, spect):
    path = save(nuclear(VOLUME, ImageType=["ORIGINAL", "PRIMARY", "TOMO", "EMISSION"]), tmp_path / "a")
    found = checked([path], spect)
    assert [(refusal.reason.name, refusal.detail) for refusal in found.refusals] == [
        ("BAD_FRAMES", "5 frames without functional groups: nothing says where they lie")
    ]


def test_a_captured_volume_with_functional_groups_is_read_when_it_is_declared_clean(tmp_path):
    made = enhanced(
        VOLUME,
        placed(5, 1),
        Modality="CT",
        SOPClassUID="1.2.840.10008.5.1.4.1.1.7.3",
        BurnedInAnnotation="NO",
        ImageType=["DERIVED", "SECONDARY"],
    )
    for groups in made.PerFrameFunctionalGroupsSequence:
        groups.PixelValueTransformationSequence[0].RescaleType = "HU"
    source = only(checked([save(made, tmp_path / "a")]))
    np.testing.assert_array_equal(dicom.read(source).array[0], VOLUME)


def test_a_cine_of_projections_is_one_plane_a_frame(tmp_path):
    clip = RNG.integers(0, 255, (4, 5, 6)).astype(np.uint8)
    made = dataset(clip, Modality="XA", SOPClassUID="1.2.840.10008.5.1.4.1.1.12.1", NumberOfFrames=4)
    found = checked([save(made, tmp_path / "a")])
    assert [source.selector["frames"] for source in found.sources] == [[0], [1], [2], [3]]
    np.testing.assert_array_equal(dicom.read(found.sources[2]).array[0], clip[2])


# Cine and spin labelling


def test_phases_of_a_cine_whose_slices_have_trigger_times_of_their_own_are_volumes(tmp_path):
    # Slices were triggered one after the other: no trigger time occurs at two positions, and instances are shuffled.
    phases = RNG.integers(0, 2000, (4, *VOLUME.shape)).astype(np.int16)
    paths = []
    for (phase, depth), instance in zip(np.ndindex(4, 5), RNG.permutation(20).tolist(), strict=True):
        paths.append(
            write_slice(
                tmp_path / f"{instance}",
                phases[phase, depth],
                position=(0, 0, 2.0 * depth),
                Modality="MR",
                TriggerTime=f"{40 * phase + 3 * depth + 1}",
                InstanceNumber=instance,
            )
        )
    found = checked(paths)
    assert reasons(found) == {}
    read = sorted((dicom.read(source).array[0] for source in found.sources), key=lambda volume: volume[0, 0, 0])
    expected = sorted(phases, key=lambda volume: volume[0, 0, 0])
    np.testing.assert_array_equal(read, expected)


def test_trigger_times_that_are_missing_at_a_position_tell_no_phases_apart(tmp_path):
    paths = [
        write_slice(
            tmp_path / f"{phase}{depth}",
            VOLUME[depth] + phase,
            position=(0, 0, 2.0 * depth),
            Modality="MR",
            TriggerTime=None if (phase, depth) == (1, 2) else f"{40 * phase + 3 * depth + 1}",
            InstanceNumber=None,
        )
        for phase, depth in np.ndindex(2, 5)
    ]
    assert reasons(checked(paths)) == {"DUP_POSITION": 10}


@pytest.mark.parametrize("creator", ["Philips MR Imaging DD 005", None])
def test_label_and_control_of_spin_labelling_are_volumes_of_their_own(tmp_path, creator):
    paths = []
    for phase, depth, label in np.ndindex(2, 5, 2):
        path = write_slice(
            tmp_path / f"{phase}{depth}{label}",
            VOLUME[depth] + 10 * phase + label,
            position=(0, 0, 2.0 * depth),
            Modality="MR",
            Manufacturer="Philips",
            TriggerTime=f"{250 * phase + 20 * depth + 300}",
            InstanceNumber=None,
        )
        if creator:
            held = pydicom.dcmread(path)
            for number in range(1, 5):
                held.private_block(0x2005, f"Philips MR Imaging DD {number:03d}", create=True)
            held.private_block(0x2005, creator, create=True).add_new(0x29, "CS", ("LABEL", "CONTROL")[label])
            held.save_as(path)
        paths.append(path)
    found = checked(paths)
    if creator is None:
        assert reasons(found) == {"DUP_POSITION": 20}
        return
    assert reasons(found) == {}
    offsets = sorted(int((dicom.read(source).array[0] - VOLUME).max()) for source in found.sources)
    assert offsets == [0, 1, 10, 11]


def test_spin_labelling_of_enhanced_objects_is_told_by_its_context(tmp_path):
    frames = [{"position": (0, 0, 2.0 * depth)} for _ in range(2) for depth in range(5)]
    made = enhanced(np.concatenate([VOLUME, VOLUME + 7]), frames)
    for number, item in enumerate(made.PerFrameFunctionalGroupsSequence):
        context = Dataset()
        context.ASLContext = "LABEL" if number < 5 else "CONTROL"
        item.MRArterialSpinLabelingSequence = Items([context])
    found = survey([save(made, tmp_path / "a")])
    assert reasons(found) == {}
    assert sorted(int((dicom.read(source).array[0] - VOLUME).max()) for source in found.sources) == [0, 7]
