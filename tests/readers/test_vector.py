"""Vector labels: polygons land on the pixels whose centres they contain, whatever the format and coordinate system."""

from __future__ import annotations

import json
import os
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import shapely

from geomed_mae.errors import MissingExtraError, ReadError
from geomed_mae.image import Channel, Image, PlaneGeometry, RasterGeometry
from geomed_mae.modalities import resolve_modalities
from geomed_mae.readers import LabelQuery, header_of, read_labels, survey, vector
from geomed_mae.readers.geotiff.open import rasterio
from geomed_mae.readers.reasons import NOT_BAD, Reason
from geomed_mae.readers.vector import file as vector_file
from geomed_mae.readers.vector import raster as vector_raster

RIO = rasterio()
UTM = "EPSG:32633"
NORTH_UP = (10.0, 0.0, 500000.0, 0.0, -10.0, 4000000.0)
QUERY = LabelQuery(classes=("background", "water", "forest"))


def image(shape=(40, 60), crs=UTM, transform=NORTH_UP) -> Image:
    wkt = None if crs is None else RIO.crs.CRS.from_user_input(crs).to_wkt()
    geometry = RasterGeometry(wkt, transform, (10.0, 10.0))
    return Image(np.zeros((1, *shape), np.float32), np.ones((1, *shape), bool), (Channel(name="a"),), geometry, "rgb")


def pixels_to_map(polygon, onto: Image):
    """A polygon in (column, row) of an image as one in its map units."""
    a, b, c, d, e, f = onto.geometry.transform
    return shapely.transform(polygon, lambda p: p @ np.array([[a, d], [b, e]]) + [c, f])


def to_degrees(polygon, crs=UTM):
    def move(points):
        return np.column_stack(RIO.warp.transform(crs, "EPSG:4326", points[:, 0], points[:, 1]))

    return shapely.transform(polygon, move)


def geojson(path: Path, polygons, names, *, crs: str | None = None, column: str = "class", **extra) -> Path:
    features = [
        {
            "type": "Feature",
            "geometry": None if polygon is None else json.loads(shapely.to_geojson(polygon)),
            "properties": {column: name, **extra},
        }
        for polygon, name in zip(polygons, names, strict=True)
    ]
    data = {"type": "FeatureCollection", "features": features}
    if crs:
        data["crs"] = {"type": "name", "properties": {"name": crs}}
    path.write_text(json.dumps(data))
    return path


def ogr(path: Path, polygons, columns: dict, *, crs: str | None = UTM, driver: str | None = None, **options) -> Path:
    import pyogrio

    driver = driver or {".shp": "ESRI Shapefile", ".gpkg": "GPKG"}[path.suffix]
    pyogrio.raw.write(
        path,
        np.array([None if p is None else shapely.to_wkb(p) for p in polygons], dtype=object),
        [np.array(values, dtype=object if isinstance(values[0], str) else None) for values in columns.values()],
        list(columns),
        geometry_type=options.pop("geometry_type", "Polygon"),
        crs=crs,
        driver=driver,
        **options,
    )
    return path


def by_containment(polygons, numbers, onto: Image, crs: str, background: int = 0) -> np.ndarray:
    """The oracle: every pixel centre moved into the file's system by itself, and looked for in each polygon."""
    rows, columns = np.mgrid[: onto.spatial_shape[0], : onto.spatial_shape[1]] + 0.5
    a, b, c, d, e, f = onto.geometry.transform
    xs, ys = a * columns + b * rows + c, d * columns + e * rows + f
    moved = RIO.warp.transform(RIO.crs.CRS.from_wkt(onto.geometry.crs), crs, xs.ravel(), ys.ravel())
    out = np.full(onto.spatial_shape, background, np.int16)
    for polygon, number in sorted(zip(polygons, numbers, strict=True), key=lambda entry: entry[1]):
        out[shapely.intersects_xy(polygon, *moved).reshape(out.shape)] = number
    return out


def refused(path: Path, onto: Image, query: LabelQuery = QUERY) -> tuple[str, str]:
    with pytest.raises(ReadError) as caught:
        read_labels(path, onto, query)
    assert str(path.parent) not in str(caught.value)
    return caught.value.reason, str(caught.value)


# ---------------------------------------------------------------------------------------------------- which pixels


GRIDS = {
    "north-up": NORTH_UP,
    "south-up": (10.0, 0.0, 500000.0, 0.0, 10.0, 4000000.0),
    "rotated": (8.0, 6.0, 500000.0, 6.0, -8.0, 4000000.0),
    "oblong": (5.0, 0.0, 500000.0, 0.0, -20.0, 4000000.0),
}


@pytest.mark.parametrize("suffix", [".geojson", ".gpkg", ".shp"])
@pytest.mark.parametrize("grid", GRIDS)
def test_polygons_of_known_pixels_land_on_them(tmp_path, grid, suffix):
    onto = image(transform=GRIDS[grid])
    hole = shapely.Polygon(shapely.box(4.2, 3.2, 20.4, 17.4).exterior, [shapely.box(8.2, 6.2, 11.2, 9.2).exterior])
    truth = np.zeros((40, 60), np.int16)
    truth[3:17, 4:20] = 1
    truth[6:9, 8:11] = 0
    truth[30:40, 50:60] = 2
    polygons = [pixels_to_map(p, onto) for p in (hole, shapely.box(50, 30, 75, 66))]
    path = tmp_path / f"labels{suffix}"
    if suffix == ".geojson":
        geojson(path, polygons, ["Water", "forest "], crs="urn:ogc:def:crs:EPSG::32633")
    else:
        ogr(path, polygons, {"class": ["Water", "forest "]})
    found = read_labels(path, onto, QUERY)
    np.testing.assert_array_equal(found.array, truth)
    assert found.array.dtype == np.int16 and found.names == QUERY.classes


def test_a_pixel_belongs_to_the_polygon_that_holds_its_centre(tmp_path):
    onto = image((1, 10))
    edges = [(0.49, 2.49), (3.51, 5.51), (7.0, 7.4)]
    polygons = [pixels_to_map(shapely.box(left, 0, right, 1), onto) for left, right in edges]
    geojson(tmp_path / "a.geojson", polygons, ["water"] * 3, crs="EPSG:32633")
    found = read_labels(tmp_path / "a.geojson", onto, QUERY).array[0]
    np.testing.assert_array_equal(found, [1, 1, 0, 0, 1, 1, 0, 0, 0, 0])


def test_the_higher_class_lies_on_top_in_whatever_order_the_file_has(tmp_path):
    onto = image()
    wide, small = (pixels_to_map(shapely.box(*b), onto) for b in ((0, 0, 30, 30), (10, 10, 20, 20)))
    for polygons, names in (((wide, small), ("water", "forest")), ((small, wide), ("forest", "water"))):
        geojson(tmp_path / "a.geojson", polygons, names, crs="EPSG:32633")
        found = read_labels(tmp_path / "a.geojson", onto, QUERY).array
        assert (found == 2).sum() == 100 and (found == 1).sum() == 800
        os.utime(tmp_path / "a.geojson", ns=(1, 1))


@pytest.mark.parametrize("latitude", [0.5, 47.0, 78.0])
def test_degrees_on_a_utm_grid_agree_with_every_pixel_centre_moved_by_itself(tmp_path, latitude):
    """Long edges: straight in degrees, 10 m pixels and up to 300 km long, they leave the chord by many pixels."""
    x, y = (axis[0] for axis in RIO.warp.transform("EPSG:4326", UTM, [16.0], [latitude]))
    onto = image((300, 400), transform=(10.0, 0.0, x, 0.0, -10.0, y))
    west, north = to_degrees(shapely.Point(x, y)).coords[0]
    spread = 2.0
    polygons = [
        shapely.Polygon([(west - spread, north - 0.01), (west + spread, north - 0.011), (west, north - 2)]),
        shapely.Polygon([(west + 0.01, north + 1), (west + 0.02, north + 1), (west + 0.03, north - 1)]),
        shapely.Point(west + 0.02, north - 0.02).buffer(0.004),
    ]
    names = ["water", "forest", "water"]
    geojson(tmp_path / "a.geojson", polygons, names)
    found = read_labels(tmp_path / "a.geojson", onto, QUERY).array
    truth = by_containment(polygons, [1, 2, 1], onto, "EPSG:4326")
    # Within the tolerance of an edge, a centre may fall on either side.
    assert (found != truth).sum() <= 4 and {0, 1, 2} == set(np.unique(found))
    if latitude == 78.0:
        bent = vector_raster._densified(np.array(polygons[:1]), lambda p: np.column_stack([p[:, 0], p[:, 1]]), tmp_path)
        assert len(bent[0].exterior.coords) == 4, "a straight map needs no further points"


def test_edges_that_were_not_bent_would_be_wrong(tmp_path, monkeypatch):
    x, y = (axis[0] for axis in RIO.warp.transform("EPSG:4326", UTM, [16.0], [60.0]))
    onto = image((300, 400), transform=(500.0, 0.0, x - 1e5, 0.0, -500.0, y + 5e4))
    polygon = shapely.Polygon([(8, 60), (24, 60), (16, 57)])
    geojson(tmp_path / "a.geojson", [polygon], ["water"])
    truth = by_containment([polygon], [1], onto, "EPSG:4326")
    assert (read_labels(tmp_path / "a.geojson", onto, QUERY).array != truth).sum() <= 4
    monkeypatch.setattr(vector_raster, "_densified", lambda polygons, to_pixel, path: polygons)
    assert (read_labels(tmp_path / "a.geojson", onto, QUERY).array != truth).sum() > 400


def test_a_projected_file_lands_on_a_grid_in_degrees_and_on_another_zone(tmp_path):
    circle = shapely.Point(503000.0, 3998000.0).buffer(1500.0, quad_segs=200)
    for suffix in (".gpkg", ".shp"):
        path = ogr(tmp_path / f"a{suffix}", [circle], {"class": ["water"]})
        degrees = image((100, 100), crs="EPSG:4326", transform=(0.0005, 0.0, 15.0, 0.0, -0.0005, 36.15))
        (x,), (y,) = RIO.warp.transform(UTM, "EPSG:32634", [501000.0], [4000000.0])
        zone = image((400, 400), crs="EPSG:32634", transform=(15.0, 0.0, x, 0.0, -15.0, y))
        for onto in (degrees, zone):
            found = read_labels(path, onto, QUERY).array
            truth = by_containment([circle], [1], onto, UTM)
            assert truth.sum() > 1000 and (found != truth).sum() <= 4


def test_polygons_on_both_sides_of_the_antimeridian_land_on_one_image(tmp_path):
    west, east = shapely.box(179.97, -17.02, 180.0, -16.99), shapely.box(-180.0, -17.02, -179.98, -16.99)
    geojson(tmp_path / "a.geojson", [shapely.MultiPolygon([west, east])], ["water"])
    x, y = (axis[0] for axis in RIO.warp.transform("EPSG:4326", "EPSG:32760", [179.96], [-16.98]))
    utm = image((500, 700), crs="EPSG:32760", transform=(10.0, 0.0, x, 0.0, -10.0, y))
    degrees = image((60, 80), crs="EPSG:4326", transform=(0.001, 0.0, 179.9595, 0.0, -0.001, -16.9795))
    for onto in (utm, degrees):
        truth = by_containment([west, east, shapely.box(180.0, -17.02, 180.02, -16.99)], [1, 1, 1], onto, "EPSG:4326")
        found = read_labels(tmp_path / "a.geojson", onto, QUERY).array
        if onto is degrees:
            assert found.sum() == 50 * 30
        else:
            assert (found != truth).sum() <= np.sqrt(truth.sum()) / 10 and truth.sum() > 100_000


def test_a_polygon_around_the_pole_lands_on_a_polar_image(tmp_path):
    cap = shapely.box(-180, 85, 180, 90)
    onto = image((200, 200), crs="EPSG:3413", transform=(10000.0, 0.0, -1e6, 0.0, -10000.0, 1e6))
    geojson(tmp_path / "a.geojson", [cap], ["water"])
    found = read_labels(tmp_path / "a.geojson", onto, QUERY).array
    truth = by_containment([cap], [1], onto, "EPSG:4326")
    assert found[100, 100] == 1 and (found != truth).sum() <= 10


def test_an_edge_around_the_world_is_refused(tmp_path):
    onto = image(crs="EPSG:4326", transform=(0.1, 0, 0, 0, -0.1, 2))
    geojson(tmp_path / "a.geojson", [shapely.Polygon([(-179.9, -1), (179.9, -1), (179.9, 1), (-179.9, 1)])], ["water"])
    reason, text = refused(tmp_path / "a.geojson", onto)
    assert reason == "MALFORMED" and "cut it at the antimeridian (RFC 7946, 3.1.9)" in text
    geojson(tmp_path / "b.geojson", [shapely.box(-180, -90, 180, 90)], ["water"])
    assert (read_labels(tmp_path / "b.geojson", onto, QUERY).array == 1).all()


def test_a_file_that_does_not_touch_the_image_lies_elsewhere(tmp_path):
    onto = image()
    for box in (shapely.box(60, 0, 70, 10), shapely.box(1e5, 0, 1.1e5, 10)):
        polygon = pixels_to_map(box, onto)
        for path in (
            geojson(tmp_path / "a.geojson", [polygon], ["water"], crs="EPSG:32633"),
            ogr(tmp_path / "a.gpkg", [polygon], {"class": ["water"]}),
            geojson(tmp_path / "b.geojson", [to_degrees(polygon)], ["water"]),
        ):
            if path.name == "b.geojson" and box.bounds[0] == 60:
                continue  # moved there and back, the shared edge is no longer exactly shared
            reason, text = refused(path, onto)
            assert reason == "BAD_GEOMETRY" and path.name in text
        vector_file._layer.cache_clear()


def test_without_a_coordinate_system_on_one_side_nothing_is_placed(tmp_path):
    onto = image()
    polygon = pixels_to_map(shapely.box(1, 1, 9, 9), onto)
    path = ogr(tmp_path / "a.shp", [polygon], {"class": ["water"]})
    path.with_suffix(".prj").unlink()
    assert "a shapefile states it in its .prj" in refused(path, onto)[1]
    assert (
        "the image has no coordinate system"
        in refused(geojson(tmp_path / "a.geojson", [polygon], ["water"]), image(crs=None))[1]
    )
    assert (read_labels(path, image(crs=None), QUERY).array == 1).sum() == 64
    plane = Image(
        np.zeros((1, 4, 4), np.float32), np.ones((1, 4, 4), bool), (Channel(name="a"),), PlaneGeometry(), "xray"
    )
    assert "the image is not a raster on the ground" in refused(path, plane)[1]


# --------------------------------------------------------------------------------------------------------- classes


def labelled(path: Path, values, query: LabelQuery, **extra) -> np.ndarray:
    onto = image((1, 3 * len(values)))
    polygons = [pixels_to_map(shapely.box(3 * n, 0, 3 * n + 2, 1), onto) for n in range(len(values))]
    geojson(path, polygons, values, crs="EPSG:32633", **extra)
    vector_file._layer.cache_clear()
    return read_labels(path, onto, query).array[0, ::3]


def test_whole_numbers_are_class_numbers_unless_they_are_names(tmp_path):
    path = tmp_path / "a.geojson"
    np.testing.assert_array_equal(labelled(path, [2, 1, -1], QUERY), [2, 1, -1])
    np.testing.assert_array_equal(labelled(path, [2, 1], LabelQuery(classes=("2", "1"))), [0, 1])
    np.testing.assert_array_equal(labelled(path, [255, 1], LabelQuery(classes=("a", "b"), ignore=(255,))), [-1, 1])
    np.testing.assert_array_equal(labelled(path, [7, 1], LabelQuery(classes=("a", "b"), values={7: 1})), [1, -1])
    with pytest.raises(ReadError, match=r"a\.geojson has the class '3', which is none of background, water, forest"):
        labelled(path, [3], QUERY)


def test_names_are_mapped_left_out_or_unknown(tmp_path):
    path = tmp_path / "a.geojson"
    query = LabelQuery(classes=("background", "wet"), values={"LAKE": 1, "river": 1})
    np.testing.assert_array_equal(labelled(path, ["lake", "River ", "road", None, ""], query), [1, 1, 0, -1, -1])
    with pytest.raises(ReadError, match=r"has the class 'Woter', which is none .* did you mean 'water'") as caught:
        labelled(path, ["Woter"], QUERY)
    assert caught.value.reason == "CLASS_UNKNOWN"


def test_without_classes_names_are_numbered_as_met(tmp_path):
    onto = image((1, 9))
    polygons = [pixels_to_map(shapely.box(3 * n, 0, 3 * n + 2, 1), onto) for n in range(3)]
    geojson(tmp_path / "a.geojson", polygons, ["b", "a", "b"], crs="EPSG:32633")
    found = read_labels(tmp_path / "a.geojson", onto, LabelQuery())
    assert found.names == ("background", "b", "a")
    np.testing.assert_array_equal(found.array[0], [1, 1, 0, 2, 2, 0, 1, 1, 0])


def test_without_a_background_class_the_rest_is_ignored(tmp_path):
    onto = image((1, 6))
    geojson(tmp_path / "a.geojson", [pixels_to_map(shapely.box(0, 0, 2, 1), onto)], ["water"], crs="EPSG:32633")
    found = read_labels(tmp_path / "a.geojson", onto, LabelQuery(classes=("water", "land"))).array
    np.testing.assert_array_equal(found[0], [0, 0, -1, -1, -1, -1])


def test_the_column_is_named_or_the_only_one_or_asked_for(tmp_path):
    path = tmp_path / "a.geojson"
    np.testing.assert_array_equal(labelled(path, ["water"], QUERY, area_m2=12.5), [1])
    with pytest.raises(
        ReadError, match=r"has 2 columns of text or whole numbers .* its columns: 'class', 'id'"
    ) as caught:
        labelled(path, ["water"], QUERY, id=4)
    assert caught.value.reason == "MISSING_TAG"
    query = LabelQuery(classes=QUERY.classes, column="CLASS")
    np.testing.assert_array_equal(labelled(path, ["water"], query, id=4), [1])
    with pytest.raises(ReadError, match=r"a\.geojson has no column 'kind'; its columns are 'class', 'id'"):
        labelled(path, ["water"], LabelQuery(classes=QUERY.classes, column="kind"), id=4)


def test_columns_of_a_geopackage_and_a_shapefile_keep_whole_numbers_and_text(tmp_path):
    onto = image()
    polygon = pixels_to_map(shapely.box(0, 0, 10, 10), onto)
    for suffix in (".gpkg", ".shp"):
        path = ogr(
            tmp_path / f"a{suffix}", [polygon, polygon], {"name": ["é", "b"], "code": [2, 1], "share": [0.5, 2.0]}
        )
        assert vector_file.layer(path).columns == {"name": ["é", "b"], "code": [2, 1], "share": [0.5, 2]}
        assert (read_labels(path, onto, LabelQuery(classes=QUERY.classes, column="code")).array == 2).sum() == 100


# ------------------------------------------------------------------------------------------------------ geometries


def test_a_ring_that_crosses_itself_is_repaired(tmp_path):
    onto = image((20, 20))
    bow = pixels_to_map(shapely.Polygon([(0, 0), (20, 20), (20, 0), (0, 20)]), onto)
    geojson(tmp_path / "a.geojson", [bow], ["water"], crs="EPSG:32633")
    found = read_labels(tmp_path / "a.geojson", onto, QUERY).array
    rows, columns = np.mgrid[:20, :20] + 0.5
    inside = np.abs(rows - 10) < np.abs(columns - 10)
    border = np.abs(rows - 10) == np.abs(columns - 10)
    np.testing.assert_array_equal(found[~border], inside[~border])


def test_points_and_lines_are_refused_with_their_number(tmp_path):
    onto = image()
    polygon = pixels_to_map(shapely.box(0, 0, 10, 10), onto)
    shapes = [
        polygon,
        shapely.Point(500010, 3999990),
        shapely.MultiPoint([(1, 2), (3, 4)]),
        shapely.LineString([(0, 0), (1, 1)]),
    ]
    geojson(tmp_path / "a.geojson", shapes, ["water"] * 4, crs="EPSG:32633")
    reason, text = refused(tmp_path / "a.geojson", onto)
    assert reason == "DTYPE_UNSUPPORTED" and "holds points (2) and lines (1)" in text and "buffer them" in text
    ogr(tmp_path / "a.shp", shapes[1:2], {"class": ["water"]}, geometry_type="Point")
    assert refused(tmp_path / "a.shp", onto)[0] == "DTYPE_UNSUPPORTED"


def test_features_without_geometry_and_collections_of_polygons_are_fine(tmp_path):
    onto = image()
    boxes = [pixels_to_map(shapely.box(10 * n, 0, 10 * n + 5, 5), onto) for n in range(3)]
    nested = shapely.GeometryCollection([boxes[0], shapely.GeometryCollection([shapely.MultiPolygon(boxes[1:])])])
    geojson(tmp_path / "a.geojson", [None, nested, shapely.Polygon()], ["forest", "water", "water"], crs="EPSG:32633")
    found = read_labels(tmp_path / "a.geojson", onto, QUERY).array
    assert (found == 1).sum() == 75 and (found == 2).sum() == 0


def test_heights_are_dropped(tmp_path):
    onto = image()
    polygon = shapely.force_3d(pixels_to_map(shapely.box(0, 0, 10, 10), onto), 7.0)
    geojson(tmp_path / "a.geojson", [polygon], ["water"], crs="EPSG:32633")
    ogr(tmp_path / "a.gpkg", [polygon], {"class": ["water"]}, geometry_type="Polygon Z")
    for name in ("a.geojson", "a.gpkg"):
        assert (read_labels(tmp_path / name, onto, QUERY).array == 1).sum() == 100


# ---------------------------------------------------------------------------------------------------- files, safety


def test_vector_files_in_an_archive_are_labels_and_not_bad(tmp_path):
    polygon = shapely.box(0, 0, 1, 1)
    geojson(tmp_path / "a.geojson", [polygon], ["x"])
    geojson(tmp_path / "b.json", [polygon], ["x"])
    ogr(tmp_path / "c.gpkg", [polygon], {"class": ["x"]})
    ogr(tmp_path / "d.shp", [polygon], {"class": ["x"]})
    (tmp_path / "e.json").write_text('{"type": "settings"}')
    found = survey(sorted(tmp_path.iterdir()), resolve_modalities("auto"))
    assert not found.sources
    reasons = {refusal.path.name: refusal.reason for refusal in found.refusals}
    assert {name for name, reason in reasons.items() if reason is Reason.LABEL} == {
        "a.geojson", "b.json", "c.gpkg", "d.shp"
    }  # fmt: skip
    assert set(reasons.values()) <= NOT_BAD


def test_no_geojson_is_ever_given_to_gdal(tmp_path, monkeypatch):
    """GDAL 3.11 runs a command line that it finds in JSON of a certain type."""
    import pyogrio

    monkeypatch.setattr(pyogrio, "read_info", None)
    monkeypatch.setattr(pyogrio.raw, "read", None)
    (tmp_path / "a.geojson").write_text(
        '{"type": "gdal_streamed_alg", "command_line": "gdal vector pipeline ! read secret.gpkg", "features": []}'
    )
    assert refused(tmp_path / "a.geojson", image())[0] == "MALFORMED"


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "{}",
        "[" * 100_000,
        '{"type": "FeatureCollection", "features": 3}',
        '{"type": "FeatureCollection", "features": [3]}',
        '{"type": "FeatureCollection", "features": [{"geometry": {"type": "Polygon"}}]}',
        '{"type": "FeatureCollection", "features": [{"geometry": {"type": "Polygon", "coordinates": [[[0], [1]]]}}]}',
        '{"type": "FeatureCollection", "features": [{"geometry": {"type": "Polygon", "coordinates": [["a"]]}}]}',
        '{"type": "Polygon", "coordinates": [[[NaN, 0], [1, 0], [1, 1], [NaN, 0]]]}',
        '{"type": "Polygon", "coordinates": [[[0, 0], [1, 0], [1e999, 1], [0, 0]]]}',
        '{"type": "FeatureCollection", "features": [], "crs": {"type": "link", "properties": {"href": "http://a/b"}}}',
        '{"type": "FeatureCollection", "features": [], "crs": {"type": "name", "properties": {"name": "a.prj"}}}',
        '{"type": "FeatureCollection", "features": [{"properties": 3, "geometry": null}]}',
    ],
)
def test_geojson_that_is_none_has_a_reason(tmp_path, text):
    (tmp_path / "a.geojson").write_text(text if text.startswith("{") else '{"a":' + text)
    assert refused(tmp_path / "a.geojson", image())[0] == "MALFORMED"


def test_a_shapefile_without_its_parts_says_which(tmp_path):
    path = ogr(tmp_path / "a.shp", [shapely.box(0, 0, 1, 1)], {"class": ["water"]})
    path.with_suffix(".dbf").rename(tmp_path / "elsewhere")
    reason, text = refused(path, image())
    assert reason == "MISSING_TAG" and "a.shp lies without .dbf beside it" in text
    os.mkfifo(path.with_suffix(".dbf"))
    assert refused(path, image())[0] == "NOT_REGULAR"


@pytest.mark.parametrize("part", [".shp", ".dbf", ".shx"])
def test_a_cut_shapefile_is_refused(tmp_path, part):
    boxes = [shapely.box(n, 0, n + 1, 1) for n in range(20)]
    path = ogr(tmp_path / "a.shp", boxes, {"class": ["water"] * 20})
    content = path.with_suffix(part).read_bytes()
    path.with_suffix(part).write_bytes(content[: len(content) * 2 // 3])
    assert refused(path, image())[0] in ("TRUNCATED", "MALFORMED")


def test_a_geopackage_with_ways_out_is_refused_and_nothing_is_written_beside_it(tmp_path):
    box = pixels_to_map(shapely.box(0, 0, 10, 10), image())
    for name, statement, reason in (
        ("wal", "PRAGMA journal_mode = WAL", None),
        ("virtual", "CREATE VIRTUAL TABLE leak USING VirtualOGR('secret.csv')", "MALFORMED"),
        ("view", "ALTER TABLE view RENAME TO base; CREATE VIEW view AS SELECT * FROM base", "MALFORMED"),
    ):
        path = ogr(tmp_path / f"{name}.gpkg", [box], {"class": ["water"]})
        database = sqlite3.connect(path)
        if name == "virtual":
            database.execute("PRAGMA writable_schema = ON")
            quoted = statement.replace("'", "''")
            statement = f"INSERT INTO sqlite_master VALUES ('table', 'leak', 'leak', 0, '{quoted}')"
        elif name == "view":
            for trigger in database.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
                database.execute(f'DROP TRIGGER "{trigger[0]}"')
        database.executescript(statement)
        database.commit()
        database.close()
        before = sorted(tmp_path.iterdir())
        if reason is None:
            assert (read_labels(path, image(), QUERY).array == 1).sum() == 100
        else:
            assert refused(path, image())[0] == reason
        assert sorted(tmp_path.iterdir()) == before


def test_several_layers_and_no_layer_are_errors(tmp_path):
    box = shapely.box(0, 0, 1, 1)
    path = ogr(tmp_path / "a.gpkg", [box], {"class": ["water"]}, layer="one")
    ogr(path, [box], {"class": ["water"]}, layer="two", append=True)
    reason, text = refused(path, image())
    assert reason == "MISSING_TAG" and "has 2 layers; labels have one" in text
    database = sqlite3.connect(path)
    database.execute("DELETE FROM gpkg_contents")
    database.commit()
    database.close()
    assert refused(path, image())[0] == "NON_IMAGE"


def test_a_damaged_geopackage_is_refused(tmp_path):
    boxes = [shapely.box(n, 0, n + 1, 1) for n in range(50)]
    content = ogr(tmp_path / "a.gpkg", boxes, {"class": ["water"] * 50}).read_bytes()
    (tmp_path / "b.gpkg").write_bytes(content[: len(content) // 3])
    assert refused(tmp_path / "b.gpkg", image())[0] == "MALFORMED"


def test_a_file_is_parsed_once_until_it_changes(tmp_path, monkeypatch):
    onto = image()
    path = geojson(tmp_path / "a.geojson", [pixels_to_map(shapely.box(0, 0, 9, 9), onto)], ["water"], crs="EPSG:32633")
    parsed = []
    monkeypatch.setattr(vector_file, "_geojson", lambda p, real=vector_file._geojson: parsed.append(p) or real(p))
    for _ in range(3):
        assert (read_labels(path, onto, QUERY).array == 1).sum() == 81
    geojson(path, [pixels_to_map(shapely.box(0, 0, 5, 5), onto)], ["forest"], crs="EPSG:32633")
    assert (read_labels(path, onto, QUERY).array == 2).sum() == 25
    assert len(parsed) == 2


def test_a_file_beyond_the_limit_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(vector_file, "MAX_JSON_BYTES", 10)
    path = geojson(tmp_path / "a.geojson", [shapely.box(0, 0, 1, 1)], ["water"])
    assert refused(path, image())[0] == "TOO_LARGE"


def test_a_missing_package_is_named_with_its_extra(tmp_path, monkeypatch):
    path = geojson(tmp_path / "a.geojson", [shapely.box(0, 0, 1, 1)], ["water"])
    monkeypatch.setattr(vector, "NEEDED", ("shapely_that_is_not_there",))
    with pytest.raises(MissingExtraError, match=r"pip install 'geomed-mae\[geo\]'"):
        read_labels(path, image(), QUERY)
    assert header_of(path).reason is Reason.LABEL


def test_an_index_of_another_shapefile_is_refused(tmp_path):
    """GDAL leaves out the shapes that an index does not lead to, without a word."""
    boxes = [shapely.box(n, 0, n + 1, 1) for n in range(5)]
    path = ogr(tmp_path / "a.shp", boxes, {"class": ["water"] * 5})
    content = bytearray(path.with_suffix(".shx").read_bytes())
    content[100 + 8 * 2 + 3] ^= 8
    path.with_suffix(".shx").write_bytes(content)
    assert refused(path, image()) == ("MALFORMED", "a.shp cannot be read as vectors: its .shx does not belong to it")


def test_coordinates_that_overflow_have_a_reason(tmp_path):
    shape = '{"type": "Polygon", "coordinates": [[[0, 0], [1e308, 0], [-1e308, 1e308], [1e308, 1e308], [0, 0]]]}'
    (tmp_path / "a.geojson").write_text(shape[:-1] + ', "crs": {"properties": {"name": "EPSG:32634"}}}')
    with pytest.raises(ReadError):
        read_labels(tmp_path / "a.geojson", image(), QUERY)
