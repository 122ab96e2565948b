"""Export to STAC: an Item of the Machine Learning Model extension beside the files that it describes.

    item = pystac.Item.from_file("FOLDER/item.json")
    model = torch.export.load(item.assets["model"].get_absolute_href()).module()

The item says in the extension's own terms what goes in (bands with wavelengths and units, shape, clipping as
`pre_processing_function`, mean and standard deviation as `value_scaling`) and what comes out (shape, classes). Its
model.pt2 scales nothing itself, so that a program that follows the item does not scale twice. Hrefs are relative. Where
and when the training images were taken is not told.

The item is of version 1.5.2 of the extension, and names 1.4.0 too, whose schema it also fulfils: that is the newest
that pystac 1.15 reads with its class MLMExtension.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from geomed_mae.errors import MissingExtraError
from geomed_mae.exporters.card import CONTRACT, NORMALISED, README, contract_json, model_card, physics
from geomed_mae.exporters.fixed import fixed, parameters
from geomed_mae.exporters.folder import ENCODER_FOLDER, MODEL_FOLDER, building, carry_native, outcome
from geomed_mae.exporters.graph import traced
from geomed_mae.exporters.model_units import unscaled
from geomed_mae.exporters.proof import Trial, ours, prove, prove_contract, trial
from geomed_mae.exporters.request import Request
from geomed_mae.models.contract import ChannelContract

TAKES = ("encoder", "model")
ITEM, PROGRAM = "item.json", "model.pt2"
SCHEMAS = "https://stac-extensions.github.io"
MLM = (f"{SCHEMAS}/mlm/v1.5.2/schema.json", f"{SCHEMAS}/mlm/v1.4.0/schema.json")
EO, FILE = f"{SCHEMAS}/eo/v2.0.0/schema.json", f"{SCHEMAS}/file/v2.1.0/schema.json"
ALWAYS = ("1900-01-01T00:00:00Z", "9999-12-31T23:59:59Z")
"""What the extension's best practices give for a model whose times are not restricted: an Item must have some."""

WORLD = (-180.0, -90.0, 180.0, 90.0)
SHA256_MULTIHASH = "1220"
"""Of a SHA-256 of 32 bytes (multihash), before its hexadecimal digits."""

MEDIA = "application/octet-stream; framework=pytorch"
ROWS = {2: ("height", "width"), 3: ("depth", "height", "width")}
OWN_SCALING = "(x - numpy.median(x)) / ((numpy.percentile(x, 95) - numpy.percentile(x, 5)) / 3.29)"
"""Of a channel that is scaled by its image: x is the whole image's channel, valid pixels alone."""


def export(request: Request, out: Path) -> dict[str, Any]:
    """Write `out` with item.json, model.pt2 and the native weights, open the item with pystac, and compare.

    Returns:
        folder, files, item (its path), channels, input_size and parity.

    Raises:
        IntegrityError: the model that the item leads to does not compute the same; nothing is left behind.
        MissingExtraError: pystac is not installed.
        OutputError: the folder cannot be written.
    """
    try:
        import pystac  # noqa: F401  the proof needs it: better now than after minutes
    except ImportError as error:
        raise MissingExtraError("the stac-mlm export", "pystac", "export") from error
    given = trial(request)
    contract = contract_json(request, values=NORMALISED, layout="b c y x" if len(request.size) == 2 else "b c z y x")
    with building(out) as folder:
        program = traced(unscaled(request), dynamic=False).program
        torch.export.save(program, folder / PROGRAM, extra_files={CONTRACT: json.dumps(contract)})
        carry_native(request, folder)
        (folder / CONTRACT).write_text(json.dumps(contract, indent=2), encoding="utf-8")
        prove_contract("stac-mlm", folder, request)
        (folder / README).write_text(_card(request), encoding="utf-8")
        (folder / ITEM).write_text(json.dumps(_item(request, folder), indent=2), encoding="utf-8")
        answer = ours(request, given)
        parity = prove(
            "stac-mlm",
            answer.features if answer.probabilities is None else answer.probabilities,
            _answer(folder / ITEM, request, given),
            runtime=f"pystac and torch {torch.__version__.split('+', maxsplit=1)[0]}",
            compared=f"{_output_names(request)[0]} on {given.source} and noise, scaled as the item says",
        )
    return outcome(request, out, item=str(Path(out) / ITEM), parity=parity)


# ------------------------------------------------------------------------------------------------------ the item


def _item(request: Request, folder: Path) -> dict[str, Any]:
    """Return the Item of the files in `folder`."""
    task = None if request.task is None else request.task.spec.head.task
    assets = _assets(request, folder)
    what = {None: "encoder", "segment": "segmentation", "classify": "classification"}[task]
    optical = any(channel.wavelength_nm is not None for channel in request.channels)
    west, south, east, north = WORLD
    ring = [[west, south], [east, south], [east, north], [west, north], [west, south]]
    return {
        "type": "Feature",
        "stac_version": "1.1.0",
        "stac_extensions": [*MLM, FILE, *([EO] if optical else [])],
        "id": f"geomed-mae-{request.modality}-{what}-{assets['model']['file:checksum'][4:16]}",
        # Catalogues look for models by place: a raster's may be used anywhere. Medical images have no place.
        "geometry": {"type": "Polygon", "coordinates": [ring]} if request.on_ground else None,
        **({"bbox": list(WORLD)} if request.on_ground else {}),
        "properties": _properties(request, what),
        "links": [],
        "assets": assets,
    }


def _properties(request: Request, what: str) -> dict[str, Any]:
    contract, spec = request.encoder.contract, request.encoder.spec
    weights = parameters(fixed(request))
    trained = f"{contract.images} images, fingerprint {contract.fingerprint or 'not recorded'}"
    pretrained = request.pretrained and bool(contract.images)
    how = "pretrained as a masked autoencoder" if pretrained else "trained"
    return {
        "description": f"Vision transformer, {how} with geomed-mae: {what} of "
        f"{request.modality} images. Place and time of the training images are not stated, so that neither restricts "
        "the item.",
        "datetime": None,
        "start_datetime": ALWAYS[0],
        "end_datetime": ALWAYS[1],
        **({"gsd": float(np.mean(request.distance))} if request.on_ground and request.distance is not None else {}),
        "bands": [_band(entry) for entry in request.entries],
        "mlm:name": f"geomed-mae {request.modality} {what}",
        "mlm:architecture": "Vision Transformer",
        "mlm:tasks": _tasks(request),
        "mlm:framework": "PyTorch",
        "mlm:framework_version": torch.__version__.split("+", maxsplit=1)[0],
        "mlm:memory_size": 4 * weights,
        "mlm:total_parameters": weights,
        "mlm:pretrained": pretrained,
        "mlm:pretrained_source": trained if pretrained else None,
        "mlm:accelerator": None,
        "mlm:input": [_input(request)],
        "mlm:output": _outputs(request),
        "mlm:hyperparameters": {
            "embed_dim": spec.dim,
            "depth": spec.depth,
            "num_heads": spec.heads,
            "patch": list(request.patch),
            "spacing": None if request.distance is None else list(request.distance),
            "spacing_unit": "m" if request.on_ground else "mm",
        },
    }


def _band(entry: ChannelContract) -> dict[str, Any]:
    """Return a STAC 1.1 band; wavelengths in micrometres, as the extension eo has them."""
    channel, said = entry.channel, {}
    if channel.wavelength_nm is not None:
        said["eo:center_wavelength"] = round(channel.wavelength_nm / 1000, 6)
        if channel.bandwidth_nm is not None:
            said["eo:full_width_half_max"] = round(channel.bandwidth_nm / 1000, 6)
    return {
        "name": channel.name,
        "description": physics(channel),
        "unit": channel.unit,
        "data_type": "float32",
        **said,
    }


def _input(request: Request) -> dict[str, Any]:
    names = [channel.name for channel in request.channels]
    return {
        "name": "pixels",
        "description": "Values in the units of the bands; clipped by pre_processing_function, then scaled by "
        "value_scaling; 0 after that where a pixel is not valid.",
        "bands": names,
        "input": {
            "shape": [-1, len(names), *request.size],
            "dim_order": ["batch", "bands", *ROWS[len(request.size)]],
            "data_type": "float32",
        },
        "value_scaling": [_value_scaling(entry) for entry in request.entries],
        "resize_type": None,
        "pre_processing_function": _clipping(request),
    }


def _value_scaling(entry: ChannelContract) -> dict[str, Any]:
    if entry.method == "image":
        return {"type": "processing", "format": "python", "expression": OWN_SCALING}
    return {"type": "z-score", "mean": entry.center, "stddev": entry.scale}


def _clipping(request: Request) -> dict[str, Any] | None:
    ranges = [entry.value_range for entry in request.entries]
    if not any(ranges):
        return None
    if len(set(ranges)) == 1:
        low, high = (repr(limit) for limit in ranges[0])
    else:
        limits = [pair or (-np.inf, np.inf) for pair in ranges]
        shape = f"reshape({[len(ranges), *[1] * len(request.size)]})"
        low, high = (f"numpy.array({json.dumps([pair[side] for pair in limits])}).{shape}" for side in (0, 1))
        low, high = (text.replace("Infinity", "numpy.inf") for text in (low, high))
    return {
        "format": "python",
        "expression": f"numpy.clip(x, {low}, {high})",
        "description": f"x is the array (bands, {', '.join(ROWS[len(request.size)])}) in the units of the bands",
    }


def _tasks(request: Request) -> list[str]:
    if request.task is None:
        return ["similarity-search"]
    if request.task.spec.head.task == "segment":
        return ["semantic-segmentation"]
    return ["scene-classification", "classification"] if request.on_ground else ["classification"]


def _output_names(request: Request) -> tuple[str, ...]:
    return ("features", "vector") if request.task is None else ("probabilities",)


def _outputs(request: Request) -> list[dict[str, Any]]:
    """Return what comes out, in the order in which the program gives it."""
    space, dim = list(ROWS[len(request.size)]), request.encoder.spec.dim
    if request.task is None:
        shapes = [([-1, dim, *request.grid], ["embedding", *space]), ([-1, dim], ["embedding"])]
        more: dict[str, Any] = {}
    else:
        head = request.task.spec.head
        maps = head.task == "segment"
        shapes = [([-1, len(head.classes), *(request.size if maps else ())], ["class", *(space if maps else ())])]
        more = {
            "classification:classes": [
                {"value": number, "name": re.sub(r"[^0-9A-Za-z_-]+", "-", name), "description": name}
                for number, name in enumerate(head.classes)
            ]
        }
    return [
        {
            "name": name,
            "tasks": _tasks(request),
            "result": {"shape": shape, "dim_order": ["batch", *order], "data_type": "float32"},
            **more,
        }
        for name, (shape, order) in zip(_output_names(request), shapes, strict=True)
    ]


def _assets(request: Request, folder: Path) -> dict[str, Any]:
    native = (ENCODER_FOLDER if request.task is None else MODEL_FOLDER) + "/model.safetensors"
    files = {
        "model": (PROGRAM, MEDIA, ["mlm:model", "mlm:weights"], "Network and weights, a program of torch.export"),
        "weights": (native, "application/octet-stream", ["mlm:weights"], "Weights for geomed-mae, safetensors"),
        "contract": (CONTRACT, "application/json", ["metadata"], "Input and output in machine-readable form"),
        "readme": (README, "text/markdown", ["metadata"], "Model card"),
    }
    assets: dict[str, Any] = {}
    for name, (path, kind, roles, title) in files.items():
        with (folder / path).open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        assets[name] = {
            "href": f"./{path}",
            "type": kind,
            "title": title,
            "roles": roles,
            "file:size": (folder / path).stat().st_size,
            "file:checksum": SHA256_MULTIHASH + digest,
        }
    assets["model"]["mlm:artifact_type"] = "torch.export.save"
    # STAC 1.1 takes the properties' bands for a summary of those of assets, and wants these to be there.
    assets["model"]["bands"] = [{"name": channel.name} for channel in request.channels]
    return assets


# --------------------------------------------------------------------------------------------------------- proof


@torch.no_grad()
def _answer(path: Path, request: Request, given: Trial) -> Tensor:
    """Follow the item: open it with pystac, scale as it says, load the model that it names, return its first output."""
    import pystac
    from pystac.extensions.mlm import MLMExtension

    item = pystac.Item.from_file(str(path))
    (taken,) = MLMExtension.ext(item).input
    pixels = given.normalised.clone()
    for number, (entry, rule) in enumerate(zip(request.entries, taken.properties["value_scaling"], strict=True)):
        if rule["type"] == "z-score":
            low, high = entry.value_range or (-torch.inf, torch.inf)
            pixels[:, number] = (given.raw[:, number].clamp(low, high) - rule["mean"]) / rule["stddev"]
    model = torch.export.load(item.assets["model"].get_absolute_href()).module()
    answer = model(pixels)
    return answer[0] if isinstance(answer, tuple) else answer


def _card(request: Request) -> str:
    opening = f"""\
A STAC Item of the Machine Learning Model extension, `{ITEM}`, and the files that it describes.

```python
import pystac, torch

item = pystac.Item.from_file("{ITEM}")
model = torch.export.load(item.assets["model"].get_absolute_href()).module()
```

`item.properties["mlm:input"]` says how values become the model's input: `{PROGRAM}` scales nothing itself. Its batch is
open, its size is not. Place and time of the training images are not told: the item's geometry is
{"the world" if request.on_ground else "null"}, its times are all. geomed-mae opens this folder too."""
    return model_card(
        request,
        title=f"geomed-mae {request.modality} model as a STAC Item",
        opening=opening,
        tags=("stac", "stac-mlm"),
        values=NORMALISED,
    )
