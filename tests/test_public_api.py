"""The public Python interface is what `__all__` says, and no more than a dozen names."""

from __future__ import annotations

import subprocess
import sys

import geomed_mae


def test_all_names_exist_and_are_sorted():
    assert geomed_mae.__all__ == sorted(geomed_mae.__all__)
    assert len(geomed_mae.__all__) <= 12
    assert all(getattr(geomed_mae, name) is not None for name in geomed_mae.__all__)


def test_the_names_that_the_design_promises_exist():
    assert {"read_images", "scan", "load_encoder", "Image", "Channel", "Index"} <= set(geomed_mae.__all__)


def test_scan_stays_a_function_after_its_module_is_imported():
    code = "import geomed_mae, geomed_mae.scan, geomed_mae.cli; assert callable(geomed_mae.scan)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_an_unknown_name_is_an_attribute_error():
    try:
        _ = geomed_mae.nonsense
    except AttributeError as error:
        assert "geomed_mae" in str(error)
    else:
        raise AssertionError("no error")
