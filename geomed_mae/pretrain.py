"""The verb pretrain: recipe + archive -> run folder with an encoder.

Read `pretrain` from top to bottom: archive, samples, contract, model, loop, encoder, panels, summary.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomed_mae.archives.build import Progress as ScanProgress
from geomed_mae.archives.build import keep_apart, of_modalities, open_archive
from geomed_mae.archives.index import Index
from geomed_mae.config import ModelConfig, Recipe
from geomed_mae.errors import ConfigError, TooManyBadInputsError
from geomed_mae.modalities import Modality, resolve_modalities
from geomed_mae.models.contract import Contract, contract_entries
from geomed_mae.models.encoder_folder import load_encoder, save_encoder
from geomed_mae.models.foreign.fixed import start, why_no_decoder
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking
from geomed_mae.models.pretrained import PretrainedEncoder
from geomed_mae.models.spec import SIZES, ModelSpec
from geomed_mae.samples.batch import Batch
from geomed_mae.samples.buckets import Bucket, shares
from geomed_mae.samples.loader import Steps, load_steps, measure_rate
from geomed_mae.training.loop import Progress, fit, pick_device
from geomed_mae.training.objective import MaskedObjective, objective_state
from geomed_mae.training.optim import build_optimizers
from geomed_mae.training.panels import CANDIDATES, draw_reconstructions
from geomed_mae.training.run import RunFolder, describe_environment

MAX_UNREADABLE = 0.01
"""Share of the images that may stop to be readable during a run (at least one); they were whole when it began."""

MAX_PANELS = 5

log = logging.getLogger(__name__)


def pretrain(
    recipe: Recipe,
    archive_paths: Sequence[str | Path],
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: ScanProgress | None = None,
) -> dict[str, Any]:
    """Pretrain a masked autoencoder on an archive.

    Args:
        recipe: a recipe without head.
        archive_paths: raw files and folders, or one index folder; only read.
        out: the run folder.
        resume: continue the run that is there, from its newest valid checkpoint.
        overwrite: replace the run that is there.
        dry_run: write nothing; return what would be read, and what it needs.
        progress: shows how far the scan of a raw archive is.

    Returns:
        `run` and `encoder` (folders), `loss_first`, `loss_last`, `steps`; with `dry_run` the plan.

    Raises:
        ConfigError: the recipe does not fit the archive; `out` holds a run or lies in the archive.
        TooManyBadInputsError: the archive is unusable, or became so. IntegrityError, OutputError, NumericalError,
        Preempted: see `RunFolder` and `training.loop.fit`.
    """
    config, out = _pretraining(recipe), Path(out)
    keep_apart(out, archive_paths)
    options = {} if progress is None else {"progress": progress}
    index = open_archive(archive_paths, recipe.data.modality, part=recipe.data.split, **options)
    index = of_modalities(index, recipe.data.modality)
    train = recipe.train
    steps = Steps(index, recipe.data, seed=train.seed, batch_size=train.batch_size)

    source = None if config.init is None else load_encoder(config.init)
    # Weights are drawn here and nowhere else.
    torch.manual_seed(train.seed)
    mae = MaskedAutoencoder.from_spec(adapted(ModelSpec.from_config(config), source))
    contract = make_contract(recipe, index, steps.buckets)
    if source is not None:
        contract = start_from(mae, contract, source)
    if dry_run:
        return describe_plan(recipe, index, steps, mae)
    device = pick_device(train.device)
    objective = MaskedObjective(mae.to(device), contract, masking=Masking.from_config(config), seed=train.seed)

    environment = describe_environment(device, train.precision)
    archive = {"fingerprint": index.fingerprint, "images": len(index)}
    with RunFolder(out, recipe, environment=environment, archive=archive, resume=resume, overwrite=overwrite) as run:
        log.info("pretraining on %d images in %d buckets", len(index), len(steps.buckets))

        def batches(first: int) -> Iterator[Batch]:
            pinned = device.type == "cuda"
            made = load_steps(steps, first, train.steps, workers=recipe.data.workers, pin_memory=pinned)
            return within_budget(made, len(index))

        done = fit(
            mae,
            build_optimizers(mae, train),
            batches,
            objective.loss,
            train,
            checkpoints=run.checkpoints,
            record=run.record,
            state=objective_state(objective),
            resumed=run.resumed,
        )
        save_encoder(out / "encoder", mae.encoder, contract)
        errors = _draw_panels(objective, steps, out / "panels")
        summary = run.finish({**_summary(done, run, index), "reconstruction_error": errors})
    return {"run": str(out), "encoder": str(out / "encoder"), **{key: summary[key] for key in RESULT}}


RESULT = ("loss_first", "loss_last", "steps", "seconds")
"""Entries of summary.json that the command prints."""


def _pretraining(recipe: Recipe) -> ModelConfig:
    if recipe.head is not None:
        raise ConfigError("this recipe has a head, it is for finetune; pretrain takes a recipe without one")
    if recipe.model is None:
        raise ConfigError(
            "this recipe has no section 'model'; pretrain needs at least model.patch_2d or model.patch_3d"
        )
    return recipe.model


def make_contract(recipe: Recipe, index: Index, buckets: Sequence[Bucket]) -> Contract:
    """Settle how each channel of each modality is scaled, from the statistics of all images that have it.

    Raises:
        ConfigError: images of a modality that the recipe does not name.
    """
    modalities = {modality.name: modality for modality in resolve_modalities(recipe.data.modality)}
    entries: dict[tuple[str, str], Any] = {}
    for bucket in buckets:
        modality = _known(modalities, bucket.modality)
        for channel in bucket.channels:
            if (modality.name, channel.name) not in entries:
                own = [
                    (row.statistics[place],)
                    for row in index.rows
                    if row.modality == modality.name
                    for place, other in enumerate(row.channels)
                    if other.name == channel.name
                ]
                entries[modality.name, channel.name] = contract_entries(modality, (channel,), own)[0]
    return Contract(
        channels=tuple(entries.values()),
        crop_2d=recipe.data.crop_2d,
        crop_3d=recipe.data.crop_3d,
        fingerprint=index.fingerprint,
        images=len(index),
        steps=recipe.train.steps,
    )


def _known(modalities: Mapping[str, Modality], name: str) -> Modality:
    if name not in modalities:
        raise ConfigError(
            f"the index holds images of modality '{name}', the recipe reads {sorted(modalities)}; set data.modality to "
            "the name or YAML file that the index was made with"
        )
    return modalities[name]


def adapted(spec: ModelSpec, source: PretrainedEncoder | None) -> ModelSpec:
    """Return the spec with what no recipe sets and an encoder to start from has: norm_eps and learned positions.

    Raises:
        ConfigError: learned positions are of images, and the recipe has volumes too, or the other way round.
    """
    if source is None:
        return spec
    spec, learned = replace(spec, norm_eps=source.spec.norm_eps), source.spec.learned_positions
    of_decoder, origin = None, source.origin
    if origin is not None and origin.decoder is not None and origin.decoder.positions is not None:
        of_decoder = None if why_no_decoder(spec, origin.decoder) else origin.grid
    grid = learned or of_decoder
    if grid is None:
        return spec
    patches = {2: spec.patch_2d, 3: spec.patch_3d}
    if patches.pop(len(grid)) is None:
        return spec  # nothing but blocks will be taken
    if any(patches.values()):
        raise ConfigError(
            f"model.init has a learned table of positions for {len(grid)} spatial axes; a recipe that starts from "
            f"it has model.patch_{len(grid)}d alone"
        )
    return replace(spec, learned_positions=learned, learned_decoder_positions=of_decoder)


def start_from(mae: MaskedAutoencoder, contract: Contract, source: PretrainedEncoder) -> Contract:
    """Copy the weights of a pretrained encoder into `mae`, and return its contract extended by the new channels.

    Channels that it knows keep their scaling. Filters of a kind of patch that it does not have stay random. A model
    that came from elsewhere gives its decoder too, if it fits, and its filters to channels that it does not know
    (`models.foreign.fixed.start`).

    Raises:
        ConfigError: the shapes differ; the keys to change are named.
    """
    have, want = source.spec, mae.spec
    names = ["dim", "depth", "heads", "patch_2d", "patch_3d"] + (["basis"] if source.origin is None else [])
    differ = [
        name
        for name in names
        if getattr(have, name) != getattr(want, name)
        and not (name.startswith("patch") and None in (getattr(have, name), getattr(want, name)))
    ]
    if differ:
        found = "; ".join(f"{name} {getattr(have, name)}, here {getattr(want, name)}" for name in differ)
        raise ConfigError(f"model.init is an encoder with {found}; {_way_out(have, differ)}")
    if source.origin is not None:
        modalities = dict.fromkeys(entry.modality for entry in contract.channels)
        start(mae, source.origin, [[entry.channel for entry in contract.of(name)] for name in modalities])
    else:
        weights, wanted = source.module.state_dict(), set(mae.encoder.state_dict())
        mae.encoder.load_state_dict({**mae.encoder.state_dict(), **{k: v for k, v in weights.items() if k in wanted}})
        log.info("the encoder starts from model.init, the decoder, which encoder folders do not hold, at random")
    return replace(
        source.contract.extended(contract.channels),
        crop_2d=contract.crop_2d or source.contract.crop_2d,
        crop_3d=contract.crop_3d or source.contract.crop_3d,
        fingerprint=contract.fingerprint,
        images=contract.images,
        steps=contract.steps,
    )


def _way_out(have: ModelSpec, differ: Sequence[str]) -> str:
    """Return what to set so that a recipe builds the shape `have`."""
    size = next((name for name, (dim, _, heads) in SIZES.items() if (dim, heads) == (have.dim, have.heads)), None)
    if size is None:
        known = ", ".join(f"{name} {dim} with {heads}" for name, (dim, _, heads) in SIZES.items())
        return f"recipes have the widths and heads of timm's sizes alone ({known}), so no recipe can go on from it"
    keys = [f"model.size={size}"] if {"dim", "heads"} & set(differ) else []
    if "depth" in differ or ("dim" in differ and have.depth != SIZES[size][1]):
        keys.append(f"model.depth={have.depth}")
    for name in ("patch_2d", "patch_3d", "basis"):
        if name in differ:
            keys.append(f"model.{name}={getattr(have, name)}".replace("(", "[").replace(")", "]").replace(" ", ""))
    return f"set {' '.join(keys)}"


def within_budget(batches: Iterator[Batch], images: int) -> Iterator[Batch]:
    """Pass batches on, and name each image that could not be read once.

    Raises:
        TooManyBadInputsError: more than MAX_UNREADABLE of the images (and more than one) are gone.
    """
    seen: set[str] = set()
    for batch in batches:
        for failure in set(batch.failed) - seen:
            seen.add(failure)
            log.warning("image %s could not be read any more; another took its place", failure)
        if len(seen) > max(1, MAX_UNREADABLE * images):
            raise TooManyBadInputsError(
                f"{len(seen)} of {images} images can no longer be read (last: {batch.failed[-1]}); were files moved or "
                "damaged since the archive was scanned? Restore them, then continue with --resume"
            )
        yield batch


def _draw_panels(objective: MaskedObjective, steps: Steps, folder: Path) -> dict[str, Any]:
    """Draw one panel a bucket; return the errors over hidden patches of each (see `panels.error_summary`).

    Of many buckets those that most steps have gone to, in that order.
    """
    objective.mae.eval()
    errors = {}
    order = np.argsort(-shares(steps.buckets, steps.config.weights), kind="stable")
    for number, bucket in enumerate((steps.buckets[place] for place in order[:MAX_PANELS]), start=1):
        batch = steps.examples(bucket, CANDIDATES)
        name = f"{number:02d}-{bucket.modality}"
        errors[name] = draw_reconstructions(objective, batch, folder / f"{name}.png")
    return errors


def _summary(done: Progress, run: RunFolder, index: Index) -> dict[str, Any]:
    fractions = [line["valid_fraction"] for line in run.metrics() if line.get("valid_fraction") is not None]
    return {
        "verb": "pretrain",
        "steps": done.step,
        "loss_first": done.first_loss,
        "loss_last": done.last_loss,
        "seconds": round(done.seconds, 1),
        "samples": done.samples,
        "samples_per_second": round(done.samples_per_second, 2),
        "skipped_steps": done.skipped,
        "valid_fraction": round(sum(fractions) / len(fractions), 4) if fractions else None,
        "images": len(index),
    }


def describe_plan(recipe: Recipe, index: Index, steps: Steps, mae: MaskedAutoencoder) -> dict[str, Any]:
    """Return what a run would read and need: images, buckets, tokens, memory (a rough upper bound), loader's speed."""
    buckets = []
    for bucket, share in zip(steps.buckets, shares(steps.buckets, recipe.data.weights), strict=True):
        patch = mae.spec.patch(len(bucket.crop))
        tokens = math.prod(size // step for size, step in zip(bucket.crop, patch, strict=True))
        buckets.append(
            {
                "modality": bucket.modality,
                "channels": [channel.name for channel in bucket.channels],
                "images": len(bucket.rows),
                "share_of_steps": round(float(share), 4),
                "crop": list(bucket.crop),
                "patch": list(patch),
                "tokens": tokens,
                "tokens_seen": int(tokens * (1 - mae_ratio(recipe))),
                "memory_mb": round(_memory_mb(recipe, mae, bucket, tokens)),
            }
        )
    samples = recipe.train.steps * recipe.train.batch_size
    return {
        "images": len(index),
        "files": index.ledger.summary(),
        "buckets": buckets,
        "parameters": sum(parameter.numel() for parameter in mae.parameters()),
        "steps": recipe.train.steps,
        "samples": samples,
        "loader_samples_per_second": round(measure_rate(steps), 1),
        "device": str(pick_device(recipe.train.device)),
    }


def mae_ratio(recipe: Recipe) -> float:
    """Return the recipe's mask ratio, the lowest of a range."""
    return Masking.from_config(recipe.model).bounds[0] if recipe.model else 0.0


def _memory_mb(recipe: Recipe, mae: MaskedAutoencoder, bucket: Bucket, tokens: int) -> float:
    """Estimate memory of a step in fp32: weights, gradients, two moments, activations, and the batch itself.

    A ViT block keeps about 16 widths a token for its backward pass (inputs of four products, two norms, the GELU's 4
    widths twice) and the attention's matrix.
    """
    spec, batch = mae.spec, recipe.train.batch_size
    seen = int(tokens * (1 - mae_ratio(recipe))) + 1
    encoder = spec.depth * (16 * seen * spec.dim + 2 * spec.heads * seen**2)
    decoder = spec.decoder_depth * (16 * tokens * spec.decoder_dim + 2 * spec.decoder_heads * tokens**2)
    pixels = 6 * len(bucket.channels) * math.prod(bucket.crop)
    weights = 4 * sum(parameter.numel() for parameter in mae.parameters())
    return 4 * (weights + batch * (encoder + decoder + pixels)) / 2**20
