"""Every recipe parses, names its command, hardware and time, holds together, says only what differs, and runs."""

from __future__ import annotations

import math
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from geomed_mae.archives.card import read_card
from geomed_mae.config import Recipe
from geomed_mae.errors import ConfigError
from geomed_mae.finetune import finetune
from geomed_mae.modalities import load_modality
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.spec import SIZES, ModelSpec
from geomed_mae.pretrain import pretrain
from geomed_mae.recipe_file import load_recipe
from geomed_mae.safe_yaml import read_yaml
from geomed_mae.scan import scan
from tests.make_data import write_geotiff, write_nifti
from tests.make_dicom import uid, write_series
from tests.make_pictures import write_png

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
PRETRAIN = [path for path in RECIPES if path.stem.startswith("pretrain_")]
FINETUNE = [path for path in RECIPES if path.stem.startswith("finetune_")]
LARGER = [path for path in PRETRAIN if path.stem.endswith(("_base", "_large"))]
SLOW = [path for path in PRETRAIN if path in LARGER or path.stem in ("pretrain_eo_tiny", "pretrain_medical_tiny")]
"""Whose two steps are left to the marked run; pretrain_demo_tiny stands for mixed archives in the default one."""
CARDS = sorted((ROOT / "data_cards").glob("[!_]*.md"))
SENSORS = ["sentinel2_l2a", "sentinel2_l1c", "landsat7", "landsat8", "naip", "sentinel1", "enmap_l2a", "eo"]
SCANNERS = ["ct", "mr", "mr_multisequence", "xray", "mammography", "ultrasound", "pet_ct", "medical"]
"""Archives that the README promises recipes for, tiny ones at least."""

VOXELS = (48, 64, 40)
"""Of NIfTI files (columns, rows, slices)."""

SEQUENCES = {"RepetitionTime": (500, 4000), "EchoTime": (15, 90)}
"""Spin echoes whose timing makes them T1 and T2."""


def header(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


def shapes(recipe: Recipe) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Return (crop, patch) of 2D and of 3D images, those that the recipe has."""
    pairs = ((recipe.data.crop_2d, recipe.model.patch_2d), (recipe.data.crop_3d, recipe.model.patch_3d))
    return [(crop, patch) for crop, patch in pairs if crop]


def write_archive(folder: Path, modality: str) -> None:
    """Put a small image of a modality into `folder`, as such images come: GeoTIFF, NIfTI, DICOM series or PNG."""
    rng = np.random.default_rng(zlib.crc32(modality.encode()))
    meaning = load_modality(modality)
    if meaning.geometry == "plane":
        write_png(folder / "image.png", rng.integers(0, 250, (80, 80)), 0)
    elif meaning.geometry == "raster":
        low, high = stored_range(modality)
        side = 128 if len(meaning.channels) < 100 else 32
        bands = rng.integers(low, high, (len(meaning.channels), side, side)).astype(
            np.uint8 if high < 256 else np.int16
        )
        names = [channel.name for channel in meaning.channels]
        if modality == "sentinel1":
            bands = rng.normal(-14, 4, bands.shape).astype(np.float32)
        write_geotiff(folder / f"{modality}.tif", bands, descriptions=names)
    elif "nifti" in meaning.formats:
        write_nifti(folder / f"{modality}.nii", rng.normal(0, 300, VOXELS).astype(np.int16))
    else:
        volume = rng.integers(1, 900, (16, 64, 64)).astype(np.int16)
        if modality == "pet-ct":
            write_series(folder / "ct", volume, Modality="CT")
            tags = {"Modality": "PT", "Units": "BQML", "RescaleSlope": "0.5", "RescaleIntercept": "0"}
            write_series(folder / "pt", volume[:, ::2, ::2], spacing=(2.0, 2.0), SeriesInstanceUID=uid("pt"), **tags)
        else:
            for number in range(2):
                timing = {name: values[number] for name, values in SEQUENCES.items()}
                tags = {"Modality": "MR", "ScanningSequence": "SE", "SeriesInstanceUID": uid("mr", number), **timing}
                write_series(folder / str(number), volume + number, **tags)


def stored_range(modality: str) -> tuple[int, int]:
    """Return stored numbers of ordinary ground: 8-bit numbers, or reflectances of 0.02 to 0.4."""
    meaning = load_modality(modality)
    if meaning.unit != "reflectance":
        return 1, 250
    low, high = ((value - meaning.offset) / meaning.scale for value in (0.02, 0.4))
    return round(low), round(high)


@pytest.fixture(scope="session")
def index_of(tmp_path_factory):
    """Return an index of one small image of a modality, made once."""
    made: dict[str, Path] = {}

    def find(modality: str) -> Path:
        if modality not in made:
            folder = tmp_path_factory.mktemp(f"archive-{modality}")
            write_archive(folder, modality)
            made[modality] = tmp_path_factory.mktemp(f"index-{modality}") / "index"
            scan([folder], made[modality], modality=modality, workers=1)
        return made[modality]

    return find


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_command_its_hardware_its_time_and_what_to_expect(path):
    text = header(path)
    verb = load_recipe(path).verb
    assert path.stem.startswith(f"{verb}_")
    assert re.search(rf"geomed[-_]mae {verb} {path.stem}\s", text) or "geomed-mae demo" in text
    for field in ("What: ", "Hardware: ", "Time: ", "Expect"):
        assert field in text, f"the header has no '{field}'"
    assert ("CPU core" in text or "GPU" in text) and "PENDING" not in text
    cards = re.findall(r"data_cards/([\w-]+\.md)", text)
    assert cards or "not measured" in text, "no data card is named"
    for card in cards:
        read_card(ROOT / "data_cards" / card)


def test_there_is_a_recipe_for_every_archive_that_was_promised_and_the_headers_name_recipes_that_exist():
    names = {path.stem for path in RECIPES}
    assert {f"pretrain_{name}_tiny" for name in (*SENSORS, *SCANNERS)} <= names
    for path in RECIPES:
        mentioned = set(re.findall(r"\b(?:pretrain|finetune)_\w+?_(?:tiny|base|large)\b", header(path)))
        assert mentioned <= names, path.name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_that_extends_another_says_only_what_differs(path):
    own = read_yaml(path)
    parent = own.pop("extends", None)
    if parent is None:
        return
    base, changed = load_recipe(path.parent / parent).model_dump(), load_recipe(path).model_dump()
    for section, values in own.items():
        for key in values:
            assert changed[section][key] != base[section][key], f"{section}.{key} is {parent}'s already"


@pytest.mark.parametrize("path", PRETRAIN, ids=lambda path: path.stem)
def test_crops_patches_and_reference_of_a_recipe_fit_its_modalities(path):
    recipe = load_recipe(path)
    geometries = {load_modality(name).geometry for name in recipe.data.modality}
    assert (recipe.data.crop_2d is not None) == bool(geometries & {"raster", "plane"})
    assert (recipe.data.crop_3d is not None) == ("volume" in geometries)
    for crop, patch in shapes(recipe):
        tokens = math.prod(size // step for size, step in zip(crop, patch, strict=True))
        assert 36 <= tokens <= 2048, f"{tokens} patches a crop"
    if recipe.data.weights:
        assert set(recipe.data.weights) == set(recipe.data.modality)
    # Positions in metres and mm, where images of different spacing meet.
    if path in LARGER:
        assert (recipe.model.reference_gsd_m is not None) == ("raster" in geometries)
        assert (recipe.model.reference_spacing_mm is not None) == bool(geometries & {"volume", "plane"})


@pytest.mark.parametrize("path", LARGER, ids=lambda path: path.stem)
def test_a_larger_recipe_builds_its_model_and_shares_out_its_batch(path):
    recipe = load_recipe(path)
    size = path.stem.rpartition("_")[2]
    ranks = 8 if size == "large" else 1
    command = header(path).partition("Hardware")[0]
    assert (f"torchrun --nproc-per-node {ranks} -m geomed_mae" in command) == (ranks > 1)
    assert recipe.model.size == size and recipe.train.batch_size % (ranks * recipe.train.accumulate) == 0
    with torch.device("meta"):
        mae = MaskedAutoencoder.from_spec(ModelSpec.from_config(recipe.model))
    dim, depth, _ = SIZES[size]
    blocks = sum(parameter.numel() for parameter in mae.encoder.blocks.parameters())
    assert math.isclose(blocks, 12 * depth * dim**2, rel_tol=0.01), "not the size of timm's ViT"
    assert recipe.train.lr == pytest.approx(1.5e-4 * recipe.train.batch_size / 256), "not the published rate"
    assert recipe.train.steps % recipe.train.keep_every == 0


@pytest.mark.parametrize("path", LARGER, ids=lambda path: path.stem)
def test_the_loader_of_a_larger_recipe_fits_the_memory_of_a_machine(path):
    recipe, largest = load_recipe(path), 0
    for modality in map(load_modality, recipe.data.modality):
        crop = recipe.data.crop_3d if modality.geometry == "volume" else recipe.data.crop_2d
        stored = 2 if modality.name == "enmap-l2a" else 4  # one file of integers; scenes and volumes come as float32
        largest = max(largest, math.prod(crop) * (1 + len(modality.channels) * stored))
    window = largest * recipe.train.batch_size * recipe.data.shuffle_steps
    # In every worker one in the making and one before it, and two on their way from it.
    assert 4 * (recipe.data.workers + 1) * window < 128 * 2**30, f"{window / 2**30:.1f} GiB a window"


def reduced(path: Path) -> Recipe:
    """Load a recipe for two steps of two small crops; larger ones with a small model too."""
    small = ["train.steps=2", "train.batch_size=2", "train.log_every=1", "train.accumulate=1", "data.workers=0"]
    full = load_recipe(path)
    if full.verb == "pretrain":
        for name in ("2d", "3d"):
            crop, patch = getattr(full.data, f"crop_{name}"), getattr(full.model, f"patch_{name}")
            if crop:
                fewer = [min(size, 4 * step) for size, step in zip(crop, patch, strict=True)]
                small.append(f"data.crop_{name}={fewer}")
        small += ["model.size=tiny", "model.depth=1", "model.decoder_dim=32", "model.decoder_depth=1"]
        small += ["train.sharding=replicated", "data.min_valid=0.01"]
    return load_recipe(path, small)


@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=pytest.mark.slow if path in SLOW else (), id=path.stem) for path in PRETRAIN],
)
def test_a_pretraining_recipe_runs_two_steps(path, tmp_path, index_of):
    recipe = reduced(path)
    result = pretrain(recipe, [index_of(name) for name in recipe.data.modality], tmp_path / "run")
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()
    assert result["steps"] == 2 and np.isfinite(result["loss_last"])


def write_labelled(data: Path, labels: Path, recipe: Recipe) -> Path:
    """Write an archive that a fine-tuning recipe can be split on, and labels with every class in every block."""
    modality, classes = recipe.data.modality[0], len(recipe.head.classes)
    meaning = load_modality(modality)
    stored = {number: value for value, number in (recipe.labels.values or {}).items()}
    values = np.array([stored.get(number, number) for number in range(classes)], dtype=np.uint8)
    rng = np.random.default_rng(1)
    if recipe.head.task == "classify":
        for number in range(6):
            write_png(data / f"{number}.png", rng.integers(0, 250, (40, 40)), 0)
        rows = [f"{number}.png,{recipe.head.classes[number % classes]}" for number in range(6)]
        (labels / "classes.csv").write_text("\n".join(["image,class", *rows]))
        return labels / "classes.csv"
    for number in range(1 if recipe.labels.block_px else 3):
        if meaning.geometry == "raster":
            low, high = stored_range(modality)
            bands = rng.integers(low, high, (len(meaning.channels), 128, 128)).astype("u1" if high < 256 else "i2")
            at = (10.0, 0.0, 500_000.0 + 50_000 * number, 0.0, -10.0, 4_000_000.0)
            names = [channel.name for channel in meaning.channels]
            write_geotiff(data / f"{number}.tif", bands, descriptions=names, transform=at)
            marks = values[np.indices((128, 128)).sum(0) // 8 % classes]
            write_geotiff(labels / f"{number}.tif", marks, transform=at)
        else:
            write_nifti(data / f"{number}.nii", rng.normal(0, 300, VOXELS).astype(np.int16))
            write_nifti(labels / f"{number}.nii", values[np.indices(VOXELS).sum(0) // 8 % classes])
    return labels


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=pytest.mark.slow if "abdomen" in path.stem else (), id=path.stem)
        for path in FINETUNE
        if "pet_ct" not in path.stem
    ],
)
def test_a_finetuning_recipe_runs_two_steps(path, tmp_path):
    recipe = reduced(path)
    (tmp_path / "archive").mkdir()
    (tmp_path / "labels").mkdir()
    labels = write_labelled(tmp_path / "archive", tmp_path / "labels", recipe)
    result = finetune(recipe, [tmp_path / "archive"], labels, "none", tmp_path / "run")
    assert result["steps"] == 2 and np.isfinite(result["loss_last"])
    assert result["test"]["value"] is not None


@pytest.mark.slow
@pytest.mark.data
def test_the_recipe_of_sarcoma_runs_on_pet_ct_and_the_structures_of_the_planning_system(tmp_path, shared_data):
    recipe = reduced(ROOT / "recipes" / "finetune_pet_ct_sarcoma.yaml")
    archive = shared_data / "med" / "sarcoma"
    scan([archive], tmp_path / "index", modality="pet-ct", workers=2, max_bad=0.5)
    result = finetune(recipe, [tmp_path / "index"], archive, "none", tmp_path / "run")
    assert result["labels"]["images_labelled"] == 3
    assert result["split"]["groups"] == {"train": 2, "validation": 0, "test": 1}


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_a_data_card_is_complete_and_used(path):
    front = read_card(path)
    assert front["name"] == path.stem
    assert "More Information Needed" not in path.read_text()
    folder = str(front.get("folder", "")).rpartition("/")[2]
    tests = [file.read_text() for file in (ROOT / "tests").rglob("test_*.py")] if folder else []
    used = any(path.name in recipe.read_text() for recipe in RECIPES) or any(
        f'"{folder}' in text or f"/{folder}" in text for text in tests
    )
    assert used, "no recipe and no test uses this data"
    for name in str(front["modality"]).split(", "):
        load_modality(name)


def test_a_card_without_a_licence_is_refused(tmp_path):
    text = (ROOT / "data_cards" / "ct-abdomen.md").read_text()
    (tmp_path / "card.md").write_text(re.sub(r"licence:.*\n", "", text))
    with pytest.raises(ConfigError, match="card.md: the front matter has no 'licence'"):
        read_card(tmp_path / "card.md")


def test_a_card_without_front_matter_is_refused(tmp_path):
    (tmp_path / "card.md").write_text("# nothing\n")
    with pytest.raises(ConfigError, match="is no data card"):
        read_card(tmp_path / "card.md")
