"""Fixtures that every test may use."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
os.environ.setdefault("MPLBACKEND", "agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    # Test processes share the cores among them; each with a thread a core would only wait for the others.
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# The same examples in every run, so that a failure is the change's and not the day's. To look for new ones:
# HYPOTHESIS_PROFILE=search make test
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.register_profile("search", deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of real images beside the checkout; a test that needs it is skipped, with this reason, without it."""
    folder = Path(os.environ.get("GEOMED_TEST_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip("real test images are not there: set GEOMED_TEST_DATA to a folder laid out as data_cards/ describe")
    return folder.resolve()  # the folder may be a link, and sources name files where they are
