"""Legends beside class maps, read by GDAL, an XML parser and by the rules of 3D Slicer."""

from __future__ import annotations

import numpy as np
import pytest

from geomed_mae.image import PlaneGeometry, RasterGeometry
from geomed_mae.writers import NODATA, cog, legend, nifti
from tests.consumer import elsewhere
from tests.writers.test_cog import ROTATED, UTM
from tests.writers.test_nifti import geometry as volume_geometry

CLASSES = ("background", "open water", 'wood <5 m & "bush"', "Gebüsch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    values = np.random.default_rng(0).integers(0, 4, (30, 40)).astype(np.uint8)
    cog.write(folder / "map.tif", values, RasterGeometry(UTM, ROTATED, None), CLASSES)
    nifti.write(folder / "volume.nii.gz", values.reshape(3, 10, 40), volume_geometry(), CLASSES)
    nifti.write(folder / "plane.nii.gz", values, PlaneGeometry(None), CLASSES)
    return folder


def test_gdal_elsewhere_finds_category_names_and_an_attribute_table(folder, tmp_path):
    """GDAL says what it has read when it copies a raster to its text format."""
    found = elsewhere(
        """
        import json, sys
        import xml.etree.ElementTree as tree
        import rasterio
        from rasterio.shutil import copy
        copy(sys.argv[1], sys.argv[2], driver="VRT")
        band = tree.parse(sys.argv[2]).getroot().find("VRTRasterBand")
        table = band.find("GDALRasterAttributeTable")
        fields = [(f.findtext("Name"), f.findtext("Usage")) for f in table.findall("FieldDefn")]
        with rasterio.open(sys.argv[1]) as d:
            said = {"tags": d.tags(1), "map": {k: v for k, v in d.colormap(1).items() if k < 4 or k == 255},
                    "nodata": d.nodata, "files": d.files}
        print(json.dumps({
            "names": [c.text for c in band.find("CategoryNames")], "fields": fields,
            "rows": [[f.text for f in row] for row in table.findall("Row")], **said,
        }))
        """,
        folder / "map.tif",
        tmp_path / "map.vrt",
    )
    assert found["names"] == list(CLASSES)
    assert found["fields"] == [
        ["Value", "5"],
        ["Class", "2"],
        ["Red", "6"],
        ["Green", "7"],
        ["Blue", "8"],
        ["Alpha", "9"],
    ]
    table = legend.colours(4)
    assert found["rows"] == [[str(n), name, *map(str, table[n])] for n, name in enumerate(CLASSES)]
    assert {f"CLASS_{number}": name for number, name in enumerate(CLASSES)}.items() <= found["tags"].items()
    assert found["map"] == {str(n): list(colour) for n, colour in table.items()} and found["nodata"] == NODATA
    assert found["files"] == [str(folder / "map.tif"), str(folder / "map.tif.aux.xml")]


def test_the_style_is_a_paletted_renderer_as_qgis_writes_it(folder):
    found = elsewhere(
        """
        import json, sys
        import xml.etree.ElementTree as tree
        root = tree.parse(sys.argv[1]).getroot()
        renderer = root.find("pipe/rasterrenderer")
        print(json.dumps([root.tag, renderer.attrib, [e.attrib for e in renderer.find("colorPalette")]]))
        """,
        folder / "map.qml",  # the map's name with another ending: the style that QGIS loads by itself
    )
    tag, renderer, entries = found
    assert tag == "qgis" and (renderer["type"], renderer["band"]) == ("paletted", "1")
    assert [(entry["value"], entry["label"]) for entry in entries] == [(str(n), c) for n, c in enumerate(CLASSES)]
    for number, entry in enumerate(entries):
        red, green, blue, alpha = legend.colours(4)[number]
        assert entry["color"] == f"#{red:02x}{green:02x}{blue:02x}" and entry["alpha"] == str(alpha)


@pytest.mark.parametrize("name", ["volume", "plane"])
def test_the_colour_table_of_slicer_has_six_words_a_line_and_no_spaces_in_names(folder, name):
    text = (folder / f"{name}.ctbl").read_text(encoding="utf-8")
    lines = [line.split(" ") for line in text.splitlines() if not line.startswith("#")]
    assert text.startswith("# Color table file\n# 5 values\n")
    assert [line[0] for line in lines] == ["0", "1", "2", "3", str(NODATA)]
    assert [line[1] for line in lines][:2] == ["background", "open_water"] and {len(line) for line in lines} == {6}
    assert lines[0][2:] == lines[-1][2:] == ["0"] * 4, "background and what is unknown are not shown"
    assert tuple(map(int, lines[1][2:])) == legend.colours(4)[1]


def test_legends_hold_names_and_numbers_alone(folder):
    for path in folder.iterdir():
        assert str(folder).encode() not in path.read_bytes()
