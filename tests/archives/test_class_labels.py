"""Classification labels: tables and folders lead to the right images, and what is unclear is said, not guessed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Pillow

from geomed_mae.archives.build import scan_archive
from geomed_mae.archives.class_labels import ClassQuery, match_classes
from geomed_mae.archives.class_table import read_table
from geomed_mae.archives.index import Index
from geomed_mae.errors import ConfigError, ReadError
from geomed_mae.readers.source import Source
from tests.make_dicom import write_slice

RNG = np.random.default_rng(8)
NAMES = ("cat", "dog")


def archive(folder: Path, *names: str) -> Index:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Pillow.fromarray(RNG.integers(0, 256, (8, 8), dtype=np.uint8)).save(path)
    return scan_archive([folder], "xray")


def table(path: Path, text: str, encoding: str = "utf-8") -> Path:
    path.write_bytes(text.encode(encoding))
    return path


def by_name(index: Index, matching) -> dict[str, object]:
    """Relative name of an image -> its target."""
    return {
        index.paths(row.key)[0].name: target.tolist()
        for row, target in zip(matching.labelled, matching.targets, strict=True)
    }


# --------------------------------------------------------------------------------------------------- single label


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "latin-1", "utf-16"])
def test_a_table_is_read_as_it_is_commonly_written(tmp_path, delimiter, encoding):
    index = archive(tmp_path / "a", "1.png", "2.png", "3.png")
    rows = [
        ("file", "größe, cm", "class"),
        ("1.png", '"a, ""b"";"', "CAT "),
        ("3.png", "x", "dog"),
        ("9.png", "x", "cat"),
    ]
    text = "\r\n".join(delimiter.join(row) for row in rows) + "\r\n\r\n"
    if delimiter == ",":
        text = text.replace("größe, cm", '"größe, cm"')
    matching = match_classes(index, table(tmp_path / "l.csv", text, encoding), ClassQuery(NAMES))
    assert by_name(index, matching) == {"1.png": 0, "3.png": 1}
    assert matching.targets.dtype == np.int16 and not matching.multi_label and matching.classes == NAMES
    np.testing.assert_array_equal(matching.matrix(), [[1, 0], [0, 1]])
    assert matching.counts() == {
        "images_labelled": 2,
        "images_without_labels": 1,
        "label_rows_without_image": 1,
        "label_rows_without_class": 0,
    }


def test_an_image_is_named_by_path_stem_or_index_key(tmp_path):
    index = archive(tmp_path / "a", "x/1.png", "y/1.png", "y/2.png")
    keys = {"/".join(index.paths(row.key)[0].parts[-2:]): row.key for row in index}
    for cells in (
        ("x/1.png", "y/1.png", "2.png"),
        ("x\\1.png", "y\\1.png", "y\\2.png"),
        ("/elsewhere/a/x/1.png", "/elsewhere/a/y/1.png", "/elsewhere/a/y/2.png"),
        tuple(keys[name] for name in ("x/1.png", "y/1.png", "y/2.png")),
    ):
        text = "image,class\n" + "".join(f"{cell},{n}\n" for cell, n in zip(cells, (0, 1, 1), strict=True))
        matching = match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES))
        found = {row.key: target for row, target in zip(matching.labelled, matching.targets.tolist(), strict=True)}
        assert found == {keys["x/1.png"]: 0, keys["y/1.png"]: 1, keys["y/2.png"]: 1}
    stems = match_classes(index, table(tmp_path / "l.csv", "image,class\n2,dog\n"), ClassQuery(NAMES))
    assert [row.key for row in stems.labelled] == [keys["y/2.png"]]


def test_a_name_of_several_images_is_refused(tmp_path):
    index = archive(tmp_path / "a", "x/1.png", "y/1.png")
    for cell in ("1.png", "1", "z/1.png"):
        with pytest.raises(
            ConfigError, match=r"line 2 of l\.csv names 2 images by the file name in 'image'; give paths"
        ):
            match_classes(index, table(tmp_path / "l.csv", f"image,class\n{cell},cat\n"), ClassQuery(NAMES))


def test_identifiers_in_headers_name_images_and_stay_out_of_messages(tmp_path):
    uids = {"p1": "1.2.826.1", "p2": "1.2.826.2"}
    for patient, uid in uids.items():
        for number in range(3):
            values = RNG.integers(0, 900, (8, 8)).astype(np.int16)
            write_slice(
                tmp_path / "a" / patient / f"{number}.dcm",
                values,
                position=(0.0, 0.0, 2.0 * number),
                PatientID=patient,
                StudyInstanceUID=f"{uid}.1",
                SeriesInstanceUID=f"{uid}.2",
                FrameOfReferenceUID=f"{uid}.3",
            )
    index = scan_archive([tmp_path / "a"], "ct")
    assert len(index) == 2
    for column, end in (("PatientID", None), ("StudyInstanceUID", ".1"), ("SeriesInstanceUID", ".2")):
        cells = [patient if end is None else uid + end for patient, uid in uids.items()]
        text = f"id;{column};class\n7;{cells[0]};dog\n8;{cells[1]};cat\n"
        matching = match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES, key_column=column))
        found = {index.paths(row.key)[0].parent.name: int(t) for row, t in zip(index, matching.targets, strict=True)}
        assert found == {"p1": 1, "p2": 0}
        assert match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES)).counts() == matching.counts()
    with pytest.raises(ConfigError) as caught:
        text = "PatientID,class\np1,dog\np1,cat\n"
        match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES))
    assert "lines 2 and 3 of l.csv say different things about one image" in str(caught.value)
    assert "p1" not in str(caught.value)
    with pytest.raises(ConfigError, match="a table of labels begins with column names") as caught:
        match_classes(index, table(tmp_path / "l.csv", "p1,dog\np2,cat\n"), ClassQuery(NAMES))
    assert "p1" not in str(caught.value)


def test_one_patients_label_holds_for_all_of_the_patients_images(tmp_path):
    index = archive(tmp_path / "a", "1.png", "2.png", "3.png")
    sources = {
        key: Source.from_json({**source.to_json(), "identity": [["patient", f"P{n // 2}|hospital"]]})
        for n, (key, source) in enumerate(sorted(index._sources.items(), key=lambda entry: entry[1].files))
    }
    index = Index(index.rows, index.ledger, sources, index._digests, index._salt)
    matching = match_classes(index, table(tmp_path / "l.csv", "patient,class\nP0,cat\nP1,dog\n"), ClassQuery(NAMES))
    assert by_name(index, matching) == {"1.png": 0, "2.png": 0, "3.png": 1}


def test_the_most_telling_column_names_the_image(tmp_path):
    index = archive(tmp_path / "a", *(f"{n}.png" for n in range(6)))
    text = "row,file,age,class\n" + "".join(f"{n + 1},{n}.png,{n % 3},{n % 2}\n" for n in range(6))
    matching = match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES, class_columns=("class",)))
    assert by_name(index, matching) == {f"{n}.png": n % 2 for n in range(6)}
    text = "one,other,class\n0.png,1.png,cat\n"
    with pytest.raises(
        ConfigError, match=r"columns 'one', 'other' of l\.csv name different images; set labels\.key_column"
    ):
        match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES))
    matching = match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES, None, "OTHER", ("class",)))
    assert by_name(index, matching) == {"1.png": 0}


def test_rows_that_agree_are_one_and_rows_that_disagree_an_error(tmp_path):
    index = archive(tmp_path / "a", "1.png", "2.png")
    text = "file,class\n1.png,cat\n2.png,\n1.png,Cat\n1.png,nan\n"
    matching = match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES))
    assert by_name(index, matching) == {"1.png": 0} and matching.rows_unlabelled == 2
    text = 'file,class,note\n1.png,cat,"two\nlines"\n2.png,dog,\n1.png,dog,\n'
    with pytest.raises(ConfigError, match=r"lines 3 and 5 of l\.csv say different things about one image"):
        match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES, class_columns=("class",)))


def test_an_unknown_class_names_file_and_line(tmp_path):
    index = archive(tmp_path / "a", "1.png", "2.png")
    with pytest.raises(ReadError, match=r"line 3 of l\.csv has the class 'dgo', .* did you mean 'dog'") as caught:
        match_classes(index, table(tmp_path / "l.csv", "file,class\n1.png,cat\n2.png,dgo\n"), ClassQuery(NAMES))
    assert caught.value.reason == "CLASS_UNKNOWN"
    with pytest.raises(ReadError, match=r"line 2 of l\.csv has the class '2'"):
        match_classes(index, table(tmp_path / "l.csv", "file,class\n1.png,2\n"), ClassQuery(NAMES))


def test_numbers_are_names_first_and_class_numbers_second(tmp_path):
    index = archive(tmp_path / "a", "1.png", "2.png")
    path = table(tmp_path / "l.csv", "file,class\n1.png,1.0\n2.png,0\n")
    assert by_name(index, match_classes(index, path, ClassQuery(NAMES))) == {"1.png": 1, "2.png": 0}
    assert by_name(index, match_classes(index, path, ClassQuery(("1", "0")))) == {"1.png": 0, "2.png": 1}
    assert by_name(index, match_classes(index, path, ClassQuery(NAMES, {1: 0}))) == {"1.png": 0}
    assert by_name(index, match_classes(index, path, ClassQuery(NAMES, ignore=(1,)))) == {"2.png": 0}
    assert match_classes(index, path).classes == ("0", "1")


def test_classes_that_are_not_given_are_those_that_are_met(tmp_path):
    index = archive(tmp_path / "a", "1.png", "2.png", "3.png")
    matching = match_classes(index, table(tmp_path / "l.csv", "file,class\n1.png,zebra\n2.png,Ape\n3.png,none\n"))
    assert matching.classes == ("Ape", "none", "zebra")
    assert by_name(index, matching) == {"1.png": 2, "2.png": 0, "3.png": 1}


def test_the_class_column_is_inferred_only_where_it_is_plain(tmp_path):
    index = archive(tmp_path / "a", "1.png", "2.png")
    text = "file,sex,diagnosis,empty\n1.png,f,cat,\n2.png,m,dog,nan\n"
    path = table(tmp_path / "l.csv", text)
    assert by_name(index, match_classes(index, path, ClassQuery(NAMES))) == {"1.png": 0, "2.png": 1}
    with pytest.raises(
        ConfigError, match=r"could hold the class; set labels\.class_columns .* 'file', 'sex', 'diagnosis'"
    ):
        match_classes(index, path)
    with pytest.raises(
        ConfigError, match=r"labels\.class_columns names the column 'kind', but those of l\.csv are 'file'"
    ):
        match_classes(index, path, ClassQuery(NAMES, class_columns=("kind",)))
    with pytest.raises(ConfigError, match=r"labels\.key_column names the column 'image'"):
        match_classes(index, path, ClassQuery(NAMES, key_column="image"))
    with pytest.raises(ConfigError, match=r"the column 'sex' of l\.csv names no image of the archive"):
        match_classes(index, path, ClassQuery(NAMES, key_column="sex"))


# ---------------------------------------------------------------------------------------------------- multi label


def test_columns_of_zero_and_one_are_several_labels(tmp_path):
    index = archive(tmp_path / "a", "1.png", "2.png", "3.png")
    text = "file,age,Dog,cat\n1.png,33,1,0\n2.png,44,-1,1.0\n3.png,55,,\n"
    matching = match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(NAMES))
    assert matching.multi_label and matching.targets.dtype == np.int8
    assert by_name(index, matching) == {"1.png": [0, 1], "2.png": [1, -1]}
    assert matching.matrix() is matching.targets and matching.rows_unlabelled == 1
    free = match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(class_columns=("Dog", "cat")))
    assert free.classes == ("Dog", "cat") and by_name(index, free) == {"1.png": [1, 0], "2.png": [-1, 1]}
    with pytest.raises(ConfigError, match=r"line 2 of l\.csv has neither 0 nor 1 in the column 'age'"):
        match_classes(index, table(tmp_path / "l.csv", text), ClassQuery(class_columns=("age", "cat")))


def test_lists_in_one_cell_are_several_labels(tmp_path):
    """As ChestX-ray14 writes them, with a name for "none of these" that leads to no class."""
    index = archive(tmp_path / "a", "1.png", "2.png", "3.png", "4.png")
    text = "Image Index,Finding Labels\n1.png,cat|dog\n2.png,No Finding\n3.png,dog\n4.png,\n"
    path = table(tmp_path / "l.csv", text)
    matching = match_classes(index, path, ClassQuery(NAMES, {"cat": 0, "dog": 1}))
    assert by_name(index, matching) == {"1.png": [1, 1], "2.png": [0, 0], "3.png": [0, 1]}
    with pytest.raises(ReadError, match=r"line 3 of l\.csv has the class 'No Finding'"):
        match_classes(index, path, ClassQuery(NAMES))


# ---------------------------------------------------------------------------------------------- folders of classes


def test_the_first_folder_below_is_the_class(tmp_path):
    index = archive(tmp_path / "a", "Cat/1.png", "dog/patient7/2.png", "3.png")
    matching = match_classes(index, tmp_path / "a", ClassQuery(NAMES))
    assert by_name(index, matching) == {"1.png": 0, "2.png": 1} and matching.images_without == 1
    assert match_classes(index, tmp_path / "a").classes == ("Cat", "dog")
    with pytest.raises(ReadError, match=r"the folder 'a' has the class 'Cat', which is none of horse, dog"):
        match_classes(index, tmp_path / "a", ClassQuery(("horse", "dog")))
    only = match_classes(index, tmp_path / "a", ClassQuery(NAMES, {"DOG": 1}))
    assert by_name(index, only) == {"2.png": 1}
    (tmp_path / "b").mkdir()
    with pytest.raises(ConfigError, match=r"none of the 3 images lies in a folder below .* or a CSV table"):
        match_classes(index, tmp_path / "b", ClassQuery(NAMES))


# ---------------------------------------------------------------------------------------------------------- faults


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file\n1.png\n", "its first line has one column"),
        ("file,class\n", "has a header row and no other"),
        ("file,class,class\n1.png,cat,dog\n", "has the column 'class' twice"),
        ("file,class\n1.png,cat,dog\n", "line 2 of l.csv has 3 cells, its header 2"),
        ('file,class\n1.png,"cat\n', "is no table of labels: unexpected end of data"),
        ("file,class\n7.png,cat\n", "no column of l.csv names images of the archive"),
        ("1.png,cat\n2.png,dog\n", "the first line of l.csv names an image"),
        ("file,class\n1.png,\n2.png,nan\n", "l.csv has no column beside 'file' that holds anything"),
        ("file,class\n1.png,-1\n", "no image of the 2 in the archive gets a class from l.csv"),
        ("", "its first line has one column"),
    ],
)
def test_a_table_that_cannot_be_used_says_why(tmp_path, text, message):
    index = archive(tmp_path / "a", "1.png", "2.png")
    with pytest.raises(ConfigError) as caught:
        match_classes(index, table(tmp_path / "l.csv", text or "\n"), ClassQuery(NAMES))
    assert message in str(caught.value)


def test_a_file_that_is_no_text_is_refused(tmp_path):
    (tmp_path / "l.csv").write_bytes(b"PK\3\4\0\0\0")
    with pytest.raises(ConfigError, match=r"l\.csv is no table of labels: it is not a text file"):
        read_table(tmp_path / "l.csv")


def test_the_row_number_column_of_a_data_frame_is_kept_under_its_place(tmp_path):
    assert read_table(table(tmp_path / "l.csv", ",file\n0,a.png\n")).columns == ("column 1", "file")


# ------------------------------------------------------------------------------------------------------- real data


@pytest.mark.data
def test_pneumonia_as_folders_and_as_a_table_gives_the_labels_it_came_with(shared_data, tmp_path):
    with np.load(shared_data / "med" / "pneumoniamnist" / "train.npz") as data:
        images, labels = (data[name] for name in sorted(data.files, key=lambda name: data[name].ndim, reverse=True)[:2])
    labels = labels.reshape(-1)[:120].astype(int)
    names = ("normal", "pneumonia")
    lines = ["image_id,view,finding"]
    for number, (pixels, label) in enumerate(zip(images[:120], labels, strict=True)):
        for path in (tmp_path / "folders" / names[label] / f"{number}.png", tmp_path / "flat" / f"{number}.png"):
            path.parent.mkdir(parents=True, exist_ok=True)
            Pillow.fromarray(pixels).save(path)
        lines.append(f"{number},PA,{names[label]}")
    csv = table(tmp_path / "labels.csv", "\n".join(lines))
    for folder, source in ((tmp_path / "folders", tmp_path / "folders"), (tmp_path / "flat", csv)):
        index = scan_archive([folder], "xray")
        matching = match_classes(index, source, ClassQuery(names))
        assert matching.counts()["images_labelled"] == len(index) == 120
        for row, target in zip(matching.labelled, matching.targets, strict=True):
            number = int(index.paths(row.key)[0].stem)
            assert target == labels[number]
            np.testing.assert_array_equal(index.read(row.key).array[0], images[number])
