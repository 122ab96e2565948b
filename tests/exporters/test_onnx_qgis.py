"""The QGIS target: what the plug-in Deepness reads off the file and does to a raster's tiles, step by step.

`DEEPNESS` follows the plug-in (repository PUTvision/qgis-plugin-deepness, f450c63 of 2024-12): modules
processing/models/model_base, segmentor and preprocessing_utils, processing/map_processor/map_processor_segmentation.
"""

from __future__ import annotations

import getpass
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import geomed_mae.exporters.onnx_qgis as exporter
from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.exporters.request import ask
from geomed_mae.models.encoder_folder import load_encoder
from tests.consumer import elsewhere
from tests.exporters.graphs import (
    CLASSES,
    RGB,
    ROOT,
    SPEC,
    chances,
    encoder_of,
    files_that_name,
    scene,
    task_request,
)

SIDE = 32
DEEPNESS = """
import json, sys
import numpy as np
import onnx
import onnxruntime

def opened(file):
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    inputs, outputs = session.get_inputs(), session.get_outputs()
    assert len(inputs) == 1, "ONNX model: unsupported number of inputs"
    told = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    names = sorted(told["class_names"].items(), key=lambda pair: int(pair[0]))
    assert [int(number) for number, _ in names] == list(range(len(names)))
    (batch, channels, rows, columns), made = inputs[0].shape, outputs[0].shape
    assert rows == columns and made[-2:] == [rows, columns] and made[-3] == len(names) > 1
    return session, told, {
        "model_type": str(told["model_type"]).capitalize(),
        "batch": None if isinstance(batch, str) else batch,
        "channels": channels,
        "input_side": columns,
        "outputs": len(outputs),
        "classes": [name for _, name in names],
        "resolution": float(told["resolution"]) if "resolution" in told else None,
        "tile_size": int(told["tile_size"]),
        "tiles_overlap": int(told["tiles_overlap"]),
        "threshold": float(told["seg_thresh"]),
        "small_segment": float(told["seg_small_segment"]),
        "bands": told["channels"],
    }

def classes(session, told, tiles):  # (n, rows, columns, bands) of the raster's own type
    limit = session.get_inputs()[0].shape[-3]
    tiles = np.float32(tiles[:, :, :, :limit] * 1. / 255.)
    tiles = (tiles - np.array(told["standardization_mean"], dtype=np.float32)) / np.array(
        told["standardization_std"], dtype=np.float32)
    tiles = np.transpose(tiles, (0, 3, 1, 2))
    (result,) = session.run(None, {session.get_inputs()[0].name: tiles})
    assert np.allclose(result.sum(axis=1), 1, atol=1e-5)
    kept = result.copy()
    kept[kept < float(told["seg_thresh"])] = 0
    return np.argmax(kept, axis=1), result

folder = sys.argv[1]
given, said, read = np.load(f"{folder}.given.npz"), {}, {}
for file in given.files:
    session, told, read[file] = opened(f"{folder}/{file}.onnx")
    said[file], said[file + ".chances"] = classes(session, told, given[file])
    proto = onnx.load(f"{folder}/{file}.onnx", load_external_data=False)
    read[file] |= {"ir": proto.ir_version, "opsets": [(one.domain, one.version) for one in proto.opset_import]}
np.savez(f"{folder}.said.npz", **said)
print(json.dumps(read))
"""


def wanted(head: str = "linear", task: str = "segment", size: tuple[int, int] = (SIDE, SIDE), **more):
    """A request for a model of three Sentinel-2 bands whose positions are physical."""
    encoder = more.pop("encoder", None) or encoder_of(spec=replace(SPEC, reference_gsd_m=10.0))
    return task_request(encoder, head, task, channels=RGB, size=size, **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The export, and what Deepness makes of the same ground stored in three ways."""
    folder = tmp_path_factory.mktemp("qgis") / "out"
    request = wanted("convolutional")
    result = exporter.export(request, folder)
    numbers = np.random.default_rng(0).integers(0, 6000, (3, SIDE, SIDE, 3)).astype(np.uint16)
    tiles = {
        "model": numbers,
        "model_offset_1000": numbers + np.uint16(1000),
        "model_physical": (numbers * np.float64(0.0001)).astype(np.float32),
    }
    np.savez(f"{folder}.given.npz", **tiles)
    read = elsewhere(DEEPNESS, folder)
    raw = np.ascontiguousarray(tiles["model_physical"].transpose(0, 3, 1, 2))
    return folder, result, read, np.load(f"{folder}.said.npz"), chances(request, raw)


@pytest.mark.parametrize("file", ["model", "model_offset_1000", "model_physical"])
def test_deepness_makes_the_map_that_predict_makes(run, file):
    _, _, _, said, chances = run
    assert np.allclose(said[f"{file}.chances"], chances, atol=2e-5)
    first, second = np.sort(chances, axis=1)[:, -1], np.sort(chances, axis=1)[:, -2]
    clear = first - second > 1e-4
    assert clear.mean() > 0.99 and len(np.unique(said[file])) > 1
    assert np.array_equal(said[file][clear], chances.argmax(axis=1)[clear])


def test_deepness_fills_in_its_settings_from_the_file(run):
    folder, result, read, _, _ = run
    for file, found in read.items():
        assert found == {
            "model_type": "Segmentor",
            "batch": None,
            "channels": 3,
            "input_side": SIDE,
            "outputs": 1,
            "classes": list(CLASSES),
            "resolution": 1000.0,
            "tile_size": SIDE,
            "tiles_overlap": exporter.OVERLAP_PERCENT,
            "threshold": 0.0,
            "small_segment": 0.0,
            "bands": list(RGB),
            "ir": 8,
            "opsets": [["", 18]],
        }, file
    assert result["resolution_cm"] == 1000.0 and result["parity"]["largest_relative_difference"] < 2e-5
    assert list(result["models"]) == ["model.onnx", "model_offset_1000.onnx", "model_physical.onnx"]
    assert result["models"]["model_offset_1000.onnx"].endswith("reflectance = (number - 1000) * 0.0001")
    card = (folder / "README.md").read_text()
    assert "| model_physical.onnx | values in reflectance |" in card and "1000 cm/pixel" in card


def test_nothing_of_this_machine_is_in_the_files_and_load_encoder_opens_them(run):
    folder = run[0]
    assert files_that_name(folder, str(ROOT), sys.prefix, "site-packages", "/tmp/", f"/{getpass.getuser()}/") == []
    assert load_encoder(folder).spec.dim == SPEC.dim
    assert json.loads((folder / "contract.json").read_text())["input"]["any_size"] is False


def test_numbers_that_are_in_their_unit_already_need_one_file():
    encoder = encoder_of("rgb")
    names = tuple(entry.channel.name for entry in encoder.contract.channels)
    request = task_request(encoder, "linear", "segment", channels=names, size=(SIDE, SIDE))
    (only,) = exporter._stored(request)
    assert (only.file, only.said) == ("model.onnx", "values in DN")
    assert only.settings(2) == {"standardization_mean": [0.0, 0.0], "standardization_std": [1.0, 1.0]}


def test_the_resolution_is_that_of_the_positions_or_of_the_given_image():
    counting = encoder_of()  # positions count patches
    assert exporter._resolution_cm(wanted()) == 1000.0
    assert exporter._resolution_cm(wanted(spacing=(0.3, 0.3))) == 30.0
    assert exporter._resolution_cm(wanted(encoder=counting)) is None
    ones = np.ones((3, 40, 40), dtype=np.float32)
    image = scene(ones, ones[:1] > 0, RGB, (28.5, 28.5))
    assert exporter._resolution_cm(wanted(encoder=counting, image=image)) == 2850.0
    with pytest.raises(ConfigError, match="square pixels, and these are 20 x 15 m; export with --spacing 15,15"):
        exporter._resolution_cm(wanted(spacing=(20.0, 15.0)))


@pytest.mark.parametrize(
    ("request_of", "message"),
    [
        (lambda: ask(encoder_of(), channels=RGB), "Deepness has no use for an encoder's features"),
        (lambda: wanted("linear", "classify"), "no use for classes of a whole image.*--to onnx"),
        (lambda: wanted(size=(32, 24)), "square tiles, and the size is 32 x 24 pixels.*--size, for example 32,32"),
        (
            lambda: task_request(encoder_of("ct"), "linear", "segment", channels=("CT",), size=(4, 16, 8)),
            "is for rasters, and this model is for volumes; take --to monai-bundle",
        ),
        (
            lambda: task_request(encoder_of("xray"), "linear", "segment", channels=("XR",), size=(32, 32)),
            "images of modality 'xray' are scaled by their own median.*take --to onnx",
        ),
    ],
    ids=["encoder", "classes", "oblong", "volume", "per image"],
)
def test_what_deepness_has_no_place_for_is_refused_before_anything_is_made(tmp_path, request_of, message):
    with pytest.raises(ConfigError, match=message):
        exporter.export(request_of(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(exporter.Tile, "forward", lambda self, tile: self.network(tile * 250))
    with pytest.raises(IntegrityError, match="the onnx-qgis export, opened in onnxruntime .* differs from the model"):
        exporter.export(wanted(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
