"""The folder of writers is the registry of formats."""

from __future__ import annotations

import pytest

from geomed_mae.errors import ConfigError
from geomed_mae.plugins import plugin_names
from geomed_mae.writers import AUTO, MARKER, writer


def test_class_map_writers_are_found_by_name():
    assert plugin_names("writers", marker=MARKER) == ["cog", "dicom_seg", "nifti"]
    for name in plugin_names("writers", marker=MARKER):
        assert all(hasattr(writer(name), part) for part in ("stream", "stream_chances", "write"))
    assert all(kind in writer(name).GEOMETRIES for kind, name in AUTO.items())


def test_an_unknown_format_names_the_nearest():
    with pytest.raises(ConfigError, match="'nifty' is not one of the writers: did you mean 'nifti'"):
        writer("nifty")
