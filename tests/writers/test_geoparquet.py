"""Embedding tables: pyarrow reads them back, the standard's fields are checked by hand."""

from __future__ import annotations

import itertools
import json
import struct

import numpy as np
import pyarrow.parquet as pq
import pytest

from geomed_mae.writers import geoparquet

CLOCKWISE = ((10.0, 50.0), (11.0, 50.0), (11.0, 49.0), (10.0, 49.0))
MODEL = {"id": "encoder", "fingerprint": "abc"}


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
    vectors = np.arange(3 * len(footprints), dtype=np.float32).reshape(-1, 3)
    keys = [f"{number:032x}" for number in range(len(footprints))]
    return pq.read_table(geoparquet.write(tmp_path / "e.parquet", keys, vectors, footprints, MODEL)), vectors, keys


def test_ids_and_vectors_come_back_exactly(tmp_path):
    table, vectors, keys = written(tmp_path, [CLOCKWISE, CLOCKWISE])
    assert table["id"].to_pylist() == keys
    np.testing.assert_array_equal(np.array(table["embedding"].to_pylist(), dtype=np.float32), vectors)
    assert str(table.schema.field("embedding").type).startswith("list<") and "float" in str(table.schema)


def test_footprint_is_a_closed_counter_clockwise_polygon_with_its_box(tmp_path):
    table, _, _ = written(tmp_path, [CLOCKWISE])
    (ring,) = parse_wkb(table["geometry"][0].as_py())
    assert ring[0] == ring[-1] and set(ring) == set(CLOCKWISE)
    assert signed_area(ring) == pytest.approx(1.0)
    assert table["bbox"][0].as_py() == {"xmin": 10.0, "ymin": 49.0, "xmax": 11.0, "ymax": 50.0}


def test_metadata_is_geoparquet_1_1_with_a_covering_and_names_the_model(tmp_path):
    table, _, _ = written(tmp_path, [CLOCKWISE])
    geo, emb = (json.loads(table.schema.metadata[name]) for name in (b"geo", b"emb"))
    column = geo["columns"]["geometry"]
    assert (geo["version"], geo["primary_column"], column["encoding"]) == ("1.1.0", "geometry", "WKB")
    assert column["geometry_types"] == ["Polygon"] and "crs" not in column, "no crs means longitude, latitude on WGS84"
    assert column["covering"]["bbox"]["xmin"] == ["bbox", "xmin"] and column["bbox"] == [10.0, 49.0, 11.0, 50.0]
    assert emb["model"] == MODEL and emb["embedding"]["dim"] == 3
    assert pq.ParquetFile(tmp_path / "e.parquet").metadata.row_group(0).column(0).compression == "ZSTD"


def test_a_footprint_across_the_antimeridian_is_cut_there(tmp_path):
    table, _, _ = written(tmp_path, [((179.0, 1.0), (-179.0, 1.0), (-179.0, 0.0), (179.0, 0.0))])
    rings = parse_wkb(table["geometry"][0].as_py())
    assert sorted(signed_area(ring) for ring in rings) == pytest.approx([1.0, 1.0])
    assert all(-180 <= x <= 180 for ring in rings for x, _ in ring)
    assert json.loads(table.schema.metadata[b"geo"])["columns"]["geometry"]["geometry_types"] == ["MultiPolygon"]


def test_an_image_without_a_place_has_no_geometry(tmp_path):
    table, _, _ = written(tmp_path, [CLOCKWISE, None])
    assert table["geometry"][1].as_py() is None and table["bbox"][1].as_py() is None


def test_without_footprints_it_is_plain_parquet(tmp_path):
    geoparquet.write(tmp_path / "e.parquet", ["k"], np.ones((1, 4), np.float32), None, MODEL)
    table = pq.read_table(tmp_path / "e.parquet")
    assert table.column_names == ["id", "embedding"] and b"geo" not in table.schema.metadata
