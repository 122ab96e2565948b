"""Promise 7: no identifier reaches a public output. Every text that a file can hold, and every path, is a canary.

DICOM: every text attribute of the standard, private ones, dates, UIDs, items of sequences and functional groups, values
that make a library warn. GeoTIFF: the baseline text tags, GDAL's metadata, band descriptions. Pictures: text chunks,
comments, EXIF. NIfTI: the free text of the header. Scenes: their metadata. Structure sets and segmentations have a run
of their own in test_finetune_dicom. What predict, embed and export write is unpacked and searched, file by file.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pydicom
import pytest
from click.testing import CliRunner
from PIL import Image as PictureFile
from pydicom import config
from pydicom.datadict import DicomDictionary, keyword_for_tag
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.identity import keyed
from geomed_mae.archives.index import Index
from geomed_mae.archives.seen import Seen
from geomed_mae.cli import main
from geomed_mae.export import MARKER
from geomed_mae.heads.task_model import save_task_model
from geomed_mae.plugins import plugin_names
from tests import make_data, make_dicom, make_scenes
from tests.heads.given import task_model

PRIVATE = ("locations.parquet", "salt", "journal", "seen.json")
"""Files of an index, and of a run's folder private, that are documented as private (mode 0600)."""

TEXT = {"AE": 12, "CS": 16, "LO": 40, "LT": 40, "PN": 40, "SH": 14, "ST": 40, "UC": 40, "UR": 40, "UT": 40}
"""Text value representations (PS3.5 section 6.2) and how long our canary in them is."""

KEPT = {"SpecificCharacterSet"}
"""Without a true value here the file could not be read at all."""


def token(number: int, length: int) -> str:
    return f"Zq{number:05d}KANARIENVOGEL"[:length]


def planted(modality: str, plane: np.ndarray, place: float) -> tuple[Dataset, set[str]]:
    """Return a slice whose every text attribute of the standard, and some private ones, hold a canary."""
    made = make_dicom.dataset(plane, Modality=modality, PixelSpacing=[1.0, 1.0])
    made.ImagePositionPatient, made.ImageOrientationPatient = [0.0, 0.0, place], list(make_dicom.AXIAL)
    return made, plant(made)


def plant(made: Dataset) -> set[str]:
    """Put canaries into all attributes that a data set does not have yet; return them."""
    tokens = set()
    with config.disable_value_validation():
        for number, (tag, (vr, _, _, retired, _)) in enumerate(sorted(DicomDictionary.items())):
            keyword = keyword_for_tag(tag)
            free = vr in TEXT and not retired and tag >> 16 >= 8
            if keyword and free:
                if keyword in KEPT or tag in made or tag >> 16 >= 0x7FE0:
                    continue
                value = token(number, TEXT.get(vr, 12))
                made.add_new(tag, vr, f"{value}^{value[::-1]}" if vr == "PN" else value)
                tokens |= {value, value[::-1]} if vr == "PN" else {value}
        dates = {"PatientBirthDate": "19470213", "StudyDate": "20010911", "AcquisitionTime": "031415.926"}
        uids = {"StudyInstanceUID": "1.2.777.888.1", "SeriesInstanceUID": "1.2.777.888.2", "DeviceUID": "1.2.777.888.3"}
        for keyword, value in {**dates, **uids, "FrameOfReferenceUID": "1.2.777.888.4", "PatientAge": "077Y"}.items():
            setattr(made, keyword, value)
            tokens.add(value)
        item = Dataset()
        item.CodeMeaning = token(90001, 30)
        made.ProcedureCodeSequence = Sequence([item])
        block = made.private_block(0x0019, "KANARIENVOGEL CREATOR", create=True)
        block.add_new(0x10, "LO", token(90002, 30))
        block.add_new(0x11, "UN", token(90003, 30).encode())
        # Values that make pydicom warn or fail when they are looked at.
        made.SliceLocation, made.SeriesNumber = "90004.90004", "90005900"
    return {*tokens, token(90001, 30), token(90002, 30), token(90003, 30), *SPOILT.values()}


SPOILT = {"90004.90004": "Zq90004KANA", "90005900": "Zq90005K"}
"""Numbers that become text after writing, because no library writes such a file."""


def saved(made: Dataset, path: Path) -> Path:
    """Write a data set and spoil its numbers."""
    make_dicom.save(made, path)
    for number, text in SPOILT.items():
        make_dicom.patch(path, number.encode(), text.encode())
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    root = tmp_path_factory.mktemp("archive") / "ZqPATHKANARIENVOGEL_DOE_JANE"
    rng = np.random.default_rng(7)
    base = rng.integers(0, 900, (40, 40)).astype("int16")
    tokens = {"ZqPATHKANARIENVOGEL", "DOE_JANE", "ZqFILEKANARIENVOGEL"}
    for patient in range(2):
        for number in range(5):
            made, more = planted("MR", base + number + patient, 2.0 * number)
            made.PatientID = f"ZqID{patient}KANARIENVOGEL"
            made.StudyInstanceUID = f"1.2.777.888.1.{patient}"
            made.SeriesInstanceUID = f"1.2.777.888.2.{patient}"
            made.FrameOfReferenceUID = f"1.2.777.888.4.{patient}"
            tokens |= {*more, made.PatientID}
            saved(made, root / f"ZqFILEKANARIENVOGEL{patient}_{number}.dcm")
    bad, _ = planted("MR", base, 99.0)
    bad.RescaleSlope, bad.RescaleIntercept = "1", "0"
    path = saved(bad, root / "ZqFILEKANARIENVOGEL_bad.dcm")
    make_dicom.patch(path, b"DS\x02\x001 ", b"DS\x02\x00Zq")
    truncated, _ = planted("CT", base, 0.0)
    path = saved(truncated, root / "ZqFILEKANARIENVOGEL_cut")
    path.write_bytes(path.read_bytes()[:-100])
    frames = [{"position": (0.0, 0.0, 2.0 * number)} for number in range(3)]
    whole = make_dicom.enhanced(np.stack([base.astype("uint16")] * 3) + 3, frames, SeriesInstanceUID="1.2.777.888.5")
    tokens |= plant(whole)
    for number, item in enumerate(whole.PerFrameFunctionalGroupsSequence):
        item.FrameContentSequence[0].FrameComments = token(90010 + number, 30)
        item.FrameContentSequence[0].FrameLabel = token(90020 + number, 14)
        tokens |= {token(90010 + number, 30), token(90020 + number, 14)}
    saved(whole, root / "ZqFILEKANARIENVOGEL_enhanced")
    capture, _ = planted("US", base.astype("uint8"), 0.0)
    saved(capture, root / "ZqFILEKANARIENVOGEL_us")
    (root / "ZqFILEKANARIENVOGEL.txt").write_text("ZqTEXTKANARIENVOGEL")
    return root, tokens | {"ZqTEXTKANARIENVOGEL", "KANARIENVOGEL"}


COMMANDS = """
import json, sys
from geomed_mae.cli import main
for words in json.loads(sys.argv[1]):
    main(words, standalone_mode=False)
"""


def run(*commands: tuple[object, ...]) -> bytes:
    """Run commands, one after the other in one process of their own, and let them say all that they have to say.

    Return what they say, on either stream, and demand that they work.
    """
    words = json.dumps([["-vv", *map(str, command)] for command in commands])
    done = subprocess.run([sys.executable, "-c", COMMANDS, words], capture_output=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return done.stdout + done.stderr


NUMBERS = " (numbers)"
"""Marks the part of a file that is millions of random bytes: four of them spell an age by chance, eight do not."""


def public_bytes(folder: Path) -> dict[str, bytes]:
    """Return every public file below a folder, tables as text, and the names of all files."""
    found = {"names": "\n".join(str(path.relative_to(folder)) for path in folder.rglob("*")).encode()}
    for path in folder.rglob("*"):
        if path.is_file() and not path.name.startswith(PRIVATE):
            found[path.name] = path.read_bytes()
            if path.suffix == ".safetensors":
                header = 8 + int.from_bytes(found[path.name][:8], "little")
                found[f"{path.name}{NUMBERS}"] = found[path.name][header:]
                found[path.name] = found[path.name][:header]
            if path.suffix == ".parquet":
                found[path.name] += str(pq.read_table(path).to_pylist()).encode()
    return found


def leaks(content: bytes, tokens: set[str], *, known: bytes = b"") -> list[str]:
    """Return the canaries in `content`, in any of three encodings, in any case."""
    low = content.replace(known, b"").lower()

    def holds(text: str) -> bool:
        return any(text.lower().encode(code) in low for code in ("utf-8", "utf-16le", "utf-16be"))

    # Thousands of them begin alike: what does not hold the beginning holds none of them.
    begun = {start for start in {one[:4] for one in tokens} if holds(start)}
    return [one for one in sorted(tokens) if one[:4] in begun and holds(one)]


def leaking(said: dict[str, bytes], tokens: set[str]) -> dict[str, list[str]]:
    """Return the outputs that hold canaries, with them; among numbers only those too long to be there by chance."""
    long = {one for one in tokens if len(one) >= 8}
    found = {name: leaks(content, long if name.endswith(NUMBERS) else tokens) for name, content in said.items()}
    return {name: hits for name, hits in found.items() if hits}


def closed(index: Path) -> None:
    """Demand that the private files of an index are there, and for their owner alone."""
    private = [path for path in index.iterdir() if path.name.startswith(PRIVATE)]
    assert {path.name for path in private} >= {"locations.parquet", "salt", "journal.sqlite"}
    assert all(path.stat().st_mode & 0o077 == 0 for path in private)


def test_the_canary_is_found_where_it_is(archive):
    root, tokens = archive
    assert len(tokens) > 300
    content = b"".join(path.read_bytes() for path in root.rglob("*") if path.is_file())
    assert len(leaks(content, tokens)) > 300


def test_no_identifier_reaches_a_public_output(archive, tmp_path):
    root, tokens = archive
    index, trained = tmp_path / "index", tmp_path / "run"
    how = ("--modality", "mr", "--max-bad", "50%", "--split", "group")
    small = ("steps=2", "batch_size=2", "checkpoint_every=2")
    changes = (*(f"train.{one}" for one in small), "model.depth=1", "data.crop_3d=[4, 32, 32]")
    overrides = [word for one in changes for word in ("--set", one)]
    said = {
        "commands": run(
            ("scan", root, "--out", index, *how),
            ("inspect", root / "ZqFILEKANARIENVOGEL0_0.dcm", "--json"),
            ("inspect", root / "ZqFILEKANARIENVOGEL_enhanced", "--json"),
            ("pretrain", "pretrain_mr_tiny", "--archive", index, "--out", trained, *overrides),
            ("report", trained),
            ("embed", trained, "--archive", index, "--out", tmp_path / "vectors"),
            ("export", trained, "--to", "timm", "--modality", "mr", "--out", tmp_path / "timm"),
        )
    }
    assert b"DEBUG" in said["commands"], "they say all that they can"
    closed(index)
    for folder in ("index", "run", "vectors", "timm"):
        said |= {f"{folder}/{name}": content for name, content in public_bytes(tmp_path / folder).items()}
    assert leaking(said, tokens) == {}
    check_the_record_of_patients(tmp_path)


def check_the_record_of_patients(folder: Path) -> None:
    """Demand that hashes of patient numbers are in the run's private file alone, and that nothing public helps to try
    numbers against them: not what is hashed, not the salt.
    """
    private = folder / "run" / "private" / "seen.json"
    assert private.stat().st_mode & 0o777 == 0o600 and private.parent.stat().st_mode & 0o777 == 0o700
    assert leaks(private.read_bytes(), {"KANARIENVOGEL", "1.2.777.888"}) == []
    held = [part for part in json.loads(private.read_text())["parts"].values() if part["identities"]]
    hashes = {text for part in held for text in part["identities"]}
    salts = {part["salt"] for part in held}
    assert len(hashes) >= 4
    index = Index.load(folder / "index")
    patients = {pair for row in index for pair in index.identity(row.key) if pair[0] == "patient"}
    assert len(patients) >= 2
    for pair in patients:
        tried = {keyed(bytes.fromhex(salt), "identity", *pair) for salt in salts}
        assert tried & hashes, "who holds this file and guesses a number sees it confirmed: so it is private"
    secrets = {*hashes, *salts, *(look.partition(":")[2] for part in held for look in part["looks"])}
    outside = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path != private}
    outside = {path: data for path, data in outside.items() if not path.name.startswith(PRIVATE)}
    assert not {path: one for path, data in outside.items() for one in secrets if one.encode() in data}
    assert list(folder.rglob("seen.json")) == [private]


def test_a_refused_file_is_named_to_its_user_but_its_contents_are_not(archive):
    root, tokens = archive
    done = subprocess.run(
        [sys.executable, "-m", "geomed_mae", "inspect", str(root / "ZqFILEKANARIENVOGEL_bad.dcm")],
        capture_output=True,
        check=False,
    )
    assert done.returncode == 3
    # The terminal may say which file: its user has just typed the name.
    assert leaks(done.stdout + done.stderr, tokens - {"ZqFILEKANARIENVOGEL", "KANARIENVOGEL"}) == []


# ------------------------------------------------------------------------------------------------- the other formats


def scene(path: Path, number: int, **how: object) -> Path:
    values = np.random.default_rng(number).integers(1, 255, (6, 48, 48)).astype(np.uint8)
    path.parent.mkdir(parents=True, exist_ok=True)
    tags = ("ARTIST", "IMAGEDESCRIPTION", "SOFTWARE", "HOSTCOMPUTER", "DOCUMENTNAME", "COPYRIGHT")
    said = {f"TIFFTAG_{tag}": token(80000 + at, 30) for at, tag in enumerate(tags)}
    said |= {"TIFFTAG_DATETIME": "1947:02:13 03:14:15", "PATIENT": token(80007, 30)}
    spaces = {"": said, "KANARIENVOGEL": {"owner": token(80008, 30)}, "RPC": {"LINE_OFF": token(80009, 30)}}
    return make_data.write_geotiff(path, values, namespaces=spaces, **how)


def radiographs(root: Path) -> None:
    from PIL import Image, PngImagePlugin

    grey = np.random.default_rng(3).integers(0, 255, (40, 40)).astype(np.uint8)
    words = PngImagePlugin.PngInfo()
    words.add_text("Author", token(81000, 30))
    words.add_itxt("Comment", token(81001, 30), zip=True)
    words.add_text("Title", token(81002, 30), zip=True)
    Image.fromarray(grey).save(root / "ZqFILEKANARIENVOGEL.png", pnginfo=words)
    exif = Image.Exif()
    exif[0x013B], exif[0x010E], exif[0x0132] = token(81003, 30), token(81004, 30), "1947:02:13 03:14:15"
    # JPEG, twice as large: no copy of the other.
    Image.fromarray(255 - np.tile(grey, (2, 2))).save(
        root / "ZqFILEKANARIENVOGEL.jpg", exif=exif, comment=token(81005, 30), quality=90
    )


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Archives of the other formats, by modality; every text and name in them is a canary."""
    root = tmp_path_factory.mktemp("others") / "ZqPATHKANARIENVOGEL_DOE_JANE"
    for number in range(2):
        scene(root / "landsat7" / f"ZqFILEKANARIENVOGEL{number}.tif", number)
    scene(root / "landsat7" / "ZqFILEKANARIENVOGEL_odd.tif", 5, descriptions=[token(82000 + n, 30) for n in range(6)])
    cut = scene(root / "landsat7" / "ZqFILEKANARIENVOGEL_cut.tif", 6)
    cut.write_bytes(cut.read_bytes()[:-500])
    (root / "landsat7" / "notes").write_text("Zq8KANAR is what this text begins with")
    (root / "landsat7" / "page.tif").write_text("Zq8K of a page")
    (root / "xray").mkdir()
    radiographs(root / "xray")
    (root / "mr").mkdir()
    for number in range(2):
        volume = np.random.default_rng(number).integers(0, 900, (20, 24, 16)).astype(np.int16)
        make_data.write_nifti(
            root / "mr" / f"ZqFILEKANARIENVOGEL{number}.nii",
            volume,
            descrip=token(83000, 60),
            aux_file=token(83001, 20),
            db_name=token(83002, 15),
            intent_name=token(83003, 12),
        )
    words = make_scenes.metadata("L2A", "04.00", -1000).replace("</", f"<!--{token(84000, 30)}--></", 1)
    product, _ = make_scenes.safe_l2a(root / "sentinel2-l2a", rows=60, suffix="tif", xml=words)
    (product / "GRANULE" / "ZqFILEKANARIENVOGEL.xml").write_text(f"<a>{token(84001, 30)}</a>")
    spoilt = make_scenes.metadata("L2A", token(84002, 30), -1000)
    make_scenes.safe_l2a(root / "sentinel2-l2a" / "ZqFOLDERKANARIENVOGEL", rows=60, suffix="tif", xml=spoilt)
    tokens = {"ZqPATHKANARIENVOGEL", "DOE_JANE", "ZqFILEKANARIENVOGEL", "KANARIENVOGEL", "Zq8K", "1947:02:13"}
    used = {first: range(first, first + 10) for first in range(80000, 85000, 1000)}
    return root, tokens | {token(number, 30)[:12] for numbers in used.values() for number in numbers}


@pytest.mark.parametrize("modality", ["landsat7", "xray", "mr", "sentinel2-l2a"])
@pytest.mark.parametrize("named", [True, False], ids=["named", "auto"])
def test_no_text_of_the_other_formats_reaches_a_public_output(others, tmp_path, modality, named):
    root, tokens = others
    if not named and modality == "xray":
        pytest.skip("a grey picture is of no modality in particular")
    folder = root / modality
    assert len(leaks(b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file()), tokens)) > 2
    words = ("--modality", modality) if named else ()
    index = tmp_path / "index"
    scan = ("scan", folder, "--out", index, "--max-bad", "100%", *words)
    said = {"commands": run(scan, ("inspect", index, "--json"))}
    closed(index)
    said |= {f"index/{name}": content for name, content in public_bytes(index).items()}
    assert leaking(said, tokens) == {}


def test_no_text_of_a_geotiff_reaches_a_run(others, tmp_path):
    root, tokens = others
    index = tmp_path / "index"
    small = ("steps=2", "batch_size=2", "checkpoint_every=2")
    changes = (*(f"train.{one}" for one in small), "model.depth=1", "data.crop_2d=[32, 32]")
    overrides = [word for one in changes for word in ("--set", one)]
    scan = ("scan", root / "landsat7", "--out", index, "--max-bad", "100%", "--modality", "landsat7")
    train = ("pretrain", "pretrain_landsat7_tiny", "--archive", index, "--out", tmp_path / "run", *overrides)
    said = {"commands": run(scan, train)}
    said |= public_bytes(tmp_path / "run")
    assert leaking(said, tokens) == {}


# ---------------------------------------------------------------------------------- predict, embed, export: every file

PATHS = {"ZqPATHKANARIENVOGEL", "DOE_JANE", "ZqFILEKANARIENVOGEL", "KANARIENVOGEL"}
"""Parts of the inputs' paths, which the terminal of their user may show; files may not."""
IMAGES = {"landsat7": (32, 32), "mr": (4, 16, 16)}
SEG_MAY_HOLD = {
    *("StudyDate", "StudyTime", "AccessionNumber", "ReferringPhysicianName", "StudyInstanceUID", "StudyID"),
    *("PatientName", "PatientID", "IssuerOfPatientID", "PatientBirthDate", "PatientSex"),
    *("FrameOfReferenceUID", "PositionReferenceIndicator", "ReferencedSOPInstanceUID"),
}
"""What a DICOM Segmentation takes from its source because the standard demands it (types 1 and 2, references)."""


def opened(path: Path) -> dict[str, bytes]:
    """Return what a file holds once it is unpacked, by name; parts that are numbers say so in their name."""
    data = path.read_bytes()
    if path.name.endswith(".nii.gz"):
        data = gzip.decompress(data)
        return {path.name: data[:352], f"{path.name}{NUMBERS}": data[352:]}
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as packed:
            names = "\n".join(packed.namelist()).encode()
            parts = {f"{path.name}/{name}{NUMBERS}": packed.read(name) for name in packed.namelist()}
            return {path.name: names, **parts}
    if path.suffix == ".png":
        with PictureFile.open(path) as picture:
            return {path.name: str(picture.info).encode()}
    if path.suffix == ".dcm":
        return {path.name: without_subject(path)}
    binary = path.suffix in (".tif", ".onnx", ".safetensors", ".parquet")
    return {f"{path.name}{NUMBERS}" if binary else path.name: data}


def without_subject(path: Path) -> bytes:
    """Return the text of a DICOM object without what the standard demands of patient, study and source."""
    made = pydicom.dcmread(path)
    assert made.PatientID, "it is filed with its patient"
    for item in [made, *(inner.value for inner in made.iterall() if inner.VR == "SQ")]:
        for one in item if isinstance(item, Sequence) else [item]:
            for element in list(one):
                # References name series too, by the UID of the series.
                if element.keyword in SEG_MAY_HOLD or (one is not made and element.keyword == "SeriesInstanceUID"):
                    del one[element.tag]
    del made.PixelData
    return str(made).encode()


def written(folder: Path) -> dict[str, bytes]:
    """Return the unpacked contents of every file below a folder, and the files' names."""
    said = public_bytes(folder)
    said = {name: content for name, content in said.items() if name == "names" or name.endswith((".json", ".parquet"))}
    for path in folder.rglob("*"):
        if path.is_file():
            said |= {f"{path.relative_to(folder)}: {name}": content for name, content in opened(path).items()}
    return said


def homes(tmp_path: Path) -> list[bytes]:
    """Folders of this machine that a library may write into what it makes."""
    return [os.fsencode(path) for path in (Path(__file__).resolve().parents[1], sys.prefix, tmp_path)]


def demand_silence(said: dict[str, bytes], tokens: set[str], tmp_path: Path) -> None:
    """Demand that no canary and no folder of this machine is in what was written."""
    assert leaking(said, tokens) == {}
    found = {name: [home for home in homes(tmp_path) if home in content] for name, content in said.items()}
    assert {name: hits for name, hits in found.items() if hits} == {}


def told(*words: object) -> bytes:
    """Run the command line here, on an archive that holds broken files: 3 says that some were not used."""
    done = CliRunner().invoke(main, [str(word) for word in words])
    assert done.exit_code in (0, 3), done.output[-2000:]
    return done.output.encode()


@pytest.fixture(scope="module")
def canaries(archive, others, tmp_path_factory):
    """Archives with canaries and models for them, by modality: (images, canaries, run with random weights)."""
    made = {}
    for modality, (root, tokens) in {"mr": archive, "landsat7": (others[0] / "landsat7", others[1])}.items():
        index = open_archive([root], [modality], max_bad=1.0)
        model = task_model(index, "linear", "segment", crop=IMAGES[modality])
        run_folder = tmp_path_factory.mktemp(modality) / "run"
        save_task_model(run_folder, model, Seen.of(index, index.rows, what="training"))
        made[modality] = root, tokens, run_folder
    return made


@pytest.mark.parametrize(("modality", "ends"), [("mr", (".nii.gz", ".ctbl")), ("landsat7", (".tif", ".qml", ".xml"))])
def test_no_identifier_reaches_a_map_or_its_probabilities(canaries, tmp_path, modality, ends):
    root, tokens, model = canaries[modality]
    spoken = told("-vv", "predict", model, "--archive", root, "--out", tmp_path / "maps", "--probabilities")
    said = written(tmp_path / "maps")
    assert all(any(end in name for name in said) for end in (*ends, ".probabilities", "predictions.jsonl"))
    demand_silence(said, tokens, tmp_path)
    # Its user has typed the names; what is in the files is another matter.
    assert leaks(spoken, tokens - PATHS - {token for token in tokens if token in str(root)}) == []


def test_a_dicom_segmentation_holds_patient_and_study_and_nothing_else(canaries, tmp_path):
    root, tokens, model = canaries["mr"]
    told("predict", model, "--archive", root, "--out", tmp_path / "maps", "--format", "dicom-seg")
    said = written(tmp_path / "maps")
    assert sum(name.endswith(".dcm") for name in said) >= 2
    demand_silence(said, tokens, tmp_path)


@pytest.mark.parametrize("modality", IMAGES)
def test_no_identifier_reaches_embeddings_token_grids_or_previews(canaries, tmp_path, modality):
    root, tokens, model = canaries[modality]
    how = ("--tile", "16") if modality == "landsat7" else ()
    told("-vv", "embed", model, "--archive", root, "--out", tmp_path / "vectors", "--dense", "--preview", *how)
    said = written(tmp_path / "vectors")
    assert all(any(end in name for name in said) for end in (".parquet", ".png"))
    demand_silence(said, tokens, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("modality", IMAGES)
@pytest.mark.parametrize("target", plugin_names("exporters", marker=MARKER))
def test_no_identifier_reaches_an_export_that_was_proven_on_an_image_of_the_archive(
    canaries, tmp_path, target, modality
):
    root, tokens, model = canaries[modality]
    image = root / ("ZqFILEKANARIENVOGEL0_0.dcm" if modality == "mr" else "ZqFILEKANARIENVOGEL0.tif")
    if modality == "mr":
        (tmp_path / "DOE_JANE").mkdir()
        for path in root.glob("ZqFILEKANARIENVOGEL0_*.dcm"):
            (tmp_path / "DOE_JANE" / path.name).write_bytes(path.read_bytes())
        image = tmp_path / "DOE_JANE"
    words = ("export", model, "--to", target, "--out", tmp_path / "out", "--image", image)
    done = subprocess.run(
        [sys.executable, "-m", "geomed_mae", *map(str, words)], capture_output=True, timeout=500, check=False
    )
    assert done.returncode in (0, 2), done.stderr.decode()[-2000:]
    if done.returncode == 2:
        pytest.skip(f"{target} is not made for such models: {done.stderr.decode()[-200:]}")
    demand_silence(written(tmp_path / "out"), tokens, tmp_path)
