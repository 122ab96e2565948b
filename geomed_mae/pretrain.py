"""The verb pretrain: recipe + archive -> run folder with an encoder.

Read `pretrain` from top to bottom: archive, samples, contract, model, loop, encoder, panels, summary.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from geomed_mae.archives.build import Progress as ScanProgress
from geomed_mae.archives.build import keep_apart, of_modalities, open_archive
from geomed_mae.archives.index import Index, is_index
from geomed_mae.archives.seen import PRETRAINING, Seen, save_private
from geomed_mae.config import ModelConfig, Recipe
from geomed_mae.errors import ConfigError, TooManyBadInputsError
from geomed_mae.models.encoder_folder import load_encoder, save_encoder
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.models.masking import Masking
from geomed_mae.models.spec import ModelSpec
from geomed_mae.samples.batch import Batch
from geomed_mae.samples.loader import Steps, load_steps
from geomed_mae.samples.store import open_store
from geomed_mae.training.begin import adapted, make_contract, start_from
from geomed_mae.training.distributed import Ranks
from geomed_mae.training.learner import Learner
from geomed_mae.training.loop import Progress, fit
from geomed_mae.training.objective import MaskedObjective, objective_state
from geomed_mae.training.observers import Watch, due
from geomed_mae.training.plan import describe_plan
from geomed_mae.training.run import FollowedRun, RunFolder, describe_environment, open_run

MAX_UNREADABLE = 0.01
"""Share of the images that may stop to be readable during a run (at least one); they were whole when it began."""

log = logging.getLogger(__name__)


def pretrain(
    recipe: Recipe,
    archive_paths: Sequence[str | Path],
    out: str | Path,
    *,
    labels: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    dry_run: bool = False,
    progress: ScanProgress | None = None,
) -> dict[str, Any]:
    """Pretrain a masked autoencoder on an archive, with all processes that a launcher (torchrun) has started.

    Args:
        recipe: a recipe without head.
        archive_paths: raw files and folders, or one index folder; only read. Several processes need an index.
        out: the run folder.
        labels: label maps or a table, to probe features with; they never influence training.
        resume: continue the run that is there, from its newest valid checkpoint.
        overwrite: replace the run that is there.
        dry_run: write nothing; return what would be read, and what it needs.
        progress: shows how far the scan of a raw archive is.

    Returns:
        `run` and `encoder` (folders), `loss_first`, `loss_last`, `steps`; with `dry_run` the plan. Empty in processes
        other than the first.

    Raises:
        ConfigError: the recipe does not fit the archive; `out` holds a run or lies in the archive.
        TooManyBadInputsError: the archive is unusable, or became so. IntegrityError, OutputError, NumericalError,
        Preempted: see `RunFolder` and `training.loop.fit`.
    """
    config, out, ranks = _pretraining(recipe), Path(out), Ranks.from_environment()
    keep_apart(out, archive_paths)
    _check_processes(ranks, recipe, archive_paths, dry_run)
    device = ranks.device(recipe.train.device)
    with ranks.joined(device, recipe.train.timeout_s):
        options = {} if progress is None or not ranks.first else {"progress": progress}
        index = open_archive(archive_paths, recipe.data.modality, part=recipe.data.split, **options)
        index = of_modalities(index, recipe.data.modality).by_pixels()
        ranks.check_same(index.fingerprint, "the processes see different archives; give all of them the same index")
        steps = _steps(recipe, index, ranks, None if dry_run else out / "cache", archive_paths)
        objective, before = _begin(recipe, config, index, steps)
        if dry_run:
            return describe_plan(recipe, index, steps, objective, device=device, out=out)
        objective.mae.to(device)
        environment = {**describe_environment(device, recipe.train.precision), "processes": ranks.world}
        archive = {"fingerprint": index.fingerprint, "images": len(index)}
        how = {"environment": environment, "archive": archive, "resume": resume, "overwrite": overwrite}
        with open_run(out, recipe, ranks, **how) as run:
            log.info("pretraining on %d images in %d buckets", len(index), len(steps.buckets))
            return _train(recipe, index, steps, objective, run, ranks=ranks, labels=labels, before=before)


def _steps(
    recipe: Recipe, index: Index, ranks: Ranks, cache: Path | None, archive_paths: Sequence[str | Path]
) -> Steps:
    """Return this process's share of every batch; decoded images may be kept in the folder `cache`."""
    store = None if cache is None else open_store(recipe.data, cache, index, archive_paths)
    train = recipe.train
    shared = {"rank": ranks.rank, "world": ranks.world, "store": store}
    return Steps(index, recipe.data, seed=train.seed, batch_size=train.batch_size, **shared)


def _begin(recipe: Recipe, config: ModelConfig, index: Index, steps: Steps) -> tuple[MaskedObjective, Seen]:
    """Return the model with its first weights, the contract that scales its input and its masks; and what these weights
    have seen before.
    """
    source = None if config.init is None else load_encoder(config.init)
    # Weights are drawn here and nowhere else.
    torch.manual_seed(recipe.train.seed)
    mae = MaskedAutoencoder.from_spec(adapted(ModelSpec.from_config(config), source))
    contract = make_contract(recipe, index, steps.buckets)
    if source is not None:
        contract = start_from(mae, contract, source)
    before = Seen.nothing() if source is None else source.seen or Seen.unknown()
    return MaskedObjective(mae, contract, masking=Masking.from_config(config), seed=recipe.train.seed), before


def _train(
    recipe: Recipe,
    index: Index,
    steps: Steps,
    objective: MaskedObjective,
    run: RunFolder | FollowedRun,
    *,
    ranks: Ranks,
    labels: str | Path | None,
    before: Seen,
) -> dict[str, Any]:
    """Train, then leave the encoder, what it has seen, pictures and numbers in the run folder."""
    train, state = recipe.train, objective_state(objective)
    learner = Learner(objective.mae, train, ranks)
    objective.forward = learner.parallel.forward

    def batches(first: int) -> Iterator[Batch]:
        made = load_steps(steps, first, train.steps, workers=recipe.data.workers)
        return within_budget(made, len(index))

    def blank() -> MaskedAutoencoder:
        return MaskedAutoencoder.from_spec(objective.mae.spec)

    watch = Watch(objective, steps, index, recipe, run, labels=labels) if ranks.first else None

    def observe(done: int) -> None:
        if due(train, done, labelled=labels is not None):
            model = learner.best(blank)  # in every process: each may hold a part
            if watch is not None:
                watch.observe(done, model)

    done = fit(
        learner,
        batches,
        objective.loss,
        train,
        checkpoints=run.checkpoints,
        record=run.record,
        state=state,
        resumed=run.resumed,
        observe=observe,
    )
    best = learner.best(blank)
    if watch is None:
        return {}
    seen = Seen.of(index, index.rows, what=PRETRAINING) + before
    save_encoder(run.path / "encoder", best.encoder, objective.contract, seen=seen)
    save_private(run.path, seen)
    summary = run.finish({**_summary(done, run, index), **watch.finish(best)})
    return {"run": str(run.path), "encoder": str(run.path / "encoder"), **{key: summary[key] for key in RESULT}}


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


def _check_processes(ranks: Ranks, recipe: Recipe, archive_paths: Sequence[str | Path], dry_run: bool) -> None:
    """Make sure that several processes can do what is asked for."""
    train = recipe.train
    if ranks.alone:
        return
    if dry_run:
        raise ConfigError("--dry-run looks at one process; start it without torchrun")
    if not all(is_index(Path(path)) for path in archive_paths):
        raise ConfigError(
            f"{ranks.world} processes need an INDEX, which each of them opens; make one first: geomed-mae scan "
            "ARCHIVE... --out INDEX, then give it as --archive INDEX"
        )
    if train.batch_size % (ranks.world * train.accumulate):
        raise ConfigError(
            f"train.batch_size {train.batch_size} cannot be shared by {ranks.world} processes in {train.accumulate} "
            f"parts each; make it a multiple of {ranks.world * train.accumulate}"
        )


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
