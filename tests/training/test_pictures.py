"""What a panel shows: colours and greys of the right channels, windows of a reading room, planes the right way up."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.archives.planes import shown_groups, sides, window_of
from geomed_mae.image import Channel, PlaneGeometry, VolumeGeometry
from geomed_mae.modalities import load_modality
from geomed_mae.training.pictures import Crop, rows_of

CT = (Channel(name="CT", kind="ct", unit="HU"),)
MR = (Channel(name="MR", kind="mr", unit="a.u."),)


def names(modality):
    channels = load_modality(modality).channels
    return [[channels[index].name for index in group] for group in shown_groups(channels)]


def test_optical_images_are_shown_in_natural_colours_and_radar_in_one_grey_a_polarisation():
    assert names("landsat7") == [["B3", "B2", "B1"]] and names("sentinel2-l2a") == [["B04", "B03", "B02"]]
    assert names("sentinel1") == [["VV"], ["VH"]] and names("ct") == [["CT"]]


def test_bands_outside_the_visible_are_shown_in_false_colours_the_longest_as_red():
    infrared = [Channel(name=str(nm), kind="optical", wavelength_nm=nm) for nm in (2200.0, 850.0, 1600.0, 2300.0)]
    assert shown_groups(infrared) == [(0, 2, 1)]
    assert shown_groups(infrared[:2]) == [(0,), (1,)]


def test_ct_is_seen_through_the_window_of_what_is_there():
    soft = np.array([-1000.0] * 60 + [40.0] * 40)[:, None]  # a body in much free air
    lung = np.array([-1000.0] * 10 + [-850.0] * 60 + [40.0] * 30)[:, None]
    window = window_of(CT, soft)
    assert (window.low[0], window.high[0]) == (-160, 240)
    assert window.name == "soft tissue window: level 40, width 400 HU"
    assert window_of(CT, lung).name == "lung window: level -600, width 1500 HU"


def test_pet_starts_at_zero_and_is_inverted_and_others_run_between_percentiles():
    values = np.linspace(3, 103, 1001)[:, None]
    pet = window_of((Channel(name="PET", kind="pet", unit="g/ml"),), values)
    assert pet.low[0] == 0 and pet.high[0] == pytest.approx(102.5) and pet.colours == "gray_r"
    other = window_of(MR, values)
    assert (other.low[0], other.high[0]) == pytest.approx((5, 101)) and other.name == "5 to 101 a.u."


def test_a_constant_or_empty_crop_has_a_window_too():
    for values in (np.full((5, 1), 7.0), np.zeros((0, 1))):
        window = window_of(MR, values)
        assert window.high[0] > window.low[0]


# ---------------------------------------------------------------------------------------------------------- volumes


def affine_of(axes: str, spacing: tuple[float, float, float]) -> np.ndarray:
    """Affine of a volume whose slices, rows and columns run towards the given patient sides, for example "SPL"."""
    towards = {"L": (0, 1), "R": (0, -1), "P": (1, 1), "A": (1, -1), "S": (2, 1), "I": (2, -1)}
    affine = np.eye(4)
    affine[:3, :3] = 0
    for column, (letter, step) in enumerate(zip(axes, spacing, strict=True)):
        axis, sign = towards[letter]
        affine[axis, column] = sign * step
    return affine


def phantom(axes: str, spacing: tuple[float, float, float], shape: tuple[int, int, int]) -> Crop:
    """A volume as it was acquired whose values rise to the patient's left by 1, posterior 10, superior 100 a mm."""
    affine = affine_of(axes, spacing)
    index = np.stack(np.meshgrid(*(np.arange(size) for size in shape), indexing="ij"), axis=-1)
    place = index @ affine[:3, :3].T
    place = place - place.reshape(-1, 3).min(axis=0)
    values = (place @ np.array([1.0, 10.0, 100.0]))[None].astype(np.float32)
    seen = np.zeros(shape, bool)
    letters = sides({"k": VolumeGeometry(affine)})["k"]
    return Crop(values, values + 1, np.ones(values.shape, bool), seen, ~seen[None], spacing, letters)


@pytest.mark.parametrize("axes", ["SPL", "IAR", "PIL", "ASR", "LIP", "RSA"])
def test_planes_lie_as_radiologists_see_them_however_a_volume_was_acquired(axes):
    """Right on the left, anterior and superior on top; the oracle is the position of each voxel in the patient."""
    rows = {row.label.split(" · ")[1]: row for row in rows_of(phantom(axes, (2.0, 1.0, 1.5), (12, 16, 10)), MR, 1)}
    assert set(rows) == {"axial", "coronal", "sagittal"}
    for name, (across, down), edges in (
        ("axial", (1.0, 10.0), "RLAP"),  # to the left, to the back
        ("coronal", (1.0, -100.0), "RLSI"),  # to the left, to the feet
        ("sagittal", (10.0, -100.0), "APSI"),  # to the back, to the feet
    ):
        plane = rows[name].image[..., 0]
        right, below = np.diff(plane, axis=1), np.diff(plane, axis=0)
        steps = {"L": 0, "R": 0, "P": 1, "A": 1, "S": 2, "I": 2}
        spacing = {steps[letter]: step for letter, step in zip(axes, (2.0, 1.0, 1.5), strict=True)}
        axis = {1.0: 0, 10.0: 1, 100.0: 2}
        assert right == pytest.approx(across * spacing[axis[abs(across)]], rel=1e-4)
        assert below == pytest.approx(down * spacing[axis[abs(down)]], rel=1e-4)
        assert rows[name].edges == edges
        assert rows[name].aspect == spacing[axis[abs(down)]] / spacing[axis[abs(across)]]


def test_the_plane_that_was_acquired_comes_first():
    assert rows_of(phantom("PIL", (2.0, 1.0, 1.0), (8, 8, 8)), MR, 1)[0].label == "example 1 · coronal"


def test_without_orientation_planes_are_named_after_the_axes():
    crop = phantom("SPL", (5.0, 1.0, 2.0), (4, 16, 16))
    unknown = Crop(crop.image, crop.answer, crop.valid, crop.seen, crop.asked, crop.spacing)
    rows = rows_of(unknown, MR, 2)
    assert [row.label for row in rows] == [
        f"example 2 · {n}" for n in ("row x column", "slice x column", "slice x row")
    ]
    assert [row.image.shape for row in rows] == [(16, 16, 1), (4, 16, 1), (4, 16, 1)]
    assert [row.aspect for row in rows] == [0.5, 2.5, 5.0]
    assert sides({"k": PlaneGeometry(None)}) == {}


def test_planes_that_are_slivers_are_left_out():
    rows = rows_of(phantom("SPL", (5.0, 1.0, 2.0), (1, 16, 48)), MR, 1)  # 5 x 16 x 96 mm
    assert [row.label.split(" · ")[1] for row in rows] == ["axial", "sagittal"]


def test_of_full_planes_the_one_with_most_to_see_is_shown():
    image = np.full((1, 6, 8, 8), -1000.0, np.float32)
    image[0, 4, 2:6, 2:6] = 60.0
    valid = np.ones(image.shape, bool)
    valid[:, 5] = False
    crop = Crop(image, image, valid, valid[0], valid, (1.0, 1.0, 1.0))
    assert (rows_of(crop, CT, 1)[0].image == image[0, 4, :, :, None]).all()


def test_padding_is_cut_off_and_further_channels_are_shown_in_one_plane_each():
    image = np.random.default_rng(0).normal(size=(2, 8, 8, 8)).astype(np.float32)
    valid = np.zeros(image.shape, bool)
    valid[:, :6, :, :5] = True
    channels = tuple(Channel(name=name, kind="mr", unit="a.u.") for name in ("T1", "T2"))
    rows = rows_of(Crop(image, image, valid, valid[0], valid, (1.0, 1.0, 1.0)), channels, 1)
    assert [row.label.split(" · ")[1:] for row in rows] == [
        ["T1", "row x column"],
        ["T1", "slice x column"],
        ["T1", "slice x row"],
        ["T2", "row x column"],
    ]
    assert rows[0].image.shape == (8, 5, 1) and rows[1].image.shape == (6, 5, 1)
