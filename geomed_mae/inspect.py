"""The verb inspect: what is in one file or folder, for a person or as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from geomed_mae.archives.statistics import ChannelStatistics, summarise
from geomed_mae.image import Image, RasterGeometry, VolumeGeometry
from geomed_mae.readers import read_images

BARS = " ▁▂▃▄▅▆▇█"
HISTOGRAM_BINS = 32
AXES = {3: "channel, row, column", 4: "channel, slice, row, column"}


def inspect(path: str | Path, modality: str = "auto") -> list[dict[str, Any]]:
    """Return what is in `path`: one dictionary of plain values an image.

    Raises:
        as `read_images`.
    """
    return [_describe(image) for image in read_images(path, modality)]


def _describe(image: Image) -> dict[str, Any]:
    geometry: dict[str, Any] = {"spacing": image.spacing}
    if isinstance(image.geometry, RasterGeometry):
        geometry |= {"kind": "raster", "crs": image.geometry.crs, "transform": image.geometry.transform}
    elif isinstance(image.geometry, VolumeGeometry):
        geometry |= {"kind": "volume", "affine_lps": image.geometry.affine.tolist()}
    else:
        geometry["kind"] = "plane"
    statistics = summarise(image.array, image.valid)
    valid = np.broadcast_to(image.valid, image.array.shape)
    return {
        "modality": image.modality,
        "shape": list(image.array.shape),
        "valid_fraction": image.valid_fraction,
        "geometry": geometry,
        "channels": [
            {
                "name": channel.name,
                "kind": channel.kind,
                "unit": channel.unit,
                "wavelength_nm": channel.wavelength_nm,
                "statistics": entry.to_json(),
                "histogram": _histogram(image.array[number][valid[number]], entry),
            }
            for number, (channel, entry) in enumerate(zip(image.channels, statistics, strict=True))
        ],
    }


def _histogram(values: np.ndarray, statistics: ChannelStatistics) -> list[int]:
    """Counts in 32 equal bins between the 0.5th and the 99.5th percentile."""
    if not values.size or statistics.p005 == statistics.p995:
        return [int(values.size)]
    return np.histogram(values, HISTOGRAM_BINS, (statistics.p005, statistics.p995))[0].tolist()


def as_text(descriptions: list[dict[str, Any]]) -> str:
    """Return `inspect`'s result as a page for a terminal."""
    lines = []
    for number, entry in enumerate(descriptions, 1):
        geometry = entry["geometry"]
        unit = "m" if geometry["kind"] == "raster" else "mm"
        spacing = geometry["spacing"]
        lines += [
            f"image {number} of {len(descriptions)}: {entry['modality']} {geometry['kind']}",
            f"  shape     {' x '.join(map(str, entry['shape']))} ({AXES[len(entry['shape'])]})",
            f"  spacing   {' x '.join(f'{value:.6g}' for value in spacing) + ' ' + unit if spacing else 'unknown'}",
            f"  valid     {entry['valid_fraction']:.2%}",
        ]
        if geometry["kind"] == "raster":
            lines.append(f"  crs       {_crs_name(geometry['crs'])}")
            lines.append(f"  transform {', '.join(f'{value:.10g}' for value in geometry['transform'])}")
        if geometry["kind"] == "volume":
            rows = ("  ".join(f"{value:10.4f}" for value in row) for row in geometry["affine_lps"])
            lines += ["  affine    (slice, row, column) -> LPS mm"] + [f"            {row}" for row in rows]
        lines.append(f"  {'channel':<10} {'unit':<12} {'min':>10} {'median':>10} {'max':>10}  0.5 % to 99.5 %")
        for channel in entry["channels"]:
            values = channel["statistics"]
            top = max(max(channel["histogram"]), 1)
            bars = "".join(BARS[-(-count * (len(BARS) - 1) // top)] for count in channel["histogram"])
            numbers = " ".join(f"{values[name]:>10.5g}" for name in ("minimum", "median", "maximum"))
            lines.append(f"  {channel['name']:<10} {channel['unit']:<12} {numbers}  {bars}")
    return "\n".join(lines)


def _crs_name(wkt: str | None) -> str:
    """Return the quoted name at the head of a WKT string."""
    return "none" if wkt is None else wkt.split('"')[1] if '"' in wkt else wkt
