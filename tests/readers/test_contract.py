"""What every reader promises: listing, surveying, reading and the errors that say why nothing came out."""

from __future__ import annotations

import ast
import ctypes
import inspect
import pickle
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from geomed_mae import readers
from geomed_mae.errors import ConfigError, GeomedError, MissingExtraError, ReadError, TooManyBadInputsError
from geomed_mae.modalities import resolve_modalities
from geomed_mae.plugins import plugin_names
from geomed_mae.readers import label_reading, read, read_images, read_labels, read_labels_guarded, survey
from geomed_mae.readers.reasons import NOT_BAD, UNSUPPORTED, Reason, status
from geomed_mae.readers.regular import list_files
from geomed_mae.readers.source import Source, Survey
from tests.make_data import write_geotiff, write_nifti

RNG = np.random.default_rng(0)
AUTO = resolve_modalities("auto")


@pytest.fixture
def archive(tmp_path):
    write_geotiff(tmp_path / "raster.tif", RNG.integers(1, 255, (4, 20, 30)).astype(np.uint8))
    write_nifti(tmp_path / "volume.nii.gz", RNG.normal(size=(5, 6, 7)).astype(np.float32))
    (tmp_path / "notes.txt").write_text("remember the milk")
    (tmp_path / "page.tif").write_text("<html>not found</html>")
    (tmp_path / "broken.nii").write_text("no header at all")
    return tmp_path


def test_the_readers_are_the_files_that_name_suffixes():
    assert {"geotiff", "nifti"} <= set(plugin_names("readers", marker="SUFFIXES"))
    assert not {"registry", "surveying", "labels", "regular", "scenes"} & set(
        plugin_names("readers", marker="SUFFIXES")
    )


def test_listing_readers_imports_no_image_library():
    code = (
        "import sys; from geomed_mae import readers; readers.load_readers();"
        "print(*{'rasterio', 'pydicom', 'nibabel', 'torch'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("name", ["geotiff", "jp2", "nifti"])
def test_a_reader_has_the_names_of_the_contract(name):
    module = readers.reader(name)
    assert all(suffix == suffix.lower() and suffix.startswith(".") for suffix in module.SUFFIXES)
    for function, first in {"sniff": "path", "header": "path", "group": "headers", "read": "source"}.items():
        assert next(iter(inspect.signature(getattr(module, function)).parameters)) == first


def test_every_file_is_in_a_source_or_in_one_refusal(archive):
    found = survey(list_files(archive), AUTO, root=archive)
    accounted = [path.name for source in found.sources for path in source.files] + [r.path.name for r in found.refusals]
    assert sorted(accounted) == sorted(path.name for path in archive.iterdir())
    assert {r.path.name: r.reason for r in found.refusals} == {
        "notes.txt": Reason.UNKNOWN_FORMAT,
        "page.tif": Reason.NOT_TIFF,
        "broken.nii": Reason.MALFORMED,
    }


def test_headers_travel_between_processes(archive):
    here = survey(list_files(archive), AUTO, root=archive)
    with ProcessPoolExecutor(1) as pool:
        there = survey(list_files(archive), AUTO, root=archive, mapper=pool.map)
    assert [s.to_json() for s in there.sources] == [s.to_json() for s in here.sources]
    assert there.refusals == here.refusals


def test_a_source_survives_json_and_pickle(archive):
    for source in survey(list_files(archive), AUTO).sources:
        again = Source.from_json(source.to_json())
        assert again.to_json() == source.to_json()
        assert pickle.loads(pickle.dumps(source)).to_json() == source.to_json()
        np.testing.assert_array_equal(read(again).array, read(source).array)


def test_a_window_is_the_crop_of_the_whole(archive):
    for source in survey(list_files(archive), AUTO).sources:
        whole = read(source)
        window = tuple(slice(1, size - 1) for size in whole.spatial_shape)
        part, crop = read(source, window), whole.crop(window)
        np.testing.assert_array_equal(part.array, crop.array)
        np.testing.assert_array_equal(
            np.broadcast_to(part.valid, part.array.shape), np.broadcast_to(crop.valid, part.array.shape)
        )
        for name in ("affine", "transform"):
            if hasattr(part.geometry, name):
                np.testing.assert_allclose(getattr(part.geometry, name), getattr(crop.geometry, name))


def test_an_image_is_what_its_source_promised(archive):
    for source in survey(list_files(archive), AUTO).sources:
        image = read(source)
        assert (image.modality, image.channels, image.spatial_shape) == (source.modality, source.channels, source.shape)
        assert not image.array.flags.writeable


def test_a_folder_gives_its_images_and_skips_the_rest(archive):
    assert sorted(image.modality for image in read_images(archive)) == ["unnamed-raster", "unnamed-volume"]


def test_a_single_bad_file_says_why(archive):
    with pytest.raises(ReadError, match=r"page\.tif cannot be used: not a TIFF by its first bytes") as caught:
        read_images(archive / "page.tif")
    assert caught.value.reason == "NOT_TIFF" and str(archive) not in str(caught.value)


def test_a_folder_without_a_usable_file_counts_the_reasons(tmp_path):
    for name in ("a.tif", "b.tif", "c.txt"):
        (tmp_path / name).write_text("text")
    with pytest.raises(
        TooManyBadInputsError, match=r"none of the 3 files .*1 x UNKNOWN_FORMAT \(.*2 x NOT_TIFF \(not a TIFF"
    ):
        read_images(tmp_path)


def test_an_empty_folder_and_a_missing_path_are_different_errors(tmp_path):
    with pytest.raises(TooManyBadInputsError, match="holds no files"):
        read_images(tmp_path)
    with pytest.raises(ConfigError, match="there is nothing at"):
        read_images(tmp_path / "missing")


def test_an_unknown_modality_names_the_nearest(tmp_path):
    write_geotiff(tmp_path / "a.tif", np.ones((1, 4, 4), np.uint8))
    with pytest.raises(ConfigError, match="did you mean 'sentinel2-l2a'"):
        read_images(tmp_path, modality="sentinel2-l2")


def test_a_missing_package_is_named_with_its_extra(monkeypatch, tmp_path):
    write_geotiff(tmp_path / "a.tif", np.ones((1, 4, 4), np.uint8))
    monkeypatch.setattr(readers.reader("geotiff"), "PACKAGE", "rasterio_that_is_not_there")
    with pytest.raises(MissingExtraError, match=r"pip install 'geomed-mae\[geo\]'"):
        readers.reader("geotiff")
    found = survey([tmp_path / "a.tif"], AUTO)
    assert [r.reason for r in found.refusals] == [Reason.MISSING_EXTRA]


def test_a_label_file_of_an_unknown_format_is_refused(tmp_path):
    (tmp_path / "labels.csv").write_text("a,b")
    write_geotiff(tmp_path / "a.tif", np.ones((1, 4, 4), np.uint8))
    with pytest.raises(ReadError, match=r"labels\.csv is not a label file that a reader knows"):
        readers.read_labels(tmp_path / "labels.csv", read_images(tmp_path / "a.tif")[0])


def test_reasons_fall_into_skipped_and_unsupported():
    assert {status(reason) for reason in Reason} == {"skipped", "unsupported"}
    assert all(status(reason) == "unsupported" for reason in UNSUPPORTED)
    assert Reason.TRUNCATED not in NOT_BAD and Reason.UNKNOWN_FORMAT in NOT_BAD
    assert len({reason.value for reason in Reason}) == len(Reason), "two reasons share a text"


def test_rasterio_opens_files_at_one_place_only():
    """Each guard that protects one call site is missing at the next: there is no next."""
    calls = []
    for file in sorted(Path(readers.__path__[0]).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("rasterio.open", "rio.open"):
                calls.append(f"{file.parent.name}/{file.stem}")
    assert calls == ["geotiff/open"]


def test_nothing_usable_is_an_error_of_this_package():
    assert issubclass(TooManyBadInputsError, GeomedError) and Survey([], []).sources == []


def test_bad_files_beside_good_ones_are_counted_and_not_passed_over_in_silence(tmp_path, caplog):
    write_geotiff(tmp_path / "good.tif", np.arange(64, dtype="uint8").reshape(8, 8))
    damaged = write_geotiff(
        tmp_path / "damaged.tif", np.arange(64, dtype="uint8").reshape(8, 8), compress="deflate"
    ).read_bytes()
    at = damaged.index(b"\x78", 8)
    (tmp_path / "damaged.tif").write_bytes(damaged[:at] + b"\xff\xff\xff\xff" + damaged[at + 4 :])
    (tmp_path / "text.tif").write_bytes(b"text")
    (tmp_path / "README.md").write_text("no image, and nothing bad")
    assert len(read_images(tmp_path)) == 1
    assert "2 files were left out" in caplog.text
    assert "NOT_TIFF" in caplog.text
    assert "DECODE_FAILED" in caplog.text


def test_labels_from_a_decoding_child_are_those_of_this_process(archive):
    (source,) = survey([archive / "raster.tif"], AUTO).sources
    image = read(source)
    path = write_geotiff(archive / "labels.tif", RNG.integers(0, 3, (20, 30)).astype(np.uint8))
    here, there = read_labels(path, image), read_labels_guarded(path, image)
    np.testing.assert_array_equal(there.array, here.array)
    assert (there.names, there.counts) == (here.names, here.counts)
    assert there.array.dtype == np.int16 and there.array.flags.writeable
    with pytest.raises(ReadError, match="is not a label file") as caught:
        read_labels_guarded(archive / "notes.txt", image)
    assert caught.value.reason == "UNKNOWN_FORMAT"


def test_a_label_file_that_ends_its_process_is_an_error(archive, monkeypatch):
    (source,) = survey([archive / "raster.tif"], AUTO).sources
    image = read(source)
    monkeypatch.setattr(label_reading, "_labels_on", _deadly)
    with pytest.raises(ReadError, match=r"the decoder crashed \(SIGSEGV\)") as caught:
        read_labels_guarded(archive / "raster.tif", image)
    assert caught.value.reason == "DECODE_FAILED"


def _deadly(*_):
    ctypes.string_at(0)
