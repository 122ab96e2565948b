"""Times and numbers as people read them."""

from __future__ import annotations

import pytest

from geomed_mae.reporting.page import shown
from geomed_mae.reporting.tables import duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.52, "0.5 s"), (45, "45 s"), (60, "1 min"), (725, "12 min 5 s"), (12_000, "3 h 20 min"), (187_300, "2 d 4 h")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_numbers():
    assert [shown(value) for value in (None, 1234567, 0.123456, 465_665.3, True, "x")] == [
        "-", "1,234,567", "0.1235", "465,665", "True", "x",
    ]  # fmt: skip
