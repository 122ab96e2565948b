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
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomed_mae.archives.build import Progress, keep_apart, open_archive
from geomed_mae.archives.index import Index
from geomed_mae.archives.labels import LabelledImage, match_labels
from geomed_mae.archives.statistics import summarise
from geomed_mae.image import Image
from geomed_mae.models.contract import normalise, scaling
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.pretrained import PretrainedEncoder, read_out
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from geomed_mae.readers import IGNORE
from geomed_mae.training.probing import MIN_LABELLED, SEED, Patches, held_out, label_values, linear_probe, patch_means
from geomed_mae.training.run import write_json

PERCENTILES = (5.0, 50.0, 95.0)

Features = Callable[[Image], dict[str, np.ndarray]]
"""Image -> by name, float32 (features, *token grid), NaN where a patch is not valid."""


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
    classes = label_values(matching.labelled)
    held, unit = held_out(matching.labelled)
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
