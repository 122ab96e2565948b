"""Tables of embeddings: what is put in comes out, in the order of a curve over the map, and a search finds it."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from geomed_mae.errors import ConfigError
from geomed_mae.writers import embedding_table
from geomed_mae.writers.embedding_table import EmbeddingTable, hilbert, nearest

MODEL = {"id": "encoder", "digest": "abc"}


def square(west: float, south: float) -> tuple[tuple[float, float], ...]:
    return ((west, south + 1), (west + 1, south + 1), (west + 1, south), (west, south))


def filled(folder, vectors, rings, *, tile=None, boxes=None):
    with EmbeddingTable(folder, vectors.shape[1], tile=tile) as table:
        for number, (vector, ring) in enumerate(zip(vectors, rings, strict=True)):
            box = None if boxes is None else boxes[number]
            table.add(f"k{number}", "rgb", vector, valid_fraction=0.5, ring=ring, box=box)
        return table.save(folder / "e.parquet", MODEL, {"channels": ["B1"]})


def test_neighbouring_cells_of_the_hilbert_curve_are_neighbours_on_the_map(monkeypatch):
    monkeypatch.setattr(embedding_table, "HILBERT_BITS", 4)
    points = np.array(list(itertools.product(range(16), repeat=2)), dtype=float)
    places = hilbert(points)
    assert sorted(places) == list(range(256))
    steps = np.abs(np.diff(points[np.argsort(places)], axis=0)).sum(axis=1)
    assert (steps == 1).all()


def test_rows_stand_in_the_order_of_the_curve_and_those_without_a_place_follow(tmp_path):
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 5)).astype(np.float32)
    rings = [None if number % 10 == 3 else square(*rng.uniform(-50, 50, 2)) for number in range(40)]
    table = pq.read_table(filled(tmp_path, vectors, rings))
    keys = table["id"].to_pylist()
    assert sorted(keys) == sorted(f"k{number}" for number in range(40)) and keys[-4:] == ["k3", "k13", "k23", "k33"]
    for key, vector in zip(keys, table["embedding"].to_pylist(), strict=True):
        np.testing.assert_array_equal(np.float32(vector), vectors[int(key[1:])])
    centres = np.array([table["longitude"].to_pylist()[:36], table["latitude"].to_pylist()[:36]]).T
    assert (np.diff(hilbert(centres)) >= 0).all()
    nowhere = table.slice(36).to_pylist()
    assert all(row[name] is None for row in nowhere for name in ("geometry", "bbox", "longitude", "latitude"))
    emb = json.loads(table.schema.metadata[b"emb"])
    assert emb["model"] == MODEL and emb["contract"] == {"channels": ["B1"]} and emb["embedding"]["dim"] == 5
    assert {pq.ParquetFile(tmp_path / "e.parquet").metadata.row_group(0).column(0).compression} == {"ZSTD"}


def test_a_long_table_has_several_row_groups_and_they_are_small_areas(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_table, "MAX_GROUP", 16)
    grid = list(itertools.product(range(0, 32, 2), repeat=2))
    filled(tmp_path, np.ones((256, 2), np.float32), [square(*place) for place in grid])
    file = pq.ParquetFile(tmp_path / "e.parquet")
    assert file.num_row_groups == 16
    for group in range(16):
        box = file.read_row_group(group, columns=["bbox"])["bbox"].combine_chunks()
        assert max(box.field("xmax").to_pylist()) - min(box.field("xmin").to_pylist()) == 7


def test_a_search_gives_the_largest_cosines_over_all_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_table, "MAX_GROUP", 7)
    rng = np.random.default_rng(1)
    vectors = rng.normal(size=(50, 6)).astype(np.float32) * rng.uniform(0.1, 10, (50, 1)).astype(np.float32)
    boxes = [(8 * number, 8 * number + 8, 0, 8) for number in range(50)]
    path = filled(tmp_path, vectors, [square(number, 0) for number in range(50)], tile=8, boxes=boxes)
    query = rng.normal(size=6).astype(np.float32)
    cosines = vectors @ query / np.linalg.norm(vectors, axis=1) / np.linalg.norm(query)
    found = nearest(path, query, 4)
    expected = np.argsort(-cosines)[:4]
    assert [row["image"] for row in found] == [f"k{number}" for number in expected]
    np.testing.assert_allclose([row["similarity"] for row in found], cosines[expected], atol=1e-6)
    best = int(expected[0])
    assert found[0]["id"] == f"k{best}:{8 * best},0" and found[0]["row_start"] == 8 * best
    assert (found[0]["longitude"], found[0]["latitude"]) == (best + 0.5, 0.5)
    assert len(nearest(path, query, 99)) == 50


def test_a_shortened_table_has_only_what_came_before(tmp_path):
    with EmbeddingTable(tmp_path, 2) as table:
        table.add("a", "rgb", np.float32([1, 2]), valid_fraction=1.0)
        table.add("b", "rgb", np.float32([3, 4]), valid_fraction=1.0)
        table.shorten(1)
        table.add("c", "rgb", np.float32([5, 6]), valid_fraction=1.0)
        found = pq.read_table(table.save(tmp_path / "e.parquet", MODEL))
    assert found["id"].to_pylist() == ["a", "c"] and found["embedding"].to_pylist() == [[1, 2], [5, 6]]


def test_a_table_without_any_place_is_plain_parquet(tmp_path):
    table = pq.read_table(filled(tmp_path, np.ones((2, 3), np.float32), [None, None]))
    assert table.column_names == ["id", "embedding", "valid_fraction", "modality"]
    assert b"geo" not in table.schema.metadata


def test_what_is_no_table_of_embeddings_is_refused_with_the_way_to_one(tmp_path):
    with pytest.raises(ConfigError, match="write one first: geomed-mae embed"):
        embedding_table.about(tmp_path / "e.parquet")
    (tmp_path / "e.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(ConfigError, match="is no table of embeddings"):
        embedding_table.about(tmp_path / "e.parquet")
    path = filled(tmp_path, np.ones((50, 3), np.float32), [None] * 50)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ConfigError, match="cannot be read; write it again"):
        nearest(path, np.ones(3, np.float32), 1)
