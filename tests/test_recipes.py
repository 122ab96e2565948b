"""Every recipe parses, names its command and its data card, and runs two steps."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from geomed_mae.archives.card import read_card
from geomed_mae.config import load_recipe
from geomed_mae.errors import ConfigError
from geomed_mae.finetune import finetune
from geomed_mae.modalities import load_modality
from geomed_mae.pretrain import pretrain
from tests.make_data import write_geotiff, write_nifti

ROOT = Path(__file__).resolve().parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
CARDS = sorted((ROOT / "data_cards").glob("[!_]*.md"))
TWO_STEPS = ["train.steps=2", "train.batch_size=2", "train.log_every=1"]


def header(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if line.startswith("#"))


def archive(folder: Path, modality: str) -> None:
    """Put a small image of a modality into `folder`: 3 to 13 bands, or a volume."""
    rng = np.random.default_rng(0)
    meaning = load_modality(modality)
    if meaning.geometry == "raster":
        bands = rng.integers(1, 250, (len(meaning.channels), 128, 128)).astype(np.uint8)
        names = [channel.name for channel in meaning.channels]
        write_geotiff(folder / f"{modality}.tif", bands, descriptions=names)
    else:
        write_nifti(folder / f"{modality}.nii", rng.normal(0, 300, (104, 104, 36)).astype(np.int16))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_names_its_command_its_hardware_and_its_data_card(path):
    text = header(path)
    verb = load_recipe(path).verb
    assert path.stem.startswith(f"{verb}_")
    assert f"geomed-mae {verb} {path.stem}" in text or "geomed-mae demo" in text
    assert "CPU core" in text and "PENDING" not in text
    cards = re.findall(r"data_cards/([\w-]+\.md)", text)
    assert cards, "no data card is named"
    for card in cards:
        read_card(ROOT / "data_cards" / card)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_runs_two_steps(path, tmp_path):
    recipe = load_recipe(path, TWO_STEPS)
    data = tmp_path / "archive"
    data.mkdir()
    indexes = []
    for modality in recipe.data.modality:
        (data / modality).mkdir()
        archive(data / modality, modality)
        if len(recipe.data.modality) > 1:
            # NIfTI does not say which of several modalities it is; an index does.
            from geomed_mae.scan import scan

            scan([data / modality], tmp_path / f"index-{modality}", modality=modality)
            indexes.append(tmp_path / f"index-{modality}")
    if recipe.verb == "pretrain":
        result = pretrain(recipe, indexes or [data], tmp_path / "run")
        assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()
        assert result["steps"] == 2 and np.isfinite(result["loss_last"])
        return
    labels = tmp_path / "labels"
    labels.mkdir()
    classes = len(recipe.head.classes)
    for modality in recipe.data.modality:
        # Every class stands in every block and every held-out part.
        if load_modality(modality).geometry == "raster":
            write_geotiff(labels / f"{modality}.tif", (np.indices((128, 128)).sum(0) // 8 % classes).astype(np.uint8))
        else:
            marks = (np.indices((104, 104, 36)).sum(0) // 8 % classes).astype(np.uint8)
            write_nifti(labels / f"{modality}.nii", marks)
            write_nifti(labels / "second.nii", marks)
            write_nifti(
                data / modality / "second.nii", np.random.default_rng(1).normal(0, 9, (104, 104, 36)).astype("f4")
            )
    finetune(recipe, [data], labels, "none", tmp_path / "run")
    assert (tmp_path / "run" / "summary.json").is_file()


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
