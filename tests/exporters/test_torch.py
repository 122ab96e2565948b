"""The torch.export target: a .pt2 that torch alone opens, of any size, with nothing of this machine in it."""

from __future__ import annotations

import getpass
import json
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

import geomed_mae.exporters.fixed as fixed
import geomed_mae.exporters.graph as graphs
import geomed_mae.exporters.torch as exporter
from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.exporters.request import ask
from geomed_mae.models.encoder_folder import load_encoder
from tests.exporters.graphs import (
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
import torch

told = []
for folder in sys.argv[1:]:
    extra = {"contract.json": ""}
    program = torch.export.load(f"{folder}/model.pt2", extra_files=extra)
    model = program.module()
    given, said = np.load(f"{folder}.given.npz"), {}
    for name in given.files:
        with torch.no_grad():
            out = model(torch.from_numpy(given[name]))
        for number, one in enumerate(out if isinstance(out, tuple) else (out,)):
            said[f"{name}.{number}"] = one.numpy()
    np.savez(f"{folder}.said.npz", **said)
    told.append({"contract": json.loads(extra["contract.json"]), "example": program.example_inputs is not None})
print(json.dumps(told))
"""


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    task = task_request(encoder_of("mr"), "linear", "segment", channels=("MR",), size=(4, 16, 8))
    return opened_elsewhere(tmp_path_factory.mktemp("torch"), exporter, task, OPEN)


def test_torch_alone_computes_the_same_features_and_vectors(seen):
    result, said = seen.results[0], seen.said[0]
    assert result["any_size"] and result["parity"]["largest_relative_difference"] < 1e-5
    assert result["parity"]["runtime"].startswith("torch ")
    for name, image in seen.images.items():
        assert np.allclose(said[f"{name}.0"][0], seen.encoder.features(image, channels=RGB).array, atol=1e-5)
        assert np.allclose(said[f"{name}.1"][0], seen.encoder.embed(image, channels=RGB), atol=1e-5)
    assert said["three.0"].shape == (3, 24, 6, 16)
    assert np.allclose(said["three.0"][2], said["larger.0"][0], atol=1e-5)
    assert set(result["files"]) >= {"model.pt2", "contract.json", "README.md", "encoder/model.safetensors"}


def test_a_model_for_volumes_takes_scaled_values_where_each_image_has_its_own_scale(seen):
    assert seen.results[1]["any_size"]
    assert np.allclose(seen.said[1]["own.0"], chances(seen.task, seen.volumes), atol=1e-5)
    assert "take the whole image's median" in (seen.folders[1] / "README.md").read_text()


def test_the_file_has_the_contract_and_nothing_of_this_machine(seen):
    for folder, told in zip(seen.folders, seen.told, strict=True):
        assert not told["example"]
        assert told["contract"] == json.loads((folder / "contract.json").read_text())
        assert files_that_name(folder, str(ROOT), sys.prefix, "site-packages", "/tmp/", f"/{getpass.getuser()}/") == []
    taken = seen.told[0]["contract"]["input"]
    assert taken["spacing"] == [20.0, 20.0] and taken["any_size"] and taken["layout"] == "b c y x"
    assert seen.told[1]["contract"]["output"]["classes"] == ["background", "water", "wood"]


def test_load_encoder_opens_the_export(seen):
    image = seen.images["larger"]
    again = load_encoder(seen.folders[0])
    assert np.array_equal(again.embed(image, channels=RGB), seen.encoder.embed(image, channels=RGB))


def test_a_learned_table_of_positions_is_of_one_size_and_the_card_says_so(tmp_path):
    encoder = encoder_of(spec=replace(SPEC, learned_positions=(3, 5)))
    result = exporter.export(ask(encoder, channels=RGB[:1], size=(16, 8)), tmp_path / "out")
    assert result["any_size"] is False
    card = (tmp_path / "out" / "README.md").read_text()
    assert "of this one size, because positions are a learned table of one grid" in card
    model = torch.export.load(tmp_path / "out" / "model.pt2").module()
    assert model(torch.zeros(5, 1, 16, 8))[0].shape == (5, 24, 2, 2)


class OneSize(nn.Module):
    """A head that knows its own size alone."""

    def forward(self, inputs):
        return inputs.maps[-1].reshape(-1, 24 * 3 * 2)[:, :3]


class Numpy(nn.Module):
    """A head that leaves torch."""

    def forward(self, inputs):
        return torch.from_numpy(inputs.maps[-1].mean(dim=(2, 3)).numpy())[:, :3]


def test_a_head_for_one_size_is_exported_for_that_size(caplog):
    request = task_request(encoder_of(), "linear", "classify", channels=RGB, size=(24, 8))
    request.task.head = OneSize()
    graph = graphs.traced(request)
    assert not graph.dynamic and graph.sizes == ((24, 8),)
    assert "its head is for one size" in graph.why_fixed and "the export is for one size" in caplog.text
    assert graph.program.module()(torch.zeros(4, 3, 24, 8)).shape == (4, 3)


def test_a_size_of_more_patches_than_an_open_axis_has_is_the_only_one(monkeypatch):
    encoder = encoder_of()
    for module in (graphs, fixed):
        monkeypatch.setattr(module, "MOST_PATCHES", 4)
    longest = graphs.traced(ask(encoder, channels=RGB, size=(24, 16)))
    assert longest.dynamic and longest.sizes == ((24, 16), (32, 12))
    assert graphs.comparisons(longest)[1][1].features.shape[2:] == (4, 3)
    longer = graphs.traced(ask(encoder, channels=RGB, size=(24, 20)))
    assert not longer.dynamic and longer.why_fixed == "an axis of it has more than 4 patches"


def test_a_head_without_a_graph_is_named(tmp_path):
    request = task_request(encoder_of(), "linear", "classify", channels=RGB, size=(24, 8))
    request.task.head = Numpy()
    with pytest.raises(ConfigError, match="head 'linear' cannot be written as a graph of tensor operations"):
        exporter.export(request, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_computes_something_else_leaves_nothing_behind(tmp_path, monkeypatch):
    true = torch.export.save

    def damaged(program, file, **given):
        program.state_dict["encoder.norm.bias"] += 0.1
        true(program, file, **given)

    monkeypatch.setattr(torch.export, "save", damaged)
    with pytest.raises(IntegrityError, match=r"the torch export, opened in torch .* differs from the model"):
        exporter.export(ask(encoder_of(), channels=RGB[:1], size=(16, 8)), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
