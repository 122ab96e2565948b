"""Modality files: the packaged ones are sound, and a wrong one is refused with its place."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from geomed_mae import read_images
from geomed_mae.errors import ConfigError
from geomed_mae.modalities import load_modality, modality_names, parse_modality, resolve_modalities
from tests.make_data import write_geotiff

GOOD = """
name: mine
title: A sensor of mine
geometry: raster
formats: [geotiff]
unit: reflectance
normalise: {method: fixed, center: 0.2, scale: 0.1}
channels:
  - {name: R, aliases: [red], kind: optical, wavelength_nm: 660, bandwidth_nm: 30}
"""


@pytest.mark.parametrize("name", modality_names())
def test_every_packaged_modality_is_sound(name):
    modality = load_modality(name)
    assert modality.name == name
    assert modality.noise_floor >= 0
    for channel in modality.channels:
        assert modality.channel(channel.name.lower()) == channel
        if channel.kind == "optical":
            assert 350 < channel.wavelength_nm < 2600 and channel.bandwidth_nm > 0
        if channel.kind == "sar":
            assert channel.polarisation and channel.radar_ghz


def test_names_may_be_written_with_an_underscore():
    assert load_modality("sentinel2_l2a") is load_modality("sentinel2-l2a")


def test_auto_means_all_packaged_modalities():
    assert [modality.name for modality in resolve_modalities("auto")] == modality_names()
    assert resolve_modalities(("auto",)) == resolve_modalities("auto")


def test_a_hyperspectral_cube_is_read_in_the_order_of_its_bands_and_empty_ones_are_invalid(tmp_path):
    stored = np.random.default_rng(0).integers(100, 4000, (224, 24, 24)).astype(np.int16)
    stored[129] = stored[:, :5] = -32768  # a band of water vapour, and ground outside the swath; the file declares none
    path = write_geotiff(tmp_path / "ENMAP01-____L2A-SPECTRAL_IMAGE.TIF", stored)
    (image,) = read_images(path, modality="enmap-l2a")
    assert [channel.name for channel in image.channels] == [f"B{number:03d}" for number in range(1, 225)]
    assert (image.valid == (stored != -32768)).all()
    assert np.allclose(image.array[image.valid], stored[image.valid] * 0.0001)
    wavelengths = [channel.wavelength_nm for channel in image.channels]
    for first, last in ((0, 91), (91, 224)):  # two spectrometers, which overlap
        assert wavelengths[first:last] == sorted(wavelengths[first:last])


def test_an_unknown_modality_names_the_nearest():
    with pytest.raises(ConfigError, match=r"no modality 'sentinel2-l2'; did you mean 'sentinel2-l2a'\?"):
        load_modality("sentinel2-l2")


def test_a_modality_file_of_the_users_is_read(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD)
    modality = load_modality(str(path))
    assert modality.channel("RED").wavelength_nm == 660
    assert modality.channel("blue") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("geometry: raster", "geometry: rastre"), "geometry 'rastre' is none of raster, volume, plane"),
        (("unit: reflectance", "unti: reflectance"), r"unknown field 'unti'; did you mean 'unit'\?"),
        (("unit: reflectance\n", ""), "missing field 'unit'"),
        (("method: fixed", "method: guess"), "normalise.method is 'guess'; known: fixed, archive, image"),
        (("scale: 0.1", "scale: 0"), "normalise.scale is 0; it must be positive"),
        (("wavelength_nm", "wavelenght_nm"), "a channel has no field 'wavelenght_nm'; did you mean 'wavelength_nm'"),
        (("aliases: [red]", "aliases: [red]}\n  - {name: red"), "the name 'red' means two channels"),
        (("formats: [geotiff]", "formats: [geotiff]\nflips: [up]"), r"flips \['up'\] are none of y, x, z, rot90"),
    ],
)
def test_a_wrong_modality_file_is_refused_with_its_place(tmp_path: Path, change, message):
    path = tmp_path / "mine.yaml"
    path.write_text(GOOD.replace(*change))
    with pytest.raises(ConfigError, match=message):
        parse_modality(path)
