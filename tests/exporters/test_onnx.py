"""The ONNX target: one file that onnxruntime alone opens, scaling in the graph and the contract in its metadata."""

from __future__ import annotations

import getpass
import importlib.util
import json
import sys
from dataclasses import replace

import numpy as np
import pytest

import geomed_mae.exporters.onnx as exporter
from geomed_mae.errors import ConfigError, IntegrityError, MissingExtraError
from geomed_mae.exporters import onnx_file
from geomed_mae.exporters.request import ask
from geomed_mae.models.encoder_folder import load_encoder
from tests.exporters.graphs import (
    CLASSES,
    RGB,
    ROOT,
    SPEC,
    chances,
    encoder_of,
    files_that_name,
    opened_elsewhere,
    task_request,
)

OPEN = """
import json, sys
import numpy as np
import onnx
import onnxruntime

told = []
for folder in sys.argv[1:]:
    file = f"{folder}/model.onnx"
    onnx.checker.check_model(file, full_check=True)
    proto = onnx.load(file, load_external_data=False)
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    given, said = np.load(f"{folder}.given.npz"), {}
    for name in given.files:
        for output, one in zip(session.get_outputs(), session.run(None, {"pixels": given[name]})):
            said[f"{name}.{output.name}"] = one
    np.savez(f"{folder}.said.npz", **said)
    (taken,) = session.get_inputs()
    told.append({
        "input": [taken.name, taken.type, taken.shape],
        "outputs": {one.name: one.shape for one in session.get_outputs()},
        "metadata": {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()},
        "producer": session.get_modelmeta().producer_name,
        "opsets": [(one.domain, one.version) for one in proto.opset_import],
    })
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    head = {"channels": ("MR",), "size": (4, 16, 8), "multi_label": True}
    task = task_request(encoder_of("mr"), "attentive", "classify", **head)
    return opened_elsewhere(tmp_path_factory.mktemp("onnx"), exporter, task, OPEN)


def test_onnxruntime_alone_computes_the_same_features_and_vectors(seen):
    result, said = seen.results[0], seen.said[0]
    assert result["any_size"] and result["parity"]["largest_relative_difference"] < 2e-5
    assert result["parity"]["runtime"].startswith("onnxruntime ") and result["seconds"] > 0
    for name, image in seen.images.items():
        assert np.allclose(said[f"{name}.features"][0], seen.encoder.features(image, channels=RGB).array, atol=2e-5)
        assert np.allclose(said[f"{name}.vector"][0], seen.encoder.embed(image, channels=RGB), atol=2e-5)
    assert said["three.features"].shape == (3, 24, 6, 16)
    assert np.allclose(said["three.vector"][2], said["larger.vector"][0], atol=2e-5)


def test_a_classifier_of_volumes_of_any_size_gives_the_same_probabilities(seen):
    assert seen.results[1]["any_size"] and seen.told[1]["outputs"] == {"probabilities": ["batch", 3]}
    assert np.allclose(seen.said[1]["own.probabilities"], chances(seen.task, seen.volumes), atol=1e-5)


def test_it_is_one_float_input_with_named_open_axes_in_opset_20(seen):
    first, second = seen.told
    assert first["input"] == ["pixels", "tensor(float)", ["batch", 3, "8*patch_rows", "4*patch_columns"]]
    assert first["outputs"]["features"] == ["batch", 24, "patch_rows", "patch_columns"]
    assert second["input"][2] == ["batch", 1, "2*patch_slices", "8*patch_rows", "4*patch_columns"]
    assert first["opsets"] == [["", 20]] and first["producer"] == "geomed-mae"
    assert [path.name for path in seen.folders[0].glob("*.onnx*")] == ["model.onnx"]


def test_the_metadata_says_bands_units_and_scaling_in_the_order_of_the_input(seen):
    said = seen.told[0]["metadata"]
    assert said["channels"] == list(RGB) and said["wavelength_nm"] == [664.6, 559.8, 492.4]
    assert said["bandwidth_nm"] == [31, 36, 66] and said["units"] == ["reflectance"] * 3
    assert said["mean"] == [0.15] * 3 and said["std"] == [0.15] * 3 and said["value_range"] == [[0, 1.6]] * 3
    assert said["size"] == [32, 24] and said["patch"] == [8, 4]
    assert said["spacing"] == [20.0, 20.0] and said["spacing_unit"] == "m"
    assert said["contract"] == json.loads((seen.folders[0] / "contract.json").read_text())
    said = seen.told[1]["metadata"]
    assert said["scaling"] == ["image"] and said["mean"] == [None] and said["spacing_unit"] == "mm"
    assert said["classes"] == list(CLASSES) and said["task"] == "classify" and said["multi_label"] is True


def test_nothing_of_this_machine_is_in_the_files(seen):
    for folder in seen.folders:
        assert files_that_name(folder, str(ROOT), sys.prefix, "site-packages", "/tmp/", f"/{getpass.getuser()}/") == []


def test_load_encoder_opens_the_export(seen):
    image = seen.images["larger"]
    again = load_encoder(seen.folders[0])
    assert np.array_equal(again.embed(image, channels=RGB), seen.encoder.embed(image, channels=RGB))


def test_a_file_that_computes_something_else_leaves_nothing_behind(tmp_path, monkeypatch):
    true = exporter.onnx_model

    def damaged(*args, **given):
        model = true(*args, **given)
        weight = next(one for one in model.graph.initializer if one.name.endswith("embed.bias"))
        weight.raw_data = (np.frombuffer(weight.raw_data, dtype=np.float32) * 2).tobytes()
        return model

    monkeypatch.setattr(exporter, "onnx_model", damaged)
    with pytest.raises(IntegrityError, match=r"the onnx export, opened in onnxruntime .* differs from the model"):
        exporter.export(ask(encoder_of(), channels=RGB[:1], size=(16, 8)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else object())
    with pytest.raises(MissingExtraError, match=r"export --to onnx needs the package 'onnxscript'.*\[export\]"):
        exporter.export(ask(encoder_of(), channels=RGB[:1], size=(16, 8)), tmp_path / "out")


def test_weights_that_one_file_cannot_hold_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(onnx_file, "MOST_BYTES", 10_000)
    with pytest.raises(ConfigError, match=r"the weights take .* GiB, and one ONNX file holds 2; take --to torch"):
        exporter.export(ask(encoder_of(), channels=RGB[:1], size=(16, 8)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("size", [(32, 24), (4, 16, 8)])
@pytest.mark.parametrize("maps", [1, 3])
@pytest.mark.parametrize(
    ("head", "task"),
    [
        ("linear", "segment"),
        ("convolutional", "segment"),
        ("unetr", "segment"),
        ("linear", "classify"),
        ("attentive", "classify"),
    ],
)
def test_every_head_is_exported_for_any_size(tmp_path, head, task, maps, size):
    encoder = encoder_of("ct" if len(size) == 3 else "sentinel2-l2a", spec=replace(SPEC, depth=3))
    channels = ("CT",) if len(size) == 3 else RGB
    request = task_request(encoder, head, task, channels=channels, size=size, maps=maps)
    result = exporter.export(request, tmp_path / "out")
    assert result["any_size"] and result["parity"]["largest_relative_difference"] < exporter.GRAPH_TOLERANCE
