"""The README's section for each audience: its commands run, and its lines open what they wrote, in another program."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.seen import Seen
from geomed_mae.cli import main
from geomed_mae.heads.task_model import save_task_model
from geomed_mae.plugins import plugin_names
from tests.consumer import elsewhere
from tests.heads.given import task_model
from tests.make_dicom import write_series
from tests.scenes import landsat_scene, mr_volume, random_encoder

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
TITLE = "## Where your tools already are\n"

CHECKS = {
    "Python": "assert vector.shape == (192,) and grid.shape == (192, 16, 20)",
    "QGIS": """
import glob, onnxruntime, rasterio
with rasterio.open(glob.glob("maps/*.tif")[0]) as made, rasterio.open("scene.tif") as scene:
    assert (made.transform, made.crs, made.shape) == (scene.transform, scene.crs, scene.shape)
    assert made.colormap(1)[1] != (0, 0, 0, 255)
assert glob.glob("maps/*.qml") and glob.glob("dense/*-preview.tif")
assert onnxruntime.InferenceSession("to-qgis/model.onnx").get_inputs()[0].shape[1:] == [6, 64, 64]
""",
    "timm, transformers, TerraTorch": """
import torch
pixels = torch.rand(2, 6, 64, 64)
assert model.forward_features(pixels).shape == (2, 65, 192)
assert torch.allclose(same(pixels).last_hidden_state, model.forward_features(pixels), atol=1e-5)
""",
    "TorchGeo": "",
    "MONAI": "assert list(pathlib.Path('segmented').rglob('*.nii.gz'))",
    "3D Slicer": """
import glob, nibabel, numpy, pydicom
made, volume = nibabel.load(glob.glob("maps/*.nii.gz")[0]), nibabel.load("volumes/a.nii.gz")
assert made.shape == volume.shape and numpy.allclose(made.affine, volume.affine, atol=1e-6)
made, source = (pydicom.dcmread(glob.glob(name)[0]) for name in ("segs/*.dcm", "series/*.dcm"))
assert made.Modality == "SEG" and made.StudyInstanceUID == source.StudyInstanceUID
""",
    "onnxruntime": "assert features.shape == (1, 192, 16, 20) and vector.shape == (1, 192)",
    "torch": "assert torch.allclose(probabilities.sum(1), torch.ones(1, 64, 64))",
    "STAC": "assert item.properties['mlm:name']",
    "scikit-learn": "assert list(alike[0]) == sorted(alike[0], key=lambda row: row != 0) and alike.shape[1] == 5",
}
"""What holds after the lines of each audience; a heading without an entry is a line that nobody has tried."""
QUICK = ("Python", "scikit-learn")
"""The others take long (importing transformers, MONAI, tracing); each exporter has quicker tests of its own."""


def audiences() -> dict[str, tuple[list[str], str]]:
    """Heading -> (commands, Python code) of the section."""
    section = README.split(TITLE)[1].split("\n## ")[0]
    found = {}
    for part in section.split("\n### ")[1:]:
        heading, body = part.split("\n", 1)
        code = "\n".join(re.findall(r"```python\n(.*?)```", body, flags=re.DOTALL))
        plain = re.sub(r"```.*?```", "", body, flags=re.DOTALL)
        shell = "\n".join(line[4:] for line in plain.splitlines() if line.startswith("    ")).replace("\\\n", " ")
        found[heading] = (shell.splitlines(), code)
    return found


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder as the section has it: `runs/a` of scenes, `runs/b` and `runs/c` that segment scenes and CT."""
    folder = tmp_path_factory.mktemp("readme")
    for seed in range(2):
        landsat_scene(folder / "scenes" / f"{seed}.tif", None, seed=seed)
    landsat_scene(folder / "scene.tif", None, seed=0)
    random_encoder(folder / "runs" / "a" / "encoder", "landsat7", folder / "scene.tif")
    index = open_archive([folder / "scene.tif"], ["landsat7"])
    save_task_model(folder / "runs" / "b", task_model(index, "linear", "segment", crop=(64, 64)), Seen.nothing())
    slices = np.random.default_rng(0).integers(800, 1400, (6, 20, 24)).astype(np.uint16)
    write_series(folder / "series", slices, step=(0.0, 0.5, 2.0))
    mr_volume(folder / "volumes" / "a.nii.gz", None)
    index = open_archive([folder / "series"], ["ct"])
    save_task_model(folder / "runs" / "c", task_model(index, "linear", "segment", crop=(4, 16, 16)), Seen.nothing())
    return folder


def run(line: str, place: Path) -> None:
    """Run a command of the README: our own in this process, another program's in another."""
    words = shlex.split(line, comments=True)
    if not words:
        return
    if words[0] == "geomed-mae":
        done = CliRunner().invoke(main, words[1:])
        assert done.exit_code == 0, (line, done.output)
        return
    assert words[:2] == ["python", "-m"], f"what is {line!r}?"
    code = f"""
        import os, runpy, sys
        os.chdir({str(place)!r})
        sys.argv = {words[2:]!r}
        runpy.run_module(sys.argv[0], run_name="__main__")
        print(0)
    """
    elsewhere(code)


@pytest.mark.parametrize(
    "heading", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CHECKS]
)
def test_the_lines_of_an_audience_run_as_they_stand(place, monkeypatch, heading):
    commands, code = audiences()[heading]
    monkeypatch.chdir(place)
    for line in commands:
        run(line, place)
    if heading == "TorchGeo" and importlib.util.find_spec("torchgeo") is None:
        pytest.skip("torchgeo is not installed: the commands have run, tests/exporters/test_torchgeo.py opens the file")
    code = f"{code}\n{CHECKS[heading]}"
    if heading == "Python":
        exec(compile(code, "README.md", "exec"), {})
    elif code.strip():
        elsewhere(f"import os, pathlib\nos.chdir({str(place)!r})\n{code}\nprint(0)")


def test_every_audience_is_tried():
    assert list(audiences()) == list(CHECKS)


def test_every_export_target_is_in_the_readme():
    names = [name.replace("_", "-") for name in plugin_names("exporters", marker="export")]
    assert [name for name in names if f"`{name}`" not in README] == []
    assert [name for name in names if f"--to {name} " not in README.split(TITLE)[1] and name != "native"] == []
