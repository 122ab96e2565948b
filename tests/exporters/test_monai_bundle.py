"""The MONAI bundle: MONAI alone runs it on files, and its maps are those of `predict`."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

import geomed_mae.exporters.monai_bundle as exporter
from geomed_mae.archives.build import open_archive
from geomed_mae.archives.index import Index
from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.exporters.bundle_config import inference_config
from geomed_mae.exporters.request import Request, ask
from geomed_mae.heads import HeadSpec
from geomed_mae.heads.task_model import TaskModel, TaskSpec, load_task_model
from geomed_mae.heads.windows import image_chances, whole_class_map
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import ChannelContract, Contract, contract_entries
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from tests.consumer import elsewhere
from tests.heads.given import CLASSES, archive, task_model

CROP = (4, 16, 12)
CONSUMER = """
    import json, os, sys
    import torch
    from monai.bundle import run, verify_net_in_out

    for folder in sys.argv[2:]:
        os.chdir(folder)
        config = "configs/inference.json"
        run(config_file=config, bundle_root=".", dataset_dir=sys.argv[1], output_dir=folder + ".eval")
        verify_net_in_out("network_def", meta_file="configs/metadata.json", config_file=config, device="cpu")
    print(json.dumps(torch.cuda.is_available()))
"""
COMMAND = """
    import json, subprocess, sys

    # The line of the bundle's README, as it stands there.
    line = "-m monai.bundle run --config_file configs/inference.json --bundle_root .".split()
    places = ["--dataset_dir", sys.argv[1], "--output_dir", sys.argv[2] + ".eval"]
    subprocess.run([sys.executable, *line, *places], cwd=sys.argv[2], check=True, stdout=subprocess.DEVNULL)
    print(json.dumps(True))
"""


def asked(model: TaskModel) -> Request:
    """The request of a task model."""
    return ask(PretrainedEncoder(model.encoder, model.contract), task=model)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, index of an MR volume, task models by name, results), after MONAI has run the bundles elsewhere."""
    work = tmp_path_factory.mktemp("monai")
    (work / "data").mkdir()
    index = archive(work / "data", 3)
    models = {
        "segment": task_model(index, "convolutional", "segment", crop=CROP),
        "classify": task_model(index, "attentive", "classify", crop=CROP),
    }
    results = {name: exporter.export(asked(model), work / name) for name, model in models.items()}
    elsewhere(CONSUMER, work / "data", *(work / name for name in models))
    return work, index, models, results


def test_its_map_is_that_of_predict_on_the_grid_of_the_file(exported):
    work, index, models, results = exported
    (row,) = index.rows
    ours = whole_class_map(models["segment"], index, row)
    found = nibabel.load(work / "segment.eval" / "a_seg.nii.gz")
    theirs = np.asarray(found.dataobj).T
    assert len(np.unique(ours)) > 1 and theirs.dtype == np.uint8
    assert theirs.shape == ours.shape and (theirs == ours).mean() > 0.9995
    assert np.array_equal(found.affine, nibabel.load(work / "data" / "a.nii.gz").affine)
    assert (
        results["segment"]["parity"]["largest_relative_difference"] < 1e-5 and results["segment"]["same_class"] > 0.999
    )


def test_its_table_is_that_of_predict(exported):
    work, index, models, results = exported
    (row,) = index.rows
    with (work / "classify.eval" / "predictions.csv").open(newline="") as table:
        ((_, *chances),) = csv.reader(table)
    assert np.allclose(np.array(chances, float), image_chances(models["classify"], index, row), atol=1e-5)
    assert "same_class" not in results["classify"]


def test_the_bundle_says_what_goes_in_and_out(exported):
    work, _, _, _ = exported
    names = {str(path.relative_to(work / "segment")) for path in (work / "segment").rglob("*") if path.is_file()}
    assert {
        "LICENSE",
        "contract.json",
        "docs/README.md",
        "configs/metadata.json",
        "models/model.ts",
        "model/MANIFEST.sha256",
    } <= names
    said = json.loads((work / "segment" / "configs" / "metadata.json").read_text())
    image, pred = said["network_data_format"]["inputs"]["image"], said["network_data_format"]["outputs"]["pred"]
    assert (image["modality"], image["num_channels"], image["spatial_shape"]) == ("MR", 1, [12, 16, 4])
    assert pred["channel_def"] == {str(number): name for number, name in enumerate(CLASSES)}
    assert said["input_contract"][0]["std"] == "(p95 - p5) / 3.29 of the image"
    for key in ("schema", "version", "changelog", "monai_version", "pytorch_version", "numpy_version", "authors"):
        assert said[key], key
    card = (work / "segment" / "docs" / "README.md").read_text()
    assert "python -m monai.bundle run --config_file configs/inference.json --bundle_root ." in card


def test_we_open_the_bundle_too_and_no_path_of_ours_is_inside(exported):
    work, _, models, _ = exported
    assert load_task_model(work / "segment")[0].classes == CLASSES
    assert load_encoder(work / "segment").spec == models["segment"].encoder.spec
    for path in (path for path in (work / "segment").rglob("*") if path.is_file()):
        data = path.read_bytes()
        assert str(work).encode() not in data and str(Path(exporter.__file__).parents[2]).encode() not in data, path


def test_slices_of_a_dicom_series_run_along_their_normal(exported):
    from monai.bundle import ConfigParser
    from monai.data import MetaTensor

    work, _, _, _ = exported
    config = json.loads((work / "segment" / "configs" / "inference.json").read_text())
    (step,) = (one for one in config["preprocessing"]["transforms"] if "upside_down" in one.get("func", ""))
    parser = ConfigParser({"imports": config["imports"], "upside_down": config["upside_down"], "step": step})
    turn = parser.get_parsed_content("step")
    pixels = torch.arange(24.0).reshape(1, 2, 3, 4)
    for series, depth, turned in ((True, -2.0, True), (True, 2.0, False), (False, -2.0, False)):
        meta = {"00200037": {"Value": [1, 0, 0, 0, 1, 0]}} if series else {}
        image = MetaTensor(pixels, affine=torch.diag(torch.tensor([-1.0, -1.0, depth, 1.0])), meta=meta)
        made = turn({"image": image})["image"]
        assert torch.equal(made.as_tensor(), pixels.flip(3) if turned else pixels)
        assert made.affine[2, [2, 3]].tolist() == ([2.0, -6.0] if turned else [depth, 0.0])


def test_encoders_and_rasters_are_refused(tmp_path, exported):
    _, _, models, _ = exported
    model = models["segment"]
    with pytest.raises(ConfigError, match="takes a fine-tuned model, and an encoder has no head"):
        exporter.export(ask(PretrainedEncoder(model.encoder, model.contract)), tmp_path / "out")
    (tmp_path / "scene").mkdir()
    raster = task_model(archive(tmp_path / "scene", 2), "linear", "segment", crop=(16, 16))
    with pytest.raises(ConfigError, match=r"MONAI does not read georeferenced rasters such as 'landsat7'"):
        exporter.export(asked(raster), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_mismatch_leaves_nothing_behind(tmp_path, exported, monkeypatch):
    _, _, models, _ = exported

    def other(request: Request) -> dict[str, object]:
        return {**inference_config(request), "statistics": "$lambda c: (0.0, 1.0)"}

    monkeypatch.setattr(exporter, "inference_config", other)
    with pytest.raises(IntegrityError, match="the monai-bundle export, opened in MONAI"):
        exporter.export(asked(models["segment"]), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def own_model(modality: str, crop: tuple[int, ...], head: str, **spec: object) -> TaskModel:
    """A task model of all channels of a modality, with random weights."""
    known = load_modality(modality)
    entries: tuple[ChannelContract, ...] = contract_entries(known, known.channels, [])
    torch.manual_seed(0)
    patch = (2, 4, 4) if len(crop) == 3 else (4, 4)
    encoder = Encoder(ModelSpec(dim=24, depth=3, heads=2, basis=4, **{f"patch_{len(crop)}d": patch}, **spec))
    task = "segment" if head != "attentive" else "classify"
    names = tuple(entry.channel.name for entry in entries)
    given = HeadSpec(name=head, task=task, embed_dim=24, classes=CLASSES, channels=len(names), patch=patch)
    contract = Contract(channels=entries, **{f"crop_{len(crop)}d": crop})
    return TaskModel(encoder, contract, TaskSpec(head=given, modality=modality, channels=names, crop=crop)).eval()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("modality", "crop", "head", "spec"),
    [
        ("ct", (4, 8, 12), "convolutional", {"reference_spacing_mm": (5.0, 1.0, 1.0)}),  # clipped, resampled
        ("xray", (16, 24), "linear", {}),
        ("ultrasound", (16, 24), "attentive", {}),
    ],
)
def test_other_modalities_and_planes_prove_themselves(tmp_path, modality, crop, head, spec):
    result = exporter.export(asked(own_model(modality, crop, head, **spec)), tmp_path / "out")
    assert result["parity"]["largest_relative_difference"] < 1e-5
    steps = json.loads((tmp_path / "out" / "configs" / "inference.json").read_text())["preprocessing"]["transforms"]
    found = {step["_target_"]: step for step in steps}
    if modality == "ct":
        assert found["Spacingd"]["pixdim"] == [1.0, 1.0, 5.0] and found["ScaleIntensityRanged"]["clip"]
    else:
        assert "Spacingd" not in found


HIPPOCAMPUS = Path(__file__).parents[3] / "shared" / "data" / "med" / "hippocampus" / "images"


@pytest.mark.slow
@pytest.mark.skipif(not HIPPOCAMPUS.is_dir(), reason="the hippocampus volumes are not here")
def test_real_volumes_have_the_same_maps(tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    for path in sorted(HIPPOCAMPUS.glob("*.nii.gz"))[:2]:
        (data / path.name).write_bytes(path.read_bytes())
    index: Index = open_archive([data], ["mr"])
    model = task_model(index, "convolutional", "segment", crop=(16, 24, 16))
    exporter.export(asked(model), tmp_path / "out")
    elsewhere(COMMAND, data, tmp_path / "out")
    for row in index.rows:
        name = index.paths(row.key)[0].name.replace(".nii.gz", "_seg.nii.gz")
        theirs = np.asarray(nibabel.load(tmp_path / "out.eval" / name).dataobj).T
        assert (theirs == whole_class_map(model, index, row)).mean() > 0.9999
