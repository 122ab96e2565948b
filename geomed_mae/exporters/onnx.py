"""Export to ONNX: one file that onnxruntime, and most else that runs networks, opens. Opset 20.

Values in the channels' units go in: clipping and scaling are part of the graph. Batch and size are open where they can
be. The contract is in the file's metadata_props. For QGIS see `onnx_qgis`.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

from geomed_mae.exporters.card import CONTRACT, README, contract_json, model_card
from geomed_mae.exporters.folder import building, carry_native, outcome
from geomed_mae.exporters.graph import GRAPH_TOLERANCE, Graph, answers, comparisons, size_note, traced
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

TAKES = ("encoder", "model")
FILE = "model.onnx"
OPSET = 20

OPENING = """The file `{file}` is the whole model, weights included, in ONNX (opset {opset}).

```python
import onnxruntime

session = onnxruntime.InferenceSession("{file}")
{outputs} = session.run(None, {{"pixels": pixels}})  # pixels: float32 ({axes})
```

{what} `session.get_modelmeta().custom_metadata_map` has the contract, every value as JSON: `channels`, `units`,
`wavelength_nm`, `mean`, `std`, `value_range`, `size`, `patch`, `spacing` and more."""

ENCODER = "`features` (batch, dim, *grid) are the tokens on their grid, `vector` (batch, dim) is their mean."
TASK = "`probabilities` are those of the classes below."


def export(request: Request, out: Path) -> dict[str, Any]:
    """Write `out` with model.onnx, open it in onnxruntime, and compare: batches of 1 and 3 and, where any size goes in,
    two sizes.

    Returns:
        folder, files, channels, input_size, any_size (whether other sizes go in), outputs, opset, seconds that it
        took, and `parity`.

    Raises:
        MissingExtraError: onnx, onnxscript or onnxruntime is not installed.
        ConfigError: `out` holds something, or the head has no ONNX form.
        IntegrityError: the file does not compute the same; nothing is left behind.
        OutputError: the folder cannot be written.
    """
    require_packages("onnx")
    start = time.monotonic()
    graph = traced(request)
    contract = contract_json(request, **graph.takes())
    with building(out) as folder:
        model = onnx_model(graph, opset=OPSET)
        describe(model, contract_properties(graph, contract))
        (folder / FILE).write_bytes(model.SerializeToString())
        del model
        parity = _parity(graph, folder / FILE)
        (folder / CONTRACT).write_text(json.dumps(contract, indent=2), encoding="utf-8")
        prove_contract("onnx", folder, request)
        (folder / README).write_text(_card(graph), encoding="utf-8")
        carry_native(request, folder)
    return outcome(
        request,
        out,
        any_size=graph.dynamic,
        outputs=list(graph.outputs),
        opset=OPSET,
        seconds=round(time.monotonic() - start, 1),
        parity=parity,
    )


def _parity(graph: Graph, file: Path) -> dict[str, Any]:
    """Return the largest difference over sizes, batches and outputs."""
    session = opened(file)
    found = []
    for given, answer in comparisons(graph):
        for fed in (given.fed, given.fed[:1]):
            found += held_against(
                graph,
                session,
                fed.numpy(),
                answers(graph, answer),
                target="onnx",
                source=given.source,
                tolerance=GRAPH_TOLERANCE,
            )
    return max(found, key=lambda one: one["largest_relative_difference"])


def _card(graph: Graph) -> str:
    request = graph.request
    axes = ", ".join(["batch", "channel", *("slice", "row", "column")[-len(request.size) :]])
    opening = OPENING.format(
        file=FILE,
        opset=OPSET,
        outputs=", ".join(graph.outputs) + ("" if len(graph.outputs) > 1 else ","),
        axes=axes,
        what=ENCODER if request.task is None else TASK,
    )
    return model_card(
        request,
        title="A geomed-mae model in ONNX",
        opening=opening,
        library="onnxruntime",
        tags=("onnx",),
        notes=(size_note(graph),),
    )
