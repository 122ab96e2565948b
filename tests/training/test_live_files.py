"""Live panels are few whatever the length of a run: the first, the newest, and some between."""

from __future__ import annotations

import itertools

import pytest

from geomed_mae.errors import OutputError
from geomed_mae.training.live_files import LIVE_KEPT, chosen, forget_after, live_name, live_panels, thin_out


def panel(folder, step, name="01-ct"):
    folder.mkdir(exist_ok=True)
    (folder / f"{live_name(step)}-{name}.png").touch()


def test_file_names_hold_step_kind_and_modality(tmp_path):
    for step in (200, 1000, 30):
        panel(tmp_path, step, "02-sentinel2-l2a")
    panel(tmp_path, 30)
    (tmp_path / "01-ct.png").touch()
    found = live_panels(tmp_path)
    assert {name: list(series) for name, series in found.items()} == {
        "01-ct": [30],
        "02-sentinel2-l2a": [30, 200, 1000],
    }
    assert found["01-ct"][30].name == "step-00000030-01-ct.png"


@pytest.mark.parametrize("steps", [1, 2, 8, 9, 500])
def test_first_and_newest_stay_and_the_others_are_few(steps):
    series = [100 * number for number in range(1, steps + 1)]
    kept = chosen(series, LIVE_KEPT)
    assert len(kept) == min(steps, LIVE_KEPT) and kept == sorted(kept) and set(kept) <= set(series)
    assert kept[0] == 100 and kept[-1] == 100 * steps


def test_a_long_series_keeps_early_steps_dense_and_late_ones_sparse():
    kept: list[int] = []
    for step in range(100, 100_001, 100):
        kept = chosen([*kept, step], LIVE_KEPT)
    ratios = [after / before for before, after in itertools.pairwise(kept)]
    assert kept[1] <= 1000 and max(ratios[:-1]) < 6 and min(ratios[:-1]) > 1.2


def test_the_folder_holds_no_more_than_that_of_each_kind(tmp_path):
    for step in range(10, 310, 10):
        for name in ("01-ct", "02-mr"):
            panel(tmp_path, step, name)
        thin_out(tmp_path)
    found = live_panels(tmp_path)
    assert len(found["01-ct"]) == len(found["02-mr"]) == LIVE_KEPT and {10, 300} <= set(found["01-ct"])


def test_steps_that_will_be_done_again_are_forgotten_and_nothing_else(tmp_path):
    for step in (10, 20, 30):
        panel(tmp_path, step)
    (tmp_path / "01-ct.png").touch()
    forget_after(tmp_path, 20)
    assert list(live_panels(tmp_path)["01-ct"]) == [10, 20] and (tmp_path / "01-ct.png").exists()


def test_a_picture_that_cannot_be_deleted_is_an_output_error(tmp_path):
    (tmp_path / f"{live_name(10)}-01-ct.png").mkdir()
    with pytest.raises(OutputError, match="'step-00000010-01-ct.png' cannot be deleted"):
        forget_after(tmp_path, 0)
