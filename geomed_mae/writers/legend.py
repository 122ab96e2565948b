"""Which number is which class, in the words of the programs that open a class map: small text files beside it.

- `x.qml`: the style that QGIS loads by itself with `x.tif` (QgsPalettedRasterRenderer), so that the legend has names;
- `x.tif.aux.xml`: category names and a raster attribute table as GDAL keeps them (gdal.org, "PAM"; ArcGIS reads the
  same), because a GeoTIFF has no place of its own for them before GDAL 3.11;
- `x.ctbl`: a colour table of 3D Slicer (Developer Guide, "Colors"), which gives the segments of `x.nii.gz` their names
  and colours when it is chosen with the segmentation. NIfTI has no field for class names. Slicer reads this form in all
  its versions; ITK-SNAP has a form of its own.

All hold names, numbers and colours of classes and nothing else.
"""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from html import escape

from geomed_mae.writers import NODATA

Colour = tuple[int, int, int, int]
"""Red, green, blue and alpha, 0 to 255."""

QML, PAM, CTBL = ".qml", ".aux.xml", ".ctbl"
GREY: Colour = (190, 190, 190, 255)
NONE: Colour = (0, 0, 0, 0)
GOLDEN = 0.61803398875
"""Hue step between classes: multiples of the golden ratio never come close to one another."""
SATURATION, BRIGHTNESS, FIRST_HUE = 0.75, 0.9, 0.6
FIELDS = (("Value", 0, 5), ("Class", 2, 2), ("Red", 0, 6), ("Green", 0, 7), ("Blue", 0, 8), ("Alpha", 0, 9))
"""Columns of the attribute table: name, GDALRATFieldType (0 integer, 2 text), GDALRATFieldUsage (5 value, 2 name)."""


def colours(classes: int) -> dict[int, Colour]:
    """Return the colour of each class number: class 0 grey, the others far apart in hue, NODATA transparent."""
    table = {0: GREY}
    for number in range(1, classes):
        red, green, blue = colorsys.hsv_to_rgb((FIRST_HUE + number * GOLDEN) % 1.0, SATURATION, BRIGHTNESS)
        table[number] = (round(255 * red), round(255 * green), round(255 * blue), 255)
    return {**table, NODATA: NONE}


def qgis_style(classes: Sequence[str]) -> str:
    """Return the text of a QGIS layer style (QML): one palette entry a class, named; NODATA stays transparent."""
    table = colours(len(classes))
    entries = [
        f'        <paletteEntry value="{number}" label="{_xml(name)}" color="{_hex(table[number])}" alpha="255"/>'
        for number, name in enumerate(classes)
    ]
    return "\n".join(
        [
            "<!DOCTYPE qgis PUBLIC 'http://mrcc.com/qgis.dtd' 'SYSTEM'>",
            '<qgis version="3.22.0" styleCategories="Symbology">',
            "  <pipe>",
            '    <rasterrenderer type="paletted" band="1" opacity="1" alphaBand="-1" nodataColor="">',
            "      <rasterTransparency/>",
            "      <colorPalette>",
            *entries,
            "      </colorPalette>",
            "    </rasterrenderer>",
            "  </pipe>",
            "  <blendMode>0</blendMode>",
            "</qgis>",
            "",
        ]
    )


def gdal_sidecar(classes: Sequence[str], crs: str | None = None) -> str:
    """Return the text of a GDAL side-car (PAM): category names and an attribute table of band 1, as far as there are.

    Args:
        classes: names of the classes; empty for a raster without classes.
        crs: coordinate system as WKT, where the raster file cannot hold it; GDAL prefers it to the file's.
    """
    place = [] if crs is None else [f"  <SRS>{_xml(crs)}</SRS>"]
    band = ['  <PAMRasterBand band="1">', *_categories(classes), *_table(classes), "  </PAMRasterBand>"]
    return "\n".join(["<PAMDataset>", *place, *(band if classes else []), "</PAMDataset>", ""])


def slicer_colours(classes: Sequence[str]) -> str:
    """Return the text of a 3D Slicer colour table: number, name (no spaces), red, green, blue, opacity.

    Number 0 is Slicer's background and transparent; NODATA has a line, so that voxels without data are no segment
    with a made-up name.
    """
    table = colours(len(classes)) | {0: NONE}
    named = [*enumerate(classes), (NODATA, "no_data")]
    lines = [" ".join(map(str, (number, "_".join(name.split()), *table[number]))) for number, name in named]
    return "\n".join(["# Color table file", f"# {len(lines)} values", *lines, ""])


def _categories(classes: Sequence[str]) -> list[str]:
    lines = [f"      <Category>{_xml(name)}</Category>" for name in classes]
    return ["    <CategoryNames>", *lines, "    </CategoryNames>"]


def _table(classes: Sequence[str]) -> list[str]:
    fields = [
        f'      <FieldDefn index="{at}"><Name>{name}</Name><Type>{kind}</Type><Usage>{usage}</Usage></FieldDefn>'
        for at, (name, kind, usage) in enumerate(FIELDS)
    ]
    table, rows = colours(len(classes)), []
    for number, name in enumerate(classes):
        cells = "".join(f"<F>{_xml(str(value))}</F>" for value in (number, name, *table[number]))
        rows.append(f'      <Row index="{number}">{cells}</Row>')
    head = '    <GDALRasterAttributeTable tableType="thematic">'
    return [head, *fields, *rows, "    </GDALRasterAttributeTable>"]


def _hex(colour: Colour) -> str:
    return "#" + "".join(f"{part:02x}" for part in colour[:3])


def _xml(text: str) -> str:
    return escape(text, quote=True)
