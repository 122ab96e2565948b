"""export: what the command line's words become, and what is refused."""

from __future__ import annotations

import pytest

from geomed_mae.errors import ConfigError
from geomed_mae.export import export
from tests.scenes import landsat_scene, random_encoder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    landsat_scene(folder / "a.tif", None, shape=(64, 64))
    return random_encoder(folder / "encoder", "landsat7", folder / "a.tif") or folder / "encoder"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "64x64"}, "--size is whole numbers with commas between, for example 224,224, not '64x64'"),
        ({"spacing": "30 m"}, "--spacing is numbers with commas between, for example 20,20, not '30 m'"),
        ({"spacing": "30,30"}, "means nothing to this encoder, whose positions count patches"),
        ({"size": "65,64"}, r"size \[65, 64\] is not a multiple of the patch"),
    ],
)
def test_sizes_and_spacings_that_cannot_be_are_refused(encoder, tmp_path, options, message):
    with pytest.raises(ConfigError, match=message):
        export(encoder, "timm", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_an_export_of_chosen_channels_and_size_says_what_it_takes(encoder, tmp_path):
    result = export(encoder, "timm", tmp_path / "out", channels="B3,B2", size="32,64")
    assert result["channels"] == ["B3", "B2"] and result["input_size"] == [2, 32, 64]
    assert result["largest_relative_difference"] < 1e-5


def test_a_folder_that_holds_something_is_refused(encoder, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty; choose another --out"):
        export(encoder, "timm", tmp_path)
