"""Scenes spread over files are one Image: bands on their common grid by exact repetition, the Sentinel-2 offset right.

The oracle reads each file with rasterio alone and repeats its pixels with numpy.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from geomed_mae import readers
from geomed_mae.archives.build import scan_archive
from geomed_mae.archives.examine import examine, parts
from geomed_mae.errors import ConfigError, ReadError, TooManyBadInputsError
from geomed_mae.modalities import load_modality, resolve_modalities
from geomed_mae.readers import plausible, read_images, survey
from geomed_mae.readers.geotiff import pixels as geotiff_read
from geomed_mae.readers.geotiff.open import rasterio
from geomed_mae.readers.plausible import summary
from geomed_mae.readers.reasons import NOT_BAD, Reason
from geomed_mae.readers.regular import list_files
from geomed_mae.readers.source import Source, decoded_values
from tests.make_data import write_geotiff
from tests.make_scenes import (
    L2A_METRES,
    grid,
    landsat_product,
    metadata,
    numbers,
    reflectances,
    safe_l1c,
    safe_l2a,
    write_jp2,
)

RIO = rasterio()
AUTO = resolve_modalities("auto")
MOVED = ("minimum", "p005", "p05", "median", "p995", "maximum")
RNG = np.random.default_rng(3)
FEW = {"B02": 10, "B05": 20, "B01": 60}
"""Three bands, one of each resolution: products of them are quick to write."""


def look(folder, modality="auto"):
    return survey(list_files(folder), resolve_modalities(modality), root=folder)


def only(folder, modality="auto") -> Source:
    found = look(folder, modality)
    assert len(found.sources) == 1, [(s.files[0].name, s.modality) for s in found.sources]
    return found.sources[0]


def reasons(found) -> dict[str, str]:
    return {refusal.path.name: refusal.reason.name for refusal in found.refusals}


def repeated(array, like):
    times = like[0] // array.shape[0], like[1] // array.shape[1]
    return array.repeat(times[0], 0).repeat(times[1], 1)


# Sentinel-2


@pytest.mark.parametrize("suffix", ["jp2", "tif"])
def test_a_level_2a_product_is_one_image_of_its_finest_bands(tmp_path, suffix):
    product, stored = safe_l2a(tmp_path, suffix=suffix)
    found = look(product)
    assert len(found.sources) == 1
    source = found.sources[0]
    assert source.modality == "sentinel2-l2a" and [c.name for c in source.channels] == list(L2A_METRES)
    assert source.shape == (120, 120) and source.geometry.transform == grid(10) and source.flags == ()
    assert source.codec == ("JPEG 2000" if suffix == "jp2" else "")
    image = readers.read(source)
    for band, array in zip(L2A_METRES, image.array, strict=True):
        fine = repeated(stored[band], image.spatial_shape).astype(np.float64)
        np.testing.assert_allclose(array, np.where(fine == 0, 0, (fine - 1000) / 10000), rtol=1e-6, atol=1e-9)
    np.testing.assert_array_equal(image.valid, [repeated(stored[b], (120, 120)) > 0 for b in L2A_METRES])
    assert image.select(("B09",)).valid.shape == (1, 120, 120)


def test_what_a_product_holds_beside_its_bands_has_a_reason_that_is_no_fault(tmp_path):
    product, _ = safe_l2a(tmp_path)
    found = look(product)
    assert {r.reason for r in found.refusals} == {Reason.LEFT_OUT, Reason.METADATA}
    detail = {refusal.path.name: refusal.detail for refusal in found.refusals}
    assert detail["T32TQM_20220611T101559_B02_20m.jp2"] == "band B02 is read at a finer resolution"
    assert detail["T32TQM_20220611T101559_TCI_10m.jp2"] == "a preview of a sentinel2-l2a scene"
    assert (
        "quality map" in detail["MSK_CLDPRB_20m.jp2"] and "atmosphere" in detail["T32TQM_20220611T101559_AOT_10m.jp2"]
    )
    assert reasons(found)["MTD_MSIL2A.xml"] == reasons(found)["MTD_TL.xml"] == "METADATA"
    assert {r.reason for r in found.refusals} <= NOT_BAD
    assert len(found.refusals) + len(found.sources[0].files) == sum(1 for _ in list_files(product))


@pytest.mark.parametrize("modality", ["auto", "sentinel2-l2a"])
def test_pictures_that_a_product_carries_are_no_images(tmp_path, modality):
    from PIL import Image as Picture

    product, _ = safe_l2a(tmp_path, bands={"B02": 10})
    (product / "HTML").mkdir()
    picture = Picture.fromarray(RNG.integers(0, 255, (20, 20, 3)).astype(np.uint8))
    names = [f"{product.stem}-ql.jpg", "HTML/star_bg.jpg", "HTML/banner_1.png"]
    for name in names:
        picture.save(product / name)
    found = look(product, modality)
    assert len(found.sources) == 1 and found.sources[0].modality == "sentinel2-l2a"
    assert {reasons(found)[Path(name).name] for name in names} <= {"METADATA", "NON_IMAGE"}
    picture.save(tmp_path / "star_bg.jpg")
    assert len(survey([tmp_path / "star_bg.jpg"], AUTO).sources) == 1  # elsewhere it is a picture like any other


def test_any_window_of_a_scene_equals_the_whole_cut(tmp_path):
    source = only(safe_l2a(tmp_path, bands=FEW)[0])
    whole = readers.read(source)
    windows = [
        ((0, 120), (0, 120)),
        ((7, 61), (13, 120)),
        ((119, 120), (0, 1)),
        ((59, 62), (58, 61)),
        ((1, 2), (5, 119)),
    ]
    for rows, columns in windows:
        window = (slice(*rows), slice(*columns))
        part, cut = readers.read(source, window), whole.crop(window)
        np.testing.assert_array_equal(part.array, cut.array)
        np.testing.assert_array_equal(
            np.broadcast_to(part.valid, part.array.shape), np.broadcast_to(cut.valid, cut.array.shape)
        )
        assert part.geometry == cut.geometry


def test_only_the_coarse_pixels_under_a_window_are_decoded(tmp_path, monkeypatch):
    source = only(safe_l2a(tmp_path, bands=FEW, suffix="tif")[0])
    asked = []
    real = geotiff_read.read_many
    monkeypatch.setattr(
        geotiff_read, "read_many", lambda alone, windows: asked.append(windows[0]) or real(alone, windows)
    )
    readers.read(source, (slice(7, 61), slice(13, 25)))
    assert asked == [
        (slice(1, 11), slice(2, 5)),  # 60 m: B01 comes first
        (slice(7, 61), slice(13, 25)),
        (slice(3, 31), slice(6, 13)),
    ]


def test_a_level_1c_product_is_recognised_by_its_name(tmp_path):
    product, stored = safe_l1c(tmp_path)
    source = only(product)
    assert source.modality == "sentinel2-l1c" and [c.name for c in source.channels] == sorted(
        stored, key=lambda b: list(load_modality("sentinel2-l1c").aliases).index(b.casefold())
    )
    image = readers.read(source)
    for channel, array in zip(source.channels, image.array, strict=True):
        np.testing.assert_allclose(array, repeated(stored[channel.name], (120, 120)) * 1e-4, rtol=1e-6)
    assert look(product, "sentinel2-l2a").sources == []
    refused = [r for r in look(product, "sentinel2-l2a").refusals if r.path.suffix == ".jp2"]
    assert {r.reason for r in refused} == {Reason.MODALITY_MISMATCH} and "no sentinel2-l2a" in refused[0].detail


def test_products_with_and_without_offset_come_out_the_same(tmp_path):
    """Fault 21: one landscape, stored before and after baseline 04.00."""
    for baseline, add in (("0301", 0), ("0500", -1000)):
        safe_l2a(tmp_path / baseline, baseline=baseline, add=add, bands=FEW)
    images = read_images(tmp_path)
    assert len(images) == 2
    inside = images[0].valid & images[1].valid
    np.testing.assert_allclose(images[0].array[inside], images[1].array[inside], atol=1e-7)
    assert 0.01 < images[0].array[inside].min() < 0.03
    index = scan_archive([tmp_path], "auto")
    assert len(index) == 2 and {entry.status for entry in index.ledger.entries} == {"used", "skipped"}


@pytest.mark.parametrize(("baseline", "add"), [("0301", 0), ("0400", -1000), ("0509", -1000)])
def test_without_metadata_the_baseline_in_the_products_name_counts(tmp_path, baseline, add):
    product, stored = safe_l2a(tmp_path, baseline=baseline, add=add, bands=FEW, xml=None)
    image = read_images(product)[0]
    band = image.select(("B02",))
    np.testing.assert_allclose(
        band.array[0][band.valid[0]], (stored["B02"][stored["B02"] > 0] + float(add)) * 1e-4, atol=1e-7
    )


def test_the_metadata_counts_not_the_date_and_not_a_constant(tmp_path):
    """A product of 2022 may carry another offset and divisor, if its metadata says so."""
    xml = metadata("L2A", "05.10", -2000, 20000)
    product, stored = safe_l2a(tmp_path, baseline="0510", add=-2000, bands={"B02": 10}, xml=xml)
    # The name says -1000: metadata and name disagree.
    assert {r.reason for r in look(product).refusals if "_B02_10m" in r.path.name} == {Reason.OFFSET_SUSPECT}
    renamed = product.rename(tmp_path / "S2A_MSIL2A_20220611T101559_R065_T32TQM.SAFE")
    image = readers.read(only(renamed))
    valid = stored["B02"] > 0
    np.testing.assert_allclose(image.array[0][valid], (stored["B02"][valid] - 2000.0) / 20000, atol=1e-7)


def test_metadata_and_name_that_disagree_are_refused(tmp_path):
    product, _ = safe_l2a(tmp_path, baseline="0301", add=0, bands=FEW, xml=metadata("L2A", "04.00", -1000))
    found = look(product)
    assert found.sources == []
    first = next(r for r in found.refusals if "_B02_10m" in r.path.name)
    assert first.reason is Reason.OFFSET_SUSPECT and "says that -1000 is to be added" in first.detail


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('<!DOCTYPE a [<!ENTITY b "c">]><a>&b;</a>', "declares a document type"),
        ("<a><b></a>", "is no XML"),
        ("\ufeff<a", "is no XML"),
        (metadata("L2A", "04.00", -1000).replace("-1000", "minus"), "BOA_ADD_OFFSET is `minus`, no number"),
        (metadata("L2A", "04.00", -1000).replace("-1000", "1e30"), "has BOA_ADD_OFFSET 1e+30"),
        (metadata("L2A", "nan", -1000), "PROCESSING_BASELINE is `nan`, no number"),
        (metadata("L2A", "04.00", -1000, 0), "divides by 0"),
        (metadata("L2A", "04.00", -1000).replace('band_id="7"', 'band_id="99"'), "of band `99`"),
    ],
)
def test_metadata_that_cannot_be_read_refuses_its_scene(tmp_path, text, says):
    product, _ = safe_l2a(tmp_path, bands={"B02": 10}, xml=text)
    refused = [r for r in look(product).refusals if "_B02_10m" in r.path.name]
    assert [r.reason for r in refused] == [Reason.MALFORMED] and says in refused[0].detail


def test_metadata_that_lists_the_offsets_of_some_bands_says_nothing_of_the_others(tmp_path):
    uneven = metadata("L2A", "04.00", -1000).replace('<BOA_ADD_OFFSET band_id="1">-1000</BOA_ADD_OFFSET>', "")
    uneven = uneven.replace('band_id="0">-1000', 'band_id="0">-1001')
    product, _ = safe_l2a(tmp_path, bands={"B02": 10, "B03": 10}, xml=uneven)
    detail = {r.path.name: r.detail for r in look(product).refusals if r.reason is Reason.BASELINE_UNKNOWN}
    assert detail["T32TQM_20220611T101559_B02_10m.jp2"].endswith("offsets of other bands, and none of B02")
    assert "another file of its scene" in detail["T32TQM_20220611T101559_B03_10m.jp2"]


def test_entities_in_metadata_are_never_expanded(tmp_path):
    levels = "".join(f'<!ENTITY l{n} "{f"&l{n - 1};" * 10}">' for n in range(1, 12))
    bomb = f'<!DOCTYPE x [<!ENTITY l0 "ha">{levels}]><x>&l11;</x>'
    assert look(safe_l2a(tmp_path, bands={"B02": 10}, xml=bomb)[0]).sources == []


def test_metadata_is_not_followed_through_a_link(tmp_path):
    product, _ = safe_l2a(tmp_path / "archive", baseline="0400", bands={"B02": 10}, xml=None)
    outside = tmp_path / "elsewhere.xml"
    outside.write_text(metadata("L2A", "02.05", None))
    (product / "MTD_MSIL2A.xml").symlink_to(outside)
    assert only(product).selector["expect"]["shift"] == [-0.1]


# the offset and the pixels


def test_an_offset_that_was_removed_before_is_noticed(tmp_path):
    """Catalogues have delivered numbers without the offset beside metadata that still declares it."""
    product, _ = safe_l2a(tmp_path, baseline="0400", add=0, bands=FEW, xml=metadata("L2A", "04.00", -1000), dark=0.01)
    for path in product.rglob("*_B02_10m.jp2"):
        write_jp2(path, numbers(reflectances(120, 120, 1, dark=0.01, bright=0.08)))
    with pytest.raises(TooManyBadInputsError, match="OFFSET_SUSPECT.*has been removed before; give a modality file"):
        read_images(product)
    index = scan_archive([product, safe_l1c(tmp_path / "good")[0]], "auto", max_bad=1.0)
    assert len(index) == 1 and "OFFSET_SUSPECT" in {entry.reason for entry in index.ledger.entries}


def test_an_offset_that_nothing_declares_is_noticed(tmp_path):
    product, _ = safe_l2a(
        tmp_path, baseline="0301", add=-1000, bands=FEW, xml=metadata("L2A", "03.01", None), dark=0.005
    )
    with pytest.raises(
        TooManyBadInputsError, match=r"OFFSET_SUSPECT.*an offset of 0\.1 that its metadata or name denies"
    ):
        read_images(product)


@pytest.mark.parametrize("dark", [0.2, 0.5])
def test_deserts_and_clouds_without_offset_are_not_suspected(tmp_path, dark):
    product, _ = safe_l2a(tmp_path, baseline="0301", add=0, bands=FEW, dark=dark, bright=0.9)
    assert len(read_images(product)) == 1


def test_water_and_shadow_with_the_offset_are_not_suspected(tmp_path):
    """Atmospheric correction leaves dark pixels a little below zero."""
    product, _ = safe_l2a(tmp_path, baseline="0400", add=-1000, bands=FEW)
    for path in product.rglob("*_B02_10m.jp2"):
        write_jp2(path, numbers(reflectances(120, 120, 1, dark=-0.03, bright=0.01), -1000))
    image = read_images(product)[0]
    assert image.array.min() < -0.02


@pytest.mark.parametrize("baseline", ["9999", None])
def test_without_a_baseline_the_pixels_decide_or_the_scene_is_refused(tmp_path, baseline):
    """N9999 is what locally run processors write; it stands in names of BigEarthNet v2."""
    name = "S2A_MSIL2A_20170613T101031" + (f"_N{baseline}_R022_T33UUP_26_57" if baseline else "_26_57")
    for folder, dark, add in (("dark", 0.02, 0), ("bright", 0.3, 0), ("offset", 0.02, -1000)):
        patch = tmp_path / folder / name
        patch.mkdir(parents=True)
        for band in ("B02", "B03"):
            write_geotiff(patch / f"{name}_{band}.tif", numbers(reflectances(30, 30, 1, dark=dark), add))
    assert len(read_images(tmp_path / "dark")) == 1
    for folder in ("bright", "offset"):
        with pytest.raises(TooManyBadInputsError, match="BASELINE_UNKNOWN.*no metadata or name tells the processing"):
            read_images(tmp_path / folder)
    index = scan_archive([tmp_path / "dark"], "auto")
    assert index.rows[0].flags == ("BANDS_MISSING", "OFFSET_FROM_DATA")


def test_a_plain_raster_that_looks_as_if_it_had_the_offset_is_flagged(tmp_path):
    bands = ["B02", "B03", "B8A", "B10"]
    for name, add in (("plain", 0), ("offset", -1000)):
        array = np.stack([numbers(reflectances(30, 30, n), add) for n in range(4)])
        write_geotiff(tmp_path / f"{name}.tif", array, descriptions=bands)
    rows = scan_archive([tmp_path], "auto").rows
    assert sorted("OFFSET_UNKNOWN" in row.flags for row in rows) == [False, True]


@pytest.mark.parametrize(("add", "dark"), [(0, 0.3), (-1000, -0.03)])
def test_pixels_that_leave_the_offset_in_doubt_are_a_flag(tmp_path, add, dark):
    """A desert without offset, and dark water a little below zero with it."""
    product, _ = safe_l2a(tmp_path, baseline="0400" if add else "0301", add=add, bands=FEW, dark=dark, bright=0.9)
    assert "OFFSET_DOUBTFUL" in scan_archive([product], "auto").rows[0].flags


@pytest.mark.data
def test_real_reflectances_are_judged_right_whatever_is_declared(shared_data):
    """Fourteen real images without offset, and the same with it: truths pass, lies are refused or flagged."""
    found = survey(list_files(shared_data / "sat"), AUTO, root=shared_data / "sat")
    sources = [source for source in found.sources if source.modality.startswith("sentinel2")]
    assert len(sources) >= 14
    outcomes = {}
    for source in sources:
        seen = summary(readers.read(source))
        for carried in (0.0, 0.1):
            for state, removed in ((plausible.ABSENT, 0.0), (plausible.APPLIED, 0.1)):
                expect = {**source.selector["expect"], "offset": state, "shift": [-removed] * len(seen)}
                told = replace(source, selector={**source.selector, "expect": expect})
                moved = [replace(s, **{k: getattr(s, k) + carried - removed for k in MOVED}) for s in seen]
                try:
                    outcome = plausible.verify(told, moved)
                except ReadError as error:
                    outcome = error.reason
                outcomes.setdefault((carried, removed), []).append(outcome)
    assert set(outcomes[0.0, 0.0]) == set(outcomes[0.1, 0.1]) == {()}
    assert set(outcomes[0.1, 0.0]) == {"OFFSET_SUSPECT", ("OFFSET_DOUBTFUL",)}
    # Two scenes under smoke and dust have no dark pixel at all: nothing can tell.
    assert outcomes[0.0, 0.1].count(()) <= 2 and outcomes[0.0, 0.1].count("OFFSET_SUSPECT") >= 10


# the user's own word


def own_modality(tmp_path, name="mine", scene="", head="scale: 0.0001\noffset: -0.1\nnodata: 0\n"):
    path = tmp_path / f"{name}.yaml"
    path.write_text(
        f"name: {name}\ntitle: t\ngeometry: raster\nformats: [geotiff]\nunit: reflectance\n{head}"
        "value_range: [0, 1.6]\nnormalise: {method: archive}\n"
        f"{scene}channels:\n  - {{name: red, kind: optical, wavelength_nm: 660, bandwidth_nm: 30}}\n"
        "  - {name: nir, kind: optical, wavelength_nm: 840, bandwidth_nm: 100}\n"
    )
    return str(path)


SCENE = "scene:\n  files: ['(?P<scene>.+)_(?P<band>red|nir)\\.tif']\n  leave_out: {a preview: '.+_look\\.tif'}\n"


def test_a_sensor_of_the_users_own_has_scenes_by_its_own_rule_and_offset(tmp_path):
    modality = own_modality(tmp_path, scene=SCENE)
    folder = tmp_path / "archive"
    folder.mkdir()
    array = {}
    for scene in ("one", "two"):
        for band in ("nir", "red"):
            array[scene, band] = RNG.integers(1200, 5000, (20, 30)).astype(np.uint16)
            write_geotiff(folder / f"{scene}_{band}.tif", array[scene, band])
        write_geotiff(folder / f"{scene}_look.tif", RNG.integers(1, 9, (3, 20, 30)).astype(np.uint8))
    found = look(folder, modality)
    assert len(found.sources) == 2 and {r.reason for r in found.refusals} == {Reason.LEFT_OUT}
    for source, scene in zip(sorted(found.sources, key=lambda s: s.files), ("one", "two"), strict=True):
        assert [c.name for c in source.channels] == ["red", "nir"]
        expected = [array[scene, band] * 1e-4 - 0.1 for band in ("red", "nir")]
        np.testing.assert_allclose(readers.read(source).array, expected, atol=1e-7)


@pytest.mark.parametrize(
    ("scene", "says"),
    [
        ("scene: {files: ['(?P<scene>.+)']}\n", r"lacks the group \(\?P<band>"),
        ("scene: {files: ['(']}\n", "does not parse"),
        ("scene: {fils: ['a']}\n", "has no field 'fils'; did you mean 'files'"),
        ("scene: {leave_out: {}}\n", "scene has no 'files'"),
        ("scene: 3\n", "must be a mapping"),
        ("scene: {files: ['(?P<band>a)'], offset: {since: 4}}\n", "offset.add is None; it must be a number"),
        ("scene: {files: ['(?P<band>a)'], offset: {add: 1, since: 4, in_xml: {file: a}}}\n", "in_xml lacks 'baseline'"),
    ],
)
def test_a_rule_that_makes_no_sense_is_a_config_error(tmp_path, scene, says):
    with pytest.raises(ConfigError, match=says):
        load_modality(own_modality(tmp_path, scene=scene))


# files that do not fit together


def bands_in(folder: Path, *names: str, rows=24, **options) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(names):
        write_geotiff(folder / name, numbers(reflectances(rows, rows, number)), **options)


def test_where_the_user_names_the_modality_plain_names_of_bands_are_enough(tmp_path):
    bands_in(tmp_path / "a", "B02.tif", "B03.tif")
    bands_in(tmp_path / "b", "x_B02.tif", "x_B8A.tif", "y_B02.tif", "readme_overview.tif")
    found = look(tmp_path, "sentinel2-l2a")
    assert sorted([c.name for c in s.channels] for s in found.sources) == [["B02"], ["B02", "B03"], ["B02", "B8A"]]
    assert {s.flags for s in found.sources} == {("BANDS_MISSING",)}
    assert reasons(found) == {"readme_overview.tif": "LEFT_OUT"}
    # With auto nothing says that these are Sentinel-2's: they stay what they were.
    assert {s.modality for s in look(tmp_path).sources} == {"unnamed-raster"} and len(look(tmp_path).sources) == 6


def test_a_users_overview_is_an_image_where_no_scene_lies_beside_it(tmp_path):
    write_geotiff(
        tmp_path / "overview.tif",
        np.stack([numbers(reflectances(9, 9, n)) for n in (0, 1)]),
        descriptions=["B02", "B03"],
    )
    assert only(tmp_path, "sentinel2-l2a").files[0].name == "overview.tif"


@pytest.mark.parametrize(
    ("transform", "crs", "shape", "says"),
    [
        (grid(20, (500005.0, 4000000.0)), "EPSG:32611", (12, 12), "lies up to 0.5 of the finest pixels off"),
        (grid(15), "EPSG:32611", (16, 16), "of the finest pixels off"),
        (grid(20), "EPSG:32612", (12, 12), "coordinate system is not that of the other bands"),
        (grid(20), "EPSG:32611", (10, 12), "covers another extent: 10 x 12 pixels for 24 x 24 and factor 2 x 2"),
        (grid(20), "EPSG:32611", (14, 12), "covers another extent"),
        (grid(1000), "EPSG:32611", (1, 1), "whole factors up to 64"),
    ],
)
def test_a_band_on_another_grid_refuses_its_scene_and_says_why(tmp_path, transform, crs, shape, says):
    bands_in(tmp_path, "s_B02.tif", "s_B03.tif")
    write_geotiff(tmp_path / "s_B05.tif", numbers(reflectances(*shape, 5)), transform=transform, crs=crs)
    found = look(tmp_path, "sentinel2-l2a")
    assert found.sources == [] and {r.reason for r in found.refusals} == {Reason.SCENE_INCOMPLETE}
    detail = {r.path.name: r.detail for r in found.refusals}
    assert says in detail["s_B05.tif"]
    assert detail["s_B02.tif"].startswith("another file of its scene does not fit: it")
    with pytest.raises(TooManyBadInputsError, match="3 x SCENE_INCOMPLETE .*; for example: "):
        read_images(tmp_path, "sentinel2-l2a")


def test_a_coarse_band_may_reach_over_the_edge_of_the_finest_grid(tmp_path):
    fine, coarse = numbers(reflectances(25, 23, 1)), numbers(reflectances(13, 12, 2))
    write_geotiff(tmp_path / "s_B02.tif", fine)
    write_geotiff(tmp_path / "s_B05.tif", coarse, transform=grid(20))
    image = read_images(tmp_path, "sentinel2-l2a")[0]
    np.testing.assert_allclose(image.array[1], coarse.repeat(2, 0).repeat(2, 1)[:25, :23] * 1e-4, rtol=1e-6)


def test_rotated_and_degree_grids_fit_by_the_same_rule(tmp_path):
    for name, (a, b, d, e), crs in (("r", (6, 8, 8, -6), "EPSG:32611"), ("d", (1e-4, 0, 0, -1e-4), "EPSG:4326")):
        folder = tmp_path / name
        folder.mkdir()
        corner = (5e5, 4e6) if name == "r" else (10.0123456789, 45.0987654321)
        for band, n in (("B02", 1), ("B05", 2)):
            transform = (n * a, n * b, corner[0], n * d, n * e, corner[1])
            write_geotiff(
                folder / f"s_{band}.tif", numbers(reflectances(24 // n, 24 // n, n)), transform=transform, crs=crs
            )
        source = only(folder, "sentinel2-l2a")
        assert source.shape == (24, 24) and ("ROTATED" in source.flags) == (name == "r")


def test_one_band_in_two_files_refuses_the_scene(tmp_path):
    bands_in(tmp_path, "s_B02.tif", "s_B02.tiff", "s_B03.tif")
    found = look(tmp_path, "sentinel2-l2a")
    assert found.sources == [] and set(reasons(found).values()) == {"BAND_MISMATCH"}
    assert {r.detail for r in found.refusals if "B02" in r.path.name} == {"band B02 comes in several files"}


def test_a_description_that_contradicts_the_name_is_refused(tmp_path):
    bands_in(tmp_path, "s_B02.tif")
    write_geotiff(tmp_path / "s_B03.tif", numbers(reflectances(24, 24, 2)), descriptions=["B04"])
    found = look(tmp_path, "sentinel2-l2a")
    assert reasons(found) == {"s_B03.tif": "BAND_MISMATCH"} and len(found.sources) == 1
    assert "name says band B03, its description says B04" in found.refusals[0].detail


def test_a_band_with_a_damaged_header_leaves_a_flag_and_one_with_damaged_pixels_refuses_the_scene(tmp_path):
    product, _ = safe_l2a(tmp_path, bands=FEW, suffix="tif")
    path = next(product.rglob("*_B05_20m.tif"))
    whole = path.read_bytes()
    path.write_bytes(whole[:-400])
    (next(product.rglob("*_B05_60m.tif"))).unlink()
    source = only(product)
    assert [c.name for c in source.channels] == ["B01", "B02"] and "BANDS_MISSING" in source.flags
    assert reasons(look(product))[path.name] == "TRUNCATED"
    write_geotiff(path, numbers(reflectances(60, 60, 3)), transform=grid(20), crs="EPSG:32632", compress="deflate")
    data = bytearray(path.read_bytes())
    with RIO.open(path) as file:
        start = int(file.get_tag_item("BLOCK_OFFSET_0_0", "TIFF", bidx=1))
    data[start : start + 300] = bytes(300)
    path.write_bytes(data)
    with pytest.raises(ReadError, match=rf"pixel data of {path.name} does not decode"):
        readers.read(only(product))


def test_a_whole_scene_beyond_the_memory_limit_asks_for_windows(tmp_path, monkeypatch):
    monkeypatch.setattr("geomed_mae.readers.scenes.pixels.MAX_READ_VALUES", 1000)
    bands_in(tmp_path, "s_B02.tif", "s_B03.tif")
    source = only(tmp_path, "sentinel2-l2a")
    with pytest.raises(ReadError, match="does not fit one read; read windows of it"):
        readers.read(source)
    assert readers.read(source, (slice(0, 9), slice(0, 9))).array.shape == (2, 9, 9)


def test_bands_of_different_pixel_types_are_physical_values_alike(tmp_path):
    write_geotiff(tmp_path / "s_B02.tif", numbers(reflectances(20, 20, 1)))
    wide = numbers(reflectances(20, 20, 2)).astype(np.int32)
    write_geotiff(tmp_path / "s_B03.tif", wide)
    image = read_images(tmp_path, "sentinel2-l2a")[0]
    np.testing.assert_allclose(image.array[1], wide * 1e-4, rtol=1e-6)


def test_a_scene_survives_its_journey_through_json(tmp_path):
    source = only(safe_l2a(tmp_path, bands=FEW)[0])
    again = Source.from_json(json.loads(json.dumps(source.to_json())))
    np.testing.assert_array_equal(readers.read(again).array, readers.read(source).array)


def test_a_scan_takes_a_large_scene_in_parts_of_whole_blocks(tmp_path, monkeypatch):
    source = only(safe_l2a(tmp_path, bands=FEW, rows=240)[0])
    assert source.block == (64, 64)
    whole = examine(source)
    for limit in (3 * 240 * 70, 3 * 240 * 40):
        monkeypatch.setattr("geomed_mae.archives.examine.PART_VALUES", limit)
        assert [part[0].stop - part[0].start for part in parts(source)] == [64, 64, 64, 48]
        assert examine(source).digest == whole.digest


def test_what_a_window_decodes_is_counted_in_whole_blocks(tmp_path):
    source = only(safe_l2a(tmp_path, bands=FEW)[0])
    assert decoded_values(source, [(slice(60, 70), slice(0, 64))]) == 3 * 128 * 64
    assert decoded_values(replace(source, block=None), [(slice(60, 70), slice(0, 64))]) == 3 * 10 * 64


# units (fault 20)


def test_a_scale_of_the_files_own_must_be_the_scenes(tmp_path):
    product, stored = safe_l2a(tmp_path, bands={"B02": 10}, suffix="tif", xml=None)
    path = next(product.rglob("*_B02_10m.tif"))
    write_geotiff(path, stored["B02"], transform=grid(10), crs="EPSG:32632", scales=[1e-4], offsets=[-0.1])
    valid = stored["B02"] > 0
    np.testing.assert_allclose(
        readers.read(only(product)).array[0][valid], (stored["B02"][valid] - 1000.0) * 1e-4, atol=1e-7
    )
    write_geotiff(path, stored["B02"], transform=grid(10), crs="EPSG:32632", scales=[1e-4], offsets=[0.05])
    found = look(product)
    assert found.sources == [] and reasons(found)[path.name] == "UNIT_CONFLICT"
    assert "declares scale 0.0001 and offset 0.05" in next(r.detail for r in found.refusals if r.path == path)


@pytest.mark.parametrize(
    ("modality", "array", "says"),
    [
        ("sentinel2-l2a", RNG.uniform(0.01, 0.9, (2, 20, 20)).astype(np.float32), "this is reflectance already"),
        ("landsat8", RNG.uniform(0.01, 0.9, (2, 20, 20)).astype(np.float32), "this is reflectance already"),
        ("sentinel1", RNG.uniform(0.001, 2, (2, 20, 20)).astype(np.float32), "not the decibels of sentinel1"),
        ("sentinel1", RNG.integers(1, 900, (2, 20, 20)).astype(np.uint16), "not the decibels of sentinel1"),
        ("naip", RNG.integers(1, 60000, (2, 20, 20)).astype(np.uint16), "this is another unit or scale"),
    ],
)
def test_numbers_that_cannot_have_the_modalitys_unit_are_refused(tmp_path, modality, array, says):
    names = [channel.name for channel in load_modality(modality).channels[:2]]
    path = write_geotiff(tmp_path / "a.tif", array, descriptions=names)
    with pytest.raises(ReadError, match=says) as caught:
        read_images(path, modality)
    assert caught.value.reason == "UNIT_CONFLICT"


# Landsat, Sentinel-1, BigEarthNet


def test_a_landsat_product_is_one_image_of_reflectance_whose_fill_is_in_its_flags(tmp_path):
    product, stored = landsat_product(tmp_path)
    found = look(tmp_path)
    assert len(found.sources) == 1 and found.sources[0].modality == "landsat8"
    image = readers.read(found.sources[0])
    assert [c.name for c in image.channels] == [f"B{n}" for n in range(1, 8)]
    valid = (stored["QA_PIXEL"] & 1) == 0
    np.testing.assert_array_equal(image.valid, valid[None])
    for number, array in enumerate(image.array, start=1):
        expected = np.where(valid, stored[f"SR_B{number}"] * 0.0000275 - 0.2, 0)
        np.testing.assert_allclose(array, expected, rtol=1e-6, atol=1e-9)
    left = {r.path.name.removeprefix(f"{product.name}_"): r for r in found.refusals}
    assert {name: r.reason.name for name, r in left.items()} == {
        **dict.fromkeys(("ST_B10.TIF", "QA_RADSAT.TIF", "SR_QA_AEROSOL.TIF", "ST_QA.TIF", "ST_TRAD.TIF"), "LEFT_OUT"),
        **dict.fromkeys(("MTL.txt", "MTL.json", "MTL.xml", "ANG.txt"), "METADATA"),
    }
    assert "a thermal band" in left["ST_B10.TIF"].detail
    part = readers.read(found.sources[0], (slice(3, 9), slice(5, 20)))
    np.testing.assert_array_equal(part.valid[0], valid[3:9, 5:20])


def test_flags_that_a_float_cannot_hold_are_refused(tmp_path):
    product, stored = landsat_product(tmp_path)
    path = product / f"{product.name}_QA_PIXEL.TIF"
    write_geotiff(path, stored["QA_PIXEL"].astype(np.uint32), transform=grid(30))
    assert look(product).sources == [] and reasons(look(product))[path.name] == "BAND_MISMATCH"


def test_a_landsat_7_level_1_product_is_digital_numbers_with_fill_zero(tmp_path):
    name = "LE07_L1TP_193026_20020611_20200916_02_T1"
    for band in ("B1", "B2", "B3", "B4", "B5", "B6_VCID_1", "B7"):
        array = RNG.integers(1, 250, (20, 30)).astype(np.uint8)
        array[:4] = 0
        (tmp_path / name).mkdir(exist_ok=True)
        write_geotiff(tmp_path / name / f"{name}_{band}.TIF", array, transform=grid(30))
    write_geotiff(tmp_path / name / f"{name}_B8.TIF", np.ones((40, 60), np.uint8), transform=grid(15))
    found = look(tmp_path)
    assert [s.modality for s in found.sources] == ["landsat7"] and found.sources[0].flags == ()
    image = readers.read(found.sources[0])
    assert not image.valid[0, :4].any() and image.valid[0, 4:].all() and image.array.max() <= 250
    assert {r.path.name[len(name) + 1 :]: r.reason.name for r in found.refusals} == {
        "B6_VCID_1.TIF": "LEFT_OUT", "B8.TIF": "LEFT_OUT",
    }  # fmt: skip


def test_a_collection_1_product_has_its_own_scale(tmp_path):
    name = "LC08_L1TP_193026_20190611_20190619_01_T1"
    array = RNG.integers(100, 5000, (20, 30)).astype(np.int16)
    array[:3] = -9999
    write_geotiff(tmp_path / f"{name}_sr_band4.tif", array, transform=grid(30))
    source = only(tmp_path)
    assert source.modality == "landsat8" and [c.name for c in source.channels] == ["B4"]
    image = readers.read(source)
    np.testing.assert_allclose(image.array[0, 3:], array[3:] * 1e-4, rtol=1e-6)
    assert not image.valid[0, :3].any()


def test_level_1_numbers_are_never_taken_for_surface_reflectance(tmp_path):
    name = "LC08_L1TP_193026_20220611_20220616_02_T1"
    write_geotiff(tmp_path / f"{name}_B4.TIF", RNG.integers(5000, 20000, (20, 30)).astype(np.uint16))
    assert only(tmp_path).modality == "landsat8-l1"
    assert look(tmp_path, "landsat8").sources == [] and look(tmp_path, "landsat-tm-sr").sources == []


@pytest.mark.parametrize(
    "name", ["LC08_L1TP_193026_20220611_20220616_02_T1", "LC09_L1GT_193026_20220611_20220616_02_T2"]
)
def test_a_landsat_8_level_1_product_is_reflectance_at_the_top_of_the_atmosphere(tmp_path, name):
    stored = {}
    for band in ("B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9", "B10", "B11", "SAA", "QA_RADSAT"):
        stored[band] = RNG.integers(5200, 30000, (20, 30)).astype(np.uint16)
        write_geotiff(tmp_path / f"{name}_{band}.TIF", stored[band], transform=grid(30))
    write_geotiff(tmp_path / f"{name}_B8.TIF", np.ones((40, 60), np.uint16), transform=grid(15))
    flags = np.full((20, 30), 21824, np.uint16)
    flags[:5] = 1
    write_geotiff(tmp_path / f"{name}_QA_PIXEL.TIF", flags, transform=grid(30))
    found = look(tmp_path)
    assert [s.modality for s in found.sources] == ["landsat8-l1"] and found.sources[0].flags == ()
    image = readers.read(found.sources[0])
    assert [c.name for c in image.channels] == ["B1", "B2", "B3", "B4", "B5", "B6", "B7", "B9"]
    np.testing.assert_array_equal(image.valid[0], (flags & 1) == 0)
    np.testing.assert_allclose(image.array[3, 5:], stored["B4"][5:] * 2e-5 - 0.1, rtol=1e-6)
    assert set(reasons(found).values()) == {"LEFT_OUT"} and len(found.refusals) == 5


@pytest.mark.parametrize("sensor", ["LT05", "LE07", "LT04"])
def test_a_landsat_tm_surface_reflectance_product_has_its_own_wavelengths(tmp_path, sensor):
    name = f"{sensor}_L2SP_193026_20020611_20200916_02_T1"
    stored = {}
    for band in ("SR_B1", "SR_B2", "SR_B3", "SR_B4", "SR_B5", "SR_B7", "ST_B6", "SR_ATMOS_OPACITY", "SR_CLOUD_QA"):
        stored[band] = RNG.integers(7300, 20000, (20, 30)).astype(np.uint16)
        stored[band][:, 10:12] = 0
        write_geotiff(tmp_path / f"{name}_{band}.TIF", stored[band], transform=grid(30))
    flags = np.full((20, 30), 5440, np.uint16)
    flags[:5] = 1
    write_geotiff(tmp_path / f"{name}_QA_PIXEL.TIF", flags, transform=grid(30))
    found = look(tmp_path)
    assert [s.modality for s in found.sources] == ["landsat-tm-sr"] and found.sources[0].flags == ()
    image = readers.read(found.sources[0])
    assert [c.wavelength_nm for c in image.channels] == [485, 560, 660, 835, 1650, 2215]
    valid = ((flags & 1) == 0) & (stored["SR_B7"] != 0)
    np.testing.assert_array_equal(image.valid[0], valid)
    np.testing.assert_allclose(image.array[5], np.where(valid, stored["SR_B7"] * 0.0000275 - 0.2, 0), rtol=1e-6)
    assert set(reasons(found).values()) == {"LEFT_OUT"}
    assert look(tmp_path, "landsat8").sources == [] and look(tmp_path, "landsat7").sources == []


def test_a_landsat_tm_product_of_collection_1_has_its_own_scale(tmp_path):
    name = "LT05_L1TP_193026_19950611_20180619_01_T1"
    array = RNG.integers(100, 5000, (20, 30)).astype(np.int16)
    array[:3] = -9999
    write_geotiff(tmp_path / f"{name}_sr_band7.tif", array, transform=grid(30))
    write_geotiff(tmp_path / f"{name}_pixel_qa.tif", np.full((20, 30), 66, np.uint16), transform=grid(30))
    source = only(tmp_path)
    assert source.modality == "landsat-tm-sr" and [c.name for c in source.channels] == ["B7"]
    image = readers.read(source)
    np.testing.assert_allclose(image.array[0, 3:], array[3:] * 1e-4, rtol=1e-6)
    assert not image.valid[0, :3].any()


@pytest.mark.parametrize(
    ("product", "modality", "bands", "nir"),
    [
        ("HLS.L30.T17SLU.2020209T155956.v2.0", "hls-l30", ["B02", "B03", "B04", "B05"], 865),
        ("HLS.S30.T17SLU.2020209T155956.v2.0", "hls-s30", ["B02", "B03", "B04", "B8A"], 865),
    ],
)
def test_the_bands_of_an_hls_granule_are_one_image_whose_fill_is_minus_9999(tmp_path, product, modality, bands, nir):
    stored = {}
    for band in [*bands, "B10", "Fmask", "SZA"]:
        stored[band] = RNG.integers(-150, 6000, (20, 30)).astype(np.int16)
        stored[band][:4] = -9999
        write_geotiff(tmp_path / f"{product}.{band}.tif", stored[band], transform=grid(30), nodata=-9999)
    (tmp_path / f"{product}.cmr.xml").write_text("<x/>")
    found = look(tmp_path)
    assert [s.modality for s in found.sources] == [modality]
    image = readers.read(found.sources[0])
    assert [c.name for c in image.channels] == bands and image.channels[3].wavelength_nm == nir
    assert not image.valid[0, :4].any() and image.valid[0, 4:].all()
    for array, band in zip(image.array, bands, strict=True):
        np.testing.assert_allclose(array[4:], stored[band][4:] * 1e-4, rtol=1e-6)
    assert image.array.min() < 0
    left = {name.removeprefix(f"{product}."): reason for name, reason in reasons(found).items()}
    assert left == {
        "B10.tif": "LEFT_OUT", "Fmask.tif": "LEFT_OUT", "SZA.tif": "LEFT_OUT", "cmr.xml": "METADATA",
    }  # fmt: skip


def test_an_hls_granule_of_the_other_sensor_is_not_the_one_that_is_named(tmp_path):
    write_geotiff(tmp_path / "HLS.S30.T17SLU.2020209T155956.v2.0.B05.tif", RNG.integers(1, 99, (9, 9)).astype(np.int16))
    assert only(tmp_path).channels[0].wavelength_nm == 704.1
    assert look(tmp_path, "hls-s30").sources[0].modality == "hls-s30"
    # A single raster without a band's name: nobody but its user knows, and hls-l30 has seven bands.
    assert look(tmp_path, "hls-l30").sources == []


def test_names_of_bands_alone_are_no_product_of_a_modality_that_shares_them(tmp_path):
    path = tmp_path / "a.tif"
    stored = np.stack([numbers(reflectances(9, 9, seed)) for seed in (1, 2, 3)])
    write_geotiff(path, stored, descriptions=["B02", "B03", "B04"])
    assert only(tmp_path).modality.startswith("sentinel2")
    assert only(tmp_path, "hls-l30").modality == "hls-l30"


def test_the_polarisations_of_a_sentinel_1_patch_are_one_image(tmp_path):
    name = "S1A_IW_GRDH_1SDV_20170613T165043_33UUP_61_39"
    array = {p: RNG.normal(-14, 4, (20, 20)).astype(np.float32) for p in ("VH", "VV")}
    for polarisation, values in array.items():
        write_geotiff(tmp_path / f"{name}_{polarisation}.tif", values)
    image = read_images(tmp_path)[0]
    assert image.modality == "sentinel1" and [c.name for c in image.channels] == ["VV", "VH"]
    np.testing.assert_array_equal(image.array, [array["VV"], array["VH"]])


def test_a_bigearthnet_patch_takes_its_baseline_from_its_tile(tmp_path):
    name = "S2B_MSIL2A_20180525T94031_70_50"
    for tile, shift in (
        ("S2B_MSIL1C_20180525T094031_N0206_R036_T35VNK.SAFE", 0.0),
        ("S2B_MSIL1C_x_N0500_R036_T35VNK.SAFE", -0.1),
    ):
        folder = tmp_path / tile / name.replace("T94031", "T094031")
        folder.mkdir(parents=True)
        write_geotiff(folder / f"{folder.name}_B02.tif", numbers(reflectances(30, 30, 1), -10000 * -shift))
        (folder / f"{folder.name}_labels_metadata.json").write_text(json.dumps({"labels": [], "tile_source": tile}))
    # The nearest name counts: the patch's own, not that of the tile above it.
    found = {s.files[0].parent.parent.name[15:]: s.selector["expect"]["shift"] for s in look(tmp_path).sources}
    assert sorted(found.values()) == [[-0.1], [0.0]] and {s.modality for s in look(tmp_path).sources} == {
        "sentinel2-l2a"
    }
    # Without the tile's name in the path, the JSON beside the bands has it.
    moved = tmp_path / "patches"
    for number, folder in enumerate(sorted(tmp_path.glob("*/S2B*"))):
        shutil.move(folder, moved / str(number) / folder.name)
    assert [s.selector["expect"]["shift"] for s in look(moved).sources] == [[0.0], [-0.1]]


@pytest.mark.data
def test_the_real_bigearthnet_patch_equals_rasterio_band_by_band(shared_data):
    folder = shared_data / "sat" / "bigearthnet"
    source = only(folder)
    assert source.modality == "sentinel2-l2a" and source.shape == (120, 120) and source.flags == ()
    assert [c.name for c in source.channels] == list(L2A_METRES)
    image = read_images(folder)[0]
    for band, array in zip(L2A_METRES, image.array, strict=True):
        with RIO.open(next(folder.rglob(f"*_{band}.tif"))) as file:
            stored = file.read(1)
            assert file.transform.a == L2A_METRES[band]
        factor = L2A_METRES[band] // 10
        fine = np.repeat(np.repeat(stored, factor, 0), factor, 1)
        np.testing.assert_array_equal(array, (fine * 1e-4).astype(np.float32))
    assert image.valid.all() and image.geometry.gsd_m == (10, 10)
    index = scan_archive([folder], "auto")
    assert len(index) == 1 and [e.status for e in index.ledger.entries].count("used") == 12
    assert index.rows[0].flags == ()


def test_polarisations_named_by_their_folder_alone_are_one_image(tmp_path):
    folder = tmp_path / "S1A_IW_GRDH_1SDV_20200329T001515_20200329T001540_031883_03AE27_9BAF"
    folder.mkdir()
    array = {p: RNG.normal(-14, 4, (20, 20)).astype(np.float32) for p in ("VH", "VV")}
    for polarisation, values in array.items():
        write_geotiff(folder / f"{polarisation}.tif", values)
    source = only(tmp_path)
    assert source.modality == "sentinel1"
    np.testing.assert_array_equal(readers.read(source).array, [array["VV"], array["VH"]])


def test_bands_of_sentinel_2_may_be_numbered_without_a_zero(tmp_path):
    stored = {band: numbers(reflectances(20, 20, 1)) for band in ("B2", "B8A", "B12")}
    for band, array in stored.items():
        write_geotiff(tmp_path / f"{band}.tif", array)
    source = only(tmp_path, "sentinel2-l2a")
    assert [c.name for c in source.channels] == ["B02", "B8A", "B12"]
    assert {s.modality for s in look(tmp_path).sources} == {"unnamed-raster"}


def test_a_landsat_band_is_no_band_of_the_sentinel_2_that_is_named(tmp_path):
    path = tmp_path / "LC08_L1TP_193026_20220611_20220616_02_T1_B4.TIF"
    write_geotiff(path, RNG.integers(5000, 20000, (20, 30)).astype(np.uint16))
    assert reasons(look(tmp_path, "sentinel2-l2a")) == {path.name: "MODALITY_MISMATCH"}


@pytest.mark.parametrize("modality", ["sentinel2-l2a", "landsat8", "hls-s30"])
def test_eight_bits_cannot_hold_scaled_reflectance(tmp_path, modality):
    """Chips scaled for display keep the names of the bands: times 0.0001 they would all be black."""
    names = {"landsat8": ["SR_B2", "SR_B3", "SR_B6"]}.get(modality, ["B02", "B03", "B04"])
    write_geotiff(tmp_path / "a.tif", RNG.integers(1, 255, (3, 20, 20)).astype(np.uint8), descriptions=names)
    found = look(tmp_path, modality)
    assert [r.reason.name for r in found.refusals] == ["UNIT_CONFLICT"]
    assert "scaled for display or in another unit; give a modality file" in found.refusals[0].detail
    assert only(tmp_path).modality == "unnamed-raster"
    (tmp_path / "scene").mkdir()
    for band in ("B02", "B03"):
        write_geotiff(tmp_path / "scene" / f"x_{band}.tif", RNG.integers(1, 255, (9, 9)).astype(np.uint8))
    scene = look(tmp_path / "scene", "sentinel2-l2a")
    assert scene.sources == [] and set(reasons(scene).values()) == {"UNIT_CONFLICT"}


def test_names_that_two_landsats_share_are_not_guessed(tmp_path):
    """SR_B2 is blue for OLI and green for TM, with one scale: a wrong guess would change every wavelength."""
    stored = RNG.integers(7300, 20000, (3, 20, 20)).astype(np.uint16)
    write_geotiff(tmp_path / "a.tif", stored, descriptions=["SR_B4", "SR_B3", "SR_B2"])
    source = only(tmp_path)
    assert source.modality == "unnamed-raster" and "MODALITY_AMBIGUOUS" in source.flags
    assert [c.wavelength_nm for c in only(tmp_path, "landsat8").channels] == [655, 561, 482]
    assert [c.wavelength_nm for c in only(tmp_path, "landsat-tm-sr").channels] == [835, 660, 560]
    oli = tmp_path / "oli"
    oli.mkdir()
    write_geotiff(oli / "a.tif", stored, descriptions=["SR_B4", "SR_B3", "SR_B6"])
    assert only(oli).modality == "landsat8"
