"""Runs of a study without training: folders as fine-tuning leaves them, with scores drawn from a plan."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.index import Row
from geomed_mae.recipe_file import build_recipe, dump_recipe
from geomed_mae.scoring.classification import ClassificationScores
from geomed_mae.scoring.segmentation import SegmentationScores
from geomed_mae.scoring.stored import save_scores

CLASSES = ("background", "anterior", "posterior")
MR = {
    "data": {"modality": ["mr"], "crop_3d": [16, 16, 16]},
    "model": {"depth": 1, "patch_3d": [4, 4, 4]},
    "head": {"task": "segment", "classes": list(CLASSES)},
    "labels": {"shots": 4, "validation": 0.25},
    "train": {"steps": 400, "validate_every": 50, "seeds": 3},
}
XRAY = {
    "data": {"modality": ["xray"], "crop_2d": [28, 28]},
    "model": {"depth": 1, "patch_2d": [4, 4]},
    "head": {"task": "classify", "classes": ["normal", "pneumonia"]},
    "labels": {"shots": 32},
    "train": {"steps": 400, "seeds": 3},
}


def recipe(base: dict[str, Any] = MR, **train: Any):
    """Return a recipe of a study; `train` changes its keys."""
    return build_recipe({**base, "train": {**base["train"], **train}})


def row(number: int, geometry: str = "volume", group: str | None = None) -> Row:
    """Return a row of an index without pixels."""
    spacing = {"volume": (1.0, 1.0, 1.0), "raster": (10.0, 10.0), "plane": None}[geometry]
    return Row(
        key=f"{number:08x}key",
        modality="mr",
        channels=(),
        shape=(8,) * (3 if geometry == "volume" else 2),
        dtype="int16",
        geometry=geometry,
        spacing=spacing,
        crs=None,
        footprint=None,
        valid_fraction=1.0,
        statistics=(),
        group=hashlib.md5(str(number).encode()).hexdigest() if group is None else group,
        content="c",
        flags=(),
    )


class Patients:
    """The part of an index that a study looks at: every image names its patient."""

    @staticmethod
    def identity(key: str) -> tuple[tuple[str, str], ...]:
        return (("patient", key),)


@dataclass
class FakeTask:
    """The part of a task that a study looks at."""

    patients: int = 20
    geometry: str = "volume"
    fingerprint: str = "data"
    index: Patients = field(default_factory=Patients)
    train: tuple = ()
    test: tuple = ()

    def __post_init__(self) -> None:
        self.test = tuple((row(number, self.geometry), np.zeros(1)) for number in range(self.patients))


@dataclass
class FakeTune:
    """Makes a member's folder; scores are `base` + `gain` (if pretrained) + what patient, seed and run add."""

    gain: float = 0.09
    base: float = 0.65
    of_seeds: float = 0.01
    of_runs: float = 0.02
    frozen: bool = False
    stop_at: int | None = None
    transductive: int | None = None
    summarised: bool = True
    calls: list[dict[str, Any]] = field(default_factory=list)

    def __call__(self, recipe, task, encoder, out, *, twin_of, transductive, resume, overwrite) -> dict[str, Any]:
        if self.stop_at is not None and len(self.calls) >= self.stop_at:
            raise KeyboardInterrupt
        call = {"recipe": recipe, "encoder": encoder, "out": Path(out), "twin_of": twin_of}
        self.calls.append({**call, "transductive": transductive, "resume": resume, "overwrite": overwrite})
        pretrained, seed = encoder != "none", recipe.train.seed
        out = Path(out)
        out.mkdir(parents=True)
        scores = self.scores(recipe, task, pretrained, seed) if task.test else None
        (out / "recipe.resolved.yaml").write_text(dump_recipe(recipe))
        (out / "environment.json").write_text(json.dumps({"python": "3.11", "archive": {"fingerprint": "data"}}))
        validated = recipe.train.validate_every is not None
        lines = list(self.metrics(recipe, pretrained, seed))
        (out / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        best = max((line for line in lines if "validation" in line), key=lambda line: line["validation"], default={})
        summary = {
            "verb": "finetune",
            "task": recipe.head.task,
            "steps": recipe.train.steps,
            "loss_first": 1.2,
            "loss_last": lines[-2]["loss"] if validated else lines[-1]["loss"],
            "seconds": 61.5 + seed,
            "samples_per_second": 52.0,
            "skipped_steps": 0,
            "encoder": "pretrained" if pretrained else "random weights",
            "twin": twin_of is not None,
            "frozen": self.frozen,
            "labels": {"images": 87, "labelled": 87},
            "split": self.split(task, recipe),
            "few": self.few(recipe, seed),
            "validation": {
                "metric": "m",
                "best": best["validation"],
                "step": best["step"],
                "scored": 8,
                "stopped_early": False,
            }
            if validated
            else None,
            "test": scores.summary() if scores is not None and self.summarised else None,
            "leakage": {
                "images": task.patients,
                "compared_with": {"training": 5, "pretraining": 67 if pretrained else 0},
                "kinds": ["same patient", "same pixels", "near duplicate", "footprint"],
            },
        }
        if transductive:
            summary["transductive"] = {"allowed": True, "test_images_pretrained_on": self.transductive or 0}
        if scores is not None:
            save_scores(out / "scores.json", scores)
        (out / "summary.json").write_text(json.dumps(summary))
        return {"run": str(out), **summary}

    def split(self, task, recipe) -> dict[str, Any]:
        """Return the numbers of images by part."""
        counts = {"train": 64 if recipe.head.task == "classify" else 3, "validation": 1, "test": task.patients}
        return {"unit": "stored", **counts, "groups": dict(counts)}

    def few(self, recipe, seed: int) -> dict[str, Any] | None:
        """Return what was drawn of the labels."""
        if recipe.labels.shots is None:
            return None
        classes = 2 if recipe.head.task == "classify" else 1
        images = recipe.labels.shots * classes
        return {"shots": recipe.labels.shots, "seed": seed, "images": images, "groups": images, "of_images": 67,
                "of_groups": 67}  # fmt: skip

    def metrics(self, recipe, pretrained: bool, seed: int):
        """Yield lines of metrics.jsonl: a loss that falls and a validation score that rises and then stays."""
        rng = np.random.default_rng(17 * seed + pretrained)
        for step in range(10, recipe.train.steps + 1, 10):
            loss = 0.25 + np.exp(-step / (90 if pretrained else 160)) + 0.03 * rng.normal()
            yield {"step": step, "loss": float(loss), "lr": 1e-3 * (1 - step / recipe.train.steps),
                   "samples_per_second": 52.0, "data_wait": 0.01}  # fmt: skip
            every = recipe.train.validate_every
            if every and step % every == 0:
                top = self.base + (self.gain if pretrained else 0)
                value = top * (1 - np.exp(-step / (60 if pretrained else 110))) + 0.01 * rng.normal()
                yield {"step": step, "validation": float(np.clip(value, 0, 1))}

    def scores(self, recipe, task, pretrained: bool, seed: int):
        """Return scores of the test images."""
        common, own = np.random.default_rng(0), np.random.default_rng([seed, int(pretrained)])
        hard = 0.08 * common.normal(size=task.patients)
        helped = 0.03 * common.normal(size=task.patients)
        level = self.base + hard + self.of_seeds * np.random.default_rng([5, seed, pretrained]).normal()
        level = level + (self.gain + helped if pretrained else 0)
        if recipe.head.task == "classify":
            return self._classified(recipe, task, float(level.mean()), own)
        images = []
        for number, (entry, _) in enumerate(task.test):
            dices = [level[number] + shift + self.of_runs * own.normal() for shift in (0.03, -0.03)]
            images.append(_image(entry, np.clip(dices, 0.0, 1.0)))
        plain = {"task": "segment", "classes": list(CLASSES), "surfaces": True, "images": images}
        return SegmentationScores.from_json(plain)

    def _classified(self, recipe, task, level: float, rng):
        scores = ClassificationScores(recipe.head.classes)
        for number, (entry, _) in enumerate(task.test):
            truth = number % 2
            chance = 1 / (1 + np.exp(-(truth * 2 - 1) * 4 * (level - 0.5) - 1.2 * rng.normal()))
            scores.add_image(entry.key, entry.group, np.array([1 - chance, chance]), truth)
        return scores


def _image(entry: Row, dices: np.ndarray) -> dict[str, Any]:
    """Return an image whose classes have these Dice scores."""
    size = 1000
    counts = np.zeros((3, 3), dtype=int)
    counts[0, 0] = 20 * size
    for number, dice in enumerate(dices, start=1):
        hit = round(dice * size)
        counts[number, number] = hit
        counts[number, 0] = counts[0, number] = size - hit
    far = [[None, None], *([round(8 * (1 - dice), 3), round(2 * (1 - dice), 3)] for dice in dices)]
    return {"key": entry.key, "group": entry.group, "confusion": counts.tolist(), "unpredicted": 0, "distances": far,
            "unit": "mm", "calibration": None}  # fmt: skip
