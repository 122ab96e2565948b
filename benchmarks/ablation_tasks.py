"""Data and frozen probes of `ablations.py`: three small labelled sets of real images, held in memory.

| task | images | crop, patch | asked of each patch (image) |
|---|---|---|---|
| fires | 12 Sentinel-2 scenes, bands B02, B03, B04, B08, B12, in 11 groups | 48 x 48, 4 x 4 | burned share |
| hippocampus | 87 MR volumes | 24 x 24 x 24, 4 x 4 x 4 | shares of three classes |
| xray | 2,428 chest X-rays, equal ones in one group | 28 x 28, 4 x 4 | (pneumonia) |

Images are read by the package's readers and scaled by its contract, once. A split is by group and by seed; whatever
learns, with labels or without, sees the training groups alone. A probe is a ridge regression in closed form whose
strength is chosen by cross-validation over training groups (images of X-ray). Scores on the test groups:

- fires: area under the ROC curve of patches burned by more than half, within each test scene, mean over scenes. (R^2
  over all patches is about 0 from one fire to another, for every encoder and floor: scenes differ by an offset.)
- hippocampus: R^2 over all patches, mean of the classes.
- xray: area under the ROC curve of images, from the mean of their tokens.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from geomed_mae.archives.statistics import summarise
from geomed_mae.errors import ConfigError
from geomed_mae.image import Channel, Image, PlaneGeometry
from geomed_mae.modalities import load_modality
from geomed_mae.models.contract import contract_entries, normalise, scaling
from geomed_mae.models.vit import Encoder
from geomed_mae.readers import IGNORE, read_images, read_labels
from geomed_mae.scoring.values import mean_known, r_squared
from geomed_mae.training.probing import MIN_LABELLED, patch_means

OTHER_BANDS = (
    *("CANAL_20240530", "CODY_20240608", "DOVE_20241019", "GROVE_2_20240724", "HURST_20250107", "LIDIA_20250108"),
    *("RANCH_20240601", "SKY_20240619", "VALLEY_20240521"),
)
"""Scenes of the fires that hold the true-colour bands TCI in place of reflectances; these are left out."""
CONTRADICTORY = ("5-6_CASCADE_CREEK_20200817",)
"""The burn ratio of near and short-wave infrared is *higher* inside this mask (ROC area 0.12): left out, unseen by
models, for its labels would decide the mean of a split's few test scenes."""
OVERLAPPING = {"BORDER_58_20240622": "BORDER", "BORDER_59_20240626": "BORDER"}
"""Scenes that show the same ground are one group."""

HELD_OUT = {"fires": 0.36, "hippocampus": 0.25, "xray": 0.3}
"""Share of the groups that a split scores on."""

WINDOWS_PER_PASS = 64
FOLDS = 4
PENALTIES = np.logspace(-6, 1, 15)
"""Candidate strengths of the ridge, per training row, for standardised features."""
SMALLEST_SPREAD = 1e-9
"""Features that vary less are constant and get no weight."""
DRAWS = 5
"""Draws of few labels that a score is averaged over."""
STREAM_SPLIT, STREAM_FEW = 1, 2


@dataclass(frozen=True, slots=True, eq=False)
class Sample:
    """One image: pixels (c, *s) in model units, 0 where not `valid` (c, *s); its group; its label.

    `label` is int16 (*s), IGNORE where unknown, or the class number of the whole image.
    """

    pixels: np.ndarray
    valid: np.ndarray
    group: str
    label: np.ndarray | int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Task:
    """A data set, what is asked of it, and how a model is trained on it.

    Attributes:
        floor: (c,) noise in model units.
        classes: label values whose shares are asked for; () for a label per image.
        few: groups (images per class, for a label per image) of the probe with few labels.
        held_out: share of the groups that scores are computed on.
    """

    name: str
    samples: tuple[Sample, ...]
    channels: tuple[Channel, ...]
    floor: np.ndarray
    flips: tuple[str, ...]
    crop: tuple[int, ...]
    classes: tuple[int, ...]
    few: int
    held_out: float
    batch: int
    steps: int
    patch_side: int = 4

    @property
    def patch(self) -> tuple[int, ...]:
        """Patch in pixels or voxels."""
        return (self.patch_side,) * len(self.crop)

    @property
    def dense(self) -> bool:
        """Whether labels are maps."""
        return bool(self.classes)


def load_task(name: str, data: Path) -> Task:
    """Read one of TASKS from the data folder (laid out as data_cards/ describe).

    Raises:
        ConfigError: there is no such task.
        ReadError: a file cannot be read.
    """
    if name not in TASKS:
        raise ConfigError(f"there is no task '{name}'; known: {', '.join(TASKS)}")
    return TASKS[name](data)


def _fires(data: Path) -> Task:
    images, labels, groups = [], [], []
    for path in sorted((data / "sat/wildfire_s2/images").glob("*.tif")):
        if path.stem in OTHER_BANDS + CONTRADICTORY:
            continue
        images.append(read_images(path, modality="sentinel2-l2a")[0])
        stored = read_labels(path.parents[1] / "masks" / path.name, images[-1]).array
        labels.append(np.where(stored == IGNORE, IGNORE, stored > 0))
        groups.append(OVERLAPPING.get(path.stem, path.stem))
    # Burned and unburned shares add up to 1: one of the two says all.
    sizes = {"crop": (48, 48), "batch": 16, "steps": 300}
    return _task("fires", images, labels, groups, {"classes": (1,), "few": 2, "held_out": HELD_OUT["fires"], **sizes})


def _hippocampus(data: Path) -> Task:
    paths = sorted((data / "med/hippocampus/images").glob("*.nii.gz"))
    images = [read_images(path, modality="mr")[0] for path in paths]
    labels = [
        read_labels(path.parents[1] / "labels" / path.name, image).array
        for path, image in zip(paths, images, strict=True)
    ]
    sizes = {"crop": (24, 24, 24), "batch": 8, "steps": 500}
    rule = {"classes": (0, 1, 2), "few": 4, "held_out": HELD_OUT["hippocampus"], **sizes}
    return _task("hippocampus", images, labels, [path.name for path in paths], rule)


def _xray(data: Path) -> Task:
    modality = load_modality("xray")
    stored = np.load(data / "med/pneumoniamnist/train.npz")
    pictures = stored["images"].astype(np.float32)[:, None]
    valid = np.ones((1, *pictures.shape[2:]), bool)
    images = [Image(each, valid, modality.channels, PlaneGeometry(), modality.name) for each in pictures]
    groups = [hashlib.sha256(each.tobytes()).hexdigest() for each in stored["images"]]
    rule = {"classes": (), "few": 20, "held_out": HELD_OUT["xray"], "crop": (28, 28), "batch": 32, "steps": 250}
    return _task("xray", images, [int(label) for label in stored["labels"][:, 0]], groups, rule)


TASKS: dict[str, Callable[[Path], Task]] = {"fires": _fires, "hippocampus": _hippocampus, "xray": _xray}


def _task(
    name: str, images: Sequence[Image], labels: Sequence[np.ndarray | int], groups: Sequence[str], rule: dict
) -> Task:
    """Scale images as pretraining would and put them beside their labels."""
    modality = load_modality(images[0].modality)
    samples, floor = [], None
    for image, label, group in zip(images, labels, groups, strict=True):
        own = summarise(image.array, image.valid)
        entries = contract_entries(modality, image.channels, [own])
        center, scale, floor = scaling(entries, own)
        valid = torch.from_numpy(np.broadcast_to(image.valid, image.array.shape).copy())
        pixels = normalise(
            torch.from_numpy(image.array.copy())[None],
            valid[None],
            torch.from_numpy(center)[None],
            torch.from_numpy(scale)[None],
            [entry.value_range for entry in entries],
        )
        samples.append(Sample(pixels[0].numpy(), valid.numpy(), group, label))
    return Task(
        name=name, samples=tuple(samples), channels=images[0].channels, floor=floor, flips=modality.flips, **rule
    )


def split(task: Task, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of training and of test samples; a group is on one side."""
    groups = sorted({sample.group for sample in task.samples})
    order = draw_rng(seed, STREAM_SPLIT).permutation(len(groups))
    held = {groups[place] for place in order[: max(1, round(task.held_out * len(groups)))]}
    numbers = range(len(task.samples))
    train = [number for number in numbers if task.samples[number].group not in held]
    return train, [number for number in numbers if task.samples[number].group in held]


def draw_rng(seed: int, stream: int, draw: int = 0) -> np.random.Generator:
    """Return the generator of one draw of one purpose."""
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, 0, draw]))


@torch.inference_mode()
def encode(encoder: Encoder, task: Task, layers: Sequence[int]) -> list[np.ndarray]:
    """Return per sample the features (layer, dim, *grid) of frozen blocks, all patches shown, NaN where not valid.

    Images are cut into crops on a grid without overlap; at the border crops are smaller, in whole patches.
    """
    found = [
        np.full((len(layers), encoder.spec.dim, *token_grid(sample, task)), np.nan, np.float32)
        for sample in task.samples
    ]
    windows: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
    for number, sample in enumerate(task.samples):
        space = [count * step for count, step in zip(token_grid(sample, task), task.patch, strict=True)]
        for corner in itertools.product(*map(range, [0] * len(space), space, task.crop)):
            size = tuple(min(c, s - at) for c, s, at in zip(task.crop, space, corner, strict=True))
            windows[size].append((number, corner))
    for size, places in windows.items():
        for first in range(0, len(places), WINDOWS_PER_PASS):
            some = places[first : first + WINDOWS_PER_PASS]
            pairs = [cut(task.samples[number], corner, size) for number, corner in some]
            pixels, valid = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*pairs, strict=True))
            out = encoder(pixels, valid, task.channels, None, layers=layers)
            known = out.token_valid.unflatten(1, out.grid)[:, None]
            maps = torch.stack([torch.where(known, each, torch.nan) for each in out.maps], dim=1).numpy()
            for (number, corner), array in zip(some, maps, strict=True):
                at = (slice(a // p, (a + s) // p) for a, s, p in zip(corner, size, task.patch, strict=True))
                found[number][(slice(None), slice(None), *at)] = array
    return found


def token_grid(sample: Sample, task: Task) -> tuple[int, ...]:
    """Return the number of patches along each axis; those at the far border may hold pixels that are not there."""
    return tuple(-(-size // step) for size, step in zip(sample.pixels.shape[1:], task.patch, strict=True))


def cut(sample: Sample, start: Sequence[int], size: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Return pixels and validity (c, *size) from `start` on, padded as not valid beyond the image."""
    window = (slice(None), *(slice(begin, begin + length) for begin, length in zip(start, size, strict=True)))
    parts = []
    for array in (sample.pixels[window], sample.valid[window]):
        gaps = [(0, length - have) for length, have in zip(size, array.shape[1:], strict=True)]
        parts.append(np.pad(array, [(0, 0), *gaps]) if any(gap for _, gap in gaps) else array)
    return parts[0], parts[1]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Rows of a regression: features (n, f), targets (n, t), number of the sample of each (n,)."""

    features: Float[np.ndarray, "n f"]
    targets: Float[np.ndarray, "n t"]
    sample: Int[np.ndarray, " n"]


def gather(task: Task, features: Sequence[np.ndarray]) -> Rows:
    """Return one row a labelled, valid patch, or one a sample (mean over valid patches) for labels per image."""
    rows, targets, numbers = [], [], []
    for number, (sample, found) in enumerate(zip(task.samples, features, strict=True)):
        if not task.dense:
            pooled = found if found.ndim == 1 else np.nanmean(found.reshape(len(found), -1), axis=1)
            rows.append(pooled[None])
            targets.append(np.array([[2.0 * sample.label - 1]]))
        else:
            known = patch_means(sample.label != IGNORE, task.patch)
            kept = (known >= MIN_LABELLED) & np.isfinite(found).all(axis=0)
            rows.append(found[:, kept].T)
            parts = [patch_means(sample.label == value, task.patch)[kept] / known[kept] for value in task.classes]
            targets.append(np.stack(parts, axis=1))
        numbers.append(np.full(len(rows[-1]), number))
    return Rows(np.concatenate(rows).astype(np.float64), np.concatenate(targets), np.concatenate(numbers))


def score(task: Task, rows: Rows, seed: int) -> dict[str, float]:
    """Return the test score of the probe with all training labels (`probe`) and with few (`few`, mean of draws)."""
    train, test = split(task, seed)
    few = [_fit_and_score(task, rows, chosen, test, seed) for chosen in _few(task, train, seed)]
    return {"probe": _fit_and_score(task, rows, train, test, seed), "few": float(np.mean(few))}


def _few(task: Task, train: Sequence[int], seed: int) -> Iterator[list[int]]:
    for draw in range(DRAWS):
        order = [train[place] for place in draw_rng(seed, STREAM_FEW, draw).permutation(len(train))]
        if task.dense:
            groups = list(dict.fromkeys(task.samples[number].group for number in order))[: task.few]
            yield [number for number in order if task.samples[number].group in groups]
        else:
            labels = sorted({task.samples[number].label for number in order})
            yield [
                number
                for label in labels
                for number in [each for each in order if task.samples[each].label == label][: task.few]
            ]


def _fit_and_score(task: Task, rows: Rows, train: Sequence[int], test: Sequence[int], seed: int) -> float:
    inside, outside = np.isin(rows.sample, train), np.isin(rows.sample, test)
    groups = np.unique([sample.group for sample in task.samples], return_inverse=True)[1]
    fold = _folds(groups[rows.sample[inside]], seed)
    weights, center, mean = ridge(rows.features[inside], rows.targets[inside], fold)
    found, truth, sample = (
        (rows.features[outside] - mean) @ weights + center,
        rows.targets[outside],
        rows.sample[outside],
    )
    if not task.dense:
        return area_under_curve(found[:, 0], truth[:, 0] > 0)
    if len(task.classes) > 1:
        return float(mean_known([r_squared(found[:, place], truth[:, place]) for place in range(truth.shape[1])]) or 0)
    scenes = [(found[sample == number, 0], truth[sample == number, 0] > 0.5) for number in np.unique(sample)]
    return float(np.mean([area_under_curve(values, burned) for values, burned in scenes if 0 < burned.mean() < 1]))


def _folds(group: np.ndarray, seed: int) -> np.ndarray:
    names = np.unique(group)
    number = dict(zip(draw_rng(seed, STREAM_SPLIT, 1).permutation(names), itertools.cycle(range(FOLDS)), strict=False))
    return np.array([number[each] for each in group])


def ridge(features: np.ndarray, targets: np.ndarray, fold: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (weights (f, t), center (t,), mean (f,)) of a ridge: found = (features - mean) @ weights + center.

    Its strength has the least squared error in cross-validation over `fold` (n,). Everything follows from each fold's
    products X'X and X'y, so that a strength costs no pass over the rows. In torch, whose threads the driver sets.
    """
    x, y = torch.from_numpy(features), torch.from_numpy(targets)
    mean, spread, center = x.mean(0), x.std(0, correction=0), y.mean(0)
    spread = torch.where(spread > SMALLEST_SPREAD, spread, torch.inf)
    x, y = (x - mean) / spread, y - center
    products = []
    for number in np.unique(fold):
        own = torch.from_numpy(fold == number)
        products.append((x[own].T @ x[own], x[own].T @ y[own], int(own.sum())))
    gram, cross, count = (sum(values) for values in zip(*products, strict=True))
    errors = torch.zeros(len(PENALTIES), dtype=x.dtype)
    for own_gram, own_cross, own_count in products:
        solved = _solutions(gram - own_gram, cross - own_cross, count - own_count)
        errors += torch.stack([(w * (own_gram @ w - 2 * own_cross)).sum() for w in solved])
    weights = _solutions(gram, cross, count)[int(errors.argmin())]
    return (weights / spread[:, None]).numpy(), center.numpy(), mean.numpy()


def _solutions(gram: torch.Tensor, cross: torch.Tensor, count: int) -> list[torch.Tensor]:
    values, vectors = torch.linalg.eigh(gram)
    turned = vectors.T @ cross
    return [vectors @ (turned / (values.clamp(min=0)[:, None] + penalty * count)) for penalty in PENALTIES]


def area_under_curve(found: Float[np.ndarray, " n"], truth: Bool[np.ndarray, " n"]) -> float:
    """Return the probability that a positive scores above a negative, ties counting half (Mann & Whitney 1947)."""
    negative = np.sort(found[~truth])
    below = np.searchsorted(negative, found[truth], "left") + np.searchsorted(negative, found[truth], "right")
    return float(below.mean() / (2 * len(negative)))
