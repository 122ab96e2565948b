"""The answer of a probe: is the encoder above the best of its floors, and may that be chance?

The encoder's read-out is chosen by what the training side expects of it, never by the test scores; the floor is the
best of all by its test score. Whatever that choice is worth favours the floor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from geomed_mae.errors import ConfigError
from geomed_mae.scoring.intervals import Bounds, Estimate, Scored, paired
from geomed_mae.scoring.values import mean_known, rounded
from geomed_mae.training.comparison import LEAST_GROUPS
from geomed_mae.training.probe_features import CONVOLUTIONS, ENCODER, FLOOR, IMAGE_STATISTICS, PATCH_STATISTICS, RANDOM

ANY: Bounds = (None, None)
"""Bounds of a difference: R^2 has no least value."""
DRAWS = 5
"""Draws of few labels, whose scores are averaged."""
WORDS = {
    RANDOM: "the same network with random weights",
    CONVOLUTIONS: "random convolutional features",
    PATCH_STATISTICS: "statistics of the patches' pixels",
    IMAGE_STATISTICS: "statistics of the images' pixels",
}
"""Floors in words."""


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """One source: its scores, and the loss that its training side expects (smaller is better)."""

    scores: Scored
    loss: float


def compare(found: Mapping[str, Standing], unit: str) -> dict[str, Any]:
    """Return which read-out of the encoder stands against which floor, their difference, and a sentence.

    Args:
        found: by the names of `probe_features`.
        unit: what a group is called.
    """
    mine = min((name for name in found if name.startswith(ENCODER)), key=lambda name: found[name].loss)
    floor = max(
        (name for name in found if name.startswith(FLOOR)),
        key=lambda name: -1e9 if (value := found[name].scores.headline()) is None else value,
    )
    values = [found[name].scores.headline() for name in (mine, floor)]
    gain = paired([(found[mine].scores, found[floor].scores)], bounds=ANY)
    known = None not in values
    return {
        "encoder_read_out": mine,
        "best_floor": floor,
        "difference": gain.to_json(),
        "encoder_beats_floors": bool(known and values[0] > values[1]),
        "verdict": sentence(gain, values, floor, unit),
    }


def sentence(gain: Estimate, values: Sequence[float | None], floor: str, unit: str) -> str:
    """Return in plain words whether the encoder is above its best floor."""
    rival = WORDS[next(name for name in WORDS if floor.startswith(name))]
    if gain.mean is None or None in values:
        return f"Whether the encoder is above its floors cannot be told: {gain.metric} is not defined on the test part."
    scores = f"{values[0]:.3f} against {values[1]:.3f} ({gain.metric})"
    if gain.low is None or gain.high is None:
        one = gain.groups == 1
        few = f"{gain.groups} group{'' if one else 's'} of test {unit} give{'s' if one else ''} no interval"
        return f"The encoder scores {scores} for the best floor, {rival}; {few}."
    interval = (
        f"difference {gain.mean:+.3f}, 95 % interval {gain.low:+.3f} to {gain.high:+.3f} over {gain.groups} {unit}"
    )
    if gain.groups < LEAST_GROUPS or gain.low <= 0 <= gain.high:
        why = f"{gain.groups} test {unit} are too few" if gain.groups < LEAST_GROUPS else "the interval holds 0"
        return f"Whether the encoder is above the best floor, {rival}, cannot be told: {scores}, {interval}; {why}."
    place = "above" if gain.low > 0 else "below"
    return f"The encoder is {place} the best floor, {rival}: {scores}, {interval}."


def numbers(given: str | Sequence[int] | None) -> tuple[int, ...]:
    """Return numbers of labels, given one by one or as text with commas; () where nothing is given.

    Raises:
        ConfigError: one is no whole number from 1 on.
    """
    if not given:
        return ()
    parts = given.split(",") if isinstance(given, str) else list(map(str, given))
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise ConfigError(f"--shots takes whole numbers of labels from 1 on, such as 8,16,32, not '{','.join(parts)}'")
    return tuple(int(part) for part in parts)


def curve(
    counts: Sequence[int], names: Sequence[str], score: Callable[[str, int, int], Scored], per: str
) -> list[dict[str, Any]]:
    """Return the scores with few labels, one entry a count: means over DRAWS, and the difference to the best floor.

    Args:
        counts: numbers of labels.
        names: the encoder's read-out first, then the floors.
        score: (source, count, seed) -> its scores.
        per: what is counted.
    """
    found = []
    for count in counts:
        drawn = {name: [score(name, count, seed) for seed in range(DRAWS)] for name in names}
        means = {name: mean_known([one.headline() for one in runs]) for name, runs in drawn.items()}
        mine, floors = names[0], names[1:]
        best = max(floors, key=lambda name: -1e9 if means[name] is None else means[name])
        found.append(
            {
                "shots": count,
                "per": per,
                "draws": DRAWS,
                "scores": {name: rounded(value) for name, value in means.items()},
                "best_floor": best,
                "difference": paired(list(zip(drawn[mine], drawn[best], strict=True)), bounds=ANY).to_json(),
            }
        )
    return found
