"""The verb demo: the main job, on real images, in a few minutes on a CPU.

One Landsat 7 scene travels with the package; the CT and MR files are those that pydicom and nibabel install (see
data_cards/). Everything is read where it lies and written below one output folder.
"""

from __future__ import annotations

import importlib.util
import io
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.build import Progress
from geomed_mae.embed import embed
from geomed_mae.errors import ConfigError, IntegrityError, MissingExtraError
from geomed_mae.export import export
from geomed_mae.finetune import finetune
from geomed_mae.image import Image
from geomed_mae.predict import predict
from geomed_mae.pretrain import pretrain
from geomed_mae.readers import read_images, read_labels
from geomed_mae.readers.geotiff.grid import native_grid
from geomed_mae.readers.geotiff.open import opened
from geomed_mae.recipe_file import load_recipe
from geomed_mae.reporting.page import Figure, Section, picture, write_page
from geomed_mae.reporting.section import run_section
from geomed_mae.scan import scan
from geomed_mae.writers import cog

SCENE = Path(__file__).parent / "demo_data" / "L7_ETMs.tif"
MARKER = "demo.json"
WATER = ("land", "water")
BROKEN_ON_PURPOSE = 1.0
"""Error budget of the medical samples: they are test files, many of them broken on purpose."""


def _installed(package: str, *parts: str) -> Path:
    """Return a path inside an installed package without importing it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError("the demo", package, "all")
    return Path(spec.submodule_search_locations[0]).joinpath(*parts)


def _fresh(out: Path) -> None:
    """Empty the output folder, when it is a demo's."""
    if out.exists() and any(out.iterdir()):
        if not (out / MARKER).is_file():
            raise ConfigError(f"'{out}' holds something else; choose another --out")
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    (out / MARKER).write_text("{}\n", encoding="utf-8")


def water_mask(scene: Image) -> Image:
    """Return a mask of water, MNDWI = (green - SWIR) / (green + SWIR) > 0 (Xu 2006), as an Image of the same grid."""
    by_wavelength = {channel.wavelength_nm: scene.array[number] for number, channel in enumerate(scene.channels)}
    green = by_wavelength[min(by_wavelength, key=lambda nm: abs((nm or 0) - 560))]
    swir = by_wavelength[min(by_wavelength, key=lambda nm: abs((nm or 0) - 1650))]
    water = (green - swir) > 0  # the sign of the index is that of its numerator
    return replace(scene, array=water[None].astype(np.float32), channels=scene.channels[:1])


def demo(out: str | Path, *, say: Callable[[str], None], progress: Progress) -> dict[str, Any]:
    """Run the demo.

    Args:
        out: folder for everything it makes; a former demo in it is replaced.
        say: shows one line to the user.
        progress: wraps long passes to show how far they are.

    Returns:
        the paths of the results and the numbers that matter.

    Raises:
        ConfigError: `out` holds something that is no demo, or a needed package is missing.
        IntegrityError: the prediction does not lie on the scene's grid.
    """
    start = time.perf_counter()
    out = Path(out)
    _fresh(out)

    say("1/7 scan: a Landsat 7 scene, and the DICOM and NIfTI files that pydicom and nibabel install")
    indexes = [out / "index-landsat7", out / "index-dicom", out / "index-nifti"]
    archives = (
        (SCENE, ["landsat7"]),
        (_installed("pydicom", "data", "test_files"), ["ct", "mr"]),
        (_installed("nibabel", "tests", "data", "example4d.nii.gz"), ["mr"]),
    )
    for folder, (path, modality) in zip(indexes, archives, strict=True):
        index = scan([path], folder, modality=modality, max_bad=BROKEN_ON_PURPOSE, progress=progress)
        say(f"    {'/'.join(modality)}: {len(index)} images; {index.ledger.summary()}")

    say("2/7 pretrain: one encoder on 2D multispectral pixels and 3D volumes")
    pretrained = pretrain(load_recipe("pretrain_demo_tiny"), indexes, out / "pretrain")
    say(f"    loss {pretrained['loss_first']:.3f} -> {pretrained['loss_last']:.3f}")

    say("3/7 finetune: a water mask, labels by a spectral index (see data_cards/landsat7-olinda.md)")
    scene = read_images(SCENE, "landsat7")[0]
    mask = water_mask(scene)
    labels = cog.write(out / "labels" / "L7_ETMs.tif", mask.array[0].astype(np.uint8), scene.geometry, WATER)
    # Pretrained on the very scene: blocks that are scored were seen without labels, and the summary says so.
    finetuned = finetune(
        load_recipe("finetune_demo_water"),
        [indexes[0]],
        labels,
        str(out / "pretrain"),
        out / "finetune",
        transductive=True,
    )

    say("4/7 predict: the whole scene to a GeoTIFF on the scene's own grid")
    predicted = predict(out / "finetune", [SCENE], out / "predictions", format="cog")
    overlay = _check_overlay(Path(predicted["predictions"][0]["output"]), scene)

    say("5/7 embed: one vector an image, and the scene's token grid")
    embedded = embed(out / "pretrain", [indexes[0]], out / "embeddings", dense=True)

    say("6/7 export: the encoder as an ordinary timm model")
    exported = export(out / "pretrain", "timm", out / "timm", modality="landsat7")
    say(f"    largest relative difference of its features: {exported['largest_relative_difference']:.1e}")

    say("7/7 report")
    sections = [run_section(out / "pretrain", "Pretraining"), run_section(out / "finetune", "Fine-tuning")]
    sections.append(_results(scene, mask.array[0] > 0, overlay, exported))
    lead = "One encoder from a satellite scene and a folder of medical files, on a CPU, from nothing."
    report = write_page(out / "report.html", "geomed-mae demo", lead, sections)
    seconds = time.perf_counter() - start
    result = {
        "report": str(report),
        "encoder": pretrained["encoder"],
        "prediction": predicted["predictions"][0]["output"],
        "embeddings": embedded,
        "timm": str(out / "timm"),
        "loss_first": pretrained["loss_first"],
        "loss_last": pretrained["loss_last"],
        "water": finetuned["test"],
        "timm_largest_relative_difference": exported["largest_relative_difference"],
        "seconds": round(seconds, 1),
    }
    (out / MARKER).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    say(f"done in {seconds:.0f} s; open {report}")
    return result


def _check_overlay(path: Path, scene: Image) -> np.ndarray:
    """Read the predicted classes back, int16 (rows, columns), and hold their grid against the scene's, to the bit."""
    with opened(path, labels=True) as (dataset, structure):
        geometry, _ = native_grid(dataset, structure, path)
        shape = dataset.shape
    if shape != scene.spatial_shape or geometry != scene.geometry:
        raise IntegrityError(f"the prediction {path.name} does not lie on the scene's grid")
    return read_labels(path, scene).array


def _stretch(band: np.ndarray) -> np.ndarray:
    low, high = np.percentile(band, (2, 98))
    return np.clip((band - low) / max(high - low, 1e-6), 0, 1)


def _results(scene: Image, mask: np.ndarray, prediction: np.ndarray, exported: dict[str, Any]) -> Section:
    """Draw scene, label and prediction side by side."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = {channel.name: number for number, channel in enumerate(scene.channels)}
    colour = np.stack([_stretch(scene.array[names[name]]) for name in ("B3", "B2", "B1")], axis=-1)
    water = prediction == WATER.index("water")
    wrong = np.where(mask == water, 0.0, 1.0)
    figure, axes = plt.subplots(1, 4, figsize=(14, 3.9), layout="constrained")
    shown = (
        (colour, "scene (red, green, blue)"),
        (mask, "label: MNDWI > 0"),
        (water, "prediction"),
        (wrong, "differences"),
    )
    for axis, (panel, title) in zip(axes, shown, strict=True):
        axis.imshow(panel, cmap="Blues" if panel.ndim == 2 else None, interpolation="nearest")
        axis.set_title(title, fontsize=10)
        axis.set_axis_off()
    data = io.BytesIO()
    figure.savefig(data, format="png", dpi=110)
    plt.close(figure)
    section = Section("Results", "The whole scene, and the exported encoder.")
    section.tiles = [
        ("pixels that agree with the label, whole scene", f"{(mask == water).mean():.2%}"),
        ("largest relative difference of the timm export", f"{exported['largest_relative_difference']:.1e}"),
    ]
    caption = (
        "Part of this scene was trained on: agreement here is no measure of quality; see the held-out blocks above."
    )
    section.figures = [Figure("Water in the whole scene", picture(data.getvalue()), caption)]
    return section
