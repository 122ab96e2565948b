"""The live probe: what the features of a run in progress say about labels, on a bounded and fixed set of windows.

Labels never influence training: windows are read and scaled once, the encoder runs over them without gradients, and
the answer goes into the log. The maths are those of the verb `probe`, read out of the last block, on held-out
patients or scenes, beside the floor of random weights. Two kinds of labels: label maps (which share of a patch belongs
to each class), and a CSV table (the class of an image, from the mean of its tokens).

The pixels of all labelled images may be in the pretraining archive, their labels are not; the curve says whether
training goes on paying, and the verb `probe` on images outside the archive says how much.

Cost of one probe: the encoder's forward pass over at most `probe_windows.MAX_WINDOWS` windows of the pretraining crop
(that of as many samples of a step with nothing hidden and no backward pass), and one ridge of the encoder's width.
Measured for a tiny encoder and 58 windows of 24^3 voxels: 1.0 s of one core, the time of five steps.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from geomed_mae.archives.index import Index
from geomed_mae.config import Recipe
from geomed_mae.models.contract import Contract
from geomed_mae.models.spec import ModelSpec
from geomed_mae.models.vit import Encoder
from geomed_mae.scoring.ranking import Ranking
from geomed_mae.scoring.values import mean_known, r_squared
from geomed_mae.training.probe_windows import Window, WindowReader, choose
from geomed_mae.training.probing import SEED, Patches, held_out_predictions

PER_PASS = 8
"""Windows that go through the encoder together."""


@dataclass(frozen=True, slots=True, eq=False)
class OnlineProbe:
    """Windows, what is true of their tokens, and which of these are held out.

    Attributes:
        windows: what the encoder is fed.
        truth: (rows, classes) shares of label maps, one row a kept token; or 1, 0 and -1 (unknown), one row a window.
        held: (rows,) rows that are scored.
        dense: whether rows are tokens.
        spec: of the encoders that will come, for the floor.
    """

    windows: tuple[Window, ...]
    truth: np.ndarray
    held: np.ndarray
    dense: bool
    spec: ModelSpec
    _floor: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(cls, index: Index, labels: str | Path, contract: Contract, spec: ModelSpec, recipe: Recipe) -> OnlineProbe:
        """Match labels to the images of an index, choose windows, and read them.

        Raises:
            ConfigError: no labels that match, fewer than two classes, or too few groups to hold one out.
            ReadError: an image or a label file cannot be read.
        """
        chosen = choose(WindowReader(index, contract, spec, recipe), Path(labels))
        return cls(chosen.windows, chosen.truth, chosen.held, chosen.dense, spec)

    def score(self, encoder: Encoder, *, floor: bool = True) -> dict[str, float]:
        """Return the scores of an encoder, on its device; its mode is put back, no random state is touched.

        Means over classes: `probe_auroc`; of label maps `probe_r2`; and `probe_accuracy`, except where an image may
        have several classes. With `floor` the same of random weights as `probe_floor_...`; and `probe_seconds`.
        """
        start = time.perf_counter()
        scores = {f"probe_{name}": value for name, value in self._scores(encoder).items()}
        if floor:
            if not self._floor:
                device = next(encoder.parameters()).device
                with torch.random.fork_rng(devices=[]):
                    torch.manual_seed(SEED)
                    random = Encoder(self.spec).to(device)
                self._floor.update(self._scores(random))
            scores |= {f"probe_floor_{name}": value for name, value in self._floor.items()}
        return {**scores, "probe_seconds": round(time.perf_counter() - start, 2)}

    def _scores(self, encoder: Encoder) -> dict[str, float]:
        features = self._features(encoder)
        if not np.isfinite(features).all():
            return {}
        return (_dense_scores if self.dense else _image_scores)(features, self.truth, self.held)

    @torch.no_grad()
    def _features(self, encoder: Encoder) -> np.ndarray:
        """Return float64 (rows, dim), in the order of `truth`."""
        device, before = next(encoder.parameters()).device, encoder.training
        encoder.eval()
        found: dict[int, np.ndarray] = {}
        try:
            order = sorted(range(len(self.windows)), key=lambda number: repr(self.windows[number].kind))
            for _, same in itertools.groupby(order, key=lambda number: self.windows[number].kind):
                numbers = list(same)
                for first in range(0, len(numbers), PER_PASS):
                    some = numbers[first : first + PER_PASS]
                    found |= zip(some, self._pass(encoder, [self.windows[one] for one in some], device), strict=True)
        finally:
            encoder.train(before)
        return np.concatenate([found[number] for number in range(len(self.windows))]).astype(np.float64)

    def _pass(self, encoder: Encoder, windows: Sequence[Window], device: torch.device) -> list[np.ndarray]:
        pixels, valid = (
            torch.stack([getattr(one, name) for one in windows]).to(device) for name in ("pixels", "valid")
        )
        spacing = None
        if windows[0].spacing is not None:
            spacing = torch.tensor([one.spacing for one in windows], dtype=torch.float32, device=device)
        out = encoder(pixels, valid, windows[0].channels, spacing, layers=(-1,))
        maps = out.maps[0].float().cpu().numpy()
        rows = [one[:, window.kept].T for one, window in zip(maps, windows, strict=True)]
        return rows if self.dense else [tokens.mean(axis=0, keepdims=True) for tokens in rows]


def _dense_scores(features: np.ndarray, truth: np.ndarray, held: np.ndarray) -> dict[str, float]:
    """Fit shares of patches; AUROC of a class being the largest, R^2 and accuracy over held-out patches.

    Answers are clipped to 0 to 1, as shares are: a scene that is darker than all others would decide R^2 alone.
    """
    fitted, _ = held_out_predictions(Patches(features, truth, held))
    fitted, known = fitted.clip(0, 1), truth[held]
    largest, classes = known.argmax(axis=1), range(truth.shape[1])
    found = {
        "auroc": mean_known([Ranking(fitted[:, number], largest == number).auroc() for number in classes]),
        "r2": mean_known([r_squared(fitted[:, number], known[:, number]) for number in classes]),
        "accuracy": float((fitted.argmax(axis=1) == largest).mean()),
    }
    return {name: round(value, 6) for name, value in found.items() if value is not None}


def _image_scores(features: np.ndarray, truth: np.ndarray, held: np.ndarray) -> dict[str, float]:
    """Fit classes of images; AUROC per class over held-out images that are known, and accuracy of single labels."""
    known = truth >= 0
    middle = np.where(known, truth, 0)[~held].sum(axis=0) / np.maximum(known[~held].sum(axis=0), 1)
    filled = np.where(known, truth, middle)
    fitted, _ = held_out_predictions(Patches(features, filled, held))
    areas = [
        Ranking(fitted[known[held, number], number], truth[held][known[held, number], number] == 1).auroc()
        for number in range(truth.shape[1])
    ]
    scores = {} if (area := mean_known(areas)) is None else {"auroc": round(area, 6)}
    if known.all() and (truth.sum(axis=1) == 1).all():
        scores["accuracy"] = round(float((fitted.argmax(axis=1) == truth[held].argmax(axis=1)).mean()), 6)
    return scores
