"""Watching a run: live panels, the live probe, and what the report needs. One object for `pretrain`.

Nothing here changes training: the pictures' samples come from a stream of their own, no random state is drawn from,
and the model's mode is put back. What goes wrong while watching (a full disk, a full GPU, a file that went away) is
said once and ends no run. With several processes, rank 0 alone watches.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from geomed_mae.archives.description import describe_archive
from geomed_mae.archives.index import Index
from geomed_mae.archives.planes import sides
from geomed_mae.config import Recipe, TrainConfig
from geomed_mae.errors import ConfigError, OutputError, ReadError
from geomed_mae.models.mae import MaskedAutoencoder
from geomed_mae.samples.batch import Batch
from geomed_mae.samples.buckets import Bucket, shares
from geomed_mae.samples.loader import Steps
from geomed_mae.training.live_files import forget_after, live_name, thin_out
from geomed_mae.training.objective import MaskedObjective
from geomed_mae.training.panels import CANDIDATES, draw_reconstructions
from geomed_mae.training.probe_online import OnlineProbe
from geomed_mae.training.run import RunFolder, write_json

ARCHIVE = "archive.json"
MAX_PANELS = 5
"""Kinds of images that get a panel: those that most steps go to."""

LIVE_CANDIDATES, LIVE_ROWS, LIVE_DPI = 8, 3, 100
"""A live panel is small and quick: three rows, of eight crops that are the same all the way."""

log = logging.getLogger(__name__)
aloud = logging.getLogger("geomed_mae.labels")
"""Messages that may name label files: to stderr, and not into the run's train.log."""


class Watch:
    """Everything that looks at a pretraining run.

    Args:
        objective: what is trained.
        steps: gives the pictures' samples.
        index: the archive.
        recipe: train.panels_every, train.probe_every; labels.
        run: the open run folder.
        labels: label maps or a CSV table of images of the archive, for the probe.

    Raises:
        OutputError: the run folder cannot be written.
    """

    def __init__(
        self,
        objective: MaskedObjective,
        steps: Steps,
        index: Index,
        recipe: Recipe,
        run: RunFolder,
        *,
        labels: str | Path | None = None,
    ) -> None:
        self._objective, self._steps, self._index, self._recipe, self._run = objective, steps, index, recipe, run
        self._panels = run.path / "panels"
        self._batches: list[tuple[str, Batch]] = []
        self._scored: dict[str, Any] = {}
        self._complained: set[str] = set()
        done = 0 if run.resumed is None else run.resumed.step
        write_json(run.path / ARCHIVE, describe_archive(index))
        forget_after(self._panels, done)
        if done:
            run.record({"step": done, "resumed": True})
        self._probe = None if labels is None else self._open_probe(labels)
        if recipe.train.panels_every:
            # Now, not when they are first due: with CUDA a thread of its own then makes batches with the same `steps`,
            # whose caches are for one thread.
            with self._looking("live panels"):
                self._batches = [(name, steps.examples(bucket, LIVE_CANDIDATES)) for name, bucket in self._shown()]

    def observe(self, done: int, model: MaskedAutoencoder) -> None:
        """Look at the model (averaged, where there is an average) with what is due after `done` steps; see `due`."""
        train = self._recipe.train
        if train.panels_every and done % train.panels_every == 0:
            with self._looking("live panels"):
                self._draw_live(done, model)
        if self._probe is not None and train.probe_every and done % train.probe_every == 0:
            with self._looking("the live probe"):
                self._score(self._probe, done, model)

    def finish(self, model: MaskedAutoencoder) -> dict[str, Any]:
        """Draw the final panels and probe for the last time; return `reconstruction_error`, and `probe` with labels.

        Raises:
            OutputError: a picture cannot be written. ReadError: no image of the archive can be read any more.
        """
        train, errors = self._recipe.train, {}
        if train.panels_every:
            with self._looking("live panels"):
                self._draw_live(train.steps, model)
        objective = self._looking_at(model)
        with evaluating(objective.mae):
            for name, bucket in self._shown():
                batch = self._steps.examples(bucket, CANDIDATES)
                path = self._panels / f"{name}.png"
                errors[name] = draw_reconstructions(objective, batch, path, sides=self._sides(batch))
        found: dict[str, Any] = {"reconstruction_error": errors}
        if self._probe is not None:
            self._score(self._probe, train.steps, model)
            found["probe"] = self._scored
        return found

    @contextlib.contextmanager
    def _looking(self, what: str) -> Iterator[None]:
        try:
            yield
        except (OutputError, ReadError, torch.OutOfMemoryError) as error:
            if what not in self._complained:
                self._complained.add(what)
                why = f"images cannot be read: {error.reason}" if isinstance(error, ReadError) else str(error)
                if isinstance(error, torch.OutOfMemoryError):
                    why = "training leaves the device too little memory for it"
                log.warning("%s: %s; the run goes on", what, why)

    def _looking_at(self, model: MaskedAutoencoder) -> MaskedObjective:
        own = self._objective
        return MaskedObjective(model, own.contract, masking=own.masking, seed=own.seed)

    def _shown(self) -> list[tuple[str, Bucket]]:
        """Return (file name without suffix, bucket) of those that most steps go to, in that order."""
        buckets = self._steps.buckets
        order = np.argsort(-shares(buckets, self._steps.config.weights), kind="stable")[:MAX_PANELS]
        return [
            (f"{number:02d}-{Path(buckets[place].modality).stem}", buckets[place])
            for number, place in enumerate(order, start=1)
        ]

    def _sides(self, batch: Batch) -> dict[str, Any]:
        return sides({key: self._index.outline(key).geometry for key in batch.keys})

    def _draw_live(self, done: int, model: MaskedAutoencoder) -> None:
        objective = self._looking_at(model)
        with evaluating(objective.mae):
            for name, batch in self._batches:
                path = self._panels / f"{live_name(done)}-{name}.png"
                how = {"rows": LIVE_ROWS, "dpi": LIVE_DPI, "note": f"step {done:,}"}
                draw_reconstructions(objective, batch, path, sides=self._sides(batch), **how)
        thin_out(self._panels)

    def _open_probe(self, labels: str | Path) -> OnlineProbe | None:
        own = self._objective
        try:
            return OnlineProbe.open(self._index, labels, own.contract, own.mae.spec, self._recipe)
        except (ConfigError, ReadError) as error:
            aloud.warning("%s", error)
            log.warning("there will be no probe: the labels do not fit the archive; training does not need them")
            return None

    def _score(self, probe: OnlineProbe, done: int, model: MaskedAutoencoder) -> None:
        scores = probe.score(model.encoder)
        self._run.record({"step": done, **scores})
        self._scored = {name.removeprefix("probe_"): value for name, value in scores.items()}


def due(train: TrainConfig, done: int, *, labelled: bool) -> bool:
    """Return whether a live panel or, with labels, a probe is due after `done` steps; the last step is `finish`'s."""
    every = [train.panels_every, train.probe_every if labelled else None]
    return done < train.steps and any(number and done % number == 0 for number in every)


@contextlib.contextmanager
def evaluating(mae: MaskedAutoencoder) -> Iterator[None]:
    """Put a model into evaluation mode, and back into the mode that it was in."""
    before = mae.training
    mae.eval()
    try:
        yield
    finally:
        mae.train(before)
