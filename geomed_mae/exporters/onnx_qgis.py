"""Export to QGIS: an ONNX file that the plug-in Deepness loads as a segmentation model, its settings filled in.

What Deepness (repository f450c63, 2024-12) does, and what is therefore written:

- one input [batch, channel, S, S], square tiles of one size; output [batch, class, S, S] after softmax;
- every tile is multiplied by 1/255 whatever its numbers are, then `(x - standardization_mean) / standardization_std`:
  the graph multiplies by 255 again, and the two settings turn the numbers that files of the modality store into their
  unit. They are all that differs between the files of one export: `model.onnx` for stored numbers, and where these are
  not in their unit `model_physical.onnx` for values that are, and `model_offset_*.onnx` for products with an offset;
- settings are JSON in metadata_props. `resolution` is in cm/pixel; `tile_size` is what its code reads, whatever its
  documentation says. A threshold of 0 keeps the most probable class; any other makes doubtful pixels class 0.
- its runtime may be as old as onnxruntime 1.17: opset 18 and version 8 of the file format.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from geomed_mae.errors import ConfigError
from geomed_mae.exporters.card import CONTRACT, README, contract_json, from_stored, model_card
from geomed_mae.exporters.folder import building, carry_native, outcome
from geomed_mae.exporters.graph import GRAPH_TOLERANCE, Graph, comparisons, traced
from geomed_mae.exporters.onnx_file import (
    contract_properties,
    describe,
    held_against,
    onnx_model,
    opened,
    require_packages,
)
from geomed_mae.exporters.proof import prove_contract
from geomed_mae.exporters.request import Request
from geomed_mae.image import RasterGeometry
from geomed_mae.modalities import load_modality

TAKES = ("model",)
FILE = "model.onnx"
OPSET, IR_VERSION = 18, 8
FULL_SCALE = 255
"""What Deepness divides every number by."""

OVERLAP_PERCENT = 25
"""Of neighbouring tiles; Deepness cuts half of it off each side of a tile, where tokens see least around them."""

SQUARE = 0.01
"""Relative difference of the two pixel spacings up to which pixels are square."""

OPENING = """Made for the QGIS plug-in Deepness: install the plug-in, open a raster, choose `{first}` as model file,
map the model's {many} input channel{s} to the raster's bands in the order below, and run. Model type, tile size,
overlap, class names{resolution} are filled in from the file.

{files}

QGIS applies the scale and offset that a raster declares itself; such rasters are in their unit already."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Numbers as a file stores them: `value = number * scale + offset`."""

    file: str
    said: str
    scale: float = 1.0
    offset: float = 0.0

    def settings(self, channels: int) -> dict[str, list[float]]:
        """Return Deepness' standardisation, which turns `number / 255` into `value / 255`."""
        mean = -self.offset / (self.scale * FULL_SCALE)
        return {
            "standardization_mean": [mean + 0.0] * channels,  # + 0.0: no "-0.0" in the file
            "standardization_std": [1 / self.scale] * channels,
        }


class Tile(torch.nn.Module):
    """A network behind a multiplication by FULL_SCALE, which undoes Deepness' division."""

    def __init__(self, network: torch.nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, tile: Float[Tensor, "b c s s"]) -> Float[Tensor, "b class s s"]:
        """Return probabilities of a tile of values divided by FULL_SCALE."""
        return self.network(tile * FULL_SCALE)


def export(request: Request, out: Path) -> dict[str, Any]:
    """Write `out` with model.onnx, run it as Deepness does, and compare.

    Returns:
        folder, files, channels, input_size, resolution_cm (None where it is not known), classes, models (what each
        ONNX file takes) and `parity`.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        ConfigError: no model for class maps of rasters or pictures, tiles or pixels that are not square, or channels
            that are scaled by each image's own statistics, which Deepness does not know.
        IntegrityError: a file does not compute the same; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    _check(request)
    require_packages("onnx-qgis")
    resolution = _resolution_cm(request)
    graph = traced(request, dynamic=False, around=Tile)
    contract = contract_json(request, **graph.takes())
    parities = []
    with building(out) as folder:
        model = onnx_model(graph, opset=OPSET, ir_version=IR_VERSION)
        kinds = _stored(request)
        for stored in kinds:
            settings = _settings(request, resolution) | stored.settings(len(request.entries))
            describe(model, settings | contract_properties(graph, contract))
            (folder / stored.file).write_bytes(model.SerializeToString())
            parities += _parity(graph, folder / stored.file, stored)
        (folder / CONTRACT).write_text(json.dumps(contract, indent=2), encoding="utf-8")
        prove_contract("onnx-qgis", folder, request)
        (folder / README).write_text(_card(graph, kinds, resolution), encoding="utf-8")
        carry_native(request, folder)
    return outcome(
        request,
        out,
        resolution_cm=resolution,
        classes=list(request.task.classes),
        models={stored.file: stored.said for stored in kinds},
        parity=max(parities, key=lambda one: one["largest_relative_difference"]),
    )


def _check(request: Request) -> None:
    """Refuse what Deepness has no place for."""
    if request.task is None or request.task.spec.head.task != "segment":
        what = "an encoder's features" if request.task is None else "classes of a whole image"
        raise ConfigError(
            f"--to onnx-qgis is for models that make class maps; Deepness has no use for {what}. Give a run that was "
            "fine-tuned with head.task segment, or take --to onnx"
        )
    if len(request.size) != 2:
        raise ConfigError(
            "--to onnx-qgis is for rasters, and this model is for volumes; take --to monai-bundle or onnx"
        )
    if request.size[0] != request.size[1]:
        raise ConfigError(
            f"Deepness cuts square tiles, and the size is {request.size[0]} x {request.size[1]} pixels; choose another "
            f"--size, for example {max(request.size)},{max(request.size)}"
        )
    if request.per_image:
        raise ConfigError(
            f"images of modality '{request.modality}' are scaled by their own median and spread, which Deepness does "
            "not know when it cuts tiles; take --to onnx, or `geomed-mae predict` and open its map"
        )


def _resolution_cm(request: Request) -> float | None:
    """Return cm/pixel: of the positions' spacing, else of the given image; None where neither says it.

    Raises:
        ConfigError: pixels that are not square.
    """
    spacing = request.distance if request.on_ground else None
    if spacing is None and request.image is not None and isinstance(request.image.geometry, RasterGeometry):
        spacing = request.image.geometry.gsd_m
    if spacing is None:
        return None
    rows, columns = spacing
    if abs(rows - columns) > SQUARE * columns:
        raise ConfigError(
            f"Deepness has square pixels, and these are {rows:g} x {columns:g} m; export with --spacing {columns:g},"
            f"{columns:g}"
        )
    return round(100 * columns, 4)


def _stored(request: Request) -> tuple[Stored, ...]:
    """Return what each file is for: the numbers that files of the modality store and, where they differ, their unit."""
    units = " and ".join(sorted({entry.channel.unit for entry in request.entries}))
    physical = Stored("model_physical.onnx", f"values in {units}")
    try:
        modality = load_modality(request.modality)
    except ConfigError:  # a modality file of the user's, which is not here
        return (replace(physical, file=FILE),)
    scale, offset = modality.scale, modality.offset
    if (scale, offset) == (1.0, 0.0):
        return (replace(physical, file=FILE),)
    formulas = from_stored(modality)
    usual = Stored(FILE, f"stored numbers, {units} = {formulas[0.0]}", scale, offset)
    rule = None if modality.scene is None else modality.scene.offset
    if rule is None:
        return (usual, physical)
    return (
        replace(
            usual, said=f"{usual.said}: products before processing baseline {rule.since:05.2f}, and harmonised ones"
        ),
        Stored(
            f"model_offset_{abs(rule.add):g}.onnx",
            f"stored numbers of products since processing baseline {rule.since:05.2f}, {units} = {formulas[rule.add]}",
            scale,
            offset + rule.add * scale,
        ),
        physical,
    )


def _settings(request: Request, resolution: float | None) -> dict[str, Any]:
    """Return what Deepness reads, but for the standardisation."""
    return {
        "model_type": "Segmentor",
        "class_names": dict(enumerate(request.task.classes)),
        "tile_size": request.size[0],
        "tiles_overlap": OVERLAP_PERCENT,
        "seg_thresh": 0,
        "seg_small_segment": 0,
        **({} if resolution is None else {"resolution": resolution}),
    }


def as_deepness_feeds(
    tiles: Float[np.ndarray, "b c s s"], mean: Sequence[float], std: Sequence[float]
) -> Float[np.ndarray, "b c s s"]:
    """Return what Deepness makes of tiles of a raster's numbers: divided by 255, then standardised, in float32."""
    column = (1, -1, 1, 1)
    scaled = np.float32(tiles * 1.0 / FULL_SCALE)
    return (scaled - np.float32(mean).reshape(column)) / np.float32(std).reshape(column)


def _parity(graph: Graph, file: Path, stored: Stored) -> list[dict[str, Any]]:
    """Run a file on a real tile, and on noise, as Deepness would, in batches of 3 and 1."""
    session, found = opened(file), []
    settings = stored.settings(len(graph.request.entries))
    for given, answer in comparisons(graph):
        numbers = (given.raw.double().numpy() - stored.offset) / stored.scale
        fed = as_deepness_feeds(numbers, *settings.values())
        for batch in (fed, fed[:1]):
            found += held_against(
                graph,
                session,
                batch,
                (answer.probabilities,),
                target="onnx-qgis",
                source=given.source,
                tolerance=GRAPH_TOLERANCE,
            )
    return found


def _card(graph: Graph, kinds: Sequence[Stored], resolution: float | None) -> str:
    request = graph.request
    many = len(request.entries)
    opening = OPENING.format(
        first=kinds[0].file,
        many=many,
        s="" if many == 1 else "s",
        resolution="" if resolution is None else f" and resolution ({resolution:g} cm/pixel)",
        files="| file | takes |\n|---|---|\n" + "\n".join(f"| {kind.file} | {kind.said} |" for kind in kinds),
    )
    notes = [
        "Deepness fills tiles beyond the raster's border with 0, and takes pixels without data as they are stored: "
        "what it says there means nothing."
    ]
    if resolution is None:
        notes.append(
            "The model's positions count pixels: set the resolution to that of your raster, in cm per pixel, by hand."
        )
    return model_card(
        request, title="A geomed-mae model for QGIS (Deepness)", opening=opening, tags=("onnx", "qgis"), notes=notes
    )
