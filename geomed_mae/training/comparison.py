"""What a study found: both arms over their seeds, their paired difference, and whether pretraining paid.

Numbers come from the scores of the members' test images alone. All arms and seeds are scored on the same images, so
that an image that is hard for both takes no part in the difference.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from geomed_mae.archives.index import Index, Row
from geomed_mae.errors import ConfigError
from geomed_mae.scoring.intervals import DIFFERENCE, SCORE, Estimate, Metric, check_same, resample
from geomed_mae.scoring.stored import Scores
from geomed_mae.scoring.values import rounded

PRETRAINED, SCRATCH = "pretrained", "scratch"
ARMS = (PRETRAINED, SCRATCH)
"""Arms of a study, in this order: from the given encoder, and from random weights."""
LEAST_GROUPS = 5
"""Test patients or scenes below which nothing is claimed: an interval of so few rests on the shape of a distribution
that nobody has seen (with 5, all of them ahead happens by chance in 1 of 16 cases)."""

PAID, DID_NOT_PAY, UNKNOWN = "paid", "did not pay", "cannot be told"
HEADS = {
    PAID: "Pretraining paid here",
    DID_NOT_PAY: "Pretraining did not pay here",
    UNKNOWN: "Whether pretraining paid here cannot be told",
}


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One finished run of a study: its arm, its seed, where it is in the study, and what it found."""

    arm: str
    seed: int
    folder: str
    summary: Mapping[str, Any]
    scores: Scores | None


def unit_of(index: Index, rows: Sequence[Row]) -> str:
    """Return what groups of these images are called: scenes, patients where all images name theirs, else images.

    Pictures and NIfTI files name nobody: to call their groups patients would claim what is not known. Where some of
    their images belong together (equal pixels), they are called groups.
    """
    if all(row.geometry == "raster" for row in rows):
        return "scenes"
    named = all(any(kind == "patient" for kind, _ in index.identity(row.key)) for row in rows)
    if named:
        return "patients"
    return "images" if len({row.group for row in rows}) == len(rows) else "groups"


def compare(members: Sequence[Member], unit: str) -> dict[str, Any]:
    """Return the summary of a study as plain values.

    Args:
        members: finished runs; each arm has the same seeds, in the same order.
        unit: what a group is called, see `unit_of`.

    Raises:
        ConfigError: an arm lacks a seed that the other has.
        IntegrityError: members were scored on different images.
    """
    arms = {name: [one for one in members if one.arm == name] for name in ARMS}
    arms = {name: found for name, found in arms.items() if found}
    seeds = {name: [one.seed for one in found] for name, found in arms.items()}
    if any(found != next(iter(seeds.values())) for found in seeds.values()):
        raise ConfigError(f"the arms of a study have different seeds ({seeds}); finish it with --resume")
    first = members[0]
    summary: dict[str, Any] = {
        "verb": "finetune",
        "study": True,
        "task": first.summary.get("task"),
        "unit": unit,
        "arms": {name: {} for name in arms},
        "used": _used(first, len(next(iter(arms.values())))),
        "runs": [_run(one) for one in members],
        "seconds": rounded(sum(float(one.summary.get("seconds") or 0) for one in members)),
    }
    for name in ("leakage", "transductive"):
        if first.summary.get(name) is not None:
            summary[name] = first.summary[name]
    if dropped := next((one.summary["dropped"] for one in members if one.summary.get("dropped")), None):
        summary["dropped"] = dropped  # keys of the recipe that the twins have without effect
    if all(one.scores is not None for one in members):
        summary |= _scored(arms, summary["used"], unit)
        if summary.get("outcome") == PAID:
            summary["advice"] += _of_steps(arms[SCRATCH])
    return summary


def _run(one: Member) -> dict[str, Any]:
    validation = one.summary.get("validation") or {}
    return {
        "arm": one.arm,
        "seed": one.seed,
        "folder": one.folder,
        "score": None if one.scores is None else rounded(one.scores.headline()),
        "validation": validation.get("best"),
        "best_step": validation.get("step"),
        "steps": one.summary.get("steps"),
        "stopped_early": bool(validation.get("stopped_early")),
        "seconds": one.summary.get("seconds"),
    }


def _used(first: Member, seeds: int) -> dict[str, Any]:
    """Return which labels were used; the few are drawn anew by each seed, in equal number."""
    found = {name: first.summary.get(name) for name in ("split", "few", "labels", "frozen")}
    return {**found, "per_class": first.summary.get("task") == "classify", "seeds": seeds}


def _scored(arms: Mapping[str, Sequence[Member]], used: Mapping[str, Any], unit: str) -> dict[str, Any]:
    scores = {name: _scores_of(found) for name, found in arms.items()}
    check_same([one for found in scores.values() for one in found])
    first = next(iter(scores.values()))[0]
    heads: dict[str, list[Metric]] = {name: [one.headline for one in found] for name, found in scores.items()}
    whole = _three(heads, first.metric, first.groups)
    found: dict[str, Any] = {
        "metric": first.metric,
        "arms": {name: whole[name].to_json() for name in arms},
        "classes": _classes(scores),
        "groups": _groups(scores),
    }
    if len(arms) == len(ARMS):
        gain, (outcome, sentence) = whole["difference"], verdict(whole, used, unit)
        found |= {
            "difference": gain.to_json(),
            "outcome": outcome,
            "verdict": sentence,
            "seeds_agree": gain.seeds > 1 and gain.low_seeds is not None and not chance_of_runs(gain),
            "advice": advice(gain, outcome, unit),
        }
    return found


def _scores_of(members: Sequence[Member]) -> list[Scores]:
    return [one.scores for one in members if one.scores is not None]


def _three(heads: Mapping[str, Sequence[Metric]], name: str, groups: Sequence[str]) -> dict[str, Estimate]:
    """Return an estimate of each arm, and of their difference where there are both."""
    drawn = {arm: resample(metrics, groups) for arm, metrics in heads.items()}
    found = {arm: one.estimate(name, SCORE) for arm, one in drawn.items()}
    if len(heads) == len(ARMS):
        found["difference"] = drawn[PRETRAINED].minus(drawn[SCRATCH]).estimate(name, DIFFERENCE)
    return found


def _classes(scores: Mapping[str, Sequence[Scores]]) -> dict[str, Any]:
    """Return class -> estimates by arm, and whether the class counts in the headline."""
    first = next(iter(scores.values()))[0]
    found = {}
    for number, name in enumerate(first.classes):
        heads = {arm: [_of_class(one, number) for one in runs] for arm, runs in scores.items()}
        whole = _three(heads, first.metric, first.groups)
        counted = first.task == "classify" or number > 0
        found[name] = {"counted": counted, **{arm: one.to_json() for arm, one in whole.items()}}
    return found


def _of_class(scores: Scores, number: int) -> Callable[[np.ndarray], float | None]:
    return lambda images: scores.class_score(number, images)


def _groups(scores: Mapping[str, Sequence[Scores]]) -> list[dict[str, Any]]:
    """Return each group's score by arm, mean over seeds, and the differences; [] where a group alone has no score."""
    first = next(iter(scores.values()))[0]
    members: dict[str, list[int]] = {}
    for number, group in enumerate(first.groups):
        members.setdefault(group, []).append(number)
    found = []
    for group, numbers in members.items():
        images = np.array(numbers)
        values = {arm: [one.headline(images) for one in runs] for arm, runs in scores.items()}
        if any(value is None for each in values.values() for value in each):
            continue
        line: dict[str, Any] = {"group": group, "images": len(numbers)}
        line |= {arm: rounded(float(np.mean(each))) for arm, each in values.items()}
        if len(values) == len(ARMS):
            per_seed = [a - b for a, b in zip(*(values[arm] for arm in ARMS), strict=True)]
            line["difference"] = rounded(float(np.mean(per_seed)))
            line["per_seed"] = [rounded(value) for value in per_seed]
        found.append(line)
    return found


# ----------------------------------------------------------------------------------------------------------- in words


def verdict(found: Mapping[str, Estimate], used: Mapping[str, Any], unit: str) -> tuple[str, str]:
    """Return (outcome, sentence): whether pretraining paid, in plain words with the numbers.

    The outcome goes by the interval over groups; where other seeds could turn it round, the sentence says so.

    Args:
        found: estimates of both arms and of their difference, by name.
        used: what was used, see `compare`.
        unit: what a group is called.
    """
    gain, means = found["difference"], [found[arm].mean for arm in ARMS]
    outcome = _outcome(gain)
    # A claim about these runs is no claim about pretraining where other seeds could turn it round, or none were tried.
    here = "here" if outcome == UNKNOWN or not (gain.seeds == 1 or chance_of_runs(gain)) else "in these runs"
    head = HEADS[outcome].replace("here", here if gain.seeds > 1 else here.replace("these runs", "this run"))
    if gain.mean is None or None in means:
        return outcome, f"{head}: {gain.metric}: not defined on {_count(gain.groups, unit, 'test ')}."
    number = f".{_digits(gain)}f"
    rival = "frozen random weights" if used.get("frozen") else "random weights"
    text = (
        f"{head}: {_labels(used, unit)}, the score on {_count(gain.groups, unit, 'test ')} is {means[0]:{number}} from "
        f"pretrained and {means[1]:{number}} from {rival}, {abs(gain.mean):{number}} "
        f"{'more' if gain.mean >= 0 else 'less'} ({gain.metric}; "
    )
    if gain.low is None or gain.high is None:
        return outcome, f"{text}no interval: {_why_none(gain, unit)})."
    text += f"95 % interval over {unit} {gain.low:+{number}} to {gain.high:+{number}})"
    if outcome == UNKNOWN:
        few = f"{gain.groups} test {unit} are too few for a claim"
        return outcome, f"{text}; {few if gain.groups < LEAST_GROUPS else 'the interval holds 0'}."
    if gain.seeds == 1:
        return outcome, f"{text}, with one seed."
    if chance_of_runs(gain):
        ends = f"{gain.low_seeds:+{number}} to {gain.high_seeds:+{number}}"
        return outcome, f"{text}; but {gain.seeds} seeds do not rule out chance of the runs: {ends} counting them too."
    return outcome, f"{text}; {gain.seeds} seeds agree."


def chance_of_runs(gain: Estimate) -> bool:
    """Return whether several seeds were tried and leave it open that others turn the difference round."""
    return gain.low_seeds is not None and gain.high_seeds is not None and gain.low_seeds <= 0 <= gain.high_seeds


def _outcome(gain: Estimate) -> str:
    if gain.low is None or gain.high is None or gain.groups < LEAST_GROUPS:
        return UNKNOWN
    return PAID if gain.low > 0 else DID_NOT_PAY if gain.high < 0 else UNKNOWN


def advice(gain: Estimate, outcome: str, unit: str) -> list[str]:
    """Return sentences on what the verdict does not cover, or on what would bring one about."""
    found = []
    if gain.seeds == 1:
        found.append(
            f"One seed: the interval says how far other test {unit} could change the difference, not how far other "
            "initial weights, orders and draws of labels could; --seeds 3 or more does."
        )
    elif outcome != UNKNOWN and chance_of_runs(gain):
        found.append(
            f"{gain.seeds} seeds are few: more of them (--seeds) would tell pretraining from luck of the runs."
        )
    if outcome == UNKNOWN:
        few = f"A claim needs {LEAST_GROUPS} test {unit} or more (labels.test)."
        found.append(few if gain.groups < LEAST_GROUPS else f"More labelled test {unit} would narrow the interval.")
    return found


def _of_steps(runs: Sequence[Member]) -> list[str]:
    """Return what a gain does not rule out: that random weights catch up with more steps."""
    steps = max(int(one.summary.get("steps") or 0) for one in runs)
    best = [(one.summary.get("validation") or {}).get("step") for one in runs]
    rising = sum(step is not None and step == one.summary.get("steps") for step, one in zip(best, runs, strict=True))
    text = f"Random weights had {steps} steps at most: they may catch up in longer runs (train.steps)."
    still = f" In {rising} of {len(runs)} of their runs the last validation was the best: they were still learning."
    return [text + still * bool(rising)]


def _why_none(gain: Estimate, unit: str) -> str:
    if gain.groups < 2:
        return f"{_count(gain.groups, unit)} cannot say how much {unit} differ"
    if gain.mean == 0:
        return "both score the same"
    return f"too few draws of these {unit} have a score, or all have the same"


def _labels(used: Mapping[str, Any], unit: str) -> str:
    """Return what was trained on, in words."""
    few, split = used.get("few"), used.get("split") or {}
    if not few:
        groups, images = (split.get("groups") or {}).get("train"), split.get("train")
        if groups is None:
            return "with the labels given"
        return f"with all {_count(groups, unit, 'labelled ')}" + (f" ({images} images)" if images != groups else "")
    if few.get("shots") is not None and used.get("per_class"):
        return f"with {few['shots']} labelled images of each class ({few['images']} in all)"
    return f"with {_count(few['groups'], unit, 'labelled ')} of {few['of_groups']}"


def _count(number: int, unit: str, before: str = "") -> str:
    return f"{number} {before}{unit if number != 1 else unit.removesuffix('s')}"


def _digits(gain: Estimate) -> int:
    """Return digits after the point: three, or more where the interval is so narrow that three would hide it."""
    if gain.low is None or gain.high is None:
        return 3
    return 3 if gain.high - gain.low >= 0.004 else 4
