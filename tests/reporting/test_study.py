"""The pages of a study and of a fine-tuning run: the verdict first, numbers with intervals, nothing that misleads."""

from __future__ import annotations

import json
import re
from html import unescape
from pathlib import Path

import pytest

from geomed_mae.errors import ConfigError, IntegrityError
from geomed_mae.report import report
from geomed_mae.scoring import intervals
from geomed_mae.training.study import run_study
from tests.make_study import MR, XRAY, FakeTask, FakeTune, recipe


def study(out: Path, tune: FakeTune | None = None, *, task: FakeTask | None = None, base=MR, **how) -> Path:
    encoder = out.parent / "encoder"
    encoder.mkdir(parents=True, exist_ok=True)
    options = {"twin": True, "transductive": False, "resume": False, "overwrite": False, **how}
    seeds = options.pop("seeds", 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(intervals, "ROUNDS", 200)
        tune = tune or FakeTune(summarised=False)
        run_study(recipe(base, seeds=seeds), task or FakeTask(), str(encoder), out, tune=tune, **options)
    return out


def words(folder: Path) -> str:
    html = report(folder).read_text(encoding="utf-8")
    body = re.sub(r"<details>.*?</details>", " ", html.split("<body>")[1], flags=re.DOTALL)
    return " ".join(unescape(re.sub(r"<[^>]+>", " ", body)).split())


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch, request):
    """Drawing takes a second; one test looks at the pictures."""
    if "html" not in request.fixturenames:
        monkeypatch.setattr("geomed_mae.reporting.study.forest", lambda *_: None)
        monkeypatch.setattr("geomed_mae.reporting.study.learning", lambda *_: None)
        monkeypatch.setattr("geomed_mae.reporting.section.curves", lambda *_: None)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    return study(tmp_path_factory.mktemp("study") / "out", FakeTune())


@pytest.fixture(scope="module")
def html(finished) -> str:
    return report(finished).read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------------------- a study


def test_the_verdict_is_the_first_thing_on_the_page(finished, html):
    sentence = json.loads((finished / "summary.json").read_text())["verdict"]
    body = html.split("<body>")[1]
    assert f'<p class="verdict good">{sentence}</p>' in body
    assert body.index(sentence) < body.index('class="tile"')


def test_both_arms_and_their_difference_have_means_intervals_and_values_per_seed(finished):
    summary, text = json.loads((finished / "summary.json").read_text()), words(finished)
    for name, one, sign in (
        ("pretrained weights", summary["arms"]["pretrained"], ""),
        ("random weights", summary["arms"]["scratch"], ""),
        ("difference", summary["difference"], "+"),
    ):
        form = f"{sign}.3f"
        ends = [f"{one[f'low{which}']:{form}} to {one[f'high{which}']:{form}}" for which in ("", "_seeds")]
        seeds = " ".join(f"{value:{form}}" for value in one["per_seed"])
        assert f"{name} {one['mean']:{form}} {ends[0]} {ends[1]} {seeds}" in text


def test_classes_patients_labels_runs_and_the_leakage_record_are_told(finished):
    text = words(finished)
    assert "background (not in the mean)" in text and "anterior 0." in text
    assert "Few labels: labels.shots=4 drew 4 of 67 images (4 of 67 groups), by the run's seed." in text
    assert "compared with, pretraining 67" in text
    assert "pretrained/seed-0" in text and "scratch/seed-1" in text
    assert re.search(r"pretrained weights are behind on \d+ of 20 patients", text)


def test_a_study_has_pictures_of_its_differences_and_of_its_learning_curves(html):
    assert html.count("data:image/png;base64,") == 2 and "<script" not in html
    assert "Does pretraining help, patient by patient?" in html and "Learning curves of both arms" in html


def test_transductive_pretraining_is_told_before_any_number(tmp_path):
    out = study(tmp_path / "out", FakeTune(summarised=False, transductive=20), transductive=True)
    text = words(out)
    assert "TRANSDUCTIVE: pretraining was allowed to see test images without their labels, and saw 20 of 20" in text
    assert text.index("TRANSDUCTIVE") < text.index("pretrained weights (")


def test_a_lost_comparison_with_a_frozen_encoder_says_so(tmp_path):
    out = study(tmp_path / "out", FakeTune(gain=-0.1, frozen=True, summarised=False))
    assert 'class="verdict bad"' in report(out).read_text()
    assert "random weights are then the floor of random features" in words(out)


@pytest.mark.parametrize(
    ("tune", "seeds", "patients", "style"),
    [
        (FakeTune(gain=0.0, of_seeds=0, summarised=False), 2, 20, "open"),
        (FakeTune(gain=0.05, of_seeds=0.03, summarised=False), 3, 20, "good unsure"),
        (FakeTune(summarised=False), 1, 20, "good unsure"),
        (FakeTune(summarised=False), 2, 4, "open"),
    ],
)
def test_a_page_is_green_only_where_patients_and_seeds_agree(tmp_path, tune, seeds, patients, style):
    out = study(tmp_path / "out", tune, seeds=seeds, task=FakeTask(patients))
    assert f'class="verdict {style}"' in report(out).read_text()


def test_a_study_of_classification_has_no_picture_of_single_images(tmp_path):
    out = study(tmp_path / "out", base=XRAY, task=FakeTask(40, geometry="plane"))
    text = words(out)
    assert "AUROC, mean over classes" in text and "images by seed" not in text and "Test images" not in text


def test_an_unfinished_study_shows_its_runs_and_has_no_verdict(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "out", FakeTune(stop_at=1, summarised=False))
    text = words(tmp_path / "out")
    assert "This study has not finished" in text and "not finished, 1 runs are" in text and "paid" not in text


def test_a_study_without_logs_and_one_with_damaged_records_are_told_apart(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        study(tmp_path / "out", FakeTune(stop_at=0))
    with pytest.raises(ConfigError, match="no run of the study .* has logged a step yet"):
        report(tmp_path / "out")
    out = study(tmp_path / "out", resume=True)
    (out / "summary.json").write_text("{broken")
    with pytest.raises(IntegrityError, match="records of the study .* are damaged"):
        report(out)


def test_seeds_without_a_twin_have_a_page_too(tmp_path):
    text = words(study(tmp_path / "out", twin=False))
    assert "pretrained weights, 2 seeds" in text and "difference" not in text


# ---------------------------------------------------------------------------------------------------------------- a run


def test_a_run_shows_its_score_with_an_interval_per_class_and_what_early_stopping_kept(finished):
    run = finished / "pretrained/seed-0"
    test, text = json.loads((run / "summary.json").read_text())["test"], words(run)
    ends = f"{test['interval']['low']:.3f} to {test['interval']['high']:.3f}"
    assert f"{test['value']:.3f} mean foreground Dice over images ({ends})" in text
    anterior = test["classes"]["anterior"]["dice_over_images"]
    assert f"anterior {anterior['mean']:.3f} ({anterior['low']:.3f} to {anterior['high']:.3f})" in text
    assert "validation, best at step" in text
    assert "mm" in text and "Leakage record" in text and "Surface distances" in text


def test_the_curve_of_early_stopping_marks_the_weights_that_were_kept(html, finished):
    text = words(finished / "pretrained/seed-0")
    assert "The validation part decides which weights are kept (circle) and is not the test part." in text


def test_a_twin_says_what_it_is(finished):
    assert "This is the scratch twin of a pretrained run: the same from random weights." in words(
        finished / "scratch/seed-0"
    )


def test_what_could_not_be_compared_and_blocks_of_one_scene_are_notices(finished, tmp_path):
    run = finished / "pretrained/seed-1"
    summary = json.loads((run / "summary.json").read_text())
    summary["leakage"]["not_compared"] = ["pretraining: nothing is recorded"]
    summary["split"]["unit"] = "block"
    summary["dropped"], summary["twin"] = ["train.layer_decay"], True
    other = tmp_path / "run"
    other.mkdir()
    for name in ("recipe.resolved.yaml", "metrics.jsonl", "environment.json"):
        (other / name).write_text((run / name).read_text())
    (other / "summary.json").write_text(json.dumps(summary))
    text = words(other)
    assert "Leaks could not be ruled out wholly: pretraining: nothing is recorded." in text
    assert "Training and test are blocks of the same scenes" in text
    assert "from random weights, without train.layer_decay, which protect pretrained weights" in text
