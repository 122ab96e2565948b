"""The STAC export: an Item that is valid without a network, whose model computes what ours does."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import geomed_mae.exporters.stac_mlm as exporter
from geomed_mae.archives.seen import Seen
from geomed_mae.errors import IntegrityError
from geomed_mae.exporters.proof import ours, trial
from geomed_mae.exporters.request import Request, ask
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from tests.consumer import elsewhere
from tests.heads.given import CLASSES, archive, task_model

SCHEMAS = Path(__file__).parent / "schemas"
CONSUMER = """
    import json, numpy, pystac, sys, torch
    from pathlib import Path
    from pystac.extensions.mlm import MLMExtension
    from pystac.validation import RegisteredValidator
    from pystac.validation.stac_validator import JsonSchemaSTACValidator

    validator = JsonSchemaSTACValidator()
    for file in Path(sys.argv[2]).glob("*.json"):
        name, version = file.stem.rsplit("-v", 1)
        uri = f"https://stac-extensions.github.io/{name}/v{version}/schema.json"
        validator.schema_cache[uri] = {**json.loads(file.read_text()), "$id": uri}
    RegisteredValidator.set_validator(validator)

    def network(*given, **more):
        raise OSError("no network in tests")

    pystac.StacIO.default().read_text = network
    said = {}
    for folder in sys.argv[3:]:
        item = pystac.Item.from_dict(json.loads((Path(folder) / "item.json").read_text()))
        item.set_self_href(str(Path(folder) / "item.json"))
        valid = item.validate()
        model = torch.export.load(item.assets["model"].get_absolute_href()).module()
        taken = item.properties["mlm:input"][0]
        arrays = numpy.load(Path(sys.argv[1]) / (Path(folder).name + ".npy"))
        pixels = []
        for x in arrays:
            if taken["pre_processing_function"]:
                x = eval(taken["pre_processing_function"]["expression"])
            rules = taken["value_scaling"]
            scaled = [
                (x[number] - rule["mean"]) / rule["stddev"]
                if rule["type"] == "z-score"
                else eval(rule["expression"], {"x": x[number], "numpy": numpy})
                for number, rule in enumerate(rules)
            ]
            pixels.append(numpy.stack(scaled))
        with torch.no_grad():
            answer = model(torch.from_numpy(numpy.stack(pixels).astype("float32")))
        answer = answer if isinstance(answer, tuple) else (answer,)
        for output, result in zip(answer, item.properties["mlm:output"], strict=True):
            shape = result["result"]["shape"]
            assert list(output.shape)[1:] == shape[1:] and shape[0] == -1, (output.shape, shape)
        numpy.save(Path(sys.argv[1]) / (Path(folder).name + ".answer.npy"), answer[0].numpy())
        said[Path(folder).name] = {
            "schemas": valid,
            "extension": [one.name for one in MLMExtension.ext(item).output],
            "absolute": [asset.href for asset in item.assets.values() if not asset.href.startswith("./")],
        }
    print(json.dumps(said))
"""


def encoder_request() -> Request:
    """An encoder of Sentinel-2's thirteen less some bands, with physical positions."""
    torch.manual_seed(0)
    s2 = load_modality("sentinel2-l2a")
    entries = contract_entries(s2, s2.channels, [])
    module = Encoder(ModelSpec(dim=24, depth=2, heads=2, patch_2d=(8, 8), basis=8, reference_gsd_m=10.0))
    contract = Contract(channels=entries, crop_2d=(32, 24), images=2, steps=3, fingerprint="abc")
    return ask(PretrainedEncoder(module, contract), channels=["B04", "B08", "B11"])


def task_request(folder: Path, name: str, task: str, axes: int) -> Request:
    """A task model of a Landsat scene or an MR volume."""
    folder.mkdir()
    crop = (16, 24) if axes == 2 else (4, 8, 12)
    model = task_model(archive(folder, axes), name, task, crop=crop)
    return ask(PretrainedEncoder(model.encoder, model.contract), task=model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Requests by name, and the folder that holds their exports and what another process made of them."""
    work = tmp_path_factory.mktemp("stac")
    requests = {
        "encoder": encoder_request(),
        "segment": task_request(work / "a", "convolutional", "segment", 2),
        "volumes": task_request(work / "b", "linear", "classify", 3),
    }
    results = {name: exporter.export(request, work / name) for name, request in requests.items()}
    for name, request in requests.items():
        np.save(work / f"{name}.npy", trial(request, noise=0).raw.numpy())
    said = elsewhere(CONSUMER, work, SCHEMAS, *(work / name for name in requests))
    return work, requests, results, said


def test_items_are_valid_without_a_network(exported):
    _, requests, _, said = exported
    for name in requests:
        used = said[name]["schemas"]
        assert any("mlm/v1.5.2" in uri for uri in used) and any("item-spec" in uri for uri in used)
        assert said[name]["absolute"] == []
    assert said["encoder"]["extension"] == ["features", "vector"]
    assert any("eo/v2.0.0" in uri for uri in said["encoder"]["schemas"])


def test_a_program_that_follows_the_item_gets_our_answers(exported):
    work, requests, results, _ = exported
    for name, request in requests.items():
        answer = ours(request, trial(request, noise=0))
        wanted = answer.features if answer.probabilities is None else answer.probabilities
        theirs = np.load(work / f"{name}.answer.npy")
        assert np.abs(theirs - wanted.numpy()).max() < 1e-5 * float(wanted.abs().max()), name
        assert results[name]["parity"]["largest_relative_difference"] < 1e-5


def test_the_item_has_bands_in_stacs_terms(exported):
    work, _, results, _ = exported
    item = json.loads(Path(results["encoder"]["item"]).read_text())
    said = item["properties"]
    red = said["bands"][0]
    assert (red["name"], red["unit"], red["data_type"]) == ("B04", "reflectance", "float32")
    assert red["eo:center_wavelength"] == pytest.approx(0.6646, abs=0.002) and "eo:full_width_half_max" in red
    assert said["gsd"] == 10.0 and said["mlm:tasks"] == ["similarity-search"]
    taken = said["mlm:input"][0]
    assert taken["bands"] == ["B04", "B08", "B11"] and taken["input"]["shape"] == [-1, 3, 32, 24]
    assert taken["value_scaling"][0] == {"type": "z-score", "mean": 0.15, "stddev": 0.15}
    assert taken["pre_processing_function"]["expression"] == "numpy.clip(x, 0, 1.6)"
    classes = json.loads((work / "segment" / "item.json").read_text())["properties"]["mlm:output"][0]
    assert [one["name"] for one in classes["classification:classes"]] == list(CLASSES)
    volume = json.loads((work / "volumes" / "item.json").read_text())
    assert volume["geometry"] is None and "bbox" not in volume
    assert volume["properties"]["mlm:input"][0]["value_scaling"][0]["type"] == "processing"


def test_checksums_are_those_of_the_files_and_no_path_of_ours_is_inside(exported):
    work, requests, _, _ = exported
    for name in requests:
        item = json.loads((work / name / "item.json").read_text())
        for asset in item["assets"].values():
            data = (work / name / asset["href"]).read_bytes()
            assert asset["file:checksum"] == "1220" + hashlib.sha256(data).hexdigest()
            assert asset["file:size"] == len(data)
        for path in (work / name).rglob("*"):
            if path.is_file():
                data = path.read_bytes()
                assert str(Path(exporter.__file__).parents[2]).encode() not in data, path
                assert str(work).encode() not in data, path


def test_load_encoder_opens_the_folder(exported):
    work, requests, _, _ = exported
    for name, request in requests.items():
        opened = load_encoder(work / name)
        assert all(
            torch.equal(mine, theirs)
            for mine, theirs in zip(
                request.encoder.module.state_dict().values(), opened.module.state_dict().values(), strict=True
            )
        )


def test_other_ranges_for_other_channels_are_clipped_each_by_its_own():
    request = encoder_request()
    first, *rest = request.entries
    text = exporter._clipping(replace(request, entries=(replace(first, value_range=None), *rest)))["expression"]
    x = np.full((3, 2, 2), 5.0)
    assert eval(text, {"x": x, "numpy": np})[:, 0, 0].tolist() == [5.0, 1.6, 1.6]


def test_names_of_classes_are_machine_readable_and_limits_exact(tmp_path):
    asked = task_request(tmp_path / "a", "linear", "segment", 2)
    spec = asked.task.spec
    asked.task.spec = replace(spec, head=replace(spec.head, classes=("back muscles", *spec.head.classes[1:])))
    (said,) = exporter._outputs(asked)
    assert said["classification:classes"][0] == {"value": 0, "name": "back-muscles", "description": "back muscles"}
    wide = replace(asked, entries=tuple(replace(one, value_range=(-1.0, 1234567.5)) for one in asked.entries))
    assert exporter._clipping(wide)["expression"] == "numpy.clip(x, -1.0, 1234567.5)"


def test_a_model_from_scratch_is_not_called_pretrained(tmp_path):
    asked = task_request(tmp_path / "a", "linear", "segment", 2)
    for seen, wanted in ((Seen.nothing(), False), (Seen.unknown(), True)):
        contract = replace(asked.encoder.contract, images=7)
        encoder = PretrainedEncoder(asked.encoder.module, contract, seen=seen)
        said = exporter._properties(replace(asked, encoder=encoder), "segmentation")
        assert said["mlm:pretrained"] is wanted and ("masked autoencoder" in said["description"]) is wanted


def test_a_mismatch_leaves_nothing_behind(tmp_path, monkeypatch):
    true_rule = exporter._value_scaling
    monkeypatch.setattr(exporter, "_value_scaling", lambda entry: {**true_rule(entry), "stddev": 0.2})
    with pytest.raises(IntegrityError, match="the stac-mlm export, opened in pystac"):
        exporter.export(encoder_request(), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
