"""probe: what frozen features say about labels, beside the floors that any encoder must beat.

The question asked of the features is dense: from a token alone, which share of its patch belongs to each class? The
answer is a ridge regression in closed form, so that nothing has to be tuned; its strength is chosen by generalised
cross-validation (Golub, Heath & Wahba 1979) on the training images alone. Scores are on held-out patients or scenes.

Features are read out of the last block, and of several blocks side by side, which tell more (benchmarks/ablations.py).
Floors stand beside the encoder: statistics of the patch's own pixels, and the same network with random weights, read
out in the same two ways. An encoder that does not beat them has learned nothing for these labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomed_mae.archives.build import Progress, keep_apart, open_archive
from geomed_mae.archives.index import Index, Row
from geomed_mae.archives.label_values import block_split
from geomed_mae.archives.labels import LabelledImage, match_labels
from geomed_mae.archives.splits import split_by_group
from geomed_mae.archives.statistics import summarise
from geomed_mae.errors import ConfigError
from geomed_mae.image import Image
from geomed_mae.models.contract import normalise, scaling
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import PretrainedEncoder, read_out
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from geomed_mae.readers import IGNORE
from geomed_mae.training.metrics import mean_known, r_squared
from geomed_mae.training.run import write_json

MAX_CLASSES = 32
"""Label maps with more different values are taken for something else than classes."""
MIN_LABELLED = 0.5
"""A patch counts when at least this share of its pixels has a label."""
HELD_OUT = 0.3
"""Share of groups, or of blocks of a single image, that the scores are computed on."""
BLOCKS = 4
"""A single image is split into blocks of a quarter of its longest side."""
PENALTIES = np.logspace(-3, 5, 17)
"""Candidate strengths of the ridge, for standardised features."""
SINGULAR = 1e-12
"""Squared singular values below this share of the largest are rounding."""
SEED = 0
PERCENTILES = (5.0, 50.0, 95.0)

Features = Callable[[Image], dict[str, np.ndarray]]
"""Image -> by name, float32 (features, *token grid), NaN where a patch is not valid."""


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """Rows of a regression: features (n, f), class shares (n, classes), and which of them are held out (n,)."""

    features: np.ndarray
    shares: np.ndarray
    held_out: np.ndarray


def probe(
    encoder: str | Path,
    archive_paths: Sequence[str | Path],
    labels_path: str | Path,
    out_json: str | Path,
    *,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Fit linear probes on frozen features and on the floors; write and return their scores.

    Per class that occurs: R^2 of its share in a patch. Over all: their mean, and the accuracy of the largest share.

    Args:
        encoder: encoder folder or pretraining run.
        archive_paths: raw files and folders, or an INDEX.
        labels_path: label maps, see `archives.labels`; every value in them is a class.
        out_json: file for the scores.
        progress: shows how many images are done.

    Raises:
        ConfigError: no encoder, no labels that match, or labels without two classes.
    """
    model = load_encoder(encoder)
    known = sorted({entry.modality for entry in model.contract.channels})
    keep_apart(out_json, archive_paths)
    index = open_archive(archive_paths, known)
    matching = match_labels(index, Path(labels_path))
    classes = _classes(matching.labelled)
    held, unit = _held_out(matching.labelled)
    torch.manual_seed(SEED)
    random = PretrainedEncoder(Encoder(model.spec), model.contract)
    sources: list[Features] = [
        lambda image: read_outs("encoder", model, image),
        lambda image: read_outs("floor_random_weights", random, image),
        lambda image: {"floor_patch_statistics": patch_statistics(model, image)},
    ]
    work = matching.labelled
    shown = work if progress is None else progress(work, "probe", len(work))
    patches = _collect(index, shown, held, sources, (model.spec, classes))
    scores = {name: linear_probe(found) for name, found in patches.items()}
    best, floor = (
        max(scores[name]["mean_r2"] or 0.0 for name in scores if name.startswith(kind)) for kind in ("encoder", "floor")
    )
    result = {
        "verb": "probe",
        "labels": matching.counts(),
        "label_values": classes,
        **({"label_names": [matching.names[value] for value in classes]} if matching.names else {}),
        "held_out": unit,
        "scores": scores,
        "encoder_beats_floors": best > floor,
    }
    out = Path(out_json)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json(out, result)
    return result


def _classes(labelled: Sequence[LabelledImage]) -> list[int]:
    values = sorted({int(value) for entry in labelled for value in np.unique(entry.stored)} - {IGNORE})
    if not 2 <= len(values) <= MAX_CLASSES:
        raise ConfigError(f"the labels hold {len(values)} different values; a probe needs 2 to {MAX_CLASSES} classes")
    return values


def _held_out(labelled: Sequence[LabelledImage]) -> tuple[dict[str, np.ndarray], str]:
    """Return per image which pixels are held out, and the unit that was kept apart."""
    rows: list[Row] = [entry.row for entry in labelled]
    if len({row.group for row in rows}) < 2:
        sides = {row.key: max(-(-max(row.shape) // BLOCKS), 1) for row in rows}
        return {row.key: block_split(row.shape, sides[row.key], HELD_OUT, SEED) for row in rows}, "block"
    _, held = split_by_group(rows, HELD_OUT, SEED)
    keys = {row.key for row in held}
    return {row.key: np.broadcast_to(np.bool_(row.key in keys), row.shape) for row in rows}, "group"


def _collect(
    index: Index,
    labelled: Iterable[LabelledImage],
    held: dict[str, np.ndarray],
    sources: Sequence[Features],
    asked: tuple[ModelSpec, Sequence[int]],
) -> dict[str, Patches]:
    """Gather the same patches for all sources: labelled enough, valid for each, on one side of the split."""
    spec, classes = asked
    rows: dict[str, list[np.ndarray]] = {}
    shares, outside = [], []
    for entry in labelled:
        image = index.read(entry.row.key)
        tokens = {name: grid for features in sources for name, grid in features(image).items()}
        patch = spec.patch(len(entry.row.shape))
        known = patch_means(entry.stored != IGNORE, patch)
        parts = np.stack([patch_means(entry.stored == value, patch) for value in classes], axis=-1)
        side = patch_means(held[entry.row.key], patch)
        kept = (known >= MIN_LABELLED) & ((side == 0) | (side == 1))
        for grid in tokens.values():
            kept &= np.isfinite(grid).all(axis=0)
        for name, grid in tokens.items():
            rows.setdefault(name, []).append(grid[:, kept].T)
        shares.append(parts[kept] / known[kept][:, None])
        outside.append(side[kept] == 1)
    truth, test = np.concatenate(shares), np.concatenate(outside)
    return {name: Patches(np.concatenate(found).astype(np.float64), truth, test) for name, found in rows.items()}


def read_outs(name: str, encoder: PretrainedEncoder, image: Image) -> dict[str, np.ndarray]:
    """Return the features of the last block, and of several blocks side by side, of which it is the last."""
    several = encoder.features(image, layers=read_out("several", encoder.spec.depth)).array
    return {name: several[-encoder.spec.dim :], f"{name}_several_layers": several}


def patch_means(array: np.ndarray, patch: Sequence[int]) -> np.ndarray:
    """Return the mean of each patch of an array, float64; patches at the far border hold the pixels that are there."""
    for axis, size in enumerate(patch):
        edges = np.arange(0, array.shape[axis], size)
        counts = np.diff([*edges, array.shape[axis]])
        sums = np.add.reduceat(array.astype(np.float64), edges, axis=axis)
        array = sums / counts.reshape([-1 if other == axis else 1 for other in range(array.ndim)])
    return array


def patch_statistics(model: PretrainedEncoder, image: Image) -> np.ndarray:
    """Return mean, standard deviation and percentiles of each channel and patch, in model units; NaN where any of a
    patch's values is not valid.
    """
    image = model.checked(image)
    entries = model.contract.entries(image.modality, image.channels)
    center, scale, _ = scaling(entries, summarise(image.array, image.valid))
    valid = np.broadcast_to(image.valid, image.array.shape)
    raw, seen, center, scale = (torch.from_numpy(part.copy())[None] for part in (image.array, valid, center, scale))
    pixels = normalise(raw, seen, center, scale, [entry.value_range for entry in entries])
    values = np.where(valid, pixels[0].numpy(), np.nan)
    patch = model.spec.patch(values.ndim - 1)
    missing = [(-size) % step for size, step in zip(values.shape[1:], patch, strict=True)]
    # Patches that reach over the border repeat its last pixel, for they are valid in part.
    values = np.pad(values, [(0, 0), *((0, amount) for amount in missing)], mode="edge")
    grid = [size // step for size, step in zip(values.shape[1:], patch, strict=True)]
    split = values.reshape(len(values), *(size for pair in zip(grid, patch, strict=True) for size in pair))
    inner = tuple(range(2, split.ndim, 2))
    parts = [split.mean(axis=inner), split.std(axis=inner), *np.percentile(split, PERCENTILES, axis=inner)]
    return np.concatenate(parts).astype(np.float32)


def linear_probe(patches: Patches) -> dict[str, Any]:
    """Return R^2 per class and mean, and accuracy, of a ridge regression on the held-out patches.

    Raises:
        ConfigError: no patch is left to train or to score on.
    """
    train, test = ~patches.held_out, patches.held_out
    if train.sum() < 2 or test.sum() < 2:
        raise ConfigError(
            f"{int(train.sum())} patches are left to train on and {int(test.sum())} to score on; label more area"
        )
    mean, spread = patches.features[train].mean(axis=0), patches.features[train].std(axis=0)
    features = (patches.features - mean) / np.where(spread > 0, spread, 1.0)
    weights, center, penalty = ridge(features[train], patches.shares[train])
    found, truth = features[test] @ weights + center, patches.shares[test]
    scores = [r_squared(found[:, number], truth[:, number]) for number in range(truth.shape[1])]
    return {
        "r2": [None if score is None else round(score, 6) for score in scores],
        "mean_r2": None if (mean_score := mean_known(scores)) is None else round(mean_score, 6),
        "accuracy": round(float((found.argmax(axis=1) == truth.argmax(axis=1)).mean()), 6),
        "features": int(features.shape[1]),
        "patches_train": int(train.sum()),
        "patches_scored": int(test.sum()),
        "penalty": float(penalty),
    }


def ridge(features: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return (weights (f, t), intercept (t,), penalty) of ridge regression with the best generalised cross-validation.

    Args:
        features: (n, f), of mean 0.
        targets: (n, t).
    """
    center = targets.mean(axis=0)
    # From the products of features, whose number is small, and not of patches.
    squared, right = np.linalg.eigh(features.T @ features)
    kept = squared > squared.max(initial=0.0) * SINGULAR
    singular, right = np.sqrt(squared[kept]), right[:, kept]
    projected = (right.T @ (features.T @ (targets - center))) / singular[:, None]
    outside = ((targets - center) ** 2).sum() - (projected**2).sum()
    errors = []
    for penalty in PENALTIES:
        shrunk = singular**2 / (singular**2 + penalty)
        residual = outside + (((1 - shrunk)[:, None] * projected) ** 2).sum()
        errors.append(residual / (1 - min(shrunk.sum() / len(features), 1 - 1e-9)) ** 2)
    best = float(PENALTIES[int(np.argmin(errors))])
    return right @ ((singular / (singular**2 + best))[:, None] * projected), center, best
