"""Tables with a place: pyarrow reads them back, the standard's fields are checked by hand."""

from __future__ import annotations

import itertools
import json
import struct

import pyarrow.parquet as pq
import pytest

from geomed_mae.writers import geoparquet

CLOCKWISE = ((10.0, 50.0), (11.0, 50.0), (11.0, 49.0), (10.0, 49.0))


def parse_wkb(data: bytes) -> list[list[tuple[float, float]]]:
    """Exterior rings of a little-endian polygon or multipolygon."""
    order, kind, count = struct.unpack_from("<BII", data)
    assert order == 1
    if kind == 3:
        assert count == 1
        (corners,) = struct.unpack_from("<I", data, 9)
        return [[struct.unpack_from("<2d", data, 13 + 16 * corner) for corner in range(corners)]]
    assert kind == 6
    rings, at = [], 9
    for _ in range(count):
        rings += parse_wkb(data[at:])
        at += 13 + 16 * len(rings[-1])
    return rings


def signed_area(ring: list[tuple[float, float]]) -> float:
    return sum(x0 * y1 - x1 * y0 for (x0, y0), (x1, y1) in itertools.pairwise(ring)) / 2


def written(tmp_path, footprints):
    keys = [f"{number:032x}" for number in range(len(footprints or [None]))]
    path = geoparquet.write_columns(tmp_path / "e.parquet", {"id": keys}, footprints, {"note": "kept"})
    return pq.read_table(path), keys


def test_footprint_is_a_closed_counter_clockwise_polygon_with_its_box(tmp_path):
    table, keys = written(tmp_path, [CLOCKWISE])
    assert table["id"].to_pylist() == keys
    (ring,) = parse_wkb(table["geometry"][0].as_py())
    assert ring[0] == ring[-1] and set(ring) == set(CLOCKWISE)
    assert signed_area(ring) == pytest.approx(1.0)
    assert table["bbox"][0].as_py() == {"xmin": 10.0, "ymin": 49.0, "xmax": 11.0, "ymax": 50.0}


def test_metadata_is_geoparquet_1_1_with_a_covering_and_keeps_what_else_is_said(tmp_path):
    table, _ = written(tmp_path, [CLOCKWISE])
    geo = json.loads(table.schema.metadata[b"geo"])
    column = geo["columns"]["geometry"]
    assert (geo["version"], geo["primary_column"], column["encoding"]) == ("1.1.0", "geometry", "WKB")
    assert column["geometry_types"] == ["Polygon"] and "crs" not in column, "no crs means longitude, latitude on WGS84"
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"] and column["bbox"] == [10.0, 49.0, 11.0, 50.0]
    assert table.schema.metadata[b"note"] == b"kept"
    assert pq.ParquetFile(tmp_path / "e.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_footprint_across_the_antimeridian_is_cut_there(tmp_path):
    table, _ = written(tmp_path, [((179.0, 1.0), (181.0, 1.0), (181.0, 0.0), (179.0, 0.0))])
    rings = parse_wkb(table["geometry"][0].as_py())
    assert sorted(signed_area(ring) for ring in rings) == pytest.approx([1.0, 1.0])
    assert all(-180 <= x <= 180 for ring in rings for x, _ in ring)
    assert json.loads(table.schema.metadata[b"geo"])["columns"]["geometry"]["geometry_types"] == ["MultiPolygon"]


def test_an_image_without_a_place_has_no_geometry(tmp_path):
    table, _ = written(tmp_path, [CLOCKWISE, None])
    assert table["geometry"][1].as_py() is None and table["bbox"][1].as_py() is None


def test_without_footprints_it_is_plain_parquet(tmp_path):
    table, _ = written(tmp_path, None)
    assert table.column_names == ["id"] and b"geo" not in table.schema.metadata


def test_the_centre_of_a_footprint_across_the_antimeridian_lies_near_it():
    east = geoparquet.Placed.of(((179.0, 1.0), (182.0, 1.0), (182.0, 0.0), (179.0, 0.0)))
    assert east.centre == pytest.approx((-179.5, 0.5)) and east.parts == 2


def test_a_map_of_the_world_is_not_cut_and_one_beyond_the_antimeridian_is_moved(tmp_path):
    world, moved = (
        ((-180.0, 90.0), (180.0, 90.0), (180.0, -90.0), (-180.0, -90.0)),
        [(x + 175, y) for x, y in CLOCKWISE],
    )
    table, _ = written(tmp_path, [world, moved])
    assert [signed_area(parse_wkb(value.as_py())[0]) for value in table["geometry"]] == pytest.approx([360 * 180, 1.0])
    assert table["bbox"].to_pylist()[1] == {"xmin": -175.0, "ymin": 49.0, "xmax": -174.0, "ymax": 50.0}
