"""The folder is the registry."""

from __future__ import annotations

import pytest

from geomed_mae.errors import ConfigError
from geomed_mae.plugins import load_plugin, plugin_names


def test_readers_are_found_by_their_marker_and_neighbours_are_not():
    assert plugin_names("readers", marker="SUFFIXES") == ["dicom", "geotiff", "jp2", "nifti", "picture", "vector"]


def test_exporters_are_found_by_their_function():
    assert "timm" in plugin_names("exporters", marker="export")


def test_an_unknown_plugin_names_the_nearest():
    with pytest.raises(ConfigError, match=r"'geotif' is not one of the readers: did you mean 'geotiff'\?"):
        load_plugin("readers", "geotif", marker="SUFFIXES")


def test_a_path_is_never_imported():
    with pytest.raises(ConfigError, match="is not one of the readers"):
        load_plugin("readers", "os.path", marker="SUFFIXES")
