"""The walk over raw elements, beside pydicom on the same bytes; and files that lack their preamble, meta or syntax."""

from __future__ import annotations

import logging
import struct
import threading
import warnings
from pathlib import Path

import numpy as np
import pydicom
import pytest
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from geomed_mae.errors import ReadError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import dicom
from geomed_mae.readers.dicom import elements as dicom_elements
from geomed_mae.readers.dicom.file import open_dicom, quiet
from geomed_mae.readers.dicom.values import WANTED
from geomed_mae.readers.reasons import Reason
from geomed_mae.readers.regular import first_bytes
from geomed_mae.readers.source import Refusal
from tests.make_dicom import AXIAL, dataset, patch, save

ROOT = Path(pydicom.__file__).parent / "data" / "test_files"
BUNDLED = sorted(path for path in ROOT.glob("*.dcm") if path.name != "ExplVR_BigEndNoMeta.dcm")
"""All but one: big endian without a file meta is not guessed at, and so is no DICOM."""

PLANE = np.arange(30, dtype=np.int16).reshape(5, 6)
IMPLICIT, EXPLICIT = "1.2.840.10008.1.2", "1.2.840.10008.1.2.1"
DEFLATED, BIG = "1.2.840.10008.1.2.1.99", "1.2.840.10008.1.2.2"


def slice_of(**tags: object) -> Dataset:
    place = {"ImagePositionPatient": [0, 0, 0], "ImageOrientationPatient": list(AXIAL), "PixelSpacing": [1, 1]}
    return dataset(PLANE, **(place | tags))


def check_read(path: Path, *flags: str) -> None:
    """The file is sniffed, read as the CT slice PLANE - 1024, and flagged."""
    assert dicom.sniff(path, first_bytes(path))
    header = dicom.header(path)
    assert not isinstance(header, Refusal), header
    (source,) = dicom.group([header], resolve_modalities("auto")).sources
    assert set(flags) == {flag for flag in source.flags if flag in ("NO_PREAMBLE", "SYNTAX_ASSUMED")}
    np.testing.assert_array_equal(dicom.read(source).array[0, 0], PLANE - 1024.0)


def reason(path: Path) -> Reason:
    found = dicom.header(path)
    assert isinstance(found, Refusal), found
    return found.reason


# ---- the walk


@pytest.mark.parametrize("path", BUNDLED, ids=lambda path: path.name)
def test_wanted_values_are_the_bytes_that_pydicom_finds(path):
    logging.getLogger("pydicom").disabled = True
    try:
        values = open_dicom(path).values
    except ReadError as error:
        assert error.reason in ("MALFORMED", "NOT_DICOM")
        return
    finally:
        logging.getLogger("pydicom").disabled = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = pydicom.dcmread(path, force=True, stop_before_pixels=True)
    compared = 0
    for element in one.elements():
        raw = element.value
        if int(element.tag) in WANTED and isinstance(raw, bytes):
            assert values._raw.get(int(element.tag)) == raw
            compared += 1
    assert compared or "Rows" not in one


def sequences(path: Path, *, syntax: str, undefined: bool, **tags: object) -> Path:
    """Write a slice with a private and a standard sequence in front of its Rows, of defined or undefined length."""
    inner, outer = Dataset(), Dataset()
    inner.LUTExplanation = "inner"
    inner.Rows = 77  # must never be taken for the image's own
    outer.ModalityLUTSequence = Sequence([inner, Dataset()])
    made = slice_of(ReferencedImageSequence=Sequence([outer, Dataset(), outer]), **tags)
    block = made.private_block(0x0009, "CREATOR", create=True)
    block.add_new(0x01, "SQ", Sequence([outer]))
    for sequence in (made.ReferencedImageSequence, made[0x00091001].value, outer.ModalityLUTSequence):
        for item in sequence:
            item.is_undefined_length_sequence_item = undefined
    for element in (made["ReferencedImageSequence"], made[0x00091001], outer["ModalityLUTSequence"]):
        element.is_undefined_length = undefined
    return save(made, path, syntax=syntax)


@pytest.mark.parametrize("undefined", [False, True])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_sequences_are_stepped_over_whether_their_length_is_known_or_not(tmp_path, syntax, undefined):
    check_read(sequences(tmp_path / "a", syntax=syntax, undefined=undefined))


def test_an_icon_s_pixels_are_not_the_image_s(tmp_path):
    icon = dataset(np.zeros((2, 2), np.uint8))
    check_read(save(slice_of(IconImageSequence=Sequence([icon])), tmp_path / "a"))


def test_an_icon_in_fragments_inside_an_item_of_known_length_is_stepped_over(tmp_path):
    fragments = b"\xfe\xff\x00\xe0\0\0\0\0" + b"\xfe\xff\x00\xe0\4\0\0\0abcd" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    pixels = b"\xe0\x7f\x10\x00OB\0\0\xff\xff\xff\xff" + fragments
    for length in (struct.pack("<L", len(pixels)), b"\xff\xff\xff\xff"):
        item = b"\xfe\xff\x00\xe0" + length + pixels + b"\xfe\xff\x0d\xe0\0\0\0\0" * (length == b"\xff\xff\xff\xff")
        icon = b"\x88\x00\x00\x02SQ\0\0" + struct.pack("<L", len(item)) + item
        path = save(slice_of(), tmp_path / length.hex())
        content = path.read_bytes()
        at = content.index(b"\xe0\x7f\x10\x00OW")
        path.write_bytes(content[:at] + icon + content[at:])
        check_read(path)


def test_an_unknown_sequence_of_undefined_length_holds_implicit_items(tmp_path):
    inner = b"\x28\x00\x10\x00\x02\0\0\0\x4d\x00"  # Rows, 77, without a VR
    unknown = (
        b"\x28\x00\x01\x00UN\0\0\xff\xff\xff\xff" + b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + inner
        + b"\xfe\xff\x0d\xe0\0\0\0\0" + b"\xfe\xff\xdd\xe0\0\0\0\0"
    )  # fmt: skip
    path = save(slice_of(), tmp_path / "a")
    content = path.read_bytes()
    at = content.index(b"\x28\x00\x02\x00US")
    path.write_bytes(content[:at] + unknown + content[at:])
    check_read(path)


def test_an_element_without_a_vr_in_an_explicit_file_is_read_as_pydicom_does(tmp_path):
    path = save(slice_of(), tmp_path / "a")
    content = path.read_bytes()
    at = content.index(b"\x28\x00\x02\x00US")
    path.write_bytes(content[:at] + b"\x28\x00\x00\x00\x04\0\0\0\1\0\0\0" + content[at:])
    check_read(path)


def test_values_longer_than_what_is_read_at_once_are_whole(tmp_path):
    made = slice_of(ImageComments="x" * 60_000)
    made.private_block(0x0009, "CREATOR", create=True).add_new(0x01, "OB", bytes(200_000))
    check_read(save(made, tmp_path / "a"))


def nested(depth: int, *, known: bool) -> bytes:
    content = b""
    for _ in range(depth):
        item = b"\xfe\xff\x00\xe0\xff\xff\xff\xff" + content + b"\xfe\xff\x0d\xe0\0\0\0\0"
        end = b"" if known else b"\xfe\xff\xdd\xe0\0\0\0\0"
        length = struct.pack("<L", len(item)) if known else b"\xff\xff\xff\xff"
        content = b"\x40\x00\x75\x02SQ\0\0" + length + item + end
    return content


def test_sequences_nested_beyond_reason_are_malformed(tmp_path):
    for depth, expected in ((10, None), (5000, Reason.MALFORMED)):
        path = save(slice_of(), tmp_path / str(depth))
        content = path.read_bytes()
        at = content.index(b"\xe0\x7f\x10\x00OW")
        path.write_bytes(content[:at] + nested(depth, known=False) + content[at:])
        if expected is None:
            check_read(path)
        else:
            assert reason(path) is expected


def test_elements_beyond_the_limit_are_malformed(tmp_path, monkeypatch):
    path = save(slice_of(), tmp_path / "a")
    content = path.read_bytes()
    at = content.index(b"\xe0\x7f\x10\x00OW")
    path.write_bytes(content[:at] + b"\x31\x00\x10\x00LO\0\0" * 5000 + content[at:])
    check_read(path)
    monkeypatch.setattr(dicom_elements, "MAX_ELEMENTS", 4000)
    assert reason(path) is Reason.MALFORMED


def test_a_value_beyond_the_limit_is_too_large(tmp_path, monkeypatch):
    path = save(slice_of(ImageType=["X" * 16] * 100), tmp_path / "a")
    monkeypatch.setattr(dicom_elements, "MAX_VALUE_BYTES", 1000)
    assert reason(path) is Reason.TOO_LARGE


# ---- without preamble, meta or syntax


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_bare_data_sets_are_read_in_either_vr_and_flagged(tmp_path, syntax):
    check_read(save(slice_of(), tmp_path / "a", syntax=syntax, preamble=False), "NO_PREAMBLE")


def test_a_file_meta_without_its_preamble_is_believed(tmp_path):
    path = save(slice_of(), tmp_path / "a", syntax=IMPLICIT)
    path.write_bytes(path.read_bytes()[132:])
    check_read(path, "NO_PREAMBLE")


@pytest.mark.parametrize("missing", ["SOPClassUID", "Rows", "Columns", "PixelData"])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_bare_data_sets_without_all_that_an_image_needs_are_no_dicom(tmp_path, syntax, missing):
    path = save(slice_of(**{missing: None}), tmp_path / "a", syntax=syntax, preamble=False)
    assert reason(path) is Reason.NOT_DICOM


@pytest.mark.parametrize("sop_class", ["1.2.840.10008.5.1.4.1.1.481.3", "1.2.840.10008.5.1.4.1.1.88.11"])
@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_bare_structure_sets_and_reports_are_no_images(tmp_path, syntax, sop_class):
    made = Dataset()
    made.SOPClassUID, made.SOPInstanceUID, made.Modality = sop_class, "1.2.3", "RTSTRUCT"
    path = save(made, tmp_path / "a", syntax=syntax, preamble=False)
    assert dicom.sniff(path, first_bytes(path))
    assert reason(path) is Reason.NON_IMAGE


def test_an_acr_nema_image_is_read_at_best_effort(tmp_path):
    made = slice_of(SOPClassUID=None, SOPInstanceUID=None, Modality="CR")
    made.add_new(0x00080010, "LO", "ACR-NEMA 2.0")
    path = save(made, tmp_path / "a", syntax=IMPLICIT, preamble=False)
    path.write_bytes(b"\x08\x00\x00\x00\x04\0\0\0\x40\x01\0\0" + path.read_bytes())
    assert dicom.sniff(path, first_bytes(path))
    (source,) = dicom.group([dicom.header(path)], resolve_modalities("auto")).sources
    np.testing.assert_array_equal(dicom.read(source).array[0], PLANE)


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
@pytest.mark.parametrize("blank", [b"\0" * 8, b" " * 8])
def test_a_blank_transfer_syntax_is_told_from_the_data_set(tmp_path, syntax, blank):
    path = save(slice_of(), tmp_path / "a", syntax=syntax)
    name = syntax.encode() + b"\0" * (len(syntax) % 2)
    patch(path, b"\x02\x00\x10\x00UI" + struct.pack("<H", len(name)) + name,
          b"\x02\x00\x10\x00UI" + struct.pack("<H", len(name)) + (blank * 4)[: len(name)])  # fmt: skip
    check_read(path, "SYNTAX_ASSUMED")


@pytest.mark.parametrize("syntax", [IMPLICIT, EXPLICIT])
def test_a_missing_transfer_syntax_is_told_from_the_data_set(tmp_path, syntax):
    path = save(slice_of(), tmp_path / "a", syntax=syntax)
    patch(path, b"\x02\x00\x10\x00UI", b"\x02\x00\x99\x00UI")
    check_read(path, "SYNTAX_ASSUMED")


@pytest.mark.parametrize(("written", "declared"), [(IMPLICIT + ".1", IMPLICIT + "\0\0"), (IMPLICIT, IMPLICIT)])
def test_a_data_set_in_another_vr_than_declared_is_read_as_it_is(tmp_path, written, declared):
    path = save(slice_of(), tmp_path / "a", syntax=written)
    content = path.read_bytes()
    at = content.index(b"\x02\x00\x10\x00UI") + 8
    name = content[at : at + len(declared)]
    path.write_bytes(content.replace(name, declared.encode(), 1))
    check_read(path)


def test_a_deflated_data_set_is_read(tmp_path):
    check_read(save(slice_of(), tmp_path / "a", syntax=DEFLATED))


def test_a_deflated_stream_that_is_damaged_is_malformed(tmp_path):
    path = save(slice_of(), tmp_path / "a", syntax=DEFLATED)
    content = path.read_bytes()
    path.write_bytes(content[:-200] + b"\xff" * 200)
    assert reason(path) in (Reason.MALFORMED, Reason.NO_PIXEL_DATA)


def test_big_endian_sequences_and_values_are_read(tmp_path):
    made = slice_of(ReferencedImageSequence=Sequence([Dataset()]))
    made.PixelData = PLANE.astype(">i2").tobytes()
    check_read(save(made, tmp_path / "a", syntax=BIG))


# ---- silence


def test_silence_holds_for_every_thread_and_ends_with_the_last():
    """Two threads leave in the order in which they came: the usual save and restore would undo each other."""
    entered, leave = threading.Event(), threading.Event()
    level = logging.getLogger("pydicom").level
    filters = list(warnings.filters)

    def other() -> None:
        with quiet():
            entered.set()
            leave.wait(5)
            warnings.warn("a patient's name", stacklevel=1)

    thread = threading.Thread(target=other)
    with quiet():
        thread.start()
        assert entered.wait(5)
    assert logging.getLogger("pydicom").level > logging.CRITICAL
    leave.set()
    thread.join(5)
    assert logging.getLogger("pydicom").level == level
    assert list(warnings.filters) == filters
    with pytest.warns(UserWarning, match="back"):
        warnings.warn("back", stacklevel=1)


def test_a_header_is_read_without_pydicom(tmp_path):
    """Heavy imports are for decoding: a worker that scans headers of plain files needs none of them."""
    import subprocess
    import sys

    path = save(slice_of(), tmp_path / "a")
    code = (
        "import sys; from pathlib import Path; from geomed_mae.readers.dicom.file import open_dicom; "
        f"print(open_dicom(Path({str(path)!r})).values.whole('Rows'), 'pydicom' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["5", "False"]
