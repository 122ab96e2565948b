"""Structure sets, segmentations and masks in the folders where they are found: among the images."""

from __future__ import annotations

import shutil
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.label_pairs import pair
from geomed_mae.archives.label_values import label_query, target_of
from geomed_mae.archives.labels import match_labels
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.readers import IGNORE, LabelQuery
from geomed_mae.recipe_file import build_recipe, dump_recipe, load_recipe
from tests.make_dicom import uid, write_series
from tests.make_labels import contour, frame_of, segment, square, write_rtstruct, write_seg
from tests.scenes import mr_volume

RNG = np.random.default_rng(11)
QUERY = LabelQuery(classes=("background", "tumour", "lung"))
SHAPE = (4, 12, 10)


def series(folder: Path, name: str = "series", **tags) -> list[str]:
    """Write a CT series and return the SOP instances of its slices, in their order."""
    values = RNG.integers(0, 1000, SHAPE).astype(np.int16)
    files = write_series(folder, values, **{"SeriesInstanceUID": uid(name), **tags})
    return [str(pydicom.dcmread(path, stop_before_pixels=True).SOPInstanceUID) for path in files]


def archive(folder: Path, *modalities: str):
    return open_archive([folder], list(modalities or ("ct",)))


def test_a_structure_set_in_the_folder_of_its_series_is_found_there(tmp_path):
    instances = series(tmp_path / "dump")
    write_rtstruct(tmp_path / "dump" / "0000", {"Tumour": [square(1.5, 4.5, 2)]}, instances=instances)
    (tmp_path / "dump" / "report.txt").write_text("no labels")
    index = archive(tmp_path / "dump")
    reasons = {entry.reason for entry in index.ledger.entries}
    assert reasons >= {"NON_IMAGE"} and {entry.status for entry in index.ledger.entries} == {"used", "unsupported"}
    matching = match_labels(index, tmp_path / "dump", QUERY)
    assert (matching.labelled[0].stored == 1).sum() == 9 and matching.labelled[0].named
    assert matching.counts() == {
        "images_labelled": 1,
        "images_without_labels": 0,
        "label_files_without_image": 0,
        "other_files": 5,
    }


def test_of_three_series_in_one_frame_each_gets_the_set_that_names_it(tmp_path):
    for number in range(3):
        instances = series(tmp_path / f"{number}", f"s{number}")
        names = {"instances": instances} if number < 2 else {}
        box = square(0.5, 1.5 + number, 2)
        write_rtstruct(tmp_path / "rs" / f"{number}.dcm", {"tumour": [box]}, series=uid(f"s{number}"), **names)
    index = archive(tmp_path)
    matching = match_labels(index, tmp_path, QUERY)
    areas = {index.paths(entry.row.key)[0].parent.name: int((entry.stored == 1).sum()) for entry in matching.labelled}
    assert areas == {"0": 1, "1": 4, "2": 9}
    # Alone, a set lies on every series of its frame of reference.
    for number in (0, 1):
        shutil.rmtree(tmp_path / f"{number}")
        (tmp_path / "rs" / f"{number}.dcm").unlink()
    series(tmp_path / "3", "s3")
    matching = match_labels(archive(tmp_path), tmp_path / "rs", QUERY)
    assert matching.counts()["images_labelled"] == 1 and matching.counts()["images_without_labels"] == 1
    (tmp_path / "rs" / "2.dcm").unlink()  # "2" is the name of a folder: it would go with that series alone
    write_rtstruct(tmp_path / "rs" / "any.dcm", {"tumour": [square(0.5, 3.5, 2)]})
    assert match_labels(archive(tmp_path), tmp_path / "rs", QUERY).counts()["images_labelled"] == 2


def test_a_set_of_another_patient_is_counted_and_not_used(tmp_path):
    instances = series(tmp_path / "ct")
    write_rtstruct(tmp_path / "rs" / "a.dcm", {"tumour": [square(1.5, 4.5, 2)]}, instances=instances)
    write_rtstruct(
        tmp_path / "rs" / "b.dcm", {"tumour": [square(1.5, 9.5, 2)]}, frame=uid("other"), instances=[uid("other")]
    )
    matching = match_labels(archive(tmp_path / "ct"), tmp_path / "rs", QUERY)
    assert (matching.labelled[0].stored == 1).sum() == 9
    assert matching.counts()["label_files_without_image"] == 1


def test_what_does_not_lie_on_the_image_that_it_names_is_an_error_with_both_names(tmp_path):
    instances = series(tmp_path / "ct")
    path = write_rtstruct(tmp_path / "rs" / "a.dcm", {"tumour": [square(1.5, 4.5, 70)]}, instances=instances)
    index = archive(tmp_path / "ct")
    with pytest.raises(ReadError, match=r"a\.dcm has a contour 64\.00 mm from .* \(image 0004\.dcm\)$") as caught:
        match_labels(index, path, QUERY)
    assert caught.value.reason == "BAD_GEOMETRY"
    path = write_seg(tmp_path / "s.dcm", [frame_of(np.ones((12, 10), np.uint8), (50, 0, 0))], [segment(1, "tumour")])
    with pytest.raises(ReadError, match=r"labels of s\.dcm do not overlap the image \(image 0004\.dcm\)$"):
        match_labels(index, path, QUERY)


def test_an_unknown_class_is_an_error_with_both_names(tmp_path):
    series(tmp_path / "ct")
    path = write_rtstruct(tmp_path / "rs.dcm", {"Heart": [square(1.5, 4.5, 2)]})
    index = archive(tmp_path / "ct")
    with pytest.raises(ReadError, match=r"rs\.dcm has the class 'Heart', .* \(image 0004\.dcm\)$") as caught:
        match_labels(index, path, QUERY)
    assert caught.value.reason == "CLASS_UNKNOWN"


def test_names_are_numbered_alike_over_all_files_when_none_are_asked_for(tmp_path):
    for number, name in enumerate(("lung", "Heart")):
        series(tmp_path / f"{number}", f"s{number}", FrameOfReferenceUID=uid("frame", number))
        regions = {name: [square(0.5, 3.5, 2)], "spine": [square(5.5, 7.5, 2)]}
        write_rtstruct(tmp_path / f"{number}.rs", regions, frame=uid("frame", number))
    matching = match_labels(archive(tmp_path), tmp_path)
    assert matching.names == ("background", "Heart", "lung", "spine")
    assert [np.bincount(entry.stored.ravel())[1:].tolist() for entry in matching.labelled] == [[0, 9, 4], [9, 0, 4]]


def test_several_files_join_where_they_name_different_things_and_are_refused_where_not(tmp_path):
    instances = series(tmp_path / "ct")
    write_rtstruct(tmp_path / "l" / "a.dcm", {"tumour": [square(1.5, 4.5, 2)]}, instances=instances)
    pixels = np.zeros((12, 10), np.uint8)
    pixels[:4] = 1
    frames = [frame_of(pixels, (0, 0, 2.0), source=(instances[1], None))]
    write_seg(tmp_path / "l" / "b.dcm", frames, [segment(1, "lung")])
    index = archive(tmp_path / "ct")
    stored = match_labels(index, tmp_path / "l", QUERY).labelled[0].stored
    assert (stored == 2).sum() == 40 and (stored == 1).sum() == 3 and (stored == 0).sum() == stored.size - 43
    frames = [frame_of(pixels, (0, 0, 2.0), source=(instances[1], None))]
    write_seg(tmp_path / "l" / "b.dcm", frames, [segment(1, "tumour")])
    with pytest.raises(ConfigError, match=r"2 label files lie on the image 0004\.dcm \(a\.dcm, b\.dcm\)"):
        match_labels(index, tmp_path / "l", QUERY)


def test_a_series_split_at_a_gap_shares_one_set_out(tmp_path):
    values = RNG.integers(0, 1000, (8, 12, 10)).astype(np.int16)
    files = write_series(tmp_path / "ct", values)
    instances = [str(pydicom.dcmread(path).SOPInstanceUID) for path in files]
    files[3].unlink()
    regions = {"tumour": [square(1.5, 4.5, 2.0 * n, instance=instances[n]) for n in (1, 2, 5)]}
    write_rtstruct(tmp_path / "rs.dcm", regions, instances=instances)
    matching = match_labels(archive(tmp_path), tmp_path, QUERY)
    assert [int((entry.stored == 1).sum()) for entry in matching.labelled] == [9, 18]
    assert matching.counts()["contours_of_other_images"] == 3


def test_volumes_without_identity_take_a_set_by_place_only_when_it_fits_one(tmp_path):
    mr_volume(tmp_path / "a.nii.gz", None)
    affine = nibabel.load(tmp_path / "a.nii.gz").affine
    x, y, z = np.diag([-1, -1, 1]) @ (affine @ [4, 4, 4, 1])[:3]
    box = [(x - 1.5, y - 1.5, z), (x + 1.5, y - 1.5, z), (x + 1.5, y + 1.5, z), (x - 1.5, y + 1.5, z)]
    path = write_rtstruct(tmp_path / "rs" / "r.dcm", {"tumour": [contour(box)]})
    index = archive(tmp_path / "a.nii.gz", "mr")
    stored = match_labels(index, path, QUERY).labelled[0].stored
    assert (stored == 1).sum() == 9 and stored[4, 4, 4] == 1
    mr_volume(tmp_path / "b.nii.gz", None, seed=1)
    index = open_archive([tmp_path / "a.nii.gz", tmp_path / "b.nii.gz"], ["mr"])
    with pytest.raises(ConfigError, match=r"labels of r\.dcm lie on 2 images \(a\.nii\.gz, b\.nii\.gz\), and nothing"):
        match_labels(index, path, QUERY)


def test_masks_beside_their_images_are_labels_and_no_images(tmp_path):
    for seed in range(2):
        mr_volume(tmp_path / f"p{seed}.nii.gz", tmp_path / f"p{seed}_seg.nii.gz", seed=seed)
    index = archive(tmp_path, "mr")
    assert len(index) == 4  # nothing in a mask's header says that it is none
    matching = match_labels(index, tmp_path)
    names = [index.paths(entry.row.key)[0].name for entry in matching.labelled]
    assert names == ["p0.nii.gz", "p1.nii.gz"]
    assert matching.counts() == {
        "images_labelled": 2,
        "images_without_labels": 0,
        "label_files_without_image": 0,
        "other_files": 2,
    }
    for entry in matching.labelled:
        assert set(np.unique(entry.stored)) == {0, 1}


def test_a_folder_of_masks_inside_the_archive_is_labels_and_no_images(tmp_path):
    for seed in range(2):
        mr_volume(tmp_path / "images" / f"p{seed}_0000.nii.gz", tmp_path / "labels" / f"p{seed}.nii.gz", seed=seed)
    index = archive(tmp_path, "mr")
    assert len(index) == 4
    assert match_labels(index, tmp_path / "labels").counts()["images_labelled"] == 2


def test_a_label_map_goes_with_all_volumes_of_the_file_of_its_name(tmp_path):
    for seed in range(2):
        mr_volume(tmp_path / "i" / f"{seed}.nii.gz", tmp_path / "l" / f"{seed}.nii.gz", seed=seed)
        image = nibabel.load(tmp_path / "i" / f"{seed}.nii.gz")
        values = np.asarray(image.dataobj)
        several = np.stack([values, values + 7, values + 9], axis=-1)
        nibabel.save(nibabel.Nifti1Image(several, image.affine), tmp_path / "i" / f"{seed}.nii.gz")
    index = archive(tmp_path / "i", "mr")
    matching = match_labels(index, tmp_path / "l")
    assert matching.counts()["images_labelled"] == len(index) == 6
    for entry in matching.labelled:
        name = index.paths(entry.row.key)[0].name
        truth = np.asarray(nibabel.load(tmp_path / "l" / name).dataobj).T
        np.testing.assert_array_equal(entry.stored, truth)


def test_links_go_by_their_own_names_and_broken_ones_end_in_a_reason(tmp_path):
    mr_volume(tmp_path / "i" / "v.nii.gz", tmp_path / "store" / "x7.nii.gz")
    (tmp_path / "l").mkdir()
    (tmp_path / "l" / "v.nii.gz").symlink_to(tmp_path / "store" / "x7.nii.gz")
    index = archive(tmp_path / "i", "mr")
    assert match_labels(index, tmp_path / "l").labelled[0].place == "v.nii.gz (image v.nii.gz)"
    (tmp_path / "l" / "loop").symlink_to(tmp_path / "l" / "loop")
    with pytest.raises(ReadError, match="loop is part of a loop of links"):
        match_labels(index, tmp_path / "l")


def test_no_image_file_is_opened_to_match_labels(tmp_path):
    series(tmp_path / "ct")
    write_rtstruct(tmp_path / "rs.dcm", {"tumour": [square(1.5, 4.5, 2)]})
    index = archive(tmp_path)
    for path in (tmp_path / "ct").iterdir():
        path.write_bytes(b"gone")
    assert (match_labels(index, tmp_path / "rs.dcm", QUERY).labelled[0].stored == 1).sum() == 9


def test_a_damaged_label_object_is_an_error_and_a_damaged_image_beside_labels_is_none(tmp_path):
    series(tmp_path / "ct")
    path = write_rtstruct(tmp_path / "rs" / "a.dcm", {"tumour": [square(1.5, 4.5, 2)]})
    index = archive(tmp_path / "ct")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - 60])
    with pytest.raises(ReadError, match=r"a\.dcm has no contours, or was cut short"):
        match_labels(index, tmp_path / "rs", QUERY)
    path.write_bytes(whole)
    (tmp_path / "ct" / "broken.dcm").write_bytes(
        bytes(128) + b"DICM" + b"\x02\0\x10\0UI\x04\x00" + b"1.2\0" + b"\xff" * 40
    )
    assert match_labels(index, tmp_path, QUERY).counts()["images_labelled"] == 1


def recipe(classes, **labels):
    return build_recipe({"head": {"name": "segment", "classes": list(classes)}, "labels": labels})


def test_a_recipe_maps_names_and_numbers(tmp_path):
    given = recipe(("background", "tumour"), values={"GTV*": 1, "gtv_1": 1, "255": 1, 0: 0}, ignore=[7, -3])
    assert given.labels.values == {"GTV*": 1, "gtv_1": 1, 255: 1, 0: 0}
    (tmp_path / "again.yaml").write_text(dump_recipe(given))
    assert load_recipe(tmp_path / "again.yaml") == given
    query = label_query(given.labels, given.head.classes)
    assert query.values == {"GTV*": 1, "gtv_1": 1, "255": 1, "0": 0} and query.ignore == (7, -3)
    series(tmp_path / "ct")
    regions = {"GTV_1": [square(1.5, 4.5, 2)], "BODY": [square(0.5, 9.5, 2)]}
    path = write_rtstruct(tmp_path / "rs.dcm", regions)
    (entry,) = match_labels(archive(tmp_path / "ct"), path, query).labelled
    assert np.bincount(target_of(entry, given.labels, given.head.classes).ravel()).tolist() == [480 - 9, 9]


def test_values_that_fit_no_name_at_all_are_an_error_and_not_an_empty_label(tmp_path):
    series(tmp_path / "ct")
    path = write_rtstruct(tmp_path / "rs.dcm", {"GTV_1": [square(1.5, 4.5, 2)]})
    given = recipe(("background", "tumour"), values={1: 1})
    with pytest.raises(ConfigError, match=r"no class in rs\.dcm \(image 0004\.dcm\) .* is in labels\.values \(1\)"):
        match_labels(archive(tmp_path / "ct"), path, label_query(given.labels, given.head.classes))
    given = recipe(("background", "tumour"), values={"GTV_1": 3})
    with pytest.raises(ConfigError, match=r"labels\.values leads to class 3, but head\.classes names 0 to 1"):
        label_query(given.labels, given.head.classes)


def test_stored_values_without_a_class_name_both_files(tmp_path):
    mr_volume(tmp_path / "i" / "v.nii.gz", tmp_path / "l" / "v.nii.gz")
    (entry,) = match_labels(archive(tmp_path / "i", "mr"), tmp_path / "l").labelled
    given = recipe(("bright", "other"), values={"bright": 1})
    with pytest.raises(ConfigError, match=r"^v\.nii\.gz \(image v\.nii\.gz\): labels\.values lists names alone"):
        target_of(entry, given.labels, given.head.classes)


def test_ignored_values_are_unknown(tmp_path):
    mr_volume(tmp_path / "i" / "v.nii.gz", tmp_path / "l" / "v.nii.gz")
    mask = nibabel.load(tmp_path / "l" / "v.nii.gz")
    values = np.asarray(mask.dataobj).astype(np.int32)
    values[0], values[1] = 255, -99999
    nibabel.save(nibabel.Nifti1Image(values, mask.affine), tmp_path / "l" / "v.nii.gz")
    given = recipe(("background", "bright"), ignore=[255, -99999])
    query = label_query(given.labels, given.head.classes)
    (entry,) = match_labels(archive(tmp_path / "i", "mr"), tmp_path / "l", query).labelled
    target = target_of(entry, given.labels, given.head.classes)
    assert (target[:, :, :2] == IGNORE).all() and (target[:, :, 2:] == values.T[:, :, 2:]).all()
    with pytest.raises(ReadError, match=r"list the ones that mean 'not known' in labels\.ignore \(image v\.nii\.gz\)"):
        match_labels(archive(tmp_path / "i", "mr"), tmp_path / "l")


def test_resampling_is_done_on_request_alone(tmp_path):
    mr_volume(tmp_path / "v.nii.gz", None)
    mr_volume(tmp_path / "o.nii.gz", tmp_path / "l" / "v.nii.gz", shape=(12, 13, 11), spacing=2.0)
    index = archive(tmp_path / "v.nii.gz", "mr")
    with pytest.raises(ReadError, match=r"or set labels\.resample: nearest \(image v\.nii\.gz\)"):
        match_labels(index, tmp_path / "l")
    matching = match_labels(index, tmp_path / "l", LabelQuery(resample="nearest"))
    assert matching.counts()["label_maps_resampled"] == 1
    stored = matching.labelled[0].stored
    truth = np.asarray(nibabel.load(tmp_path / "l" / "v.nii.gz").dataobj).T
    # Twice the spacing from the same origin: voxel 2 n lies on voxel n, and 2 n + 1 on the border to the next.
    whole = stored[::2, ::2, ::2]
    np.testing.assert_array_equal(whole, truth[: whole.shape[0], : whole.shape[1], : whole.shape[2]])
    np.testing.assert_array_equal(stored[1:-1:2, ::2, ::2], whole[1:])


def test_pairs_of_a_large_folder_cost_one_look_a_file(tmp_path, monkeypatch):
    opened = []
    from geomed_mae.readers.dicom import labels as dicom_labels

    real = dicom_labels.open_dicom
    for number in range(4):
        instances = series(tmp_path / f"{number}", f"s{number}", FrameOfReferenceUID=uid("f", number))
        regions = {"tumour": [square(0.5, 4.5, 2)]}
        write_rtstruct(tmp_path / f"{number}" / "rs", regions, instances=instances, frame=uid("f", number))
    index = archive(tmp_path)
    monkeypatch.setattr(dicom_labels, "open_dicom", lambda path: opened.append(path) or real(path))
    dicom_labels._parsed.cache_clear()
    assert len(pair(index, tmp_path).ties) == 4
    assert len(opened) == 4
    assert match_labels(index, tmp_path, QUERY).counts()["images_labelled"] == 4
    assert len(opened) <= 12


@pytest.mark.data
@pytest.mark.parametrize("modality", ["ct", "mr", "pet"])
def test_real_structure_sets_equal_the_masks_that_come_with_them(shared_data, modality):
    folder = shared_data / "med" / "sarcoma"
    kind = {"ct": "CT", "mr": "MR_T1", "pet": "PET"}[modality]
    index = open_archive([folder / f"STS_{n}" / "dicom" / kind for n in ("008", "019", "024")], [modality])
    query = LabelQuery(classes=("background", "tumour"), values={f"GTV_Mass_{kind}": 1})
    outlined = match_labels(index, folder, query)
    assert outlined.counts()["images_labelled"] == 3
    for entry in outlined.labelled:
        patient = index.paths(entry.row.key)[0].parts[-5]
        masks = match_labels(index.subset([entry.row]), folder / patient / "nifti" / f"{kind}_mask.nii.gz")
        found, truth = entry.stored == 1, masks.labelled[0].stored > 0
        dice = 2 * (found & truth).sum() / (found.sum() + truth.sum())
        assert truth.any() and dice >= 0.95, (patient, kind, dice)


@pytest.mark.data
def test_real_abdomen_labels_land_on_the_voxels_where_their_affine_puts_them(shared_data):
    folder = shared_data / "med" / "ct_abdomen"
    index = open_archive([folder / "dicom"], ["ct"], max_bad=1.0)
    labels = nibabel.load(folder / "labels.nii.gz")
    classes = np.asarray(labels.dataobj)
    for entry in match_labels(index, folder / "labels.nii.gz").labelled:
        headers = [pydicom.dcmread(path, stop_before_pixels=True) for path in index.paths(entry.row.key)]
        normal = np.cross(*np.reshape([float(v) for v in headers[0].ImageOrientationPatient], (2, 3)))
        headers.sort(key=lambda header: float(normal @ np.array(header.ImagePositionPatient, float)))
        places = RNG.integers(0, entry.stored.shape, (4000, 3))
        for plane, row, column in places:
            header = headers[plane]
            across, down = np.reshape([float(v) for v in header.ImageOrientationPatient], (2, 3))
            place = np.array(header.ImagePositionPatient, float)
            place = place + column * float(header.PixelSpacing[1]) * across + row * float(header.PixelSpacing[0]) * down
            voxel = np.linalg.inv(labels.affine) @ [-place[0], -place[1], place[2], 1]
            i, j, k = np.rint(voxel[:3]).astype(int)
            assert np.abs(voxel[:3] - (i, j, k)).max() < 0.02
            assert entry.stored[plane, row, column] == classes[i, j, k]
        assert len(np.unique(entry.stored)) > 5
