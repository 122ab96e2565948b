"""One vector file for a whole archive: every image gets what lies on it, and no other."""

from __future__ import annotations

import json

import numpy as np

from geomed_mae.archives.build import open_archive
from geomed_mae.archives.labels import match_labels
from geomed_mae.readers import LabelQuery
from geomed_mae.readers.geotiff.open import rasterio
from tests.make_data import write_geotiff


def test_one_geojson_labels_every_image_that_it_touches(tmp_path):
    rng = np.random.default_rng(3)
    features = []
    (tmp_path / "images").mkdir()
    for number in range(3):
        left, top = 500000.0 + 2000 * number, 4000000.0
        grid = (10.0, 0.0, left, 0.0, -10.0, top)
        pixels = rng.integers(1, 255, (6, 40, 60)).astype(np.uint8)
        write_geotiff(tmp_path / "images" / f"s{number}.tif", pixels, transform=grid)
        if number == 2:
            continue
        size = 100.0 * (number + 1)
        xs, ys = [left, left + size, left + size, left, left], [top, top, top - size, top - size, top]
        lons, lats = rasterio().warp.transform("EPSG:32611", "EPSG:4326", xs, ys)
        ring = [list(point) for point in zip(lons, lats, strict=True)]
        features.append(
            {
                "type": "Feature",
                "properties": {"class": "water"},
                "geometry": {"type": "Polygon", "coordinates": [ring]},
            }
        )
    (tmp_path / "labels.geojson").write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    index = open_archive([tmp_path / "images"], ["landsat7"])
    query = LabelQuery(classes=("background", "water"))
    matching = match_labels(index, tmp_path / "labels.geojson", query)
    stored = {index.paths(entry.row.key)[0].stem: entry.stored for entry in matching.labelled}
    truth = {name: np.zeros((40, 60), int) for name in ("s0", "s1")}
    truth["s0"][:10, :10] = 1
    truth["s1"][:20, :20] = 1
    assert set(stored) == set(truth) and matching.names == query.classes
    for name, expected in truth.items():
        np.testing.assert_array_equal(stored[name], expected)
    assert matching.counts()["images_without_labels"] == 1
