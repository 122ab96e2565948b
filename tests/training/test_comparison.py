"""Whether pretraining paid: three outcomes, in words that say no more than the numbers do."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.scoring import intervals
from geomed_mae.scoring.intervals import Estimate
from geomed_mae.training.comparison import Member, advice, compare, unit_of, verdict
from tests.make_study import MR, XRAY, FakeTask, FakeTune, recipe, row


@pytest.fixture(autouse=True)
def few_rounds(monkeypatch):
    monkeypatch.setattr(intervals, "ROUNDS", 200)


def members(tmp_path, tune: FakeTune | None = None, task: FakeTask | None = None, base=MR, seeds: int = 3):
    tune, task = tune or FakeTune(summarised=False), task or FakeTask()
    found = []
    for seed in range(seeds):
        for arm, encoder in (("pretrained", "encoder"), ("scratch", "none")):
            own = recipe(base, seed=seed, seeds=1)
            out = tmp_path / arm / f"seed-{seed}"
            how = {"twin_of": None, "transductive": False, "resume": False, "overwrite": False}
            summary = tune(own, task, encoder, out, **how)
            scores = tune.scores(own, task, encoder != "none", seed) if task.test else None
            found.append(Member(arm, seed, f"{arm}/seed-{seed}", summary, scores))
    return found


def estimates(low: float | None, high: float | None, *, groups: int = 20, seeds: int = 3, of_seeds=None, mean=None):
    """Return what a verdict is made of: a difference with its intervals, and the means of the arms."""
    both = (low, high) if of_seeds is None else of_seeds
    both = (None, None) if seeds == 1 else both
    middle = mean if mean is not None else 0.0 if low is None else (low + high) / 2
    gain = Estimate("mean Dice", middle, low, high, *both, (middle,) * seeds, groups, groups, seeds)
    nothing = (None,) * 4
    arms = [
        Estimate("mean Dice", value, *nothing, (value,) * seeds, groups, groups, seeds) for value in (0.6 + middle, 0.6)
    ]
    return {"pretrained": arms[0], "scratch": arms[1], "difference": gain}


USED = {
    "few": {"shots": 4, "images": 4, "groups": 4, "of_images": 67, "of_groups": 67},
    "split": {},
    "per_class": False,
}


# ---------------------------------------------------------------------------------------------------------- the verdict


def test_pretraining_paid_when_the_interval_is_above_0():
    outcome, sentence = verdict(estimates(0.05, 0.13), USED, "patients")
    assert outcome == "paid"
    assert sentence == (
        "Pretraining paid here: with 4 labelled patients of 67, the score on 20 test patients is 0.690 from pretrained "
        "and 0.600 from random weights, 0.090 more (mean Dice; 95 % interval over patients +0.050 to +0.130); 3 seeds "
        "agree."
    )


def test_pretraining_did_not_pay_when_the_interval_is_below_0():
    outcome, sentence = verdict(estimates(-0.13, -0.05), USED, "scenes")
    assert outcome == "did not pay" and sentence.startswith(
        "Pretraining did not pay here: with 4 labelled scenes of 67"
    )
    assert "0.090 less" in sentence and "-0.130 to -0.050" in sentence


def test_it_cannot_be_told_when_the_interval_holds_0():
    outcome, sentence = verdict(estimates(-0.02, 0.04), USED, "patients")
    assert outcome == "cannot be told"
    assert sentence.startswith("Whether pretraining paid here cannot be told: ")
    assert sentence.endswith("95 % interval over patients -0.020 to +0.040); the interval holds 0.")


def test_four_patients_are_too_few_for_a_claim_however_far_the_interval_is_from_0():
    found = estimates(0.05, 0.13, groups=4)
    outcome, sentence = verdict(found, USED, "patients")
    assert outcome == "cannot be told" and sentence.endswith("4 test patients are too few for a claim.")
    assert advice(found["difference"], outcome, "patients") == ["A claim needs 5 test patients or more (labels.test)."]


def test_no_interval_is_no_claim_and_the_reason_is_told():
    outcome, sentence = verdict(estimates(None, None, groups=1, mean=0.1), USED, "scenes")
    assert outcome == "cannot be told" and sentence.endswith("no interval: 1 scene cannot say how much scenes differ).")
    assert verdict(estimates(None, None, mean=0.0), USED, "patients")[1].endswith("no interval: both score the same).")


def test_a_claim_that_other_seeds_could_turn_round_is_about_these_runs_alone():
    found = estimates(0.01, 0.05, of_seeds=(-0.02, 0.08))
    outcome, sentence = verdict(found, USED, "patients")
    assert outcome == "paid" and sentence.startswith("Pretraining paid in these runs: ")
    assert sentence.endswith("but 3 seeds do not rule out chance of the runs: -0.020 to +0.080 counting them too.")
    assert "more of them (--seeds)" in advice(found["difference"], outcome, "patients")[0]


def test_a_claim_from_one_seed_is_about_this_run_alone():
    found = estimates(0.01, 0.05, seeds=1)
    outcome, sentence = verdict(found, USED, "patients")
    assert sentence.startswith("Pretraining paid in this run: ") and sentence.endswith("with one seed.")
    assert "One seed" in advice(found["difference"], outcome, "patients")[0]


def test_a_frozen_twin_is_called_what_it_is():
    assert "0.600 from frozen random weights" in verdict(estimates(0.05, 0.13), {**USED, "frozen": True}, "patients")[1]


def test_a_narrow_interval_is_not_rounded_away():
    assert (
        "0.0009 more (mean Dice; 95 % interval over images +0.0004 to +0.0014)"
        in verdict(estimates(0.0004, 0.0014), USED, "images")[1]
    )


@pytest.mark.parametrize(
    ("used", "words"),
    [
        ({"few": None, "split": {"train": 67, "groups": {"train": 60}}}, "with all 60 labelled patients (67 images), "),
        ({"few": None, "split": {"train": 67, "groups": {"train": 67}}}, "with all 67 labelled patients, "),
        ({"few": {"fraction": 0.1, "groups": 1, "of_groups": 9}}, "with 1 labelled patient of 9, "),
        (
            {"few": {"shots": 32, "images": 64}, "per_class": True},
            "with 32 labelled images of each class (64 in all), ",
        ),
    ],
)
def test_the_labels_that_were_used_are_in_the_sentence(used, words):
    assert words in verdict(estimates(0.05, 0.13), used, "patients")[1]


# ---------------------------------------------------------------------------------------------------------- the summary


def test_the_summary_of_a_study_has_both_arms_their_difference_and_what_was_used(tmp_path):
    found = members(tmp_path)
    summary = compare(found, "patients")
    arms, gain = summary["arms"], summary["difference"]
    by_hand = [one.scores.headline() for one in found]
    assert arms["pretrained"]["per_seed"] == pytest.approx(by_hand[0::2], abs=1e-6)
    assert arms["scratch"]["mean"] == pytest.approx(np.mean(by_hand[1::2]), abs=1e-6)
    assert gain["mean"] == pytest.approx(arms["pretrained"]["mean"] - arms["scratch"]["mean"], abs=1e-5)
    assert gain["low"] < gain["mean"] < gain["high"] and (gain["groups"], gain["seeds"]) == (20, 3)
    assert summary["outcome"] == "paid" and summary["used"]["few"]["shots"] == 4
    assert any("Random weights had 400 steps at most: they may catch up" in line for line in summary["advice"])
    assert [line["seed"] for line in summary["runs"]] == [0, 0, 1, 1, 2, 2]
    assert summary["leakage"]["compared_with"]["pretraining"] == 67 and "transductive" not in summary


def test_the_difference_of_groups_and_classes_adds_up_to_that_of_the_whole(tmp_path):
    summary = compare(members(tmp_path), "patients")
    gain = summary["difference"]["mean"]
    assert np.mean([line["difference"] for line in summary["groups"]]) == pytest.approx(gain, abs=1e-5)
    counted = [one["difference"]["mean"] for one in summary["classes"].values() if one["counted"]]
    assert len(counted) == 2 and np.mean(counted) == pytest.approx(gain, abs=1e-5)
    assert not summary["classes"]["background"]["counted"]
    assert all(len(line["per_seed"]) == 3 for line in summary["groups"])


def test_classification_has_classes_and_no_scores_of_single_images(tmp_path):
    task = FakeTask(60, geometry="plane")
    summary = compare(members(tmp_path, task=task, base=XRAY, seeds=1), "images")
    assert summary["metric"] == "AUROC, mean over classes" and summary["groups"] == []
    both = [one["difference"]["mean"] for one in summary["classes"].values()]
    assert both[0] == pytest.approx(both[1]), "of two classes one is the other the wrong way round"


def test_seeds_without_a_twin_have_one_arm_and_no_verdict(tmp_path):
    alone = [one for one in members(tmp_path) if one.arm == "pretrained"]
    summary = compare(alone, "patients")
    assert list(summary["arms"]) == ["pretrained"] and "verdict" not in summary and "difference" not in summary
    assert summary["arms"]["pretrained"]["low_seeds"] is not None


def test_runs_without_a_test_part_have_no_scores(tmp_path):
    summary = compare([one for one in members(tmp_path, task=FakeTask(0)) if one.arm == "scratch"], "patients")
    assert summary["arms"] == {"scratch": {}} and "metric" not in summary and summary["runs"][0]["score"] is None


def test_arms_over_other_seeds_or_other_images_are_not_compared(tmp_path):
    found = members(tmp_path / "a")
    with pytest.raises(ConfigError, match="different seeds"):
        compare(found[:-1], "patients")
    other = members(tmp_path / "b", task=FakeTask(19))
    with pytest.raises(IntegrityError, match="20 and 19 images"):
        compare([*found[0::2], *other[1::2]], "patients")


def test_groups_are_called_patients_only_where_all_images_name_theirs():
    class Named:
        def identity(self, key):
            return (("series", "1"), ("patient", key)) if key == row(0, "plane").key else (("file", key),)

    index = Named()
    assert unit_of(index, [row(0, "raster"), row(1, "raster")]) == "scenes"
    assert unit_of(index, [row(0, "volume")]) == unit_of(index, [row(0, "plane")]) == "patients"
    assert unit_of(index, [row(0, "volume"), row(1, "volume")]) == "images"
    assert unit_of(index, [row(1, "plane", "g"), row(2, "plane", "g")]) == "groups"
