"""The fixed networks compute what the model computes; a difference ends an export and leaves nothing."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from geomed_mae.archives.seen import Seen
from geomed_mae.archives.statistics import summarise
from geomed_mae.errors import ConfigError, IntegrityError, OutputError
from geomed_mae.exporters import card, hf_vitmae, native, timm
from geomed_mae.exporters.fixed import FixedEncoder, FixedTask, PhysicalEncoder, fixed
from geomed_mae.exporters.folder import building, carry_native, written
from geomed_mae.exporters.proof import TOLERANCE, difference, ours, prove, trial
from geomed_mae.exporters.request import ask
from geomed_mae.heads.task_model import load_task_model
from geomed_mae.image import Image, RasterGeometry, VolumeGeometry
from geomed_mae.models.contract import Contract
from geomed_mae.models.encoder_folder import load_encoder
from geomed_mae.models.manifest import digests
from tests.exporters.given import MR, S2, asked, encoder
from tests.heads.given import HEADS

GRID = RasterGeometry(None, (1, 0, 0, 0, -1, 0), None)
REFERENCES = {"reference_gsd_m": 10.0, "reference_spacing_mm": (2.0, 1.0, 1.0)}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("modality", ["sentinel2-l2a", "ct", "mr"])
@pytest.mark.parametrize(("name", "task"), HEADS)
def test_a_fixed_task_model_gives_the_models_probabilities(name, task, modality, dynamic):
    request = asked(name, task, modality, multi_label=(name, task) == ("linear", "classify"))
    given = trial(request)
    with torch.inference_mode():
        theirs = FixedTask(request, dynamic=dynamic)(given.fed)
    mine = ours(request, given).probabilities
    assert difference(mine, theirs) < TOLERANCE
    assert mine.std() > 1e-3, "a constant answer would prove nothing"
    assert tuple(theirs.shape[2:]) == (request.size if task == "segment" else ())


@pytest.mark.parametrize(
    ("modality", "spacing", "changes"),
    [
        ("sentinel2-l2a", None, {}),
        ("sentinel2-l2a", (20.0, 15.0), REFERENCES),
        ("sentinel2-l2a", None, {"learned_positions": (4, 4)}),
        ("ct", (5.0, 0.7, 0.7), REFERENCES),
        ("mr", None, REFERENCES),
    ],
)
def test_a_fixed_encoder_gives_the_encoders_features(modality, spacing, changes):
    request = ask(encoder(**changes), modality=modality, spacing=spacing)
    given = trial(request)
    mine = ours(request, given)
    kinds = [False] if "learned_positions" in changes else [False, True]
    for dynamic in kinds:
        with torch.inference_mode():
            features, vector = PhysicalEncoder(request, dynamic=dynamic)(given.fed)
            tokens = FixedEncoder(request, dynamic=dynamic)(given.normalised)
        assert max(difference(mine.features, features), difference(mine.vector, vector)) < TOLERANCE
        assert difference(mine.tokens, tokens) < TOLERANCE


def test_a_dynamic_encoder_takes_other_sizes_and_says_so_where_it_cannot():
    request = ask(encoder(**REFERENCES), modality="sentinel2-l2a", spacing=(20.0, 15.0))
    model = PhysicalEncoder(request, dynamic=True)
    for size in ((8, 8), (64, 40), (24, 96)):
        other = replace(request, size=size)
        given = trial(other, noise=2)
        with torch.inference_mode():
            features, _ = model(given.fed)
        assert difference(ours(other, given).features, features) < TOLERANCE
    with pytest.raises(ConfigError, match=r"learned positions of a grid of \[4, 4\] patches.* for one size"):
        fixed(ask(encoder(learned_positions=(4, 4)), modality="sentinel2-l2a"), dynamic=True)
    with pytest.raises(ConfigError, match="an encoder has no head"):
        FixedTask(request)


def test_values_are_clipped_and_what_is_no_number_is_the_centre():
    request = ask(encoder(), modality="sentinel2-l2a", channels=["B04"])
    model = PhysicalEncoder(request)
    raw = torch.full((1, 1, 32, 32), 0.15)
    odd, high = raw.clone(), raw.clone()
    odd[..., :3, :3], odd[..., 4, 4], high[..., 0] = float("nan"), float("inf"), 1.6
    with torch.inference_mode():
        assert torch.equal(model(raw)[0], model(odd)[0])
        assert torch.equal(model(high)[0], model(torch.where(high > 1.5, 9.0, high))[0])
        assert not torch.equal(model(raw)[0], model(high)[0])


def test_a_given_image_is_compared_at_its_most_valid_window_with_the_statistics_of_the_whole():
    rng = np.random.default_rng(0)
    array = rng.normal(300, 40, (1, 9, 40, 40)).astype(np.float32)
    valid = np.zeros((1, 9, 40, 40), bool)
    valid[:, 4:8, 16:32, 16:32] = True
    array[~valid] = np.nan
    image = Image(array, valid, MR.channels, VolumeGeometry(np.eye(4)), "mr")
    request = ask(encoder(), modality="mr", image=image)
    given = trial(request)
    assert torch.equal(given.raw[0], torch.from_numpy(array[:, 4:8, 16:32, 16:32].copy()))
    (whole,) = summarise(array, valid)
    assert torch.allclose(given.fed[0], (given.raw[0] - whole.median) / whole.spread, atol=1e-5)
    assert given.source == "the given image" and torch.isfinite(given.raw).all()


def test_a_given_image_smaller_than_the_input_is_filled_with_the_centre():
    array = np.full((12, 8, 16), 0.3, np.float32)
    image = Image(array, np.ones((1, 8, 16), bool), S2.channels, GRID, S2.name)
    given = trial(ask(encoder(), modality="sentinel2-l2a", channels=["B03", "B02"], image=image))
    assert (given.raw[0, :, :8, :16] == 0.3).all() and (given.raw[0, :, 8:] == 0.15).all()


def test_an_image_that_cannot_be_compared_on_is_refused():
    image = Image(np.zeros((2, 8, 8), np.float32), np.ones((1, 8, 8), bool), S2.channels[:2], GRID, S2.name)
    with pytest.raises(ConfigError, match=r"--image lacks the channels \['B08'\]"):
        ask(encoder(), modality="sentinel2-l2a", channels=["B01", "B08"], image=image)
    with pytest.raises(ConfigError, match="--image is a 2D image of modality 'sentinel2-l2a', the export is for 3D"):
        ask(encoder(), modality="ct", image=image)
    empty = replace(image, valid=np.zeros((1, 8, 8), bool))
    with pytest.raises(ConfigError, match="--image has no valid pixel"):
        ask(encoder(), modality="sentinel2-l2a", channels=["B01"], image=empty)


def test_the_made_image_has_the_texture_of_a_scene_in_the_channels_units():
    request = ask(encoder(), modality="sentinel2-l2a", size=(512, 512))
    given = trial(request)
    assert given.raw.shape == (2, 12, 512, 512) and given.raw[0].min() >= 0 and given.raw[0].max() <= 1.6
    assert (given.raw[0].flatten(1).std(dim=1) > 0.05).all()
    volume = trial(ask(encoder(), modality="ct")).raw[0, 0]
    assert not torch.equal(volume[0], volume[1]) and torch.equal(volume[0, 3:], volume[1, :-3])


@pytest.mark.parametrize("damage", [float("nan"), 1e-3])
def test_a_difference_is_an_error_with_its_figure(damage):
    mine = torch.ones(2, 3)
    theirs = mine.clone()
    theirs[1, 2] += damage
    said = r"the toy export, opened in toy 1, differs from the model by (nan|1.0e-03) of the largest value"
    with pytest.raises(IntegrityError, match=said):
        prove("toy", mine, theirs, runtime="toy 1", compared="numbers")
    found = prove("toy", mine, theirs.nan_to_num(1), runtime="toy 1", compared="numbers", tolerance=1e-2)
    assert found["largest_relative_difference"] == pytest.approx(damage if damage == 1e-3 else 0, rel=1e-3)
    assert (found["runtime"], found["compared"], found["tolerance"]) == ("toy 1", "numbers", 1e-2)


def test_another_shape_is_never_taken_for_the_same():
    with pytest.raises(IntegrityError, match=r"gives \(1, 3\) where the model gives \(2, 3\)"):
        prove("toy", torch.ones(2, 3), np.ones((1, 3)), runtime="toy 1", compared="numbers")


def test_a_folder_is_there_whole_or_not_at_all(tmp_path):
    with pytest.raises(IntegrityError), building(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise IntegrityError("it differs")
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OutputError, match="cannot be written: No space left"), building(tmp_path / "out"):
        raise OSError(28, "No space left on device")
    assert list(tmp_path.iterdir()) == []
    with building(tmp_path / "out") as folder:
        (folder / "configs").mkdir()
        (folder / "configs" / "a.json").write_text("{}")
    assert written(tmp_path / "out") == ["MANIFEST.sha256", "configs/a.json"]
    assert list(digests(tmp_path / "out")) == ["configs/a.json"]
    manifest = tmp_path / "out" / "MANIFEST.sha256"
    for name in ("configs/../../other", "/etc/hostname", "configs//a.json"):
        manifest.write_text(f"{'0' * 64}  {name}\n")
        with pytest.raises(IntegrityError, match="has a line that names no plain file"):
            digests(tmp_path / "out")
    with pytest.raises(ConfigError, match="is not empty"), building(tmp_path / "out"):
        pass


def test_an_export_carries_the_native_weights_where_nobody_else_opens_it(tmp_path):
    alone = ask(encoder(), modality="sentinel2-l2a")
    tuned = asked("linear", "segment", "sentinel2-l2a")
    for request, name in ((alone, "alone"), (tuned, "tuned")):
        with building(tmp_path / name) as folder:
            carry_native(request, folder)
    mine, theirs = alone.encoder.module.state_dict(), load_encoder(tmp_path / "alone").module.state_dict()
    assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    opened, _ = load_task_model(tmp_path / "tuned")
    given = trial(tuned)
    assert torch.equal(ours(tuned, given).probabilities, ours(replace(tuned, task=opened), given).probabilities)


def test_a_lost_limit_shows_in_what_is_compared_on():
    request = ask(encoder(), modality="sentinel2-l2a", channels=["B04", "B08"])
    given, model = trial(request), PhysicalEncoder(request)
    mine = ours(request, given).features
    for limit in ("low", "high"):
        broken = copy.deepcopy(model)
        getattr(broken.scaling, limit)[:, 1] = 1e9 if limit == "high" else -1e9
        assert difference(mine, model(given.fed)[0]) < TOLERANCE < difference(mine, broken(given.fed)[0])


@pytest.mark.parametrize("target", [native, timm, hf_vitmae])
def test_a_contract_that_says_something_else_leaves_nothing_behind(tmp_path, monkeypatch, target):
    """The channels in another order, then another mean: the weights alone would not show it."""
    request, whole = ask(encoder(), modality="sentinel2-l2a"), Contract.to_json
    for change in (
        lambda data: data["channels"].reverse(),
        lambda data: data["channels"][0].update(center=0.2),
    ):

        def changed(contract, change=change):
            data = json.loads(whole(contract))
            change(data)
            return json.dumps(data)

        with monkeypatch.context() as patch, pytest.raises(IntegrityError, match="nothing was written"):
            patch.setattr(Contract, "to_json", changed)
            target.export(request, tmp_path / "out")
        assert not list(tmp_path.iterdir())


def test_the_card_of_a_model_from_scratch_claims_no_pretraining():
    # Its contract is the pretrained twin's; what it has seen says that it began from random weights.
    text = card.model_card(asked("linear", "segment", seen=Seen((), ("training",))), title="T", opening="O")
    assert "trained on labelled images alone, without pretraining" in text and "on 7 images" not in text
    assert "tags: [geomed-mae]" in text and "masked" not in text


def test_a_card_of_channels_that_are_scaled_in_two_ways_says_which_go_in_scaled():
    whole = ask(encoder(), modality="ct")
    mixed = replace(whole, entries=(*whole.entries, replace(whole.entries[0], method="image", value_range=None)))
    text = card.model_card(mixed, title="T", opening="O")
    assert "are part of it; but where mean and std are the image's own, the model takes values that are scaled" in text
    assert card.contract_json(mixed)["input"]["scaled_already"] == [mixed.entries[1].channel.name]
    assert card.contract_json(whole)["input"]["scaled_already"] == []


def test_the_card_says_what_is_fed_and_names_no_placeholder():
    text = card.model_card(asked("linear", "segment", "mr"), title="T", opening="How to open it.", tags=["onnx"])
    assert "take the whole image's median and spread = (p95 - p5) / 3.29" in text
    assert "| 0 | MR | mr | a.u. | its median | its spread | none |" in text
    assert "| 1 | anterior |" in text and "on 7 images for 11 steps, then fine-tuned" in text
    text = card.model_card(ask(encoder(**REFERENCES), modality="ct"), title="T", opening="O")
    assert "clipping and `(value - mean) / std` are part of it" in text and "2 x 1 x 1 mm apart" in text
    assert "## Classes" not in text and "None" not in text and "{" not in text
    data = card.contract_json(asked("attentive", "classify", "ct"), layout="b c z y x")
    assert data["input"]["size"] == [4, 16, 16] and data["input"]["spacing_unit"] == "mm"
    assert data["output"]["task"] == "classify" and len(data["channels"]) == 1


def test_the_card_says_how_stored_numbers_become_reflectance():
    text = card.model_card(ask(encoder(), modality="sentinel2-l2a"), title="t", opening="o")
    assert "reflectance = number * 0.0001, in products since processing baseline 04.00" in text
    assert "(number - 1000) * 0.0001" in text
    assert "Files of this modality store numbers" not in card.model_card(
        ask(encoder(), modality="mr"), title="t", opening="o"
    )
