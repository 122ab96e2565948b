"""Linear probe of classes: logistic regression on standardised features, its strength chosen on the training side.

The penalty is chosen by cross-validation in which no patient or scene is on both sides, by the log loss, which is finer
than accuracy where images are few. Features that are all noise then get a strong penalty rather than a bad score.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

STRENGTHS = tuple(10.0**power for power in range(-6, 3))
"""Candidates of scikit-learn's C, for standardised features; smaller is a stronger penalty."""
DEFAULT_STRENGTH = 1e-3
"""Where there are too few groups to choose."""
FOLDS = 5
"""Of the cross-validation, fewer where a class has fewer groups."""
MOST_CHOSEN_ON = 10_000
"""Rows that the strength is chosen on; of more a fixed random choice of whole groups."""
ROUNDS = 1000
"""Largest number of iterations of the optimiser."""
SEED = 0


@dataclass(frozen=True, slots=True, eq=False)
class Linear:
    """What a linear probe answers.

    Attributes:
        chances: (m, classes); of a single label they sum to 1, and are 0 for a class that was not trained on.
        strengths: the C that was chosen, one a fit (one a class where an image may have several).
        loss: log loss in cross-validation, mean over fits: how good these features are, told by the training side
            alone; None where there was nothing to choose on.
    """

    chances: np.ndarray
    strengths: tuple[float, ...]
    loss: float | None


def linear(train: np.ndarray, targets: np.ndarray, groups: Sequence[str], asked: np.ndarray, classes: int) -> Linear:
    """Fit on the training side and answer.

    Args:
        train: (n, f) features.
        targets: int (n,) class numbers, at least two different; or (n, classes) 1, 0 and -1 where it is not known.
        groups: of the n images.
        asked: (m, f) features.
        classes: number of classes.
    """
    mean, spread = train.mean(axis=0, dtype=np.float64), train.std(axis=0, dtype=np.float64)
    spread = np.where(spread > 0, spread, 1.0)
    rows, asked = (((part - mean) / spread).astype(np.float32) for part in (train, asked))
    names = np.asarray(groups)
    chances = np.zeros((len(asked), classes))
    if targets.ndim == 1:
        found, present, strength, loss = _fit(rows, targets, names, asked)
        chances[:, present] = found
        return Linear(chances, (strength,), loss)
    fits = []
    for number in range(classes):
        known = targets[:, number] >= 0
        values = targets[known, number]
        if len(np.unique(values)) < 2:
            chances[:, number] = values.mean() if len(values) else 0.5
            continue
        found, _, *rest = _fit(rows[known], values, names[known], asked)
        chances[:, number] = found[:, 1]
        fits.append(rest)
    losses = [loss for _, loss in fits if loss is not None]
    return Linear(chances, tuple(strength for strength, _ in fits), float(np.mean(losses)) if losses else None)


def _fit(
    rows: np.ndarray, targets: np.ndarray, groups: np.ndarray, asked: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float, float | None]:
    """Return (chances of the classes present, their numbers, C, its loss in cross-validation)."""
    strength, loss = _strength(rows, targets, groups)
    model = _regression(strength)
    _quiet(model.fit, rows, targets)
    return model.predict_proba(asked), model.classes_, strength, loss


def _regression(strength: float) -> Any:
    from sklearn.linear_model import LogisticRegression  # slow to import

    return LogisticRegression(C=strength, max_iter=ROUNDS, warm_start=True)


def _quiet(fit: Any, rows: np.ndarray, targets: np.ndarray) -> None:
    """Fit; weak penalties may not converge, and then lose in cross-validation or are as good as converged."""
    from sklearn.exceptions import ConvergenceWarning

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        fit(rows, targets)


def _strength(rows: np.ndarray, targets: np.ndarray, groups: np.ndarray) -> tuple[float, float | None]:
    """Return the C of the least log loss in grouped cross-validation, and that loss."""
    from sklearn.metrics import log_loss

    folds = _folds(targets, groups)
    if not folds:
        return DEFAULT_STRENGTH, None
    losses = np.zeros(len(STRENGTHS))
    for inside, outside in folds:
        # Each fit goes on from the one before, which had a stronger penalty.
        model = _regression(STRENGTHS[0])
        for place, strength in enumerate(STRENGTHS):
            model.set_params(C=strength)
            _quiet(model.fit, rows[inside], targets[inside])
            found = model.predict_proba(rows[outside])
            losses[place] += log_loss(targets[outside], found, labels=model.classes_) * len(outside)
    best = int(np.argmin(losses))
    return STRENGTHS[best], float(losses[best] / sum(len(outside) for _, outside in folds))


def _folds(targets: np.ndarray, groups: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (rows inside, rows outside) of folds that keep groups whole and have all classes inside."""
    from sklearn.model_selection import StratifiedGroupKFold

    rng = np.random.default_rng(SEED)
    chosen = np.arange(len(targets))
    if len(targets) > MOST_CHOSEN_ON:
        _, numbers = np.unique(groups, return_inverse=True)
        places = rng.permutation(numbers.max() + 1)[numbers]
        chosen = np.sort(np.argsort(places, kind="stable")[:MOST_CHOSEN_ON])
    classes = np.unique(targets)
    fewest = min(len(np.unique(groups[chosen][targets[chosen] == one])) for one in classes)
    count = min(FOLDS, fewest)
    if count < 2:
        return []
    splitter = StratifiedGroupKFold(count, shuffle=True, random_state=SEED)
    found = []
    for inside, outside in splitter.split(np.zeros(len(chosen)), targets[chosen], groups[chosen]):
        inside, outside = chosen[inside], chosen[outside]
        if len(outside) and len(np.unique(targets[inside])) == len(classes):
            found.append((inside, outside))
    return found
